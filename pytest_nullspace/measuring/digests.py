"""Digests of the base that was measured with, by which a later run knows whether it is the same."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event
from typing import Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import TensorInfo, opened, read_json_object, stamp_of

_CHUNK = 1 << 24
_AT_ONCE = 4 << 20
"""Bytes that are hashed at once: neither reading nor hashing them holds the interpreter, only what is in between."""
_QUANTISED = ("quantization_config", "quantization")
"""What a config calls the form of its weights: of transformers, and of MLX."""
_DECIDES_NOTHING = {
    *_QUANTISED, "_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype",
    "use_cache", "eos_token_id", "lora_r",
}  # fmt: skip
"""What a config tells of its making, or what a run tells by itself; no figure follows from it."""


def of_base(checkpoint: Checkpoint, base: Path | None, until: Event | None = None) -> dict[str, Any]:
    """What a run tells of its base: the SHA-256 of its files, or of what a checkpoint that carries it holds beside.

    Args:
        checkpoint: What was measured.
        base: Its base, a directory or a GGUF file; None where it is not known, or ``checkpoint`` carries it.
        until: Ends it where it is set.

    Raises:
        CancelledError: It was ended.
        CheckpointError: A file cannot be read.
    """
    told: dict[str, Any]
    if checkpoint.carries_base:
        beside = checkpoint.beside([layer.name for layer in checkpoint.layers])
        told, config = {"beside_sha256": _of_tensors(beside)}, checkpoint.config
    elif base is None:
        return {}
    else:
        files = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
        told = {"files": {file.name: _once(file, until) for file in files}}
        file = base / "config.json"
        config = read_json_object(file, "the base model's config") if file.is_file() else {}
    if config:
        told |= {"config_sha256": _of_json(_deciding(config)), "quantisation": _quantisation(config)}
    return {"base_model": told}


def file_sha256(file: Path, until: Event | None = None) -> str:
    """The SHA-256 of a file.

    Raises:
        CancelledError: ``until`` was set before the end, so that no hash of a part is taken for that of the whole.
        CheckpointError: It cannot be read.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_AT_ONCE))
    with opened(file, "the file of the weights") as (stream, _):
        while count := stream.readinto(buffer):
            if until is not None and until.is_set():
                raise CancelledError
            digest.update(buffer[:count])
    return digest.hexdigest()


_KNOWN: dict[tuple[Path, tuple[int, int]], str] = {}
"""The digests of files of bases, as long as they stay what they are: several adapters have one."""


def _once(file: Path, until: Event | None) -> str:
    key = file.absolute(), stamp_of(file.stat())
    if key not in _KNOWN:
        _KNOWN[key] = file_sha256(file, until)
    return _KNOWN[key]


def add_bytes(digest: Any, file: Path, begin: int, size: int | None) -> None:
    """Add a whole file, or ``size`` bytes of a safetensors file's data from ``begin``, to a digest."""
    with opened(file, "the base model") as (stream, status):
        if size is None:
            size = status.st_size
        else:
            stream.seek(8 + int.from_bytes(stream.read(8), "little") + begin)
        while size > 0 and (data := stream.read(min(size, _CHUNK))):
            digest.update(data)
            size -= len(data)


def _of_tensors(tensors: list[TensorInfo]) -> str:
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        digest.update(f"\n{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        add_bytes(digest, tensor.file, tensor.begin, tensor.nbytes)
    return digest.hexdigest()


def _of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _deciding(config: object) -> object:
    """What a config says of the model, in parts of it as well."""
    if isinstance(config, Mapping):
        return {key: _deciding(value) for key, value in config.items() if key not in _DECIDES_NOTHING}
    return [*map(_deciding, config)] if isinstance(config, list) else config


def _quantisation(config: Mapping[str, Any]) -> str:
    """By what its weights are quantised, and the digest of how; ``none`` where they are not."""
    told = next((config[key] for key in _QUANTISED if config.get(key)), None)
    if told is None:
        return "none"
    method = told.get("quant_method") if isinstance(told, Mapping) else None
    return f"{method if isinstance(method, str) else 'its config'} {_of_json(told)[:12]}"
