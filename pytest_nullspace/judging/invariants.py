"""The invariants: which figure may lie where, and the verdict on a layer or on the averages of a run. Pure.

The default thresholds are those of the reference script, and leakage against chance beside them: a random subspace
can pass ``‖BX‖/‖X‖ < 0.1``, but never ``leakage / chance < 0.5``. Which of them decide is in
`pytest_nullspace.judging.profiles`.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from pytest_nullspace.errors import OptionError
from pytest_nullspace.judging.profiles import BOUNDS, Chosen, Profile, decides
from pytest_nullspace.judging.verdicts import Finding, Threshold, Tier, Verdict
from pytest_nullspace.run.figures import FIGURES, of_layers
from pytest_nullspace.run.stats import UNREACHED, Drift, LayerStats, RunStats
from pytest_nullspace.run.texts import DRIFT as DRIFT
from pytest_nullspace.run.texts import called, drift_test, is_drift


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


MODEL = "model"
"""The name of the item that judges the averages of all layers."""


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

    def names(self, test: str) -> bool:
        """Whether it holds in the test of that name, one of the predictions by its text's name too."""
        return self.layers == test or any(fnmatchcase(name, self.layers) for name in called(test))


@dataclass(frozen=True)
class Expectations:
    """What is expected of every layer of a run.

    Attributes:
        stage: Whether training has happened.
        overrides: Bounds set by the user; of several that fit a layer the last holds.
        checks: What each layer is held against beside the thresholds.
        unreached: Globs of the layers that no activation row need reach.
        chosen: By which profile it is judged, and why; without one every figure decides.
        drift_judged: Whether what the preserved text lost is judged itself, so that nothing need stand in for it.
        judged: The names of the tests that came to a verdict; None for all.
        drift_faults: What fails the drift beside its thresholds, in phrases.
    """

    stage: Stage = Stage.TRAINED
    overrides: Sequence[Override] = ()
    checks: Sequence[Check] = ()
    unreached: Sequence[str] = ()
    chosen: Chosen | None = None
    drift_judged: bool = False
    judged: Collection[str] | None = None
    drift_faults: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse overrides of figures that this stage does not judge, and bounds that cannot be."""
        judged = {threshold.figure: threshold for of in (False, True) for threshold in defaults(self.stage, of)}
        for override in self.overrides:
            if override.figure not in judged:
                raise OptionError(
                    f"no figure {override.figure!r} is judged at stage {self.stage}; there are {', '.join(judged)}"
                )
            judged[override.figure].replaced(override.passes, override.fails)

    @property
    def profile(self) -> Profile | None:
        """By what it is judged."""
        return None if self.chosen is None else self.chosen.profile

    @property
    def left_out(self) -> tuple[str, ...]:
        """The figures that a single layer shows and is not judged by."""
        return tuple(name for name in of_layers() if not self._decides(name, ""))

    def _decides(self, figure: str, test: str) -> bool:
        """Whether a figure decides in the test of that name: by the profile, or because a bound was given for it."""
        given = any(o.figure == figure and o.names(test) for o in self.overrides)
        return given or decides(figure, self.profile, test == MODEL, self.drift_judged)

    def gates(self, test: str) -> bool:
        """Whether the test of that name, a layer's, ``model`` or ``drift``, came to a verdict."""
        return self.judged is None or test in self.judged

    def thresholds(self, layer: str) -> tuple[Threshold, ...]:
        """The thresholds that hold for the test of that name: a layer's, the averages', one of the predictions."""
        held = (t for t in defaults(self.stage, is_drift(layer)) if self._decides(t.figure, layer))
        return tuple(self._overridden(self._of_profile(threshold), layer) for threshold in held)

    def _of_profile(self, threshold: Threshold) -> Threshold:
        own = {} if self.profile is None else BOUNDS.get(self.profile, {})
        return threshold.replaced(*own[threshold.figure]) if threshold.figure in own else threshold

    def excuses(self, layer: LayerStats) -> bool:
        """Whether nothing but that no row reached ``layer`` is wrong with it, and none had to."""
        return layer.defect == UNREACHED and any(fnmatchcase(layer.name, glob) for glob in self.unreached)

    def _overridden(self, threshold: Threshold, layer: str) -> Threshold:
        for override in self.overrides:
            if override.figure == threshold.figure and override.names(layer):
                threshold = threshold.replaced(override.passes, override.fails)
        return threshold


def judge(layer: LayerStats, expectations: Expectations) -> Verdict:
    """Hold every figure of ``layer`` that was measured against its threshold, and the layer against all checks."""
    if expectations.excuses(layer):  # from its figures alone: what its weights show is told without a row
        verdict = Verdict(layer.name, (), excuse=f"{UNREACHED}, which is allowed")
    else:
        verdict = _judge(layer.name, layer, expectations, layer.defect)
    faults = tuple(fault for check in expectations.checks for fault in check(layer))
    return replace(verdict, faults=faults, gated=expectations.gates(layer.name))


FORGOT = "what it forgot was not measured: no test judged the drift of its predictions"
"""Why averages that promise no null space do not pass alone."""


def judge_averages(run: RunStats, expectations: Expectations) -> Verdict:
    """Hold the averages over all layers against the thresholds, as the reference's summary does."""
    defective = [layer.name for layer in run.layers if layer.defect is not None and not expectations.excuses(layer)]
    defect = None
    if not run.complete:
        defect = f"only {len(run.layers)} of {run.checkpoint_layers} layers were measured"
    elif defective:
        defect = f"{len(defective)} of {len(run.layers)} layers could not be judged, {defective[0]} among them"
    verdict = _judge(MODEL, run, expectations, defect)
    unknown = expectations.profile is Profile.LORA and expectations.stage is Stage.TRAINED
    return replace(verdict, doubt=FORGOT) if unknown and not expectations.drift_judged else verdict


def judge_drift(drift: Drift, expectations: Expectations, text: str | None = None) -> Verdict:
    """Hold how far the predictions moved on the text of that name, or on the first, against the thresholds."""
    name = drift.name if text is None else text
    figures, test = drift.figures_on(name), drift_test(name)
    return Verdict(
        test,
        tuple(
            Finding(value, threshold, threshold.tier(value), margin)
            for threshold in expectations.thresholds(test)
            if threshold.figure in figures
            for value, margin in [figures[threshold.figure]]
        ),
        faults=tuple(expectations.drift_faults) if name == drift.name else (),
        gated=expectations.gates(test),
    )


def judge_drifts(run: RunStats, expectations: Expectations) -> list[Verdict]:
    """The same on each preserved text; nothing where no predictions were measured."""
    return [] if run.drift is None else [judge_drift(run.drift, expectations, text) for text in run.drift.texts]


def verdicts_of(run: RunStats, expectations: Expectations) -> list[Verdict]:
    """Those on the predictions, the averages and every layer, in this order, as that is how much they weigh."""
    averages = [judge_averages(run, expectations)] if run.complete and run.layers else []
    return [*judge_drifts(run, expectations), *averages, *(judge(layer, expectations) for layer in run.layers)]


def passes(run: RunStats, expectations: Expectations) -> bool:
    """Whether something was measured and every verdict on it is a pass, without a warning."""
    return bool(run.layers) and all(verdict.tier is Tier.PASS for verdict in verdicts_of(run, expectations))


def _judge(subject: str, of: LayerStats | RunStats, expectations: Expectations, defect: str | None) -> Verdict:
    value = of.mean if isinstance(of, RunStats) else of.figure
    to_the_letter = expectations.profile is Profile.REFERENCE
    findings = tuple(
        _finding(value(figure), threshold, of.margin(figure), value(figure, sinks=False), to_the_letter)
        for threshold in expectations.thresholds(subject)
        if (figure := threshold.figure) in of.measured
    )
    return Verdict(subject, findings, defect, gated=expectations.gates(subject))


def _finding(
    value: float, threshold: Threshold, margin: float | None, without_sinks: float, to_the_letter: bool
) -> Finding:
    """A figure whose own value decides, but does not pass where a few rows alone make it pass, unless to the letter."""
    tier = threshold.tier(value)
    if not to_the_letter and tier is Tier.PASS and threshold.tier(without_sinks) is not Tier.PASS:
        tier = Tier.WARN
    return Finding(value, threshold, tier, margin, without_sinks=without_sinks)
