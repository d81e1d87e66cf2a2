"""Several preserved texts in what a run measured: the worst of them judges a layer, and a saved run tells of each."""

import dataclasses
import json
import math
from typing import Any

import pytest

from pytest_nullspace.errors import StatsError
from pytest_nullspace.judging.invariants import Expectations, Override, judge, judge_drifts
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.run.predictions import Passage
from pytest_nullspace.run.saved import from_json, to_json
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats
from pytest_nullspace.run.texts import called, drift_test, is_drift, is_name, key_of, name_of, preserved, shared
from tests import saved

PASSAGE = Passage(12, 15, "the ruler \u202eis", " Ze", "\n", 0.9, 0.1, " Ze", " Bo", 2.5)


def two(**changes: Any) -> LayerStats:
    """A layer with a second preserved text, on which it is as ``changes`` say."""
    layer = saved.full().layers[0]
    other = dataclasses.replace(layer, task=None, spectrum=None, **changes)
    return dataclasses.replace(layer, further={"code": other})


def run() -> RunStats:
    """A run on two texts that tells of everything."""
    whole = saved.full()
    assert whole.drift is not None
    layers = tuple(
        dataclasses.replace(
            layer, further={"code": dataclasses.replace(layer, task=None, spectrum=None, down_norm=3.0)}
        )
        for layer in whole.layers
    )
    text = dataclasses.replace(whole.drift.preserved, passages=(PASSAGE,))
    drift = dataclasses.replace(
        whole.drift, name="wiki", preserved=text, further={"code": dataclasses.replace(text, divergence=0.4)}
    )
    return dataclasses.replace(whole, layers=layers, drift=drift)


def test_a_layer_is_as_bad_as_on_its_worst_text() -> None:
    """Of each figure of the preserved text the worst decides, with its margin; those of the task stay as they are."""
    layer = two(down_norm=3.0, mean_leakage=0.0001, margins={"preservation": 0.07})
    alone = dataclasses.replace(layer, further={})
    assert layer.figure("preservation") == pytest.approx(3.0 / 8.0)
    assert layer.margin("preservation") == 0.07
    assert layer.figure("leakage") == alone.figure("leakage")
    assert layer.margin("leakage") == alone.margin("leakage")
    assert layer.figure("contribution") == alone.figure("contribution")
    loud = two(update_norm=2.0)
    assert loud.figure("forgetting") == pytest.approx(2.0 / 7.5)
    assert loud.figure("selectivity") == pytest.approx((4.0 / 7.5) / (2.0 / 7.5))
    assert judge(two(mean_leakage=0.9), Expectations()).tier is Tier.FAIL
    assert judge(alone, Expectations()).tier is not Tier.FAIL


def test_what_is_no_number_on_one_text_passes_on_none() -> None:
    """A layer that one text does not reach, or makes not finite, is told by that text's name."""
    assert math.isnan(two(mean_leakage=math.nan).figure("leakage"))
    for changes, said in (({"rows": 0}, "no activation row reached it"), ({"down_norm": math.inf}, "non-finite")):
        defect = two(**changes).defect
        assert defect is not None
        assert defect.startswith("on the text code: ")
        assert said in defect


def test_a_saved_run_tells_of_each_text() -> None:
    """Layers, predictions and passages of every text are read as they were written."""
    text = to_json(run())
    assert from_json(text, "s.json") == run()
    assert "\\u202e" in text or "\u202e" in text


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d["drift"].update(name="drift"), "'name' and 'texts' do not hold names of texts, each once"),
        (lambda d: d["drift"].update(name="code"), "'name' and 'texts' do not hold names of texts, each once"),
        (lambda d: d["drift"].update(texts=[3]), "'name' and 'texts' do not hold names of texts, each once"),
        (lambda d: d["drift"].update(name=["a"]), "'name' and 'texts' do not hold names of texts, each once"),
        (lambda d: d["stats"][0].update(texts={"a b": {}}), "does not hold the layer by the names of texts"),
        (lambda d: d["stats"][0].update(texts={}), "does not hold the layer by the names of texts"),
        (lambda d: d["stats"][0]["texts"].update(code=d["stats"][1]), "its entry 'texts' is not of the same layer"),
        (lambda d: d["stats"][0].pop("texts"), "only one has"),
        (lambda d: _passage(d, start=-1), "start and end must be characters of the text"),
        (lambda d: _passage(d, end=3), "start and end must be characters of the text"),
        (lambda d: _passage(d, token="x" * 2000), "must quote text of 1000 characters at most"),
        (lambda d: _passage(d, before=None), "must quote text of 1000 characters at most"),
        (lambda d: _passage(d, base=1.5), "a probability is above 1"),
        (lambda d: _passage(d, divergence="x"), "divergence must be a number"),
        (lambda d: d["drift"]["preserved"].update(passages={}), "must be a list of 100 objects at most"),
        (lambda d: d["drift"]["preserved"].update(passages=[{}] * 101), "must be a list of 100 objects at most"),
    ],
)  # fmt: skip
def test_what_no_run_writes_is_refused(edit: Any, said: str) -> None:
    """A file with names that are none, texts of other layers or passages that cannot be is told in one sentence."""
    document = json.loads(to_json(run()))
    edit(document)
    with pytest.raises(StatsError) as caught:
        from_json(json.dumps(document), "s.json")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def _passage(document: dict[str, Any], **changes: Any) -> None:
    document["drift"]["preserved"]["passages"][0].update(changes)


def test_bounds_hold_for_the_text_that_they_name() -> None:
    """A bound for a text, for all of them and for everything; of several that fit the last holds."""

    def tiers(*overrides: Override) -> dict[str, Tier]:
        return {v.subject: v.tier for v in judge_drifts(run(), Expectations(overrides=overrides))}

    assert tiers() == {"drift[wiki]": Tier.PASS, "drift[code]": Tier.FAIL}
    loose = {
        glob: tiers(Override(glob, "divergence", 0.5, 0.6)) for glob in ("code", "drift", "*", "c?de", "drift[code]")
    }
    assert all(found["drift[code]"] is Tier.PASS for found in loose.values())
    assert tiers(Override("wiki", "divergence", 0.5, 0.6))["drift[code]"] is Tier.FAIL
    last = tiers(Override("code", "divergence", 0.5, 0.6), Override("drift", "divergence", 0.0, 0.0))
    assert set(last.values()) == {Tier.FAIL}


def test_the_task_is_judged_with_the_first_text_alone() -> None:
    """Its gain is no figure of the others."""
    drift = run().drift
    assert drift is not None
    assert list(drift.figures) == ["divergence", "loss-rise", "task-gain", "headroom"]
    assert list(drift.figures_on("code")) == ["divergence", "loss-rise"]
    assert isinstance(drift, Drift)


def test_names_and_keys_lead_to_each_other() -> None:
    """A text's name, its key in a saved run and its test are found from each other; what is none is told."""
    assert (key_of("code"), name_of("text[code]"), name_of("text"), name_of("task_text")) == (
        "text[code]",
        "code",
        "",
        "",
    )
    assert [drift_test(""), drift_test("code")] == ["drift", "drift[code]"]
    assert [is_drift(test) for test in ("drift", "drift[a]", "drifter", "model")] == [True, True, False, False]
    assert [called(test) for test in ("drift", "drift[a]", "l.0")] == [("drift",), ("drift", "a"), ("l.0",)]
    assert all(map(is_name, ("wiki", "a.b-c_1", "a" * 40)))
    assert not any(map(is_name, ("", "a" * 41, "a b", "a[", "model", "drift", "task", "-a", "é", None, 3)))


def test_what_two_runs_both_read_is_found_by_digest() -> None:
    """The same windows are told from other windows of the same text, whatever the texts are called."""
    one = {"text": {"sha256": "a", "starts": [0], "seqlen": 8}, "text[b]": {"sha256": "b", "starts": [0], "seqlen": 8}}
    other = {
        "text": {"sha256": "b", "starts": [1], "seqlen": 8},
        "text[x]": {"sha256": "a", "starts": [0], "seqlen": 8},
    }
    assert shared(one, other) == {"a": True, "b": False}
    assert shared(one, {"text": 3, "text[a]": None, "textual": {"sha256": "a"}}) == {}
    assert list(preserved({"text[b]": {}, "text": {}, "task_text": {}})) == ["text", "text[b]"]
