"""What follows from the layers' weights alone: computed where they lie, for many layers of one shape at once.

Nothing is decomposed where it need not be. With the rows of B, or the columns of A, brought to one length, the Gram
matrix in float64 has what is asked for: ``L⁻¹`` of ``L Lᵀ = B Bᵀ`` makes the rows of B orthonormal, and ``Lᵀ`` of
``L Lᵀ = Aᵀ A`` is as long on any vector as A. That squares the condition, so a layer beyond `CONDITION`, or one that is
not finite, is taken by `kernels.factors`, which does not.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytest_nullspace import kernels
from pytest_nullspace.kernels import Factors
from pytest_nullspace.measuring.transfer import fetched, fetching
from pytest_nullspace.model import AdaptedLayer

CONDITION = 1e4
"""Of B and of A at most, rows and columns of one length: what follows from their Gram matrices is exact to 1e-8."""

SQUARES = (1e-280, 1e280)
"""Between these a sum of squares in float64 has all its digits."""

SQUARINGS = 8
"""How often a Gram matrix is squared, until its norm is that power of its largest eigenvalue to within 1 %."""

TOGETHER = 1 << 23
"""Bytes of weights in float64 that are stacked at once: more are not in a CPU's cache when they are multiplied."""

TOGETHER_ELSEWHERE = 1 << 28
"""The same on a card, where a decomposition of few small matrices takes as long as one of many."""

STACKS = 8
"""So many of these are decomposed at once: what is left of each is small."""

WeightNorms = tuple[float | None, float, float | None]
"""What `AdaptedLayer.weight_norms` gives, as numbers."""


class Begun(NamedTuple):
    """`kernels.factors` of layers, begun with; the matrices are left where a layer's weights lie.

    Attributes:
        presumed: Of each, as if it were well conditioned and the rows of its B of length one.
        told: Waits for what they are, in one transfer: with the same matrices where that was right.
    """

    presumed: list[Factors]
    told: Callable[[], list[Factors]]


def of_layers(layers: Sequence[AdaptedLayer]) -> Begun:
    """Begin with `kernels.factors` of each of ``layers``."""
    alike = list(_alike(layers))
    quickly = quick(_stacked([layers[number] for number in numbers]) for numbers in alike)
    arrived = fetching([figures for _, figures in quickly])
    none = torch.empty(0, 0)
    presumed = [kernels.factors(none, none, 1.0)] * len(layers)
    for numbers, (matrices, _) in zip(alike, quickly, strict=True):
        for number, of in zip(numbers, matrices.unbind(), strict=True):
            presumed[number] = Factors(of, layers[number].rank, 1.0, 1.0, 1.0)

    def told() -> list[Factors]:
        found = list(presumed)
        for numbers, figures in zip(alike, arrived(), strict=True):
            for number, (mixing, condition, *lengths) in zip(numbers, figures.tolist(), strict=True):
                layer, of = layers[number], presumed[number]
                if mixing <= CONDITION and condition <= CONDITION:
                    found[number] = Factors(of.matrices, of.rank, mixing, *lengths)
                else:
                    found[number] = kernels.factors(layer.down_matrix(), layer.up_matrix, layer.scale)
        return found

    return Begun(presumed, told)


Pair = tuple[Tensor, Tensor, float]
"""B and A of some layers of one shape, and their scale."""


def quick(pairs: Iterable[Pair]) -> list[tuple[Tensor, Tensor]]:
    """What `kernels.Factors` hold of layers whose matrices are well conditioned, without waiting for the device.

    Args:
        pairs: Of some layers each: B, shape ``(l, r, in)``, and A, shape ``(l, out, r)``, float64, and the scale.

    Returns:
        Of each pair the matrices, shape ``(l, 2, r, r)``, and of each layer, shape ``(l, 4)``, its mixing, at most 1 %
        too large, the same of A's columns, and the norms of B's longest and shortest row. Where one of the first two is
        beyond `CONDITION`, or no number, the matrices are not to be used.
    """
    found: list[tuple[Tensor, Tensor]] = []
    known = (_gram(*pair) for pair in pairs)  # of thousands of layers they would not fit beside what is found
    for _, of_rank in groupby(known, key=lambda of: (of[0].device, of[0].shape[-1])):
        while alike := list(islice(of_rank, STACKS)):
            grams, lengths = zip(*alike, strict=True)
            of_all = _quick(torch.cat(grams), torch.cat(lengths))
            found += zip(*(torch.split(part, list(map(len, grams))) for part in of_all), strict=True)
    return found


def _quick(grams: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What `quick` gives of layers, from what `_gram` gives of them."""
    parts = _triangle(grams.flatten(0, 1))
    triangles, inverses, conditions = (part.view(-1, 2, *part.shape[1:]) for part in parts)
    rows = lengths[:, 0]
    matrices = torch.stack((inverses[:, 0] / rows[:, None, :], triangles[:, 1].mT * lengths[:, 1, None, :]), dim=1)
    return matrices, torch.cat((conditions, rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True)), dim=-1)


def _gram(down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The Gram matrices of the rows of B and the columns of A, of one length each, ``(l, 2, r, r)``, and their lengths.

    Those of A are times the scale. A column of zeros, as A has at the start, stands apart; a row of zeros makes what is
    no number, and so does what is too short or too long for its square to hold its digits.
    """
    grams = torch.stack((down @ down.mT, up.mT @ up), dim=1)
    squares = grams.diagonal(dim1=-2, dim2=-1)
    low, high = SQUARES
    zero = squares == 0
    zero[:, 0] = False
    unit = squares.sqrt().where((squares > low) & (squares < high), torch.nan).where(~zero, 1.0)
    grams = grams / unit[..., None] / unit[..., None, :] + torch.diag_embed(zero.to(unit))
    lengths = unit.where(~zero, 0.0)
    return grams, torch.stack((lengths[:, 0], lengths[:, 1] * abs(scale)), dim=1)


def _triangle(grams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L of each of ``grams (n, r, r)``, its inverse, and the condition of the rows that it is of."""
    triangle, failed = torch.linalg.cholesky_ex(grams)
    inverse = torch.linalg.solve_triangular(triangle, torch.eye(len(grams[0])).to(grams), upper=False)
    largest = _largest(torch.cat((grams, inverse.mT @ inverse)))
    condition = (largest[: len(grams)] * largest[len(grams) :]).sqrt()
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


def weight_norms(layers: Sequence[AdaptedLayer]) -> Callable[[], list[WeightNorms]]:
    """Begin with `AdaptedLayer.weight_norms` of each of ``layers``; what is returned waits for them.

    They come in one transfer but for those that left float32's range.
    """
    norms = [layer.weight_norms() for layer in layers]

    def found() -> list[WeightNorms]:
        flat = iter(fetched([norm for of in norms for norm in of if norm is not None]))
        found: list[Any] = [tuple(None if norm is None else float(next(flat)) for norm in of) for of in norms]
        low, high = kernels.FLOAT32_SAFE
        for number, of in enumerate(found):
            if not all(norm is None or low <= norm <= high for norm in of):
                exact = layers[number].weight_norms(exact=True)
                found[number] = tuple(None if norm is None else float(norm) for norm in exact)
        return found

    return found


def _alike(layers: Sequence[AdaptedLayer]) -> Iterator[list[int]]:
    """The numbers of ``layers`` that have a B, those of one shape, scale and place together as `TOGETHER` allows."""

    def shape(number: int) -> tuple[str, int, int, int, float]:
        layer = layers[number]
        return str(layer.down.weight.device), layer.rank, layer.in_features, layer.out_features, layer.scale

    shapes = {number: shape(number) for number, layer in enumerate(layers) if layer.rank}
    for (where, rank, wide, out, _), alike in groupby(sorted(shapes, key=shapes.__getitem__), key=shapes.__getitem__):
        held = list(alike)
        room = TOGETHER if where == "cpu" else TOGETHER_ELSEWHERE
        most = max(1, room // (8 * rank * (wide + out)))
        yield from (held[first : first + most] for first in range(0, len(held), most))


def _stacked(layers: Sequence[AdaptedLayer]) -> Pair:
    down = torch.stack([layer.down_matrix() for layer in layers])
    up = torch.stack([layer.up_matrix for layer in layers]).to(down)
    return down, up, layers[0].scale
