"""From the norms that were taken of the layers to the sums of each window: many layers, and all windows, at once.

What is taken is kept until enough layers have come together. Then each step is one operation over ``(layers, windows,
rows)``, so how many there are does not grow with the windows of a batch, and none of them waits for a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytest_nullspace import kernels
from pytest_nullspace.measuring.rows import Layout
from pytest_nullspace.measuring.transfer import sent

HELD_BYTES = 1 << 22
"""What may be kept of norms and narrow activations before they are summed."""

HELD_ELSEWHERE = 1 << 25
"""The same on a GPU, whose batches have more rows, and where each operation costs its start."""

_APART = ("input", "down", "update", "base", "output")
OCTAVES = (kernels.OCTAVES, 1 + len(_APART))
"""The shape of a layer's sums by octave: of rows, and of these norms."""


@dataclass(frozen=True)
class Taken:
    """What was taken of one layer in one forward.

    Attributes:
        number: Of the layer.
        layout: Which rows it read.
        norms: Of ``x``, ``W_res x``, the output and, where it is more than ``scale · A B x``, the update, and, where
            there is no ``down``, those of `kernels.narrow_norms`; shape ``(k, n)`` each, together ``(3 to 7, n)``.
        down: ``Bx``, shape ``(n, r)``, whose norms are yet to be taken, of many layers at once.
    """

    number: int
    layout: Layout
    norms: Sequence[Tensor]
    down: Tensor | None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What those have in common that can be summed together."""
        told = self.layout.counts, self.layout.whole
        down = () if self.down is None else (self.down.shape, self.down.dtype)
        return sum(map(len, self.norms)), self.norms[0].shape[1:], self.norms[0].dtype, down, *told

    @property
    def parts(self) -> list[Sequence[Tensor]]:
        """What takes memory."""
        return [self.norms] if self.down is None else [self.norms, [self.down]]

    @property
    def whole(self) -> Tensor:
        """All the norms, shape ``(3 to 7, n)``."""
        return self.norms[0] if len(self.norms) == 1 else torch.cat(list(self.norms))


class _Summed(NamedTuple):
    """The sums of a batch of some layers: of which, whether over the rows of its tokens, by window, by octave."""

    numbers: list[int]
    whole: bool
    by_window: Tensor
    by_octave: Tensor

    def only(self, numbers: set[int]) -> "_Summed":
        """The same of these layers alone."""
        kept = [place for place, number in enumerate(self.numbers) if number in numbers]
        if len(kept) == len(self.numbers):
            return self
        return _Summed([self.numbers[place] for place in kept], self.whole, self.by_window[kept], self.by_octave[kept])


class Summing:
    """The sums of all layers, and what is not yet added to them of the batch that is under way.

    Attributes:
        factors: The `kernels.Factors.matrices` of the layers, in the order of their numbers.
    """

    def __init__(self, device: torch.device, windows: int) -> None:
        self._device, self._windows = device, windows
        self.factors: Sequence[Tensor] = ()
        self._by_window = self._by_octave = torch.empty(0)
        self._held: list[Taken] = []
        self._memory = _Held(HELD_BYTES if kernels.at_hand(device) else HELD_ELSEWHERE, device)
        self._of_batch: list[_Summed] = []

    def start(self, layers: int) -> None:
        """From here on sum up so many layers."""
        shape = layers, self._windows, len(kernels.Sums._fields)
        self._by_window = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._by_octave = self._by_window.new_zeros(layers, *OCTAVES)

    def hold(self, taken: Taken) -> None:
        """Keep a copy of what was taken, or sum it up at once where there is no room for it."""
        if not self._memory.has_room(*taken.parts):
            self.sum_held()
        if not self._memory.has_room(*taken.parts):
            self._sum([taken])
            return
        norms, *down = map(self._memory.keep, taken.parts)
        self._held.append(replace(taken, norms=[norms], down=down[0] if down else None))

    def sum_held(self) -> None:
        """Sum up what is kept, the layers of one shape at once."""
        alike: dict[tuple[Any, ...], list[Taken]] = {}
        for taken in self._held:
            alike.setdefault(taken.shape, []).append(taken)
        for of_shape in alike.values():
            self._sum(of_shape)
        self.forget_held()

    def forget_held(self) -> None:
        """Let go of what is kept."""
        self._held.clear()
        self._memory.clear()

    def forget(self) -> None:
        """Let go of all of the batch."""
        self.forget_held()
        self._of_batch.clear()

    def of_tokens(self) -> set[int]:
        """The numbers of the layers of which the rows of the batch's tokens were summed up."""
        return {number for of in self._of_batch if of.whole for number in of.numbers}

    def count(self, first: int) -> None:
        """Add the sums of the batch, whose first window has that number, to those of all."""
        of_tokens = self.of_tokens()
        for of in self._of_batch:
            # An expert may run more than once a forward. Beside the tokens a layer may read what is none: distances.
            part = of if of.whole else of.only(set(of.numbers) - of_tokens)
            if part.numbers:
                index, windows = sent(part.numbers, self._device), part.by_window.shape[1]
                self._by_window[:, first : first + windows].index_add_(0, index, part.by_window)
                self._by_octave.index_add_(0, index, part.by_octave)

    def taken(self, windows: range) -> tuple[Tensor, Tensor]:
        """The sums of these ``windows``, and those by octave since they were last taken: of each layer, on the CPU."""
        sums, apart = self._by_window[:, windows.start : windows.stop], self._by_octave
        both = torch.cat((sums.flatten(1), apart.flatten(1)), dim=1).cpu()
        apart.zero_()
        split = torch.split(both, [sums[0].numel(), apart[0].numel()], dim=1)
        return split[0].reshape(sums.shape).contiguous(), split[1].reshape(apart.shape).contiguous()

    def _sum(self, taken: list[Taken]) -> None:
        norms = torch.stack([t.whole for t in taken], dim=1).to(self._device)
        if downs := [t.down for t in taken if t.down is not None]:
            down = torch.stack(downs).to(self._device)
            factors = torch.stack([self.factors[t.number] for t in taken])
            narrow = kernels.narrow_norms(down, factors)
            if not kernels.safe(narrow):
                narrow = kernels.narrow_norms(down.double(), factors)
            norms = torch.cat((norms, narrow))

        def named(norms: Tensor) -> dict[str, Tensor]:
            x, base, output, *change, down, projected, update = norms.unbind()
            update = change[0] if change else update
            parts = {"input": x, "down": down, "base": base, "output": output}
            return parts | {"update": update, "projected": projected}

        windows, rows = by_windows(norms, taken[0].layout.counts)
        whole = named(norms)
        by_octave = kernels.sums_by_octave(*(whole[name] for name in _APART))
        by_window = kernels.sums(**named(windows), rows=rows)
        self._of_batch.append(_Summed([t.number for t in taken], taken[0].layout.whole, by_window, by_octave))


def by_windows(norms: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """The norms ``(…, n)`` of rows that lie window after window, apart: shape ``(…, windows, most rows of one)``.

    Args:
        norms: Of all.
        counts: How many of the rows each window has.

    Returns:
        The norms, where a window has fewer rows than another with zeros after them, and which are rows, 1, and which
        are none, 0, shape ``(windows, most)``; None where all are.
    """
    if len(set(counts)) == 1:
        return norms.view(*norms.shape[:-1], len(counts), counts[0]), None
    index = _places(counts, norms.device)
    filled = torch.nn.functional.pad(norms, (0, 1)).index_select(-1, index.flatten())
    return filled.view(*norms.shape[:-1], *index.shape), (index < norms.shape[-1]).to(norms.dtype)


@lru_cache(maxsize=4)
def _places(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Which rows each window has, shape ``(windows, most)``; where it has fewer, one past the last of all."""
    places, most, before, total = [], max(counts), 0, sum(counts)
    for count in counts:
        places.append([*range(before, before + count), *[total] * (most - count)])
        before += count
    return sent(places, device)


class _Held:
    """Memory set aside for what is kept from layer to layer.

    Kept where it was allocated, amid wide activations that are freed, each small piece would stop their memory from
    being used again, and the heap would grow with every layer.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory, self._used = torch.empty(size, dtype=torch.uint8, device=device), 0

    def has_room(self, *wholes: Sequence[Tensor]) -> bool:
        """Whether copies of the ``wholes``, each of parts of one width, fit beside what is kept."""
        return self._used + sum(map(_padded, wholes)) <= len(self._memory)

    def keep(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of ``parts`` one below the other, for which there `has_room`."""
        size, rows = sum(part.nbytes for part in parts), sum(map(len, parts))
        free = self._memory[self._used : self._used + size]
        kept = free.view(parts[0].dtype).view(rows, *parts[0].shape[1:])
        self._used += _padded(parts)
        return torch.cat(list(parts), out=kept)

    def clear(self) -> None:
        """Forget all that is kept."""
        self._used = 0


def _padded(parts: Sequence[Tensor]) -> int:
    return -(-sum(part.nbytes for part in parts) // 64) * 64
