"""How a measurement shows while it runs and when it fails, without disturbing what pytest captures."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import pytest

from pytest_nullspace.errors import NullspaceError

if TYPE_CHECKING:
    from pytest_nullspace.run.stats import RunStats
    from pytest_nullspace.shell.runs import GatedRun


WAITS = "not measured: see the first error of"
"""How the message of a test begins that only waited for what another one tells."""
FIRST, BETWEEN_LINES, AT_MOST = 10.0, 20.0, 300.0
"""Seconds to the first line where no line can be written anew, and between two: at first, and at most, ever twice."""
NEARLY = 30.0
"""Seconds left of which nothing more is told there."""
LONG = 600.0
"""Seconds left from which it is said how to have fewer."""


class Progress:
    """How far a measurement is, in words; where nothing was read yet, that it loads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, cores: int | None = None) -> None:
        self._clock = clock
        self._cores = len(os.sched_getaffinity(0)) if cores is None and hasattr(os, "sched_getaffinity") else cores
        self._began = clock()
        self._last = self._began + FIRST - BETWEEN_LINES
        self._between: float | None = None
        self._first: float | None = None
        self._hinted = False

    def told(self, done: int, windows: int) -> str:
        """The state after ``done`` of so many windows; before the first their number is 0 while the model loads."""
        if done == 0 or self._first is None:
            self._first = self._clock()
        if not windows:
            return "nullspace: reading the text and loading the model"
        if done == 0:
            return f"nullspace: loaded in {_span(self._first - self._began)}; {windows} windows to read"
        left = self.left(done, windows)
        return f"nullspace: window {done} of {windows}" + (f", about {_span(left)} left" if done < windows else "")

    def left(self, done: int, windows: int) -> float:
        """The seconds that the other windows take, if they take as long as those before them."""
        return 0.0 if self._first is None or not done else (self._clock() - self._first) / done * (windows - done)

    def hint(self, done: int, windows: int) -> str | None:
        """What would make it quicker, once, where that matters on a CPU."""
        asked = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(asked) if asked.isdecimal() else 0
        if self._hinted or not done:
            return None
        crowded = self._cores is not None and threads > self._cores
        if not crowded and self.left(done, windows) < LONG:
            return None
        self._hinted = True
        told = [f"OMP_NUM_THREADS={threads} is more than the {self._cores} cores there are"] if crowded else []
        if self.left(done, windows) >= LONG:
            if self._cores is not None and 0 < threads < self._cores:
                told.append(f"OMP_NUM_THREADS={threads} uses {threads} of {self._cores} cores")
            told.append(f"fewer than {windows} windows are read with --nullspace-calib-size=N")
        return "\n".join(f"nullspace: {line}" for line in told)

    def worth(self, done: int, windows: int) -> bool:
        """Whether it is told where no line can be written anew: that a long load ended, and how far a long pass is."""
        if windows and not done and self._first is not None and self._first - self._began >= FIRST:
            self._last = self._clock()
            return True
        return self.left(done, windows) >= NEARLY and self.due()

    def due(self) -> bool:
        """Whether the last line is long enough ago for another one."""
        if self._clock() - self._last < (self._between or BETWEEN_LINES):
            return False
        self._last = self._clock()
        self._between = BETWEEN_LINES if self._between is None else min(AT_MOST, 2 * self._between)
        return True


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Showing:
    """Shows how far a measurement is: on a terminal in one line that it rewrites, elsewhere in one now and then."""

    def __init__(self, reporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        self._reporter, self._capture = reporter, config.pluginmanager.get_plugin("capturemanager")
        self._progress, self._shown = Progress(), False

    def __call__(self, done: int, windows: int) -> None:
        """Show that so many of so many ``windows`` are done."""
        told, hint = self._progress.told(done, windows), self._progress.hint(done, windows)
        if self._reporter.isatty and not self._shown:
            self._reporter.ensure_newline()
        self._shown = True
        if hint is not None:
            self._write(hint, stays=True)
        if self._reporter.isatty:
            self._write(told, stays=False)
        elif self._progress.worth(done, windows):
            self._write(told, stays=True)

    def say(self, line: str) -> None:
        """Show what stays."""
        self._write(f"nullspace: {line}", stays=True)

    def end(self) -> None:
        """Remove the line."""
        if self._shown and self._reporter.isatty:
            self._write("", stays=False)

    def _write(self, line: str, stays: bool) -> None:
        capture, reporter = self._capture, self._reporter
        with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
            if stays:
                reporter.rewrite("", erase=True) if reporter.isatty else reporter.ensure_newline()
                reporter.write_line(line)
            else:
                reporter.rewrite(line, erase=True)
            reporter.flush()


@contextmanager
def showing_progress(config: pytest.Config) -> Iterator[Showing | None]:
    """Within this context it is told how far the measurement is; None where there is no terminal of pytest's."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not isinstance(reporter, pytest.TerminalReporter) or reporter.verbosity < 0:
        yield None
        return
    showing = Showing(reporter, config)
    try:
        yield showing
    finally:
        showing.end()


def measured(run: "GatedRun", test: pytest.Item, config: pytest.Config) -> "RunStats":
    """What was measured of ``run``, measuring first if ``test`` is the first to ask.

    One test tells whole what prevents it. The others only say that they wait for that, and none shows a traceback.
    """
    try:
        with showing_progress(config) as progress:
            return run.measured(progress)
    except NullspaceError as error:
        message = str(error) if run.tells(test.nodeid) else f"{WAITS} {run.name}"
        raise pytest.fail.Exception(message, pytrace=False) from None
