"""Digests of files that are read for something else, piece by piece: taken from the same bytes.

SHA-256 goes from a file's beginning to its end. A piece that begins where the digest has come to is added to it; one
that begins later together with what lies between, if that is not still to come; any other is read again at the end.
"""

from collections.abc import Iterable
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from time import sleep

from pytest_nullspace.measuring.digests import PrefixDigest, add_to, no_prefix

_WAITING = 4
"""Pieces that may wait for the thread that adds them; then who reads them waits."""
_PATIENCE = 0.05
"""Seconds after which who waits looks whether it is over."""


class Followed:
    """Takes the digests, in a thread of its own."""

    def __init__(self, pieces: Iterable[tuple[Path, int]]) -> None:
        """Begin nothing yet.

        Args:
            pieces: Those that are to come: of which file, from which byte on.
        """
        self._prefixes: dict[Path, PrefixDigest] = {}
        self._to_come: dict[Path, set[int]] = {}
        for file, begin in pieces:
            self._to_come.setdefault(file, set()).add(begin)
        self._pieces: Queue[tuple[Path, int, memoryview]] = Queue(_WAITING)
        self._ended = False
        Thread(target=self._run, name="nullspace-hashes", daemon=True).start()

    def add(self, file: Path, begin: int, piece: memoryview) -> None:
        """Take a piece of a file, that begins with that byte and is not changed any more.

        Raises:
            CancelledError: It is over, so that who reads ahead reads no more either: pytest would wait for it.
        """
        while not self._ended:
            with suppress(Full):
                self._pieces.put((file, begin, piece), timeout=_PATIENCE)
                return
        raise CancelledError

    def prefix(self, file: Path) -> PrefixDigest:
        """The digest of a file as far as it has come, once all pieces are added."""
        while self._pieces.unfinished_tasks and not self._ended:
            sleep(_PATIENCE)
        return self._prefixes.get(file, no_prefix(file))

    def end(self) -> None:
        """End the thread; nobody waits for it any more."""
        self._ended = True

    def _run(self) -> None:
        while not self._ended:
            with suppress(Empty):
                piece = self._pieces.get(timeout=_PATIENCE)
                with suppress(Exception):  # whatever it is, the rest is read at the end, and that tells
                    self._take(*piece)
                del piece
                self._pieces.task_done()

    def _take(self, file: Path, begin: int, piece: memoryview) -> None:
        known = self._prefixes.get(file, no_prefix(file))
        to_come = self._to_come.get(file, set())
        to_come.discard(begin)
        if begin < known.size or any(known.size <= other < begin for other in to_come):
            return
        digest = known.digest.copy()
        if begin > known.size:
            add_to(digest, file, None, known.size, begin - known.size)
        digest.update(piece)
        self._prefixes[file] = PrefixDigest(digest, begin + len(piece))
