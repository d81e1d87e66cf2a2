"""The report of a run that was gated on weights alone: what it is comes first, and again last."""

import math
from collections.abc import Callable, Iterator, Sequence

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.judging.weights import STATEMENT, LayerWeights, Weights
from pytest_nullspace.report.layout import Form, table, with_faults
from pytest_nullspace.report.markdown import escape, headed
from pytest_nullspace.report.notes import negative_scales, outside
from pytest_nullspace.report.page import Page, Row, kind
from pytest_nullspace.report.words import MARKS

WORST_SHOWN = 5
_COLUMNS = ("norm of B", "norm of A", "norm of W_res", "scale", "of the update", "rank used")
_SHORT = ("B", "A", "W_res", "scale", "update", "rank used")

Faults = Callable[[LayerWeights], Sequence[str]]
"""What fails a layer."""

Names = Callable[[str], str]
"""How a sentence calls the matrices: as in the adapter's files."""

Gates = Callable[[str], bool]
"""Whether the test of a layer of that name came to a verdict."""


def _all(_: str) -> bool:
    return True


def header(checkpoint: Checkpoint, gated: int) -> Iterator[str]:
    """What is gated, and on what."""
    yield (
        f"nullspace: {printable(checkpoint.directory, 1000)} ({checkpoint.format}, {gated} of "
        f"{len(checkpoint.layers)} layers, {checkpoint.ranks}); {STATEMENT}"
    )
    if checkpoint.outside:
        yield f"nullspace: {outside(checkpoint.outside)}"


def summary(
    weights: Weights,
    faults: Faults,
    of: int,
    every: bool,
    columns: float = math.inf,
    gates: Gates = _all,
    called: Names = str,
) -> Iterator[tuple[str, Tier | None]]:
    """The lines of the summary: failed layers first, five or all, then the statement."""
    told = {layer.name: [called(fault) for fault in faults(layer)] for layer in weights.layers}
    failed = any(wrong for name, wrong in told.items() if gates(name))
    yield counted(weights, faults, of, gates), Tier.FAIL if failed else Tier.WARN
    if (negative := negative_scales(weights.layers)) is not None:
        yield negative, Tier.WARN
    yield "", None
    ordered = sorted(weights.layers, key=lambda layer: (not told[layer.name], layer.rank_used))
    shown = ordered if every else ordered[:WORST_SHOWN]
    cells = [_cells(layer) for layer in shown]
    beside = [_told(told[layer.name], gates(layer.name)) for layer in shown]
    names = [f"{mark} {printable(layer.name)}" for layer, (mark, _) in zip(shown, beside, strict=True)]
    forms = Form([*map(called, _COLUMNS)], cells), Form([*map(called, _SHORT)], cells)
    title, *rows = table("layers, by norms", names, forms, columns)
    yield title, None
    for row, (mark, wrong) in zip(rows, beside, strict=True):
        tier = None if mark == " " else Tier.FAIL
        yield from ((line, tier) for line in with_faults(row, wrong, columns))


def _told(faults: Sequence[str], gated: bool) -> tuple[str, Sequence[str]]:
    """The mark of a layer, and what is said beside it."""
    if gated:
        return MARKS[Tier.FAIL] if faults else " ", faults
    return " ", ["not gated, would fail: " + "; ".join(faults) if faults else "not gated"]


def counted(weights: Weights, faults: Faults, of: int, gates: Gates = _all) -> str:
    """How many layers were gated on their weights, and that nothing else was."""
    failed = {layer.name: bool(faults(layer)) for layer in weights.layers}
    gated = [wrong for name, wrong in failed.items() if gates(name)]
    left = [wrong for name, wrong in failed.items() if not gates(name)]
    beside = f"; the tests of {len(left)} more were left out or not run, {sum(left)} would have failed" if left else ""
    return f"{STATEMENT}: {len(gated)} of {of} layers, {sum(gated)} failed, none measured{beside}"


def markdown(title: str, weights: Weights, faults: Faults, of: int, notes: Sequence[str], gates: Gates = _all) -> str:
    """The same as Markdown, every layer."""
    return page(title, weights, faults, of, notes, gates).whole


def page(
    title: str,
    weights: Weights,
    faults: Faults,
    of: int,
    notes: Sequence[str],
    gates: Gates = _all,
    decision: Decision | None = None,
    called: Names = str,
) -> Page:
    """The same in its parts, the verdict first where there is one."""
    lines = [*headed(title, decision), f"{MARKS[Tier.WARN]} **{counted(weights, faults, of, gates)}**", ""]
    if (negative := negative_scales(weights.layers)) is not None:
        lines += [f"{MARKS[Tier.WARN]} {escape(negative)}", ""]
    lines += [f"- {escape(note.strip())}" for note in notes]
    columns = f"| | layer | {' | '.join(map(called, _COLUMNS))} | |\n|---|---|{'---:|' * len(_COLUMNS)}---|"
    rows = []
    for layer in weights.layers:
        found = [called(fault) for fault in faults(layer)]
        mark, wrong = _told(found, gates(layer.name))
        what = kind(Tier.FAIL if found else Tier.PASS, gates(layer.name))
        cells = " | ".join(_cells(layer))
        rows.append(Row(what, f"| {mark} | {escape(layer.name)} | {cells} | {escape('; '.join(wrong))} |"))
    return Page("\n".join(lines), rows, "", columns)


def _cells(layer: LayerWeights) -> Sequence[str]:
    base = "–" if layer.base_norm is None else f"{layer.base_norm:.4g}"
    used = f"{layer.rank_used:.1f} of {layer.rank}"
    return f"{layer.down_norm:.4g}", f"{layer.up_norm:.4g}", base, f"{layer.scale:g}", f"{layer.update_norm:.4g}", used
