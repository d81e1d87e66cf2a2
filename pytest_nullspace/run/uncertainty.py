"""How far a figure may lie from what more text would give, from how it varies between windows. Pure."""

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist, fmean

LEVEL = 0.95
"""How often the true figure lies within its margin."""
MOST_WINDOWS = 10**9
"""More than any text has."""


def jackknife(without: Sequence[float]) -> float:
    """The margin of a figure from its values with one window left out, each in turn; infinite from fewer than two.

    It is half the width of the figure's confidence interval, in its own unit. Source: Efron and Tibshirani, An
    Introduction to the Bootstrap, chapter 11.
    """
    count = len(without)
    if count < 2:
        return math.inf
    middle = fmean(without)
    return students_t(count - 1) * math.sqrt((count - 1) / count * sum((value - middle) ** 2 for value in without))


@cache
def students_t(freedom: int) -> float:
    """Student's t below which lies all but half of what `LEVEL` leaves.

    Exact for one and two degrees of freedom, beyond them the expansion of Abramowitz and Stegun 26.7.5 (to 1 % at three
    degrees of freedom, 0.1 % from seven).
    """
    p = (1 + LEVEL) / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    total: float = z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
    return total


def windows_needed(windows: int, margin: float, distance: float) -> int | None:
    """About how many windows would bring ``margin`` below ``distance``, as it falls with their square root.

    None where no text would have so many.
    """
    if not distance > 0:
        return None
    times = margin / distance
    needed = windows * times * times
    return math.ceil(needed) if needed <= MOST_WINDOWS else None
