"""The predictions against the base model's: what serves as the base, and where the two models begin."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring import loading
from pytest_nullspace.measuring.drift import Predictions, drift
from pytest_nullspace.measuring.inputs import why_no_drift
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from tests import tiny
from tests.adapters import adapter, change
from tests.releases import leave_out_older

CPU, META = torch.device("cpu"), torch.device("meta")
WINDOWS = [list(range(3, 40)), list(range(60, 100))]


class Elsewhere(nn.Module):
    """A base model that takes its input on the meta device, which stands for another card."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        with torch.inference_mode():
            self._answers = iter([model(input_ids=torch.tensor([window])) for window in WINDOWS])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert input_ids.device == META
        assert not use_cache
        return next(self._answers)


@pytest.fixture
def adapted(tmp_path: Path) -> AdaptedModel:
    """A tiny model with random adapters."""
    return load_model(open_checkpoint(tiny.lora_null(tmp_path / "ft")), CPU, torch.float32)


def test_each_model_gets_the_tokens_where_it_begins(adapted: AdaptedModel) -> None:
    """A base that takes its input on another device than the adapted model gets it there, and the drift is the same."""
    base, elsewhere = tiny.llama(), Elsewhere(tiny.llama())
    want = drift(adapted.model, lambda: nullcontext(base), WINDOWS, CPU)
    assert drift(adapted.model, lambda: nullcontext(elsewhere), WINDOWS, CPU, base_device=META) == want
    assert want.divergence > 0


@pytest.fixture(params=["LoRA-Null", "PEFT"])
def switchable(request: pytest.FixtureRequest, tmp_path: Path) -> AdaptedModel:
    """A tiny model of either format that is its base with the adapter switched off."""
    if request.param == "PEFT":
        directory = adapter(tmp_path, tiny.llama(), r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        return load_model(open_checkpoint(directory), CPU, torch.float32, tmp_path / "base")
    return load_model(open_checkpoint(tiny.lora_null(tmp_path / "ft")), CPU, torch.float32)


def test_the_pass_gives_the_predictions_and_the_base_reads_each_batch_once(switchable: AdaptedModel) -> None:
    """With drift a batch costs one forward of each model; the layers' figures are the same to the last digit."""
    windows = [list(range(3, 40)), list(range(60, 97)), list(range(20, 57)), list(range(60, 100))]
    base = switchable.switched_off
    assert base is not None
    alone = measure(switchable, windows, batch_size=2)
    forwards: list[int] = []
    handle = switchable.model.register_forward_hook(lambda _, __, output: forwards.append(len(output.logits)))
    predictions = Predictions(base, len(windows), CPU)
    assert measure(switchable, windows, batch_size=2, predictions=predictions) == alone
    assert forwards == [2, 2, 1, 1, 1, 1]
    handle.remove()
    found, want = predictions.of(len(windows)), drift(switchable.model, base, windows, CPU)
    assert found.divergence > 1e-6
    for figure in ("tokens", "base_loss", "adapted_loss", "divergence", "divergence_margin"):
        assert getattr(found, figure) == pytest.approx(getattr(want, figure), rel=1e-5), figure
    assert predictions.seconds > 0


def test_a_batch_without_memory_for_its_predictions_is_counted_once(switchable: AdaptedModel) -> None:
    """Where the base's forward is refused, half as many windows are read, and nothing is added twice."""
    base, taken = switchable.switched_off, []
    assert base is not None

    @contextmanager
    def small() -> Iterator[nn.Module]:
        def refuse(_: nn.Module, __: Any, given: Any) -> None:
            taken.append(len(given["input_ids"]))
            if taken[-1] > 1:
                raise torch.OutOfMemoryError("no memory")

        with base() as model:
            handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
            try:
                yield model
            finally:
                handle.remove()

    windows = [list(range(first, first + 30)) for first in (3, 20, 40, 60)]
    predictions, sizes = Predictions(small, 4, CPU), list[int]()
    found = measure(switchable, windows, batch_size=4, predictions=predictions, shrunk=sizes.append)
    assert found == measure(switchable, windows)
    assert (taken, sizes) == ([4, 2, 1, 1, 1, 1], [2, 1])
    assert predictions.of(4) == drift(switchable.model, base, windows, CPU)


@pytest.mark.parametrize("which", ["start", "base"])
def test_a_base_that_is_spread_tells_where_it_begins(
    which: str, adapted: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a start and of a plain base under a device map the first card that it was given is where its tokens go."""
    tiny.llama().save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "ft")
    monkeypatch.setattr("accelerate.infer_auto_device_map", lambda *_, **__: {"model": "cpu", "lm_head": 1})
    monkeypatch.setattr("accelerate.dispatch_model", lambda *_, **__: None)
    settings: Any = SimpleNamespace(device_map={"cpu": 1}, base=None)
    initial, base = (checkpoint, None) if which == "start" else (None, tmp_path / "base")
    _, place = loading.true_base(adapted, checkpoint, initial, base, settings, CPU, torch.float32).load()
    assert place == torch.device("cuda:1")


LOUD: dict[str, Any] = {"initializer_range": 0.2}


def untied() -> Any:
    return tiny.llama(tie_word_embeddings=False, **LOUD)


def with_biases() -> Any:
    return tiny.qwen2(**LOUD)


def shifted(*names: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    """An edit that gives the adapter's file the base's own tensors of these names, moved."""

    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        own = dict(untied().named_parameters())
        tensors |= {f"base_model.model.{name}": own[name.replace(".base_layer", "")].detach() + 0.1 for name in names}

    return edit


Q_PROJ: dict[str, Any] = {"target_modules": ["q_proj"]}
BASES: dict[str, tuple[Callable[[], Any], dict[str, Any], Callable[..., None] | None, str]] = {
    "nothing else": (untied, Q_PROJ, None, "switched off"),
    "saved embeddings": (untied, Q_PROJ, shifted("model.embed_tokens.weight", "lm_head.weight"), "base"),
    "a norm": (untied, Q_PROJ, shifted("model.layers.1.input_layernorm.weight"), "base"),
    "a layer's own weight": (untied, Q_PROJ, shifted("model.layers.0.self_attn.q_proj.base_layer.weight"), "base"),
    "another layer's weight": (untied, Q_PROJ, shifted("model.layers.2.mlp.up_proj.weight"), "base"),
    "LoRA on the embedding": (untied, {"target_modules": ["q_proj", "embed_tokens"]}, None, "base"),
    "every bias": (with_biases, {**Q_PROJ, "bias": "all"}, None, "base"),
    "the layers' biases": (with_biases, {**Q_PROJ, "bias": "lora_only"}, None, "base"),
    "biases where there are none": (untied, {**Q_PROJ, "bias": "all"}, None, "switched off"),
    "whole modules": (untied, {**Q_PROJ, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}, None, "switched off"),
    "trained tokens": (
        lambda: tiny.llama(**LOUD),
        {**Q_PROJ, "trainable_token_indices": [32, 101, 111]},
        None,
        "switched off",
    ),
    "magnitudes": (untied, {**Q_PROJ, "use_dora": True}, None, "switched off"),
    "biases of the LoRA": (untied, {**Q_PROJ, "lora_bias": True}, None, "switched off"),
}
"""What an adapter holds, and what serves as its base: itself, or the base once more."""


# PEFT's own, while the test makes adapters with it.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("task", "mapped", "config", "writes"),
    [
        ("CAUSAL_LM", None, None, True),
        (None, "LlamaForCausalLM", None, True),
        (None, "LlavaForConditionalGeneration", {"architectures": ["LlavaForConditionalGeneration"]}, True),
        (None, "LlavaForConditionalGeneration", None, False),
        (None, "LlamaModel", {"architectures": ["LlamaForCausalLM"]}, False),
        (None, None, {"architectures": ["LlamaForCausalLM"]}, True),
        (None, None, None, True),
        ("SEQ_2_SEQ_LM", None, {"architectures": ["Qwen2ForCausalLM"]}, True),
        ("SEQ_2_SEQ_LM", None, {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, False),
        ("SEQ_2_SEQ_LM", None, {"architectures": 5}, False),
        ("SEQ_CLS", None, {"architectures": ["LlamaForCausalLM"]}, False),
    ],
)
def test_whether_drift_is_measured_follows_from_the_class_where_the_task_is_wrong(
    task: str | None, mapped: str | None, config: dict[str, Any] | None, writes: bool, tmp_path: Path
) -> None:
    """A decoder saved as another task, or without one, has its predictions compared; what is no decoder has not."""
    told = {"task_type": task, "auto_mapping": None if mapped is None else {"base_model_class": mapped}}
    directory = adapter(tmp_path, tiny.llama(), **Q_PROJ, r=4)
    change(directory, lambda _, saved: saved.update(told))
    file = tmp_path / "base" / "config.json"
    file.unlink() if config is None else file.write_text(json.dumps(config))
    checkpoint = open_checkpoint(directory)
    settings: Any = SimpleNamespace(base=None, layers="*", profile="auto")
    assert why_no_drift(checkpoint, settings) == (None if writes else "it is no causal language model")


# PEFT's own, while the test makes adapters with it.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", BASES)
def test_drift_is_that_of_two_models_loaded_apart(kind: str, tmp_path: Path) -> None:
    """Whatever PEFT writes into the base, losses and divergence are those of the base as it lies on disk, to 1e-6."""
    make, config, edit, served = BASES[kind]
    leave_out_older(kind)
    directory = adapter(tmp_path, make(), r=4, lora_alpha=8, **config)
    if edit is not None:
        change(directory, edit)
    checkpoint, base = open_checkpoint(directory), tmp_path / "base"
    adapted = load_model(checkpoint, CPU, torch.float32, base)
    settings: Any = SimpleNamespace(device_map=None, base=None, layers="*", profile="auto")
    assert (why_no_drift(checkpoint, settings) is None) == (served != "base"), "its files alone tell it"
    assert (loading.base_at_hand(adapted) is None) == (served == "base")
    held_against = loading.true_base(adapted, checkpoint, None, base, settings, CPU, torch.float32)
    assert held_against.name == ("the model with its adapter switched off" if served != "base" else f"the base {base}")
    model, place = held_against.load()
    found = drift(adapted.model, model, WINDOWS, CPU, base_device=place)

    def loaded() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    with torch.inference_mode():
        before, after = (
            [of(input_ids=torch.tensor([window])).logits.double().log_softmax(-1)[0] for window in WINDOWS]
            for of in (loaded(), peft.PeftModel.from_pretrained(loaded(), directory).eval())
        )
    divergence = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]).mean()
    losses = [
        -torch.cat([of[:-1].gather(1, torch.tensor(w)[1:, None]) for of, w in zip(logs, WINDOWS, strict=True)]).mean()
        for logs in (before, after)
    ]
    assert [found.base_loss, found.adapted_loss, found.divergence] == pytest.approx(
        [*map(float, losses), float(divergence)], rel=1e-6
    )
    assert found.divergence > 1e-6
