"""A Markdown report in its parts, so that where there is little room the layers that failed are shown first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pytest_nullspace.judging.verdicts import Tier

FAILED, WARNED, WOULD_FAIL, PASSED, NOT_GATED = "failed", "warned", "would fail if gated", "passed", "not gated"
_ORDER = (FAILED, WARNED, WOULD_FAIL, PASSED, NOT_GATED)
"""What a row may tell of its layer, the most urgent first."""
_SHOWN = (FAILED, WARNED, WOULD_FAIL)
"""The rows that nobody need unfold."""
_ROOM_FOR_REST = 600
"""Bytes of the line that counts what is left out, and of what is around a second table."""
_VERDICT = 3
"""How many lines of a report hold its title and how many layers passed."""


def kind(tier: Tier, gated: bool = True) -> str:
    """What a row tells of its layer."""
    if not gated:
        return WOULD_FAIL if tier is Tier.FAIL else NOT_GATED
    return {Tier.FAIL: FAILED, Tier.WARN: WARNED, Tier.PASS: PASSED}[tier]


class Row(NamedTuple):
    """A layer's row of the table, and what it tells."""

    kind: str
    text: str


@dataclass(frozen=True)
class Page:
    """The report of one run.

    Attributes:
        head: What stands first: title and verdict are its first lines.
        rows: One for each layer, in model order; those that did not pass are shown, the others unfold.
        foot: The row of the averages, or nothing.
        columns: The table's own head, two lines.
        more: What unfolds below the table.
    """

    head: str
    rows: Sequence[Row]
    foot: str = ""
    columns: str = "| |\n|---|"
    more: str = ""

    @property
    def whole(self) -> str:
        """The report with every row."""
        return self._with(self.rows)

    @property
    def verdict(self) -> str:
        """The least that can be shown of it."""
        return "\n".join(self.head.splitlines()[:_VERDICT]) + "\n"

    def shortened(self, kept: Sequence[Row]) -> str:
        """The report with the rows ``kept`` and a line that counts the others."""
        if len(kept) == len(self.rows):
            return self.whole
        found = [row.kind for row in self.rows]
        shown = [row.kind for row in kept]
        counts = {what: found.count(what) - shown.count(what) for what in _ORDER}
        told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        rest = (
            f"\n… and {len(found) - len(shown):,} more layers ({told}), for which there is no room here: "
            "all rows are in the file of `--nullspace-report=FILE.md`.\n"
        )
        return self._with(kept) + rest

    def _with(self, rows: Sequence[Row]) -> str:
        wrong = [row.text for row in rows if row.kind in _SHOWN]
        others = [row.text for row in rows if row.kind not in _SHOWN]
        parts = [self.head]
        if wrong:
            parts += ["", self.columns, *wrong]
        if others or self.foot:
            foot = [self.foot] if self.foot else []
            parts += _folded(f"{len(others):,} {'more' if wrong else ''} layers".replace("  ", " "))
            parts += [self.columns, *others, *foot, "", "</details>"]
        if self.more:
            parts += [*_folded("The figures in words, and what may be in doubt"), self.more, "", "</details>"]
        return "\n".join(parts) + "\n"


def _folded(title: str) -> list[str]:
    """The first lines of what a reader unfolds."""
    return ["", f"<details><summary>{title}</summary>", ""]


def joined(pages: Sequence[Page]) -> str:
    """All reports, whole, one after the other."""
    return "\n".join(page.whole for page in pages)


def fitted(pages: Sequence[Page], room: int) -> str:
    """The reports in at most ``room`` bytes: whole if they fit, else of all of them what is most urgent.

    The rows that are kept are those of layers that failed, then those that warned, and so on; where not even what
    stands above the rows fits, titles and verdicts alone, of as many reports as there is room for.
    """
    whole = joined(pages)
    if _size(whole) <= room:
        return whole
    left = room - sum(_size(page.shortened(())) + (_ROOM_FOR_REST if page.rows else 0) for page in pages)
    if left < 0:
        return _verdicts(pages, room)
    kept: list[list[Row]] = [[] for _ in pages]
    rows = [(_ORDER.index(row.kind), number, row) for number, page in enumerate(pages) for row in page.rows]
    for _, number, row in sorted(rows, key=lambda entry: entry[0]):
        left -= _size(row.text) + 1
        if left < 0:
            break
        kept[number].append(row)
    return "\n".join(page.shortened(of) for page, of in zip(pages, kept, strict=True))


def _verdicts(pages: Sequence[Page], room: int) -> str:
    shown = ""
    for page in pages:
        if _size(shown) + _size(page.verdict) + 1 > room:
            break
        shown += f"\n{page.verdict}" if shown else page.verdict
    return shown


def _size(text: str) -> int:
    return len(text.encode("utf-8", "backslashreplace"))
