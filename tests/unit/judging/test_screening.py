"""What a screen tells of an adapter, judged: never safe, and red where a figure is, lacks or is no number."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_nullspace.errors import StatsError
from pytest_nullspace.judging.decision import Call, decide
from pytest_nullspace.judging.invariants import MODEL, Expectations, Stage
from pytest_nullspace.judging.profiles import Chosen, Profile, choose
from pytest_nullspace.judging.screening import (
    KEY,
    UNDECIDED,
    ScreenedLayer,
    Screening,
    sentence,
    verdict,
    verdicts,
)
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.run.stats import RunStats

QUIET = ScreenedLayer("a", "", 10, 100, 4, 4, 10.0, 0.2, 0.3, 6.0, 0.004, 2.0)
"""A layer in whose null space the text lies: leakage 0.1 of chance, preservation 0.02, forgetting 0.05."""
NULL_SPACE = Expectations(Stage.TRAINED, chosen=Chosen(Profile.NULLSPACE, ""))
LORA = Expectations(Stage.TRAINED, chosen=Chosen(Profile.LORA, ""))


def screening(*layers: ScreenedLayer, of: int | None = None) -> Screening:
    """A screen of these layers, which are all unless told otherwise."""
    told = Screening(layers, 0)
    return replace(told, of=len(told.layers) if of is None else of)


def test_the_figures_are_ratios_of_the_mean_norms() -> None:
    """Leakage over chance, preservation and forgetting, each by its definition."""
    assert (QUIET.leakage, QUIET.preservation, QUIET.forgetting) == pytest.approx((0.1, 0.02, 0.05))


def test_a_null_space_is_judged_layer_by_layer_and_its_update_by_the_average() -> None:
    """Leakage and preservation decide in each layer, forgetting in the averages; effectiveness nowhere."""
    loud = replace(QUIET, name="b", mean_leakage=0.04, update_norm=2.0)
    told = screening(QUIET, loud)
    green, red, averages = (verdict(told, name, NULL_SPACE) for name in ("a", "b", MODEL))
    assert [finding.threshold.figure for finding in green.findings] == ["preservation", "leakage"]
    assert (green.tier, red.tier, averages.tier) == (Tier.PASS, Tier.FAIL, Tier.FAIL)
    assert red.summary == "leakage 1 > 0.75"
    assert averages.summary == "forgetting 0.1917 > 0.125"


def test_without_a_promise_the_average_alone_decides() -> None:
    """Of a plain LoRA no layer is red for its leakage, and none is green either."""
    told = screening(replace(QUIET, mean_leakage=0.5))
    assert verdict(told, "a", LORA).excuse == UNDECIDED
    assert verdict(told, "a", LORA).tier is Tier.WARN
    assert verdict(told, MODEL, LORA).tier is Tier.PASS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rows": 0}, "no activation row reached it"),
        ({"down_rank": 0}, "B is zero"),
        ({"update_norm": math.nan}, "non-finite activations or update"),
        ({"mean_leakage": math.inf}, "non-finite activations or update"),
        ({"base_norm": math.nan}, "non-finite activations or update"),
        ({"down_weight_norm": math.nan}, "non-finite weights"),
        ({"unplaced": 2}, "in 2 batches not every row"),
        ({"update_norm": 0.0}, "nothing was trained"),
        ({"input_norm": 0.0}, "its input is zero"),
    ],
)
def test_what_was_not_measured_whole_and_finite_is_red(change: dict[str, Any], why: str) -> None:
    """In its layer and in the averages, whatever it promises and whichever figure the gap is in."""
    told = screening(QUIET, replace(QUIET, name="b", **change))
    for expectations in (NULL_SPACE, LORA):
        assert why in verdict(told, "b", expectations).summary
        assert verdict(told, "b", expectations).tier is Tier.FAIL
        assert verdict(told, MODEL, expectations).tier is Tier.FAIL


def test_of_several_texts_the_worst_counts() -> None:
    """A layer that is loud on one of two is loud; one that is no number there is none."""
    told = screening(QUIET, replace(QUIET, text="code", mean_leakage=0.04))
    assert told.figure("a", "leakage") == pytest.approx(1.0)
    assert verdict(told, "a", NULL_SPACE).tier is Tier.FAIL
    assert math.isnan(screening(QUIET, replace(QUIET, text="code", mean_leakage=math.nan)).figure("a", "leakage"))


def test_the_averages_of_a_part_are_none() -> None:
    """Where not all layers were screened the averages fail, and the sentence says how many were."""
    told = screening(QUIET, of=3)
    assert verdict(told, MODEL, NULL_SPACE).defect == "only 1 of 3 layers were screened"
    assert [one.subject for one in verdicts(told, NULL_SPACE)] == ["a"]
    assert sentence(told, ["a"], NULL_SPACE).startswith("only 1 of 3 layers, ")


def test_no_screen_is_safe() -> None:
    """What passes is NOT GATED, with the figures and what to do; what fails is stopped."""
    run = RunStats("ft", "text", (), 1)
    for layer, call in ((QUIET, Call.NOT_GATED), (replace(QUIET, mean_leakage=0.04), Call.STOP)):
        told = screening(layer)
        found = verdicts(told, NULL_SPACE)
        failed = {one.subject: one.summary for one in found if one.tier is Tier.FAIL}
        words = sentence(told, ["a", MODEL], NULL_SPACE)
        decision = decide(run, NULL_SPACE, (), ["a", MODEL], failed, words, screened=found)
        assert decision.call is call
    assert decision.reasons[0].words == "1 of 1 layers have no null space"
    assert words.endswith("; gate it before you deploy")


def test_the_profile_follows_from_what_was_screened() -> None:
    """An adapter whose space is quiet is judged by it, as in a gate; one that is loud by its update alone."""
    run = RunStats("ft", "text", (), 1, {"format": "PEFT LoRA"})
    assert choose(run, screened=[QUIET]).profile is Profile.NULLSPACE
    assert choose(run, screened=[replace(QUIET, mean_leakage=0.04, down_weight_norm=9.0)]).profile is Profile.LORA


def test_it_goes_through_json_and_back() -> None:
    """Numbers and what is none alike; what is of no screen is an error that names the file."""
    told = screening(QUIET, replace(QUIET, name="b", base_norm=math.inf))
    back = Screening.told({KEY: json.loads(json.dumps(told.to_dict(), allow_nan=False))})
    assert back is not None
    assert back.entries[0] == QUIET
    assert math.isnan(back.entries[1].base_norm)
    assert Screening.told({}) is None
    wrongs: tuple[Any, ...] = ([], {"layers": [{}], "of": 1}, {"layers": [1], "of": 1}, {"layers": []})
    for wrong in wrongs:
        with pytest.raises(StatsError, match=r"x\.json: its entry 'screened' is of no screen"):
            Screening.told({KEY: wrong}, "x.json")
