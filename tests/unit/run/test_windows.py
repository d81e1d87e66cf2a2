"""What is kept of each window, and the margin of a difference that two runs on the same windows have."""

import base64
import dataclasses
import json
import math
import random
from array import array
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.errors import StatsError
from pytest_nullspace.run import paired
from pytest_nullspace.run.saved import from_json, to_json
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats, TextDrift
from pytest_nullspace.run.uncertainty import jackknife, students_t
from pytest_nullspace.run.windows import OF_LAYER, OF_PREDICTIONS, ByWindow
from tests import saved

NORMS = [name for name in OF_LAYER.over if name.endswith("norm")]
SUMS = st.lists(st.tuples(st.integers(1, 50), *[st.floats(0.5, 2.0)] * len(OF_LAYER.over)), min_size=2, max_size=12)


def of_windows(windows: Sequence[tuple[float, ...]]) -> LayerStats:
    """The layer whose windows have so many rows, and such means in each."""
    rows = [float(count) for count, *_ in windows]
    sums = {
        name: [count * window[1 + number] for count, window in zip(rows, windows, strict=True)]
        for number, name in enumerate(OF_LAYER.over)
    }
    means: dict[str, Any] = {name: math.fsum(told) / sum(rows) for name, told in sums.items()}
    layer = dataclasses.replace(saved.LAYER, rows=int(sum(rows)), **means)
    return dataclasses.replace(layer, by_window=ByWindow.of(OF_LAYER, layer, (rows, rows), sums))


@given(SUMS)
def test_leaving_a_window_out_is_what_was_measured_without_it(windows: list[tuple[float, ...]]) -> None:
    """Each mean agrees with that of a naive float64 sum over the other windows."""
    layer = of_windows(windows)
    assert layer.by_window is not None
    for number, means in enumerate(layer.by_window.left_out()):
        rest = [window for other, window in enumerate(windows) if other != number]
        for position, name in enumerate(OF_LAYER.over, 1):
            naive = sum(w[0] * w[position] for w in rest) / sum(w[0] for w in rest)
            dominated = windows[number][0] * windows[number][position] / (naive * sum(w[0] for w in rest))
            assert means[name] == pytest.approx(naive, rel=1e-6 * (1 + dominated))


@given(SUMS)
def test_what_is_kept_survives_the_file(windows: list[tuple[float, ...]]) -> None:
    """Read back it is the same, bit by bit; a task text has its own."""
    layer = of_windows(windows)
    whole = dataclasses.replace(layer, task=dataclasses.replace(of_windows([*windows, windows[0]]), name=layer.name))
    run = RunStats("m", "t", (whole,), 1)
    assert repr(from_json(to_json(run), "f.json")) == repr(run)


def test_a_window_takes_few_bytes() -> None:
    """Of each layer and text some 45 bytes a window, of which the figures share all."""
    windows = [(2048.0, *(random.Random(seed).uniform(0.5, 2) for _ in OF_LAYER.over)) for seed in range(64)]
    kept = of_windows(windows).by_window
    assert kept is not None
    assert len(kept.encoded()) / 64 < 45


def test_a_file_never_keeps_more_windows_than_it_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all layers on both texts have too many the file keeps none, and is read; up to there it keeps all."""
    layer = of_windows([(10, *[1.0] * 6), (20, *[1.5] * 6)])
    both = [dataclasses.replace(layer, name=name, task=dataclasses.replace(layer, name=name)) for name in ("a", "b")]
    run = RunStats("m", "t", tuple(both), 2)
    monkeypatch.setattr("pytest_nullspace.run.saved.MOST_WINDOWS", 8)
    assert repr(from_json(to_json(run), "f.json")) == repr(run)
    monkeypatch.setattr("pytest_nullspace.run.saved.MOST_WINDOWS", 7)
    read = from_json(to_json(run), "f.json")
    assert all(layer.by_window is None and layer.task is not None for layer in read.layers)
    assert all(layer.task is not None and layer.task.by_window is None for layer in read.layers)


@pytest.mark.parametrize(
    "change", [{"input_norm": math.nan}, {"base_norm": 1e300}, {"update_norm": 1e-60}, {"mean_leakage": math.nan}]
)
def test_what_float32_cannot_hold_is_not_kept(change: dict[str, float]) -> None:
    """A layer of NaN or of norms beyond float32's range keeps nothing, instead of what is wrong."""
    means = {name: getattr(saved.LAYER, name) for name in OF_LAYER.over} | change
    changed: dict[str, Any] = {**change}
    layer = dataclasses.replace(saved.LAYER, **changed)
    assert ByWindow.of(OF_LAYER, layer, ([50.0, 50.0],) * 2, {n: [50 * m] * 2 for n, m in means.items()}) is None
    fine = {name: [50 * getattr(saved.LAYER, name)] * 2 for name in OF_LAYER.over}
    assert ByWindow.of(OF_LAYER, saved.LAYER, ([50.0, 50.0],) * 2, fine) is not None


def packed(*columns: Sequence[float]) -> str:
    """Columns as a file holds them."""
    return base64.b64encode(array("f", [value for column in columns for value in column]).tobytes()).decode()


SOUND = [[60, 40], [60, 40], *([getattr(saved.LAYER, name)] * 2 for name in OF_LAYER.over)]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "must be 8 float32 a window in base 64, not None"),
        (7, "must be 8 float32 a window in base 64, not 7"),
        ("", "must be 8 float32 a window"),
        ("A" * 7, "must be 8 float32 a window"),
        ("ä" * 8, "must be 8 float32 a window"),
        (packed(*SOUND[:-1]), "must be 8 float32 a window"),
        (packed(*SOUND[:-1], [math.nan, 0.001]), "holds what is negative or not finite"),
        (packed(*SOUND[:-1], [math.inf, 0.001]), "holds what is negative or not finite"),
        (packed(*SOUND[:-1], [-1e-3, 3e-3]), "holds what is negative or not finite"),
        (packed([60.5, 39.5], *SOUND[1:]), "holds counts that are none"),
        (packed(SOUND[0], [60, 41], *SOUND[2:]), "holds counts that are none"),
        (packed([60, 41], *SOUND[1:]), "rows is 100, but over the windows 101; the file was edited or damaged"),
        (packed(*SOUND[:2], [8, 9], *SOUND[3:]), "input_norm is 8.0, but over the windows 8.4; the file was edited"),
        (packed(*SOUND[:-1], [0.002, 0.001]), "mean_leakage is 0.001, but over the windows 0.0016; the file"),
        (packed(*([] for _ in SOUND)), "must be 8 float32 a window"),
    ],
)
def test_what_is_not_of_the_layer_is_refused(told: object, said: str) -> None:
    """A hostile file's windows are held against their form and against the layer's own figures, by name."""
    document = json.loads(to_json(saved.run()))
    document["stats"][3]["by_window"] = packed(*SOUND)
    assert from_json(json.dumps(document), "f.json").layers[3].by_window is not None
    document["stats"][3]["by_window"] = told
    with pytest.raises(StatsError) as refused:
        from_json(json.dumps(document), "f.json")
    assert str(refused.value).startswith("f.json: stats[3]: by_window")
    assert said in str(refused.value)


def drift_of(windows: Sequence[tuple[float, float, float]], task: TextDrift | None = None) -> Drift:
    """The drift whose windows of 10 tokens have such base losses, adapted losses and divergences."""
    base, adapted, divergence = (fmean(column) for column in zip(*windows, strict=True))
    found = TextDrift(10 * len(windows), base, adapted, divergence, 0.0, 0.0)
    names = ("base_loss", "adapted_loss", "divergence")
    per_token = dict(zip(names, zip(*windows, strict=True), strict=True))
    counts = [10.0] * len(windows), [9.0] * len(windows)
    sums = {name: [counts[OF_PREDICTIONS.over[name]][0] * mean for mean in per_token[name]] for name in names}
    return Drift("b", dataclasses.replace(found, by_window=ByWindow.of(OF_PREDICTIONS, found, counts, sums)), task)


def value(of: Drift, figure: str) -> float:
    """A figure of the drift."""
    return of.figures[figure][0]


@given(st.lists(st.tuples(*[st.floats(0.5, 2)] * 6), min_size=2, max_size=20))
def test_the_margin_of_a_difference_of_means_is_its_standard_error_times_t(windows: list[tuple[float, ...]]) -> None:
    """Of plain means over windows alike the jackknife of the difference is the textbook's paired interval."""
    now, before = drift_of([w[:3] for w in windows]), drift_of([w[3:] for w in windows])  # type: ignore[misc]
    found = paired.differences(now, before, ("divergence", "loss-rise"), value)
    assert found is not None
    risen = [(w[1] - w[0]) - (w[4] - w[3]) for w in windows]
    for figure, told in (("divergence", [w[2] - w[5] for w in windows]), ("loss-rise", risen)):
        want = students_t(len(told) - 1) * stdev(told) / math.sqrt(len(told))
        assert paired.margin(found[figure]) == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_the_windows_of_a_drift_survive_the_file_and_are_held_against_it() -> None:
    """Losses and divergence of each window are read back; another loss beside them is refused."""
    run = dataclasses.replace(saved.run(), drift=drift_of([(2, 2.1, 0.1), (3, 3.2, 0.3)]))
    assert from_json(to_json(run), "f.json").drift == run.drift
    document = json.loads(to_json(run))
    document["drift"]["preserved"]["base_loss"] = 2.6
    with pytest.raises(StatsError, match=r"f\.json: drift: preserved: by_window: base_loss is 2\.6, but over the wind"):
        from_json(json.dumps(document), "f.json")


def test_windows_that_differ_are_not_paired() -> None:
    """Other counts of rows, or windows that only one run kept, give no difference window by window."""
    layer = of_windows([(10, *[1.0] * 6), (20, *[1.5] * 6)])
    other = of_windows([(20, *[1.0] * 6), (10, *[1.5] * 6)])
    without = dataclasses.replace(layer, by_window=None)
    for now, before in (
        (layer, other),
        (layer, without),
        (without, layer),
        (dataclasses.replace(layer, task=other), layer),
    ):
        assert paired.differences(now, before, ["preservation"], LayerStats.figure) is None
    assert paired.differences(layer, layer, ["preservation"], LayerStats.figure) == {"preservation": [[0.0, 0.0]]}
    one = of_windows([(10, *[1.0] * 6)])
    alone = paired.differences(one, one, ["preservation"], LayerStats.figure)
    assert alone is not None
    assert paired.margin(alone["preservation"]) is None


def hard_and_easy(choose: random.Random, count: int) -> list[tuple[int, float]]:
    """So many windows, each with its rows and how loud it is."""
    return [(choose.randint(20, 40), choose.lognormvariate(0, 0.5)) for _ in range(count)]


def heard(windows: Sequence[tuple[int, float]], louder: Sequence[float] | None = None) -> LayerStats:
    """What a layer makes of them whose B and A are ``louder`` by as much in each."""
    times = louder or [1.0] * len(windows)
    return of_windows(
        [(rows, 8.0, 0.25 * loud * by, 0.5, 7.5, 10.0, 0.001) for (rows, loud), by in zip(windows, times, strict=True)]
    )


def margin_of(now: LayerStats, before: LayerStats) -> float:
    """The paired margin of their preservations' difference."""
    found = paired.differences(now, before, ["preservation"], LayerStats.figure)
    assert found is not None
    margin = paired.margin(found["preservation"])
    assert margin is not None
    return margin


def test_the_margin_of_a_difference_holds_as_often_as_it_says() -> None:
    """Of many pairs of runs about 95 % have the true difference of two ratios of means within their margin."""
    tries, hits, true = 800, 0, 0.1 * 0.25 * math.exp(0.5**2 / 2) / 8
    for seed in range(tries):
        choose = random.Random(seed)
        windows = hard_and_easy(choose, 24)
        before, now = heard(windows), heard(windows, [choose.gauss(1.1, 0.1) for _ in windows])
        hits += abs(now.preservation - before.preservation - true) <= margin_of(now, before)
    assert 0.91 < hits / tries < 0.98  # skewed windows cost the jackknife a little


def test_a_planted_rise_is_found_with_a_third_of_the_windows() -> None:
    """Ten per cent more is beyond the paired margin with a third of the windows that two margins of their own need."""
    needed = {}
    for kind in ("paired", "apart"):
        for count in (3, 6, 12, 24, 48, 96, 192, 384):
            found = 0
            for seed in range(20):
                choose = random.Random(seed)
                windows = hard_and_easy(choose, count)
                before, now = heard(windows), heard(windows, [choose.gauss(1.1, 0.02) for _ in windows])
                margin = margin_of(now, before) if kind == "paired" else math.hypot(own(now), own(before))
                found += now.preservation - before.preservation > margin
            if found >= 19:
                needed[kind] = count
                break
    assert 3 * needed["paired"] <= needed["apart"]


def own(layer: LayerStats) -> float:
    """The margin of a layer's preservation by itself."""
    assert layer.by_window is not None
    parts: list[Any] = [*layer.by_window.left_out()]
    return jackknife([dataclasses.replace(layer, **means).preservation for means in parts])
