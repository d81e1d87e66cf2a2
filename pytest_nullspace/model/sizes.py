"""Sizes that training changed: the labels of a head, and the rows of a vocabulary."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.checkpoint.peft import PREFIX
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.ends import ends_of


@dataclass(frozen=True)
class Fitted:
    """How a base is built otherwise than its config says, as the adapter's own tensors tell.

    Attributes:
        labels: Of its head; None for those of the config.
        vocabulary: Rows of its embeddings, to which they are resized; None for as many as they are.
        remarks: The same in sentences.
    """

    labels: int | None = None
    vocabulary: int | None = None
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
    vocabulary, tokens = {name: rows for name, rows in other.items() if name in ends}, _tokens(model, checkpoint, ends)
    if not vocabulary:
        vocabulary = _of_trained_tokens(checkpoint, tokens, {name: places[name][0] for name in ends})
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
        is_one = _is_tied(model, ends) and tokens.keys() <= {_embeddings(model)}  # else PEFT holds the head's apart
        is_whole = vocabulary.keys() == ends or vocabulary[name] < places[name][0] or is_one
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
        tuple(remarks),
    )


def _tokens(model: Any, checkpoint: Checkpoint, ends: Collection[str]) -> dict[str, Sequence[int]]:
    """The tokens that alone were trained of each of the ``ends`` of which the adapter's config names some."""
    told = checkpoint.config.get("trainable_token_indices") or {}
    if not isinstance(told, Mapping):
        return {end: told for end in ends if end == _embeddings(model)}
    named = {path: [end for end in ends if f".{end}".endswith(f".{path}.weight")] for path in told}
    return {end: told[path] for path, found in named.items() for end in found}


def _of_trained_tokens(
    checkpoint: Checkpoint, tokens: Mapping[str, Sequence[int]], known: Mapping[str, int]
) -> dict[str, int]:
    """How many rows each weight has whose trained tokens are new ones, all of which the adapter must hold.

    Args:
        checkpoint: The adapter.
        tokens: Those that were trained of each.
        known: How many rows the base has of each weight.

    Raises:
        CheckpointError: A token is beyond the vocabulary, and the rows up to it are not the adapter's.
    """
    found = {}
    for end, trained in tokens.items():
        if not trained or max(trained) < known[end]:
            continue
        if not set(trained).issuperset(range(known[end], max(trained))):
            raise CheckpointError(
                f"{checkpoint.config_file}: trainable_token_indices name token {max(trained)}, and {printable(end)} of "
                f"the base has {known[end]} rows: those that training added are lost; save the adapter with "
                "save_embedding_layers=True, or give the base with its rows by --nullspace-base=DIR"
            )
        found[end] = max(trained) + 1
    return found


def _place(name: str) -> str:
    """Where a whole weight lies in the base; PEFT puts that of a module with LoRA or trained tokens deeper."""
    return name.removeprefix(PREFIX).replace(".token_adapter.", ".").replace(".base_layer.", ".")


def _ends(model: Any) -> frozenset[str]:
    """The names of the weights that have a row for each token."""
    ends = {id(end) for end in ends_of(model) if end is not None}
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if id(module) in ends)


def _embeddings(model: Any) -> str:
    """The name of the weight that has the embedding of each token; empty where there is none."""
    embeds = ends_of(model).embeds
    return next((f"{name}.weight" for name, module in model.named_modules() if module is embeds), "")


def _is_tied(model: Any, ends: Collection[str]) -> bool:
    """Whether the ends share one weight."""
    return len(ends) < 2 or bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
