"""PEFT adapters on bases that a library of transformers' quantised, on the CPU; skipped where it is not installed."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model.stored import weight_of
from tests import tiny
from tests.adapters import adapter
from tests.releases import five
from tests.unit.model.test_peft import EXACT, WINDOWS, inputs_of, opened

# The libraries' own, while the tests quantise with them.
pytestmark = pytest.mark.filterwarnings("ignore")


def bitsandbytes(**options: Any) -> Any:
    return transformers.BitsAndBytesConfig(**options)


def torchao(name: str) -> Any:
    import torchao.quantization

    return transformers.TorchAoConfig(getattr(torchao.quantization, name)())


KINDS: dict[str, tuple[str, Callable[[], Any], float]] = {
    "bitsandbytes 8 bit": ("bitsandbytes", lambda: bitsandbytes(load_in_8bit=True), 0.01),
    "bitsandbytes 4 bit": ("bitsandbytes", lambda: bitsandbytes(load_in_4bit=True), 0.15),
    "bitsandbytes nf4": (
        "bitsandbytes",
        lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        0.1,
    ),
    "torchao int8 weights": ("torchao", lambda: torchao("Int8WeightOnlyConfig"), 0.01),
    "torchao int8": ("torchao", lambda: torchao("Int8DynamicActivationInt8WeightConfig"), 0.01),
    "torchao float8 weights": ("torchao", lambda: torchao("Float8WeightOnlyConfig"), 0.04),
}
"""The library, its configuration, and how far a weight may lie from the one that was quantised, relatively."""


def quantised(folder: Path, kind: str) -> tuple[Path, Any]:
    """An adapter whose base was saved quantised, and that base as it was before."""
    library, config, _ = KINDS[kind]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    plain = tiny.llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    directory = adapter(folder, plain, r=4, target_modules="all-linear")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config())
    base.save_pretrained(folder / "base")
    assert "quantization_config" in json.loads((folder / "base" / "config.json").read_text())
    return directory, plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_measured_as_it_computes(kind: str, tmp_path: Path) -> None:
    """Figures are those of what each module gives for its inputs, logits those of PEFT's own loading."""
    directory, _ = quantised(tmp_path, kind)
    _, adapted = opened(directory)
    measured = measure(adapted, WINDOWS)
    inputs = inputs_of(adapted, WINDOWS)
    assert len(measured) == 21
    for layer in measured:
        view, x = adapted.layers[layer.name], inputs[layer.name]
        with torch.inference_mode():
            wx = view.base(x.float()).double()
        abx = view.scale * (x @ view.down_matrix().mT) @ view.up_matrix.double().mT
        want = [float(t.norm(dim=1).mean()) for t in (x, abx, wx, abx + wx)]
        got = [layer.input_norm, layer.update_norm, layer.base_norm, layer.output_norm]
        assert got == pytest.approx(want, rel=EXACT), layer.name
        assert layer.defect is None
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, directory).eval()
    tokens = torch.tensor(WINDOWS)
    with torch.inference_mode():
        torch.testing.assert_close(adapted.model(tokens).logits, theirs(tokens).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_a_quantised_weight_is_that_of_its_numbers(kind: str, tmp_path: Path) -> None:
    """‖W_res‖ is the norm of what the layer multiplies by, and near that of the weight that was quantised."""
    directory, plain = quantised(tmp_path, kind)
    _, adapted = opened(directory)
    for layer in measure(adapted, WINDOWS):
        view, weight = adapted.layers[layer.name], plain.get_submodule(layer.name).weight
        with torch.inference_mode():
            multiplied = view.base(torch.eye(view.in_features)).norm()
            matrix = view.base_matrix()
        assert layer.base_weight_norm == pytest.approx(float(multiplied), rel=0.01), layer.name
        assert matrix is not None
        assert (matrix.float() - weight).norm() < KINDS[kind][2] * weight.norm(), layer.name


@pytest.mark.parametrize(
    "weight",
    [torch.ones(8, 4, dtype=torch.int8), torch.ones(8, 4).to(torch.float8_e4m3fn), torch.ones(16, 1), None],
    ids=["whole numbers", "scaled apart", "packed", "of another name"],
)
def test_a_weight_that_does_not_tell_its_numbers_has_no_norm(weight: torch.Tensor | None) -> None:
    """What is packed or scaled apart gives no norm rather than a wrong one; a plain weight gives its own."""
    module = nn.Linear(4, 8)
    assert weight_of(module, {4, 8}) is module.weight
    del module.weight
    if weight is not None:
        module.weight = nn.Parameter(weight, requires_grad=False)
    assert weight_of(module, {4, 8}) is None


@five
@pytest.mark.parametrize(("library", "options"), [("bitsandbytes", {"load_in_8bit": True}), ("torchao", {})])
def test_a_missing_library_is_named(library: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A base whose quantisation cannot be read here is an error that says what to install."""
    if find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"])
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": library, **options}}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"quantised by {library}, .* not installed: .*; pip install {library}$"):
        opened(directory)


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_quantised_weights_without_their_config_are_an_error(part: str, tmp_path: Path) -> None:
    """Where nothing says how they are computed with, no other model is measured in their place."""
    directory = adapter(tmp_path, tiny.llama(), r=2, target_modules=["q_proj"])
    file, name = tmp_path / "base/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    if part == "weight":
        tensors[name] = (tensors[name] * 100).to(torch.int8)
    else:
        tensors[f"{name}_scale"] = torch.ones(1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"up_proj\.{part}' .* is of quantised weights, and config\.json has no"):
        opened(directory)
