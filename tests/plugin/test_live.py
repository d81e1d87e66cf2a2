"""The gate on a model in memory: the figures of what it would save, and the model as it was."""

import copy
import json
import math
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pandas
import peft
import pytest
import torch
from torch import nn

from fixtures.build import WORLD
from pytest_nullspace import CheckpointError, MeasurementError, NullspaceError, OptionError, Report, gate
from tests import tiny

# PEFT's and torch's own, while the tests make adapters with them.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")

QUICK: dict[str, Any] = {"seqlen": 64, "calib_size": 3, "drift": None}


def gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    return transformers.GPT2LMHeadModel(config).eval()


def adapted(folder: Path, model: Any = None, name: str = "default", **config: Any) -> peft.PeftModel:
    """A random LoRA on ``model``, whose base lies in ``folder``, with a text beside it."""
    model = model or tiny.llama()
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder / "base")
        tiny.tokenizer(folder / "base")
        model.name_or_path = str(folder / "base")
        (folder / "text.txt").write_text(tiny.TEXT)
        torch.manual_seed(3)
        config = {"r": 4, "target_modules": ["q_proj", "down_proj"], **config}
        lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
        wrapped = peft.get_peft_model(model, lora, adapter_name=name)
    for place, parameter in wrapped.named_parameters():
        if parameter.requires_grad and ".lora_A" not in place and ".lora_B" not in place:
            parameter.data.add_(0.1)
    return wrapped


def saved(model: peft.PeftModel, folder: Path) -> Path:
    """Where the active adapter of ``model`` is saved."""
    name = model.active_adapters[0]
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder / "saved", selected_adapters=[name])
    return folder / "saved" if name == "default" else folder / "saved" / name


def in_training(model: peft.PeftModel) -> None:
    """Amid training: gradients pending, some modules in either mode, nothing kept of activations."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    next(iter(model.get_base_model().modules())).train(False)
    next(p for name, p in model.named_parameters() if ".lora_A." in name).requires_grad_(False)


def two_adapters(model: peft.PeftModel) -> None:
    """A second adapter that is the active one, of which the first knows nothing."""
    torch.manual_seed(5)
    other = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["k_proj", "q_proj"], init_lora_weights=False)
    model.add_adapter("other", other)
    model.set_adapter("other")


def halved(model: peft.PeftModel) -> None:
    """A base in half precision under an adapter that is not."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.bfloat16()


def switched_off(model: peft.PeftModel) -> None:
    """An adapter that is switched off, as while its base is asked for something."""
    model.base_model.disable_adapter_layers()


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], Callable[[peft.PeftModel], object], dict[str, Any]]] = {
    "plain": (tiny.llama, {}, lambda _: None, {}),
    "in training": (tiny.llama, {"lora_dropout": 0.3}, in_training, {}),
    "of several": (tiny.llama, {}, two_adapters, {}),
    "named": (tiny.llama, {"name": "fr"}, lambda _: None, {}),
    "switched off": (tiny.llama, {"modules_to_save": ["o_proj"]}, switched_off, {}),
    "DoRA": (tiny.llama, {"use_dora": True, "use_rslora": True}, in_training, {}),
    "biases": (tiny.qwen2, {"bias": "all", "lora_bias": True}, lambda _: None, {}),
    "a base of its own": (tiny.qwen2, {"bias": "all"}, lambda _: None, {"drift": True}),
    "tokens": (tiny.llama, {"trainable_token_indices": [3, 4]}, in_training, {}),
    "transposed": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, in_training, {}),
    "half precision": (tiny.llama, {}, halved, {"dtype": "bfloat16"}),
    "with a task": (tiny.llama, {}, in_training, {"task": True, "spectrum": True, "suggest": True, "drift": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_in_memory_has_the_figures_of_what_it_saves(case: str, tmp_path: Path) -> None:
    """Every figure of every layer, the drift and the verdict are those of the saved adapter; the model is as it was."""
    base, config, prepare, options = CASES[case]
    model = adapted(tmp_path, base(), **config)
    prepare(model)
    options = QUICK | options
    if options.pop("task", False):
        (tmp_path / "task.txt").write_text(tiny.TEXT[::-1])
        options["task"] = tmp_path / "task.txt"
    directory = saved(model, tmp_path)
    of_saved = gate(directory, tmp_path / "text.txt", **options)
    options.pop("dtype", None)
    before, twin = everything(model), twin_of(model)
    of_model = gate(model, tmp_path / "text.txt", **options)
    assert_alike(of_model, of_saved)
    assert of_model.run.about["weights_sha256"] == of_saved.run.about["weights_sha256"]
    assert_untouched(model, before)
    assert step(model) == step(twin)


def assert_alike(of_model: Report, of_saved: Report) -> None:
    """Hold two reports to the same rows, predictions and verdict."""
    assert of_model.layers
    rows, saved_rows = pandas.DataFrame(of_model.layers), pandas.DataFrame(of_saved.layers)
    pandas.testing.assert_frame_equal(rows, saved_rows, rtol=1e-6)
    assert (of_model.run.drift is None) == (of_saved.run.drift is None)
    if of_model.run.drift is not None and of_saved.run.drift is not None:
        told, others = of_model.run.drift.figures, of_saved.run.drift.figures
        assert list(told) == list(others)
        for figure, both in told.items():
            assert both == pytest.approx(others[figure], rel=1e-6, abs=1e-9), figure
    assert of_model.verdict == of_saved.verdict
    assert of_model.decision.sentence == of_saved.decision.sentence
    assert of_model.run.about.get("suggestion") == of_saved.run.about.get("suggestion")


def twin_of(model: peft.PeftModel) -> peft.PeftModel:
    """A copy of the model with its gradients, which a deep copy loses."""
    twin = copy.deepcopy(model)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = None if own.grad is None else own.grad.clone()
    return twin


def everything(model: Any) -> dict[str, Any]:
    """All that must be as it was, by value and by identity."""
    modules = list(model.named_modules())
    return {
        "numbers": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "attributes": [(name, key, id(value)) for name, module in modules for key, value in vars(module).items()],
        "hooks": [list(module._forward_hooks) + list(module._forward_pre_hooks) for _, module in modules],
        "modes": [module.training for _, module in modules],
        "config": copy.deepcopy(model.config.to_dict()),
        "adapters": {name: copy.deepcopy(of.to_dict()) for name, of in model.peft_config.items()},
        "active": list(model.active_adapters),
        "chance": (torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())),
    }


def assert_untouched(model: Any, before: dict[str, Any]) -> None:
    """Hold the model to what it was, bit for bit."""
    after = everything(model)
    for what in ("parameters", "attributes", "hooks", "modes", "config", "adapters", "active"):
        assert after[what] == before[what], what
    for (name, value), other in zip(before["numbers"].items(), after["numbers"].values(), strict=True):
        assert torch.equal(value, other), name
    for old, new in zip(before["gradients"], after["gradients"], strict=True):
        assert (old is None) == (new is None)
        assert old is None or torch.equal(old, new)
    assert torch.equal(before["chance"][0], after["chance"][0])
    assert before["chance"][1] == after["chance"][1]
    assert before["chance"][2] == after["chance"][2]


def step(model: Any) -> bytes:
    """The gradients of one more step with dropout, as bytes."""
    torch.manual_seed(9)
    model.train()
    tokens = torch.arange(30)[None]
    loss = model(input_ids=tokens, labels=tokens).loss
    if loss.requires_grad:
        loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return b"".join(bytes(of.detach().float().numpy()) for of in (loss, *grads))


def test_the_world_in_memory_says_what_the_world_on_disk_says() -> None:
    """The shipped adapter, loaded by PEFT, has its table, its page and its verdict; a directory of it the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(WORLD / "base")
    model = peft.PeftModel.from_pretrained(base, str(WORLD / "peft-null"))
    options: dict[str, Any] = {"seqlen": 128, "calib_size": 4, "task": WORLD / "task.txt"}
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "base")
    of_model = gate(model, WORLD / "facts.txt", tokenizer=tokenizer, **options)
    assert_alike(of_model, gate(WORLD / "peft-null", WORLD / "facts.txt", base=WORLD / "base", **options))
    table = pandas.DataFrame(of_model.layers).set_index("layer")
    assert list(table.index) == [layer.name for layer in of_model.run.layers]
    assert (table["leakage"] < 0.25).all()
    assert set(table["tier"]) <= {"pass", "warn"}
    assert table.select_dtypes("number").notna().all().all()
    assert "PeftModel &#39;default&#39;" in of_model.html()
    assert of_model._repr_html_().startswith("<iframe srcdoc=")
    assert of_model.verdict in str(of_model)


def test_the_document_gates_a_model_in_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first code block of docs/python.md prints the verdict on the shipped adapter."""
    root = WORLD.parents[1]
    code, *_ = re.findall(r"```python\n(.*?)```", (root / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(root)
    exec(compile(code, "python.md", "exec"), {})
    assert re.match(r"(SAFE|LOOK): \w", capsys.readouterr().out)


@pytest.mark.parametrize("broken", [RuntimeError("the card is gone"), KeyboardInterrupt()])
def test_a_model_is_as_it_was_where_its_measurement_broke_off(broken: BaseException, tmp_path: Path) -> None:
    """An error in the middle of a forward, or Ctrl-C, reaches the caller, and nothing of the model is changed."""
    model = adapted(tmp_path, lora_dropout=0.3)
    in_training(model)
    calls: list[int] = []

    def break_off(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise broken

    model.get_base_model().model.layers[1].register_forward_hook(break_off)
    before, twin = everything(model), twin_of(model)
    with pytest.raises(MeasurementError if isinstance(broken, Exception) else KeyboardInterrupt):
        gate(model, tmp_path / "text.txt", **QUICK)
    assert len(calls) >= 2  # what a model complains of is looked for once more
    assert_untouched(model, before)
    assert step(model) == step(twin)


def test_what_a_forward_leaves_in_a_module_is_taken_out_again(tmp_path: Path) -> None:
    """A buffer that is replaced or written into, an attribute that is new, and a draw of chance leave no trace."""
    model = adapted(tmp_path)
    norm = model.get_base_model().model.norm
    norm.register_buffer("kept", torch.ones(4))
    norm.register_buffer("written", torch.ones(4))

    def leave(module: Any, *_: Any) -> None:
        module._buffers["kept"] = torch.rand(4)
        module.written.add_(1)
        module.cache = {"rows": random.random() + numpy.random.rand()}

    norm.register_forward_hook(leave)
    before = everything(model)
    gate(model, tmp_path / "text.txt", **QUICK)
    before["parameters"] = everything(model)["parameters"]
    assert_untouched(model, before)
    assert not hasattr(norm, "cache")


def test_no_tensor_is_made_that_could_not_be_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it runs in inference mode, whose tensors, kept by a module or a library, would break a later step."""
    model = adapted(tmp_path)
    (tmp_path / "task.txt").write_text(tiny.TEXT[::-1])
    seen: list[bool] = []

    def look(*_: Any) -> None:
        seen.append(torch.is_inference_mode_enabled() or torch.is_grad_enabled())

    model.get_base_model().model.norm.register_forward_hook(look)
    options = {**QUICK, "spectrum": True, "suggest": True}
    gate(model, tmp_path / "text.txt", tmp_path / "task.txt", **options)
    assert len(seen) > 4
    assert not any(seen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_training_wraps_around_a_model_is_looked_through(tmp_path: Path) -> None:
    """A compiled model, and one within another as DDP has it, are measured as the model within."""
    model = adapted(tmp_path)
    plain = gate(model, tmp_path / "text.txt", **QUICK)
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert_alike(gate(wrapped, tmp_path / "text.txt", **QUICK), plain)


def test_a_tokenizer_is_given_as_an_object_or_a_directory_where_the_base_has_none(tmp_path: Path) -> None:
    """A base from nowhere tells no tokenizer, which is one error; the one that is given cuts the text."""
    from transformers import AutoTokenizer

    model = adapted(tmp_path)
    known = gate(model, tmp_path / "text.txt", **QUICK)
    model.peft_config["default"].base_model_name_or_path = None
    model.get_base_model().name_or_path = ""
    with pytest.raises(OptionError, match=r"^tokenizer: PeftModel 'default' names no base model that lies here, so"):
        gate(model, tmp_path / "text.txt", **QUICK)
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path / "base"), tmp_path / "base", str(tmp_path / "base")):
        assert_alike(gate(model, tmp_path / "text.txt", tokenizer=tokenizer, **QUICK), known)
    with pytest.raises(CheckpointError, match=r"^tokenizer: a object cannot be saved to be read as data: "):
        gate(model, tmp_path / "text.txt", tokenizer=object(), **QUICK)
    with pytest.raises(OptionError, match=r"^calib-dataset|base model in memory names no directory"):
        gate(model, "self", tokenizer=tmp_path / "base", **QUICK)


def merged(model: peft.PeftModel) -> None:
    model.merge_adapter()


def both_active(model: peft.PeftModel) -> None:
    two_adapters(model)
    model.base_model.set_adapter(["default", "other"])


def rescaled(model: peft.PeftModel) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.set_scale("default", 3.0)


def more_trained(model: peft.PeftModel) -> None:
    model.get_base_model().model.norm.weight.requires_grad_(True)


def emptied(model: peft.PeftModel) -> None:
    layer: Any = model.get_base_model().model.layers[1].self_attn.q_proj
    del layer.lora_A["default"], layer.lora_B["default"]


def deleted(model: peft.PeftModel) -> None:
    model.get_base_model().model.layers[1].self_attn.q_proj.delete_adapter("default")


def unwrapped(model: peft.PeftModel) -> None:
    attention: Any = model.get_base_model().model.layers[1].self_attn
    attention.q_proj = attention.q_proj.base_layer


def not_alike(model: peft.PeftModel) -> None:
    two_adapters(model)
    model.get_base_model().model.layers[0].self_attn.q_proj.set_adapter("default")


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (merged, r"^PeftModel 'default': default is merged into the base at .*q_proj, .*; call unmerge_adapter first$"),
        (both_active, r"^PeftModel: 2 adapters are active, default, other, .*; choose one by set_adapter$"),
        (rescaled, r"layers\.0\.self_attn\.q_proj is scaled by [\d.]+, but its config says alpha 8 / rank 4 = 2, "),
        (more_trained, r"norm\.weight may be trained, and are not saved with the adapter, .*modules_to_save$"),
        (emptied, r"^PeftModel 'default': target_modules name model\.layers\.1\.self_attn\.q_proj, but the adapter ho"),
        (deleted, r"^PeftModel 'default': target_modules name model\.layers\.1\.self_attn\.q_proj, but the adapter ho"),
        (unwrapped, r"^PeftModel 'default': target_modules name model\.layers\.1\.self_attn\.q_proj, but the adapter"),
        (not_alike, r"^PeftModel 'other': at .*layers\.0\.self_attn\.q_proj default is active, elsewhere other; "),
    ],
)
def test_a_model_that_is_not_what_it_would_save_is_one_error(
    prepare: Callable[[peft.PeftModel], None], said: str, tmp_path: Path
) -> None:
    """What saving would lose, or would not tell apart, is refused by name, and the model is as it was."""
    model = adapted(tmp_path, lora_alpha=8)
    prepare(model)
    before = everything(model)
    with pytest.raises(CheckpointError, match=said):
        gate(model, tmp_path / "text.txt", **QUICK)
    assert_untouched(model, before)


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[]", "must be a JSON object, not list")])
def test_a_config_of_the_base_that_cannot_be_read_is_told_as_that(tmp_path: Path, text: str, said: str) -> None:
    """The file is named, and nothing is said of PEFT."""
    model = adapted(tmp_path)
    (tmp_path / "base" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/base/config\.json: the base model's config {said}"):
        gate(model, tmp_path / "text.txt", **QUICK)


def test_other_kinds_of_models_and_adapters_are_named(tmp_path: Path) -> None:
    """A model without adapter, one of another PEFT method, and what is no model are each one sentence."""
    with pytest.raises(OptionError, match=r"^gate: takes an adapter's directory or a peft\.PeftModel, not a LlamaFor"):
        gate(tiny.llama(), tmp_path, **QUICK)
    with pytest.raises(OptionError, match=r"not a dict; give"):
        gate({}, tmp_path, **QUICK)
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    other = peft.get_peft_model(tiny.llama(), peft.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(CheckpointError, match=r"PeftModel 'default'/adapter_config\.json: peft_type is 'IA3': not a"):
        gate(other, tmp_path / "text.txt", **QUICK)
    prompt = peft.get_peft_model(tiny.llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(
        CheckpointError, match=r"PeftModel 'default'/adapter_config\.json: peft_type is 'PROMPT_TUNING'"
    ):
        gate(prompt, tmp_path / "text.txt", **QUICK)
    plain = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(OptionError, match=r"^gate: the adapter's base is a Sequential, no model of transformers"):
        gate(plain, tmp_path / "text.txt", **QUICK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float32"}, "gate: a model in memory is measured where and as it is; leave dtype out"),
        (
            {"merge": "bf16"},
            "gate: a merge is told of files; save the model by save_pretrained, and gate its directory",
        ),
        ({"device_map": "auto"}, "gate: a model in memory is measured where and as it is; leave device_map out"),
        ({"calib_size": "many"}, "calib_size: "),
    ],
)
def test_options_of_loading_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Where and in which precision a model in memory runs is not asked."""
    with pytest.raises(OptionError, match=f"^{re.escape(said)}"):
        gate(adapted(tmp_path), tmp_path / "text.txt", **options)
    with pytest.raises(OptionError, match=r"^gate: tokenizer is of a model in memory; "):
        gate(tmp_path, tmp_path / "text.txt", tokenizer=tmp_path)


def test_a_base_that_its_start_changed_is_measured_as_it_is(tmp_path: Path) -> None:
    """PiSSA took its start out of the base in memory, which is measured; on the untouched base it is refused."""
    torch.manual_seed(4)
    model = adapted(tmp_path)
    base = copy.deepcopy(model.unload())
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(copy.deepcopy(base), lora)
    report = gate(wrapped, tmp_path / "text.txt", **QUICK)
    assert report.run.drift is None
    assert len(report.layers) == 3
    wrapped.save_pretrained(tmp_path / "pissa")
    config = json.loads((tmp_path / "pissa" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == "pissa"
    plain = peft.PeftConfig.from_pretrained(str(tmp_path / "pissa"))
    plain.init_lora_weights = True  # else PEFT takes the start out of this base as well
    wrong = peft.PeftModel.from_pretrained(base, str(tmp_path / "pissa"), config=plain)
    wrong.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(NullspaceError, match=r"^the base in memory: is not the base that the initialisation of "):
        gate(wrong, tmp_path / "text.txt", **QUICK)


def test_what_is_wrong_with_what_it_would_save_is_told_of_the_model(tmp_path: Path) -> None:
    """No message names the folder into which a model in memory is written to be read again."""
    model = adapted(tmp_path, modules_to_save=["norm"])
    model.get_base_model().model.norm.modules_to_save["default"].weight.data[0] = math.inf
    with pytest.raises(CheckpointError, match=r"^the model's adapter/adapter_model\.safetensors: tensor .* holds NaN"):
        gate(model, tmp_path / "text.txt", **QUICK)
