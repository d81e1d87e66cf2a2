"""The tracking of benchmark ratios: what counts as a regression."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import track

BEFORE = {"a[cpu]": {"pass_over_bare_forward": 1.02}, "b[cpu]": {"share_of_copy_bandwidth": 0.8}}


@pytest.mark.parametrize(
    ("now", "regressed"),
    [
        ({"a[cpu]": {"pass_over_bare_forward": 1.2}, "b[cpu]": {"share_of_copy_bandwidth": 0.7}}, 0),
        ({"a[cpu]": {"pass_over_bare_forward": 1.3}, "b[cpu]": {"share_of_copy_bandwidth": 0.9}}, 1),
        ({"a[cpu]": {"pass_over_bare_forward": 0.5}, "b[cpu]": {"share_of_copy_bandwidth": 0.6}}, 1),
        ({"c[cuda]": {"share_of_copy_bandwidth": 0.1}}, 0),
    ],
)
def test_a_ratio_regresses_in_its_own_direction(now: track.Ratios, regressed: int) -> None:
    """The pass may not become dearer, nor the share of bandwidth smaller, by more than the margin."""
    assert sum(worse for _, worse in track.compared(now, BEFORE)) == regressed


def test_only_ratios_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are left out; a run without any ratio fails, and writing makes it the baseline of its device alone."""

    def run(share: float, device: str = "a card") -> dict[str, object]:
        one = {"fullname": "a", "stats": {"mean": 1}, "extra_info": {"share_of_copy_bandwidth": share}}
        return {"benchmarks": [one], "machine_info": {"device": device}}

    assert track.ratios(run(0.5)) == {"a": {"share_of_copy_bandwidth": 0.5}}
    file = tmp_path / "run.json"
    monkeypatch.setattr(track, "BASELINE", tmp_path / "baseline.json")
    (tmp_path / "baseline.json").write_text("{}")
    for document, arguments, code in (
        (run(0.5), ["--write"], 0), (run(0.5), [], 0), (run(0.2), [], 1), (run(0.2, "another"), [], 0),
        (run(0.2, "another"), ["--write"], 0), (run(0.2), [], 1), ({"benchmarks": []}, [], 1),
    ):  # fmt: skip
        file.write_text(json.dumps(document))
        monkeypatch.setattr("sys.argv", ["track", str(file), *arguments])
        assert track.main() == code


def test_the_committed_baseline_holds_ratios_of_every_kind() -> None:
    """What CI compares with is there, for the reduction and for the pass."""
    held = json.loads(track.BASELINE.read_text("utf-8"))
    assert {ratio for of in held.values() for told in of.values() for ratio in told} == set(track.LOWER_IS_BETTER)


def test_what_the_reduction_writes_keeps_its_keys(tmp_path: Path) -> None:
    """Who reads the file of ``--benchmark-json`` finds in it what was always there: no key more, and none less."""
    file = tmp_path / "run.json"
    test = "tests/benchmarks/test_reduction.py::test_layer_update[576-float32-cpu]"
    options = ("-o", "addopts=--strict-markers", "--benchmark-only", "-p", "no:randomly", "-p", "no:cacheprovider")
    command = [
        sys.executable,
        "-m",
        "pytest",
        test,
        *options,
        f"--benchmark-json={file}",
        f"--basetemp={tmp_path / 't'}",
    ]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, env=alone)
    document = json.loads(file.read_text("utf-8"))
    assert set(document) == {"machine_info", "commit_info", "benchmarks", "datetime", "version"}
    (told,) = document["benchmarks"]
    assert set(told) == {"group", "name", "fullname", "params", "param", "extra_info", "options", "stats"}
    assert (told["group"], told["fullname"]) == ("reduction", test)
    assert set(told["extra_info"]) == {"bytes_per_second", "copy_bytes_per_second", "share_of_copy_bandwidth"}
    assert {"min", "max", "mean", "stddev", "median", "rounds", "iterations", "ops"} <= set(told["stats"])
    assert track.device(document) == platform.machine()
    assert any(
        track.ratios(document).keys() <= of.keys() for of in json.loads(track.BASELINE.read_text("utf-8")).values()
    )
