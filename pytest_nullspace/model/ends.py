"""The two ends of a model: what makes vectors of its tokens, and predictions of tokens of its vectors."""

from typing import Any, NamedTuple

from torch import nn


class Ends(NamedTuple):
    """Either is None where a model has none, or cannot tell.

    Attributes:
        embeds: What makes vectors of token ids.
        predicts: What makes predictions of tokens.
    """

    embeds: nn.Module | None
    predicts: nn.Module | None

    @property
    def known(self) -> int:
        """How many tokens have a vector of their own; 0 where that is no table of them."""
        count = getattr(self.embeds, "num_embeddings", 0)
        return count if isinstance(count, int) else 0


def ends_of(model: Any) -> Ends:
    """The ends of ``model``, a class of transformers or another; CANINE and PPFormulaNet say by an exception: none."""
    return Ends(*(_end(model, get) for get in ("get_input_embeddings", "get_output_embeddings")))


def _end(model: Any, get: str) -> nn.Module | None:
    try:
        end = getattr(model, get)()
    except (AttributeError, NotImplementedError):
        return None
    return end if isinstance(end, nn.Module) else None
