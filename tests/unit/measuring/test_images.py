"""Rows of images and text: figures and predictions of the whole model, as PEFT's own forward has them."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pyarrow
import pytest
import torch
import transformers
from pyarrow import parquet
from torch import Tensor
from torch.nn.functional import cross_entropy

from pytest_nullspace import gate
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import CheckpointError, TextError
from pytest_nullspace.measuring import drift
from pytest_nullspace.measuring.drift import Predictions
from pytest_nullspace.measuring.forward import require_images_read, telling
from pytest_nullspace.measuring.measurement import HeldAgainst, Measurement
from pytest_nullspace.measuring.spectrum import spectrum
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.text.processor import Processor, processor_of
from pytest_nullspace.text.sources import FolderText
from pytest_nullspace.text.windows import Shown, Window, distinct_rows, predicted_places, windows_hash
from tests import tiny
from tests.adapters import adapter
from tests.releases import sees
from tests.seeing import CAPTIONS, IMAGE, KINDS, gallery, png, rows, seeing
from tests.unit.model.test_peft import EXACT, figures, naive, opened

# PEFT's own, while the tests make adapters with it.
pytestmark = [
    sees,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

CPU = torch.device("cpu")
NO_HEAD = {"exclude_modules": r".*(vision_tower\.head|lm_head).*"}
"""SigLIP's pooler, of which the language model reads nothing."""
ON_TORCHVISION = "qwen2_5_vl"
"""Whose processor transformers itself builds only where torchvision is, for its videos."""


class Case:
    """An adapter of a family, its processor, and the windows of a gallery."""

    def __init__(self, folder: Path, family: str, seqlen: int = 64) -> None:
        self.directory = seeing(folder, family, **NO_HEAD)
        self.base = folder / "base"
        checkpoint, self.adapted = opened(self.directory)
        self.processor: Processor = processor_of(checkpoint, self.base, self.base)
        self.images = images = rows(FolderText(gallery(folder / "gallery")))
        self.windows: Sequence[Window] = self.processor.windows(images, range(len(images.rows)), seqlen)
        self.shown = [window.tokens for window in self.windows]

    def theirs(self) -> Any:
        """PEFT's own model."""
        return peft.PeftModel.from_pretrained(self.plain(), self.directory).get_base_model().eval()

    def plain(self) -> Any:
        """The base model alone."""
        kind: Any = type(self.adapted.model)
        return kind.from_pretrained(self.base, dtype=torch.float32).eval()

    def given(self, number: int) -> dict[str, Tensor]:
        """What transformers' own processor makes of a row."""
        row = self.images.rows[number]
        image = row.pictures[0].image()
        if ON_TORCHVISION in self.directory.parent.name:
            config = KINDS[ON_TORCHVISION].preprocessor
            seen = transformers.Qwen2VLImageProcessorPil(**config)([image], return_tensors="pt")
            places = int(seen["image_grid_thw"].prod()) // 4
            ids = [122, *[IMAGE] * places, 123, *map(ord, row.text)]
            kinds = [[int(token == IMAGE) for token in ids]]
            return {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor(kinds), **seen}
        own = transformers.AutoProcessor.from_pretrained(self.base)
        if self.processor.kind == "PaliGemmaProcessor":
            made = own(text=[own.image_token], images=[image], suffix=[row.text], return_tensors="pt")
            return {name: value for name, value in made.items() if name != "labels"}
        # BLIP-2's puts them before the text by itself.
        mark = "" if hasattr(own, "num_query_tokens") else getattr(own, "boi_token", own.image_token)
        return dict(own(text=[mark + row.text], images=[image], return_tensors="pt"))


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """That of one family."""
    folder = tmp_path / request.param
    folder.mkdir()
    return Case(folder, request.param, seqlen=128)


FAMILIES = pytest.mark.parametrize("case", [ON_TORCHVISION, "gemma3", "llava", "paligemma"], indirect=True)
MAIN = pytest.mark.parametrize("case", [ON_TORCHVISION, "gemma3"], indirect=True)
AND_TILES = pytest.mark.parametrize("case", [ON_TORCHVISION, "gemma3", "mllama"], indirect=True)
"""With one that reads its images as tiles, some of which are padding (`tests.unit.measuring.test_tiles`)."""


@pytest.mark.parametrize(
    "case", [ON_TORCHVISION, "gemma3", "llava", "llava_next", "paligemma", "idefics3", "blip_2"], indirect=True
)
def test_every_layer_is_measured_as_pefts_own_forward_has_it(case: Case) -> None:
    """Tower, projector and text path: each mean agrees with float64 arithmetic on hooks on PEFT's model to 1e-6."""
    model = case.theirs()
    caught = inputs_of(model, case)
    measured = {layer.name: layer for layer in measure(case.adapted, case.shown)}
    assert measured.keys() == caught.keys()
    assert {"vision", "text"} <= {part for name in measured for part in ("vision", "text") if part in _wing(name)}
    modules = dict(model.named_modules())
    for name, layer in measured.items():
        rows = torch.cat(caught[name])
        assert layer.rows == len(rows), name
        assert figures(layer) == pytest.approx(naive(rows, case.adapted.layers[name], modules[name]), rel=EXACT), name
        assert layer.defect is None
        assert not layer.unplaced
        assert layer.margins, "from windows, of which each is a row"


def inputs_of(model: Any, case: Case) -> dict[str, list[Tensor]]:
    """The float64 input rows of each layer with LoRA in PEFT's own ``model``, window after window."""
    caught = defaultdict[str, list[Tensor]](list)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(
                lambda _, args, __, name=name: caught[name].append(args[0].detach().double().flatten(0, -2))
            )
    with torch.inference_mode():
        for number in range(len(case.windows)):
            model(**case.given(number))
    return caught


def test_a_model_that_reads_no_text_without_an_image_is_gated_whole_on_images(tmp_path: Path) -> None:
    """No part of a gate asks BLIP-2 for text alone, such as whether a token begins one: its drift is measured too."""
    report = gate(seeing(tmp_path, "blip_2"), str(gallery(tmp_path / "gallery")), calib_size=2)
    assert report.run.drift is not None
    assert all(layer.defect is None for layer in report.run.layers)


@pytest.mark.parametrize(("queries", "count", "told"), [(4, 2, (4, 8)), (None, 1, (0, 4)), (2, 1, (2, 4))])
def test_an_image_of_which_a_model_would_read_a_part_alone_is_refused(
    queries: int | None, count: int, told: tuple[int, int], tmp_path: Path
) -> None:
    """BLIP-2 says nothing where fewer tokens stand for images than it makes of them: the row is told, not measured."""
    directory = seeing(tmp_path, "blip_2")
    (tmp_path / "base" / "processor_config.json").write_text(
        json.dumps({"num_query_tokens": queries, "processor_class": "Blip2Processor"})
    )
    images = [[{"bytes": png(seed=seed), "path": None} for seed in range(count)] for _ in range(2)]
    parquet.write_table(pyarrow.table({"images": images, "text": list(CAPTIONS[:2])}), tmp_path / "rows.parquet")
    with pytest.raises(CheckpointError, match=r"row \d: {} tokens stand for images of .* makes {}, ".format(*told)):
        gate(directory, tmp_path / "rows.parquet", calib_size=2)


def _wing(name: str) -> str:
    return "vision" if any(part in name for part in ("visual", "vision", "projector")) else "text"


@AND_TILES
def test_predictions_are_held_against_the_bases_on_text_alone(case: Case) -> None:
    """Losses and divergence are of where a token comes next that stands for no image, and agree with float64."""
    switched_off = case.adapted.switched_off
    assert switched_off is not None
    predictions = Predictions(switched_off, len(case.windows), CPU, predicted_places(case.windows))
    assert measure(case.adapted, case.shown, predictions=predictions)
    found = predictions.of(len(case.windows))
    base, theirs, sums, count = case.plain(), case.theirs(), torch.zeros(3, dtype=torch.float64), 0
    for number in range(len(case.windows)):
        given = case.given(number)
        tokens = given["input_ids"][0]
        with torch.inference_mode():
            p, q = (model(**given).logits[0].double().log_softmax(-1) for model in (base, theirs))
        targets = tokens[1:].masked_fill(tokens[1:] == IMAGE, -100)
        losses = [cross_entropy(of[:-1], targets, reduction="sum", ignore_index=-100) for of in (p, q)]
        sums += torch.stack([*losses, (p.exp() * (p - q)).sum(-1)[:-1][targets >= 0].sum()])
        count += int((targets >= 0).sum())
    want = [float(of) / count for of in sums]
    assert [found.base_loss, found.adapted_loss, found.divergence] == pytest.approx(want, rel=EXACT)
    assert found.tokens == count < sum(map(len, case.shown))


@MAIN
def test_rows_that_are_drawn_are_spread_over_tokens_and_patches(case: Case) -> None:
    """With fewer rows a layer each counts some of its own of every window, whatever they are, and no more."""
    most = sum(map(len, case.shown)) // 2
    for layer in measure(case.adapted, case.shown, max_rows=most):
        assert most / 2 < layer.rows <= most or "visual.merger" in layer.name, layer.name
        assert layer.by_window is not None
        assert all(layer.by_window.rows)


@pytest.mark.parametrize("case", [ON_TORCHVISION, "gemma3", "llava", "paligemma", "mllama"], indirect=True)
def test_windows_of_one_form_share_a_forward(case: Case, tmp_path: Path) -> None:
    """Images of one size under texts of one length run together, and each figure and margin is that of one by one."""
    captions = ["a cat on it", "a dog there", "rain for me", "of no size."]
    for number, caption in enumerate(captions):
        (tmp_path / f"{number}.png").write_bytes(png(16 if number == 3 else 24, 16, seed=number))
        (tmp_path / f"{number}.txt").write_text(caption)
    images = rows(FolderText(tmp_path))
    shown = [window.tokens for window in case.processor.windows(images, range(4), 64)]
    together: list[int] = []
    model: Any = case.adapted.model
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: together.append(len(args[0])))
    try:
        for cap in (None, 40):
            alone = measure(case.adapted, shown, max_rows=cap)
            assert set(together) == {1}
            together.clear()
            found = measure(case.adapted, shown, batch_size=4, max_rows=cap)
            assert max(together) == (3 if case.processor.kind == "Qwen2_5_VLProcessor" else 4)
            together.clear()
            for layer, one in zip(found, alone, strict=True):
                assert layer.rows == one.rows
                assert layer.norms == pytest.approx(one.norms, rel=EXACT), layer.name
                assert layer.by_window is not None
                assert one.by_window is not None
                assert layer.by_window.rows == one.by_window.rows, layer.name
                assert layer.margins == pytest.approx(one.margins, rel=1e-4), layer.name
    finally:
        handle.remove()


@MAIN
def test_of_what_the_assistant_says_the_rows_alone_count_and_all_parts_of_images(case: Case) -> None:
    """In the text path the chosen tokens, in tower and projector every patch, be there as many as tokens or not."""
    model = case.theirs()
    caught = inputs_of(model, case)
    counted = [[len(tokens) - 1, len(tokens) - 3] for tokens in case.shown]
    modules = dict(model.named_modules())
    for batch_size in (1, 4):
        for layer in measure(case.adapted, case.shown, counted=counted, batch_size=batch_size):
            parts = caught[layer.name]
            if _wing(layer.name) == "text":
                parts = [part[places] for part, places in zip(parts, counted, strict=True)]
            wanted = naive(torch.cat(parts), case.adapted.layers[layer.name], modules[layer.name])
            assert layer.rows == sum(map(len, parts)), layer.name
            assert figures(layer) == pytest.approx(wanted, rel=EXACT), layer.name
            assert not layer.unplaced


def test_the_spectrum_reaches_the_tower(tmp_path: Path) -> None:
    """Each layer has its spectrum, though the first row holds no image."""
    case = Case(tmp_path, "gemma3")
    text = Shown(map(ord, "no image in it"), dict, frozenset({IMAGE}), "", "row 0")
    found = spectrum(case.adapted, [text, *case.shown], list(case.adapted.layers))
    assert found.keys() == case.adapted.layers.keys()


def test_windows_tell_other_images_apart(tmp_path: Path) -> None:
    """The same text with another image is another window, with rows of its own; placeholders are no language."""
    case = Case(tmp_path, "llava")
    gallery(tmp_path / "gallery", ["the same"] * 2)
    images = rows(FolderText(tmp_path / "gallery"))
    one, other = case.processor.windows(images, range(2), 64)
    assert one.tokens == other.tokens
    assert windows_hash([one]) != windows_hash([other])
    assert distinct_rows([one, other]) == 2 * distinct_rows([one]) == 2 * len(one.tokens)
    assert bytes(one.predicted) == b"the same"
    again = case.processor.windows(images, range(2), 64)
    assert windows_hash(again) == windows_hash([one, other]), "a row read again is the same"


def test_an_image_that_changes_while_it_is_measured_is_refused(tmp_path: Path) -> None:
    """Adapter, base and digest read it in turn, so another image in its place would make figures of none of the two."""
    case = Case(tmp_path, "llava")
    gallery(tmp_path / "gallery", ["the same"] * 2)
    shown = case.processor.windows(rows(FolderText(tmp_path / "gallery")), range(2), 64)
    first, other, *_ = sorted((tmp_path / "gallery").glob("*.png"))
    first.write_bytes(other.read_bytes())
    assert measure(case.adapted, [shown[1].tokens])
    with pytest.raises(TextError, match=r"line 1: its image changed while it was read; run again"):
        measure(case.adapted, [shown[0].tokens])


def test_a_long_text_is_cut_and_an_image_is_not(tmp_path: Path) -> None:
    """What goes beside the tokens is cut with them; an image beyond the window's end is named with its row."""
    case = Case(tmp_path, ON_TORCHVISION, seqlen=20)
    assert [len(tokens) for tokens in case.shown] == [min(8 + len(CAPTIONS[0]), 20), 20, 20, 20, 15]
    beside = case.shown[0].beside() if isinstance(case.shown[0], Shown) else {}
    assert beside["mm_token_type_ids"].shape == (1, 20)
    assert measure(case.adapted, case.shown)
    with pytest.raises(
        ValueError, match="line 3: its images end at token 17, and a window has 16; raise --nullspace-seq"
    ):
        case.processor.windows(case.images, [2], 16)


def test_a_model_that_takes_no_images_is_refused(tmp_path: Path) -> None:
    """One sentence for a model of text alone, and one for a processor of another model."""
    case = Case(tmp_path / "seeing", "llava")
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"])
    checkpoint, adapted = opened(directory)
    with pytest.raises(CheckpointError, match="is run as a LlamaForCausalLM, which takes no images; give text alone"):
        require_images_read(adapted, checkpoint, "pixel_values", case.shown)
    other = Case(tmp_path / "other", "gemma3")
    with pytest.raises(CheckpointError, match="a LlavaForConditionalGeneration, cannot read what the processor makes"):
        require_images_read(case.adapted, open_checkpoint(case.directory), "pixel_values", other.shown)


def test_a_lost_first_token_is_looked_for_in_the_text_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is asked with and without it on the row's text, in which nothing stands for an image."""
    case = Case(tmp_path, "gemma3")
    asked: list[Sequence[int]] = []

    def begun(_: object, tokens: Sequence[int], *__: object) -> tuple[float, float]:
        asked.append(tokens)
        return 9.0, 1.0

    monkeypatch.setattr(drift, "begun", begun)
    assert case.adapted.switched_off is not None
    held = HeldAgainst("the base", case.adapted.switched_off, CPU)
    settings: Any = None
    run = Measurement(
        open_checkpoint(case.directory), settings, case.adapted, {"text": case.windows}, 64, "", None, held
    )
    assert run.unbegun()["first_token"]["base_loss"] == 9.0
    assert asked == [tuple(token for token in case.shown[0] if token != IMAGE)]
    assert bytes(asked[0]).endswith(CAPTIONS[0].encode())


def test_what_tells_most_is_run_first() -> None:
    """The window that shows where a forward may end is one with an image, if there is any."""
    text = Shown((1, 2), dict, frozenset({7}), "", "")
    seen = Shown((1, 7), dict, frozenset({7}), "", "")
    assert telling([text, seen]) is seen
    assert telling([text]) is text
