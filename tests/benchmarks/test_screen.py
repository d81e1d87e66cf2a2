"""Eight adapters screened together against one of them, over the same windows of the same base."""

import statistics
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pytest_nullspace.measuring.screen import places
from tests.adapters import on_the_base
from tests.benchmarks.screening import MANY, randoms, screening_of

ALTERNATIONS = 5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's own


@pytest.mark.benchmark(group="screen")
def test_eight_screened_over_one(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """CPU seconds of eight over those of one, median of alternations, on a decoder of 4 layers 512 wide."""
    base, held = on_the_base(randoms(tmp_path))
    ratios = []
    for _ in range(ALTERNATIONS):
        start = time.process_time()
        screening_of(base, held[0], places(held[:1]))
        middle = time.process_time()
        screening_of(base, held[0], places(held))
        ratios.append((time.process_time() - middle) / (middle - start))
    benchmark.pedantic(screening_of, (base, held[0], places(held)), rounds=1)  # type: ignore[no-untyped-call]
    assert len(held) == MANY
    benchmark.extra_info["eight_over_one"] = statistics.median(ratios)
