"""The numbers of a parameter or buffer, wherever accelerate keeps them between two forwards of its module."""

from copy import copy
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


def without_bias(module: nn.Module, x: Tensor) -> Tensor:
    """What ``module`` makes of ``x`` when its parameter or buffer ``bias`` is zero.

    It is the module's own arithmetic, whatever holds its weight, on a copy of it that shares all else: in a model's
    forward somebody else may read the bias at any time.
    """
    twin = copy(module)
    for kind in ("_parameters", "_buffers"):
        own = vars(module)[kind]
        vars(twin)[kind] = own | {
            name: stored(module, name).to(x.device)
            for name, value in own.items()
            if value is not None and value.is_meta
        }
        if own.get("bias") is not None:
            vars(twin)[kind]["bias"] = torch.zeros_like(vars(twin)[kind]["bias"])
    # On an instance that accelerate or somebody else wrapped, ``forward`` would run the module itself.
    result: Tensor = type(module).forward(twin, x)
    return result


def _keeping(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that keep the parameters of ``module`` off its device."""
    hook = getattr(module, "_hf_hook", None)
    return [each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "weights_map", None) is not None]
