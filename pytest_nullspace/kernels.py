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

FLOAT32_SAFE = (1e-15, 1e15)
"""Norms between these have squares, and sums of squares over any real width, within float32's normal range."""


class Sums(NamedTuple):
    """What is summed over rows, in the order of the state vector."""

    rows: float
    directed: float
    input: float
    down: float
    update: float
    base: float
    output: float
    leakage: float


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
        if not (low >= FLOAT32_SAFE[0] and high <= FLOAT32_SAFE[1]):
            return _vector_norm(values, dim=-1, dtype=torch.float64)
    return norms


def whitener(down: Tensor) -> Tensor:
    """The matrix that turns ``Bx`` into coordinates of ``Px``: ``‖Px‖ = ‖whitener · Bx‖``.

    With ``B Bᵀ = V Λ Vᵀ`` it is ``Λ^-½ Vᵀ`` over the eigenvalues that are not zero, so B may be rank-deficient.

    Args:
        down: B, shape ``(r, in)``.

    Returns:
        Shape ``(rank of B, r)``, float64; NaN where B is not finite, so that its leakage is NaN.
    """
    down = down.double()
    if not bool(torch.isfinite(down).all()):
        return torch.full((1, len(down)), torch.nan, dtype=torch.float64)
    scale = down.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    down = down / scale
    eigenvalues, vectors = _eigh(down @ down.mT)
    kept = eigenvalues > eigenvalues[-1].clamp_min(0) * max(down.shape) * torch.finfo(torch.float64).eps
    whitening: Tensor = (vectors[:, kept] * eigenvalues[kept].rsqrt()).mT / scale
    return whitening


def update(
    state: Tensor,
    input_norms: Tensor,
    down: Tensor,
    up: Tensor,
    base: Tensor,
    output: Tensor,
    *,
    scale: float,
    whitener: Tensor,
) -> None:
    """Add the rows of one forward of the layer to ``state``, in place and without waiting for the device.

    Args:
        state: As `empty` or an earlier update left it.
        input_norms: `row_norms` of ``x``, shape ``(n,)``; layers that share an input take them once.
        down: ``Bx``, shape ``(n, r)``.
        up: ``ABx`` before its scale, shape ``(n, out)``.
        base: ``W_res x``, shape ``(n, out)``.
        output: ``scale · ABx + W_res x``, shape ``(n, out)``.
        scale: The adapter's scale.
        whitener: `whitener` of B, in the dtype in which ``Px`` shall be taken.
    """
    projected = row_norms(down.to(whitener.dtype) @ whitener.mT)
    directed = input_norms > 0
    share = (projected.double() / input_norms.double()).square().where(directed, 0.0)
    norms = (input_norms, row_norms(down), row_norms(up), row_norms(base), row_norms(output))
    x, bx, abx, wx, y = (n.sum(dtype=torch.float64) for n in norms)
    rows = torch.full_like(x, input_norms.numel())
    state += torch.stack((rows, directed.sum(dtype=torch.float64), x, bx, abs(scale) * abx, wx, y, share.sum()))


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
