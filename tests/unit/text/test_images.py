"""Rows of images: how folders and tables give them, and what of a stranger's image and processor is refused."""

import io
import json
import struct
import sys
import zlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import transformers
from PIL import Image, ImageFile
from pyarrow import parquet

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import CheckpointError, TextError
from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.inputs import read_texts
from pytest_nullspace.settings import Settings
from pytest_nullspace.text.conversations import WHOLE
from pytest_nullspace.text.images import MOST_PIXELS, Images, Picture, require_pillow
from pytest_nullspace.text.processor import Processor, processor_of
from pytest_nullspace.text.sources import FileText, FolderText
from pytest_nullspace.text.tokenizer import load_tokenizer
from tests import tiny
from tests.adapters import adapter
from tests.plain import read_text
from tests.releases import sees
from tests.seeing import CAPTIONS, KINDS, START, gallery, image, png, processor, rows, tokenizer

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

STRUCT = [{"bytes": png(seed=number), "path": f"{number}.png"} for number in range(3)]
HF_IMAGE = {b"huggingface": json.dumps({"info": {"features": {"photo": {"_type": "Image"}}}}).encode()}
HF_AUDIO = {b"huggingface": json.dumps({"info": {"features": {"clip": {"_type": "Audio"}}}}).encode()}
TEXTS = ["one", "two", "three"]


def table(folder: Path, columns: Mapping[str, list[Any]], metadata: Any = None) -> Path:
    """A parquet file of these columns."""
    held = pyarrow.table(dict(columns))
    parquet.write_table(held if metadata is None else held.replace_schema_metadata(metadata), folder / "rows.parquet")
    return folder / "rows.parquet"


def images(file: Path, column: str | None = None) -> Images:
    return rows(FolderText(file, None, column) if file.is_dir() else FileText(file, column))


def told(found: Images) -> list[tuple[str, int]]:
    """The text of each row, and how many images it has."""
    return [(row.text, len(row.pictures)) for row in found.rows]


class TestRows:
    """Where images and their text lie."""

    def test_a_folder_with_metadata(self, tmp_path: Path) -> None:
        """Each line names its image; what it does not name is left out, and another column is taken by its name."""
        gallery(tmp_path)
        (tmp_path / "unnamed.png").write_bytes(png())
        assert told(images(tmp_path)) == [(caption, 1) for caption in CAPTIONS]
        lines = [json.dumps({"file_name": "0.png", "text": "no", "said": "yes"})]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        assert told(images(tmp_path, "said")) == [("yes", 1)]
        with pytest.raises(TextError, match="has no column 'other'; its columns: file_name, text, said"):
            images(tmp_path, "other")

    def test_a_folder_with_a_csv_or_text_beside_or_nothing(self, tmp_path: Path) -> None:
        """Metadata as CSV, a text file of an image's name, and neither; folders below are looked through."""
        for name in ("b/1.png", "a/0.JPG"):
            (tmp_path / name).parent.mkdir()
            image().save(tmp_path / name)
        assert told(images(tmp_path)) == [("", 1), ("", 1)]
        (tmp_path / "a/0.txt").write_text("beside it\n")
        assert told(images(tmp_path)) == [("beside it", 1), ("", 1)]
        assert told(rows(FolderText(tmp_path, "b"))) == [("", 1)]
        (tmp_path / "metadata.csv").write_text("file_name,caption\nb/1.png,in a table\n")
        assert told(images(tmp_path)) == [("in a table", 1)]

    @pytest.mark.parametrize(
        ("columns", "metadata"),
        [
            ({"image": STRUCT, "text": TEXTS}, None),
            ({"photo": STRUCT, "caption": TEXTS}, HF_IMAGE),
            ({"image": [of["bytes"] for of in STRUCT], "label": [1, 2, 3], "said": TEXTS}, None),
            ({"images": [[of] for of in STRUCT], "question": TEXTS}, None),
        ],
    )
    def test_a_parquet_with_images(self, columns: Mapping[str, list[Any]], metadata: Any, tmp_path: Path) -> None:
        """The struct of datasets, bytes alone and lists are images; the text is found as of a text."""
        assert told(images(table(tmp_path, columns, metadata))) == [(text, 1) for text in TEXTS]

    def test_a_column_of_the_text_reads_it_alone(self, tmp_path: Path) -> None:
        """Of both columns either is read by its name, or both."""
        file = table(tmp_path, {"image": STRUCT, "text": TEXTS, "other": ["x", "y", "z"]})
        assert read_text(FileText(file, "text")) == "one\n\ntwo\n\nthree"
        assert told(images(file, "image")) == [("", 1)] * 3
        assert told(images(file, "image+other")) == [("x", 1), ("y", 1), ("z", 1)]
        with pytest.raises(TextError, match=r"has no column 'image\+nothing'; its columns: image, text, other"):
            read_text(FileText(file, "image+nothing"))

    def test_json_lines_name_files_beside_them(self, tmp_path: Path) -> None:
        """Paths lie below the file's folder; a row may have several images, or none."""
        gallery(tmp_path / "shots")
        lines = [{"image": "shots/0.png", "text": "one"}, {"image": ["shots/1.png", "shots/2.png"], "text": "two"}]
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, [*lines, {"text": "none"}])))
        found = images(file)
        assert told(found) == [("one", 1), ("two", 2), ("none", 0)]
        assert found.rows[1].where == f"{file}: line 2"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("../0.png", "leads out of .*; put the images beside the file, or below"),
            ("/etc/passwd", "leads out of"),
            ("https://example.com/a.png", "is not at hand, and nothing is fetched; save the images' bytes"),
        ],
    )
    def test_a_path_that_leads_elsewhere(self, name: str, message: str, tmp_path: Path) -> None:
        """Nothing is opened outside the folder, and nothing is fetched."""
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps({"image": name, "text": "one"}))
        with pytest.raises(TextError, match=f"line 1: .*{message}"):
            read_text(FileText(file))

    @pytest.mark.parametrize(
        ("columns", "metadata"), [({"audio": STRUCT, "text": TEXTS}, None), ({"clip": STRUCT}, HF_AUDIO)]
    )
    def test_sound_is_refused_by_name(self, columns: Mapping[str, list[Any]], metadata: Any, tmp_path: Path) -> None:
        """A column of sound is named, and its text is read where that is asked for."""
        file = table(tmp_path, columns, metadata)
        with pytest.raises(TextError, match=f"column '{next(iter(columns))}' holds sound, which is not measured"):
            read_text(FileText(file))
        if "text" in columns:
            assert read_text(FileText(file, "text")) == "one\n\ntwo\n\nthree"

    def test_a_folder_of_sound(self, tmp_path: Path) -> None:
        """It is told as what it is."""
        (tmp_path / "a.wav").write_bytes(b"RIFF")
        with pytest.raises(TextError, match="holds sound, which is not measured; give text or images"):
            read_text(FolderText(tmp_path))

    def test_a_dataset_that_was_saved(self, tmp_path: Path) -> None:
        """Images of datasets' own kind are read by their bytes, not opened by that library."""
        import datasets

        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        held = datasets.Dataset.from_dict({"image": STRUCT, "text": TEXTS}, features=features)
        held.save_to_disk(tmp_path / "saved")
        found = images(tmp_path / "saved")
        assert told(found) == [(text, 1) for text in TEXTS]
        assert isinstance(found.rows[0].pictures[0].held, bytes)

    def test_which_column_is_meant_must_be_clear(self, tmp_path: Path) -> None:
        """Two columns of images, or of text, are listed."""
        with pytest.raises(TextError, match="holds images in left, right; say which"):
            images(table(tmp_path, {"left": STRUCT, "right": STRUCT}))
        with pytest.raises(TextError, match=r"FILE:image\+caption; its columns: image, a, b"):
            images(table(tmp_path, {"image": STRUCT, "a": TEXTS, "b": TEXTS}))

    def test_a_chat_that_is_demanded_is_not_left_out(self, tmp_path: Path) -> None:
        """``--nullspace-chat`` with images alone is an error, for nothing would be rendered."""
        gallery(tmp_path / "photos")
        given: dict[str, Any] = {
            "models": (), "stats": (), "base": None, "calib_dataset": "photos", "text_folder": tmp_path,
            "calib_size": 2, "seqlen": 32, "max_activation_samples": None, "seed": 42, "batch_size": None,
            "device": "cpu", "dtype": "auto", "layers": "*", "stage": "trained", "overrides": (), "save_stats": None,
            "reports": (), "ranks": Ranks(),
        }  # fmt: skip
        assert list(read_texts(Settings(**given))) == ["text"]
        with pytest.raises(TextError, match="no text holds conversations"):
            read_texts(Settings(**given, chat=WHOLE))

    def test_rows_are_drawn_once_each_by_the_seed(self, tmp_path: Path) -> None:
        """No row twice, all where there are fewer, others by another seed; the digest is of text and images."""
        found = images(gallery(tmp_path))
        assert sorted(found.drawn(3, 1)) == sorted(set(found.drawn(3, 1)))
        assert list(found.drawn(9, 1)) == [0, 1, 2, 3, 4]
        assert len({tuple(found.drawn(3, seed)) for seed in range(20)}) > 5
        before = found.sha256()
        (tmp_path / "0.png").write_bytes(png(seed=99))
        assert images(tmp_path).sha256() != before


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


class TestHostileImages:
    """An image is a stranger's file."""

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (png()[:200], "not a whole image: .*truncated.*; replace or remove it"),
            (b"not an image", r"no image that is read \(PNG, JPEG, WEBP, GIF, BMP, TIFF\); replace or remove it"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that is read"),
            (bomb(20_000, 20_000), r".*; scale it down"),
            (bomb(9_500, 9_500), r".*; scale it down"),
        ],
    )
    def test_what_is_refused(self, data: bytes, message: str) -> None:
        """Each is one sentence that names the row."""
        with pytest.raises(TextError, match=f"^rows.parquet: row 3: {message}"):
            Picture(data, "rows.parquet: row 3").image()

    def test_the_bound_is_ours_whatever_pillow_was_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A conftest that lifts Pillow's own bound lifts not that of the gate."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        with pytest.raises(TextError, match=rf"has 9,500 x 9,500 pixels; at most {MOST_PIXELS:,} are read"):
            Picture(bomb(9_500, 9_500), "here").image()

    def test_a_missing_file_and_a_pipe(self, tmp_path: Path) -> None:
        """Neither is waited for."""
        with pytest.raises(TextError, match=r"line 1: .*gone\.png: the image is missing"):
            Picture(tmp_path / "gone.png", "line 1").image()

    def test_an_image_is_turned_as_its_camera_says(self) -> None:
        """As datasets turns it."""
        exif = Image.Exif()
        exif[0x0112] = 6
        stream = io.BytesIO()
        image(24, 16).save(stream, "JPEG", exif=exif)
        assert Picture(stream.getvalue(), "").image().size == (16, 24)
        assert not ImageFile.LOAD_TRUNCATED_IMAGES

    def test_without_pillow(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """One sentence says what to install; nothing else asks for it."""
        found = images(gallery(tmp_path))
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(TextError, match=r"Pillow, which reads them, is not installed; pip install .*\[images\]"):
            require_pillow(found)


Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, its base described as each family in turn; never run."""
    folder = tmp_path_factory.mktemp("made")
    adapter(folder, tiny.llama(), r=2, target_modules=["q_proj"])
    return folder


def of(made: Path, family: str, edit: Edit = lambda _: None, name: str = "preprocessor_config.json") -> Processor:
    """The processor of a family, one of its files changed."""
    tokenizer(made / "base", KINDS[family])
    (made / "base/processor_config.json").unlink(missing_ok=True)
    processor(made / "base", KINDS[family])
    file = made / "base" / name
    fields = json.loads(file.read_text())
    edit(fields)
    file.write_text(json.dumps(fields))
    return processor_of(open_checkpoint(made / "adapter"), made / "base", made / "base")


def test_an_older_transformers_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not tell which tokens stand for an image is refused by its version, and not as a bad file."""
    monkeypatch.delattr(transformers.ProcessorMixin, "image_token_ids", raising=False)
    with pytest.raises(
        CheckpointError, match=r"5\.11 or later, and \S+ is installed; pip install 'transformers>=5\.11', or gate"
    ):
        of(made, "llava")


@sees
class TestProcessor:
    """What lies beside a model is data."""

    @pytest.mark.parametrize("family", KINDS)
    def test_text_alone_has_the_tokenizers_ids(self, family: str, made: Path, tmp_path: Path) -> None:
        """A row without an image has the very tokens that its text has as a text."""
        if family == "paligemma":
            pytest.skip("it takes no text without an image")
        (tmp_path / "rows.jsonl").write_text('{"images": [], "text": "no image"}\n{"images": ["a.png"], "text": "a"}')
        (tmp_path / "a.png").write_bytes(png())
        found = of(made, family)
        held = images(tmp_path / "rows.jsonl").rows
        begin = [START] if family == "mllama" else []  # which its processor writes itself
        assert list(found.window(held[0], 64)) == [*begin, *load_tokenizer(made / "base")("no image")]
        assert found.unscored == {120}

    def test_what_holds_images_against_texts_reads_no_rows_of_both(self, made: Path) -> None:
        """CLIP's processor has no mark for an image in a text, which is said, and not that its files are bad."""
        with pytest.raises(CheckpointError, match="a CLIPProcessor puts no image among the words of a text"):
            of(made, "llava", lambda fields: fields.update(processor_class="CLIPProcessor"), "processor_config.json")

    def test_a_package_that_a_processor_wants_is_to_be_installed(self, made: Path) -> None:
        """SmolVLM's wants num2words, which is said, and not that its files are bad."""
        if find_spec("num2words") is not None:
            pytest.skip("it is installed")
        with pytest.raises(
            CheckpointError, match=r"num2words` is required .*; install that, or gate the model on text"
        ):
            of(
                made,
                "idefics3",
                lambda fields: fields.update(processor_class="SmolVLMProcessor"),
                "processor_config.json",
            )

    @pytest.mark.parametrize("mark", ["<image>", "<|image_pad|>"])
    def test_a_text_that_says_where_its_images_stand(self, mark: str, made: Path, tmp_path: Path) -> None:
        """The mark of the model, and the one that rows of any model have, are taken where they are; a count is held."""
        (tmp_path / "a.png").write_bytes(png())
        lines = [{"image": "a.png", "text": f"see {mark} here"}, {"image": "a.png", "text": f"{mark}{mark}"}]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
        found, held = of(made, "qwen2_5_vl"), images(tmp_path / "rows.jsonl")
        ids = found.window(held.rows[0], 64)
        assert bytes(token for token in ids if token != 120) == b"see  here"
        assert ids.index(120) == len("see ")
        with pytest.raises(TextError, match=r"line 2: its text says .* 2 times, and it has 1 images; mend one of them"):
            found.window(held.rows[1], 64)

    @pytest.mark.parametrize(
        ("family", "name", "fields"),
        [
            ("gemma3", "preprocessor_config.json", {"size": {"height": 1_000_000, "width": 1_000_000}}),
            ("llava", "preprocessor_config.json", {"crop_size": 100_000}),
            ("qwen2_5_vl", "preprocessor_config.json", {"min_pixels": 10**12}),
            ("qwen2_5_vl", "preprocessor_config.json", {"temporal_patch_size": 10**6}),
            ("qwen2_5_vl", "preprocessor_config.json", {"image_grid_pinpoints": [[16, 16], [10**6, 10**6]]}),
            ("gemma3", "processor_config.json", {"image_seq_length": 10**10}),
            ("gemma3", "processor_config.json", {"image_processor": {"pan_and_scan_max_num_crops": 10**9}}),
            ("gemma3", "processor_config.json", {"image_seq_length": float("nan")}),
        ],
    )
    def test_a_config_that_asks_for_too_much(self, family: str, name: str, fields: Any, made: Path) -> None:
        """Refused by its file and field, before anything is built."""
        with pytest.raises(CheckpointError, match="more than any processor asks for; give the one that was saved"):
            of(made, family, lambda held: held.update(fields), name)

    def test_an_image_that_would_become_a_giant(self, made: Path, tmp_path: Path) -> None:
        """What a small edge makes of a narrow image is held where it is resized, and Pillow is left as it was."""
        narrow = np.zeros((1, 4_000, 3), dtype=np.uint8)
        Image.fromarray(narrow).save(tmp_path / "narrow.png")
        found = of(made, "llava", lambda held: held["size"].update(shortest_edge=9_000))
        before = Image.Image.resize
        with pytest.raises(TextError, match=r"narrow.png: the model's processor would make .* pixels of an image"):
            found.window(images(tmp_path).rows[0], 64)
        assert Image.Image.resize is before

    def test_code_is_never_run(self, made: Path) -> None:
        """What ``auto_map`` names is not looked at, and classes are those of transformers alone."""
        (made / "base/trap.py").write_text(tiny.TRAP)
        code = {"AutoProcessor": "trap.Trap", "AutoImageProcessor": "trap.Trap"}
        assert of(made, "gemma3", lambda held: held.update(auto_map=code)).kind == "Gemma3Processor"
        with pytest.raises(CheckpointError, match="has no processor of its own that reads images for model_type llama"):
            of(made, "gemma3", lambda held: held.update(processor_class="Trap"), "processor_config.json")

    @pytest.mark.skipif(find_spec("torchvision") is not None, reason="they are built")
    @pytest.mark.parametrize(
        ("fields", "name", "told"),
        [
            ({"image_processor_type": "Llama4ImageProcessorFast"}, "preprocessor_config.json", "Llama4ImageProcessor"),
            ({"image_processor_type": "Lfm2VlImageProcessor"}, "preprocessor_config.json", "Lfm2VlImageProcessor"),
            ({"processor_class": "PixtralProcessor"}, "processor_config.json", "PixtralProcessor"),
        ],
    )
    def test_what_is_built_with_torchvision_alone_names_it(self, fields: Any, name: str, told: str, made: Path) -> None:
        """One sentence with the class and the package; where there is a class for Pillow that is taken."""
        with pytest.raises(CheckpointError, match=f"builds {told} with torchvision, which is not installed; install"):
            of(made, "llava", lambda held: held.update(fields), name)
        fast = of(made, "llava", lambda held: held.update(image_processor_type="CLIPImageProcessorFast"))
        assert type(fast.call.image_processor).__name__ == "CLIPImageProcessorPil"

    def test_a_processor_that_does_not_fit(self, made: Path) -> None:
        """What transformers complains of is one sentence, and so is a model without a processor."""
        with pytest.raises(
            CheckpointError, match=r"cannot build the processor of its images: .*; save the base model's"
        ):
            of(made, "gemma3", lambda held: held.update(size="large"))
        for name in ("preprocessor_config.json", "processor_config.json"):
            (made / "base" / name).unlink()
        with pytest.raises(CheckpointError, match=r"no processor of images lies in it .*; give text alone"):
            processor_of(open_checkpoint(made / "adapter"), made / "base", made / "base")
