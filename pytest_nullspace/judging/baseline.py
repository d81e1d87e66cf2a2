"""Run against run: what became worse since an earlier run, layer by layer, and whether the two compare at all. Pure.

A baseline is only ever read; it changes when somebody saves another run in its place.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_nullspace.judging.invariants import Stage, lower_is_better
from pytest_nullspace.run.stats import LayerStats, RunStats

BASE_TOLERANCE = 1e-3
"""How far ``‖W_res‖`` may differ between runs of one base, in whatever precision they were measured."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How much worse a figure may become.

    Attributes:
        figure: A name in `pytest_nullspace.run.figures.FIGURES`.
        amount: The limit itself is still allowed.
        relative: Whether ``amount`` is a share of the earlier value, or a difference.
    """

    figure: str
    amount: float
    relative: bool

    def __str__(self) -> str:
        """The limit as the option takes it: ``5%`` or ``0.001``."""
        return f"{self.amount:.6g}" if not self.relative else f"{100 * self.amount:.6g}%"


@dataclass(frozen=True, slots=True)
class Change:
    """One figure before and now.

    Attributes:
        figure: A name in `pytest_nullspace.run.figures.FIGURES`.
        before: Its value in the earlier run.
        now: Its value in this one.
        lower_is_better: Which direction is the worse.
    """

    figure: str
    before: float
    now: float
    lower_is_better: bool

    @property
    def worsened(self) -> float:
        """By how much it became worse; negative where it became better."""
        return self.now - self.before if self.lower_is_better else self.before - self.now

    @property
    def share(self) -> float:
        """The same as a share of the earlier value; infinite where that was zero and is no more."""
        if self.before:
            return self.worsened / abs(self.before)
        return math.copysign(math.inf, self.worsened) if self.worsened else 0.0

    def exceeds(self, limit: Limit) -> bool:
        """Whether it became worse by more than ``limit``; what is no number did."""
        return not (self.share if limit.relative else self.worsened) <= limit.amount

    def __str__(self) -> str:
        """The change in a phrase, such as ``preservation 0.02 → 0.03 (+50%)``."""
        told = "from zero" if not self.before and self.now else f"{self._moved:+.3%}"
        return f"{self.figure} {self.before:.4g} → {self.now:.4g} ({told})"

    @property
    def _moved(self) -> float:
        return (self.now - self.before) / abs(self.before) if self.before else 0.0


@dataclass(frozen=True)
class Comparison:
    """This run against an earlier one.

    Attributes:
        changes: Of each layer that both runs hold, the change of every figure that both measured.
        regressions: Of each layer of this run, what fails it, in phrases: limits exceeded, or that it is new.
        missing: The layers that only the earlier run holds.
    """

    changes: Mapping[str, tuple[Change, ...]]
    regressions: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]

    def worst(self, figure: str) -> tuple[str, Change] | None:
        """The layer in which a figure became worse by most, or better by least."""
        found = [(name, change) for name, changes in self.changes.items() for change in changes]
        return max(
            ((name, change) for name, change in found if change.figure == figure),
            key=lambda pair: pair[1].worsened if math.isfinite(pair[1].worsened) else math.inf,
            default=None,
        )


def compare(run: RunStats, earlier: RunStats, limits: Sequence[Limit], stage: Stage) -> Comparison:
    """Hold every layer of ``run`` against the layer of its name in ``earlier``."""
    changes = {
        layer.name: layer_changes(layer, before, stage)
        for layer in run.layers
        if (before := earlier.layer(layer.name)) is not None
    }
    held = {layer.name for layer in run.layers}
    return Comparison(
        changes,
        {layer.name: tuple(regressions(layer, earlier, limits, stage)) for layer in run.layers},
        tuple(layer.name for layer in earlier.layers if layer.name not in held),
    )


def layer_changes(layer: LayerStats, before: LayerStats, stage: Stage) -> tuple[Change, ...]:
    """The change of every figure that both runs measured."""
    return tuple(
        Change(figure, before.figure(figure), layer.figure(figure), lower_is_better(figure, stage))
        for figure in layer.measured
        if figure in before.measured
    )


def regressions(layer: LayerStats, earlier: RunStats, limits: Sequence[Limit], stage: Stage) -> Iterator[str]:
    """What became worse in ``layer`` than ``limits`` allow, in phrases; that it is new, where it is."""
    before = earlier.layer(layer.name)
    if before is None:
        yield "new: the earlier run has no such layer"
        return
    if not layer.rows:  # its figures are no numbers, which judging it tells
        return
    for change in layer_changes(layer, before, stage):
        for limit in limits:
            if limit.figure == change.figure and change.exceeds(limit):
                yield f"{change} is worse by more than {limit}"


@dataclass(frozen=True, slots=True)
class Difference:
    """Why two runs do not compare.

    Attributes:
        what: A name in `COMPARED`, or ``unrecorded``.
        how: What it is now, and what it was.
    """

    what: str
    how: str

    def __str__(self) -> str:
        """The difference in a phrase."""
        return f"{self.what} ({self.how})"


def _layers(of: Callable[[LayerStats], Any]) -> Callable[[RunStats, Collection[str]], Any]:
    def read(run: RunStats, common: Collection[str]) -> Any:
        values = {layer.name: of(layer) for layer in run.layers if layer.name in common}
        return values if any(values.values()) else None

    return read


def _about(section: str, key: str) -> Callable[[RunStats, Collection[str]], Any]:
    def read(run: RunStats, _: Collection[str]) -> Any:
        recorded = run.about.get(section)
        value = recorded.get(key) if isinstance(recorded, Mapping) else None
        return value if value is None or isinstance(value, str | int | float) else str(value)

    return read


COMPARED: Mapping[str, Callable[[RunStats, Collection[str]], Any]] = {
    "text": _about("text", "sha256"),
    "windows": _about("text", "windows"),
    "seqlen": _about("text", "seqlen"),
    "seed": _about("settings", "seed"),
    "rows": _layers(lambda layer: layer.rows),
    "rank": _layers(lambda layer: layer.rank),
    "widths": _layers(lambda layer: (layer.in_features, layer.out_features) if layer.in_features else ()),
    "base": _layers(lambda layer: layer.base_weight_norm),
    "task": _about("task_text", "sha256"),
    "figures": lambda run, _: list(run.measured),
}
"""What two runs must have in common, and where a run records it."""

UNRECORDED = "unrecorded"


def incomparable(
    run: RunStats, earlier: RunStats, conditions: Collection[str] = tuple(COMPARED)
) -> tuple[Difference, ...]:
    """All in which two runs differ so that their figures do not compare; layers that only one holds are left out.

    What only one of the two records, as the reference script records little, is one difference: ``unrecorded``.

    Args:
        run: This run.
        earlier: The other.
        conditions: The names in `COMPARED` that are looked at.
    """
    common = {layer.name for layer in run.layers} & {layer.name for layer in earlier.layers}
    found, unrecorded = [], []
    for what, read in COMPARED.items():
        if what not in conditions:
            continue
        now, before = read(run, common), read(earlier, common)
        if (now is None) != (before is None):
            unrecorded.append(what)
        elif isinstance(now, dict):
            differing = [name for name in now if not _alike(now[name], before[name])]
            if differing:
                name = differing[0]
                more = f" and {len(differing) - 1} more layers" if len(differing) > 1 else ""
                found.append(Difference(what, f"{name}: {_shown(now[name])}, was {_shown(before[name])}{more}"))
        elif now != before:
            found.append(Difference(what, f"{_shown(now)}, was {_shown(before)}"))
    if unrecorded:
        found.append(Difference(UNRECORDED, f"only one of the runs tells its {', '.join(unrecorded)}"))
    return tuple(found)


def _alike(now: Any, before: Any) -> bool:
    if isinstance(now, float) and isinstance(before, float):  # NaN fails its layer by itself
        return math.isnan(now) or math.isnan(before) or math.isclose(now, before, rel_tol=BASE_TOLERANCE)
    return bool(now == before)


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return "×".join(map(str, value)) if isinstance(value, tuple) else ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:12]
