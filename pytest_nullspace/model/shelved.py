"""Adapted layers whose weights come and go with the block that they lie in."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from pytest_nullspace.model.layers import AdaptedLayer
from pytest_nullspace.model.shelf import Shelf, UnfitError

Norms = tuple[float | None, float, float | None]
"""What `AdaptedLayer.weight_norms` gives, as numbers."""


@dataclass(frozen=True)
class ShelvedLayer(AdaptedLayer):
    """An adapted layer in a block that comes and goes.

    Attributes:
        kept: The norms of its weights, once they were taken.
    """

    kept: list[Norms] = field(default_factory=list)

    def norms(self) -> Norms:
        """The norms, which are exact; they are taken once, while the weights are there."""
        if not self.kept:
            down, up, base = super().weight_norms(exact=True)
            self.kept.append((None if down is None else float(down), float(up), None if base is None else float(base)))
        return self.kept[0]

    def weight_norms(self, exact: bool = False) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The same, on the CPU."""
        down, up, base = (None if norm is None else torch.tensor(norm, dtype=torch.float64) for norm in self.norms())
        assert up is not None
        return down, up, base


def shelved(layers: Mapping[str, AdaptedLayer], shelf: Shelf) -> dict[str, AdaptedLayer]:
    """The layers, as such whose block comes and goes.

    Raises:
        UnfitError: One lies in no block, or its update is more than A B.
    """
    inside = {id(module) for block in shelf.blocks for module in block.modules()}
    for layer in layers.values():
        if id(layer.layer) not in inside:
            raise UnfitError(f"{layer.name} lies in none of its blocks")
        if layer.update is not None:
            raise UnfitError(f"{layer.name} is a DoRA layer, which needs its whole weight when it is loaded")
    return {
        name: ShelvedLayer(**{of.name: getattr(layer, of.name) for of in fields(layer)})
        for name, layer in layers.items()
    }
