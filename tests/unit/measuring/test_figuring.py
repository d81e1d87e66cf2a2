"""From sums to figures: for many layers at once what each would get by itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace import kernels
from pytest_nullspace.measuring.figuring import figured
from pytest_nullspace.measuring.summing import OCTAVES
from pytest_nullspace.run.figures import of_one_text
from pytest_nullspace.run.stats import LayerStats
from pytest_nullspace.run.uncertainty import jackknife
from tests.saved import LAYER

MEANS = ("input_norm", "down_norm", "update_norm", "base_norm", "output_norm", "mean_leakage")


def told(layer: LayerStats, sums: torch.Tensor) -> LayerStats:
    """The layer with the means that one vector of sums gives."""
    rows, *means = kernels.compute(sums)
    of: dict[str, Any] = dict(zip(MEANS, means, strict=True))
    return replace(layer, rows=rows, **of)


def no_sinks(sums: torch.Tensor) -> torch.Tensor:
    """By octave, where the norms of all rows lie in one."""
    apart = torch.zeros(len(sums), *OCTAVES, dtype=torch.float64)
    apart[:, 50, 0] = sums[..., 0].sum(dim=1)
    return apart


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_figures_and_margins_are_those_of_each_layer(layers: int, windows: int, seed: int) -> None:
    """Means over all windows, and the jackknife over those that had rows, which are fewer in some layers."""
    chance = torch.Generator().manual_seed(seed)
    sums = torch.rand(layers, windows, len(kernels.Sums._fields), generator=chance, dtype=torch.float64) + 0.5
    sums[..., 0] = torch.randint(1, 9, (layers, windows), generator=chance)
    sums[..., 1] = sums[..., 0]
    sums[torch.rand(layers, windows, generator=chance) < 0.3] = 0
    plain = replace(LAYER, task=None, spectrum=None, without_sinks=None, by_window=None, margins={})
    found = figured([plain] * layers, sums, no_sinks(sums))
    for got, of in zip(found, sums, strict=True):
        want, seen = told(plain, of.sum(dim=0)), of[of[:, 0] > 0]
        names = ("rows", *MEANS)
        assert [getattr(got, n) for n in names] == pytest.approx([getattr(want, n) for n in names], nan_ok=True)
        left = [told(plain, of.sum(dim=0) - window) for window in seen]
        assert set(got.margins) == set(of_one_text())
        for name, margin in got.margins.items():
            exact = jackknife([layer.figure(name) for layer in left])
            assert margin == pytest.approx(exact, rel=1e-6, abs=1e-12, nan_ok=True)


def test_a_layer_without_b_has_no_figure_of_it() -> None:
    """Where the update is a whole matrix neither a mean of ``Bx`` nor a margin of what follows from it is told."""
    whole = replace(LAYER, rank=0, down_norm=None, mean_leakage=None, task=None, margins={})
    sums = torch.ones(1, 3, len(kernels.Sums._fields), dtype=torch.float64)
    (got,) = figured([whole], sums, no_sinks(sums))
    assert got.down_norm is None
    assert got.mean_leakage is None
    assert set(got.margins) == {"effectiveness", "contribution", "forgetting"}
    assert figured([], torch.empty(0, 3, 8), torch.empty(0, *OCTAVES)) == ()
