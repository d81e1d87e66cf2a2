"""Benchmarks run as a gate does: what a forward frees is kept for the next; and they tell on which device they ran."""

from typing import Any

import pytest
import torch

from pytest_nullspace.measuring.loading import device_name
from pytest_nullspace.measuring.memory import keep_freed_memory

DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
"""Where a benchmark runs; the second is what ``--device`` says."""


@pytest.fixture(scope="session", autouse=True)
def _as_in_a_gate() -> None:
    """Keep freed memory, in every benchmark, for all that it compares."""
    keep_freed_memory()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device of one of `DEVICES`."""
    named = "cpu" if request.param == "cpu" else request.config.getoption("--device")
    assert isinstance(named, str)
    return named


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """By which name the baseline knows the device."""
    machine_info["device"] = device_name(torch.device(config.getoption("--device") or "cpu"))
