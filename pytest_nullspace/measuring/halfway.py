"""What a streamed measurement has so far, kept in a folder: a run that was killed goes on from its last block.

One file takes the place of the last after each block. It holds the figures of the blocks that are done and, of each
forward, what the last of them gave. The file is named by its own SHA-256 and tells what it follows from, so nothing is
gone on with that is not whole, or of other files, texts, options or versions.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from pytest_nullspace.measuring.distributed import HeardError
from pytest_nullspace.measuring.recorder import Recorder
from pytest_nullspace.measuring.stowed import SUFFIX, OddError, stow, stowed
from pytest_nullspace.measuring.streaming import Seen
from pytest_nullspace.measuring.summing import OCTAVES
from pytest_nullspace.measuring.waiting import Call
from pytest_nullspace.measuring.written import cache_folder
from pytest_nullspace.model.shelved import Norms

GRACE, SHARE = 1.0, 0.05
"""Seconds, and the share of all time, that keeping may take; where it takes more not every block is kept."""
_ENDED = "an earlier run did not come to its end"


Filled = tuple[Tensor, Tensor]
"""The places ``(n, 2)`` of the rows of a tensor ``(l, o, s)`` that are not zero, and these rows, ``(n, s)``."""


def filled(values: Tensor) -> Filled:
    """What is to be kept of a tensor that is mostly zero, so that it takes memory by what it holds."""
    places = (values != 0).any(dim=-1).nonzero()
    return places, values[*places.T]


def whole(layers: int, of: Filled) -> Tensor:
    """The tensor of so many ``layers`` of which that was kept."""
    places, rows = of
    values = rows.new_zeros(layers, *OCTAVES)
    values[*places.T] = rows
    return values


@dataclass
class OfPart:
    """What was taken of the layers on a part of a text, in few tensors that grow with each block.

    What is small and kept apart for each block would lie amid activations that are freed, and let the heap grow.

    Attributes:
        names: The layers, as they came.
        sums: What `Recorder.taken` gives.
        by_octave: Likewise, of which `filled` gives what is kept: the most octaves have no row.
        distinct: What `Recorder.distinct` gives.
        unplaced: Of each layer, in how many windows its rows had no place.
        down_ranks: How many directions the rows of their B span.
    """

    names: list[str] = field(default_factory=list)
    sums: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    by_octave: Filled = field(default_factory=lambda: filled(torch.empty(0, *OCTAVES, dtype=torch.float64)))
    distinct: dict[str, Tensor | None] = field(default_factory=dict)
    unplaced: dict[str, int] = field(default_factory=dict)
    down_ranks: dict[str, int] = field(default_factory=dict)

    @property
    def seen(self) -> Seen:
        """What their rows were."""
        return self.distinct, self.unplaced

    def add(self, layers: Sequence[str], recorder: Recorder, windows: range) -> None:
        """Add what ``recorder`` took of these ``layers`` on these ``windows``."""
        sums, by_octave = recorder.taken(windows)
        places, rows = filled(by_octave)
        places[:, 0] += len(self.names)
        self.by_octave = torch.cat((self.by_octave[0], places)), torch.cat((self.by_octave[1], rows))
        self.sums = torch.cat((self.sums, sums))
        self.names += layers
        self.distinct |= recorder.distinct()
        self.unplaced |= recorder.unplaced
        self.down_ranks |= recorder.down_ranks


@dataclass
class Pass:
    """A pass through all blocks, as far as it came.

    Attributes:
        parts: The windows of each text that it reads.
        extras: How many forwards are beside them.
        batches: The batch sizes so far.
        read: What was taken on each part.
        norms: Those of the weights of each layer.
        blocks: How many blocks are done.
        answers: Of each forward what the last of them gave.
        met: What `told_of` says of what the first forward gives to the next.
        compared: Once it ended, of each part the predictions of each batch, by its first window.
        taken: Then, what was taken of each forward beside.
        ended: Whether it did.
    """

    parts: list[tuple[int, int]]
    extras: int
    batches: list[int]
    read: list[OfPart]
    norms: dict[str, Norms] = field(default_factory=dict)
    blocks: int = 0
    answers: list[Any] = field(default_factory=list)
    met: str = ""
    compared: list[list[tuple[int, Tensor]]] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)
    ended: bool = False


class _OtherError(Exception):
    """What was kept is not gone on with; the message is why, in a clause."""


class Halfway:
    """The passes of a measurement so far, in memory and, where there is a folder, in a file.

    Attributes:
        told: What the report is to say of it, in clauses.
    """

    def __init__(self, folder: Path | None = None, of: Mapping[str, str] | None = None) -> None:
        """Find what an earlier run left in ``folder``, if it followed from the very same, which ``of`` digests."""
        self.told: list[str] = []
        self._folder, self._of = folder, dict(of or {})
        self._passes: list[Pass] = []
        self._left = [] if folder is None else self._found(folder)
        self._began, self._spent = time.perf_counter(), 0.0

    def begin(self, parts: Sequence[range], extras: int, batches: list[int], blocks: int) -> Pass:
        """The next pass as an earlier run left it, or at its beginning.

        Args:
            parts: The windows of each text that it reads.
            extras: How many forwards are beside them.
            batches: The batch sizes so far; afterwards those of the earlier run.
            blocks: How many blocks it goes through.
        """
        spans = [(part.start, part.stop) for part in parts]
        if self._left and (self._left[0].parts, self._left[0].extras) != (spans, extras):
            self._left.clear()
            self.told.append(f"{_ENDED} and read other windows, so it begins anew")
        if self._left:
            found = self._left.pop(0)
            batches[:], found.batches = found.batches, batches
            if not self._left:
                of_pass = f" of pass {len(self._passes) + 1}" if self._passes else ""
                self.told.append(f"{_ENDED}, so it goes on after block {found.blocks} of {blocks}{of_pass}")
        else:
            found = Pass(spans, extras, batches, [OfPart() for _ in parts])
        self._passes.append(found)
        return found

    def again(self, *, went_on: bool) -> None:
        """Let go of the pass under way, which is to begin anew; whether it ``went_on`` from an earlier run."""
        self._passes.pop()
        if went_on:
            self._left.clear()
            self.told[:] = [f"{_ENDED}, and its model cannot be brought back to where it was, so it begins anew"]

    @property
    def is_due(self) -> bool:
        """Whether the passes are to be kept now."""
        return self._folder is not None and self._spent <= GRACE + SHARE * (time.perf_counter() - self._began)

    def keep(self) -> None:
        """Put the passes, as they are now, into the place of what was kept; where that fails no more is kept."""
        if self._folder is None:
            return
        began = time.perf_counter()
        try:
            stow(self._folder, {"of": self._of, "passes": list(map(_plain, self._passes))})
        except (OSError, OddError) as error:
            self.told.append(f"what it has so far cannot be kept in {self._folder}, for {error}")
            _emptied(self._folder)
            self._folder = None
        self._spent += time.perf_counter() - began

    def _found(self, folder: Path) -> list[Pass]:
        """The passes of an earlier run, the last of which may not have ended."""
        kept = [file for file in folder.iterdir() if file.suffix == SUFFIX]
        found, why = list[list[Pass]](), " and what it kept is not whole"
        for told in (stowed(file) for file in kept):
            if told is not None:
                try:
                    found.append(self._passes_of(told))
                except _OtherError as error:
                    why = str(error)
        if found:
            return max(found, key=lambda passes: [(of.ended, of.blocks) for of in passes])
        if kept:
            self.told.append(f"{_ENDED}{why}, so it begins anew")
        _emptied(folder)
        return []

    def _passes_of(self, told: Any) -> list[Pass]:
        """The passes in what was kept, whatever that is.

        Raises:
            _OtherError: It follows from something else, or has another form than it would have today.
        """
        try:
            of, passes = told["of"], told["passes"]
            changed = [name for name, digest in self._of.items() if of.get(name) != digest]
            found = [] if changed else list(map(_pass, passes))
        except Exception:
            raise _OtherError(" and what it kept has another form") from None
        if changed:
            raise _OtherError(f", but its {' and '.join(changed)} were others")
        return found


@contextmanager
def keeping(checkpoint: Path, rank: int, of: Mapping[str, str]) -> Iterator[Halfway]:
    """Within this context a run of ``checkpoint`` keeps what it has so far, which goes once it ended by itself.

    It stays where the process was killed or interrupted, or another one with which it measures was.

    Args:
        checkpoint: The directory of what is measured, which has one folder for each process.
        rank: Which of several processes this is.
        of: Digests of all that its figures follow from, by what that is in words.
    """
    name = hashlib.sha256(os.fsencode(checkpoint.absolute())).hexdigest()[:24]
    folder = cache_folder() / "streamed" / f"{name}-{rank}"
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(folder.with_suffix(".lock"), timeout=0))
            kept = Halfway(folder, of)
        except (OSError, Timeout) as error:
            kept = Halfway()
            kept.told.append(
                f"another run of it is under way, so this one keeps nothing in {folder}"
                if isinstance(error, Timeout)
                else f"what it has so far cannot be kept in {folder}, for {error}"
            )
            yield kept
            return
        try:
            yield kept
        except HeardError:
            raise
        except Exception:
            _gone(folder)
            raise
        _gone(folder)


def told_of(call: Call | None) -> str:
    """A digest of all that a module is given, by which it is known whether a forward came to the same again."""
    digest, seen = hashlib.sha256(), set[int]()

    def add(value: Any) -> None:
        digest.update(f"\n{type(value).__qualname__} ".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif value is None or isinstance(value, str | int | float | torch.dtype | torch.device):
            digest.update(repr(value).encode())
        elif isinstance(value, Mapping):
            for name, part in value.items():
                add(name)
                add(part)
        elif isinstance(value, Sequence):
            for part in value:
                add(part)
        elif not isinstance(value, nn.Module) and hasattr(value, "__dict__") and id(value) not in seen:
            seen.add(id(value))
            add(vars(value))

    if call is not None:
        add(call.args)
        add(call.kwargs)
    return digest.hexdigest()


def stand_ins(answer: Any) -> Any:
    """What stands for an answer that is no more: of its form and without numbers, so nothing follows from it."""
    if isinstance(answer, Tensor):
        return torch.empty_like(answer, device="meta")
    if isinstance(answer, dict):
        return {name: stand_ins(part) for name, part in answer.items()}
    return type(answer)(map(stand_ins, answer)) if isinstance(answer, list | tuple) else answer


def holds_stand_in(value: Any) -> bool:
    """Whether one of them, or what was made of one, is in ``value``."""
    if isinstance(value, Tensor):
        return value.is_meta
    if isinstance(value, Mapping):
        return any(map(holds_stand_in, value.values()))
    return isinstance(value, list | tuple) and any(map(holds_stand_in, value))


def _plain(of: Pass) -> dict[str, Any]:
    """A pass as what can be stowed."""
    return {**vars(of), "read": [dict(vars(part)) for part in of.read]}


def _pass(told: dict[str, Any]) -> Pass:
    """A pass that was stowed; some exception or other where it is none."""
    found = Pass(**told)
    if told.keys() != vars(found).keys() or len(found.read) != len(found.parts):
        raise ValueError
    found.read = [OfPart(**part) for part in told["read"]]
    for part, of in zip(found.read, told["read"], strict=True):
        if of.keys() != vars(part).keys() or len(part.sums) != len(part.names) or part.sums.dtype != torch.float64:
            raise ValueError
        whole(len(part.names), part.by_octave)
    return found


def _emptied(folder: Path) -> None:
    for file in folder.iterdir():
        with suppress(OSError):
            file.unlink()


def _gone(folder: Path) -> None:
    """Remove a folder and its lock, and what holds them once it is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.with_suffix(".lock").unlink()
        folder.parent.rmdir()
        folder.parent.parent.rmdir()
