"""The invariants: which figure may lie where, and the verdict on a layer or on the averages of a run. Pure.

The default thresholds are those of the reference script, and leakage against chance beside them: a random subspace
can pass ``‖BX‖/‖X‖ < 0.1``, but never ``leakage / chance < 0.5``. Where a task text was measured too, the update must
be larger there than on the preserved text, and may be small in a single layer if it is not in the whole model.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from pytest_nullspace.errors import OptionError
from pytest_nullspace.judging.verdicts import Finding, Threshold, Tier, Verdict
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.stats import UNREACHED, Drift, LayerStats, RunStats


class Stage(StrEnum):
    """Of which moment the checkpoint is: what holds of one may not hold of the other."""

    TRAINED = "trained"
    INIT = "init"


def defaults(stage: Stage, of_predictions: bool = False) -> tuple[Threshold, ...]:
    """The thresholds that hold at a stage if nobody says otherwise: of layers, or of a model's predictions."""
    judged = ((f, f.trained if stage is Stage.TRAINED else f.init) for f in FIGURES.values())
    return tuple(
        Threshold(figure.name, bounds.passes, bounds.fails, bounds.lower_is_better)
        for figure, bounds in judged
        if bounds is not None and figure.of_predictions == of_predictions
    )


DRIFT = "drift"
"""The name of the item that judges them."""


def lower_is_better(figure: str, stage: Stage) -> bool:
    """Which direction is the better one for a figure at a stage, judged there or not."""
    record = FIGURES[figure]
    return (record.init or record.trained if stage is Stage.INIT else record.trained).lower_is_better


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
        judged: The names of the tests that came to a verdict; None for all.
    """

    stage: Stage = Stage.TRAINED
    overrides: Sequence[Override] = ()
    checks: Sequence[Check] = ()
    unreached: Sequence[str] = ()
    variant: str = "auto"
    drift_judged: bool = False
    judged: Collection[str] | None = None

    def __post_init__(self) -> None:
        """Refuse overrides of figures that this stage does not judge, and bounds that cannot be."""
        judged = {threshold.figure: threshold for of in (False, True) for threshold in defaults(self.stage, of)}
        for override in self.overrides:
            if override.figure in self.left_out:
                raise OptionError(
                    f"{override.figure} is not judged of variant {self.variant}; leave one of the two out"
                )
            if override.figure not in judged:
                raise OptionError(
                    f"no figure {override.figure!r} is judged at stage {self.stage}; there are {', '.join(judged)}"
                )
            judged[override.figure].replaced(override.passes, override.fails)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The figures that are shown and not judged, because the adapter promises nothing of them."""
        return tuple(name for name, figure in FIGURES.items() if self.variant in figure.left_out_of)

    def gates(self, test: str) -> bool:
        """Whether the test of that name, a layer's, ``model`` or ``drift``, came to a verdict."""
        return self.judged is None or test in self.judged

    def thresholds(self, layer: str) -> tuple[Threshold, ...]:
        """The thresholds that hold for the layer of that name (``model`` for the averages, ``drift`` for the drift)."""
        left_out = self.left_out
        held = (t for t in defaults(self.stage, layer == DRIFT) if t.figure not in left_out)
        return tuple(self._overridden(threshold, layer) for threshold in held)

    def excuses(self, layer: LayerStats) -> bool:
        """Whether nothing but that no row reached ``layer`` is wrong with it, and none had to."""
        return layer.defect == UNREACHED and any(fnmatchcase(layer.name, glob) for glob in self.unreached)

    def _overridden(self, threshold: Threshold, layer: str) -> Threshold:
        for override in self.overrides:
            if override.figure == threshold.figure and fnmatchcase(layer, override.layers):
                threshold = threshold.replaced(override.passes, override.fails)
        return threshold


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
    faults = tuple(fault for check in expectations.checks for fault in check(layer))
    return replace(verdict, faults=faults, gated=expectations.gates(layer.name))


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
        gated=expectations.gates(DRIFT),
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
    return Verdict(subject, findings, defect, gated=expectations.gates(subject))


def _finding(value: float, threshold: Threshold, margin: float | None, without_sinks: float) -> Finding:
    """The reference's figure decides, but it does not pass where a few rows alone make it pass."""
    tier = threshold.tier(value)
    if tier is Tier.PASS and threshold.tier(without_sinks) is not Tier.PASS:
        tier = Tier.WARN
    return Finding(value, threshold, tier, margin, without_sinks=without_sinks)
