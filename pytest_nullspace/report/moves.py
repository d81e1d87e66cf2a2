"""What a page shows of a run beside an earlier one: old and new of every figure, and where it became worse. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.baseline import Change, Comparison
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report.words import MARKS
from pytest_nullspace.run.stats import LayerStats

TOLD = 0.01
"""Of figures that no margin tells of: which share of the earlier value a change has at least to be called one."""
STEPS = (0.1, 0.5)
"""Shares of the earlier value that part the shades of a heat map of changes."""
FULL = 0.5
"""The share of the earlier value at which a bar is full."""
SAME = "c0"
"""The shade of what did not change, or within its margin."""


@dataclass(frozen=True, slots=True)
class Move:
    """A figure before and now.

    Attributes:
        figure: Its name.
        text: On which text, if it is one of several.
        before: Its value in the earlier run.
        now: Its value in this one.
        share: By how much it moved, as a share of the earlier value.
        told: Better or worse, by how much and with which margin.
        tier: The colour of that.
        width: How far it became worse or better, in per cent of what fills a bar.
        worse: Whether it became worse.
        most: In how many layers it became worse beyond its margin, and where most.
    """

    figure: str
    text: str
    before: str
    now: str
    share: str
    told: str
    tier: str
    width: float
    worse: bool
    most: str


def moves(compared: Comparison) -> list[Move]:
    """The figures that changed: of the predictions text by text, then the averages over layers."""
    of = len(compared.changes)
    found = [_move(change, "", compared.drift_regressions) for change in compared.drift if not _same(change)]
    for change in compared.averages:
        count, worst, most = compared.worse(change.figure), compared.worst(change.figure), ""
        if worst is not None and worst[1].worsened > 0 and not worst[1].is_none:
            most = f"most in {printable(worst[0])}: {worst[1].before:.4g} → {worst[1].now:.4g}"
            if change.margin is not None:
                most = f"beyond its margin worse in {count} of {of} layers" + (f"; {most}" if count else "")
        if most or not _same(change):
            found.append(_move(change, most))
    return found


def same(compared: Comparison) -> list[str]:
    """The names of the others."""
    told = {one.figure for one in moves(compared) if not one.text}
    drift = [f"{change.figure} {printable(change.text)}".rstrip() for change in compared.drift if _same(change)]
    return [*drift, *(change.figure for change in compared.averages if change.figure not in told)]


def _same(change: Change) -> bool:
    return called(change)[0] == "no change"


def _move(change: Change, most: str, regressions: Sequence[str] = ()) -> Move:
    word, tier = called(change, regressions)
    margin = "" if change.margin is None or change.is_none else f" ± {change.margin:.2g}"
    by = f" by {abs(change.worsened):.2g}{margin}" if tier and math.isfinite(change.worsened) else ""
    width = 100 * min(abs(change.share) / FULL, 1.0) if math.isfinite(change.worsened) else 100.0
    moved = (change.now - change.before) / abs(change.before) if change.before else math.inf
    return Move(
        change.figure,
        printable(change.text),
        f"{change.before:.4g}",
        f"{change.now:.4g}",
        "" if change.is_none else f"{moved:+.1%}" if math.isfinite(moved) else "from zero",
        f"{word}{by or margin}",
        tier,
        0.0 if change.is_none else round(width, 1),
        not change.worsened <= 0,
        most,
    )


def called(change: Change, regressions: Sequence[str] = ()) -> tuple[str, str]:
    """Whether a change is one for the better or the worse, and its colour; within its margin it is neither.

    Args:
        change: Before and now.
        regressions: What became worse than is allowed, in phrases that begin with the change.
    """
    if any(told.startswith(str(change)) for told in regressions):
        return "worse than allowed", str(Tier.FAIL)
    if change.is_none or (math.isnan(change.before) and math.isnan(change.now)):
        return "no change", ""
    if not math.isfinite(change.worsened):
        return "no number", str(Tier.FAIL)
    if change.margin is not None and abs(change.worsened) <= change.margin:
        return "within its margin", ""
    if change.margin is None and abs(change.share) < TOLD:
        return "hardly any change", ""
    return ("worse", str(Tier.WARN)) if change.worsened > 0 else ("better", str(Tier.PASS))


def shades(figure: str, layers: Sequence[LayerStats], compared: Comparison) -> list[tuple[str, str]]:
    """For a heat map of what changed: each layer's shade, and the change in words."""
    found = []
    for layer in layers:
        change = _of(layer.name, figure, compared)
        if change is None:
            found.append(("none", "the earlier run does not tell"))
            continue
        word, tier = called(change, compared.regressions.get(layer.name, ()))
        step = sum(abs(change.share) > limit for limit in STEPS) + 1 if math.isfinite(change.share) else len(STEPS) + 1
        side = {str(Tier.PASS): "b", "": ""}.get(tier, "w")
        found.append((f"{side}{step}" if side else SAME, f"{change.before:.3g} → {change.now:.3g}, {word}"))
    return found


def beside(layer: str, figure: str, compared: Comparison | None) -> tuple[str, str]:
    """What a table tells of a change beside the figure of a layer, and its colour; nothing of what is hardly one."""
    change = None if compared is None else _of(layer, figure, compared)
    if compared is None or change is None:
        return "", ""
    word, tier = called(change, compared.regressions.get(layer, ()))
    if not tier:
        return "", ""
    shown = f"{(change.now - change.before) / abs(change.before):+.0%} " if change.before else ""
    side = f"{MARKS[Tier.FAIL]} worse" if tier == Tier.FAIL else word
    return f"{shown}{side}", tier


def _of(layer: str, figure: str, compared: Comparison) -> Change | None:
    return next((change for change in compared.changes.get(layer, ()) if change.figure == figure), None)
