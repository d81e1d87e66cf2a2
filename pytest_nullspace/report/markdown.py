"""The report as Markdown, for a job's summary page or a file."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.invariants import Expectations, judge, judge_averages, judge_drifts
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.report import doubts, verdict
from pytest_nullspace.report.notes import (
    best_possible,
    drift,
    passages,
    profile,
    tally,
    texts,
    ungated,
    unread,
)
from pytest_nullspace.report.page import Page, Row, kind
from pytest_nullspace.report.words import MARKS, figures, mark, not_gated, reading
from pytest_nullspace.run.stats import RunStats

_MARKUP = re.compile(r"[\\`*\[\]|&~#$]|(?<!\S )[<>]|[<>](?! )|(?<![^\W_])_|_(?![^\W_])|^[-+](?=\s|$)")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
"""What Markdown, HTML or GitHub read as more than a letter: no underline within a word, no sign between two numbers."""


def escape(text: str) -> str:
    """``text`` such that Markdown and HTML show it letter by letter."""
    return _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(lambda found: f"\\{found[0]}", printable(text, 1000)))


def decided(decision: Decision, steps: Iterable[str] = ()) -> Iterator[str]:
    """The verdict, what decided it, and what to do next."""
    yield f"**{decision.call}**: {escape(decision.sentence)}"
    yield ""
    yield from (f"- {escape(line)}" for line, _ in list(verdict.lines(decision))[1:])
    yield from (f"- {escape(step)}" for step in steps)
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
        *headed(run.model_path, decision, () if decision is None else verdict.steps(run, decision)),
        f"Gated {sum(judged.gated for judged in verdicts):,} of {run.checkpoint_layers:,} layers on "
        f"{escape(texts(run))}: **{tally(verdicts)}**.",
    ]
    if (told := unread(run, decision)) is not None:
        lines += ["", f"{escape(told[0].upper() + told[1:])}."]
    if (told := ungated(verdicts, expectations)) is not None:
        lines += ["", f"{MARKS[Tier.WARN]} {escape(told)}."]
    if not run.layers and run.drift is None:
        lines += ["", "No layer was measured; what follows is read from the files.", ""]
        return Page("\n".join([*lines, *(f"- {escape(note.strip())}" for note in notes)]), ())
    if (by := profile(expectations)) is not None:
        lines += ["", f"{escape(by[0].upper() + by[1:])}."]
    for line in doubts.cautions(run, verdicts):
        lines += ["", f"{MARKS[Tier.WARN]} {escape(line)}."]
    rows = []
    for layer, judged in zip(run.layers, verdicts, strict=True):
        cells = " | ".join(figures(layer, run.expected))
        text = f"| {mark(judged)} | {escape(layer.name)} | {cells} | {_why(judged)} |"
        rows.append(Row(kind(judged.tier, judged.gated), text))
    foot = "| | average | " + " | ".join(figures(run, run.expected)) + " | |"
    columns = f"| | layer | {' | '.join(run.expected)} | |\n|---|---|{'---:|' * len(run.expected)}---|"
    return Page("\n".join(lines), rows, foot, columns, "\n".join(_more(run, verdicts, expectations, notes)))


def headed(path: str, decision: Decision | None, steps: Iterable[str] = ()) -> Iterator[str]:
    """The first lines: what is gated, by the last name of a path from the root, and the verdict on it."""
    yield f"## nullspace: {escape(Path(path).name if Path(path).is_absolute() else path)}"
    yield ""
    yield from decided(decision, steps) if decision is not None else ()


def _more(
    run: RunStats, verdicts: Sequence[Verdict], expectations: Expectations, notes: Iterable[str]
) -> Iterator[str]:
    """What explains the figures, and what keeps them from being trusted as they stand."""
    if run.complete:
        averages = judge_averages(run, expectations)
        yield from () if averages.gated else ("The averages over all layers; no test judged them:", "")
        yield from (f"- {line.strip().replace('<', '&lt;')}" for line, _ in reading(averages))
    yield from (f"- {escape(line)}" for line in best_possible(run))
    if run.drift is not None:
        yield ""
        told = drift(run.drift, *judge_drifts(run, expectations))
        yield from (f"- {escape(line.strip())}" for line, _ in told)
        if changed := [f"- {escape(line.strip())}" for line in passages(run.drift)]:
            yield from ("", "<details><summary>Where the predictions changed most</summary>", "", *changed)
            yield from ("", "</details>")
    for doubt in doubts.all_of(verdicts, run, expectations):
        yield from ("", f"{escape(doubt)}.")
    yield ""
    yield from (f"- {escape(note.strip())}" for note in notes)


def _why(verdict: Verdict) -> str:
    """What stands beside the figures of a layer that did not simply pass."""
    if not verdict.gated:
        return escape(not_gated(verdict))
    return "" if verdict.tier is Tier.PASS else escape(verdict.summary)
