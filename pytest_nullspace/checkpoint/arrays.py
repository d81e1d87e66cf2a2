"""Numbers straight from the files of weights, by numpy: norms, changes and angles, one tensor of each side in memory.

Numpy is imported where numbers are needed.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint.header import AGAIN, FLOATING, TensorInfo, printable
from pytest_nullspace.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}
_NO_NUMBERS = {
    "F16": ("<u2", 0x7C00, 0x7C00), "BF16": ("<u2", 0x7F80, 0x7F80), "F32": ("<u4", 0x7F800000, 0x7F800000),
    "F64": ("<u8", 0x7FF << 52, 0x7FF << 52), "C64": ("<u4", 0x7F800000, 0x7F800000), "F8_E5M2": ("u1", 0x7C, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F), "F8_E8M0": ("u1", 0xFF, 0xFF), "F8_E5M2FNUZ": ("u1", 0xFF, 0x80),
    "F8_E4M3FNUZ": ("u1", 0xFF, 0x80),
}  # fmt: skip
"""For each type that can hold NaN or infinity: its bits as whole numbers, and which of them are then what."""
_CHUNK = 1 << 22
_ROUNDED = 2.0**-20
"""The share of a matrix that the rounding of its entries to float32 may have made."""


def _raw(info: TensorInfo) -> "Array":
    """The tensor's bytes in its own order, mapped from its file where that is the file's."""
    import numpy as np

    try:
        begin = info.begin + (_data_at(info.file) if info.data_at is None else info.data_at)
        if not info.nbytes:
            return np.empty(0, np.uint8)
        held = np.memmap(info.file, np.uint8, "r", begin, (info.nbytes,))
    except OSError as error:
        raise CheckpointError(f"{info.file}: the weights cannot be read: {error.strerror}") from None
    if info.heads:
        halves = held.reshape(info.heads, info.shape[0] // info.heads // 2, 2, -1).swapaxes(1, 2)
        return np.ascontiguousarray(halves).reshape(-1)
    if not info.transposed:
        return held
    rows, columns = info.shape
    turned = held.reshape(columns, rows, -1).transpose(1, 0, 2)
    return np.ascontiguousarray(turned).reshape(-1)


def _data_at(file: Path) -> int:
    """Where the data of a safetensors file begins."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def _floats(raw: "Array", dtype: str) -> "Array":
    """Bytes as float64."""
    import numpy as np

    values = raw.view(_DTYPES[dtype])
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def read_tensor(info: TensorInfo) -> "Array":
    """A tensor in float64, in its shape."""
    return _floats(_raw(info), info.dtype).reshape(info.shape)


def rows_of(info: TensorInfo, rows: slice, *, turned: bool = False) -> "Array":
    """Some rows of a matrix in float64, or with ``turned`` of its transpose; the rest of its file is not read."""
    import numpy as np

    held = _raw(info).view(_DTYPES[info.dtype]).reshape(info.shape)
    part = np.ascontiguousarray((held.T if turned else held)[rows])
    return _floats(part.view(np.uint8).reshape(-1), info.dtype).reshape(part.shape)


def triangle(info: TensorInfo, *, turned: bool = False) -> "Array":
    """The triangle R of a QR decomposition of a tall matrix or, ``turned``, of its transpose, some rows at a time.

    It has the norm and the singular values of the matrix, and is no number where that holds one that is none.
    """
    import numpy as np

    rows, columns = info.shape[::-1] if turned else info.shape
    found: Array = np.zeros((0, columns))
    step = max(_CHUNK // 16 // columns, columns)
    for first in range(0, rows, step):
        part = rows_of(info, slice(first, first + step), turned=turned)
        stacked = np.concatenate((found, part))
        root: Any = np.linalg.qr(stacked, mode="r")
        found = root if np.isfinite(stacked).all() else np.full((columns, columns), np.nan)
    return found


ORTHONORMAL = 1e-2
"""How far ``B Bᵀ`` may lie from the identity, in any element; half precision rounds."""


def is_orthonormal(info: TensorInfo) -> bool:
    """Whether its rows are."""
    import numpy as np

    rows = read_tensor(info)
    return bool(np.abs(rows @ rows.T - np.eye(len(rows))).max() <= ORTHONORMAL)


def is_finite(info: TensorInfo) -> bool:
    """Whether it holds neither NaN nor infinity, by its bits, whatever its type."""
    if info.dtype not in _NO_NUMBERS:
        return True
    whole, mask, such = _NO_NUMBERS[info.dtype]
    bits = _raw(info).view(whole)
    parts = (bits[start : start + _CHUNK] for start in range(0, len(bits), _CHUNK))
    return not any(((part & part.dtype.type(mask)) == part.dtype.type(such)).any() for part in parts)


def require_finite(tensors: Iterable[TensorInfo]) -> None:
    """Read each of them once.

    Raises:
        CheckpointError: One is not finite, or cannot be read.
    """
    for info in tensors:
        if not is_finite(info):
            raise not_finite(info)


def not_finite(info: TensorInfo) -> CheckpointError:
    """The error that it is not."""
    return CheckpointError(
        f"{info.file}: tensor {printable(info.stored or info.name)} holds NaN or infinity, and no layer test covers "
        f"it; throw this one away, or {AGAIN}"
    )


def norm(info: TensorInfo) -> float:
    """The Frobenius norm of a tensor, without all of it in float64 at once."""
    raw, count = _raw(info), math.prod(info.shape)
    width = len(raw) // count if count else 0
    parts = (_floats(raw[i * width : (i + _CHUNK) * width], info.dtype) for i in range(0, count, _CHUNK))
    return math.sqrt(sum(float((part**2).sum()) for part in parts))


def change(now: TensorInfo, before: TensorInfo, *, absolute: bool = False) -> float:
    """``‖now − before‖ / ‖before‖`` in the Frobenius norm, or without the division; equal bytes are not converted."""
    import numpy as np

    a, b = _raw(now), _raw(before)
    if now.dtype == before.dtype and now.shape == before.shape and np.array_equal(a, b) and now.dtype in FLOATING:
        return 0.0
    if now.dtype not in FLOATING or before.dtype not in FLOATING or now.shape != before.shape:
        same = now.dtype == before.dtype and now.shape == before.shape and np.array_equal(a, b)
        return 0.0 if same else math.inf
    if not math.prod(now.shape):
        return 0.0
    wide, narrow = len(a) // math.prod(now.shape), len(b) // math.prod(before.shape)
    far = size = 0.0
    for start in range(0, math.prod(now.shape), _CHUNK):
        x = _floats(a[start * wide : (start + _CHUNK) * wide], now.dtype)
        y = _floats(b[start * narrow : (start + _CHUNK) * narrow], before.dtype)
        far += float(((x - y) ** 2).sum())
        size += float((y**2).sum())
    return math.sqrt(far) if absolute else _quotient(math.sqrt(far), math.sqrt(size))


def is_same(now: TensorInfo, before: TensorInfo) -> bool:
    """Whether two tensors of one shape hold the same numbers, as far as the type of ``now`` can hold them."""
    import numpy as np

    a, b, count = _raw(now), _raw(before), math.prod(now.shape)
    numbers = {now.dtype, before.dtype} <= FLOATING
    if count and (len(a) % count or len(b) % count):  # several numbers in a byte
        return now.dtype == before.dtype and np.array_equal(a, b)
    wide, narrow = (len(raw) // count if count else 0 for raw in (a, b))
    for start in range(0, count, _CHUNK):
        x, y = a[start * wide : (start + _CHUNK) * wide], b[start * narrow : (start + _CHUNK) * narrow]
        if now.dtype == before.dtype and np.array_equal(x, y):
            continue
        same = numbers and np.array_equal(
            _floats(x, now.dtype), _rounded(_floats(y, before.dtype), now.dtype), equal_nan=True
        )
        if not same:
            return False
    return True


def _rounded(values: "Array", dtype: str) -> "Array":
    """Numbers as a type holds them, in float64: what lies between two is rounded to the even one."""
    import numpy as np

    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype(_DTYPES[dtype]).astype(np.float64)
        bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def _quotient(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0


def relative(now: "Array", before: "Array") -> float:
    """``‖now − before‖ / ‖before‖`` in the Frobenius norm."""
    import numpy as np

    return _quotient(float(np.linalg.norm(now - before)), float(np.linalg.norm(before)))


def largest_angle(down: "Array", start: "Array") -> float:
    """The largest principal angle between two row spaces, in degrees; exact also where it is small.

    Of spaces of different dimensions it is 90: one has a direction that the other has nothing of.
    """
    import numpy as np

    if np.array_equal(down, start):
        return 0.0
    if not (np.isfinite(down).all() and np.isfinite(start).all()):
        return math.nan
    a, b = _row_space(start), _row_space(down)
    if a.shape != b.shape:
        return 90.0
    common = a.T @ b
    cosine = float(np.linalg.svd(common, compute_uv=False).min())
    sine = float(np.linalg.norm(b - a @ common, 2))
    return math.degrees(math.atan2(sine, cosine))


def _row_space(matrix: "Array") -> "Array":
    """An orthonormal basis ``(in, rank)`` of what the rows ``(r, in)`` span, whatever their lengths."""
    import numpy as np

    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    basis, triangle = np.linalg.qr((matrix / np.where(lengths > 0, lengths, 1.0)).T)
    turned, values, _ = np.linalg.svd(triangle)
    spanned: Array = basis @ turned[:, values > values.max() * _ROUNDED]
    return spanned
