"""The measuring pass against the bare forward pass of the same decoder over the same windows."""

import statistics
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import load_model
from tests import tiny
from tests.benchmarks.conftest import DEVICES
from tests.benchmarks.reference import bare

ALTERNATIONS = 9


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.benchmark(group="pass")
def test_pass_over_bare_forward(
    benchmark: BenchmarkFixture, device: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Pass over bare forward, median of alternations, on a decoder of 8 layers 512 wide."""
    model = tiny.llama(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, max_position_embeddings=512
    )
    folder = tiny.lora_null(tmp_path_factory.mktemp("pass") / "ft", model, rank=32)
    adapted = load_model(open_checkpoint(folder), torch.device(device), torch.float32)
    windows = torch.randint(0, 128, (2, 512), generator=torch.Generator().manual_seed(0)).tolist()
    measure(adapted, windows)
    bare(adapted, windows)
    ratios = []
    for _ in range(ALTERNATIONS):
        start = time.perf_counter()
        bare(adapted, windows)
        middle = time.perf_counter()
        measure(adapted, windows)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    benchmark.pedantic(measure, (adapted, windows), rounds=3)  # type: ignore[no-untyped-call]
    benchmark.extra_info["pass_over_bare_forward"] = statistics.median(ratios)
