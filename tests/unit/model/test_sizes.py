"""Heads with other labels and vocabularies that grew or shrank: the base is built as in training, and that is told."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.measuring.drift import drift
from pytest_nullspace.measuring.limits import require_known_to_base
from pytest_nullspace.model import load_model, load_plain
from pytest_nullspace.text.windows import Window
from tests import tiny
from tests.adapters import adapter, change
from tests.releases import newest_peft
from tests.unit.model.test_peft import SMALL, WINDOWS, check_figures, opened

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

CONFIG = {**SMALL, "intermediate_size": 48}


def trained(folder: Path, base: Any, change: Callable[[Path], Any], task: str, **config: Any) -> tuple[Path, Any]:
    """An adapter of ``base`` as ``change`` loads it from its directory, with that model, trained."""
    torch.manual_seed(0)
    base.save_pretrained(folder / "base")
    tiny.tokenizer(folder / "base")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(
        change(folder / "base"), peft.LoraConfig(task_type=task, r=4, init_lora_weights=False, **config)
    )
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    wrapped.save_pretrained(folder / "adapter")
    return folder / "adapter", wrapped.eval()


def same_logits(adapted: Any, wrapped: Any) -> None:
    with torch.inference_mode():
        theirs, ours = (model(input_ids=torch.tensor(WINDOWS)).logits for model in (wrapped, adapted.model))
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["BertModel", "BertForPreTraining", "BertForSequenceClassification"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_adapters_head_says_how_many_labels(kind: str, task: str, tmp_path: Path) -> None:
    """Whatever head the base was saved with, if any: logits are those that training had."""
    auto = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}[task]
    base = getattr(transformers, kind)(transformers.BertConfig(**CONFIG))
    directory, wrapped = trained(
        tmp_path,
        base,
        lambda folder: getattr(transformers, f"AutoModelFor{auto}").from_pretrained(
            folder, num_labels=5, ignore_mismatched_sizes=True
        ),
        task,
        target_modules=["query", "value"],
    )
    _, adapted = opened(directory)
    same_logits(adapted, wrapped)
    assert adapted.remarks == (
        "built with 5 labels, as the adapter's classifier.bias has, where the base's config says 2",
    )
    check_figures(adapted)


@pytest.mark.parametrize("rows", [131, 192, 120], ids=["grown", "padded", "shrunk"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids=["attention", "embedding"])
def test_the_adapters_embedding_says_how_large_the_vocabulary_is(
    rows: int, tied: bool, targets: list[str], tmp_path: Path
) -> None:
    """The base is resized as training resized it, and its rows are the adapter's: logits are those of training."""

    def resized(folder: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(rows)
        return model

    base = tiny.llama(tie_word_embeddings=tied)
    directory, wrapped = trained(tmp_path, base, resized, "CAUSAL_LM", target_modules=targets)
    if rows > 128 and not tied and "embed_tokens" in targets:  # of which PEFT does not save the head
        with pytest.raises(CheckpointError, match="the rows that training added are lost"):
            load_model(directory)
        return
    checkpoint, adapted = opened(directory)
    config: Any = adapted.model.config
    assert config.vocab_size == rows
    same_logits(adapted, wrapped)
    (told,) = adapted.remarks
    assert told.startswith(f"the vocabulary of 128 was resized to {rows}, as the adapter's ")
    assert adapted.switched_off is None
    if rows < 128:
        with pytest.raises(CheckpointError, match="vocabulary is smaller than that of the base"):
            load_plain(tmp_path / "base", torch.device("cpu"), torch.float32, checkpoint)
        return
    plain = load_plain(tmp_path / "base", torch.device("cpu"), torch.float32, checkpoint)
    found = drift(adapted.model, lambda: nullcontext(plain), WINDOWS, torch.device("cpu"))
    with torch.inference_mode():
        q, p = (of(torch.tensor(WINDOWS)).logits.double().log_softmax(-1) for of in (adapted.model, plain))
    p = torch.nn.functional.pad(p, (0, rows - 128), value=-1e6)  # it gives nothing to what it does not know
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9)
    require_known_to_base([[Window(0, (127,))]], plain, checkpoint)
    with pytest.raises(CheckpointError, match="has the token 128, which training added, for the base knows only 128"):
        require_known_to_base([[Window(0, (128,))]], plain, checkpoint)


def test_a_head_that_was_not_saved_with_its_rows_is_an_error(tmp_path: Path) -> None:
    """The new rows of an untied head would be random, so what is lost is named."""

    def resized(folder: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(131)
        return model

    base = tiny.llama(tie_word_embeddings=False)
    directory, _ = trained(tmp_path, base, resized, "CAUSAL_LM", target_modules=["q_proj"])
    change(directory, lambda tensors, _: tensors.__delitem__("base_model.model.lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"vocabulary of 131, the base has 128; but lm_head\.weight is not"):
        load_model(directory)


NEW = [128, 129, 130]


@pytest.mark.parametrize("saved", [True, False], ids=["whole", "rows"])
@pytest.mark.parametrize(("tied", "tokens"), [(True, NEW), (False, {"embed_tokens": [5, *NEW], "lm_head": NEW})])
def test_new_tokens_that_alone_were_trained_say_how_large_the_vocabulary_is(
    tied: bool, tokens: Any, saved: bool, tmp_path: Path
) -> None:
    """Where the adapter holds each row that was added, as a whole weight or as a trained token, it is gated."""

    def resized(folder: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(131)
        return model

    base = tiny.llama(tie_word_embeddings=tied)
    directory, wrapped = trained(
        tmp_path, base, resized, "CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=tokens
    )
    for name, parameter in wrapped.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.add_(0.1)
    wrapped.save_pretrained(directory, save_embedding_layers=saved)
    _, adapted = opened(directory)
    same_logits(adapted, wrapped)
    config: Any = adapted.model.config
    assert config.vocab_size == 131
    assert "the vocabulary of 128 was resized to 131" in adapted.remarks[0]


def test_a_trained_token_beyond_rows_that_were_not_saved_is_an_error(tmp_path: Path) -> None:
    """What is between the base's vocabulary and a trained token would be random, so the token is named."""
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    change(directory, lambda _, config: config.update(trainable_token_indices=[1, 500]))
    with pytest.raises(
        CheckpointError, match=r"name token 500, and model\.embed_tokens\.weight of the base has 128 row"
    ):
        load_model(directory)


@pytest.mark.parametrize(
    ("how", "lost"),
    [
        ({"trainable_token_indices": {"lm_head": NEW}}, "embeddings"),
        ({"trainable_token_indices": {"embed_tokens": NEW, "lm_head": [3]}}, "head"),
        ({"modules_to_save": ["lm_head"]}, "embeddings"),
        ({"modules_to_save": ["embed_tokens"]}, "head"),
    ],
)
def test_rows_that_only_one_end_of_a_tied_vocabulary_has_are_an_error(
    how: dict[str, Any], lost: str, tmp_path: Path
) -> None:
    """What PEFT trains of one end it holds apart from the other, whose new rows would be random and measured."""

    def resized(folder: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(131)
        return model

    directory, wrapped = trained(tmp_path, tiny.llama(), resized, "CAUSAL_LM", target_modules=["q_proj"], **how)
    wrapped.save_pretrained(directory, save_embedding_layers=False)
    with pytest.raises(CheckpointError, match=f"131 has 3 rows that the base lacks, .* not hold those of the {lost}:"):
        load_model(directory)


@newest_peft
def test_another_base_is_still_refused(tmp_path: Path) -> None:
    """An embedding of another width is no vocabulary that grew."""
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.weight"
    change(directory, lambda tensors, _: tensors.update({name: torch.zeros(131, 16)}))
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.weight is \[131, 16\], and the base would take \[128, 32\]"
    ):
        load_model(directory)
    assert open_checkpoint(directory).outside == (name,)


HOW: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [97, 101]}},
}


@pytest.mark.parametrize("flag", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("how", HOW)
def test_an_adapter_of_tied_embeddings_is_loaded_as_peft_loads_it(how: str, flag: bool, tmp_path: Path) -> None:
    """Trained whole, by LoRA or by token, with and without ``ensure_weight_tying``: logits are PEFT's own."""
    directory = adapter(tmp_path, tiny.llama(), r=4, ensure_weight_tying=flag, **HOW[how])
    checkpoint, adapted = opened(directory)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    same_logits(adapted, peft.PeftModel.from_pretrained(base, directory).eval())
    assert sum("q_proj" in name for name in adapted.layers) == 3
    assert any("embed_tokens" in name for name in checkpoint.outside)


def test_whole_modules_beside_a_vocabulary_that_grew_are_read_once(tmp_path: Path) -> None:
    """PEFT then writes each of them under three names, and reads one: logits are those of training."""

    def resized(folder: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(160)
        return model

    modules = ["embed_tokens", "lm_head"]
    base = tiny.llama(tie_word_embeddings=False)
    directory, wrapped = trained(
        tmp_path, base, resized, "CAUSAL_LM", target_modules=["q_proj"], modules_to_save=modules
    )
    checkpoint, adapted = opened(directory)
    assert any(".modules_to_save." in name for name in checkpoint.outside)
    same_logits(adapted, wrapped)
    key = "base_model.model.lm_head.modules_to_save.weight"
    change(directory, lambda tensors, _: tensors.update({key: tensors[key] + 1}))
    with pytest.raises(CheckpointError, match=r"modules_to_save\.weight have no place in the base model"):
        load_model(directory)
