"""The verdict: tiers to the letter of the reference's table, and never a better tier for a worse figure."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.errors import OptionError
from pytest_nullspace.judging.invariants import Expectations, Override, Stage, judge, judge_averages, judge_drift
from pytest_nullspace.judging.verdicts import Finding, Threshold, Tier, Verdict
from pytest_nullspace.run.figures import of_layers
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats, TextDrift

PASS, WARN, FAIL = Tier
TRAINED, INIT = Expectations(), Expectations(Stage.INIT)
ORDER = list(Tier)
GOOD = LayerStats(
    name="model.layers.0.mlp.up_proj",
    rows=10,
    in_features=100,
    rank=10,
    out_features=50,
    input_norm=1.0,
    down_norm=0.01,
    update_norm=0.05,
    base_norm=1.0,
    output_norm=1.0,
    mean_leakage=0.001,
    down_weight_norm=1.0,
    up_weight_norm=1.0,
    base_weight_norm=1.0,
)


def threshold(figure: str, expectations: Expectations = TRAINED) -> Threshold:
    """The threshold of that figure."""
    return next(t for t in expectations.thresholds("any") if t.figure == figure)


def layer(**changes: Any) -> LayerStats:
    """A layer that passes, changed."""
    return dataclasses.replace(GOOD, **changes)


# Tiers


@pytest.mark.parametrize(
    ("figure", "value", "tier"),
    [
        ("preservation", 0.0, PASS),
        ("preservation", 0.0999999, PASS),
        ("preservation", math.nextafter(0.1, 0), PASS),
        ("preservation", 0.1, WARN),
        ("preservation", 0.3, WARN),
        ("preservation", 0.5, WARN),
        ("preservation", math.nextafter(0.5, 1), FAIL),
        ("preservation", 0.5000001, FAIL),
        ("effectiveness", 0.5, PASS),
        ("effectiveness", math.nextafter(1e-4, 1), PASS),
        ("effectiveness", 1e-4, WARN),
        ("effectiveness", 1e-6, WARN),
        ("effectiveness", math.nextafter(1e-6, 0), FAIL),
        ("effectiveness", 0.0, FAIL),
        ("contribution", 0.02, PASS),
        ("contribution", math.nextafter(0.01, 1), PASS),
        ("contribution", 0.01, WARN),
        ("contribution", 0.001, WARN),
        ("contribution", math.nextafter(0.001, 0), FAIL),
        ("contribution", 0.0, FAIL),
        ("leakage", 0.0, PASS),
        ("leakage", math.nextafter(0.5, 0), PASS),
        ("leakage", 0.5, WARN),
        ("leakage", 0.75, WARN),
        ("leakage", math.nextafter(0.75, 1), FAIL),
        ("leakage", 1.0, FAIL),
    ],
)
def test_bounds_lie_in_the_warn_tier(figure: str, value: float, tier: Tier) -> None:
    """Each figure passes and fails strictly beyond its bounds; the bounds themselves warn."""
    assert threshold(figure).tier(value) is tier


@pytest.mark.parametrize(
    ("figure", "value", "tier"),
    [
        ("effectiveness", 0.0, PASS),
        ("effectiveness", math.nextafter(1e-6, 0), PASS),
        ("effectiveness", 1e-6, WARN),
        ("effectiveness", 1e-4, WARN),
        ("effectiveness", math.nextafter(1e-4, 1), FAIL),
        ("preservation", 0.1, WARN),
        ("preservation", 0.6, FAIL),
        ("leakage", 0.8, FAIL),
    ],
)
def test_before_training_an_update_is_the_fault(figure: str, value: float, tier: Tier) -> None:
    """Of the initial checkpoint the reverse is expected of the update, and the same of the null space."""
    assert threshold(figure, INIT).tier(value) is tier


def test_each_stage_judges_its_figures() -> None:
    """A trained checkpoint is judged by every figure; an initial one has no contribution to judge."""
    assert [t.figure for t in TRAINED.thresholds("x")] == list(of_layers())
    assert [t.figure for t in INIT.thresholds("x")] == ["preservation", "effectiveness", "leakage"]


@pytest.mark.parametrize("figure", of_layers())
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails(figure: str, value: float) -> None:
    """No figure passes as NaN or infinity, on whichever side infinity lies."""
    assert threshold(figure).tier(value) is FAIL


BOUNDS = st.floats(-1e6, 1e6)


@given(figure=st.sampled_from(sorted(of_layers())), stage=st.sampled_from(Stage), a=BOUNDS, b=BOUNDS, data=st.data())
def test_a_worse_figure_never_has_a_better_tier(
    figure: str, stage: Stage, a: float, b: float, data: st.DataObject
) -> None:
    """For any bounds, moving a value towards the bad side never improves its tier."""
    thresholds = {t.figure: t for t in Expectations(stage).thresholds("x")}
    if figure not in thresholds:
        return
    default = thresholds[figure]
    low, high = sorted((a, b))
    bounds = default.replaced(*((low, high) if default.lower_is_better else (high, low)))
    values = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([low, high])
    for held in (default, bounds):
        better, worse = sorted((data.draw(values), data.draw(values)), reverse=not held.lower_is_better)
        assert ORDER.index(held.tier(better)) <= ORDER.index(held.tier(worse))


RATIOS = st.floats(1e-9, 1e3)


@given(x=RATIOS, bx=RATIOS, abx=RATIOS, y=RATIOS, leak=st.floats(0, 1), factor=st.floats(1, 1e6))
def test_a_layer_that_got_worse_is_never_judged_better(
    x: float, bx: float, abx: float, y: float, leak: float, factor: float
) -> None:
    """Raising ``‖BX‖`` or leakage, or lowering ``‖ABX‖``, never improves the verdict on a trained layer."""
    before = layer(input_norm=x, down_norm=bx, update_norm=abx, output_norm=y, mean_leakage=leak)
    tier = ORDER.index(judge(before, TRAINED).tier)
    for change in ({"down_norm": bx * factor}, {"mean_leakage": leak * factor}, {"update_norm": abx / factor}):
        assert ORDER.index(judge(dataclasses.replace(before, **change), TRAINED).tier) >= tier  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(Tier)))
def test_the_worst_tier_is_the_worst(tiers: list[Tier]) -> None:
    """Fail outweighs warn, warn outweighs pass, and nothing at all passes."""
    assert Tier.worst(tiers) is (FAIL if FAIL in tiers else WARN if WARN in tiers else PASS)


# Bounds of the user's own


def test_the_last_override_that_fits_a_layer_holds() -> None:
    """Overrides apply by glob and figure; of several the last wins, and other layers and figures keep theirs."""
    expectations = Expectations(
        overrides=(
            Override("*", "preservation", 0.2, 0.6),
            Override("*.mlp.*", "preservation", 0.3, 0.7),
            Override("model", "leakage", 0.1, 0.2),
        )
    )
    bounds = {
        name: {t.figure: (t.passes, t.fails) for t in expectations.thresholds(name)}
        for name in ("a.mlp.b", "a", "model")
    }
    assert bounds["a.mlp.b"]["preservation"] == (0.3, 0.7)
    assert bounds["a"]["preservation"] == bounds["model"]["preservation"] == (0.2, 0.6)
    assert bounds["a"]["leakage"] == (0.5, 0.75)
    assert bounds["model"]["leakage"] == (0.1, 0.2)


def test_globs_tell_upper_from_lower_case() -> None:
    """A glob means the same on every system."""
    expectations = Expectations(overrides=(Override("A*", "preservation", 0.2, 0.6),))
    assert expectations.thresholds("a")[0].passes == 0.1
    assert expectations.thresholds("A")[0].passes == 0.2


@pytest.mark.parametrize(
    ("figure", "passes", "fails", "said"),
    [
        ("preservation", 0.6, 0.5, "preservation: lower is better, so PASS 0.6 cannot lie beyond FAIL 0.5; swap them"),
        ("contribution", 0.1, 0.2, "contribution: higher is better, so PASS 0.1 cannot lie beyond FAIL 0.2; swap them"),
        ("leakage", math.nan, 1.0, "leakage: the bounds must be finite, not nan and 1"),
        ("leakage", 0.1, math.inf, "leakage: the bounds must be finite, not 0.1 and inf"),
        (
            "speed",
            0.1,
            0.2,
            "no figure 'speed' is judged at stage trained; there are "
            "preservation, effectiveness, contribution, leakage, forgetting, selectivity, divergence, loss-rise, "
            "task-gain, headroom",
        ),
    ],
)
def test_bounds_that_cannot_be_are_refused(figure: str, passes: float, fails: float, said: str) -> None:
    """Bounds the wrong way round, not finite, or of no figure are an option's fault, before anything is measured."""
    with pytest.raises(OptionError) as caught:
        Expectations(overrides=(Override("*", figure, passes, fails),))
    assert str(caught.value) == said


def test_a_stage_refuses_bounds_of_a_figure_that_it_does_not_judge() -> None:
    """An override that could never apply is not taken in silence."""
    with pytest.raises(OptionError, match="no figure 'contribution' is judged at stage init"):
        Expectations(Stage.INIT, (Override("*", "contribution", 0.1, 0.01),))


def test_an_initial_checkpoint_is_not_held_to_a_gain() -> None:
    """Before training the predictions must not have moved; that the task gained nothing is no fault, nor a bound."""
    text = TextDrift(tokens=10, base_loss=2.0, adapted_loss=2.0, divergence=0.0, loss_margin=0.0, divergence_margin=0.0)
    drift = Drift("the base", text, dataclasses.replace(text, adapted_loss=2.0 + 1e-9))
    assert [f.threshold.figure for f in judge_drift(drift, INIT).findings] == ["divergence", "loss-rise"]
    assert (judge_drift(drift, INIT).tier, judge_drift(drift, TRAINED).tier) == (PASS, FAIL)
    with pytest.raises(OptionError, match=r"no figure 'task-gain' is judged at stage init; there are .*, loss-rise$"):
        Expectations(Stage.INIT, (Override("*", "task-gain", 0.1, 0.0),))


def test_equal_bounds_leave_one_value_to_warn() -> None:
    """With one bound for both tiers only that very value warns."""
    sharp = threshold("preservation").replaced(0.2, 0.2)
    assert [sharp.tier(v) for v in (0.19, 0.2, 0.21)] == [PASS, WARN, FAIL]


# Verdicts


def test_a_good_layer_passes_in_every_figure() -> None:
    """A sound, trained layer passes, with one finding for each figure."""
    verdict = judge(GOOD, TRAINED)
    assert (verdict.subject, verdict.tier, verdict.defect) == (GOOD.name, PASS, None)
    assert {f.threshold.figure: f.value for f in verdict.findings} == {f: GOOD.figure(f) for f in GOOD.measured}


def test_a_verdict_whose_margin_reaches_over_a_bound_is_uncertain() -> None:
    """Uncertain is what another tier lies within the margin of, and whatever has an infinite margin."""
    threshold = next(t for t in TRAINED.thresholds("x") if t.figure == "preservation")
    for value, margin, uncertain in (
        (0.09, 0.02, True),
        (0.09, 0.005, False),
        (0.3, math.inf, True),
        (0.3, None, False),
    ):
        assert Finding(value, threshold, threshold.tier(value), margin).uncertain is uncertain


@pytest.mark.parametrize(
    ("change", "tier", "summary"),
    [
        ({"down_norm": 0.61}, FAIL, "preservation 0.61 > 0.5"),
        ({"down_norm": 0.2}, WARN, "preservation 0.2 >= 0.1"),
        ({"down_norm": 0.1}, WARN, "preservation 0.1 >= 0.1"),
        ({"update_norm": 0.0}, FAIL, "effectiveness 0 < 1e-06, contribution 0 < 0.001"),
        ({"update_norm": 0.005}, WARN, "contribution 0.005 <= 0.01"),
        ({"mean_leakage": 0.09}, FAIL, "leakage 0.9 > 0.75"),
        ({"mean_leakage": math.nan}, FAIL, "leakage nan is not finite"),
        ({"down_norm": 0.2, "mean_leakage": 0.09}, FAIL, "leakage 0.9 > 0.75"),
        ({"rows": 0}, FAIL, "no activation row reached it"),
        ({"down_norm": math.nan}, FAIL, "non-finite activations (NaN or infinity)"),
        ({"input_norm": 0.0}, FAIL, "its input is zero in every row"),
    ],
)
def test_a_verdict_says_what_is_wrong_in_a_line(change: dict[str, Any], tier: Tier, summary: str) -> None:
    """The tier is the worst of the findings, and the summary names those of that tier with the bound they crossed."""
    verdict = judge(layer(**change), TRAINED)
    assert (verdict.tier, verdict.summary) == (tier, summary)


UNREACHED: dict[str, Any] = dict.fromkeys(
    ("input_norm", "down_norm", "update_norm", "base_norm", "output_norm"), math.nan
)


def test_only_the_activations_of_an_unreached_layer_are_excused() -> None:
    """A layer that no row need reach warns, and fails by non-finite weights, a B of zeros or what a check finds."""
    unreached = layer(rows=0, mean_leakage=math.nan, **UNREACHED)
    allowed = Expectations(unreached=["*"])
    assert (judge(unreached, TRAINED).tier, judge(unreached, allowed).tier) == (FAIL, WARN)
    for weight in ("down_weight_norm", "up_weight_norm", "base_weight_norm"):
        broken = layer(rows=0, mean_leakage=math.nan, **UNREACHED, **{weight: math.nan})
        verdict = judge(broken, allowed)
        assert (verdict.tier, verdict.summary) == (FAIL, "non-finite weights (NaN or infinity)")
        averages = judge_averages(RunStats("m", "t", (GOOD, broken), 2), allowed)
        assert averages.defect == f"1 of 2 layers could not be judged, {broken.name} among them"
    zero = judge(dataclasses.replace(unreached, down_rank=0), allowed)
    assert (zero.tier, zero.summary) == (FAIL, "its down projection B is zero, so nothing can reach it")
    moved = judge(unreached, dataclasses.replace(allowed, checks=[lambda _: ["B left its space"]]))
    assert (moved.tier, moved.summary) == (FAIL, "B left its space")
    assert judge_averages(RunStats("m", "t", (GOOD, unreached), 2), allowed).tier is PASS


def test_nothing_to_judge_is_no_pass() -> None:
    """A verdict without findings fails: an empty gate must not look like a passed one."""
    assert Verdict("x", ()).tier is FAIL


@given(values=st.lists(st.floats() | st.sampled_from([0.0, 0.1, 0.5]), min_size=2, max_size=8))
def test_severity_sorts_by_tier_first(values: list[float]) -> None:
    """Any verdicts can be sorted, defects come last, and the tiers never mix."""
    held = threshold("preservation")
    verdicts = [Verdict("x", (Finding(value, held, held.tier(value)),)) for value in values]
    verdicts.append(Verdict("x", (), "a defect"))
    ordered = sorted(verdicts, key=lambda verdict: verdict.severity)
    assert ordered[-1].defect == "a defect"
    indices = [ORDER.index(verdict.tier) for verdict in ordered]
    assert indices == sorted(indices)


def test_within_a_tier_the_worse_figure_is_more_severe() -> None:
    """Among layers that fail, the one that lies further out sorts later, on either side."""
    assert judge(layer(down_norm=5.0), TRAINED).severity > judge(layer(down_norm=0.6), TRAINED).severity
    assert judge(layer(update_norm=1e-9), TRAINED).severity > judge(layer(update_norm=1e-7), TRAINED).severity
    assert judge(layer(update_norm=0.0), TRAINED).severity > judge(layer(update_norm=1e-9), TRAINED).severity


def test_averages_are_judged_like_a_layer() -> None:
    """The averages over all layers are held against the same bounds, under the name ``model``."""
    run = RunStats("m", "t", (layer(down_norm=0.01), layer(name="b", down_norm=0.39)), 2)
    verdict = judge_averages(run, TRAINED)
    assert (verdict.subject, verdict.tier, verdict.summary) == ("model", WARN, "preservation 0.2 >= 0.1")


def test_averages_of_an_incomplete_or_defective_run_fail() -> None:
    """Averages over some layers, or over layers that could not be judged, are none."""
    incomplete = judge_averages(RunStats("m", "t", (GOOD,), 3), TRAINED)
    assert (incomplete.tier, incomplete.summary) == (FAIL, "only 1 of 3 layers were measured")
    defective = judge_averages(RunStats("m", "t", (layer(name="a"), layer(name="b", rows=0)), 2), TRAINED)
    assert (defective.tier, defective.summary) == (FAIL, "1 of 2 layers could not be judged, b among them")
    assert judge_averages(RunStats("m", "t", (), 0), TRAINED).tier is FAIL


def test_bounds_are_told_in_words() -> None:
    """What passes and what fails is said with the sign that holds for the figure."""
    assert threshold("preservation").bound == "pass < 0.1, fail > 0.5"
    assert threshold("effectiveness").bound == "pass > 0.0001, fail < 1e-06"
    assert threshold("effectiveness", INIT).bound == "pass < 1e-06, fail > 0.0001"
