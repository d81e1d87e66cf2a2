"""One outcome in a folder that several processes share: the first that asks makes it, the others read it."""

from collections.abc import Callable
from pathlib import Path

from pytest_nullspace.errors import MeasurementError, NullspaceError, StatsError
from pytest_nullspace.run.saved import from_json, write, write_atomically
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.settings import PREFIX


class SharedOutcome:
    """The outcome of one run of the gate."""

    def __init__(self, folder: Path, number: int) -> None:
        self._lock = folder / f"{number}.lock"
        self._started = folder / f"{number}.started"
        self._measured = folder / f"{number}.json"
        self._failed = folder / f"{number}.failed"
        self._teller = folder / f"{number}.teller"

    def get_or(self, measure: Callable[[], RunStats | NullspaceError]) -> RunStats | NullspaceError:
        """What was measured, or why not; ``measure`` is called where no process has begun to."""
        from filelock import FileLock

        with FileLock(self._lock):
            outcome = self.peek()
            if outcome is not None:
                return outcome
            if self._started.exists():
                return MeasurementError(
                    "the worker that measured this checkpoint died before it had finished, perhaps out of memory, or "
                    f"found no room in {self._started.parent}; lower {PREFIX}seqlen or {PREFIX}batch-size, or run "
                    "without -n to see it happen"
                )
            self._started.touch()
            outcome = measure()
            if isinstance(outcome, NullspaceError):
                write_atomically(self._failed, str(outcome))
            else:
                try:
                    write(outcome, self._measured)
                except StatsError as error:
                    return error
            return outcome

    def peek(self) -> RunStats | NullspaceError | None:
        """What was measured, or why not; None where no process has come to an end."""
        if self._measured.exists():
            return from_json(self._measured.read_text("utf-8"), str(self._measured))
        return MeasurementError(self._failed.read_text("utf-8")) if self._failed.exists() else None

    def teller(self, test: str) -> str:
        """The test that tells what went wrong, of all processes the first that asked to."""
        try:
            with self._teller.open("x", encoding="utf-8") as file:
                file.write(test)
        except FileExistsError:
            return self._teller.read_text("utf-8")
        except OSError:  # no room: better told by each process than by none
            pass
        return test
