"""What tensors a checkpoint's files hold, read from their safetensors headers alone.

Nothing here trusts the file: a header is checked as a whole before any of it is used, and no tensor is read.
Format: https://huggingface.co/docs/safetensors (8 bytes little-endian length, JSON, data without holes).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint import grammar
from pytest_nullspace.checkpoint.files import (
    AGAIN,
    Stamps,
    inside,
    json_object,
    opened,
    read_json_object,
    require_plain_files,
    require_unchanged,
    stamp_of,
    stamps,
)
from pytest_nullspace.checkpoint.grammar import Object
from pytest_nullspace.errors import CheckpointError, printable, quoted

__all__ = [
    "AGAIN",
    "FLOATING",
    "Stamps",
    "TensorInfo",
    "inside",
    "opened",
    "printable",
    "quoted",
    "read_header",
    "read_json_object",
    "read_tensors",
    "require_plain_files",
    "require_unchanged",
    "stamp_of",
    "stamps",
]

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
MAX_NAME = 500
"""Characters of a tensor's name; those of real models have up to 150."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip

_FIELDS = ("dtype", "shape", "data_offsets")

FLOATING = frozenset({"F16", "BF16", "F32", "F64"})
"""The dtypes in which adapter weights can be measured."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it.

    Attributes:
        name: Its full name.
        dtype: The safetensors name of its type, such as ``BF16``.
        shape: Its dimensions.
        file: The file that holds it.
        begin: Offset of its first byte in the file's data.
        nbytes: Its size in bytes.
        stamp: Size and time of the file when its header was read.
        stored: Its name in the file, where that is another.
        transposed: Whether the file holds it with its two dimensions exchanged.
        data_at: Where the file's data begins, of a file that is no safetensors.
        heads: Of how many heads the halves' rows lie there in turn, as llama.cpp has them; 0 for rows as they are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    nbytes: int
    stamp: tuple[int, int] = field(default=(0, 0), compare=False)
    stored: str | None = None
    transposed: bool = False
    data_at: int | None = None
    heads: int = 0


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name, in the order of its header.

    Raises:
        CheckpointError: The file is missing, truncated, or its header does not describe its data exactly.
    """
    with opened(file, "the file of the weights") as (stream, status):
        size = status.st_size
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: not a whole safetensors file: it has {size:,} bytes"
                + (f" and claims a header of {length:,}" if len(prefix) == 8 else "")
                + f"; {AGAIN}"
            )
        where = f"{file}: the safetensors header"
        header = json_object(stream.read(length), where, grammar.parsed)
    _once(header, where)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{where} has a __metadata__ that is no object of texts; {AGAIN}")
    stamp = stamp_of(status)
    tensors = {name: _tensor(file, name, entry, stamp) for name, entry in header.items()}
    _check_ranges(file, tensors.values(), size - 8 - length)
    return tensors


def _once(entries: dict[str, Any], where: str, among: Collection[str] | None = None) -> None:
    """Refuse an object of a header in which a key stands twice, if it is ``among`` those that matter."""
    twice = sorted(key for key in entries.twice if among is None or key in among) if isinstance(entries, Object) else []
    if twice:
        raise CheckpointError(f"{where} names {quoted(twice[0])} twice; {AGAIN}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _tensor(file: Path, name: str, entry: object, stamp: tuple[int, int]) -> TensorInfo:
    def wrong(what: str) -> CheckpointError:  # put into words only where needed: there may be a million tensors
        return CheckpointError(f"{file}: tensor {quoted(name)}: {what}")

    if len(name) > MAX_NAME:
        raise wrong(f"its name has {len(name):,} characters; at most {MAX_NAME} are read; {AGAIN}")
    if isinstance(entry, list) and len(entry) == len(_FIELDS):  # as the library takes it too
        entry = dict(zip(_FIELDS, entry, strict=True))
    if not isinstance(entry, dict):
        raise wrong(f"its header entry is not an object; {AGAIN}")
    _once(entry, f"{file}: tensor {quoted(name)}: the safetensors header", _FIELDS)
    if len(entry) > len(_FIELDS) and grammar.is_deeper(entry, grammar.DEEPEST - 1):
        raise wrong(f"its header entry is nested too deeply; {AGAIN}")
    dtype, shape, offsets = map(entry.get, _FIELDS)
    if isinstance(dtype, dict) and list(dtype.values()) == [None]:
        (dtype,) = dtype
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise wrong(f"unknown dtype {quoted(dtype)}; save it in a floating point type")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise wrong(f"its shape {printable(shape)} is not a list of sizes; {AGAIN}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise wrong(f"its data_offsets {printable(offsets)} are not a begin and an end; {AGAIN}")
    begin, end = offsets
    elements = 1
    for size in shape:  # stop early: the whole product of a hostile shape can have millions of digits
        elements *= size
        if elements >= 2**64:
            raise wrong(f"its shape {printable(shape)} is larger than any file; {AGAIN}")
    if elements * _BITS[dtype] >= 2**64:
        raise wrong(f"its shape {printable(shape)} is larger than any file; {AGAIN}")
    if elements * _BITS[dtype] % 8:
        raise wrong(f"its shape {printable(shape)} of {dtype} does not end with a byte; {AGAIN}")
    if end - begin != elements * _BITS[dtype] // 8:
        raise wrong(
            f"shape {printable(shape)} of {dtype} takes {elements * _BITS[dtype] // 8:,} bytes, "
            f"but its data_offsets hold {end - begin:,}; {AGAIN}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, begin, end - begin, stamp)


def _check_ranges(file: Path, tensors: Iterable[TensorInfo], data_size: int) -> None:
    at = 0
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.nbytes)):
        if tensor.begin != at:
            fault = "overlaps the one before it" if tensor.begin < at else "leaves a hole before it"
            raise CheckpointError(f"{file}: the data of tensor {quoted(tensor.name)} {fault} (byte {at:,}); {AGAIN}")
        at += tensor.nbytes
    if at != data_size:
        raise CheckpointError(
            f"{file}: its header describes {at:,} bytes of data, but the file holds {data_size:,}; "
            f"it was cut short or altered: {AGAIN}"
        )


def read_tensors(directory: Path, stem: str) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint, from ``<stem>.safetensors`` or the shards of ``<stem>.safetensors.index.json``.

    Args:
        directory: The checkpoint.
        stem: ``model``, or ``adapter_model`` for PEFT.

    Raises:
        CheckpointError: No safetensors weights, weights that lie outside ``directory``, or shards and index that
            disagree.
    """
    single = directory / f"{stem}.safetensors"
    index = directory / f"{stem}.safetensors.index.json"
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory}: holds both {single.name} and {index.name}; remove the one that is stale")
    if index.exists():
        return _read_shards(directory, index)
    if not single.exists():
        pickled = [name for name in (f"{stem}.bin", f"pytorch_{stem}.bin", f"{stem}.pt") if (directory / name).exists()]
        if pickled:
            raise CheckpointError(
                f"{directory / pickled[0]}: pickled weights can run code and are never opened; save the model again "
                "with safe_serialization=True"
            )
        raise CheckpointError(
            f"{directory}: no weights: neither {single.name} nor {index.name} is there; give the "
            "directory that training saved"
        )
    return read_header(inside(directory, single.name))


def _read_shards(directory: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json_object(inside(directory, index.name), "the index of the weights").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to files; {AGAIN}")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        file = inside(directory, shard)
        if file.suffix != ".safetensors" or shard.startswith("."):
            raise CheckpointError(f"{index}: names the file {quoted(shard)}, which is no *.safetensors; {AGAIN}")
        for name, tensor in read_header(file).items():
            if weight_map.get(name) != shard:
                said = f"puts it into {quoted(weight_map[name])}" if name in weight_map else "does not name it"
                raise CheckpointError(f"{tensor.file}: holds tensor {quoted(name)}, but {index.name} {said}; {AGAIN}")
            tensors[name] = tensor
    missing = _first_missing(weight_map, tensors)
    if missing is not None:
        raise CheckpointError(
            f"{directory / weight_map[missing]}: does not hold tensor {quoted(missing)}, which {index.name} "
            "promises; copy all shards of one save"
        )
    stray = [file for file in directory.glob(f"{index.name.split('.')[0]}-*-of-*.safetensors")
             if file.name not in set(weight_map.values())]  # fmt: skip
    if stray:
        raise CheckpointError(
            f"{stray[0]}: is a shard that {index.name} does not name; remove what is left of another save"
        )
    return tensors


def _first_missing(wanted: Mapping[str, object], found: Mapping[str, object]) -> str | None:
    return next((name for name in wanted if name not in found), None)
