"""A base that lacks weights: measured where all that is gated comes before them, and refused elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import load_model
from pytest_nullspace.model.used import Uses
from tests import families, tiny
from tests.adapters import adapter, switch
from tests.unit.model.test_peft import SMALL, WINDOWS, check_figures, opened

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def bert(kind: str) -> Any:
    return getattr(transformers, kind)(transformers.BertConfig(**SMALL, intermediate_size=48))


def distilbert(kind: str) -> Any:
    sizes = {"vocab_size": 128, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    return getattr(transformers, kind)(transformers.DistilBertConfig(**sizes))


def t5(kind: str) -> Any:
    return getattr(transformers, kind)(
        transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


@pytest.mark.parametrize(
    ("make", "adapted_as", "saved_as", "task", "target", "lost"),
    [
        (bert, "BertModel", "BertForMaskedLM", "FEATURE_EXTRACTION", "query", "pooler.dense.bias"),
        (distilbert, "DistilBertForSequenceClassification", "DistilBertForMaskedLM", "SEQ_CLS", "q_lin", "pre_classif"),
        (t5, "T5ForSequenceClassification", "T5ForConditionalGeneration", "SEQ_CLS", "q", "classification_head.dense"),
    ],
    ids=["pooler", "before the head", "a head that wants more than tokens"],
)
def test_what_comes_behind_all_layers_may_be_random(
    make: Any, adapted_as: str, saved_as: str, task: str, target: str, lost: str, tmp_path: Path
) -> None:
    """PEFT saves no pooler, nor what lies before a head: every layer is measured all the same, and that is told."""
    torch.manual_seed(0)
    directory = adapter(tmp_path, make(adapted_as), task, r=4, target_modules=[target])
    make(saved_as).save_pretrained(tmp_path / "base")
    _, adapted = opened(directory)
    told = adapted.remarks[-1]
    assert told.startswith(("2 weights that the base does not hold", "4 weights that the base does not hold"))
    assert f"are random, such as {lost}" in told
    assert adapted.switched_off is None, "its predictions are no base's"
    if make is t5:  # whose head the tests' own forward would not leave out
        assert {layer.defect for layer in measure(adapted, WINDOWS)} == {None}
    else:
        check_figures(adapted)


@pytest.mark.parametrize(
    ("lost", "targets"),
    [
        ("model.layers.0.mlp.up_proj.weight", ["q_proj"]),
        ("model.layers.0.self_attn.q_proj.weight", ["q_proj"]),
        ("model.layers.2.mlp.up_proj.weight", r".*layers\.0\..*q_proj"),
        ("model.norm.weight", r".*layers\.0\..*q_proj"),
        ("lm_head.weight", ["q_proj"]),
    ],
    ids=["between the layers", "of a layer", "before the predictions", "a norm", "the predictions"],
)
def test_what_a_layer_or_the_predictions_follow_from_must_be_there(lost: str, targets: Any, tmp_path: Path) -> None:
    """Random weights before an adapted layer, or before the logits, make figures of another model."""
    directory = adapter(tmp_path, tiny.llama(tie_word_embeddings=False), r=4, target_modules=targets)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="its weights are not those of a whole LlamaForCausalLM: "):
        load_model(directory)


def test_what_no_text_reaches_may_follow_from_anything(tmp_path: Path) -> None:
    """Nobody knows what comes before an adapted layer that the tokens do not reach, such as a tower's first weight."""
    targets = r".*vision_tower.*layers\.0.*q_proj"
    directory = adapter(tmp_path, families.llava(), r=4, target_modules=targets)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    (lost,) = (name for name in tensors if name.endswith("patch_embedding.weight"))
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="its weights are not those of a whole LlavaForConditionalGeneration: "):
        load_model(directory)


def test_an_expert_to_which_the_probe_brings_no_token_must_be_there(tmp_path: Path) -> None:
    """A weight that the probe never uses may come before a layer all the same, as an expert of the encoder does."""
    model, used = switch(), set[str]()
    directory = adapter(tmp_path, model, "SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"])
    experts = {name for name, _ in model.named_modules() if name.startswith("encoder.") and ".expert_" in name}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: used.add(name))
    for last in (0, model.config.eos_token_id):
        tokens = torch.tensor([[0] * 7 + [last]])
        model(input_ids=tokens, decoder_input_ids=tokens)
    lost = tuple(f"{name}." for name in experts - used)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    assert lost
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="its weights are not those of a whole SwitchTransformersForConditional"):
        load_model(directory)


@pytest.mark.parametrize(
    ("of", "compute"),
    [
        (torch.nn.Linear(4, 4), lambda module: module.weight.chunk(2)),
        (torch.nn.LSTM(4, 4), lambda module: module(torch.zeros(2, 4))),
        (torch.nn.MultiheadAttention(4, 2), lambda module: module(*[torch.zeros(2, 4)] * 3)),
        (torch.nn.Linear(4, 4), lambda module: torch.svd(module.weight)),
    ],
    ids=["chunk", "LSTM", "attention", "svd"],
)
def test_a_weight_is_used_whatever_holds_the_result(of: Any, compute: Callable[[Any], object]) -> None:
    """What gives several tensors computes with a weight as what gives one does; a question for its shape does not."""
    used = set[int]()
    weight = next(of.parameters())
    with torch.inference_mode(), Uses([weight], used.add):
        assert weight.shape == weight.size()
        assert weight.dtype is torch.float32
        assert not used
        compute(of)
    assert used == {id(weight)}
