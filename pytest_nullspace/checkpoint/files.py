"""The files of a checkpoint or a base: opened, read as JSON, held to their directory, and known again.

A file is nobody's friend: it may be a pipe, a link out of the directory, a pointer to another, or be replaced.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from pytest_nullspace.errors import CheckpointError, printable, quoted, twice

POINTER = b"version https://git-lfs"
"""How the small text file begins that a clone without Git LFS holds in place of a large one."""
MAX_JSON_BYTES = 100_000_000
MAX_JSON_VALUES = 4_000_000
"""A header names about eight values a tensor; a million times ``[]`` takes twenty times the memory of its bytes."""
AGAIN = "save or download it again"
"""How most messages of a file end."""

Stamps = frozenset[tuple[Path, tuple[int, int]]]
"""Files, each with its size and time when it was first read."""


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
    return json_object(data, where, lambda text: json.loads(text, object_pairs_hook=lambda of: _unique(of, where)))


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    if (key := twice(pairs)) is not None:
        raise CheckpointError(f"{where} names {quoted(key)} twice; {AGAIN}")
    return dict(pairs)


def json_object(data: bytes, where: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The JSON object that ``parse`` makes of ``data``; ``where`` names it.

    Raises:
        CheckpointError: It is none.
    """
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
