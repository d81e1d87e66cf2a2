"""Whole measurements of tiny checkpoints in this process."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.pipeline import measure_checkpoint
from pytest_nullspace.run.saved import to_json
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.settings import Settings
from tests import tiny
from tests.plugin.test_device_map import numbers

Measured = Callable[..., RunStats]


def measure(folder: Path, directory: Path, **changes: Any) -> RunStats:
    """Measure a checkpoint on two windows of ``text.txt`` and on two of ``task.txt``, which lie in ``folder``."""
    given: dict[str, Any] = {
        "models": (), "stats": (), "base": None, "calib_dataset": "text.txt", "text_folder": folder, "calib_size": 2,
        "calib_most": 128, "seqlen": 32, "max_activation_samples": None, "seed": 42, "batch_size": None,
        "device": "cpu", "dtype": "auto", "layers": "*", "stage": "trained", "overrides": (), "save_stats": None,
        "reports": (), "ranks": Ranks(), "task_folder": folder, "task_dataset": "task.txt", "drift": None,
    }  # fmt: skip
    checkpoint = open_checkpoint(directory)
    names = [layer.name for layer in checkpoint.layers]
    return measure_checkpoint(checkpoint, Settings(**{**given, **changes}), names)


def figures(run: RunStats) -> dict[str, float]:
    """All that was measured, as it is saved, by its place."""
    document = json.loads(to_json(run))
    return dict(numbers({key: document[key] for key in ("stats", "drift")}))


def write_texts(folder: Path) -> None:
    """Write the two texts."""
    (folder / "text.txt").write_text(tiny.TEXT)
    (folder / "task.txt").write_text(tiny.TEXT[::-1])


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Measure a checkpoint so, in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_texts(tmp_path)
    return partial(measure, tmp_path)
