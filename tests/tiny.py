"""Tiny random checkpoints, real in every respect but their training, made in a fraction of a second."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TRAP = "raise RuntimeError('this file must never be executed')\n"
SIZES: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40


def llama(**changes: Any) -> PreTrainedModel:
    """A random Llama with tied embeddings."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **changes})).eval()


SINK = 1
"""The token whose row outweighs all others in `llama_with_sinks`."""


def llama_with_sinks(**changes: Any) -> PreTrainedModel:
    """A random Llama in whose first block one token alone lights the last coordinate, and that drives the MLP's last.

    So its row of the first block's down_proj is some thousand times as long as all others.
    """
    model: Any = llama(**{"initializer_range": 0.3, "tie_word_embeddings": False, **changes})
    with torch.no_grad():
        model.model.embed_tokens.weight[:, -1] = 0
        model.model.embed_tokens.weight[SINK] = 0
        model.model.embed_tokens.weight[SINK, -1] = 50.0
        block = model.model.layers[0]
        block.self_attn.o_proj.weight.zero_()
        for part in (block.mlp.gate_proj, block.mlp.up_proj):
            part.weight[:, -1] = 0
            part.weight[-1] = 0
            part.weight[-1, -1] = 30.0
    return model


def qwen2(**changes: Any) -> PreTrainedModel:
    """A random Qwen2, whose q, k and v have biases that outweigh their outputs."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=30.0)
    return model


def tokenizer(folder: Path) -> None:
    """A tokenizer of ASCII characters, saved into ``folder``."""
    backend = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def complement_rows(rank: int, in_features: int) -> Tensor:
    """Orthonormal rows, shape ``(rank, in)``."""
    rows: Tensor = torch.linalg.qr(torch.randn(in_features, rank, dtype=torch.float64))[0].mT.float()
    return rows


def lora_null(
    folder: Path,
    model: PreTrainedModel | None = None,
    *,
    rank: int = 4,
    up_scale: float = 0.5,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    protected: int | None = None,
    change: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None,
) -> Path:
    """A LoRA-Null directory of ``model`` with random adapters.

    Args:
        folder: Where to write it.
        model: A random Llama by default.
        rank: Of every adapter.
        up_scale: Standard deviation of A.
        dtype: Of the saved weights.
        shards: Weight files.
        protected: Rank of ``PALinear``/``PBLinear``, for the variant that has them.
        change: May break the tensors and the config before they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model or llama()
    torch.manual_seed(1)
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            tensors[f"{name}.weight_residual"] = tensors.pop(f"{name}.weight")
            tensors[f"{name}.BLinear.weight"] = complement_rows(rank, module.in_features)
            tensors[f"{name}.ALinear.weight"] = up_scale * torch.randn(module.out_features, rank)
            if module.bias is not None:
                tensors[f"{name}.ALinear.bias"] = tensors.pop(f"{name}.bias")
            if protected is not None:
                tensors[f"{name}.PBLinear.weight"] = complement_rows(protected, module.in_features)
                tensors[f"{name}.PALinear.weight"] = 0.5 * tensors[f"{name}.PBLinear.weight"].mT.contiguous()
    config = json.loads(model.config.to_json_string())
    kind = type(model).__name__
    config |= {
        "lora_r": rank,
        "architectures": [f"CovSVD{kind}"],
        "auto_map": {"AutoConfig": "configuration_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"},
    }
    tensors = {name: value.to(dtype).contiguous().clone() for name, value in tensors.items()}
    if change is not None:
        change(tensors, config)
    for trap in ("configuration_trap.py", "modeling_trap.py"):
        (folder / trap).write_text(TRAP)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer(folder)
    save(folder, "model", tensors, shards)
    return folder


def save(folder: Path, stem: str, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """Write ``tensors`` as one safetensors file, or as shards with their index."""
    if shards == 1:
        save_file(dict(tensors), folder / f"{stem}.safetensors")
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        held = names[shard::shards]
        save_file({name: tensors[name] for name in held}, folder / file)
        weight_map |= dict.fromkeys(held, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
