"""The hashes of a checkpoint's weights and of its base, taken by a thread while its model is loaded and measured."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.measuring.digests import file_sha256, of_base

Hashes = Mapping[str, str]


class Hashed(NamedTuple):
    """What was hashed.

    Attributes:
        weights: Each file of the checkpoint's weights, by its name.
        base: What a run tells of the base.
    """

    weights: Hashes
    base: Mapping[str, Any]


def hashes(checkpoint: Checkpoint, until: Event | None = None) -> Hashes:
    """The SHA-256 of each file of its weights, by the file's name.

    Raises:
        CancelledError: ``until`` was set before the end, so that no hash of a part is taken for that of the whole.
    """
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    return {file.name: file_sha256(file, until) for file in files}


@contextmanager
def hashed_meanwhile(checkpoint: Checkpoint, base: Path | None = None) -> Iterator[Callable[[], Hashed]]:
    """Within this context its weights and its base are hashed, and what is given waits for the end of that."""
    over = Event()
    with ThreadPoolExecutor(1, "nullspace-hashes") as thread:
        found = thread.submit(lambda: Hashed(hashes(checkpoint, over), of_base(checkpoint, base, over)))
        try:
            yield found.result
        finally:
            over.set()
