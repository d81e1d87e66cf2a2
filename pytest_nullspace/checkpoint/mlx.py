"""Adapters of mlx-lm: ``adapter_config.json`` and ``adapters.safetensors``, read as PEFT would have saved them.

Per adapted layer ``<layer>.lora_a (in, r)`` and ``<layer>.lora_b (r, out)``, each PEFT's matrix transposed, and with
DoRA ``<layer>.m (out)``, its magnitude. The update is ``scale · lora_bᵀ lora_aᵀ x``, whatever the rank
(https://github.com/ml-explore/mlx-lm, mlx_lm/tuner/lora.py and dora.py).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint import peft
from pytest_nullspace.checkpoint.header import TensorInfo, inside, printable, quoted, read_header, read_json_object
from pytest_nullspace.checkpoint.layers import Checkpoint, LastBlocks
from pytest_nullspace.checkpoint.strangers import require_unwrapped
from pytest_nullspace.errors import CheckpointError

WEIGHTS = "adapters.safetensors"
FIELDS = ("fine_tune_type", "lora_parameters")
"""What the config of mlx-lm has, and PEFT's has not."""
_PARTS: Mapping[str, tuple[str, int]] = {"lora_a": (peft.DOWN, 2), "lora_b": (peft.UP, 2), "m": (peft.MAGNITUDES[0], 1)}
"""What each tensor is to PEFT, and how many dimensions it has."""
_EMBEDS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embeddings)$")


def is_one(directory: Path) -> bool:
    """Whether ``directory`` holds an adapter of mlx-lm: by the name of its weights, and by what its config has."""
    config_file = directory / peft.CONFIG_FILE
    if not (config_file.is_file() and (directory / WEIGHTS).exists()) or any(directory.glob("adapter_model.*")):
        return False
    return any(field in read_json_object(config_file, "the adapter's config") for field in FIELDS)


def read(directory: Path) -> Checkpoint:
    """Read the adapter's config and header.

    Raises:
        CheckpointError: It is no LoRA of linear layers, or config and weights do not fit together.
    """
    config_file = directory / peft.CONFIG_FILE
    config = read_json_object(inside(directory, config_file.name), "the adapter's config")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        cure = (
            "fuse it into a model of its own (mlx_lm.fuse) and give that" if kind == "full" else "give a LoRA adapter"
        )
        raise CheckpointError(f"{config_file}: fine_tune_type is {quoted(kind)}, no LoRA adapter; {cure}")
    held = read_header(inside(directory, WEIGHTS))
    require_unwrapped(directory, held)
    tensors = {info.name: info for info in (_as_peft(directory, tensor) for tensor in held.values())}
    magnitudes = any(name.endswith(peft.MAGNITUDES[0]) for name in tensors)
    if magnitudes != (kind == "dora"):
        raise CheckpointError(
            f"{config_file}: fine_tune_type is {kind}, but {WEIGHTS} holds {'' if magnitudes else 'no '}magnitudes "
            "(m): config and weights are of different runs; copy both from one save"
        )
    rank, scale = _parameters(config.get("lora_parameters"), config_file)
    base = config.get("model", config.get("base_model_name_or_path"))
    if base is not None and not isinstance(base, str):
        raise CheckpointError(f"{config_file}: model must be text, not {printable(repr(base))}; mend it")
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "use_dora": magnitudes,
        "init_lora_weights": True,
        "target_modules": sorted({name.removeprefix(peft.PREFIX).partition(".lora_")[0] for name in tensors}),
    }
    return replace(
        peft.of(directory, told, config_file, tensors), format=peft.MLX, last_blocks=_last_blocks(config, config_file)
    )


def _as_peft(directory: Path, tensor: TensorInfo) -> TensorInfo:
    """A tensor under PEFT's name and in its shape."""
    layer, _, part = tensor.name.rpartition(".")
    if part not in _PARTS or not layer:
        raise CheckpointError(
            f"{directory / WEIGHTS}: tensor {quoted(tensor.name)} is neither lora_a nor lora_b nor m of a layer; only "
            "LoRA and DoRA of linear layers are read"
        )
    name, dimensions = _PARTS[part]
    if len(tensor.shape) == 3 and part != "m":
        raise CheckpointError(
            f"{directory / WEIGHTS}: tensor {quoted(tensor.name)} is one matrix for each expert of a mixture, which no "
            "layer test covers; give an adapter without keys of the experts"
        )
    if len(tensor.shape) != dimensions:
        raise CheckpointError(
            f"{directory / WEIGHTS}: tensor {quoted(tensor.name)} has shape {list(tensor.shape)}, expected "
            f"{dimensions} dimensions; save the adapter again"
        )
    if _EMBEDS.search(layer):
        raise CheckpointError(
            f"{directory / WEIGHTS}: tensor {quoted(tensor.name)} adapts an embedding, which is no linear layer and is "
            "not read; give an adapter whose keys leave it out"
        )
    return replace(
        tensor,
        name=f"{peft.PREFIX}{layer}.{name}",
        shape=tensor.shape[::-1],
        stored=tensor.name,
        transposed=dimensions == 2,
    )


def _last_blocks(config: Mapping[str, Any], config_file: Path) -> LastBlocks:
    """Which layers the config says that it adapts; an older mlx-lm calls the number of blocks ``lora_layers``."""
    count, keys = config.get("num_layers", config.get("lora_layers")), config["lora_parameters"].get("keys")
    if not isinstance(count, int) or isinstance(count, bool):
        raise CheckpointError(
            f"{config_file}: num_layers must be a whole number, -1 for all blocks, not {printable(repr(count))}; "
            "write back what it was trained with"
        )
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise CheckpointError(
            f"{config_file}: lora_parameters.keys must be a list of texts, not {printable(repr(keys))}; write back "
            "what it was trained with"
        )
    return LastBlocks(count, None if keys is None else frozenset(keys))


def _parameters(told: object, config_file: Path) -> tuple[int, float]:
    """The rank, and what the update is multiplied with."""
    parameters: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(
            f"{config_file}: lora_parameters.rank must be a whole number from 1, not {printable(repr(rank))}; write "
            "back what it was trained with"
        )
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or abs(scale) > 1e6:
        raise CheckpointError(
            f"{config_file}: lora_parameters.scale is {printable(repr(scale))}, not a number below a million; without "
            "it the size of the update is unknown; write back what it was trained with"
        )
    return rank, float(scale)
