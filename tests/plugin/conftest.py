"""Runs of the real plugin, each in a process of its own, on tiny checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import pytest_nullspace.shell.gate  # noqa: F401 (else each run in this process imports it anew, some of it twice)
from tests import saved, tiny

Gate = Callable[..., pytest.RunResult]
Replay = Callable[..., pytest.RunResult]

LOOSE = ("--nullspace-threshold=preservation:2:3", "--nullspace-threshold=leakage:5:6")
"""Bounds by which the random adapters of `tests.tiny` pass."""
QUICK = ("--nullspace-calib-dataset=text.txt", "--nullspace-calib-size=2", "--nullspace-seqlen=32")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny LoRA-Null checkpoint for the whole session; to be copied, never changed."""
    return tiny.lora_null(tmp_path_factory.mktemp("made") / "ft")


@pytest.fixture
def folder(pytester: pytest.Pytester) -> Path:
    """The test's own folder, with a text in it."""
    (pytester.path / "text.txt").write_text(tiny.TEXT)
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    return pytester.path


@pytest.fixture
def checkpoint(made: Path, folder: Path) -> Path:
    """A copy of it at ``runs/ft`` in the test's own folder, with a text beside."""
    copy = folder / "runs" / "ft"
    shutil.copytree(made, copy)
    return copy


@pytest.fixture
def gate(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Run pytest with the quick text options and a model, ``runs/ft`` unless told otherwise.

    Without drift unless ``auto`` is said or it is asked for: most tests are of something else.
    """
    monkeypatch.setenv("COLUMNS", "400")  # so that no line of the summary is cut

    def run(
        *args: str, model: str | None = "runs/ft", quick: tuple[str, ...] = QUICK, auto: bool = False
    ) -> pytest.RunResult:
        models = () if model is None else (f"--nullspace-model={model}",)
        drift = () if auto else ("--nullspace-no-drift",)
        if any(arg.startswith("--nullspace-calib-dataset=") for arg in args):  # a text of its own, not a further one
            quick = tuple(option for option in quick if not option.startswith("--nullspace-calib-dataset="))
        return pytester.runpytest_subprocess("-p", "no:randomly", *models, *drift, *quick, *args)

    return run


@pytest.fixture
def replay(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Replay:
    """Run pytest on a saved run, ``stats.json`` unless told otherwise."""
    monkeypatch.setenv("COLUMNS", "400")
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    saved.save(pytester.path / "stats.json")

    def run(*args: str, stats: str = "stats.json", apart: bool = False) -> pytest.RunResult:
        pytest_run = pytester.runpytest_subprocess if apart or "-n" in args else pytester.runpytest_inprocess
        return pytest_run("-p", "no:randomly", "-W", "default", f"--nullspace-stats={stats}", *args)

    return run
