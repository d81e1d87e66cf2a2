"""What a model can read: how long a window may be, and which tokens it knows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.errors import CheckpointError, TextError
from pytest_nullspace.settings import PREFIX
from pytest_nullspace.text.windows import Shown, Window

DEFAULT_SEQLEN = 2048
"""Tokens a window, as in the reference, where the model allows as many."""

LIMITS = (
    "max_position_embeddings", "max_seq_len", "max_encoder_position_embeddings", "max_decoder_position_embeddings",
)  # fmt: skip
"""What configs call the number of tokens that a model takes: MPT's, and LED's for each of its sides, are not known to
transformers by the first name."""

TEXT_CONFIGS = ("text_config", "text_encoder", "decoder", "generator")
"""Where a model of several parts keeps the config of the one that reads text."""


def window_length(asked: int | None, model: Any) -> int:
    """Tokens a window: as many as were asked for, or else as many as the model takes, up to `DEFAULT_SEQLEN`.

    Raises:
        TextError: They are more than the model takes, or its config does not say in a number how many these are.
    """
    limit = _positions(model)
    if asked is None:
        return DEFAULT_SEQLEN if limit is None else min(DEFAULT_SEQLEN, limit)
    if limit is not None and asked > limit:
        raise TextError(f"{PREFIX}seqlen: {asked} tokens are more than the {limit} that the model takes; lower it")
    return asked


def default_length(config: Mapping[str, Any]) -> int | None:
    """The window of a model with this ``config.json``; None where that does not tell before the model is there."""
    if not any(isinstance(part, Mapping) and "max_position_embeddings" in part for part in _parts(config)):
        return None  # GPT-J's calls it otherwise, and others have no limit
    limit = of_text(config, "max_position_embeddings")
    return min(DEFAULT_SEQLEN, limit) if isinstance(limit, int) and limit > 0 else DEFAULT_SEQLEN


def require_known_tokens(texts: Iterable[Sequence[Window]], model: Any, checkpoint: Checkpoint) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        CheckpointError: There is one.
    """
    largest = _largest(texts)
    known = vocabulary(model)
    if known is not None and largest >= known:
        raise CheckpointError(
            f"{checkpoint.directory}: its tokenizer gives the token {largest}, but the model knows only {known}; save "
            "the base model's tokenizer into the directory"
        )


def require_known_to_base(texts: Iterable[Sequence[Window]], base: Any, checkpoint: Checkpoint) -> None:
    """Refuse to hold predictions against a base that does not know all tokens, for training added some.

    Raises:
        CheckpointError: There is one that it has no embedding for.
    """
    largest = _largest(texts)
    known = vocabulary(base)
    if known is not None and largest >= known:
        raise CheckpointError(
            f"{checkpoint.directory}: the text has the token {largest}, which training added, for the base knows only "
            f"{known}; its predictions cannot be compared on that text: give another, or {PREFIX}no-drift"
        )


def _largest(texts: Iterable[Sequence[Window]]) -> int:
    """The largest token of all; what stands for an image may lie beyond the vocabulary, and is none of it."""
    ids = (window.tokens for windows in texts for window in windows)
    return max(max(set(of) - of.unscored, default=0) if isinstance(of, Shown) else max(of) for of in ids)


def vocabulary(model: Any) -> int | None:
    """How many tokens the model knows, as its config says; None where that does not tell."""
    known = of_text(model.config, "vocab_size")
    return known if isinstance(known, int) else None


def _positions(model: Any) -> int | None:
    """How many tokens the model takes; None where it has no limit, which XLNet's config calls -1."""
    limits = []
    for name in LIMITS:
        limit = of_text(model.config, name)
        if limit is None or limit == -1:
            continue
        if not isinstance(limit, int) or limit < 1:
            raise TextError(f"config.json: {name} must be a whole number from 1, not {printable(repr(limit))}; mend it")
        limits.append(limit - _skipped(model, limit))
    return min(limits, default=None)


def _skipped(model: Any, limit: int) -> int:
    """How many of a table of positions no token gets: RoBERTa and its kind begin behind the one of padding."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and getattr(module, "num_embeddings", None) == limit:
            padding = getattr(module, "padding_idx", None)
            # ProphetNet's streams, of which there are ngram, stand one behind the token that they read.
            return 0 if padding is None else int(padding) + 1 + bool(getattr(model.config, "ngram", 0))
    return 0


def of_text(config: Any, field: str) -> Any:
    """A field of the config, in the part of it that is of the text where it has such a part."""
    return next((value for part in _parts(config) if (value := _field(part, field)) is not None), None)


def _parts(config: Any) -> list[Any]:
    return [part for name in TEXT_CONFIGS if (part := _field(config, name)) is not None] + [config]


def _field(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)
