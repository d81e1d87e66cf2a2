"""What weights alone tell, against float64 arithmetic on the whole matrices."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.arrays import norm
from pytest_nullspace.errors import StatsError
from pytest_nullspace.judging.diagnosis import diagnose
from pytest_nullspace.judging.weights import Weights, effective_rank, singular_values, weigh
from pytest_nullspace.report import weights
from pytest_nullspace.report.markdown import escape
from pytest_nullspace.run.stats import SCALE_ZERO, RunStats
from tests import adapters, tiny

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("protected", [None, 3])
def test_norms_and_rank_are_those_of_the_product(tmp_path: Path, protected: int | None) -> None:
    """Each norm, and the effective rank of A·B (less what PA, PB take out), as the full product has them."""
    folder = tiny.lora_null(tmp_path / "ft", protected=protected)
    checkpoint = open_checkpoint(folder)
    tensors = {name: value.double().numpy() for name, value in load_file(folder / "model.safetensors").items()}
    (layer,) = weigh(checkpoint, {Q0}).layers
    up, down = tensors[f"{Q0}.ALinear.weight"], tensors[f"{Q0}.BLinear.weight"]
    outside = np.eye(down.shape[1])
    if protected is not None:
        outside -= tensors[f"{Q0}.PALinear.weight"] @ tensors[f"{Q0}.PBLinear.weight"]
    values = np.linalg.svd(up @ down @ outside, compute_uv=False)
    shares = values[:4] / values[:4].sum()
    assert layer.rank_used == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert layer.update_norm == pytest.approx(np.linalg.norm(values), rel=1e-9)
    norms = [np.linalg.norm(part) for part in (down, up, tensors[f"{Q0}.weight_residual"])]
    assert [layer.down_norm, layer.up_norm, layer.base_norm] == pytest.approx(norms, rel=1e-12)
    assert norm(checkpoint.tensors[f"{Q0}.weight_residual"]) == pytest.approx(norms[2], rel=1e-12)


def test_the_effective_rank_counts_directions() -> None:
    """N equal singular values are n, one alone is one, none is none, and what is no number has none."""
    assert effective_rank(np.ones(5)) == pytest.approx(5)
    assert effective_rank(np.array([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.zeros(3)) == 0
    assert math.isnan(effective_rank(singular_values(np.full((4, 2), np.nan), np.ones((3, 2)))))


def test_the_scale_of_peft_is_in_the_update(tmp_path: Path) -> None:
    """Alpha / r, or alpha / √r with rsLoRA, by each layer's own pattern; the base is not there, so it has no norm."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    plain = adapters.adapter(tmp_path / "a", tiny.llama(), **options, alpha_pattern={"v_proj": 2})
    scales = {layer.name[-6:]: layer.scale for layer in weigh(open_checkpoint(plain), {Q0, Q0[:-6] + "v_proj"}).layers}
    assert scales == {"q_proj": 2.0, "v_proj": 0.5}
    rooted = adapters.adapter(tmp_path / "b", tiny.llama(), **options, use_rslora=True)
    (layer,) = weigh(open_checkpoint(rooted), {Q0}).layers
    assert (layer.scale, layer.base_norm) == (4.0, None)


def test_a_scale_of_zero_is_a_fault_by_its_name_and_a_negative_one_is_remarked(tmp_path: Path) -> None:
    """Layers that alpha_pattern switches off fail by that reason alone; one that it turns round is told, not failed."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    made = adapters.adapter(tmp_path, tiny.llama(), **options, alpha_pattern={"q_proj": 0, "1.self_attn.v_proj": -2})
    checkpoint = open_checkpoint(made)
    found = weigh(checkpoint, {spec.name for spec in checkpoint.layers})
    off = tuple(layer.name for layer in found.layers if layer.name.endswith("q_proj"))
    for layer in found.layers:
        told = [f"dead: {SCALE_ZERO}, so with the adapter the output is the same as without"]
        assert list(layer.faults(trained=True)) == (told if layer.name in off else [])
    causes = diagnose(RunStats("ft", "", (), 6), weights=found)
    assert [(cause.cause, cause.layers) for cause in causes] == [("scale-zero", off)]
    remarked = "the scale is negative in 1 of 6 layers, such as model.layers.1.self_attn.v_proj (-0.5): what was"
    shown = [line for line, _ in weights.summary(found, lambda _: (), 6, every=False)]
    assert any(line.startswith(remarked) for line in shown)
    assert escape(remarked) in weights.markdown("ft", found, lambda _: (), 6, [])


def test_what_float64_cannot_square_is_no_finite_weight(tmp_path: Path) -> None:
    """Entries of 1e170, as a file in float64 may hold, are told as the infinities that a forward makes of them."""

    def grow(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q0}.ALinear.weight"] = tensors[f"{Q0}.ALinear.weight"].double() * 1e170

    checkpoint = open_checkpoint(tiny.lora_null(tmp_path / "ft", change=grow, dtype=torch.float64))
    (first, *_) = weigh(checkpoint, {spec.name for spec in checkpoint.layers}).layers
    assert list(first.faults(trained=True)) == ["non-finite weights (NaN or infinity)"]


def test_dead_and_non_finite_layers_have_faults_and_causes(tmp_path: Path) -> None:
    """A zero A and a NaN each fail by name and are diagnosed without an audit; all survives the file."""

    def break_two(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q0}.ALinear.weight"] *= 0
        tensors[f"{Q0[:-6]}v_proj.BLinear.weight"][0, 0] = math.nan

    checkpoint = open_checkpoint(tiny.lora_null(tmp_path / "ft", change=break_two))
    found = weigh(checkpoint, {spec.name for spec in checkpoint.layers})
    told = {layer.name: list(layer.faults(trained=True)) for layer in found.layers}
    assert {name[-6:]: phrases for name, phrases in told.items() if phrases} == {
        "q_proj": ["dead: A is zero, so with the adapter the output is the same as without"],
        "v_proj": ["non-finite weights (NaN or infinity)"],
    }
    again = Weights.of({"weights": json.loads(json.dumps(found.to_list(), allow_nan=False))})
    assert again is not None
    assert [list(layer.faults(True)) for layer in again.layers] == list(told.values())
    sound: dict[str, Any] = found.to_list()[0]
    broken: list[Any]
    for broken in ([3], [{}], [{**sound, "name": ["a"]}], [{**sound, "rank": "4"}], [{**sound, "up_norm": 10**400}]):
        with pytest.raises(StatsError, match=r"^f\.json: its entry 'weights' holds no weights; weigh again$"):
            Weights.of({"weights": broken}, "f.json")
    causes = diagnose(RunStats("ft", "", (), 21), weights=found)
    assert [(cause.cause, cause.layers) for cause in causes] == [
        ("non-finite", (Q0[:-6] + "v_proj",)),
        ("dead-layers", (Q0,)),
    ]
    assert [list(layer.faults(trained=False)) for layer in found.layers][3][0].startswith("an update already")
