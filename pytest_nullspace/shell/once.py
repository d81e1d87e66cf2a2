"""A measurement that is made once, by the first test that asks, and kept, good or bad, for all that follow."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from pytest_nullspace.errors import MeasurementError, NullspaceError, OptionError, first_line
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.shell.shared import SharedOutcome


class MeasuredOnce(ABC):
    """What is measured at most once in a run of pytest, whatever the number of its workers.

    Attributes:
        path: What is measured, for messages.
    """

    path: Path

    def __init__(self) -> None:
        self._outcome: RunStats | NullspaceError | None = None
        self._shared: SharedOutcome | None = None
        self._wrong: NullspaceError | None = None
        self._broken_off: BaseException | None = None
        self._teller: str | None = None

    @abstractmethod
    def _measure(self, progress: Callable[[int, int], None] | None) -> RunStats | NullspaceError:
        """The figures of the selected layers, or what prevented them."""

    @abstractmethod
    def _refusal(self, outcome: RunStats) -> OptionError | None:
        """Why the figures may not be judged, if so."""

    def share(self, folder: Path, number: int) -> None:
        """Keep the outcome in ``folder`` as well, for the other processes of this run of pytest."""
        self._shared = SharedOutcome(folder, number)

    def measured(self, progress: Callable[[int, int], None] | None = None) -> RunStats:
        """What was measured, measuring first if no process of this run has.

        Raises:
            NullspaceError: The measurement failed, now or before, and is not tried again; or the earlier run is not
                comparable.
        """
        if self._outcome is None:
            self._outcome = (
                self._made(progress) if self._shared is None else self._shared.get_or(lambda: self._made(progress))
            )
            self._wrong = self._outcome if isinstance(self._outcome, NullspaceError) else self._refusal(self._outcome)
            broken_off, self._broken_off = self._broken_off, None
            if broken_off is not None:
                raise broken_off
        if self._wrong is not None:
            raise self._wrong.with_traceback(None)
        assert isinstance(self._outcome, RunStats)
        return self._outcome

    def _made(self, progress: Callable[[int, int], None] | None) -> RunStats | NullspaceError:
        """The outcome; one that stays also where a timeout of the test, or Ctrl-C, breaks the measurement off."""
        try:
            return self._measure(progress)
        except BaseException as error:
            self._broken_off = error
            return MeasurementError(
                f"{self.path}: the measurement was broken off by {type(error).__name__}: {first_line(error)}; it is "
                "made once for all tests, within the first of them: give that one more time"
            )

    def tells(self, test: str) -> bool:
        """Whether ``test``, which met what went wrong, is the one that tells it; the others only name it."""
        if self._teller is None:
            self._teller = test if self._shared is None else self._shared.teller(test)
        return self._teller == test

    def peek(self) -> RunStats | None:
        """What was measured, if it was; nothing is measured now."""
        outcome = self._outcome if self._shared is None else self._shared.peek()
        return outcome if isinstance(outcome, RunStats) else None
