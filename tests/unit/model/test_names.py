"""Adapters that an older transformers named otherwise: mapped as PEFT maps them, or refused for that reason."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model import load_model
from pytest_nullspace.model.matching import require_targets
from pytest_nullspace.model.names import Placed
from pytest_nullspace.report.notes import outside
from tests import tiny
from tests.adapters import adapter, change
from tests.families import llava, qwen2_5_vl
from tests.releases import five, maps
from tests.unit.model.test_peft import WINDOWS, check_figures, opened

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning"
)

TODAY = "base_model.model.model.language_model.layers"


def renamed(directory: Path, old: str, **changes: Any) -> None:
    """Give the adapter's tensors the names that they had at ``old``."""

    def edit(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config.update(changes)
        for name in list(tensors):
            tensors[name.replace(TODAY, f"base_model.model.{old}")] = tensors.pop(name)

    change(directory, edit)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        given: Tensor = model(input_ids=torch.tensor(WINDOWS)).logits
    return given


@maps
def test_names_that_peft_maps_are_mapped_and_told(tmp_path: Path) -> None:
    """LLaVA's language model lay elsewhere once: layers keep the adapter's names, figures and logits are PEFT's own."""
    torch.manual_seed(0)
    model = llava()
    directory = adapter(tmp_path, model, r=4, target_modules=["o_proj", "gate_proj"])
    before = logits(opened(directory)[1].model)
    renamed(directory, "language_model.model.layers")
    checkpoint, adapted = opened(directory)
    assert [layer.name for layer in checkpoint.layers] == list(adapted.layers)
    assert all(name.startswith("language_model.model.layers") for name in adapted.layers)
    check_figures(adapted)
    base = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, directory).eval()
    assert torch.equal(logits(adapted.model), before)
    torch.testing.assert_close(before, logits(theirs), rtol=1e-6, atol=1e-6)
    old, new = (f"{where}.layers.0.self_attn.o_proj" for where in ("language_model.model", "model.language_model"))
    (told,) = adapted.remarks
    assert told == (
        f"4 of 4 layers are named as an older transformers did, mapped as PEFT does: {old} is {new} in the model"
    )


@maps
def test_an_alpha_under_a_name_that_was_mapped_is_not_lost(tmp_path: Path) -> None:
    """PEFT maps names of tensors, not of ``alpha_pattern``, and would take another scale; that is refused."""
    torch.manual_seed(0)
    directory = adapter(tmp_path, llava(), r=4, target_modules=["o_proj"])
    renamed(
        directory, "language_model.model.layers", alpha_pattern={"language_model.model.layers.1.self_attn.o_proj": 64}
    )
    with pytest.raises(CheckpointError, match=r"lora_alpha of language_model\S*layers.1\S* is told under that name"):
        load_model(directory)


@five
@pytest.mark.parametrize("target", [["o_proj"], r"model\.layers\.\d+\.self_attn\.o_proj"])
def test_names_that_peft_does_not_map_are_refused_as_old(target: Any, tmp_path: Path) -> None:
    """PEFT would leave the base as it is; the reason is the version that saved it, never another architecture."""
    torch.manual_seed(0)
    directory = adapter(tmp_path, qwen2_5_vl(), r=4, target_modules=["o_proj"])
    renamed(directory, "model.layers", target_modules=target)
    with pytest.raises(CheckpointError, match="an older transformers named them; load the adapter there") as caught:
        load_model(directory)
    assert "architecture" not in str(caught.value)


def test_another_architecture_is_still_called_that(tmp_path: Path) -> None:
    """Names that no table of transformers knows are not taken for old ones."""
    torch.manual_seed(0)
    directory = adapter(tmp_path, llava(), r=4, target_modules=["o_proj"])
    renamed(directory, "transformer.h")
    with pytest.raises(CheckpointError, match="that is of another architecture"):
        load_model(directory)


WIDTH, EXPERT, EXPERTS, RANK = 32, 24, 4, 4


def qwen3_moe() -> Any:
    sizes = {**tiny.SIZES, "num_hidden_layers": 2, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**sizes, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=EXPERT)
    )


def with_experts(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Add a LoRA for each expert, as one trained them when each expert was modules of its own."""
    config["target_modules"] = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    for layer in range(2):
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                wide, narrow = (EXPERT, WIDTH) if name == "down_proj" else (WIDTH, EXPERT)
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, wide) / wide**0.5
                tensors[f"{key}.lora_B.weight"] = torch.randn(narrow, RANK) / RANK**0.5


def test_attention_is_measured_where_each_expert_has_a_lora_of_its_own(tmp_path: Path) -> None:
    """The experts are fused now: their LoRAs lie outside, and the model is that of PEFT's own loading."""
    torch.manual_seed(0)
    directory = adapter(tmp_path, qwen3_moe(), r=RANK, lora_alpha=8, target_modules=["q_proj"])
    without = logits(opened(directory)[1].model)
    change(directory, with_experts)
    checkpoint, adapted = opened(directory)
    assert list(adapted.layers) == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert len(checkpoint.outside) == 2 * EXPERTS * 3 * 2
    assert "48 LoRA matrices of experts (model.layers.0.mlp.experts.0.down_proj" in outside(checkpoint.outside)
    check_figures(adapted)
    base = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, directory).eval()
    torch.testing.assert_close(logits(adapted.model), logits(theirs), rtol=1e-6, atol=1e-6)
    assert (logits(adapted.model) - without).abs().max() > 1e-2, "the experts' LoRAs are on"


@maps
def test_an_expert_without_its_lora_is_an_error(tmp_path: Path) -> None:
    """What PEFT cannot merge, for a part is missing, is refused before anything is measured."""
    torch.manual_seed(0)
    directory = adapter(tmp_path, qwen3_moe(), r=RANK, lora_alpha=8, target_modules=["q_proj"])
    change(directory, with_experts)
    lost = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_B.weight"
    change(directory, lambda tensors, _: tensors.__delitem__(lost))
    with pytest.raises(CheckpointError, match="PEFT cannot map its tensors"):
        load_model(directory)
    assert open_checkpoint(directory).layers


def test_a_name_of_today_that_peft_maps_elsewhere_is_told_as_that(tmp_path: Path) -> None:
    """Where PEFT's own table spoils a name that the base has, it is PEFT that is named, and no architecture."""
    torch.manual_seed(0)
    directory = adapter(tmp_path, llava(), r=4, target_modules=["o_proj"])
    checkpoint, adapted = opened(directory)
    adapted.take_off()
    name = checkpoint.layers[0].name
    found = {module: part for module, part in adapted.model.named_modules() if module.endswith("o_proj")}
    at = Placed({name: f"{name}.again"}, frozenset())
    with pytest.raises(CheckpointError, match=r"PEFT takes them for an older transformers' and looks for \S+again, so"):
        require_targets(checkpoint, tmp_path / "base", found, adapted.model, at)
