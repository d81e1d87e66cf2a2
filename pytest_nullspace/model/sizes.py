"""Sizes that training changed: the labels of a head, and the rows of a vocabulary."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.checkpoint.peft import PREFIX
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.ends import ends_of
from pytest_nullspace.model.stored import stored


@dataclass(frozen=True)
class Fitted:
    """How a base is built otherwise than its config says, as the adapter's own tensors tell.

    Attributes:
        labels: Of its head; None for those of the config.
        vocabulary: Rows of its embeddings, to which they are resized; None for as many as they are.
        known: Of these, those that the base has.
        remarks: The same in sentences.
    """

    labels: int | None = None
    vocabulary: int | None = None
    known: int = 0
    remarks: tuple[str, ...] = ()


NOT_FITTED = Fitted()


def sizes_of(model: Any, checkpoint: Checkpoint, weights: Collection[str]) -> Fitted:
    """What sizes the adapter's whole ``weights`` have where ``model``, without numbers, has others.

    Raises:
        CheckpointError: The vocabulary was resized, and not all that it takes was saved.
    """
    places = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    other: dict[str, int] = {}
    for name in weights:
        place, shape = _place(name), checkpoint.tensors[name].shape
        if place in places and shape and shape[0] != places[place][0] and shape[1:] == places[place][1:]:
            other[place] = shape[0]
    ends = _ends(model)
    vocabulary = {name: rows for name, rows in other.items() if name in ends}
    if not vocabulary:
        vocabulary = _of_trained_tokens(model, checkpoint, {name: places[name][0] for name in ends})
    labels = {
        name: rows for name, rows in other.items() if name not in ends and places[name][0] == model.config.num_labels
    }
    remarks = []
    if len(set(labels.values())) == 1:
        name = min(labels)
        remarks.append(
            f"built with {labels[name]} labels, as the adapter's {printable(name)} has, where the base's config says "
            f"{places[name][0]}"
        )
    if vocabulary:
        name = min(vocabulary)
        is_whole = vocabulary.keys() == ends or vocabulary[name] < places[name][0] or _is_tied(model, ends)
        if len(set(vocabulary.values())) > 1 or not is_whole:
            lost = ", ".join(map(printable, sorted(ends - vocabulary.keys()))) or "another"
            raise CheckpointError(
                f"{checkpoint.directory}: its {printable(name)} is of a vocabulary of {vocabulary[name]}, the base "
                f"has {places[name][0]}; but {lost} is not: the rows that training added are lost; save the adapter "
                "with save_embedding_layers=True"
            )
        remarks.append(
            f"the vocabulary of {places[name][0]} was resized to {vocabulary[name]}, as the adapter's "
            f"{printable(name)} has"
        )
    return Fitted(
        next(iter(labels.values())) if len(set(labels.values())) == 1 else None,
        next(iter(vocabulary.values()), None),
        min((places[name][0] for name in vocabulary), default=0),
        tuple(remarks),
    )


def resize(model: Any, fitted: Fitted) -> None:
    """Give a base the rows of its vocabulary; new ones are no numbers, so that those which no adapter fills show."""
    if fitted.vocabulary is not None:
        model.resize_token_embeddings(fitted.vocabulary, mean_resizing=False)
        for end in ends_of(model):
            if end is not None:
                stored(end, "weight").data[fitted.known :] = math.nan


def require_rows(model: Any, fitted: Fitted, checkpoint: Checkpoint) -> None:
    """Refuse an adapter that left a row of a resized vocabulary without numbers, at either end.

    Raises:
        CheckpointError: There is one, as where PEFT saved a head, and not the embeddings that it was tied to.
    """
    if fitted.vocabulary is None or fitted.vocabulary <= fitted.known:
        return
    for end, what in zip(ends_of(model), ("embeddings", "head"), strict=True):
        if end is None:
            continue
        weight = stored(end, "weight")
        new = torch.arange(fitted.known, fitted.vocabulary, device=weight.device)
        with torch.inference_mode():
            told = end(new if what == "embeddings" else weight.new_zeros(1, weight.shape[1]))
        if not bool(told.isfinite().all()):
            raise CheckpointError(
                f"{checkpoint.directory}: its vocabulary of {fitted.vocabulary} has {len(new)} rows that the base "
                f"lacks, and it does not hold those of the {what}: they are lost; save the adapter with "
                "save_embedding_layers=True"
            )


def _of_trained_tokens(model: Any, checkpoint: Checkpoint, known: Mapping[str, int]) -> dict[str, int]:
    """How many rows each weight has whose trained tokens are new ones, all of which the adapter must hold.

    Args:
        model: The base.
        checkpoint: The adapter.
        known: How many rows the base has of each weight.

    Raises:
        CheckpointError: A token is beyond the vocabulary, and the rows up to it are not the adapter's.
    """
    told, embeds = checkpoint.config.get("trainable_token_indices") or {}, ends_of(model).embeds
    named = {name.removesuffix(".weight"): name for name in known}
    first = next((path for path in named if model.get_submodule(path) is embeds), "")
    found = {}
    for path, tokens in (told if isinstance(told, Mapping) else {first: told}).items():
        end = next((name for whole, name in named.items() if f".{whole}".endswith(f".{path}")), None)
        if end is None or not tokens or max(tokens) < known[end]:
            continue
        if not set(tokens).issuperset(range(known[end], max(tokens))):
            raise CheckpointError(
                f"{checkpoint.config_file}: trainable_token_indices name token {max(tokens)}, and {printable(end)} of "
                f"the base has {known[end]} rows: those that training added are lost; save the adapter with "
                "save_embedding_layers=True, or give the base with its rows by --nullspace-base=DIR"
            )
        found[end] = max(tokens) + 1
    return found


def _place(name: str) -> str:
    """Where a whole weight lies in the base; PEFT puts that of a module with LoRA or trained tokens deeper."""
    return name.removeprefix(PREFIX).replace(".token_adapter.", ".").replace(".base_layer.", ".")


def _ends(model: Any) -> frozenset[str]:
    """The names of the weights that have a row for each token."""
    ends = {id(end) for end in ends_of(model) if end is not None}
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if id(module) in ends)


def _is_tied(model: Any, ends: Collection[str]) -> bool:
    """Whether the ends share one weight."""
    return len(ends) < 2 or bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
