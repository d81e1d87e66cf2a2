"""Weights that a base model does not hold: refused, unless all that is gated comes before them."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.errors import CheckpointError, some
from pytest_nullspace.model.ends import ends_of
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
    head = ends_of(model).predicts
    if not _come_last(model, absent, [*layers, *([] if head is None else [head])]):
        raise not_whole(model, absent, base)
    return (
        f"{len(absent)} weights that the base does not hold are random, such as {printable(absent[0])}; all that is "
        "gated comes before them",
    )


def _come_last(model: nn.Module, absent: Sequence[str], layers: Sequence[nn.Module]) -> bool:
    """Whether on text each of the ``absent`` weights is used, and only after the last of ``layers`` has run.

    Of one that is not used, such as an expert's to which no token went, nobody knows what it comes before.
    """
    try:
        weights = [model.get_parameter(name) for name in absent]
    except AttributeError:  # of a module that is adapted
        return False
    happened: list[nn.Module | int] = []  # a layer has run, or the weight of that id was used
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=next(model.parameters()).device)
    tokens[0, -1] = _end_of_text(model)
    given = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if is_encoder_decoder(model) else {})
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(lambda layer, *_: happened.append(layer)).remove)
        hooks.enter_context(torch.inference_mode())
        hooks.enter_context(Uses(weights, happened.append))
        with suppress(Exception):  # a head may want more than tokens; its weights are then not used
            model(**given)
    used = {id(weight) for weight in weights}
    if not used.union(layers) <= set(happened):  # of a layer that did not run nobody knows what comes before it either
        return False
    last = max(place for place, what in enumerate(happened) if isinstance(what, nn.Module))
    return used.isdisjoint(happened[:last])


def _end_of_text(model: Any) -> int:
    """The token that ends a text, by which some heads find it; 0 where the model tells none."""
    told = getattr(model.config, "eos_token_id", None)
    ends = told[0] if isinstance(told, list) and told else told
    return ends if isinstance(ends, int) and 0 <= ends < ends_of(model).known else 0
