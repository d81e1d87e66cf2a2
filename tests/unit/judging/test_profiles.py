"""By what an adapter is judged."""

import dataclasses
import json
from pathlib import Path

import pytest

from fixtures.study_figures import JUDGED_AS
from pytest_nullspace.judging.invariants import (
    FORGOT,
    MODEL,
    Expectations,
    Override,
    Stage,
    defaults,
    judge,
    judge_averages,
)
from pytest_nullspace.judging.profiles import KEPT, OF_AVERAGES, OF_LAYERS, STAND_IN, Chosen, Profile, choose
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.run.figures import of_predictions
from pytest_nullspace.run.stats import LayerStats, RunStats
from pytest_nullspace.run.texts import DRIFT

LAYER = LayerStats(
    "l", 100, 100, 4, 100, 10.0, 0.1, 0.2, 10.0, 10.0, mean_leakage=0.004, down_weight_norm=1.5, up_weight_norm=1.0,
    base_weight_norm=1.0,
)  # fmt: skip
LOUD = dataclasses.replace(LAYER, mean_leakage=0.08, down_norm=6.0)
PEFT = {"format": "PEFT LoRA", "init_lora_weights": True}


def held(profile: Profile, **more: object) -> Expectations:
    """What is expected by a profile."""
    return Expectations(chosen=Chosen(profile, "said"), **more)  # type: ignore[arg-type]


def run(*layers: LayerStats, **about: object) -> RunStats:
    """A run of these layers."""
    return RunStats("m", "t", layers or (LAYER,), len(layers) or 1, about or PEFT)


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("stage", Stage)
def test_each_profile_judges_its_figures_and_no_other(profile: Profile, stage: Stage) -> None:
    """In layers and averages those of its table, as far as the stage judges them; of the drift every figure."""
    known = {threshold.figure for threshold in defaults(stage)}
    expected = held(profile, stage=stage, drift_judged=True)
    assert {t.figure for t in expected.thresholds("l")} == OF_LAYERS[profile] & known
    assert {t.figure for t in expected.thresholds(MODEL)} == OF_AVERAGES[profile] & known
    assert {t.figure for t in expected.thresholds(DRIFT)} == {t.figure for t in defaults(stage, of_predictions=True)}
    assert set(of_predictions()) >= {t.figure for t in expected.thresholds(DRIFT)}


def test_a_lost_null_space_fails_who_promised_one() -> None:
    """A loud input space fails a null-space adapter and the script's own ratio, and not a plain LoRA."""
    assert [judge(LOUD, held(profile)).tier for profile in Profile] == [Tier.FAIL, Tier.FAIL, Tier.PASS]
    leaks = dataclasses.replace(LAYER, mean_leakage=0.08)
    assert [judge(leaks, held(profile)).tier for profile in Profile] == [Tier.PASS, Tier.FAIL, Tier.PASS]


def test_a_layer_that_contributes_little_fails_by_the_script_alone() -> None:
    """A good null space is weak on the text that it spares: a single layer is only held to have learned at all."""
    weak = dataclasses.replace(LAYER, update_norm=0.005)
    assert [judge(weak, held(profile)).tier for profile in Profile] == [Tier.FAIL, Tier.PASS, Tier.PASS]
    dead = dataclasses.replace(LAYER, update_norm=0.0)
    assert {judge(dead, held(profile)).tier for profile in Profile} == {Tier.FAIL}
    assert judge_averages(run(weak, dataclasses.replace(LAYER, name="m")), held(Profile.NULLSPACE)).tier is Tier.PASS
    lost = dataclasses.replace(LAYER, update_norm=0.0015)
    assert judge_averages(run(lost), held(Profile.NULLSPACE)).summary == "contribution 0.00015 < 0.0002"


def test_a_plain_lora_does_not_pass_where_nobody_measured_what_it_forgot() -> None:
    """Its averages warn, with the reason, until a test judges its drift; before training nothing can be forgotten."""
    verdict = judge_averages(run(LOUD), held(Profile.LORA))
    assert (verdict.tier, verdict.summary, verdict.doubt) == (Tier.WARN, FORGOT, FORGOT)
    assert verdict.warning == f"in the warn tier: {FORGOT}"
    assert judge_averages(run(LOUD), held(Profile.LORA, drift_judged=True)).tier is Tier.PASS
    initial = dataclasses.replace(LOUD, update_norm=0.0)
    assert judge_averages(run(initial), held(Profile.LORA, stage=Stage.INIT)).tier is Tier.PASS
    dead = judge_averages(run(initial), held(Profile.LORA))
    assert (dead.tier, FORGOT in dead.summary) == (Tier.FAIL, False)


def test_forgetting_stands_in_only_where_nobody_judges_the_drift() -> None:
    """A large update fails the averages, and no single layer, where nothing better is known."""
    large = dataclasses.replace(LAYER, update_norm=5.0, task=dataclasses.replace(LAYER, update_norm=9.0))
    for profile in (Profile.NULLSPACE, Profile.LORA):
        assert judge(large, held(profile)).tier is Tier.PASS
        assert "forgetting 0.5 > 0.125" in judge_averages(run(large), held(profile)).summary
        assert judge_averages(run(large), held(profile, drift_judged=True)).tier is Tier.PASS
    assert judge_averages(run(large), held(Profile.REFERENCE)).tier is Tier.PASS


def test_a_figure_for_which_a_bound_is_given_decides() -> None:
    """A user's bound makes any figure decide, where its glob says, in every profile."""
    bound = Override("l", "leakage", 0.1, 0.2)
    expected = held(Profile.LORA, overrides=[bound], drift_judged=True)
    assert judge(LOUD, expected).summary == "leakage 2 > 0.2"
    assert judge(dataclasses.replace(LOUD, name="other"), expected).tier is Tier.PASS
    assert judge_averages(run(LOUD), expected).tier is Tier.PASS
    assert "leakage" in held(Profile.LORA).left_out


def test_the_script_is_held_to_the_letter() -> None:
    """By its profile a figure passes by its own value, though a few rows alone make it pass."""
    from pytest_nullspace.run.stats import WithoutSinks

    sunk = dataclasses.replace(LAYER, without_sinks=WithoutSinks(90, 1.0, 0.3, 0.2, 1.0, 1.0))
    assert judge(sunk, held(Profile.REFERENCE)).tier is Tier.PASS
    assert judge(sunk, held(Profile.NULLSPACE)).tier is Tier.WARN


@pytest.mark.parametrize(
    ("of", "asked", "variant", "start", "profile", "why"),
    [
        (run(), "reference", "lora", None, "reference", "as --nullspace-profile says"),
        (run(LOUD), "auto", "v1", None, "nullspace", "as --nullspace-variant=v1 says"),
        (run(), "auto", "lora", None, "lora", "as --nullspace-variant=lora says"),
        (run(LOUD, format="LoRA-Null"), "auto", "auto", ("lora", "so"), "nullspace", "a LoRA-Null directory"),
        (run(version=1), "auto", "auto", None, "reference", "its file tells no more than the reference script's"),
        (run(format="PEFT LoRA", init_lora_weights="pissa"), "auto", "auto", None, "lora",
         "its config says init_lora_weights=pissa"),
        (run(LOUD), "auto", "auto", ("v2", "as v2 begins"), "nullspace", "as v2 begins"),
        (run(), "auto", "auto", ("lora", "as lora begins"), "lora", "as lora begins"),
        (run(), "auto", "auto", ("v1", "as v1 begins"), "nullspace", "a null space was found (leakage 0.1 x chance)"),
        (run(), "auto", "auto", None, "nullspace", "a null space was found (leakage 0.1 x chance)"),
        (run(LOUD), "auto", "auto", None, "lora", "an ordinary LoRA by its leakage, 2 x chance"),
        (run(dataclasses.replace(LOUD, down_weight_norm=2.0)), "auto", "auto", None, "nullspace",
         "the rows of B are orthonormal"),
        (run(dataclasses.replace(LOUD, mean_leakage=None)), "auto", "auto", None, "lora",
         "nothing tells of a null space"),
        (run(dataclasses.replace(LAYER, rows=0)), "auto", "auto", None, "lora", "nothing tells of a null space"),
    ],
)  # fmt: skip
def test_a_profile_is_chosen_from_what_is_known(
    of: RunStats, asked: str, variant: str, start: tuple[str, str] | None, profile: str, why: str
) -> None:
    """What was said comes first, then the format, the config, the start, and last what was measured."""
    assert choose(of, asked, variant, start) == Chosen(Profile(profile), why)


PREDICTS = 0.6
"""The partial correlation with knowledge lost, given what was learned, from which a figure may decide what is kept."""


def test_what_decides_about_forgetting_is_what_predicts_it() -> None:
    """In each world of the study the figures that decide what was kept predict it, and no others decide that.

    The update beside what the base computes stands in for them where it is the whole change of the weights. What a null
    space promises and what was learned are judged for themselves.
    """
    study = json.loads((Path(__file__).parents[3] / "docs" / "prediction.json").read_text("utf-8"))
    partial = {figure: [rho for rho, *_ in worlds.values()] for figure, worlds in study["partial"].items()}
    assert {len(worlds) for worlds in partial.values()} == {4}  # three worlds, and all together
    for figure in KEPT:
        assert min(partial[JUDGED_AS[figure]]) >= PREDICTS, figure
    assert min(partial["true update, preserved"]) >= PREDICTS
    promise, learned = {"preservation", "leakage"}, {"effectiveness", "contribution", "task-gain", "headroom"}
    for profile in (Profile.NULLSPACE, Profile.LORA):
        judged = {t.figure for test in ("l", MODEL, DRIFT) for t in held(profile).thresholds(test)}
        assert judged - KEPT - STAND_IN - promise - learned == set()
    weak = {name for name, judged in JUDGED_AS.items() if min(partial[judged]) < PREDICTS}
    assert {"leakage", "selectivity", "preservation"} <= weak
    assert not weak & KEPT
    assert promise.isdisjoint({t.figure for t in held(Profile.LORA).thresholds("l")})
