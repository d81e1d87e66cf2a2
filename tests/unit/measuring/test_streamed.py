"""Blocks outside, windows inside: the same figures, each byte read once, or a plain reason why not."""

import hashlib
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from pytest_nullspace.checkpoint import header
from pytest_nullspace.errors import CheckpointError, MeasurementError
from pytest_nullspace.measuring import digests
from pytest_nullspace.model.light import SELDOM, Light, lighten
from pytest_nullspace.model.shelf import Shelf
from pytest_nullspace.settings import STREAM
from tests import tiny
from tests.adapters import adapter
from tests.plugin.test_device_map import gpt2
from tests.releases import five
from tests.unit.measuring.conftest import Measured, figures
from tests.unit.measuring.test_distributed import meet


def made(kind: str, folder: Path) -> Path:
    """A checkpoint of this kind."""
    match kind:
        case "LoRA-Null":
            return tiny.lora_null(folder / "whole")
        case "shards":
            return tiny.lora_null(folder / "whole", shards=3)
        case "biases":
            return adapter(folder, tiny.qwen2(), r=4, target_modules="all-linear")
        case "Conv1D":
            return adapter(folder, gpt2(), r=4, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
        case "sliding":
            config = transformers.Gemma2Config(**tiny.SIZES, head_dim=8, sliding_window=8)
            return adapter(folder, transformers.Gemma2ForCausalLM(config).eval(), r=4, target_modules="all-linear")
        case "one layer":
            return adapter(folder, tiny.llama(), r=4, target_modules=["layers.1.self_attn.q_proj"])
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("LoRA-Null", {}),
        ("LoRA-Null", {"calib_size": None, "calib_most": 40, "max_activation_samples": 100}),
        ("LoRA-Null", {"dtype": "bfloat16"}),
        ("shards", {"drift": False}),
        ("biases", {"batch_size": 1}),
        ("Conv1D", {}),
        ("sliding", {}),
        ("one layer", {"drift": False}),
    ],
)
def test_figures_are_those_of_the_model_in_memory(
    kind: str, changes: dict[str, Any], measured: Measured, tmp_path: Path
) -> None:
    """To the last bit: layers, drift, headroom, the windows that settle them, and of capped rows."""
    directory = made(kind, tmp_path)
    whole, streamed = measured(directory, **changes), measured(directory, device_map=STREAM, **changes)
    assert streamed.about["model"]["remarks"][-1] == "its blocks are read one after the other"
    assert whole.layers
    assert streamed.layers == whole.layers
    assert (whole.drift is None) == (changes.get("drift") is False)
    assert streamed.drift == whole.drift
    for told in ("text", "task_text", "first_token", "tokenizer", "weights_sha256"):
        assert streamed.about.get(told) == whole.about.get(told)


@pytest.mark.parametrize("windows", [2, 12])
def test_each_byte_of_the_weights_is_read_once(
    windows: int, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many windows and texts there are, with drift and the files' SHA-256: at most a twentieth more."""
    shelves, hashed = list[Shelf](), list[int]()
    put = Shelf.put

    def seen(shelf: Shelf, number: int, values: Any) -> None:
        shelves.append(shelf)
        put(shelf, number, values)

    class Counted:
        """A file that counts the bytes that are read of it."""

        def __init__(self, stream: Any) -> None:
            self.seek, self.read, self._stream = stream.seek, stream.read, stream

        def readinto(self, buffer: Any) -> int:
            hashed.append(self._stream.readinto(buffer))
            return hashed[-1]

    @contextmanager
    def counted(*of: Any) -> Iterator[tuple[Counted, Any]]:
        with header.opened(*of) as (stream, status):
            yield Counted(stream), status

    monkeypatch.setattr(Shelf, "put", seen)
    monkeypatch.setattr(digests, "opened", counted)
    wide = tiny.llama(hidden_size=128, intermediate_size=256, num_hidden_layers=7)
    directory = tiny.lora_null(tmp_path / "wide", wide, rank=4, shards=2)
    run = measured(directory, device_map=STREAM, calib_size=windows)
    files = sorted(directory.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert len(shelves) == 7
    assert len(set(map(id, shelves))) == 1
    assert shelves[0].early.bytes_read == shelves[0].largest
    assert 0.95 * size < shelves[0].bytes_read + sum(hashed) < 1.05 * size
    assert run.about["weights_sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_two_blocks_are_in_memory_at_most(measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next is read meanwhile, and the one after it once the first of both is gone, in each pass."""
    there, most = set[int](), list[int]()
    read, clear = Shelf.read, Shelf.clear

    def begun(shelf: Shelf, number: int) -> Any:
        there.add(number)
        most.append(len(there))
        return read(shelf, number)

    def cleared(shelf: Shelf, number: int) -> None:
        clear(shelf, number)
        there.discard(number)

    monkeypatch.setattr(Shelf, "read", begun)
    monkeypatch.setattr(Shelf, "clear", cleared)
    directory = tiny.lora_null(tmp_path / "deep", tiny.llama(num_hidden_layers=7))
    measured(directory, device_map=STREAM, calib_size=None, calib_most=40)
    assert len(most) > 7
    assert len(most) % 7 == 0
    assert max(most) == 2
    assert not there


def test_freed_memory_is_given_back_after_each_block_and_nothing_is_set_aside_for_an_empty_one(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the heap grows with every block: by what is kept of it, and lies amid its weights and activations."""
    done, clear = list[str](), Shelf.clear

    def cleared(shelf: Shelf, number: int) -> None:
        clear(shelf, number)
        names = [name for name, _ in shelf.blocks[number].named_parameters()]
        again = [value for _, value in shelf.blocks[number].named_parameters()]
        assert names
        assert all(value.isnan().all() and value.untyped_storage().nbytes() == value.element_size() for value in again)
        clear(shelf, number)
        assert all(map(operator.is_, again, shelf.blocks[number].parameters()))
        done.append("cleared")

    monkeypatch.setattr(Shelf, "clear", cleared)
    monkeypatch.setattr("pytest_nullspace.measuring.streamed.give_back_freed_memory", lambda: done.append("given back"))
    measured(tiny.lora_null(tmp_path / "whole"), device_map=STREAM)
    assert done == ["cleared", "given back"] * 3


def test_a_block_that_is_not_there_takes_little_memory(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one dictionary of hooks stays in its layers, and one tensor is in the place of all weights of a shape."""
    shelves, clear = list[Shelf](), Shelf.clear

    def cleared(shelf: Shelf, number: int) -> None:
        shelves.append(shelf)
        assert any(set(SELDOM) & set(vars(of)) for of in shelf.blocks[number].modules() if isinstance(of, Light))
        clear(shelf, number)
        light = [of for block in shelf.blocks for of in block.modules() if isinstance(of, Light)]
        assert len(light) == 7 * 7 * 4
        assert not {name for of in light for name in set(SELDOM) & set(vars(of))}

    monkeypatch.setattr(Shelf, "clear", cleared)
    measured(tiny.lora_null(tmp_path / "deep", tiny.llama(num_hidden_layers=7)), device_map=STREAM)
    assert len(shelves) == 7
    held = [of for block in shelves[0].blocks for of in block.parameters()]
    assert len(set(map(id, held))) == len({(of.dtype, of.shape) for of in held})


def test_a_light_module_keeps_the_hooks_that_it_has() -> None:
    """What it lacks it has once it is asked for it, and what is not empty stays."""
    called = list[str]()

    class Layer(Light, nn.Linear):
        """One such."""

    layer = Layer(2, 2)
    layer.register_forward_hook(lambda *_: called.append("hook"))
    lighten(layer)
    assert [name for name in SELDOM if name in vars(layer)] == ["_forward_hooks"]
    layer(torch.zeros(1, 2))
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer(torch.zeros(1, 2))
    assert called == ["hook", "before", "hook"]
    assert layer.state_dict().keys() == {"weight", "bias"}
    with pytest.raises(AttributeError, match="'Layer' object has no attribute 'other'"):
        _ = layer.other


def test_each_process_streams_its_own_windows(measured: Measured, tmp_path: Path) -> None:
    """Of three windows two processes read one and two; each has the figures, drift and headroom of one alone."""
    codes, outcomes = meet(2, 29727, "streamed")
    assert codes == [0, 0]
    alone = measured(tiny.lora_null(tmp_path / "ft"), calib_size=3, batch_size=1, device_map=STREAM)
    expected = figures(alone)
    assert len(expected) > 300
    for of in outcomes:
        found, remarks = of["streamed"]
        assert remarks == ["its blocks are read one after the other"]
        assert found == pytest.approx(expected, rel=1e-12)


def no_blocks(**_: Any) -> Any:
    """A model of one shared block: ALBERT's layers are one group, run again and again."""
    config = transformers.AlbertConfig(
        vocab_size=128, embedding_size=32, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_hidden_layers=3, max_position_embeddings=256,
    )  # fmt: skip
    return transformers.AlbertForMaskedLM(config).eval()


def encoder_decoder() -> Any:
    """A tiny T5."""
    config = transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("model", "asks", "changes", "why"),
    [
        (tiny.llama, {"use_dora": True}, {}, "its adapter is more than A B beside its base"),
        (tiny.llama, {"modules_to_save": ["lm_head"]}, {}, "its adapter is more than A B beside its base"),
        (tiny.llama, {}, {"spectrum": True}, "--nullspace-spectrum asks for more than each of them once"),
        (no_blocks, {"target_modules": ["query"], "task": None}, {"drift": False}, "its blocks do not run once each"),
        (
            encoder_decoder,
            {"target_modules": ["q"], "task": "SEQ_2_SEQ_LM"},
            {"drift": False},
            "lies in none of its blocks",
        ),
    ],
    ids=["DoRA", "saved", "spectrum", "shared", "two sides"],
)
def test_what_cannot_be_streamed_is_measured_as_before_and_says_so(
    model: Callable[[], Any],
    asks: dict[str, Any],
    changes: dict[str, Any],
    why: str,
    measured: Measured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its figures are those of the model in memory; here it did not fit by itself, and no map was asked for."""
    monkeypatch.setattr("pytest_nullspace.measuring.fitting._too_large", lambda *_: "")
    directory = adapter(tmp_path, model(), **{"r": 4, "target_modules": ["q_proj"], **asks})
    whole = measured(directory, **changes)
    monkeypatch.setattr("pytest_nullspace.measuring.fitting._too_large", lambda *_: "it does not fit: ")
    streamed = measured(directory, **changes)
    assert streamed.layers == whole.layers
    assert streamed.drift == whole.drift
    remark = streamed.about["model"]["remarks"][-1]
    assert remark.startswith("its blocks are not read one after the other, for ")
    assert why in remark


def test_a_model_that_does_not_fit_is_streamed_by_itself(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where less is free than its weights take, and says so in one line."""
    monkeypatch.setattr("pytest_nullspace.measuring.fitting._free", lambda _: 130_000)
    run = measured(tiny.lora_null(tmp_path / "whole"), calib_size=1, drift=False)
    assert run.about["model"]["remarks"] == [
        "its weights take 132 kB, and 130 kB are free on cpu: its blocks are read one after the other"
    ]


@five
def test_hidden_states_that_do_not_fit_are_told_before_a_block_is_run(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they take, what is free, and what to do; as many windows as are named then fit, each process having a share.

    Held to what they are: of each token its embedding and what the block before gave, with the base's beside them.
    """
    directory = tiny.lora_null(tmp_path / "whole")
    run, blocks, put = partial(measured, directory, device_map=STREAM), list[int](), Shelf.put

    def counted(shelf: Shelf, number: int, values: Any) -> None:
        blocks.append(number)
        put(shelf, number, values)

    monkeypatch.setattr(Shelf, "put", counted)
    monkeypatch.setattr("pytest_nullspace.measuring.fitting._free", lambda _: 250_000)
    with pytest.raises(MeasurementError) as refused:
        run(calib_size=8)
    told = str(refused.value)
    assert not blocks
    found = re.search(r"\((\d+) tokens, .*\) take (\d+) kB beside two blocks of (\S+) kB, but 250 kB are free", told)
    assert found, told
    tokens, hidden, block = map(float, found.groups())
    assert tokens == 2 * 2 * 8 * 32 + 32 + 33 + 4 * 32  # two texts, with the base; how it begins; at twice the update
    assert hidden == pytest.approx(tokens * 4 * 2 * 32 / 1e3, rel=0.05)
    of_extra = hidden / tokens * (32 + 33 + 4 * 32)
    fewer = int((250 - 2 * block - of_extra) / (hidden - of_extra) * 8)
    assert fewer == 3
    assert told.endswith(
        f"; give --nullspace-calib-size={fewer}, lower --nullspace-seqlen, give --nullspace-no-drift, gate on one text "
        "at a time, or take a machine with more"
    )
    assert run(calib_size=fewer).drift
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(MeasurementError, match="but 125 kB are free; "):
        run(calib_size=fewer)


def test_nan_beside_the_layers_is_refused_as_in_memory(measured: Measured, tmp_path: Path) -> None:
    """A norm in a block, which no layer test covers, is looked at as it is read."""

    def spoil(tensors: dict[str, Any], _: Any) -> None:
        tensors["model.layers.2.input_layernorm.weight"][3] = float("nan")

    directory = tiny.lora_null(tmp_path / "whole", change=spoil)
    with pytest.raises(CheckpointError, match=r"layers\.2\.input_layernorm\.weight holds NaN or infinity"):
        measured(directory, device_map=STREAM)
