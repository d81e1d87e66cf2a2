"""Whole models held against their base from their files: what is a layer, what lies outside, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import CheckpointError
from tests import tiny
from tests.adapters import edit

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, never changed."""
    folder = tmp_path_factory.mktemp("whole") / "base"
    tiny.llama().save_pretrained(folder)
    return folder


Make = Callable[..., Path]


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    """A copy of the base, its tensors and its config edited."""

    def copy(to: Callable[[dict[str, Tensor]], None] = lambda _: None, **config: Any) -> Path:
        shutil.copytree(base, tmp_path / "ft")
        told = json.loads((base / "config.json").read_text()) | config
        (tmp_path / "ft" / "config.json").write_text(json.dumps(told))
        return edit(tmp_path / "ft", to)

    return copy


def trained(*names: str, by: float = 0.5) -> Callable[[dict[str, Tensor]], None]:
    """Moves the tensors of these names."""
    return lambda tensors: tensors.update({name: tensors[name] + by for name in names})


def test_each_linear_layer_that_differs_is_a_layer_and_all_else_is_told(base: Path, make: Make) -> None:
    """Layers that are the base's are counted, and norms and embeddings that changed lie outside."""
    others = "model.norm.weight", "model.embed_tokens.weight"
    found = open_checkpoint(make(trained(f"{QUERY}.weight", "model.layers.2.mlp.down_proj.weight", *others)), str(base))
    assert [layer.name for layer in found.layers] == [QUERY, "model.layers.2.mlp.down_proj"]
    assert (found.layers[1].in_features, found.layers[1].out_features, found.layers[1].rank) == (48, 32, 0)
    assert found.outside == tuple(sorted(others))
    assert found.remarks == (
        "19 of 21 linear layers, such as model.layers.0.mlp.down_proj, are the base's own and no tests",
    )
    assert (found.base, found.is_whole, found.ranks) == (str(base), True, "no down projection")
    assert open_checkpoint(found.directory, str(base), 4).ranks == "rank 4"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_that_wrote_the_base_is_an_error_by_name(base: Path, make: Make, dtype: torch.dtype) -> None:
    """The base again, byte for byte or rounded to another type, is no model that was trained."""
    copy = make(lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items()}))
    with pytest.raises(CheckpointError, match=r"is byte for byte its base .*none of 29 tensors differs; the merge"):
        open_checkpoint(copy, str(base))


def test_what_rounding_to_another_type_leaves_is_the_base_s_own(base: Path, make: Make) -> None:
    """Of a model saved in bfloat16 only what was trained differs from a base in float32."""

    def save(tensors: dict[str, Tensor]) -> None:
        trained(f"{QUERY}.weight")(tensors)
        tensors.update({name: value.bfloat16() for name, value in tensors.items()})

    found = open_checkpoint(make(save), str(base))
    assert [layer.name for layer in found.layers] == [QUERY]
    assert found.outside == ()


def test_a_sign_of_zero_is_no_change(base: Path, make: Make) -> None:
    """What differs in its bytes and in no number is not a layer."""

    def zero(sign: float) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: tensors.update({f"{QUERY}.weight": sign * torch.zeros(32, 32)})

    other = shutil.copytree(base, base.parent / "zeros", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="byte for byte its base"):
        open_checkpoint(make(zero(-1.0)), str(edit(other, zero(1.0))))


MOVED = trained(f"{QUERY}.weight")
REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], None], dict[str, Any], str]] = {
    "norms alone": (trained("model.norm.weight"), {}, r"no linear layer differs from its base .*, only model.norm"),
    "another architecture": (
        trained(f"{QUERY}.weight"),
        {"model_type": "qwen2"},
        r"is a qwen2 model, its base .* llama",
    ),
    "quantised": (
        trained(f"{QUERY}.weight"),
        {"quantization_config": {"bits": 4}},
        r"config.json: has a quantization_",
    ),
    "another shape": (
        lambda tensors: tensors.update({f"{QUERY}.weight": torch.ones(64, 32)}),
        {},
        r"q_proj.weight is \[64, 32\], but \[32, 32\] in the base .*of two architectures",
    ),
    "integers": (
        lambda tensors: tensors.update({f"{QUERY}.weight": torch.ones(32, 32, dtype=torch.int8)}),
        {},
        r"q_proj.weight is I8, not a floating point type whose change could be measured",
    ),
    "incomplete": (lambda tensors: tensors.__delitem__(f"{QUERY}.weight"), {}, r"1 of 29 tensors of the base"),
    "stray": (
        lambda tensors: tensors.update({"score.weight": torch.ones(2, 32)}),
        {},
        r"1 of 30 tensors are not in the base .*, such as score.weight; what was added",
    ),
    "other names": (
        lambda tensors: tensors.update({f"base.{name}": tensors.pop(name) for name in [*tensors]}),
        {},
        r"28 of 29 tensors of the base .* are not in it, .* they are named otherwise",
    ),
    "layers of peft inside": (
        lambda tensors: tensors.update({f"{QUERY}.lora_A.default.weight": torch.ones(2, 32)}),
        {},
        r"a whole model with PEFT's layers inside",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_two_models_of_which_no_change_can_be_told_are_refused_in_a_sentence(base: Path, make: Make, case: str) -> None:
    """Each says which tensor or config, and what to do."""
    to, config, match = REFUSED[case]
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(make(to, **config), str(base))


def test_a_base_that_is_none_is_refused(base: Path, make: Make, tmp_path: Path) -> None:
    """The model itself, a GGUF file and a rank beyond the layers' are each told."""
    model = make(trained(f"{QUERY}.weight"))
    with pytest.raises(CheckpointError, match="is the model itself; give the base"):
        open_checkpoint(model, str(model))
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="a GGUF file holds quantised weights"):
        open_checkpoint(model, str(tmp_path / "base.gguf"))
    with pytest.raises(CheckpointError, match=r"--nullspace-rank: 33 is above what .*q_proj.weight, \[32, 32\]"):
        open_checkpoint(model, str(base), 33)


def test_a_missing_shard_is_told_as_such(base: Path, make: Make) -> None:
    """Of a model in shards the file that is not there is named."""
    model = make(trained(f"{QUERY}.weight"))
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors: .* is missing"):
        open_checkpoint(model, str(base))


def test_a_head_that_is_tied_or_not_and_a_resized_vocabulary_are_told(base: Path, make: Make) -> None:
    """A head that training untied lies outside, one that is the embeddings does not, and more rows are no error."""

    def head(tensors: dict[str, Tensor]) -> None:
        trained(f"{QUERY}.weight")(tensors)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = make(head)
    assert open_checkpoint(model, str(base)).outside == ()
    edit(model, trained("lm_head.weight"))
    assert open_checkpoint(model, str(base)).outside == ("lm_head.weight",)
    edit(model, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(130, 32)}))
    found = open_checkpoint(model, str(base))
    assert found.cut == ""
    assert found.remarks[-1].startswith("the vocabulary of 128 was resized to 130, as model.embed_tokens.weight has, ")
    assert found.remarks[-1].endswith("so the predictions are compared on what both know")
    edit(model, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(120, 32)}))
    found = open_checkpoint(model, str(base))
    assert found.cut in found.remarks
    assert found.cut.endswith("so the predictions cannot be held against the base's")


@pytest.mark.parametrize("rows", [48, 96])
def test_a_table_of_positions_of_another_length_is_no_vocabulary(tmp_path: Path, rows: int) -> None:
    """Longer or shorter it is told as what it is, and the predictions can be held against the base's."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model: Any = transformers.GPT2LMHeadModel(config)
    for name in ("base", "ft"):
        model.save_pretrained(tmp_path / name)
    edit(tmp_path / "ft", trained("transformer.h.0.mlp.c_fc.weight"))
    edit(tmp_path / "ft", lambda tensors: tensors.update({"transformer.wpe.weight": torch.ones(rows, 32)}))
    found = open_checkpoint(tmp_path / "ft", str(tmp_path / "base"))
    assert found.cut == ""
    assert found.remarks[1:] == (
        f"transformer.wpe.weight, a table of positions or types, has {rows} rows, and 64 in the base",
    )
    edit(tmp_path / "ft", lambda tensors: tensors.update({"transformer.wte.weight": torch.ones(120, 32)}))
    assert open_checkpoint(tmp_path / "ft", str(tmp_path / "base")).cut.startswith(
        "the vocabulary of 128 was resized to 120, as transformer.wte.weight has"
    )


@pytest.mark.parametrize(("dtype", "size"), [("F4", 512), ("F6_E2M3", 768)])
def test_what_is_stored_by_less_than_a_byte_is_held_against_its_base_by_its_bytes(
    base: Path, make: Make, dtype: str, size: int
) -> None:
    """A changed tensor of four or six bits a number is told as one outside, and an equal one is not."""
    model, other = make(trained(f"{QUERY}.weight")), shutil.copytree(base, base.parent / dtype)
    for directory in (model, other):
        add(directory, "model.packed_weight", dtype, bytes(size))
    assert open_checkpoint(model, str(other)).outside == ()
    add(model, "model.packed_weight", dtype, bytes(size - 1) + b"\1")
    assert open_checkpoint(model, str(other)).outside == ("model.packed_weight",)


def add(directory: Path, name: str, dtype: str, data: bytes) -> None:
    """Put a tensor of 32 by 32 numbers of any type at the end of a model's file, or another in its place."""
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header, held = json.loads(raw[8:end]), raw[end:]
    if name in header:
        held = held[: header[name]["data_offsets"][0]]
    header[name] = {"dtype": dtype, "shape": [32, 32], "data_offsets": [len(held), len(held) + len(data)]}
    told = json.dumps(header).encode()
    file.write_bytes(len(told).to_bytes(8, "little") + told + held + data)


def test_an_adapter_s_directory_is_read_as_one_beside_a_base(base: Path, tmp_path: Path) -> None:
    """With a base given a LoRA-Null directory is still that."""
    assert open_checkpoint(tiny.lora_null(tmp_path / "null"), str(base)).format == "LoRA-Null"
