"""A base model at work as a writer: it begins where its documents do, and draws token after token at temperature 1."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pytest_nullspace.errors import TextError
from pytest_nullspace.measuring.limits import of_text, vocabulary
from pytest_nullspace.text.sources import OPTION, SELF

ROWS = 8
"""Documents that are written at once; of the choice of tokens a part, so it is the same on every machine."""
LEAST = 4
"""Tokens of a document in the mean, below which a base writes too little."""


def first_token(model: Any) -> int:
    """The token from which a text begins: the one that says so, or else the one that ends a text, or else the first."""
    ends = _ends(model)
    begin = of_text(model.config, "bos_token_id")
    known = vocabulary(model)
    found = [token for token in (begin, *ends, 0) if _is_token(token, known)]
    return int(found[0])


def stretches(
    model: Any, decode: Callable[[Sequence[int]], str], device: torch.device, *, count: int, seqlen: int, seed: int
) -> list[str]:
    """Let ``model`` write.

    Args:
        model: The base model, in eval mode.
        decode: Makes text of token ids, special ones left out.
        device: Where its inputs go.
        count: How many stretches.
        seqlen: Tokens of each, the first one included; short documents are put together.
        seed: Of the choice of tokens.

    Raises:
        TextError: It ends its documents so soon that they would never be enough.
    """
    first, ends = first_token(model), _ends(model)
    length = max(1, seqlen - 1)  # the longest that fits beside the first token
    found: list[list[str]] = [[]]
    left, rounds, most = length, 0, 64 + count * length // (ROWS * LEAST)
    with _drawing(model, device, seed):
        while len(found) <= count:
            if rounds == most:
                raise TextError(
                    f"{OPTION}={SELF}: the base model ends its texts so soon that {rounds * ROWS} of them are not "
                    f"enough for {count} windows of {seqlen} tokens; give a text, or a smaller --nullspace-seqlen"
                )
            rounds += 1
            for document in _documents(model, first, ends, device, length):
                if text := decode(document):
                    found[-1].append(text)
                    left -= len(document)
                if left <= 0:
                    found.append([])
                    left = length
    return ["\n\n".join(documents) for documents in found[:count]]


def _documents(model: Any, first: int, ends: Sequence[int], device: torch.device, length: int) -> Iterator[list[int]]:
    """Some documents of ``length`` tokens at most, each without what begins and ends it."""
    begun = torch.full((ROWS, 1), first, device=device)
    written: Tensor = model.generate(
        input_ids=begun,
        attention_mask=torch.ones_like(begun),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        bos_token_id=first,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else first,
    )
    for row in written[:, 1:].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        yield row[:stop]


@contextmanager
def _drawing(model: Any, device: torch.device, seed: int) -> Iterator[None]:
    """With tokens drawn by ``seed`` alone, whatever the model's own folder says of how it should write."""
    from transformers import GenerationConfig

    own, cards = model.generation_config, [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(cards, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = own


def _ends(model: Any) -> list[int]:
    """The tokens that end a text."""
    told = of_text(model.config, "eos_token_id")
    known = vocabulary(model)
    return [int(token) for token in (told if isinstance(told, list) else [told]) if _is_token(token, known)]


def _is_token(token: Any, known: int | None) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and token >= 0 and (known is None or token < known)
