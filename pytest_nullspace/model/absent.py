"""Weights that a base model does not hold: refused, unless all that is gated comes before them."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.errors import CheckpointError, some
from pytest_nullspace.model.known import own_code
from pytest_nullspace.model.layers import is_encoder_decoder
from pytest_nullspace.model.used import Uses

PROBE_TOKENS = 8


def not_whole(model: nn.Module, absent: Collection[str], base: Path) -> CheckpointError:
    """The error that ``absent`` weights are not in ``base``."""
    return CheckpointError(
        f"{base}: its weights are not those of a whole {type(model).__name__}: {some(absent)} have no tensor of their "
        f"shape there{own_code(base)}"
    )


def told_behind(model: nn.Module, absent: Sequence[str], layers: Iterable[nn.Module], base: Path) -> tuple[str, ...]:
    """That ``absent`` weights are random, where that changes nothing of what ``layers`` read; nothing if there is none.

    PEFT saves the head that training put on a base, and not what lies between: RoBERTa's pooler, DistilBERT's
    ``pre_classifier``.

    Raises:
        CheckpointError: They may come before a layer, or make the predictions.
    """
    if not absent:
        return ()
    if not _come_last(model, absent, [*layers, *_head(model)]):
        raise not_whole(model, absent, base)
    return (
        f"{len(absent)} weights that the base does not hold are random, such as {printable(absent[0])}; all that is "
        "gated comes before them",
    )


def _head(model: Any) -> list[nn.Module]:
    """What makes the predictions, if they are of tokens."""
    with suppress(NotImplementedError):
        head = model.get_output_embeddings()
        return [] if head is None else [head]
    return []


def _come_last(model: nn.Module, absent: Sequence[str], layers: Sequence[nn.Module]) -> bool:
    """Whether on text ``absent`` weights are used only after the last of ``layers`` has run."""
    try:
        weights = [model.get_parameter(name) for name in absent]
    except AttributeError:  # of a module that is adapted
        return False
    happened: list[nn.Module | None] = []  # a layer has run, or a weight was used
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=next(model.parameters()).device)
    given = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if is_encoder_decoder(model) else {})
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(lambda layer, *_: happened.append(layer)).remove)
        hooks.enter_context(torch.inference_mode())
        hooks.enter_context(Uses(weights, lambda _: happened.append(None)))
        with suppress(Exception):  # a head may want more than tokens, such as an end of text
            model(**given)
    if not set(layers) <= set(happened):  # of one that did not run nobody knows what comes before it
        return False
    last = max(place for place, layer in enumerate(happened) if layer is not None)
    return None not in happened[:last]
