"""How many threads numpy's BLAS takes."""

import numpy as np
import pytest

from pytest_nullspace.checkpoint import threads


def test_numpy_takes_one_thread_and_then_as_many_as_before() -> None:
    """The wheels of numpy have a library that can be told so."""
    library = threads._openblas()
    if library is None:
        pytest.skip(f"numpy {np.__version__} has no OpenBLAS of its own")
    before = library.get()
    library.set(2)
    try:
        with threads.one_thread():
            assert library.get() == 1
        assert library.get() == 2
    finally:
        library.set(before)


def test_a_numpy_of_another_making_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no such library nothing is set, and all runs."""
    monkeypatch.setattr(threads, "_openblas", lambda: None)
    with threads.one_thread():
        assert np.linalg.norm(np.linalg.inv(np.eye(4))) == 2
