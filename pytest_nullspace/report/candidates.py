"""Several candidates in one table, the best marked."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.candidates import FIGURES_TOLD, Candidate, best
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report.layout import Form, shortened, table
from pytest_nullspace.report.markdown import escape
from pytest_nullspace.report.page import Page

_COLUMNS = ("verdict", *FIGURES_TOLD, "worst layer")
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


@dataclass(frozen=True, slots=True)
class Rival:
    """A candidate as a page shows it.

    Attributes:
        name: How reports name it.
        best: Whether it is the best of them.
        cells: Each figure's head, its value and how far that reaches, in per cent of the largest of all candidates.
        worst: Its worst layer.
    """

    name: str
    best: bool
    cells: Sequence[tuple[str, str, float]]
    worst: str


def rivals(candidates: Sequence[Candidate]) -> list[Rival]:
    """All of them, as a page shows them."""
    chosen = best(candidates)
    columns = [[one.figures[head] for one in candidates] for head in FIGURES_TOLD]
    most = [max((value for value in of if math.isfinite(value)), default=0.0) for of in columns]
    return [
        Rival(
            printable(one.name),
            one is chosen,
            [
                (head, _shown(value), round(100 * max(value, 0.0) / of, 1) if of > 0 and math.isfinite(value) else 0.0)
                for (head, value), of in zip(one.figures.items(), most, strict=True)
            ],
            printable(one.worst),
        )
        for one in candidates
    ]


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
    return (str(one.call), *map(_shown, one.figures.values()), printable(one.worst))


def _shown(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"
