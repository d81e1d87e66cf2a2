"""The hashes of a checkpoint's weights, taken by a thread while its model is loaded and measured."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from threading import Event

from pytest_nullspace.checkpoint import Checkpoint

_AT_ONCE = 4 << 20
"""Bytes that are hashed at once: neither reading nor hashing them holds the interpreter, only what is in between."""

Hashes = Mapping[str, str]


def hashes(checkpoint: Checkpoint, until: Event | None = None) -> Hashes:
    """The SHA-256 of each file of its weights, by the file's name.

    Raises:
        CancelledError: ``until`` was set before the end, so that no hash of a part is taken for that of the whole.
    """
    found = {}
    buffer = memoryview(bytearray(_AT_ONCE))
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        digest = sha256()
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                if until is not None and until.is_set():
                    raise CancelledError
                digest.update(buffer[:count])
        found[file.name] = digest.hexdigest()
    return found


@contextmanager
def hashed_meanwhile(checkpoint: Checkpoint) -> Iterator[Callable[[], Hashes]]:
    """Within this context its weights are hashed, and what is given waits for the end of that."""
    over = Event()
    with ThreadPoolExecutor(1, "nullspace-hashes") as thread:
        found = thread.submit(hashes, checkpoint, over)
        try:
            yield found.result
        finally:
            over.set()
