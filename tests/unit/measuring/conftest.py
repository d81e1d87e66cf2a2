"""Whole measurements of tiny checkpoints in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.pipeline import measure_checkpoint
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.settings import Settings
from tests import tiny

Measured = Callable[..., RunStats]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Measure a checkpoint on two windows, and on two of a task text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    (tmp_path / "task.txt").write_text(tiny.TEXT[::-1])

    def measure(directory: Path, **changes: Any) -> RunStats:
        given: dict[str, Any] = {
            "models": (), "stats": (), "base": None, "calib_dataset": "text.txt", "text_folder": tmp_path,
            "calib_size": 2, "calib_most": 128, "seqlen": 32, "max_activation_samples": None, "seed": 42,
            "batch_size": None, "device": "cpu", "dtype": "auto", "layers": "*", "stage": "trained", "overrides": (),
            "save_stats": None, "reports": (), "ranks": Ranks(), "task_folder": tmp_path, "task_dataset": "task.txt",
            "drift": None,
        }  # fmt: skip
        checkpoint = open_checkpoint(directory)
        names = [layer.name for layer in checkpoint.layers]
        return measure_checkpoint(checkpoint, Settings(**{**given, **changes}), names)

    return measure
