"""Numbers, words and tensors, in lists, tuples and dictionaries, in one file that is named by its own SHA-256.

It begins with the length of a JSON text, in which a tensor stands as its number; behind that text the tensors lie one
after the other. No code comes out of it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytest_nullspace.measuring.digests import file_sha256

SUFFIX = ".stowed"
_AT_ONCE = 1 << 24
"""Bytes that are written, or read, at once."""
_TENSOR, _TUPLE, _DICTIONARY = "tensor", "tuple", "dictionary"
"""Under which key JSON tells what it has no word for."""
_PLAIN = frozenset({type(None), bool, int, float, str})
"""For what it has one: a list of these alone is not looked through."""


class OddError(Exception):
    """What is to be kept is none of these; the message is what it is."""


def stow(folder: Path, value: object) -> None:
    """Keep ``value`` in the place of all that is in ``folder``, at once or not at all.

    Args:
        folder: Where.
        value: What; tensors may lie on any device.

    Raises:
        OddError: It holds something else.
        OSError: There is no room.
    """
    tensors = list[Tensor]()
    told = _told(value, tensors, {})
    forms = [(str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for tensor in tensors]
    text = json.dumps([told, forms]).encode()
    handle, name = tempfile.mkstemp(dir=folder)
    new, digest = Path(name), hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as stream:
            for data in (memoryview(len(text).to_bytes(8, "little") + text), *map(_bytes, tensors)):
                for first in range(0, len(data), _AT_ONCE):
                    digest.update(data[first : first + _AT_ONCE])
                    stream.write(data[first : first + _AT_ONCE])
        kept = new.replace(folder / f"{digest.hexdigest()}{SUFFIX}")
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    for file in folder.iterdir():
        if file != kept:
            file.unlink()


def stowed(file: Path) -> Any:
    """What is kept in ``file``; None where that is not what was written."""
    with suppress(Exception):  # whatever lies there under such a name, by whomever it was written
        if file_sha256(file) != file.stem:
            return None
        with file.open("rb") as stream:
            told, forms = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in forms]
            are_whole = [stream.readinto(_bytes(tensor)) == tensor.nbytes for tensor in tensors]
            return _had(told, tensors) if all(are_whole) and not stream.read(1) else None
    return None


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def _told(value: Any, tensors: list[Tensor], known: dict[int, int]) -> Any:
    """It as JSON; ``tensors`` get each tensor once, by whose id its number is ``known``."""

    def each(parts: Iterable[Any]) -> list[Any]:
        found = list(parts)
        return found if _PLAIN.issuperset(map(type, found)) else [_told(part, tensors, known) for part in found]

    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return each(value)
    if type(value) is tuple:
        return {_TUPLE: each(value)}
    if type(value) is dict:
        return {_DICTIONARY: [each(value), each(value.values())]}
    if type(value) is not Tensor:
        raise OddError(f"it holds a {type(value).__name__}")
    if id(value) not in known:
        known[id(value)] = len(tensors)
        tensors.append(value)
    return {_TENSOR: known[id(value)]}


def _had(told: Any, tensors: list[Tensor]) -> Any:
    """What was told as JSON."""
    if isinstance(told, list):
        return [_had(part, tensors) for part in told]
    if not isinstance(told, dict):
        return told
    ((kind, of),) = told.items()
    if kind == _TENSOR:
        return tensors[of]
    parts = _had(of, tensors)
    return tuple(parts) if kind == _TUPLE else dict(zip(*{_DICTIONARY: parts}[kind], strict=True))
