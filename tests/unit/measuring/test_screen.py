"""The screen against plain arithmetic: what each adapter would make of the base's own activations, in float64."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.measuring.screen import Place, Screen, Screened, places, screen
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from tests import adapters, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's own
CPU = torch.device("cpu")
WINDOWS = [list(range(first, first + 24)) for first in (0, 30, 60, 90, 100)]
UNLIKE = (
    {"r": 4, "target_modules": "all-linear"},
    {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
    {"r": 8, "use_rslora": True, "target_modules": ["v_proj", "q_proj"], "layers_to_transform": [1]},
)
"""Configs of other ranks, scales and layers."""


def made(folder: Path, model: Any, configs: Sequence[dict[str, Any]]) -> list[Path]:
    """Random adapters of one base."""
    return [adapters.adapter(folder, model(), name=f"a{i}", **config) for i, config in enumerate(configs)]


def shared(directories: Sequence[Path]) -> tuple[AdaptedModel, list[Place]]:
    """The plain base, and its layers under all of them."""
    base, held = adapters.on_the_base(directories)
    return AdaptedModel(base, {name: layer for of in held for name, layer in of.items()}, CPU), places(held)


def screened(directories: Sequence[Path], **how: Any) -> list[dict[str, Screened]]:
    """All of them in one pass, windows two by two."""
    return screen(*shared(directories), WINDOWS, batch_size=2, **how)


def by_definition(directory: Path, name: str) -> tuple[float, ...]:
    """The mean norms at one layer and its leakage, of the base's rows kept whole, in float64."""
    adapted = load_model(open_checkpoint(directory), CPU, "float64")
    layer, kept = adapted.layers[name], []
    assert adapted.switched_off is not None
    handle = layer.base.register_forward_pre_hook(lambda _, args: kept.append(args[0].flatten(0, -2)))
    with torch.inference_mode(), adapted.switched_off() as base:
        for window in WINDOWS:
            base(input_ids=torch.tensor([window]), use_cache=False)
    handle.remove()
    x = torch.cat(kept)
    down, up = layer.down_matrix(), layer.scale * layer.up_matrix
    wide: Any = layer.base
    matrix = wide.weight if isinstance(wide, nn.Linear) else wide.weight.mT
    bx = x @ down.mT
    inside = (x @ (torch.linalg.pinv(down) @ down)).norm(dim=1)
    norms = [part.norm(dim=1).mean() for part in (x, bx, bx @ up.mT, x @ matrix.mT)]
    return (*map(float, norms), float((inside / x.norm(dim=1)).square().mean()))


def gpt2() -> Any:
    """A random GPT-2, whose layers hold their weights the other way round and have biases."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


MOST = 60
"""Operations a layer and a batch beyond the base's own; views are among them, and what layers with one input share."""


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count it, and do it."""
        self.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", [tiny.llama, tiny.qwen2, gpt2])
def test_each_figure_is_that_of_the_base_s_activations(tmp_path: Path, model: Any) -> None:
    """Whatever ranks, scales and layers the adapters have, and whatever biases the base, each agrees to 1e-6."""
    configs = UNLIKE if model is not gpt2 else ({"r": 4, "target_modules": ["c_attn", "c_proj"]}, {"r": 2})
    directories = made(tmp_path, model, configs)
    for directory, found in zip(directories, screened(directories), strict=True):
        assert list(found) == [*load_model(open_checkpoint(directory), CPU, "float32").layers]
        for name in (*found,)[:: max(1, len(found) // 5)]:
            means = found[name].means
            told = means.input, means.down, means.update, means.base, means.leakage
            assert told == pytest.approx(by_definition(directory, name), rel=1e-6), (directory.name, name)
            assert means.rows == sum(map(len, WINDOWS))


def test_where_nothing_lies_before_it_is_what_the_pass_measures(tmp_path: Path) -> None:
    """The first layers read what no adapter changed, so there a screen and the pass agree, capped rows and all."""
    (directory,) = made(tmp_path, tiny.llama, [{"r": 4, "target_modules": "all-linear"}])
    (found,) = screened([directory], max_rows=50)
    first, *_, last = measure(load_model(open_checkpoint(directory), CPU, "float32"), WINDOWS, max_rows=50)
    told = found[first.name].means
    assert (told.rows, told.input, told.down, told.update, told.base, told.leakage) == pytest.approx(
        (first.rows, first.input_norm, first.down_norm, first.update_norm, first.base_norm, first.mean_leakage),
        rel=1e-6,
    )
    assert found[last.name].means.update != pytest.approx(last.update_norm, rel=1e-3)


def test_what_a_float32_product_would_lose_is_taken_in_float64(tmp_path: Path) -> None:
    """A B that all but cancels the base's activations is exact, to those that the base has, beside a loud one."""
    quiet, loud = made(tmp_path, tiny.llama, 2 * [{"r": 2, "target_modules": ["q_proj"]}])
    model, held = shared([loud])
    few, kept = [list(range(12)), list(range(12, 24))], list[Tensor]()  # fewer tokens than the first layer is wide
    handle = held[0].module.register_forward_pre_hook(lambda _, args: kept.append(args[0].flatten(0, -2).double()))
    with torch.inference_mode():
        for window in few:
            model.model(input_ids=torch.tensor([window]))
    handle.remove()
    x = torch.cat(kept)
    unread = torch.linalg.svd(x)[2][-2:] + 1e-5 * torch.randn(2, x.shape[1], generator=torch.Generator().manual_seed(0))

    def still(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"base_model.model.{held[0].name}.lora_A.weight"] = unread.float().contiguous()

    adapters.change(quiet, still)
    told = [found[held[0].name].means.down for found in screen(*shared([quiet, loud]), few, batch_size=2)]
    for directory, mean in zip((quiet, loud), told, strict=True):
        down = load_model(open_checkpoint(directory), CPU, "float32").layers[held[0].name].down_matrix()
        assert mean == pytest.approx(float((x @ down.mT).norm(dim=1).mean()), rel=1e-6)
    assert told[0] < 1e-3 * told[1]


@pytest.mark.parametrize("by", [1e-18, 1e18])
def test_norms_that_float32_cannot_hold_are_taken_in_float64(tmp_path: Path, by: float) -> None:
    """An update whose norms have squares beyond float32 is told to 1e-6, and so is what lies beside it."""
    scaled, plain = made(tmp_path, tiny.llama, 2 * [{"r": 2, "target_modules": ["q_proj"]}])
    adapters.change(scaled, lambda tensors, _: tensors.update({name: by * tensors[name] for name in tensors}))
    for directory, found in zip((scaled, plain), screened([scaled, plain]), strict=True):
        for name, told in found.items():
            means = told.means.input, told.means.down, told.means.update, told.means.base, told.means.leakage
            assert means == pytest.approx(by_definition(directory, name), rel=1e-6), (directory.name, name)


def test_a_layer_to_which_no_row_comes_is_told_of_the_others_alone(tmp_path: Path) -> None:
    """An expert that got nothing in one batch adds nothing to what it got in another."""
    _, held = shared(made(tmp_path, tiny.llama, 2 * [{"r": 2, "target_modules": ["q_proj"]}]))
    place = replace(held[0], name="model.experts.0.q_proj")
    taking, x = Screen([place], CPU), torch.randn(7, place.down.shape[1])
    with taking.watching(), torch.inference_mode():
        for rows in (x[:0], x, x[:0]):
            taking.rows.start(Batch.of([[1] * 7], CPU))
            place.module(rows)
    told = [of[place.name].means for of in taking.found()]
    assert [of.rows for of in told] == [7, 7]
    assert [of.input for of in told] == 2 * [pytest.approx(float(x.double().norm(dim=1).mean()), rel=1e-6)]


def test_what_it_costs_in_operations_does_not_grow_with_the_adapters(tmp_path: Path) -> None:
    """One adapter, two or eight: each layer is as many operations of a forward, and few; in float64 as well."""
    directories = made(tmp_path, tiny.llama, 8 * [{"r": 4, "target_modules": ["q_proj", "up_proj"]}])

    def operations(count: int, exact: bool) -> float:
        model, held = shared(directories[:count])
        taking, batch = Screen([replace(of, blurs=exact) for of in held], CPU), Batch.of(WINDOWS[:2], CPU)
        counted = []
        for watching in (taking.watching, nullcontext):
            with taking.rows.watching(model.model), watching(), torch.inference_mode(), Counted() as counts:
                taking.rows.start(batch)
                model.model(input_ids=batch.tokens)
            counted.append(int(counts.operations))
        return (counted[0] - counted[1]) / len(held)

    for exact in (False, True):
        one, *more = (operations(count, exact) for count in (1, 2, 8))
        assert more == [one, one]
        assert one <= MOST
