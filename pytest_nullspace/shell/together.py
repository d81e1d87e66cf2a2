"""One pass over the base for all adapters that are screened, whichever of their tests is the first to ask."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.errors import MeasurementError, NullspaceError, first_line
from pytest_nullspace.measuring.screening import screen_checkpoints
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.settings import Settings
from pytest_nullspace.shell.shared import SharedOutcome
from pytest_nullspace.text.readers import Text

Wanted = Callable[[], Collection[str]]
"""Gives, once collection has ended, the layers of an adapter that are to be screened."""


class Together:
    """All adapters of a run of pytest that are screened."""

    def __init__(self, settings: Settings, texts: dict[str, Text]) -> None:
        self._settings, self._texts = settings, texts
        self._asked: list[tuple[Checkpoint, Wanted]] = []
        self._found: dict[int, RunStats] | NullspaceError | None = None
        self._lock: Path | None = None
        self._shared: Sequence[SharedOutcome] = ()

    def add(self, checkpoint: Checkpoint, wanted: Wanted) -> Callable[[Callable[[int, int], None] | None], RunStats]:
        """One more; what is given screens all of them once, and gives the run of this one."""
        self._asked.append((checkpoint, wanted))
        return partial(self._of, len(self._asked) - 1)

    def share(self, folder: Path) -> None:
        """Keep what is found in ``folder`` as well, for the other processes of this run of pytest."""
        first = len(self._asked)  # the runs have the numbers below
        self._lock = folder / "screen.lock"
        self._shared = [SharedOutcome(folder, first + number) for number in range(len(self._asked))]

    def _of(self, number: int, progress: Callable[[int, int], None] | None) -> RunStats:
        if self._lock is None:
            return self._all(progress)[number]
        from filelock import FileLock

        with FileLock(self._lock):
            if self._shared[number].peek() is None:
                for one, (shared, (_, wanted)) in enumerate(zip(self._shared, self._asked, strict=True)):
                    if wanted():
                        shared.get_or(partial(self._outcome, one, progress))
            outcome = self._shared[number].peek()
        if isinstance(outcome, RunStats):
            return outcome
        raise outcome or MeasurementError("the screen was broken off in another worker, or found no room for its file")

    def _outcome(self, number: int, progress: Callable[[int, int], None] | None) -> RunStats | NullspaceError:
        try:
            return self._all(progress)[number]
        except NullspaceError as error:
            return error

    def _all(self, progress: Callable[[int, int], None] | None) -> dict[int, RunStats]:
        if self._found is None:
            asked = [(number, of, wanted()) for number, (of, wanted) in enumerate(self._asked) if wanted()]
            try:
                runs = screen_checkpoints(
                    [(of, names) for _, of, names in asked], self._settings, progress, self._texts
                )
                self._found = {number: run for (number, *_), run in zip(asked, runs, strict=True)}
            except BaseException as error:
                told = f"the screen of all adapters failed: {type(error).__name__}: {first_line(error)}"
                self._found = error if isinstance(error, NullspaceError) else MeasurementError(told)
                raise
            finally:
                self._texts = {}
        if isinstance(self._found, NullspaceError):
            raise self._found.with_traceback(None)
        return self._found
