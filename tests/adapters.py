"""Random adapters that PEFT itself made and saved, on the tiny models of `tests.tiny`."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from tests import tiny

if TYPE_CHECKING:
    from pytest_nullspace.model import AdaptedLayer


def adapter(folder: Path, model: Any, task: str | None = "CAUSAL_LM", name: str = "adapter", **config: Any) -> Path:
    """Save ``model`` and a tokenizer as ``folder/base`` and a random LoRA on it as ``folder/<name>``; returns that."""
    import peft  # it takes seconds, and few tests need it

    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder / "base")
        tiny.tokenizer(folder / "base")
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type=task, init_lora_weights=False, **config))
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_magnitude" in parameter_name or ("modules_to_save" in parameter_name and parameter.requires_grad):
                parameter.data.mul_(1.1)
            if "trainable_tokens_delta" in parameter_name or (
                parameter_name.endswith(".bias") and parameter.requires_grad
            ):
                parameter.data.add_(0.1)
        wrapped.save_pretrained(folder / name)
    change(folder / name, lambda _, saved: saved.update(base_model_name_or_path=str(folder / "base")))
    return folder / name


def on_the_base(directories: Sequence[Path], base: str | None = None) -> "tuple[Any, list[dict[str, AdaptedLayer]]]":
    """The plain base of some adapters, and the layers of each as a screen sees them."""
    from pytest_nullspace.measuring.screen import on_base
    from pytest_nullspace.model import load_model

    bases: dict[Any, Any] = {}
    held = []
    for directory in directories:
        adapted = load_model(open_checkpoint(directory), "cpu", "float32", base, bases)
        held.append(on_base(adapted, set(adapted.layers)))
        adapted.take_off()
    (plain,) = bases.values()
    return plain, held


def merged(folder: Path, directory: Path, dtype: torch.dtype = torch.float32, name: str = "merged") -> Path:
    """Merge the adapter in ``directory`` into ``folder/base`` as PEFT does, saved in ``dtype`` as ``folder/<name>``."""
    import peft
    import transformers

    with warnings.catch_warnings(action="ignore"):
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        whole: Any = peft.PeftModel.from_pretrained(base, directory).merge_and_unload()
        whole.to(dtype).save_pretrained(folder / name)
    return folder / name


def edit(directory: Path, to: Callable[[dict[str, Tensor]], None]) -> Path:
    """Edit the tensors of a whole model in place; returns its directory."""
    tensors = load_file(directory / "model.safetensors")
    to(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def change(directory: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Edit the adapter's tensors and config in place."""
    file = directory / "adapter_model.safetensors"
    tensors, config = load_file(file), json.loads((directory / "adapter_config.json").read_text())
    edit(tensors, config)
    save_file(tensors, file)
    (directory / "adapter_config.json").write_text(json.dumps(config))


def switch() -> Any:
    """A random mixture of experts that are linear layers of their own, so many that few rows leave some out."""
    import transformers

    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=16,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=24,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()
