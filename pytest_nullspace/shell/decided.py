"""The one verdict on each run of the gate, from what was measured and what became of its tests."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from pytest_nullspace.judging.decision import UNMEASURED, Call, Decision, decide, gaps, not_gated, stopped
from pytest_nullspace.judging.invariants import MODEL, Expectations
from pytest_nullspace.judging.screening import FIGURES, sentence, verdicts
from pytest_nullspace.judging.screening import STATEMENT as SCREENED
from pytest_nullspace.judging.survival import OfType
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.judging.weights import STATEMENT
from pytest_nullspace.report.machine import Beside
from pytest_nullspace.report.words import named
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.settings import PREFIX
from pytest_nullspace.shell.collect import FROZEN, SCOPE
from pytest_nullspace.shell.runs import GatedRun


def tests_of(run: GatedRun) -> Sequence[str]:
    """The names of all tests that the run has, selected or not."""
    single = (
        (MODEL, run.gates_all and not run.weights_only),
        (FROZEN, run.has_audit),
        *((name, True) for name in run.drift_tests),
        (SCOPE, run.gates_scope),
    )
    return (
        *run.gated,
        *run.against.missing,
        *(name for name, has in single if has),
        *run.merge_tests,
        *run.servers.tests,
    )


def decided(run: GatedRun, failed: Mapping[str, str], excused: Collection[str] = ()) -> Decision:
    """The verdict on one run, once all its tests have run.

    Args:
        run: What was gated.
        failed: The names of its tests that failed, each with what it said.
        excused: The names of those that failed as a mark of the user's expects.
    """
    outcome = run.peek()
    if outcome is None:
        refused = {name: message for name, message in failed.items() if name in run.servers.tests}
        if refused:
            return stopped(refused)
        why = "not measured" if run.judged else "none of its tests was run"
        return not_gated(max(failed.values(), key=len, default=why))
    expectations, tests = run.expectations(outcome), tests_of(run)
    told = decide(
        outcome,
        expectations,
        run.diagnoses(outcome),
        tests,
        failed,
        _unmeasured(run, outcome, expectations, tests),
        [*merge_doubts(run, outcome), *run.servers.doubts(run.judged)],
        excused,
        screened=screened_verdicts(run, outcome, expectations),
    )
    reasons = tuple(replace(one, words=named(one.words, outcome)) for one in told.reasons)
    told = replace(told, reasons=reasons)
    if not run.screened:
        return told
    return replace(told, basis=SCREENED, thresholds=tuple(t for t in told.thresholds if t.figure in FIGURES))


def lacking(decisions: Mapping[str, Decision], weights_only: bool) -> Iterator[str]:
    """What keeps runs from being green where ``--nullspace-require`` asks for them, and what to do."""
    asks = f"{PREFIX}require asks for all"
    if weights_only:
        asks = (
            f"{PREFIX}require asks for a measurement; leave out {PREFIX}weights-only, or the requirement "
            "(-o nullspace_require=false where the ini file sets it)"
        )
    for name, decision in decisions.items():
        if decision.call is Call.NOT_GATED:
            yield f"{name}: {decision.sentence}, and {asks}"


def _unmeasured(run: GatedRun, outcome: RunStats, expectations: Expectations, tests: Sequence[str]) -> str:
    """What is said of a run that holds no measured layer."""
    if (told := run.against.told(outcome).screening) is not None:
        return sentence(told, tests, expectations)
    return STATEMENT if run.weights_only else UNMEASURED


def screened_verdicts(run: GatedRun, outcome: RunStats, expectations: Expectations) -> list[Verdict]:
    """The first-order verdicts of a run that was screened; none of others."""
    told = run.against.told(outcome).screening
    return [] if told is None else verdicts(told, expectations)


def merge_doubts(run: GatedRun, outcome: RunStats) -> list[str]:
    """What the tests of a merge that came to a verdict warn of."""
    return [kept.summary for test, kept in merged(run, outcome) if kept.tier is Tier.WARN and is_judged(run, test)]


def merge_failed(run: GatedRun, outcome: RunStats) -> dict[str, str]:
    """The tests of a merge that fail, each with what it says."""
    return {test: kept.summary for test, kept in merged(run, outcome) if kept.tier is Tier.FAIL}


def merged(run: GatedRun, outcome: RunStats) -> list[tuple[str, OfType]]:
    """What a merge keeps, by the name of its test, as far as it was measured."""
    survival = run.against.told(outcome).survival
    return [] if survival is None else [(test, survival.of_type(kind)) for test, kind in run.merge_tests.items()]


def warned(run: GatedRun, outcome: RunStats) -> list[str]:
    """The names of the tests beside the figures that only warn: of merges, and of servers."""
    servers = (test for test in run.servers.tests if run.servers.outcome(test).tier is Tier.WARN)
    return [*(test for test, kept in merged(run, outcome) if kept.tier is Tier.WARN), *servers]


def beside(run: GatedRun, failed: Mapping[str, str], excused: Collection[str]) -> Iterator[Beside]:
    """The tests that figures do not tell of and that came to a verdict; of layers and averages those that fail so."""
    outcome = run.peek()
    merges = {} if outcome is None else dict(merged(run, outcome))
    measured = {MODEL, *run.gated}
    by_figures = {*run.drift_tests, *(() if run.weights_only or run.screened else measured)}
    for test in tests_of(run):
        if test in by_figures or not is_judged(run, test):
            continue
        if test in failed:
            yield Beside(test, Tier.FAIL, failed[test])
        elif test not in measured:
            told = merges[test] if test in merges else run.servers.outcome(test) if test in run.servers.tests else None
            passes = test not in excused and (told is None or told.tier is Tier.PASS)
            words = told.summary if told is not None else "" if passes else "fails, as a mark expects"
            yield Beside(test, Tier.PASS if passes else Tier.WARN, words)


def is_judged(run: GatedRun, test: str) -> bool:
    """Whether a test came to a verdict, as far as that is known."""
    return run.judged is None or test in run.judged


def why_untold(run: GatedRun, decision: Decision) -> str | None:
    """Why nothing is told of a run where others read it; None where it is whole."""
    outcome = run.peek()
    if outcome is None or decision.call is Call.NOT_GATED:
        return f"NOT GATED: {decision.sentence}"
    gap = next(gaps(outcome, run.expectations(outcome), tests_of(run)), None)
    return None if gap is None else gap.words
