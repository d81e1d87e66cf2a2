"""How many distinct rows a layer's input has: fewer than it is wide leave some subspace perfectly quiet.

A row is known again by a few of its numbers and its norm, to bfloat16, as a model may round it otherwise beside other
rows. Where there are as many as the input is wide, no more are counted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from pytest_nullspace import kernels
from pytest_nullspace.measuring.transfer import fetched

COLUMNS = 32
"""Of the numbers of a row, how many it is known by."""

FIRST, TOGETHER = 2, 64
"""Times its input's width: so many prints of a store are nearly always enough; and of how many stores at once."""

AHEAD = 16
"""How many times as many prints as its input is wide a store on a GPU holds, before it looks which are distinct."""

_unique: Callable[[Tensor], Tensor] = torch.unique


class DistinctRows:
    """The distinct rows among those that were added, while they are fewer than the ``width`` of each.

    Attributes:
        enough: Whether they are as many.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._width, self._used, self.enough = width, 0, False
        # Set aside at once: what is small and kept amid activations that are freed lets the heap grow.
        self._kept = torch.empty((1 if kernels.at_hand(device) else AHEAD) * width, dtype=torch.int64, device=device)

    def add(self, prints: Tensor) -> None:
        """Add some rows by their `prints`; adding them again changes nothing, and a GPU is not waited for."""
        if self.enough:
            return
        device = self._kept.device
        prints = prints.to(device)
        # Where they may be enough a CPU looks at once: then no more need to be made.
        if self._used + len(prints) >= len(self._kept):
            prints, self._used = torch.cat((self._kept[: self._used], prints)), 0
            if kernels.at_hand(device):
                prints = _unique(prints)
                self.enough = len(prints) >= self._width
            else:
                prints = _first_distinct(prints, self._width)
        if self.enough:
            self._kept = self._kept[:0].clone()
        else:
            self._kept[self._used : self._used + len(prints)] = prints
            self._used += len(prints)

    def found(self) -> Tensor | None:
        """The prints of all distinct rows, on the CPU; None where they are as many as the input is wide."""
        found = _unique(self._kept[: self._used])
        return None if self.enough or len(found) >= self._width else found.cpu()

    def first(self) -> Tensor:
        """The first of the prints, of which as many as the input is wide may be distinct; none where they are fewer."""
        return self._kept[: min(self._used, FIRST * self._width) if self._used >= self._width else 0]

    def suffices(self, count: int) -> bool:
        """Whether so many distinct rows are as many as the input is wide."""
        return self.enough or count >= self._width


def all_found(stores: Iterable[DistinctRows]) -> Mapping[DistinctRows, Tensor | None]:
    """What each of ``stores`` has `found`; a GPU is waited for once for all that have enough among their first."""
    alike: dict[int, list[DistinctRows]] = {}
    for store in stores:
        alike.setdefault(len(store.first()), []).append(store)
    parts = [of[first : first + TOGETHER] for of in alike.values() for first in range(0, len(of), TOGETHER)]
    counts = fetched([_distinct(torch.stack([store.first() for store in part])) for part in parts])
    return {
        store: None if store.suffices(int(count)) else store.found()
        for part, of in zip(parts, counts, strict=True)
        for store, count in zip(part, of, strict=True)
    }


def _distinct(prints: Tensor) -> Tensor:
    """How many of each row of ``prints (s, n)`` are distinct, without waiting for the device."""
    values = prints.sort(dim=-1).values
    return (values[:, 1:] != values[:, :-1]).sum(dim=-1) + min(1, prints.shape[-1])


def _first_distinct(prints: Tensor, count: int) -> Tensor:
    """The smallest distinct of ``prints``, at most ``count``, shape ``(count,)``; the smallest again for what lacks."""
    values = prints.sort().values
    is_new = torch.nn.functional.pad(values[1:] != values[:-1], (1, 0), value=True)
    place = is_new.cumsum(0) - 1
    place = place.where(is_new & (place < count), count)
    return values[:1].repeat(count + 1).scatter_(0, place, values)[:count]


def together(found: Sequence[Tensor | None], width: int) -> int:
    """How many distinct rows of that ``width`` all processes `found`, no more than it; 0 where none found any."""
    parts = [part for part in found if part is not None]
    if not parts or len(parts) < len(found):
        return width if found else 0
    return min(len(_unique(torch.cat(parts))), width)


def prints(rows: Tensor, norms: Tensor) -> Tensor:
    """Numbers that are alike for rows that are, and only for these but for a rare chance.

    Args:
        rows: Shape ``(n, in)``, any floating point type.
        norms: Theirs, shape ``(n,)``.

    Returns:
        Shape ``(n,)``, int64.
    """
    columns, weights = _key(rows.shape[-1], rows.device)
    if (quick := kernels.fused(rows.device)) is not None and {rows.dtype, norms.dtype} <= {*quick.TAKEN}:
        found: Tensor = quick.prints(rows, norms, columns, weights)
        return found
    known = torch.cat((rows.index_select(-1, columns).bfloat16(), norms[:, None].bfloat16()), dim=-1)
    return (known.view(torch.int16) * weights).sum(dim=-1)


@cache
def _key(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which columns are looked at, and an odd weight for each and for the norm."""
    chance = torch.Generator().manual_seed(width)
    columns = torch.randperm(width, generator=chance)[:COLUMNS]
    weights = 2 * torch.randint(-(2**62), 2**62, (len(columns) + 1,), generator=chance) + 1
    return columns.to(device), weights.to(device)
