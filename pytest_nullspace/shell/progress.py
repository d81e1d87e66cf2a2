"""How a measurement shows while it runs and when it fails, without disturbing what pytest captures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pytest_nullspace.errors import NullspaceError

if TYPE_CHECKING:
    from pytest_nullspace.run.stats import RunStats
    from pytest_nullspace.shell.runs import GatedRun


@contextmanager
def showing_progress(config: pytest.Config) -> Iterator[Callable[[int, int], None] | None]:
    """Within this context the callback rewrites one line of pytest's own terminal; None where there is none."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not isinstance(reporter, pytest.TerminalReporter) or not reporter.isatty or reporter.verbosity < 0:
        yield None
        return
    shown = False
    capture = config.pluginmanager.get_plugin("capturemanager")

    def write(line: str) -> None:
        if capture is None:
            reporter.rewrite(line, erase=True)
        else:
            with capture.global_and_fixture_disabled():
                reporter.rewrite(line, erase=True)
                reporter.flush()

    def show(done: int, windows: int) -> None:
        nonlocal shown
        if not shown:
            reporter.ensure_newline()
        shown = True
        write(f"nullspace: window {done} of {windows}")

    try:
        yield show
    finally:
        if shown:
            write("")


def measured(run: "GatedRun", test: pytest.Item, config: pytest.Config) -> "RunStats":
    """What was measured of ``run``, measuring first if ``test`` is the first to ask.

    One test tells whole what prevents it. The others only say that they wait for that, and none shows a traceback.
    """
    try:
        with showing_progress(config) as progress:
            return run.measured(progress)
    except NullspaceError as error:
        message = str(error) if run.tells(test.nodeid) else f"not measured: see the first error of {run.name}"
        raise pytest.fail.Exception(message, pytrace=False) from None
