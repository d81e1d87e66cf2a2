"""The report as one HTML file: no network, nothing to install, readable without its script.

Every name that comes from a file is escaped by Jinja and shown letter by letter. The page's content security policy
allows its own style and script, by their digests, and nothing else.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.invariants import (
    MODEL,
    Expectations,
    judge,
    judge_averages,
    judge_drifts,
)
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.report import charts, doubts, model, notes
from pytest_nullspace.report.words import MARKS, faults, mark, named, reading, scanned_figure
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.stats import LayerStats, RunStats

if TYPE_CHECKING:
    from jinja2 import Template

ROWS = 500
"""Layers that the table shows at most, the worst first."""
CHARTED = 2_000
"""Layers up to which every figure has its charts; beyond, those that decide."""
_PARTS = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of words with the tier that marks it; the mark itself stands in no words."""

    words: str
    tier: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A layer in the table."""

    tier: str
    mark: str
    name: str
    cells: Sequence[tuple[str, str]]
    why: str


@dataclass(frozen=True)
class Sheet:
    """What the page shows of one run.

    Attributes:
        name: What it is called.
        decision: The verdict on it.
        facts: What was measured, where and on what.
        lines: What is to be said beside the figures.
        drift: The figures of the predictions.
        drift_words: The same in words.
        reading: The averages in words.
        figures: The figures that the run has, those that decide first.
        deciding: Which of them decide.
        of_layers: Which of those do in single layers.
        heats: A heat map for each.
        profiles: A depth profile for each.
        rows: The layers, the worst first, `ROWS` at most.
        left: How many layers have no row.
        averages: The averages, as cells.
        changes: Against a start or an earlier run.
    """

    name: str
    decision: Decision
    facts: Sequence[str]
    lines: Sequence[Line]
    drift: Sequence[charts.Bar]
    drift_words: Sequence[Line]
    reading: Sequence[Line]
    figures: Sequence[str]
    deciding: Sequence[str]
    of_layers: Sequence[str]
    heats: Sequence[charts.Heat]
    profiles: Sequence[charts.Profile]
    rows: Sequence[Row]
    left: int
    averages: Sequence[str]
    changes: Sequence[Line] = field(default=())


def sheet(
    name: str,
    run: RunStats,
    expectations: Expectations,
    decision: Decision,
    changes: Sequence[tuple[str, Tier | None]] = (),
) -> Sheet:
    """What the page shows of ``run``.

    Args:
        name: What it is called.
        run: What was measured.
        expectations: What it was held against.
        decision: The verdict on it.
        changes: Lines about its start and an earlier run.
    """
    verdicts = [judge(layer, expectations) for layer in run.layers]
    of_layers = [t.figure for t in expectations.thresholds("") if t.figure in run.expected]
    deciding = [*of_layers, *(t.figure for t in expectations.thresholds(MODEL) if t.figure in run.expected)]
    figures = [*dict.fromkeys(deciding), *(figure for figure in run.expected if figure not in deciding)]
    charted = [f for f in figures if f in run.measured and (len(run.layers) <= CHARTED or f in deciding)]
    bounds = {threshold.figure: threshold for threshold in expectations.thresholds("")}
    moved = judge_drifts(run, expectations)
    profiles = [charts.profile(figure, run.layers, verdicts, bounds.get(figure)) for figure in charted]
    return Sheet(
        name=printable(name, 200),
        decision=decision,
        facts=_facts(run, verdicts, expectations),
        lines=_lines(run, verdicts, expectations),
        drift=charts.bars(moved[0].findings, _LABELS) if moved else (),
        drift_words=() if run.drift is None else _plain(notes.drift(run.drift, *moved), run),
        reading=_plain(reading(judge_averages(run, expectations)), run) if run.complete and run.layers else (),
        figures=figures,
        deciding=list(dict.fromkeys(deciding)),
        of_layers=of_layers,
        heats=[charts.heat(figure, run.layers, verdicts) for figure in charted],
        profiles=[profile for profile in profiles if profile is not None],
        rows=_rows(run.layers, verdicts, figures),
        left=max(0, len(run.layers) - ROWS),
        averages=[scanned_figure(run, figure) for figure in figures] if run.layers else (),
        changes=_plain(changes, run),
    )


_LABELS = {
    "divergence": "preserved text: predictions moved (nats a token)",
    "loss-rise": "preserved text: loss rose (nats a token)",
    "task-gain": "task text: loss fell (nats a token)",
}


def _facts(run: RunStats, verdicts: Sequence[Verdict], expectations: Expectations) -> list[str]:
    gated = sum(verdict.gated for verdict in verdicts)
    told = [
        notes.conditions(run),
        f"layers: {gated} of {run.checkpoint_layers} gated: {notes.tally(verdicts)}",
        notes.profile(expectations),
        *model.built_as(run),
    ]
    return [fact for fact in told if fact is not None]


def _lines(run: RunStats, verdicts: Sequence[Verdict], expectations: Expectations) -> list[Line]:
    told = [
        notes.ungated(verdicts, expectations),
        *doubts.cautions(run, verdicts),
        *doubts.all_of(verdicts, run, expectations),
    ]
    lines = [(words, Tier.WARN) for words in told if words is not None]
    return _plain([*lines, *((words, None) for words in notes.best_possible(run))], run)


def _plain(lines: Any, run: RunStats) -> list[Line]:
    """Lines of a report without the mark that begins them, which the page draws itself."""
    marks = "".join(MARKS.values())
    return [Line(named(words.strip().lstrip(marks).strip(), run), str(tier or "")) for words, tier in lines]


def _rows(layers: Sequence[LayerStats], verdicts: Sequence[Verdict], figures: Sequence[str]) -> list[Row]:
    ordered = sorted(zip(layers, verdicts, strict=True), key=lambda pair: pair[1].severity, reverse=True)
    return [
        Row(
            str(verdict.tier) if verdict.gated else "none",
            mark(verdict),
            printable(layer.name),
            [(scanned_figure(layer, figure), _tier(verdict, figure)) for figure in figures],
            "; ".join(faults(verdict)),
        )
        for layer, verdict in ordered[:ROWS]
    ]


def _tier(verdict: Verdict, figure: str) -> str:
    finding = charts.finding_of(verdict, figure)
    return "" if finding is None else str(finding.tier)


@cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loaded = Environment(
        loader=FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return loaded.get_template("page.html.j2")


def _part(name: str) -> tuple[str, str]:
    """A style or script, and the digest by which the page allows it."""
    text = (_PARTS / name).read_text("utf-8")
    return text, "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page(sheets: Sequence[Sheet]) -> str:
    """The whole page of one run or several."""
    (style, style_digest), (script, script_digest) = _part("page.css"), _part("page.js")
    return _template().render(
        sheets=sheets,
        known=FIGURES,
        marks={str(tier): MARKS[tier] for tier in Tier} | {"": "", "none": ""},
        cell=charts.CELL,
        plot=(charts.WIDTH, charts.HEIGHT),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src '{style_digest}'; script-src '{script_digest}'; base-uri 'none'; "
        "form-action 'none'",
    )
