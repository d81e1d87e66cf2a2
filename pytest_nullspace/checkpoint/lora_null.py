"""LoRA-Null and CorDA directories: a whole model whose linear layers were replaced.

Per adapted layer: ``ALinear.weight (out, r)``, ``BLinear.weight (r, in)``, ``weight_residual (out, in)``, and, where
the original had a bias, ``ALinear.bias (out)``. A variant also holds ``PBLinear.weight (p, in)`` and
``PALinear.weight (in, p)``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_nullspace.checkpoint.header import FLOATING, TensorInfo, inside, printable, read_json_object, read_tensors
from pytest_nullspace.checkpoint.layers import Checkpoint, LayerSpec, in_model_order
from pytest_nullspace.checkpoint.strangers import require_unwrapped, whole_model
from pytest_nullspace.errors import CheckpointError

CONFIG_FILE = "config.json"
FORMAT = "LoRA-Null"

DOWN, UP, BASE, BIAS = "BLinear.weight", "ALinear.weight", "weight_residual", "ALinear.bias"
PROTECT_DOWN, PROTECT_UP = "PBLinear.weight", "PALinear.weight"
_PARTS = (DOWN, UP, BASE, BIAS, PROTECT_DOWN, PROTECT_UP)
_MODULES = ("ALinear", "BLinear", "PALinear", "PBLinear")


def read(directory: Path) -> Checkpoint:
    """Read the directory's config and headers.

    Raises:
        CheckpointError: The config or the weights are unreadable, no layer is adapted, or one is incomplete.
    """
    config_file = directory / CONFIG_FILE
    config = read_json_object(inside(directory, CONFIG_FILE), "the model's config")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{config_file}: has no model_type; it is not the config of a transformers model, so give the directory "
            "that training saved"
        )
    tensors = read_tensors(directory, "model")
    require_unwrapped(directory, tensors)
    names = sorted({name for name in map(_layer_of, tensors) if name is not None})
    if not names:
        raise CheckpointError(f"{directory}: no adapted layer: {whole_model(directory, tensors)}")
    layers = in_model_order(directory, (_layer(directory, name, tensors) for name in names))
    _check_rank(config_file, config.get("lora_r"), layers)
    return Checkpoint(directory, FORMAT, config_file, config, layers, tensors)


def is_adapted(directory: Path) -> bool:
    """Whether a model's directory holds any part of such a layer.

    Raises:
        CheckpointError: Its weights are unreadable.
    """
    return any(_layer_of(name) is not None for name in read_tensors(directory, "model"))


def _layer_of(tensor: str) -> str | None:
    """The layer of which ``tensor`` is a part; anything under one of the four adapter modules is one."""
    for part in _PARTS:
        if tensor.endswith(f".{part}"):
            return tensor[: -len(part) - 1]
    for module in _MODULES:
        if f".{module}." in tensor:
            return tensor.rpartition(f".{module}.")[0]
    return None


def _layer(directory: Path, name: str, tensors: Mapping[str, TensorInfo]) -> LayerSpec:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{directory}: layer {printable(name)}{what}")

    def part(suffix: str, *shape: int | None) -> TensorInfo:
        tensor = tensors.get(f"{name}.{suffix}")
        if tensor is None:
            raise wrong(f" has no {suffix}; the checkpoint is incomplete")
        if tensor.dtype not in FLOATING:
            raise wrong(f": {suffix} is {tensor.dtype}, not a floating point type that is measured")
        fits = len(tensor.shape) == len(shape) and all(w in (None, s) for w, s in zip(shape, tensor.shape, strict=True))
        if not fits or 0 in tensor.shape:
            wanted = ", ".join("?" if w is None else str(w) for w in shape)
            hint = "; an empty tensor is what ZeRO-3 leaves when it is saved ungathered" if 0 in tensor.shape else ""
            raise wrong(f": {suffix} has shape {list(tensor.shape)}, expected ({wanted}){hint}")
        return tensor

    rank, in_features = part(DOWN, None, None).shape
    (out_features, _) = part(UP, None, rank).shape
    part(BASE, out_features, in_features)
    if f"{name}.{BIAS}" in tensors:
        part(BIAS, out_features)
    if f"{name}.{PROTECT_DOWN}" in tensors or f"{name}.{PROTECT_UP}" in tensors:
        (protected, _) = part(PROTECT_DOWN, None, in_features).shape
        part(PROTECT_UP, in_features, protected)
    for module in _MODULES:
        for other in (n for n in (f"{name}.{module}.weight", f"{name}.{module}.bias") if n in tensors):
            if other.removeprefix(f"{name}.") not in _PARTS:
                raise wrong(f": {other.removeprefix(f'{name}.')} belongs to no known LoRA-Null layer")
    if rank > in_features:
        raise wrong(f": its rank {rank} is above its input width {in_features}")
    return LayerSpec(name, rank, in_features, out_features)


def _check_rank(config_file: Path, lora_r: object, layers: Sequence[LayerSpec]) -> None:
    if lora_r is None:
        return
    if not isinstance(lora_r, int) or isinstance(lora_r, bool) or lora_r < 1:
        raise CheckpointError(
            f"{config_file}: lora_r must be a whole number from 1, not {printable(repr(lora_r))}; mend it"
        )
    for layer in layers:
        if layer.rank != lora_r:
            raise CheckpointError(
                f"{config_file}: lora_r is {lora_r}, but {layer.name}.{DOWN} has rank {layer.rank}; "
                "config and weights are of different runs"
            )
