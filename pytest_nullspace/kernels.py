"""The figures of an adapted layer as pure functions of its activations: update, merge, compute.

A layer's state is one vector of sums, so any split of the rows, in any order, over any number of processes, merges to
the same answer. Norms are taken in at least float32 without copying half-precision activations; sums are float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm
_eigh: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.linalg.eigh
_qr: Callable[..., tuple[Tensor, Tensor]] = torch.linalg.qr

FLOAT32_SAFE = (1e-15, 1e15)
"""Norms between these have squares, and sums of squares over any real width, within float32's normal range."""


class Sums(NamedTuple):
    """What is summed over rows, in the order of the state vector."""

    rows: float
    directed: float
    leakage: float
    input: float
    down: float
    update: float
    base: float
    output: float


class Means(NamedTuple):
    """The mean norms of a layer's activations over its rows, and its leakage.

    Attributes:
        rows: How many rows were seen.
        input: ``mean ‖x‖``.
        down: ``mean ‖Bx‖``.
        update: ``mean ‖ABx‖``, scale included.
        base: ``mean ‖W_res x‖``.
        output: ``mean ‖ABx + W_res x‖``.
        leakage: ``mean ‖Px‖² / ‖x‖²`` over rows that are not zero, P the orthogonal projector on B's row space.
    """

    rows: int
    input: float
    down: float
    update: float
    base: float
    output: float
    leakage: float


def empty(device: torch.device | str = "cpu") -> Tensor:
    """The state before any row, shape ``(len(Sums),)``."""
    return torch.zeros(len(Sums._fields), dtype=torch.float64, device=device)


def row_norms(values: Tensor) -> Tensor:
    """The Euclidean norm of each row.

    Args:
        values: Shape ``(…, d)``, any floating point type.

    Returns:
        Shape ``(…,)``: float32, or float64 where ``values`` are float64, or lie on the CPU and leave the range in
        which float32 squares are exact enough. (On a GPU that look would wait for the device; there an overflow shows
        as infinity, which no verdict passes.)
    """
    if values.dtype == torch.float64:
        return _vector_norm(values, dim=-1)
    norms = _vector_norm(values, dim=-1, dtype=torch.float32)
    if norms.device.type == "cpu" and norms.numel():
        low, high = norms.aminmax()
        if not (low.item() >= FLOAT32_SAFE[0] and high.item() <= FLOAT32_SAFE[1]):
            return _vector_norm(values, dim=-1, dtype=torch.float64)
    return norms


class Factors(NamedTuple):
    """What a layer's weights make of ``Bx``, of no more than r rows each, so that no wide matrix is read for them.

    Attributes:
        both: Shape ``(k + q, r)``. With its first k rows ``‖Px‖ = ‖whitening · Bx‖``, with the others
            ``‖scale · ABx‖ = ‖root · Bx‖``.
        whitening: k.
    """

    both: Tensor
    whitening: int


def factors(down: Tensor, up: Tensor, scale: float, device: torch.device | str = "cpu") -> Factors:
    """A layer's `Factors`, taken in float64 and kept in float32.

    With ``B Bᵀ = V Λ Vᵀ`` the whitening is ``Λ^-½ Vᵀ`` over the eigenvalues that are not zero, so B may be
    rank-deficient; with ``A = Q R`` the root is ``scale · R``.

    Args:
        down: B, shape ``(r, in)``.
        up: A, shape ``(out, r)``.
        scale: The adapter's scale.
        device: Where ``Bx`` will lie.

    Returns:
        NaN where B or A is not finite, so that what is measured with it is NaN.
    """
    whitening = whitener(down)
    both = torch.cat((whitening, scale * _root(up)))
    return Factors(both.to(device, torch.float32), len(whitening))


def whitener(down: Tensor) -> Tensor:
    """The matrix that turns ``Bx`` into coordinates of ``Px``, shape ``(rank of B, r)``, float64; see `factors`."""
    down = down.to("cpu", torch.float64)
    if not bool(torch.isfinite(down).all()):
        return torch.full((1, len(down)), torch.nan, dtype=torch.float64)
    scale = down.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    down = down / scale
    eigenvalues, vectors = _eigh(down @ down.mT)
    kept = eigenvalues > eigenvalues[-1].clamp_min(0) * max(down.shape) * torch.finfo(torch.float64).eps
    whitening: Tensor = (vectors[:, kept] * eigenvalues[kept].rsqrt()).mT / scale
    return whitening


def _root(up: Tensor) -> Tensor:
    """R of ``A = Q R``, shape ``(min(out, r), r)``, float64."""
    up = up.to("cpu", torch.float64)
    if not bool(torch.isfinite(up).all()):
        return torch.full((1, up.shape[1]), torch.nan, dtype=torch.float64)
    return _qr(up, mode="r")[1]


def inner_norms(down: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """``‖Px‖`` and ``‖scale · ABx‖`` of each row, from ``down = Bx (n, r)`` alone."""
    both = down.to(factors.both.dtype) @ factors.both.mT
    return row_norms(both[:, : factors.whitening]), row_norms(both[:, factors.whitening :])


def add(
    state: Tensor,
    *,
    input: Tensor,  # noqa: A002  # the figures' own names
    down: Tensor,
    update: Tensor,
    base: Tensor,
    output: Tensor,
    projected: Tensor,
) -> None:
    """Add the rows of one forward of the layer to ``state``, in place and without waiting for the device.

    Args:
        state: As `empty` or an earlier call left it.
        input: `row_norms` of ``x``, shape ``(n,)`` like all that follow.
        down: Of ``Bx``.
        update: Of ``scale · ABx``.
        base: Of ``W_res x``.
        output: Of ``scale · ABx + W_res x``.
        projected: Of ``Px``.
    """
    directed = input > 0
    state[0] += input.numel()
    state[1] += directed.sum()
    state[2] += (projected / input).square().where(directed, 0.0).sum(dtype=torch.float64)
    state[3:] += torch.stack((input, down, update, base, output)).sum(dim=1, dtype=torch.float64)


def merge(states: list[Tensor]) -> Tensor:
    """The state of all rows of all ``states``, each of shape ``(len(Sums),)``."""
    return torch.stack(states).sum(dim=0)


def compute(state: Tensor) -> Means:
    """The means over the rows in ``state``; NaN where there is no row to take them from."""
    sums = Sums(*state.tolist())

    def mean(total: float, rows: float) -> float:
        return total / rows if rows else float("nan")

    return Means(
        rows=int(sums.rows),
        input=mean(sums.input, sums.rows),
        down=mean(sums.down, sums.rows),
        update=mean(sums.update, sums.rows),
        base=mean(sums.base, sums.rows),
        output=mean(sums.output, sums.rows),
        leakage=mean(sums.leakage, sums.directed),
    )
