"""Layers whose update is unlike that of their own kind in the same adapter, by their weights alone. Pure.

Of each layer its largest singular value, its norm, how much of its energy lies in one direction, and the entropy and
kurtosis of its singular values are held against the median of all layers of its family, in robust deviations. An odd
layer need not be a bad one, and an adapter without any need not be a good one: it is where to look first.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from pytest_nullspace.judging.weights import LayerWeights, Weights

FEWEST = 8
"""Layers of a family below which nobody can tell what is usual in it."""
BOUND = 6.0
"""Robust deviations from which a layer is odd; see docs/figures.md."""
FLOOR = 0.02
"""The least that counts as a deviation, so that layers that are all but equal are not odd by their last digits."""
_NORMAL = 1.4826
"""By which a median absolute deviation becomes the standard deviation of normal numbers."""


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


FIGURES: Mapping[str, tuple[str, Callable[[LayerWeights], float]]] = {
    "sigma": ("largest singular value", lambda layer: _log(layer.sigma)),
    "norm": ("norm", lambda layer: _log(layer.update_norm)),
    "concentration": ("energy in one direction", lambda layer: layer.concentration),
    "entropy": ("entropy of its singular values", lambda layer: _log(layer.rank_used)),
    "kurtosis": ("kurtosis of its singular values", lambda layer: layer.kurtosis),
}
"""Each figure in words, and what is compared of it; sizes by their logarithm, for twice is as far as half."""


@dataclass(frozen=True, slots=True)
class Odd:
    """One figure of one layer that lies far from those of its family.

    Attributes:
        layer: Its module path.
        family: What its family is called: its path with every number left open.
        figure: A name in `FIGURES`.
        value: The figure as it is compared.
        usual: The median of the family.
        deviations: How many robust deviations lie between the two.
    """

    layer: str
    family: str
    figure: str
    value: float
    usual: float
    deviations: float


@dataclass(frozen=True)
class Oddities:
    """What is odd in an adapter.

    Attributes:
        found: The farthest first.
        held: How many layers were held against their families.
        alone: The layers whose families are too small to tell.
    """

    found: tuple[Odd, ...]
    held: int
    alone: tuple[str, ...]

    def of_layers(self) -> Mapping[str, Sequence[Odd]]:
        """The same by layer, that first which lies farthest."""
        by_layer: dict[str, list[Odd]] = {}
        for odd in self.found:
            by_layer.setdefault(odd.layer, []).append(odd)
        return by_layer

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return {"found": [asdict(odd) for odd in self.found], "held": self.held, "alone": list(self.alone)}


def family(name: str) -> str:
    """The path of a layer with every number in it left open, which layers of one kind share."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def oddities(weights: Weights) -> Oddities:
    """Hold each layer that has an update against its family; one that is dead or no number fails elsewhere."""
    families: dict[str, list[LayerWeights]] = {}
    for layer in weights.layers:
        if layer.is_finite and layer.update_norm > 0:
            families.setdefault(family(layer.name), []).append(layer)
    told = {name: layers for name, layers in families.items() if len(layers) >= FEWEST}
    found = [odd for name, layers in told.items() for figure in FIGURES for odd in _in_family(name, layers, figure)]
    return Oddities(
        tuple(sorted(found, key=lambda odd: -abs(odd.deviations))),
        sum(map(len, told.values())),
        tuple(layer.name for name, layers in families.items() if name not in told for layer in layers),
    )


def _in_family(name: str, layers: Sequence[LayerWeights], figure: str) -> list[Odd]:
    of = FIGURES[figure][1]
    values = {layer.name: value for layer in layers if math.isfinite(value := of(layer))}
    if len(values) < FEWEST:
        return []
    usual = median(values.values())
    spread = max(_NORMAL * median(abs(value - usual) for value in values.values()), FLOOR)
    return [
        Odd(layer, name, figure, value, usual, far)
        for layer, value in values.items()
        if abs(far := (value - usual) / spread) > BOUND
    ]
