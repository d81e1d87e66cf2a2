"""Our pass against the reference's way to the same figures, at equal rows: time and peak memory."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.model import load_model
from tests import tiny
from tests.benchmarks.reference import cached, streaming, windows_of

ALTERNATIONS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 blocks 512 wide, of which 16k rows take 800 MB to keep."""
    model = tiny.llama(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=512
    )
    return tiny.lora_null(tmp_path_factory.mktemp("reference") / "ft", model, rank=32)


def peak(way: str, folder: Path, rows: int) -> float:
    """The peak memory of one way in a process of its own, in MiB."""
    command = [sys.executable, "-m", "tests.benchmarks.reference", way, str(folder), str(rows)]
    root = Path(__file__).parents[2]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)


@pytest.mark.parametrize("rows", [1024, 4096, 16384])
@pytest.mark.benchmark(group="reference")
def test_pass_over_the_reference(benchmark: BenchmarkFixture, folder: Path, rows: int) -> None:
    """Time, median of alternations, and peak memory as shares of the reference's; the figures agree to 1e-4."""
    adapted = load_model(open_checkpoint(folder), torch.device("cpu"), torch.float32)
    windows = windows_of(rows)
    ours, theirs = streaming(adapted, windows), cached(adapted, windows)
    assert all(ours[name] == pytest.approx(norms, rel=1e-4) for name, norms in theirs.items())
    ratios = []
    for _ in range(ALTERNATIONS):
        start = time.perf_counter()
        cached(adapted, windows)
        middle = time.perf_counter()
        streaming(adapted, windows)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    benchmark.pedantic(streaming, (adapted, windows[:2]), rounds=1)  # type: ignore[no-untyped-call]
    peaks = {way: peak(way, folder, rows) for way in ("streaming", "cached")}
    benchmark.extra_info |= {
        "time_over_reference": statistics.median(ratios),
        "memory_over_reference": peaks["streaming"] / peaks["cached"],
        "peak_mib": peaks,
    }
