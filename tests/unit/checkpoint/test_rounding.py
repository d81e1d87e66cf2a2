"""Weights as the types hold them, against torch's own types and against rounding that is written differently."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.checkpoint import rounding

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def weights(seed: int, rows: int, width: int, scale: float) -> np.ndarray:
    """Rows of very different sizes, with zeros, ties and a row of nothing."""
    values = np.random.default_rng(seed).normal(size=(rows, width)) * scale
    values *= 10.0 ** np.arange(-(rows // 2), rows - rows // 2)[:, None]
    values[0], values[-1, ::7] = 0.0, 0.0
    return values.astype(np.float32)


def same(one: np.ndarray, other: torch.Tensor) -> None:
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, other.float().numpy())


@pytest.mark.parametrize("name", DTYPES)
@given(seed=st.integers(0, 1000), width=st.integers(1, 70))
def test_half_precision_is_what_torch_rounds_to(name: str, seed: int, width: int) -> None:
    """Every number, ties, zeros and what overflows included, is the one that torch's type holds."""
    values = weights(seed, 8, width, 1.0)
    values[1, 0], values[2, 0] = 1 + 2.0**-9, 1e30
    same(rounding.TYPES[name](values), torch.from_numpy(values).to(DTYPES[name]))


def test_no_number_stays_none() -> None:
    """NaN, whatever its bits, is NaN in each type, and never a number that passes."""
    values = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    values.view(np.uint32)[0, 1] = 0x7FFFFFFF
    for name, to in rounding.TYPES.items():
        assert np.isnan(to(values)[0, 1]), name


@given(seed=st.integers(0, 1000), width=st.integers(1, 70))
def test_e4m3_is_what_torch_rounds_to(seed: int, width: int) -> None:
    """Normal, subnormal and tied numbers up to 448 are those of torch.float8_e4m3fn."""
    values = np.clip(weights(seed, 12, width, 1.0), -448, 448)
    values[1, 0], values[2, 0], values[3, 0] = 2.0**-10, 3 * 2.0**-10, 448.0
    same(rounding.e4m3(values), torch.from_numpy(values).to(torch.float8_e4m3fn))


def test_fp8_has_a_scale_an_output() -> None:
    """Each row is scaled by its own largest over 448, and a row of zeros stays zero."""
    values = weights(0, 6, 40, 0.02)
    rows = []
    for row in torch.from_numpy(values):
        scale = row.abs().max() / 448
        rows.append((row / scale).to(torch.float8_e4m3fn).float() * scale if scale else row)
    same(rounding.fp8(values), torch.stack(rows))


@given(seed=st.integers(0, 1000), width=st.integers(1, 150))
def test_nf4_is_the_nearest_of_sixteen_in_each_block_of_64(seed: int, width: int) -> None:
    """Of the flattened weight, so that a block may go on in the next row, and the last one may be short."""
    values = weights(seed, 5, width, 0.1)
    flat, naive = values.reshape(-1).astype(np.float64), np.zeros(values.size)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = abs(block).max()
        for place, value in enumerate(block):
            naive[start + place] = largest * min(rounding.NF4, key=lambda code: abs(code * largest - value))
    near = np.abs(rounding.nf4(values).reshape(-1) - naive)
    # Between two codes float32 may fall on either side.
    assert ((near <= 1e-6 * np.abs(naive)) | (np.abs(2 * flat - naive - rounding.nf4(values).reshape(-1)) < 1e-5)).all()


@pytest.mark.parametrize("size", [0.1, 0.01, 0.001])
def test_one_scale_a_tensor_leaves_of_an_update_what_one_an_output_does(size: float) -> None:
    """The step beside a weight is the same, so a server's choice of the two changes no verdict: docs/merging.md."""
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(512, 512)) * np.exp(rng.normal(size=(512, 1)))).astype(np.float32)
    update = (rng.normal(size=(512, 8)) @ rng.normal(size=(8, 512))).astype(np.float32)
    update *= size * np.linalg.norm(weight) / np.linalg.norm(update)

    def whole(values: np.ndarray) -> np.ndarray:
        scale = np.float32(np.abs(values).max() / rounding.FP8_MOST)
        return np.asarray(rounding.e4m3(values / scale) * scale)

    told = []
    for kind in (rounding.fp8, whole):
        rest = kind(weight + update).astype(np.float64) - kind(weight)
        told.append((np.vdot(rest, update) / np.vdot(update, update), np.linalg.norm(rest - update)))
    (survival, noise), (other, louder) = told
    assert other == pytest.approx(survival, abs=0.03)
    assert louder == pytest.approx(noise, rel=0.07)
