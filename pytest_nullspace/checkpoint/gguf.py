"""GGUF files: what tensors one holds, read from its header alone; their numbers are transformers' to take out.

Nothing here trusts the file: the readers of the packages take whatever count it names, so every one is held against
the file's real size before they see it. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from io import BufferedReader
from pathlib import Path

from pytest_nullspace.checkpoint.header import AGAIN, TensorInfo, opened, printable, quoted, stamp_of
from pytest_nullspace.errors import CheckpointError

SUFFIX = ".gguf"
MAX_VALUES = 4_000_000
"""In all lists of the metadata: a vocabulary with its scores, kinds and merges has a million."""
MAX_COUNT = 1_000_000
"""The largest count of layers, heads or experts: libraries make lists of that length."""
MAX_DIMENSIONS = 4

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9
_OF_KIND, _OF_ADAPTER = ("general.type", "general.architecture"), "adapter."
_ALIGNMENT, _ALIGNMENTS = 32, [1 << bits for bits in range(3, 21)]


def only_file(directory: Path, cure: str) -> Path | None:
    """The GGUF file of a directory that holds no safetensors; None where there is none.

    Args:
        directory: Where it lies.
        cure: What to do where nothing tells which of several is meant.

    Raises:
        CheckpointError: There are several.
    """
    files = sorted(directory.glob(f"*{SUFFIX}"))
    if not files or any(directory.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise CheckpointError(
            f"{directory}: holds {len(files)} GGUF files, {', '.join(printable(file.name) for file in files[:5])}"
            f"{' …' if len(files) > 5 else ''}; {cure}"
        )
    return files[0]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one GGUF file, by the names that it gives them.

    Raises:
        CheckpointError: It is missing, cut short, not consistent, or the package that reads it is not installed.
    """
    return read(file)[0]


def read(file: Path) -> tuple[dict[str, TensorInfo], dict[str, float | str | None]]:
    """The same, and what the file says of its kind and as an adapter, by key; None of a list.

    Raises:
        CheckpointError: It is missing, cut short, not consistent, or the package that reads it is not installed.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise CheckpointError(f"{file}: is a GGUF file, and what reads it is not installed; pip install gguf") from None
    blocks = {int(kind): (GGMLQuantizationType(kind).name, *GGML_QUANT_SIZES[kind]) for kind in GGML_QUANT_SIZES}
    with opened(file, "the file of the weights") as (stream, status):
        reader = _Reader(file, stream, status.st_size)
        tensors = reader.tensors(blocks, stamp_of(status))
    return {name: replace(tensor, data_at=reader.start) for name, tensor in tensors.items()}, reader.told


class _Reader:
    """Reads forward, and never past the end of the file."""

    def __init__(self, file: Path, stream: BufferedReader, size: int) -> None:
        self._file, self._stream, self._size = file, stream, size
        self._values = 0
        self.told: dict[str, float | str | None] = {}
        self.start = 0

    def tensors(self, blocks: Mapping[int, tuple[str, int, int]], when: tuple[int, int]) -> dict[str, TensorInfo]:
        if self._stream.read(4) != b"GGUF":
            raise self._refused("not a GGUF file: it does not begin with GGUF")
        version, count, metadata = self._whole("<I"), self._whole("<Q"), self._whole("<Q")
        if version not in (2, 3):
            raise self._refused(f"of GGUF version {version}; versions 2 and 3 are read")
        alignment = _ALIGNMENT
        for _ in range(self._held(metadata, 12)):
            key = self._text()
            kept = key in _OF_KIND or key.startswith(_OF_ADAPTER)
            if key in self.told:
                raise self._refused(f"names {quoted(key)} twice")
            told = self._value(self._whole("<I"), kept)
            if kept:
                self.told[key] = told
            value = None if isinstance(told, str) else told
            if key.endswith("_count") and value is not None and not value <= MAX_COUNT:
                raise self._refused(f"{quoted(key)} is {value}, more than any model has")
            if key == "general.alignment":
                alignment = int(value) if value is not None and value in _ALIGNMENTS else 0
        if not alignment:
            raise self._refused("its general.alignment is no power of two")
        found: dict[str, TensorInfo] = {}
        for _ in range(self._held(count, 24)):
            tensor = self._tensor(blocks, when)
            if tensor.name in found:
                raise self._refused(f"names the tensor {quoted(tensor.name)} twice")
            found[tensor.name] = tensor
        self.start = -(-self._stream.tell() // alignment) * alignment
        self._check_ranges(found.values(), self.start)
        return found

    def _tensor(self, blocks: Mapping[int, tuple[str, int, int]], when: tuple[int, int]) -> TensorInfo:
        name, dimensions = self._text(), self._whole("<I")
        if dimensions > MAX_DIMENSIONS:
            raise self._refused(f"tensor {quoted(name)} has {dimensions} dimensions")
        shape = tuple(self._whole("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self._whole("<I"), self._whole("<Q")
        if kind not in blocks:
            raise self._refused(f"tensor {quoted(name)} is of the unknown type {kind}; a newer gguf may know it")
        dtype, numbers, nbytes = blocks[kind]
        elements = 1
        for width in shape:
            elements *= width
        if elements % numbers or elements // numbers * nbytes > self._size:
            raise self._refused(f"tensor {quoted(name)}: {list(shape)} of {dtype} is more than the file holds")
        return TensorInfo(name, dtype, shape, self._file, offset, elements // numbers * nbytes, when)

    def _check_ranges(self, tensors: Iterable[TensorInfo], start: int) -> None:
        at = 0
        for tensor in sorted(tensors, key=lambda t: (t.begin, t.nbytes)):
            if tensor.begin < at:
                raise self._refused(f"the data of tensor {quoted(tensor.name)} overlaps the one before it")
            at = tensor.begin + tensor.nbytes
        if start + at > self._size:
            raise self._refused(
                f"its header describes {start + at:,} bytes, but it has {self._size:,}: it is cut short"
            )

    def _value(self, kind: int, kept: bool) -> float | str | None:
        """One value of the metadata, None where it is a list or text that is not ``kept``: those are walked past."""
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT and kept:
            return self._text()
        if kind == _TEXT:
            self._skip(self._whole("<Q"))
            return None
        if kind != _LIST:
            raise self._refused(f"its metadata holds a value of the unknown type {kind}")
        of, count = self._whole("<I"), self._whole("<Q")
        self._values += count
        if self._values > MAX_VALUES:
            raise self._refused(f"its metadata has more than {MAX_VALUES:,} values, which no model needs")
        if of in _NUMBERS:
            self._skip(count * struct.calcsize(_NUMBERS[of]))
        elif of == _TEXT:
            for _ in range(self._held(count, 8)):
                self._skip(self._whole("<Q"))
        else:
            raise self._refused(f"its metadata holds a list of the type {of}, which no model needs")
        return None

    def _text(self) -> str:
        length = self._whole("<Q")
        if length > 65_535:
            raise self._refused(f"a name in it has {length:,} bytes")
        try:
            return self._read(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._refused("a name in it is not UTF-8 text") from None

    def _number(self, form: str) -> float:
        number: float = struct.unpack(form, self._read(struct.calcsize(form)))[0]
        return number

    def _whole(self, form: str) -> int:
        return int(self._number(form))

    def _held(self, count: int, least: int) -> int:
        """``count``, where the rest of the file can hold as many things of ``least`` bytes."""
        if count * least > self._size - self._stream.tell():
            raise self._refused(f"it promises {count:,} entries where its {self._size:,} bytes cannot hold them")
        return count

    def _read(self, length: int) -> bytes:
        data = self._stream.read(self._held(length, 1))
        if len(data) < length:
            raise self._refused(f"it is cut short at byte {self._stream.tell():,}")
        return data

    def _skip(self, length: int) -> None:
        self._stream.seek(self._held(length, 1), 1)

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {what}; {AGAIN}")
