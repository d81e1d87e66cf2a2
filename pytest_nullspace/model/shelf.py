"""A model whose blocks stay in their files and come into memory one at a time.

A block is an element of the outermost `torch.nn.ModuleList` that holds most of the numbers. Until it is put into its
place, and again once it is taken out, each of its weights is one NaN seen everywhere, so what computed with it shows.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pytest_nullspace.checkpoint.arrays import not_finite
from pytest_nullspace.checkpoint.header import TensorInfo
from pytest_nullspace.checkpoint.raw import Early, RawFiles, Span, spans
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.light import lighten

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class UnfitError(CheckpointError):
    """The blocks of a model cannot be run one after the other for all windows; the message is why, in a clause."""


class _Piece(NamedTuple):
    """A weight on the shelf: whose it is, where it lies, and what is in its place while it lies there."""

    module: nn.Module
    attribute: str
    info: TensorInfo
    empty: nn.Parameter


class Shelf:
    """Where the numbers of a model's blocks lie.

    Attributes:
        blocks: The blocks, in their order.
        device: Where a block runs.
        files: From which they are read.
        largest: Bytes of the largest block in memory.
        beside: Bytes of what stays in memory.
        early: Reads the first block before the model is there, where that was begun.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
        """Set up an empty shelf.

        Args:
            blocks: The blocks.
            device: Where they are to run.
            dtype: To what floating point weights are converted.
        """
        self.blocks, self.device, self.dtype = tuple(blocks), device, dtype
        self.largest = self.beside = 0
        self.files, self.early = RawFiles(), Early(tuple)
        self._pieces: list[list[_Piece]] = [[] for _ in self.blocks]
        self._block_of = {id(module): number for number, block in enumerate(self.blocks) for module in block.modules()}
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[list[Tensor]]] = {}
        self._finite: frozenset[str] = frozenset()

    def takes(self, model: nn.Module, name: str, info: TensorInfo) -> bool:
        """Whether the parameter of that name lies in a block; it is then read where its block is."""
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        value, number = module._parameters.get(attribute), self._block_of.get(id(module))
        if number is None or value is None or info.dtype not in _TYPES or info.transposed:
            self.beside += info.nbytes
            return False
        empty = _empty(value.dtype, value.shape)
        self._pieces[number].append(_Piece(module, attribute, info, empty))
        module.register_parameter(attribute, empty)
        size = sum(piece.empty.numel() * piece.empty.element_size() for piece in self._pieces[number])
        self.largest = max(self.largest, size)
        return True

    def require_finite(self, infos: Collection[TensorInfo]) -> list[TensorInfo]:
        """From here on refuse NaN and infinity in those that lie here, as they are read; gives the others."""
        held = {piece.info.name for pieces in self._pieces for piece in pieces}
        self._finite = frozenset(info.name for info in infos) & held
        return [info for info in infos if info.name not in held]

    def taken(self, info: TensorInfo) -> Tensor:
        """One tensor from its file, on the CPU, as it is to be computed with.

        Raises:
            CheckpointError: It cannot be read, or is one that has to be finite and is not.
        """
        return self._taken([info])[0]

    def pieces(self) -> Iterator[tuple[Path, int]]:
        """Of which file, and from which byte on, each span is in which the blocks are read."""
        for span in (span for pieces in self._pieces for span in spans(piece.info for piece in pieces)):
            yield span[0].file, self.files.offset(span)

    def read(self, number: int) -> list[Tensor]:
        """The weights of a block from their files; nothing of the model is changed, so a thread may do it."""
        values = dict[str, Tensor]()
        for span in spans(piece.info for piece in self._pieces[number]):
            values |= zip((info.name for info in span), self._taken(span), strict=True)
        return [values[piece.info.name] for piece in self._pieces[number]]

    def _taken(self, span: Span) -> list[Tensor]:
        sizes = [info.nbytes for info in span]
        early = self.early.taken(span)
        if early is None:
            held = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            self.files.read(span, held.numpy().data)
        else:
            held = torch.frombuffer(early, dtype=torch.uint8)
            self.files.read_by(span[0].file, self.files.offset(span), early)
        values = []
        for info, of in zip(span, torch.split(held, sizes), strict=True):
            value = of.view(_TYPES[info.dtype]).view(info.shape)
            if info.name in self._finite and not _is_finite(value):
                raise not_finite(info)
            values.append(value.to(self.dtype) if value.is_floating_point() else value)
        return values

    def ahead(self, number: int) -> None:
        """Begin to read a block in a thread, behind what that reads already, unless it was begun or there is none."""
        if number in self._ahead or number >= len(self.blocks):
            return
        if self._reader is None:
            threads = torch.get_num_threads()
            self._reader = ThreadPoolExecutor(1, "nullspace-reader")
            self._reader.submit(torch.set_num_threads, 1).result()  # what runs a block has the cores
            torch.set_num_threads(threads)
        self._ahead[number] = self._reader.submit(self.read, number)

    def ready(self, number: int) -> list[Tensor]:
        """The weights of a block, once they are read; what was begun of earlier ones is let go.

        Raises:
            CheckpointError: As `taken` does.
        """
        self.ahead(number)
        for earlier in [other for other in self._ahead if other < number]:
            self._ahead.pop(earlier).cancel()
        values = self._ahead.pop(number).result()
        self.early.end()
        return values

    def put(self, number: int, values: Sequence[Tensor]) -> None:
        """Put what was `read` of a block into its place, where it runs."""
        for piece, value in zip(self._pieces[number], values, strict=True):
            there = nn.Parameter(value.to(self.device, non_blocking=True), requires_grad=False)
            piece.module.register_parameter(piece.attribute, there)
        if self.device.type != "cpu":  # what is not on the shelf, such as buffers and PEFT's own, stays from now on
            self.blocks[number].to(self.device)

    def clear(self, number: int) -> None:
        """Let go of a block's weights."""
        for piece in self._pieces[number]:
            piece.module.register_parameter(piece.attribute, piece.empty)
        lighten(self.blocks[number])

    def close(self) -> None:
        """Close its files, which are opened again when they are read, and end the thread that reads ahead."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        self._reader = None
        self._ahead.clear()
        self.files.close()

    @property
    def bytes_read(self) -> int:
        """Of the files of the weights, all tensors together."""
        return self.beside + self.files.bytes_read + self.early.bytes_read


@cache
def _empty(dtype: torch.dtype, shape: torch.Size) -> nn.Parameter:
    """One NaN, or zero where there is none, seen everywhere: the same in the place of all weights of that shape."""
    return nn.Parameter(_nothing(dtype).expand(shape), requires_grad=False)


@cache
def _nothing(dtype: torch.dtype) -> Tensor:
    """It: one in all of memory."""
    return torch.full((1,), float("nan") if dtype.is_floating_point else 0, dtype=dtype)


def is_shelved(value: Tensor) -> bool:
    """Whether this is what stands in a place whose numbers lie in their files."""
    return not value.is_meta and value.data_ptr() == _nothing(value.dtype).data_ptr()


def _is_finite(value: Tensor) -> bool:
    """Whether all of it is, in one read and with no memory beside."""
    return not value.is_floating_point() or not value.numel() or bool(torch.stack(value.aminmax()).isfinite().all())


def stack_of(model: nn.Module) -> nn.ModuleList:
    """The outermost list of modules that holds the most numbers.

    Raises:
        UnfitError: There is none.
    """
    stacks, inner = list[nn.ModuleList](), set[int]()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inner:
            stacks.append(module)
            inner.update(map(id, module.modules()))
    if not stacks:
        raise UnfitError("it has no list of blocks")
    return max(stacks, key=lambda stack: sum(value.numel() for value in stack.parameters()))
