"""What changed: the run against its start and against an earlier one, and the causes of what is wrong."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.audit import Audit
from pytest_nullspace.judging.baseline import Change, Comparison
from pytest_nullspace.judging.evidence import Diagnosis
from pytest_nullspace.judging.remedy import Remedy
from pytest_nullspace.judging.start import Start, quantities
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report.words import named
from pytest_nullspace.run import texts
from pytest_nullspace.run.figures import of_layers
from pytest_nullspace.run.stats import RunStats

MOVED_SHOWN = 5


def comparison(compared: Comparison, against: Path, missing: Sequence[str]) -> Iterator[tuple[str, Tier | None]]:
    """How the run compares with an earlier one: what fails, then each figure that changed.

    On the same windows by how much and with which margin, else where it became worse by most; what did not change once.
    """
    worse = [name for name, told in compared.regressions.items() if told]
    of = len(compared.regressions)
    unchanged = compared.is_none and not missing
    yield (
        f"against {printable(against, 1000)}: {len(worse)} of {of} layers are worse than allowed"
        + (f", {len(missing)} of its layers are missing" if missing else "")
        + ("; no change" if unchanged else "")
        + ("" if compared.unpaired is None else f"; unpaired: {compared.unpaired}"),
        Tier.FAIL if worse or missing or compared.drift_regressions else None,
    )
    yield from ((f"  {doubt}", None) for doubt in compared.doubts)
    if unchanged:
        return
    still = []
    for figure in of_layers():
        worst = compared.worst(figure)
        if worst is None:
            continue
        name, change = worst
        mean = next((told for told in compared.averages if told.figure == figure), None)
        if change.margin is None or mean is None:
            yield f"  largest change for the worse: {change} in {printable(name)}", None
        elif change.is_none and mean.is_none:
            still.append(figure)
        else:
            count = compared.worse(figure)
            most = f"; most: {change} in {printable(name)}" if count else ""
            yield f"  {mean} in the mean; beyond its margin worse in {count} of {of} layers{most}", None
    if still:
        yield f"  no change: {', '.join(still)}", None
    yield from ((f"  {change}", None) for change in compared.drift)


def start_lines(
    start: Start, file: Path, run: RunStats, trained: bool, every: bool
) -> Iterator[tuple[str, Tier | None]]:
    """What changed since the saved start: each quantity in the mean and in the layer where it changed by most.

    With ``every`` also each quantity in each layer.
    """
    wrong = [layer for layer in run.layers if any(start.check(layer, trained))]
    yield (
        f"against its start {printable(file, 1000)}, a saved run: variant {start.variant}, {start.decided}; "
        f"{len(wrong)} of {len(run.layers)} layers are not what training may make of it",
        Tier.FAIL if wrong else None,
    )
    moves = start.moves(run)
    for quantity in quantities():
        changes = [(name, move) for name, told in moves.items() for move in told if move.figure == quantity]
        if changes:
            before, now = (fmean(getattr(move, side) for _, move in changes) for side in ("before", "now"))
            name, most = max(changes, key=lambda pair: _size(pair[1]))
            yield f"  {Change(quantity, before, now, True)} in the mean; by most: {most} in {printable(name)}", None
    for name, told in moves.items() if every else ():
        yield f"  {printable(name)}: {'; '.join(map(str, told))}", None


def held_out(run: RunStats, start: Start | None) -> tuple[str, Tier | None]:
    """Whether the text is one from which B may have been built, as far as the saved start tells."""
    no_evidence = "the text that built B is no evidence of its null space"
    digests = [] if start is None else [of.get("sha256") for of in texts.preserved(start.run.about).values()]
    known = [digest for digest in digests if isinstance(digest, str)]
    if start is None or not known:
        return f"held out: unknown, for nothing tells from which text B was built; {no_evidence}", None
    both = texts.shared(run.about, start.run.about)
    if not both:
        return f"held out: the saved start read another text (sha256 {', '.join(map(_digest, known))})", None
    windows, named = "the same windows" if any(both.values()) else "other windows", ", ".join(map(_digest, both))
    return (
        f"in-sample: the saved start read {windows} of the same text (sha256 {named}); if B was "
        f"built from it, gate on another one, with --nullspace-compare-allow=text: {no_evidence}",
        Tier.WARN,
    )


def _digest(whole: str) -> str:
    return printable(whole[:12])


def _size(change: Change) -> tuple[float, float]:
    """How large a change is, in whatever direction, to sort by; what is no number is the largest."""
    sizes = abs(change.share), abs(change.worsened)
    return (math.inf, math.inf) if math.isnan(sizes[1]) else sizes


def audit_lines(audited: Audit) -> Iterator[tuple[str, Tier | None]]:
    """What moved since training started, in all layers and outside them."""
    layers, of = audited.layers, len(audited.layers)
    yield (
        f"against its start {printable(audited.initial, 1000)}: variant {printable(audited.variant)}, "
        f"{printable(audited.decided)}",
        None,
    )
    down = [layer for layer in layers if not layer.down <= layer.tolerance]
    angle = max((layer.angle for layer in layers), default=0.0)
    base = sum(layer.base is not None and not layer.base <= layer.tolerance for layer in layers)
    yield (
        f"  B moved in {len(down)} of {of} layers, largest principal angle {angle:.3g}°; W_res changed in {base}; "
        f"A moved in {sum(layer.up != 0 for layer in layers)}",
        Tier.FAIL if base or (down and audited.variant == "v2") else None,
    )
    scales = Counter((layer.initial_scale, layer.scale) for layer in layers if layer.scale is not None)
    for (before, now), count in scales.items():
        told = f"was {before}" if before is not None else "the start has no such factor"
        changed = before is not None and before != now
        yield f"  scale {now}; {told} (in {count} of {of} layers)", Tier.FAIL if changed else None
    yield f"  {moved(audited)}", Tier.FAIL if audited.others else None


def moved(audited: Audit) -> str:
    """Which tensors outside the layers are not what they were, the farthest first, and whether the base is another."""
    others = sorted(audited.tensors, key=lambda other: (not math.isnan(other.change), -other.change))
    told = "; ".join(map(str, others[:MOVED_SHOWN])) + ("; …" if len(others) > MOVED_SHOWN else "")
    counted = f"{len(others)} of {audited.compared} tensors outside the layers moved" + (f": {told}" if told else "")
    return "; ".join((*map(str, audited.bases), counted))


def remedy(run: RunStats) -> Iterator[tuple[str, Tier | None]]:
    """What would make it pass, where that was looked for."""
    found = Remedy.of(run.about)
    if found is not None:
        yield f"suggestion: {found}", None


def in_names(causes: Sequence[Diagnosis], run: RunStats) -> list[Diagnosis]:
    """The causes with the matrices called as in the adapter's files."""
    return [
        replace(cause, evidence=named(cause.evidence, run), cure=named(cause.cure, run), apart=named(cause.apart, run))
        for cause in causes
    ]


def explained(causes: Sequence[Diagnosis]) -> Iterator[tuple[str, Tier | None]]:
    """Each cause with its evidence, its cure, what would tell it from the next likely one, and its page."""
    for cause in causes:
        yield f"cause: {cause.cause}: {cause.evidence}", Tier.FAIL
        yield f"  cure: {cause.cure}", None
        yield f"  to tell it apart: {cause.apart}", None
        yield f"  more: {cause.page}", None
