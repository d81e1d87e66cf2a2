"""The best that a subspace could do, against plain eigenvalues of the rows themselves."""

from pathlib import Path

import pytest
import torch

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.spectrum import spectrum
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from tests import tiny

WINDOWS = [list(range(40)), list(range(60, 100)), list(range(20, 60))]
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapted(tmp_path: Path) -> AdaptedModel:
    """A tiny model with random adapters."""
    return load_model(open_checkpoint(tiny.lora_null(tmp_path / "ft")), torch.device("cpu"), torch.float32)


def rows_of(adapted: AdaptedModel, name: str) -> torch.Tensor:
    """Every input row of the layer, each of length one, in float64."""
    rows: list[torch.Tensor] = []
    layer = adapted.layers[name]
    handle = layer.layer.register_forward_pre_hook(lambda _, args: rows.append(args[0][0].double()))
    with torch.inference_mode():
        for window in WINDOWS:
            adapted.model(input_ids=torch.tensor([window]))
    handle.remove()
    together = torch.cat(rows)
    unit: torch.Tensor = together / together.norm(dim=1, keepdim=True)
    return unit


@pytest.mark.parametrize("held_bytes", [1, 20_000, 1 << 30])
def test_it_is_that_of_the_rows_however_many_fit_at_once(adapted: AdaptedModel, held_bytes: int) -> None:
    """Least leakage, effective rank and shared space are those of the rows' own singular values, in any blocks."""
    found = spectrum(adapted, WINDOWS, list(adapted.layers), held_bytes=held_bytes)
    assert list(found) == list(adapted.layers)
    for name, layer in adapted.layers.items():
        rows, rank = rows_of(adapted, name), layer.rank
        _, singular, vectors = torch.linalg.svd(rows, full_matrices=True)
        values = torch.zeros(layer.in_features, dtype=torch.float64)
        values[: len(singular)] = singular.square() / len(rows)
        assert found[name].least_leakage == pytest.approx(float(values[-rank:].sum()), rel=1e-6, abs=1e-12)
        shares = values[values > 0]
        assert found[name].effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-6)
        basis = torch.linalg.qr(layer.down_matrix().mT)[0]
        overlap = float((vectors[-rank:] @ basis).square().sum() / rank)
        assert found[name].shared == pytest.approx(overlap, rel=1e-4)


def test_it_is_that_of_the_rows_that_count(adapted: AdaptedModel) -> None:
    """Of the rows at some places alone, as of what an assistant says, the values are those of these rows."""
    places = [[0, 3, 4], [], list(range(7, 30))]
    kept = [number * 40 + place for number, of in enumerate(places) for place in of]
    rows, layer = rows_of(adapted, Q0)[kept], adapted.layers[Q0]
    values = torch.linalg.eigvalsh(rows.mT @ rows / len(rows))
    found = spectrum(adapted, WINDOWS, [Q0], counted=places)[Q0]
    assert found.least_leakage == pytest.approx(float(values[: layer.rank].sum()), rel=1e-6, abs=1e-12)
    (figures,) = measure(adapted, WINDOWS, layers=[Q0], counted=places)
    assert figures.rows == len(rows)
    assert figures.mean_leakage == pytest.approx(
        float((rows @ torch.linalg.qr(layer.down_matrix().mT)[0]).square().sum(dim=-1).mean()), rel=1e-6
    )


def test_the_best_subspace_stands_at_one_and_no_adapter_beyond(adapted: AdaptedModel) -> None:
    """B from the smallest eigenvectors reaches the least leakage; any other B stands below it."""
    layer = adapted.layers[Q0]
    vectors = torch.linalg.svd(rows_of(adapted, Q0), full_matrices=True)[2]
    weight = layer.down.weight
    assert isinstance(weight, torch.Tensor)
    before = measure(adapted, WINDOWS, layers=[Q0])[0]
    weight.data.copy_(vectors[-layer.rank :])
    found = spectrum(adapted, WINDOWS, [Q0])[Q0]
    (best,) = measure(adapted, WINDOWS, layers=[Q0])
    assert found.shared == pytest.approx(1, rel=1e-4)
    assert best.mean_leakage == pytest.approx(found.least_leakage, rel=1e-4, abs=1e-9)
    assert before.mean_leakage is not None
    assert before.mean_leakage > found.least_leakage


def test_a_rank_deficient_b_stands_by_the_space_that_it_spans(adapted: AdaptedModel) -> None:
    """Rows of B that repeat others, or are zero, add nothing to its subspace nor to the best one it is held against."""
    layer = adapted.layers[Q0]
    weight = layer.down.weight
    assert isinstance(weight, torch.Tensor)
    weight.data[2], weight.data[3] = -weight.data[0], 0
    rows = rows_of(adapted, Q0)
    _, singular, vectors = torch.linalg.svd(rows, full_matrices=True)
    values = torch.zeros(layer.in_features, dtype=torch.float64)
    values[: len(singular)] = singular.square() / len(rows)
    found = spectrum(adapted, WINDOWS, [Q0])[Q0]
    assert found.least_leakage == pytest.approx(float(values[-2:].sum()), rel=1e-6, abs=1e-12)
    basis = torch.linalg.qr(layer.down_matrix()[:2].mT)[0]
    assert found.shared == pytest.approx(float((vectors[-2:] @ basis).square().sum() / 2), rel=1e-4)
    weight.data.zero_()
    assert spectrum(adapted, WINDOWS, [Q0]) == {}


def test_a_layer_whose_input_is_no_number_has_none(adapted: AdaptedModel) -> None:
    """Infinity in one layer's input leaves it and those behind it without a spectrum, and the others with theirs."""
    base = adapted.layers["model.layers.1.mlp.gate_proj"].base.weight
    assert isinstance(base, torch.Tensor)
    base.data.fill_(torch.inf)
    found = spectrum(adapted, WINDOWS, list(adapted.layers))
    assert "model.layers.1.mlp.gate_proj" in found
    assert "model.layers.1.mlp.down_proj" not in found
    assert "model.layers.2.self_attn.q_proj" not in found


def test_it_leaves_the_model_as_it_was(adapted: AdaptedModel) -> None:
    """No hook remains."""
    spectrum(adapted, WINDOWS, [Q0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in adapted.model.modules())
