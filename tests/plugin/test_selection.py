"""What a selection leaves out is never reported as gated: layers that were measured for other tests, and whole runs."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests import saved
from tests.plugin.conftest import Gate, Replay

ONE_BAD = saved.run(down_norm=4.5)
"""One layer fails by preservation, 0.5625; the averages pass, 0.0903."""
ALONE = "judged: {} alone; the tests of 9 measured layers were left out or not run, and 1 of them would have failed, "


@pytest.mark.parametrize("chosen", [("-k", "not layers"), ("bad.json::model",), ("bad.json::model", "-n", "2")])
def test_the_averages_alone_gate_no_layer(replay: Replay, pytester: pytest.Pytester, chosen: tuple[str, ...]) -> None:
    """Layers measured for the averages are not counted as gated, in any report, and the one that would fail is told."""
    saved.save(pytester.path / "bad.json", ONE_BAD)
    result = replay(*chosen, "-vv", "--nullspace-report=o.md", "--nullspace-save-stats=o.json", stats="bad.json")
    assert result.ret == 0
    result.assert_outcomes(passed=1, deselected=0 if "::" in chosen[0] else 9)
    text = result.stdout.str()
    assert "gated 0 of 9 layers: 0 green, 0 to look at, 0 red" in text
    assert ALONE.format("model") + f"such as {saved.NAMES[0]} (preservation 0.5625 > 0.5)" in text
    assert "✗" not in text
    assert text.count("✓") == 4, "the averages, and nothing else"
    assert text.count("  not gated, would fail: preservation 0.5625 > 0.5") == 2, "in its block and in the table"
    report = (pytester.path / "o.md").read_text()
    assert "Gated 0 of 9 layers on text.txt: **0 green, 0 to look at, 0 red**." in report
    assert "1 of them would have failed" in report
    assert report.count("| not gated |") == 8
    assert "| ✓ |" not in report
    assert json.loads((pytester.path / "o.json").read_text())["gated_layers"] == 0


def test_averages_and_drift_that_no_test_judged_bear_no_mark(replay: Replay, pytester: pytest.Pytester) -> None:
    """Where the layers alone are judged, averages and drift that would fail are shown as no verdict."""
    whole = saved.full()
    unaudited = {key: value for key, value in whole.about.items() if key != "audit"}
    saved.save(pytester.path / "full.json", dataclasses.replace(whole, about=unaudited))
    bounds = "nullspace_threshold=drift divergence 1e-9 1e-8\nmodel leakage 1e-9 1e-8"
    result = replay("-v", "-k", "layers", "--nullspace-report=o.md", "-o", bounds, stats="full.json")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "gated 2 of 2 layers: 2 green, 0 to look at, 0 red",
            "  drift on the preserved text*",
            "*base: the base; no test judged this drift",
            "reading (averages over all layers; no test judged them):",
            "  preservation *",
        ]
    )
    assert "✗" not in result.stdout.str() + (pytester.path / "o.md").read_text()
    assert "The averages over all layers; no test judged them:" in (pytester.path / "o.md").read_text()


def test_a_run_that_stopped_gated_what_it_judged(replay: Replay, pytester: pytest.Pytester) -> None:
    """After -x the layers whose tests never ran are not counted as passed."""
    saved.save(pytester.path / "bad.json", ONE_BAD)
    result = replay("-x", stats="bad.json")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["gated 1 of 9 layers: 0 green, 0 to look at, 1 red", "the tests of 8 measured layers were *none of them*"]
    )


def test_layers_measured_for_a_users_test_are_not_gated(replay: Replay, pytester: pytest.Pytester) -> None:
    """A user's test of the whole run has every layer measured; the gate counts those that have a test of its own."""
    saved.save(pytester.path / "bad.json", ONE_BAD)
    pytester.makepyfile("def test_run(nullspace_run): assert nullspace_run.complete")
    result = replay("-k", "test_run or layers.1.", stats="bad.json")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["gated 3 of 9 layers: 3 green, 0 to look at, 0 red", "the tests of 6 measured layers*1 of them would have*"]
    )


def test_weights_that_no_test_judged_are_not_gated(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """With the weights alone likewise: `frozen` by itself gates no layer."""
    chosen = ("--nullspace-weights-only", "--nullspace-init=runs/ft", "-k", "frozen", "--nullspace-report=o.md")
    result = gate(*chosen, quick=())
    assert result.ret == 0
    told = (
        "gated on weights, activations not measured: 0 of 21 layers, 0 failed, none measured; "
        "the tests of 21 more were left out or not run, 21 would have failed"
    )
    assert told in result.stdout.str()
    assert told in (pytester.path / "o.md").read_text()
    assert "✗ model" not in result.stdout.str()


@pytest.fixture
def two(replay: Replay, pytester: pytest.Pytester) -> Replay:
    """Gate two saved runs, ``stats.json`` and ``b.json``, of which the second is bad."""
    saved.save(pytester.path / "b.json", saved.run(down_norm=6.0))
    return lambda *args: replay("--nullspace-stats=b.json", *args)


NO_TEST = "nullspace: NOT GATED: none of the tests of b.json was selected; leave out what selects *, or b.json itself"


@pytest.mark.parametrize(
    "chosen",
    [
        ("stats.json",),
        (f"stats.json::{saved.NAMES[1]}",),
        ("stats.json", "test_own.py"),
        ("stats.json::model", "-n", "2"),
        ("--ignore=b.json", "stats.json"),
        ("-k", "stats.json"),
        ("--deselect=b.json",),
    ],
)
def test_a_run_of_which_nothing_was_judged_is_not_green(
    two: Replay, pytester: pytest.Pytester, chosen: tuple[str, ...]
) -> None:
    """Whatever selects the tests of one run alone, the other that was given is told as not gated, with exit 1."""
    pytester.makepyfile(test_own="def test_own(): pass")
    result = two(*chosen)
    assert result.ret == 1
    assert "failed" not in result.parseoutcomes()
    result.stdout.fnmatch_lines([NO_TEST])


def test_each_run_needs_one_verdict_alone(two: Replay, pytester: pytest.Pytester) -> None:
    """A selection that leaves each run a test is as green as its tests."""
    two("stats.json", "b.json::model").assert_outcomes(passed=len(saved.NAMES) + 2)
    result = two("-k", "layers.2.")
    assert result.ret == 0
    result.assert_outcomes(passed=6, deselected=14)


def test_a_run_without_a_test_is_told_also_where_another_failed(two: Replay, pytester: pytest.Pytester) -> None:
    """That the named run failed does not hide that the other was not gated."""
    result = two("stats.json", "--nullspace-threshold=preservation:0.01:0.02")
    assert result.ret == 1
    result.stdout.fnmatch_lines([NO_TEST])
