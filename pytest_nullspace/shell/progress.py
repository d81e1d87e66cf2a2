"""How a measurement shows while it runs and when it fails, without disturbing what pytest captures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest

from pytest_nullspace.errors import NullspaceError

_TOLD = pytest.StashKey[set[str]]()


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


def fail_measuring(error: NullspaceError, config: pytest.Config) -> NoReturn:
    """Fail the test that needed the measurement; only the first to meet an error tells more than its first line."""
    told, message = config.stash.setdefault(_TOLD, set()), str(error)
    first = message.partition("\n")[0] if message in told else message
    told.add(message)
    pytest.fail(first, pytrace=False)
