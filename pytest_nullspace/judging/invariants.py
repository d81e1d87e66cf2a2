"""The invariants: which figure may lie where, and the verdict on a layer or on the averages of a run. Pure.

The default thresholds are those of the reference script, and leakage against chance beside them: a random subspace
can pass ``‖BX‖/‖X‖ < 0.1``, but never ``leakage / chance < 0.5``. Where a task text was measured too, the update must
be larger there than on the preserved text, and may be small in a single layer if it is not in the whole model.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from pytest_nullspace.errors import OptionError
from pytest_nullspace.run.stats import UNREACHED, Drift, LayerStats, RunStats


class Tier(StrEnum):
    """How a figure is judged."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"

    @classmethod
    def worst(cls, tiers: Iterable["Tier"]) -> "Tier":
        """The most severe of ``tiers``; pass if there is none."""
        order = list(cls)
        return max(tiers, key=order.index, default=cls.PASS)


class Stage(StrEnum):
    """Of which moment the checkpoint is: what holds of one may not hold of the other."""

    TRAINED = "trained"
    INIT = "init"


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where a figure passes and where it fails; between the two it warns.

    Attributes:
        figure: A name in `FIGURES`.
        passes: The bound of the pass tier, itself outside it.
        fails: The bound of the fail tier, itself outside it.
        lower_is_better: Whether the pass tier lies below ``passes`` or above.
    """

    figure: str
    passes: float
    fails: float
    lower_is_better: bool

    def tier(self, value: float) -> Tier:
        """The tier of ``value``; what is not finite fails."""
        if not math.isfinite(value):
            return Tier.FAIL
        if value < self.passes if self.lower_is_better else value > self.passes:
            return Tier.PASS
        return Tier.FAIL if (value > self.fails if self.lower_is_better else value < self.fails) else Tier.WARN

    @property
    def bound(self) -> str:
        """Both bounds in words."""
        sign, beyond = ("<", ">") if self.lower_is_better else (">", "<")
        return f"pass {sign} {self.passes:g}, fail {beyond} {self.fails:g}"

    def replaced(self, passes: float, fails: float) -> "Threshold":
        """The threshold with other bounds.

        Raises:
            OptionError: They are not finite, or lie the wrong way round.
        """
        if not (math.isfinite(passes) and math.isfinite(fails)):
            raise OptionError(f"{self.figure}: the bounds must be finite, not {passes:g} and {fails:g}")
        if passes > fails if self.lower_is_better else passes < fails:
            better = "lower" if self.lower_is_better else "higher"
            raise OptionError(
                f"{self.figure}: {better} is better, so PASS {passes:g} cannot lie beyond FAIL {fails:g}; swap them"
            )
        return Threshold(self.figure, passes, fails, self.lower_is_better)


_TRAINED = (
    Threshold("preservation", 0.1, 0.5, lower_is_better=True),
    Threshold("effectiveness", 1e-4, 1e-6, lower_is_better=False),
    Threshold("contribution", 1e-2, 1e-3, lower_is_better=False),
    Threshold("leakage", 0.5, 0.75, lower_is_better=True),
    Threshold("forgetting", 0.1, 0.125, lower_is_better=True),
    Threshold("selectivity", 1.5, 0.5, lower_is_better=False),
)
_INIT = (
    Threshold("preservation", 0.1, 0.5, lower_is_better=True),
    Threshold("effectiveness", 1e-6, 1e-4, lower_is_better=True),
    Threshold("leakage", 0.5, 0.75, lower_is_better=True),
)
_DEFAULTS = {Stage.TRAINED: _TRAINED, Stage.INIT: _INIT}
_INIT_DRIFT = (
    Threshold("divergence", 0.05, 0.15, lower_is_better=True),
    Threshold("loss-rise", 0.05, 0.15, lower_is_better=True),
)
_DRIFT = {
    Stage.TRAINED: (*_INIT_DRIFT, Threshold("task-gain", 0.01, 0.0, lower_is_better=False)),
    Stage.INIT: _INIT_DRIFT,
}
"""What is judged of a model's predictions, in nats a token; before training nothing can have been gained."""
DRIFT = "drift"
"""The name of the item that judges them."""


def lower_is_better(figure: str, stage: Stage) -> bool:
    """Which direction is the better one for a figure at a stage, judged there or not."""
    return next(t.lower_is_better for t in (*_DEFAULTS[stage], *_TRAINED) if t.figure == figure)


Check = Callable[[LayerStats], Iterable[str]]
"""What else a layer is held against: gives what fails it, in phrases."""


@dataclass(frozen=True, slots=True)
class Override:
    """Bounds that a user sets for a figure, in the layers that ``layers`` (a glob) names."""

    layers: str
    figure: str
    passes: float
    fails: float


@dataclass(frozen=True)
class Expectations:
    """What is expected of every layer of a run.

    Attributes:
        stage: Whether training has happened.
        overrides: Bounds set by the user; of several that fit a layer the last holds.
        checks: What each layer is held against beside the thresholds.
        unreached: Globs of the layers that no activation row need reach.
        variant: What the adapter was said to be; plain LoRA (``lora``) promises no null space.
        drift_judged: Whether what the preserved text lost is judged itself, so that `forgetting`, which stands for it
            and also counts what an adapter held when it was initialised, only warns.
    """

    stage: Stage = Stage.TRAINED
    overrides: Sequence[Override] = ()
    checks: Sequence[Check] = ()
    unreached: Sequence[str] = ()
    variant: str = "auto"
    drift_judged: bool = False

    def __post_init__(self) -> None:
        """Refuse overrides of figures that this stage does not judge, and bounds that cannot be."""
        defaults = {threshold.figure: threshold for threshold in (*_DEFAULTS[self.stage], *_DRIFT[self.stage])}
        for override in self.overrides:
            if override.figure in self.left_out:
                raise OptionError(
                    f"{override.figure} is not judged of variant {self.variant}; leave one of the two out"
                )
            if override.figure not in defaults:
                raise OptionError(
                    f"no figure {override.figure!r} is judged at stage {self.stage}; there are {', '.join(defaults)}"
                )
            defaults[override.figure].replaced(override.passes, override.fails)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The figures that are shown and not judged, because the adapter promises nothing of them."""
        return ("leakage",) if self.variant == "lora" else ()

    def thresholds(self, layer: str) -> tuple[Threshold, ...]:
        """The thresholds that hold for the layer of that name (``model`` for the averages, ``drift`` for the drift)."""
        defaults = (_DRIFT if layer == DRIFT else _DEFAULTS)[self.stage]
        return tuple(self._overridden(t, layer) for t in defaults if t.figure not in self.left_out)

    def excuses(self, layer: LayerStats) -> bool:
        """Whether nothing but that no row reached ``layer`` is wrong with it, and none had to."""
        return layer.defect == UNREACHED and any(fnmatchcase(layer.name, glob) for glob in self.unreached)

    def _overridden(self, threshold: Threshold, layer: str) -> Threshold:
        for override in self.overrides:
            if override.figure == threshold.figure and fnmatchcase(layer, override.layers):
                threshold = threshold.replaced(override.passes, override.fails)
        return threshold


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure held against its threshold.

    Attributes:
        value: The figure.
        threshold: What it is held against.
        tier: Where it lies; a warning where it passes and what it is without sink rows does not.
        margin: How far it may lie from what more text would give; None if that was never estimated.
        softened: Why it only warns beyond the bound of the fail tier; None where it fails there.
        without_sinks: What it is without sink rows; None if it has no part in them.
    """

    value: float
    threshold: Threshold
    tier: Tier
    margin: float | None = None
    softened: str | None = None

    @property
    def leniency(self) -> str | None:
        """That the value fails its bound and only warns, and why; None where its tier is that of its bounds."""
        if self.softened is None or self.threshold.tier(self.value) is not Tier.FAIL:
            return None
        return f"fails its bound; only warns, as {self.softened}"
    without_sinks: float | None = None

    @property
    def decided_by_sinks(self) -> bool:
        """Whether it lies in another tier without sink rows."""
        tiers = {self.threshold.tier(value) for value in (self.value, self.without_sinks) if value is not None}
        return len(tiers) > 1

    @property
    def uncertain(self) -> bool:
        """Whether more text might put the value into another tier."""
        if self.margin is None or not math.isfinite(self.value):
            return False
        ends = self.value - self.margin, self.value + self.margin
        passes = {self.threshold.tier(end) is Tier.PASS for end in ends}
        fails = {self.threshold.tier(end) is Tier.FAIL for end in ends if self.softened is None}
        return not math.isfinite(self.margin) or len(passes) > 1 or len(fails) > 1

    @property
    def distance(self) -> float:
        """How far the value lies from the nearest bound that parts two tiers."""
        from_pass, from_fail = (abs(self.value - bound) for bound in (self.threshold.passes, self.threshold.fails))
        return min(from_pass, from_fail) if self.softened is None else from_pass

    @property
    def badness(self) -> float:
        """How far the value lies towards the bad side, 1 being the bound of the pass tier; for sorting only."""
        values = [self.value] if self.without_sinks is None else [self.value, self.without_sinks]
        return max(map(self._badness, values))

    def _badness(self, value: float) -> float:
        if not math.isfinite(value):
            return math.inf
        better, worse = (self.threshold.passes, value)
        if not self.threshold.lower_is_better:
            better, worse = worse, better
        return worse / better if better > 0 else math.inf

    def __str__(self) -> str:
        """The verdict in a phrase, such as ``preservation 0.61 > 0.5``."""
        told = f"{self.threshold.figure} {self._against(self.value)}"
        if self.without_sinks is not None and self.decided_by_sinks:
            told += f", but {self._against(self.without_sinks)} without sink rows"
        return told + self._leniency

    def _against(self, value: float) -> str:
        """``value`` and its bound, such as ``0.61 > 0.5``."""
        if not math.isfinite(value):
            return f"{value:g} is not finite"
        shown, limit = _apart(value, self._bound(value))
        return f"{shown} {self._sign(value)} {limit}"

    @property
    def condition(self) -> str:
        """What holds of the value, the value left out, such as ``preservation >= 0.1``."""
        value, of = self.value, ""
        if self.without_sinks is not None and self.threshold.tier(value) is Tier.PASS and self.decided_by_sinks:
            value, of = self.without_sinks, " without sink rows"
        return f"{self.threshold.figure}{of} {self._sign(value)} {self._bound(value):g}{self._leniency}"

    @property
    def _leniency(self) -> str:
        return "" if self.leniency is None else f" ({self.leniency})"

    def _bound(self, value: float) -> float:
        """The bound that ``value`` missed, or that of the pass tier."""
        return self.threshold.fails if self.threshold.tier(value) is Tier.FAIL else self.threshold.passes

    def _sign(self, value: float) -> str:
        """Where ``value`` lies of that bound."""
        tier, lower = self.threshold.tier(value), self.threshold.lower_is_better
        if tier is Tier.WARN:
            return ">=" if lower else "<="
        return "<" if lower is (tier is Tier.PASS) else ">"


def _apart(value: float, bound: float) -> tuple[str, str]:
    """Both in as few digits as show on which side of ``bound`` the value lies."""
    for digits in range(4, 17):
        shown, limit = f"{value:.{digits}g}", f"{bound:.{max(digits, 6)}g}"
        if (float(shown) > float(limit)) == (value > bound) and (float(shown) < float(limit)) == (value < bound):
            return shown, limit
    return repr(value), repr(bound)


@dataclass(frozen=True)
class Verdict:
    """The judgement on one layer, or on the averages.

    Attributes:
        subject: The layer's name, or ``model``.
        findings: One for each figure that is judged.
        defect: Why nothing could be judged, or None.
        faults: What fails it beside its findings, in phrases.
        excuse: Why no figure had to be judged, or None.
    """

    subject: str
    findings: tuple[Finding, ...]
    defect: str | None = None
    faults: tuple[str, ...] = ()
    excuse: str | None = None

    @property
    def tier(self) -> Tier:
        """The worst tier of its findings; a defect or fault fails, and so does nothing to judge unless excused."""
        if self.defect is not None or self.faults:
            return Tier.FAIL
        if self.excuse is not None:
            return Tier.WARN
        if not self.findings:
            return Tier.FAIL
        return Tier.worst(finding.tier for finding in self.findings)

    @property
    def unjudged(self) -> str | None:
        """Why its figures were not judged, be it a defect or an excuse."""
        return self.defect or self.excuse

    @property
    def severity(self) -> tuple[bool, int, float]:
        """A sort key: defects last, then by tier, then by how far its worst figure lies towards the bad side."""
        worst = max((finding.badness for finding in self.findings), default=math.inf)
        return self.defect is not None, list(Tier).index(self.tier), worst

    @property
    def summary(self) -> str:
        """The findings of its tier in one line, worst first to be read."""
        if self.defect is not None:
            return self.defect
        told = [*(str(finding) for finding in self.findings if finding.tier is self.tier), *self.faults]
        return ", ".join(told) or self.excuse or ""

    @property
    def warning(self) -> str:
        """Why it is in the warn tier, in words that are the same for all subjects alike."""
        told = [finding.condition for finding in self.findings if finding.tier is Tier.WARN]
        return self.excuse or f"in the warn tier: {', '.join(told)}"


def judge(layer: LayerStats, expectations: Expectations) -> Verdict:
    """Hold every figure of ``layer`` that was measured against its threshold, and the layer against all checks."""
    if expectations.excuses(layer):  # from its figures alone: what its weights show is told without a row
        verdict = Verdict(layer.name, (), excuse=f"{UNREACHED}, which is allowed")
    else:
        verdict = _judge(layer.name, layer, expectations, layer.defect)
    if layer.task is not None:
        # With a task text at hand a single layer may contribute little, as long as the averages do not.
        why = "the averages are judged themselves"
        verdict = replace(verdict, findings=tuple(_softened(f, "contribution", why) for f in verdict.findings))
    return replace(verdict, faults=tuple(fault for check in expectations.checks for fault in check(layer)))


def _softened(finding: Finding, figure: str, why: str) -> Finding:
    """The finding as one that only warns where it fails by ``figure``, unless that is no number."""
    if finding.threshold.figure != figure or not math.isfinite(finding.value):
        return finding
    return replace(finding, tier=Tier.WARN if finding.tier is Tier.FAIL else finding.tier, softened=why)


MODEL = "model"
"""The name of the item that judges the averages of all layers."""


def judge_averages(run: RunStats, expectations: Expectations) -> Verdict:
    """Hold the averages over all layers against the thresholds, as the reference's summary does."""
    defective = [layer.name for layer in run.layers if layer.defect is not None and not expectations.excuses(layer)]
    defect = None
    if not run.complete:
        defect = f"only {len(run.layers)} of {run.checkpoint_layers} layers were measured"
    elif defective:
        defect = f"{len(defective)} of {len(run.layers)} layers could not be judged, {defective[0]} among them"
    return _judge(MODEL, run, expectations, defect)


def judge_drift(drift: Drift, expectations: Expectations) -> Verdict:
    """Hold how far the predictions moved against the thresholds."""
    figures = drift.figures
    return Verdict(
        DRIFT,
        tuple(
            Finding(value, threshold, threshold.tier(value), margin)
            for threshold in expectations.thresholds(DRIFT)
            if threshold.figure in figures
            for value, margin in [figures[threshold.figure]]
        ),
    )


def passes(run: RunStats, expectations: Expectations) -> bool:
    """Whether something was measured and every verdict on it is a pass, without a warning."""
    verdicts = [judge(layer, expectations) for layer in run.layers]
    if run.complete:
        verdicts.append(judge_averages(run, expectations))
    if run.drift is not None:
        verdicts.append(judge_drift(run.drift, expectations))
    return bool(run.layers) and all(verdict.tier is Tier.PASS for verdict in verdicts)


def _judge(subject: str, of: LayerStats | RunStats, expectations: Expectations, defect: str | None) -> Verdict:
    value = of.mean if isinstance(of, RunStats) else of.figure
    findings = tuple(
        _finding(value(figure), threshold, of.margin(figure), value(figure, sinks=False))
        for threshold in expectations.thresholds(subject)
        if (figure := threshold.figure) in of.measured
    )
    if expectations.drift_judged:
        findings = tuple(_softened(finding, "forgetting", "the drift is judged itself") for finding in findings)
    return Verdict(subject, findings, defect)


def _finding(value: float, threshold: Threshold, margin: float | None, without_sinks: float) -> Finding:
    """The reference's figure decides, but it does not pass where a few rows alone make it pass."""
    tier = threshold.tier(value)
    if tier is Tier.PASS and threshold.tier(without_sinks) is not Tier.PASS:
        tier = Tier.WARN
    return Finding(value, threshold, tier, margin, without_sinks=without_sinks)
