"""The update since a start that held a part of W: by its definition in float64, and none where nothing was trained.

Where the start is not there, the untouched base tells the same.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixtures import lora_null, world
from fixtures.build import WORLD
from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.checkpoint.arrays import read_tensor
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.measuring.moved import with_base, with_start
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.run.stats import LayerStats
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


def nudged(model: Any, far: float = 0.01) -> None:
    """Training, in a word: both matrices move by a little."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "ALinear.weight", "BLinear.weight")):
            parameter.data += far * parameter.abs().mean() * torch.randn_like(parameter)


def of_lora_null(initialise: Callable[..., None], folder: Path, train: Trained) -> Pair:
    """A pair of LoRA-Null directories."""
    model: Any = tiny.llama(initializer_range=0.2)
    (folder / "tokenizer").mkdir()
    tiny.tokenizer(folder / "tokenizer")
    model.save_pretrained(folder / "base")
    found = lora_null.covariances(model, [torch.tensor(window) for window in WINDOWS])
    initialise(model, found, RANK)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    lora_null.save(model, folder / "start", tokenizer)
    train(model)
    lora_null.save(model, folder / "ft", tokenizer)
    return Pair(folder / "start", folder / "ft", None)


def of_peft(start: str, folder: Path, train: Trained, **more: Any) -> Pair:
    """A pair of PEFT adapters, on the base that their initialisation changed."""
    model: Any = tiny.llama(initializer_range=0.2)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=12,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=start,
        **more,
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
        base = None if pair.checkpoint.carries_base else tmp_path / "base"
        adapted = with_start(load_model(pair.checkpoint, dtype=dtype, base=base), pair.checkpoint, pair.start)
        for layer in measure(adapted, WINDOWS):
            assert (layer.update_norm, layer.forgetting, layer.contribution) == (0, 0, 0), layer.name
            assert layer.base_norm > 0
    assert all(layer.update_norm > 1e-3 for layer in measure(pair.adapted, WINDOWS)), "which without its start is told"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_layer_whose_update_is_more_than_a_product_is_said_to_be_measured_as_a_whole(tmp_path: Path) -> None:
    """Of DoRA nothing is told since the start: then that is said, by a layer's name, also where all layers are."""
    pair = of_peft("pissa", tmp_path, nudged, use_dora=True)
    adapted = with_start(pair.adapted, pair.checkpoint, pair.start)
    assert adapted.remarks[-1].startswith("update as a whole in 6 of 6 layers, such as model.layers.0.self_attn.q_proj")
    assert all(layer.start is None for layer in adapted.layers.values())


def test_a_start_that_held_nothing_of_w_changes_nothing(tmp_path: Path) -> None:
    """Of v2, where A is zero at the start, the layers are what they were, and no line speaks of a start."""
    for name, up_scale in (("ft", 0.5), ("start", 0.0)):
        tiny.lora_null(tmp_path / name, up_scale=up_scale)
    trained = open_checkpoint(tmp_path / "ft")
    adapted = load_model(trained)
    assert with_start(adapted, trained, open_checkpoint(tmp_path / "start")) is adapted


def changed(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> Checkpoint:
    """A directory of weights with some of them changed."""
    return open_checkpoint(adapters.edit(directory, edit))


def stored_as(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


def closely(layer: LayerStats) -> Any:
    told = (layer.update_norm, layer.base_norm, layer.output_norm, layer.forgetting, layer.down_norm, layer.leakage)
    return pytest.approx(told, rel=1e-6)


@pytest.mark.parametrize("start", ["v1", "CorDA"])
def test_the_base_tells_the_update_as_the_start_does(start: str, tmp_path: Path) -> None:
    """W - W_res in place of the start's own factors gives every figure of the update to 1e-6."""
    pair = STARTS[start](tmp_path, partial(nudged, far=0.1))
    by_start = measure(with_start(pair.adapted, pair.checkpoint, pair.start), WINDOWS)
    adapted = with_base(pair.adapted, pair.checkpoint, tmp_path / "base")
    for layer, want in zip(measure(adapted, WINDOWS), by_start, strict=True):
        told = layer.update_norm, layer.base_norm, layer.output_norm, layer.forgetting, layer.down_norm, layer.leakage
        assert told == closely(want), layer.name
    assert adapted.since == str(tmp_path / "base")
    assert "W - W_res is the A0B0 of the start in 21 of 21 layers" in adapted.remarks[-1]
    assert "not judged without --nullspace-init=DIR" in adapted.remarks[-1]


def test_the_base_tells_a_real_update_as_the_start_does(tmp_path: Path) -> None:
    """The same of v1 on the shipped base, in a null space of its facts and really trained."""
    model: Any = AutoModelForCausalLM.from_pretrained(WORLD / "base")
    facts = world.windows(world.facts_text(2), 4, 128, 0)
    lora_null.initialise_v1(model, lora_null.covariances(model, next(facts)), 16)
    lora_null.save(model, tmp_path / "start", world.tokenizer())
    lora_null.choose(model, "both")
    lora_null.train(model, world.windows(world.task_text(), 4, 64, 0), 10, 1e-4)
    lora_null.save(model, tmp_path / "ft", world.tokenizer())
    pair = Pair(tmp_path / "start", tmp_path / "ft", None)
    tokens = next(facts).tolist()
    by_start = measure(with_start(pair.adapted, pair.checkpoint, pair.start), tokens)
    for layer, want in zip(
        measure(with_base(pair.adapted, pair.checkpoint, WORLD / "base"), tokens), by_start, strict=True
    ):
        told = layer.update_norm, layer.base_norm, layer.output_norm, layer.forgetting, layer.down_norm, layer.leakage
        assert told == closely(want), layer.name
        assert 0 < layer.forgetting < 0.02


def test_before_training_the_base_tells_next_to_no_update(tmp_path: Path) -> None:
    """An untrained start is far below what passes as an update, so it fails as with its start at hand."""
    pair = STARTS["v1"](tmp_path, lambda _: None)
    for layer in measure(with_base(pair.adapted, pair.checkpoint, tmp_path / "base"), WINDOWS):
        assert layer.effectiveness < 1e-6, layer.name


@pytest.mark.parametrize(("far", "told"), [(0.01, False), (1.0, True)])
def test_an_update_that_rounding_may_have_made_is_not_told(far: float, told: bool, tmp_path: Path) -> None:
    """In bfloat16 what changed little is left as it is, with a line that says so; what changed much is told."""
    pair = STARTS["v1"](tmp_path, partial(nudged, far=far))
    checkpoint = changed(tmp_path / "ft", stored_as(torch.bfloat16))
    adapted = with_base(load_model(checkpoint), checkpoint, tmp_path / "base")
    assert bool(adapted.since) is told
    if told:
        by_start = measure(with_start(load_model(checkpoint), checkpoint, pair.start), WINDOWS)
        for layer, want in zip(measure(adapted, WINDOWS), by_start, strict=True):
            assert layer.update_norm == pytest.approx(want.update_norm, rel=0.02), layer.name
    else:
        assert "update as a whole in 21 of 21 layers: W - W_res is rounded too coarsely" in adapted.remarks[-1]
        assert all(layer.start is None for layer in adapted.layers.values())


def loud(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight_residual"] += 0.01 * torch.randn(48, 32)


def lacking(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("directory", "edit", "told"),
    [
        ("ft", loud, r"ft: W - W_res of model.layers.1.mlp.up_proj is not of rank 4: beyond it lies 0\.\d"),
        ("base", lacking, r"base: holds no weight of model.layers.1.mlp.up_proj of shape 48×32"),
    ],
    ids=["W_res moved", "another model"],
)
def test_what_is_not_of_the_adapters_rank_is_refused(
    directory: str, edit: Callable[[dict[str, Tensor]], None], told: str, tmp_path: Path
) -> None:
    """A W_res that was changed, and a base that is another's, are errors by the layer's name."""
    STARTS["v1"](tmp_path, nudged)
    adapters.edit(tmp_path / directory, edit)
    checkpoint = open_checkpoint(tmp_path / "ft")
    with pytest.raises(CheckpointError, match=told):
        with_base(load_model(checkpoint), checkpoint, tmp_path / "base")


def test_a_base_beside_a_residual_that_is_whole_changes_nothing(tmp_path: Path) -> None:
    """Of a plain LoRA in such a directory W_res is W, to the rounding of bfloat16, and the update is all of AB."""
    tiny.llama().save_pretrained(tmp_path / "base")

    def change(tensors: dict[str, Tensor], _: object) -> None:
        tensors.update({name: 2 * of for name, of in tensors.items() if name.endswith("BLinear.weight")})

    for dtype in (torch.float32, torch.bfloat16):
        checkpoint = open_checkpoint(tiny.lora_null(tmp_path / str(dtype), change=change, dtype=dtype))
        adapted = load_model(checkpoint)
        assert with_base(adapted, checkpoint, tmp_path / "base") is adapted
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    (remark,) = with_base(adapted, checkpoint, tmp_path / "base.gguf").remarks
    assert remark.startswith("update as a whole: ")
