"""The one verdict on a run: what decides it, in which words, and that nothing is safe that was not measured."""

import dataclasses
import math
from typing import Any

import pytest

from pytest_nullspace.judging.decision import DECIDING, Call, Decision, decide, not_gated
from pytest_nullspace.judging.invariants import MODEL, Expectations, Stage
from pytest_nullspace.judging.profiles import Chosen, Profile
from pytest_nullspace.judging.sanity import insane
from pytest_nullspace.judging.spoken import plain
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.predictions import Headroom
from pytest_nullspace.run.stats import WITHOUT_DRIFT, Drift, LayerStats, RunStats, TextDrift
from pytest_nullspace.run.texts import DRIFT
from tests import saved

ALL = (*saved.NAMES, MODEL, DRIFT)


def drift(rise: float = 0.006, divergence: float = 0.001, gain: float = 0.4, margin: float = 0.0005) -> Drift:
    preserved = TextDrift(480, 2.0, 2.0 + rise, divergence, margin, margin)
    return Drift("the base", preserved, TextDrift(480, 3.0, 3.0 - gain, 0.5, 0.01, 0.02))


def good(told: Drift | None = None, **changes: Any) -> RunStats:
    return dataclasses.replace(saved.run(**changes), drift=told or drift())


def verdict(run: RunStats, **given: object) -> Decision:
    judged = given.pop("judged", None)
    return decide(run, Expectations(judged=judged), **given)  # type: ignore[arg-type]


def test_a_good_adapter_is_safe_and_says_what_it_kept_and_learned() -> None:
    """Everything green and the predictions held: safe, with the two texts in plain words."""
    told = verdict(good())
    assert told.call is Call.SAFE
    assert told.sentence == "preserved text 0.6 % less likely, task text 49 % more likely"
    assert [reason.finding.threshold.figure for reason in told.deciding if reason.finding is not None] == [
        "loss-rise",
        "task-gain",
        "divergence",
    ]


def test_what_forgets_is_not_to_be_deployed_and_the_predictions_are_told_before_the_layers() -> None:
    """The rise of the loss leads, as the share of probability that a token lost; layers follow, grouped by figure."""
    told = verdict(good(drift(0.3, 0.33), mean_leakage=0.9))
    assert told.call is Call.STOP
    assert told.sentence == "it forgets: the preserved text is 26 % less likely"
    assert [reason.words for reason in told.deciding] == [
        "the preserved text is 26 % less likely",
        "predictions moved by 0.33 nats a token",
        "1 of 9 layers have no null space",
    ]
    assert told.reasons[0].detail == "loss-rise 0.3 ± 0.0005, bound 0.15"
    assert told.reasons[2].detail == f"leakage 14.4, bound 0.75, {saved.NAMES[0]}"
    assert len(told.deciding) == DECIDING
    assert told.reasons[-1].words == "the task text is 49 % more likely"


@pytest.mark.parametrize(
    ("told", "call"),
    [
        (drift(0.3, 0.33), Call.STOP),
        (drift(0.1, 0.1), Call.LOOK),
        (drift(0.04, 0.04, margin=0.03), Call.LOOK),
        (dataclasses.replace(drift(), task=None), Call.LOOK),
        (drift(gain=-0.1), Call.STOP),
        (drift(), Call.SAFE),
    ],
    ids=["red", "between the bounds", "in doubt", "not all judged", "red by another", "safe"],
)
def test_the_loss_is_told_before_the_divergence_whatever_the_verdict(told: Drift, call: Call) -> None:
    """Where both lie in one tier loss-rise, of which the verdict's sentence speaks, stands first."""
    found = verdict(good(told))
    assert found.call is call
    figures = [reason.finding.threshold.figure for reason in found.reasons if reason.finding is not None]
    assert figures.index("loss-rise") < figures.index("divergence")


def test_what_was_not_measured_or_not_judged_is_never_safe() -> None:
    """No predictions is a reason to look; a layer or a test that is lacking leaves the adapter ungated, by its name."""
    assert verdict(saved.run()).call is Call.LOOK
    assert "--nullspace-drift" in verdict(saved.run()).sentence
    untold = verdict(good(dataclasses.replace(drift(), task=None)))
    assert (untold.call, untold.sentence) == (
        Call.LOOK,
        "preserved text 0.6 % less likely; what it learned was not judged (--nullspace-task-dataset)",
    )
    blind = verdict(dataclasses.replace(saved.run(), about={WITHOUT_DRIFT: "it is no causal language model"}))
    assert blind.sentence == "what it forgot was not judged: it is no causal language model"
    part = verdict(dataclasses.replace(good(), checkpoint_layers=10))
    assert (part.call, part.sentence) == (Call.NOT_GATED, "only 9 of 10 layers were measured")
    one = verdict(good(), judged={*ALL} - {saved.NAMES[4]}, asked=ALL)
    assert one.call is Call.NOT_GATED
    assert one.sentence == f"only 10 of 11 tests came to a verdict, not {saved.NAMES[4]}"
    assert verdict(dataclasses.replace(saved.run(), layers=())).sentence == "no layer was measured"
    assert not_gated("no room").to_dict()["tier"] is None
    lacking = dataclasses.replace(
        good(), layers=tuple(dataclasses.replace(x, mean_leakage=None) for x in good().layers)
    )
    assert (verdict(lacking).call, verdict(lacking).sentence) == (Call.LOOK, "not measured: leakage")


def test_a_null_space_that_so_few_rows_could_not_show_is_no_reason_to_call_it_safe() -> None:
    """Where fewer rows than a layer is wide reached most layers their leakage proves little; of a few it is a note."""

    def scarce(count: int) -> RunStats:
        run = good()
        few = [dataclasses.replace(layer, distinct_rows=layer.in_features - 1) for layer in run.layers[:count]]
        return dataclasses.replace(run, layers=(*few, *run.layers[count:]))

    assert verdict(scarce(4)).call is Call.SAFE
    told = verdict(scarce(5))
    assert (told.call, told.sentence) == (Call.LOOK, "too few rows to show a null space in 5 of 9 layers")
    ordinary = Expectations(chosen=Chosen(Profile.LORA, "asked for"), drift_judged=True)
    assert decide(scarce(9), ordinary).call is Call.SAFE


def test_a_null_space_is_shown_on_every_preserved_text_or_it_is_one_to_look_at() -> None:
    """Rows are counted of each text apart: many of the first show nothing of another, by whose name that is told."""

    def read(first: int, other: int, name: str = "", of: str = "code") -> RunStats:
        def few(layer: LayerStats, place: int, count: int) -> LayerStats:
            return dataclasses.replace(layer, distinct_rows=layer.in_features - 1) if place < count else layer

        run = good()
        layers = tuple(
            dataclasses.replace(
                few(layer, place, first), further={of: few(dataclasses.replace(layer, task=None), 8 - place, other)}
            )
            for place, layer in enumerate(run.layers)
        )
        return dataclasses.replace(run, layers=layers, about={**run.about, "text": {"name": name} if name else {}})

    assert verdict(read(0, 4)).call is Call.SAFE
    told = verdict(read(0, 5))
    assert (told.call, told.sentence) == (
        Call.LOOK,
        "too few rows of the text code to show a null space in 5 of 9 layers",
    )
    assert verdict(read(5, 0)).sentence == "too few rows to show a null space in 5 of 9 layers"
    both = verdict(read(3, 3, "prose"))  # neither lacks most layers alone, and yet most lack one of them
    assert both.sentence == "too few rows of the texts prose and code to show a null space in 6 of 9 layers"
    counted = read(0, 0)
    about = {**counted.about, "text[code]": {"tokens": 1000, "distinct": 1}}
    assert verdict(dataclasses.replace(counted, about=about)).call is Call.LOOK


def test_what_a_saved_run_tells_is_printable_wherever_the_verdict_is_shown() -> None:
    """A reason or a text's name from a file brings no control character into a page, a property or a log."""
    evil = "\x1b[2J\n::error::"
    blind = dataclasses.replace(saved.run(), about={WITHOUT_DRIFT: evil})
    layers = [dataclasses.replace(layer, distinct_rows=1) for layer in good().layers]
    few = tuple(dataclasses.replace(of, further={"code": dataclasses.replace(of, task=None)}) for of in layers)
    named = dataclasses.replace(good(), layers=few, about={"text": {"name": evil}})
    for run in (blind, named):
        assert r"\x1b[2J\n::error::" in verdict(run).sentence


def test_an_adapter_in_files_that_peft_does_not_load_is_one_to_look_at() -> None:
    """PEFT opens one file by its name, so one in shards may be right and still not be what is deployed."""

    def of(*files: str, form: str) -> Decision:
        about = {"weights_sha256": dict.fromkeys(files, "0"), "format": form}
        return verdict(dataclasses.replace(good(), about=about))

    shards = [f"adapter_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    told = of(*shards, form="PEFT LoRA")
    assert (told.call, told.sentence) == (
        Call.LOOK,
        "PEFT loads adapter_model.safetensors alone, and its weights lie in 2 other files",
    )
    assert of("adapter_model.safetensors", form="PEFT LoRA").call is Call.SAFE
    assert of(*shards, form="LoRA-Null").call is Call.SAFE


def test_a_failure_weighs_more_than_a_gap() -> None:
    """What failed is not to be deployed, however little of the rest was judged."""
    judged = {saved.NAMES[0]}
    told = verdict(good(mean_leakage=0.9), judged=judged, asked=ALL, failed={saved.NAMES[0]: "leakage 14.4 > 0.75"})
    assert told.call is Call.STOP
    assert told.sentence.startswith("1 of 9 layers have no null space")


def test_a_test_that_failed_by_no_figure_is_told_by_its_message() -> None:
    """What moved outside the layers, and a warning that was made an error, are failures of the adapter as well."""
    told = verdict(good(), asked=(*ALL, "frozen"), failed={"frozen": "1 of 3 tensors outside the layers moved"})
    assert told.call is Call.STOP
    assert told.sentence == "the test frozen failed: 1 of 3 tensors outside the layers moved"


def test_a_failure_that_a_mark_expects_is_one_to_look_at() -> None:
    """The figures of an xfail test fail and its test does not: no reason to stop, and none to call it safe."""
    told = verdict(good(mean_leakage=0.9), failed={MODEL: "leakage"})
    assert told.call is Call.STOP
    told = verdict(good(mean_leakage=0.9), failed={})
    assert told.call is Call.LOOK
    assert told.sentence == f"{MODEL} and 1 more would fail, which a mark of your own expects"


def test_a_warning_and_predictions_near_a_bound_are_to_be_looked_at() -> None:
    """Between the bounds, and on the pass side by less than the margin: both are told with their figures."""
    assert verdict(good(drift(rise=0.07))).call is Call.LOOK
    near = verdict(good(drift(divergence=0.0499)))
    assert near.call is Call.LOOK
    assert near.sentence.endswith("0.05 nats a token, but more text might change that")
    loud = verdict(good(mean_leakage=0.04))
    assert loud.sentence == "1 of 9 layers lie between the bounds of leakage"


def test_a_text_that_became_likelier_was_not_forgotten() -> None:
    """Where the predictions moved and the preserved text gained, as where the two texts are swapped, that is said."""
    swapped = verdict(good(drift(rise=-8.0, divergence=7.6)))
    assert (swapped.call, swapped.reasons[0].gained) == (Call.STOP, True)
    assert swapped.sentence == "it learned the preserved text: predictions moved by 7.6 nats a token"
    assert verdict(good(drift(rise=-0.01, divergence=0.2))).sentence.startswith("it forgets: ")


def test_an_update_that_is_too_weak_is_told_by_what_twice_of_it_would_gain() -> None:
    """A task gain that grows with the update is a failure, one that does not is among what is good."""
    lost = verdict(good(dataclasses.replace(drift(), headroom=Headroom(144, 0.2, 0.44, 0.01))))
    assert lost.call is Call.STOP
    assert lost.sentence == "it is too weak: twice the update would gain 2.2 x as much on the task"
    assert verdict(good(dataclasses.replace(drift(), headroom=Headroom(144, 0.2, 0.1, 0.01)))).call is Call.SAFE


def test_who_was_trained_gently_is_not_called_too_weak() -> None:
    """What 60 steps at a thirtieth of the rate leave is to be looked at; a scale lost in SmolLM2 is still a failure."""
    gentle = verdict(good(dataclasses.replace(drift(), headroom=Headroom(2040, 0.93, 0.93 * 1.807, 0.021))))
    assert gentle.call is Call.LOOK
    assert gentle.sentence == "twice the update would gain 1.8 x as much on the task"
    lost = verdict(good(dataclasses.replace(drift(), headroom=Headroom(2040, 0.0288, 0.0288 * 1.97, 0.01))))
    assert lost.call is Call.STOP


def test_defects_and_faults_are_told_once_with_their_number() -> None:
    """Layers that hold NaN are one reason, whatever their number."""
    told = verdict(good(output_norm=math.nan))
    assert told.sentence == "1 of 9 layers: non-finite output (NaN or infinity)"


def test_an_adapter_without_an_update_is_not_excused_by_its_text() -> None:
    """A task that nobody learned to read is told behind what explains it: every update is zero."""
    none = [dataclasses.replace(layer, update_norm=0.0, up_weight_norm=0.0) for layer in saved.run().layers]
    strange = dataclasses.replace(drift(), task=TextDrift(2040, 9.0, 9.0, 0.0, 0.0, 0.0))
    about = {"task_text": {"vocabulary": 1000, "unigram_loss": 4.5}}
    run = dataclasses.replace(saved.run(), layers=tuple(none), drift=strange, about=about)
    faults = tuple(insane(run))
    told = decide(run, Expectations(drift_judged=True, drift_faults=faults))
    assert (told.call, told.sentence) == (Call.STOP, "9 of 9 layers have no update, or next to none")
    assert "the loss on the task text, 9 nats a token, and 9 with the adapter, is not below" in faults[0]
    assert faults[0] in [reason.words for reason in told.reasons]
    moved = dataclasses.replace(run, layers=saved.run().layers)
    assert decide(moved, Expectations(drift_judged=True, drift_faults=faults)).sentence == faults[0]


def test_an_update_before_training_is_told_as_that() -> None:
    """At the initial stage the figure of learning fails in the other direction."""
    told = decide(saved.run(), Expectations(Stage.INIT))
    assert told.sentence == "9 of 9 layers hold an update before training"


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("value", [-40.0, -0.1, 0.0, 1e-9, 0.07, 1.0, 3.0, 1e6, math.nan, math.inf])
def test_every_figure_has_plain_words_for_every_value(figure: str, value: float) -> None:
    """No figure and no value is without words, and those of a number hold one."""
    told = plain(figure, value)
    assert told.isprintable()
    assert math.isfinite(value) is not told.endswith("is no number")


def test_predictions_that_are_no_number_are_not_called_forgetting() -> None:
    """Nobody knows what such an adapter forgets: it is broken."""
    assert verdict(good(drift(math.nan, math.nan))).sentence == "it is broken: loss-rise is no number"


def test_json_holds_what_decided() -> None:
    """Verdict, tier, thresholds, figures and causes stand there as numbers and words, what is no number as null."""
    told = verdict(good(drift(math.nan, math.inf), mean_leakage=0.9)).to_dict()
    assert (told["verdict"], told["tier"]) == ("DO NOT DEPLOY", "fail")
    assert told["thresholds"]["loss-rise"] == {"pass": 0.05, "fail": 0.15, "lower_is_better": True}
    assert told["figures"][0] == {
        "words": "loss-rise is no number",
        "tier": "fail",
        "figure": "loss-rise",
        "value": None,
        "margin": 0.0005,
        "pass": 0.05,
        "fail": 0.15,
        "lower_is_better": True,
        "subject": "drift",
    }


def test_predictions_that_are_worse_than_an_earlier_run_allows_are_not_to_be_deployed() -> None:
    """What fails the test `drift` beside its bounds is a reason of its own, as what fails a layer is."""
    told = decide(good(), Expectations(drift_faults=["divergence 0.01 → 0.02 is worse by more than 5%"]))
    assert told.call is Call.STOP
    assert told.sentence == "divergence 0.01 → 0.02 is worse by more than 5%"


def test_a_figure_between_its_bounds_that_more_text_might_change_is_told_once() -> None:
    """What warns and is uncertain too takes one of the few lines, so that no other figure is pushed out."""
    told = verdict(good(drift(divergence=0.06, margin=0.04)))
    assert told.call is Call.LOOK
    assert [r.finding.threshold.figure for r in told.reasons if r.finding].count("divergence") == 1
