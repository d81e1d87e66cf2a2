"""Run against run: what became worse, by how much, and whether the two compare at all."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.judging.baseline import Change, Limit, compare
from pytest_nullspace.judging.comparable import COMPARED, incomparable
from pytest_nullspace.judging.invariants import Stage
from pytest_nullspace.report.changes import comparison
from pytest_nullspace.run.figures import of_layers
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats, TextDrift
from pytest_nullspace.run.uncertainty import jackknife
from pytest_nullspace.run.windows import OF_LAYER, OF_PREDICTIONS, ByWindow
from tests import saved

TRAINED, INIT = Stage
EARLIER = saved.run()
Q0 = saved.NAMES[0]


def fails(limit: Limit, stage: Stage = TRAINED, **changes: Any) -> tuple[str, ...]:
    """What fails the first layer when it changed so."""
    return compare(saved.run(**changes), EARLIER, [limit], stage).regressions[Q0]


@pytest.mark.parametrize(
    ("changes", "limit", "said"),
    [
        ({"down_norm": 0.26}, Limit("preservation", 0.05, True), None),
        ({"down_norm": 0.27}, Limit("preservation", 0.05, True), "preservation 0.03125 → 0.03375 (+8.000%)*5%"),
        ({"down_norm": 0.01}, Limit("preservation", 0.05, True), None),
        ({"down_norm": 0.27}, Limit("preservation", 0.001, False), "preservation 0.03125 → 0.03375 (+8.000%)*0.001"),
        ({"down_norm": 0.27}, Limit("preservation", 0.01, False), None),
        ({"down_norm": 0.27}, Limit("leakage", 0, True), None),
        ({"update_norm": 0.4}, Limit("effectiveness", 0.1, True), "effectiveness 0.0625 → 0.05 (-20.000%)*10%"),
        ({"update_norm": 0.9}, Limit("effectiveness", 0.1, True), None),
        ({"output_norm": 20.0}, Limit("contribution", 0.1, True), "contribution 0.05 → 0.025 (-50.000%)*10%"),
        ({"mean_leakage": 0.002}, Limit("leakage", 0.5, True), "leakage 0.016 → 0.032 (+100.000%)*50%"),
        ({"mean_leakage": math.nan}, Limit("leakage", 9, True), "leakage 0.016 → nan *"),
    ],
)
def test_a_figure_may_become_worse_by_no_more_than_its_limit(
    changes: dict[str, Any], limit: Limit, said: str | None
) -> None:
    """In the direction that is worse for it, as a share or as a difference; what is no number is worse."""
    told = fails(limit, **changes)
    if said is None:
        assert told == ()
    else:
        (phrase,) = told
        start, _, end = said.partition("*")
        assert phrase.startswith(start)
        assert phrase.endswith(end)


def test_a_layer_that_no_row_reached_has_no_figure_to_compare() -> None:
    """What was not measured became no worse; that the layer is new is a fault all the same."""
    limit = Limit("preservation", 0.05, True)
    unreached = saved.run(rows=0, input_norm=math.nan, down_norm=math.nan)
    assert compare(unreached, EARLIER, [limit], TRAINED).regressions[Q0] == ()
    (new,) = compare(unreached, saved.run(*saved.NAMES[1:]), [limit], TRAINED).regressions[Q0]
    assert new.startswith("new: ")


def test_at_the_initial_stage_an_update_is_the_worse_direction() -> None:
    """Before training effectiveness should be zero, so there more of it is worse."""
    limit = Limit("effectiveness", 0.1, True)
    assert fails(limit, INIT, update_norm=0.9)
    assert not fails(limit, INIT, update_norm=0.1)


def test_growth_from_zero_is_beyond_every_share() -> None:
    """A share of zero is no room at all; staying at zero is no change."""
    assert Change("leakage", 0.0, 1e-9, True).exceeds(Limit("leakage", 1e6, True))
    assert not Change("leakage", 0.0, 0.0, True).exceeds(Limit("leakage", 0, True))
    assert not Change("leakage", 0.0, 1e-9, True).exceeds(Limit("leakage", 1e-6, False))
    assert not Change("effectiveness", 0.0, 1e-9, False).exceeds(Limit("effectiveness", 0, True))


def test_layers_that_only_one_run_has_are_told() -> None:
    """A new layer fails by name, also without limits; the missing ones are listed."""
    compared = compare(saved.run(*saved.NAMES[:3], "extra"), EARLIER, [], TRAINED)
    assert compared.regressions["extra"] == ("new: the earlier run has no such layer",)
    assert compared.missing == saved.NAMES[3:]
    assert not any(told for name, told in compared.regressions.items() if name != "extra")


def test_the_worst_layer_of_each_figure_is_found() -> None:
    """The largest change for the worse is told with its layer; a figure that one run lacks has none."""
    compared = compare(saved.run(down_norm=0.5), EARLIER, [], TRAINED)
    worst = compared.worst("preservation")
    assert worst is not None
    assert (worst[0], worst[1].now) == (Q0, 0.0625)
    lacking = [dataclasses.replace(layer, mean_leakage=None) for layer in EARLIER.layers]
    assert compare(EARLIER, dataclasses.replace(EARLIER, layers=tuple(lacking)), [], TRAINED).worst("leakage") is None


def windowed(down: float, digest: str = "w", wobble: float = 0.1) -> RunStats:
    """A run that kept its four windows, of which two are louder, with this ``‖Bx‖`` in its first layer."""
    counts = [25.0] * 4
    shares = {"down_norm": (1 - wobble, 1 + wobble, 1 - wobble, 1 + wobble), "input_norm": (0.9, 1.1, 1.1, 0.9)}
    layers = []
    for layer in saved.run(down_norm=down).layers:
        sums = {name: [25 * getattr(layer, name) * s for s in shares.get(name, (1,) * 4)] for name in OF_LAYER.over}
        layers.append(dataclasses.replace(layer, by_window=ByWindow.of(OF_LAYER, layer, (counts, counts), sums)))
    about = {**saved.ABOUT, "text": {**saved.ABOUT["text"], "windows_sha256": digest}}
    return dataclasses.replace(EARLIER, layers=tuple(layers), about=about)


def left_out(layer: LayerStats) -> list[LayerStats]:
    """The layer without each of its windows in turn."""
    assert layer.by_window is not None
    parts: list[Any] = [*layer.by_window.left_out()]
    return [dataclasses.replace(layer, **means) for means in parts]


def told(now: RunStats, before: RunStats, *limits: Limit) -> list[str]:
    """The lines of the report."""
    return [line for line, _ in comparison(compare(now, before, limits, TRAINED), Path("b.json"), ())]


def test_on_the_same_windows_the_difference_is_judged_with_its_own_margin() -> None:
    """By how much and with which margin; the failure says so, and where more windows might change it."""
    before, now = windowed(0.25), windowed(0.28)
    compared = compare(now, before, [Limit("preservation", 0.05, True)], TRAINED)
    change = next(change for change in compared.changes[Q0] if change.figure == "preservation")
    assert change.margin is not None
    own = jackknife([layer.preservation for layer in left_out(now.layers[0])])
    assert change.margin == pytest.approx(own * 0.03 / 0.28, rel=1e-4)
    phrase = f"preservation 0.03125 → 0.035 (+12.000%), worse by 0.0038 ± {change.margin:.2g}"
    assert compared.regressions[Q0] == (f"{phrase}: more than the 5% allowed",)
    (near,) = compare(now, before, [Limit("preservation", 0.0035, False)], TRAINED).regressions[Q0]
    assert near == f"{phrase}: more than the 0.0035 allowed, though within its margin: more windows would tell"
    assert compare(now, before, [Limit("preservation", 0.13, True)], TRAINED).regressions[Q0] == ()
    lines = told(now, before)
    assert lines[0] == "against b.json: 0 of 9 layers are worse than allowed"
    assert lines[1].startswith("  preservation 0.03125 → 0.03167 (+1.333%), worse by 0.00042 ± ")
    assert lines[1].endswith(f" in the mean; beyond its margin worse in 1 of 9 layers; most: {phrase} in {Q0}")
    assert lines[2:] == ["  no change: effectiveness, contribution, leakage"]


def test_runs_that_are_identical_say_no_change_once() -> None:
    """Nothing changed, be it paired or not: one line, and no limit, not even none at all, fails it."""
    none = [Limit(figure, 0, True) for figure in of_layers()]
    rounded = [dataclasses.replace(x, down_norm=(x.down_norm or 0.0) * (1 + 1e-6)) for x in windowed(0.25).layers]
    for now in (windowed(0.25), dataclasses.replace(windowed(0.25), layers=tuple(rounded))):
        assert told(now, windowed(0.25), *none) == ["against b.json: 0 of 9 layers are worse than allowed; no change"]
        assert not any(compare(now, windowed(0.25), none, TRAINED).regressions.values())
    assert told(EARLIER, EARLIER) == [
        "against b.json: 0 of 9 layers are worse than allowed; no change; unpaired: the earlier run does not tell what "
        "each window gave"
    ]


def test_other_windows_are_not_paired_and_that_is_said_once() -> None:
    """Where the windows differ or were not kept the comparison is what it was, and one line says so."""
    for before, why in ((windowed(0.25, "other"), "the windows of the text are not the same"),
                        (EARLIER, "the earlier run does not tell what each window gave")):  # fmt: skip
        lines = told(windowed(0.28), before)
        assert lines[0] == f"against b.json: 0 of 9 layers are worse than allowed; unpaired: {why}"
        lines = [line for line in lines if not line.startswith("  not ")]  # alike, or known to be: the tokens
        assert lines[1] == f"  largest change for the worse: preservation 0.03125 → 0.035 (+12.000%) in {Q0}"
        assert not any("±" in line or "unpaired" in line for line in lines[1:])
    (fault,) = compare(windowed(0.28), EARLIER, [Limit("preservation", 0.05, True)], TRAINED).regressions[Q0]
    assert fault == "preservation 0.03125 → 0.035 (+12.000%) is worse by more than 5%"


def test_the_predictions_are_compared_as_well() -> None:
    """A limit on a figure of the drift fails the drift, with the margin of the difference where it has one."""

    def run(adapted: float) -> RunStats:
        found = TextDrift(40, 2.0, adapted, 0.02, 0.1, 0.1)
        sums = {
            "base_loss": [36.0, 36.0],
            "adapted_loss": [18 * adapted - 1, 18 * adapted + 1],
            "divergence": [0.1, 0.7],
        }
        kept = ByWindow.of(OF_PREDICTIONS, found, ([20.0, 20.0], [18.0, 18.0]), sums)
        return dataclasses.replace(windowed(0.25), drift=Drift("b", dataclasses.replace(found, by_window=kept)))

    compared = compare(run(2.05), run(2.01), [Limit("loss-rise", 0.01, False)], TRAINED)
    assert [str(change) for change in compared.drift] == [
        "divergence 0.02 → 0.02 (+0.000%), no change",
        f"loss-rise 0.01 → 0.05 (+400.000%), worse by 0.04 ± {compared.drift[1].margin:.2g}",
    ]
    assert compared.drift[1].margin == pytest.approx(0, abs=1e-6)  # both windows rose alike
    assert compared.drift_regressions == (f"{compared.drift[1]}: more than the 0.01 allowed",)
    assert compare(run(2.01), run(2.01), [Limit("loss-rise", 0, False)], TRAINED).is_none


@given(before=st.floats(0, 1e6), now=st.floats(0, 1e6), more=st.floats(0, 1e6), limit=st.floats(0, 10))
def test_worse_never_becomes_allowed(before: float, now: float, more: float, limit: float) -> None:
    """If a value exceeds the limit, so does every worse one; a limit of the change itself is not exceeded."""
    for relative in (True, False):
        bound = Limit("leakage", limit, relative)
        if Change("leakage", before, now, True).exceeds(bound):
            assert Change("leakage", before, now + more, True).exceeds(bound)
    change = Change("leakage", before, now, True)
    assert not change.exceeds(Limit("leakage", max(0.0, change.worsened), False))


def test_a_run_compares_with_itself() -> None:
    """Nothing differs, nothing is worse."""
    assert incomparable(EARLIER, EARLIER) == ()
    assert not any(compare(EARLIER, EARLIER, [Limit(f, 0, True) for f in of_layers()], TRAINED).regressions.values())


def other(**changes: Any) -> RunStats:
    """The run with other entries of its ``text`` and ``settings``."""
    about = {key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value
             for key, value in saved.ABOUT.items()}  # fmt: skip
    return dataclasses.replace(EARLIER, about=about)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (other(text={"sha256": "f" * 64}), "text (ffffffffffff, was 000000000000)"),
        (other(text={"windows": 8}), "windows (8, was 16)"),
        (other(text={"seqlen": 64}), "seqlen (64, was 32)"),
        (other(settings={"seed": 1}), "seed (1, was 42)"),
        (saved.run(rows=50), f"rows ({Q0}: 50, was 100)"),
        (saved.run(rank=8), f"rank ({Q0}: 8, was 4)"),
        (saved.run(out_features=64), f"widths ({Q0}: 64×64, was 64×32)"),
        (saved.run(base_weight_norm=41.0), f"base ({Q0}: 41, was 40)"),
        (saved.run(base_weight_norm=40.01), None),
        (saved.run(base_weight_norm=math.nan), None),
    ],
)
def test_what_differs_is_named(run: RunStats, said: str | None) -> None:
    """Each condition under which figures do not compare is told by its name, what it is and what it was."""
    assert [str(difference) for difference in incomparable(run, EARLIER)] == ([] if said is None else [said])


def test_what_only_one_run_records_is_one_difference() -> None:
    """A run of the reference script records little: that is told at once, with the figures that it lacks."""
    layers = [
        dataclasses.replace(layer, mean_leakage=None, rank=0, in_features=0, out_features=0) for layer in EARLIER.layers
    ]
    reference = RunStats("ft", "wikitext2", tuple(layers), len(layers))
    assert [str(d) for d in incomparable(EARLIER, reference)] == [
        "figures (preservation, effectiveness, contribution, leakage, was preservation, effectiveness, contribution)",
        "unrecorded (only one of the runs tells its text, windows, seqlen, seed, rank, widths)",
    ]
    assert incomparable(reference, reference) == ()


def test_layers_that_do_not_match_are_left_out_of_the_conditions() -> None:
    """Only layers that both hold must have the same rank, widths and base."""
    assert incomparable(saved.run("extra", *saved.NAMES, rank=99), EARLIER) == ()
    assert set(COMPARED) >= {"text", "windows", "seqlen", "seed", "rank", "widths", "base", "figures"}


@pytest.mark.parametrize("odd", [{"a": 1}, {}, [1]])
def test_conditions_of_any_kind_are_compared(odd: object) -> None:
    """A file whose conditions are objects or lists differs from one of ours by them, in words."""
    other = dataclasses.replace(EARLIER, about={**EARLIER.about, "text": {**EARLIER.about["text"], "sha256": odd}})
    assert [d.what for d in incomparable(other, EARLIER)] == ["text"]
    assert [d.what for d in incomparable(EARLIER, other)] == ["text"]
    assert incomparable(other, other) == ()
