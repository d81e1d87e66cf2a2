"""The verdict on a run as reports show it: the first thing and the last that a reader sees."""

from collections.abc import Iterator

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.decision import Call, Decision, Reason
from pytest_nullspace.judging.profiles import KEPT
from pytest_nullspace.judging.remedy import KEY as SUGGESTION
from pytest_nullspace.judging.verdicts import Finding, Tier
from pytest_nullspace.report.words import MARKS
from pytest_nullspace.run.stats import RunStats

GROUPS_SHOWN = 4


def lines(decision: Decision, every: bool = False) -> Iterator[tuple[str, Tier | None]]:
    """The verdict, what decided it in groups, the first few or all, and where to read on."""
    yield f"verdict: {decision.call}: {printable(decision.sentence, 1000)}", decision.call.tier or Tier.FAIL
    shown = decision.reasons if every else decision.reasons[:GROUPS_SHOWN]
    for reason in shown:
        if reason.finding is not None:
            yield f"{MARKS[reason.tier]} {_group(reason) if reason.layers else _figure(reason)}", reason.tier
        elif reason is not decision.reasons[0]:
            yield f"{MARKS[reason.tier]} {printable(reason.words, 1000)}", reason.tier
    if len(decision.reasons) > len(shown) and decision.call.tier is not Tier.PASS:
        yield f"  ... and {len(decision.reasons) - len(shown)} more (all with -v)", None
    for cause in decision.causes:
        yield f"cause: {cause.cause}; more: {cause.page}", None


def _figure(reason: Reason) -> str:
    assert reason.finding is not None
    words = reason.words
    if reason.finding.threshold.figure == "loss-rise":  # per token, for which the verdict has no room
        words = words.removeprefix("the ").replace(" text is ", " tokens ")
    return f"{in_short(reason.finding, reason.tier)}: {printable(words, 1000)}"


def _group(reason: Reason) -> str:
    assert reason.finding is not None
    figure, value = reason.finding.threshold.figure, reason.finding.value
    many = f"{reason.layers:,} layer{'s' if reason.layers > 1 else ''}"
    return f"{figure}: {many}, worst {printable(reason.subject)} {value:.3g}"


def in_short(finding: Finding, tier: Tier) -> str:
    """A figure with its margin, and the bound that it is held against."""
    threshold = finding.threshold
    bound = threshold.fails if tier is Tier.FAIL else threshold.passes
    sign = "<" if (finding.value < bound) else ">"
    return f"{threshold.figure} {finding.value:.3g}{finding.with_margin} {sign} {bound:g}"


def last(decision: Decision, name: str | None) -> str:
    """The verdict in one line, to stand at the end of everything; ``name`` tells several runs apart."""
    of = "" if name is None else f" on {printable(name, 1000)}"
    return f"verdict{of}: {decision.call}: {printable(decision.sentence, 1000)}"


def steps(run: RunStats, decision: Decision) -> Iterator[str]:
    """Where to read what the figure is that decided, and what to try first; a cause has a page that tells both."""
    first = decision.reasons[0].finding
    if decision.causes or first is None or decision.call not in (Call.STOP, Call.LOOK):
        return
    yield f"more: pytest --nullspace-explain={first.threshold.figure}"
    if decision.reasons[0].gained:
        yield "next: is that the text of the task? --nullspace-calib-dataset takes the one that must survive"
    elif first.uncertain:
        yield "next: --nullspace-calib-size=auto reads text until that is settled"
    elif decision.call is Call.STOP and first.threshold.figure in KEPT and SUGGESTION not in run.about:
        yield "next: --nullspace-suggest looks for a smaller scale that passes"
