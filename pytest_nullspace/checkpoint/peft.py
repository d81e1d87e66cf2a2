"""PEFT directories: ``adapter_config.json`` and the adapter's own tensors; the base model lies elsewhere.

Per adapted layer: ``base_model.model.<layer>.lora_A.weight (r, in)`` and ``….lora_B.weight (out, r)``, with DoRA also
``….lora_magnitude_vector (out)``, with ``lora_bias`` also ``….lora_B.bias (out)``. Whatever else the file holds was
trained too, and no layer test covers it: LoRA on embeddings (``lora_embedding_A``), on convolutions (matrices of more
than two dimensions), on ``torch.nn.MultiheadAttention`` (computed in one piece, with its ``out_proj``), on bare
parameters (``target_parameters``) and one LoRA for each expert, trained tokens, biases, whole modules.
"""

import re
from collections.abc import Callable, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint.fields import require_lora, unused
from pytest_nullspace.checkpoint.header import (
    FLOATING,
    TensorInfo,
    inside,
    printable,
    quoted,
    read_json_object,
    read_tensors,
)
from pytest_nullspace.checkpoint.layers import PREFIX as PREFIX
from pytest_nullspace.checkpoint.layers import Checkpoint, LayerSpec, Scale, in_model_order
from pytest_nullspace.checkpoint.patterns import require_quick, table
from pytest_nullspace.checkpoint.strangers import require_unwrapped
from pytest_nullspace.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FORMAT, MLX, GGUF = "PEFT LoRA", "MLX LoRA", "GGUF LoRA"
FORMATS = (FORMAT, MLX, GGUF)
"""What is read as PEFT saves it, whoever saved it."""

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
    config = read_json_object(inside(directory, CONFIG_FILE), "the adapter's config")
    require_lora(config, FIELDS, config_file)
    _check_fields(config, config_file)
    if not isinstance(config.get("lora_alpha"), int | float):
        raise CheckpointError(
            f"{config_file}: lora_alpha is {printable(repr(config.get('lora_alpha')))}, not a number; without it the "
            "scale of the update is unknown; write back the value that it was trained with"
        )
    held = read_tensors(directory, "adapter_model")
    require_unwrapped(directory, held)
    return of(directory, config, config_file, held)


def of(directory: Path, config: Mapping[str, Any], config_file: Path, held: Mapping[str, TensorInfo]) -> Checkpoint:
    """The checkpoint of an adapter, from its config and all its tensors as PEFT names them.

    Raises:
        CheckpointError: They do not fit together.
    """
    idle = unused(held, config)
    tensors = {name: tensor for name, tensor in held.items() if name not in idle}
    require_quick(config, {name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors}, config_file)
    names = _layers(directory, tensors, config)
    layers = [_layer(directory, name, tensors, config, config_file) for name in names]
    covered = {f"{PREFIX}{name}.{part}" for name in names for part in (DOWN, UP)}
    return Checkpoint(
        directory=directory,
        format=FORMAT,
        config_file=config_file,
        config=config,
        layers=in_model_order(directory, layers),
        tensors=tensors,
        outside=tuple(sorted(set(tensors) - covered)),
        base=config.get("base_model_name_or_path") or "",
        base_revision=config.get("revision"),
        changed_base=_changed_base(config),
    )


_OF_ADAPTER = (".lora_", ".trainable_tokens_delta")


def writes_into_base(checkpoint: Checkpoint) -> list[str]:
    """The tensors of the adapter that are the base's own: PEFT writes them there, and no switch takes them out again.

    Of whole modules it keeps those of the base beside them.
    """
    whole = tuple(checkpoint.config.get("modules_to_save") or ())  # PEFT takes whatever ends so

    def is_kept_beside(name: str) -> bool:
        return any(path.endswith(whole) for path in accumulate(name.split("."), "{}.{}".format))

    own = (name for name in checkpoint.outside if not any(part in name for part in _OF_ADAPTER))
    return [name for name in own if not (whole and is_kept_beside(name))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) and _is_whole(one) and one >= 0 for one in value)


def _is_map(key: Callable[[object], bool], of: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(key(k) and of(v) for k, v in value.items())


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


_FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_whole, "a whole number"),
    "lora_alpha": (_is_number, "a number below a billion"),
    **dict.fromkeys(("bias", "task_type", "base_model_name_or_path", "revision"), (_is_text, "text")),
    **dict.fromkeys(
        ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"), (_is_truth, "true or false")
    ),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        (lambda value: _is_text(value) or _is_texts(value), "text or a list of texts"),
    ),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (_is_texts, "a list of texts")),
    "layers_to_transform": (
        lambda value: _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value))),
        "a whole number or a list of them",
    ),
    "rank_pattern": (_is_map(_is_text, _is_whole), "an object of whole numbers"),
    "alpha_pattern": (_is_map(_is_text, _is_number), "an object of numbers below a billion"),
    "trainable_token_indices": (
        lambda value: _is_tokens(value) or _is_map(_is_text, _is_tokens)(value),
        "a list of whole numbers from 0, or an object of such lists",
    ),
}
"""Each field that is used, what it may hold, and that in words."""

FIELDS = tuple(field for field in _FIELDS if field not in ("task_type", "base_model_name_or_path", "revision"))
"""The fields that shape the adapted model; no other reaches PEFT."""


def _check_fields(config: Mapping[str, Any], config_file: Path) -> None:
    """Hold every field that is used against what it may be, before any library sees it."""
    for field, (fits, words) in _FIELDS.items():
        value = config.get(field)
        if value is not None and not fits(value):
            raise CheckpointError(
                f"{config_file}: {field} must be {words}, not {printable(repr(value))}; mend it or save the adapter "
                "again"
            )


def _changed_base(config: Mapping[str, Any]) -> str | None:
    """What is known of an initialisation that moved weight out of the base.

    An adapter saved converted belongs on the untouched base, and says ``true``. So does one that was made to say so
    before it was saved as it is; of CorDA and LoRA-GA alone a trace is left.
    """
    start, base = str(config.get("init_lora_weights", "")).lower(), printable(config.get("base_model_name_or_path"))
    if start.startswith(CHANGES_THE_BASE):
        return (
            f"init_lora_weights {start} changed the base's weights, and the adapter was not saved converted: on the "
            f"untouched base {base} every figure would be wrong; give the changed base"
        )
    for field, method in (("corda_config", "CorDA"), ("lora_ga_config", "LoRA-GA")):
        if config.get(field):
            return (
                f"its {field} says that {method} changed the base's weights, and nothing says whether the adapter was "
                f"saved converted; if it was, give the untouched base {base}, if not, the changed one,"
            )
    return None


def _layers(directory: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[str]:
    """The names of the linear layers that have a lora_A or a lora_B."""
    stray = next((name for name in tensors if not name.startswith(PREFIX)), None)
    if stray is not None:
        is_lora = ".lora_A." in stray or ".lora_B." in stray
        raise CheckpointError(
            f"{directory}: tensor {quoted(stray)} does not begin with {PREFIX!r} as PEFT's do, so PEFT would "
            "silently leave it out; "
            + ("rename the keys or save the adapter with save_pretrained" if is_lora else "save the adapter again")
        )
    twice = next((name for name in tensors if name.startswith(2 * PREFIX)), None)
    if twice is not None:
        raise CheckpointError(
            f"{directory}: tensor {quoted(twice)} begins with {PREFIX!r} twice, so PEFT would silently leave it out; "
            "take it off every key once, or save the adapter with save_pretrained"
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
            f"{directory}: tensor {quoted(named)} carries the adapter's name, which PEFT takes out when it saves, "
            "and would not find again; save the adapter with save_pretrained"
        )
    in_one_piece = {name for name in names if f"{name}{_OUT_PROJ}" in names}
    names -= in_one_piece | {f"{name}{_OUT_PROJ}" for name in in_one_piece}
    names = {name for name in names if not _is_parameter(name, tensors, config) and not _EXPERT.search(name)}
    if not names:
        held = f", only others such as {printable(min(tensors))}" if tensors else ""
        cure = (
            "its LoRA is on embeddings, convolutions, experts, attention in one piece or bare parameters alone; adapt "
            "linear layers as well"
            if any(".lora_" in name for name in tensors)
            else "give the directory that save_pretrained wrote"
        )
        raise CheckpointError(
            f"{directory}: no adapted layer: none of its {len(tensors)} tensors is {PREFIX}<layer>.{DOWN} of a linear "
            f"layer{held}; there is nothing here that a layer test could cover; {cure}"
        )
    return sorted(names)


_OUT_PROJ = ".base_layer.out_proj"
"""Behind the name of a ``torch.nn.MultiheadAttention``: PEFT adapts its ``in_proj`` and this always together."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of one expert's layer: transformers 5 fuses the experts of a block, and PEFT their LoRAs."""


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
            raise CheckpointError(f"{where} has no {part}: the adapter is incomplete; save or download it again")
        if tensor.dtype not in FLOATING:
            raise CheckpointError(
                f"{where}: {part} is {tensor.dtype}, not a floating point type that is measured; save the adapter in "
                "16 or 32 bits"
            )
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            hint = (
                "; an empty tensor is what ZeRO-3 leaves when it is saved ungathered; gather it first"
                if 0 in tensor.shape
                else ""
            )
            raise CheckpointError(f"{where}: {part} has shape {list(tensor.shape)}, expected two dimensions{hint}")
        shapes.append(tensor.shape)
    (rank, in_features), (out_features, up_rank) = shapes
    if rank != up_rank:
        raise CheckpointError(
            f"{where}: {DOWN} has rank {rank}, {UP} has rank {up_rank}: they are of different runs; copy both from one "
            "save"
        )
    expected = pattern_value(config.get("rank_pattern"), name, config.get("r"))
    if expected != rank:
        raise CheckpointError(
            f"{config_file}: gives {printable(name)} the rank {printable(expected)}, but its {DOWN} has rank {rank}; "
            "config and weights are of different runs, and the scale alpha / r would be wrong; copy both from one save"
        )
    return LayerSpec(name, rank, in_features, out_features, _scale(name, rank, config, config_file))


def _scale(name: str, rank: int, config: Mapping[str, Any], config_file: Path) -> Scale:
    alpha = pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        said = "is lost" if alpha is None else f"is {printable(repr(alpha))}, no number"
        raise CheckpointError(
            f"{config_file}: the lora_alpha of {printable(name)} {said}, so the scale alpha / r is unknown, and PEFT "
            "would take one of its own; write back the value that it was trained with"
        )
    return Scale(float(alpha), rank, bool(config.get("use_rslora")))


def pattern_value(pattern: object, layer: str, default: Any) -> Any:
    """What ``rank_pattern`` or ``alpha_pattern`` gives a layer, by the first key that fits its name."""
    if not isinstance(pattern, Mapping) or (first := table(tuple(pattern)).first(layer)) is None:
        return default
    return next(islice(pattern.values(), first, None))
