"""A LoRA of llama.cpp: the one GGUF file of a directory, read as PEFT would have saved it.

Per adapted layer ``blk.<number>.<part>.weight.lora_a (r, in)`` and ``….lora_b (out, r)``, and for the whole file
``adapter.lora.alpha``; the update is ``alpha / r · lora_b lora_a x``. For the architecture ``llama`` the rows of the q
and k projections lie as those of its own bases do: the halves of each head in turn
(https://github.com/ggml-org/llama.cpp, convert_lora_to_gguf.py, conversion/llama.py, src/llama-adapter.cpp).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pytest_nullspace.checkpoint import gguf, peft
from pytest_nullspace.checkpoint.header import FLOATING, TensorInfo, inside, printable, quoted, read_json_object
from pytest_nullspace.checkpoint.hub import base_path
from pytest_nullspace.checkpoint.layers import Checkpoint
from pytest_nullspace.errors import PREFIX, CheckpointError

_PARTS: Mapping[str, str] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What the layers of a block are called in transformers."""
_PARTS_OF_PHI: Mapping[str, str] = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Architecture(NamedTuple):
    """Of llama.cpp: which models of transformers it is, what their layers are called, whether q and k are turned."""

    model_types: tuple[str, ...]
    parts: Mapping[str, str] = _PARTS
    turned: bool = False


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture(("llama", "mistral"), turned=True),
    "qwen2": _Architecture(("qwen2",)),
    "qwen3": _Architecture(("qwen3",)),
    "gemma": _Architecture(("gemma",)),
    "gemma2": _Architecture(("gemma2",)),
    "gemma3": _Architecture(("gemma3_text",)),
    "phi3": _Architecture(("phi3",), _PARTS_OF_PHI),
}
_HEADS: Mapping[str, tuple[str, ...]] = {
    "attn_q": ("num_attention_heads",),
    "attn_k": ("num_key_value_heads", "num_attention_heads"),
}
"""Which field of the base's config, the first that is there, says how many heads a layer's rows are of."""
_NAME = re.compile(r"(?:blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)|output)\.weight\.lora_([ab])")
_FROM_PEFT = "give the PEFT directory from which it was converted"


def only_file(directory: Path) -> Path | None:
    """The GGUF file of a directory that holds neither a config nor safetensors; None where there is none.

    Raises:
        CheckpointError: There are several, and nothing tells which is meant.
    """
    if any((directory / name).exists() for name in (peft.CONFIG_FILE, "config.json")):
        return None
    return gguf.only_file(directory, "put the one that is meant into a directory of its own")


def read(file: Path, base: str | None) -> Checkpoint:
    """Read the adapter's header.

    Args:
        file: The adapter.
        base: The directory of its base model, as `pytest_nullspace.checkpoint.hub.base_path` takes it.

    Raises:
        CheckpointError: It is no LoRA of linear layers, of an architecture that is not read, or not of that base.
    """
    held, told = gguf.read(inside(file.parent, file.name))
    alpha = _alpha(told, file)
    name = told.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise CheckpointError(
            f"{file}: is of llama.cpp's architecture {printable(name)}; LoRAs of {', '.join(_ARCHITECTURES)} are read; "
            f"{_FROM_PEFT}"
        )
    config = _base_config(base, str(name), file)
    tensors = {
        info.name: info for info in (_as_peft(tensor, _ARCHITECTURES[str(name)], config) for tensor in held.values())
    }
    ranks = {
        info.name.removeprefix(peft.PREFIX).removesuffix(f".{peft.DOWN}"): info.shape[0]
        for info in tensors.values()
        if info.name.endswith(peft.DOWN)
    }
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 0
    as_peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": usual,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(layer): rank for layer, rank in ranks.items() if rank != usual},
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
    }
    return replace(peft.of(file.parent, as_peft, file, tensors), format=peft.GGUF)


def _alpha(told: Mapping[str, float | str | None], file: Path) -> float:
    """What each update is multiplied with before it is divided by its rank."""
    if told.get("general.type") != "adapter" or told.get("adapter.type") != "lora":
        raise CheckpointError(
            f"{file}: is no LoRA, its general.type is {printable(told.get('general.type'))} and its adapter.type "
            f"{printable(told.get('adapter.type'))}; a whole model is no adapter; give the adapter's directory"
        )
    if any(key.startswith("adapter.alora.") for key in told):
        raise CheckpointError(
            f"{file}: is an activated LoRA, which acts behind its invocation tokens alone, so no figure of all tokens "
            "would be its own; give a plain LoRA"
        )
    alpha = told.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isfinite(alpha) or not 0 < abs(alpha) <= 1e6:
        raise CheckpointError(
            f"{file}: adapter.lora.alpha is {printable(alpha)}, no number other than 0 and below a million; without it "
            "the size of the update is unknown; convert the adapter again"
        )
    return alpha


def _base_config(base: str | None, architecture: str, file: Path) -> dict[str, Any]:
    """The config of the base, which must be of ``architecture``."""
    if base is None:
        raise CheckpointError(
            f"{file}: is a LoRA of llama.cpp, which does not tell how many heads its base has; give the directory of "
            f"its base by {PREFIX}base=DIR, or {_FROM_PEFT}"
        )
    place = base_path(base, None, f"{PREFIX}base")
    if place.is_file():
        raise CheckpointError(
            f"{PREFIX}base: {place}: is a GGUF file, and a LoRA of llama.cpp is gated on the base as transformers "
            f"saved it; give that directory by {PREFIX}base=DIR"
        )
    config = read_json_object(place / "config.json", "the base model's config")
    if config.get("model_type") not in _ARCHITECTURES[architecture].model_types:
        raise CheckpointError(
            f"{file}: is of llama.cpp's architecture {architecture}, but the base {place} is of model_type "
            f"{printable(config.get('model_type'))}; give the base that it was trained on by {PREFIX}base=DIR"
        )
    return config


def _as_peft(tensor: TensorInfo, architecture: _Architecture, config: Mapping[str, Any]) -> TensorInfo:
    """A tensor under PEFT's name."""
    where = f"{tensor.file}: tensor {quoted(tensor.name)}"
    found = _NAME.fullmatch(tensor.name)
    if found is None or (found[2] is not None and found[2] not in architecture.parts):
        raise CheckpointError(
            f"{where} is neither lora_a nor lora_b of a linear layer, and nothing else is read, such as LoRA on "
            f"embeddings, experts or norms; {_FROM_PEFT}"
        )
    if tensor.dtype not in FLOATING:
        raise CheckpointError(
            f"{where} is {tensor.dtype}, whose rounding is no part of training; convert the adapter again with "
            "--outtype f32"
        )
    if len(tensor.shape) != 2:
        raise CheckpointError(
            f"{where} has shape {list(tensor.shape)}, expected two dimensions; convert the adapter again"
        )
    layer = "lm_head" if found[2] is None else f"model.layers.{found[1]}.{architecture.parts[found[2]]}"
    turned = architecture.turned and found[3] == "b" and found[2] in _HEADS
    return replace(
        tensor,
        name=f"{peft.PREFIX}{layer}.{peft.DOWN if found[3] == 'a' else peft.UP}",
        stored=tensor.name,
        heads=_heads(found[2], tensor, config) if turned else 0,
    )


def _heads(part: str, tensor: TensorInfo, config: Mapping[str, Any]) -> int:
    """Of how many heads the rows of q or k are."""
    field = next((name for name in _HEADS[part] if config.get(name) is not None), _HEADS[part][-1])
    heads = config.get(field)
    if not isinstance(heads, int) or isinstance(heads, bool) or not 1 <= heads <= gguf.MAX_COUNT:
        raise CheckpointError(
            f"{tensor.file}: its base's config has {printable(heads)} for {field}, so the order of the rows of "
            f"{quoted(tensor.name)} is unknown; give the base that it was trained on by {PREFIX}base=DIR"
        )
    if tensor.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{tensor.file}: tensor {quoted(tensor.name)} has {tensor.shape[0]:,} rows, which are no {heads} heads as "
            f"its base's config has them; give the base that it was trained on by {PREFIX}base=DIR"
        )
    return heads
