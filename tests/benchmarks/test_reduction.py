"""Throughput of the activation reduction, as a share of what the memory of the device can do.

Run by ``tox -e bench``; ordinary test runs skip these.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from pytest_nullspace import kernels
from tests.benchmarks.conftest import DEVICES
from tests.benchmarks.reference import wait_for

RANK = 128
NUMBERS, NUMBERS_ELSEWHERE = 1 << 25, 1 << 28
"""Of the rows whose norms are taken: more than any cache holds, so that memory is what limits them; and on a card so
many that it takes longer over them than Python over the next launch."""


def synchronised(work: Callable[[], object], device: str) -> Callable[[], None]:
    """``work``, ended only when the device has done it."""

    def run() -> None:
        work()
        wait_for(device)

    return run


def seconds(work: Callable[[], object], device: str, rounds: int = 15) -> float:
    """Median time of ``work``; on a card of one of many that follow each other, as in a pass they do."""
    if device != "cpu":
        alone, many = seconds_of([work], device, rounds), seconds_of([work] * 11, device, rounds)
        return (many - alone) / 10
    return seconds_of([work], device, rounds)


def seconds_of(work: Sequence[Callable[[], object]], device: str, rounds: int) -> float:
    """Median time of all of ``work`` together."""
    run, times = synchronised(lambda: [one() for one in work], device), []
    run()
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [576, 4096, 11008, 14336])
@pytest.mark.benchmark(group="reduction")
def test_row_norms(benchmark: BenchmarkFixture, device: str, dtype: torch.dtype, width: int) -> None:
    """The norms of many rows, with bytes per second beside those of a plain copy of the same rows."""
    rows = torch.randn((NUMBERS if device == "cpu" else NUMBERS_ELSEWHERE) // width, width, device=device).to(dtype)
    copy = torch.empty_like(rows)
    _record(benchmark, device, rows.nbytes, lambda: kernels.row_norms(rows), lambda: copy.copy_(rows))
    torch.testing.assert_close(kernels.row_norms(rows).double(), rows.double().norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [576, 4096])
@pytest.mark.benchmark(group="reduction")
def test_layer_update(benchmark: BenchmarkFixture, device: str, dtype: torch.dtype, width: int) -> None:
    """All figures of one layer from one window of 1024 rows: two reads of the output's width, one of the rank's."""
    base, output = (torch.randn(1024, width, device=device).to(dtype) for _ in range(2))
    down = torch.randn(1024, RANK, device=device).to(dtype)
    norms = torch.rand(1024, device=device) + 1
    factors = kernels.factors(torch.eye(RANK), torch.eye(RANK), 1.0).matrices.to(device, torch.float32)

    def update() -> Tensor:
        projected, change = kernels.inner_norms(down.float(), factors)
        bx, wx, y = map(kernels.row_norms, (down, base, output))
        return kernels.sums(input=norms, down=bx, update=change, base=wx, output=y, projected=projected)

    parts: list[tuple[Tensor, Tensor]] = [(part, torch.empty_like(part)) for part in (base, output, down)]

    def copy() -> None:
        for source, target in parts:
            target.copy_(source)

    _record(benchmark, device, sum(source.nbytes for source, _ in parts), update, copy)
    assert update()[0] == len(down)


def _record(
    benchmark: BenchmarkFixture, device: str, nbytes: int, work: Callable[[], object], copy: Callable[[], object]
) -> None:
    """Time ``work``; a copy reads and writes, so its bandwidth is twice its bytes over its time."""
    copied = seconds(copy, device)
    worked = seconds(work, device)
    benchmark(synchronised(work, device))
    benchmark.extra_info |= {
        "bytes_per_second": nbytes / worked,
        "copy_bytes_per_second": 2 * nbytes / copied,
        "share_of_copy_bandwidth": nbytes / worked / (2 * nbytes / copied),
    }
