"""What the gate does to pytest's own summary: its failures are told once for all layers, and the verdict comes last."""

import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import pytest
from _pytest.junitxml import xml_key

from pytest_nullspace.errors import NullspaceWarning
from pytest_nullspace.judging.candidates import Candidate, best
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report import terminal, verdict
from pytest_nullspace.report.layout import wrapped
from pytest_nullspace.shell.progress import WAITS

_FAILED = "error", "failed"
"""How the terminal calls tests that did not pass."""
LISTED = 3
"""Tests of a run of the gate that the list of failed ones names at most."""


class LastWord:
    """A plugin whose hooks wrap those of pytest's terminal.

    The report of a run groups its failures. So pytest shows no block for each of them, and lists a few; with ``-v`` all
    are listed and a few shown, with ``-vv`` all. What it counts, and what every other plugin sees, is left as it is.
    """

    def __init__(self, decisions: Mapping[str, Decision], prefixes: Mapping[str, str]) -> None:
        """Take the verdicts, by name, and how the ids of each run's tests begin; both are filled in later."""
        self._decisions, self._prefixes = decisions, prefixes

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # around the terminal's, which ends with pytest's counts
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """End with the verdict on each run."""
        yield
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if isinstance(reporter, pytest.TerminalReporter):
            others = [one for what in _FAILED for one in reporter.stats.get(what, ()) if not self._is_ours(one)]
            if others and self._decisions:
                failed = f"{len(others):,} other test{'s' if len(others) > 1 else ''} failed, which no verdict is of"
                terminal.write_lines(reporter, [(failed, Tier.FAIL)])
            for name, decision in self._decisions.items():
                of = name if len(self._decisions) > 1 else None
                terminal.write_lines(reporter, [(verdict.last(decision, of), decision.call.tier)])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
        """Within the hook the terminal's own sections leave out what is told elsewhere."""
        left_out = 0 if terminalreporter.verbosity >= terminal.BLOCKS else self._shorten(terminalreporter)
        yield
        if left_out:
            terminalreporter.write_line(f"... and {left_out:,} more (all with -v)")

    def _shorten(self, reporter: pytest.TerminalReporter) -> int:
        """Have the terminal leave out what is told elsewhere; how many tests its list of failed ones will lack."""
        failed = self._failed(reporter)
        whole = {report.nodeid for report in _unlike(report for report in failed if not self._is_told(report))}
        named = whole.union(*(self._listed(name, failed) for name in self._decisions))

        def shows(ids: Collection[str]) -> Callable[[Any], bool]:
            return lambda report: not self._is_ours(report) or report.nodeid in ids

        hidden = sum(report.nodeid not in named for report in failed)
        if reporter.verbosity > 0:
            _wrap(reporter, "summary_errors", _FAILED, shows(named))
            _wrap(reporter, "summary_failures", _FAILED, shows(named), hidden)
            return 0
        for section in ("summary_errors", "summary_failures"):
            _wrap(reporter, section, _FAILED, shows(whole))
        _wrap(reporter, "summary_warnings", ("warnings",), lambda told: not self._is_our_warning(told))
        if not reporter.hasopt("f") or _asked_for_all(reporter):
            return 0
        _wrap(reporter, "short_test_summary", _FAILED, shows(named))
        return hidden

    def _is_ours(self, report: Any) -> bool:
        return isinstance(report, pytest.TestReport) and report.nodeid.startswith(tuple(self._prefixes.values()))

    def _is_told(self, report: pytest.TestReport) -> bool:
        """Whether it is told elsewhere: in the report, of what failed by its figures or weights; or by another test."""
        by_figure = report.when == "call" and any(name in ("tier", "gated_on") for name, _ in report.user_properties)
        return by_figure or message(report).startswith(WAITS)

    def _is_our_warning(self, told: Any) -> bool:
        ours = (told.nodeid or "").startswith(tuple(self._prefixes.values()))
        return ours and f"{NullspaceWarning.__name__}: " in told.message

    def _failed(self, reporter: pytest.TerminalReporter) -> list[pytest.TestReport]:
        return [report for what in _FAILED for report in reporter.stats.get(what, ()) if self._is_ours(report)]

    def _listed(self, name: str, failed: Sequence[pytest.TestReport]) -> Sequence[str]:
        """The ids of one run's tests that are listed: of each group of failures the worst, then the first."""
        prefix = self._prefixes[name]
        here = [report.nodeid for report in failed if report.nodeid.startswith(prefix)]
        worst = [f"{prefix}{reason.subject}" for reason in self._decisions[name].reasons]
        return list(dict.fromkeys([*(test for test in worst if test in {*here}), *here[:LISTED]]))[:LISTED]


def _unlike(reports: Iterable[pytest.TestReport]) -> Iterator[pytest.TestReport]:
    """The first of those that say the same."""
    told: set[str] = set()
    for report in reports:
        if (said := message(report)) not in told:
            told.add(said)
            yield report


def message(report: pytest.TestReport) -> str:
    """What a failed test says, without the line by which xdist names the worker."""
    return str(report.longrepr).strip()


def _asked_for_all(reporter: pytest.TerminalReporter) -> bool:
    """Whether the list of all failed tests was asked for by name, as ``-rf`` and ``-rA`` do."""
    asked = reporter.config.option.reportchars
    return "A" in asked or (asked != "fE" and "f" in asked)


def _wrap(
    reporter: pytest.TerminalReporter,
    section: str,
    categories: Sequence[str],
    shown: Callable[[Any], bool],
    hidden: int = 0,
) -> None:
    """Have a section of the terminal see the reports alone of which ``shown`` is true; it tells how many are hidden."""
    own = getattr(reporter, section, None)
    if own is not None:  # else a terminal of another making, which has sections of its own

        def fit(report: Any) -> Any:
            return report if section == "short_test_summary" else _fitting(report, reporter)

        def seeing() -> None:
            held = {what: reporter.stats[what] for what in categories if what in reporter.stats}
            try:
                reporter.stats.update({what: [fit(one) for one in told if shown(one)] for what, told in held.items()})
                own()
            finally:
                reporter.stats.update(held)
            if hidden:
                reporter.write_line(f"... and {hidden:,} more, each with its figures below (whole with -vv)")

        setattr(reporter, section, seeing)


def _fitting(report: Any, reporter: pytest.TerminalReporter) -> Any:
    """A report as the terminal shows it: a message without a traceback in lines that fit, all else as it is."""
    longrepr = getattr(report, "longrepr", None)
    entries = getattr(getattr(longrepr, "reprtraceback", None), "reprentries", None)
    bare = isinstance(longrepr, str) if entries is None else all(entry.style == "value" for entry in entries)
    if not bare:
        return report
    shown, width = copy(report), terminal.columns(reporter._tw)
    lines = str(longrepr).rstrip().splitlines()
    shown.longrepr = "\n".join(part for line in lines for part in wrapped(line, width)) + "\n"
    return shown


def record(config: pytest.Config, decisions: Mapping[str, Decision], told: Callable[[], Sequence[Candidate]]) -> None:
    """Tell the verdicts, and what tells several apart, as properties of the suite, where JUnit's file is written."""
    xml = config.stash.get(xml_key, None)
    if xml is None:
        return
    candidates = told()
    chosen, several = best(candidates), len(decisions) > 1
    for (name, decision), one in zip(decisions.items(), candidates, strict=True):
        of = f"[{name}]" if several else ""
        xml.add_global_property(f"nullspace_verdict{of}", str(decision.call))
        xml.add_global_property(f"nullspace_why{of}", decision.sentence)
        for figure, value in one.figures.items():
            if math.isfinite(value):
                xml.add_global_property(f"nullspace_{figure.replace('-', '_')}{of}", repr(value))
        if one.worst:
            xml.add_global_property(f"nullspace_worst_layer{of}", one.worst)
    if several:
        xml.add_global_property("nullspace_best", "" if chosen is None else chosen.name)
