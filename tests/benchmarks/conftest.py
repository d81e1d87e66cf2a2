"""Benchmarks run as a gate does: what a forward frees is kept for the next."""

import pytest

from pytest_nullspace.measuring.memory import keep_freed_memory


@pytest.fixture(scope="session", autouse=True)
def _as_in_a_gate() -> None:
    """Keep freed memory, in every benchmark, for all that it compares."""
    keep_freed_memory()
