"""Several processes that share one measurement, as ``torchrun`` or ``accelerate launch`` starts them.

Each takes its share of the windows and adds what it summed to the others' sums, so that every one of them holds the
whole and comes to the same verdicts. Before they add they tell each other where they are: a process that failed, one
that is elsewhere, and a window that nobody read are errors of all of them.

Only where there are several processes does a function here import torch.
"""

import atexit
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pytest_nullspace.errors import MeasurementError, NullspaceError, OptionError, quoted

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long one process waits for another that neither answers nor dies."""

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class _Report(NamedTuple):
    """What a process tells the others when they meet."""

    error: str | None = None
    step: str = ""
    read: tuple[int, ...] = ()
    facts: Mapping[str, str] = {}
    found: Any = None


class HeardError(MeasurementError):
    """What ended the measurement of every process, and need not be told to them again."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that measure together; alone unless told otherwise.

    Attributes:
        rank: Its number; process 0 reports.
        size: How many there are.
        local: Its number among those of its machine, and that of the card which it takes.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Ranks":
        """What the launcher set.

        Raises:
            OptionError: It makes no sense.
        """
        size = _whole(environment, "WORLD_SIZE", 1)
        if size <= 1:
            return cls()
        unset = [name for name in _NAMES if not environment.get(name)]
        if unset:
            raise OptionError(
                f"WORLD_SIZE is {size}, but {', '.join(unset)} is not set; start the processes by torchrun, or unset "
                "WORLD_SIZE"
            )
        rank = _whole(environment, "RANK", 0)
        if rank >= size:
            raise OptionError(f"RANK is {rank}, but WORLD_SIZE is {size}; start the processes by torchrun")
        return cls(rank, size, _whole(environment, "LOCAL_RANK", 0))

    def share(self, windows: range) -> range:
        """The windows among ``windows`` that this process reads; the shares differ by one at most."""
        count = len(windows)
        return windows[count * self.rank // self.size : count * (self.rank + 1) // self.size]

    def add(self, step: str, windows: range, read: Sequence[int], *sums: "Tensor") -> None:
        """Add to ``sums``, in place, those of the other processes.

        Args:
            step: What was summed, in words that are the same in each process.
            windows: The windows of which all processes together shall hold the sums.
            read: Those of them that this process has read.
            sums: On the CPU or on a card.

        Raises:
            MeasurementError: A process failed, died or is elsewhere, or the windows that were read are not ``windows``.
        """
        if self.size == 1:
            reports = [_Report(read=tuple(read))]
        else:
            shapes = ", ".join(str(tuple(summed.shape)) for summed in sums)
            reports = self._meet(_Report(step=f"{step}, {shapes}", read=tuple(read)))
        together = sorted(window for report in reports for window in report.read)
        if together != list(windows):
            raise HeardError(f"{step}: {len(together)} windows were read, not the {len(windows)} that were asked for")
        if self.size > 1:
            from torch import distributed

            with _lost_told():
                for summed in sums:
                    distributed.all_reduce(summed)

    def told(self, step: str, found: T) -> list[T]:
        """What each process ``found``, in their order.

        Args:
            step: What was found, in words that are the same in each process.
            found: What this one found; it must be possible to pickle it.

        Raises:
            MeasurementError: A process failed, died or is elsewhere.
        """
        return [found] if self.size == 1 else [report.found for report in self._meet(_Report(step=step, found=found))]

    @contextmanager
    def joined(self) -> Iterator["Ranks"]:
        """Within this context the processes measure together, and what fails in one fails in all.

        Raises:
            MeasurementError: The processes cannot reach each other.
        """
        if self.size == 1:
            yield self
            return
        _join()
        try:
            yield self
        except HeardError:
            raise
        except Exception as error:
            told = str(error) if isinstance(error, NullspaceError) else f"{type(error).__name__}: {error}"
            with suppress(HeardError):  # of itself
                self._meet(_Report(error=told))
            raise

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Hold that all processes came to the end, with the same ``facts``, each a JSON value.

        Raises:
            MeasurementError: One did not.
        """
        if self.size == 1:
            return
        reports = self._meet(_Report(step="the end", facts={name: _digest(value) for name, value in facts.items()}))
        for rank, report in enumerate(reports):
            other = sorted({name for name, _ in report.facts.items() ^ reports[0].facts.items()})
            if other:
                raise HeardError(
                    f"process {rank} did not measure what process 0 did, for {', '.join(other)} differ; give all of "
                    "them the same options and files"
                )

    def _meet(self, report: _Report) -> list[_Report]:
        """The reports of all processes.

        Raises:
            HeardError: One of them failed or died, or they are not at the same step.
        """
        from torch import distributed

        reports: list[Any] = [None] * self.size
        with _lost_told():
            distributed.all_gather_object(reports, report)
        for rank, other in enumerate(reports):
            if other.error is not None:
                raise HeardError(f"process {rank} of {self.size} failed, so the others ended as well: {other.error}")
        for rank, other in enumerate(reports):
            if other.step != reports[0].step:
                raise HeardError(
                    f"process {rank} is at {quoted(other.step)}, process 0 at {quoted(reports[0].step)}: each must "
                    "measure the same in the same order; give all of them the same options, and -p no:randomly"
                )
        return reports


ALONE = Ranks()


def _whole(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise OptionError(f"the environment's {name} must be a whole number, not {quoted(text)}; unset it")
    return int(text)


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _join() -> None:
    """Make the group of the processes, once for all measurements; it is left when Python ends."""
    from torch import accelerator, distributed

    if distributed.is_initialized():
        return
    backends = ["cpu:gloo"]
    card = accelerator.current_accelerator(check_available=True)
    if card is not None and card.type in ("cuda", "xpu"):
        backends.append(f"{card.type}:{distributed.get_default_backend_for_device(card)}")
    try:
        distributed.init_process_group(",".join(backends), timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise HeardError(
            f"the processes cannot meet at {where} (MASTER_ADDR, MASTER_PORT): {error}; start them all by torchrun"
        ) from None
    atexit.register(_leave)


def _leave() -> None:
    """Leave the group, process 0 first: a launcher ends the others as soon as one ended red, and it has to report."""
    import torch
    from torch import distributed

    sys.stdout.flush()
    if distributed.get_rank() > 0:
        with suppress(RuntimeError):  # process 0 sends nothing, but the wait ends with it
            distributed.recv(torch.empty(1), src=0)
    distributed.destroy_process_group()


@contextmanager
def _lost_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise HeardError(
            f"another process died, perhaps out of memory, or did not answer for {TIMEOUT}: {first}; look at what it "
            "printed"
        ) from None
