"""PEFT adapters: measured as PEFT computes them, on several architectures, and proved applied."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.measure import measure
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.session import base_directory
from pytest_nullspace.stats import LayerStats
from tests import tiny

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

EXACT = 1e-6
WINDOWS = torch.randint(3, 120, (3, 24), generator=torch.Generator().manual_seed(5)).tolist()
SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def adapter(folder: Path, model: Any, task: str | None = "CAUSAL_LM", **config: Any) -> Path:
    """Save ``model`` as ``folder/base`` and a random LoRA on it as ``folder/adapter``; returns the adapter."""
    model.save_pretrained(folder / "base")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type=task, init_lora_weights=False, **config))
    for name, parameter in wrapped.named_parameters():
        if "lora_magnitude" in name or ("modules_to_save" in name and parameter.requires_grad):
            parameter.data.mul_(1.1)
    wrapped.save_pretrained(folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"base_model_name_or_path": str(folder / "base")}))
    return folder / "adapter"


def opened(directory: Path) -> tuple[Checkpoint, AdaptedModel]:
    checkpoint = open_checkpoint(directory)
    base = base_directory(checkpoint, None)
    return checkpoint, load_model(checkpoint, torch.device("cpu"), torch.float32, base)


def inputs_of(adapted: AdaptedModel, windows: list[list[int]]) -> dict[str, Tensor]:
    """The float64 input rows of each adapted layer, caught as the plain model runs."""
    caught: dict[str, list[Tensor]] = {name: [] for name in adapted.layers}
    handles = [
        layer.layer.register_forward_hook(
            lambda _, args, __, name=name: caught[name].append(args[0].detach().double().flatten(0, -2))
        )
        for name, layer in adapted.layers.items()
    ]
    extra = {"decoder_input_ids"} if adapted.is_encoder_decoder else set()
    with torch.inference_mode():
        for window in windows:
            tokens = torch.tensor([window])
            adapted.model(input_ids=tokens, **dict.fromkeys(extra, tokens))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in caught.items()}


def naive(x: Tensor, layer: Any, lora: Any) -> list[float]:
    """Every mean by its definition in float64, from PEFT's own weights."""
    down, up = lora.lora_A["default"].weight.double(), lora.lora_B["default"].weight.double()
    bias = lora.lora_B["default"].bias
    weight = lora.get_base_layer().weight.double()
    weight = weight.mT if isinstance(lora.get_base_layer(), transformers.pytorch_utils.Conv1D) else weight
    bx = x @ down.mT
    abx = layer.scale * (bx @ up.mT + (0 if bias is None else bias.double()))
    wx = x @ weight.mT
    y = abx + wx
    if lora.use_dora["default"]:
        magnitude = lora.lora_magnitude_vector["default"].weight.double().flatten()
        y = y * magnitude / (weight + layer.scale * up @ down).norm(dim=1)
        abx = y - wx
    projector = torch.linalg.pinv(down) @ down
    leakage = (x @ projector).norm(dim=1).square() / x.norm(dim=1).square()
    return [float(t.norm(dim=1).mean()) for t in (x, bx, abx, wx, y)] + [float(leakage.mean())]


def figures(layer: LayerStats) -> list[float]:
    return [
        layer.input_norm, layer.down_norm, layer.update_norm, layer.base_norm, layer.output_norm, layer.mean_leakage,
    ]  # fmt: skip


def check_figures(adapted: AdaptedModel, rel: float = EXACT) -> None:
    measured = measure(adapted, WINDOWS)
    inputs = inputs_of(adapted, WINDOWS)
    assert measured
    for layer in measured:
        view = adapted.layers[layer.name]
        want = naive(inputs[layer.name], view, view.layer)
        assert figures(layer) == pytest.approx(want, rel=rel), layer.name
        assert layer.defect is None


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {"k_proj": 2, r"model.layers.1.self_attn.v_proj": 6},
        "alpha_pattern": {"v_proj": 64, r".*\.1\..*q_proj": 3},
    },
    "regex": {"r": 3, "target_modules": r".*\.1\.(self_attn|mlp)\.(o|up)_proj"},
    "all-linear": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "layers": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1, 2]},
    "dropout": {"r": 4, "lora_dropout": 0.5, "target_modules": ["q_proj"]},
    "lora_bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "modules_to_save": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_lora_is_computed_as_peft_computes_it(kind: str, tmp_path: Path) -> None:
    """Figures agree with float64 arithmetic, and the model's logits are those of PEFT's own loading."""
    directory = adapter(tmp_path, tiny.llama(tie_word_embeddings=False), **CONFIGS[kind])
    _, adapted = opened(directory)
    check_figures(adapted)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, directory).eval()
    tokens = torch.tensor(WINDOWS)
    with torch.inference_mode():
        torch.testing.assert_close(adapted.model(tokens).logits, theirs(tokens).logits, rtol=1e-6, atol=1e-6)


ARCHITECTURES: dict[str, tuple[Callable[[], Any], str | None, dict[str, Any]]] = {
    "llama": (tiny.llama, "CAUSAL_LM", {}),
    "qwen2, biases that outweigh the outputs": (tiny.qwen2, "CAUSAL_LM", {}),
    "qwen3": (
        lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**tiny.SIZES, head_dim=8)),
        "CAUSAL_LM",
        {},
    ),
    "mistral": (lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**tiny.SIZES)), "CAUSAL_LM", {}),
    "gemma": (
        lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**tiny.SIZES, head_dim=8)),
        "CAUSAL_LM",
        {},
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4)),
        "CAUSAL_LM",
        {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc", "c_proj"]},
    ),
    "gpt-neox": (
        lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, intermediate_size=64)),
        "CAUSAL_LM",
        {},
    ),
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32)
        ),
        "CAUSAL_LM",
        {},
    ),
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=64)),
        "FEATURE_EXTRACTION",
        {},
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
        "SEQ_2_SEQ_LM",
        {},
    ),
    "mixtral": (
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**tiny.SIZES, num_local_experts=4, num_experts_per_tok=2)
        ),
        "CAUSAL_LM",
        {"target_modules": ["q_proj", "o_proj"]},
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_measured(name: str, tmp_path: Path) -> None:
    """A random tiny model of the architecture with LoRA on its linear layers: figures agree with float64 arithmetic."""
    make, task, config = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = make()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter)
    directory = adapter(tmp_path, model, task, **{"r": 4, "target_modules": "all-linear", **config})
    _, adapted = opened(directory)
    # Reading a base's own bias apart needs no subtraction, so even here 1e-6 holds.
    check_figures(adapted)


def change(directory: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Edit the adapter's tensors and config in place."""
    file = directory / "adapter_model.safetensors"
    tensors, config = load_file(file), json.loads((directory / "adapter_config.json").read_text())
    edit(tensors, config)
    save_file(tensors, file)
    (directory / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return adapter(tmp_path, tiny.llama(), r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def rename(old: str, new: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], None], str]] = {
    "another PEFT type": (
        lambda _, config: config.update(peft_type="LOHA"),
        "peft_type is 'LOHA': not a LoRA adapter",
    ),
    "a prefix missing": (rename("base_model.model.", ""), "does not begin with 'base_model.model.' as PEFT's do"),
    "a prefix too many": (rename("model.model.", "model.model.model."), "match nothing in the base model"),
    "the adapter's name left in": (rename("lora_A.", "lora_A.default."), "carries the adapter's name"),
    "half an adapter": (
        lambda tensors, _: tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"),  # type: ignore[dict-item]
        "layer model.layers.1.self_attn.q_proj has no lora_B.weight",
    ),
    "a layer without weights": (
        lambda _, config: config.update(target_modules=["q_proj", "v_proj", "o_proj"]),
        "target_modules name model.layers.0.self_attn.o_proj",
    ),
    "a layer that is no target": (lambda _, config: config.update(target_modules=["q_proj"]), "match nothing"),
    "config rank of another run": (lambda _, config: config.update(r=8), "has rank 4"),
    "an empty tensor": (
        lambda tensors, _: tensors.update(
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.empty(0)}
        ),
        "an empty tensor is what ZeRO-3 leaves",
    ),
    "a base of another width": (
        lambda tensors, _: tensors.update(
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)}
        ),
        "does not fit the base model",
    ),
    "a base changed by its initialisation": (
        lambda _, config: config.update(init_lora_weights="pissa_niter_4"),
        "init_lora_weights pissa_niter_4 changed the base's weights",
    ),
    "no base named": (lambda _, config: config.update(base_model_name_or_path=None), "--nullspace-base=DIR"),
    "a base that is nowhere": (
        lambda _, config: config.update(base_model_name_or_path="/no/such/base"),
        "/no/such/base is no directory",
    ),
    "a base that is on no hub in reach": (
        lambda _, config: config.update(base_model_name_or_path="nobody/nothing"),
        "cannot be had from the hub",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_is_an_error_that_names_what_is_wrong(how: str, saved: Path) -> None:
    """What PEFT only warns about, or does not see, is an error."""
    edit, message = BROKEN[how]
    change(saved, edit)
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        opened(saved)


def test_the_option_names_a_changed_base(saved: Path, tmp_path: Path) -> None:
    """With --nullspace-base the base that an initialisation changed can be given."""
    change(saved, lambda _, config: config.update(init_lora_weights="olora"))
    assert base_directory(open_checkpoint(saved), str(tmp_path / "base")) == tmp_path / "base"


def test_what_no_layer_test_covers_is_listed(tmp_path: Path) -> None:
    """modules_to_save and DoRA magnitudes are trained, so the checkpoint lists them as outside the layers."""
    directory = adapter(
        tmp_path,
        tiny.llama(tie_word_embeddings=False),
        r=4,
        use_dora=True,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
    )
    outside = open_checkpoint(directory).outside
    assert "base_model.model.lm_head.weight" in outside
    assert sum("lora_magnitude_vector" in name for name in outside) == 3
    assert len(outside) == 4


def test_a_lora_null_directory_and_the_same_adapter_in_peft_give_the_same_figures(tmp_path: Path) -> None:
    """The same A, B and W in either format give the same figures to 1e-6."""
    model = tiny.llama()
    ours = tiny.lora_null(tmp_path / "ft", model)
    directory = adapter(tmp_path, model, r=4, lora_alpha=4, target_modules="all-linear")
    null = load_file(ours / "model.safetensors")

    def same(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in tensors:
            layer = name.removeprefix("base_model.model.")
            layer = layer.replace("lora_A", "BLinear").replace("lora_B", "ALinear")
            tensors[name] = null[layer]

    change(directory, same)
    _, theirs = opened(directory)
    native = load_model(open_checkpoint(ours), torch.device("cpu"), torch.float32)
    for one, other in zip(measure(native, WINDOWS), measure(theirs, WINDOWS), strict=True):
        assert one.name == other.name
        assert figures(one) == pytest.approx(figures(other), rel=EXACT)
