"""What is written of the runs when all tests have run: what is saved, and the report in the form of each file."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from pytest_nullspace import __version__
from pytest_nullspace.judging.candidates import Candidate
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.invariants import Expectations, Stage
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report import changes, html, machine, markdown, merging, odd, verdict, weights
from pytest_nullspace.report import screened as report_of_screen
from pytest_nullspace.report.page import Page, joined
from pytest_nullspace.report.words import named
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.shell.decided import beside as beside_figures
from pytest_nullspace.shell.runs import GatedRun


class Told(NamedTuple):
    """One run as reports tell of it.

    Attributes:
        run: What was gated.
        outcome: What was measured of it, which may be nothing.
        decision: The verdict on it.
        file: The id of its file among pytest's nodes.
        failed: The names of its tests that failed, each with what it said.
        excused: The names of those that failed as a mark of the user's expects.
    """

    run: GatedRun
    outcome: RunStats
    decision: Decision
    file: str
    failed: Mapping[str, str]
    excused: Collection[str] = ()


def screened(
    run: GatedRun, outcome: RunStats, decision: Decision, name: str = ""
) -> report_of_screen.ScreenedAdapter | None:
    """The adapter as the report of a screen shows it; None where it was not screened."""
    told = run.against.told(outcome).screening
    if told is None:
        return None
    return report_of_screen.ScreenedAdapter(name or outcome.model_path, told, run.expectations(outcome), decision)


def summary(
    run: GatedRun, outcome: RunStats, decision: Decision, every: bool, width: float
) -> list[tuple[str, Tier | None]] | None:
    """The lines of the terminal's summary of a run that holds no measured layer; None of others."""
    weighed = run.against.told(outcome).weights
    if (of := screened(run, outcome, decision)) is not None:
        return [*verdict.lines(decision), *report_of_screen.summary(of, outcome, every, width)]
    if weighed is None:
        return None
    faults, layers = partial(run.against.weight_faults, outcome), outcome.checkpoint_layers
    gates, called = run.expectations(outcome).gates, partial(named, run=outcome)
    return [*verdict.lines(decision), *weights.summary(weighed, faults, layers, every, width, gates, called)]


def page(told: Told) -> Page:
    """The Markdown report of one run."""
    run, outcome, decision, *_ = told
    if (held := screened(run, outcome, decision)) is not None:
        return report_of_screen.page(held)
    lines = [*changed(run, outcome), *changes.explained(run.diagnoses(outcome))]
    weighed, below = run.against.told(outcome).weights, [named(line, outcome) for line, _ in lines]
    expectations = run.expectations(outcome)
    if weighed is None:
        whole = markdown.page(outcome, expectations, below, decision)
        return replace(whole, head=named(whole.head, outcome), more=named(whole.more, outcome))
    faults, of = partial(run.against.weight_faults, outcome), outcome.checkpoint_layers
    return weights.page(
        outcome.model_path, weighed, faults, of, below, expectations.gates, decision, partial(named, run=outcome)
    )


def written(suffix: str, told: Sequence[Told], pages: Sequence[Page], beside: Sequence[Candidate]) -> str:
    """The report of every run in the form that a file's suffix names.

    Args:
        suffix: Of the file.
        told: The runs.
        pages: Their Markdown.
        beside: What is told of each beside the others; empty where there is one.
    """
    if suffix == ".md":
        return joined(pages)
    held = [(of, of.run.expectations(of.outcome)) for of in told]
    if suffix == ".html":
        among = sum(len(of.outcome.layers) for of in told)
        return html.page([sheet(of, expected, among) for of, expected in held], beside)
    gated = [
        machine.Gated(
            of.run.name, of.file, of.outcome, expected, of.decision, [*beside_figures(of.run, of.failed, of.excused)]
        )
        for of, expected in held
    ]
    return machine.openmetrics(gated) if suffix == ".prom" else machine.sarif(gated, __version__)


def sheet(told: Told, expectations: Expectations, among: int) -> html.Sheet:
    """What the page shows of one run among so many layers; of an earlier one a line tells, and a table the rest."""
    run, outcome, decision, *_ = told
    compared = run.against.compared(outcome)
    since_begin = [*began(run, outcome), *itertools.islice(since(run, outcome), 1)]
    lines = [*since_begin, *odds(run, outcome), *merges(run, outcome), *servers(run)]
    if (of := screened(run, outcome, decision)) is not None:
        lines += report_of_screen.summary(of, outcome, every=True)
    return html.sheet(run.name, outcome, expectations, decision, lines, compared, among)


def diagnosed(run: GatedRun, outcome: RunStats) -> RunStats:
    """The outcome as it is saved: its causes, the servers, and how many layers' tests came to a verdict."""
    causes = [cause.to_dict() for cause in run.diagnoses(outcome)]
    gated = sum(map(run.expectations(outcome).gates, run.gated))
    about = {**outcome.about, "diagnosis": causes, "gated_layers": gated}
    if run.servers.tests:
        about["servers"] = [run.servers.outcome(test).to_dict() for test in run.servers.tests]
    return replace(outcome, about=about)


def changed(run: GatedRun, outcome: RunStats, every: bool = False) -> list[tuple[str, Tier | None]]:
    """What a report says below the figures, in lines: the run against its start and an earlier one.

    With ``every`` layer by layer where there is so much to say.
    """
    told = [*began(run, outcome, every), *since(run, outcome), *changes.remedy(outcome)]
    return [*told, *odds(run, outcome, every), *merges(run, outcome, every), *servers(run)]


def began(run: GatedRun, outcome: RunStats, every: bool = False) -> Iterator[tuple[str, Tier | None]]:
    """The run against its start."""
    audited = run.against.told(outcome).audit
    if audited is not None:
        yield from changes.audit_lines(audited)
    if run.against.start is not None and run.against.start_file is not None:
        trained = run.expectations(outcome).stage is Stage.TRAINED
        yield from changes.start_lines(run.against.start, run.against.start_file, outcome, trained, every)
    asked = every or run.against.start is not None  # what is unknown is not told unasked
    if outcome.layers and not outcome.is_whole and asked:
        yield changes.held_out(outcome, run.against.start)


def since(run: GatedRun, outcome: RunStats) -> Iterator[tuple[str, Tier | None]]:
    """The run against an earlier one."""
    compared = run.against.compared(outcome)
    if compared is not None and run.against.earlier_file is not None:
        yield from changes.comparison(compared, run.against.earlier_file, run.against.missing)


def merges(run: GatedRun, outcome: RunStats, every: bool = False) -> Iterator[tuple[str, Tier | None]]:
    """What a merge keeps of the update, a line each type."""
    survival = run.against.told(outcome).survival
    if survival is not None:
        yield from merging.lines(survival, every)


def odds(run: GatedRun, outcome: RunStats, every: bool = False) -> Iterator[tuple[str, Tier | None]]:
    """Which layers are odd beside their own kind, where the weights alone are gated."""
    weighed = run.against.told(outcome).weights
    if weighed is not None:
        yield from odd.lines(weighed, every)


def servers(run: GatedRun) -> Iterator[tuple[str, Tier | None]]:
    """What became of the adapter before each server, a line each."""
    for test in run.servers.tests:
        outcome = run.servers.outcome(test)
        yield f"{test}: {outcome.summary}", None if outcome.tier is Tier.PASS else outcome.tier
