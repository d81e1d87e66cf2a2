"""LoRA-Null and CorDA directories of other families than Llama's: the model is the one that the directory describes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import load_model
from tests import tiny

WINDOW = [1, 5, 9, 2, 7, 11]
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "Mistral": {},
    "Phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def merged(file: Path) -> dict[str, Tensor]:
    """The plain weights, ``W_res + A B`` in each adapted layer."""
    held, found = load_file(file), {}
    for name, tensor in held.items():
        layer, _, part = name.rpartition(".weight_residual")
        if layer and not part:
            update = held[f"{layer}.ALinear.weight"] @ held[f"{layer}.BLinear.weight"]
            found[f"{layer}.weight"] = tensor + update
        elif name.endswith(".ALinear.bias"):
            found[name.replace(".ALinear", "")] = tensor
        elif ".ALinear." not in name and ".BLinear." not in name:
            found[name] = tensor
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_of_each_family_is_the_model_that_it_describes(family: str, tmp_path: Path) -> None:
    """Its class is transformers' own, each layer is measured, and the logits are those of ``W_res + A B`` merged."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**tiny.SIZES, **FAMILIES[family]})
    plain: Any = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    directory = tiny.lora_null(tmp_path / "ft", plain)
    adapted = load_model(directory)
    assert type(adapted.model) is type(plain)
    assert len(measure(adapted, [WINDOW])) == sum(
        isinstance(module, torch.nn.Linear) and name != "lm_head" for name, module in plain.named_modules()
    )
    with torch.inference_mode():
        before = plain(input_ids=torch.tensor([WINDOW])).logits
        plain.load_state_dict(merged(directory / "model.safetensors"), strict=False)
        wanted = plain(input_ids=torch.tensor([WINDOW])).logits
        torch.testing.assert_close(adapted.model(input_ids=torch.tensor([WINDOW])).logits, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-3
