"""Adapted layers whose weights come and go with the block that they lie in."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from pytest_nullspace.model.layers import AdaptedLayer
from pytest_nullspace.model.shelf import Shelf, UnfitError

Norms = tuple[Tensor | None, Tensor, Tensor | None]
"""What `AdaptedLayer.weight_norms` gives."""


@dataclass(frozen=True)
class ShelvedLayer(AdaptedLayer):
    """An adapted layer in a block that comes and goes; the norms of its weights are kept from when it was there."""

    kept: list[Norms] = field(default_factory=list)

    def keep_norms(self, norms: Norms, device: torch.device) -> None:
        """Have these norms, which were taken before, on ``device``."""
        down, up, base = norms
        self.kept[:] = [(_on(down, device), up.to(device), _on(base, device))]

    def weight_norms(self, exact: bool = False) -> Norms:
        """The norms, which are exact; they are taken once, while the weights are there."""
        if not self.kept:
            self.kept.append(super().weight_norms(exact=True))
        return self.kept[0]


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


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)
