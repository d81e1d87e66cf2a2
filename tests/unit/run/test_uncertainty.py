"""Margins: the jackknife against textbook values, and how often they hold."""

import math
import random
from statistics import NormalDist, fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.run.uncertainty import jackknife, students_t, windows_needed


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (7, 2.3646), (15, 2.1314), (30, 2.0423), (1000, 1.9623)],
)
def test_students_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    """The quantile agrees with the printed table, to 1 % at three degrees of freedom and 0.1 % from five on."""
    assert students_t(freedom) == pytest.approx(quantile, rel=1e-2 if freedom == 3 else 1e-3)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40))
def test_the_margin_of_a_mean_is_its_standard_error_times_t(values: list[float]) -> None:
    """For a plain mean the jackknife is the textbook's standard error."""
    total, count = sum(values), len(values)
    without = [(total - value) / (count - 1) for value in values]
    want = students_t(count - 1) * stdev(values) / math.sqrt(count)
    assert jackknife(without) == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_margins_hold_as_often_as_they_say() -> None:
    """Of many small samples about 95 % have the true mean within their margin."""
    choose, hits, tries = random.Random(0), 0, 2000
    for _ in range(tries):
        values = [choose.gauss(3, 2) for _ in range(8)]
        margin = jackknife([(sum(values) - value) / 7 for value in values])
        hits += abs(fmean(values) - 3) <= margin
    spread = math.sqrt(0.95 * 0.05 / tries)
    assert abs(hits / tries - 0.95) < 4 * spread


def test_one_window_has_no_margin_but_infinity() -> None:
    """What cannot vary tells nothing of how it would vary."""
    assert jackknife([1.0]) == math.inf
    assert jackknife([]) == math.inf


def test_the_windows_needed_grow_with_the_square() -> None:
    """Half the distance takes four times the windows; on the bound itself no number is enough."""
    assert windows_needed(16, 0.2, 0.1) == 64
    assert windows_needed(16, 0.1, 0.1) == 16
    assert windows_needed(16, 0.1, 0.0) is None
    assert windows_needed(1, math.inf, 0.1) is None
    assert windows_needed(16, 1e308, 1e-308) is None
    assert NormalDist().inv_cdf(0.975) < students_t(10**6) < 1.96 + 1e-4
