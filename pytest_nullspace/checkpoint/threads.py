"""Many small matrices, or many layers at once: how many threads work, and how many numpy's BLAS takes in each."""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")

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


def side_by_side(work: Callable[[_Item], _Found], items: Iterable[_Item], most: int) -> tuple[_Found, ...]:
    """What ``work`` gives of each of ``items``, ``most`` at once at most, each with BLAS on one thread."""
    with one_thread(), ThreadPoolExecutor(max_workers=min(most, os.cpu_count() or 1)) as pool:
        return tuple(pool.map(work, items))


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
