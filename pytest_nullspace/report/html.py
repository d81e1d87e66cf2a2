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
from pytest_nullspace.judging.baseline import Comparison
from pytest_nullspace.judging.candidates import Candidate
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.invariants import (
    MODEL,
    Expectations,
    judge,
    judge_averages,
    judge_drifts,
)
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.report import bars, candidates, charts, doubts, model, moves, notes, verdict
from pytest_nullspace.report import changes as told_changes
from pytest_nullspace.report.words import MARKS, faults, mark, named, reading, scanned_figure
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.stats import LayerStats, RunStats

if TYPE_CHECKING:
    from jinja2 import Template

ROWS = 500
"""Layers that the tables of a page show at most, the worst first."""
ROWS_LEAST = 30
"""Layers that the table of one run of many shows, where it has so many."""
CHARTED, SEVERAL = 2_000, 20_000
"""Layers of a page up to which every figure has its charts, and up to which those that decide; beyond, in layers."""
_PARTS = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of words with the tier that marks it; the mark itself stands in no words."""

    words: str
    tier: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A layer in the table; each cell is a figure and its tier, then how it changed and for better or worse."""

    tier: str
    mark: str
    name: str
    cells: Sequence[tuple[str, str, str, str]]
    why: str


@dataclass(frozen=True)
class Sheet:
    """What the page shows of one run.

    Attributes:
        name: What it is called.
        decision: The verdict on it.
        facts: What was measured, where and on what.
        lines: What is to be said beside the figures.
        drift: The figures of the predictions, each on every text.
        drift_words: The same in words.
        quotes: Where the predictions on each text changed most.
        stands: How quiet B could be on each text.
        reading: The averages in words.
        figures: The figures that the run has, those that decide first.
        deciding: Which of them decide.
        of_layers: Which of those do in single layers.
        heats: A heat map for each.
        profiles: A depth profile for each.
        rows: The layers, the worst first, `ROWS` on a page at most.
        left: How many layers have no row.
        averages: The averages, as cells.
        remedy: What would make it pass, where that was looked for; where to read on, and what to try first.
        changes: Against a start or an earlier run, in words.
        since: Old and new of every figure that changed, where it is held against an earlier run.
        same: Those that did not.
        shifted: A heat map of what changed for each figure that decides in layers.
        down: How the adapter's files call the down projection.
    """

    name: str
    decision: Decision
    facts: Sequence[str]
    lines: Sequence[Line]
    drift: Sequence[bars.Group]
    drift_words: Sequence[Line]
    quotes: Sequence[bars.Quotes]
    stands: Sequence[bars.Stand]
    reading: Sequence[Line]
    figures: Sequence[str]
    deciding: Sequence[str]
    of_layers: Sequence[str]
    heats: Sequence[charts.Heat]
    profiles: Sequence[charts.Profile]
    rows: Sequence[Row]
    left: int
    averages: Sequence[str]
    remedy: Sequence[Line] = field(default=())
    changes: Sequence[Line] = field(default=())
    since: Sequence[moves.Move] = field(default=())
    same: str = ""
    shifted: Sequence[charts.Heat] = field(default=())
    down: str = "B"


def sheet(
    name: str,
    run: RunStats,
    expectations: Expectations,
    decision: Decision,
    changes: Sequence[tuple[str, Tier | None]] = (),
    compared: Comparison | None = None,
    among: int = 0,
) -> Sheet:
    """What the page shows of ``run``.

    Args:
        name: What it is called.
        run: What was measured.
        expectations: What it was held against.
        decision: The verdict on it.
        changes: Lines about its start and an earlier run.
        compared: The earlier run, if it was held against one.
        among: How many layers the page shows of all its runs, so that it stays small; its own at least.
    """
    of_page = max(among, len(run.layers))
    each, rows = of_page <= charts.EACH, max(ROWS * len(run.layers) // max(of_page, 1), ROWS_LEAST)
    verdicts = [judge(layer, expectations) for layer in run.layers]
    of_layers = [t.figure for t in expectations.thresholds("") if t.figure in run.expected]
    deciding = [*of_layers, *(t.figure for t in expectations.thresholds(MODEL) if t.figure in run.expected)]
    figures = [*dict.fromkeys(deciding), *(figure for figure in run.expected if figure not in deciding)]
    wanted = next((of for most, of in ((CHARTED, figures), (SEVERAL, deciding)) if of_page <= most), of_layers)
    charted = [f for f in figures if f in run.measured and f in wanted]
    bounds = {threshold.figure: threshold for threshold in expectations.thresholds("")}
    moved = judge_drifts(run, expectations)
    profiles = [charts.profile(figure, run.layers, verdicts, bounds.get(figure), each) for figure in charted]
    return Sheet(
        name=printable(name, 200),
        decision=decision,
        facts=_facts(run, verdicts, expectations, notes.unread(run, decision)),
        lines=_lines(run, verdicts, expectations),
        drift=bars.groups(moved, () if compared is None else compared.drift),
        drift_words=() if run.drift is None else _plain(notes.drift(run.drift, *moved), run),
        quotes=() if run.drift is None else list(bars.quotes(run.drift, moved)),
        stands=list(bars.stands(run)),
        reading=_plain(reading(judge_averages(run, expectations)), run) if run.complete and run.layers else (),
        figures=figures,
        deciding=list(dict.fromkeys(deciding)),
        of_layers=of_layers,
        heats=[charts.heat(f, run.layers, charts.shades(f, run.layers, verdicts), each) for f in charted],
        profiles=[profile for profile in profiles if profile is not None],
        rows=_rows(list(zip(run.layers, verdicts, strict=True)), rows, figures, of_layers, compared),
        left=max(0, len(run.layers) - rows),
        averages=[scanned_figure(run, figure) for figure in figures] if run.layers else (),
        remedy=_plain([*told_changes.remedy(run), *((line, None) for line in verdict.steps(run, decision))], run),
        changes=_plain(changes, run),
        since=() if compared is None else moves.moves(compared),
        same="" if compared is None else ", ".join(moves.same(compared)),
        shifted=() if compared is None else _shifted(of_layers, run.layers, compared, each),
        down=named("B", run),
    )


def _shifted(
    figures: Sequence[str], layers: Sequence[LayerStats], compared: Comparison, each: bool
) -> list[charts.Heat]:
    """A heat map of what changed for each figure that did in some layer."""
    shaded = ((figure, moves.shades(figure, layers, compared)) for figure in figures)
    return [
        charts.heat(figure, layers, shades, each)
        for figure, shades in shaded
        if any(shade not in (moves.SAME, "none") for shade, _ in shades)
    ]


def _facts(run: RunStats, verdicts: Sequence[Verdict], expectations: Expectations, unread: str | None) -> list[str]:
    gated = sum(verdict.gated for verdict in verdicts)
    profile = notes.profile(expectations)
    told = [
        notes.conditions(run),
        unread,
        f"layers: {gated:,} of {run.checkpoint_layers:,} gated: {notes.tally(verdicts)}",
        None if profile is None else named(profile, run),
        *model.built_as(run),
        *notes.whole_updates(run),
    ]
    return [fact for fact in told if fact is not None]


def _lines(run: RunStats, verdicts: Sequence[Verdict], expectations: Expectations) -> list[Line]:
    told = [
        notes.ungated(verdicts, expectations),
        *doubts.cautions(run, verdicts),
        *doubts.all_of(verdicts, run, expectations),
    ]
    return _plain([(words, Tier.WARN) for words in told if words is not None], run)


def _plain(lines: Any, run: RunStats) -> list[Line]:
    """Lines of a report without the mark that begins them, which the page draws itself."""
    marks = "".join(MARKS.values())
    return [Line(named(words.strip().lstrip(marks).strip(), run), str(tier or "")) for words, tier in lines]


def _rows(
    judged: Sequence[tuple[LayerStats, Verdict]],
    most: int,
    figures: Sequence[str],
    deciding: Sequence[str],
    compared: Comparison | None,
) -> list[Row]:
    """A row for each of the worst layers; what changed is told of the figures that decide in layers."""
    ordered = sorted(judged, key=lambda pair: pair[1].severity, reverse=True)[:most]
    return [
        Row(
            str(verdict.tier) if verdict.gated else "none",
            mark(verdict),
            printable(layer.name),
            [
                (
                    scanned_figure(layer, figure),
                    _tier(verdict, figure),
                    *(moves.beside(layer.name, figure, compared) if figure in deciding else ("", "")),
                )
                for figure in figures
            ],
            "; ".join(faults(verdict)),
        )
        for layer, verdict in ordered
    ]


def _tier(verdict: Verdict, figure: str) -> str:
    finding = charts.finding_of(verdict, figure)
    return "" if finding is None else str(finding.tier)


_MARKS = {str(tier): MARKS[tier] for tier in Tier} | {"": "", "none": ""}
_SHADES = {
    "w3": "× worse by more than half",
    "w2": "× by 10 to 50 %",
    "w1": "× by less",
    moves.SAME: "= no change, or within its margin",
    "b1": "+ better by less than 10 %",
    "b2": "+ by 10 to 50 %",
    "b3": "+ by more than half",
}
"""What the shades of a heat map of changes mean."""


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


def page(sheets: Sequence[Sheet], beside: Sequence[Candidate] = ()) -> str:
    """The whole page of one run, or of several with what is told of each ``beside`` the others."""
    (style, style_digest), (script, script_digest) = _part("page.css"), _part("page.js")
    return _template().render(
        sheets=sheets,
        rivals=list(zip(sheets, candidates.rivals(beside), strict=True)) if beside else (),
        told=candidates.told(beside) if beside else "",
        known=FIGURES,
        marks=_MARKS,
        shades=_SHADES,
        cell=charts.CELL,
        plot=(charts.WIDTH, charts.HEIGHT),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src '{style_digest}'; script-src '{script_digest}'; base-uri 'none'; "
        "form-action 'none'",
    )
