"""The report on the terminal: the reference's block for each layer, a table of the worst, and a reading in words."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.invariants import Expectations, judge, judge_averages, judge_drift
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.report import notes
from pytest_nullspace.report.words import MARKS, beside, faults, figures, reading, shown, sink_rows
from pytest_nullspace.run.stats import FIGURES, TASK_FIGURES, LayerStats, RunStats

if TYPE_CHECKING:
    import pytest

WORST_SHOWN = 5
WIDTH = 60


def write(reporter: "pytest.TerminalReporter", run: RunStats, expectations: Expectations) -> None:
    """Print the report of one checkpoint: with ``-v`` a block for each layer, with ``-vv`` where the time went."""
    verdicts = [judge(layer, expectations) for layer in run.layers]
    if reporter.verbosity > 0:
        for layer, verdict in zip(run.layers, verdicts, strict=True):
            for line in block(layer, verdict):
                reporter.write_line(line)
    if reporter.verbosity > 1 and (told := notes.time_spent(run)) is not None:
        reporter.write_line(told)
    write_lines(reporter, summary(run, verdicts, expectations))


def write_lines(reporter: "pytest.TerminalReporter", lines: Iterable[tuple[str, Tier | None]]) -> None:
    """Print lines, each in the colour of its tier."""
    for line, tier in lines:
        markup = {} if tier is None else {_COLOURS[tier]: True}
        reporter.write_line(line, **markup)


_COLOURS = {Tier.PASS: "green", Tier.WARN: "yellow", Tier.FAIL: "red"}


def block(layer: LayerStats, verdict: Verdict) -> Iterator[str]:
    """The reference's block for one layer."""
    marks = {finding.threshold.figure: MARKS[finding.tier] for finding in verdict.findings}
    yield "=" * WIDTH
    yield f"Layer: {printable(layer.name)}"
    yield "=" * WIDTH
    yield f"samples: {layer.rows}" + (f", of which {sink_rows(layer)}" if layer.sinks else "")
    if layer.rank:
        spans = "" if layer.down_rank in (None, layer.rank) else f" (B spans {layer.down_rank})"
        yield f"input width: {layer.in_features}, rank: {layer.rank}{spans}, output width: {layer.out_features}"
    yield "-" * WIDTH
    yield "activation norms:"
    for label, value in (
        ("||X|| (avg):", layer.input_norm),
        ("||BX|| (avg):", layer.down_norm),
        ("||ABX|| (avg):", layer.update_norm),
        ("||W_residual @ X||:", layer.base_norm),
        ("||full output||:", layer.output_norm),
    ):
        yield f"  {label:<22} {value:.6f}"
    yield "-" * WIDTH
    yield "null-space figures:"
    for figure in ("preservation", "effectiveness", "leakage"):
        yield _figure_line(layer, figure, marks)
    yield "-" * WIDTH
    yield "adapter contribution:"
    yield _figure_line(layer, "contribution", marks)
    if layer.task is not None:
        yield "-" * WIDTH
        yield "preserved text against task text (effectiveness and contribution above are of the task text):"
        for figure in TASK_FIGURES:
            yield _figure_line(layer, figure, marks)
    yield "-" * WIDTH
    base = "not measured" if layer.base_weight_norm is None else f"{layer.base_weight_norm:.6f}"
    yield (
        f"weight norms:  ||B||_F {layer.down_weight_norm:.6f}   ||A||_F {layer.up_weight_norm:.6f}   "
        f"||W_residual||_F {base}"
    )
    for fault in faults(verdict):
        yield f"  {MARKS[verdict.tier]} {fault}"


def _figure_line(layer: LayerStats, figure: str, marks: Mapping[str, str]) -> str:
    told = f"{shown(layer, figure)}  {marks.get(figure, '')}".rstrip()
    return f"  {FIGURES[figure] + ':':<22} {told}  {beside(layer, figure)}".rstrip()


def summary(
    run: RunStats, verdicts: Sequence[Verdict], expectations: Expectations
) -> Iterator[tuple[str, Tier | None]]:
    """The lines of the summary, each with the tier that colours it."""
    conditions = notes.conditions(run)
    if conditions is not None:
        yield conditions, None
    counts = {tier: sum(verdict.tier is tier for verdict in verdicts) for tier in Tier}
    worst = Tier.worst(verdict.tier for verdict in verdicts)
    yield (
        f"gated {len(run.layers)} of {run.checkpoint_layers} layers: {counts[Tier.PASS]} passed, "
        f"{counts[Tier.WARN]} warned, {counts[Tier.FAIL]} failed",
        worst if run.complete else Tier.WARN if worst is Tier.PASS else worst,
    )
    if not run.layers and run.drift is None:
        yield "no layer was measured; what follows is read from the files", Tier.WARN
        return
    absent = notes.not_measured(run)
    if absent is not None:
        yield absent, Tier.WARN
    unjudged = notes.left_out(expectations)
    if unjudged is not None:
        yield unjudged, Tier.WARN
    if names := notes.outside_of(run):
        yield notes.outside(names), Tier.WARN
    yield from ((doubt, Tier.WARN) for doubt in notes.doubts(verdicts, run, expectations))
    yield "", None
    yield from _table(run, verdicts)
    for line in notes.best_possible(run):
        yield line, None
    if run.drift is not None:
        yield "", None
        yield from notes.drift(run.drift, judge_drift(run.drift, expectations))
    if run.complete:
        averages = judge_averages(run, expectations)
        yield "", None
        yield "reading (averages over all layers):", None
        yield from reading(averages)


def _table(run: RunStats, verdicts: Sequence[Verdict]) -> Iterator[tuple[str, Tier | None]]:
    ordered = sorted(zip(run.layers, verdicts, strict=True), key=lambda pair: pair[1].severity, reverse=True)
    shown = ordered[:WORST_SHOWN]
    width = max(len(name) for name in ("average", *(printable(layer.name) for layer, _ in shown)))
    title = "worst layers" if len(ordered) > len(shown) else "layers"
    yield f"  {title:<{width}} " + "".join(f"{FIGURES[figure]:>20}" for figure in run.expected), None
    for layer, verdict in shown:
        yield _row(MARKS[verdict.tier], printable(layer.name), width, figures(layer, run.expected), verdict)
    yield _row(" ", "average", width, figures(run, run.expected), None)


def _row(mark: str, name: str, width: int, values: Sequence[str], verdict: Verdict | None) -> tuple[str, Tier | None]:
    line = f"{mark} {name:<{width}} " + "".join(f"{value:>20}" for value in values)
    if verdict is not None:
        line += "".join(f"  {fault}" for fault in faults(verdict))
    return line, None if verdict is None or verdict.tier is Tier.PASS else verdict.tier
