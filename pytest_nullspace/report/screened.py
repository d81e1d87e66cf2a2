"""The report of adapters that were screened: each figure is named as of the first order, and no verdict is safe."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.invariants import MODEL, Expectations
from pytest_nullspace.judging.screening import CURE, FIGURES, STATEMENT, UNDECIDED, Screening, verdicts
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.report.layout import Form, table, with_faults
from pytest_nullspace.report.markdown import escape, headed
from pytest_nullspace.report.notes import header as gated_header
from pytest_nullspace.report.notes import measured_on, profile, tally
from pytest_nullspace.report.page import Page, Row, kind
from pytest_nullspace.report.words import MARKS, colour, mark
from pytest_nullspace.run.stats import RunStats

if TYPE_CHECKING:
    from pytest_nullspace.settings import Settings

WORST_SHOWN = 5
UNREAD = "no adapter runs, and no task text is read"
"""What a screen leaves out."""


class ScreenedAdapter(NamedTuple):
    """One adapter as reports show it.

    Attributes:
        name: How reports name it.
        told: What was screened.
        expectations: What that is held against.
        decision: The verdict.
    """

    name: str
    told: Screening
    expectations: Expectations
    decision: Decision


def header(checkpoint: Checkpoint, gated: int, settings: "Settings") -> Iterator[str]:
    """What will be screened, and that this is no gate."""
    told = (line for line in gated_header(checkpoint, gated, settings) if "nullspace: task text" not in line)
    yield from told
    yield f"nullspace: {STATEMENT}: {UNREAD}; {CURE}"


def counted(told: Screening, expectations: Expectations) -> str:
    """How many layers were screened, how they came out, and that none was gated."""
    found = [one for one in verdicts(told, expectations) if one.subject != MODEL]
    gated = sum(one.gated for one in found)
    alone = [one for one in found if one.excuse != UNDECIDED]
    judged = tally(alone) if alone else UNDECIDED
    return f"{STATEMENT}: {gated} of {told.of} layers: {judged}; none gated"


def summary(
    of: ScreenedAdapter, run: RunStats, every: bool, columns: float = math.inf
) -> Iterator[tuple[str, Tier | None]]:
    """The lines of the summary: the worst layers, five or all, then the averages."""
    told, expectations = of.told, of.expectations
    found = verdicts(told, expectations)
    yield counted(told, expectations), Tier.worst([Tier.WARN, *(one.tier for one in found if one.gated)])
    yield from ((line, None) for line in (measured_on(run), profile(expectations)) if line is not None)
    layers = sorted((one for one in found if one.subject != MODEL), key=lambda one: one.severity, reverse=True)
    shown = layers if every else layers[:WORST_SHOWN]
    shown = [*shown, *(one for one in found if one.subject == MODEL)]
    cells = [_cells(told, one.subject) for one in shown]
    names = [f"{_mark(one)} {printable('average' if one.subject == MODEL else one.subject)}" for one in shown]
    title, *rows = table("layers, first order", names, (Form(FIGURES, cells), Form(FIGURES, cells)), columns)
    yield title, None
    for row, one in zip(rows, shown, strict=True):
        wrong = [one.summary] if one.tier is Tier.FAIL and (one.defect is not None or not one.gated) else []
        yield from ((line, colour(one)) for line in with_faults(row, wrong, columns))


def _mark(of: Verdict) -> str:
    """Green is for what was gated."""
    return " " if of.tier is Tier.PASS or of.excuse is not None else mark(of)


def _cells(told: Screening, subject: str) -> list[str]:
    value = told.mean if subject == MODEL else lambda figure: told.figure(subject, figure)
    return [f"{value(figure):.3g}" for figure in FIGURES]


def beside(adapters: Sequence[ScreenedAdapter], columns: float = math.inf) -> Iterator[tuple[str, Tier | None]]:
    """All adapters in one table, by the averages over their layers."""
    heads = (*FIGURES, "verdict")
    cells = [[*_cells(one.told, MODEL), str(one.decision.call)] for one in adapters]
    names = [f"  {printable(one.name)}" for one in adapters]
    title, *rows = table("averages, first order", names, (Form(heads, cells), Form(heads, cells)), columns)
    yield title, None
    yield from ((row, one.decision.call.tier) for row, one in zip(rows, adapters, strict=True))
    yield f"{STATEMENT}, so none of them is gated; {CURE}", Tier.WARN


def page(of: ScreenedAdapter) -> Page:
    """The same in Markdown, every layer."""
    told, expectations = of.told, of.expectations
    found = verdicts(told, expectations)
    lines = [*headed(of.name, of.decision), f"{MARKS[Tier.WARN]} **{counted(told, expectations)}; {CURE}**", ""]
    heads = " | ".join(f"{figure} (first order)" for figure in FIGURES)
    columns = f"| | layer | {heads} | |\n|---|---|{'---:|' * len(FIGURES)}---|"

    def row(one: Verdict, name: str) -> str:
        why = one.summary if one.tier is Tier.FAIL or one.excuse is None else ""
        shown = escape(why if one.tier is not Tier.PASS else "")
        return f"| {_mark(one)} | {escape(name)} | {' | '.join(_cells(told, one.subject))} | {shown} |"

    rows = [Row(kind(one.tier, one.gated), row(one, one.subject)) for one in found if one.subject != MODEL]
    foot = "".join(row(one, "average") for one in found if one.subject == MODEL)
    return Page("\n".join(lines), rows, foot, columns)


def beside_page(adapters: Sequence[ScreenedAdapter]) -> Page:
    """All adapters in one table, as a report that stands before the others."""
    rows = [f"| {escape(one.name)} | {' | '.join(_cells(one.told, MODEL))} | {one.decision.call} |" for one in adapters]
    head = (
        f"| adapter | {' | '.join(f'{figure} (first order)' for figure in FIGURES)} | verdict |\n|---|{'---:|' * 3}---|"
    )
    told = f"{STATEMENT}: averages over layers; none of them is gated; {CURE}."
    return Page("\n".join(["## nullspace: screened", "", told, "", head, *rows]), ())
