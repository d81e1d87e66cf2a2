"""What a forward frees is kept for the next, where the C library can; what stays is not looked through for cycles."""

import gc
import platform
import subprocess
import sys
import weakref
from contextlib import suppress

import pytest

from pytest_nullspace.measuring.memory import set_aside, uncollected

FREED = """
import ctypes
from pytest_nullspace.measuring.memory import keep_freed_memory, keeping_little
{keep}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = [libc.malloc(20 << 20) for _ in range(4)]
for block in blocks:
    libc.free(block)
libc.mallinfo2.restype = type("mallinfo2", (ctypes.Structure,), {{
    "_fields_": [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks "
                 "fordblks keepcost".split()]}})
print(libc.mallinfo2().fordblks >> 20)
"""


def kept(keep: str, **env: str) -> int:
    """MiB that stay with the process of the 80 that it freed."""
    code = FREED.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_was_freed_is_kept() -> None:
    """Blocks of the size of activations stay with the process, which else gives every one of them back."""
    assert kept("pass") < 20
    assert kept("assert keep_freed_memory()") >= 80


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_the_users_own_settings_of_the_allocator_stand() -> None:
    """Where the user has told glibc how to keep memory, nothing is changed."""
    assert kept("assert not keep_freed_memory()", MALLOC_ARENA_MAX="2") < 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_where_memory_is_scarce_large_blocks_are_given_back() -> None:
    """While a model is streamed no weight stays with the process once it is freed, and afterwards they do again."""
    entered = "keep_freed_memory(); scarce = keeping_little(); scarce.__enter__()"
    assert kept(entered) < 20
    assert kept(f"{entered}; scarce.__exit__(None, None, None)") >= 80


HELD = """
import ctypes
from pathlib import Path
from pytest_nullspace.measuring.memory import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) >> 10
before, blocks = resident(), []
for _ in range(4):
    blocks.append(libc.malloc(20 << 20))
    ctypes.memset(blocks[-1], 1, 20 << 20)
    libc.malloc(64)
for block in blocks:
    libc.free(block)
kept = resident() - before
give_back_freed_memory()
print(kept, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_was_freed_amid_what_is_used_is_given_back_on_demand() -> None:
    """Blocks between which something small stays are kept otherwise, so that a streamed model's heap would grow."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True, env={})
    kept, after = map(int, done.stdout.split())
    assert kept >= 78
    assert after < 4


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    """Cycles are not looked for inside, and afterwards as the user has it, also where an import failed."""
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with suppress(ImportError), uncollected():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("others", [False, True])
def test_what_was_there_before_is_not_looked_through_until_the_end(others: bool) -> None:
    """Cycles made inside go as ever, those of before at the end; what somebody else set aside stays so."""

    class Cycle:
        def __init__(self) -> None:
            self.own = self

    before = Cycle()
    if others:
        gc.freeze()
    try:
        held = gc.get_freeze_count()
        with set_aside(lambda: None):
            old, new = weakref.ref(before), weakref.ref(Cycle())
            del before
            gc.collect()
            assert new() is None
            assert old() is not None
        assert (gc.get_freeze_count() > 0) == others
        assert not others or abs(gc.get_freeze_count() - held) < held / 2
        gc.collect()
        assert (old() is None) != others
    finally:
        gc.unfreeze()
