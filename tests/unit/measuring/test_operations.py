"""What the pass asks of a device: few operations a layer, however many windows a batch has, and no wait for any.

There is no card here. But on torch's meta device nothing can be looked at, so a look at a number is an error there, and
the same operations are dispatched as on a card. That they give the right figures is held on the CPU, told that a number
is not at hand.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_nullspace import kernels
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring import factors
from pytest_nullspace.measuring.distinct import AHEAD, DistinctRows, all_found
from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.drift import compared
from pytest_nullspace.measuring.recorder import Recorder
from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.measuring.summing import by_windows
from pytest_nullspace.model import AdaptedLayer, AdaptedModel, load_model
from tests import tiny
from tests.adapters import adapter
from tests.unit.measuring.test_measure import FIGURES, UNEQUAL, WEIGHTS

META, CPU = torch.device("meta"), torch.device("cpu")
TOKENS = 24
MOST = 45
"""Operations a layer and a batch beyond the model's own: views, which start nothing on a card, are among them."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: Mapping[str, Callable[[Path], Path]] = {
    "LoRA-Null": tiny.lora_null,
    "LoRA-Null, protected": lambda folder: tiny.lora_null(folder, protected=3),
    "LoRA-Null with biases": lambda folder: tiny.lora_null(folder, tiny.qwen2()),
    "PEFT": lambda folder: adapter(folder, tiny.llama(), r=4, target_modules=LINEAR),
    "PEFT with biases": lambda folder: adapter(folder, tiny.qwen2(), r=4, target_modules=LINEAR),
    "DoRA": lambda folder: adapter(folder, tiny.llama(), r=4, target_modules=LINEAR, use_dora=True),
}


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """A tiny model of that kind on the CPU."""
    with warnings.catch_warnings(action="ignore"):
        return load_model(open_checkpoint(KINDS[kind](folder)), CPU, dtype)


@contextmanager
def without_a_look(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within this context a CPU's numbers are taken as no more at hand than a card's."""
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "at_hand", lambda _: False)
        yield


def run(layers: Sequence[AdaptedLayer], windows: int, dtype: torch.dtype, flat: bool) -> Counter[str]:
    """Each layer called once on the meta device, as a forward would; the operations that this took."""
    shape = (TOKENS,) if flat else (windows, TOKENS)
    widths = {layer.in_features for layer in layers}
    inputs = {width: torch.empty(*shape, width, device=META, dtype=dtype) for width in widths}
    counting = Counting()
    with counting:
        for layer in layers:
            layer.layer(inputs[layer.in_features])
    return counting.seen


def operations(
    adapted: AdaptedModel, windows: Sequence[int], dtype: torch.dtype, *, batches: int = 2, routed: bool = False
) -> list[float]:
    """Operations a layer and a batch beyond the layers' own, of batches of so many ``windows``; all on the meta device.

    What only weights give is told before, on the CPU: on a card that takes one transfer for all layers.
    """
    layers, found = list(adapted.layers.values()), []
    if routed:
        layers = [replace(layer, name=f"model.experts.{number}.proj") for number, layer in enumerate(layers)]
    recorder = Recorder(META, batches * sum(windows))
    with torch.no_grad(), recorder.watching(layers):
        adapted.model.to(META)
        for base in {layer.base for layer in layers}:
            recorder._outweighed[base] = False  # asked once a layer, in the first batch
        first = 0
        for size in windows:
            counted: Counter[str] = Counter()
            for _ in range(batches):
                batch = Batch(torch.empty(size, TOKENS, device=META), first, None, [TOKENS] * size)
                counting = Counting()
                with counting:
                    recorder.start(batch)
                    run(layers, size, dtype, routed)
                    assert recorder.end() is None
                counted += counting.seen
                first += size
            with recorder.silent():
                bare = run(layers, size, dtype, routed)
            found.append((counted.total() / batches - bare.total()) / len(layers))
    assert recorder.sums._by_window.shape == (len(layers), batches * sum(windows), len(kernels.Sums._fields))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_operations_a_layer_do_not_grow_with_the_windows_of_a_batch(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """One window or eight, each layer costs the same few operations, and none that waits for the device."""
    _, one, eight = operations(load(tmp_path, kind, dtype), [1, 1, 8], dtype)  # memory is set aside once, in the first
    assert one == eight <= MOST


def test_an_expert_takes_the_same_road(tmp_path: Path) -> None:
    """What is routed to an expert is summed as all else is, in forwards of one window, with no look at a number."""
    (one,) = operations(load(tmp_path, "PEFT"), [1], torch.float32, routed=True)
    assert one <= MOST


def test_on_the_meta_device_a_look_at_a_number_is_an_error() -> None:
    """What stands for a card here fails wherever a card would have to be waited for."""
    there = torch.ones(3, device=META)
    for look in (lambda: there.sum().item(), lambda: bool(there.sum() > 0), there.cpu, there.tolist, there.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            look()


@pytest.mark.parametrize("places", [None, [0, 3, 4]])
def test_predictions_are_compared_without_a_look(places: list[int] | None) -> None:
    """What both models predict in a window is held against each other on a card, and nothing of it is waited for."""
    logits, counting = torch.empty(300, 50, device=META), [Counting(), Counting()]
    for many, seen in zip((6, 30), counting, strict=True):
        tokens = torch.empty(10 * many, dtype=torch.long, device=META)
        with seen:
            found = compared(logits[: 10 * many], logits[: 10 * many], tokens, places)
    assert found.device == META
    assert counting[0].seen.total() == counting[1].seen.total()


@pytest.mark.parametrize("max_rows", [None, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_look_the_figures_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, max_rows: int | None
) -> None:
    """The road that a card takes gives every figure, margin and count that the CPU's own gives."""
    adapted = load(tmp_path, kind, torch.float64)
    want = measure(adapted, UNEQUAL, max_rows=max_rows)
    with without_a_look(monkeypatch):
        got = measure(adapted, UNEQUAL, max_rows=max_rows, batch_size=4)
    for a, b in zip(got, want, strict=True):
        fields = (*FIGURES, *WEIGHTS)
        assert [getattr(a, name) for name in fields] == pytest.approx([getattr(b, name) for name in fields], rel=1e-6)
        assert (a.rows, a.distinct_rows, a.down_rank) == (b.rows, b.distinct_rows, b.down_rank)
        assert a.margins == pytest.approx(b.margins, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_computes_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    """Where a layer's parts are added by us the logits are the model's own, to the last bit, and so are they after."""
    adapted, tokens = load(tmp_path, kind, dtype), torch.tensor(UNEQUAL[:1])
    joins: list[float] = []
    with without_a_look(monkeypatch), torch.no_grad():
        monkeypatch.setattr(kernels, "joined", lambda *of, own=kernels.joined: joins.append(of[2]) or own(*of))  # type: ignore[func-returns-value]
        bare, recorder = adapted.model(input_ids=tokens).logits, Recorder(CPU, 1)
        with recorder.watching(list(adapted.layers.values())):
            recorder.start(Batch(tokens, 0, None, [tokens.shape[1]]))
            assert torch.equal(adapted.model(input_ids=tokens).logits, bare)
        made = len(joins)
        assert torch.equal(adapted.model(input_ids=tokens).logits, bare)
    plain = [layer for layer in adapted.layers.values() if layer.joined is not None]
    assert made == len(joins) == len(plain)
    assert bool(plain) is (kind != "DoRA")


@pytest.mark.parametrize("kind", ["LoRA-Null", "PEFT"])
def test_a_forward_of_somebody_else_is_left_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Where accelerate has put its own forward on the layers it runs and stays, and figures are the same."""
    adapted = load(tmp_path, kind, torch.float64)
    want, ran = measure(adapted, UNEQUAL), list[str]()
    for name, layer in adapted.layers.items():

        def forward(*of: Any, own: Any = layer.layer.forward, name: str = name, **more: Any) -> Any:
            ran.append(name)
            return own(*of, **more)

        layer.layer.forward = forward
    with without_a_look(monkeypatch):
        got = measure(adapted, UNEQUAL)
    assert set(ran) == set(adapted.layers)
    assert all("forward" in vars(layer.layer) for layer in adapted.layers.values())
    for a, b in zip(got, want, strict=True):
        assert [getattr(a, n) for n in FIGURES] == pytest.approx([getattr(b, n) for n in FIGURES], rel=1e-6)


@pytest.mark.parametrize("spoil", ["one row twice", "two rows nearly alike", "a row too short for float32", "a bias"])
def test_a_batch_is_run_anew_where_weights_are_not_as_presumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    """A card does not wait to know what of B or a bias decides how Bx and W x are taken: a wrong batch is run anew."""
    kind = "PEFT with biases" if spoil == "a bias" else "PEFT"
    adapted, exact = load(tmp_path / "a", kind), load(tmp_path / "b", kind, torch.float64)
    for model in adapted, exact:
        layer = next(iter(model.layers.values()))
        rows = layer.down.get_parameter("weight").data
        match spoil:
            case "a bias":
                layer.base.get_parameter("bias").data.fill_(1e5)
            case "one row twice":
                rows[1] = rows[0]
            case "two rows nearly alike":
                rows[1] = rows[0] + 2.0**-8 * rows[1]
            case _:
                rows[1] *= 2.0**-110
    want, batches = measure(exact, UNEQUAL), list[int]()

    def start(recorder: Recorder, batch: Batch, own: Any = Recorder.start) -> None:
        batches.append(batch.first)
        own(recorder, batch)

    monkeypatch.setattr(Recorder, "start", start)
    with without_a_look(monkeypatch):
        got = measure(adapted, UNEQUAL, batch_size=4)
    assert batches[:2] == [0, 0] != batches[1:3]
    for a, b in zip(got, want, strict=True):
        assert [getattr(a, name) for name in FIGURES] == pytest.approx([getattr(b, name) for name in FIGURES], rel=1e-4)
        assert (a.rows, a.down_rank) == (b.rows, b.down_rank)


class Last(Ranks):
    """The process of two that gets no window where there is one, which meets nobody."""

    def add(self, step: str, windows: range, read: Sequence[int], *sums: Tensor) -> None:
        """What the other has read is left out."""
        assert (len(windows), list(read)) == (1, [])

    def told(self, step: str, found: Any) -> list[Any]:
        """What this one found."""
        return [found]


def test_a_process_that_reads_nothing_knows_what_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are more processes than windows a card without a batch of its own tells of weights all the same."""
    adapted = load(tmp_path, "LoRA-Null")
    want = measure(adapted, UNEQUAL[:1])
    with without_a_look(monkeypatch):
        got = measure(adapted, UNEQUAL[:1], ranks=Last(0, 2))
    assert [(of.down_rank, of.rows) for of in got] == [(of.down_rank, 0) for of in want]


def test_weights_beyond_float32_are_told_without_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that float32 cannot hold are taken again in float64 also where they were not looked at."""
    adapted = load(tmp_path, "LoRA-Null")
    layer = next(iter(adapted.layers.values()))
    with torch.no_grad():
        layer.up_matrix.mul_(2.0**-90)
        layer.down.get_parameter("weight").mul_(2.0**90)
    with without_a_look(monkeypatch):
        (down, up, base), *_ = factors.weight_norms([layer])()
    weights = (layer.down.get_parameter("weight"), layer.up_matrix, layer.base.get_parameter("weight"))
    assert (down, up, base) == pytest.approx([float(weight.double().norm()) for weight in weights], rel=1e-7)


# What stands for the weights


def layer_of(down: Tensor, up: Tensor, scale: float) -> AdaptedLayer:
    """A layer of these matrices."""
    parts = [nn.Linear(matrix.shape[1], matrix.shape[0], bias=False) for matrix in (down, up)]
    for part, matrix in zip(parts, (down, up), strict=True):
        part.weight = nn.Parameter(matrix, requires_grad=False)
    first, last = parts
    return AdaptedLayer("x", first, first, last, first, scale, down.double, lambda: None, has_bias=False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 40), st.integers(-30, 30), st.integers(0, 2**31))
def test_factors_of_many_layers_are_those_of_each(rank: int, wide: int, out: int, power: int, seed: int) -> None:
    """Decomposed or by Gram matrices, in stacks or one by one: the same norms, rank, condition and row lengths."""
    rows = 2.0 ** random(rank, 1, seed=seed).mul(power).round()
    pairs = [(rows * random(rank, wide, seed=seed + n), random(out, rank, seed=seed - n - 1)) for n in range(3)]
    pairs.append((pairs[0][0], torch.zeros(out, rank, dtype=torch.float64)))
    for (down, up), got in zip(pairs, factors.of_layers([layer_of(*pair, -0.5) for pair in pairs]).told(), strict=True):
        want, bx = kernels.factors(down, up, -0.5), random(7, wide, seed=seed + 9) @ down.mT
        norms = (kernels.inner_norms(bx, of.matrices) for of in (got, want))
        for ours, theirs in zip(*norms, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)
        assert (got.rank, got.longest, got.shortest) == (want.rank, *map(pytest.approx, (want.longest, want.shortest)))
        assert want.mixing * (1 - 1e-6) <= got.mixing <= want.mixing * 1.011


@pytest.mark.parametrize(
    "spoil", ["repeated", "zero", "nearly", "nan", "infinite", "up is nan", "up is nearly", "short", "long"]
)
def test_what_is_not_well_conditioned_is_decomposed(spoil: str) -> None:
    """A row that others make, or none, a length beyond squares, no number: the factors are `kernels.factors`' own."""
    down, up = random(4, 20, seed=0), random(9, 4, seed=1)
    match spoil:
        case "repeated":
            down[3] = down[1]
        case "zero":
            down[3] = 0
        case "nearly":
            down[3] = down[1] + 1e-6 * down[3]
        case "nan" | "infinite":
            down[2, 5] = float("nan" if spoil == "nan" else "inf")
        case "up is nan":
            up[2, 2] = torch.nan
        case "up is nearly":
            up[:, 3] = up[:, 1] + 1e-6 * up[:, 3]
        case "short":
            up[:, 2] *= 1e-155
        case "long":
            down[1] *= 1e145
    good = layer_of(random(4, 20, seed=2), random(9, 4, seed=3), 1.0)
    _, got = factors.of_layers([good, layer_of(down, up, 2.0)]).told()
    want = kernels.factors(down, up, 2.0)
    torch.testing.assert_close(got.matrices, want.matrices, equal_nan=True, rtol=0, atol=0)
    assert repr(got[1:]) == repr(want[1:])


def test_of_many_layers_few_gram_matrices_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are, so many stacks as are decomposed at once; and then they are let go of."""
    held: list[weakref.ref[Tensor]] = []
    alive = []

    def gram(*of: Any, own: Any = factors._gram) -> Any:
        found = own(*of)
        held.append(weakref.ref(found[0]))
        alive.append(sum(ref() is not None for ref in held))
        return found

    monkeypatch.setattr(factors, "_gram", gram)
    pairs = [(random(1, 3, 20, seed=seed), random(1, 9, 3, seed=-seed - 1), 1.0) for seed in range(5 * factors.STACKS)]
    assert len(factors.quick(pairs)) == len(pairs) == len(held)
    assert max(alive) <= 2 * factors.STACKS


# What is kept of rows


@given(st.lists(st.lists(st.integers(0, 60), max_size=40), max_size=12), st.integers(1, 50))
def test_distinct_rows_are_the_same_without_a_look(parts: list[list[int]], width: int) -> None:
    """A store that may not look how many prints are distinct finds the same, in bounded memory."""
    with pytest.MonkeyPatch.context() as monkeypatch, without_a_look(monkeypatch):
        blind, seeing = DistinctRows(width, CPU), DistinctRows(width, CPU)
        for part in parts:
            blind.add(torch.tensor(part, dtype=torch.int64))
        assert len(blind._kept) <= AHEAD * width
        got = all_found([blind])[blind]
    seeing = DistinctRows(width, CPU)
    for part in parts:
        seeing.add(torch.tensor(part, dtype=torch.int64))
    want = seeing.found()
    assert (got is None) == (want is None)
    assert want is None or got is None or got.tolist() == want.tolist()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 2**31))
def test_windows_of_any_number_of_rows_are_summed_apart(counts: list[int], seed: int) -> None:
    """Each window's sums are those of its own rows, and what fills it up counts as no row; NaN stays where it is."""
    norms = random(6, 2, sum(counts), seed=seed).abs()
    if sum(counts) > 1:
        norms[:, :, -1] = torch.nan
    apart, rows = by_windows(norms, tuple(counts))
    names = ("input", "down", "update", "base", "output", "projected")
    got = kernels.sums(**dict(zip(names, apart.unbind(), strict=True)), rows=rows)
    for window, part in enumerate(torch.split(norms, counts, dim=-1)):
        want = kernels.sums(**dict(zip(names, part.unbind(), strict=True)))
        torch.testing.assert_close(got[:, window], want, equal_nan=True)
        assert got[:, window, 0].tolist() == [counts[window]] * 2
