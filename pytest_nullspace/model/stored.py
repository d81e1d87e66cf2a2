"""The numbers of a parameter or buffer, wherever accelerate keeps them between two forwards of its module."""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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


def weight_of(base: nn.Module, widths: set[int]) -> Tensor | None:
    """The weight of one linear layer, taken out of its quantisation by the library that put it in; None if it cannot.

    What another library packs or scales apart may still be a tensor named ``weight``, whose norm would be wrong.
    """
    weight = _dequantised(base)
    if isinstance(weight, Tensor) and weight.dtype in _NUMBERS and weight.ndim == 2 and set(weight.shape) == widths:
        return weight
    return None


def _dequantised(base: Any) -> object:
    # PEFT has a function for it, but on a CPU that leaves an 8-bit layer unable to run again.
    weight: Any = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        return stored(base, "weight")
    match type(weight).__name__:
        case "Params4bit":
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)
        case "Int8Params":
            from bitsandbytes.functional import int8_vectorwise_dequant

            held = weight if base.state.CB is None else base.state  # there from the first forward on
            return int8_vectorwise_dequant(held.CB, held.SCB)
    return weight.dequantize() if type(weight).__module__.startswith("torchao.") else weight
