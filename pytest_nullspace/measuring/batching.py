"""How many windows share a forward: as many as suit a CPU, and on a card as many as its first forwards tell."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU_TOKENS, GPU_TOKENS = 256, 16384
"""Tokens of the windows that share a forward. Below so many a CPU spends its time between the matrix products, beyond
them little is gained (docs/cost.md); a GPU begins with more, as far as they fit."""

PREDICTED = 1 << 28
"""Numbers that the predictions of the first forwards may be, where the base's are held against them."""

LARGEST, MOST_PREDICTED = 1 << 17, 1 << 31
"""Tokens of a forward, and numbers of its predictions where they are kept, beyond which none is tried."""

GAIN = 1.05
"""How many times as many tokens a second twice as many windows must read to be worth their memory."""


def suiting(device: "torch.device", seqlen: int, predicted: int) -> int:
    """Windows of so many tokens that suit the ``device``; how many fit, and gain, is found out by trying.

    Args:
        device: Where the model runs.
        seqlen: Tokens of a window.
        predicted: Numbers that are predicted of each token and kept; 0 where none are.
    """
    tokens = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return max(1, min(tokens, PREDICTED // max(1, predicted)) // seqlen)


class Batching:
    """The number of windows of a forward, found out while they are read.

    Each size that is tried runs twice: in its first forward memory is set aside and kernels are chosen, the second is
    timed. It is doubled until that gains too little, or does not fit. What is tried is read and counted like all else.

    Attributes:
        size: How many windows the next forward takes.
        first: How many the first took.
    """

    def __init__(self, size: int, clock: Callable[[], float] | None = None, largest: int = LARGEST) -> None:
        """Begin with so many windows.

        Args:
            size: They.
            largest: Tokens beyond which no forward is tried.
            clock: Gives seconds, with all done that was given to the device before; None where the size is to stay.
        """
        self.size, self.first, self._clock, self._largest = size, size, clock, largest
        self._is_warm, self._before = False, 0.0

    @classmethod
    def trying(cls, size: int, device: "torch.device", predicted: int = 0) -> "Batching":
        """With so many windows at first, and on a card as many as gain.

        Args:
            size: They.
            device: Where the model runs.
            predicted: As `suiting` takes it.
        """
        largest = min(LARGEST, MOST_PREDICTED // max(1, predicted))
        return cls(size, None if device.type == "cpu" else lambda: _seconds(device), largest)

    def begin(self, windows: int) -> float | None:
        """When a forward of so many windows begins; None where it is not timed."""
        if self._clock is None or windows < self.size or not self._is_warm:
            return None
        return self._clock()

    def counted(self, windows: int, tokens: int, began: float | None) -> None:
        """Learn from a forward that was counted.

        Args:
            windows: How many it read.
            tokens: Of how many tokens together.
            began: What `begin` gave.
        """
        if self._clock is None or windows < self.size:
            return
        if began is None:
            self._is_warm = True
            return
        quick = tokens / max(self._clock() - began, 1e-9)
        if quick < GAIN * self._before:
            self.settle(self.size // 2)
        elif 2 * tokens > self._largest:
            self.settle(self.size)
        else:
            self.size, self._is_warm, self._before = 2 * self.size, False, quick

    def settle(self, size: int) -> None:
        """Take so many windows from now on, and try no more."""
        self.size, self._clock = size, None


def _seconds(device: "torch.device") -> float:
    import torch

    torch.accelerator.synchronize(device)
    return time.perf_counter()
