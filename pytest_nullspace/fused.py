"""What `kernels` computes, on a card in one read of its memory: kernels for Triton, which comes with torch for CUDA.

Each does what the function of `kernels` that calls it does in plain torch, in float32 as that does. Imported only where
Triton is there.
"""

# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: N803

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.runtime.errors import OutOfResources

TAKEN = (torch.bfloat16, torch.float16, torch.float32)
"""The types that are taken; all else goes plain torch's way."""
WIDEST_RANK = 256
"""Of a ``Bx`` whose rows lie in registers whole."""
_too_large: set[tuple[int, bool]] = set()
"""Of a ``Bx``, the ranks, rounded up, and ways for which a card has shown to have too little memory of its own."""


@triton.jit
def _row_norms(values, out, rows, width, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, width, BLOCK):
        there = (row < rows)[:, None] & (first + at < width)[None, :]
        read = tl.load(values + row[:, None] * stride + (first + at)[None, :], mask=there, other=0.0).to(tl.float32)
        total += read * read
    tl.store(out + row, tl.sqrt(tl.sum(total, axis=1)), mask=row < rows)


@triton.jit
def _joined(  # type: ignore[no-untyped-def]
    base, up, bias, output, out, rows, width, scale, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    of_base, of_output = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, width, BLOCK):
        there = (row < rows)[:, None] & (first + at < width)[None, :]
        place = row[:, None] * width + (first + at)[None, :]
        left = tl.load(base + place, mask=there, other=0.0)
        right = tl.load(up + place, mask=there, other=0.0)
        # Rounded as often as torch rounds, so that the model goes on with the very same numbers.
        right = (right.to(tl.float32) * scale).to(right.dtype).to(tl.float32)
        both = (left.to(tl.float32) + right).to(left.dtype)
        tl.store(output + place, both, mask=there)
        left, both = left.to(tl.float32), both.to(tl.float32)
        if HAS_BIAS:
            columns = first + at
            left -= tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
            both = left + right
        of_base += left * left
        of_output += both * both
    tl.store(out + row, tl.sqrt(tl.sum(of_base, axis=1)), mask=row < rows)
    tl.store(out + rows + row, tl.sqrt(tl.sum(of_output, axis=1)), mask=row < rows)


@triton.jit
def _narrow_norms(  # type: ignore[no-untyped-def]
    down,
    factors,
    out,
    rows,
    rank,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    PART: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, RANK)
    there = (row < rows)[:, None] & (at < rank)[None, :]
    given = tl.load(down + row[:, None] * rank + at[None, :], mask=there, other=0.0)
    read = given.to(tl.float32)
    which = tl.program_id(1)
    if which == 0:
        tl.store(out + row, tl.sqrt(tl.sum(read * read, axis=1)), mask=row < rows)
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.static_range(0, RANK, PART):
        of = first + tl.arange(0, PART)
        place = which * rank * rank + of[None, :] * rank + at[:, None]
        factor = tl.load(factors + place, mask=(of < rank)[None, :] & (at < rank)[:, None], other=0.0)
        factor = factor.to(tl.float32)
        if SPLIT:  # into three parts of 8 bits, which hold all of its 24
            high = factor.to(tl.bfloat16)
            rest = factor - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            made = tl.dot(given, high, tl.dot(given, middle, tl.dot(given, low)))
        else:
            made = tl.dot(read, factor, input_precision="tf32x3")
        total += tl.sum(made * made, axis=1)
    tl.store(out + (1 + which) * rows + row, tl.sqrt(total), mask=row < rows)


@triton.jit
def _prints(values, norms, columns, weights, out, rows, count, stride, ROWS: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, COUNT)
    column = tl.load(columns + at, mask=at < count, other=0)
    weight = tl.load(weights + at, mask=at < count, other=0)
    there = (row < rows)[:, None] & (at < count)[None, :]
    read = tl.load(values + row[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    known = read.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int64)
    norm = tl.load(norms + row, mask=row < rows, other=0.0).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int64)
    total = tl.sum(known * weight[None, :], axis=1) + norm * tl.load(weights + count)
    tl.store(out + row, total, mask=row < rows)


def row_norms(values: Tensor) -> Tensor:
    """`kernels.row_norms` of ``values (…, d)``."""
    rows = _rows(values)
    out = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    width = rows.shape[-1]
    tile, warps = _tile(width)
    _launch(_row_norms, rows, (tile["ROWS"],), rows, out, len(rows), width, rows.stride(0), **tile, **warps)
    return out.view(values.shape[:-1])


def joined(base: Tensor, up: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`kernels.joined` of ``base`` and ``up (…, d)``, and of a ``bias (d,)``."""
    left, right = base.contiguous(), up.contiguous()
    output, width = torch.empty_like(left), left.shape[-1]
    out = torch.empty(2, left.numel() // width, dtype=torch.float32, device=left.device)
    (tile, warps), rows = _tile(width), out.shape[1]
    # A product that is added unrounded would not be what torch computes.
    options = {"HAS_BIAS": bias is not None, **tile, **warps, "enable_fp_fusion": False}
    given = left, right, left if bias is None else bias.contiguous(), output, out, rows, width, scale
    _launch(_joined, out[0], (tile["ROWS"],), *given, **options)
    return output, out


def narrow_norms(down: Tensor, factors: Tensor) -> Tensor | None:
    """`kernels.narrow_norms` of ``down (n, r)`` and ``factors (2, r, r)``; None where a card is too small for it."""
    down, factors = down.contiguous(), factors.contiguous()
    rows, rank = down.shape
    out = torch.empty(3, rows, dtype=torch.float32, device=down.device)
    held, split = max(16, triton.next_power_of_2(rank)), down.dtype == torch.bfloat16
    if held > WIDEST_RANK or (held, split) in _too_large:
        return None
    tile = 128, held, min(64 if held <= 128 else 32, held), split
    try:
        _launch(_narrow_norms, down, (tile[0], 2), down, factors, out, rows, rank, *tile, num_warps=8, num_stages=1)
    except OutOfResources:
        _too_large.add((held, split))
        return None
    return out


def prints(values: Tensor, norms: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """`distinct.prints` of ``values (n, d)`` and their norms, by the columns and weights that it looks at."""
    rows = _rows(values)
    out = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    count = len(columns)
    given = rows, norms.contiguous(), columns, weights, out, len(rows), count, rows.stride(0)
    _launch(_prints, rows, (32,), *given, 32, triton.next_power_of_2(count), num_warps=4)
    return out


def works(device: torch.device) -> bool:
    """Whether Triton compiles here, which takes a C compiler, and gives what torch gives."""
    values = torch.randn(3, 40, device=device)
    return torch.allclose(row_norms(values), torch.linalg.vector_norm(values, dim=-1), rtol=1e-5)


def _launch(kernel: Any, rows: Tensor, tile: tuple[int, ...], *given: Any, **options: Any) -> None:
    """Start ``kernel`` for each tile of so many rows, and, where it has more numbers, for each of so many kinds."""
    if not len(rows):
        return
    grid = (triton.cdiv(len(rows), tile[0]), *tile[1:])
    if rows.device.index == torch.cuda.current_device():  # as nearly always; the other way takes longer than a launch
        kernel[grid](*given, **options)
    else:
        with torch.cuda.device(rows.device):
            kernel[grid](*given, **options)


def _rows(values: Tensor) -> Tensor:
    """The rows of ``values``, the numbers of each side by side."""
    rows = values.reshape(-1, values.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _tile(width: int) -> tuple[dict[str, int], dict[str, int]]:
    """How many rows and how much of each a program reads at once, and by how many warps; the best tried on an H200."""
    block = triton.next_power_of_2(width)
    if block > 1024:
        return {"ROWS": 1, "BLOCK": 2048}, {"num_warps": 8}
    return {"ROWS": 4, "BLOCK": min(block, 512)}, {"num_warps": 4}
