"""Whether a model fits where it is to run; where it does not, its blocks are streamed from their files, if they can be.

What holds tensors is imported inside functions.
"""

import math
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import TensorInfo
from pytest_nullspace.checkpoint.hub import tensors_of
from pytest_nullspace.checkpoint.raw import Early
from pytest_nullspace.errors import PREFIX, MeasurementError
from pytest_nullspace.measuring.inputs import sources
from pytest_nullspace.measuring.limits import vocabulary
from pytest_nullspace.measuring.loading import Bases, load, one_of
from pytest_nullspace.settings import STREAM, Settings
from pytest_nullspace.text.sources import SelfText

if TYPE_CHECKING:
    from pytest_nullspace.model import AdaptedModel, UnfitError

_UNITS = (1.0, "bytes"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")
ROOM = 0.9
"""The share of free memory that the weights of a model may take where it is loaded whole."""

_OF_INPUT, _OF_OUTPUT, _OF_CHUNK = 4, 4, 6
"""How many inputs and outputs of the widest layer are there at once while a batch goes through a block, and how often
the predictions of a chunk while it is compared."""
_AT_FIRST = 24 << 20
"""Bytes that the libraries take once something is computed."""


def load_fitting(
    checkpoint: Checkpoint,
    settings: Settings,
    device: Any,
    dtype: Any,
    base: Path | None,
    bases: Bases | None,
    initial: Checkpoint | None,
    early: Early,
    unfit: "UnfitError | None" = None,
) -> "AdaptedModel":
    """The checkpoint's model: whole, spread, or to be streamed where that is asked for or it does not fit.

    Args:
        checkpoint: Of which it is.
        settings: How it is measured.
        device: Where it runs.
        dtype: In which precision.
        base: The base of an adapter.
        bases: Keeps that for the next adapter.
        initial: The checkpoint from which training started.
        early: Reads the first block of what is streamed.
        unfit: Why it cannot be streamed, where that was tried.
    """
    from pytest_nullspace.model import UnfitError, load_model

    why = unfit
    if why is None:
        large = "" if settings.device_map == STREAM else _too_large(checkpoint, settings, base, device, dtype)
        if settings.device_map != STREAM and not large:
            return load(checkpoint, settings, device, dtype, base, bases)
        try:
            if more := _asks_for_more(checkpoint, settings, base, initial):
                raise UnfitError(more)
            early.begin()
            adapted = load_model(checkpoint, device, dtype, base, shelve=True)
            if settings.drift and adapted.switched_off is None:
                raise UnfitError("the base that its predictions are held against is another model")
            assert adapted.shelf is not None
            adapted.shelf.early = early
            return replace(adapted, remarks=(*adapted.remarks, f"{large}its blocks are read one after the other"))
        except UnfitError as error:
            why = error
    adapted = load(checkpoint, settings, device, dtype, base, bases)
    how = "loaded whole" if settings.device_map is None or settings.ranks.size > 1 else "spread"
    return replace(
        adapted, remarks=(*adapted.remarks, f"its blocks are not read one after the other, for {why}; {how}")
    )


@contextmanager
def first_read(
    checkpoint: Checkpoint, settings: Settings, base: Path | None, initial: Checkpoint | None, *, is_live: bool
) -> Iterator[Early]:
    """Within this context what reads the first block of what is streamed: at once where it is known that it will be."""

    def tensors() -> Iterable[TensorInfo]:
        if checkpoint.is_whole or (base is not None and base.is_file()):  # which are not streamed
            return ()
        return checkpoint.tensors.values() if base is None else tensors_of(base)

    early = Early(tensors)
    if settings.device_map == STREAM and not is_live and not _asks_for_more(checkpoint, settings, base, initial):
        early.begin()
    try:
        yield early
    finally:
        early.end()


def _asks_for_more(checkpoint: Checkpoint, settings: Settings, base: Path | None, initial: Checkpoint | None) -> str:
    """What needs the whole model at once, and was asked for, in a clause; empty where nothing does."""
    asks = {
        "spectrum": settings.spectrum, "suggest": settings.suggest, "init": initial is not None,
        "base": checkpoint.carries_base and base is not None, "merge": bool(settings.merge),
    }  # fmt: skip
    for name in (name for name, asked in asks.items() if asked):
        return f"{PREFIX}{name} asks for more than each of them once"
    if any(isinstance(source, SelfText) for source in sources(settings).values()):
        return "a text that the base writes itself takes a pass for each token"
    return ""


def _too_large(checkpoint: Checkpoint, settings: Settings, base: Path | None, device: Any, dtype: Any) -> str:
    """That the weights do not fit, as the beginning of a sentence; empty where they do, or where that is unknown."""
    free = _free(device)
    if settings.device_map is not None or free is None:
        return ""
    takes = _bytes(checkpoint, base, dtype.itemsize)
    if takes <= ROOM * free:
        return ""
    return f"its weights take {size(takes)}, and {size(free)} are free on {device}: "


def _bytes(checkpoint: Checkpoint, base: Path | None, itemsize: int) -> int:
    beside = [] if checkpoint.carries_base or base is None or base.is_file() else tensors_of(base)
    return sum(math.prod(tensor.shape) * itemsize for tensor in (*checkpoint.tensors.values(), *beside))


def _free(device: Any) -> int | None:
    """The bytes that are free there; None where that cannot be told."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    import psutil  # type: ignore[import-untyped]

    available: int = psutil.virtual_memory().available
    return available


def needed(adapted: "AdaptedModel", tokens: int, *, is_compared: bool) -> dict[str, int]:
    """The bytes that a streamed pass takes at most, by where: of the whole process in memory, and on the card if any.

    It can be told once all forwards wait for the first block, which was read: they, the libraries and what lies outside
    the blocks are there. What comes is one more block, and what one batch takes on its way.

    Args:
        adapted: The model, which has a shelf.
        tokens: Those of a batch.
        is_compared: Whether its predictions are held against the base's, which they are once no block is there.
    """
    import psutil
    import torch

    from pytest_nullspace.measuring.drift import rows_at_once

    shelf = adapted.shelf
    assert shelf is not None
    widths = [(layer.in_features, layer.out_features) for layer in adapted.layers.values()]
    wide, out = (max(of, default=0) for of in zip(*widths, strict=True)) if widths else (0, 0)
    on_the_way = tokens * shelf.dtype.itemsize * (_OF_INPUT * wide + _OF_OUTPUT * out)
    known = vocabulary(adapted.model) or 0
    each = 2 * tokens * shelf.dtype.itemsize + _OF_CHUNK * rows_at_once(shelf.device, max(1, known)) * 8
    predicted = each * known if is_compared else 0
    here: int = psutil.Process().memory_info().rss + _AT_FIRST
    if shelf.device.type == "cpu":
        return {"memory": here + max(shelf.largest + on_the_way, predicted - shelf.largest)}
    there = getattr(torch, shelf.device.type).memory_allocated(shelf.device) + max(
        shelf.largest + on_the_way, predicted
    )
    return {"memory": here + shelf.largest, str(shelf.device): there}


def require_room(
    adapted: "AdaptedModel",
    checkpoint: Checkpoint,
    windows: Collection[int],
    is_compared: bool,
    tokens: int,
    held: int,
    extra: int,
) -> None:
    """Refuse a streamed pass whose hidden states do not fit into what is free of memory, before a block is run.

    Args:
        adapted: The model, which has a shelf.
        checkpoint: Of which it is.
        windows: How many each text has.
        is_compared: Whether its predictions are held against the base's.
        tokens: How many all forwards read, the base's and others beside them.
        held: The bytes that those will be between two blocks.
        extra: How many of these are no windows of a text.

    Raises:
        MeasurementError: They do not fit.
    """
    import torch

    assert adapted.shelf is not None
    free, blocks = _free(torch.device("cpu")), 2 * adapted.shelf.largest
    together = os.environ.get("LOCAL_WORLD_SIZE", "1")  # how many processes of a launcher share this memory
    free = None if free is None else free // max(1, int(together) if together.isdecimal() else 1)
    if free is None or held + blocks <= free:
        return
    fewer = min(int(max(windows) * max(0, free - blocks - extra) / max(1, held - extra)), max(windows) - 1)
    cures = [f"give {PREFIX}calib-size={fewer}" if fewer else f"lower {PREFIX}calib-size", f"lower {PREFIX}seqlen"]
    cures += [f"give {PREFIX}no-drift"] if is_compared else []
    cures += ["gate on one text at a time"] if len(windows) > 1 else []
    raise MeasurementError(
        f"{checkpoint.directory}: too little memory to read its blocks one after the other: between two blocks all "
        f"windows wait, and their hidden states ({tokens} tokens, with what is read beside them) take {size(held)} "
        f"beside two blocks of {size(adapted.shelf.largest)}, but {size(free)} are free; "
        + one_of(*cures, "take a machine with more")
    )


def told_needed(adapted: "AdaptedModel", tokens: int, *, is_compared: bool) -> str:
    """The same in a sentence."""
    parts = [f"{size(count)} of {place}" for place, count in needed(adapted, tokens, is_compared=is_compared).items()]
    return f"the blocks are read one after the other; that takes up to {' and '.join(parts)}"


def size(count: float) -> str:
    """So many bytes, in words."""
    unit, name = max((of for of in _UNITS if of[0] <= count), default=_UNITS[0])
    return f"{count / unit:.3g} {name}"
