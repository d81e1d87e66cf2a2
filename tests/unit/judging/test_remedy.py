"""The largest scale that passes: found by few questions, and told in a sentence."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.errors import StatsError
from pytest_nullspace.judging.invariants import Expectations, Override
from pytest_nullspace.judging.remedy import AT_ONCE, KEY, NEAR, ROUNDS, Remedy, guess, largest, passes
from pytest_nullspace.run.figures import Text
from pytest_nullspace.run.stats import Drift, TextDrift

FOUND = Remedy(0.625, "lora_alpha 20 in place of 32", {"divergence": (0.046, 0.003)}, 0.714)


@given(bound=st.floats(1e-3, 1), about=st.floats(1e-3, 0.99))
def test_the_largest_scale_that_fits_is_found_with_few_questions(bound: float, about: float) -> None:
    """What is found fits, and nothing near above it does, unless the guess was far off."""
    asked: list[float] = []

    def fits(scales: Sequence[float]) -> list[bool]:
        asked.extend(scales)
        return [scale < bound for scale in scales]

    found = largest(fits, about)
    assert found < bound
    assert found in (0.0, *asked)
    assert len(asked) <= ROUNDS * AT_ONCE
    if 0.4 < about / bound < 1.2:
        assert found >= bound * (1 - 1.5 * NEAR)


def test_where_only_none_of_it_fits_zero_is_found() -> None:
    """A bound that nothing above zero keeps."""
    assert largest(lambda scales: [False] * len(scales), 0.5) == 0


def text(rise: float, divergence: float, margin: float = 0.001) -> TextDrift:
    return TextDrift(400, 2.0, 2.0 + rise, divergence, margin, margin)


def test_only_what_would_pass_with_more_text_surely_passes() -> None:
    """A figure within its margin of the bound passes as it is, and not surely; the task's are the task text's."""
    near, far = Drift("b", text(0.01, 0.0495), text(-1, 9)), Drift("b", text(0.01, 0.04), text(0.1, 9))
    assert passes(near, Expectations(), Text.PRESERVED, surely=False)
    assert not passes(near, Expectations(), Text.PRESERVED)
    assert passes(far, Expectations(), Text.PRESERVED)
    assert passes(near, Expectations(), Text.TASK)
    assert not passes(far, Expectations(), Text.TASK)
    assert not passes(Drift("b", text(0.01, 0.04, math.inf)), Expectations(), Text.PRESERVED)
    strict = Expectations(overrides=[Override("*", "divergence", 0.01, 0.02)])
    assert not passes(far, strict, Text.PRESERVED)


def test_the_guess_is_that_of_a_divergence_that_grows_with_the_square() -> None:
    """Four times the bound halves the update; of several figures the worst counts."""
    assert guess(Drift("b", text(0.01, 0.199)), Expectations()) == pytest.approx(0.5)
    assert guess(Drift("b", text(0.799, 0.199)), Expectations()) == pytest.approx(0.25)


def test_it_is_told_in_a_sentence_and_survives_the_file() -> None:
    """The number, what it costs, and what is kept of the task; or why there is none."""
    assert (
        str(FOUND) == "lora_alpha 20 in place of 32 would pass: divergence 0.046 ± 0.003; 71 % of the task's gain kept"
    )
    none = Remedy(None, "its lora_alpha is 0 already", {})
    assert str(none) == "no scale of the update passes: its lora_alpha is 0 already"
    for remedy in (FOUND, none):
        assert Remedy.of(json.loads(json.dumps({KEY: remedy.to_dict()}))) == remedy
    assert Remedy.of({}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"scale": "x"},
        {"scale": math.nan},
        {"scale": [1]},
        {"kept": math.inf},
        {"figures": 7},
        {"figures": {"divergence": [1]}},
        {"figures": {"beauty": [1, 2]}},
        {"figures": {"divergence": [1, None]}},
        {"figures": {"divergence": [10**400, 1]}},
    ],
)
def test_what_is_no_suggestion_is_refused(change: dict[str, Any]) -> None:
    """A hostile file's suggestion is refused by name."""
    others: list[Any] = [7, [], "x", {}, {"scale": 1.0, "kept": None, "figures": {}}]
    for told in (FOUND.to_dict() | change, *others):
        with pytest.raises(StatsError, match=r"^f\.json: suggestion: not what a run tells of it; measure again$"):
            Remedy.of({KEY: told}, "f.json")
