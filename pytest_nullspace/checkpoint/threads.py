"""How many threads numpy's BLAS takes: one, where many small matrices are factored or many layers at once."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads64_")


class _Threads(NamedTuple):
    get: Callable[[], int]
    set: Callable[[int], None]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this context numpy's own OpenBLAS takes one thread; a numpy of another making is left as it is.

    On a busy machine the threads of a small factorisation wait for each other ten times as long as they work.
    """
    threads = _openblas()
    before = 0 if threads is None else threads.get()
    try:
        if threads is not None:
            threads.set(1)
        yield
    finally:
        if threads is not None:
            threads.set(before)


@cache
def _openblas() -> _Threads | None:
    """The library that lies in numpy's wheel, which is loaded already."""
    import numpy as np

    place = Path(np.__file__).parent
    for file in (*place.parent.glob("numpy.libs/*openblas*"), *place.glob(".dylibs/*openblas*")):
        try:
            library: Any = ctypes.CDLL(str(file))
        except OSError:
            continue
        for name in _NAMES:
            if hasattr(library, name.format("set")):
                return _Threads(getattr(library, name.format("get")), getattr(library, name.format("set")))
    return None
