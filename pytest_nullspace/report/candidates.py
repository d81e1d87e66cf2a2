"""Several candidates in one table, the best marked."""

import math
from collections.abc import Iterator, Sequence

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.candidates import Candidate, best
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report.layout import Form, shortened, table
from pytest_nullspace.report.markdown import escape
from pytest_nullspace.report.page import Page

_COLUMNS = ("verdict", "divergence", "task-gain", "forgetting", "worst layer")
BEST, OTHER = "★", " "
WORST_ROOM = 20
"""Characters of the name of a worst layer where there is little room."""


def lines(candidates: Sequence[Candidate], width: float) -> Iterator[tuple[str, Tier | None]]:
    """The table as a terminal shows it, each row in the colour of its verdict."""
    chosen = best(candidates)
    whole = [_cells(one) for one in candidates]
    worst = shortened([cells[-1] for cells in whole], WORST_ROOM)
    short = [(*cells[:-1], name) for cells, name in zip(whole, worst, strict=True)]
    narrow = ("verdict", "diverg.", "gain", "forget.", "worst layer")
    names = [f"{BEST if one is chosen else OTHER} {printable(one.name)}" for one in candidates]
    forms = (Form(_COLUMNS, whole), Form(_COLUMNS, short), Form(narrow, short))
    title, *rows = table("candidates", names, forms, width)
    yield title, None
    yield from ((row, one.call.tier) for row, one in zip(rows, candidates, strict=True))
    yield told(candidates), None


def told(candidates: Sequence[Candidate]) -> str:
    """Which is the best, and by what."""
    chosen = best(candidates)
    if chosen is None:
        return "none of them is to be deployed"
    return f"{BEST} best: {printable(chosen.name)}, the safest, and of these the one that learned most"


def page(candidates: Sequence[Candidate]) -> Page:
    """The table in Markdown, as a report that stands before the others."""
    chosen = best(candidates)
    rows = [
        f"| {BEST if one is chosen else OTHER} | {escape(one.name)} | {' | '.join(map(escape, _cells(one)))} |"
        for one in candidates
    ]
    head = f"| | candidate | {' | '.join(_COLUMNS)} |\n|---|---|---|---:|---:|---:|---|"
    return Page("\n".join(["## nullspace: candidates", "", f"{escape(told(candidates))}.", "", head, *rows]), ())


def _cells(one: Candidate) -> tuple[str, ...]:
    figures = (one.divergence, one.gain, one.forgetting)
    return (str(one.call), *("–" if math.isnan(value) else f"{value:.3g}" for value in figures), printable(one.worst))
