"""The verdict on a run as reports show it: the first thing and the last that a reader sees."""

from collections.abc import Iterator

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report.words import MARKS


def lines(decision: Decision) -> Iterator[tuple[str, Tier | None]]:
    """The verdict, what decided, and where to read on, each with the tier that colours it."""
    yield f"verdict: {decision.call}: {printable(decision.sentence, 1000)}", decision.call.tier or Tier.FAIL
    for reason in decision.reasons:
        if reason.detail:
            yield (
                f"{MARKS[reason.tier]} {printable(reason.words, 1000)} ({printable(reason.detail, 1000)})",
                reason.tier,
            )
        elif reason is not decision.reasons[0]:
            yield f"{MARKS[reason.tier]} {printable(reason.words, 1000)}", reason.tier
    for cause in decision.causes:
        yield f"cause: {cause.cause}; more: {cause.page}", None


def last(decision: Decision, name: str | None) -> str:
    """The verdict in one line, to stand at the end of everything; ``name`` tells several runs apart."""
    of = "" if name is None else f" on {printable(name, 1000)}"
    return f"verdict{of}: {decision.call}: {printable(decision.sentence, 1000)}"
