"""Weights as the types hold them in which merged models are stored and served, by numpy.

Each function takes rows of a weight, shape ``(n, in)``, float32, one row an output, and gives what is read back, alike.
Numpy is imported where numbers are needed.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

FP8_MOST, _FP8_NORMAL, _FP8_STEP = 448.0, 2.0**-6, 2.0**-9
"""Of e4m3: its largest number, its smallest normal one, and the step between those below."""
NF4_BLOCK = 64
"""Weights that share a scale in NF4, counted on over the ends of rows."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen values of NF4 (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes has them."""


def bf16(values: "Array") -> "Array":
    """Bfloat16: to the nearest, ties to the even one; beyond its range infinity, and what is no number stays none."""
    import numpy as np

    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), values, rounded.view(np.float32))


def fp16(values: "Array") -> "Array":
    """Float16, likewise."""
    import numpy as np

    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def fp8(values: "Array") -> "Array":
    """Float8 e4m3 with a scale an output, the largest of the row over 448: compressed-tensors' ``channel`` strategy."""
    import numpy as np

    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(FP8_MOST)
    scales = np.where(scales == 0, np.float32(1), scales)
    return np.asarray(e4m3(values / scales) * scales)


def e4m3(values: "Array") -> "Array":
    """Numbers of at most 448 as e4m3 holds them: three bits of mantissa, ties to the even one."""
    import numpy as np

    bits = values.view(np.uint32)
    normal = (bits + (np.uint32(0x7FFFF) + ((bits >> 20) & 1))) & np.uint32(0xFFF00000)
    small = np.rint(values / np.float32(_FP8_STEP)) * np.float32(_FP8_STEP)
    rounded = np.where(np.abs(values) < _FP8_NORMAL, small, normal.view(np.float32))
    return np.where(np.isnan(values), values, rounded)


def nf4(values: "Array") -> "Array":
    """NF4 in blocks of 64, each scaled by its largest, as bitsandbytes quantises with its defaults."""
    import numpy as np

    flat = values.reshape(-1)
    padded = np.zeros(-(-len(flat) // NF4_BLOCK) * NF4_BLOCK, np.float32)
    padded[: len(flat)] = flat
    blocks = padded.reshape(-1, NF4_BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.array(NF4, np.float32)
    between = (codes[1:] + codes[:-1]) / 2
    nearest = codes[np.searchsorted(between, blocks / np.where(scales == 0, np.float32(1), scales))]
    rounded = (nearest * scales).reshape(-1)[: len(flat)].reshape(values.shape)
    return np.where(np.isnan(values), values, rounded)


TYPES: Mapping[str, Callable[["Array"], "Array"]] = {"bf16": bf16, "fp16": fp16, "fp8": fp8, "nf4": nf4}
"""The types by name."""
BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "nf4": 4}
"""What a weight takes in each, scales left out."""
