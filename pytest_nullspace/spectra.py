"""What a whole matrix is made of: its singular values, its leading directions and the triangle of its columns. Pure."""

from collections.abc import Callable

import torch
from torch import Tensor

_qr: Callable[..., tuple[Tensor, Tensor]] = torch.linalg.qr
_eigh: Callable[..., tuple[Tensor, Tensor]] = torch.linalg.eigh
_eigvalsh: Callable[..., Tensor] = torch.linalg.eigvalsh


def singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The singular values of a matrix, and the right singular vectors of its ``rank`` largest.

    They come from the smaller of its two Gram matrices in float64, which takes a fraction of the time of a whole
    decomposition; a value below 1e-8 of the largest is then rounding.

    Args:
        matrix: Shape ``(out, in)``.
        rank: At most ``min(out, in)``.

    Returns:
        The values, shape ``(min(out, in),)``, the largest first, and orthonormal rows, shape ``(rank, in)``; float64,
        NaN where the matrix is not finite.
    """
    exact = matrix.double()
    if not bool(torch.isfinite(exact).all()):
        lost = exact.new_full((rank, exact.shape[1]), torch.nan)
        return exact.new_full((min(exact.shape),), torch.nan), lost
    is_wide = exact.shape[0] < exact.shape[1]
    gram = exact @ exact.mT if is_wide else exact.mT @ exact
    if not rank:
        return _eigvalsh(gram).clamp_min(0).sqrt().flip(0), exact.new_empty(0, exact.shape[1])
    squares, vectors = _eigh(gram)
    leading = vectors.flip(-1)[:, :rank]
    if is_wide:
        leading = _qr(exact.mT @ leading, mode="reduced")[0]
    return squares.clamp_min(0).sqrt().flip(0), leading.mT


def effective_rank(values: Tensor) -> float:
    """``exp(−Σ p ln p)`` of the shares ``p`` of singular values: n equal ones give n, one alone gives 1, none 0."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total != 0 else 0.0


def triangle(matrix: Tensor) -> Tensor:
    """R of ``Q R``, shape ``(min(m, n), n)``, of a ``matrix (m, n)``; NaN where that is not finite."""
    if not bool(torch.isfinite(matrix).all()):
        return torch.full((1, matrix.shape[1]), torch.nan, dtype=matrix.dtype)
    return _qr(matrix, mode="r")[1]
