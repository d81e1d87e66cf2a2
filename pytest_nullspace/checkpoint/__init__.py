"""What lies on disk: which layers a checkpoint adapts, read without torch and without reading a weight.

A new format is one file here, with a ``read(directory) -> Checkpoint``, and one in `pytest_nullspace.model`.
"""

import os
from pathlib import Path

from pytest_nullspace.checkpoint import llama_cpp, lora_null, mlx, peft, whole
from pytest_nullspace.checkpoint.header import require_plain_files
from pytest_nullspace.checkpoint.hub import base_path, near
from pytest_nullspace.checkpoint.layers import Checkpoint, LayerSpec
from pytest_nullspace.checkpoint.strangers import require_ours
from pytest_nullspace.errors import PREFIX, CheckpointError

__all__ = ["Checkpoint", "LayerSpec", "open_checkpoint"]


def open_checkpoint(
    directory: str | os.PathLike[str], base: str | None = None, rank: int = 0, *, is_start: bool = False
) -> Checkpoint:
    """Find out what is adapted in ``directory``.

    Args:
        directory: A LoRA-Null or CorDA directory as transformers saves it, or a LoRA adapter as PEFT does; with a
            ``base`` also llama.cpp's LoRA and a whole model without adapter.
        base: The base model, as `pytest_nullspace.checkpoint.hub.base_path` takes it; read for those two alone.
        rank: Of what stands for the down projections of a whole model; 0 for none.
        is_start: Whether training started from it, so that it must hold an adapter, whatever the ``base``.

    Returns:
        The checkpoint, with at least one adapted layer.

    Raises:
        CheckpointError: It is no such directory, or what lies there does not hold together.
    """
    directory = Path(directory)
    try:
        if not directory.is_dir():
            is_file = directory.exists()
            what = "is a file" if is_file else f"no such directory{near(directory)}"
            wanted = "the directory that holds it" if is_file else "the one that training saved"
            raise CheckpointError(f"{directory}: {what}; give {wanted}")
        require_plain_files(directory)
        if mlx.is_one(directory):
            return mlx.read(directory)
        if (file := llama_cpp.only_file(directory)) is not None:
            return llama_cpp.read(file, base)
        require_ours(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}; mend its permissions") from None
    if (directory / peft.CONFIG_FILE).exists():  # first: an adapter's directory may hold its base's config as well
        return peft.read(directory)
    if base is not None and not is_start and not lora_null.is_adapted(directory):
        return whole.read(directory, base_path(base, None, f"{PREFIX}base"), rank)
    return lora_null.read(directory)
