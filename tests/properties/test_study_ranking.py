"""The study's rank correlations, intervals and bounds against plain definitions and planted data."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fixtures.study_ranking import (
    Alarms,
    Floats,
    alarms,
    area,
    association,
    best_bound,
    bootstrapped,
    ranks,
    ranks_within,
)

pytestmark = pytest.mark.filterwarnings("error")

COLUMNS = st.lists(st.integers(-5, 5), min_size=3, max_size=30)
SEEDS = st.integers(0, 2**31)


@given(COLUMNS)
def test_a_rank_is_how_many_are_smaller_and_half_of_the_equal_others(values: list[int]) -> None:
    """Ranks agree with their definition, ties and all."""
    wanted = [sum(v < w for v in values) + (values.count(w) - 1) / 2 for w in values]
    assert ranks(values).tolist() == pytest.approx(wanted)


@given(SEEDS, st.integers(5, 40))
def test_a_rank_correlation_knows_no_scale(seed: int, count: int) -> None:
    """Any rising transformation leaves it, a falling one turns its sign, and a column with itself gives one."""
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=count), draw.normal(size=count)
    rho = association(x, y)
    assert association(np.exp(x), y**3) == pytest.approx(rho)
    assert association(-x, y) == pytest.approx(-rho)
    assert association(x, x) == pytest.approx(1)


@given(SEEDS, st.integers(8, 40))
def test_a_partial_correlation_is_that_of_what_regression_leaves(seed: int, count: int) -> None:
    """It agrees with correlating the residuals of both ranks after the third's ranks."""
    draw = np.random.default_rng(seed)
    third = draw.normal(size=count)
    x, y = third + draw.normal(size=count), third - draw.normal(size=count)

    def left(column: Floats) -> Any:
        design = np.column_stack([np.ones(count), ranks(third)])
        return ranks(column) - design @ np.linalg.lstsq(design, ranks(column), rcond=None)[0]

    assume(min(np.linalg.norm(left(x)), np.linalg.norm(left(y))) > 1e-6)  # what follows the third leaves rounding alone
    assert association(x, y, third) == pytest.approx(np.corrcoef(left(x), left(y))[0, 1], abs=1e-9)


def test_what_only_the_task_gain_explains_has_no_partial_correlation() -> None:
    """Two columns that follow a third and nothing else correlate plainly, and hardly at all given it."""
    draw = np.random.default_rng(0)
    third = draw.normal(size=2000)
    x, y = third + draw.normal(size=2000), third + draw.normal(size=2000)
    assert association(x, y) > 0.4
    assert abs(association(x, y, third)) < 0.08


def test_inside_strata_what_lies_between_them_counts_for_nothing() -> None:
    """Two worlds of opposite levels in each of which the columns rise together: −0.5 or so plainly, one inside."""
    x, y, worlds = [1, 2, 3, 11, 12, 13], [21, 22, 23, 1, 2, 3], list("aaabbb")
    assert association(x, y) < -0.3
    assert association(x, y, strata=worlds) == pytest.approx(1)


@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from("abc")), min_size=1, max_size=30))
def test_ranks_inside_strata_are_those_of_each_alone(rows: list[tuple[int, str]]) -> None:
    """Each stratum's ranks are its own, from their mean, as shares of its size."""
    values, strata = [v for v, _ in rows], [of for _, of in rows]
    found = ranks_within(values, strata)
    for stratum in set(strata):
        of = ranks([v for v, s in rows if s == stratum])
        alone = [float(rank) for rank, s in zip(found, strata, strict=True) if s == stratum]
        assert alone == pytest.approx((of - of.mean()) / len(of))


@given(SEEDS)
def test_an_interval_holds_the_value_and_comes_again(seed: int) -> None:
    """The same seed gives the same interval, the value lies inside, and rows without the figure are left out."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=30)
    y = x + draw.normal(size=30)
    found = bootstrapped(x, y, resamples=100)
    assert found.low - 0.1 <= found.value <= found.high + 0.1
    assert bootstrapped([*x, math.nan], [*y, 99.0], resamples=100) == found


def test_intervals_cover_what_is_true_about_as_often_as_they_say() -> None:
    """Of 100 samples of a population in which Spearman is 0.58, at least 85 of the 95 % intervals hold it."""
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        x = draw.normal(size=60)
        y = 0.75 * x + draw.normal(size=60)  # Pearson 0.6, which is a Spearman of 6/π·asin(0.3)
        found = bootstrapped(x, y, resamples=100)
        held += found.low <= 6 / math.pi * math.asin(0.3) <= found.high
    assert held >= 85


def test_too_few_adapters_are_not_correlated() -> None:
    """Four rows give no number, and a figure that never varies gives none either."""
    assert math.isnan(bootstrapped([1, 2, 3, 4], [1, 2, 3, 4]).value)
    assert math.isnan(bootstrapped([1] * 9, range(9)).value)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=20))
def test_the_area_is_the_chance_that_a_ruined_one_lies_higher(rows: list[tuple[int, bool]]) -> None:
    """It agrees with counting the pairs, equal ones half."""
    bad, good = [v for v, ruined in rows if ruined], [v for v, ruined in rows if not ruined]
    found = area([v for v, _ in rows], [ruined for _, ruined in rows])
    if not bad or not good:
        assert math.isnan(found)
        return
    pairs = [(b > g) + (b == g) / 2 for b in bad for g in good]
    assert found == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("lower", [True, False])
def test_the_best_bound_parts_what_can_be_parted(lower: bool) -> None:
    """Where every ruined adapter lies beyond every other, it errs nowhere; a bound that is off is told how."""
    sign = 1 if lower else -1
    values, ruined = [sign * v for v in (1.0, 2.0, 3.0, 10.0, 11.0)], [False, False, False, True, True]
    assert best_bound(values, ruined, lower) == Alarms(sign * 6.5, 2, 0, 3, 0)
    assert alarms(values, ruined, sign * 2.0, lower) == Alarms(sign * 2.0, 2, 0, 3, 2)
    assert alarms(values, ruined, sign * 10.5, lower) == Alarms(sign * 10.5, 2, 1, 3, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=20), st.booleans())
def test_no_bound_is_better_than_the_best(rows: list[tuple[int, bool]], lower: bool) -> None:
    """Of all bounds between values none has fewer misses and false alarms, as shares of their own."""
    values, ruined = [v for v, _ in rows], [of for _, of in rows]
    best = best_bound(values, ruined, lower)
    tried = [alarms(values, ruined, bound + 0.5, lower) for bound in range(min(values), max(values))]

    def cost(one: Alarms) -> float:
        return one.misses / max(1, one.ruined) + one.false_alarms / max(1, one.good)

    assert all(cost(best) <= cost(one) + 1e-9 for one in tried)
