"""The figures of an adapted layer as pure functions of its activations: norms, sums and means.

What rows add up to is one vector of sums, so any split of the rows, in any order, over any number of processes, merges
to the same answer. Norms are taken in at least float32, on a GPU without copying half-precision rows; sums are float64.
Leading dimensions, of layers or windows, are carried along.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm
_qr: Callable[..., tuple[Tensor, Tensor]] = torch.linalg.qr
_svd: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.linalg.svd

FLOAT32_SAFE = (1e-15, 1e15)
"""Float32 norms between these have squares, and sums of squares over any real width, within float32's normal range."""

CONVERTED = 1 << 21
"""Numbers of half precision that are converted at once."""

OCTAVES = 102
"""Powers of two by which rows are told apart, 2⁻⁵⁰ to 2⁵⁰: what is more counts with the last, what is less as zero."""

WIDEST = 1024
"""Columns over which a running float32 sum of squares is exact to 1e-6 whatever they hold."""

ROUNDED = 2.0**-20
"""The share of a matrix that the rounding of its entries to float32 may have made."""


class Sums(NamedTuple):
    """What is summed over rows, in the order of the vector."""

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


@cache
def fused(device: torch.device) -> ModuleType | None:
    """`pytest_nullspace.fused` where its kernels work on the ``device``; where they do not it is plain torch's turn."""
    if device.type != "cuda":
        return None
    try:
        from pytest_nullspace import fused as found

        return found if found.works(device) else None
    except Exception:  # Triton is not there, knows nothing of the card, or finds no compiler
        return None


def _fused(values: Tensor) -> Any:
    """It, where it takes them."""
    found: Any = fused(values.device)
    return found if found is not None and values.dtype in found.TAKEN else None


def at_hand(device: torch.device) -> bool:
    """Whether a number that lies there can be looked at without waiting for all work that was given to the device."""
    return device.type == "cpu"


def row_norms(values: Tensor) -> Tensor:
    """The Euclidean norm of each row.

    Args:
        values: Shape ``(…, d)``, any floating point type.

    Returns:
        Shape ``(…,)``, float64 where ``values`` are, else float32: whether those are `safe` is the caller's to ask.
    """
    if (quick := _fused(values)) is not None:
        norms: Tensor = quick.row_norms(values)
        return norms
    if values.device.type == "cpu" and values.dtype != torch.float64:
        if values.dtype != torch.float32 and values.numel() > CONVERTED:
            return _converted_norms(values.reshape(-1, values.shape[-1])).reshape(values.shape[:-1])
        if values.shape[-1] > WIDEST:
            return _wide_norms(values)
    return _vector_norm(values, dim=-1, dtype=torch.promote_types(values.dtype, torch.float32))


def _wide_norms(values: Tensor) -> Tensor:
    """The norms of wide rows, from those of pieces of them.

    On a CPU torch adds up a row in a few running float32 sums, whose rounding goes one way where numbers are alike or
    few: over 14,336 columns from bfloat16 that was 2e-6, more than all else together.
    """
    piece = _piece(values.shape[-1])
    if piece is None:
        return _vector_norm(values, dim=-1, dtype=torch.float64).float()
    pieces = values.reshape(*values.shape[:-1], values.shape[-1] // piece, piece)
    return _vector_norm(_vector_norm(pieces, dim=-1, dtype=torch.float32), dim=-1)


@cache
def _piece(width: int) -> int | None:
    """The widest piece into which rows of this ``width`` can be cut evenly; None where it would be a narrow one."""
    return next((piece for piece in range(WIDEST, WIDEST // 8, -1) if width % piece == 0), None)


def _converted_norms(rows: Tensor) -> Tensor:
    """The norms of many half-precision rows ``(n, d)``, a few converted at a time.

    What is converted whole, as torch does, leaves the cache before it is summed, and takes twice the memory again. The
    parts are of one size, so that each thread meets in the buffer what lies in its own core's cache.
    """
    parts = torch.chunk(rows, -(-rows.numel() // CONVERTED))
    converted = torch.empty_like(parts[0], dtype=torch.float32)
    return torch.cat([row_norms(converted[: len(part)].copy_(part)) for part in parts])


def safe(norms: Tensor) -> bool:
    """Whether all the norms are exact; beyond `FLOAT32_SAFE` only float64 ones are."""
    if norms.dtype == torch.float64 or not norms.numel():
        return True
    low, high = norms.aminmax()
    # Compared as numbers: each operation on so small a tensor costs as much as the look at all of them.
    return FLOAT32_SAFE[0] <= low.item() and high.item() <= FLOAT32_SAFE[1]


def exact_row_norms(values: Tensor) -> Tensor:
    """`row_norms` in float64, of which those that float32 cannot hold are taken again.

    Args:
        values: Shape ``(n, d)``.

    Returns:
        Shape ``(n,)``.
    """
    norms = row_norms(values)
    if safe(norms):
        return norms.double()
    lost = ~((norms >= FLOAT32_SAFE[0]) & (norms <= FLOAT32_SAFE[1]))
    norms = norms.double()
    norms[lost] = row_norms(values[lost].double())
    return norms


class Factors(NamedTuple):
    """What a layer's weights make of ``Bx``, so that no wide matrix has to be read for it.

    Attributes:
        matrices: Whitening and root, shape ``(2, r, r)``, float64 on the CPU, rows of zeros where they have fewer:
            ``‖Px‖ = ‖whitening · Bx‖`` and ``‖scale · ABx‖ = ‖root · Bx‖``. NaN where B or A is not finite, so that
            what is measured with it is NaN.
        rank: How many directions the rows of B span.
        mixing: How many times what was rounded off ``Bx`` may weigh in ``Px``: the condition of B, its rows brought to
            one length. 1 where they are orthogonal.
        longest: The norm of the longest row of B.
        shortest: Of the shortest that is not zero.
    """

    matrices: Tensor
    rank: int
    mixing: float
    longest: float
    shortest: float


def factors(down: Tensor, up: Tensor, scale: float) -> Factors:
    """What stands for the weights of a layer where only norms of what they make of ``Bx`` are asked for.

    With ``B = D U S Vᵀ``, D the lengths of its rows and the rest singular values and vectors of B with rows of one
    length, the whitening is ``S⁻¹ Uᵀ D⁻¹`` over the singular values that are not zero, so B may be rank-deficient. With
    ``A = Q R`` the root is ``scale · R``. It is the row space of B that is measured, as by the reference, and not that
    of AB: A is zero at the start, where the null space is to be seen already.

    Rows may be as short as they like, for A can make up for it: the same update has many pairs A, B. A direction counts
    that is there to float64; one that only float32's rounding of B tells from none must carry something of the update.

    Args:
        down: B, shape ``(r, in)``; of no rows where there is none.
        up: A, shape ``(out, r)``.
        scale: The adapter's scale.
    """
    down, up = down.to("cpu", torch.float64), up.to("cpu", torch.float64)
    matrices = torch.zeros(2, len(down), len(down), dtype=torch.float64)
    if not len(down):
        return Factors(matrices, 0, 1.0, 0.0, 0.0)
    root = scale * _qr(up, mode="r")[1] if bool(torch.isfinite(up).all()) else torch.full_like(matrices[1], torch.nan)
    matrices[1, : len(root)] = root
    if not bool(torch.isfinite(down).all()):
        matrices[0] = torch.nan
        return Factors(matrices, len(down), 1.0, torch.nan, torch.nan)
    rows = row_norms(down)
    down = down * (rows > 0)[:, None]  # what is too short to be squared in float64 counts as zero, as its Bx does
    lengths = rows.where(rows > 0, 1.0)[:, None]
    # The triangle of Bᵀ has its singular values, and none of them is squared on the way.
    vectors, values, _ = _svd(_qr((down / lengths).mT, mode="r")[1].mT, full_matrices=False)
    carried = row_norms((root @ (lengths * vectors * values)).mT)
    exact = max(down.shape) * torch.finfo(torch.float64).eps
    kept = (values > values[0] * ROUNDED) | (values > values[0] * exact) & (carried > carried.max() * ROUNDED)
    whitening = (vectors[:, kept] / values[kept] / lengths).mT
    matrices[0, : len(whitening)] = whitening
    return Factors(
        matrices,
        len(whitening),
        float(values[0] / values[kept].min()) if len(whitening) else 1.0,
        float(rows.max()),
        float(rows[rows > 0].min()) if len(whitening) else 0.0,
    )


def inner_norms(down: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """``‖Px‖`` and ``‖scale · ABx‖`` of each row, from ``down = Bx (…, n, r)`` and ``factors (…, 2, r, r)`` alone."""
    both = down @ factors.flatten(-3, -2).mT
    both = row_norms(both.reshape(*both.shape[:-1], 2, down.shape[-1]))
    return both[..., 0], both[..., 1]


def narrow_norms(down: Tensor, factors: Tensor) -> Tensor:
    """``‖Bx‖``, ``‖Px‖`` and ``‖scale · ABx‖`` of each row, shape ``(3, …, n)``, in at least float32.

    Args:
        down: ``Bx``, shape ``(…, n, r)``, any floating point type.
        factors: Shape ``(…, 2, r, r)``, float64.
    """
    if down.ndim == 2 and (quick := _fused(down)) is not None:
        norms: Tensor | None = quick.narrow_norms(down, factors)
        if norms is not None:
            return norms
    down = down.to(torch.promote_types(down.dtype, torch.float32))
    return torch.stack((row_norms(down), *inner_norms(down, factors.to(down.dtype))))


def joined(base: Tensor, up: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A layer's output from its two parts, and the norms of the base's rows and of its own, both without the bias.

    On a card both are taken by the very addition, which so costs no more than it did.

    Args:
        base: ``W_res x [+ bias]``, shape ``(…, out)``.
        up: ``ABx`` before the ``scale``, likewise.
        scale: What it is multiplied with.
        bias: Where the base has added one, shape ``(out,)``.

    Returns:
        ``base + scale · up`` in the type of ``base``, to the last bit what torch gives, and the norms, shape
        ``(2, n)``.
    """
    quick = _fused(base)
    if quick is not None and up.dtype in (base.dtype, torch.float32) and up.shape == base.shape and base.numel():
        found: tuple[Tensor, Tensor] = quick.joined(base, up, scale, bias)
        return found
    update = up if scale == 1 else up * scale
    whole = output = (base + update).to(base.dtype)
    if bias is not None:
        base = base.to(torch.promote_types(base.dtype, torch.float32)) - bias
        whole = base + update
    return output, torch.stack((row_norms(base).flatten(), row_norms(whole).flatten()))


def sums(
    *,
    input: Tensor,  # noqa: A002  # the figures' own names
    down: Tensor,
    update: Tensor,
    base: Tensor,
    output: Tensor,
    projected: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """What the rows of a layer add up to, in one reduction and without waiting for the device.

    Args:
        input: `row_norms` of ``x``, shape ``(…, n)`` like all that follow.
        down: Of ``Bx``.
        update: Of ``scale · ABx``.
        base: Of ``W_res x``.
        output: Of ``scale · ABx + W_res x``.
        projected: Of ``Px``.
        rows: 1 for what is a row and 0 for what fills up, whose norms are zero; all are if None.

    Returns:
        Shape ``(…, len(Sums))``, float64.
    """
    directed = input > 0
    share = (projected / input).square().where(directed, 0.0)
    rows = torch.ones_like(input) if rows is None else rows.expand_as(input)
    parts = (rows, directed.to(input.dtype), share, input, down, update, base, output)
    return torch.stack(parts, dim=-2).sum(dim=-1, dtype=torch.float64)


def sums_by_octave(*norms: Tensor) -> Tensor:
    """How many rows there are, and what their norms add up to, apart for each power of two below which ``‖x‖`` lies.

    So the rows' median, and which of them lie far beyond it, can be told at the end, from counts that are the same in
    whatever order and by whatever process the rows were added.

    Args:
        norms: `row_norms` of ``x`` and of what else is summed, shape ``(…, n)`` each.

    Returns:
        Shape ``(…, OCTAVES, 1 + len(norms))``, float64.
    """
    octave = _octave(norms[0]).unsqueeze(-2)
    rows = torch.stack((torch.ones_like(norms[0]), *norms), dim=-2).double()
    summed = rows.new_zeros(*rows.shape[:-1], OCTAVES)
    return summed.scatter_add_(-1, octave.expand_as(rows), rows).mT


def _octave(norms: Tensor) -> Tensor:
    """The number among `OCTAVES` of each norm, from the exponent in its bits; 0 of a norm of zero."""
    whole, digits, bias = (torch.int64, 52, 1022) if norms.dtype == torch.float64 else (torch.int32, 23, 126)
    return ((norms.view(whole) >> digits) + (OCTAVES // 2 - bias)).clamp(0, OCTAVES - 1).long()


def without_sinks(by_octave: Tensor, times: int) -> Tensor:
    """The sums of the rows that are no sinks: of all but the few whose norm is beyond ``times`` the median.

    The median is over the rows that are not zero, and rounded up to a power of two.

    Args:
        by_octave: `sums_by_octave` of all rows of a layer, shape ``(…, OCTAVES, s)``.
        times: A power of two.

    Returns:
        Shape ``(…, s)``.
    """
    upto = by_octave[..., 1:, 0].cumsum(dim=-1)
    median = 1 + (2 * upto < upto[..., -1:]).sum(dim=-1)
    last = (median + times.bit_length()).clamp_max(OCTAVES) - 1
    index = last[..., None, None].expand(*last.shape, 1, by_octave.shape[-1])
    return by_octave.cumsum(dim=-2).gather(-2, index).squeeze(-2)


def means(summed: Tensor) -> Tensor:
    """What `Means` holds after the rows, in its order; NaN where there is no row.

    Args:
        summed: Shape ``(…, len(Sums))``.

    Returns:
        Shape ``(…, len(Means) - 1)``.
    """
    of = Sums(*summed.unbind(dim=-1))  # type: ignore[arg-type]  # a tensor for each
    total = torch.stack((of.input, of.down, of.update, of.base, of.output, of.leakage), dim=-1)  # type: ignore[arg-type]
    rows = torch.stack((*(of.rows,) * 5, of.directed), dim=-1)  # type: ignore[arg-type]
    return total / rows.where(rows > 0, torch.nan)


def compute(summed: Tensor) -> Means:
    """The means over the rows that ``summed (len(Sums),)`` holds; NaN where there is no row to take them from."""
    return Means(int(summed[0]), *means(summed).tolist())
