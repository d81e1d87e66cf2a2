"""What rounding would take of a figure, and how its digits are kept: norms, products and ``Bx`` are taken exactly then.

A float32 norm has a range, a ``Bx`` may be what is left of numbers that all but cancel, and a bias may be so long that
its layer's output holds few digits of ``W x``.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from pytest_nullspace import kernels
from pytest_nullspace.model.stored import stored, without_bias

CANCELLATION = 5e-8
"""The relative error to which cancellation in a float32 ``Bx`` may add up over a batch."""

OUTWEIGHS = 2.0
"""How many times a bias may be as long as ``W x`` that is what is left of an output when it is subtracted; beyond that
the digits of ``W x`` are lost in the sum, and it is computed again."""

MIXED = 16.0
"""How many times the rounding of ``Bx`` may weigh in ``Px``; where it would weigh more, ``Bx`` is taken in float64."""

_Numbers = TypeVar("_Numbers", float, Tensor)


def norms_of(values: Tensor) -> Tensor:
    """`kernels.row_norms`, taken again in float64 where they lie at hand and float32 cannot hold them."""
    norms = kernels.row_norms(values)
    return kernels.row_norms(values.double()) if kernels.at_hand(norms.device) and not kernels.safe(norms) else norms


def blurs(factors: kernels.Factors, dtype: torch.dtype) -> bool:
    """Whether a ``Bx`` in ``dtype`` cannot tell ``Px``: its rounding outweighs it, or short rows of B underflow."""
    held = torch.finfo(dtype)
    return dtype != torch.float64 and (factors.mixing > MIXED or 0 < factors.shortest < held.tiny / held.eps)


def weight_of(factors: kernels.Factors, width: int) -> float:
    """How much what is rounded off rows of that ``width`` weighs in ``Bx`` and what is made of it, for `cancels`."""
    # Rounding errors are a random walk of `in` steps, so they grow beside what cancellation leaves.
    return 2.0**-22 * factors.mixing * factors.longest / math.sqrt(width)


def cancels(weight: _Numbers, inputs: _Numbers, down: _Numbers) -> _Numbers:
    """Whether a float32 ``Bx`` lost its digits to cancellation; of numbers, or of many at once.

    Args:
        weight: `weight_of` the layer.
        inputs: The norm of the norms of ``x`` over the rows.
        down: The sum of the norms of ``Bx``.
    """
    return weight * inputs > CANCELLATION * down


def outweighs(bias: Tensor, norms: Tensor) -> Tensor:
    """Whether a ``bias`` drowns the digits of rows that have these ``norms`` without it; nobody waits for it."""
    return kernels.row_norms(bias) > OUTWEIGHS * norms.mean()


def has_bias(module: nn.Module) -> bool:
    """Whether the module adds a bias of its own."""
    return isinstance(getattr(module, "bias", None), Tensor)


def product(base: nn.Module, x: Callable[[], Tensor], output: Tensor, outweighed: dict[nn.Module, bool]) -> Tensor:
    """``W x``, from what ``base`` gave with a bias of its own.

    Args:
        base: The layer.
        x: Its input, where that is asked for.
        output: What it gave.
        outweighed: Which biases drowned the digits; a GPU is waited for, so there each layer is asked once.
    """
    if not has_bias(base):
        return output
    values = output.to(torch.promote_types(output.dtype, torch.float32))
    bias = stored(base, "bias").to(values)
    values = values - bias
    drowned = outweighed.get(base)
    if drowned is None:
        drowned = bool(outweighs(bias, kernels.row_norms(values)))
        if not kernels.at_hand(values.device):
            outweighed[base] = drowned
    return without_bias(base, x().to(values.device)) if drowned else values
