"""The numbers of a parameter or buffer, wherever accelerate keeps them between two forwards of its module."""

from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def stored(module: nn.Module, name: str) -> Tensor:
    """The values of the parameter or buffer ``name`` of ``module``, detached."""
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    for hook in _keeping(module) if value.is_meta else ():
        kept: Tensor = hook.weights_map[name]
        return kept.detach()
    return value.detach()


@contextmanager
def zeroed(module: nn.Module, name: str) -> Iterator[Tensor]:
    """Within this context the parameter or buffer ``name`` of ``module`` is zero; gives what it was."""
    was, values = getattr(module, name), stored(module, name)
    zeros = torch.zeros_like(values)
    if isinstance(was, nn.Parameter):  # assigned over a buffer it would displace it for good
        zeros = nn.Parameter(zeros, requires_grad=False)
    maps = [(hook, hook.weights_map) for hook in (_keeping(module) if was.is_meta else ())]
    for hook, kept in maps:
        hook.weights_map = ChainMap({name: zeros.data}, kept)
    if not maps:
        setattr(module, name, zeros)
    try:
        yield values
    finally:
        for hook, kept in maps:
            hook.weights_map = kept
        if not maps:
            setattr(module, name, was)


def _keeping(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that keep the parameters of ``module`` off its device."""
    hook = getattr(module, "_hf_hook", None)
    return [each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "weights_map", None) is not None]
