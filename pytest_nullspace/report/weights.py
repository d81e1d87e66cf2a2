"""The report of a run that was gated on weights alone: what it is comes first, and again last."""

import math
from collections.abc import Callable, Iterator, Sequence

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.judging.weights import STATEMENT, LayerWeights, Weights
from pytest_nullspace.report.layout import Form, table, with_faults
from pytest_nullspace.report.markdown import escape
from pytest_nullspace.report.notes import outside
from pytest_nullspace.report.words import MARKS

WORST_SHOWN = 5
_COLUMNS = ("‖B‖", "‖A‖", "‖W_res‖", "scale", "‖scale·AB‖", "rank used")

Faults = Callable[[LayerWeights], Sequence[str]]
"""What fails a layer."""


def header(checkpoint: Checkpoint, gated: int) -> Iterator[str]:
    """What is gated, and on what."""
    yield (
        f"nullspace: {printable(checkpoint.directory, 1000)} ({checkpoint.format}, {gated} of "
        f"{len(checkpoint.layers)} layers, {checkpoint.ranks}); {STATEMENT}"
    )
    if checkpoint.outside:
        yield f"nullspace: {outside(checkpoint.outside)}"


def summary(
    weights: Weights, faults: Faults, of: int, every: bool, columns: float = math.inf
) -> Iterator[tuple[str, Tier | None]]:
    """The lines of the summary: failed layers first, five or all, then the statement."""
    told = {layer.name: faults(layer) for layer in weights.layers}
    yield counted(weights, faults, of), Tier.FAIL if any(told.values()) else Tier.WARN
    yield "", None
    ordered = sorted(weights.layers, key=lambda layer: (not told[layer.name], layer.rank_used))
    shown = ordered if every else ordered[:WORST_SHOWN]
    cells = [_cells(layer) for layer in shown]
    names = [f"{MARKS[Tier.FAIL] if told[layer.name] else ' '} {printable(layer.name)}" for layer in shown]
    title, *rows = table("layers", names, (Form(_COLUMNS, cells, 14), Form(_COLUMNS, cells)), columns)
    yield title, None
    for row, layer in zip(rows, shown, strict=True):
        tier = Tier.FAIL if told[layer.name] else None
        yield from ((line, tier) for line in with_faults(row, told[layer.name], columns))


def counted(weights: Weights, faults: Faults, of: int) -> str:
    """How many layers were gated on their weights, and that nothing else was."""
    failed = sum(bool(faults(layer)) for layer in weights.layers)
    return f"{STATEMENT}: {len(weights.layers)} of {of} layers, {failed} failed, none measured"


def markdown(title: str, weights: Weights, faults: Faults, of: int, notes: Sequence[str]) -> str:
    """The same as Markdown, every layer."""
    lines = [f"## nullspace: {escape(title)}", "", f"{MARKS[Tier.WARN]} **{counted(weights, faults, of)}**", ""]
    lines += [f"- {escape(note.strip())}" for note in notes]
    lines += ["", "| | layer | " + " | ".join(_COLUMNS) + " | |", "|---|---|" + "---:|" * len(_COLUMNS) + "---|"]
    for layer in weights.layers:
        wrong = faults(layer)
        mark = MARKS[Tier.FAIL] if wrong else " "
        lines.append(f"| {mark} | {escape(layer.name)} | {' | '.join(_cells(layer))} | {escape('; '.join(wrong))} |")
    return "\n".join(lines) + "\n"


def _cells(layer: LayerWeights) -> Sequence[str]:
    base = "–" if layer.base_norm is None else f"{layer.base_norm:.4g}"
    used = f"{layer.rank_used:.1f} of {layer.rank}"
    return f"{layer.down_norm:.4g}", f"{layer.up_norm:.4g}", base, f"{layer.scale:g}", f"{layer.update_norm:.4g}", used
