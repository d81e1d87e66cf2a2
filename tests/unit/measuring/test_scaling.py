"""The update scaled while the model runs is that of the format's own factor, and what cannot be scaled so is told."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.judging.invariants import Expectations, Override
from pytest_nullspace.judging.remedy import Remedy, passes
from pytest_nullspace.measuring.distributed import ALONE
from pytest_nullspace.measuring.drift import Predictions, drift
from pytest_nullspace.measuring.scaling import Scales, headroom, remedy, scaled
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.run.figures import Text
from pytest_nullspace.run.stats import Drift, TextDrift
from tests import tiny
from tests.adapters import adapter, change

CPU = torch.device("cpu")
WINDOWS = [list(range(3 + shift, 40 + shift)) for shift in range(0, 24, 4)]


def loaded(directory: Path, base: Path | None = None) -> AdaptedModel:
    return load_model(open_checkpoint(directory), CPU, torch.float32, base)


def logits(adapted: AdaptedModel) -> Tensor:
    with torch.inference_mode():
        found: Tensor = adapted.model(input_ids=torch.tensor([WINDOWS[0]])).logits
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The base model of the adapters."""
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer(tmp_path / "base")
    return tmp_path / "base"


def louder(times: float) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    """Makes the update of a PEFT adapter so many times what it is, by its factor."""

    def edit(_: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["lora_alpha"] *= times
        config["alpha_pattern"] = {name: value * times for name, value in config.get("alpha_pattern", {}).items()}

    return edit


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
    ],
    ids=["LoRA", "rsLoRA", "DoRA", "bias", "pattern"],
)
def test_scaled_is_as_another_lora_alpha(config: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Within the context an adapter of PEFT predicts what it would with that lora_alpha, and afterwards as before."""
    directory = adapter(tmp_path, tiny.llama(), **config)
    whole = loaded(directory, base)
    before = logits(whole)
    with scaled(whole, 0.25):
        quieter = logits(whole)
    assert torch.equal(logits(whole), before)
    change(directory, louder(0.25))
    assert torch.allclose(quieter, logits(loaded(directory, base)), atol=1e-5)
    assert not torch.allclose(quieter, before, atol=1e-3)


def test_scaled_is_as_another_a_of_a_lora_null_directory(tmp_path: Path) -> None:
    """So many times every ALinear.weight, with the biases of a Qwen2 left as they are; at zero it is the base."""
    whole = loaded(tiny.lora_null(tmp_path / "ft", tiny.qwen2()))
    with scaled(whole, 0.25):
        quieter = logits(whole)
    with scaled(whole, 0.0):
        none = logits(whole)
    for layer in whole.layers.values():
        layer.up.weight.data.mul_(0.25)  # type: ignore[operator]
    assert torch.allclose(quieter, logits(whole), atol=1e-5)
    for layer in whole.layers.values():
        layer.up.weight.data.zero_()  # type: ignore[operator]
    assert torch.equal(none, logits(whole))


def suggested(
    directory: Path, base: Path, *bounds: tuple[str, float], gained: bool = True
) -> tuple[Remedy | None, Drift]:
    """What is suggested for an adapter that is held against the plain base; its update is its own task."""
    adapted, plain = loaded(directory, base), tiny.llama().eval()
    texts = {"preserved": WINDOWS, "task": WINDOWS[:3]}
    scales = Scales(adapted, lambda: nullcontext(plain), CPU, texts, ALONE)
    (whole,) = scales.at([1.0], ["preserved", "task"])
    now = Drift("the base", whole["preserved"], whole["task"] if not gained else None)
    overrides = [Override("*", figure, bound, 2 * bound) for figure, bound in bounds]
    return remedy(open_checkpoint(directory), now, Expectations(overrides=overrides), scales), now


def test_the_drift_at_several_scales_is_that_of_each_alone(base: Path, tmp_path: Path) -> None:
    """With the base's predictions taken once a window every scale gives what a pass of its own gives."""
    directory = adapter(tmp_path, tiny.llama())
    adapted, plain = loaded(directory, base), tiny.llama().eval()
    scales = Scales(adapted, lambda: nullcontext(plain), CPU, {"text": WINDOWS}, ALONE)
    found = scales.at([0.0, 0.5, 1.0], ["text"])
    for scale, at in zip((0.0, 0.5, 1.0), found, strict=True):
        with scaled(adapted, scale):
            assert at["text"] == drift(adapted.model, lambda: nullcontext(plain), WINDOWS, CPU)
    assert found[0]["text"].divergence == pytest.approx(0, abs=1e-9)


def test_the_suggestion_passes_when_it_is_written(base: Path, tmp_path: Path) -> None:
    """With the suggested lora_alpha the adapter has the figures that were told, and passes; a good one has none."""
    directory = adapter(tmp_path, tiny.llama())
    now = suggested(directory, base)[1]
    bounds = ("divergence", now.preserved.divergence / 3), ("loss-rise", 1.0)
    found, _ = suggested(directory, base, *bounds)
    assert found is not None
    assert found.scale is not None
    assert 0.3 < found.scale < 0.9
    alpha = json.loads((directory / "adapter_config.json").read_text())["lora_alpha"]
    assert found.said == f"lora_alpha {alpha * found.scale:g} in place of {alpha:g}"
    change(directory, louder(found.scale))
    again, then = suggested(directory, base, *bounds)
    assert again is None
    assert then.preserved.divergence == pytest.approx(found.figures["divergence"][0], rel=1e-4)
    assert found.figures["divergence"][0] + found.figures["divergence"][1] < bounds[0][1]


def test_where_the_task_is_lost_with_it_no_scale_is_suggested(base: Path, tmp_path: Path) -> None:
    """A random update gains nothing of a task: the most that keeps the preserved text is told as too little."""
    directory = adapter(tmp_path, tiny.llama())
    now = suggested(directory, base)[1]
    found, _ = suggested(
        directory, base, ("divergence", now.preserved.divergence / 3), ("loss-rise", 1.0), gained=False
    )
    assert found is not None
    assert found.scale is None
    assert found.said.endswith("is the most that keeps the preserved text, and too little for the task")


def test_what_a_factor_does_not_scale_alone_is_told_by_name(base: Path, tmp_path: Path) -> None:
    """A start that holds a part of W, DoRA's magnitudes, and an update that is zero by its factor already."""
    directory = adapter(tmp_path, tiny.llama(), use_dora=True)

    def trained(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors |= {name: tensor * 2 for name, tensor in tensors.items() if "magnitude" in name}

    change(directory, trained)
    found, _ = suggested(directory, base, ("divergence", 1e-6))
    assert found is not None
    assert found.said.startswith("with none of it the model is not its base (divergence ")
    assert found.said.endswith("): DoRA's magnitudes were trained as well")

    v1 = tiny.lora_null(tmp_path / "v1")
    checkpoint, adapted = open_checkpoint(v1), loaded(v1)
    other = tiny.llama()
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    scales = Scales(adapted, lambda: nullcontext(other.eval()), CPU, {"preserved": WINDOWS}, ALONE)
    none, whole = (Drift("the base", at["preserved"]) for at in scales.at([0.0, 1.0], ["preserved"]))
    between = 0.9 * whole.preserved.divergence
    bounds = Expectations(overrides=[Override("*", "divergence", between, 1), Override("*", "loss-rise", 1, 2)])
    assert passes(none, bounds, Text.PRESERVED)  # of this text nothing would be lost with the part of W
    told = remedy(checkpoint, whole, bounds, scales)
    assert told is not None
    assert told.said.endswith("): a start of LoRA-Null v1 or CorDA holds a part of W")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"changed_base": "it did", "config": {"init_lora_weights": "pissa_niter_4", "lora_alpha": 8}},
            "its start (init_lora_weights pissa_niter_4) holds a part of W, so a smaller scale is no smaller update",
        ),
        ({"config": {"lora_alpha": 0}}, "its lora_alpha is 0 already"),
        (
            {"outside": ("base_model.model.lm_head.lora_A.weight",)},
            "lora_alpha scales base_model.model.lm_head.lora_A.weight as well, which is measured as no layer",
        ),
    ],
)
def test_what_the_files_tell_is_told_before_anything_is_asked(
    change: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    """PiSSA and its like, a factor of zero, and tensors that lora_alpha scales beside the layers."""
    checkpoint = dataclasses.replace(open_checkpoint(adapter(tmp_path, tiny.llama())), **change)
    scales = Scales(loaded(tiny.lora_null(tmp_path / "any")), lambda: nullcontext(tiny.llama()), CPU, {}, ALONE)
    lost = TextDrift(100, 2.0, 3.0, 1.0, 0.1, 0.1)
    assert remedy(checkpoint, Drift("the base", lost), Expectations(), scales) == Remedy(None, said, {})


def test_one_window_tells_no_margin(base: Path, tmp_path: Path) -> None:
    """From one window nothing is suggested, for nothing would surely pass."""
    directory = adapter(tmp_path, tiny.llama())
    adapted, plain = loaded(directory, base), tiny.llama().eval()
    scales = Scales(adapted, lambda: nullcontext(plain), CPU, {"preserved": WINDOWS[:1]}, ALONE)
    (whole,) = scales.at([1.0], ["preserved"])
    strict = Expectations(overrides=[Override("*", "divergence", 1e-9, 1e-8)])
    found = remedy(open_checkpoint(directory), Drift("the base", whole["preserved"]), strict, scales)
    assert found is not None
    assert found.said == "one window tells no margin; give more by --nullspace-calib-size"


def predicted(adapted: AdaptedModel) -> Predictions:
    """Those of every window, beside those of the model with its adapter switched off."""
    assert adapted.switched_off is not None
    found = Predictions(adapted.switched_off, len(WINDOWS), CPU)
    with torch.inference_mode():
        for number, window in enumerate(WINDOWS):
            tokens = torch.tensor([window])
            found.add(number, found.compared(adapted.model(input_ids=tokens).logits, tokens))
    return found


@pytest.fixture
def gaining(base: Path, tmp_path: Path) -> Path:
    """An adapter that gains on the windows; nobody trained it, so it may have to be turned round."""
    directory = adapter(tmp_path, tiny.llama())
    if predicted(loaded(directory, base)).of(4).loss_change > 0:
        change(directory, louder(-1.0))
    return directory


def test_headroom_is_what_two_adapters_gain(gaining: Path, base: Path) -> None:
    """It is the quotient of the gains of two adapters, of which one has twice the factor, on the first windows."""
    few, once = 4, loaded(gaining, base)
    found = headroom(open_checkpoint(gaining), once, predicted(once), WINDOWS, ALONE)
    gain = -predicted(once).of(few).loss_change
    change(gaining, louder(2.0))
    doubled = -predicted(loaded(gaining, base)).of(few).loss_change
    assert found is not None
    assert found.gain == pytest.approx(gain, rel=1e-6)
    assert found.doubled == pytest.approx(doubled, rel=1e-6)
    assert found.ratio == pytest.approx(doubled / gain, rel=1e-6)
    assert found.tokens == few * (len(WINDOWS[0]) - 1)
    assert 0 < found.margin < 10


def test_no_headroom_where_the_scale_is_not_of_what_was_learned(gaining: Path, base: Path) -> None:
    """A start that holds a part of W tells none, and neither does an adapter that gains nothing."""
    once = loaded(gaining, base)
    whole = dataclasses.replace(open_checkpoint(gaining), changed_base="its start took a part of W")
    assert headroom(whole, once, predicted(once), WINDOWS, ALONE) is None
    with scaled(once, 0.0):
        nothing = predicted(once)
    assert nothing.of(4).loss_change == 0
    assert headroom(open_checkpoint(gaining), once, nothing, WINDOWS, ALONE) is None
