"""The report on the terminal: the reference's block for each layer, a table of the worst, and a reading in words."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.invariants import Expectations, judge, judge_averages, judge_drifts
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.report import brief, doubts, model, notes
from pytest_nullspace.report.layout import Form, wrapped
from pytest_nullspace.report.words import (
    beside,
    faults,
    mark,
    named,
    reading,
    scanned_figure,
    shown,
    sink_rows,
)
from pytest_nullspace.run.figures import FIGURES, OF_DOWN, beside_a_task
from pytest_nullspace.run.stats import LayerStats, RunStats

if TYPE_CHECKING:
    import pytest
    from _pytest._io import TerminalWriter

    from pytest_nullspace.judging.decision import Decision

WORST_SHOWN = 5
BLOCKS = 2
"""The verbosity from which each layer has a block."""
WIDTH = 60
MARGIN = 4


def write(reporter: "pytest.TerminalReporter", run: RunStats, expectations: Expectations, decision: "Decision") -> None:
    """Print the report of one checkpoint in brief, its verdict first.

    With ``-v`` it is whole, with a row for each layer and where the time went; with ``-vv`` after the reference's block
    for each layer.
    """
    verdicts = [judge(layer, expectations) for layer in run.layers]
    width = columns(reporter._tw)
    if reporter.verbosity <= 0:
        short = brief.summary(run, verdicts, expectations, decision, width)
        write_lines(reporter, ((named(line, run), tier) for line, tier in short))
        return
    write_lines(reporter, ((named(line, run), tier) for line, tier in brief.opening(run, decision, every=True)))
    if reporter.verbosity >= BLOCKS and run.layers:
        write_lines(reporter, ((named(line, run), None) for line in legend()))
        for layer, judged in zip(run.layers, verdicts, strict=True):
            write_lines(reporter, ((named(line, run), None) for line in block(layer, judged)))
    write_lines(reporter, ((line, None) for line in model.built_as(run)))
    if (told := notes.time_spent(run)) is not None:
        write_lines(reporter, [(told, None)])
    whole = summary(run, verdicts, expectations, width, len(verdicts))
    write_lines(reporter, ((named(line, run), tier) for line, tier in whole))


def columns(writer: "TerminalWriter") -> int:
    """How many of the terminal's lines take: some terminals draw a mark two columns wide, so a few stay free."""
    return writer.fullwidth - MARGIN


def write_lines(reporter: "pytest.TerminalReporter", lines: Iterable[tuple[str, Tier | None]]) -> None:
    """Print lines, each in the colour of its tier and wrapped at the terminal's width."""
    for line, tier in lines:
        markup = {} if tier is None else {_COLOURS[tier]: True}
        for part in wrapped(line, columns(reporter._tw)):
            reporter.write_line(part, **markup)


_COLOURS = {Tier.PASS: "green", Tier.WARN: "yellow", Tier.FAIL: "red"}


def legend() -> Iterator[str]:
    """What the letters of the blocks stand for."""
    yield (
        "In the blocks X is a layer's input, BX what B, its down projection, makes of it, and ABX what A, its up "
        "projection, makes of that: the update. W_residual is the layer without it; avg is the mean over tokens."
    )


_NORMS = ("||X|| (avg):", "||BX|| (avg):", "||ABX|| (avg):", "||W_residual @ X||:", "||full output||:")


def block(layer: LayerStats, verdict: Verdict) -> Iterator[str]:
    """The reference's block for one layer."""
    marks = {finding.threshold.figure: mark(verdict, finding.tier) for finding in verdict.findings}
    yield "=" * WIDTH
    yield f"Layer: {printable(layer.name)}"
    yield "=" * WIDTH
    yield f"samples: {layer.rows}" + (f", of which {sink_rows(layer)}" if layer.sinks else "")
    if layer.rank or layer.effective_rank is not None:
        spans = "" if layer.down_rank in (None, layer.rank) else f" (B spans {layer.down_rank})"
        ranks = f"rank: {layer.rank}{spans}, " if layer.rank else ""
        ranks += "" if layer.effective_rank is None else f"effective rank: {layer.effective_rank:.1f}, "
        yield f"input width: {layer.in_features}, {ranks}output width: {layer.out_features}"
    yield "-" * WIDTH
    yield "activation norms:"
    for label, value in zip(_NORMS, layer.norms, strict=True):
        if value is not None:
            yield f"  {label:<22} {value:.6f}"
    yield "-" * WIDTH
    yield "null-space figures:"
    for figure in ("preservation", "effectiveness", "leakage"):
        if figure not in OF_DOWN or layer.down_norm is not None:
            yield _figure_line(layer, figure, marks)
    yield "-" * WIDTH
    yield "adapter contribution:"
    yield _figure_line(layer, "contribution", marks)
    if layer.task is not None:
        yield "-" * WIDTH
        yield "preserved text against task text (effectiveness and contribution above are of the task text):"
        for figure in beside_a_task():
            yield _figure_line(layer, figure, marks)
    yield "-" * WIDTH
    base = "not measured" if layer.base_weight_norm is None else f"{layer.base_weight_norm:.6f}"
    down = "" if layer.down_weight_norm is None else f"||B||_F {layer.down_weight_norm:.6f}   "
    update = "||ΔW||_F" if layer.effective_rank is not None else "||A||_F"
    yield f"weight norms:  {down}{update} {layer.up_weight_norm:.6f}   ||W_residual||_F {base}"
    for fault in faults(verdict):
        yield f"  {mark(verdict)} {fault}"


def _figure_line(layer: LayerStats, figure: str, marks: Mapping[str, str]) -> str:
    told = f"{shown(layer, figure)}  {marks.get(figure, '')}".rstrip()
    return f"  {FIGURES[figure].symbol + ':':<22} {told}  {beside(layer, figure)}".rstrip()


def summary(
    run: RunStats,
    verdicts: Sequence[Verdict],
    expectations: Expectations,
    width: float = math.inf,
    shown: int = WORST_SHOWN,
) -> Iterator[tuple[str, Tier | None]]:
    """The lines of the whole summary, each with the tier that colours it.

    Args:
        run: What was measured.
        verdicts: On each of its layers.
        expectations: What it was held against.
        width: Columns of the terminal.
        shown: How many layers have a row, the worst first.
    """
    conditions = notes.conditions(run)
    if conditions is not None:
        yield conditions, None
    yield from brief.counted(run, verdicts, expectations)
    if not run.layers and run.drift is None:
        return
    yield from brief.cautions(run, verdicts, expectations)
    yield from ((doubt, Tier.WARN) for doubt in doubts.all_of(verdicts, run, expectations))
    yield "", None
    yield from _table(run, verdicts, width, shown)
    for line in notes.best_possible(run):
        yield line, None
    if run.drift is not None:
        yield "", None
        yield from notes.drift(run.drift, *judge_drifts(run, expectations))
        yield from ((line, None) for line in notes.passages(run.drift))
    if run.complete:
        averages = judge_averages(run, expectations)
        yield "", None
        yield f"reading (averages over all layers{'' if averages.gated else '; no test judged them'}):", None
        yield from reading(averages)


def _table(run: RunStats, verdicts: Sequence[Verdict], width: float, shown: int) -> Iterator[tuple[str, Tier | None]]:
    ordered = sorted(zip(run.layers, verdicts, strict=True), key=lambda pair: pair[1].severity, reverse=True)
    worst = ordered[:shown]
    rows: list[LayerStats | RunStats] = [*(layer for layer, _ in worst), run]
    cells = [[scanned_figure(row, figure) for figure in run.expected] for row in rows]
    forms = (
        Form(run.expected, cells),
        Form([FIGURES[figure].short or figure for figure in run.expected], cells),
    )
    yield from brief.layer_lines("worst layers" if len(ordered) > len(worst) else "layers", worst, forms, width)
