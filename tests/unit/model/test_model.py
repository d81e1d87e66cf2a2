"""The model rebuilt from a checkpoint: the same function as the plain one, every weight in its place, no code run."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.measuring.factors import weight_norms
from pytest_nullspace.model import AdaptedLayer, AdaptedModel, load_model
from pytest_nullspace.model.known import require_known
from tests import tiny
from tests.releases import FIVE

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 43).reshape(2, 20)
Q = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """The model of the checkpoint in ``folder``."""
    return load_model(open_checkpoint(folder), CPU, dtype)


def logits(model: nn.Module) -> Tensor:
    """The model's answer to some tokens."""
    with torch.inference_mode():
        answer: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return answer


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in ``folder``, as the safetensors library reads it."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def merged(folder: Path, plain: PreTrainedModel) -> PreTrainedModel:
    """``plain`` with the weights in ``folder``, each adapter merged into its layer: ``W = W_res + A B``, in float64."""
    tensors = {name: value.double() for name, value in stored(folder).items()}
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        layer, _, part = name.rpartition(".weight_residual")
        if layer and not part:
            down, up = tensors[f"{layer}.BLinear.weight"], tensors[f"{layer}.ALinear.weight"]
            if f"{layer}.PALinear.weight" in tensors:
                down = down - down @ tensors[f"{layer}.PALinear.weight"] @ tensors[f"{layer}.PBLinear.weight"]
            state[f"{layer}.weight"] = value + up @ down
        elif name.endswith(".ALinear.bias"):
            state[name.replace(".ALinear.bias", ".bias")] = value
        elif "Linear." not in name:
            state[name] = value
    if plain.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    plain = plain.double()
    plain.load_state_dict(state, strict=True)
    return plain.eval()


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, tied": tiny.llama,
    "llama, not tied": lambda: tiny.llama(tie_word_embeddings=False),
    "llama, all biases": lambda: tiny.llama(attention_bias=True, mlp_bias=True),
    "qwen2, biases": tiny.qwen2,
    "qwen2, tied": lambda: tiny.qwen2(tie_word_embeddings=True),
}


@pytest.mark.parametrize(
    ("kind", "dtype", "shards", "protected"),
    [
        *((kind, torch.float32, 1, None) for kind in ARCHITECTURES),
        ("llama, tied", torch.bfloat16, 1, None),
        ("llama, tied", torch.float16, 3, None),
        ("qwen2, biases", torch.bfloat16, 3, None),
        ("qwen2, biases", torch.float16, 1, None),
        ("llama, all biases", torch.float32, 1, 3),
        ("qwen2, biases", torch.bfloat16, 3, 3),
    ],
)
def test_it_answers_as_the_plain_model_with_merged_weights(
    tmp_path: Path, kind: str, dtype: torch.dtype, shards: int, protected: int | None
) -> None:
    """The rebuilt model is the plain one with W_res + A B in place of W, whatever the type and the number of files."""
    tiny.lora_null(tmp_path, ARCHITECTURES[kind](), dtype=dtype, shards=shards, protected=protected)
    ours, plain = logits(load(tmp_path).model), logits(merged(tmp_path, ARCHITECTURES[kind]()))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), plain, rtol=0, atol=float(2e-5 * plain.abs().max()))


def test_the_adapter_matters_to_that_comparison(tmp_path: Path) -> None:
    """The adapters of these checkpoints move the logits far beyond the tolerance, so a lost one would be seen."""
    with_adapter, without = tmp_path / "a", tmp_path / "b"
    tiny.lora_null(with_adapter)
    tiny.lora_null(without, up_scale=0.0)
    difference = logits(load(with_adapter).model) - logits(load(without).model)
    assert difference.abs().max() > 1e-2 * logits(load(without).model).abs().max()
    torch.testing.assert_close(logits(load(without).model), logits(tiny.llama()), rtol=1e-5, atol=1e-6)


def watched(layer: AdaptedLayer, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's output for ``x``, and those of its parts."""
    seen: dict[str, Tensor] = {}
    for part in ("down", "up", "base"):
        getattr(layer, part).register_forward_hook(lambda _, __, output, part=part: seen.update({part: output}))
    with torch.inference_mode():
        output: Tensor = layer.layer(x)
    return output, seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("protected", [None, 3])
def test_each_layer_is_its_formula(tmp_path: Path, protected: int | None, bias: bool) -> None:
    """Each adapted layer gives ``A B (x - P_A P_B x) + W_res x + bias``, and its parts give what they stand for."""
    tiny.lora_null(tmp_path, tiny.qwen2() if bias else None, protected=protected)
    adapted, tensors = load(tmp_path), stored(tmp_path)
    for name, layer in adapted.layers.items():
        weight = {part.removeprefix(f"{name}."): t.double() for part, t in tensors.items() if part.startswith(name)}
        x = torch.randn(5, layer.down_matrix().shape[1], dtype=torch.float64)
        kept = x - x @ weight["PBLinear.weight"].mT @ weight["PALinear.weight"].mT if protected else x
        down = kept @ weight["BLinear.weight"].mT
        up, base = down @ weight["ALinear.weight"].mT, x @ weight["weight_residual"].mT
        output, seen = watched(layer, x.float())
        assert layer.has_bias == ("ALinear.bias" in weight) == (bias and name.split(".")[-1] in "q_proj k_proj v_proj")
        total = up + base + weight.get("ALinear.bias", torch.zeros(1))
        for ours, wanted in ((seen["down"], down), (seen["up"], up), (seen["base"], base), (output, total)):
            torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        torch.testing.assert_close(x @ layer.down_matrix().mT, down, rtol=1e-12, atol=1e-12)
        assert (layer.scale, layer.out_features) == (1.0, len(weight["weight_residual"]))
        assert weight_norms([layer])()[0] == pytest.approx(
            [float(weight[part].norm()) for part in ("BLinear.weight", "ALinear.weight", "weight_residual")], rel=1e-7
        )


@pytest.mark.parametrize("power", [-100, -70, 70, 100])
def test_the_norm_of_weights_is_theirs_however_large_or_small_they_are(tmp_path: Path, power: int) -> None:
    """B by a power of two and A by its inverse are the same update: no norm of theirs is infinite or zero for it."""

    def rescale(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            factor = power if name.endswith("BLinear.weight") else -power if name.endswith("ALinear.weight") else 0
            tensors[name] = tensor * 2.0**factor

    tiny.lora_null(tmp_path / "plain"), tiny.lora_null(tmp_path / "scaled", change=rescale)
    plain, scaled = load(tmp_path / "plain").layers, load(tmp_path / "scaled").layers
    for name, layer in plain.items():
        down, up, base = weight_norms([layer])()[0]
        assert down is not None
        assert weight_norms([scaled[name]])()[0] == pytest.approx((down * 2.0**power, up * 2.0**-power, base), rel=1e-7)


def test_layers_come_in_model_order_and_the_model_in_eval_mode(tmp_path: Path) -> None:
    """The layers are those of the checkpoint in its order; no dropout is left on and no gradient is kept."""
    tiny.lora_null(tmp_path, tiny.llama(attention_dropout=0.5))
    adapted = load(tmp_path)
    assert list(adapted.layers) == [spec.name for spec in open_checkpoint(tmp_path).layers]
    assert not any(module.training for module in adapted.model.modules())
    assert not any(parameter.requires_grad for parameter in adapted.model.parameters())
    assert adapted.device == CPU
    assert not any(tensor.is_meta for tensor in (*adapted.model.parameters(), *adapted.model.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_runs_in_the_dtype_that_is_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every weight has the type asked for, whatever the file's; rotary frequencies stay in float32."""
    tiny.lora_null(tmp_path, dtype=torch.bfloat16)
    adapted = load(tmp_path, dtype)
    assert {parameter.dtype for parameter in adapted.model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in adapted.model.buffers()} == {torch.float32}
    assert logits(adapted.model).dtype == dtype


def test_a_tied_head_shares_the_embeddings(tmp_path: Path) -> None:
    """A tied head is the embeddings' own memory, whether the file holds it once or twice, in one shard or two."""

    def both(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    changes: list[tuple[Change | None, int]] = [(None, 1), (both, 1), (both, 2), (both, 3)]
    for number, (change, shards) in enumerate(changes):
        folder = tiny.lora_null(tmp_path / str(number), change=change, shards=shards)
        model = load(folder).model
        head, embeddings = model.get_parameter("lm_head.weight"), model.get_parameter("model.embed_tokens.weight")
        assert head.data_ptr() == embeddings.data_ptr()
        assert torch.equal(head, stored(folder)["model.embed_tokens.weight"])


# Trust


def test_the_files_of_the_directory_are_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python files beside the weights, which the config names, are neither run nor imported, from anywhere."""
    tiny.lora_null(tmp_path)
    for trap in tmp_path.glob("*_trap.py"):
        trap.write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n{tiny.TRAP}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    load(tmp_path)
    assert not (tmp_path / "executed").exists()
    assert not [name for name in sys.modules if name.endswith("_trap")]


def test_a_config_cannot_choose_another_implementation(tmp_path: Path) -> None:
    """Fields of the config that lead to code, other weights or quantisation have no effect."""

    def change(_: dict[str, Tensor], config: dict[str, Any]) -> None:
        config |= {
            "attn_implementation": "hub-user/kernel",
            "_attn_implementation": "hub-user/kernel",
            "experts_implementation": "hub-user/kernel",
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "custom_pipelines": {"x": {"impl": "modeling_trap.Trap"}},
            "_name_or_path": "/etc",
            "torch_dtype": "float16",
        }

    plain = logits(load(tiny.lora_null(tmp_path / "a")).model)
    assert torch.equal(logits(load(tiny.lora_null(tmp_path / "b", change=change)).model), plain)


def test_weights_are_mapped_where_they_fit(tmp_path: Path) -> None:
    """In the file's own type the parameters lie in the mapped file: no second copy of the model is in memory."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    file = tiny.lora_null(tmp_path, dtype=torch.bfloat16) / "model.safetensors"

    def mapped(model: nn.Module) -> list[bool]:
        ranges = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in maps.read_text().splitlines()
            if line.endswith(str(file))
        ]
        return [any(a <= p.data_ptr() < b for a, b in ranges) for p in model.parameters()]

    same, other = load(tmp_path, torch.bfloat16), load(tmp_path, torch.float32)
    assert all(mapped(same.model))
    assert not any(mapped(other.model))


# What does not fit


def refused(folder: Path, change: Change, model: PreTrainedModel | None = None, shards: int = 1) -> str:
    """The message with which loading a changed checkpoint fails; it names the directory."""
    tiny.lora_null(folder, model, change=change, shards=shards)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """A tensor that the model has no parameter for is named: it would have been left out silently."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)

    message = refused(tmp_path, change)
    assert "1 tensors that the model has no place for: model.layers.0.mlp.extra.weight" in message
    assert "parameters without a tensor" not in message


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_parameter_without_a_tensor_is_refused(tmp_path: Path, name: str) -> None:
    """A parameter that no tensor fills is named: it would have held anything."""
    message = refused(tmp_path, lambda tensors, _: tensors.__delitem__(name))
    assert f"1 parameters without a tensor: {name}" in message or "1 parameters without a tensor: lm_head" in message


def test_many_misfits_are_counted_and_the_first_named(tmp_path: Path) -> None:
    """A checkpoint of another depth gives one short message, not one of a thousand names."""
    message = refused(tmp_path, lambda _, config: config.update(num_hidden_layers=4))
    assert "9 parameters without a tensor: model.layers.3." in message
    assert message.endswith(" …; copy both from one save")


def test_a_layer_that_the_architecture_lacks_is_refused(tmp_path: Path) -> None:
    """Weights of a deeper model than the config's are told by the first layer that has no place."""
    message = refused(tmp_path, lambda _, config: config.update(num_hidden_layers=2))
    assert "the weights adapt model.layers.2.self_attn.q_proj, but a llama model of this config has no such layer" in (
        message
    )


def test_an_adapter_on_what_is_no_linear_layer_is_refused(tmp_path: Path) -> None:
    """Adapter weights on the place of a norm are refused."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for part in ("BLinear.weight", "ALinear.weight", "weight_residual"):
            tensors[f"model.norm.{part}"] = tensors[f"{Q}.{part}"].clone()

    assert "model.norm is a LlamaRMSNorm, not a linear layer" in refused(tmp_path, change)


def test_widths_that_differ_from_the_config_are_refused(tmp_path: Path) -> None:
    """A layer or a plain weight of another size than the config's is named with both sizes."""
    message = refused(tmp_path / "a", lambda _, config: config.update(intermediate_size=40))
    assert "model.layers.0.mlp.gate_proj is (48, 32) in the weights, (40, 32) by config.json" in message
    message = refused(tmp_path / "b", lambda _, config: config.update(vocab_size=130))
    assert "tensor model.embed_tokens.weight has shape [128, 32], but config.json makes it [130, 32]" in message
    message = refused(tmp_path / "c", lambda tensors, _: tensors.update({"model.norm.weight": torch.zeros(1, 32)}))
    assert "tensor model.norm.weight has shape [1, 32], but config.json makes it [32]" in message


@pytest.mark.parametrize("shelve", [False, True])
def test_quantised_weights_are_refused(tmp_path: Path, shelve: bool) -> None:
    """Whole numbers in the place of a weight are none that the model computes with, be it streamed or loaded whole."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["model.layers.1.input_layernorm.weight"] = torch.full((32,), 100, dtype=torch.int8)

    checkpoint = open_checkpoint(tiny.lora_null(tmp_path, change=change))
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.input_layernorm\.weight is I8, quantised, and nothing"
    ):
        load_model(checkpoint, CPU, torch.float32, shelve=shelve)


def test_a_bias_that_the_weights_lack_is_refused(tmp_path: Path) -> None:
    """Where the architecture's layer has a bias and the checkpoint has none, the model would be another one."""
    message = refused(tmp_path, lambda tensors, _: tensors.__delitem__(f"{Q}.ALinear.bias"), tiny.qwen2())
    assert f"{Q}.ALinear.bias" in message


@pytest.mark.parametrize(("name", "like"), [("bias", "ALinear.bias"), ("residual.weight", "weight_residual")])
def test_two_tensors_for_one_parameter_are_refused(tmp_path: Path, name: str, like: str) -> None:
    """A plain tensor beside the adapter's own, for the same parameter, is named instead of one hiding the other."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q}.{name}"] = tensors[f"{Q}.{like}"] + 1

    assert f"{Q}.{name}" in refused(tmp_path, change, tiny.qwen2())


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, shards: int) -> None:
    """A head of its own under a config that ties it is told, not dropped, wherever the two tensors lie."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    message = refused(tmp_path, change, shards=shards)
    assert "config.json ties " in message
    assert "lm_head.weight" in message
    assert "model.embed_tokens.weight" in message
    assert "set tie_word_embeddings to false" in message


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "vit"},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"hidden_act": "no_such_activation"},
    ],
)
def test_a_config_that_builds_no_causal_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """An unknown or unfit architecture, and values that transformers refuses, are the user's to mend."""
    message = refused(tmp_path, lambda _, config: config.update(change))
    assert f"{tmp_path / 'config.json'}: transformers cannot build a causal" in message


def test_an_architecture_that_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    """A LoRA-Null directory whose plain architecture needs code of its own is told so, and that code is not run."""
    message = refused(tmp_path, lambda _, config: config.update(model_type="no_such_model"))
    assert "has no model_type 'no_such_model' of its own, and the code that auto_map names" in message


def test_weights_that_changed_since_collection_are_refused(tmp_path: Path) -> None:
    """A file cut short between reading its header and its data is told by name."""
    tiny.lora_null(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the weights cannot be read"):
        load_model(checkpoint, CPU, torch.float32)


def test_the_config_read_is_the_one_on_disk(tmp_path: Path) -> None:
    """Fields that shape the architecture reach it: another rope base gives other logits."""
    tiny.lora_null(tmp_path)
    before = logits(load(tmp_path).model)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 17.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not FIVE:  # which passes over that field, and would compute another model
        with pytest.raises(CheckpointError, match=r"whose rope_parameters transformers \S+ does not read"):
            load(tmp_path)
        return
    assert not torch.allclose(logits(load(tmp_path).model), before)


@pytest.mark.parametrize(
    ("field", "refused"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, False),
        ({"rope_type": "default", "rope_theta": 17.0}, True),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, True),
        ({"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}, True),
    ],
)
def test_positions_that_an_older_transformers_passes_over_are_refused(
    field: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers 4 would compute otherwise is not measured, at the top of a config or in a part of it."""
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "llama", lambda: SimpleNamespace(rope_theta=10000.0))
    of_part = {"model_type": "llama", "text_config": {"rope_parameters": field}}
    for config, is_wrong in (({"model_type": "llama", "rope_parameters": field}, refused), (of_part, True)):
        with pytest.raises(CheckpointError, match="rope_parameters") if is_wrong else nullcontext():
            require_known(config, Path("config.json"))
    monkeypatch.setattr("transformers.__version__", "5.0.0")
    require_known({"model_type": "llama", "rope_parameters": field}, Path("config.json"))
