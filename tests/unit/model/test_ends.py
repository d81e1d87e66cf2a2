"""What makes vectors of a model's tokens, and predictions of its vectors: where it has them, and where it has none."""

from typing import Any

import pytest
import torch
import transformers

from pytest_nullspace.measuring.rows import Rows
from pytest_nullspace.model.absent import told_behind
from pytest_nullspace.model.ends import ends_of
from tests import families, tiny
from tests.releases import five
from tests.unit.model.test_peft import SMALL


class Unhandled(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A model whose embeddings transformers does not find, as PPFormulaNet."""

    def get_input_embeddings(self) -> Any:
        """As transformers says it of a class that it does not know."""
        raise NotImplementedError("`get_input_embeddings` not auto-handled")

    def get_output_embeddings(self) -> Any:
        """The same."""
        raise NotImplementedError("`get_output_embeddings` not auto-handled")


def canine() -> Any:
    return transformers.CanineForSequenceClassification(
        transformers.CanineConfig(**{**SMALL, "num_hidden_layers": 1}, intermediate_size=48, num_hash_buckets=8)
    )


@five
def test_a_model_has_its_two_ends_or_none_or_one() -> None:
    """Llama has both, a classifier of bytes and a plain module none: no question for them raises."""
    model: Any = tiny.llama()
    assert ends_of(model) == (model.model.embed_tokens, model.lm_head)
    assert ends_of(model).known == 128
    for none in (canine(), torch.nn.Linear(2, 2), Unhandled(model.config)):
        assert ends_of(none) == (None, None)
        assert ends_of(none).known == 0


def test_what_has_no_table_of_tokens_is_probed_all_the_same() -> None:
    """A weight that comes last may be random, in a model that cannot name its embeddings or its head."""
    model = Unhandled(tiny.llama(eos_token_id=1, tie_word_embeddings=False).config)
    (told,) = told_behind(model, ["lm_head.weight"], [model.model.layers[0].mlp.up_proj], None)  # type: ignore[arg-type]
    assert told.startswith("1 weights that the base does not hold are random, such as lm_head.weight")


@five
def test_what_sees_and_cannot_name_its_embeddings_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that read tokens are those of its decoder then, and nothing raises."""
    model: Any = families.llava()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        monkeypatch.setattr(type(model), get, getattr(Unhandled, get))
    rows = Rows()
    with rows.watching(model):
        assert rows._parts().readers == set(map(id, model.get_decoder().modules()))
