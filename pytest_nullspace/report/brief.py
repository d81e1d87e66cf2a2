"""The report on the terminal in few lines, whatever the number of layers: what decided, and where to read on."""

import re
from collections.abc import Iterator, Sequence

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.decision import MORE_TEXT, Call, Decision
from pytest_nullspace.judging.invariants import Expectations
from pytest_nullspace.judging.profiles import KEPT
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.report import doubts, notes, verdict
from pytest_nullspace.report.layout import Form, table, with_faults
from pytest_nullspace.report.words import colour, faults, mark, scanned_figure
from pytest_nullspace.run.stats import LayerStats, RunStats

WORST_SHOWN = 3
COLUMNS_LEAST = 3
LOUD = "forgetting"
"""The figure by which layers are shown where none is worse than the others."""
Line = tuple[str, Tier | None]


def summary(
    run: RunStats, verdicts: Sequence[Verdict], expectations: Expectations, decision: Decision, width: float
) -> Iterator[Line]:
    """The lines of the summary, each with the tier that colours it; ``-v`` shows all of what they tell the first of."""
    yield from opening(run, decision)
    yield from ((told, None) for told in (notes.unread(run, decision), notes.measured_on(run)) if told is not None)
    yield from counted(run, verdicts, expectations)
    yield from cautions(run, verdicts, expectations, in_short=True)
    said = [doubts.ON_DRIFT] if MORE_TEXT in decision.sentence else []
    short = map(_first, doubts.all_of(verdicts, run, expectations))
    yield from ((told, Tier.WARN) for told in short if told and told not in said)
    if run.layers:
        yield from _table(run, verdicts, decision, width)


def opening(run: RunStats, decision: Decision, every: bool = False) -> Iterator[Line]:
    """The verdict and what decided it, where to read on and what to try first."""
    yield from verdict.lines(decision, every)
    yield from ((line, None) for line in verdict.steps(run, decision))


def counted(run: RunStats, verdicts: Sequence[Verdict], expectations: Expectations) -> Iterator[Line]:
    """How many layers came to which tier, and which did not."""
    gated = [verdict.tier for verdict in verdicts if verdict.gated]
    in_part = [Tier.WARN] if len(gated) < run.checkpoint_layers else []
    told = f"gated {len(gated):,} of {run.checkpoint_layers:,} layers: {notes.tally(verdicts)}"
    yield told, Tier.worst([*gated, *in_part])
    if (left := notes.ungated(verdicts, expectations)) is not None:
        yield left, Tier.WARN
    if not run.layers and run.drift is None:
        yield "no layer was measured; what follows is read from the files", Tier.WARN


def cautions(
    run: RunStats, verdicts: Sequence[Verdict], expectations: Expectations, in_short: bool = False
) -> Iterator[Line]:
    """By what it was judged, and what is to be known beside."""
    if in_short and (chosen := expectations.chosen) is not None:
        yield f"profile {chosen.profile}: {chosen.why}", None
    elif (profile := notes.profile(expectations)) is not None:
        yield profile, None
    yield from ((line, Tier.WARN) for line in doubts.cautions(run, verdicts))


def _first(doubt: str) -> str:
    """What is in doubt, without the example, and the remedy where it is sure; nothing of sinks that decide nothing."""
    if doubt.startswith("sink rows: ") and "they decide" not in doubt:
        return ""
    told = re.split(r", such as |; | \(", doubt, maxsplit=1)[0]
    remedy = doubt.rpartition("; ")[2].rpartition(": ")[2]
    return f"{told}; {remedy}" if doubt.startswith(doubts.FEW_ROWS) else told


def _table(run: RunStats, verdicts: Sequence[Verdict], decision: Decision, width: float) -> Iterator[Line]:
    """The worst layers, in the figures that decided before the others, as many as there is room for by their names."""
    ordered = sorted(zip(run.layers, verdicts, strict=True), key=lambda pair: pair[1].severity, reverse=True)
    worst = [pair for pair in ordered if pair[1].tier is not Tier.PASS][:WORST_SHOWN]
    heading = "worst layers" if len(ordered) > max(len(worst), 1) else "layers"
    loud = [] if worst else _loudest(run, ordered, decision)
    heading, worst = ("largest updates", loud) if loud else (heading, worst or ordered[:1])
    rows: list[LayerStats | RunStats] = [*(layer for layer, _ in worst), run]
    findings = [reason.finding for reason in decision.reasons if reason.finding is not None]
    first = [finding.threshold.figure for finding in findings if finding.threshold.figure in run.expected]
    figures = list(dict.fromkeys([*([LOUD] if loud else []), *first, *run.expected]))
    least = min(COLUMNS_LEAST, len(figures))
    forms = [
        Form(figures[:count], [[scanned_figure(row, figure) for figure in figures[:count]] for row in rows])
        for count in range(len(figures), least - 1, -1)
    ]
    yield from layer_lines(heading, worst, forms, width)


def _loudest(
    run: RunStats, layers: Sequence[tuple[LayerStats, Verdict]], decision: Decision
) -> list[tuple[LayerStats, Verdict]]:
    """Where the update is largest beside what the base computes, if the predictions moved and no layer is to blame."""
    finding = decision.reasons[0].finding
    forgets = decision.call is Call.STOP and finding is not None and finding.threshold.figure in KEPT
    if not forgets or LOUD not in run.expected or len(layers) <= WORST_SHOWN:
        return []
    return sorted(layers, key=lambda pair: pair[0].figure(LOUD), reverse=True)[:WORST_SHOWN]


def layer_lines(
    heading: str, layers: Sequence[tuple[LayerStats, Verdict]], forms: Sequence[Form], width: float
) -> Iterator[Line]:
    """A table of layers with their marks and what is wrong beside their figures; the last row is the averages'."""
    names = [*(f"{mark(judged)} {printable(layer.name)}" for layer, judged in layers), "  average"]
    title, *lines = table(heading, names, forms, width)
    yield title, None
    for line, (_, judged) in zip(lines, layers, strict=False):
        tier = None if judged.tier is Tier.PASS else colour(judged)
        yield from ((told, tier) for told in with_faults(line, faults(judged), width))
    yield lines[-1], None
