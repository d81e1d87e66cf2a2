"""What tensors a checkpoint's files hold, read from their safetensors headers alone.

Nothing here trusts the file: a header is checked as a whole before any of it is used, and no tensor is read.
Format: https://huggingface.co/docs/safetensors (8 bytes little-endian length, JSON, data without holes).
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint import grammar
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

POINTER = b"version https://git-lfs"
"""How the small text file begins that a clone without Git LFS holds in place of a large one."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
MAX_JSON_BYTES = 100_000_000
MAX_JSON_VALUES = 4_000_000
"""A header names about eight values a tensor; a million times ``[]`` takes twenty times the memory of its bytes."""
MAX_NAME = 500
"""Characters of a tensor's name; those of real models have up to 150."""

AGAIN = "save or download it again"
"""How most messages of a file end."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip

_FIELDS = ("dtype", "shape", "data_offsets")

FLOATING = frozenset({"F16", "BF16", "F32", "F64"})
"""The dtypes in which adapter weights can be measured."""

Stamps = frozenset[tuple[Path, tuple[int, int]]]
"""Files, each with its size and time when it was first read."""


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


@contextmanager
def opened(file: Path, what: str) -> Iterator[tuple[BufferedReader, os.stat_result]]:
    """``file`` open for reading, with its status; ``what`` names it in messages.

    A pipe or a device is not waited for, but refused.

    Raises:
        CheckpointError: It is missing, not a regular file, or cannot be read.
    """
    try:
        try:
            descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except ValueError as error:  # a name that no file can have
            raise OSError(None, str(error)) from None
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{file}: {what} cannot be read: it is not a regular file; put one there")
            if stream.peek(len(POINTER)).startswith(POINTER):
                raise CheckpointError(
                    f"{file}: {what} is not there, only a Git LFS pointer to it; run git lfs pull in that repository, "
                    "or download the file itself"
                )
            yield stream, status
    except FileNotFoundError:
        raise CheckpointError(f"{file}: {what} is missing; {AGAIN}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {what} cannot be read: {error.strerror}; mend that or {AGAIN}") from None


def read_json_object(file: Path, what: str) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        CheckpointError: The file is missing, too large, not UTF-8, not JSON, or not an object; ``what`` names it.
    """
    with opened(file, what) as (stream, status):
        size = status.st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: {what} has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read; {AGAIN}")
        data = stream.read(MAX_JSON_BYTES)
    where = f"{file}: {what}"
    return _json_object(data, where, lambda text: json.loads(text, object_pairs_hook=lambda of: _unique(of, where)))


def _json_object(data: bytes, where: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_JSON_VALUES:
        raise CheckpointError(f"{where} has more than {MAX_JSON_VALUES:,} values, which no model needs; {AGAIN}")
    try:
        value = parse(data.decode("utf-8"))
    except UnicodeEncodeError:
        raise CheckpointError(f"{where} holds half of a surrogate pair, which is no text; {AGAIN}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 text (byte {error.start}); {AGAIN}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where} is not JSON: {error.msg} at line {error.lineno}; {AGAIN}") from None
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise CheckpointError(f"{where} is not JSON that can be read: {error}; {AGAIN}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object, not {type(value).__name__}; {AGAIN}")
    return value


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CheckpointError(f"{where} names {quoted(twice)} twice; {AGAIN}")
    return entries


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
        header = _json_object(stream.read(length), where, grammar.parsed)
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


def stamp_of(status: os.stat_result) -> tuple[int, int]:
    """Size and time of a file, by which it is known again."""
    return status.st_size, status.st_mtime_ns


def stamps(model: Path) -> Stamps:
    """The files from which the numbers of a model come, a directory's or the one that it is, as they are now.

    Raises:
        CheckpointError: One cannot be read.
    """
    found = set()
    for file in [model] if model.is_file() else [*model.glob("*.safetensors"), *model.glob("config.json")]:
        with opened(file, "the file of the model") as (_, status):
            found.add((file, stamp_of(status)))
    return frozenset(found)


def require_unchanged(stamps: Stamps) -> None:
    """Refuse files that are no more what they were when they were stamped.

    Raises:
        CheckpointError: One is gone, or has another size or time.
    """
    for file, stamp in sorted(stamps):
        with opened(file, "the file of the model") as (stream, status):
            if stamp_of(status) != stamp:
                now = hashlib.file_digest(stream, "sha256").hexdigest()
                raise CheckpointError(
                    f"{file}: changed after it was first read (SHA-256 now {now}), so no figure would be of one "
                    "checkpoint; run again once nothing writes to it"
                )


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


def inside(directory: Path, name: str) -> Path:
    """The path of ``name`` in ``directory``, which must not lead out of it (the hub cache's own blobs excepted).

    Raises:
        CheckpointError: ``name`` is no plain file name, or a link to somewhere else.
    """
    file = directory / name
    if not name or name != Path(name).name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{directory}: {quoted(name)} is not the name of a file in this directory; {AGAIN}")
    try:
        home, target = directory.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that no file can have
        raise CheckpointError(f"{directory}: {quoted(name)} leads to no file: {printable(error)}; {AGAIN}") from None
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if target.parent not in allowed:
        raise CheckpointError(f"{file}: is a link out of the checkpoint, to {target}; copy the file into the directory")
    return file


_READ_BY_LIBRARIES = (".json", ".safetensors", ".model", ".txt", ".jinja")


def require_plain_files(directory: Path) -> None:
    """Refuse a checkpoint in which a file leads elsewhere, or would block or never end for whoever opens it.

    The libraries choose by themselves what they open, so every file that they could want is looked at.

    Raises:
        CheckpointError: A file that is read is a link out of ``directory``, a pipe or a device.
    """
    for file in sorted(directory.iterdir()):
        if file.suffix in _READ_BY_LIBRARIES:
            inside(directory, file.name)
            if file.exists() and not file.is_file() and not file.is_dir():
                raise CheckpointError(f"{file}: cannot be read: it is not a regular file; put one there")


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
