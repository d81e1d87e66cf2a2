"""The process's memory: what one forward frees is kept for the next, what one model held is given back."""

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 << 20
"""Bytes of the largest block that glibc lets be taken from its heap."""

_LARGEST_KEPT_WHERE_SCARCE = 1 << 20
"""The same for a model that is streamed."""

_MOST_KEPT = 256 << 20
"""Bytes of freed blocks that may stay unused."""


def keep_freed_memory(largest: int = _LARGEST_KEPT) -> bool:
    """Have glibc hand freed blocks of activations out again.

    By default it gives them back, and the kernel clears every page anew at the next forward: a tenth to a fifth of the
    time of a small model on a CPU.

    Args:
        largest: Bytes of the largest block that is kept so.

    Returns:
        Whether it was done: not with another C library, nor where the user has set glibc's own variables.
    """
    set_by_user = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if set_by_user or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, largest) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT))


@contextmanager
def keeping_little() -> Iterator[None]:
    """Within this context whatever is large, a weight or an activation, is given back once it is freed."""
    keep_freed_memory(_LARGEST_KEPT_WHERE_SCARCE)
    try:
        yield
    finally:
        keep_freed_memory()


def give_back_freed_memory() -> None:
    """Have glibc give all freed memory back, also what lies between blocks that are in use.

    What is kept of each block of a model, however small, lies amid activations and weights that are freed; without this
    the heap of a model that is streamed grows with every block.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def free_earlier_models() -> None:
    """Free the model of an earlier measurement, which else may lie in memory beside the next.

    Nothing refers to it any more, but accelerate's hooks, and frames that the import of a library leaves, hold it in
    cycles; and what was freed of an accelerator's memory is not what accelerate sees as free.
    """
    torch = sys.modules.get("torch")
    if torch is None:  # then none was measured
        return
    gc.collect()
    kind = getattr(torch.accelerator.current_accelerator(check_available=True), "type", None)
    if kind in ("cuda", "xpu"):  # on an Apple GPU is not measured
        getattr(torch, kind).empty_cache()


@contextmanager
def uncollected() -> Iterator[None]:
    """Within this context Python looks for no cycles; for imports, of which it finds none that could go.

    Torch and transformers make a million objects that stay, and looking through them again and again is a quarter of
    the time of their imports.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def set_aside(import_libraries: Callable[[], object]) -> Iterator[None]:
    """Within this context what is there once libraries were imported is not looked through for cycles.

    Their objects came while Python looked for none, so it would look through them now, thrice: as new ones, as older
    ones, with all. That takes a fifth of a second each time. What is made from here on it looks through as ever.
    """
    with uncollected():
        import_libraries()
        is_ours = not gc.get_freeze_count()  # else somebody has set aside what is to stay so
        if is_ours:
            gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()
