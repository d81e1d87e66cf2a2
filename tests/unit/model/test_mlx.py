"""Adapters of mlx-lm are measured as PEFT's own of the same numbers; what is no LoRA of linear layers is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.arrays import norm, read_tensor
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.judging.audit import audit
from pytest_nullspace.measuring.inputs import why_no_drift
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import load_model
from tests import tiny
from tests.adapters import adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WINDOWS = [[1, 5, 9, 2, 7, 11], [3, 3, 8, 1, 0, 4]]
PREFIX = "base_model.model."


def as_mlx(directory: Path, folder: Path) -> Path:
    """What mlx-lm would have saved of the adapter that PEFT saved in ``directory``."""
    folder.mkdir()
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        layer, _, part = name.removeprefix(PREFIX).partition(".lora_")
        if part.startswith("magnitude"):
            tensors[f"{layer}.m"] = tensor
        else:
            tensors[f"{layer}.lora_{part[0].lower()}"] = tensor.mT.contiguous()
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    told = {
        "fine_tune_type": "dora" if config["use_dora"] else "lora",
        "model": config["base_model_name_or_path"],
        "num_layers": -1,
        "lora_parameters": {"rank": config["r"], "scale": config["lora_alpha"] / config["r"], "dropout": 0.0},
        "learning_rate": 1e-5,
    }
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture
def mlx(tmp_path: Path) -> Path:
    """An adapter of mlx-lm beside the one of PEFT from which it was made."""
    return as_mlx(
        adapter(tmp_path, tiny.llama(), r=4, lora_alpha=20, target_modules=["q_proj", "up_proj"]), tmp_path / "m"
    )


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_its_figures_are_those_of_the_same_adapter_saved_by_peft(config: dict[str, Any], tmp_path: Path) -> None:
    """Every figure of every layer, and the logits, to 1e-6; the file's own numbers are seen transposed."""
    theirs = adapter(tmp_path, tiny.llama(), r=4, lora_alpha=20, target_modules=["q_proj", "down_proj"], **config)
    ours = open_checkpoint(as_mlx(theirs, tmp_path / "mlx"))
    assert ours.format == "MLX LoRA"
    peft = open_checkpoint(theirs)
    assert [replace(layer) for layer in ours.layers] == list(peft.layers)
    assert ours.outside == tuple(name.removesuffix(".weight") for name in peft.outside)
    found, wanted = (load_model(of, base=tmp_path / "base") for of in (ours, peft))
    tokens = torch.tensor(WINDOWS)
    with torch.inference_mode():
        got, want = (of.model(input_ids=tokens).logits for of in (found, wanted))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for one, other in zip(*(measure(of, WINDOWS) for of in (found, wanted)), strict=True):
        for figure in ("preservation", "effectiveness", "contribution", "leakage"):
            assert one.figure(figure) == pytest.approx(other.figure(figure), rel=1e-6)
    for name, info in ours.tensors.items():
        held = peft.tensors.get(name) or peft.tensors[f"{name}.weight"]
        assert read_tensor(info).tolist() == read_tensor(held).tolist()
        assert norm(info) == pytest.approx(norm(held), rel=1e-12)


def test_it_is_audited_against_a_start_of_either_kind(mlx: Path, tmp_path: Path) -> None:
    """Against itself nothing moved, and nothing against the same adapter as PEFT saved it."""
    trained = open_checkpoint(mlx)
    for start in (mlx, tmp_path / "adapter"):
        told = audit(trained, open_checkpoint(start), layers=[layer.name for layer in trained.layers], variant="lora")
        assert all(layer.down == layer.up == 0.0 for layer in told.layers)


def edit(directory: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Break config or tensors."""
    file, config_file = directory / "adapters.safetensors", directory / "adapter_config.json"
    config, tensors = json.loads(config_file.read_text()), load_file(file)
    change(config, tensors)
    save_file(tensors, file)
    config_file.write_text(json.dumps(config))


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda c, _: c.update(fine_tune_type="full"),
            "fine_tune_type is 'full', no LoRA adapter; fuse it into a model",
        ),
        (
            lambda c, _: c.update(fine_tune_type="dora"),
            "fine_tune_type is dora, but adapters.safetensors holds no magn",
        ),
        (lambda c, _: c.pop("lora_parameters"), "lora_parameters.rank must be a whole number from 1, not None"),
        (lambda c, _: c["lora_parameters"].pop("scale"), "lora_parameters.scale is None, not a number below a million"),
        (lambda c, _: c["lora_parameters"].update(rank=8), "the rank 8, but its lora_A.weight has rank 4"),
        (lambda c, _: c.update(model=3), "model must be text, not 3"),
        (lambda _, t: t.pop(f"{FIRST}.lora_b"), f"layer {FIRST} has no lora_B.weight: the adapter is incomplete"),
        (lambda _, t: t.update({f"{FIRST}.weight": torch.ones(2)}), "is neither lora_a nor lora_b nor m of a layer"),
        (lambda _, t: t.update({f"{FIRST}.lora_a": torch.ones(2, 3, 4)}), "one matrix for each expert of a mixture"),
        (lambda _, t: t.update({f"{FIRST}.lora_a": torch.ones(2)}), "has shape [2], expected 2 dimensions"),
        (lambda _, t: t.update({"model.embed_tokens.lora_a": torch.ones(2, 3)}), "adapts an embedding, which is no"),
    ],
)
def test_what_is_odd_is_refused_in_a_sentence(change: Any, told: str, mlx: Path) -> None:
    """The sentence names the file, the field or the tensor, and what to do."""
    edit(mlx, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(mlx)
    assert told in str(caught.value)


def test_what_torchtune_leaves_beside_its_pickle_is_gated(tmp_path: Path) -> None:
    """Its checkpointer writes PEFT's two files and, beside them, its own pickle, which is never opened."""
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"])
    told = json.loads((directory / "adapter_config.json").read_text())
    kept = {name: told[name] for name in ("r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path")}
    (directory / "adapter_config.json").write_text(json.dumps(kept))
    (directory / "adapter_model.pt").write_bytes(b"cposix\nsystem\n(S'false'\ntR.")
    shutil.copy(tmp_path / "base" / "config.json", directory)
    adapted = load_model(directory)
    assert type(adapted.model) is type(tiny.llama())
    assert len(measure(adapted, WINDOWS)) == 3
    settings: Any = SimpleNamespace(device_map=None, base=None, layers="*", profile="auto")
    assert why_no_drift(open_checkpoint(directory), settings) is None
