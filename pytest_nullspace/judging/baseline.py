"""Run against run: what became worse since an earlier run that compares with it, layer by layer. Pure.

A baseline is only ever read; it changes when somebody saves another run in its place.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from pytest_nullspace.judging.comparable import about, doubts
from pytest_nullspace.judging.invariants import Stage, lower_is_better
from pytest_nullspace.run import paired
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats
from pytest_nullspace.run.texts import FIRST, preserved

ROUNDING = 2e-6
"""How far a figure may differ on the very same windows although nothing did: each is right to half of it.

A share of it; of the predictions' figures, which are what is left of losses, in nats.
"""


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
        margin: How far the difference may lie from what more text would give; None unless both are of the same windows.
        text: The name of the text on which it is, if several preserved texts have it.
    """

    figure: str
    before: float
    now: float
    lower_is_better: bool
    margin: float | None = None
    text: str = ""

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

    @property
    def is_none(self) -> bool:
        """Whether nothing changed; what is no number did."""
        if self.margin is None:
            return self.now == self.before
        size = 1.0 if FIGURES[self.figure].of_predictions else max(abs(self.before), abs(self.now))
        return abs(self.now - self.before) <= ROUNDING * size

    @property
    def is_worse(self) -> bool:
        """Whether it became worse beyond doubt: by more than its margin."""
        return self.margin is not None and not self.is_none and self.worsened > self.margin

    def exceeds(self, limit: Limit) -> bool:
        """Whether it became worse by more than ``limit``; what is no number did."""
        return not (self.is_none or (self.share if limit.relative else self.worsened) <= limit.amount)

    def beyond(self, limit: Limit) -> str:
        """That it `exceeds` ``limit``, and whether more text might change that, in a phrase."""
        if self.margin is None:
            return f"{self} is worse by more than {limit}"
        room = limit.amount * abs(self.before) if limit.relative else limit.amount
        doubt = "" if self.worsened - self.margin > room else ", though within its margin: more windows would tell"
        return f"{self}: more than the {limit} allowed{doubt}"

    def __str__(self) -> str:
        """The change in a phrase, such as ``preservation 0.02 → 0.03 (+50%), worse by 0.01 ± 0.002``."""
        told = "from zero" if not self.before and self.now else f"{self._moved:+.3%}"
        on = f" on {self.text}" if self.text else ""
        return f"{self.figure}{on} {self.before:.4g} → {self.now:.4g} ({told}){self._difference}"

    @property
    def _difference(self) -> str:
        if self.margin is None:
            return ""
        if self.is_none:
            return ", no change"
        return f", {'worse' if self.worsened > 0 else 'better'} by {abs(self.worsened):.2g} ± {self.margin:.2g}"

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
        averages: The change of every figure in the mean of the layers that both runs hold and a row reached.
        drift: The change of every figure of the predictions that both runs tell.
        drift_regressions: What fails the drift, in phrases.
        unpaired: Why the two are not held against each other window by window; None if they are.
        doubts: In what they differ all the same, or may, in sentences.
    """

    changes: Mapping[str, tuple[Change, ...]]
    regressions: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]
    averages: tuple[Change, ...] = ()
    drift: tuple[Change, ...] = ()
    drift_regressions: tuple[str, ...] = ()
    unpaired: str | None = None
    doubts: tuple[str, ...] = ()

    @property
    def is_none(self) -> bool:
        """Whether all is what it was."""
        changes = [change for told in self.changes.values() for change in told]
        return (
            not self.missing
            and self.changes.keys() == self.regressions.keys()
            and all(c.is_none or (math.isnan(c.before) and math.isnan(c.now)) for c in (*changes, *self.drift))
        )

    def worst(self, figure: str) -> tuple[str, Change] | None:
        """The layer in which a figure became worse by most, or better by least."""
        return max(
            self._of(figure),
            key=lambda pair: pair[1].worsened if math.isfinite(pair[1].worsened) else math.inf,
            default=None,
        )

    def worse(self, figure: str) -> int:
        """In how many layers a figure became worse by more than its margin."""
        return sum(change.is_worse for _, change in self._of(figure))

    def _of(self, figure: str) -> Iterator[tuple[str, Change]]:
        found = ((name, change) for name, changes in self.changes.items() for change in changes)
        return ((name, change) for name, change in found if change.figure == figure)


def compare(run: RunStats, earlier: RunStats, limits: Sequence[Limit], stage: Stage) -> Comparison:
    """Hold every layer of ``run`` against the layer of its name in ``earlier``, and the drift against the drift.

    On the same windows each change has the margin of the difference, by the jackknife over windows.
    """
    unpaired = _why_unpaired(run, earlier)
    pairs = [(layer, was) for layer in run.layers if (was := earlier.layer(layer.name)) is not None]
    changes, differences = {}, {}
    for layer, was in pairs:
        figures = [figure for figure in layer.measured if figure in was.measured]
        found = paired.differences(layer, was, figures, LayerStats.figure) if unpaired is None else None
        changes[layer.name] = _changes(figures, was.figure, layer.figure, found, stage)
        if layer.rows and was.rows:
            differences[layer.name] = found
    held = {layer.name for layer in run.layers}
    drift = _drift_changes(run.drift, earlier.drift, unpaired is None, stage)
    return Comparison(
        changes,
        {layer.name: tuple(_regressions(layer, changes.get(layer.name), limits)) for layer in run.layers},
        tuple(layer.name for layer in earlier.layers if layer.name not in held),
        _averages(changes, differences, stage),
        drift,
        tuple(_beyond(drift, limits)),
        unpaired,
        tuple(doubts(run, earlier)),
    )


def _changes(
    figures: Collection[str],
    before: Callable[[str], float],
    now: Callable[[str], float],
    found: paired.Differences | None,
    stage: Stage,
) -> tuple[Change, ...]:
    """The change of every figure, with its margin where ``found`` tells the differences."""
    margins = {} if found is None else {figure: paired.margin(found[figure]) for figure in figures}
    return tuple(Change(f, before(f), now(f), lower_is_better(f, stage), margins.get(f)) for f in figures)


def _averages(
    changes: Mapping[str, tuple[Change, ...]], found: Mapping[str, paired.Differences | None], stage: Stage
) -> tuple[Change, ...]:
    """The change of every figure that all layers tell, in the mean of those that are ``found``."""
    of_layers = [{change.figure: change for change in changes[name]} for name in found]
    told = list(found.values())
    averages = []
    for figure in of_layers[0] if of_layers else ():
        if all(figure in layer for layer in of_layers):
            before, now = (fmean(getattr(layer[figure], side) for layer in of_layers) for side in ("before", "now"))
            known = [differences for differences in told if differences is not None]
            mean = paired.averaged(known, figure) if len(known) == len(told) else None
            margin = None if mean is None else paired.margin(mean)
            averages.append(Change(figure, before, now, lower_is_better(figure, stage), margin))
    return tuple(averages)


def _drift_changes(drift: Drift | None, earlier: Drift | None, same: bool, stage: Stage) -> tuple[Change, ...]:
    if drift is None or earlier is None:
        return ()

    changes: list[Change] = []
    for name in drift.texts:
        # The first text's may have got a name since, the others are known by theirs.
        was = earlier.name if name == drift.name else name
        if was in earlier.texts:
            changes += _text_changes(drift, name, earlier, was, same, stage)
    return tuple(changes)


def _text_changes(drift: Drift, name: str, earlier: Drift, was: str, same: bool, stage: Stage) -> Iterator[Change]:
    """The changes on the text of that ``name``, which is called ``was`` in the earlier run."""
    now, before = drift.figures_on(name), earlier.figures_on(was)
    figures = [figure for figure in now if figure in before]

    def value(of: Drift, figure: str) -> float:
        return of.figures_on(name if name in of.texts else was)[figure][0]

    found = paired.differences(drift, earlier, figures, value) if same else None
    for change in _changes(figures, partial(value, earlier), partial(value, drift), found, stage):
        yield replace(change, text=name)


def _regressions(layer: LayerStats, changes: Sequence[Change] | None, limits: Sequence[Limit]) -> Iterator[str]:
    """What became worse in ``layer`` than ``limits`` allow, in phrases; that it is new, where it is."""
    if changes is None:
        yield "new: the earlier run has no such layer"
    elif layer.rows:  # else its figures are no numbers, which judging it tells
        yield from _beyond(changes, limits)


def _beyond(changes: Iterable[Change], limits: Sequence[Limit]) -> Iterator[str]:
    for change in changes:
        for limit in limits:
            if limit.figure == change.figure and change.exceeds(limit):
                yield change.beyond(limit)


def _why_unpaired(run: RunStats, earlier: RunStats) -> str | None:
    """Why two runs cannot be held against each other window by window; None if they can."""
    for of, which in ((earlier, "the earlier run"), (run, "this run")):
        if all(layer.by_window is None for layer in of.layers):
            return f"{which} does not tell what each window gave"
    further = {*preserved(run.about), *preserved(earlier.about)} - {FIRST}
    for what in (FIRST, "task_text", *sorted(further)):
        read = about(what, "windows_sha256")
        now, before = read(run, ()), read(earlier, ())
        told = f"the windows of the {what.replace('_', ' ')} are not"
        if now != before and None not in (now, before):
            return f"{told} the same"
        if now != before or (what == FIRST and now is None):
            return f"{told} known to be the same"
    return None
