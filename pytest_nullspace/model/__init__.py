"""The module tree rebuilt from a checkpoint, ready to be measured. A new format is one loader here."""

import torch

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.model import lora_null
from pytest_nullspace.model.layers import AdaptedLayer, AdaptedModel

__all__ = ["AdaptedLayer", "AdaptedModel", "load_model"]


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> AdaptedModel:
    """Build the checkpoint's model in eval mode, every weight from its files.

    Args:
        checkpoint: As `pytest_nullspace.checkpoint.open_checkpoint` found it.
        device: Where to run it.
        dtype: In which precision to run it.

    Raises:
        CheckpointError: Config and weights do not make one model.
    """
    return lora_null.load(checkpoint, device, dtype)
