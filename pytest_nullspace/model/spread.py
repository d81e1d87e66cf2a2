"""A model larger than one device, spread by accelerate over several, over the CPU's memory and the disk.

What is kept off the device where it runs is brought there for each forward of its module, and in between is on the meta
device: whoever wants numbers outside a forward asks for them by `stored`.
"""

import logging
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.layers import AdaptedModel

Memory = Mapping[int | str, int]
"""The bytes that a model may take of each card, by its number, and of ``cpu``; what has no room lies on disk."""


def spread(adapted: AdaptedModel, memory: Memory) -> AdaptedModel:
    """Move a model that was loaded on the CPU to where it has room.

    Args:
        adapted: The model; its base is not kept for another adapter.
        memory: What it may take; what is left by others if empty.

    Raises:
        CheckpointError: It has a layer that cannot run so, or the disk has no room.
    """
    for layer in adapted.layers.values():
        if layer.is_whole:
            raise CheckpointError(
                f"{layer.name}: is of a whole model, which is measured beside its base and cannot be spread; leave "
                "--nullspace-device-map out"
            )
        if layer.update is not None:
            raise CheckpointError(
                f"{layer.name}: is a DoRA layer, which needs its whole weight beside it and cannot be spread; leave "
                "--nullspace-device-map out"
            )
        if layer.base_matrix() is None or type(layer.base.weight) not in (nn.Parameter, Tensor):
            raise CheckpointError(
                f"{layer.name}: has a quantised weight, which cannot be spread; leave --nullspace-device-map out"
            )
    take_off, device = _dispatch(adapted.model, memory)
    # What took it off before would bring the whole base back into memory.
    return replace(adapted, device=device, take_off=take_off)


def spread_plain(model: nn.Module, memory: Memory) -> torch.device:
    """The same of a model without adapter; gives where it takes its input."""
    return _dispatch(model, memory)[1]


def places(adapted: AdaptedModel) -> str:
    """Where the model lies, in words, the device that takes its input first."""
    over = getattr(adapted.model, "hf_device_map", None)
    return " and ".join(dict.fromkeys((str(adapted.device), *map(_device, over.values() if over else ()))))


def _device(place: Any) -> str:
    if not isinstance(place, int):
        return str(place)
    accelerator = torch.accelerator.current_accelerator()
    return f"{'cuda' if accelerator is None else accelerator.type}:{place}"


def _dispatch(model: nn.Module, memory: Memory) -> tuple[Callable[[], object], torch.device]:
    """Spread ``model``; gives what removes its files, which go with it at the latest, and where it takes its input."""
    from accelerate import dispatch_model

    with _unheard("accelerate.big_modeling", "accelerate.utils.modeling"):
        device_map = _device_map(model, memory)
        folder = mkdtemp(prefix="nullspace-offload-")
        remove = weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        try:
            is_away = set(device_map.values()) == {"disk"}  # which accelerate brings back by itself since 1.11 alone
            if is_away and "" in device_map:  # accelerate finds no weights under an empty name
                device_map = dict.fromkeys((name for name, _ in model.named_children()), "disk")
            main = "cpu" if is_away else None
            dispatch_model(model, device_map, main, offload_dir=folder, force_hooks=is_away)
        except OSError as error:
            remove()
            raise CheckpointError(
                f"{folder}: what of the model has no room in memory cannot be kept there: {error}; let TMPDIR "
                "name a folder on a larger disk, or allow more memory by --nullspace-device-map"
            ) from None
    runs = [place for place in device_map.values() if place not in ("cpu", "disk")]
    return remove, torch.device(_device(runs[0]) if runs else "cpu")


def _device_map(model: nn.Module, memory: Memory) -> dict[str, int | str]:
    """Which part of ``model`` goes where.

    Raises:
        CheckpointError: What was trained of single tokens would be brought to where it runs for each forward, but PEFT
            reads it from outside.
    """
    from accelerate import infer_auto_device_map

    whole = getattr(model, "_no_split_modules", None)
    tokens = [name for name, module in model.named_modules() if type(module).__name__ == "TrainableTokensLayer"]
    found: dict[str, int | str] = {}
    try:
        found = infer_auto_device_map(
            model, max_memory=dict(memory) or _free(), no_split_module_classes=sorted(whole or ())
        )
    except IndexError:  # it finds no place for what is tied to a weight below such a layer
        if not tokens:
            raise
    cards = set(found.values()) - {"cpu", "disk"}
    if tokens and (not found or "disk" in found.values() or (cards and "cpu" in found.values())):
        raise CheckpointError(
            f"{tokens[0]}: has trained tokens, whose rows PEFT reads from outside it, so no part of the model can lie "
            "off the devices where it runs; allow more memory by --nullspace-device-map, or leave it out"
        )
    return found


def _free() -> dict[int | str, int]:
    """The bytes that are free of each device that can take sums in float64."""
    from accelerate.utils import get_max_memory

    free: dict[int | str, int] = get_max_memory()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in ("cuda", "xpu"):
        return free
    return {"cpu": free.get("cpu", free.get("mps", 0))}  # an Apple machine has one memory, and it is told as its GPU's


@contextmanager
def _unheard(*names: str) -> Iterator[None]:
    """Without the warnings of these loggers: that parts of the model are elsewhere is what was asked for."""
    loggers = [logging.getLogger(name) for name in names]
    were = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, was in zip(loggers, were, strict=True):
            logger.disabled = was
