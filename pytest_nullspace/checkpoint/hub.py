"""A model's directory by its path or by its id on the Hugging Face hub."""

import re
from difflib import get_close_matches
from pathlib import Path

from pytest_nullspace.checkpoint import gguf
from pytest_nullspace.checkpoint.header import TensorInfo, printable, read_header
from pytest_nullspace.checkpoint.layers import Checkpoint
from pytest_nullspace.checkpoint.strangers import check_base
from pytest_nullspace.errors import PREFIX, CheckpointError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")

_WANTED = (
    "*.json",
    "*.safetensors",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""What is downloaded: no code and no pickles."""
_UNWANTED = ("*/*",)
"""Nor what lies in folders, such as the states of training."""


def base_of(checkpoint: Checkpoint, asked: str | None, option: str = f"{PREFIX}base") -> Path:
    """The base model of ``checkpoint``, a directory or a GGUF file: as asked for, else as its config does.

    Args:
        checkpoint: An adapter that does not carry its base.
        asked: What the user names, as `base_path` takes it.
        option: Where the user named it, for messages.

    Raises:
        CheckpointError: Neither says, it cannot be had, or the config's base is not the one that was trained on.
    """
    if asked is not None:
        return base_path(asked, None, option)
    if checkpoint.changed_base is not None:
        raise CheckpointError(f"{checkpoint.config_file}: {checkpoint.changed_base} by {PREFIX}base=DIR")
    if not checkpoint.base:
        raise CheckpointError(
            f"{checkpoint.config_file}: names no base_model_name_or_path; give it by {PREFIX}base=DIR"
        )
    how = f"{checkpoint.config_file}: base_model_name_or_path"
    try:
        return base_path(checkpoint.base, checkpoint.base_revision, how)
    except CheckpointError as error:  # a relative path, as it was from the folder in which training ran
        meant = "" if _local(checkpoint.base) else _above(Path(checkpoint.config_file), Path(checkpoint.base))
        raise CheckpointError(f"{error}{meant}") from error


def base_path(name: str, revision: str | None, how: str) -> Path:
    """The directory of the base model ``name``, downloaded to the hub's own cache where it is no path; or a GGUF file.

    The one GGUF file of a directory is its model where the directory holds no safetensors.

    Args:
        name: A directory, a GGUF file, or ``owner/name`` on the hub, with ``@revision`` before ``revision``.
        revision: A branch, tag or commit of the hub; None for the main branch.
        how: Which option or field said so, for messages.

    Raises:
        CheckpointError: It is none, holds several GGUF files or an adapter, or the hub cannot be reached or has no such
            model.
    """
    local = _local(name)
    if local is None and name.endswith(gguf.SUFFIX):
        raise CheckpointError(f"{how}: {printable(name)}: no such file; give a GGUF file that is there")
    local = local or downloaded(name, revision, how)
    cure = f"give one of them by {PREFIX}base=FILE{gguf.SUFFIX}"
    return check_base(local if local.is_file() else gguf.only_file(local, cure) or local, how)


def weight_files(base: Path) -> list[Path]:
    """The files of a base's weights: each ``*.safetensors`` of a directory, or the GGUF file itself."""
    return [base] if base.is_file() else sorted(base.glob("*.safetensors"))


def tensors_of(base: Path) -> list[TensorInfo]:
    """All tensors of a base, by the headers of its files.

    Raises:
        CheckpointError: One cannot be read.
    """
    read = gguf.read_header if base.is_file() else read_header
    return [tensor for file in weight_files(base) for tensor in read(file).values()]


def local_directory(name: str) -> Path | None:
    """The directory of that path, or that in which the GGUF file of that path lies, if there is one."""
    local = _local(name)
    return local.parent if local is not None and local.is_file() else local


def _local(name: str) -> Path | None:
    """The directory or GGUF file of that path, if there is one."""
    try:
        local = Path(name).expanduser()
        return local if local.is_dir() or (local.suffix == gguf.SUFFIX and local.is_file()) else None
    except (OSError, RuntimeError, ValueError):  # a name too long, nobody's home
        return None


def near(path: Path) -> str:
    """What is meant by ``path``, where nothing lies, as a question; else nothing.

    What is called nearly so beside it, or lies so below a folder above this one, in which pytest was not started.
    """
    try:
        names = [entry.name for entry in path.expanduser().parent.iterdir()]
    except (OSError, RuntimeError, ValueError):  # nothing there either, nobody's home
        names = []
    alike = get_close_matches(path.name, names, 1, cutoff=0.75)
    if alike and alike != [path.name]:
        return f" (did you mean {printable(path.parent / alike[0])}?)"
    here = Path.cwd()
    return _above(here, path.relative_to(here) if path.is_relative_to(here) else path)


def _above(place: Path, path: Path) -> str:
    """What lies at the relative ``path`` from a folder above ``place``, as a question; else nothing."""
    try:
        found = next((folder / path for folder in place.absolute().parents if (folder / path).exists()), None)
    except (OSError, ValueError):  # a name too long
        return ""
    return "" if found is None or path.is_absolute() else f" (did you mean {printable(found.resolve())}?)"


def at_hand(name: str, revision: str | None) -> Path | None:
    """The directory of that path, or what the hub's own cache holds of that id; nothing is asked of the hub."""
    local = local_directory(name)
    if local is not None or not _HUB_ID.fullmatch(name):
        return local
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    identity, _, said = name.partition("@")
    try:
        held = try_to_load_from_cache(identity, "config.json", revision=said or revision)
    except HFValidationError:
        return None
    return Path(held).parent if isinstance(held, str) else None


def downloaded(name: str, revision: str | None, how: str) -> Path:
    """The directory in the hub's own cache that holds ``name``, downloaded if it is not there; see `base_path`."""
    option = "" if how.startswith(PREFIX) else f" by {PREFIX}base=DIR"
    if not _HUB_ID.fullmatch(name) or name in (".", ".."):
        raise CheckpointError(
            f"{how}: {printable(name)} is no directory, and no id on the hub could be written so; give a directory or "
            f"owner/name{option}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    identity, _, said = name.partition("@")
    try:
        return Path(
            snapshot_download(
                identity, revision=said or revision, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
            )
        )
    except Exception as error:  # no network, offline, gated, unknown: huggingface_hub has an exception for each
        said = str(error).strip().partition("\n")[0].removeprefix("Got: ").rstrip(".")
        reason = printable(said or type(error).__name__, 300)
        if isinstance(error, RepositoryNotFoundError):  # what the hub says of any model that is not shown to the asker
            reason += "; if it is private or gated, set HF_TOKEN to a token that may read it"
        raise CheckpointError(
            f"{how}: {printable(name)} is no directory here{near(Path(name))} and cannot be had from the hub: {reason}"
            f"; give a local directory{option}"
        ) from error
