"""What comes before and beside the pass: reading many layers, and measuring few of them."""

import json
import statistics
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import load_model
from tests import tiny
from tests.benchmarks.headers import sharded
from tests.benchmarks.reference import windows_of


@pytest.mark.benchmark(group="shell")
def test_reading_ten_thousand_layers(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Every header of a sharded checkpoint read and checked, over parsing their JSON alone."""
    folder = sharded(tmp_path / "ft", 10_000)

    def parse() -> None:
        json.loads((folder / "model.safetensors.index.json").read_bytes())
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as stream:
                json.loads(stream.read(int.from_bytes(stream.read(8), "little")))

    ratios = []
    for _ in range(5):
        start = time.process_time()
        parse()
        middle = time.process_time()
        assert len(open_checkpoint(folder).layers) == 10_000
        ratios.append((time.process_time() - middle) / (middle - start))
    benchmark.pedantic(open_checkpoint, (folder,), rounds=3)  # type: ignore[no-untyped-call]
    benchmark.extra_info["reading_over_parsing"] = statistics.median(ratios)


@pytest.mark.benchmark(group="shell")
def test_one_block_of_eight_costs_about_an_eighth(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The pass of the first block's layers alone, over its share of the whole pass."""
    model = tiny.llama(hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8)
    folder = tiny.lora_null(tmp_path / "ft", model, rank=16)
    adapted, windows = load_model(open_checkpoint(folder), torch.device("cpu"), torch.float32), windows_of(1024, 256)
    first = [name for name in adapted.layers if name.startswith("model.layers.0.")]
    measure(adapted, windows)
    ratios = []
    for _ in range(9):
        start = time.process_time()
        measure(adapted, windows)
        middle = time.process_time()
        measure(adapted, windows, layers=first)
        ratios.append(8 * (time.process_time() - middle) / (middle - start))
    benchmark.pedantic(measure, (adapted, windows), {"layers": first}, rounds=3)  # type: ignore[no-untyped-call]
    benchmark.extra_info["selected_over_share"] = statistics.median(ratios)
