"""What the charts of a page are drawn from: heat maps by block and projection, depth profiles. Pure coordinates.

A chart of ten thousand layers must stay small: where a page has more than `EACH` layers, cells of one shade become one
path, and a profile shows the least, the median and the most of each block in place of a dot a layer.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.verdicts import Finding, Threshold, Tier, Verdict
from pytest_nullspace.run.stats import LayerStats

EACH = 600
"""Layers of a page up to which each has a cell and a dot of its own, with its value to be seen on hovering."""
CELL, SLIM, NARROW = 16, 12, 2
"""A cell's height and greatest width, its width where two maps then stand side by side, and its least width."""
HALF, WIDE = 384, 720
"""How wide two maps side by side may be each, and how wide one becomes before its cells grow narrow."""
DIGIT, GAP, LINE = 7, 4, 12
"""How wide a digit of a label is, the gap after it, and how high a line of labels."""
SHADES = 4
"""Of a figure that does not decide: how many shades it has between its least and its greatest value."""
HEIGHT, WIDTH = 150, 720
"""Of a profile's plot."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A layer's place in a heat map."""

    x: float
    y: float
    shade: str
    title: str


@dataclass(frozen=True, slots=True)
class Heat:
    """A figure over blocks (across) and projections (down).

    Attributes:
        figure: Its name.
        labels: Of the rows, each with its middle.
        blocks: Labels of some columns, each with its left edge.
        cells: One a layer; empty where there are too many.
        paths: The shade and the line through all cells of one shade, where there are too many.
        width: Of the cells together.
        height: Of the rows together.
        cell: How wide a cell is.
        counts: How many layers have each shade.
        signs: The outline of the marks that stand in cells.
    """

    figure: str
    labels: Sequence[tuple[float, str]]
    blocks: Sequence[tuple[float, str]]
    cells: Sequence[Cell]
    paths: Sequence[tuple[str, str]]
    width: float
    height: float
    cell: float
    counts: Mapping[str, int]
    signs: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer lies: its block's number, and its name without it."""

    block: int
    row: str


def place(name: str) -> Place:
    """Where the layer of that name lies; one that is in no numbered block is in block 0."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal() and part.isascii()), None)
    if at is None:
        return Place(0, name)
    return Place(int(parts[at]), ".".join(parts[at + 1 :]) or parts[at - 1])


def heat(figure: str, layers: Sequence[LayerStats], shades: Sequence[tuple[str, str]], each: bool = True) -> Heat:
    """The heat map of one figure, from each layer's shade and what is told of it; with ``each`` a cell a layer."""
    places = [place(layer.name) for layer in layers]
    columns = {block: number for number, block in enumerate(sorted({at.block for at in places}))}
    rows = {row: number for number, row in enumerate(dict.fromkeys(at.row for at in places))}
    cell = next((width for width in (CELL, SLIM) if width * len(columns) <= HALF), WIDE / max(1, len(columns)))
    cell = max(NARROW, min(CELL, cell))
    cells = [
        Cell(columns[at.block] * cell, rows[at.row] * CELL, shade, f"{printable(layer.name)}: {told}")
        for layer, at, (shade, told) in zip(layers, places, shades, strict=True)
    ]
    step = max(1, math.ceil((DIGIT * len(str(max(columns, default=0))) + GAP) / cell))
    return Heat(
        figure,
        [(number * CELL + CELL / 2, printable(row)) for row, number in rows.items()],
        [(number * cell, str(block)) for block, number in columns.items() if number % step == 0],
        cells if each else (),
        () if each else _merged(cells, cell),
        len(columns) * cell,
        len(rows) * CELL,
        cell,
        Counter(shade for shade, _ in shades),
        "".join(_sign(of, cell) for of in cells) if each else "",
    )


def shades(figure: str, layers: Sequence[LayerStats], verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """Each layer's shade and its value in words.

    The shade is its tier where the figure decides, else where it lies between the least and the most.
    """
    values = [layer.figure(figure) for layer in layers]
    known = sorted(value for value in values if math.isfinite(value))
    found = []
    for value, verdict in zip(values, verdicts, strict=True):
        finding = finding_of(verdict, figure)
        if not math.isfinite(value):
            found.append("none" if verdict.tier is not Tier.FAIL else str(Tier.FAIL))
        elif finding is not None:
            found.append(str(finding.tier))
        else:
            share = bisect_left(known, value) / max(1, len(known) - 1)
            found.append(f"s{min(SHADES - 1, int(share * SHADES))}")
    return list(zip(found, (_value(layer, figure) for layer in layers), strict=True))


def finding_of(verdict: Verdict, figure: str) -> Finding | None:
    """What was found of a figure; None where it does not decide, or nothing was judged."""
    if verdict.unjudged is not None:
        return None
    return next((finding for finding in verdict.findings if finding.threshold.figure == figure), None)


_CROSS, _PLUS, _BANG = "m-3 -3l6 6m0 -6l-6 6", "m-3 0h6m-3 -3v6", "m0 -5v6m0 2v2"
_SIGNS = {"fail": _CROSS, "warn": _BANG, **{f"w{n}": _CROSS for n in (1, 2, 3)}, **{f"b{n}": _PLUS for n in (1, 2, 3)}}
"""What is drawn in the middle of a cell of a shade."""


def _sign(of: Cell, width: float) -> str:
    sign = _SIGNS.get(of.shade)
    return "" if sign is None else f"M{of.x + width / 2:g} {of.y + CELL / 2:g}{sign}"


def _merged(cells: Iterable[Cell], width: float) -> list[tuple[str, str]]:
    """Of each shade one path through all of its cells, neighbours in a row as one piece."""
    by_shade: dict[str, list[Cell]] = {}
    for cell in cells:
        by_shade.setdefault(cell.shade, []).append(cell)
    return [(shade, "".join(_pieces(of, width))) for shade, of in by_shade.items()]


def _pieces(cells: Sequence[Cell], width: float) -> Iterable[str]:
    for y, row in groupby(sorted(cells, key=lambda cell: (cell.y, cell.x)), key=lambda cell: cell.y):
        begin = end = -1.0
        for cell in row:
            if begin >= 0 and abs(cell.x - end) < width / 2:
                end = cell.x + width
                continue
            if begin >= 0:
                yield _piece(begin, y, end - begin)
            begin, end = cell.x, cell.x + width
        yield _piece(begin, y, end - begin)


def _piece(x: float, y: float, width: float) -> str:
    return f"M{x:g} {y + CELL / 2:g}h{width:g}"  # a line as thick as a cell is high


@dataclass(frozen=True, slots=True)
class Dot:
    """A layer in a profile."""

    x: float
    y: float
    tier: str
    title: str


@dataclass(frozen=True, slots=True)
class Profile:
    """A figure along the depth of the model.

    Attributes:
        figure: Its name.
        dots: One a layer; empty where there are too many.
        whiskers: The outline of their margins.
        band: The outline of least and most by block, where there are.
        line: The medians of the blocks.
        bounds: What parts the tiers: height, that of its label, the label and the tier beyond.
        ticks: Heights and values at the side.
        best: The least that any subspace could reach, the medians of the blocks; empty where that was not measured.
    """

    figure: str
    dots: Sequence[Dot]
    whiskers: str
    band: str
    line: str
    bounds: Sequence[tuple[float, float, str, str]]
    ticks: Sequence[tuple[float, str]]
    best: str


def profile(
    figure: str,
    layers: Sequence[LayerStats],
    verdicts: Sequence[Verdict],
    threshold: Threshold | None,
    each: bool = True,
) -> Profile | None:
    """The profile of one figure, with ``each`` a dot a layer; None where no layer has a positive, finite value."""
    values = [layer.figure(figure) for layer in layers]
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if not positive:
        return None
    limits = [] if threshold is None else [b for b in (threshold.passes, threshold.fails) if b > 0]
    blocks = _by_block(layers, values)
    least = _by_block(layers, _least(layers) if figure == "leakage" else ())
    scale = _Scale.of([*positive, *limits, *(v for of in least.values() for v in of if v > 0)])
    order = sorted(blocks)
    across = {block: (i + 0.5) * WIDTH / len(order) for i, block in enumerate(order)}
    middle, best = (_polyline([(across[b], scale(median(of[b]))) for b in order if b in of]) for of in (blocks, least))
    (dots, whiskers), band = _dots(figure, layers, verdicts, scale) if each else ([], ""), ""
    if not each:
        top = [(across[block], scale(max(blocks[block]))) for block in order]
        bottom = [(across[block], scale(min(blocks[block]))) for block in reversed(order)]
        band = _polyline([*top, *bottom]) + "z"
    return Profile(figure, dots, whiskers, band, middle, _bounds(threshold, scale), scale.ticks, best)


def _by_block(layers: Sequence[LayerStats], values: Sequence[float]) -> dict[int, list[float]]:
    """The finite ones of ``values``, one a layer or none at all, by the number of the block."""
    blocks: dict[int, list[float]] = {}
    for layer, value in zip(layers, values, strict=False):
        if math.isfinite(value):
            blocks.setdefault(place(layer.name).block, []).append(value)
    return blocks


def _least(layers: Sequence[LayerStats]) -> list[float]:
    """The leakage over chance that the best subspace of each layer has."""
    return [
        layer.spectrum.least_leakage / layer.chance if layer.spectrum and layer.chance else math.nan for layer in layers
    ]


def _dots(
    figure: str, layers: Sequence[LayerStats], verdicts: Sequence[Verdict], scale: "_Scale"
) -> tuple[list[Dot], str]:
    """A dot for each layer, and the outline of all margins that are to be seen."""
    dots: list[Dot] = []
    whiskers = []
    for number, (layer, verdict) in enumerate(zip(layers, verdicts, strict=True)):
        value, margin = layer.figure(figure), layer.margin(figure) or 0.0
        if not math.isfinite(value):
            continue
        finding = finding_of(verdict, figure)
        x, y = round((number + 0.5) * WIDTH / len(layers), 1), scale(value)
        tier = f"s{SHADES - 1}" if finding is None else str(finding.tier)
        dots.append(Dot(x, y, tier, f"{printable(layer.name)}: {_value(layer, figure)}"))
        if math.isfinite(margin) and (ends := (scale(value - margin), scale(value + margin)))[0] - ends[1] > 1:
            whiskers.append(f"M{x:g} {ends[0]:g}V{ends[1]:g}")
    return dots, "".join(whiskers)


def _bounds(threshold: Threshold | None, scale: "_Scale") -> list[tuple[float, float, str, str]]:
    """The bounds, the labels of two that lie near each other apart."""
    if threshold is None:
        return []
    told = ((threshold.passes, "pass", Tier.PASS), (threshold.fails, "fail", Tier.FAIL))
    found = sorted((scale(bound), f"{word} {bound:g}", str(tier)) for bound, word, tier in told if bound > 0)
    heights = [y for y, *_ in found]
    if len(heights) > 1 and heights[1] - heights[0] < LINE:
        middle = sum(heights) / 2
        heights = [middle - LINE / 2, middle + LINE / 2]
    return [(y, at, label, tier) for (y, label, tier), at in zip(found, heights, strict=True)]


@dataclass(frozen=True, slots=True)
class _Scale:
    """Logarithmic heights, the greatest value on top; what is not positive lies at the bottom."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "_Scale":
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return cls(low, max(high, low + 1))

    def __call__(self, value: float) -> float:
        exponent = math.log10(value) if value > 0 else self.low
        part = (min(max(exponent, self.low), self.high) - self.low) / (self.high - self.low)
        return round(HEIGHT * (1 - part), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        step = max(1, round((self.high - self.low) / 4))
        return [(self(10.0**e), f"{10.0**e:g}") for e in range(int(self.low), int(self.high) + 1, step)]


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:g}" for x, y in points) if points else ""


def _value(layer: LayerStats, figure: str) -> str:
    value, margin = layer.figure(figure), layer.margin(figure)
    return f"{value:.3g}" + ("" if margin is None else f" ± {margin:.2g}")
