"""What the charts of a page are drawn from: heat maps by block and projection, depth profiles, bars. Pure coordinates.

A chart of ten thousand layers must stay small: beyond `EACH` layers cells of one shade become one path, and a profile
shows the least, the median and the most of each block in place of a dot a layer.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.verdicts import Finding, Threshold, Tier, Verdict
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.stats import LayerStats

EACH = 600
"""Layers up to which each has a cell and a dot of its own, with its value to be seen on hovering."""
CELL, NARROW, WIDE = 16, 2, 720
"""A cell's height and greatest width, its least width, and how wide a heat map becomes before its cells do."""
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
        paths: The shade and the outline of all cells of one shade, where there are.
        width: Of the cells together.
        height: Of the rows together.
        cell: How wide a cell is.
    """

    figure: str
    labels: Sequence[tuple[float, str]]
    blocks: Sequence[tuple[float, str]]
    cells: Sequence[Cell]
    paths: Sequence[tuple[str, str]]
    width: float
    height: float
    cell: float


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


def heat(figure: str, layers: Sequence[LayerStats], verdicts: Sequence[Verdict]) -> Heat:
    """The heat map of one figure."""
    places = [place(layer.name) for layer in layers]
    columns = {block: number for number, block in enumerate(sorted({at.block for at in places}))}
    rows = {row: number for number, row in enumerate(dict.fromkeys(at.row for at in places))}
    cell = max(NARROW, min(CELL, WIDE / max(1, len(columns))))
    shades = shade_of(figure, layers, verdicts)
    cells = [
        Cell(columns[at.block] * cell, rows[at.row] * CELL, shade, f"{printable(layer.name)}: {_value(layer, figure)}")
        for layer, at, shade in zip(layers, places, shades, strict=True)
    ]
    step = max(1, math.ceil(36 / cell))
    few = len(cells) <= EACH
    return Heat(
        figure,
        [(number * CELL + CELL / 2, printable(row)) for row, number in rows.items()],
        [(number * cell, str(block)) for block, number in columns.items() if number % step == 0],
        cells if few else (),
        () if few else _merged(cells, cell),
        len(columns) * cell,
        len(rows) * CELL,
        cell,
    )


def shade_of(figure: str, layers: Sequence[LayerStats], verdicts: Sequence[Verdict]) -> list[str]:
    """The shade of each layer: its tier where the figure decides, else where it lies between the least and the most."""
    values = [layer.figure(figure) for layer in layers]
    known = sorted(value for value in values if math.isfinite(value))
    shades = []
    for value, verdict in zip(values, verdicts, strict=True):
        finding = finding_of(verdict, figure)
        if not math.isfinite(value):
            shades.append("none" if verdict.tier is not Tier.FAIL else str(Tier.FAIL))
        elif finding is not None:
            shades.append(str(finding.tier))
        else:
            share = bisect_left(known, value) / max(1, len(known) - 1)
            shades.append(f"s{min(SHADES - 1, int(share * SHADES))}")
    return shades


def finding_of(verdict: Verdict, figure: str) -> Finding | None:
    """What was found of a figure; None where it does not decide, or nothing was judged."""
    if verdict.unjudged is not None:
        return None
    return next((finding for finding in verdict.findings if finding.threshold.figure == figure), None)


def _merged(cells: Iterable[Cell], width: float) -> list[tuple[str, str]]:
    """Of each shade one path over all of its cells, neighbours in a row as one box."""
    by_shade: dict[str, list[Cell]] = {}
    for cell in cells:
        by_shade.setdefault(cell.shade, []).append(cell)
    return [(shade, "".join(_boxes(of, width))) for shade, of in by_shade.items()]


def _boxes(cells: Sequence[Cell], width: float) -> Iterable[str]:
    for y, row in groupby(sorted(cells, key=lambda cell: (cell.y, cell.x)), key=lambda cell: cell.y):
        begin = end = -1.0
        for cell in row:
            if begin >= 0 and abs(cell.x - end) < width / 2:
                end = cell.x + width
                continue
            if begin >= 0:
                yield _box(begin, y, end - begin)
            begin, end = cell.x, cell.x + width
        yield _box(begin, y, end - begin)


def _box(x: float, y: float, width: float) -> str:
    return f"M{x:g} {y:g}h{width:g}v{CELL}h-{width:g}z"


@dataclass(frozen=True, slots=True)
class Dot:
    """A layer in a profile, with the ends of its margin."""

    x: float
    y: float
    low: float
    high: float
    tier: str
    title: str


@dataclass(frozen=True, slots=True)
class Profile:
    """A figure along the depth of the model.

    Attributes:
        figure: Its name.
        dots: One a layer; empty where there are too many.
        band: The outline of least and most by block, where there are.
        line: The medians of the blocks.
        bounds: What parts the tiers: height, words and the tier beyond.
        ticks: Heights and values at the side.
    """

    figure: str
    dots: Sequence[Dot]
    band: str
    line: str
    bounds: Sequence[tuple[float, str, str]]
    ticks: Sequence[tuple[float, str]]


def profile(
    figure: str, layers: Sequence[LayerStats], verdicts: Sequence[Verdict], threshold: Threshold | None
) -> Profile | None:
    """The profile of one figure; None where no layer has a positive, finite value."""
    values = [layer.figure(figure) for layer in layers]
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if not positive:
        return None
    limits = [] if threshold is None else [b for b in (threshold.passes, threshold.fails) if b > 0]
    scale = _Scale.of([*positive, *limits])
    blocks: dict[int, list[float]] = {}
    for layer, value in zip(layers, values, strict=True):
        if math.isfinite(value):
            blocks.setdefault(place(layer.name).block, []).append(value)
    order = sorted(blocks)
    across = {block: (i + 0.5) * WIDTH / len(order) for i, block in enumerate(order)}
    middle = _polyline([(across[block], scale(median(blocks[block]))) for block in order])
    dots, band = _dots(figure, layers, verdicts, scale), ""
    if len(layers) > EACH:
        top = [(across[block], scale(max(blocks[block]))) for block in order]
        bottom = [(across[block], scale(min(blocks[block]))) for block in reversed(order)]
        dots, band = [], _polyline([*top, *bottom]) + "z"
    return Profile(figure, dots, band, middle, _bounds(threshold, scale), scale.ticks)


def _dots(figure: str, layers: Sequence[LayerStats], verdicts: Sequence[Verdict], scale: "_Scale") -> list[Dot]:
    if len(layers) > EACH:
        return []
    dots = []
    for number, (layer, verdict) in enumerate(zip(layers, verdicts, strict=True)):
        value, margin = layer.figure(figure), layer.margin(figure) or 0.0
        if not math.isfinite(value):
            continue
        finding = finding_of(verdict, figure)
        margin = margin if math.isfinite(margin) else 0.0
        dots.append(
            Dot(
                round((number + 0.5) * WIDTH / len(layers), 1),
                scale(value),
                scale(value - margin),
                scale(value + margin),
                "none" if finding is None else str(finding.tier),
                f"{printable(layer.name)}: {_value(layer, figure)}",
            )
        )
    return dots


def _bounds(threshold: Threshold | None, scale: "_Scale") -> list[tuple[float, str, str]]:
    if threshold is None:
        return []
    told = ((threshold.passes, "pass", Tier.PASS), (threshold.fails, "fail", Tier.FAIL))
    return [(scale(bound), f"{word} {bound:g}", str(tier)) for bound, word, tier in told if bound > 0]


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
    return "M" + "L".join(f"{x:.1f} {y:g}" for x, y in points)


def _value(layer: LayerStats, figure: str) -> str:
    value, margin = layer.figure(figure), layer.margin(figure)
    return f"{FIGURES[figure].name} {value:.3g}" + ("" if margin is None else f" ± {margin:.2g}")


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure of the predictions on a scale from zero.

    Attributes:
        label: What it is.
        value: In words, with its margin.
        tier: Where it lies.
        width: How far it reaches, in per cent of the scale.
        low: The lower end of its margin, likewise.
        high: The upper end.
        marks: The bounds: how far, in words, and the tier beyond.
    """

    label: str
    value: str
    tier: str
    width: float
    low: float
    high: float
    marks: Sequence[tuple[float, str, str]]


def bars(findings: Sequence[Finding], label: Mapping[str, str]) -> list[Bar]:
    """The figures of the predictions, each on a scale that holds its value, its margin and its bounds."""
    return [_bar(finding, label.get(finding.threshold.figure, finding.threshold.figure)) for finding in findings]


def _bar(finding: Finding, label: str) -> Bar:
    margin = finding.margin if finding.margin is not None and math.isfinite(finding.margin) else 0.0
    value = finding.value if math.isfinite(finding.value) else 0.0
    limits = (finding.threshold.passes, finding.threshold.fails)
    most = max(value + margin, *limits, 1e-12) * 1.15

    def far(of: float) -> float:
        return round(100 * min(max(of, 0.0), most) / most, 2)

    told = f"{finding.value:.3g}" + (f" ± {margin:.2g}" if margin else "")
    names = zip(limits, ("pass", "fail"), (Tier.PASS, Tier.FAIL), strict=True)
    marks = [(far(bound), f"{word} {bound:g}", str(tier)) for bound, word, tier in names if bound > 0]
    return Bar(label, told, str(finding.tier), far(value), far(value - margin), far(value + margin), marks)
