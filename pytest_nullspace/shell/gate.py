"""The hooks of a run of pytest that gates: its nodes come in, its outcome is held complete, its reports go out."""

import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from pytest_nullspace.checkpoint.hub import local_directory
from pytest_nullspace.errors import NullspaceError, printable
from pytest_nullspace.judging.candidates import Candidate, best, candidate
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.screening import STATEMENT as SCREENED
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.judging.weights import STATEMENT
from pytest_nullspace.report import candidates, changes, screened, terminal
from pytest_nullspace.report.layout import wrapped
from pytest_nullspace.report.words import named
from pytest_nullspace.run import saved
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.run.texts import is_drift
from pytest_nullspace.settings import PREFIX, Settings, stats_file
from pytest_nullspace.shell import attest, cards, reports
from pytest_nullspace.shell.asked import lists_only, require_gated
from pytest_nullspace.shell.collect import CheckpointFile, GateItem, node_id, select
from pytest_nullspace.shell.decided import decided, lacking
from pytest_nullspace.shell.extras import HtmlExtras
from pytest_nullspace.shell.last import LastWord, message, record
from pytest_nullspace.shell.opening import check_inputs, open_runs
from pytest_nullspace.shell.outputs import append_step_summary, check_outputs
from pytest_nullspace.shell.runs import CheckpointRun, GatedRun
from pytest_nullspace.text.readers import Text

_SHARED = "nullspace_shared_folder"


class Gate:
    """Registered as a plugin where at least one model or saved run is named."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.settings = settings
        self._reports = settings.ranks.rank == 0
        if settings.ranks.size > 1 and config.getoption("dist", "no") != "no":
            raise NullspaceError(
                f"-n shares out the tests of one process, but torchrun started {settings.ranks.size} that measure "
                "together; leave out -n"
            )
        texts: dict[str, Text] = {}
        self.runs = open_runs(settings, texts)
        given, folder = config.option.file_or_dir, config.invocation_params.dir
        require_gated(given, folder, settings, [run.path for run in self.runs])
        self._files = {run.file: run for run in self.runs}
        named = [run.checkpoint.base for run in self.runs if isinstance(run, CheckpointRun)]
        bases = [local_directory(name) for name in (*named, settings.base) if name]
        strangers = [*(run.path for run in self.runs), *bases, settings.init]
        self._strangers = [folder.absolute() for folder in strangers if folder is not None and folder.is_dir()]
        on_path = {Path(folder).resolve() for folder in sys.path}
        for folder in self._strangers:
            if folder.resolve() in on_path and any(folder.glob("*.py")):
                raise NullspaceError(f"{folder}: Python imports from it; start pytest in another folder")
            if (folder / "conftest.py").exists():
                raise NullspaceError(
                    f"{folder / 'conftest.py'}: pytest would run it as a part of your tests; remove it"
                )
        self._attested: attest.Pending | None = None
        if not hasattr(config, "workerinput"):  # what is wrong there was wrong before the workers were started
            check_outputs(config, settings, self.runs, [base for base in bases if base is not None])
            for run in self.runs if settings.card else ():
                cards.check(run)
            check_inputs(self.runs, settings, texts, look=lists_only(config))
            if config.getoption("dist", "no") != "no":  # each worker reads them itself
                texts.clear()
            self._attested = None if lists_only(config) else attest.pending(settings, self.runs)
        self._config = config
        self._saved: list[str] = []
        self._deselected: set[pytest.Item] = set()
        self._nodes: list[CheckpointFile] = []
        self._expected: list[str] = []
        self._judged: set[str] = set()
        self._problems: list[str] = []
        self._failed: dict[str, str] = {}
        self._excused: set[str] = set()
        self.decisions: dict[str, Decision] = {}
        prefixes = {self._where(run): f"{node_id(run.file, config.rootpath)}::" for run in self.runs}
        config.pluginmanager.register(LastWord(self.decisions, prefixes), "nullspace-last-word")
        if not hasattr(config, "workerinput"):
            HtmlExtras.register(config, self.decisions, prefixes, settings.reports)
        self._no_room: str | None = None
        self._folder: TemporaryDirectory[str] | None = None
        shared = getattr(config, "workerinput", {}).get(_SHARED)
        if shared is not None:
            self._share(Path(shared))

    # --- nodes in ---------------------------------------------------------------------------------------------------

    def pytest_report_header(self) -> list[str]:
        """Say what is gated, before anything is loaded."""
        size = self.settings.ranks.size
        together = [f"nullspace: {size} processes, each reads its share of the windows"] if size > 1 else []
        lines = [*(self._as_typed(line) for run in self.runs for line in run.header()), *together]
        width = terminal.columns(self._config.get_terminal_writer())
        return [part for line in lines for part in wrapped(line, width)]

    def _as_typed(self, line: str) -> str:
        """A line with paths as one types them."""
        return line.replace(f"{self._config.invocation_params.dir}{os.sep}", "")

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Answer for a checkpoint's file that was named on the command line, as an id copied from a report is."""
        run = self._files.get(file_path)
        if run is None or not parent.session.isinitpath(file_path):
            return None
        return CheckpointFile.of(parent, run)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Keep pytest from the Python files of a checkpoint that lies among the user's tests.

        The directory of what is gated is collected itself, so that the user's own conftest files above it hold for it.
        """
        if any(collection_path in (file, file.parent) for file in self._files):
            return None
        return True if self._is_strange(collection_path) else None

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Take a checkpoint's directory for no package, whose ``__init__.py`` pytest would import."""
        if not self._is_strange(path):
            return None
        directory: pytest.Dir = pytest.Dir.from_parent(parent, path=path)
        return directory

    def _is_strange(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self._strangers)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Add the checkpoints to what the session collects, wherever they lie, unless some were named by id."""
        report = yield
        if isinstance(collector, pytest.Session) and report.passed and not any(map(collector.isinitpath, self._files)):
            nodes = [CheckpointFile.of(collector, run) for run in self.runs]
            report.result = [*(report.result or ()), *nodes]
            self._nodes = nodes
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> Generator[None, None, None]:
        """After every other selection, tell the runs what to measure, and remember which tests must be judged.

        A test that is gone without having been deselected comes back, to fail: left out unsaid, it would look green.
        """
        collected = [item for item in items if isinstance(item, GateItem)]
        if not config.getoption("lf", False):  # which leaves out what passed while it collects
            here = set(collected)
            collected += [item for node in self._nodes for item in node.items if item not in here]
        yield
        dropped = select(items, self.runs)
        if dropped:
            items[:] = [item for item in items if item not in dropped]
            config.hook.pytest_deselected(items=dropped)
        gone = set(collected).difference(items, self._deselected)
        for item in gone:
            item.removed = True
        items.extend(item for item in collected if item in gone)
        self._expected = [item.nodeid for item in items if isinstance(item, GateItem)]

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Remember what was left out in the way that pytest tells of."""
        self._deselected.update(items)

    # --- several processes ------------------------------------------------------------------------------------------

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell an xdist worker where the outcome of the measurement is shared."""
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="pytest-nullspace-")
            self._share(Path(self._folder.name))
        node.workerinput[_SHARED] = self._folder.name

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """Remember on the controller which tests of the gate the workers must judge."""
        prefixes = tuple(f"{node_id(file, self._config.rootpath)}::" for file in self._files)
        self._expected = [name for name in ids if name.startswith(prefixes)]
        for file, run in self._files.items():
            prefix = f"{node_id(file, self._config.rootpath)}::"
            run.drift_selected = {name for name in run.drift_tests if f"{prefix}{name}" in ids}

    def _share(self, folder: Path) -> None:
        for number, run in enumerate(self.runs):
            run.share(folder, number)

    # --- outcome out ------------------------------------------------------------------------------------------------

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember which tests came to a verdict: passed, failed, or failed as a user's xfail mark expects."""
        judged = report.failed or (report.when == "call" and (report.passed or hasattr(report, "wasxfail")))
        if judged:
            self._judged.add(report.nodeid)
        if report.when == "call" and report.skipped and hasattr(report, "wasxfail"):
            self._excused.add(report.nodeid)
        if report.failed:
            self._failed.setdefault(report.nodeid, printable(message(report).partition("\n")[0], 1000))
        if report.failed and not self._reports and report.nodeid not in self._expected:
            print(f"nullspace: process {self.settings.ranks.rank}: FAILED {report.nodeid}", file=sys.stderr)

    @pytest.hookimpl(tryfirst=True)  # before JUnit writes its file
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Save and report what was measured; a run that looks green without all having been judged is not."""
        if hasattr(session.config, "workerinput"):
            return
        if lists_only(session.config):
            if self.settings.require and exitstatus == pytest.ExitCode.OK and session.config.option.collectonly:
                self._problems.append(f"--collect-only measures nothing, and {PREFIX}require asks for all")
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        for file, run in self._files.items():
            prefix = f"{node_id(file, self._config.rootpath)}::"
            run.judged = {name.removeprefix(prefix) for name in self._judged if name.startswith(prefix)}
            if not run.has_drift:  # where, once loaded, the model turned out not to hold its base: nobody demanded it
                self._expected = [
                    name
                    for name in self._expected
                    if not (name.startswith(prefix) and is_drift(name.removeprefix(prefix)))
                ]
            self.decisions[self._where(run)] = decided(run, *self._ended(file))
        if self._reports:
            record(session.config, self.decisions, self._candidates)
            self._write()
            self._state_what_was_not_measured()
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            self._hold_complete()
        elif exitstatus == pytest.ExitCode.TESTS_FAILED:
            self._hold_each_selected()
        if self._problems and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _ended(self, file: Path) -> tuple[dict[str, str], list[str]]:
        """The names of a run's tests that failed, each with what it said, and those that were expected to."""
        prefix = f"{node_id(file, self._config.rootpath)}::"
        failed = {name.removeprefix(prefix): told for name, told in self._failed.items() if name.startswith(prefix)}
        return failed, sorted(name.removeprefix(prefix) for name in self._excused if name.startswith(prefix))

    def _state_what_was_not_measured(self) -> None:
        """Say so also where no terminal shows header and summary: unsaid, weights alone would look fully gated."""
        said = STATEMENT if self.settings.weights_only else SCREENED if self.settings.screen else None
        if said is not None and self._config.pluginmanager.get_plugin("terminalreporter") is None:
            print(f"nullspace: {said}")

    def _hold_each_selected(self) -> None:
        """Tell of every run that was given and of which no test was selected, be it by another's id or by -k."""
        if not self._expected:
            self._problems.append(
                "no layer was gated: the selection leaves none of the model's tests; to run others alone leave the "
                "model out (-o addopts= where the ini file names it there)"
            )
            return
        for file, run in self._files.items():
            if not any(name.startswith(f"{node_id(file, self._config.rootpath)}::") for name in self._expected):
                where = node_id(run.path, self._config.rootpath)
                self._problems.append(
                    f"none of the tests of {where} was selected; leave out what selects others alone (a file or id "
                    f"on the command line, -k, --deselect, --lf), or {where} itself"
                )

    def _hold_complete(self) -> None:
        self._hold_each_selected()
        for run in self.runs:
            outcome = run.peek()
            if outcome is not None and outcome.layers and not any(layer.rows for layer in outcome.layers):
                self._problems.append(f"no activation row reached any selected layer of {outcome.model_path}")
        missing = [name for name in self._expected if name not in self._judged]
        if missing:
            self._problems.append(
                f"{len(missing)} of {len(self._expected)} tests of the gate were not run or were skipped, "
                f"{missing[0]} among them: nothing is green that was not measured"
            )
        if self.settings.require and self._expected:  # else it is said already
            self._problems += lacking(self.decisions, self.settings.weights_only)

    def _write(self) -> None:
        # What was not measured stands in every report too: left out, its report would look as that of a safe one.
        root = self._config.rootpath
        told = [
            reports.Told(
                run, run.peek() or self._nothing(run), self._decision(run), node_id(file, root), *self._ended(file)
            )
            for file, run in self._files.items()
        ]
        beside = self._candidates() if len(self.runs) > 1 and not self.settings.screen else []
        first = [candidates.page(beside)] if beside else []
        if self.settings.screen and len(held := self._screened()) > 1:
            first = [screened.beside_page(held)]
        try:
            for run, outcome, *_ in told:
                if self.settings.save_stats is not None and run.peek() is not None:
                    file = stats_file(self.settings.save_stats, run.name)
                    saved.write(reports.diagnosed(run, outcome), file, self._saved_verdict(run, beside))
                    self._saved.append(self._as_typed(f"statistics saved to {file}"))
            pages = [*first, *map(reports.page, told)]
            for file in self.settings.reports:
                saved.write_atomically(file, reports.written(file.suffix, told, pages, beside))
                self._saved.append(self._as_typed(f"report written to {file}"))
            self._no_room = append_step_summary(pages)
            for run in self.runs if self.settings.card else ():
                if (said := cards.write(run, self._decision(run))) is not None:
                    self._saved.append(self._as_typed(f"card: {said}"))
            if self._attested is not None:  # last, for it is of the files as they are then
                (run,) = self.runs
                tests = attest.Tests(f"{node_id(run.file, root)}::", self._failed, self._excused)
                self._saved.append(self._as_typed(f"attest: {self._attested.write(self._decision(run), tests)}"))
        except NullspaceError as error:
            self._problems.append(str(error))

    def _nothing(self, run: GatedRun) -> RunStats:
        """What is told of a run of which nothing could be measured."""
        return RunStats(str(run.path), self.settings.calib_dataset, (), len(run.layers))

    def _saved_verdict(self, run: GatedRun, beside: Sequence[Candidate]) -> dict[str, Any]:
        """The verdict on a run as it is saved, with all candidates where there are several, and the best of them."""
        told, chosen = self._decision(run).to_dict(), best(beside)
        if not beside:
            return told
        several = [one.to_dict(one is chosen) for one in beside]
        return {**told, "candidates": several, "best": None if chosen is None else chosen.name}

    def _decision(self, run: GatedRun) -> Decision:
        return self.decisions[self._where(run)]

    def _candidates(self) -> list[Candidate]:
        """What is told of each run beside the others."""
        peeked = [(run, run.peek()) for run in self.runs]
        return [
            candidate(
                self._where(run), self._decision(run), outcome, None if outcome is None else run.expectations(outcome)
            )
            for run, outcome in peeked
        ]

    def _screened(self) -> list[screened.ScreenedAdapter]:
        """The adapters that were screened."""
        peeked = [(run, run.peek()) for run in self.runs]
        told = (
            reports.screened(run, of, self._decision(run), self._where(run)) for run, of in peeked if of is not None
        )
        return [one for one in told if one is not None]

    def _where(self, run: GatedRun) -> str:
        """How reports name what is gated."""
        return node_id(run.path, self._config.rootpath)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the report of every checkpoint, then whatever keeps the run from being complete."""
        width = terminal.columns(self._config.get_terminal_writer())
        for run in self.runs:
            outcome = run.peek()
            if outcome is None:
                terminal.write_lines(terminalreporter, reports.servers(run))
            else:
                terminalreporter.ensure_newline()
                terminalreporter.section(f"nullspace: {self._where(run)}")
                every = terminalreporter.verbosity > 0
                lines = reports.summary(run, outcome, self._decision(run), every, width)
                if lines is None:
                    terminal.write(terminalreporter, outcome, run.expectations(outcome), self._decision(run))
                else:
                    terminal.write_lines(terminalreporter, lines)
                below = [
                    *reports.changed(run, outcome, every),
                    *changes.explained(run.diagnoses(outcome) if every else ()),
                ]
                terminal.write_lines(terminalreporter, ((named(line, outcome), tier) for line, tier in below))
        if len(self.runs) > 1 and self.decisions:
            terminalreporter.section(f"nullspace: {'screened' if self.settings.screen else 'candidates'}")
            held = self._screened()
            beside = screened.beside(held, width) if held else candidates.lines(self._candidates(), width)
            terminal.write_lines(terminalreporter, beside)
        while self._problems:
            terminal.write_lines(terminalreporter, [(f"nullspace: NOT GATED: {self._problems.pop(0)}", Tier.FAIL)])
        if self._no_room is not None:
            terminal.write_lines(terminalreporter, [(f"nullspace: {self._no_room}", Tier.WARN)])
        terminal.write_lines(terminalreporter, ((f"nullspace: {said}", None) for said in self._saved))

    def pytest_unconfigure(self) -> None:
        """Tell on stderr what no summary told (-p no:terminal); remove what the processes shared."""
        for problem in self._problems if self._reports else ():
            print(f"nullspace: NOT GATED: {problem}", file=sys.stderr)
        if self._folder is not None:
            self._folder.cleanup()
