"""LoRAs of llama.cpp are measured as the PEFT adapters from which they were converted; all else is refused."""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pytest_nullspace import gate
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.arrays import norm, read_tensor, rows_of
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.judging.audit import audit
from pytest_nullspace.judging.served import asked, base_at_hand
from pytest_nullspace.judging.serving import Outcome, hold
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import load_model
from tests import tiny
from tests.adapters import adapter, change

gguf = pytest.importorskip("gguf", reason="gguf, which reads GGUF files, is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

WINDOWS = [[1, 5, 9, 2, 7, 11], [3, 3, 8, 1, 0, 4]]
PREFIX = "base_model.model."
Tensors = dict[str, tuple[Tensor, str]]
"""By their names in the file, each with the type in which it is stored."""


def permute(weights: Tensor, heads: int, heads_kv: int | None) -> Tensor:
    """What LlamaModel.permute of llama.cpp's converter does."""
    if heads_kv is not None and heads != heads_kv:
        heads = heads_kv
    turned = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2)
    return turned.reshape(weights.shape)


def converted(directory: Path, architecture: str, kind: str = "F32") -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the metadata that convert_lora_to_gguf.py makes of a PEFT adapter, by gguf's own map of names."""
    config = json.loads((directory / "adapter_config.json").read_text())
    base = json.loads((Path(config["base_model_name_or_path"]) / "config.json").read_text())
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, base["num_hidden_layers"])
    tensors: Tensors = {}
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        if not part:  # base_layer.weight of the head, which the converter leaves out
            continue
        if architecture == "llama" and part[0] == "B" and module.endswith("q_proj"):
            tensor = permute(tensor, base["num_attention_heads"], base["num_attention_heads"])
        if architecture == "llama" and part[0] == "B" and module.endswith("k_proj"):
            tensor = permute(tensor, base["num_attention_heads"], base["num_key_value_heads"])
        tensors[f"{names.get_name(module)}.weight.lora_{part[0].lower()}"] = tensor.contiguous(), kind
    return tensors, {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": config["lora_alpha"]}


def write(file: Path, architecture: str, tensors: Tensors, metadata: Mapping[str, Any]) -> Path:
    """Write them; returns the directory."""
    file.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, (tensor, kind) in tensors.items():
        of = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.parent


def small(kind: str, **changes: Any) -> Any:
    """A random model of that model_type."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**tiny.SIZES, "pad_token_id": 0, "head_dim": 16, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OF_PHI = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
FAMILIES: dict[str, tuple[str, str, list[str]]] = {
    **{kind: (kind, "llama", [*ALL, "lm_head"]) for kind in ("llama", "mistral")},
    **{kind: (kind, kind, ALL) for kind in ("qwen2", "qwen3", "gemma", "gemma2")},
    "gemma3": ("gemma3_text", "gemma3", ALL),
    "phi3": ("phi3", "phi3", OF_PHI),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_its_figures_are_those_of_the_adapter_that_was_converted(family: str, tmp_path: Path) -> None:
    """Every figure of every layer, the ranks and the logits, to 1e-6; the file's rows are seen as PEFT has them."""
    kind, architecture, targets = FAMILIES[family]
    model = small(kind, num_key_value_heads=2, tie_word_embeddings="lm_head" not in targets)
    ranks = {r"layers\.1\.self_attn\.o_proj": 3}
    theirs = adapter(tmp_path, model, r=4, lora_alpha=20, target_modules=targets, rank_pattern=ranks)
    directory = write(tmp_path / "g" / "lora.gguf", architecture, *converted(theirs, architecture))
    ours, peft = open_checkpoint(directory, str(tmp_path / "base")), open_checkpoint(theirs)
    assert (ours.format, ours.layers, ours.outside) == ("GGUF LoRA", peft.layers, ())
    for name, info in ours.tensors.items():
        held = peft.tensors[name]
        assert read_tensor(info).tolist() == read_tensor(held).tolist()
        assert rows_of(info, slice(1, 3)).tolist() == rows_of(held, slice(1, 3)).tolist()
        assert norm(info) == pytest.approx(norm(held), rel=1e-12)
    found, wanted = (load_model(of, base=tmp_path / "base") for of in (ours, peft))
    with torch.inference_mode():
        got, want = (of.model(input_ids=torch.tensor(WINDOWS)).logits for of in (found, wanted))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for one, other in zip(*(measure(of, WINDOWS) for of in (found, wanted)), strict=True):
        for figure in ("preservation", "effectiveness", "contribution", "leakage"):
            assert one.figure(figure) == pytest.approx(other.figure(figure), rel=1e-6)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Tensors, dict[str, Any]]:
    """What a small adapter is converted to; its base is beside."""
    model = small("llama", num_key_value_heads=2)
    return converted(adapter(tmp_path, model, r=4, lora_alpha=20, target_modules=["q_proj", "up_proj"]), "llama")


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_halves_are_read_as_they_are(kind: str, made: Any, tmp_path: Path) -> None:
    """Of an adapter in 16 bits the numbers are those of PEFT's rounded once; no other change is told of that start."""
    tensors, metadata = made
    directory = write(
        tmp_path / "g" / "a.gguf", "llama", {name: (of, kind) for name, (of, _) in tensors.items()}, metadata
    )
    ours, peft = open_checkpoint(directory, str(tmp_path / "base")), open_checkpoint(tmp_path / "adapter")
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    for name, info in ours.tensors.items():
        rounded = torch.from_numpy(read_tensor(peft.tensors[name])).to(dtype)
        assert info.dtype == kind
        assert read_tensor(info).tolist() == rounded.tolist()
    load_model(ours, base=tmp_path / "base")
    told = audit(ours, peft, layers=[layer.name for layer in ours.layers], variant="lora")
    assert all(layer.down < 0.01 for layer in told.layers)
    assert told.others == ()


Q = "blk.0.attn_q.weight.lora_b"


def put(**metadata: Any) -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda _, held: held.update({key.replace("__", "."): value for key, value in metadata.items()})


def renamed(name: str, to: str) -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda tensors, _: tensors.update({to: tensors.pop(name)})


def moved(name: str, to: str) -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda tensors, _: tensors.update({f"{to}.lora_{p}": tensors.pop(f"{name}.lora_{p}") for p in "ab"})


def stored(name: str, tensor: Tensor, kind: str = "F32") -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda tensors, _: tensors.update({name: (tensor, kind)})


ODD: dict[str, tuple[Callable[[Tensors, dict[str, Any]], Any], str]] = {
    "a whole model": (put(general__type="model"), "is no LoRA, its general.type is model"),
    "a control vector": (put(adapter__type="controlvector"), "its adapter.type controlvector"),
    "no kind": (lambda _, held: held.pop("general.type"), "is no LoRA, its general.type is None"),
    "an activated LoRA": (put(adapter__alora__invocation_tokens=[1, 2]), "is an activated LoRA, which acts behind"),
    "no alpha": (lambda _, held: held.pop("adapter.lora.alpha"), "adapter.lora.alpha is None, no number other than 0"),
    "alpha 0, which llama.cpp takes for none": (put(adapter__lora__alpha=0.0), "adapter.lora.alpha is 0.0, no number"),
    "alpha NaN": (put(adapter__lora__alpha=float("nan")), "adapter.lora.alpha is nan"),
    "alpha as text": (put(adapter__lora__alpha="20"), "adapter.lora.alpha is 20, no number"),
    "8 bits": (stored("blk.0.attn_q.weight.lora_a", torch.ones(4, 64), "Q8_0"), "is Q8_0, whose rounding is no part"),
    "an embedding": (renamed(Q, "token_embd.weight.lora_b"), "'token_embd.weight.lora_b' is neither lora_a nor lora_b"),
    "a norm": (stored("blk.0.attn_norm.weight", torch.ones(64)), "'blk.0.attn_norm.weight' is neither"),
    "an expert": (renamed(Q, "blk.0.ffn_up_exps.weight.lora_b"), "'blk.0.ffn_up_exps.weight.lora_b' is neither"),
    "a block twice": (stored(Q.replace("0", "00"), torch.ones(64, 4)), "'blk.00.attn_q.weight.lora_b' is neither"),
    "another's block": (renamed(Q, Q.replace("attn_q", "attn_qkv")), "'blk.0.attn_qkv.weight.lora_b' is neither"),
    "half a pair": (lambda tensors, _: tensors.pop(Q), "layer model.layers.0.self_attn.q_proj has no lora_B.weight"),
    "another half": (stored(Q, torch.ones(64, 3)), "lora_A.weight has rank 4, lora_B.weight has rank 3"),
    "three dimensions": (stored(Q, torch.ones(2, 64, 4)), "has shape [2, 64, 4], expected two dimensions"),
    "rows that are no heads": (stored(Q, torch.ones(62, 4)), "has 62 rows, which are no 4 heads as its base's config"),
    "no tensors": (lambda tensors, _: tensors.clear(), "no adapted layer"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_odd_is_refused_in_a_sentence(case: str, made: Any, tmp_path: Path) -> None:
    """What llama.cpp would take otherwise, or PEFT has no place for, is told by its name, and no figure comes of it."""
    break_, told = ODD[case]
    break_(*made)
    directory = write(tmp_path / "g" / "a.gguf", "llama", *made)
    with pytest.raises(CheckpointError, match=re.escape(told)) as caught:
        open_checkpoint(directory, str(tmp_path / "base"))
    assert str(caught.value).startswith(f"{tmp_path / 'g'}")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A folder with a base and the bytes of an adapter on it."""
    folder = tmp_path_factory.mktemp("whole")
    theirs = adapter(folder, small("llama", num_hidden_layers=1), r=2, lora_alpha=4, target_modules=["q_proj"])
    return folder, (write(folder / "g" / "a.gguf", "llama", *converted(theirs, "llama")) / "a.gguf").read_bytes()


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0)
)
def test_changed_bytes_are_read_or_refused(whole: Any, changes: list[tuple[int, int]], cut: int) -> None:
    """Of a file with other bytes, or cut short, either every number can be read or an error of ours tells why not."""
    folder, held = whole
    data = bytearray(held)
    for place, value in changes:
        data[place] = value
    (folder / "g" / "a.gguf").write_bytes(data[: len(data) - cut % len(data)] if cut % 3 == 0 else data)
    with suppress(CheckpointError):
        for info in open_checkpoint(folder / "g", str(folder / "base")).tensors.values():
            assert read_tensor(info).shape == info.shape


def test_the_base_must_be_told_and_be_of_its_architecture(made: Any, tmp_path: Path) -> None:
    """Without a base, with a GGUF file, another family or no number of heads nothing is guessed."""
    directory, config_file = write(tmp_path / "g" / "a.gguf", "llama", *made), tmp_path / "base" / "config.json"
    with pytest.raises(CheckpointError, match=r"does not tell how many heads .* by --nullspace-base=DIR, or give"):
        open_checkpoint(directory)
    with pytest.raises(CheckpointError, match=r"a\.gguf: is a GGUF file, and a LoRA of llama\.cpp is gated on"):
        open_checkpoint(directory, str(tmp_path / "g" / "a.gguf"))
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "num_attention_heads": True}))
    with pytest.raises(CheckpointError, match="its base's config has True for num_attention_heads"):
        open_checkpoint(directory, str(tmp_path / "base"))
    config_file.write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(CheckpointError, match=r"architecture llama, but the base .* is of model_type qwen2"):
        open_checkpoint(directory, str(tmp_path / "base"))
    of_other = write(tmp_path / "o" / "a.gguf", "mamba", *made)
    with pytest.raises(
        CheckpointError, match=r"is of llama\.cpp's architecture mamba; LoRAs of llama, qwen2, .* are re"
    ):
        open_checkpoint(of_other, str(tmp_path / "base"))
    write(tmp_path / "g" / "b.gguf", "llama", *made)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files, a\.gguf, b\.gguf; put the one that is meant into"):
        open_checkpoint(directory, str(tmp_path / "base"))


def test_training_may_have_started_from_one(tmp_path: Path) -> None:
    """A start in GGUF serves as PEFT's own does, whichever format the trained adapter has; and it needs the base."""
    targets: dict[str, Any] = {"r": 4, "lora_alpha": 20, "target_modules": ["q_proj", "up_proj"]}

    def made(name: str, scale: float) -> tuple[Path, Path]:
        """A LoRA whose lora_B is scaled, as PEFT saved it and converted; both of one lora_A."""
        directory = adapter(tmp_path, small("llama", num_key_value_heads=2), name=name, **targets)
        change(directory, lambda held, _: held.update({n: t * scale for n, t in held.items() if "lora_B" in n}))
        return directory, write(tmp_path / f"{name}.g" / "a.gguf", "llama", *converted(directory, "llama"))

    starts, trained = made("start", 0.0), made("trained", 0.1)
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    told = []
    for now in trained:
        for start in starts:
            run = gate(
                now, tmp_path / "text.txt", base=str(tmp_path / "base"), init=str(start), calib_size=2, seqlen=16
            ).run
            audited = run.about["audit"]
            assert (audited["variant"], audited["others"], audited["compared"]) == ("lora", [], 0)
            told.append([{**layer, "figures": run.layers[0].preservation} for layer in audited["layers"]])
    assert told[0] == told[1] == told[2] == told[3]
    with pytest.raises(CheckpointError, match=r"a\.gguf: is a LoRA of llama\.cpp, which does not tell how many heads"):
        gate(trained[0], tmp_path / "text.txt", init=str(starts[1]))
    with pytest.raises(CheckpointError, match=r"no adapted layer: was the plain model saved instead"):
        gate(trained[0], tmp_path / "text.txt", base=str(tmp_path / "base"), init=str(tmp_path / "base"))


def served(folder: Path, *servers: str) -> list[Outcome]:
    """What becomes of ``folder/g`` on ``folder/base`` before the servers."""
    checkpoint = open_checkpoint(folder / "g", str(folder / "base"))
    at_hand = base_at_hand(checkpoint, str(folder / "base"))
    return [hold(asked(server)[0], checkpoint, at_hand) for server in servers]


def test_llama_cpp_takes_what_it_opens_and_no_other_server_does(made: Any, tmp_path: Path) -> None:
    """Names, shapes and architecture are its base's; PEFT's own directory is what all others open."""
    write(tmp_path / "g" / "a.gguf", "llama", *made)
    ours, *others = served(tmp_path, "llama.cpp", "vllm", "peft==0.21")
    assert (ours.tier, ours.rules) == (Tier.PASS, 7)
    assert ours.summary == "llama.cpp takes it by all 7 rules that are known"
    for outcome in others:
        assert (outcome.tier, outcome.rules) == (Tier.FAIL, 1)
        assert "its a.gguf is of GGUF LoRA, not of PEFT; llama.cpp alone opens it" in outcome.summary
    assert served(tmp_path, "llama.cpp==b6000")[0].tier is Tier.WARN, "nobody held a rule against a version"


UNFIT: dict[str, tuple[Callable[[Tensors, dict[str, Any]], Any], str]] = {
    "a block that is not there": (
        moved("blk.0.attn_q.weight", "blk.9.attn_q.weight"),
        r"rule gguf names: 1 of its 6 modules are not in the base: tensor 'blk\.9\.attn_q\.weight\.lora_a'",
    ),
    "a tied head": (
        moved("blk.0.attn_q.weight", "output.weight"),
        r"rule gguf head: tensor 'output\.weight\.lora_a' is on a head that the base ties to its embedding",
    ),
    "another width": (
        stored(Q, torch.ones(32, 4)),
        r"rule gguf shapes: tensor 'blk\.0\.attn_q\.weight\.lora_a' is of a matrix of 32 x 32, and the base's is 64",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_llama_cpp_finds_no_place_for_is_refused(case: str, made: Any, tmp_path: Path) -> None:
    """A block or a head that its base has not, and a matrix of another size, are told by the tensor of the file."""
    break_, told = UNFIT[case]
    break_(*made)
    config_file = tmp_path / "base" / "config.json"
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "tie_word_embeddings": True}))
    write(tmp_path / "g" / "a.gguf", "llama", *made)
    (outcome,) = served(tmp_path, "llama.cpp")
    assert outcome.tier is Tier.FAIL
    assert re.search(told, outcome.summary), outcome.summary
