"""Digests of the base that was measured with, by which a later run knows whether it is the same."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import AGAIN, TensorInfo, opened, read_json_object
from pytest_nullspace.checkpoint.hub import weight_files
from pytest_nullspace.checkpoint.lora_null import DOWN, PROTECT_DOWN, PROTECT_UP, UP
from pytest_nullspace.errors import CheckpointError

_AT_ONCE = 4 << 20
"""Bytes that are hashed at once: neither reading nor hashing them holds the interpreter, only what is in between."""
_QUANTISED = ("quantization_config", "quantization")
"""What a config calls the form of its weights: of transformers, and of MLX."""
_DECIDES_NOTHING = {
    *_QUANTISED, "_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype",
    "use_cache", "eos_token_id", "lora_r",
}  # fmt: skip
"""What a config tells of its making, or what a run tells by itself; no figure follows from it."""


class PrefixDigest(NamedTuple):
    """The digest of a file's first bytes.

    Attributes:
        digest: It, to be copied before more is added to it.
        size: How many bytes these are.
    """

    digest: Any
    size: int


_EMPTY = PrefixDigest(hashlib.sha256(), 0)

PrefixOf = Callable[[Path], PrefixDigest]
"""Gives what of a file was digested before."""


def no_prefix(_: Path) -> PrefixDigest:
    """That of no byte."""
    return _EMPTY


def of_base(
    checkpoint: Checkpoint, base: Path | None, until: Event | None = None, prefix_of: PrefixOf = no_prefix
) -> dict[str, Any]:
    """What a run tells of its base: the SHA-256 of its files, or of what a checkpoint that carries it holds beside.

    Args:
        checkpoint: What was measured.
        base: Its base, a directory or a GGUF file; None where it is not known, or ``checkpoint`` carries it.
        until: Ends it where it is set.
        prefix_of: Gives what of a file's digest was taken before.

    Raises:
        CancelledError: It was ended.
        CheckpointError: A file cannot be read.
    """
    told: dict[str, Any]
    if checkpoint.carries_base:
        beside = checkpoint.beside([layer.name for layer in checkpoint.layers])
        digest = hashlib.sha256()
        _add_tensors(digest, beside, until)
        told, config = {"beside_sha256": digest.hexdigest()}, checkpoint.config
    elif base is None:
        return {}
    else:
        told = {"files": {file.name: _once(file, until, prefix_of) for file in weight_files(base)}}
        file = base / "config.json"
        config = read_json_object(file, "the base model's config") if file.is_file() else {}
    if config:
        told |= {"config_sha256": _of_json(_deciding(config)), "quantisation": _quantisation(config)}
    return {"base_model": told}


_ADAPTER = tuple(f".{part}" for part in (DOWN, UP, PROTECT_DOWN, PROTECT_UP))


def base_sha256(checkpoint: Checkpoint, base: Path | None) -> str:
    """One digest of a base model, the same of all directories that hold it under other adapters.

    Args:
        checkpoint: The adapter.
        base: Its base, a directory or a GGUF file; None where ``checkpoint`` carries it.

    Raises:
        CheckpointError: A file cannot be read.
    """
    digest = hashlib.sha256()
    if base is not None:
        for file in (*(() if base.is_file() else (base / "config.json",)), *weight_files(base)):
            add_to(digest, file)
        return digest.hexdigest()
    config = {name: value for name, value in checkpoint.config.items() if name not in ("lora_r", "auto_map")}
    digest.update(json.dumps(config, sort_keys=True).encode())
    _add_tensors(digest, (tensor for name, tensor in checkpoint.tensors.items() if not name.endswith(_ADAPTER)))
    return digest.hexdigest()


def file_sha256(file: Path, until: Event | None = None, prefix_of: PrefixOf = no_prefix) -> str:
    """The SHA-256 of a file, of which it is read what lies behind its prefix.

    Raises:
        CancelledError: ``until`` was set before the end, so that no hash of a part is taken for that of the whole.
        CheckpointError: It cannot be read.
    """
    known = prefix_of(file)
    digest = known.digest.copy()
    add_to(digest, file, until, known.size)
    return str(digest.hexdigest())


_KNOWN: dict[tuple[Path, tuple[int, ...]], str] = {}
"""The digests of files of bases, as long as they stay what they are: several adapters have one."""


def _once(file: Path, until: Event | None, prefix_of: PrefixOf) -> str:
    before = _known_by(file)
    if before not in _KNOWN:
        prefix = prefix_of(file)
        digest = file_sha256(file, until, lambda _: prefix)
        # Of two files, one of which replaced the other meanwhile, it is the digest of neither.
        if prefix.size or _known_by(file) != before:
            return digest
        _KNOWN[before] = digest
    return _KNOWN[before]


def _known_by(file: Path) -> tuple[Path, tuple[int, ...]]:
    with opened(file, "the file of the weights") as (_, status):
        return file.absolute(), times_of(status)


def _add_tensors(digest: Any, tensors: Iterable[TensorInfo], until: Event | None = None) -> None:
    """Add tensors of safetensors files to a digest, in the order of their names, whatever their files are."""
    data: dict[Path, int] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        digest.update(f"\n{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        if tensor.file not in data:
            with opened(tensor.file, "the file of the weights") as (stream, _):
                data[tensor.file] = 8 + int.from_bytes(stream.read(8), "little")
        add_to(digest, tensor.file, until, data[tensor.file] + tensor.begin, tensor.nbytes)


def add_to(digest: Any, file: Path, until: Event | None = None, begin: int = 0, count: int | None = None) -> None:
    """Add a file to a digest, from its byte ``begin`` on, to its end or so many bytes.

    Raises:
        CancelledError: ``until`` was set before the end.
        CheckpointError: It cannot be read, or has not so many.
    """
    buffer = memoryview(bytearray(_AT_ONCE if count is None else min(count, _AT_ONCE)))
    with opened(file, "the file of the weights") as (stream, status):
        stream.seek(begin)
        left = status.st_size - begin if count is None else count
        while left > 0 and (got := stream.readinto(buffer[: min(left, _AT_ONCE)])):
            if until is not None and until.is_set():
                raise CancelledError
            digest.update(buffer[:got])
            left -= got
    if left:
        raise CheckpointError(f"{file}: ends before it should; {AGAIN}")


@cache
def program_sha256() -> str:
    """One digest of this package, by which it is known whether the very same version of it wrote something."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"\n{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def times_of(status: os.stat_result) -> tuple[int, ...]:
    """All by which a file is known again long after: of its times the last cannot be set by hand."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


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
