"""The rules of PEFT held against the PEFT that is installed, which loads each adapter."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.judging.served import Asked, base_at_hand
from pytest_nullspace.judging.serving import hold
from pytest_nullspace.judging.verdicts import Tier
from tests import tiny
from tests.adapters import adapter, change
from tests.releases import newest_peft

PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
SHARD = "adapter_model-00001-of-00001.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def loads(directory: Path) -> bool:
    """Whether the installed PEFT takes every tensor and field, invents none and scales each layer as is read here."""
    base = transformers.AutoModelForCausalLM.from_pretrained(directory.parent / "base", dtype=torch.float32)
    try:
        with warnings.catch_warnings(action="ignore"):
            model: Any = peft.PeftModel.from_pretrained(base, directory)
            held = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    except (ValueError, OSError, RuntimeError):
        return False
    file = load_file(directory / "adapter_model.safetensors")
    known = model.peft_config["default"].to_dict()
    given = json.loads((directory / "adapter_config.json").read_text())
    scales = {layer.name: layer.scale for layer in open_checkpoint(directory).layers}
    modules = dict(model.base_model.model.named_modules())
    return (
        held.keys() == file.keys()
        and all(torch.equal(held[name], tensor) for name, tensor in file.items())
        and all(name in known for name, value in given.items() if value)
        and all(
            scale is not None and modules[name].scaling["default"] == pytest.approx(scale.value)
            for name, scale in scales.items()
        )
    )


def nested(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.replace("model.model.layers", "model.model.language_model.layers")] = tensors.pop(name)


def gone(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    for part in ("A", "B"):
        del tensors[f"{Q0}.lora_{part}.weight"]


def beyond(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    for part in ("A", "B"):
        tensors[f"{Q0.replace('.0.', '.7.')}.lora_{part}.weight"] = tensors[f"{Q0}.lora_{part}.weight"].clone()


def elsewhere(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / SHARD)
    weight_map = dict.fromkeys(load_file(directory / SHARD), SHARD)
    (directory / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@newest_peft
@pytest.mark.parametrize(
    ("config", "edit"),
    [
        ({}, None),
        ({"use_rslora": True, **PATTERNS}, None),
        ({"use_dora": True}, None),
        ({"bias": "lora_only", "lora_bias": True}, None),
        ({"modules_to_save": ["lm_head"]}, None),
        ({"trainable_token_indices": [1, 2]}, None),
        *(({}, of) for of in (nested, gone, beyond)),
    ],
)
def test_what_the_installed_peft_does_is_what_the_table_says(
    tmp_path: Path, config: dict[str, Any], edit: Callable[..., None] | None
) -> None:
    """An adapter passes exactly where PEFT loads all of it, as it was trained."""
    directory = adapter(
        tmp_path, tiny.llama(tie_word_embeddings=False), r=4, target_modules=["q_proj", "v_proj"], **config
    )
    if edit is not None:
        change(directory, edit)
    checkpoint = open_checkpoint(directory)
    outcome = hold(Asked("peft"), checkpoint, base_at_hand(checkpoint, None))
    is_taken = loads(directory)
    assert (outcome.tier is Tier.PASS) is is_taken, "\n".join(outcome.lines())
    assert is_taken is (edit is None)


@newest_peft
def test_peft_opens_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in shards is not found by the PEFT that is installed either."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # where PEFT looks on
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"])
    elsewhere(directory)
    checkpoint = open_checkpoint(directory)
    outcome = hold(Asked("peft"), checkpoint, base_at_hand(checkpoint, None))
    assert [one.rule.name for one in outcome.of(Tier.FAIL)] == ["file"]
    assert not loads(directory)
