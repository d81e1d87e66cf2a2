"""Rows that outweigh all others: what is measured without them, for any split of the windows, saved and judged."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_nullspace.errors import StatsError
from pytest_nullspace.judging.invariants import Expectations, Stage, judge, judge_averages
from pytest_nullspace.judging.verdicts import Finding, Tier
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel
from pytest_nullspace.report import terminal, words
from pytest_nullspace.run.saved import from_json, to_json
from pytest_nullspace.run.stats import SINK, LayerStats, RunStats, WithoutSinks
from tests import tiny
from tests.saved import LAYER
from tests.unit.measuring.test_distributed import meet
from tests.unit.measuring.test_measure import cached_rows, load

PASS, WARN, FAIL = Tier
DOWN = "model.layers.0.mlp.down_proj"
NORMS = ("input_norm", "down_norm", "update_norm", "base_norm", "output_norm")
WINDOWS = [[tiny.SINK, *range(first, first + 11)] for first in range(10, 62, 4)] + 7 * [12 * [tiny.SINK]]
"""Thirteen begin with the token that makes a sink, seven hold nothing else: 97 of 240 rows."""


def load_sinks(folder: Path) -> AdaptedModel:
    """A model with sink rows in each window, in float64, so that its own rounding blurs nothing."""
    return load(tiny.lora_null(folder, tiny.llama_with_sinks()), torch.float64)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    """That model."""
    return load_sinks(tmp_path_factory.mktemp("sinks"))


def by_definition(adapted: AdaptedModel) -> dict[str, list[float]]:
    """Of each layer the number of rows that are no sinks, and their mean norms, from the cached rows by a mask."""
    found = {}
    for name, x in cached_rows(adapted, WINDOWS).items():
        layer: Any = adapted.model.get_submodule(name)
        lengths = x.norm(dim=1)
        x = x[lengths < SINK * 2.0 ** math.frexp(lengths.median().item())[1]]
        bx = x @ layer.BLinear.weight.mT
        abx, wx = bx @ layer.ALinear.weight.mT, x @ layer.residual.weight.mT
        found[name] = [len(x), *(float(rows.norm(dim=1).mean()) for rows in (x, bx, abx, wx, abx + wx))]
    return found


def quiet(layer: LayerStats) -> tuple[float, ...]:
    """What was measured without sinks."""
    assert layer.without_sinks is not None
    return dataclasses.astuple(layer.without_sinks)


def test_without_sinks_every_mean_is_that_of_the_other_rows(adapted: AdaptedModel) -> None:
    """The means without sinks are those under the rule's mask, and where there is no sink the very same as with all."""
    measured = measure(adapted, WINDOWS)
    wanted = by_definition(adapted)
    for layer in measured:
        assert quiet(layer) == pytest.approx(wanted[layer.name], rel=1e-6)
        if not layer.sinks:
            assert layer.without_sinks == WithoutSinks(layer.rows, *layer.norms)
            assert layer.sink_share == 0
    down = next(layer for layer in measured if layer.name == DOWN)
    assert (down.rows, down.sinks) == (240, 97)
    assert down.sink_share == pytest.approx(1 - 143 * wanted[DOWN][1] / (240 * down.input_norm))
    assert down.sink_share > 0.9
    for figure in ("preservation", "effectiveness", "contribution", "forgetting"):
        assert down.figure(figure) != down.figure(figure, sinks=False)
    assert down.figure("leakage") == down.figure("leakage", sinks=False)


@pytest.mark.parametrize("max_rows", [None, 77])
@pytest.mark.parametrize("settled", [None, lambda _: False, lambda _: True])
def test_no_batch_and_no_round_changes_what_is_a_sink(
    adapted: AdaptedModel, max_rows: int | None, settled: Callable[[tuple[LayerStats, ...]], bool] | None
) -> None:
    """For batches of 1, 2 and 8, with a cap on rows, and in rounds, the same rows are sinks and left out."""
    one, *others = (
        measure(adapted, WINDOWS, batch_size=size, max_rows=max_rows, settled=settled) for size in (1, 2, 8)
    )
    assert any(layer.sinks for layer in one)
    for other in others:
        assert [layer.sinks for layer in other] == [layer.sinks for layer in one]
        for layer, same in zip(one, other, strict=True):
            assert quiet(same) == pytest.approx(quiet(layer), rel=1e-9)


def test_processes_find_the_sinks_of_all_together(adapted: AdaptedModel) -> None:
    """Two processes find what one finds, although most rows that one of them reads are sinks."""
    alone = {layer.name: list(quiet(layer)) for layer in measure(adapted, WINDOWS)}
    codes, outcomes = meet(2, 29725, "sinks")
    assert codes == [0, 0]
    for outcome in outcomes:
        assert {name: pytest.approx(of, rel=1e-9) for name, of in outcome["sinks"].items()} == alone


# In the file

SINKS = dataclasses.replace(LAYER, without_sinks=WithoutSinks(90, 0.8, 0.2, 0.4, 2.0, 2.5))
"""Ten of a hundred rows carry 91 % of the mean norm; without them preservation is 0.25 and forgetting 0.2."""


def test_what_is_without_sinks_survives_the_file() -> None:
    """With sinks, without any, never looked for, and on a task text: each comes back from the file as it was."""
    calm = dataclasses.replace(LAYER, without_sinks=WithoutSinks(LAYER.rows, *LAYER.norms))
    for layer in (SINKS, calm, LAYER, dataclasses.replace(calm, task=SINKS)):
        run = RunStats("m", "t", (layer,), 1)
        assert from_json(to_json(run), "f") == run
    (entry,) = json.loads(to_json(RunStats("m", "t", (SINKS,), 1)))["stats"]
    assert entry["sink_rows"] == 10
    assert entry["without_sinks"]["BX_ratio"] == pytest.approx(0.25)
    (entry,) = json.loads(to_json(RunStats("m", "t", (calm,), 1)))["stats"]
    assert entry["sink_rows"] == 0
    assert "without_sinks" not in entry


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sink_rows": 51}, "sink_rows must be a count of at most half of the rows, not 51; measure again"),
        ({"sink_rows": "1"}, "sink_rows must be a count of at most half of the rows, not '1'; measure again"),
        ({"without_sinks": None}, "without_sinks must hold what the norms are without the 10 sink rows; measure again"),
        ({"X_norm": "?"}, "without_sinks: X_norm must be a number, not '?'; measure again"),
        ({"BX_norm": 0.01}, "without_sinks: BX_ratio is 0.25, but BX_norm / X_norm is 0.0125; the file was edited *"),
    ],
)
def test_a_file_that_is_wrong_about_sinks_is_refused(change: dict[str, Any], told: str) -> None:
    """A number that cannot be, norms that are missing, and ratios that do not follow from them are errors."""
    document = json.loads(to_json(RunStats("m", "t", (SINKS,), 1)))
    (entry,) = document["stats"]
    for key, value in change.items():
        (entry if key in ("sink_rows", "without_sinks") else entry["without_sinks"])[key] = value
    with pytest.raises(StatsError) as error:
        from_json(json.dumps(document), "f")
    assert str(error.value).startswith(f"f: stats[0]: {told.removesuffix('*')}")


def test_one_layer_cannot_lack_what_the_others_tell_of_sinks() -> None:
    """Where sinks were looked for in one layer they were in all, so a file in which one has no key was edited."""
    run = RunStats("m", "t", (SINKS, dataclasses.replace(LAYER, name="other")), 2)
    with pytest.raises(StatsError, match="only one has leakage, or a task text, or sink_rows"):
        from_json(to_json(run), "f")


# Judged


def preserving(own: float, without: float) -> LayerStats:
    """A layer of one text whose preservation is ``own``, and ``without`` sinks."""
    norms = WithoutSinks(90, 1.0, without, 0.5, 7.5, 10.0)
    return dataclasses.replace(LAYER, input_norm=8.0, down_norm=8 * own, without_sinks=norms)


def found(layer: LayerStats, figure: str = "preservation", stage: Stage = Stage.TRAINED) -> Finding:
    """What its verdict says of the figure."""
    findings = judge(layer, Expectations(stage)).findings
    return next(finding for finding in findings if finding.threshold.figure == figure)


@pytest.mark.parametrize(
    ("own", "without", "tier", "told"),
    [
        (0.01, 0.02, PASS, "preservation 0.01 < 0.1"),
        (0.01, 0.2, WARN, "preservation 0.01 < 0.1, but 0.2 >= 0.1 without sink rows"),
        (0.01, 0.6, WARN, "preservation 0.01 < 0.1, but 0.6 > 0.5 without sink rows"),
        (0.2, 0.3, WARN, "preservation 0.2 >= 0.1"),
        (0.2, 0.01, WARN, "preservation 0.2 >= 0.1, but 0.01 < 0.1 without sink rows"),
        (0.2, 0.6, WARN, "preservation 0.2 >= 0.1, but 0.6 > 0.5 without sink rows"),
        (0.6, 0.7, FAIL, "preservation 0.6 > 0.5"),
        (0.6, 0.01, FAIL, "preservation 0.6 > 0.5, but 0.01 < 0.1 without sink rows"),
        (0.01, math.nan, WARN, "preservation 0.01 < 0.1, but nan is not finite without sink rows"),
    ],
)
def test_a_verdict_that_sinks_decide_is_told_and_no_pass(own: float, without: float, tier: Tier, told: str) -> None:
    """The figure over all rows decides, but passes only where it does without sinks too; both are told."""
    layer = preserving(own, without)
    finding = found(layer)
    assert (finding.tier, str(finding)) == (tier, told)
    run = RunStats("m", "t", (layer,), 1)
    averages = judge_averages(run, Expectations())
    assert str(averages.findings[0]) == told
    assert averages.tier is tier
    if tier is WARN and own < 0.1:
        assert finding.condition.startswith("preservation without sink rows >")


def test_each_ratio_has_its_value_without_sinks_and_leakage_is_its_own() -> None:
    """Effectiveness, contribution and selectivity are held without sinks too, on the text on which they are judged."""
    task = dataclasses.replace(LAYER, update_norm=4.0, without_sinks=WithoutSinks(99, 8.0, 0.25, 1e-5, 7.5, 10.0))
    layer = dataclasses.replace(SINKS, task=task)
    of = {figure: found(layer, figure).without_sinks for figure in layer.measured}
    assert of == {
        "preservation": pytest.approx(0.25),
        "effectiveness": pytest.approx(1e-5 / 8),
        "contribution": pytest.approx(1e-6),
        "leakage": layer.leakage,
        "forgetting": pytest.approx(0.2),
        "selectivity": pytest.approx(1e-5 / 7.5 / 0.2),
    }
    assert all(found(layer, figure).tier is WARN for figure in layer.measured if figure != "leakage")


def test_averages_are_taken_without_sinks_where_a_layer_has_any() -> None:
    """A layer without sinks, or one of which nobody told, gives its own figure to the averages without sinks."""
    run = RunStats("m", "t", (SINKS, dataclasses.replace(LAYER, name="other")), 2)
    assert run.mean("preservation", sinks=False) == pytest.approx((0.25 + LAYER.preservation) / 2)
    assert run.mean("preservation") == LAYER.preservation


def test_an_update_of_zero_is_zero_without_sinks() -> None:
    """Before training the two agree, for there is no update in any row."""
    norms = WithoutSinks(90, 0.8, 0.02, 0.0, 2.0, 2.0)
    initial = dataclasses.replace(LAYER, update_norm=0.0, without_sinks=norms)
    assert found(initial, "effectiveness", Stage.INIT).tier is PASS


# Told


def summary(*layers: LayerStats) -> list[str]:
    """The lines of the summary."""
    run = RunStats("m", "t", layers, len(layers))
    verdicts = [judge(layer, Expectations()) for layer in layers]
    return [line for line, _ in terminal.summary(run, verdicts, Expectations())]


def test_sinks_that_decide_are_told_beside_every_figure() -> None:
    """The summary says how much a few rows carry, by which rule, and what they decide; block and failure show both."""
    lines = summary(SINKS)
    assert (
        "sink rows: 1 of 1 layers have rows beyond 8 times the median norm, such as "
        "model.layers.0.self_attn.q_proj: 10 of 100 rows carry 91.0% of the mean norm, and without them "
        "preservation is 0.25, not 0.0312, and forgetting is 0.2, not 0.0667; they decide the verdict on 1 of 1, such "
        "as model.layers.0.self_attn.q_proj (preservation 0.03125 < 0.1, but 0.25 >= 0.1 without sink rows)"
    ) in lines
    assert (
        "⚠ preservation 0.0312, 0.25 without sink rows (pass < 0.1, fail > 0.5): sink rows decide this; "
        "with them: the null space is well kept; B is still approximately in it; without them: the null space is "
        "degraded, but acceptable"
    ) in lines
    block = list(terminal.block(SINKS, judge(SINKS, Expectations())))
    assert "samples: 100, of which 10 sink rows (beyond 8 times the median norm, 91.0% of the mean norm)" in block
    assert "  ||BX||/||X||:          3.125e-02  ⚠  2.500e-01 without sink rows" in block
    loud = preserving(0.6, 0.01)
    assert (
        "\nwithout 10 sink rows (beyond 8 times the median norm, 88.8% of the mean norm): input 1, behind B 0.01, "
        in words.layer_failure(loud, judge(loud, Expectations()))
    )


def test_sinks_of_the_task_text_are_told_as_its_own() -> None:
    """Where it is the task text that has sinks, the summary says so, for the figures beside them are of that text."""
    quiet = dataclasses.replace(LAYER, without_sinks=WithoutSinks(LAYER.rows, *LAYER.norms))
    (told,) = [line for line in summary(dataclasses.replace(quiet, task=SINKS)) if line.startswith("sink rows")]
    assert (
        "such as model.layers.0.self_attn.q_proj on the task text: 10 of 100 rows carry 91.0% of the mean norm" in told
    )
    (told,) = [line for line in summary(dataclasses.replace(SINKS, task=quiet)) if line.startswith("sink rows")]
    assert "such as model.layers.0.self_attn.q_proj: 10 of 100 rows carry 91.0% of the mean norm" in told


def test_sinks_that_carry_little_are_not_told_nor_is_a_run_that_has_none() -> None:
    """Below a twentieth of mean ``‖X‖`` what decides nothing is not told; that nobody looked is."""
    little = dataclasses.replace(LAYER, without_sinks=WithoutSinks(99, 7.9, 0.25, 0.5, 7.5, 10.0))
    none = dataclasses.replace(LAYER, without_sinks=WithoutSinks(LAYER.rows, *LAYER.norms))
    for layer in (little, none):
        assert not any(line.startswith("sink rows") for line in summary(layer))
    assert "sink rows: this run does not tell of them, so a few rows may decide its ratios" in summary(LAYER)
