"""A real model: exactness, cost and memory on SmolLM2-135M under a LoRA-Null-v2 adapter of rank 32.

Build it with ``python -m fixtures.build smollm2 --out DIR`` and run
``NULLSPACE_REAL=DIR pytest tests/benchmarks/test_real.py -o addopts= -p no:randomly -s``.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.run.stats import LayerStats
from pytest_nullspace.text.sources import FileText
from pytest_nullspace.text.tokenizer import load_tokenizer
from pytest_nullspace.text.windows import draw_windows
from tests.benchmarks.reference import bare
from tests.plain import read_text

REAL = os.environ.get("NULLSPACE_REAL")
pytestmark = pytest.mark.skipif(not REAL, reason="NULLSPACE_REAL does not name a folder made by fixtures.build smollm2")

WINDOWS, SEQLEN = 16, 1024
ALTERNATIONS = 5
EXACT = 1e-6


def prepared(windows: int = WINDOWS, dtype: torch.dtype = torch.float32) -> tuple[AdaptedModel, list[list[int]]]:
    """The trained model and its windows of preserved text."""
    assert REAL is not None
    directory = Path(REAL) / "trained"
    text = read_text(FileText(Path(REAL) / "preserved.txt"))
    drawn = draw_windows(text, load_tokenizer(directory), count=windows, seqlen=SEQLEN, seed=42)
    adapted = load_model(open_checkpoint(directory), torch.device("cpu"), dtype)
    return adapted, [list(window.tokens) for window in drawn]


def naive(adapted: AdaptedModel, windows: list[list[int]]) -> dict[str, list[float]]:
    """Every mean of every layer by its definition in float64 on the very inputs of the float32 forward."""
    sums: dict[str, Tensor] = {}
    projectors = {
        name: torch.linalg.pinv(layer.down_matrix()) @ layer.down_matrix() for name, layer in adapted.layers.items()
    }

    def add(name: str, x: Tensor) -> None:
        layer, x = adapted.layers[name], x.double().flatten(0, -2)
        up, base = layer.up.weight, layer.base.weight
        assert isinstance(up, Tensor)
        assert isinstance(base, Tensor)
        bx = x @ layer.down_matrix().mT
        abx, wx = bx @ up.double().mT, x @ base.double().mT
        leakage = (x @ projectors[name]).norm(dim=1).square() / x.norm(dim=1).square()
        parts = torch.stack([t.norm(dim=1).sum() for t in (x, bx, abx, wx, abx + wx)] + [leakage.sum()])
        sums[name] = sums.get(name, torch.zeros(6, dtype=torch.float64)) + parts

    handles = [
        layer.layer.register_forward_hook(lambda _, args, __, name=name: add(name, args[0]))
        for name, layer in adapted.layers.items()
    ]
    bare(adapted, windows)
    for handle in handles:
        handle.remove()
    rows = sum(map(len, windows))
    return {name: (total / rows).tolist() for name, total in sums.items()}


def figures(layer: LayerStats) -> list[float]:
    assert layer.mean_leakage is not None
    assert layer.down_norm is not None
    return [
        layer.input_norm, layer.down_norm, layer.update_norm, layer.base_norm, layer.output_norm, layer.mean_leakage,
    ]  # fmt: skip


def test_every_figure_is_that_of_naive_float64_arithmetic() -> None:
    """All 210 layers, four windows: every mean agrees with float64 arithmetic on the same inputs to 1e-6 relative."""
    adapted, windows = prepared(windows=4)
    want = naive(adapted, windows)
    errors = sorted(
        (max(abs(a / b - 1) for a, b in zip(figures(layer), want[layer.name], strict=True)), layer.name)
        for layer in measure(adapted, windows)
    )
    print(f"\nrelative error: median {errors[len(errors) // 2][0]:.1e}, largest {errors[-1][0]:.1e} at {errors[-1][1]}")
    assert len(errors) == 210
    assert errors[-1][0] < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.benchmark(group="real pass")
def test_pass_over_bare_decoder_forward(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    """The pass over the bare forward of the decoder on the same windows, alternating in one process."""
    adapted, windows = prepared(dtype=dtype)
    bare(adapted, windows[:2])
    measure(adapted, windows[:2])
    ratios, seconds = [], []
    for _ in range(ALTERNATIONS):
        start = time.perf_counter()
        bare(adapted, windows)
        middle = time.perf_counter()
        measure(adapted, windows)
        end = time.perf_counter()
        seconds.append((middle - start, end - middle))
        ratios.append((end - middle) / (middle - start))
    benchmark.pedantic(measure, (adapted, windows[:1]), rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info["pass_over_bare_forward"] = statistics.median(ratios)
    print(
        f"\n{dtype}: ratios {[round(r, 3) for r in ratios]}, seconds {[tuple(round(s, 1) for s in p) for p in seconds]}"
    )


def test_peak_memory_over_the_bare_forward() -> None:
    """Peak memory of the pass in a process of its own, beside that of the bare forward and for four times the rows."""

    def peak(what: str, count: int) -> float:
        code = (
            "from tests.benchmarks.reference import peak_memory; from tests.benchmarks.test_real import *\n"
            f"adapted, windows = prepared(windows={count})\n{what}(adapted, windows)\n"
            "print(peak_memory() / 2**10)"
        )
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    peaks = {f"{what} of {count}": peak(what, count) for what in ("bare", "measure") for count in (2, 8)}
    print("\npeak memory, GiB:", {key: round(value, 2) for key, value in peaks.items()})
    assert peaks["measure of 8"] < 1.05 * peaks["measure of 2"]
