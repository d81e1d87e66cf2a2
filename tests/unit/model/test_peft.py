"""PEFT adapters: measured as PEFT computes them, on several architectures, and proved applied."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint, patterns
from pytest_nullspace.checkpoint.hub import base_of
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.model.views import view as view_of
from pytest_nullspace.report import notes
from pytest_nullspace.run.stats import LayerStats
from tests import tiny
from tests.adapters import adapter, change, switch
from tests.families import PATCHES
from tests.releases import five, leave_out_older

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

EXACT = 1e-6
WINDOWS = torch.randint(3, 120, (3, 24), generator=torch.Generator().manual_seed(5)).tolist()
SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def opened(directory: Path) -> tuple[Checkpoint, AdaptedModel]:
    checkpoint = open_checkpoint(directory)
    base = base_of(checkpoint, None)
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
    return {name: torch.cat(rows) for name, rows in caught.items() if rows}


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


def figures(layer: LayerStats) -> list[float | None]:
    return [
        layer.input_norm, layer.down_norm, layer.update_norm, layer.base_norm, layer.output_norm, layer.mean_leakage,
    ]  # fmt: skip


def check_figures(adapted: AdaptedModel, rel: float = EXACT) -> None:
    measured = measure(adapted, WINDOWS)
    inputs = inputs_of(adapted, WINDOWS)
    assert measured
    for layer in measured:
        view = adapted.layers[layer.name]
        lora: Any = view.layer
        want = naive(inputs[layer.name], view, lora)
        assert figures(layer) == pytest.approx(want, rel=rel), layer.name
        assert layer.defect is None
        assert layer.scale == lora.scaling["default"], "as PEFT has it"
        up = lora.lora_B["default"].weight.double().norm()
        assert layer.up_weight_norm == pytest.approx(float(layer.scale * up), rel=rel), "A is the matrix with its scale"


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
    "layers of a list": {
        "r": 2,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": ["layers", "blocks"],
    },
    "trained tokens": {
        "r": 4,
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [2]},
    },
    "dropout": {"r": 4, "lora_dropout": 0.5, "target_modules": ["q_proj"]},
    "lora_bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "modules_to_save": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
}
for way, settings in {"Monteclora": {"buffer_size": 2}, "Velora": {"num_groups": 8}}.items():
    if made := getattr(peft.tuners.lora.config, f"{way}Config", None):  # newer than the oldest that is supported
        CONFIGS[way.lower()] = {"r": 4, "target_modules": ["q_proj"], f"{way.lower()}_config": made(**settings)}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_lora_is_computed_as_peft_computes_it(kind: str, tmp_path: Path) -> None:
    """Figures agree with float64 arithmetic, and the model's logits are those of PEFT's own loading."""
    directory = adapter(tmp_path, tiny.llama(tie_word_embeddings=False), **CONFIGS[kind])
    checkpoint, adapted = opened(directory)
    check_figures(adapted)
    assert not any("monteclora" in name or "velora" in name for name in checkpoint.outside), "training alone reads them"
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


def test_a_bias_that_is_a_buffer_is_left_out_as_a_parameter_is(tmp_path: Path) -> None:
    """A base that holds its bias as a buffer, as GPTQ's and AWQ's layers do, has the figures of one that does not."""
    directory = adapter(tmp_path, tiny.qwen2(), r=4, target_modules=["q_proj"])
    (_, plain), (_, adapted) = opened(directory), opened(directory)
    biases = {}
    for name, view in adapted.layers.items():
        biases[name] = view.base.get_parameter("bias").detach()
        del view.base.bias
        nn.Module.register_buffer(view.base, "bias", biases[name])
    assert measure(adapted, WINDOWS) == measure(plain, WINDOWS)
    check_figures(adapted)
    for name, view in adapted.layers.items():
        assert view.base.get_buffer("bias") is biases[name], "it is there again, and still a buffer"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return adapter(tmp_path, tiny.llama(), r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def rename(old: str, new: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


TABLE = Path(__file__).parents[3] / "docs/bad-days.md"
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], None], str]] = {
    "another PEFT type": (
        lambda _, config: config.update(peft_type="LOHA"),
        "peft_type is 'LOHA': not a LoRA adapter, so it has no layers to gate; where its method allows, "
        "peft.save_as_lora(DIR, model, rank=R) of PEFT 0.20 writes",
    ),
    "a kind of LoRA that is not measured": (
        lambda _, config: config.update(alora_invocation_tokens=[60, 33]),
        "alora_invocation_tokens is set: an activated LoRA acts only after its invocation tokens, which is not",
    ),
    "a prefix missing": (rename("base_model.model.", ""), "does not begin with 'base_model.model.' as PEFT's do"),
    "a prefix too many": (
        rename("model.model.", "model.model.model."),
        "6 of its layers, such as model.model.layers.0.self_attn.q_proj, are not in the base model",
    ),
    "a prefix twice": (
        rename("base_model.model.", "base_model.model.base_model.model."),
        "begins with 'base_model.model.' twice",
    ),
    "the name of a compiled model": (
        rename("base_model.model.", "base_model.model._orig_mod."),
        "carries _orig_mod. of torch.compile, which wrapped the model when it was saved; strip it from every key",
    ),
    "the names of two wrappers": (
        lambda tensors, config: (
            rename("base_model", "module.base_model")(tensors, config),
            rename("self_attn", "_fsdp_wrapped_module.self_attn")(tensors, config),
        )[0],
        "carries _fsdp_wrapped_module. of FSDP and module. of DistributedDataParallel or DeepSpeed, which wrapped",
    ),
    "the adapter's name left in": (rename("lora_A.", "lora_A.default."), "carries the adapter's name"),
    "half an adapter": (
        lambda tensors, _: tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"),  # type: ignore[dict-item]
        "layer model.layers.1.self_attn.q_proj has no lora_B.weight",
    ),
    "a layer without weights": (
        lambda _, config: config.update(target_modules=["q_proj", "v_proj", "o_proj"]),
        "target_modules name model.layers.0.self_attn.o_proj",
    ),
    "a layer that is no target": (
        lambda _, config: config.update(target_modules=["q_proj"]),
        "holds model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj … (3 in all), but its target_modules "
        "do not name them",
    ),
    "config rank of another run": (lambda _, config: config.update(r=8), "has rank 4"),
    "a scale that was lost": (lambda _, config: config.pop("lora_alpha"), "lora_alpha is None, not a number"),
    "a number in quotes": (
        lambda _, config: config.update(lora_alpha="16"),
        "lora_alpha must be a number below a billion, not '16'; mend it",
    ),
    "a type that is stored and not computed with": (
        lambda tensors, _: tensors.update({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}),
        "lora_A.weight is F8_E4M3, not a floating point type that is measured; save the adapter in 16 or 32 bits",
    ),
    "a field that PEFT refuses": (
        lambda _, config: config.update(bias="some"),
        "Requested bias: some, is not implemented.; write back what it was trained with, or give the base that",
    ),
    "an empty tensor": (
        lambda tensors, _: tensors.update(
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.empty(0)}
        ),
        "an empty tensor is what ZeRO-3 leaves",
    ),
    "a file of no tensors": (
        lambda tensors, _: tensors.clear(),
        "no adapted layer: none of its 0 tensors is base_model.model.<layer>.lora_A.weight of a linear layer",
    ),
    "a rank_pattern that was lost": (
        lambda tensors, _: tensors.update(
            {
                f"base_model.model.model.layers.2.self_attn.v_proj.lora_{m}.weight": t
                for m, t in (("A", torch.ones(2, 32)), ("B", torch.ones(16, 2)))
            }
        ),
        "gives model.layers.2.self_attn.v_proj the rank 4, but its lora_A.weight has rank 2",
    ),
    "an alpha of a layer that is no number": (
        lambda _, config: config.update(alpha_pattern={"v_proj": None}),
        "alpha_pattern must be an object of numbers below a billion",
    ),
    "a base of another width": (
        lambda tensors, _: tensors.update(
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)}
        ),
        "base: its tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is [4, 16], and the base "
        "would take [4, 32]; give the base that it was trained on by --nullspace-base=DIR",
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


@pytest.mark.parametrize("path", ["base", "models/base", "adapter/../base"])
def test_a_base_that_lies_where_training_ran_is_asked_back(
    path: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path in the config is of the folder in which training ran; elsewhere what lies there is told."""
    (saved.parent / path).mkdir(parents=True, exist_ok=True)
    change(saved, lambda _, config: config.update(base_model_name_or_path=path))
    (tmp_path / "elsewhere" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "deeper")
    with pytest.raises(CheckpointError, match=re.escape(f"(did you mean {(saved.parent / path).resolve()}?)")):
        base_of(open_checkpoint(saved), None)


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_is_an_error_that_names_what_is_wrong(how: str, saved: Path) -> None:
    """What PEFT only warns about, or does not see, is an error, which the table of bad days quotes as it is."""
    edit, message = BROKEN[how]
    change(saved, edit)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        opened(saved)
    exit_code = 1
    try:
        base_of(open_checkpoint(saved), None)
    except CheckpointError:  # told before pytest collects
        exit_code = 4
    said, _, _ = str(caught.value).replace(f"{saved.parent}/", "").partition(" from the hub:")
    row = next(line for line in TABLE.read_text("utf-8").splitlines() if line.startswith(f"| {how} |"))
    assert f"| `{said}" in row
    assert f"| {exit_code} |" in row


@pytest.mark.parametrize(
    ("make", "config", "part", "message"),
    [
        (tiny.qwen2, {"bias": "lora_only"}, ".bias", "biases were trained, but the adapter does not hold base_model"),
        (
            lambda: tiny.llama(tie_word_embeddings=False),
            {"modules_to_save": ["lm_head"]},
            "lm_head",
            "says that base_model.model.lm_head.weight was trained, but the adapter does not hold it",
        ),
    ],
    ids=["biases", "whole modules"],
)
def test_what_was_trained_and_not_saved_is_an_error(
    make: Callable[[], Any], config: dict[str, Any], part: str, message: str, tmp_path: Path
) -> None:
    """Biases and whole modules that the config says were trained must be there; the base's own are not what was."""
    directory = adapter(tmp_path, make(), r=4, target_modules=["q_proj"], **config)

    def lose(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    change(directory, lose)
    with pytest.raises(CheckpointError, match=message):
        opened(directory)


def test_the_option_names_a_changed_base(saved: Path, tmp_path: Path) -> None:
    """With --nullspace-base the base that an initialisation changed can be given."""
    change(saved, lambda _, config: config.update(init_lora_weights="olora"))
    assert base_of(open_checkpoint(saved), str(tmp_path / "base")) == tmp_path / "base"


@pytest.mark.parametrize(
    ("start", "architecture"),
    [("pissa", "llama"), ("pissa_niter_4", "llama"), ("olora", "llama"), ("pissa", "gpt2")],
)
def test_the_untouched_base_is_refused_where_the_changed_one_is_needed(
    start: str, architecture: str, tmp_path: Path
) -> None:
    """After training, too, the base that PEFT left is measured, and the one from before says that it is not that."""
    torch.manual_seed(0)
    make, _, config = ARCHITECTURES.get(architecture, (tiny.llama, None, {"target_modules": "all-linear"}))
    model = make()
    model.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=start, **options))
    optimiser = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 2e-3)
    for _ in range(10):
        adapted(input_ids=(tokens := torch.tensor(WINDOWS)), labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted.save_pretrained(tmp_path / "ft")
    adapted.unload().save_pretrained(tmp_path / "changed")
    checkpoint = open_checkpoint(tmp_path / "ft")

    def loaded(base: str) -> AdaptedModel:
        return load_model(checkpoint, torch.device("cpu"), torch.float32, base_of(checkpoint, str(tmp_path / base)))

    check_figures(loaded("changed"), 1e-5)
    with pytest.raises(
        CheckpointError, match=r"base: is not the base that the initialisation of .*ft changed, .* still holds \d+% of"
    ):
        loaded("base")


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()


def untied() -> Any:
    return tiny.llama(tie_word_embeddings=False)


EMBEDDING = {"embed_tokens.base_layer.weight", "embed_tokens.lora_embedding_A", "embed_tokens.lora_embedding_B"}
OUTSIDE: dict[str, tuple[Callable[[], Any], dict[str, Any], set[str], str]] = {
    "embeddings": (untied, {"target_modules": ["q_proj", "embed_tokens"]}, EMBEDDING, "2 LoRA matrices of embeddings"),
    "tied embeddings": (tiny.llama, {"target_modules": ["q_proj", "embed_tokens"]}, EMBEDDING, "1 whole weights"),
    "tied embeddings, whole in both places": (
        tiny.llama,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"embed_tokens.weight", "lm_head.weight"},
        "2 whole weights",
    ),
    "trained tokens": (
        tiny.llama,
        {"trainable_token_indices": [1, 2, 5]},
        {"embed_tokens.token_adapter.trainable_tokens_delta"},
        "1 trained tokens",
    ),
    "every bias": (
        tiny.qwen2,
        {"bias": "all"},
        {f"layers.{i}.self_attn.{part}.bias" for i in range(3) for part in ("q_proj.base_layer", "k_proj", "v_proj")},
        "9 biases",
    ),
    "the layers' biases": (
        tiny.qwen2,
        {"bias": "lora_only"},
        {f"layers.{i}.self_attn.q_proj.base_layer.bias" for i in range(3)},
        "3 biases",
    ),
    "biases of the LoRA": (
        tiny.llama,
        {"lora_bias": True},
        {f"layers.{i}.self_attn.q_proj.lora_B.bias" for i in range(3)},
        "3 LoRA biases",
    ),
    "magnitudes": (
        tiny.llama,
        {"use_dora": True},
        {f"layers.{i}.self_attn.q_proj.lora_magnitude_vector" for i in range(3)},
        "3 DoRA magnitudes",
    ),
    "whole modules": (
        untied,
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"lm_head.weight", "embed_tokens.weight"},
        "2 whole weights",
    ),
    "experts by parameter": (
        mixtral,
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {
            f"layers.{i}.mlp.experts{base}.lora_{m}.weight"
            for i in range(3)
            for base in ("", ".base_layer")
            for m in "AB"
        },
        "12 LoRA matrices of convolutions or bare parameters",
    ),
    "experts by a bare name": (
        mixtral,
        {"target_parameters": ["gate_up_proj"]},
        {f"layers.{i}.mlp.experts.lora_{m}.weight" for i in range(3) for m in "AB"},
        "6 LoRA matrices of convolutions or bare parameters",
    ),
    "a linear layer's weight as a parameter": (
        tiny.llama,
        {"target_parameters": ["v_proj.weight"]},
        {f"layers.{i}.self_attn.v_proj.lora_{m}.weight" for i in range(3) for m in "AB"},
        "6 LoRA matrices",
    ),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_no_layer_test_covers_is_applied_and_listed(kind: str, tmp_path: Path) -> None:
    """Whatever else PEFT trains is named as outside, told by kind, and applied as PEFT applies it."""
    make, config, names, told = OUTSIDE[kind]
    leave_out_older(kind)
    directory = adapter(tmp_path, make(), **{"r": 4, "target_modules": ["q_proj"], **config})
    checkpoint, adapted = opened(directory)
    short = {name.removeprefix("base_model.model.").removeprefix("model.") for name in checkpoint.outside}
    assert short == names
    assert told in notes.outside(checkpoint.outside)
    assert [layer.name.rpartition(".")[2] for layer in checkpoint.layers] == ["q_proj"] * 3
    check_figures(adapted)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, directory).eval()
    tokens = torch.tensor(WINDOWS)
    with torch.inference_mode():
        torch.testing.assert_close(adapted.model(tokens).logits, theirs(tokens).logits, rtol=1e-6, atol=1e-6)


def test_convolutions_are_listed(tmp_path: Path) -> None:
    """LoRA on a convolution is outside the layers; the linear layers beside it are layers."""
    config = transformers.Wav2Vec2Config(
        **{**SMALL, "num_hidden_layers": 1}, intermediate_size=48, conv_dim=(16, 16), conv_stride=(5, 2),
        conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    directory = adapter(tmp_path, transformers.Wav2Vec2Model(config), None, r=4, target_modules=["q_proj", "conv"])
    checkpoint, adapted = opened(directory)
    assert list(adapted.layers) == ["encoder.layers.0.attention.q_proj"]
    assert notes.outside(checkpoint.outside).startswith(
        "outside the guarantee: trained tensors that no layer test covers, 6 in all: 6 LoRA matrices of convolutions"
    )


def test_a_matrix_among_the_parameters_is_an_error_until_its_module_is_named(tmp_path: Path) -> None:
    """A bare name in target_parameters could be a linear layer's; with its module's, as told, it lies outside."""
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8)
    )
    directory = adapter(tmp_path, model, r=4, target_modules=["lm_head"], target_parameters=["A_log"])
    told = r"bare parameter A_log of backbone.layers.0.mixer, .*; call it mixer.A_log there$"
    with pytest.raises(CheckpointError, match=told):
        opened(directory)
    change(directory, lambda _, config: config.update(target_parameters=["mixer.A_log"]))
    checkpoint, adapted = opened(directory)
    assert list(adapted.layers) == ["lm_head"]
    assert len([name for name in checkpoint.outside if ".mixer.lora_" in name]) == 4
    check_figures(adapted)


@five
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (untied, {"target_modules": ["embed_tokens"]}),
        (mixtral, {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    ],
    ids=["embeddings", "parameters"],
)
def test_an_adapter_that_lies_outside_altogether_is_an_error(
    make: Callable[[], Any], config: dict[str, Any], tmp_path: Path
) -> None:
    """Where no layer test could cover anything there is nothing to gate, so nothing can be green."""
    directory = adapter(tmp_path, make(), r=4, **config)
    with pytest.raises(
        CheckpointError,
        match=r"no adapted layer: none of its .* its LoRA is on embeddings, .* in one piece or bare",
    ):
        open_checkpoint(directory)


def test_two_empty_matrices_are_not_taken_for_a_convolution(saved: Path) -> None:
    """What ZeRO-3 leaves in both matrices of a layer is an error, not a tensor outside the layers."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    empty = {f"{name}.lora_{m}.weight": torch.empty(0, 1, 1) for m in "AB"}
    change(saved, lambda tensors, _: tensors.update(empty))
    with pytest.raises(CheckpointError, match="an empty tensor is what ZeRO-3 leaves"):
        open_checkpoint(saved)


def test_an_expert_that_no_row_reached_is_unreached_and_the_others_exact(tmp_path: Path) -> None:
    """In a mixture of experts each expert's figures are those of its own rows; one without rows says so."""
    _, adapted = opened(adapter(tmp_path, switch(), "SEQ_2_SEQ_LM", r=4, target_modules=["wi"]))
    few = [WINDOWS[0][:8]]
    measured = measure(adapted, few)
    reached = {layer.name: layer for layer in measured if layer.rows}
    unreached = [layer for layer in measured if not layer.rows]
    assert unreached
    assert {layer.defect for layer in unreached} == {"no activation row reached it"}
    inputs = inputs_of(adapted, few)
    assert any(".experts." in name for name in reached)
    for name, layer in reached.items():
        view = adapted.layers[name]
        assert figures(layer) == pytest.approx(naive(inputs[name], view, view.layer), rel=EXACT), name


def test_a_cap_counts_its_share_of_an_experts_rows(tmp_path: Path) -> None:
    """With a cap on rows an expert counts the same share of its own rows, spread alike, and at least stays in them."""
    _, adapted = opened(adapter(tmp_path, switch(), "SEQ_2_SEQ_LM", r=4, target_modules=["wi"]))
    everything = {layer.name: layer.rows for layer in measure(adapted, WINDOWS)}
    capped = {layer.name: layer for layer in measure(adapted, WINDOWS, max_rows=36)}
    total = sum(map(len, WINDOWS))
    assert all(0 < capped[name].rows <= rows for name, rows in everything.items() if rows)
    assert sum(layer.rows for layer in capped.values()) < sum(everything.values())
    dense = [name for name, rows in everything.items() if rows == total]
    assert all(capped[name].rows == 36 for name in dense)
    assert all(layer.defect is None for layer in capped.values() if layer.rows)


def test_an_update_that_is_not_zero_changes_the_output_and_a_zero_one_does_not(saved: Path) -> None:
    """Where a layer has an update_norm above zero the adapter changes the logits; where all are zero it does not."""

    def differs() -> tuple[float, bool]:
        _, adapted = opened(saved)
        tokens = torch.tensor(WINDOWS)
        with torch.inference_mode():
            with_it = adapted.model(tokens).logits
            updates = [layer.update_norm for layer in measure(adapted, WINDOWS)]
            for layer in adapted.layers.values():
                layer.layer.enable_adapters(False)  # type: ignore[operator]
            return max(updates), not torch.equal(with_it, adapted.model(tokens).logits)

    update, changed = differs()
    assert update > 0
    assert changed
    change(saved, lambda tensors, _: tensors.update({n: 0 * t for n, t in tensors.items() if "lora_B" in n}))
    assert differs() == (0, False)


ON_ONE_BASE: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({"target_modules": ["q_proj", "down_proj"]}, True),
    "magnitudes": ({"target_modules": ["q_proj"], "use_dora": True}, True),
    "experts by parameter": (
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        False,
    ),
    "trained tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, True),
    "a saved embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "a whole module": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
}
"""Adapters, and whether their base is as it was once they are taken off it."""


@pytest.mark.parametrize("kind", ON_ONE_BASE)
def test_adapters_of_one_base_share_it_and_leave_it_untouched(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next adapter of the same base gets it without a load, exactly as it was; a base written to is not kept."""
    config, leaves_it_untouched = ON_ONE_BASE[kind]
    leave_out_older(kind)
    directory = adapter(tmp_path, mixtral(), r=4, **config)
    checkpoint, base = open_checkpoint(directory), tmp_path / "base"
    fresh = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    alone = measure(load_model(checkpoint, torch.device("cpu"), torch.float32, base), WINDOWS)
    loads: list[str] = []
    real = transformers.PreTrainedModel.from_pretrained.__func__

    def counted(kind: Any, /, directory: str, **options: Any) -> Any:
        loads.append(directory)
        return real(kind, directory, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(counted))
    bases: dict[Any, nn.Module] = {}
    for _ in range(3):
        adapted = load_model(checkpoint, torch.device("cpu"), torch.float32, base, bases)
        assert not bases
        assert measure(adapted, WINDOWS) == alone
        adapted.take_off()
        assert bool(bases) == leaves_it_untouched
        for kept in bases.values():
            state = kept.state_dict()
            assert list(state) == list(fresh)
            assert all(torch.equal(state[name], fresh[name]) for name in fresh)
    assert len(loads) == (1 if leaves_it_untouched else 3)


def test_a_base_into_which_a_plain_weight_was_written_is_not_handed_on(saved: Path) -> None:
    """A norm in the adapter's file is written into the base, so the next adapter gets a base of its own."""
    change(saved, lambda tensors, _: tensors.update({"base_model.model.model.norm.weight": torch.full((32,), 1.5)}))
    bases: dict[Any, nn.Module] = {}
    checkpoint = open_checkpoint(saved)
    assert checkpoint.outside == ("base_model.model.model.norm.weight",)
    load_model(checkpoint, torch.device("cpu"), torch.float32, saved.parent / "base", bases).take_off()
    assert not bases


def test_a_base_whose_blocks_lie_in_their_files_is_kept_for_nobody(tmp_path: Path) -> None:
    """What a streamed run leaves holds no numbers, so the next adapter of the same base loads it anew."""
    directory, bases = adapter(tmp_path, tiny.llama(), r=4), dict[Any, nn.Module]()
    of = open_checkpoint(directory), torch.device("cpu"), torch.float32, tmp_path / "base", bases
    load_model(*of).take_off()
    assert len(bases) == 1
    load_model(*of, shelve=True).take_off()
    assert not bases


def test_a_base_with_trained_biases_is_not_handed_on(tmp_path: Path) -> None:
    """Trained biases are written into the base's own, so the next adapter gets a base of its own."""
    directory = adapter(tmp_path, tiny.qwen2(), r=4, target_modules=["q_proj"], bias="all")
    bases: dict[Any, nn.Module] = {}
    load_model(open_checkpoint(directory), torch.device("cpu"), torch.float32, tmp_path / "base", bases).take_off()
    assert not bases


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


def test_regexes_are_counted_again_on_the_names_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quick on the layers of the file may not be on the many modules of the base, and never reaches PEFT."""
    saved = adapter(tmp_path, tiny.llama(), target_modules=r"model\.layers\.1\..*(self_attn|mlp).*q_proj")
    checkpoint = open_checkpoint(saved)
    monkeypatch.setattr(patterns, "_COMPILING", 0)
    monkeypatch.setattr(patterns, "MAX_STEPS", 20_000)
    open_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"target_modules: the regex .* could take too long on 46 names of up to"):
        load_model(checkpoint, torch.device("cpu"), torch.float32, tmp_path / "base")


class Scaled(nn.Linear):
    """A linear layer whose forward takes more than its input."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """``factor · W x``."""
        return factor * super().forward(x)


def test_a_layer_that_is_called_with_more_than_its_input_is_joined_as_peft_adds_it() -> None:
    """On a card its output is added by us whatever else its model calls it with; it was a KeyError in the pass."""
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["layer"], init_lora_weights=False)
    wrapped = peft.get_peft_model(nn.ModuleDict({"layer": Scaled(8, 6, bias=False)}), config)
    layer, x, seen = wrapped.base_model.model.layer, torch.randn(3, 8), []
    joined = view_of("layer", layer, "default").joined
    assert joined is not None

    def join(base: Tensor, up: Tensor, scale: float) -> Tensor:
        seen.append(base)
        return base + scale * up

    with torch.no_grad():
        expected = layer(x, factor=3.0)
        with joined(join):
            assert torch.equal(layer(x, factor=3.0), expected)
            assert torch.equal(layer(x, 3.0), expected)
    assert len(seen) == 2
    assert torch.allclose(seen[0], 3 * x @ layer.base_layer.weight.mT)


def aria() -> Any:
    """A tiny model whose projector of images computes attention in one piece."""
    text = {**SMALL, "intermediate_size": 48, "moe_num_experts": 2, "moe_topk": 1, "pad_token_id": 0}
    return transformers.AriaForConditionalGeneration(
        transformers.AriaConfig(
            text_config=text,
            vision_config={**PATCHES, "model_type": "idefics3_vision"},
            image_token_index=120,
            projector_patch_to_query_dict={16: 4},
        )
    )


@five
def test_attention_that_is_computed_in_one_piece_is_outside_the_layers(tmp_path: Path) -> None:
    """PEFT adapts ``torch.nn.MultiheadAttention`` without calling its matrices: told as trained, with no test of it."""
    directory = adapter(tmp_path, aria(), r=4, target_modules=["v_proj", "multihead_attn"])
    checkpoint, adapted = opened(directory)
    assert all(layer.name.endswith("v_proj") for layer in checkpoint.layers)
    assert len([name for name in checkpoint.outside if ".multihead_attn." in name]) == 4
    assert adapted.layers.keys() == {layer.name for layer in checkpoint.layers}
    alone = adapter(tmp_path, aria(), name="alone", r=4, target_modules=["multihead_attn"])
    with pytest.raises(CheckpointError, match=r"attention in one piece or .*; adapt linear layers as well"):
        open_checkpoint(alone)
