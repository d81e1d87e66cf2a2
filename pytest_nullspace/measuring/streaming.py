"""The streaming pass: text through the model once, forward hooks that add to sums, no activation kept.

A layer's hooks take the norms of its wide activations while these are still in the cache, and keep them, with the
narrow ``Bx``, until enough layers have come together to be summed at once. On a CPU they see at once whether a norm
left float32's range, or ``Bx`` lost its digits to cancellation, and take it in float64 where it did.
"""

import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from pytest_nullspace import kernels
from pytest_nullspace.errors import MeasurementError
from pytest_nullspace.measuring.distributed import ALONE, Ranks
from pytest_nullspace.measuring.forward import forwards
from pytest_nullspace.model import AdaptedLayer, AdaptedModel
from pytest_nullspace.model.stored import zeroed
from pytest_nullspace.run.stats import LayerStats
from pytest_nullspace.run.uncertainty import margins

CANCELLATION = 5e-8
"""The relative error to which cancellation in a float32 ``Bx`` may add up over a batch."""

HELD_BYTES = 1 << 22
"""What may be kept of norms and narrow activations before they are summed."""

FIRST_ROUND = 16
"""Windows after which a pass may end early, and again whenever they have doubled."""

Progress = Callable[[int, int], None]
"""Told how many windows of how many are done."""


def measure(
    adapted: AdaptedModel,
    windows: Sequence[Sequence[int]],
    *,
    layers: Collection[str] | None = None,
    batch_size: int = 1,
    max_rows: int | None = None,
    seed: int = 42,
    progress: Progress | None = None,
    settled: Callable[[tuple[LayerStats, ...]], bool] | None = None,
    ranks: Ranks = ALONE,
    shrunk: Callable[[int], None] | None = None,
) -> tuple[LayerStats, ...]:
    """Run ``windows`` through the model and take every figure of the chosen layers.

    Args:
        adapted: The model; it is left as it was, hooks removed.
        windows: Token ids; windows of equal length that follow one another share a batch, so nothing is padded.
        layers: The names of the layers to measure; all if None.
        batch_size: Windows a forward; halved for the rest of the pass whenever a device has no memory for so many.
        max_rows: At most so many rows a layer, drawn evenly and seeded from all windows; all rows if None.
        seed: Of that draw.
        progress: Called after each batch, as if every process were as far.
        settled: Asked after `FIRST_ROUND` windows, and whenever they have doubled, whether the figures suffice.
        ranks: The processes that share the windows; each gets the figures of all.
        shrunk: Told the batch size after each halving.

    Returns:
        The figures in the model's order of layers, with margins from how they vary between windows. A layer that saw no
        row, or saw NaN or infinity, has a `defect`.

    Raises:
        MeasurementError: There is no window, or one without tokens, or another process failed.
        torch.OutOfMemoryError: A device has no memory even for one window.
    """
    if not windows or not all(windows):
        raise MeasurementError("windows: there is none, or one without tokens; give at least one token id in each")
    chosen = [layer for name, layer in adapted.layers.items() if layers is None or name in layers]
    if not chosen:
        return ()
    drawn = draw_rows([len(window) for window in windows], max_rows, seed)
    recorder = _Recorder(adapted.device, len(windows))
    sums = torch.zeros(len(chosen), 0, len(kernels.Sums._fields), dtype=torch.float64)

    def figures() -> tuple[LayerStats, ...]:
        return tuple(
            _stats(layer, recorder.down_ranks[layer.name], by_window)
            for layer, by_window in zip(chosen, sums, strict=True)
        )

    with forwards(adapted, chosen, windows[0]) as forward, recorder.watching(chosen):
        for part in _rounds(len(windows), settled is not None):
            share, done, told = ranks.share(part), 0, part.start
            while done < len(share):
                batch = _batch(windows, share[done : done + batch_size], drawn, adapted.device)
                if not _fits(recorder, forward, batch):
                    batch_size = len(batch.tokens) // 2
                    if shrunk is not None:
                        shrunk(batch_size)
                    continue
                done += len(batch.tokens)
                told = min(part.start + ranks.size * done, part.stop)
                if progress is not None:
                    progress(told, len(windows))
            added = torch.stack([recorder.sums[layer.name][part.start : part.stop] for layer in chosen]).cpu()
            ranks.add("the sums over windows", part, share[:done], added)
            sums = torch.cat((sums, added), dim=1)
            if progress is not None and told < part.stop:
                progress(part.stop, len(windows))
            if settled is not None and part.stop < len(windows) and settled(figures()):
                break
    return figures()


def _rounds(windows: int, early: bool) -> Iterator[range]:
    """The windows in parts, after each of which a pass may end early; in one part where it may not."""
    first, last = 0, FIRST_ROUND if early else windows
    while first < windows:
        yield range(first, min(last, windows))
        first, last = last, 2 * last


def _fits(recorder: "_Recorder", forward: Callable[[Tensor], None], batch: "_Batch") -> bool:
    """Run and count ``batch``; False, nothing counted and its memory given back, where the device has none for it."""
    try:
        recorder.start(batch)
        forward(batch.tokens)
        recorder.end()
    except torch.OutOfMemoryError:
        if len(batch.tokens) == 1:
            raise
        recorder.forget()
    else:
        return True
    if batch.tokens.device.type != "cpu":  # only now that the exception, and the frames that it held, are gone
        getattr(torch, batch.tokens.device.type).empty_cache()
    return False


def _stats(layer: AdaptedLayer, down_rank: int, by_window: Tensor) -> LayerStats:
    down, up, base = layer.weight_norms()
    whole = kernels.merge(by_window)

    def stats(summed: Tensor) -> LayerStats:
        means = kernels.compute(summed)
        return LayerStats(
            name=layer.name,
            rows=means.rows,
            in_features=layer.in_features,
            rank=layer.rank,
            out_features=layer.out_features,
            input_norm=means.input,
            down_norm=means.down,
            update_norm=means.update,
            base_norm=means.base,
            output_norm=means.output,
            mean_leakage=means.leakage,
            down_weight_norm=down,
            up_weight_norm=up,
            base_weight_norm=base,
            down_rank=down_rank,
        )

    seen = [window for window in by_window if window[0] > 0]
    return replace(stats(whole), margins=margins([stats(whole - window) for window in seen]))


def draw_rows(lengths: Sequence[int], max_rows: int | None, seed: int) -> list[list[int]] | None:
    """Which rows of each window are counted when ``max_rows`` caps them.

    Each window gives its share, to within one row.

    Args:
        lengths: Rows of each window.
        max_rows: How many rows to keep.
        seed: Of the choice within each window.

    Returns:
        Sorted row numbers for each window, ``min(max_rows, sum(lengths))`` in all; None where every row counts.
    """
    total = sum(lengths)
    if max_rows is None or max_rows >= total:
        return None
    choose = random.Random(seed)
    drawn, before = [], 0
    for length in lengths:
        share = (before + length) * max_rows // total - before * max_rows // total
        drawn.append(sorted(choose.sample(range(length), share)))
        before += length
    return drawn


@dataclass(frozen=True)
class _Batch:
    """Windows of equal length that share a forward.

    Attributes:
        tokens: Shape ``(b, length)``.
        first: The number of the first window.
        rows: The numbers of the counted rows among the ``b · length``, or None for all.
        counts: How many of them each window has.
    """

    tokens: Tensor
    first: int
    rows: Tensor | None
    counts: list[int]


def _batch(
    windows: Sequence[Sequence[int]], numbers: range, drawn: list[list[int]] | None, device: torch.device
) -> _Batch:
    """The first of the windows of these ``numbers``, and those of its length that follow it."""
    length = len(windows[numbers[0]])
    alike = list(takewhile(lambda number: len(windows[number]) == length, numbers))
    tokens = torch.tensor([list(windows[number]) for number in alike], device=device)
    if drawn is None:
        return _Batch(tokens, alike[0], None, [length] * len(alike))
    of = [drawn[number] for number in alike]
    counted = [position * length + row for position, rows in enumerate(of) for row in rows]
    return _Batch(tokens, alike[0], torch.tensor(counted, dtype=torch.long, device=device), list(map(len, of)))


@dataclass(frozen=True)
class _Watched:
    """A layer under measurement.

    Attributes:
        layer: Where its parts are.
        factors: `kernels.factors` of its weights.
        in_parts: Whether its parts must be put together anew, for a bias or a magnitude.
        seen: What its parts gave in the forward that is under way.
    """

    layer: AdaptedLayer
    factors: Tensor
    in_parts: bool
    seen: dict[str, Tensor] = field(default_factory=dict)

    @property
    def updates_by_more(self) -> bool:
        """Whether its update is more than ``scale · A B x``."""
        return self.layer.has_magnitude or _has_bias(self.layer.up)


@dataclass(frozen=True)
class _Taken:
    """What was taken of one layer in one forward.

    Attributes:
        watched: The layer.
        norms: Of ``x``, ``W_res x``, the output and, where it is more than ``scale · A B x``, the update; shape
            ``(3 or 4, n)``.
        down: ``Bx``, shape ``(n, r)``.
    """

    watched: _Watched
    norms: Tensor
    down: Tensor


class _Held:
    """Memory set aside for what is kept from layer to layer.

    Kept where it was allocated, amid wide activations that are freed, each small piece would stop their memory from
    being used again, and the heap would grow with every layer.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory, self._used = torch.empty(size, dtype=torch.uint8, device=device), 0

    def has_room(self, *parts: Tensor) -> bool:
        """Whether copies of ``parts`` fit beside what is kept."""
        return self._used + sum(map(_padded, parts)) <= len(self._memory)

    def keep(self, part: Tensor) -> Tensor:
        """A copy of ``part``, for which there `has_room`."""
        kept = self._memory[self._used : self._used + part.nbytes].view(part.dtype).view(part.shape)
        self._used += _padded(part)
        return kept.copy_(part)

    def clear(self) -> None:
        """Forget all that is kept."""
        self._used = 0


def _padded(part: Tensor) -> int:
    return -(-part.nbytes // 64) * 64


class _Recorder:
    """Takes the norms of each watched layer while it runs, and adds them to its sums.

    Attributes:
        sums: For each layer the sums of each window, shape ``(windows, len(kernels.Sums))``.
        down_ranks: How many directions the rows of its B span.
    """

    def __init__(self, device: torch.device, windows: int) -> None:
        self._device, self._windows = device, windows
        self.sums: dict[str, Tensor] = {}
        self.down_ranks: dict[str, int] = {}
        self._batch = _Batch(torch.empty(0), 0, None, [])
        self._watched: list[_Watched] = []
        self._input: Tensor | None = None
        self._input_norms = torch.empty(0)
        self._held: list[_Taken] = []
        self._memory = _Held(HELD_BYTES, device)
        self._of_batch: list[tuple[str, Tensor]] = []

    def start(self, batch: _Batch) -> None:
        """From here on count the rows of ``batch``."""
        self._batch, self._input = batch, None
        self._forget_held()
        self._of_batch.clear()

    def forget(self) -> None:
        """Let go of all that was seen of a batch that did not come to its end."""
        self._input = None
        self._forget_held()
        self._of_batch.clear()
        for watched in self._watched:
            watched.seen.clear()

    def end(self) -> None:
        """Count the batch."""
        self._sum_held()
        first = self._batch.first
        for name, summed in self._of_batch:
            # An expert may run more than once a forward.
            self.sums[name][first : first + len(summed)] += summed

    @contextmanager
    def watching(self, layers: Sequence[AdaptedLayer]) -> Iterator[None]:
        """Hooks on every layer of ``layers``, removed at the end whatever happens."""
        with ExitStack() as hooks:
            for layer in layers:
                shape = self._windows, len(kernels.Sums._fields)
                self.sums[layer.name] = torch.zeros(shape, dtype=torch.float64, device=self._device)
                factors = kernels.factors(layer.down_matrix(), layer.up_matrix, layer.scale)
                self.down_ranks[layer.name] = kernels.down_rank(factors)
                watched = _Watched(
                    layer,
                    factors.to(self._device),
                    layer.has_magnitude or layer.has_bias or _has_bias(layer.up),
                )
                self._watched.append(watched)
                takes: dict[str, Callable[[Tensor], Tensor]] = {
                    "down": self._counted,
                    "base": self._norms,
                }
                if watched.in_parts:
                    takes |= {"base": self._counted, "up": self._counted}
                for part, take in takes.items():
                    handle = getattr(layer, part).register_forward_hook(partial(_keep, watched.seen, part, take))
                    hooks.callback(handle.remove)
                if not layer.has_magnitude:
                    hooks.enter_context(_bias_apart(layer.base))
                handle = layer.layer.register_forward_hook(partial(self._take, watched))
                hooks.callback(handle.remove)
            try:
                yield
            finally:
                self._input = None
                self._forget_held()

    def _take(self, watched: _Watched, _: nn.Module, args: Any, output: Tensor) -> None:
        x, layer, change = args[0], watched.layer, []
        down, base, output = watched.seen["down"], watched.seen["base"], self._counted(output)
        if x is not self._input:
            self._input, self._input_norms = x, self._norms(x)
        if watched.in_parts:
            whole, output, parts = _parts(layer, base, watched.seen["up"], output)
            base = self._norms_of(whole)
            change = [self._norms_of(parts)] if watched.updates_by_more else []
        if self._device.type == "cpu" and _loses_digits(down, self._input_norms, layer.in_features):
            down = self._counted(x).double() @ layer.down_matrix().mT
        watched.seen.clear()
        # An input may be seen before accelerate brings it to where its layer runs.
        norms = [part.to(self._device) for part in (self._input_norms, base, self._norms_of(output), *change)]
        if len({part.dtype for part in norms}) > 1:
            norms = [part.double() for part in norms]
        self._hold(_Taken(watched, torch.stack(norms), down))

    def _hold(self, taken: _Taken) -> None:
        if not self._memory.has_room(taken.norms, taken.down):
            self._sum_held()
        if not self._memory.has_room(taken.norms, taken.down):
            self._sum([taken])
            return
        self._held.append(_Taken(taken.watched, self._memory.keep(taken.norms), self._memory.keep(taken.down)))

    def _norms(self, values: Tensor) -> Tensor:
        return self._norms_of(self._counted(values))

    def _norms_of(self, values: Tensor) -> Tensor:
        norms = kernels.row_norms(values)
        if self._device.type == "cpu" and not kernels.safe(norms):
            return kernels.row_norms(values.double())
        return norms

    def _counted(self, values: Tensor) -> Tensor:
        values = values.reshape(-1, values.shape[-1])
        if self._batch.rows is None or not len(values):
            return values
        if len(values) == self._batch.tokens.numel():
            return values.index_select(0, self._batch.rows.to(values.device))
        # An expert sees only the rows that were routed to it: of them the same share is counted, spread alike.
        rows = self._batch.rows * len(values) // self._batch.tokens.numel()
        share: Tensor = rows.unique()  # type: ignore[no-untyped-call]
        return values.index_select(0, share.to(values.device))

    def _sum_held(self) -> None:
        """Add up what was taken, the layers of one shape at once."""

        def shape(taken: _Taken) -> tuple[Any, ...]:
            return taken.norms.shape, taken.norms.dtype, taken.down.shape, taken.down.dtype

        for _, alike in groupby(sorted(self._held, key=lambda taken: repr(shape(taken))), key=shape):
            self._sum(list(alike))
        self._forget_held()

    def _forget_held(self) -> None:
        self._held.clear()
        self._memory.clear()

    def _sum(self, taken: list[_Taken]) -> None:
        exact = torch.promote_types(taken[0].down.dtype, torch.float32)
        down = torch.stack([t.down for t in taken]).to(self._device, exact)
        factors = torch.stack([t.watched.factors for t in taken])
        projected, update = kernels.inner_norms(down, factors.to(exact))
        narrow = torch.stack((kernels.row_norms(down), projected, update))
        if self._device.type == "cpu" and not kernels.safe(narrow):
            down = down.double()
            narrow = torch.stack((kernels.row_norms(down), *kernels.inner_norms(down, factors)))
        down_norms, projected, update = narrow.unbind()
        x, base, output, *change = torch.stack([t.norms for t in taken], dim=1).to(self._device).unbind()
        parts = {"input": x, "down": down_norms, "base": base, "output": output, "projected": projected}
        parts["update"] = change[0] if change else update
        counts = self._batch.counts
        if sum(counts) != x.shape[-1]:
            # Which of an expert's rows came from which window is not known: the batch counts as one.
            counts = [x.shape[-1]]
        split = {name: torch.split(part, counts, dim=-1) for name, part in parts.items()}
        by_window = [kernels.sums(**{name: part[i] for name, part in split.items()}) for i in range(len(counts))]
        for t, summed in zip(taken, torch.stack(by_window, dim=1), strict=True):
            self._of_batch.append((t.watched.layer.name, summed))


def _loses_digits(down: Tensor, input_norms: Tensor, in_features: int) -> bool:
    """Whether a float32 ``Bx`` is not exact, because its inputs are not or because it is mostly cancelled."""
    if input_norms.dtype == torch.float64:
        return True
    if down.dtype != torch.float32:
        return False
    # Rounding errors are a random walk of `in` steps, so they grow beside what cancellation leaves.
    error = 2.0**-22 * input_norms.norm().item() / math.sqrt(in_features)
    return bool(error > CANCELLATION * kernels.row_norms(down).sum().item())


def _parts(layer: AdaptedLayer, base: Tensor, up: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``W_res x``, the layer's whole output and its update, where they are not simply what the modules give.

    A bias can outweigh the output: adding the parts again is exact where subtracting it is not. What a magnitude made
    of the parts is only in the output.
    """
    if not layer.has_magnitude:
        change = layer.scale * up
        return base, base + change, change
    bias = getattr(layer.base, "bias", None)
    change = output - base
    return (base - bias, output - bias, change) if isinstance(bias, Tensor) else (base, output, change)


def _has_bias(module: nn.Module) -> bool:
    return isinstance(getattr(module, "bias", None), Tensor)


def _keep(
    seen: dict[str, Tensor], part: str, what: Callable[[Tensor], Tensor], _: nn.Module, __: Any, output: Tensor
) -> None:
    seen[part] = what(output)


@contextmanager
def _bias_apart(base: nn.Module) -> Iterator[None]:
    """Within this context ``base`` adds its bias in a last hook of its own, so that earlier hooks see ``W x`` alone."""
    if not _has_bias(base):
        yield
        return
    with zeroed(base, "bias") as bias:
        handle = base.register_forward_hook(lambda _, __, output: output + bias.to(output.device))
        try:
            yield
        finally:
            handle.remove()
