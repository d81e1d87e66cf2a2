"""How lines and tables fit the width of a terminal. Pure."""

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NAME_LEAST = 12
"""Characters that a name keeps in a table, however narrow the terminal."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way to show a table's figures.

    Attributes:
        heads: The columns' heads.
        rows: The cells of each row.
        width: Of each column at least, the gap before it included.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    width: int = 0

    @property
    def widths(self) -> list[int]:
        """Of each column, one blank before its widest cell at least."""
        columns = zip(self.heads, *self.rows, strict=True)
        return [max(self.width, *(len(cell) + 1 for cell in column)) for column in columns]


def table(title: str, names: Sequence[str], forms: Sequence[Form], width: float) -> list[str]:
    """A table's lines, its title's first: in the first of ``forms`` that fits, else in the last with shorter names.

    Args:
        title: Above the names.
        names: One for each row, its mark of one character and a blank before it.
        forms: The same figures in several ways, the widest first.
        width: Columns of the terminal.
    """
    longest = max(len(name) for name in (f"  {title}", *names))
    form = next((form for form in forms if longest + 1 + sum(form.widths) <= width), forms[-1])
    if longest + 1 + sum(form.widths) > width:
        room = max(NAME_LEAST, int(width) - 1 - sum(form.widths))
        bare = shortened([name[2:] for name in names], room - 2)
        names = [name[:2] + short for name, short in zip(names, bare, strict=True)]
        longest = max(len(name) for name in (f"  {title}", *names))
    return [
        f"{name:<{longest}} " + "".join(f"{cell:>{column}}" for cell, column in zip(cells, form.widths, strict=True))
        for name, cells in zip((f"  {title}", *names), (form.heads, *form.rows), strict=True)
    ]


def shortened(names: Sequence[str], room: int) -> list[str]:
    """Names in ``room`` characters: without their first parts, else cut in the middle, but never two of them alike."""
    head, tail = room // 2, room - room // 2 - 1
    forms = [
        [name if len(name) <= room else f"…{'.'.join(name.split('.')[drop:])}" for name in names]
        for drop in range(1, 1 + max(name.count(".") for name in names))
    ]
    forms += [[name if len(name) <= room else f"{name[:head]}…{name[-tail:]}" for name in names], [*names]]
    apart = [form for form in forms if len({*form}) == len({*names})]
    fitting = (form for form in apart if all(len(name) <= room for name in form))
    return next(fitting, min(apart, key=lambda form: max(map(len, form))))


def wrapped(line: str, width: float) -> list[str]:
    """``line`` in lines of ``width`` at most, those after the first indented; what has no blank is never broken."""
    if len(line) <= width or not math.isfinite(width):
        return [line]
    lead = re.match(r"(?:\s*[✓⚠✗] |\s*)", line)
    assert lead is not None  # it matches nothing as well
    return textwrap.wrap(
        line,
        int(width),
        subsequent_indent=" " * (len(lead[0]) if lead[0].strip() else len(lead[0]) + 2),
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def with_faults(line: str, told: Sequence[str], width: float) -> Iterator[str]:
    """A row of a table with what is wrong beside its figures: at its end where that fits, else below it."""
    whole = line + "".join(f"  {fault}" for fault in told)
    if len(whole) <= width:
        yield whole
    else:
        yield from (line, *(f"    {fault}" for fault in told))
