"""The streaming pass: text through the model once, the layers' figures from what the recorder added up meanwhile."""

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from pytest_nullspace import kernels
from pytest_nullspace.errors import MeasurementError
from pytest_nullspace.measuring.batching import Batching
from pytest_nullspace.measuring.bypassed import bypassed
from pytest_nullspace.measuring.distinct import together
from pytest_nullspace.measuring.distributed import ALONE, Ranks
from pytest_nullspace.measuring.drift import Predictions
from pytest_nullspace.measuring.factors import weight_norms
from pytest_nullspace.measuring.figuring import figured, weighed
from pytest_nullspace.measuring.forward import forwards, telling
from pytest_nullspace.measuring.recorder import Recorder
from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.measuring.summing import OCTAVES
from pytest_nullspace.model import AdaptedLayer, AdaptedModel
from pytest_nullspace.run.stats import LayerStats
from pytest_nullspace.text.windows import Shown

FIRST_ROUND = 16
"""Windows after which a pass may end early, and again whenever they have doubled."""

Progress = Callable[[int, int], None]
"""Told how many windows of how many are done."""
Read = tuple[Sequence[int], Tensor, Tensor]
"""The windows that this process read, and what `Recorder.taken` gave of them."""
Seen = tuple[Mapping[str, Tensor | None], Mapping[str, int]]
"""What `Recorder.distinct` gives of some layers, and in how many windows their rows had no place."""
NOTHING = torch.empty(0), torch.empty(0)
"""That of no layer."""


def measure(
    adapted: AdaptedModel,
    windows: Sequence[Sequence[int]],
    *,
    layers: Collection[str] | None = None,
    batch_size: int | Batching = 1,
    max_rows: int | None = None,
    seed: int = 42,
    progress: Progress | None = None,
    settled: Callable[[tuple[LayerStats, ...]], bool] | None = None,
    ranks: Ranks = ALONE,
    shrunk: Callable[[int], None] | None = None,
    predictions: Predictions | None = None,
    counted: Sequence[Sequence[int]] | None = None,
) -> tuple[LayerStats, ...]:
    """Run ``windows`` through the model and take every figure of the chosen layers.

    Args:
        adapted: The model; it is left as it was, hooks removed.
        windows: Token ids; windows of equal length that follow one another share a batch, so nothing is padded.
        layers: The names of the layers to measure; all if None.
        batch_size: Windows a forward, or what finds out how many; halved for the rest of the pass whenever a device has
            no memory for so many, and one where a layer reads what only then can be told to be a window's.
        max_rows: At most so many rows a layer, drawn evenly and seeded from all windows; all rows if None.
        seed: Of that draw.
        progress: Called after each batch, as if every process were as far.
        settled: Asked after `FIRST_ROUND` windows, and whenever they have doubled, whether the figures suffice.
        ranks: The processes that share the windows; each gets the figures of all.
        shrunk: Told the batch size after each halving below the first.
        predictions: Takes the predictions of each forward, which then goes to its end, beside the base model's.
        counted: The places in each window of the tokens whose rows alone count; None where all do.

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
    if not chosen and predictions is None:
        return ()
    drawn = counted_rows(windows, counted, max_rows, seed)
    batching = Batching(batch_size) if isinstance(batch_size, int) else batch_size
    recorder, weights = Recorder(adapted.device, len(windows)), cache(partial(weight_norms, chosen))
    watching = recorder.rows.watching(adapted.model), recorder.watching(chosen)
    running = forwards(adapted, chosen, windows, whole=predictions is not None)
    with running as forward, watching[0], watching[1]:

        def read(part: range) -> Read:
            share, done, told = ranks.share(part), 0, part.start
            while done < len(share):
                ahead = share[done : done + batching.size]
                batch = batch_of(windows, ahead, drawn, adapted.device, counted is not None)
                count, began = len(batch.tokens), batching.begin(len(batch.tokens))
                anew = _run(recorder, forward, batch, predictions)
                if anew is not None:
                    if anew < count:
                        if not recorder.alone and count > batching.first:
                            anew = max(anew, batching.first)  # which fitted
                        batching.settle(anew)
                        if shrunk is not None and not recorder.alone and anew < batching.first:
                            shrunk(anew)
                    continue
                batching.counted(count, batch.tokens.numel(), began)
                done += count
                told = min(part.start + ranks.size * done, part.stop)
                if progress is not None:
                    progress(told, len(windows))
            if progress is not None and told < part.stop:
                progress(part.stop, len(windows))
            weights()  # a card takes them behind the forwards, while it is still waited for
            return share[:done], *(recorder.taken(part) if chosen else NOTHING)

        told = cache(lambda: weighed(chosen, recorder.down_ranks, weights()()))
        figures, lost = in_rounds(chosen, told, len(windows), read, ranks, predictions, settled)
        with recorder.silent():
            unused = bypassed(lost, forward, telling(windows), adapted.device)
    return with_rows(figures, ranks, [(recorder.distinct(), recorder.unplaced)], unused)


def in_rounds(
    chosen: Sequence[AdaptedLayer],
    told: Callable[[], Sequence[LayerStats]],
    windows: int,
    read: Callable[[range], Read],
    ranks: Ranks,
    predictions: Predictions | None,
    settled: Callable[[tuple[LayerStats, ...]], bool] | None,
) -> tuple[tuple[LayerStats, ...], list[AdaptedLayer]]:
    """The figures of so many windows, or of as many as settle them, and the layers that no row reached.

    Args:
        chosen: The layers.
        told: What is `weighed` of them, once some windows were read.
        windows: How many there are.
        read: Reads some of them.
        ranks: The processes that share them.
        predictions: Takes the predictions.
        settled: As `measure` asks it.
    """
    sums = torch.zeros(len(chosen), 0, len(kernels.Sums._fields), dtype=torch.float64)
    by_octave = torch.zeros(len(chosen), *OCTAVES, dtype=torch.float64)

    def figures() -> tuple[LayerStats, ...]:
        return figured(told(), sums, by_octave)

    for part in _rounds(windows, settled is not None):
        share, added, apart = read(part)
        if chosen:
            ranks.add("the sums over windows", part, share, added, apart)
            sums, by_octave = torch.cat((sums, added), dim=1), by_octave + apart
        if predictions is not None:
            predictions.merge(ranks, part, share)
        if settled is not None and part.stop < windows and settled(figures()):
            break
    # What a whole model computes with by itself is W′, with the update in it.
    lost = [layer for layer, of in zip(chosen, sums, strict=True) if not (layer.is_whole or of[:, 0].any())]
    return figures(), lost


def with_rows(
    layers: tuple[LayerStats, ...], ranks: Ranks, seen: Sequence[Seen], unused: Collection[str]
) -> tuple[LayerStats, ...]:
    """The figures, with how many rows were distinct and how many had no place, and where none was wanted."""
    found = [of for told in ranks.told("the distinct rows", list(seen)) for of in told]
    return tuple(
        replace(
            layer,
            distinct_rows=together([of[layer.name] for of, _ in found if layer.name in of], layer.in_features),
            unplaced=sum(of.get(layer.name, 0) for _, of in found),
            bypassed=1 if layer.name in unused else None,
        )
        for layer in layers
    )


def _rounds(windows: int, early: bool) -> Iterator[range]:
    """The windows in parts, after each of which a pass may end early; in one part where it may not."""
    first, last = 0, FIRST_ROUND if early else windows
    while first < windows:
        yield range(first, min(last, windows))
        first, last = last, 2 * last


def first_round(windows: int, early: bool) -> range:
    """The first of those parts."""
    return next(_rounds(windows, early))


def _run(
    recorder: Recorder, forward: Callable[[Batch], Any], batch: Batch, predictions: Predictions | None
) -> int | None:
    """Run and count ``batch``; where nothing is counted, of how many windows it is to be run anew, its memory freed."""
    compared = None
    try:
        recorder.start(batch)
        if predictions is None:
            forward(batch)
        else:
            compared = _compared(recorder, forward, batch, predictions)
        if (anew := recorder.end()) is not None:
            return anew
        if predictions is not None and compared is not None:
            predictions.add(batch.first, compared)
    except torch.OutOfMemoryError:
        if len(batch.tokens) == 1:
            raise
        recorder.forget()
    else:
        return None
    if batch.tokens.device.type != "cpu":  # only now that the exception, and the frames that it held, are gone
        getattr(torch, batch.tokens.device.type).empty_cache()
    return len(batch.tokens) // 2


def _compared(recorder: Recorder, forward: Callable[[Batch], Any], batch: Batch, predictions: Predictions) -> Tensor:
    """Run ``batch``, and hold its predictions against the base model's, which may run through the same layers."""
    logits = forward(batch).logits
    with recorder.silent():
        return predictions.compared(logits, batch.tokens, batch.first, batch.beside)


def counted_rows(
    windows: Sequence[Sequence[int]], counted: Sequence[Sequence[int]] | None, max_rows: int | None, seed: int
) -> Sequence[Sequence[int]] | None:
    """Which rows of each window count, at most so many of those that may; None where all do."""
    if counted is None:
        return draw_rows([len(window) for window in windows], max_rows, seed)
    drawn = draw_rows([len(places) for places in counted], max_rows, seed)
    if drawn is None:
        return counted
    return [[places[row] for row in rows] for places, rows in zip(counted, drawn, strict=True)]


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


def batch_of(
    windows: Sequence[Sequence[int]],
    numbers: range,
    drawn: Sequence[Sequence[int]] | None,
    device: torch.device,
    chosen: bool,
) -> Batch:
    """The first of the windows of these ``numbers``, and those of its length and form that follow it."""
    first = windows[numbers[0]]

    def form(window: Sequence[int]) -> tuple[Any, ...]:
        return len(window), isinstance(window, Shown), window.form if isinstance(window, Shown) else ()

    alike = [numbers[0], *takewhile(lambda number: form(windows[number]) == form(first), numbers[1:])]
    if len(alike) == len(first) > 1:
        alike.pop()  # of as many windows as tokens nobody could tell which are which
    rows = None if drawn is None else [drawn[number] for number in alike]
    return Batch.of([windows[number] for number in alike], device, alike[0], rows, chosen)
