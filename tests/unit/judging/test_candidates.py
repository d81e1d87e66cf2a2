"""Several candidates side by side: which is the best, and that nothing that must not be deployed is."""

import dataclasses
import math

from pytest_nullspace.judging.candidates import Candidate, best, candidate
from pytest_nullspace.judging.decision import Call, decide, not_gated
from pytest_nullspace.judging.invariants import Expectations
from pytest_nullspace.report import candidates as report
from pytest_nullspace.run.stats import Drift, TextDrift
from tests import saved

SAFE = Candidate("safe", Call.SAFE, 0.001, 0.3, 0.01, "model.layers.0.mlp.up_proj")


def test_the_safest_is_best_and_of_these_the_one_that_learned_most() -> None:
    """The verdict counts before the gain, the gain before the divergence, and what was not measured is the worst."""
    more = dataclasses.replace(SAFE, name="more", gain=0.4)
    near = dataclasses.replace(more, name="near", divergence=0.0001)
    look = dataclasses.replace(SAFE, name="look", call=Call.LOOK, gain=9.0)
    blind = dataclasses.replace(SAFE, name="blind", gain=math.nan)
    assert best([look, SAFE, blind]) is SAFE
    assert best([SAFE, more, look]) is more
    assert best([SAFE, more, near]) is near
    assert best([look, dataclasses.replace(look, call=Call.NOT_GATED)]) is look


def test_nothing_that_failed_or_was_not_gated_is_best() -> None:
    """Where all failed, none is marked, in words too."""
    lost = [dataclasses.replace(SAFE, call=call) for call in (Call.STOP, Call.NOT_GATED)]
    assert best(lost) is None
    assert report.told(lost) == "none of them is to be deployed"
    assert "★" not in report.page(lost).whole


def test_a_candidate_is_told_from_its_run() -> None:
    """Predictions, the average of the layers and the worst; of a run that was not measured the verdict alone."""
    drift = Drift("the base", TextDrift(480, 2.0, 2.01, 0.02, 0.0, 0.0), TextDrift(480, 3.0, 2.5, 0.5, 0.0, 0.0))
    run = dataclasses.replace(saved.run(mean_leakage=0.9), drift=drift)
    told = candidate("ft", decide(run, Expectations()), run, Expectations())
    assert (told.call, told.divergence, told.gain, told.worst) == (Call.STOP, 0.02, 0.5, saved.NAMES[0])
    assert math.isnan(candidate("no", not_gated("no room"), None, None).divergence)


def test_the_table_keeps_to_80_columns_and_marks_the_best() -> None:
    """Long names are shortened in the middle of a narrow terminal; Markdown holds them whole."""
    long = dataclasses.replace(SAFE, name="runs/a-very-long-name-of-a-run-of-a-model.json", call=Call.STOP)
    lines = [line for line, _ in report.lines([SAFE, long], 76)]
    assert max(map(len, lines)) <= 76
    assert lines[1].startswith("★ safe ")
    assert lines[-1] == "★ best: safe, the safest, and of these the one that learned most"
    page = report.page([SAFE, long]).whole
    assert "| ★ | safe | SAFE | 0.001 | 0.3 | 0.01 | model.layers.0.mlp.up_proj |" in page
    assert long.name in page
