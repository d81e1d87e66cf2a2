"""The module tree rebuilt from a checkpoint, ready to be measured. A new format is one loader here."""

import warnings
from collections.abc import Hashable, MutableMapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.layers import AdaptedLayer, AdaptedModel

__all__ = ["AdaptedLayer", "AdaptedModel", "import_libraries", "load_model", "load_plain"]


def import_libraries(checkpoint: Checkpoint) -> None:
    """Import what `load_model` will need, so that the seconds of it can be told from those of loading."""
    with warnings.catch_warnings(action="ignore"):
        import_module("transformers.modeling_utils")
        _loader(checkpoint)


def _loader(checkpoint: Checkpoint) -> Any:
    return import_module("pytest_nullspace.model." + ("lora_null" if checkpoint.carries_base else "peft"))


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    base: Path | None = None,
    bases: MutableMapping[Hashable, nn.Module] | None = None,
) -> AdaptedModel:
    """Build the checkpoint's model in eval mode, every weight from its files.

    Args:
        checkpoint: As `pytest_nullspace.checkpoint.open_checkpoint` found it.
        device: Where to run it.
        dtype: In which precision to run it.
        base: The base model's directory, for a checkpoint that does not carry its base.
        bases: Keeps that base model, once `AdaptedModel.take_off` was called, for the next adapter of the same.

    Raises:
        CheckpointError: Config and weights do not make one model.
    """
    # What the libraries warn of is checked here tensor by tensor, and must not fail a user's run under -W error.
    with warnings.catch_warnings(action="ignore"):
        if checkpoint.carries_base:
            from pytest_nullspace.model import lora_null

            return lora_null.load(checkpoint, device, dtype)
        if base is None:
            raise CheckpointError(f"{checkpoint.directory}: an adapter of this format needs its base model")
        from pytest_nullspace.model import peft

        return peft.load(checkpoint, base, device, dtype, {} if bases is None else bases)


def load_plain(base: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A whole causal language model without any adapter, in eval mode.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    with warnings.catch_warnings(action="ignore"):
        from pytest_nullspace.model import peft

        return peft.load_plain(base, device, dtype)
