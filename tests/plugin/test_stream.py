"""A model that does not fit, its blocks read one after the other, each for all windows: the same figures."""

import json
import re
import signal
from pathlib import Path

import pytest

from fixtures.build import WORLD
from tests.plugin.conftest import LOOSE, Gate
from tests.plugin.test_device_map import SHIPPED, numbers

KILLS = """\
import os, signal

from pytest_nullspace.model.shelf import Shelf

clear, done = Shelf.clear, []

def killed(shelf, number):
    clear(shelf, number)
    done.append(number)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

Shelf.clear = killed
"""
"""A plugin that kills its process at the end of the third block."""
PEAK = """\
from pathlib import Path

def pytest_unconfigure(config):
    status = Path("/proc/self/status")
    if status.exists():
        peak, = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        print("peak", peak.split()[1])
"""
"""A plugin that tells the most memory that its process had, in kB."""


def test_streamed_figures_are_those_of_the_model_in_memory(
    folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last saved digit, of the shipped adapter with a task text, its drift and its headroom.

    Also where the process was killed: the same command goes on, and leaves nothing behind. What it takes of memory it
    tells before, to a tenth.
    """
    cache, documents = folder / "cache", {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (folder / "kills.py").write_text(KILLS)
    (folder / "peak.py").write_text(PEAK)
    for name, more in (("whole", ()), ("streamed", ("--nullspace-device-map=stream",))):
        saved = *LOOSE, "--nullspace-task-dataset=text.txt", f"--nullspace-save-stats={name}.json", *more
        if more:
            killed = gate("-p", "kills", *saved, model=str(WORLD / "null-v2"), quick=SHIPPED, auto=True)
            assert killed.ret == -signal.SIGKILL
            assert len(list(cache.rglob("*.stowed"))) == 1
        result = gate("-p", "peak", *saved, model=str(WORLD / "null-v2"), quick=SHIPPED, auto=True)
        assert result.parseoutcomes()["passed"] > 20
        documents[name] = json.loads((folder / f"{name}.json").read_text())
    result.stdout.fnmatch_lines(["its blocks are read one after the other", "*it goes on after block 2 of 3"])
    assert not list(cache.rglob("*"))
    told = re.search(
        r"^nullspace: the blocks are read .* takes up to ([\d.]+) ([MG])B of memory", result.stdout.str(), re.M
    )
    assert told
    if peak := re.search(r"^peak (\d+)$", result.stdout.str(), re.M):
        assert 0.9 < float(told[1]) * {"M": 1e6, "G": 1e9}[told[2]] / (1024 * float(peak[1])) < 1.1
    whole, streamed = (dict(numbers({key: of[key] for key in ("stats", "drift")})) for of in documents.values())
    assert len(whole) > 100
    assert streamed == whole
