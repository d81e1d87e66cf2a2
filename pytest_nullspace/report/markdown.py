"""The report as Markdown, for a job's summary page or a file."""

from collections.abc import Iterable, Iterator

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.invariants import Expectations, judge, judge_averages, judge_drift
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.report import doubts, verdict
from pytest_nullspace.report.model import remarks, unreached
from pytest_nullspace.report.notes import (
    best_possible,
    drift,
    negative_scales,
    not_measured,
    outside,
    outside_of,
    profile,
    tally,
    texts,
    ungated,
)
from pytest_nullspace.report.page import Page, Row, kind
from pytest_nullspace.report.words import MARKS, figures, mark, not_gated, reading
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.stats import RunStats


def escape(text: str) -> str:
    """``text`` such that Markdown and HTML show it letter by letter."""
    shown = printable(text, 1000)
    for character in "\\`*_{}[]<>()#+-.!|&~":
        shown = shown.replace(character, f"\\{character}")
    return shown


def decided(decision: Decision) -> Iterator[str]:
    """The verdict and what decided it."""
    first, *rest = (line for line, _ in verdict.lines(decision))
    yield f"**{escape(first)}**"
    yield ""
    yield from (f"- {escape(line)}" for line in rest)
    yield ""


def report(run: RunStats, expectations: Expectations, notes: Iterable[str] = ()) -> str:
    """A table of every layer and the averages, with the reading in words and ``notes`` above it."""
    return page(run, expectations, notes).whole


def page(
    run: RunStats, expectations: Expectations, notes: Iterable[str] = (), decision: Decision | None = None
) -> Page:
    """The same in its parts, the verdict first where there is one."""
    verdicts = [judge(layer, expectations) for layer in run.layers]
    lines = [
        f"## nullspace: {escape(run.model_path)}",
        "",
        *(decided(decision) if decision is not None else ()),
        f"Gated {sum(judged.gated for judged in verdicts)} of {run.checkpoint_layers} layers on "
        f"{escape(texts(run))}: **{tally(verdicts)}**.",
        "",
    ]
    if (told := ungated(verdicts, expectations)) is not None:
        lines += [f"{MARKS[Tier.WARN]} {escape(told)}.", ""]
    if not run.layers and run.drift is None:
        lines += ["No layer was measured; what follows is read from the files.", ""]
        return Page("\n".join([*lines, *(f"- {escape(note.strip())}" for note in notes)]), ())
    absent = not_measured(run)
    if absent is not None:
        lines += [f"{absent}.", ""]
    negative = negative_scales(run.layers)
    if negative is not None:
        lines += [f"{MARKS[Tier.WARN]} {escape(negative)}.", ""]
    if (by := profile(expectations)) is not None:
        lines += [f"{escape(by[0].upper() + by[1:])}.", ""]
    if names := outside_of(run):
        lines += [f"{MARKS[Tier.WARN]} {escape(outside(names))}", ""]
    for remark in (*remarks(run), *unreached(verdicts)):
        lines += [f"{MARKS[Tier.WARN]} {escape(remark)}.", ""]
    if run.complete:
        averages = judge_averages(run, expectations)
        lines += [] if averages.gated else ["The averages over all layers; no test judged them:", ""]
        lines += [f"- {line.strip().replace('<', '&lt;')}" for line, _ in reading(averages)]
    lines += [f"- {escape(line)}" for line in best_possible(run)]
    if run.drift is not None:
        told_of_drift = drift(run.drift, judge_drift(run.drift, expectations))
        lines += ["", *(f"- {escape(line.strip())}" for line, _ in told_of_drift)]
    for doubt in doubts.all_of(verdicts, run, expectations):
        lines += ["", f"{escape(doubt)}."]
    noted = [f"- {escape(note.strip())}" for note in notes]
    lines += ["", *noted] if noted else []
    formulas = (
        formula.replace("|", "\\|") for formula in (FIGURES[figure].symbol for figure in run.expected)
    )  # a bare one would end the cell
    lines += ["", "| | layer | " + " | ".join(f"`{formula}`" for formula in formulas) + " | |"]
    lines += ["|---|---|" + "---:|" * len(run.expected) + "---|"]
    rows = []
    for layer, judged in zip(run.layers, verdicts, strict=True):
        cells = " | ".join(figures(layer, run.expected))
        text = f"| {mark(judged)} | {escape(layer.name)} | {cells} | {_why(judged)} |"
        rows.append(Row(kind(judged.tier, judged.gated), text))
    return Page("\n".join(lines), rows, "| | average | " + " | ".join(figures(run, run.expected)) + " | |")


def _why(verdict: Verdict) -> str:
    """What stands beside the figures of a layer that did not simply pass."""
    if not verdict.gated:
        return escape(not_gated(verdict))
    return "" if verdict.tier is Tier.PASS else escape(verdict.summary)
