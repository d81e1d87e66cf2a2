"""The bytes of tensors from their files: unbuffered, counted, and those of a model's first block before it is there."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from io import FileIO
from mmap import mmap
from pathlib import Path

from pytest_nullspace.checkpoint.header import AGAIN, TensorInfo, printable
from pytest_nullspace.errors import CheckpointError

Span = Sequence[TensorInfo]
"""Tensors of one type, one of which lies behind the other, so that they can be read as one."""
AT_ONCE = 1 << 24
"""Bytes of one read, and of a span of several tensors at most."""
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")
"""Of the name of a tensor the outermost list in which it lies, and in which of its elements."""


class RawFiles:
    """Files that stay open while tensors are read from them.

    Attributes:
        bytes_read: So many, of all tensors together.
        read_by: Given each piece of a file that was read: which file, from which byte on, and the bytes.
    """

    def __init__(self) -> None:
        """Open nothing yet."""
        self.bytes_read = 0
        self.read_by: Callable[[Path, int, memoryview], object] = lambda *_: None
        self._files: dict[Path, tuple[FileIO, int]] = {}
        self._open = ExitStack()

    def offset(self, span: Span) -> int:
        """From which byte of its file on a span lies."""
        return self._opened(span[0].file)[1] + span[0].begin

    def read(self, span: Span, place: memoryview) -> None:
        """Read a span into a ``place`` of its size.

        Raises:
            CheckpointError: It cannot be read.
        """
        file, done = span[0].file, 0
        try:
            begin, stream = self.offset(span), self._opened(file)[0]
            stream.seek(begin)
            while done < len(place) and (got := stream.readinto(place[done : done + AT_ONCE])):
                self.read_by(file, begin + done, place[done : done + got])
                done += got
                self.bytes_read += got
        except OSError as error:
            raise CheckpointError(f"{file}: the weights cannot be read: {error.strerror}; {AGAIN}") from None
        if done < len(place):
            cut = next(info for info in span if info.begin + info.nbytes > span[0].begin + done)
            raise CheckpointError(f"{file}: ends before its tensor {printable(cut.name)} does; {AGAIN}")

    def close(self) -> None:
        """Close them; they are opened again when they are read."""
        self._files.clear()
        self._open.close()

    def _opened(self, file: Path) -> tuple[FileIO, int]:
        """The file, unbuffered so that no byte is read for nothing, and where its data begin."""
        if file not in self._files:
            stream = self._open.enter_context(FileIO(file))
            self._files[file] = stream, 8 + int.from_bytes(stream.read(8), "little")
        return self._files[file]


class Early:
    """Reads what is likely a model's first block in a thread, while libraries are imported and the model is built.

    Which tensors these are is told by their names alone, so they may be others: then they were read for nothing.
    """

    def __init__(self, tensors: Callable[[], Iterable[TensorInfo]]) -> None:
        """Begin nothing yet; ``tensors`` gives all of the model."""
        self._tensors = tensors
        self._files = RawFiles()
        self._files.read_by = self._require_asked
        self._coming: dict[tuple[Path, int, int], Future[memoryview]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._is_over = False

    @property
    def bytes_read(self) -> int:
        """So many of the files."""
        return self._files.bytes_read

    def begin(self) -> None:
        """Begin, unless that was done."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "nullspace-early")
            for span in spans(info for info in first_block(self._tensors()) if info.nbytes):
                self._coming[_place(span)] = self._reader.submit(self._read, span)

    def taken(self, span: Span) -> memoryview | None:
        """The bytes of a span, waited for; None where it is not among them, or could not be read."""
        coming = self._coming.get(_place(span))
        with suppress(Exception):  # were it too little memory: who reads it in the place of this tells what is wrong
            return None if coming is None else coming.result()
        return None

    def end(self) -> None:
        """Let go of all of it, and read no more."""
        self._is_over = True
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        self._coming.clear()
        self._files.close()

    def _read(self, span: Span) -> memoryview:
        # Not from the heap of this thread, which nothing would give back once it is freed.
        values = memoryview(mmap(-1, sum(info.nbytes for info in span)))
        self._files.read(span, values)
        return values

    def _require_asked(self, *_: object) -> None:
        """After each piece: no more where nobody waits for it."""
        if self._is_over:
            raise CancelledError


def _place(span: Span) -> tuple[Path, int, int]:
    return span[0].file, span[0].begin, span[-1].begin + span[-1].nbytes


def spans(tensors: Iterable[TensorInfo]) -> list[list[TensorInfo]]:
    """All of them in the order of their files, those together that can be read as one: few large reads for a block."""
    found = list[list[TensorInfo]]()
    for info in sorted(tensors, key=lambda info: (info.file, info.begin)):
        first, last = (found[-1][0], found[-1][-1]) if found else (info, info)
        follows = (info.file, info.dtype, info.begin) == (last.file, last.dtype, last.begin + last.nbytes)
        if found and follows and info.begin + info.nbytes - first.begin <= AT_ONCE:
            found[-1].append(info)
        else:
            found.append([info])
    return found


def first_block(tensors: Iterable[TensorInfo]) -> Sequence[TensorInfo]:
    """Those of the lowest number in the list that has most bytes, by their names."""
    stacks: defaultdict[str, defaultdict[int, list[TensorInfo]]] = defaultdict(lambda: defaultdict(list))
    for tensor in tensors:
        if found := _NUMBERED.match(tensor.name):
            stacks[found[1]][int(found[2])].append(tensor)
    if not stacks:
        return ()
    stack = max(stacks.values(), key=lambda stack: sum(tensor.nbytes for of in stack.values() for tensor in of))
    return stack[min(stack)]
