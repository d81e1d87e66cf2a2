"""What follows from the layers' weights alone: computed where they lie, for many layers of one shape at once.

Nothing is decomposed where it need not be. With the rows of B, or the columns of A, brought to one length, the Gram
matrix in float64 has what is asked for: ``L⁻¹`` of ``L Lᵀ = B Bᵀ`` makes the rows of B orthonormal, and ``Lᵀ`` of
``L Lᵀ = Aᵀ A`` is as long on any vector as A. That squares the condition, so a layer beyond `CONDITION`, or one that is
not finite, is taken by `kernels.factors`, which does not.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pytest_nullspace import kernels
from pytest_nullspace.kernels import Factors
from pytest_nullspace.model import AdaptedLayer

CONDITION = 1e4
"""Of B and of A at most, rows and columns of one length: what follows from their Gram matrices is exact to 1e-8."""

SQUARINGS = 8
"""How often a Gram matrix is squared, until its norm is that power of its largest eigenvalue to within 1 %."""

TOGETHER = 1 << 26
"""Bytes of weights in float64 that are stacked at once."""


def of_layers(layers: Sequence[AdaptedLayer]) -> list[Factors]:
    """`kernels.factors` of each of ``layers``, the matrices where its weights lie; what they tell in one transfer."""
    none = torch.empty(0, 0)
    found = [kernels.factors(none, none, 1.0)] * len(layers)
    alike = list(_alike(layers))
    quickly = [quick(*_stacked([layers[number] for number in numbers])) for numbers in alike]
    told = kernels.fetched([figures for _, figures in quickly])
    for numbers, (matrices, _), figures in zip(alike, quickly, told, strict=True):
        for number, of, (mixing, condition, longest, shortest) in zip(numbers, matrices, figures.tolist(), strict=True):
            layer = layers[number]
            if mixing <= CONDITION and condition <= CONDITION:
                found[number] = Factors(of, layer.rank, mixing, longest, shortest)
            else:
                found[number] = kernels.factors(layer.down_matrix(), layer.up_matrix, layer.scale)
    return found


def quick(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """What `kernels.Factors` hold of layers whose matrices are well conditioned, without waiting for the device.

    Args:
        down: B of each, shape ``(l, r, in)``, float64.
        up: A with its scale, shape ``(l, out, r)``, likewise.

    Returns:
        The matrices, shape ``(l, 2, r, r)``, and of each layer, shape ``(l, 4)``, its mixing, at most 1 % too large,
        the same of A's columns, and the norms of B's longest and shortest row. Where one of the first two is beyond
        `CONDITION`, or no number, the matrices are not to be used.
    """
    lengths, columns = kernels.row_norms(down), kernels.row_norms(up.mT)
    _, whitening, mixing = _triangle(down / lengths[..., None], lengths == 0)
    root, _, condition = _triangle(up.mT / columns.where(columns > 0, 1.0)[..., None], columns == 0)
    matrices = torch.stack((whitening / lengths[..., None, :], root.mT * columns[..., None, :]), dim=1)
    return matrices, torch.stack((mixing, condition, lengths.amax(-1), lengths.amin(-1)), dim=-1)


def _triangle(rows: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L of the Gram matrix of unit ``rows (l, r, d)``, its inverse, the rows' condition; ``zero`` ones stand apart."""
    gram = rows @ rows.mT + torch.diag_embed(zero.to(rows))
    triangle, failed = torch.linalg.cholesky_ex(gram)
    inverse = torch.linalg.solve_triangular(triangle, torch.eye(len(gram[0])).to(gram), upper=False)
    condition = (_largest(gram) * _largest(inverse.mT @ inverse)).sqrt()
    return triangle, inverse, condition.where(failed == 0, torch.inf)


def _largest(symmetric: Tensor) -> Tensor:
    """The largest eigenvalue of positive matrices ``(l, r, r)``, or at most 1 % more."""
    logarithm: Tensor = torch.zeros_like(symmetric[:, 0, 0])
    for _ in range(SQUARINGS + 1):
        norm = torch.linalg.matrix_norm(symmetric)
        logarithm = 2 * logarithm + norm.log()
        symmetric = symmetric / norm[:, None, None]
        symmetric = symmetric @ symmetric
    return torch.exp(logarithm / 2**SQUARINGS)


def weight_norms(layers: Sequence[AdaptedLayer]) -> list[tuple[float | None, float, float | None]]:
    """`AdaptedLayer.weight_norms` of each of ``layers``, in one transfer but for those that left float32's range."""
    norms = [layer.weight_norms() for layer in layers]
    flat = iter(kernels.fetched([norm for of in norms for norm in of if norm is not None]))
    found: list[Any] = [tuple(None if norm is None else float(next(flat)) for norm in of) for of in norms]
    low, high = kernels.FLOAT32_SAFE
    for number, of in enumerate(found):
        if not all(norm is None or low <= norm <= high for norm in of):
            found[number] = tuple(None if norm is None else float(norm) for norm in layers[number].weight_norms(True))
    return found


def _alike(layers: Sequence[AdaptedLayer]) -> Iterator[list[int]]:
    """The numbers of the ``layers`` that have a B, those of one shape and place together as far as `TOGETHER` goes."""

    def shape(number: int) -> tuple[str, int, int, int]:
        layer = layers[number]
        return str(layer.down.weight.device), layer.rank, layer.in_features, layer.out_features

    numbers = sorted((number for number, layer in enumerate(layers) if layer.rank), key=shape)
    for (_, rank, wide, out), alike in groupby(numbers, key=shape):
        held, most = list(alike), max(1, TOGETHER // (8 * rank * (wide + out)))
        yield from (held[first : first + most] for first in range(0, len(held), most))


def _stacked(layers: Sequence[AdaptedLayer]) -> tuple[Tensor, Tensor]:
    down = torch.stack([layer.down_matrix() for layer in layers])
    return down, torch.stack([layer.scale * layer.up_matrix.to(down) for layer in layers])
