"""Layers that a model never calls, for it computes with their weight itself: what PEFT adds to them is left out."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pytest_nullspace.model import AdaptedLayer


def bypassed(
    layers: Sequence[AdaptedLayer], forward: Callable[[Tensor], Any], tokens: Sequence[int], device: torch.device
) -> set[str]:
    """The names of those of ``layers`` that a forward does not call, and computes with their base weight all the same.

    Mamba's time steps are ``dt_proj.weight @ x``: an adapter of ``dt_proj`` trains nothing and changes no output.

    Args:
        layers: Of which no row was counted.
        forward: Runs the model on tokens ``(b, length)``.
        tokens: A window of the text.
        device: Where they go.
    """
    if not layers:
        return set()
    weights = {id(layer.base.weight): layer.name for layer in layers if hasattr(layer.base, "weight")}
    ran: set[str] = set()
    with ExitStack() as hooks:
        for layer in layers:
            handle = layer.layer.register_forward_pre_hook(lambda *_, name=layer.name: ran.add(name))
            hooks.callback(handle.remove)
        using = hooks.enter_context(_Using(weights.keys()))
        forward(torch.tensor([list(tokens)], device=device))
    return {weights[key] for key in using.used} - ran


class _Using(TorchFunctionMode):
    """Sees of which tensors, by their ids, something is computed; to ask for a type or a shape gives no tensor."""

    def __init__(self, of: Iterable[int]) -> None:
        super().__init__()
        self._of, self.used = frozenset(of), set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what was asked for."""
        given = kwargs or {}
        result = func(*args, **given)
        if isinstance(result, Tensor):
            for one in (*args, *given.values()):
                self.used |= self._of & set(map(id, one if isinstance(one, tuple | list) else [one]))
        return result
