"""Ten thousand layers: what reading, collecting, judging and reporting cost grows with their number, not its square."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

import pytest_nullspace
from tests import saved
from tests.benchmarks.headers import sharded

PACKAGE = str(Path(pytest_nullspace.__file__).parent)
FEW, MANY = 30, 120
LINEAR = 1.15
"""Calls for four times the layers, at most, as a share of four times the calls; a quadratic part would double them."""


def calls(work: Callable[[], object]) -> int:
    """How many functions and generators of this package are entered in ``work``."""
    count = 0

    def counted(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def names(count: int) -> list[str]:
    return [f"model.layers.{i}.self_attn.q_proj" for i in range(count)]


def audited(count: int) -> dict[str, object]:
    moved = dict.fromkeys(("down", "angle", "base", "tolerance"), 0.0) | {"up": 1.0, "bias": None}
    layers = [{"name": name, **moved} for name in names(count)]
    return {"initial": "init", "variant": "v2", "decided": "so", "layers": layers, "others": [], "compared": 0}


@pytest.mark.parametrize("option", ["--nullspace-compare=start.json", "--nullspace-init=start.json"])
def test_a_run_costs_in_proportion_to_its_layers(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """Judging and reporting a run with its audit and another run: four times the layers are four times the calls."""
    monkeypatch.setenv("COLUMNS", "400")
    (pytester.path / "pytest.ini").write_text("[pytest]\n")

    def gated(count: int) -> int:
        run = saved.run(*names(count))
        about = {**run.about, "audit": audited(count)}
        saved.save(pytester.path / "stats.json", dataclasses.replace(run, about=about))
        start = [dataclasses.replace(layer, update_norm=0.0, up_weight_norm=0.0) for layer in run.layers]
        saved.save(pytester.path / "start.json", dataclasses.replace(run, layers=tuple(start)))
        options = ("-p", "no:randomly", "-W", "default", "--nullspace-stats=stats.json", "--nullspace-report=r.md")

        def work() -> None:
            pytester.runpytest_inprocess(*options, "--nullspace-save-stats=out.json", option).assert_outcomes(
                passed=count + 2
            )

        return calls(work)

    gated(1)  # what is imported once
    few, many = gated(FEW), gated(MANY)
    assert many < LINEAR * few * MANY / FEW, (few, many)


def test_collecting_costs_in_proportion_to_the_layers(pytester: pytest.Pytester) -> None:
    """Headers of shards read, layers checked and collected, four times as many: four times the calls."""

    def collected(count: int) -> int:
        sharded(pytester.path / f"ft{count}", count, shards=3)
        (pytester.path / f"ft{count}" / "tokenizer.json").write_text("{}")  # looked for, and not read

        def work() -> None:
            done = pytester.runpytest_inprocess("-p", "no:randomly", "--co", "-q", f"--nullspace-model=ft{count}")
            done.stdout.fnmatch_lines([f"{count + 1} tests collected*"])

        return calls(work)

    collected(7)
    few, many = collected(FEW), collected(MANY)
    assert many < LINEAR * few * MANY / FEW


def test_the_sparse_shards_are_whole_safetensors_files(tmp_path: Path) -> None:
    """What the benchmark collects is what a real checkpoint has: index, shards and config that fit together."""
    folder = sharded(tmp_path / "ft", 15, shards=4)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(weight_map) == 45
    assert {file.name for file in folder.glob("*.safetensors")} == set(weight_map.values())
