"""What a run measured, and the file it is saved in."""

import dataclasses
import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.errors import StatsError
from pytest_nullspace.judging.invariants import Expectations, judge
from pytest_nullspace.report import doubts, markdown, terminal
from pytest_nullspace.run.figures import of_layers
from pytest_nullspace.run.saved import from_json, to_json, write, write_atomically
from pytest_nullspace.run.stats import LayerStats, RunStats
from tests import saved
from tests.saved import LAYER

RUN = RunStats(
    "models/ft", "wikitext2", (LAYER, dataclasses.replace(LAYER, name="model.layers.10.mlp.up_proj")), 3, {"k": [1]}
)

REFERENCE_KEYS = {
    "layer_name", "num_samples", "X_norm", "BX_norm", "ABX_norm", "ResidualX_norm", "FullOutput_norm", "BX_ratio",
    "ABX_ratio", "adapter_contribution", "B_weight_norm", "A_weight_norm", "Residual_weight_norm",
}  # fmt: skip

# Written by hand, with the keys and in the order in which the reference script writes them.
REFERENCE_FILE = """
{
  "model_path": "output/LoRA_Null_v2/ft",
  "calib_dataset": "wikitext2",
  "num_layers": 2,
  "stats": [
    {
      "layer_name": "model.layers.0.self_attn.q_proj",
      "num_samples": 100,
      "X_norm": 12.345678329467773,
      "BX_norm": 0.12345600128173828,
      "ABX_norm": 0.23456700146198273,
      "ResidualX_norm": 11.987653732299805,
      "FullOutput_norm": 12.456789016723633,
      "BX_ratio": 0.009999937,
      "ABX_ratio": 0.018999928,
      "adapter_contribution": 0.018830455,
      "B_weight_norm": 123.456789,
      "A_weight_norm": 45.678901,
      "Residual_weight_norm": 234.56789
    },
    {
      "layer_name": "model.layers.0.mlp.down_proj",
      "num_samples": 100,
      "X_norm": 1,
      "BX_norm": 0.5,
      "ABX_norm": 0,
      "ResidualX_norm": 2.0,
      "FullOutput_norm": 2.0,
      "BX_ratio": 0.5,
      "ABX_ratio": 0.0,
      "adapter_contribution": 0.0,
      "B_weight_norm": 11.3137,
      "A_weight_norm": 0.0,
      "Residual_weight_norm": NaN
    }
  ]
}
"""


def same(a: RunStats, b: RunStats) -> bool:
    """Whether two runs agree in every field, NaN being equal to NaN."""
    return repr(a) == repr(b)


# Figures


TWO_TEXTS = dataclasses.replace(
    LAYER,
    margins={"preservation": 0.001, "forgetting": 0.01, "leakage": math.inf},
    task=dataclasses.replace(LAYER, update_norm=2.0, margins={"contribution": 0.003, "forgetting": 0.02}),
)


def test_with_a_task_text_what_an_update_is_for_is_taken_there() -> None:
    """Effectiveness and contribution, with their margins, are the task text's; the others the preserved text's."""
    task = TWO_TEXTS.task
    assert task is not None
    assert TWO_TEXTS.figure("effectiveness") == task.effectiveness == 4 * LAYER.effectiveness
    assert TWO_TEXTS.figure("contribution") == task.contribution
    assert TWO_TEXTS.figure("preservation") == LAYER.preservation
    assert TWO_TEXTS.figure("forgetting") == LAYER.forgetting
    assert TWO_TEXTS.selectivity == pytest.approx(4)
    assert (TWO_TEXTS.margin("contribution"), TWO_TEXTS.margin("preservation")) == (0.003, 0.001)
    shares = 0.01 / LAYER.forgetting, 0.02 / task.forgetting
    assert TWO_TEXTS.margin("selectivity") == pytest.approx(4 * math.hypot(*shares))
    assert TWO_TEXTS.absent == ()


def test_an_update_that_spares_the_preserved_text_wholly_is_most_selective() -> None:
    """Nothing changed on the preserved text is a large finite selectivity, nothing on either text is no number."""
    assert dataclasses.replace(TWO_TEXTS, update_norm=0.0).selectivity == pytest.approx(1e12)
    assert math.isnan(dataclasses.replace(TWO_TEXTS, task=dataclasses.replace(LAYER, update_norm=0.0)).selectivity)
    least = dataclasses.replace(LAYER, update_norm=1e-320)
    assert dataclasses.replace(TWO_TEXTS, update_norm=0.0, task=least).selectivity == pytest.approx(1e12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_selectivity_of_what_is_no_number_is_none(value: float) -> None:
    """An update that is no number on one text is no ratio, nor an error, also where the other text's is zero."""
    lost = dataclasses.replace(LAYER, update_norm=value)
    for preserved in (TWO_TEXTS, dataclasses.replace(TWO_TEXTS, update_norm=0.0)):
        assert math.isnan(dataclasses.replace(preserved, task=lost).selectivity)
    assert not dataclasses.replace(lost, task=LAYER).selectivity > 0


def test_a_layer_of_two_texts_survives_its_file() -> None:
    """Margins, infinite ones too, and the task text's figures come back from the file as they were."""
    run = RunStats("m", "t", (TWO_TEXTS,), 1)
    assert from_json(to_json(run), "f") == run


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"task": {"layer_name": "other"}}, "task: "),
        ({"margin_95": {"speed": 1.0}}, "margin_95 must hold"),
        ({"margin_95": {"leakage": -1.0}}, "margin_95: leakage must not be negative"),
        ({"selectivity": 5.0}, "selectivity is 5, but task"),
        ({"ABX_over_ResidualX": 5.0}, "ABX_over_ResidualX is 5, but"),
    ],
)
def test_an_edited_second_text_is_refused(change: dict[str, Any], told: str) -> None:
    """Figures of two texts that contradict each other, and margins of no figure, are errors that name the entry."""
    document = json.loads(to_json(RunStats("m", "t", (TWO_TEXTS,), 1)))
    document["stats"][0] |= change
    with pytest.raises(StatsError, match=re.escape(told)):
        from_json(json.dumps(document), "f")


def test_figures_are_the_ratios_that_their_formulas_say() -> None:
    """Each figure is the quotient of the two norms in its formula; leakage is held against r / in."""
    assert LAYER.preservation == 0.25 / 8
    assert LAYER.effectiveness == 0.5 / 8
    assert LAYER.contribution == 0.5 / 10
    assert LAYER.chance == 4 / 64
    assert LAYER.leakage == 0.001 / (4 / 64)
    assert LAYER.forgetting == 0.5 / LAYER.base_norm
    assert {name: (TWO_TEXTS if name == "selectivity" else LAYER).figure(name) for name in of_layers()} == {
        "preservation": LAYER.preservation,
        "effectiveness": LAYER.effectiveness,
        "contribution": LAYER.contribution,
        "leakage": LAYER.leakage,
        "forgetting": LAYER.forgetting,
        "selectivity": TWO_TEXTS.selectivity,
    }


def test_a_ratio_to_zero_is_no_number() -> None:
    """A quotient by zero is NaN, not an exception and not infinity."""
    layer = dataclasses.replace(LAYER, input_norm=0.0, output_norm=0.0, base_norm=0.0, in_features=0)
    assert all(math.isnan(layer.figure(name)) for name in of_layers())


def test_a_sound_layer_has_no_defect() -> None:
    """A layer whose every norm is a number can be judged, even with A = 0 and leakage never measured."""
    assert LAYER.defect is None
    assert dataclasses.replace(LAYER, update_norm=0.0, up_weight_norm=0.0, mean_leakage=math.nan).defect is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("input_norm", "non-finite activations"),
        ("down_norm", "non-finite activations"),
        ("update_norm", "non-finite activations"),
        ("base_norm", "non-finite activations"),
        ("output_norm", "non-finite output"),
        ("down_weight_norm", "non-finite weights"),
        ("up_weight_norm", "non-finite weights"),
        ("base_weight_norm", "non-finite weights"),
    ],
)
def test_a_norm_that_is_no_number_is_a_defect(field: str, said: str, value: float) -> None:
    """NaN or infinity in any norm is told by where it is."""
    change: dict[str, Any] = {field: value}
    defect = dataclasses.replace(LAYER, **change).defect
    assert defect is not None
    assert defect.startswith(said)


def test_nothing_seen_and_nothing_but_zeros_are_defects() -> None:
    """A layer that saw no row, or only zeros, cannot be judged; weights are blamed before what follows from them."""
    assert dataclasses.replace(LAYER, rows=0, input_norm=math.nan).defect == "no activation row reached it"
    assert dataclasses.replace(LAYER, input_norm=0.0).defect == "its input is zero in every row"
    assert dataclasses.replace(LAYER, output_norm=0.0).defect == "its output is zero in every row"
    broken = dataclasses.replace(LAYER, up_weight_norm=math.nan, output_norm=math.nan, update_norm=math.nan)
    assert broken.defect == "non-finite weights (NaN or infinity)"


def test_a_run_finds_its_layers_and_averages_them() -> None:
    """A layer is found by its name, and an average is the plain mean over layers."""
    other = dataclasses.replace(LAYER, name="b", down_norm=0.75)
    run = RunStats("m", "t", (LAYER, other), 2)
    assert run.layer("b") is other
    assert run.layer("c") is None
    assert run.mean("preservation") == 0.5 / 8
    assert run.complete
    assert not RUN.complete
    assert math.isnan(RunStats("m", "t", (), 0).mean("preservation"))


def test_one_layer_without_a_figure_leaves_the_average_without_one() -> None:
    """An average never leaves a NaN out."""
    run = RunStats("m", "t", (LAYER, dataclasses.replace(LAYER, down_norm=math.nan)), 2)
    assert math.isnan(run.mean("preservation"))


# The file

NORMS = st.floats(0, 1e300) | st.just(math.nan)
LAYERS = st.builds(
    LayerStats,
    name=st.text(),
    rows=st.integers(0, 2**40),
    in_features=st.integers(0, 10**6),
    rank=st.integers(0, 1024),
    out_features=st.integers(0, 10**6),
    input_norm=NORMS,
    down_norm=NORMS,
    update_norm=NORMS,
    base_norm=NORMS,
    output_norm=NORMS,
    mean_leakage=NORMS,
    down_weight_norm=NORMS,
    up_weight_norm=NORMS,
    base_weight_norm=NORMS,
)


@given(
    model=st.text(),
    text=st.text(),
    layers=st.lists(LAYERS, max_size=3, unique_by=lambda layer: layer.name),
    unmeasured=st.integers(0, 5),
    about=st.dictionaries(st.sampled_from(["device", "text", "settings"]), st.integers() | st.text() | st.none()),
)
def test_a_run_survives_its_file(
    model: str, text: str, layers: list[LayerStats], unmeasured: int, about: dict[str, Any]
) -> None:
    """Every run, with any figure NaN, is read back as it was saved, bit by bit, and saves as the same text again."""
    run = RunStats(model, text, tuple(layers), len(layers) + unmeasured, about)
    saved = to_json(run)
    assert same(from_json(saved, "f.json"), run)
    assert to_json(from_json(saved, "f.json")) == saved


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(value: float) -> None:
    """The file is strict JSON: no NaN literal, which other readers refuse; null is read as NaN."""
    text = to_json(RunStats("m", "t", (dataclasses.replace(LAYER, down_norm=value),), 1))

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    entry = json.loads(text, parse_constant=refuse)["stats"][0]
    assert entry["BX_norm"] is None
    assert entry["BX_ratio"] is None
    assert entry["X_norm"] == 8.0
    read = from_json(text, "f").layers[0]
    assert read.down_norm is not None
    assert math.isnan(read.down_norm)
    assert read.defect is not None


def test_the_file_is_a_superset_of_the_references() -> None:
    """Every key of the reference is there under its own name, with its own meaning."""
    document = json.loads(to_json(RUN))
    assert {"model_path", "calib_dataset", "num_layers", "stats"} <= set(document)
    assert document["num_layers"] == len(document["stats"]) == 2
    assert (document["model_path"], document["calib_dataset"]) == ("models/ft", "wikitext2")
    assert document["stats"][0].keys() >= REFERENCE_KEYS
    assert {key: document["stats"][0][key] for key in REFERENCE_KEYS} == {
        "layer_name": "model.layers.0.self_attn.q_proj",
        "num_samples": 100,
        "X_norm": 8.0,
        "BX_norm": 0.25,
        "ABX_norm": 0.5,
        "ResidualX_norm": 7.5,
        "FullOutput_norm": 10.0,
        "BX_ratio": 0.03125,
        "ABX_ratio": 0.0625,
        "adapter_contribution": 0.05,
        "B_weight_norm": 2.0,
        "A_weight_norm": 3.0,
        "Residual_weight_norm": 40.0,
    }
    assert document["k"] == [1]


def test_the_references_own_file_is_read() -> None:
    """A file of the reference script gives its figures; what it does not measure is absent, and no defect."""
    run = from_json(REFERENCE_FILE, "ref.json")
    assert (run.model_path, run.calib_dataset) == ("output/LoRA_Null_v2/ft", "wikitext2")
    assert run.complete
    first, second = run.layers
    assert (first.name, first.rows, first.defect) == ("model.layers.0.self_attn.q_proj", 100, None)
    assert first.preservation == pytest.approx(1.0e-2, rel=1e-5)
    assert first.effectiveness == pytest.approx(1.9e-2, rel=1e-5)
    assert first.contribution == pytest.approx(1.883e-2, rel=1e-3)
    assert first.absent == run.absent == ("leakage", "forgetting", "selectivity")
    assert second.input_norm == 1.0
    assert isinstance(second.input_norm, float)
    assert second.defect == "non-finite weights (NaN or infinity)"


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    """The message with which a changed file is refused; it names the file."""
    document = json.loads(to_json(RUN))
    change(document)
    with pytest.raises(StatsError) as caught:
        from_json(json.dumps(document), "f.json")
    assert str(caught.value).startswith("f.json: ")
    return str(caught.value)


def test_the_norm_of_a_weight_that_does_not_tell_it_is_neither_a_number_nor_a_defect() -> None:
    """A quantised weight may have no norm: the layer is judged, and its file says that it was not measured."""
    run = dataclasses.replace(RUN, layers=tuple(dataclasses.replace(x, base_weight_norm=None) for x in RUN.layers))
    assert [layer.defect for layer in run.layers] == [layer.defect for layer in RUN.layers]
    assert json.loads(to_json(run))["stats"][0]["Residual_weight_norm"] == "not measured"
    assert same(from_json(to_json(run), "f"), run)


@pytest.mark.parametrize(
    "key", sorted(REFERENCE_KEYS - {"BX_ratio", "ABX_ratio", "adapter_contribution", "layer_name"})
)
def test_a_layer_without_one_of_the_references_fields_is_refused(key: str) -> None:
    """A missing field is named with the layer's place in the file."""
    assert f"f.json: stats[1]: {key} must be" in broken(lambda document: document["stats"][1].pop(key))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_samples", 1.5, "stats[1]: num_samples must be a whole number from 0, not 1.5"),
        ("num_samples", None, "stats[1]: num_samples must be a whole number from 0, not None"),
        ("num_samples", True, "stats[1]: num_samples must be a whole number from 0, not True"),
        ("num_samples", -1, "stats[1]: num_samples must be a whole number from 0, not -1"),
        ("rank", "4", "stats[1]: rank must be a whole number from 0, not '4'"),
        ("rank", 10**400, "stats[1]: rank must be a whole number from 0, not 1000"),
        ("rank", -4, "stats[1]: rank must be a whole number from 0, not -4"),
        ("X_norm", "1.0", "stats[1]: X_norm must be a number, not '1.0'"),
        ("X_norm", False, "stats[1]: X_norm must be a number, not False"),
        ("X_norm", [1.0], "stats[1]: X_norm must be a number, not [1.0]"),
        ("X_norm", 10**400, "stats[1]: X_norm must be a number that a float can hold"),
        ("leakage", {}, "stats[1]: leakage must be a number, not {}"),
        ("layer_name", None, "stats[1]: not a layer: it has no 'layer_name'"),
        ("layer_name", 3, "stats[1]: not a layer: it has no 'layer_name'"),
        ("layer_name", LAYER.name, f"stats[1]: layer {LAYER.name} is there twice"),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(key: str, value: object, said: str) -> None:
    """A field that is not what it must be is named with its place and its value."""
    assert said in broken(lambda document: document["stats"][1].update({key: value}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"BX_norm": 0.26},
            "BX_ratio is 0.03125, but BX_norm / X_norm is 0.0325; the file was edited or damaged, so measure again",
        ),
        ({"BX_ratio": 0.0312501}, "BX_ratio is 0.0312501, but BX_norm / X_norm is 0.03125"),
        ({"ABX_norm": 0.6}, "ABX_ratio is 0.0625, but ABX_norm / X_norm is 0.075"),
        ({"FullOutput_norm": 1.0}, "adapter_contribution is 0.05, but ABX_norm / FullOutput_norm is 0.5"),
        ({"adapter_contribution": None}, "adapter_contribution is no number, but ABX_norm / FullOutput_norm is 0.05"),
        ({"X_norm": None}, "BX_ratio is 0.03125, but BX_norm / X_norm is no number"),
        ({"rank": 8}, "leakage_chance is 0.0625, but B_rank (or rank) / in_features is 0.125"),
        ({"B_rank": 5}, "B_rank is 5, but no matrix of rank 4 spans more"),
        ({"distinct_rows": 65}, "distinct_rows is 65, but of 100 rows, 64 wide, no more than either are counted"),
        ({"num_samples": 40, "distinct_rows": 41}, "distinct_rows is 41, but of 40 rows, 64 wide, no more than"),
        ({"leakage": 0.0}, "leakage_over_chance is 0.016, but leakage / leakage_chance is 0"),
        ({"BX_norm": -0.25}, "BX_norm must not be negative, but is -0.25"),
        ({"leakage": -1}, "leakage must not be negative, but is -1"),
    ],
)
def test_ratios_that_do_not_follow_from_their_norms_are_refused(change: dict[str, Any], said: str) -> None:
    """Each ratio is computed again to 1e-6: a file edited in one place only is not judged by either."""
    assert f"f.json: stats[1]: {said}" in broken(lambda document: document["stats"][1].update(change))


def test_ratios_may_be_rounded_to_a_millionth() -> None:
    """A ratio that another program computed in single precision is no contradiction."""
    document = json.loads(to_json(RUN))
    document["stats"][0]["BX_ratio"] *= 1 + 9e-7
    assert same(from_json(json.dumps(document), "f"), RUN)


def test_a_figure_without_a_key_was_not_measured_and_null_was() -> None:
    """Leakage with no key in any layer is absent, through a file and back; in some layers only it is refused."""
    unmeasured = dataclasses.replace(LAYER, mean_leakage=None)
    run = RunStats("m", "t", (unmeasured, dataclasses.replace(unmeasured, name="b")), 2)
    assert run.absent == unmeasured.absent == ("leakage", "forgetting", "selectivity")
    assert math.isnan(unmeasured.leakage)
    assert "leakage" not in json.loads(to_json(run))["stats"][0]
    assert same(from_json(to_json(run), "f"), run)
    assert dataclasses.replace(LAYER, mean_leakage=math.nan).absent == RUN.absent == ("forgetting", "selectivity")
    said = broken(lambda document: [document["stats"][1].pop(key) for key in ("leakage", "leakage_over_chance")])
    assert "model.layers.10.mlp.up_proj and model.layers.0.self_attn.q_proj: only one has leakage, or a task" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stats": None}, "not a statistics file: it has no list 'stats'"),
        ({"stats": {}}, "not a statistics file: it has no list 'stats'"),
        ({"stats": [3]}, "stats[0]: not a layer"),
        ({"num_layers": 5}, "says num_layers 5, but holds 2"),
        ({"num_layers": "2"}, "says num_layers 2, but holds 2"),
        ({"schema": "other"}, "of schema other 2, not pytest-nullspace/run 2"),
        ({"schema_version": 3}, "of schema pytest-nullspace/run 3, not pytest-nullspace/run 2"),
        ({"checkpoint_layers": "3"}, "checkpoint_layers must be a number from 2, not "),
        ({"checkpoint_layers": None}, "checkpoint_layers must be a number from 2, not "),
        ({"checkpoint_layers": 1}, "checkpoint_layers must be a number from 2, not "),
        ({"checkpoint_layers": True}, "checkpoint_layers must be a number from 2, not "),
    ],
)
def test_a_document_that_contradicts_itself_is_refused(change: dict[str, Any], said: str) -> None:
    """Fields of the whole file that are missing, of another schema, or at odds with its layers are named."""
    assert said in broken(lambda document: document.update(change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"stats": 1}', "[" * 100_000, "9" * 5000])
def test_what_is_no_statistics_file_is_refused(text: str) -> None:
    """Anything else than a statistics file is refused by name, never with a traceback."""
    with pytest.raises(StatsError, match=r"^f\.json: not "):
        from_json(text, "f.json")


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "1e999", "null"])
def test_a_number_that_is_none_is_read_however_it_is_written(written: str) -> None:
    """It is NaN where a figure is wanted, and what else the file tells can be saved again."""
    text = to_json(RUN).replace('"X_norm": 8.0', f'"X_norm": {written}').replace('"k": [\n  1\n ]', f'"k": {written}')
    for ratio in ("BX_ratio", "ABX_ratio"):
        text = re.sub(rf'"{ratio}": [\d.]+', f'"{ratio}": {written}', text)
    run = from_json(text, "f.json")
    assert math.isnan(run.layers[0].input_norm)
    assert run.about == {"k": None}
    assert from_json(to_json(run), "f.json").about == run.about


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    document=st.fixed_dictionaries(
        {"stats": st.lists(JSON | st.fixed_dictionaries(dict.fromkeys(sorted(REFERENCE_KEYS), JSON)), max_size=2)},
        optional={"num_layers": JSON, "checkpoint_layers": JSON, "model_path": JSON, "schema": JSON},
    )
)
def test_any_json_is_read_or_refused(document: dict[str, Any]) -> None:
    """No document makes reading raise anything but StatsError, and what is read can be judged and saved."""
    try:
        run = from_json(json.dumps(document), "f.json")
    except StatsError:
        return
    assert all(isinstance(layer.defect, str | None) for layer in run.layers)
    json.loads(to_json(run))


# Writing


def test_a_run_is_written_and_read(tmp_path: Path) -> None:
    """The file is made with the folders above it, readable by all, and nothing else is left there."""
    file = tmp_path / "a" / "b" / "stats.json"
    write(RUN, file)
    assert same(from_json(file.read_text("utf-8"), str(file)), RUN)
    assert list(file.parent.iterdir()) == [file]
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full the message says so, the old file is whole, and no half of the new one is left."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "stats.json"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StatsError, match=re.escape(f"{file}: cannot be written: No space left on device")):
        write(RUN, file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the midst of writing is not swallowed, and leaves nothing behind."""

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "stats.json"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(RUN, file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A directory in the file's place, and a file in its folder's place, are told by name and left as they were."""
    (tmp_path / "stats.json").mkdir()
    with pytest.raises(StatsError, match=r"stats\.json: cannot be written: Is a directory"):
        write(RUN, tmp_path / "stats.json")
    (tmp_path / "file").write_text("old")
    with pytest.raises(StatsError, match=r"cannot be written: "):
        write(RUN, tmp_path / "file" / "stats.json")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "stats.json"]


def test_a_link_is_replaced_by_the_file(tmp_path: Path) -> None:
    """Writing never reaches through a link: the file it leads to is untouched."""
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "old"
    assert (tmp_path / "link").read_text() == "new"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list what is open")
def test_a_file_is_closed_before_it_is_moved_or_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows moves and removes no file that is open: written or not, none is."""
    there = tmp_path.resolve()

    def held() -> list[str]:
        open_now = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
        return [name for name in open_now if name.startswith(str(there))]

    seen: list[list[str]] = []

    def looking(of: Any) -> Any:
        def look(*args: Any, **how: Any) -> Any:
            seen.append(held())
            return of(*args, **how)

        return look

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, looking(getattr(Path, name)))
    write_atomically(there / "new", "text")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "no room")))
    with pytest.raises(StatsError, match="cannot be written"):
        write_atomically(there / "other", "text")
    assert seen == [[], []]
    assert [file.name for file in there.iterdir()] == ["new"]


def test_a_path_that_is_not_utf8_can_be_saved(tmp_path: Path) -> None:
    """A model's path may hold bytes that are no text; the file is still written, and read back the same."""
    run = dataclasses.replace(RUN, model_path=os.fsdecode(b"models/\xff"))
    write(run, tmp_path / "stats.json")
    assert same(from_json((tmp_path / "stats.json").read_text("utf-8"), "f"), run)


WHOLE = dataclasses.replace(
    LAYER, rank=0, down_norm=None, down_weight_norm=None, mean_leakage=None, effective_rank=7.4
)  # fmt: skip


def test_a_run_of_a_whole_model_survives_its_file() -> None:
    """Its layers have no B and tell their rank; a layer that did not change tells 0."""
    still = dataclasses.replace(WHOLE, name="b", update_norm=0.0, up_weight_norm=0.0, effective_rank=0.0)
    lost = dataclasses.replace(WHOLE, name="c", up_weight_norm=math.nan, effective_rank=math.nan)
    run = RunStats("m", "t", (WHOLE, still, lost), 3, {"format": "whole model", "gated_layers": 2})
    assert same(from_json(to_json(run), "f"), run)


def _of_layers(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [of for layer in document["stats"] for of in (layer, layer["task"])]


def _without_down(document: dict[str, Any]) -> Any:
    for of in _of_layers(document):
        for key in ("BX_norm", "B_weight_norm", "BX_ratio", "B_rank", "leakage", "leakage_over_chance"):
            of.pop(key, None)
        of |= {"rank": 0, "leakage_chance": 0.0, "update_effective_rank": 7.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda of: of["drift"]["preserved"].update(tokens=0), "drift: preserved: tokens is 0, but it tells what they"),
        (lambda of: of["drift"]["task"].update(tokens=0), "drift: task: tokens is 0, but it tells what they gave"),
        (lambda of: of["drift"]["headroom"].update(tokens=0), "drift: headroom: tokens is 0, but it tells what they"),
        (lambda of: of["drift"]["task"].update(base_loss=1e308), "drift: task: base_loss is 1e+308, which no model's"),
        (lambda of: of["stats"][0].update(weight_used_alone=1), "stats[0]: weight_used_alone is 1, but 100 rows came"),
        (_without_down, f"stats[0]: the update of {LAYER.name} is a whole matrix, but the format is 'LoRA-Null'"),
        (lambda of: _without_down(of) or of.pop("format"), "is a whole matrix, but the format is None"),
        (
            lambda of: of.update(format="whole model"),
            f"the update of {LAYER.name} is none, but the format is 'whole mo",
        ),
        (
            lambda of: (of["stats"].pop(), of.update(num_layers=1, checkpoint_layers=1)),
            "gated_layers must be a count of at most 1 layers, not 2",
        ),
        (
            lambda of: (of["stats"].pop(), of.update(num_layers=1), of.pop("checkpoint_layers")),
            "gated_layers must be a count of at most 1 layers, not 2",
        ),
        (lambda of: of["stats"][0].update(scale=0.0), f"stats[0]: the scale of {LAYER.name} is 0, but its update 0.5"),
    ],
)
def test_what_was_not_measured_is_not_read_as_if_it_was(change: Callable[[dict[str, Any]], object], said: str) -> None:
    """A file whose parts cannot all be of one run is refused, whichever of them was changed."""
    sound = saved.full()
    text = to_json(dataclasses.replace(sound, about={**sound.about, "gated_layers": 2}))
    assert from_json(text, "f").layers == sound.layers
    document = json.loads(text)
    change(document)
    with pytest.raises(StatsError, match=re.escape(said)):
        from_json(json.dumps(document), "f")


@pytest.mark.parametrize("rank", [None, 0.0, 0.5])
def test_a_whole_update_has_at_least_one_direction(rank: float | None) -> None:
    """An effective rank below 1, or none, of an update that is not zero was not measured."""
    document = json.loads(to_json(RunStats("m", "t", (WHOLE,), 1, {"format": "whole model"})))
    document["stats"][0]["update_effective_rank"] = rank
    with pytest.raises(StatsError, match=re.escape("but no update of norm 3 has less than 1")):
        from_json(json.dumps(document), "f")


def test_no_prediction_gives_no_number() -> None:
    """A text of which nothing was predicted is read with losses that are none, which no threshold passes."""
    sound = saved.full()
    assert sound.drift is not None
    nothing = dataclasses.replace(
        sound.drift.preserved, tokens=0, base_loss=math.nan, adapted_loss=math.nan, divergence=math.nan
    )
    run = dataclasses.replace(sound, drift=dataclasses.replace(sound.drift, preserved=nothing))
    assert same(from_json(to_json(run), "f"), run)


@pytest.mark.parametrize("scale", [2.0, 0.0, -0.5, None])
def test_the_scale_is_saved_and_told_where_it_says_something(scale: float | None) -> None:
    """Each layer's scale comes back as it was, or stays unknown in older files; a negative one is reported."""
    run = saved.run(scale=scale, update_norm=0.0 if scale == 0 else LAYER.update_norm)
    text = to_json(run)
    assert json.loads(text)["stats"][0].get("scale", "none") == ("none" if scale is None else scale)
    assert from_json(text, "s.json") == run
    expected = Expectations()
    lines = [line for line, _ in terminal.summary(run, [judge(layer, expected) for layer in run.layers], expected)]
    assert any(line.startswith("the scale is negative in 1 of 9 layers") for line in lines) == (scale == -0.5)
    assert ("scale is negative in 1 of 9" in markdown.report(run, expected)) == (scale == -0.5)


def test_a_run_of_the_earlier_schema_is_read_and_its_norm_said_to_be_without_the_scale() -> None:
    """What version 1 saved of a PEFT adapter is read, and said in every report and file that it came from there."""
    document = json.loads(to_json(saved.full())) | {"schema_version": 1, "format": "PEFT LoRA"}
    run = from_json(json.dumps(document), "earlier.json")
    assert run.layers == saved.full().layers
    for read in (run, from_json(to_json(run), "again.json")):
        told = list(doubts.all_of([judge(layer, Expectations()) for layer in read.layers], read, Expectations()))
        assert any("||A||_F: saved by an earlier version, and so without the adapter's scale" in line for line in told)
    of_lora_null = from_json(json.dumps(document | {"format": "LoRA-Null"}), "earlier.json")
    assert "A_weight_norm" not in of_lora_null.about
