"""One record a figure: whoever judges, saves, reads, compares, reports or documents takes it from there."""

import json
from dataclasses import replace

import pytest

from pytest_nullspace.errors import StatsError
from pytest_nullspace.judging.baseline import Limit, compare
from pytest_nullspace.judging.invariants import Expectations, Override, Stage, judge
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report import markdown, terminal
from pytest_nullspace.report.words import reading
from pytest_nullspace.run.figures import FIGURES, Bounds, Figure, Text, of_layers
from pytest_nullspace.run.saved import from_json, to_json
from pytest_nullspace.run.stats import LayerStats, RunStats
from tests import generated
from tests.saved import LAYER

NAME, KEY = "twist", "BX_over_FullOutput"


def twist(of: LayerStats) -> float:
    """The kernel of a figure that nobody knows yet."""
    assert of.down_norm is not None
    return of.down_norm / of.output_norm


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Figure:
    """A record more."""
    figure = Figure(
        name=NAME,
        symbol="||BX||/||output||",
        formula="mean ‖BX‖ / mean ‖output‖",
        meaning="How loud the down projection is beside the output.",
        trained=Bounds(0.01, 0.02, True, ("all is still", "something stirs", "it is loud")),
        key=KEY,
        follows="BX_norm / FullOutput_norm",
        of=twist,
    )
    monkeypatch.setitem(FIGURES, NAME, figure)
    return figure


@pytest.mark.usefixtures("known")
def test_a_new_record_is_judged_saved_read_compared_and_reported() -> None:
    """A figure that one record and one kernel add is held to its bounds and told everywhere, with no other change."""
    quiet = replace(LAYER, down_norm=0.001 * LAYER.output_norm)
    loud = replace(LAYER, down_norm=0.06 * LAYER.output_norm)
    assert [judge(of, Expectations()).findings[-1].threshold.figure for of in (quiet, loud)] == [NAME, NAME]
    verdict = judge(loud, Expectations())
    assert verdict.tier is Tier.FAIL
    assert verdict.findings[-1].value == pytest.approx(0.06)
    allowed = Expectations(overrides=[Override("*", NAME, 0.1, 0.2)])
    assert judge(loud, allowed).findings[-1].tier is Tier.PASS

    run = RunStats("ft", "text.txt", (loud,), 1)
    saved = json.loads(to_json(run))
    assert saved["stats"][0][KEY] == pytest.approx(0.06)
    assert from_json(json.dumps(saved), "run.json") == run
    saved["stats"][0][KEY] = 0.001
    with pytest.raises(StatsError, match=rf"{KEY} is 0\.001, but BX_norm / FullOutput_norm is 0\.06"):
        from_json(json.dumps(saved), "run.json")

    compared = compare(run, RunStats("ft", "text.txt", (quiet,), 1), [Limit(NAME, 0.5, True)], Stage.TRAINED)
    (worse,) = compared.regressions[loud.name]
    assert NAME in worse
    assert any(change.figure == NAME for change in compared.changes[loud.name])

    assert any("it is loud" in line for line, _ in reading(verdict))
    printed = "\n".join(line for line, _ in terminal.summary(run, [verdict], Expectations()))
    for text in (printed, markdown.report(run, Expectations())):
        assert "twist" in text
        assert "it is loud" in text
    assert "How loud the down projection is" in generated.figure_pages()
    assert f"| `{NAME}` |" in generated.figures()


def test_every_record_is_whole() -> None:
    """A record has its words for each tier, bounds that lie the right way round, and a key where it is of a layer."""
    for name, figure in FIGURES.items():
        assert figure.name == name
        assert name == name.lower()
        for bounds in filter(None, (figure.trained, figure.init)):
            assert len(bounds.words) == len(Tier)
            assert all(words == words.strip() and words for words in bounds.words)
            assert (bounds.passes < bounds.fails) is bounds.lower_is_better
        assert figure.meaning.endswith(".")
        assert bool(figure.key and figure.follows) is not figure.of_predictions
    keys = [FIGURES[name].key for name in of_layers()]
    assert len(set(keys)) == len(keys)
    assert [name for name in of_layers() if FIGURES[name].text is Text.BOTH] == ["selectivity"]


def test_what_is_documented_is_what_is_judged() -> None:
    """The table of figures has every figure with the bounds by which it is judged."""
    table = generated.figures()
    for stage in Stage:
        for subject in ("model.layers.0", "drift"):
            for threshold in Expectations(stage).thresholds(subject):
                assert f"| `{threshold.figure}` |" in table
                if stage is Stage.TRAINED:
                    (row,) = (line for line in table.splitlines() if line.startswith(f"| `{threshold.figure}` |"))
                    assert f"{threshold.passes:g}" in row
                    assert f"{threshold.fails:g}" in row
