"""Whole models beside their base: the figures of the adapter that was merged, and the model's own predictions."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from pytest_nullspace import spectra
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.measuring.drift import drift
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.model.whole import _rounding
from pytest_nullspace.run.stats import UNREACHED, LayerStats
from tests import tiny
from tests.adapters import adapter, edit, merged

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

WINDOWS = torch.randint(3, 120, (3, 24), generator=torch.Generator().manual_seed(5)).tolist()
RATIOS = "effectiveness", "contribution", "forgetting"
TARGETS = ["q_proj", "down_proj"]


def opened(directory: Path, rank: int = 0, dtype: str = "float32") -> AdaptedModel:
    """The model of a directory, whose base lies beside it."""
    base = str(directory.parent / "base")
    return load_model(open_checkpoint(directory, base, rank), "cpu", dtype, base)


def figures(adapted: AdaptedModel) -> dict[str, LayerStats]:
    return {layer.name: layer for layer in measure(adapted, WINDOWS)}


def moved(adapted: AdaptedModel) -> tuple[float, float]:
    """Divergence and loss rise against its base."""
    assert adapted.switched_off is not None
    found = drift(adapted.model, adapted.switched_off, WINDOWS, adapted.device)
    return found.divergence, found.loss_change


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary LoRA on a Qwen2, whose layers have biases, beside its base."""
    folder, model = tmp_path_factory.mktemp("lora"), tiny.qwen2()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.01 if name.endswith("bias") else 1.0)
    return adapter(folder, model, r=4, lora_alpha=8, target_modules=TARGETS)


def test_a_merge_in_float32_has_the_figures_of_its_adapter(lora: Path) -> None:
    """Ratios, drift and, by the rank of the adapter, leakage are those of the LoRA before it was merged."""
    own, whole = opened_peft(lora), opened(merged(lora.parent, lora), rank=4)
    assert moved(whole) == pytest.approx(moved(own), rel=1e-6, abs=1e-8)
    before, after = figures(own), figures(whole)
    assert before.keys() == after.keys()
    for name, layer in after.items():
        for figure in (*RATIOS, "leakage"):
            assert layer.figure(figure) == pytest.approx(before[name].figure(figure), rel=1e-6), (name, figure)
        assert layer.down_weight_norm == pytest.approx(2.0)  # orthonormal rows
        assert layer.up_weight_norm == pytest.approx(whole.layers[name].update.weight.norm().item(), rel=1e-6)  # type: ignore[union-attr, operator]
        assert layer.effective_rank == pytest.approx(effective_rank(own, name), rel=1e-5)


def opened_peft(directory: Path) -> AdaptedModel:
    return load_model(directory, "cpu", "float32", directory.parent / "base")


def effective_rank(adapted: AdaptedModel, name: str) -> float:
    """Of the update of a layer, by its definition."""
    layer = adapted.layers[name]
    values = torch.linalg.svdvals(layer.up_matrix.double() @ layer.down_matrix())[: layer.rank]
    shares = values / values.sum()
    return float((-shares * shares.log()).sum().exp())


def test_a_merge_in_bfloat16_has_them_to_its_rounding(lora: Path) -> None:
    """Stored in half precision the figures lie within what rounding makes of the weights."""
    directory = merged(lora.parent, lora, torch.bfloat16, "half")
    whole = opened(directory)
    own, after = figures(opened_peft(lora)), figures(whole)
    for name, layer in after.items():
        for figure in RATIOS:
            assert layer.figure(figure) == pytest.approx(own[name].figure(figure), rel=2.0**-8), (name, figure)
    assert moved(whole)[0] == pytest.approx(moved(opened_peft(lora))[0], rel=0.05)


def test_what_rounding_alone_makes_of_a_small_change_is_told(lora: Path) -> None:
    """Where a weight moved by about as much as its type can tell apart, the run says how much of ΔW is rounding."""

    def nudge(tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            tensors[name] = ((1.005 if "o_proj" in name else 1.0) * value).bfloat16()

    nudged = edit(shutil.copytree(lora.parent / "base", lora.parent / "nudged"), nudge)
    whole = opened(nudged)
    assert [*whole.layers] == [f"model.layers.{block}.self_attn.o_proj" for block in range(3)]
    share = int(re.search(r"stored in bfloat16, whose rounding alone makes about (\d+)% of", whole.remarks[-1])[1])  # type: ignore[index]
    assert 15 < share < 60


def test_of_layers_in_several_types_the_rounding_of_those_in_half_precision_is_told(lora: Path) -> None:
    """Where the first layer is in float32 and most are not, the types are those of the rounded ones."""

    def nudge(tensors: dict[str, Tensor]) -> None:
        for block, dtype in enumerate((torch.float32, torch.bfloat16, torch.bfloat16)):
            name = f"model.layers.{block}.self_attn.o_proj.weight"
            tensors[name] = (1.005 * tensors[name]).to(dtype)

    mixed = opened(edit(shutil.copytree(lora.parent / "base", lora.parent / "mixed"), nudge))
    assert mixed.remarks[-1].startswith(
        "2 of 3 of its weights are stored in bfloat16, whose rounding alone makes about"
    )


def test_zeros_are_not_rounded() -> None:
    """What is zero is held exactly by every type: pruned numbers add nothing to what rounding makes."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    pruned = torch.cat((weight, torch.zeros(64, 8)))
    assert _rounding(pruned, "BF16") == pytest.approx(_rounding(weight, "BF16"))
    assert _rounding(torch.zeros(4, 4), "F16") == 0


def test_an_update_is_decomposed_once(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of which the down projection was taken give the effective rank as well."""
    directory, taken, singular = merged(lora.parent, lora, name="once"), [], spectra.singular
    monkeypatch.setattr(spectra, "singular", lambda matrix, rank: taken.append(rank) or singular(matrix, rank))  # type: ignore[func-returns-value]
    figures(opened(directory, 4))
    assert taken == [4] * 6
    figures(opened(directory))
    assert taken == [4] * 6 + [0] * 6


def test_a_layer_whose_weight_alone_is_used_is_one_that_no_row_reached(lora: Path) -> None:
    """What a model computes with itself is W′: its ΔW acts, so nothing is said of an update without effect."""
    whole = opened(merged(lora.parent, lora, name="used"))
    mlp: Any = whole.model.get_submodule("model.layers.0.mlp")
    mlp.forward = lambda x: (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) @ mlp.down_proj.weight.mT
    lost = {name: layer.defect for name, layer in figures(whole).items() if layer.defect is not None}
    assert lost == {"model.layers.0.mlp.down_proj": UNREACHED}


def test_without_a_rank_there_is_no_down_projection(lora: Path) -> None:
    """B's figures are absent, not zero and not passed, and what is left is as with one."""
    directory = merged(lora.parent, lora, name="plain")
    for with_down, without in zip(
        measure(opened(directory, 4), WINDOWS), measure(opened(directory), WINDOWS), strict=True
    ):
        assert without.absent[:2] == ("preservation", "leakage")
        assert (without.down_norm, without.down_weight_norm, without.mean_leakage) == (None, None, None)
        assert (without.rank, without.defect) == (0, None)
        assert without.update_norm == with_down.update_norm
        assert without.by_window is not None
        assert without.margins.keys() == set(RATIOS)


def test_the_model_and_its_base_predict_as_they_are_saved(tmp_path: Path) -> None:
    """Changed norms, biases, head and embeddings act; the model and its base are those that transformers loads."""
    model: Any = tiny.qwen2(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "ft")
    adapted, tokens = opened(tmp_path / "ft"), torch.tensor(WINDOWS)
    assert adapted.switched_off is not None
    with torch.inference_mode(), adapted.switched_off() as plain:
        both = adapted.model(tokens).logits, plain(tokens).logits
    for directory, logits in zip(("ft", "base"), both, strict=True):
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / directory, dtype=torch.float32)
        with torch.inference_mode():
            assert torch.allclose(saved(tokens).logits, logits, atol=1e-4, rtol=1e-4)
    outside = open_checkpoint(tmp_path / "ft", str(tmp_path / "base")).outside
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < set(outside)
    assert "model.layers.0.self_attn.q_proj.bias" in outside


def test_layers_that_hold_their_weight_transposed_are_measured_as_they_run(tmp_path: Path) -> None:
    """GPT-2's own linear layers: every mean by its definition in float64, from the files' weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model: Any = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.add_(0.01 * torch.randn(32, 128))
    model.save_pretrained(tmp_path / "ft")
    checkpoint = open_checkpoint(tmp_path / "ft", str(tmp_path / "base"))
    (spec,) = checkpoint.layers
    assert (spec.in_features, spec.out_features) == (32, 128)
    (layer,) = measure(opened(tmp_path / "ft"), WINDOWS)
    caught: list[Tensor] = []
    handle = model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _, args, __: caught.append(args[0].double()))
    with torch.inference_mode():
        for window in WINDOWS:
            model(torch.tensor([window]))
    handle.remove()
    x, key = torch.cat([rows.flatten(0, -2) for rows in caught]), f"{spec.name}.weight"
    weight = before[key].double()
    change = model.state_dict()[key].double() - weight
    parts = (x @ change, x @ weight, x @ (weight + change))
    expected = [float(part.norm(dim=-1).mean()) for part in parts]
    assert [layer.update_norm, layer.base_norm, layer.output_norm] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [136, 124])
def test_layers_beside_a_vocabulary_of_another_size_are_the_same(tmp_path: Path, rows: int) -> None:
    """One that grew has a base whose predictions are compared on what both know, one that was cut has none."""
    model: Any = tiny.llama()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "ft")
    adapted = opened(tmp_path / "ft")
    assert (adapted.switched_off is None) is (rows < 128)
    (layer,) = measure(adapted, WINDOWS)
    assert layer.forgetting == pytest.approx(0.5, rel=1e-6)


def test_what_differs_and_is_no_linear_layer_in_the_model_is_told(tmp_path: Path) -> None:
    """A matrix that a module computes with itself has no view, and a model of such alone is refused."""
    model: Any = tiny.llama()
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "ft")
    edit(tmp_path / "ft", lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}))
    checkpoint = open_checkpoint(tmp_path / "ft", str(tmp_path / "base"))
    from pytest_nullspace.model import whole

    assert whole._linear(nn.Module(), "model", torch.ones(2, 2)) is None
    assert whole._told(["a", "b"], ["c"], checkpoint.directory)[0].startswith("a, b differ from the base's, but are no")
    with pytest.raises(CheckpointError, match="no linear layers in the model"):
        whole._told(["a"], [], checkpoint.directory)


def test_what_is_no_number_is_a_defect(tmp_path: Path) -> None:
    """NaN in a weight that was trained is told of its layer."""
    model: Any = tiny.llama()
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "ft")
    name = "model.layers.0.mlp.up_proj.weight"
    edit(tmp_path / "ft", lambda tensors: tensors.update({name: torch.full((48, 32), torch.nan)}))
    for rank in (0, 2):
        (layer,) = measure(opened(tmp_path / "ft", rank), WINDOWS)
        assert layer.defect == "non-finite weights (NaN or infinity)"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_half_precision_keeps_a_change_that_is_small(tmp_path: Path, dtype: str) -> None:
    """ΔW in numbers that float16 could hardly hold is applied in float32: its figures are those of a run in float32."""
    model: Any = tiny.llama()
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(7)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate_proj.weight.add_(1e-7 * torch.randn(48, 32))
    model.save_pretrained(tmp_path / "ft")
    exact, half = figures(opened(tmp_path / "ft")), figures(opened(tmp_path / "ft", dtype=dtype))
    for name, layer in half.items():
        assert layer.effectiveness == pytest.approx(exact[name].effectiveness, rel=0.01)


SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str], str]] = {
    "fused experts": (
        "Mixtral",
        {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4},
        {"q_proj", "k_proj", "v_proj", "o_proj"},
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    ),
    "weights that are not called": (
        "Mamba",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8},
        {"in_proj", "x_proj", "out_proj"},
        "backbone.layers.0.mixer.dt_proj.weight",
    ),
    "linear layers of its own": (
        "Falcon",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "bias": True},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        "transformer.h.0.mlp.dense_4h_to_h.bias",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_trained_whole_are_gated_in_their_linear_layers(tmp_path: Path, family: str) -> None:
    """Every layer that has a test is measured, what else was trained lies outside, and the model predicts as saved."""
    name, config, layers, outside = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config)).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "ft")
    checkpoint, adapted = open_checkpoint(tmp_path / "ft", str(tmp_path / "base")), opened(tmp_path / "ft")
    assert {layer.name.rpartition(".")[2] for layer in checkpoint.layers} == layers
    assert outside in checkpoint.outside
    assert {stats.name: stats.defect for stats in measure(adapted, WINDOWS)} == dict.fromkeys(adapted.layers)
    assert len(adapted.layers) == len(checkpoint.layers)
    tokens = torch.tensor(WINDOWS)
    with torch.inference_mode():
        assert torch.allclose(adapted.model(tokens).logits, model(tokens).logits, atol=1e-5)
