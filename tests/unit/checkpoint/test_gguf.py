"""PEFT adapters on bases that are GGUF files, the files read with no trust; skipped where gguf is not installed."""

import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_nullspace.checkpoint.gguf import MAX_VALUES, read_header
from pytest_nullspace.checkpoint.hub import base_path
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.measuring.streaming import measure
from tests import tiny
from tests.adapters import adapter, change
from tests.releases import FIVE
from tests.unit.model.test_peft import WINDOWS, check_figures, figures, opened

gguf = pytest.importorskip("gguf", reason="gguf, which reads GGUF files, is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(file: Path, model: Any, kind: str = "Q8_0") -> Path:
    """A random Llama as a GGUF file, its matrices quantised, as llama.cpp's converter lays it out."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"] if FIVE else config.rope_theta)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = name.removesuffix(".weight")
        part = names.get(module) or PARTS[module.split(".", 3)[3]]
        weight = value.float()
        if part in heads:  # llama.cpp turns the halves of each head that the rotary embedding pairs into neighbours
            weight = weight.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        of = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else kind]
        packed = gguf.quants.quantize(weight.numpy(), of)
        stored = part if module in names else f"blk.{module.split('.')[2]}.{part}"
        writer.add_tensor(f"{stored}.weight", packed, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def on_gguf(folder: Path, kind: str = "Q8_0", **config: Any) -> Path:
    """An adapter on a base of which nothing but its GGUF file and tokenizer is left."""
    model = tiny.llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    directory = adapter(folder, model, **{"r": 4, "target_modules": "all-linear", **config})
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")  # without the adapter
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / "base" / name).unlink()
    write(folder / "base" / "base.gguf", plain, kind)
    return directory


@pytest.mark.parametrize(("kind", "off"), [("F32", 0.0), ("F16", 1e-3), ("Q8_0", 0.01), ("Q4_0", 0.15)])
def test_figures_are_those_of_the_same_base_saved_as_safetensors(kind: str, off: float, tmp_path: Path) -> None:
    """They agree with float64 arithmetic, and to the bit with the unpacked base as a directory; near the true one."""
    directory = on_gguf(tmp_path, kind)
    _, adapted = opened(directory)
    check_figures(adapted)
    measured = measure(adapted, WINDOWS)
    of_gguf = {name: layer.base_matrix() for name, layer in adapted.layers.items()}
    adapted.take_off()
    unpacked: Any = adapted.model
    unpacked.save_pretrained(tmp_path / "unpacked")
    change(directory, lambda _, config: config.update(base_model_name_or_path=str(tmp_path / "unpacked")))
    _, again = opened(directory)
    assert measure(again, WINDOWS) == measured
    true: Any = tiny.llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=False)
    for name, matrix in of_gguf.items():
        weight = true.get_submodule(name).weight
        assert isinstance(matrix, Tensor)
        assert (matrix - weight).norm() <= off * weight.norm(), name


def test_a_base_may_be_named_by_its_file(tmp_path: Path) -> None:
    """The file's path gives the same figures as its directory, also where safetensors of another base lie beside it."""
    directory = on_gguf(tmp_path, "F32")
    _, adapted = opened(directory)
    want = [figures(layer) for layer in measure(adapted, WINDOWS)]
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "base.gguf"
    assert base_path(str(file), None, "x") == file
    change(directory, lambda _, config: config.update(base_model_name_or_path=str(file)))
    _, adapted = opened(directory)
    assert [figures(layer) for layer in measure(adapted, WINDOWS)] == want


def test_a_file_of_that_name_in_the_current_folder_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's own file is read, though transformers looks for the name in the current folder first."""
    directory = on_gguf(tmp_path, "F32")
    (tmp_path / "base.gguf").write_bytes(b"not this one")
    monkeypatch.chdir(tmp_path)
    change(directory, lambda _, config: config.update(base_model_name_or_path="base"))
    _, adapted = opened(directory)
    check_figures(adapted)


def test_several_files_are_named_and_one_is_asked_for(tmp_path: Path) -> None:
    """Of a folder with two GGUF files neither is guessed; with safetensors beside them those are the base."""
    for name in ("m.Q4_0.gguf", "m.Q8_0.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(
        CheckpointError,
        match=r"holds 2 GGUF files, m\.Q4_0\.gguf, m\.Q8_0\.gguf; give one of them by --nullspace-base=FILE\.gguf$",
    ):
        base_path(str(tmp_path), None, "x")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{}")
    assert base_path(str(tmp_path), None, "x") == tmp_path
    with pytest.raises(CheckpointError, match=r"^x: .*gone\.gguf: no such file; give a GGUF file that is there$"):
        base_path(str(tmp_path / "gone.gguf"), None, "x")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package gguf the message says what to install."""
    file = write(tmp_path / "base.gguf", tiny.llama(), "F16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"base\.gguf: is a GGUF file, .* not installed; pip install gguf$"):
        read_header(file)


def test_a_base_of_another_model_is_told(tmp_path: Path) -> None:
    """A GGUF file whose layers have other widths is an error that names the tensor and the file."""
    directory = on_gguf(tmp_path)
    write(tmp_path / "base" / "base.gguf", tiny.llama(hidden_size=96, intermediate_size=96), "F32")
    with pytest.raises(CheckpointError, match=r"does not fit the base model .*base\.gguf"):
        opened(directory)


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Names, shapes and types are those of the package's own reader, and the sizes add up to the file's."""
    file = write(tmp_path / "base.gguf", tiny.llama(intermediate_size=64), "Q8_0")
    told, theirs = read_header(file), gguf.GGUFReader(file).tensors
    assert [*told] == [tensor.name for tensor in theirs]
    for tensor in theirs:
        mine = told[tensor.name]
        assert (mine.shape, mine.nbytes) == (tuple(reversed(tensor.shape.tolist())), tensor.n_bytes)
        assert mine.dtype == tensor.tensor_type.name


# --- hostile files ------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def number(key: str, value: int, form: str = "<I", kind: int = 4) -> bytes:
    return text(key) + struct.pack("<I", kind) + struct.pack(form, value)


def tensor(name: str = "a", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack(
        "<IQ", kind, offset
    )  # fmt: skip


def raw(*metadata: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None,
        version: int = 3, data: int = 64) -> bytes:  # fmt: skip
    head = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(metadata))))
    head += b"".join((*metadata, *tensors))
    return head + bytes(-len(head) % 32) + bytes(data)


HOSTILE = {
    "nothing": (b"", "not a GGUF file"),
    "another format": (b"PK\3\4" + bytes(40), "not a GGUF file"),
    "cut in the head": (raw()[:13], "promises 8 entries|cannot hold"),
    "another version": (raw(version=1), "of GGUF version 1; versions 2 and 3 are read"),
    "endless metadata": (raw(counts=(0, 2**63)), "cannot hold them"),
    "endless tensors": (raw(counts=(2**63, 0)), "cannot hold them"),
    "an endless text": (raw(text("a") + struct.pack("<IQ", 8, 2**62)), "cannot hold them"),
    "an endless list": (raw(text("a") + struct.pack("<IIQ", 9, 0, 2**62)), "more than 4,000,000 values"),
    "a long list": (raw(text("a") + struct.pack("<IIQ", 9, 0, MAX_VALUES)), "cannot hold them"),
    "a list of lists": (raw(text("a") + struct.pack("<IIQ", 9, 9, 1)), "a list of the type 9"),
    "an unknown value": (raw(text("a") + struct.pack("<I", 77)), "unknown type 77"),
    "a billion layers": (raw(number("llama.block_count", 10**9)), "'llama.block_count' is 1000000000, more than any"),
    "an odd alignment": (raw(number("general.alignment", 0)), "general.alignment is no power of two"),
    "a name that is no text": (raw(struct.pack("<Q", 1) + b"\xff" + bytes(30)), "not UTF-8"),
    "a tensor twice": (raw(tensors=(tensor(), tensor(offset=32))), "names the tensor 'a' twice"),
    "a tensor over another": (raw(tensors=(tensor(), tensor("b", offset=8))), "'b' overlaps the one before it"),
    "a tensor past the end": (raw(tensors=(tensor(offset=64),)), "it is cut short"),
    "a shape that overflows": (raw(tensors=(tensor(shape=(2**62, 2**62)),)), "more than the file holds"),
    "many dimensions": (raw(tensors=(text("a") + struct.pack("<I", 2**31) + bytes(99),)), "2147483648 dimensions"),
    "an unknown type of tensor": (raw(tensors=(tensor(kind=999),)), "unknown type 999; a newer gguf may know it"),
    "half a block": (raw(tensors=(tensor(shape=(33,), kind=8),)), "more than the file holds"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_before_a_library_sees_it(case: str, tmp_path: Path) -> None:
    """Whatever a header claims is held against the file's size: one sentence, and no memory for it."""
    data, message = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(tmp_path / "m.gguf")
    assert str(caught.value).startswith(f"{tmp_path / 'm.gguf'}: ")
    assert "\n" not in str(caught.value)


WHOLE = raw(
    number("llama.block_count", 2),
    text("names") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
    tensors=(tensor(), tensor("b", (2, 2), offset=32)),
)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4), cut=st.integers(0))
def test_changed_bytes_are_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    """A sound file with bytes changed, or cut short, raises nothing but our own error."""
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    (tmp_path / "m.gguf").write_bytes(data[: len(data) - cut % len(data)] if cut % 3 == 0 else data)
    with suppress(CheckpointError):
        read_header(tmp_path / "m.gguf")


def test_a_whole_file_made_by_hand_is_read(tmp_path: Path) -> None:
    """The hostile ones above differ from one that is read."""
    file = tmp_path / "m.gguf"
    file.write_bytes(WHOLE)
    assert [(t.name, t.shape, t.dtype) for t in read_header(file).values()] == [
        ("a", (4,), "F32"),
        ("b", (2, 2), "F32"),
    ]
