"""The hashes of a checkpoint's weights and of its base, taken by a thread while its model is loaded and measured."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.measuring.digests import PrefixOf, file_sha256, no_prefix, of_base
from pytest_nullspace.measuring.followed import Followed

Hashes = Mapping[str, str]


class Hashed(NamedTuple):
    """What was hashed.

    Attributes:
        weights: Each file of the checkpoint's weights, by its name.
        base: What a run tells of the base.
    """

    weights: Hashes
    base: Mapping[str, Any]


def hashes(checkpoint: Checkpoint, until: Event | None = None, prefix_of: PrefixOf = no_prefix) -> Hashes:
    """The SHA-256 of each file of its weights, by the file's name.

    Raises:
        CancelledError: ``until`` was set before the end, so that no hash of a part is taken for that of the whole.
    """
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    return {file.name: file_sha256(file, until, prefix_of) for file in files}


class Hashing:
    """Takes the hashes in a thread."""

    def __init__(self, checkpoint: Checkpoint, base: Path | None) -> None:
        """Begin nothing yet."""
        self._checkpoint, self._base = checkpoint, base
        self._over = Event()
        self._thread = ThreadPoolExecutor(1, "nullspace-hashes")
        self._followed: Followed | None = None
        self._found: Future[Hashed] | None = None

    def begin(self) -> None:
        """Begin, unless that was done."""
        if self._found is not None:
            return
        prefix_of, over = no_prefix if self._followed is None else self._followed.prefix, self._over
        self._found = self._thread.submit(
            lambda: Hashed(
                hashes(self._checkpoint, over, prefix_of), of_base(self._checkpoint, self._base, over, prefix_of)
            )
        )

    def follow(self, pieces: Iterable[tuple[Path, int]]) -> Callable[[Path, int, memoryview], None]:
        """From here on take them from what is read for something else, until they are asked for.

        Args:
            pieces: What is to be read so: of which file, from which byte on.

        Returns:
            To be called with each of them once it is read.
        """
        self._over.set()
        self._over, self._found, self._followed = Event(), None, Followed(pieces)
        return self._followed.add

    def __call__(self) -> Hashed:
        """What was hashed, once that is done."""
        self.begin()
        assert self._found is not None
        return self._found.result()

    def end(self) -> None:
        """End it where it is."""
        self._over.set()
        if self._followed is not None:
            self._followed.end()
        self._thread.shutdown()


@contextmanager
def hashed_meanwhile(checkpoint: Checkpoint, base: Path | None = None, *, at_once: bool = True) -> Iterator[Hashing]:
    """Within this context its weights and its base are hashed, from now on or once that is asked for or begun."""
    hashing = Hashing(checkpoint, base)
    if at_once:
        hashing.begin()
    try:
        yield hashing
    finally:
        hashing.end()
