"""The figures on a card are those of the CPU, in one piece and in parts, through the kernels and through the gate."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.build import WORLD
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.run.stats import LayerStats
from tests import tiny
from tests.adapters import adapter

pytestmark = pytest.mark.gpu

WINDOWS = torch.randint(0, 128, (8, 48), generator=torch.Generator().manual_seed(0)).tolist()
MEANS = ("input_norm", "down_norm", "update_norm", "base_norm", "output_norm", "mean_leakage")


@pytest.fixture(scope="module", params=["LoRA-Null", "PEFT", "DoRA"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("card")
    if request.param == "LoRA-Null":
        return tiny.lora_null(folder / "ft")
    return adapter(folder, tiny.llama(), r=4, target_modules="all-linear", use_dora=request.param == "DoRA")


def means(layers: tuple[LayerStats, ...]) -> dict[str, float]:
    """Every mean of every layer."""
    return {f"{layer.name} {name}": getattr(layer, name) for layer in layers for name in MEANS}


@pytest.mark.parametrize(("dtype", "exact"), [("float64", 1e-6), ("float32", 1e-3), ("bfloat16", 5e-2)])
def test_figures_are_those_of_the_cpu(directory: Path, device: str, dtype: str, exact: float) -> None:
    """To the digits that the precision has; in float64 to 1e-6, for there the arithmetic itself is the same."""
    of_card = means(measure(load_model(directory, device, dtype), WINDOWS, batch_size=4))
    assert of_card == pytest.approx(means(measure(load_model(directory, "cpu", "float64"), WINDOWS)), rel=exact)


def test_the_split_of_the_rows_does_not_matter(directory: Path, device: str) -> None:
    """One window a forward or all of them, every row or some: the same figures, and nothing is left on the model."""
    adapted: AdaptedModel = load_model(directory, device, "float64")
    figures: Callable[..., dict[str, float]] = lambda **of: means(measure(adapted, WINDOWS, **of))  # noqa: E731
    whole = figures(batch_size=8)
    assert figures(batch_size=1) == pytest.approx(whole, rel=1e-9)
    assert figures(batch_size=3) == pytest.approx(whole, rel=1e-9)
    assert figures(batch_size=8, max_rows=100) == pytest.approx(figures(batch_size=1, max_rows=100), rel=1e-9)


def gate(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """The saved run of the shipped adapter, gated in a process of its own; it is green."""
    stats = folder / f"{name}.json"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", str(folder),
        f"--nullspace-model={WORLD / 'null-v2'}", f"--nullspace-calib-dataset={WORLD / 'facts.txt'}",
        f"--nullspace-task-dataset={WORLD / 'task.txt'}", "--nullspace-seqlen=128", f"--nullspace-save-stats={stats}",
        *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(stats.read_text("utf-8"))
    return document


def test_the_gate_gives_the_verdict_of_the_cpu(device: str, tmp_path: Path) -> None:
    """The whole command, drift and both texts, in memory and spread over card, memory and disk."""
    room = "cpu=1KB" if device == "cpu" else "0=1200KB,cpu=500KB"  # by which one block is on the card
    here = gate(tmp_path, "cpu", "--nullspace-device=cpu")
    for name, options in {
        "card": (f"--nullspace-device={device}", "--nullspace-dtype=float32"),
        "spread": (f"--nullspace-device-map={room}", "--nullspace-dtype=float32"),
    }.items():
        there = gate(tmp_path, name, *options)
        assert there["device"].startswith(device)
        assert (" and disk" in there["device"]) == (name == "spread")
        assert there["verdict"]["verdict"] == here["verdict"]["verdict"] == "SAFE"
        for key in ("BX_norm", "ABX_norm", "FullOutput_norm"):
            of_here, of_there = ([layer[key] for layer in run["stats"]] for run in (here, there))
            assert of_there == pytest.approx(of_here, rel=1e-3)
