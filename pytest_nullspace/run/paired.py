"""Two runs on the same windows: how far the difference of a figure may lie from what more text would give. Pure.

What a hard window does to a figure it does on both sides alike, so the difference is told apart from none with far
fewer windows than two margins that are taken one by one.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

from pytest_nullspace.run.stats import Drift, LayerStats, TextDrift
from pytest_nullspace.run.uncertainty import jackknife

Of = TypeVar("Of", LayerStats, Drift)

Differences = Mapping[str, Sequence[Sequence[float]]]
"""Of each figure and each text, the difference of two runs with one window of that text left out, each in turn."""


def differences(now: Of, before: Of, figures: Collection[str], value: Callable[[Of, str], float]) -> Differences | None:
    """By how much figures differ with one window left out of both; None where the windows were not kept, or differ.

    Args:
        now: What was measured.
        before: The same in the other run.
        figures: Which.
        value: Gives one of them.
    """
    if list(now.further) != list(before.further):
        return None
    texts = list(zip(_texts(now), _texts(before), strict=True))
    for one, other in texts:
        if (one is None) != (other is None):
            return None
        kept = [of.by_window for of in (one, other) if of is not None]
        if None in kept or len({tuple(of.rows) for of in kept if of is not None}) > 1:
            return None
    pairs = [
        list(zip(_left_out(now, text), _left_out(before, text), strict=True))
        for text, (one, _) in enumerate(texts)
        if one is not None
    ]
    return {f: [[value(one, f) - value(other, f) for one, other in pair] for pair in pairs] for f in figures}


def margin(found: Sequence[Sequence[float]]) -> float | None:
    """The margin of a difference, from what `differences` gives of its figure; None where it cannot be had.

    The texts are drawn one by one, so what each adds to the variance adds up.
    """
    whole = math.hypot(*map(jackknife, found))
    return whole if math.isfinite(whole) else None


def averaged(of_layers: Collection[Differences], figure: str) -> Sequence[Sequence[float]] | None:
    """The differences of the mean over layers; None where they did not all see the same windows."""
    found = [differences[figure] for differences in of_layers]
    if len({tuple(map(len, texts)) for texts in found}) > 1:
        return None
    return [[fmean(values) for values in zip(*text, strict=True)] for text in zip(*found, strict=True)]


def _texts(of: LayerStats | Drift) -> tuple[LayerStats | TextDrift | None, ...]:
    first = of if isinstance(of, LayerStats) else of.preserved
    return first, of.task, *of.further.values()


def _left_out(of: Of, text: int) -> list[Of]:
    """What was measured, with one window of that text left out, each in turn."""
    one: Any = _texts(of)[text]
    parts: list[Any] = [replace(one, **means) for means in one.by_window.left_out()]
    if text == 0 and isinstance(of, LayerStats):
        return parts
    if text > 1:
        name = list(of.further)[text - 2]
        return [replace(of, further={**of.further, name: part}) for part in parts]
    field = "preserved" if text == 0 else "task"
    return [replace(of, **{field: part}) for part in parts]
