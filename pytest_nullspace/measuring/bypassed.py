"""Layers that a model never calls, for it computes with their weight itself: what PEFT adds to them is left out."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.model import AdaptedLayer
from pytest_nullspace.model.used import Uses


def bypassed(
    layers: Sequence[AdaptedLayer], forward: Callable[[Batch], Any], window: Sequence[int], device: torch.device
) -> set[str]:
    """The names of those of ``layers`` that a forward does not call, and computes with their base weight all the same.

    Mamba's time steps are ``dt_proj.weight @ x``: an adapter of ``dt_proj`` trains nothing and changes no output.

    Args:
        layers: Of which no row was counted.
        forward: Runs the model on a batch.
        window: One of the text.
        device: Where it goes.
    """
    if not layers:
        return set()
    weights: dict[str, Any] = {layer.name: layer.base.weight for layer in layers if hasattr(layer.base, "weight")}
    ran, used = set[str](), set[int]()
    with ExitStack() as hooks:
        for layer in layers:
            handle = layer.layer.register_forward_pre_hook(lambda *_, name=layer.name: ran.add(name))
            hooks.callback(handle.remove)
        hooks.enter_context(Uses(weights.values(), used.add))
        forward(Batch.of([window], device))
    return {name for name, weight in weights.items() if id(weight) in used} - ran
