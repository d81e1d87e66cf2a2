"""Several processes that share one measurement: the figures of one, one report, and no green where one was lost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pytest_nullspace
from fixtures.build import WORLD
from tests.plugin.conftest import Gate
from tests.plugin.test_world import EXACT

ROOT = WORLD.parents[1]
TORCHRUN = "-m", "torch.distributed.run", "--standalone"
OPTIONS = (
    "-p", "no:randomly", "-p", "no:cacheprovider", f"--nullspace-model={WORLD / 'null-v2'}", "--nullspace-seqlen=128",
)  # fmt: skip
TEXT = f"--nullspace-calib-dataset={WORLD / 'facts.txt'}"
TASK = f"--nullspace-task-dataset={WORLD / 'task.txt'}"
BOUNDED = 60
"""Seconds in which whatever goes wrong has ended; it takes a few, and half an hour where one would wait for another."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run Python in an empty folder, with this repository's packages."""

    def python(*args: str, timeout: float | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *args],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return python


def together(run: Run, port: int, *of_each: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """Run pytest in one process for each, with its own options, and no launcher that would end the others."""

    def one(rank: int) -> subprocess.CompletedProcess[str]:
        launched = {"RANK": str(rank), "WORLD_SIZE": str(len(of_each)), "MASTER_ADDR": "127.0.0.1"}
        command = "-m", "pytest", *OPTIONS, "--tb=short", *of_each[rank]
        return run(*command, timeout=BOUNDED, **launched, MASTER_PORT=str(port))

    with ThreadPoolExecutor() as threads:
        return list(threads.map(one, range(len(of_each))))


def document(file: Path) -> dict[str, Any]:
    """The statistics without what differs between two runs of one command, and the number of processes."""
    told: dict[str, Any] = json.loads(file.read_text())
    told.pop("measured")
    told["settings"].pop("processes")
    return told


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a JSON document by their paths."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for key, inner in items for path, leaf in flat(inner, f"{name}/{key}").items()}


def require_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Hold what several processes found to what one did."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        # A margin is a small difference of figures, so it is held to 1e-6 of theirs, not of its own.
        small = EXACT if "margin" in name else 0.0
        exact = not isinstance(value, float)
        assert found[name] == (value if exact else pytest.approx(value, rel=EXACT, abs=small)), name


RED = "--nullspace-threshold=leakage:1e-9:1e-8"
OWN = """
import os
def test_own():
    assert os.environ.get("RANK", "0") == "0"
"""
SLOW = """
import time
def pytest_unconfigure(config):
    if config.pluginmanager.get_plugin("terminalreporter"):
        time.sleep(6)
        print("the end")
"""


def test_the_figures_and_the_report_are_those_of_one_process(run: Run, tmp_path: Path) -> None:
    """Two processes and four save what one does to 1e-6, and print one report, whole also where the job is red."""
    every = TASK, "--nullspace-drift", "--nullspace-spectrum", "--nullspace-max-activation-samples=2001"
    gate = "-m", "pytest", *OPTIONS, TEXT, *every, "--nullspace-calib-size=auto:19"
    alone = run(*gate, "--nullspace-save-stats=1.json", WORLD_SIZE="1", RANK="0")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    green = run(*TORCHRUN, "--nproc-per-node=2", *gate, "--nullspace-save-stats=2.json")
    assert green.returncode == 0, green.stdout + green.stderr
    assert "23 passed" in green.stdout
    (tmp_path / "test_own.py").write_text(OWN)
    (tmp_path / "conftest.py").write_text(SLOW)
    red = run(*TORCHRUN, "--nproc-per-node=4", *gate, ".", RED, "--nullspace-save-stats=4.json", "--junit-xml=j.xml")
    assert red.returncode == 1
    assert "22 failed, 2 passed" in red.stdout
    assert red.stdout.rstrip().endswith("the end")
    assert 'tests="24"' in (tmp_path / "j.xml").read_text()
    assert "nullspace: process 3: FAILED test_own.py::test_own" in red.stderr
    one = flat(document(tmp_path / "1.json"))
    for size, result in (2, green), (4, red):
        assert f"nullspace: {size} processes, each reads its share of the windows" in result.stdout
        assert result.stdout.count("gated 21 of 21 layers") == result.stdout.count("test session starts") == 1
        assert json.loads((tmp_path / f"{size}.json").read_text())["settings"]["processes"] == size
        told, alike = document(tmp_path / f"{size}.json"), one
        if result is red:  # by another bound, so of verdicts it alone tells another
            assert told.pop("verdict")["verdict"] == "DO NOT DEPLOY"
            alike = {name: value for name, value in one.items() if not name.startswith("/verdict/")}
        require_same(flat(told), alike)


KILLED = """
import os, pathlib, signal, time
from pytest_nullspace.model.shelf import Shelf
clear, done = Shelf.clear, []
def killed(shelf, number):
    clear(shelf, number)
    done.append(number)
    kept = pathlib.Path(os.environ["XDG_CACHE_HOME"]).rglob
    if f"{os.environ['RANK']} at {len(done)}" in os.environ["KILLED"].split(", "):
        while not all(list(kept(f"*-{rank}/*.stowed")) for rank in (0, 1)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
Shelf.clear = killed
"""
"""A plugin that kills the processes that ``KILLED`` names at the end of that block, once both have kept one."""


def test_a_job_whose_process_is_killed_at_a_block_ends_and_the_next_goes_on(run: Run, tmp_path: Path) -> None:
    """A SIGKILL, of both or of one, ends the job non-zero and soon, with nothing saved; the same command then goes on.

    Its figures, drift and headroom are those of one process that has the whole model in memory, and what was kept goes.
    """
    cache, options = tmp_path / "cache", {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / "kills.py").write_text(KILLED)
    options["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(tmp_path)))
    asked = "--nullspace-calib-size=6", "--nullspace-device-map=stream", "--nullspace-save-stats=s.json"
    gate = "-m", "pytest", *OPTIONS, TEXT, TASK, *asked
    for at in "0 at 2, 1 at 2", "1 at 1":  # first both at once, then of what goes on the second
        killed = run(*TORCHRUN, "--nproc-per-node=2", *gate, "-p", "kills", timeout=BOUNDED, KILLED=at, **options)
        assert killed.returncode == 1
        assert "Signal 9 (SIGKILL)" in killed.stderr
        assert not (tmp_path / "s.json").exists()
        assert {file.parent.name[-2:] for file in cache.rglob("*.stowed")} == {"-0", "-1"}
    (tmp_path / "kills.py").write_text("")
    again = run(*TORCHRUN, "--nproc-per-node=2", *gate, "-p", "kills", timeout=BOUNDED, **options)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "an earlier run did not come to its end, so it goes on after block " in again.stdout
    assert not list(cache.rglob("*"))
    alone = pytest_nullspace.gate(
        WORLD / "null-v2", str(WORLD / "facts.txt"), str(WORLD / "task.txt"), seqlen=128, calib_size=6
    )
    alone.save(tmp_path / "alone.json")
    expected, found = (json.loads((tmp_path / name).read_text()) for name in ("alone.json", "s.json"))
    assert found["settings"]["processes"] == 2
    require_same(flat(found["stats"]), flat(expected["stats"]))
    require_same(flat(found["drift"]), flat(expected["drift"]))


def test_what_fails_in_one_fails_in_all(run: Run) -> None:
    """An error of one process fails every process, and process 0 tells it although it had none of its own."""
    (reports, silent) = together(run, 29711, (TEXT,), ("--nullspace-calib-dataset=gone.txt",))
    assert reports.returncode == silent.returncode == 1
    assert "process 1 of 2 failed, so the others ended as well: " in " ".join(reports.stdout.split())
    assert "23 errors in" in reports.stdout
    assert "gone.txt" in reports.stdout
    assert "Traceback" not in reports.stdout + reports.stderr + silent.stderr
    assert not silent.stdout


def test_what_makes_no_sense_together_is_a_usage_error(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun beside xdist, a saved run, and half an environment are refused before anything is loaded."""
    model = str(WORLD / "null-v2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    half = gate(model=model)
    half.stderr.fnmatch_lines(["ERROR: WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set; start *"])
    for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29799"}.items():
        monkeypatch.setenv(name, value)
    xdist = gate("-n", "2", model=model)
    xdist.stderr.fnmatch_lines(["ERROR: -n shares out the tests of one process, but torchrun started 2 that measure *"])
    saved = gate("--nullspace-stats=s.json", model=None)
    saved.stderr.fnmatch_lines(["ERROR: --nullspace-stats: a saved run leaves nothing for 2 processes to measure; *"])
    assert half.ret == xdist.ret == saved.ret == pytest.ExitCode.USAGE_ERROR


def test_without_a_model_the_plugin_is_inert_under_a_launcher(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test suite that gates nothing runs under torchrun as without the plugin, in every process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    pytester.makepyfile(
        "import sys\n"
        "def test_own():\n"
        "    heavy = {'torch', 'pytest_nullspace.shell.gate', 'pytest_nullspace.measuring.distributed'}\n"
        "    assert not heavy & set(sys.modules)\n"
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*test session starts*"])
