"""The streaming pass against plain arithmetic: each figure by its definition in float64, and in the reference's way."""

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_nullspace import kernels
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.distinct import DistinctRows, prints, together
from pytest_nullspace.measuring.recorder import Recorder, Watched
from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.measuring.streaming import draw_rows, measure
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.run.stats import LayerStats
from tests import tiny

CPU = torch.device("cpu")
Windows = Sequence[Sequence[int]]
FIGURES = ("input_norm", "down_norm", "update_norm", "base_norm", "output_norm", "mean_leakage")
WEIGHTS = ("down_weight_norm", "up_weight_norm", "base_weight_norm")
UNEQUAL: Windows = [[5, 6, 7, 8, 9], list(range(40)), list(range(60, 100)), [3], list(range(20, 60))]
FIRST = "model.layers.0.self_attn.q_proj"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """The model of the checkpoint in ``folder``."""
    return load_model(open_checkpoint(folder), CPU, dtype)


def cached_rows(adapted: AdaptedModel, windows: Windows) -> dict[str, Tensor]:
    """The input rows of every layer, one window after the other, all kept as the reference keeps them."""
    rows: dict[str, list[Tensor]] = {name: [] for name in adapted.layers}
    handles = [
        layer.layer.register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0].flatten(0, -2)))
        for name, layer in adapted.layers.items()
    ]
    with torch.inference_mode():
        for window in windows:
            adapted.model(input_ids=torch.tensor([list(window)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def by_definition(adapted: AdaptedModel, windows: Windows, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Every figure of every layer from its cached rows, by its definition, in ``dtype``."""
    figures = {}
    for name, x in cached_rows(adapted, windows).items():
        layer: Any = adapted.model.get_submodule(name)
        x = x.to(dtype)
        down, up, base = (m.weight.to(dtype) for m in (layer.BLinear, layer.ALinear, layer.residual))
        matrix = down
        if layer.PALinear is not None:
            matrix = down - down @ layer.PALinear.weight.to(dtype) @ layer.PBLinear.weight.to(dtype)
        bx = x @ matrix.mT
        abx, wx = bx @ up.mT, x @ base.mT
        projector = torch.linalg.pinv(matrix.double()) @ matrix.double()
        leakage = (x.double() @ projector).norm(dim=1).square() / x.double().norm(dim=1).square()
        means = [float(rows.norm(dim=1).mean()) for rows in (x, bx, abx, wx, abx + wx)]
        norms = [float(weight.norm()) for weight in (down, up, base)]
        figures[name] = dict(zip((*FIGURES, *WEIGHTS), [*means, float(leakage.mean()), *norms], strict=True))
    return figures


def close(measured: Sequence[LayerStats], wanted: dict[str, dict[str, float]], rel: float) -> None:
    """Whether every figure of every layer agrees."""
    assert [layer.name for layer in measured] == list(wanted)
    for layer in measured:
        for field, value in wanted[layer.name].items():
            assert getattr(layer, field) == pytest.approx(value, rel=rel), (layer.name, field)


def agree(a: Sequence[LayerStats], b: Sequence[LayerStats], rel: float) -> None:
    """Whether two measurements agree in every figure of every layer."""
    close(a, {layer.name: {field: getattr(layer, field) for field in (*FIGURES, *WEIGHTS)} for layer in b}, rel)
    assert [(layer.rows, layer.distinct_rows) for layer in a] == [(layer.rows, layer.distinct_rows) for layer in b]


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny.lora_null,
    "biases that outweigh the outputs": lambda folder: tiny.lora_null(folder, tiny.qwen2()),
    "protected": lambda folder: tiny.lora_null(folder, protected=3),
    "protected, with biases": lambda folder: tiny.lora_null(folder, tiny.qwen2(), protected=3),
    "tiny update": lambda folder: tiny.lora_null(folder, up_scale=1e-4),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    """Each kind of checkpoint, loaded in float64, so that agreement is not blurred by the model's own rounding."""
    return load(CHECKPOINTS[request.param](tmp_path_factory.mktemp("checkpoint")), torch.float64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    """A tiny Llama in float32."""
    return load(tiny.lora_null(tmp_path_factory.mktemp("llama")))


# Figures


def test_every_figure_is_its_definition(adapted: AdaptedModel) -> None:
    """Each figure of each layer is the float64 mean of its definition over all rows of all windows."""
    measured = measure(adapted, UNEQUAL)
    close(measured, by_definition(adapted, UNEQUAL, torch.float64), 1e-6)
    assert {layer.rows for layer in measured} == {126}
    assert all(layer.defect is None for layer in measured)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_in_float32_every_figure_is_still_its_definition(tmp_path: Path, kind: str) -> None:
    """In the model's usual precision the figures of its own activations agree with float64 arithmetic to 1e-5."""
    adapted = load(CHECKPOINTS[kind](tmp_path))
    close(measure(adapted, UNEQUAL), by_definition(adapted, UNEQUAL, torch.float64), 1e-5)


@pytest.mark.parametrize("kind", ["llama", "biases that outweigh the outputs"])
def test_the_references_way_gives_the_same(tmp_path: Path, kind: str) -> None:
    """Rows cached first and multiplied in float32 afterwards give the same figures to 1e-5."""
    adapted = load(CHECKPOINTS[kind](tmp_path))
    close(measure(adapted, UNEQUAL), by_definition(adapted, UNEQUAL, torch.float32), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_to_its_own_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    """In half precision norms are still summed exactly: what differs is the model's rounding alone."""
    folder = tiny.lora_null(tmp_path)
    half, full = measure(load(folder, dtype), UNEQUAL), measure(load(folder), UNEQUAL)
    agree([dataclasses.replace(layer, mean_leakage=0.0) for layer in half],
          [dataclasses.replace(layer, mean_leakage=0.0) for layer in full], 2e-2)  # fmt: skip


def test_shapes_are_told(llama: AdaptedModel) -> None:
    """Each layer tells its rank and widths, in model order."""
    measured = measure(llama, [[1, 2, 3]])
    assert [(m.name, m.in_features, m.rank, m.out_features) for m in measured[:2]] == [
        (FIRST, 32, 4, 32),
        ("model.layers.0.self_attn.k_proj", 32, 4, 16),
    ]
    assert [layer.name for layer in measured] == list(llama.layers)


@pytest.mark.parametrize("batch_size", [2, 3, 64])
@pytest.mark.parametrize("max_rows", [None, 33])
def test_the_batch_size_changes_nothing(llama: AdaptedModel, batch_size: int, max_rows: int | None) -> None:
    """However many windows share a forward, the rows and the figures are the same, to 1e-6."""
    one = measure(llama, UNEQUAL, max_rows=max_rows)
    agree(measure(llama, UNEQUAL, max_rows=max_rows, batch_size=batch_size), one, 1e-6)


@pytest.mark.parametrize("held", [0, 1 << 10, 1 << 14])
def test_how_much_is_held_before_it_is_summed_changes_nothing(
    llama: AdaptedModel, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """Layers that are summed one by one, or few at a time, add up to the same as many at once."""
    want = measure(llama, UNEQUAL)
    monkeypatch.setattr("pytest_nullspace.measuring.summing.HELD_BYTES", held)
    agree(measure(llama, UNEQUAL), want, 1e-12)


def repeating(count: int, tokens: int, length: int = 24) -> Windows:
    """Windows of so few different tokens, in ever another order."""
    choose = random.Random(tokens)
    return [choose.choices(range(20, 20 + tokens), k=length) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("batch_size", "max_rows"), [(1, None), (2, None), (8, None), (1, 40), (8, 40)])
def test_distinct_rows_of_an_input_are_counted(
    tmp_path: Path, dtype: torch.dtype, batch_size: int, max_rows: int | None
) -> None:
    """Where a row holds its token alone there are as many as tokens, else as many as contexts, up to the width."""
    adapted = load(tiny.lora_null(tmp_path), dtype)
    for tokens in (1, 8, 25):
        windows = repeating(9, tokens)
        counted = draw_rows([24] * 9, max_rows, 42) or [list(range(24))] * 9
        found = {layer.name: layer for layer in measure(adapted, windows, batch_size=batch_size, max_rows=max_rows)}
        seen = {window[row] for window, rows in zip(windows, counted, strict=True) for row in rows}
        assert found[FIRST].distinct_rows == len(seen)
        assert found[FIRST.replace("q_proj", "v_proj")].distinct_rows == len(seen)
        if tokens > 1:
            assert {found[name].distinct_rows for name in found if "layers.1" in name} == {32, min(48, max_rows or 48)}


def test_a_row_is_known_again_whatever_is_rounded_beside_it() -> None:
    """Numbers that differ in their last digits are the same row, rows of zeros are one, and all others are apart."""
    x = torch.randn(30_000, 576, generator=torch.Generator().manual_seed(0))
    rounded = x[:1000] * (1 + 2.0**-23)
    seen = DistinctRows(40_000, CPU)
    for rows in (x[:20_000], x[10_000:], torch.zeros(7, 576), x[:20_000]):
        seen.add(prints(rows, kernels.row_norms(rows)))
    found = seen.found()
    assert found is not None
    assert len(found) == 30_001
    again = prints(rounded, kernels.row_norms(rounded)) == prints(x[:1000], kernels.row_norms(x[:1000]))
    assert again.double().mean() > 0.99
    sparse = x.relu().where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.1, 0.0)
    assert len(prints(sparse, kernels.row_norms(sparse)).unique()) > 0.7 * len(x)  # type: ignore[no-untyped-call]


@given(st.lists(st.lists(st.integers(0, 60), max_size=40), max_size=12), st.integers(1, 50), st.integers(1, 4))
def test_no_more_distinct_rows_are_kept_than_are_asked_for(parts: list[list[int]], width: int, processes: int) -> None:
    """Twice or in several processes, distinct rows are counted up to the width, in bounded memory."""
    stores = [DistinctRows(width, CPU) for _ in range(processes)]
    for i, part in enumerate(parts):
        for _ in range(1 + i % 2):
            stores[i % processes].add(torch.tensor(part, dtype=torch.int64))
        assert all(len(store._kept) <= 2 * width for store in stores)
    assert together([store.found() for store in stores], width) == min(
        len({row for part in parts for row in part}), width
    )


def test_norms_from_several_devices_are_put_together(llama: AdaptedModel) -> None:
    """An input that lies elsewhere than what its layer makes of it, as under a device map, is summed with it."""
    recorder = Recorder(torch.device("meta"), 1)
    recorder.start(Batch(torch.zeros(1, 3), 0, None, [3]))
    seen = {"down": torch.ones(3, 4, device="meta"), "joined": torch.ones(2, 3, device="meta")}
    layer, x = llama.layers[FIRST], (torch.ones(1, 3, 32),)
    factors = kernels.factors(torch.eye(4), torch.eye(4), 1.0)
    recorder._factors = [factors._replace(matrices=factors.matrices.to("meta"))]
    recorder._rounded = [recorder._factors[0].matrices]
    watched = Watched(0, layer, is_joined=True, in_parts=False, seen=seen)
    recorder._meet(watched, layer.layer, x)
    recorder._take(watched, layer.layer, x, torch.ones(1, 3, 32, device="meta"))
    (taken,) = recorder.sums._held
    assert (taken.whole.device.type, taken.whole.shape) == ("meta", (6, 3))


def no_memory_for_more_than(most: int) -> Callable[[Any, Any, Any], None]:
    """A hook that fails as torch does where an accelerator's memory is full; no CPU has that allocator."""

    def hook(module: object, args: object, output: Tensor) -> None:
        if len(output) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return hook


def test_a_batch_without_memory_is_halved_until_it_fits(llama: AdaptedModel) -> None:
    """Nothing of the failed forwards is counted, the smaller size is kept and told, and the figures are the same."""
    windows = [list(range(i, i + 20)) for i in range(9)]
    one = measure(llama, windows)
    told: list[int] = []
    lengths: list[int] = []
    block = llama.model.get_submodule("model.layers.1")
    handles = [
        block.register_forward_pre_hook(lambda _, args: lengths.append(len(args[0]))),
        block.register_forward_hook(no_memory_for_more_than(2)),
    ]
    halved = measure(llama, windows, batch_size=8, shrunk=told.append)
    for handle in handles:
        handle.remove()
    assert told == [4, 2]
    assert lengths[-7:] == [8, 4, 2, 2, 2, 2, 1]
    agree(halved, one, 1e-6)


def test_a_window_without_memory_is_an_error(llama: AdaptedModel) -> None:
    """Where not even one window fits nothing is halved, and the error is torch's own; no hook stays behind."""
    handle = llama.model.get_submodule("model.layers.1").register_forward_hook(no_memory_for_more_than(0))
    with pytest.raises(torch.OutOfMemoryError):
        measure(llama, UNEQUAL)
    handle.remove()
    assert not any(module._forward_hooks for module in llama.model.modules())


def test_a_pass_ends_early_after_the_same_windows_whatever_the_batch(llama: AdaptedModel) -> None:
    """Whether the figures suffice is asked after 16 windows and each doubling, also where a batch would be larger."""
    windows = [[i, i + 1, i + 2] for i in range(40)]
    for batch_size in (1, 5, 64):
        asked: list[int] = []

        def settled(figures: tuple[LayerStats, ...], asked: list[int] = asked) -> bool:
            asked.append(figures[0].rows // 3)
            return False

        measure(llama, windows, batch_size=batch_size, settled=settled)
        assert asked == [16, 32]


def test_windows_of_unequal_length_are_not_padded(llama: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only windows of one length share a batch, so each token counts once and none is made up."""
    monkeypatch.setattr("pytest_nullspace.measuring.digits.CANCELLATION", math.inf)
    shapes: list[tuple[int, ...]] = []
    embeddings = llama.model.get_submodule("model.embed_tokens")
    handle = embeddings.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    measure(llama, UNEQUAL, batch_size=4)
    handle.remove()
    assert shapes[-4:] == [(1, 5), (2, 40), (1, 1), (1, 40)]


def test_progress_counts_windows(llama: AdaptedModel) -> None:
    """Progress is told after each batch, in windows, and ends at the last."""
    told: list[tuple[int, int]] = []
    measure(llama, UNEQUAL, batch_size=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 5), (3, 5), (4, 5), (5, 5)]


def test_measuring_twice_gives_the_very_same(tmp_path: Path) -> None:
    """Dropout is off, even where the config asks for it: two passes agree bit by bit."""
    adapted = load(tiny.lora_null(tmp_path, tiny.llama(attention_dropout=0.5)))
    assert measure(adapted, UNEQUAL) == measure(adapted, UNEQUAL)


# Rows


def test_capped_rows_are_the_drawn_ones(llama: AdaptedModel) -> None:
    """With a cap the figures are the means over exactly the rows that `draw_rows` names."""
    drawn = draw_rows([len(window) for window in UNEQUAL], 20, 7)
    assert drawn is not None
    starts = [sum(len(window) for window in UNEQUAL[:i]) for i in range(len(UNEQUAL))]
    rows = [start + row for start, chosen in zip(starts, drawn, strict=True) for row in chosen]
    measured = measure(llama, UNEQUAL, max_rows=20, seed=7, batch_size=2)
    cached = cached_rows(llama, UNEQUAL)
    for layer in measured:
        assert layer.rows == 20
        wanted = cached[layer.name][rows].double().norm(dim=1).mean()
        assert layer.input_norm == pytest.approx(float(wanted), rel=1e-6)


def test_a_cap_is_seeded_and_a_large_one_is_none(llama: AdaptedModel) -> None:
    """The same seed draws the same rows, another seed others; a cap above the rows that exist changes nothing."""
    assert measure(llama, UNEQUAL, max_rows=10, seed=1) == measure(llama, UNEQUAL, max_rows=10, seed=1)
    assert measure(llama, UNEQUAL, max_rows=10, seed=1) != measure(llama, UNEQUAL, max_rows=10, seed=2)
    assert measure(llama, UNEQUAL, max_rows=126) == measure(llama, UNEQUAL)


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(lengths=LENGTHS, max_rows=st.integers(1, 400), seed=st.integers())
def test_rows_are_drawn_evenly(lengths: list[int], max_rows: int, seed: int) -> None:
    """Exactly the capped number is drawn, each window giving its share to within a row; rows are sorted, distinct."""
    drawn = draw_rows(lengths, max_rows, seed)
    total = sum(lengths)
    if drawn is None:
        assert max_rows >= total
        return
    assert max_rows < total
    assert sum(map(len, drawn)) == max_rows
    for length, rows in zip(lengths, drawn, strict=True):
        assert rows == sorted(set(rows))
        assert all(0 <= row < length for row in rows)
        assert abs(len(rows) - length * max_rows / total) < 1
    assert draw_rows(lengths, max_rows, seed) == drawn


@given(lengths=LENGTHS)
def test_no_cap_draws_nothing(lengths: list[int]) -> None:
    """Without a cap every row counts."""
    assert draw_rows(lengths, None, 42) is None


def test_rows_are_drawn_from_the_whole_window() -> None:
    """Over many seeds every row of a window is drawn about as often: no end of the window is preferred."""
    counts = [0] * 20
    for seed in range(2000):
        drawn = draw_rows([20, 20], 10, seed)
        assert drawn is not None
        for row in drawn[0]:
            counts[row] += 1
    assert all(400 < count < 600 for count in counts)


# Layers


class Calls:
    """Counts how often each block of a model, and its head, runs."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, int] = {}
        self._handles = []
        for name in ("model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"):
            self.counts[name] = 0
            self._handles.append(model.get_submodule(name).register_forward_pre_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[..., None]:
        def count(*_: object) -> None:
            self.counts[name] += 1

        return count

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def test_only_chosen_layers_are_measured_and_the_pass_ends_after_them(
    llama: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are not chosen are not told, and beyond the probe no block after the last chosen one runs."""
    monkeypatch.setattr("pytest_nullspace.measuring.digits.CANCELLATION", math.inf)
    chosen = ["model.layers.1.mlp.up_proj", FIRST]
    calls = Calls(llama.model)
    measured = measure(llama, UNEQUAL, layers=chosen)
    calls.remove()
    assert [layer.name for layer in measured] == [FIRST, "model.layers.1.mlp.up_proj"]
    assert calls.counts["model.layers.0"] == calls.counts["model.layers.1"] == 1 + len(UNEQUAL)
    assert calls.counts["model.layers.2"] <= 1
    assert calls.counts["lm_head"] == 0
    everything = {layer.name: layer for layer in measure(llama, UNEQUAL)}
    assert list(measured) == [everything[layer.name] for layer in measured]


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e25])
def test_what_float32_cannot_hold_is_run_again_in_float64(llama: AdaptedModel, magnitude: float) -> None:
    """A layer whose norms leave float32's range, or whose Bx is mostly cancelled, loses not a digit."""
    layer = llama.layers[FIRST]
    weight = layer.base.weight
    assert isinstance(weight, torch.Tensor)
    before = measure(llama, UNEQUAL[1:2], layers=[FIRST])[0]
    calls, kept = Calls(llama.model), weight.detach().clone()
    weight.data *= magnitude
    after = measure(llama, UNEQUAL[1:2], layers=[FIRST])[0]
    weight.data.copy_(kept)
    calls.remove()
    assert after.base_norm == pytest.approx(magnitude * before.base_norm, rel=1e-6)
    assert calls.counts["model.layers.0"] <= 3


def test_the_head_never_runs(llama: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is the widest layer and no adapter's input depends on it."""
    monkeypatch.setattr("pytest_nullspace.measuring.digits.CANCELLATION", math.inf)
    calls = Calls(llama.model)
    measure(llama, UNEQUAL)
    calls.remove()
    assert calls.counts["lm_head"] == 0
    assert calls.counts["model.layers.2"] == len(UNEQUAL), "where every block is measured no forward is spent on a look"


def test_no_layer_chosen_gives_none(llama: AdaptedModel) -> None:
    """Nothing to measure is no error."""
    assert measure(llama, UNEQUAL, layers=[]) == ()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_left_as_it_was(llama: AdaptedModel) -> None:
    """No hook is left after a pass, whole or ended early, and the model's answers are the same as before."""
    tokens = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        before = llama.model(input_ids=tokens).logits
        measure(llama, UNEQUAL)
        measure(llama, UNEQUAL, layers=[FIRST])
        assert hooks(llama.model) == 0
        assert torch.equal(llama.model(input_ids=tokens).logits, before)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_hooks_are_removed_when_the_model_raises(llama: AdaptedModel, call: int) -> None:
    """An error inside the probe or the pass goes through unchanged, and leaves no hook behind."""
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise ValueError("in the pass")

    handle = llama.model.get_submodule("model.layers.1").register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="in the pass"):
        measure(llama, UNEQUAL)
    handle.remove()
    assert hooks(llama.model) == 0


# What is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["BLinear.weight", "ALinear.weight", "weight_residual"])
def test_a_weight_that_is_no_number_is_a_defect_of_its_layer(tmp_path: Path, part: str, value: float) -> None:
    """One NaN or infinity in a weight fails its layer by name of the cause, and spares those before it."""
    broken = "model.layers.1.mlp.up_proj"

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{broken}.{part}"][0, 0] = value

    measured = {m.name: m for m in measure(load(tiny.lora_null(tmp_path, change=change)), UNEQUAL)}
    assert measured[broken].defect == "non-finite weights (NaN or infinity)"
    assert measured[FIRST].defect is None
    assert measured["model.layers.1.self_attn.o_proj"].defect is None
    assert measured["model.layers.2.self_attn.q_proj"].defect == "non-finite activations (NaN or infinity)"


def test_an_activation_that_is_no_number_is_a_defect(tmp_path: Path) -> None:
    """A NaN that one token brings in is a defect of every layer that sees it, whatever the other rows are."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][39] = math.nan

    adapted = load(tiny.lora_null(tmp_path, change=change))
    assert {m.defect for m in measure(adapted, UNEQUAL)} == {"non-finite activations (NaN or infinity)"}
    assert {m.defect for m in measure(adapted, [[1, 2, 3]])} == {None}


def test_zero_inputs_are_a_defect(tmp_path: Path) -> None:
    """A layer whose every input row is zero cannot be judged, and does not divide by zero."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["model.layers.1.input_layernorm.weight"].zero_()

    measured = {m.name: m for m in measure(load(tiny.lora_null(tmp_path, change=change)), UNEQUAL)}
    assert measured["model.layers.1.self_attn.q_proj"].defect == "its input is zero in every row"
    assert measured["model.layers.1.mlp.up_proj"].defect is None


def test_an_adapter_of_zeros_is_measured(tmp_path: Path) -> None:
    """A = 0, as at initialisation, has figures of zero, not NaN; B = 0 has no space to leak, which is told."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{FIRST}.BLinear.weight"].zero_()

    first, second, *_ = measure(load(tiny.lora_null(tmp_path, change=change, up_scale=0.0)), UNEQUAL)
    assert (first.preservation, first.effectiveness, first.contribution) == (0, 0, 0)
    assert math.isnan(first.leakage)
    assert first.defect == "its down projection B is zero, so nothing can reach it"
    assert (second.effectiveness, second.contribution) == (0, 0)
    assert second.preservation > 0
    assert second.leakage > 0
