"""What the gate does to pytest's own summary: the verdict is the last line of all, and stands in JUnit's file."""

from collections.abc import Generator, Mapping

import pytest
from _pytest.junitxml import xml_key

from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.report import terminal, verdict


class LastWord:
    """A plugin whose hooks wrap those of pytest's terminal."""

    def __init__(self, decisions: Mapping[str, Decision]) -> None:
        self._decisions = decisions

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # around the terminal's, which ends with pytest's counts
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """End with the verdict on each run."""
        yield
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if isinstance(reporter, pytest.TerminalReporter):
            for name, decision in self._decisions.items():
                of = name if len(self._decisions) > 1 else None
                terminal.write_lines(reporter, [(verdict.last(decision, of), decision.call.tier)])


def record(config: pytest.Config, decisions: Mapping[str, Decision]) -> None:
    """Tell the verdicts as properties of the suite, where JUnit's file is written."""
    xml = config.stash.get(xml_key, None)
    if xml is None:
        return
    for name, decision in decisions.items():
        of = f"[{name}]" if len(decisions) > 1 else ""
        xml.add_global_property(f"nullspace_verdict{of}", str(decision.call))
        xml.add_global_property(f"nullspace_why{of}", decision.sentence)
