"""One verdict on a run, for who has to decide: the findings, faults and gaps of all its tests in a word and a sentence.

Pure. What was not measured, not run or not complete is never safe.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pytest_nullspace.checkpoint import peft
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.evidence import Diagnosis
from pytest_nullspace.judging.invariants import MODEL, Expectations, Stage, verdicts_of
from pytest_nullspace.judging.scarce import short_texts
from pytest_nullspace.judging.spoken import PLAIN, place, said
from pytest_nullspace.judging.verdicts import Finding, Threshold, Tier, Verdict
from pytest_nullspace.run.figures import OF_DOWN
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.run.texts import DRIFT, is_drift

MORE_TEXT = "but more text might change that"
"""Said of a figure that more text might put into another tier."""
_FLOORS = frozenset({"headroom"})
"""Figures that hold a gross mistake off, so that one that passes only just is no doubt."""
UNMEASURED = "no layer was measured"
"""Said of a run that tells of none."""
DECIDING = 3
"""Reasons that are told of a verdict at most."""


class Call(StrEnum):
    """What to do with the adapter."""

    SAFE = "SAFE"
    LOOK = "LOOK"
    STOP = "DO NOT DEPLOY"
    NOT_GATED = "NOT GATED"

    @property
    def tier(self) -> Tier | None:
        """The tier that it stands for; None where nothing was judged."""
        return {Call.SAFE: Tier.PASS, Call.LOOK: Tier.WARN, Call.STOP: Tier.FAIL}.get(self)


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that decided.

    Attributes:
        words: What it is, for who knows no figure.
        tier: Where it lies.
        finding: The figure behind it; that of the worst layer where it is of layers. None for what is no figure.
        subject: Of which layer, ``model`` or ``drift`` that is; empty for what is of the run.
        layers: In how many layers it was found; 0 for what is not of layers.
        gained: Whether the text became likelier that should have stayed as it was.
    """

    words: str
    tier: Tier
    finding: Finding | None = None
    subject: str = ""
    layers: int = 0
    gained: bool = False

    @property
    def headline(self) -> str:
        """What is wrong in a few words; empty where nothing is, or where ``words`` say it."""
        if self.finding is None or self.layers or self.tier is not Tier.FAIL:
            return ""
        if not math.isfinite(self.finding.value):
            return "it is broken"
        if self.gained:
            return "it learned the preserved text"
        threshold = self.finding.threshold
        before_training = threshold.figure == "effectiveness" and threshold.lower_is_better
        return "it holds an update before training" if before_training else _WRONG[threshold.figure]

    @property
    def detail(self) -> str:
        """The figure with its margin and bound; empty where there is none."""
        if self.finding is None:
            return ""
        threshold, value = self.finding.threshold, f"{self.finding.value:.3g}"
        value += self.finding.with_margin
        bound = threshold.fails if self.tier is Tier.FAIL else threshold.passes
        of = f", {self.subject}" if self.layers else ""
        return f"{threshold.figure} {value}, bound {bound:g}{of}"

    def to_dict(self) -> dict[str, Any]:
        """The reason as JSON holds it."""
        told: dict[str, Any] = {"words": self.words, "tier": str(self.tier)}
        if self.finding is not None:
            finding = self.finding
            told |= {"figure": finding.threshold.figure, "value": _number(finding.value)}
            told |= {"margin": _number(finding.margin), **_bounds(finding.threshold), "subject": self.subject}
        return {**told, "layers": self.layers} if self.layers else told


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on one run.

    Attributes:
        call: What to do.
        reasons: All that speaks for it, the weightiest first.
        causes: The mistakes behind it, by name.
        thresholds: What the averages and the predictions were held against.
        basis: On what it rests, where that is less than the adapter's own activations.
    """

    call: Call
    reasons: tuple[Reason, ...]
    causes: tuple[Diagnosis, ...] = ()
    thresholds: tuple[Threshold, ...] = ()
    basis: str = ""

    @property
    def deciding(self) -> tuple[Reason, ...]:
        """The reasons that are told where there is little room."""
        return self.reasons[:DECIDING]

    @property
    def sentence(self) -> str:
        """Why, in one sentence."""
        return f"{self.basis}: {self._why}" if self.basis else self._why

    @property
    def _why(self) -> str:
        first = self.reasons[0]
        doubted = first.finding is not None and first.finding.uncertain
        doubt = f", {MORE_TEXT}" if self.call is Call.STOP and doubted else ""
        if self.call is Call.SAFE:
            return ", ".join(_bare(reason.words) for reason in self.reasons[:2])
        return (f"{first.headline}: {first.words}" if first.headline else first.words) + doubt

    @property
    def more(self) -> str | None:
        """The command that tells of the first cause; None where none was found."""
        return self.causes[0].page if self.causes else None

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON holds it, so that a program need not read a report."""
        return {
            "verdict": str(self.call),
            "tier": None if self.call.tier is None else str(self.call.tier),
            "sentence": self.sentence,
            **({"basis": self.basis} if self.basis else {}),
            "figures": [reason.to_dict() for reason in self.deciding],
            "thresholds": {threshold.figure: _bounds(threshold) for threshold in self.thresholds},
            "causes": [{"cause": cause.cause, "more": cause.page} for cause in self.causes],
        }


def _bounds(threshold: Threshold) -> dict[str, Any]:
    return {"pass": threshold.passes, "fail": threshold.fails, "lower_is_better": threshold.lower_is_better}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def not_gated(why: str) -> Decision:
    """The verdict where there is nothing to judge."""
    return Decision(Call.NOT_GATED, (Reason(why, Tier.FAIL),))


def stopped(failed: Mapping[str, str]) -> Decision:
    """The verdict where nothing was measured, and what needs no measurement failed."""
    return Decision(Call.STOP, tuple(_other((), failed)))


def decide(
    run: RunStats,
    expectations: Expectations,
    causes: Sequence[Diagnosis] = (),
    asked: Collection[str] | None = None,
    failed: Mapping[str, str] | None = None,
    unmeasured: str = UNMEASURED,
    further: Sequence[str] = (),
    excused: Collection[str] = (),
    screened: Sequence[Verdict] = (),
) -> Decision:
    """What to do with the adapter of which ``run`` tells.

    Args:
        run: What was measured of it.
        expectations: What it was held against, and which tests came to a verdict.
        causes: The mistakes that were found behind it.
        asked: The names of all tests that it has; None for those that follow from ``run``.
        failed: The names of the tests that failed, each with what it said; None for those that fail by their figures.
        unmeasured: What is said where no layer was measured.
        further: What else is to be looked at, of tests that measure nothing.
        excused: The names of the tests that failed as a mark of the user's expects.
        screened: The verdicts of a run that measured nothing, and so passes by none of them.
    """
    found = [verdict for verdict in (*verdicts_of(run, expectations), *screened) if verdict.gated]
    many = len(run.layers) or sum(verdict.subject != MODEL for verdict in screened)
    spared = [v for v in found if failed is not None and v.tier is Tier.FAIL and v.subject not in failed]
    verdicts = [verdict for verdict in found if verdict not in spared] if spared else found
    wrong = [*_found(verdicts, Tier.FAIL, many), *_other(verdicts, failed or {})]
    thresholds = tuple(t for subject in (MODEL, DRIFT) for t in expectations.thresholds(subject))

    def called(call: Call, reasons: Sequence[Reason]) -> Decision:
        told = {reason.finding.threshold.figure for reason in reasons if reason.finding is not None}
        drift = [(v, f) for v in found if v.subject == DRIFT for f in v.findings if f.threshold.figure not in told]
        others = (_of(v, f, f.tier) for v, f in sorted(drift, key=place))
        return Decision(call, (*reasons, *others), tuple(causes), thresholds)

    if wrong:
        return called(Call.STOP, wrong)
    if lacking := list(gaps(run, expectations, asked, unmeasured)):
        return called(Call.NOT_GATED, lacking)
    marked = dict.fromkeys([*(verdict.subject for verdict in spared), *excused])
    doubts = [*_expected_to_fail([*marked]), *_found(verdicts, Tier.WARN, len(run.layers))]
    doubts += [Reason(words, Tier.WARN) for words in further]
    doubts += _doubts(run, expectations, verdicts)
    if doubts:
        return called(Call.LOOK, doubts)
    return called(Call.SAFE, [_of(verdict, finding, Tier.PASS) for verdict, finding in _kept(verdicts)])


def _found(verdicts: Sequence[Verdict], tier: Tier, of: int) -> Iterator[Reason]:
    """What lies in ``tier``: a reason for each figure of the predictions, and one for each figure of all layers."""
    drift = [(v, f) for v in verdicts if is_drift(v.subject) for f in v.findings if f.tier is tier]
    yield from (_of(v, f, tier) for v, f in sorted(drift, key=place))
    layers = [verdict for verdict in verdicts if verdict.subject != MODEL and not is_drift(verdict.subject)]
    read = [v for v in verdicts if is_drift(v.subject)] if tier is Tier.FAIL else []
    faults = [Reason(fault, tier, None, v.subject) for v in read for fault in v.faults]
    is_base = _holds_no_update(layers)  # then no text is to blame that nobody learned to read
    if not is_base:
        yield from faults
    yield from _said(layers, tier, of)
    found: dict[str, list[tuple[Verdict, Finding]]] = {}
    for verdict in layers:
        for finding in verdict.findings if verdict.unjudged is None else ():
            if finding.tier is tier:
                found.setdefault(finding.threshold.figure, []).append((verdict, finding))
    for figure, pairs in sorted(found.items(), key=lambda item: (-len(item[1]), _WEIGHT.index(item[0]))):
        verdict, worst = max(pairs, key=lambda pair: pair[1].badness)
        told = _wrong_with(worst) if tier is Tier.FAIL else f"lie between the bounds of {figure}"
        many = f"{len(pairs):,} of {of:,} layers"
        yield Reason(f"{many} {told}", tier, worst, verdict.subject, len(pairs))
    for verdict in verdicts:
        if verdict.subject == MODEL and verdict.unjudged is None:
            yield from (
                _of(verdict, f, tier) for f in verdict.findings if f.tier is tier and f.threshold.figure not in found
            )
    if is_base:
        yield from faults


def _holds_no_update(layers: Sequence[Verdict]) -> bool:
    """Whether the update of every trained layer is zero, so that the adapted model is the base."""
    findings = [f for verdict in layers for f in verdict.findings if f.threshold.figure == "effectiveness"]
    return bool(findings) and all(f.tier is Tier.FAIL and f.value == 0 for f in findings)


def _wrong_with(worst: Finding) -> str:
    """What is wrong with layers of which this is the worst."""
    if worst.threshold.figure == "effectiveness" and worst.threshold.lower_is_better:
        return "hold an update before training"
    return _LAYERS[worst.threshold.figure]


def _said(layers: Sequence[Verdict], tier: Tier, of: int) -> Iterator[Reason]:
    """What was found of layers beside their figures, each phrase once."""
    told: dict[str, list[str]] = {}
    for verdict in layers:
        excuse = [verdict.excuse] if verdict.excuse is not None and tier is Tier.WARN else []
        wrong = [] if tier is Tier.WARN else [*([verdict.defect] if verdict.defect else []), *verdict.faults]
        for phrase in (*excuse, *wrong):
            told.setdefault(phrase, []).append(verdict.subject)
    if len(told) > 1:
        first, names = next(iter(told.items()))
        count = len({name for of_phrase in told.values() for name in of_phrase})
        yield Reason(
            f"{count:,} of {of:,} layers are wrong beside their figures: {first} ({names[0]})", tier, None, names[0]
        )
    else:
        for phrase, names in told.items():
            yield Reason(f"{len(names):,} of {of:,} layers: {phrase}", tier, None, names[0], len(names))


def _other(verdicts: Iterable[Verdict], failed: Mapping[str, str]) -> Iterator[Reason]:
    """The tests that failed by something else than the figures: what moved, what is missing, what broke."""
    explained = {verdict.subject for verdict in verdicts if verdict.tier is Tier.FAIL}
    told: dict[str, list[str]] = {}
    for name, message in failed.items():
        if name not in explained:
            told.setdefault(message, []).append(name)
    for message, names in told.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield Reason(f"the test {names[0]}{more} failed: {message}", Tier.FAIL)


def gaps(
    run: RunStats, expectations: Expectations, asked: Collection[str] | None, unmeasured: str = UNMEASURED
) -> Iterator[Reason]:
    """What was not measured or not judged, though it belongs to the adapter."""
    judged = expectations.judged
    if not run.layers or not any(layer.rows for layer in run.layers):
        yield Reason(unmeasured, Tier.FAIL)
        return
    if judged is not None and asked is not None and (left := [name for name in asked if name not in judged]):
        yield Reason(
            f"only {len(asked) - len(left):,} of {len(asked):,} tests came to a verdict, not {left[0]}", Tier.FAIL
        )
    if not run.complete:
        yield Reason(f"only {len(run.layers):,} of {run.checkpoint_layers:,} layers were measured", Tier.FAIL)


def _expected_to_fail(tests: Sequence[str]) -> Iterator[Reason]:
    if tests:
        names = tests[0] + (f" and {len(tests) - 1} more" if len(tests) > 1 else "")
        yield Reason(f"{names} would fail, which a mark of your own expects", Tier.WARN)


def _doubts(run: RunStats, expectations: Expectations, verdicts: Sequence[Verdict]) -> Iterator[Reason]:
    """Why what passed is not safe yet."""
    known = dict.fromkeys((*OF_DOWN, *run.expected))
    absent = [figure for figure in known if figure in run.absent and figure not in expectations.left_out]
    if absent:
        yield Reason(f"not measured: {', '.join(absent)}", Tier.WARN)
    if expectations.stage is Stage.TRAINED and not any(is_drift(verdict.subject) for verdict in verdicts):
        why = " (--nullspace-drift)" if run.without_drift is None else f": {printable(run.without_drift, 1000)}"
        yield Reason(f"what it forgot was not judged{why}", Tier.WARN)
    elif expectations.stage is Stage.TRAINED and (run.drift is None or run.drift.task is None):
        yield Reason(f"{_kept_so_far(verdicts)}what it learned was not judged (--nullspace-task-dataset)", Tier.WARN)
    quiet = {v.subject for v in verdicts for f in v.findings if f.threshold.figure == "leakage" and f.tier is Tier.PASS}
    short = {text: few for text, of in short_texts(run).items() if (few := {layer.name for layer in of} & quiet)}
    lacking = frozenset[str]().union(*short.values())
    if 2 * len(lacking) > len(quiet - {MODEL}):
        named = run.on_further and all(short)  # else all of it is of the first one too, which nobody named
        which = f" of the text{'s' * (len(short) > 1)} {' and '.join(map(printable, short))}" if named else ""
        layers = f"{len(lacking):,} of {len(run.layers):,} layers"
        yield Reason(f"too few rows{which} to show a null space in {layers}", Tier.WARN)
    files = run.about.get("weights_sha256") if run.about.get("format") == peft.FORMAT else None
    if isinstance(files, dict) and (others := len(files.keys() - {peft.WEIGHTS_FILE})):
        yield Reason(f"PEFT loads {peft.WEIGHTS_FILE} alone, and its weights lie in {others} other files", Tier.WARN)
    passed = [(v, f) for v in verdicts if is_drift(v.subject) for f in v.findings if f.tier is Tier.PASS]
    for verdict, finding in sorted(passed, key=place):
        if finding.uncertain and finding.threshold.figure not in _FLOORS:
            yield Reason(f"{said(verdict, finding)}, {MORE_TEXT}", Tier.WARN, finding, verdict.subject)


def _kept_so_far(verdicts: Sequence[Verdict]) -> str:
    """What the preserved text lost, the worst of several, to stand before what was not judged; empty where unsure."""
    lost = [(v, f) for v in verdicts if is_drift(v.subject) for f in v.findings if f.threshold.figure == "loss-rise"]
    if not lost or any(finding.uncertain or finding.tier is not Tier.PASS for _, finding in lost):
        return ""
    return f"{_bare(said(*max(lost, key=lambda pair: pair[1].value)))}; "


def _bare(words: str) -> str:
    """What a figure says, as a heading."""
    return words.removeprefix("the ").replace(" is ", " ")


def _kept(verdicts: Sequence[Verdict]) -> list[tuple[Verdict, Finding]]:
    """The figures that tell best why a run is safe."""
    whole = [(v, f) for v in verdicts if v.subject == MODEL or is_drift(v.subject) for f in v.findings]
    order = {name: place for place, name in enumerate(_TOLD_WHERE_SAFE)}
    return sorted(whole, key=lambda pair: order.get(pair[1].threshold.figure, len(order)))


def _of(verdict: Verdict, finding: Finding, tier: Tier) -> Reason:
    moved = finding.threshold.figure == "divergence"
    gained = moved and any(
        f.threshold.figure == "loss-rise" and f.value < -f.threshold.passes for f in verdict.findings
    )
    return Reason(said(verdict, finding), tier, finding, verdict.subject, gained=gained)


_WEIGHT = tuple(PLAIN)
"""The figures, those first that weigh most."""
_TOLD_WHERE_SAFE = ("loss-rise", "task-gain", "divergence", "leakage")
_FORGETS, _LOST, _IDLE = "it forgets", "its null space is lost", "it did not learn"
_WRONG: Mapping[str, str] = {
    "loss-rise": _FORGETS,
    "divergence": _FORGETS,
    "task-gain": _IDLE,
    "headroom": "it is too weak",
    "leakage": _LOST,
    "preservation": _LOST,
    "effectiveness": _IDLE,
    "contribution": _IDLE,
    "forgetting": "its update is loud",
    "selectivity": "it acts on what it should spare",
}
_LAYERS: Mapping[str, str] = {
    "leakage": "have no null space",
    "preservation": "let the preserved text in",
    "effectiveness": "have no update, or next to none",
    "contribution": "have no effect on the output",
    "forgetting": "change much of what the base computes on the preserved text",
    "selectivity": "act more on the preserved text than on the task",
}
