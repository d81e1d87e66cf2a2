"""What lies on disk: which layers a checkpoint adapts, read without torch and without reading a weight.

A new format is one file here, with a ``read(directory) -> Checkpoint``, and one in `pytest_nullspace.model`.
"""

from pathlib import Path

from pytest_nullspace.checkpoint import lora_null
from pytest_nullspace.checkpoint.layers import Checkpoint, LayerSpec
from pytest_nullspace.errors import CheckpointError

__all__ = ["Checkpoint", "LayerSpec", "open_checkpoint"]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Find out what is adapted in ``directory``.

    Args:
        directory: A LoRA-Null or CorDA directory as transformers saves it.

    Returns:
        The checkpoint, with at least one adapted layer.

    Raises:
        CheckpointError: It is no such directory, or what lies there does not hold together.
    """
    if not directory.is_dir():
        what = "is a file; give the directory that holds it" if directory.exists() else "no such directory"
        raise CheckpointError(f"{directory}: {what}")
    if not (directory / lora_null.CONFIG_FILE).exists():
        raise CheckpointError(
            f"{directory}: not a checkpoint: no {lora_null.CONFIG_FILE} in it; give the directory that training saved"
        )
    return lora_null.read(directory)
