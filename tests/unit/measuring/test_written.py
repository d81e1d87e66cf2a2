"""Text that a base writes itself: drawn from its own predictions, had once, and the same ever after."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import OptionError, TextError
from pytest_nullspace.measuring.digests import base_sha256
from pytest_nullspace.measuring.writing import ROWS, first_token, stretches
from pytest_nullspace.measuring.written import Request, Written, cache_folder, had, require_base
from pytest_nullspace.model import load_model
from pytest_nullspace.text.sources import FileText
from tests import tiny
from tests.adapters import adapter
from tests.plain import read_text

CPU = torch.device("cpu")
WRITES: dict[str, Any] = {"count": ROWS, "seqlen": 24, "seed": 5}
LOUD: dict[str, Any] = {"initializer_range": 0.5, "tie_word_embeddings": False}


def decode(ids: Sequence[int]) -> str:
    """Each id as a character of its own that is no blank."""
    return "".join(chr(0x4E00 + token) for token in ids)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder() / "self"


def naive(model: Any, length: int, seed: int) -> list[list[int]]:
    """Rows of ``length`` tokens drawn one after the other, each from a whole forward without any cache."""
    rows = torch.full((ROWS, 1), first_token(model))
    torch.manual_seed(seed)
    with torch.inference_mode():
        for _ in range(length):
            logits = model(input_ids=rows, use_cache=False).logits[:, -1]
            rows = torch.cat((rows, torch.multinomial(logits.softmax(-1), 1)), dim=-1)
    written: list[list[int]] = rows[:, 1:].tolist()
    return written


def test_it_is_drawn_from_the_predictions_at_temperature_one() -> None:
    """Every token is that which a forward without a cache would draw, whatever the model's folder says of writing."""
    model: Any = tiny.llama(**LOUD, eos_token_id=None)
    model.generation_config = GenerationConfig(top_k=1, temperature=0.1, repetition_penalty=3.0)
    state = torch.get_rng_state()
    found = stretches(model, decode, CPU, **WRITES)
    assert model.generation_config.top_k == 1
    assert torch.equal(torch.get_rng_state(), state), "the user's own numbers go on as they would have"
    assert found == [decode(row) for row in naive(model, 23, 5)]
    assert found != stretches(model, decode, CPU, **{**WRITES, "seed": 6})


def test_short_documents_fill_a_stretch_together() -> None:
    """Where the model ends its texts they are cut there, and as many stand in a stretch as its tokens need."""
    model: Any = tiny.llama(**LOUD, eos_token_id=list(range(40)))
    found = stretches(model, decode, CPU, **WRITES)
    rows = [next((row[:i] for i, t in enumerate(row) if t < 40), row) for row in naive(model, 23, 5)]
    documents = [decode(row) for row in rows if row]
    assert len(found) == ROWS
    assert all(len(stretch.replace("\n\n", "")) >= 23 for stretch in found)
    assert "\n\n".join(found).startswith("\n\n".join(documents[:2]))


def test_a_base_that_writes_nothing_is_refused() -> None:
    """One that ends each text at once is told after a bounded number of tries."""
    model: Any = tiny.llama(**LOUD, eos_token_id=list(range(128)))
    with pytest.raises(TextError, match=r"ends its texts so soon that .* not enough for 8 windows of 24 tokens"):
        stretches(model, decode, CPU, **WRITES)


@pytest.mark.parametrize(
    ("told", "first"),
    [({"bos_token_id": 7, "eos_token_id": 9}, 7), ({"bos_token_id": None, "eos_token_id": [9, 11]}, 9),
     ({"bos_token_id": None, "eos_token_id": None}, 0), ({"bos_token_id": 4000, "eos_token_id": 9}, 9)],
)  # fmt: skip
def test_it_begins_where_documents_do(told: dict[str, Any], first: int) -> None:
    """At the token that begins a text, or that ends one, or at the first; one that the model lacks is none."""
    assert first_token(tiny.llama(**told)) == first


def request(**changes: Any) -> Request:
    return Request(**{
        "base_sha256": "0" * 64, "tokenizer": {}, "windows": 2, "seqlen": 8, "seed": 42, "dtype": "float32",
        "device": "cpu", **changes,
    })  # fmt: skip


def test_it_is_written_once(cache: Path) -> None:
    """The second time it is what was kept; another request is another text; what is broken is written anew."""
    calls: list[int] = []

    def write() -> list[str]:
        calls.append(0)
        return ["one é", "two"]

    first = had(request(), write, 1)
    again = had(request(), write, 1)
    assert len(calls) == 1
    assert (first.text, first.starts) == (again.text, again.starts) == ("one é\n\ntwo", (0, 7))
    assert (first.about["was_kept"], again.about["was_kept"]) == (False, True)
    file = cache / request().file_name
    assert again.about["kept"] == str(file)
    assert read_text(FileText(file)) == first.text, "the file can be given as a text"
    had(request(seed=43), write, 1)
    assert len(calls) == 2
    for broken in (b"", b"{}", b'{"text": [3]}', b"\xff", b"[" * 100_000):
        file.write_bytes(broken)
        assert had(request(), write, 1).text == first.text
    assert len(calls) == 7
    assert {path.suffix for path in cache.iterdir()} == {".json", ".lock"}


def test_without_a_place_to_keep_it_it_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache folder cannot be made the text is written each time, and the run tells that it was not kept."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = had(request(), lambda: ["a"], 1)
    assert (found.text, found.about["kept"]) == ("a", None)


def test_a_text_of_blanks_is_refused(cache: Path) -> None:
    """Nothing can be measured on it."""
    with pytest.raises(TextError, match="writes nothing but blanks"):
        had(request(), lambda: [" ", "\n"], 1)


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1), min_size=1))
def test_each_stretch_begins_where_its_start_says(parts: list[str]) -> None:
    """A window that is read from a start finds that stretch."""
    written = Written(tuple(parts), {})
    assert [written.text[start:][: len(part)] for start, part in zip(written.starts, parts, strict=True)] == parts


def test_the_base_is_known_under_every_adapter(tmp_path: Path) -> None:
    """Two directories of one base have one digest, whatever their adapters; another base and another config do not."""

    def digest(name: str, **how: Any) -> str:
        return base_sha256(open_checkpoint(tiny.lora_null(tmp_path / name, **how)), None)

    one = digest("one")
    assert digest("two", rank=2, up_scale=2.0) == one

    def heavier(tensors: dict[str, torch.Tensor], _: object) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2

    def wider(_: object, config: dict[str, Any]) -> None:
        config["rope_theta"] = 5.0

    assert len({one, digest("three", change=heavier), digest("four", change=wider)}) == 3
    directory = adapter(tmp_path, tiny.llama(), r=2, target_modules=["q_proj"])
    of_peft = base_sha256(open_checkpoint(directory), tmp_path / "base")
    assert of_peft == base_sha256(open_checkpoint(directory), tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert base_sha256(open_checkpoint(directory), tmp_path / "base") != of_peft


def oblique(tensors: dict[str, torch.Tensor], _: object) -> None:
    """Makes rows of B that are no longer orthonormal, as v1 has them, so that W_res is not W."""
    for name in tensors:
        if name.endswith("BLinear.weight"):
            tensors[name] = tensors[name] + 0.5


def test_an_adapter_that_is_not_its_base_when_off_is_refused(tmp_path: Path) -> None:
    """What it would write were another model's, and one sentence says so."""
    checkpoint = open_checkpoint(tiny.lora_null(tmp_path / "ft", change=oblique))
    with pytest.raises(
        OptionError, match=r"=self: .* with its adapter switched off is not its base model, .*; give a text"
    ):
        require_base(load_model(checkpoint), checkpoint)


@pytest.mark.parametrize("make", [tiny.lora_null, lambda f: adapter(f, tiny.llama(), r=2, target_modules=["q_proj"])])
def test_it_is_the_base_that_writes(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """With the adapter switched off the text is that of the base as it was before it was adapted."""
    checkpoint = open_checkpoint(make(tmp_path / "ft"))
    adapted = load_model(checkpoint)
    require_base(adapted, checkpoint)
    assert adapted.switched_off is not None
    with adapted.switched_off() as base:
        found = stretches(base, decode, CPU, **WRITES)
    assert found == stretches(tiny.llama(), decode, CPU, **WRITES)
    assert found != stretches(adapted.model, decode, CPU, **WRITES)
