"""Runs of one text on another base, tokenizer or library are refused; on a copy of the same they compare."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pytest_nullspace import gate
from pytest_nullspace.errors import OptionError
from tests import tiny
from tests.adapters import adapter


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter, its base, a text, and the saved run of them."""
    folder = tmp_path_factory.mktemp("comparable")
    adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    measured(folder, "base").save(folder / "before.json")
    return folder


def measured(folder: Path, base: str, **options: Any) -> Any:
    """The adapter gated on a few windows over the base of that name."""
    return gate(
        folder / "adapter",
        str(folder / "text.txt"),
        base=folder / base,
        calib_size=4,
        seqlen=16,
        device="cpu",
        **options,
    )


def against(before: Path, change: Callable[[Path], object], *allow: str) -> Any:
    """The same over a copy of the base that was changed, held against the run before."""
    shutil.copytree(before / "base", before / "other", dirs_exist_ok=True)
    change(before / "other")
    return measured(before, "other", compare=before / "before.json", compare_allow=list(allow))


def louder(base: Path) -> None:
    """Other embeddings, of which no layer's norm tells, but a little."""
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    save_file({**tensors, name: tensors[name] * 1.0001}, base / "model.safetensors", {"format": "pt"})


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    """What edits a JSON file of the base."""

    def edited(base: Path) -> None:
        file = base / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edited


def test_a_copy_of_the_same_base_compares(before: Path) -> None:
    """What tells of the making of a config decides nothing, nor does how a tokenizer pads; nothing is in doubt."""

    def same(base: Path) -> None:
        edit("config.json", transformers_version="5.0.0", _name_or_path="elsewhere")(base)
        edit("tokenizer.json", padding=None)(base)

    shutil.copytree(before / "base", before / "copy", dirs_exist_ok=True)
    same(before / "copy")
    found = measured(before, "copy", compare=before / "before.json")
    told = found.run.about
    assert set(told["base_model"]) == {"files", "config_sha256", "quantisation"}
    assert told["model_class"] == "LlamaForCausalLM"
    assert {"peft", "tokenizers"} <= set(told["libraries"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (louder, "base-files"),
        (edit("config.json", rms_norm_eps=1e-4), "config"),
        (edit("tokenizer.json", normalizer={"type": "NFC"}), "tokenizer"),
    ],
)
def test_another_base_or_tokenizer_is_refused_by_name(
    before: Path, change: Callable[[Path], object], said: str
) -> None:
    """Its bytes, its config or its tokenizer are others: refused with both digests and what allows it, and allowed."""
    with pytest.raises(OptionError, match=rf"not comparable: {said} \(\S+, was \S+\).*compare-allow={said}"):
        against(before, change)
    against(before, change, said)
