"""The module tree rebuilt from a checkpoint, ready to be measured. A new format is one loader here."""

import logging
import os
import sys
import warnings
from collections.abc import Hashable, Iterator, MutableMapping
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from io import TextIOBase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.checkpoint.hub import base_of
from pytest_nullspace.errors import NO_APPLE, OptionError, quoted
from pytest_nullspace.model.layers import AdaptedLayer, AdaptedModel
from pytest_nullspace.model.shelf import UnfitError

__all__ = ["AdaptedLayer", "AdaptedModel", "UnfitError", "import_libraries", "load_model", "load_plain"]


def import_libraries(checkpoint: Checkpoint) -> None:
    """Import what `load_model` will need, so that the seconds of it can be told from those of loading."""
    with warnings.catch_warnings(action="ignore"):
        import_module("transformers.modeling_utils")
        _loader(checkpoint)


class _Unheard(TextIOBase):
    """Standard error on which nothing is heard; what a library keeps of it speaks again when it is ``over``."""

    over = False

    def write(self, text: str) -> int:
        """Drop ``text`` while it is not over."""
        return sys.stderr.write(text) if self.over else len(text)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the libraries' warnings, reports and progress bars, which would land in the output of a user's test.

    What they warn of is checked here tensor by tensor, and must not fail a user's run under -W error.
    """
    unheard = _Unheard()
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(max(level, logging.ERROR))
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(unheard):
            yield
    finally:
        unheard.over = True
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _loader(checkpoint: Checkpoint) -> Any:
    name = "lora_null" if checkpoint.carries_base else "whole" if checkpoint.is_whole else "peft"
    return import_module(f"pytest_nullspace.model.{name}")


_DTYPES = ("float32", "float16", "bfloat16", "float64")


def device_named(given: torch.device | str, option: str) -> torch.device:
    """The device of that name.

    Raises:
        OptionError: It is none on which can be measured, or this machine does not have it; the message begins with
            ``option``.
    """
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "xpu"):
        why = NO_APPLE if device is not None and device.type == "mps" else ""
        raise OptionError(f"{option}: takes cpu, cuda, cuda:N, xpu or xpu:N, not {quoted(given)}{why}")
    if device.type != "cpu":
        module = getattr(torch, device.type)
        if not module.is_available() or (device.index or 0) >= module.device_count():
            raise OptionError(f"{option}: torch sees no {device} on this machine; choose another, such as cpu")
    return torch.device("cpu") if device.type == "cpu" else device  # safetensors knows no cpu:0


def _dtype_named(given: torch.dtype | str) -> torch.dtype:
    name = str(given).removeprefix("torch.")
    if name not in _DTYPES:
        raise OptionError(f"dtype: takes {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, not {quoted(given)}")
    found: torch.dtype = getattr(torch, name)
    return found


def load_model(
    checkpoint: Checkpoint | str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "float32",
    base: str | os.PathLike[str] | None = None,
    bases: MutableMapping[Hashable, nn.Module] | None = None,
    *,
    shelve: bool = False,
) -> AdaptedModel:
    """Build the checkpoint's model in eval mode, every weight from its files.

    Args:
        checkpoint: As `pytest_nullspace.checkpoint.open_checkpoint` found it, or its directory.
        device: Where to run it.
        dtype: In which precision to run it.
        base: The base model of a checkpoint that does not carry its own: a directory, a GGUF file or a hub id; None
            for what its config names. With it a whole model without adapter is held against that.
        bases: Keeps that base model, once `AdaptedModel.take_off` was called, for the next adapter of the same.
        shelve: Whether the numbers of its blocks are left in their files, and the rest stays on the CPU; ``device`` is
            then where a block is brought to.

    Raises:
        UnfitError: They cannot be left there.
        CheckpointError: Config and weights do not make one model, or the base cannot be had.
        OptionError: There is no such device or precision.
    """
    place, precision = device_named(device, "device"), _dtype_named(dtype)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint, None if base is None else os.fspath(base))
    found = None if checkpoint.carries_base else base_of(checkpoint, None if base is None else os.fspath(base), "base")
    import_libraries(checkpoint)
    with _quietly():
        if found is None:
            from pytest_nullspace.model import lora_null

            return lora_null.load(checkpoint, place, precision, shelve=shelve)
        if checkpoint.is_whole and shelve:
            raise UnfitError("a whole model is measured beside its base")
        if checkpoint.is_whole:
            from pytest_nullspace.model import whole

            if bases is not None:
                bases.clear()  # of the bases one is in memory at a time
            return whole.load(checkpoint, found, place, precision)
        from pytest_nullspace.model import peft

        return peft.load(checkpoint, found, place, precision, {} if bases is None else bases, shelve=shelve)


def load_plain(base: Path, device: torch.device, dtype: torch.dtype, adapter: Checkpoint | None = None) -> nn.Module:
    """A whole causal language model without any adapter, in eval mode; for an ``adapter`` of the class that it adapts.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    with _quietly():
        from pytest_nullspace.model import peft

        return peft.load_plain(base, device, dtype, adapter)
