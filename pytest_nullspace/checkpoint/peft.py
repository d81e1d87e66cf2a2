"""PEFT directories: ``adapter_config.json`` and the adapter's own tensors; the base model lies elsewhere.

Per adapted layer: ``base_model.model.<layer>.lora_A.weight (r, in)`` and ``….lora_B.weight (out, r)``, with DoRA also
``….lora_magnitude_vector (out)``, with ``lora_bias`` also ``….lora_B.bias (out)``. Whatever else the file holds was
trained too, and no layer test covers it: LoRA on embeddings (``lora_embedding_A``), on convolutions (matrices of more
than two dimensions) and on bare parameters (``target_parameters``), trained tokens, biases, whole modules.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint.header import FLOATING, TensorInfo, printable, read_json_object, read_tensors
from pytest_nullspace.checkpoint.layers import Checkpoint, LayerSpec, Scale, in_model_order
from pytest_nullspace.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
FORMAT = "PEFT LoRA"
PREFIX = "base_model.model."

DOWN, UP, UP_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")

CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` (pissa also as ``pissa_niter_N``) that take the adapter's start out of the base."""


def read(directory: Path) -> Checkpoint:
    """Read the adapter's config and headers.

    Raises:
        CheckpointError: It is no LoRA adapter, the config or the weights are unreadable, or they do not fit together.
    """
    config_file = directory / CONFIG_FILE
    config = read_json_object(config_file, "the adapter's config")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{config_file}: peft_type is {printable(kind)!r}: not a LoRA adapter, so it has no layers to gate"
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise CheckpointError(
            f"{config_file}: lora_alpha is {printable(config.get('lora_alpha'))}, not a number; without it the scale "
            "of the update is unknown"
        )
    tensors = read_tensors(directory, "adapter_model")
    names = _layers(directory, tensors, config)
    layers = [_layer(directory, name, tensors, config, config_file) for name in names]
    inside = {f"{PREFIX}{name}.{part}" for name in names for part in (DOWN, UP)}
    return Checkpoint(
        directory=directory,
        format=FORMAT,
        config_file=config_file,
        config=config,
        layers=in_model_order(directory, layers),
        tensors=tensors,
        outside=tuple(sorted(set(tensors) - inside)),
        base=_text(config, "base_model_name_or_path", config_file) or "",
        base_revision=_text(config, "revision", config_file),
        changed_base=_changed_base(config),
    )


def _text(config: Mapping[str, Any], field: str, config_file: Path) -> str | None:
    value = config.get(field)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{config_file}: {field} must be text, not {printable(value)}")
    return value


def _changed_base(config: Mapping[str, Any]) -> str | None:
    """What is known of an initialisation that moved weight out of the base.

    An adapter saved converted belongs on the untouched base, and says ``true``. So does one that was made to say so
    before it was saved as it is; of CorDA alone a trace is left.
    """
    start, base = str(config.get("init_lora_weights", "")).lower(), printable(config.get("base_model_name_or_path"))
    if start.startswith(CHANGES_THE_BASE):
        return (
            f"init_lora_weights {start} changed the base's weights, and the adapter was not saved converted: on the "
            f"untouched base {base} every figure would be wrong; give the changed base"
        )
    if config.get("corda_config"):
        return (
            "its corda_config says that CorDA changed the base's weights, and nothing says whether the adapter was "
            f"saved converted; if it was, give the untouched base {base}, if not, the changed one,"
        )
    return None


def _layers(directory: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[str]:
    """The names of the linear layers that have a lora_A or a lora_B."""
    stray = next((name for name in tensors if not name.startswith(PREFIX)), None)
    if stray is not None:
        is_lora = ".lora_A." in stray or ".lora_B." in stray
        raise CheckpointError(
            f"{directory}: tensor {printable(stray)!r} does not begin with {PREFIX!r} as PEFT's do, so PEFT would "
            "silently leave it out; "
            + ("rename the keys or save the adapter with save_pretrained" if is_lora else "save the adapter again")
        )
    parts = (f".{DOWN}", f".{UP}")
    names = {
        name.removeprefix(PREFIX).removesuffix(part)
        for name, tensor in tensors.items()
        for part in parts
        if name.endswith(part) and not _is_convolution(tensor)
    }
    named = next((name for name in tensors if re.search(r"\.lora_[AB]\.[^.]+\.weight$", name)), None)
    if named is not None:
        raise CheckpointError(
            f"{directory}: tensor {printable(named)!r} carries the adapter's name, which PEFT takes out when it saves, "
            "and would not find again; save the adapter with save_pretrained"
        )
    names = {name for name in names if not _is_parameter(name, tensors, config)}
    if not names:
        held = f", only others such as {printable(min(tensors))}" if tensors else ""
        raise CheckpointError(
            f"{directory}: no adapted layer: none of its {len(tensors)} tensors is {PREFIX}<layer>.{DOWN} of a linear "
            f"layer{held}; there is nothing here that a layer test could cover"
        )
    return sorted(names)


def _is_convolution(tensor: TensorInfo) -> bool:
    return len(tensor.shape) > 2 and 0 not in tensor.shape


def _is_parameter(name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> bool:
    """Whether ``name``'s LoRA is on a bare parameter of a module, which its module computes with as it likes.

    PEFT stacks several such wrappers on one module, and names the inner ones ``<module>.base_layer``.
    """
    module, down = re.sub(r"(\.base_layer)+$", "", name), tensors.get(f"{PREFIX}{name}.{DOWN}")
    for target in config.get("target_parameters") or ():
        owner, _, _ = str(target).rpartition(".")
        if owner and f".{module}".endswith(f".{owner}"):
            return True
        rank = pattern_value(config.get("rank_pattern"), name, config.get("r"))
        if not owner and down is not None and len(down.shape) == 2 and isinstance(rank, int) and rank < down.shape[0]:
            return down.shape[0] % rank == 0  # one LoRA for each expert
    return False


def _layer(
    directory: Path, name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], config_file: Path
) -> LayerSpec:
    where = f"{directory}: layer {printable(name)}"
    shapes = []
    for part in (DOWN, UP):
        tensor = tensors.get(f"{PREFIX}{name}.{part}")
        if tensor is None:
            raise CheckpointError(f"{where} has no {part}; the adapter is incomplete")
        if tensor.dtype not in FLOATING:
            raise CheckpointError(f"{where}: {part} is {tensor.dtype}, not a floating point type that is measured")
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            hint = "; an empty tensor is what ZeRO-3 leaves when it is saved ungathered" if 0 in tensor.shape else ""
            raise CheckpointError(f"{where}: {part} has shape {list(tensor.shape)}, expected two dimensions{hint}")
        shapes.append(tensor.shape)
    (rank, in_features), (out_features, up_rank) = shapes
    if rank != up_rank:
        raise CheckpointError(f"{where}: {DOWN} has rank {rank}, {UP} has rank {up_rank}; they are of different runs")
    expected = pattern_value(config.get("rank_pattern"), name, config.get("r"))
    if expected != rank:
        raise CheckpointError(
            f"{config_file}: gives {printable(name)} the rank {printable(expected)}, but its {DOWN} has rank {rank}; "
            "config and weights are of different runs, and the scale alpha / r would be wrong"
        )
    return LayerSpec(name, rank, in_features, out_features, _scale(name, rank, config, config_file))


def _scale(name: str, rank: int, config: Mapping[str, Any], config_file: Path) -> Scale:
    alpha = pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        said = "is lost" if alpha is None else f"is {printable(alpha)}, no number"
        raise CheckpointError(
            f"{config_file}: the lora_alpha of {printable(name)} {said}, so the scale alpha / r is unknown, and PEFT "
            "would take one of its own; write back the value that it was trained with"
        )
    return Scale(float(alpha), rank, bool(config.get("use_rslora")))


def pattern_value(pattern: object, layer: str, default: Any) -> Any:
    """What ``rank_pattern`` or ``alpha_pattern`` gives a layer: the first key that is, as a regex, an end of its name.

    The rule is PEFT's own, of ``peft.utils.other.get_pattern_key``.

    Raises:
        CheckpointError: A key is no regular expression.
    """
    if not isinstance(pattern, Mapping):
        return default
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", layer):
                return value
        except re.error as error:
            raise CheckpointError(f"{printable(key)!r} in rank_pattern or alpha_pattern is no regex: {error}") from None
    return default
