"""Which rows of what a layer reads are which tokens of which window.

Most layers read ``(windows, tokens, width)``. XLNet's read the tokens first, Longformer's too, and padded to its
window; an expert reads what was routed to it, a pooler one row a window, and DeBERTa's query projection its table of
distances besides.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pytest_nullspace.measuring import tiles
from pytest_nullspace.measuring.transfer import sent
from pytest_nullspace.model.ends import ends_of
from pytest_nullspace.text.windows import Shown


@dataclass(frozen=True)
class Batch:
    """Windows of equal length that share a forward.

    Attributes:
        tokens: Shape ``(b, length)``.
        first: The number of the first window.
        rows: The numbers of the counted rows among the ``b · length``, or None for all.
        counts: How many of them each window has.
        chosen: Whether the counted rows are meant and no others, be they as many and spread alike.
        beside: What the model reads beside the tokens, that of one window behind that of another.
    """

    tokens: Tensor
    first: int
    rows: Tensor | None
    counts: list[int]
    chosen: bool = False
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        windows: Sequence[Sequence[int]],
        device: torch.device,
        first: int = 0,
        rows: Sequence[Sequence[int]] | None = None,
        chosen: bool = False,
    ) -> "Batch":
        """The batch of ``windows`` of equal length.

        Args:
            windows: Their token ids; of rows with images those of one form.
            device: Where they go.
            first: The number of the first.
            rows: The places in each of the counted rows, or None for all.
            chosen: Whether these are meant and no others.
        """
        tokens = sent([list(window) for window in windows], device)
        length = tokens.shape[1]
        parts = [window.beside() for window in windows if isinstance(window, Shown)]
        beside = {name: torch.cat([part[name] for part in parts]).to(device) for name in (parts[0] if parts else ())}
        if rows is None:
            return cls(tokens, first, None, [length] * len(windows), beside=beside)
        counted = [position * length + row for position, of in enumerate(rows) for row in of]
        return cls(tokens, first, sent(counted, device), list(map(len, rows)), chosen, beside)


@dataclass(frozen=True)
class Layout:
    """What the rows of one call of a layer are.

    Attributes:
        size: How many there are in all.
        index: The numbers of the counted ones, window after window; None where all count as they lie.
        counts: How many of these each window has, or all together where it is not known whose they are.
        whole: Whether they are the rows of all tokens, or of those that were routed there.
    """

    size: int
    index: Tensor | None
    counts: tuple[int, ...]
    whole: bool = True

    def counted(self, values: Tensor) -> Tensor:
        """The counted rows of ``values (…, d)``, shape ``(n, d)``; all rows of what is of another size."""
        values = values.flatten(0, -2)
        if self.index is None or len(values) != self.size:
            return values
        return values.index_select(0, self.index.to(values.device))


class _Parts(NamedTuple):
    """Of a model that sees images: the modules that read tokens, by id, and how many patches a tile has."""

    readers: frozenset[int]
    patches: int | None


class Rows:
    """Tells the layouts of a batch."""

    def __init__(self) -> None:
        self._batch = Batch(torch.empty(0, 0), 0, None, [])
        self._lengths: list[int] = []
        self._known: dict[tuple[tuple[int, ...], bool, bool | None], Layout | None] = {}
        self._parts: Callable[[], _Parts] = lambda: _Parts(frozenset(), None)

    def start(self, batch: Batch) -> None:
        """From here on tell of ``batch``; if it is the one that is told of, nothing known of it is forgotten."""
        if batch is self._batch:
            return
        self._batch, self._lengths = batch, [batch.tokens.shape[1]]
        self._known.clear()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within this context it is known what of ``model`` reads tokens, and, by what is embedded, its padding."""
        self._parts = cache(lambda: _Parts(_readers(model), tiles.patches_of(model)))
        with ExitStack() as hooks:
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    hooks.callback(module.register_forward_pre_hook(self._see).remove)
            yield

    def layout(self, shape: torch.Size, *, routed: bool = False, layer: nn.Module | None = None) -> Layout | None:
        """The rows of an input of this ``shape (…, d)``; None where it cannot be told which are of the text.

        Args:
            shape: Of the layer's input.
            routed: Whether the layer reads only what is routed to it.
            layer: It, where it may read parts of images.
        """
        sees = None
        if self._batch.beside and layer is not None and (readers := self._parts().readers):
            sees = id(layer) not in readers
        key = tuple(shape[:-1]), routed, sees
        if key not in self._known:
            self._known[key] = self._layout(*key)
        return self._known[key]

    def _see(self, _: nn.Module, args: Any) -> None:
        ids, tokens = args[0] if args else None, self._batch.tokens
        length = tokens.shape[-1]
        if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != len(tokens) or ids.shape[1] <= length:
            return
        if ids.shape[1] in self._lengths or not torch.equal(ids[:, :length], tokens.to(ids)):
            return
        if bool((ids[:, length:] == ids[0, length]).all()):  # one and the same token behind each window
            self._lengths.append(ids.shape[1])
            self._known.clear()

    def _layout(self, shape: tuple[int, ...], routed: bool, sees: bool | None) -> Layout | None:
        windows, length = self._batch.tokens.shape
        if tiles.MASK in self._batch.beside and sees is not False:
            return self._of_tiles(math.prod(shape)) if sees else None
        if self._batch.beside and (sees is not False or not self._batch.chosen):
            return self._beside(math.prod(shape), routed, sees)
        match shape:
            case (rows,) if routed:
                return self._routed(rows)
            case (rows,):
                for padded in self._lengths:
                    if rows == windows * padded:
                        return self._of_windows(padded, length)
                return self._of_windows(1, 1) if rows == windows else self._routed(rows)
            case (first, second):
                if first == second == windows > 1:
                    return None
                for padded in self._lengths:
                    if shape in ((windows, padded), (padded, windows)):
                        return self._of_windows(padded, length, tokens_first=first != windows)
                fewer = second if first == windows else first
                if routed:
                    return self._routed(first * second)
                if windows in shape and fewer < length:
                    return self._of_windows(fewer, fewer, tokens_first=first != windows)
                return None
            case _:
                each = math.prod(shape) // windows
                told = shape[:1] == (windows,) or windows == 1
                return self._of_windows(each, each, whole=True) if told and not each % length else None

    def _of_tiles(self, rows: int) -> Layout | None:
        """Of windows with images in tiles, without the padding; of drawn rows the same share of them."""
        batch = self._batch
        numbers = tiles.counted(batch.beside[tiles.MASK], rows, self._parts().patches)
        if numbers is None:
            return None
        if batch.rows is not None and not batch.chosen:
            numbers = tiles.drawn(numbers, batch.rows, batch.tokens.shape[1])
        return Layout(rows, torch.cat(numbers), tuple(map(len, numbers)))

    def _beside(self, rows: int, routed: bool, sees: bool | None) -> Layout | None:
        """Of windows with images, whose rows lie one window's behind another's, be they tokens or parts of images.

        Where some tokens are chosen, all parts of images count; what reads neither for certain is told of nobody.
        """
        windows = len(self._batch.tokens)
        if self._batch.chosen:
            return Layout(rows, None, (rows // windows,) * windows) if sees and not rows % windows else None
        if windows == 1:
            layout = self._routed(rows)
            return None if layout is None else replace(layout, whole=not routed)
        return None if routed or rows % windows else self._of_windows(rows // windows, rows // windows, whole=True)

    def _of_windows(
        self, each: int, kept: int, *, tokens_first: bool = False, whole: bool | None = None
    ) -> Layout | None:
        """Of ``each`` rows that every window has, the first so many, as far as they are counted."""
        windows, length = self._batch.tokens.shape
        rows, size = self._batch.rows, windows * each
        whole = kept == length if whole is None else whole
        if rows is None and kept == each and (windows == 1 or not tokens_first):
            return Layout(size, None, (kept,) * windows, whole)
        numbers = torch.arange(size, device=self._batch.tokens.device)
        numbers = numbers.view(each, windows).mT if tokens_first else numbers.view(windows, each)
        numbers = numbers[:, :kept].reshape(-1)
        if rows is None:
            return Layout(size, numbers, (kept,) * windows, whole)
        if kept == length:
            return Layout(size, numbers[rows], tuple(self._batch.counts), whole)
        if self._batch.chosen:
            return None
        # Where a window has fewer rows than tokens, or more, the same share of them is counted, spread alike.
        share: Tensor = (rows // length * kept + rows % length * kept // length).unique()  # type: ignore[no-untyped-call]
        return Layout(size, numbers[share], tuple((share // kept).bincount(minlength=windows).tolist()), whole)

    def _routed(self, rows: int) -> Layout | None:
        """An expert sees only the rows that were routed to it: which of several windows they are of nobody knows."""
        if rows and (len(self._batch.tokens) > 1 or self._batch.chosen):
            return None
        if self._batch.rows is None or not rows:
            return Layout(rows, None, (rows,))
        share = (self._batch.rows * rows // self._batch.tokens.numel()).unique()  # type: ignore[no-untyped-call]
        return Layout(rows, share, (len(share),))


def is_routed(name: str) -> bool:
    """Whether a layer of that name is an expert's, to which a router gives some rows of each window."""
    return "expert" in name and "shared_expert" not in name


def _readers(model: nn.Module) -> frozenset[int]:
    """The modules of a model that sees images which read its tokens, by id; none where nobody can tell them apart."""
    parts: list[Any] = []
    for name, how in (("get_decoder", {}), ("get_encoder", {"modality": "image"})):
        try:
            parts.append(getattr(model, name)(**how))
        except (AttributeError, NotImplementedError, TypeError, ValueError):  # of a model that has neither
            return frozenset()
    decoder, tower = parts
    inside = frozenset(map(id, decoder.modules())) - tiles.read_by(decoder)
    if decoder is model or tower is model or id(tower) in inside:
        return frozenset()
    return inside | {id(module) for end in ends_of(model) if end is not None for module in end.modules()}
