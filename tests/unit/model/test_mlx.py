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
        elif part:
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


KEYS = ["self_attn.q_proj", "mlp.up_proj"]
BLOCK = "model.layers.1."


def without_block(_: Any, tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(BLOCK)]:
        del tensors[name]


def keys(*names: str) -> Callable[[dict[str, Any], Any], None]:
    return lambda config, _: config["lora_parameters"].update(keys=[*names])


def without_block_of_all(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    keys(*KEYS)(config, tensors)
    config.update(num_layers=3)
    without_block(config, tensors)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_block_of_all, r" 3 and lora_parameters\.keys "
         r"name model\.layers\.1\.mlp\.up_proj, .*1\.self_attn\.q_proj, but the adapter holds no weights for them"),
        (without_block, r": num_layers -1 name model\.layers\.1\.mlp\.up_proj, .*: it is incomplete; save or copy it"),
        (keys(*KEYS, "mlp.down_proj"), r"keys name model\.layers\.0\.mlp\.down_proj, .* the adapter holds no weights"),
        (keys(KEYS[0]), r"keys leave out model\.layers\.0\.mlp\.up_proj, .*, so mlx-lm would run it without them"),
        (lambda c, _: c.update(num_layers=1), r": num_layers 1 leave out model\.layers\.0\..*run it without them"),
        (lambda c, _: c.update(num_layers=30), r"num_layers is 30, but the base model .*/base has 3 blocks: "),
        (lambda c, _: c.pop("num_layers"), r"num_layers must be a whole number, -1 for all blocks, not None"),
        (lambda c, _: c["lora_parameters"].update(keys="q_proj"), r"keys must be a list of texts, not 'q_proj'"),
    ],
)  # fmt: skip
def test_its_layers_are_those_that_its_config_names(change: Any, told: str, mlx: Path) -> None:
    """It holds the layers of ``keys`` in the last ``num_layers`` blocks and no others, or is refused by their names."""
    edit(mlx, change)
    with pytest.raises(CheckpointError, match=told):
        load_model(mlx)


@pytest.mark.parametrize("number", ["num_layers", "lora_layers"])
def test_the_last_blocks_and_the_head_are_an_adapter_too(number: str, tmp_path: Path) -> None:
    """The last two blocks, by either name of their number, and a key that is a whole name are as mlx-lm has it."""
    targets = r"model\.layers\.[12]\.self_attn\.q_proj|lm_head"
    model = tiny.llama(tie_word_embeddings=False)
    directory = as_mlx(adapter(tmp_path, model, r=4, target_modules=targets), tmp_path / "m")

    def told(config: dict[str, Any], _: Any) -> None:
        del config["num_layers"]
        config[number] = 2
        keys("lm_head", KEYS[0])(config, None)

    edit(directory, told)
    assert len(load_model(directory).layers) == 3


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
