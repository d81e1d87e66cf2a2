"""The update since a start that held a part of W: by its definition in float64, and none where nothing was trained."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from fixtures import lora_null
from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.checkpoint.arrays import read_tensor
from pytest_nullspace.measuring.moved import with_start
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from tests import adapters, tiny

RANK = 4
WINDOWS: Sequence[Sequence[int]] = [list(range(3, 60)), list(range(40, 100)), list(range(20, 50))]
Trained = Callable[[Any], None]


class Pair:
    """A start and what became of it.

    Attributes:
        start: The checkpoint of the start.
        adapted: The trained model.
        checkpoint: Its checkpoint.
    """

    def __init__(self, start: Path, trained: Path, base: Path | None) -> None:
        self.start, self.checkpoint = open_checkpoint(start), open_checkpoint(trained)
        self.adapted = load_model(self.checkpoint, base=base)


def nudged(model: Any) -> None:
    """Training, in a word: both matrices move by a little."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "ALinear.weight", "BLinear.weight")):
            parameter.data += 0.01 * parameter.abs().mean() * torch.randn_like(parameter)


def of_lora_null(initialise: Callable[..., None], folder: Path, train: Trained) -> Pair:
    """A pair of LoRA-Null directories."""
    model: Any = tiny.llama(initializer_range=0.2)
    (folder / "tokenizer").mkdir()
    tiny.tokenizer(folder / "tokenizer")
    found = lora_null.covariances(model, [torch.tensor(window) for window in WINDOWS])
    initialise(model, found, RANK)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    lora_null.save(model, folder / "start", tokenizer)
    train(model)
    lora_null.save(model, folder / "ft", tokenizer)
    return Pair(folder / "start", folder / "ft", None)


def of_peft(start: str, folder: Path, train: Trained) -> Pair:
    """A pair of PEFT adapters, on the base that their initialisation changed."""
    model: Any = tiny.llama(initializer_range=0.2)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=start
    )
    with warnings.catch_warnings(action="ignore"):
        wrapped: Any = peft.get_peft_model(model, config)
        wrapped.save_pretrained(folder / "start")
        train(wrapped)
        wrapped.save_pretrained(folder / "ft")
        wrapped.unload().save_pretrained(folder / "base")
    tiny.tokenizer(folder / "base")
    for name in ("start", "ft"):
        adapters.change(folder / name, lambda _, saved: saved.update(base_model_name_or_path=str(folder / "base")))
    return Pair(folder / "start", folder / "ft", folder / "base")


STARTS: dict[str, Callable[[Path, Trained], Pair]] = {
    "v1": lambda folder, train: of_lora_null(lora_null.initialise_v1, folder, train),
    "CorDA": lambda folder, train: of_lora_null(lora_null.initialise_corda, folder, train),
    "PiSSA": lambda folder, train: of_peft("pissa", folder, train),
    "OLoRA": lambda folder, train: of_peft("olora", folder, train),
}


def inputs(adapted: AdaptedModel) -> dict[str, Tensor]:
    """The input rows of every layer."""
    rows: dict[str, list[Tensor]] = {name: [] for name in adapted.layers}

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, args: rows[name].append(args[0].flatten(0, -2))

    handles = [layer.layer.register_forward_pre_hook(hook(name)) for name, layer in adapted.layers.items()]
    with torch.inference_mode():
        for window in WINDOWS:
            adapted.model(input_ids=torch.tensor([list(window)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in rows.items()}


def matrices(checkpoint: Checkpoint, name: str) -> tuple[Tensor, Tensor]:
    """B, and A with its scale, of a layer, from the files."""
    ends = ("BLinear.weight", "ALinear.weight") if checkpoint.carries_base else ("lora_A.weight", "lora_B.weight")
    found = [next(info for key, info in checkpoint.tensors.items() if key.endswith(f"{name}.{end}")) for end in ends]
    down, up = (torch.from_numpy(read_tensor(info)) for info in found)
    scale = next(spec.scale for spec in checkpoint.layers if spec.name == name)
    return down, up * (1.0 if scale is None else scale.value)


def mean(rows: Tensor) -> float:
    return float(rows.norm(dim=-1).mean())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("start", STARTS)
def test_the_update_is_what_changed_since_the_start(start: str, tmp_path: Path) -> None:
    """Update, base and output are ``(AB − A₀B₀) x``, ``(W_res + A₀B₀) x`` and their sum, to 1e-6 of float64."""
    pair = STARTS[start](tmp_path, nudged)
    adapted = with_start(pair.adapted, pair.checkpoint, pair.start)
    assert "update against the start " in adapted.remarks[-1]
    assert adapted.since == str(tmp_path / "start")
    rows, alone = inputs(adapted), {layer.name: layer for layer in measure(pair.adapted, WINDOWS)}
    for layer in measure(adapted, WINDOWS, batch_size=2):
        x, residual = rows[layer.name], adapted.layers[layer.name].base_matrix()
        assert residual is not None
        (down, up), (down0, up0) = matrices(pair.checkpoint, layer.name), matrices(pair.start, layer.name)
        whole = residual.double() + up0 @ down0
        update = x @ (up @ down - up0 @ down0).mT
        want = mean(update), mean(x @ whole.mT), mean(x @ whole.mT + update)
        assert (layer.update_norm, layer.base_norm, layer.output_norm) == pytest.approx(want, rel=1e-6), layer.name
        assert layer.forgetting == pytest.approx(want[0] / want[1], rel=1e-6)
        of_all_kinds = alone[layer.name]
        assert layer.update_norm < 0.5 * of_all_kinds.update_norm, "the start was taken out"
        assert (layer.down_norm, layer.leakage) == pytest.approx(
            (of_all_kinds.down_norm, of_all_kinds.leakage), rel=1e-6
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("start", STARTS)
def test_an_untrained_start_has_no_update(start: str, tmp_path: Path) -> None:
    """Before training the update is zero to the last digit, in every layer and precision, and so is forgetting."""
    pair = STARTS[start](tmp_path, lambda _: None)
    for dtype in ("float32", "bfloat16"):
        base = tmp_path / "base" if (tmp_path / "base").exists() else None
        adapted = with_start(load_model(pair.checkpoint, dtype=dtype, base=base), pair.checkpoint, pair.start)
        for layer in measure(adapted, WINDOWS):
            assert (layer.update_norm, layer.forgetting, layer.contribution) == (0, 0, 0), layer.name
            assert layer.base_norm > 0
    assert all(layer.update_norm > 1e-3 for layer in measure(pair.adapted, WINDOWS)), "which without its start is told"


def test_a_start_that_held_nothing_of_w_changes_nothing(tmp_path: Path) -> None:
    """Of v2, where A is zero at the start, the layers are what they were, and no line speaks of a start."""
    for name, up_scale in (("ft", 0.5), ("start", 0.0)):
        tiny.lora_null(tmp_path / name, up_scale=up_scale)
    trained = open_checkpoint(tmp_path / "ft")
    adapted = load_model(trained)
    assert with_start(adapted, trained, open_checkpoint(tmp_path / "start")) is adapted
