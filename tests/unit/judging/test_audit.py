"""Trained against initial: what moved and how far, exact to float64, whatever the format and precision."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.arrays import change, largest_angle, read_tensor
from pytest_nullspace.checkpoint.header import read_tensors
from pytest_nullspace.errors import CheckpointError, StatsError
from pytest_nullspace.judging.audit import Audit, LayerAudit, audit
from pytest_nullspace.report import changes
from tests import tiny

Q0 = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def moved(key: str, by: float | None = None) -> Change:
    """Adds a constant to one tensor; None sets it to zero."""

    def apply(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[key] = tensors[key] * 0 if by is None else tensors[key] + by

    return apply


def held(tmp_path: Path, change: Change | None = None, variant: str = "auto", **options: Any) -> Audit:
    """A trained tiny adapter, changed, against its start: the same adapter with A = 0."""
    start = open_checkpoint(tiny.lora_null(tmp_path / "start", up_scale=0.0))
    trained = open_checkpoint(tiny.lora_null(tmp_path / "trained", change=change, **options))
    return audit(trained, start, layers={spec.name for spec in trained.layers}, variant=variant)


def faults(found: Audit, trained: bool = True) -> dict[str, list[str]]:
    told = {layer.name: list(layer.faults(found.variant, trained)) for layer in found.layers}
    return {name: phrases for name, phrases in told.items() if phrases}


def test_right_training_moves_only_the_up_matrices(tmp_path: Path) -> None:
    """B, W_res and everything else are bit by bit what they were, A moved: no fault, and it is seen to be v2."""
    found = held(tmp_path)
    assert (found.variant, len(found.layers), found.others) == ("v2", 21, ())
    assert found.compared == 8  # the embeddings, the last norm and two norms a block
    assert faults(found) == {}
    assert all(layer.down == layer.angle == layer.base == 0 and layer.up > 0 for layer in found.layers)


def test_a_moved_b_fails_its_layer_alone(tmp_path: Path) -> None:
    """The relative change and the angle are those of float64 arithmetic, and only that layer is blamed."""
    found = held(tmp_path, moved(f"{Q0}.BLinear.weight", 0.05))
    (layer,) = (layer for layer in found.layers if layer.name == Q0)
    assert layer.down == pytest.approx(0.05 * math.sqrt(4 * 32) / 2, rel=1e-6)
    assert list(faults(found)) == [Q0]
    assert faults(found)[Q0][0].startswith("B left its space: relative change 0.283, largest principal angle ")
    assert found.variant == "v2"


def test_a_turned_basis_is_told_from_a_space_that_moved(tmp_path: Path) -> None:
    """B rotated or rescaled within its own row space is no longer what it was, but spans the same."""

    def turn(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        rotation = torch.linalg.qr(torch.randn(4, 4))[0]
        tensors[f"{Q0}.BLinear.weight"] = 3 * rotation @ tensors[f"{Q0}.BLinear.weight"]

    found = held(tmp_path, turn)
    assert faults(found)[Q0][0].startswith("B turned or rescaled within its space: relative change ")


def test_a_changed_residual_and_a_still_up_matrix_are_faults(tmp_path: Path) -> None:
    """W_res may never move; A must, in training, and need not at the initial stage."""
    found = held(tmp_path, moved(f"{Q0}.weight_residual", 0.01))
    (told,) = faults(found)[Q0]
    assert told.startswith("W_res changed: relative change ")
    still = held(tmp_path, moved(f"{Q0}.ALinear.weight"))
    assert faults(still) == {Q0: ["A did not move from its start"]}
    assert faults(still, trained=False) == {}


def test_what_else_moved_is_listed_with_how_far(tmp_path: Path) -> None:
    """Norms and embeddings outside the layers are compared one by one; what came or went is told."""
    found = held(tmp_path, moved("model.norm.weight", 0.5))
    assert [str(other) for other in found.others] == ["model.norm.weight (relative change 0.5)"]

    def rename(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["model.extra.weight"] = tensors.pop("model.norm.weight")

    assert [str(other) for other in held(tmp_path, rename).others] == [
        "model.extra.weight (new)",
        "model.norm.weight (gone)",
    ]


def test_the_variant_follows_from_the_initial_weights(tmp_path: Path) -> None:
    """Orthonormal rows: v2. Others with A zero: plain LoRA; with A not zero: v1. An option decides over all that."""

    def start(change: Change | None, **options: Any) -> str:
        initial = open_checkpoint(tiny.lora_null(tmp_path / "other", change=change, **options))
        return audit(initial, initial, layers={Q0}).variant

    scaled = moved(f"{Q0}.BLinear.weight", 0.1)
    assert start(None, up_scale=0.0) == "v2"
    assert start(scaled, up_scale=0.0) == "lora"
    assert start(scaled) == "v1"
    assert start(None, up_scale=0.0, dtype=torch.bfloat16) == "v2"
    found = held(tmp_path, scaled, variant="v1")
    assert (found.variant, found.decided, faults(found)) == ("v1", "as --nullspace-variant says", {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_is_no_movement(tmp_path: Path, dtype: torch.dtype) -> None:
    """Saved in another precision the frozen tensors are rounded, which is no change of training."""
    found = held(tmp_path, dtype=dtype)
    assert (faults(found), found.others) == ({}, ())
    assert faults(held(tmp_path, moved(f"{Q0}.weight_residual", 0.01), dtype=dtype))[Q0][0].startswith("W_res changed")


def test_tensors_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    """Every floating type, in shards too, is bit by bit what the safetensors library gives."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        folder = tiny.lora_null(tmp_path / str(dtype), dtype=dtype, shards=2)
        want = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        for name, info in open_checkpoint(folder).tensors.items():
            assert np.array_equal(read_tensor(info), want[name].double().numpy()), name


def test_what_is_no_number_is_a_change(tmp_path: Path) -> None:
    """NaN in a frozen tensor is never close to its start; equal bytes are equal."""
    found = held(tmp_path, moved(f"{Q0}.BLinear.weight", math.nan))
    assert len(faults(found)[Q0]) == 1
    info = open_checkpoint(tmp_path / "trained").tensors[f"{Q0}.BLinear.weight"]
    assert change(info, info) == 0


def test_a_checkpoint_of_other_layers_is_no_start(tmp_path: Path) -> None:
    """Another depth or another rank is told, not compared."""
    trained = open_checkpoint(tiny.lora_null(tmp_path / "trained"))
    deep = open_checkpoint(tiny.lora_null(tmp_path / "deep", tiny.llama(num_hidden_layers=4)))
    with pytest.raises(CheckpointError, match=r"only one of them adapts model\.layers\.3\.mlp.* and 6 more"):
        audit(trained, deep, layers={Q0})
    wide = open_checkpoint(tiny.lora_null(tmp_path / "wide", rank=8))
    with pytest.raises(CheckpointError, match="B is 8×32 at the start, but 4×32 now"):
        audit(trained, wide, layers={Q0})


def as_peft(folder: Path, change: Change | None = None) -> Path:
    """The adapter of `tiny.lora_null` as PEFT would save it, beside its base."""
    start = load_file(tiny.lora_null(folder / "whole") / "model.safetensors")
    parts = {"BLinear.weight": "lora_A.weight", "ALinear.weight": "lora_B.weight"}
    tensors = {
        f"base_model.model.{name.removesuffix(old)}{new}": value
        for name, value in start.items()
        for old, new in parts.items()
        if name.endswith(f".{old}")
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": str(folder / "base")}
    if change is not None:
        change(tensors, config)
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tiny.llama().save_pretrained(folder / "base")
    return folder / "adapter"


def test_a_peft_adapter_is_held_against_its_start(tmp_path: Path) -> None:
    """Two PEFT adapters are compared by their own tensors; another base is told by both names."""
    start = open_checkpoint(as_peft(tmp_path / "a"))
    key = f"base_model.model.{Q0}.lora_A.weight"
    trained = open_checkpoint(as_peft(tmp_path / "b", moved(key, 0.05)))
    found = audit(trained, start, layers={spec.name for spec in start.layers})
    assert found.variant == "v2"
    told = faults(found)
    assert told[Q0][0].startswith("B left its space: relative change 0.283")
    assert all("A did not move from its start" in phrases for phrases in told.values())
    assert [str(other) for other in found.others] == [
        f"base_model_name_or_path ({tmp_path}/b/base, was {tmp_path}/a/base)"
    ]
    assert found.layers[0].base is None
    assert changes.moved(found) == f"{found.others[0]}; 0 of 0 tensors outside the layers moved"


def test_who_names_no_base_names_no_other(tmp_path: Path) -> None:
    """A model in memory whose base was never saved is not told to be trained on another than its start."""
    start = open_checkpoint(as_peft(tmp_path / "a"))
    trained = open_checkpoint(as_peft(tmp_path / "b", lambda _, config: config.pop("base_model_name_or_path")))
    assert audit(trained, start, layers={Q0}).others == ()


def test_a_start_that_is_no_number_is_no_start(tmp_path: Path) -> None:
    """NaN in the matrices of a start is told of its file; the trained layers are not called broken for it."""
    key = f"base_model.model.{Q0}.lora_A.weight"
    start, trained = as_peft(tmp_path / "a", moved(key, math.nan)), as_peft(tmp_path / "b")
    with pytest.raises(
        CheckpointError, match=rf"a/adapter/adapter_model\.safetensors: tensor {re.escape(key)} holds NaN"
    ):
        audit(open_checkpoint(trained), open_checkpoint(start), layers={Q0})


def test_formats_are_compared_across(tmp_path: Path) -> None:
    """A PEFT adapter with its base is held against a LoRA-Null start, tensor by tensor, and the other way round."""
    peft_side = open_checkpoint(as_peft(tmp_path))
    base = read_tensors(tmp_path / "base", "model")
    start = open_checkpoint(tiny.lora_null(tmp_path / "start", up_scale=0.0))
    layers = {spec.name for spec in start.layers}
    found = audit(peft_side, start, layers=layers, trained_base=base)
    assert (faults(found), found.others, found.compared) == ({}, (), 8)
    assert all(layer.base == 0 for layer in found.layers)
    changed = open_checkpoint(tiny.lora_null(tmp_path / "changed", change=moved(f"{Q0}.weight_residual", 0.1)))
    back = audit(changed, peft_side, layers=layers, initial_base=base)
    assert faults(back)[Q0][0].startswith("W_res changed")


def test_a_base_stored_transposed_is_no_change(tmp_path: Path) -> None:
    """Conv1D bases hold (in, out): the same weights turned are equal, other ones are not, square or not."""
    peft_side = open_checkpoint(as_peft(tmp_path, lambda _, config: config.update(fan_in_fan_out=True)))
    start = open_checkpoint(tiny.lora_null(tmp_path / "start", up_scale=0.0))
    file = tmp_path / "base" / "model.safetensors"
    plain = load_file(file)
    linear = {f"{spec.name}.weight" for spec in start.layers}
    turned = {name: value.T.contiguous() if name in linear else value for name, value in plain.items()}
    for tensors, equal in ((turned, True), (plain, False)):
        save_file(tensors, file)
        base = read_tensors(tmp_path / "base", "model")
        found = audit(peft_side, start, layers={spec.name for spec in start.layers}, trained_base=base)
        assert all((layer.base == 0) is equal for layer in found.layers)


def test_a_scale_that_is_not_that_of_the_start_is_a_fault(tmp_path: Path) -> None:
    """Another alpha, or rsLoRA switched, is told with both factors in every layer; the file keeps them."""
    start = open_checkpoint(as_peft(tmp_path / "a"))
    for number, fields in enumerate(({"lora_alpha": 1}, {"use_rslora": True})):
        trained = open_checkpoint(as_peft(tmp_path / str(number), lambda _, config, f=fields: config.update(f)))  # type: ignore[misc]
        found = audit(trained, start, layers={Q0})
        told = [phrase for phrase in faults(found)[Q0] if "scale" in phrase]
        now = ("alpha 1 / rank 4 = 0.25", "alpha 4 / √rank 4 = 2, rsLoRA")[number]
        assert told == [f"the scale is {now}, but was alpha 4 / rank 4 = 1"]
        assert Audit.of({"audit": found.to_dict()}) == found
    assert not [phrase for phrase in faults(audit(start, start, layers={Q0}))[Q0] if "scale" in phrase]


@pytest.mark.parametrize("alpha", [None, "16", True])
def test_a_lost_alpha_is_refused(tmp_path: Path, alpha: object) -> None:
    """PEFT would silently take its default for an alpha that the config does not name."""
    folder = as_peft(tmp_path, lambda _, config: config.update(lora_alpha=alpha))
    with pytest.raises(CheckpointError, match=r"lora_alpha (is None, not|must be) a number"):
        open_checkpoint(folder)


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 0.5, 31.0, 89.0, 90.0])
def test_the_angle_is_the_one_that_was_turned(degrees: float) -> None:
    """One basis vector turned out of the space by an angle gives that angle, small ones included."""
    start = np.eye(8)[:3]
    down = start.copy()
    radians = math.radians(degrees)
    down[1] = math.cos(radians) * start[1] + math.sin(radians) * np.eye(8)[6]
    assert largest_angle(down, start) == pytest.approx(degrees, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("last", ["a row", "a sum of others", "another twice", "zero"])
def test_the_same_space_is_no_angle_away_however_its_rows_are_written(last: str) -> None:
    """Rows that are scaled, mixed or made of others span what they did; a direction more or less is 90 degrees away."""
    rng = np.random.default_rng(3)
    start = rng.standard_normal((4, 32)).astype(np.float32).astype(float)
    start[3] = {"a row": start[3], "a sum of others": start[0] + start[1], "another twice": 2 * start[0]}.get(last, 0.0)
    mixed = np.linalg.qr(rng.standard_normal((4, 4)))[0] @ start
    for down in (start * 2.0 ** np.array([[-40], [3], [27], [0]]), mixed.astype(np.float32).astype(float)):
        assert largest_angle(down, start) < 1e-4
    other = rng.standard_normal((4, 32))
    assert (largest_angle(np.vstack((start[:3], other[:1])), start) == 90) == (last != "a row")


def test_an_audit_survives_its_file(tmp_path: Path) -> None:
    """What is saved is read back the same, no number as no number; what is no audit is refused."""
    found = held(tmp_path, moved("model.norm.weight", 0.5))
    assert Audit.of({"audit": found.to_dict()}) == found
    assert Audit.of({}) is None
    lost = Audit("i", "v2", "d", (LayerAudit(Q0, math.nan, math.inf, 1.0, None, math.nan, 1e-6),), (), 0)
    again = Audit.of({"audit": lost.to_dict()})
    assert again is not None
    assert math.isnan(again.layers[0].down)
    assert again.layers[0].base is None
    assert faults(again) == faults(Audit("i", "v2", "d", (again.layers[0],), (), 0))
    wrong: list[Any] = [
        {},
        {"layers": 3},
        {**found.to_dict(), "layers": [{"name": 1}]},
        {**found.to_dict(), "x": 1},
        {**found.to_dict(), "variant": ["v2"]},
        {**found.to_dict(), "compared": "3"},
        {**found.to_dict(), "layers": [{**found.to_dict()["layers"][0], "scale": ["2"]}]},
        {**found.to_dict(), "layers": [{**found.to_dict()["layers"][0], "up": 10**400}]},
        [],
    ]
    for broken in wrong:
        with pytest.raises(StatsError, match=r"f\.json: its entry 'audit' is no audit"):
            Audit.of({"audit": broken}, "f.json")
