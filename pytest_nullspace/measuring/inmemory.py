"""A model that is in memory, made ready to be measured with a tokenizer, and left as it was.

Torch is imported only inside functions.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.hub import at_hand, base_path
from pytest_nullspace.errors import CheckpointError, OptionError, first_line
from pytest_nullspace.text.choice import TokenizerChoice

if TYPE_CHECKING:
    from pytest_nullspace.model import AdaptedModel


_ADAPTER, _TOKENIZER = "adapter", "tokenizer"
"""Into which folders what the model would save is written."""


@dataclass(frozen=True)
class InMemory:
    """A model that was in memory before, is measured as it is, and stays.

    Attributes:
        checkpoint: What it would save.
        adapted: The model, ready to be measured.
        tokenizer: Which tokenizer cuts the text.
        base: The base model as it lies here, where that is known.
    """

    checkpoint: Checkpoint
    adapted: "AdaptedModel"
    tokenizer: TokenizerChoice
    base: Path | None


@contextmanager
def in_memory(model: object, tokenizer: Any, base: str | None) -> Iterator[InMemory]:
    """Within this context the model can be measured; afterwards it is as it was.

    Args:
        model: A ``peft.PeftModel``, which may be wrapped for training.
        tokenizer: Its tokenizer, or the directory of it; that of its base if None.
        base: The base model, as ``--nullspace-base`` takes it; None for what the model names.

    Raises:
        CheckpointError: It cannot be measured as what it would save.
        OptionError: It is no PEFT model, or nothing tells its tokenizer.
    """
    try:
        from pytest_nullspace.model import live
    except ImportError as error:
        raise OptionError(f"gate: a model in memory needs PEFT, {first_line(error)}; give a directory") from None
    whole = live.peft_model(model)
    with live.chance_kept(whole), TemporaryDirectory(prefix="nullspace-") as folder, _told_as_given(Path(folder)):
        checkpoint = live.saved(whole, Path(folder) / _ADAPTER)
        named = at_hand(checkpoint.base, checkpoint.base_revision) if checkpoint.base else None
        place = base_path(base, None, "base") if base is not None else named
        own = _tokenizer(tokenizer, Path(folder) / _TOKENIZER) if tokenizer is not None else place
        if own is None:
            raise OptionError(
                f"tokenizer: {checkpoint.directory} names no base model that lies here, so nothing tells how its text "
                "is cut; give tokenizer=, a tokenizer or its directory"
            )
        unchanged = None if base is None and checkpoint.changed_base else place
        with live.measured(whole, checkpoint) as adapted:
            yield InMemory(checkpoint, adapted, TokenizerChoice.of(own, place), unchanged)


@contextmanager
def _told_as_given(folder: Path) -> Iterator[None]:
    """Tell of what was written into ``folder``, to be read again, as of the model in memory that a user knows."""
    try:
        yield
    except CheckpointError as error:
        told = str(error)
        for part in (_ADAPTER, _TOKENIZER):
            told = told.replace(str(folder / part), f"the model's {part}")
        if told == str(error):
            raise
        raise CheckpointError(told) from error


def _tokenizer(given: Any, folder: Path) -> Path:
    """The directory in which the tokenizer that was given lies, or into which it is written."""
    if isinstance(given, str | os.PathLike):
        return Path(given)
    tokenizer = getattr(given, "tokenizer", given)  # a processor has one
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise CheckpointError(
            f"tokenizer: a {type(given).__name__} cannot be saved to be read as data: {first_line(error)}; give one of "
            "transformers, or the directory of one"
        ) from error
    return folder
