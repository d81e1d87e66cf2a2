"""What was measured window by window, kept so that another run on the same windows can be paired with it. Pure.

Held in float32 and saved as such: it tells by how much a figure may vary, not what the figure is. Digits of this kind
hardly compress, so nothing is compressed, and a file can hold no more than its bytes.
"""

import base64
import binascii
import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any, Literal, NamedTuple, Self

from pytest_nullspace.errors import StatsError, printable
from pytest_nullspace.run.norms import ratio

FLOAT: Literal["f"] = "f"
CLOSE = 1e-5
"""How far, relative, the mean over the windows may lie from the mean over all rows; float32 holds 6e-8."""


class Kind(NamedTuple):
    """What is kept.

    Attributes:
        rows: The field in which what was measured tells how many rows it had.
        over: Its means, and whether each is over all rows, 0, or over those that count for it, 1.
    """

    rows: str
    over: Mapping[str, int]


OF_LAYER = Kind(
    "rows",
    {
        "input_norm": 0,
        "down_norm": 0,
        "update_norm": 0,
        "base_norm": 0,
        "output_norm": 0,
        "mean_leakage": 1,  # over the rows that are not zero
    },
)
OF_PREDICTIONS = Kind("tokens", {"divergence": 0, "base_loss": 1, "adapted_loss": 1})  # nothing follows the last token


@dataclass(frozen=True, slots=True)
class ByWindow:
    """The means of what was measured on one text, apart for each window.

    Attributes:
        kind: Which means there are.
        counts: Of each window, how many rows it had, and how many of them counted for all means.
        means: Of each window, the mean over its rows.
    """

    kind: Kind
    counts: tuple[Sequence[float], Sequence[float]]
    means: Mapping[str, Sequence[float]]

    @classmethod
    def of(
        cls, kind: Kind, whole: object, counts: tuple[Sequence[float], Sequence[float]], sums: Mapping[str, Any]
    ) -> Self | None:
        """Of what ``whole`` tells the means of, from the sums over each window; None where float32 cannot hold it."""
        means = {
            name: [s / n if n and s > 0 else 0.0 for s, n in zip(sums[name], counts[over], strict=True)]
            for name, over in kind.over.items()
        }
        kept = cls(
            kind,
            (array(FLOAT, counts[0]), array(FLOAT, counts[1])),
            {name: array(FLOAT, values) for name, values in means.items()},
        )
        return kept if kept.contradiction(whole) is None else None

    @property
    def rows(self) -> Sequence[float]:
        """How many rows each window had."""
        return self.counts[0]

    def contradiction(self, whole: object) -> str | None:
        """Where it is not what ``whole``, measured on all windows, tells; None if it is."""
        stated, found = getattr(whole, self.kind.rows), math.fsum(self.rows)
        if found != stated:
            return f"{self.kind.rows} is {stated}, but over the windows {found:g}"
        for name, over in self.kind.over.items():
            stated = getattr(whole, name)
            found = ratio(math.fsum(map(mul, self.counts[over], self.means[name])), math.fsum(self.counts[over]))
            if stated is None and not any(self.means[name]):
                continue  # there was nothing to measure
            if stated is None or not math.isclose(stated, found, rel_tol=CLOSE):
                return f"{name} is {stated}, but over the windows {found:.7g}"
        return None

    def left_out(self) -> list[dict[str, float]]:
        """The means over all windows but one, each in turn that had rows."""
        seen = [window for window, rows in enumerate(self.rows) if rows]
        wholes = [math.fsum(counts) for counts in self.counts]
        found: list[dict[str, float]] = [{} for _ in seen]
        for name, over in self.kind.over.items():
            parts = list(map(mul, self.counts[over], self.means[name]))
            whole = math.fsum(parts)
            for without, window in zip(found, seen, strict=True):
                without[name] = ratio(whole - parts[window], wholes[over] - self.counts[over][window])
        return found

    def encoded(self) -> str:
        """As a saved run holds it: little-endian float32 in base 64, the counts first."""
        flat: array[float] = array(FLOAT)
        for values in (*self.counts, *self.means.values()):
            flat.extend(values)
        return base64.b64encode(_little(flat).tobytes()).decode("ascii")

    @classmethod
    def decoded(cls, kind: Kind, told: object, whole: object, where: str) -> Self:
        """What `encoded` gave.

        Args:
            kind: Which means it holds.
            told: What a file holds for it.
            whole: What the same file tells of all windows.
            where: Its place, for messages.

        Raises:
            StatsError: It is none, or not that of ``whole``.
        """
        columns = 2 + len(kind.over)
        try:
            data = base64.b64decode(told, validate=True) if isinstance(told, str) else b""
        except (binascii.Error, ValueError):
            data = b""
        flat: array[float] = array(FLOAT)
        if not data or len(data) % (columns * flat.itemsize):
            shown = printable(repr(told), 30)
            raise StatsError(f"{where} must be {columns} float32 a window in base 64, not {shown}; measure again")
        flat.frombytes(data)
        flat = _little(flat)
        if not all(map(math.isfinite, flat)) or min(flat) < 0:
            raise StatsError(f"{where} holds what is negative or not finite; measure again")
        windows = len(flat) // columns
        rows, some, *means = (flat[first : first + windows] for first in range(0, len(flat), windows))
        if any(not n.is_integer() for n in rows) or any(not n.is_integer() or n > of for n, of in zip(some, rows)):  # noqa: B905
            raise StatsError(f"{where} holds counts that are none; measure again")
        kept = cls(kind, (rows, some), dict(zip(kind.over, means, strict=True)))
        if (told := kept.contradiction(whole)) is not None:
            raise StatsError(f"{where}: {told}; the file was edited or damaged, so measure again")
        return kept


def _little(values: "array[float]") -> "array[float]":
    """The numbers with their bytes as a little-endian machine has them, or back."""
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values
