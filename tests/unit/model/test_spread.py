"""Which devices a model is spread over, on machines that this one is not."""

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_nullspace import callback, gate
from pytest_nullspace.errors import CheckpointError, OptionError
from pytest_nullspace.measuring import finite, loading, memory
from pytest_nullspace.model import spread
from pytest_nullspace.model.stored import stored
from tests import tiny
from tests.adapters import adapter

GIB = 1 << 30


def machine(monkeypatch: pytest.MonkeyPatch, kind: str | None, free: dict[int | str, int]) -> None:
    """Have torch and accelerate see one accelerator of this kind, and this memory."""
    device = None if kind is None else SimpleNamespace(type=kind)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda *_, **__: device)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: int(kind is not None))
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: free)


@pytest.mark.parametrize(
    ("kind", "free", "used"),
    [
        ("mps", {"mps": 8 * GIB}, {"cpu": 8 * GIB}),
        ("npu", {0: GIB, "cpu": 4 * GIB}, {"cpu": 4 * GIB}),
        (None, {"cpu": 4 * GIB}, {"cpu": 4 * GIB}),
        ("cuda", {0: GIB, "cpu": 4 * GIB}, {0: GIB, "cpu": 4 * GIB}),
        ("cuda", {0: GIB}, {0: GIB}),
    ],
    ids=["Apple", "another accelerator", "CPU", "CUDA", "CUDA in the CPU's memory"],
)
def test_auto_spreads_over_what_can_take_the_sums(
    kind: str | None, free: dict[int | str, int], used: dict[int | str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only CUDA and XPU cards are used beside the CPU; an Apple machine's one memory counts as the CPU's."""
    machine(monkeypatch, kind, free)
    given: list[Any] = []

    def infer(_: Any, max_memory: Any, **__: Any) -> dict[str, str]:
        given.append(max_memory)
        return {"": "cpu"}

    monkeypatch.setattr("accelerate.infer_auto_device_map", infer)
    spread.spread_plain(torch.nn.Linear(2, 2), {})
    assert given == [used]


def test_an_apple_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of itself the gate takes the CPU there, and neither empties nor waits for what torch may not know to."""
    machine(monkeypatch, "mps", {"mps": GIB})
    for name in ("empty_cache", "synchronize"):
        monkeypatch.setattr(f"torch.accelerator.{name}", lambda *_: pytest.fail("of an Apple GPU"))
        monkeypatch.setattr(f"torch.mps.{name}", lambda: pytest.fail("of an Apple GPU"))
    settings: Any = SimpleNamespace(device="auto", ranks=SimpleNamespace(size=1), device_map=None)
    assert loading.device_of(settings) == torch.device("cpu")
    memory.free_earlier_models()
    callback._wait()


def test_an_apple_gpu_is_no_card_of_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that allows memory of card 0 is refused where the one accelerator takes no sums in float64."""
    machine(monkeypatch, "mps", {"mps": GIB})
    settings: Any = SimpleNamespace(device="auto", ranks=SimpleNamespace(size=1), device_map={0: GIB})
    with pytest.raises(OptionError, match="torch sees no card 0 on this machine"):
        loading.device_of(settings)


def test_more_processes_than_cards_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process for which its machine has no card says how many there are; the others take theirs."""
    machine(monkeypatch, "cuda", {0: GIB})
    taken: list[str] = []
    monkeypatch.setattr("pytest_nullspace.model.device_named", lambda name, _: taken.append(name))

    def device(local: int) -> object:
        ranks = SimpleNamespace(size=2, local=local)
        settings: Any = SimpleNamespace(device="auto", ranks=ranks, device_map=None)
        return loading.device_of(settings)

    device(0)
    assert taken == ["cuda:0"]
    with pytest.raises(
        OptionError, match=r"more processes than cards: process 1 takes card 1, and torch sees 1; start"
    ):
        device(1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("how", "over"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, "cpu=1KB"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, "auto"),
        (None, "cpu=1KB"),
    ],
    ids=["head", "tokens", "LoRA-Null"],
)
def test_a_tied_head_is_spread_with_what_was_trained_on_it(
    how: dict[str, Any] | None, over: str, tmp_path: Path
) -> None:
    """Its weight is the embeddings' wherever that lies, also below an adapter's layer, and figures are the same."""
    model = tiny.llama(tie_word_embeddings=True)
    directory = tiny.lora_null(tmp_path / "ft", model) if how is None else adapter(tmp_path, model, r=4, **how)
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    runs = [
        gate(directory, tmp_path / "text.txt", calib_size=2, seqlen=32, **more).run
        for more in ({}, {"device_map": over})
    ]
    assert [layer.norms for layer in runs[0].layers] == [layer.norms for layer in runs[1].layers]
    assert (runs[0].drift is None) == (runs[1].drift is None)
    if runs[0].drift is not None and runs[1].drift is not None:
        assert runs[0].drift.preserved.divergence == runs[1].drift.preserved.divergence


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_lies_on_disk_is_looked_at_one_tensor_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without room in memory is not read into it whole to see whether all of it is numbers."""
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"])
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    read: list[weakref.ref[Tensor]] = []

    def watched(module: nn.Module, name: str) -> Tensor:
        assert sum(of() is not None for of in read) <= 1  # the one before
        value = stored(module, name)
        read.append(weakref.ref(value))
        return value

    monkeypatch.setattr(finite, "stored", watched)
    gate(directory, tmp_path / "text.txt", calib_size=2, seqlen=32, drift=False, device_map="cpu=1KB")
    assert len(read) > 10


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("tied", "over"), [(True, "cpu=1KB"), (False, "cpu=70KB")])
def test_trained_tokens_without_room_are_refused(tied: bool, over: str, tmp_path: Path) -> None:
    """PEFT reads their rows from outside the module that accelerate fills, which finds no place for tied ones."""
    model = tiny.llama(tie_word_embeddings=tied)
    directory = adapter(tmp_path, model, r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4])
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.*: has trained tokens, .*; allow more memory by --nullspace"
    ):
        gate(directory, tmp_path / "text.txt", calib_size=2, seqlen=32, device_map=over)
