"""The pass changes nothing that it measures: not one bit of a model's output, and no parameter at any moment."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.recorder import Recorder
from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.model.spread import spread
from pytest_nullspace.run.saved import from_json, to_json
from pytest_nullspace.run.stats import BYPASSED, UNREACHED, RunStats
from tests import tiny
from tests.adapters import adapter, switch
from tests.releases import five
from tests.unit.model.test_peft import ARCHITECTURES, EXACT, WINDOWS, check_figures, figures, opened

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def mamba() -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8)
    )


MODELS: dict[str, tuple[Callable[[], Any], str | None, dict[str, Any]]] = {
    **ARCHITECTURES,
    "mamba, whose dt_proj.bias is read without its forward": (
        mamba,
        "CAUSAL_LM",
        {"target_modules": ["in_proj", "x_proj", "dt_proj"]},
    ),
    "experts": (switch, "SEQ_2_SEQ_LM", {"target_modules": ["wi"]}),
    "magnitudes": (tiny.qwen2, "CAUSAL_LM", {"use_dora": True}),
    "biases of the LoRA": (tiny.qwen2, "CAUSAL_LM", {"lora_bias": True}),
}


def with_biases(model: Any) -> Any:
    """The model with biases that outweigh its layers' outputs."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def loaded(name: str, folder: Path) -> AdaptedModel:
    make, task, config = MODELS[name]
    torch.manual_seed(0)
    return opened(adapter(folder, with_biases(make()), task, **{"r": 4, "target_modules": "all-linear", **config}))[1]


def state(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Which tensor each parameter and buffer is, where its numbers lie, and how often they were written to."""
    return {
        name: (id(tensor), tensor.data_ptr(), tensor._version)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def outputs(adapted: AdaptedModel, at: Callable[[], object] = lambda: None) -> Tensor:
    """What the model gives for `WINDOWS`; ``at`` is called whenever a module has run."""
    handles = [module.register_forward_hook(lambda *_: at() and None) for module in adapted.model.modules()]
    tokens = torch.tensor(WINDOWS)
    both = {"decoder_input_ids": tokens} if adapted.is_encoder_decoder else {}
    with torch.inference_mode():
        given = adapted.model(input_ids=tokens, **both)
    for handle in handles:
        handle.remove()
    return given.logits if hasattr(given, "logits") else given.last_hidden_state  # type: ignore[no-any-return]


def check_untouched(adapted: AdaptedModel) -> None:
    """What the model gives under the recorder's hooks is what it gives without, and no parameter is ever another."""
    before, kept = outputs(adapted), state(adapted.model)
    numbers = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}

    def untouched() -> None:
        assert state(adapted.model) == kept

    recorder = Recorder(adapted.device, len(WINDOWS))
    with recorder.watching(list(adapted.layers.values())):
        untouched()
        tokens = torch.tensor(WINDOWS)
        recorder.start(Batch(tokens, 0, None, [tokens.shape[1]] * len(WINDOWS)))
        assert torch.equal(outputs(adapted, untouched), before)
        recorder.end()
    measure(adapted, WINDOWS, batch_size=2)
    untouched()
    assert torch.equal(outputs(adapted), before)
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in adapted.model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_bits_under_the_hooks(name: str, tmp_path: Path) -> None:
    """The output under the hooks is that without, bit for bit, and every parameter is what it is, always."""
    check_untouched(loaded(name, tmp_path))


@pytest.mark.parametrize("protected", [None, 3])
def test_a_lora_null_model_gives_the_same_bits_under_the_hooks(protected: int | None, tmp_path: Path) -> None:
    """The same of a LoRA-Null directory with biases."""
    folder = tiny.lora_null(tmp_path, tiny.qwen2(), protected=protected)
    check_untouched(load_model(open_checkpoint(folder), torch.device("cpu"), torch.float32))


@five
def test_what_reads_a_bias_by_itself_finds_it_during_the_pass(tmp_path: Path) -> None:
    """Mamba reads dt_proj without its forward: that is told, and the layers behind have a plain forward's figures."""
    adapted = loaded("mamba, whose dt_proj.bias is read without its forward", tmp_path)
    inputs: dict[str, list[Tensor]] = {name: [] for name in adapted.layers}
    for name, layer in adapted.layers.items():
        layer.layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].double()))
    outputs(adapted)
    plain = {name: torch.cat(rows).flatten(0, -2) for name, rows in inputs.items() if rows}
    run = RunStats("ft", "c4", measure(adapted, WINDOWS), len(adapted.layers))
    for measured in from_json(to_json(run), "f").layers:
        if measured.name.endswith("dt_proj"):
            assert measured.defect == BYPASSED
        else:
            assert measured.input_norm == pytest.approx(float(plain[measured.name].norm(dim=1).mean()), rel=EXACT)


def test_a_layer_that_a_text_does_not_reach_is_not_one_that_no_text_can(tmp_path: Path) -> None:
    """Experts that few tokens leave out are told as unreached, though the model asks for the type of their weights."""
    adapted = loaded("experts", tmp_path)
    for layer in adapted.layers.values():
        layer.layer.register_forward_pre_hook(lambda layer, _: layer.weight.dtype and None)
    defects = {layer.defect for layer in measure(adapted, [WINDOWS[0][:4]])}
    assert defects == {None, UNREACHED}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "qwen2, biases that outweigh the outputs"])
def test_however_large_a_bias_is_no_digit_is_lost(kind: str, scale: float, tmp_path: Path) -> None:
    """Whether a bias is taken off an output or the product is computed again, the figures are the definition's."""
    adapted = loaded(kind, tmp_path)
    for layer in adapted.layers.values():
        if layer.has_bias:
            layer.base.get_parameter("bias").data.mul_(scale)
    check_figures(adapted)


def test_a_magnitude_beside_a_large_bias_loses_no_digit(tmp_path: Path) -> None:
    """DoRA on layers whose biases outweigh their outputs: the update is what its module gives, not a difference."""
    check_figures(loaded("magnitudes", tmp_path))


def test_biases_that_accelerate_keeps_elsewhere_are_left_there(tmp_path: Path) -> None:
    """Spread over memory and disk, a model with biases gives the same bits under the hooks, and the same figures."""
    whole = loaded("qwen2, biases that outweigh the outputs", tmp_path / "a")
    want = measure(whole, WINDOWS)
    adapted = spread(loaded("qwen2, biases that outweigh the outputs", tmp_path / "b"), {"cpu": 50_000})
    assert any(layer.base.weight.is_meta for layer in adapted.layers.values())
    before, kept = outputs(adapted), {name: id(value) for name, value in adapted.model.named_parameters()}
    measured = measure(adapted, WINDOWS)
    assert {name: id(value) for name, value in adapted.model.named_parameters()}.keys() == kept.keys()
    assert torch.equal(outputs(adapted), before)
    for one, other in zip(measured, want, strict=True):
        assert figures(one) == pytest.approx(figures(other), rel=EXACT)


def longformer() -> Any:
    return transformers.LongformerForSequenceClassification(
        transformers.LongformerConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=258, pad_token_id=1, attention_window=8,
        )
    )  # fmt: skip


def test_a_head_that_shapes_the_forward_is_run(tmp_path: Path) -> None:
    """Longformer's classifier puts global attention on the first token: its layers see what the whole model gives."""
    torch.manual_seed(0)
    targets = ["query", "value", "query_global", "value_global"]
    _, adapted = opened(adapter(tmp_path, longformer(), "SEQ_CLS", r=4, target_modules=targets))
    seen: dict[str, Tensor] = {}
    handles = [
        layer.layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].double()}))
        for name, layer in adapted.layers.items()
    ]
    with torch.inference_mode():
        adapted.model(input_ids=torch.tensor(WINDOWS[:1]))
    for handle in handles:
        handle.remove()
    measured = measure(adapted, WINDOWS[:1])
    assert len(measured) == 8
    for layer in measured:
        assert layer.defect is None
        assert layer.input_norm == pytest.approx(float(seen[layer.name].norm(dim=-1).mean()), rel=EXACT)


CALLS_AGAIN = {
    "FlavaForPreTraining", "ViltForImagesAndTextClassification", "TimesFmModelForPrediction",
    "Nemotron3DiarizationForAudioFrameClassification",  # they read no text alone
    "RoCBertForPreTraining",  # again only for labels
    "T5GemmaForSequenceClassification", "T5GemmaForTokenClassification",  # one of two calls
}  # fmt: skip


@five
def test_no_head_calls_its_decoder_twice() -> None:
    """A forward may end where the decoder returns because no class of transformers goes on to call it once more."""
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        prefixes = set(re.findall(r"^    base_model_prefix = \"(\w+)\"", text, re.MULTILINE))
        for part in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
            forward = re.search(r"^    def forward\(.*?(?=^    def |\Z)", part, re.MULTILINE | re.DOTALL)
            for prefix in prefixes if forward else ():
                if len(re.findall(rf"\bself\.{prefix}\(", forward[0])) > 1:  # type: ignore[index]
                    found.add(re.match(r"\w+", part)[0])  # type: ignore[index]
    assert found - CALLS_AGAIN == set()
    assert found
