"""A model's directory by its path or by its id on the Hugging Face hub."""

import re
from pathlib import Path

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_WANTED = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "spiece.model")
"""What is downloaded: no code and no pickles."""


def directory_of(name: str, revision: str | None, how: str) -> Path:
    """The local directory of ``name``, downloaded to the hub's own cache where it is no path.

    Args:
        name: A directory, or ``owner/name`` on the hub.
        revision: A branch, tag or commit of the hub; None for the main branch.
        how: Which option or field said so, for messages.

    Raises:
        CheckpointError: It is neither, or the hub cannot be reached or has no such model.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if not _HUB_ID.fullmatch(name) or name in (".", ".."):
        raise CheckpointError(f"{how}: {printable(name)} is no directory, and no id on the hub could be written so")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # no network, offline, gated, unknown: huggingface_hub has an exception for each
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{how}: {printable(name)} is no directory here and cannot be had from the hub: {reason}; "
            "give a local directory"
        ) from error
