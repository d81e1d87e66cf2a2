"""Adapters of vision-language models gated on rows of images, as their user meets them."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.adapters import adapter
from tests.plugin.conftest import LOOSE, Gate
from tests.releases import sees
from tests.seeing import CHATS, gallery, png, said, seeing

HEAD = r".*(vision_tower\.head|lm_head).*"
WIDE = ("--nullspace-threshold=divergence:5:6", "--nullspace-threshold=loss-rise:5:6")
SHOWN = ("--nullspace-calib-dataset=photos",)


@pytest.fixture
def folder(folder: Path) -> Path:
    """The test's own folder, with a gallery and a text in it."""
    gallery(folder / "photos")
    return folder


@sees
def test_an_adapter_is_gated_whole(folder: Path, gate: Gate) -> None:
    """Every layer of tower, merger and text path has its verdict, with the drift; saved, replayed and compared."""
    seeing(folder, "qwen2_5_vl", exclude_modules=HEAD)
    args = (*LOOSE, *WIDE, "-v")
    result = gate(*args, *SHOWN, "--nullspace-save-stats=s.json", model="adapter", quick=(), auto=True)
    result.assert_outcomes(passed=23)
    output = result.stdout.str()
    assert "gated 21 of 21 layers: 21 green, 0 to look at, 0 red" in output
    assert "photos/metadata.jsonl: line " in output, "where the predictions changed most"
    assert "are reached by images only" not in output
    document = json.loads((folder / "s.json").read_text())
    assert (document["text"]["windows"], document["text"]["images"]) == (5, 5)
    assert document["processor"]["class"] == "Qwen2_5_VLProcessor"
    assert document["processor"]["files"].keys() == {"preprocessor_config.json"}
    rows = {entry["layer_name"]: entry["num_samples"] for entry in document["stats"]}
    assert document["text"]["tokens"] == rows["model.language_model.layers.0.mlp.up_proj"] == 119
    assert rows["model.visual.blocks.0.attn.qkv"] == 4 * rows["model.visual.merger.mlp.0"] == 156, "patches"
    gate("--nullspace-stats=s.json", *args, model=None, quick=(), auto=True).assert_outcomes(passed=23)
    earlier = ("--nullspace-compare=s.json", "--nullspace-compare-fail=leakage:1")
    compared = gate(*args, *SHOWN, *earlier, model="adapter", quick=(), auto=True)
    compared.assert_outcomes(passed=23)


def test_text_alone_reaches_the_text_path_and_says_so(folder: Path, gate: Gate) -> None:
    """As ever, with one line more that names the other way."""
    seeing(folder, "gemma3", exclude_modules=HEAD)
    result = gate(*LOOSE, model="adapter")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert (
        "6 layers of model.vision_tower are reached by images only; to allow them: "
        "--nullspace-allow-unreached='model.vision_tower.*'; rows of images in place of the text reach them "
        "(docs/texts.md)" in result.stdout.str()
    )
    both = gate(*LOOSE, *SHOWN, "--nullspace-task-dataset=text.txt", "--nullspace-seqlen=32", model="adapter", quick=())
    assert "are reached by images only" not in both.stdout.str()


@sees
def test_conversations_with_images_are_written_by_the_processors_template(folder: Path, gate: Gate) -> None:
    """The assistant's tokens and all patches are gated; without a template, or with an image too few, one error."""
    seeing(folder, "gemma3", exclude_modules=HEAD)
    lines = [
        {"messages": [said("user", None, "what"), said("assistant", f"number {number}")], "images": [f"{number}.png"]}
        for number in range(4)
    ]
    file = folder / "photos/talks.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    args = (*LOOSE, *WIDE, "--nullspace-calib-dataset=photos/talks.jsonl", "--nullspace-chat=assistant")
    refused = gate(*args, model="adapter", quick=(), auto=True)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: *base: its processor has no chat template (looked for chat_template.jinja*"])
    (folder / "base/chat_template.jinja").write_text(CHATS["gemma3"])
    result = gate(*args, "--nullspace-save-stats=s.json", model="adapter", quick=(), auto=True)
    result.assert_outcomes(passed=22)
    document = json.loads((folder / "s.json").read_text())
    text, rows = document["text"], {entry["layer_name"]: entry["num_samples"] for entry in document["stats"]}
    assert (text["windows"], text["images"], text["chat"]["counted_tokens"]) == (4, 4, 4 * len("number 0;"))
    assert rows["model.language_model.layers.0.mlp.up_proj"] == 36
    assert rows["model.vision_tower.encoder.layers.0.mlp.fc1"] == 4 * 16, "patches"
    file.write_text(json.dumps({**lines[0], "images": []}))
    broken = gate(*args, model="adapter", quick=(), auto=True)
    assert broken.ret == pytest.ExitCode.USAGE_ERROR
    broken.stderr.fnmatch_lines(
        ["ERROR: *talks.jsonl: line 1: its messages have places for 1 images beside those that*"]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "photos",
            "*base: no processor of images lies in it *; give text alone, of a table by the name of its column*",
        ),
        ("rows.jsonl", "*rows.jsonl: line 1: 'nowhere/../../x.png' leads out of *"),
        ("sounds.jsonl", "*sounds.jsonl: column 'audio' holds sound, which is not measured; name the column of the *"),
    ],
)
def test_what_cannot_be_read_is_one_usage_error(given: str, message: str, folder: Path, gate: Gate) -> None:
    """Before any test is collected, with what to do."""
    adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    (folder / "rows.jsonl").write_text(json.dumps({"image": "nowhere/../../x.png", "text": "a"}))
    (folder / "sounds.jsonl").write_text(json.dumps({"audio": {"path": "a.wav"}, "text": "a"}))
    result = gate(f"--nullspace-calib-dataset={given}", model="adapter", quick=())
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
    if given != "photos":
        text = gate(f"--nullspace-calib-dataset={given}:text", "--nullspace-seqlen=8", model="adapter", quick=())
        text.stderr.fnmatch_lines(["*the text has 1 characters*"])


@sees
def test_an_image_that_is_cut_short_is_named_with_its_row(folder: Path, gate: Gate) -> None:
    """It fails every test by one sentence."""
    seeing(folder, "llava", target_modules=["q_proj"])
    (folder / "photos/3.png").write_bytes(png()[:200])
    result = gate(*SHOWN, model="adapter", quick=())
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "metadata.jsonl: line 4, 3.png: not a whole image: " in result.stdout.str()
    assert "Traceback" not in result.stdout.str()
