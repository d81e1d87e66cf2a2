"""What lies on disk: headers, shards, layers; nothing in a file is trusted, and every message names its place."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.header import (
    TensorInfo,
    inside,
    printable,
    read_header,
    read_json_object,
    read_tensors,
)
from pytest_nullspace.checkpoint.layers import Checkpoint, LayerSpec, in_model_order, model_order
from pytest_nullspace.errors import CheckpointError
from tests import tiny

Header = Mapping[str, Any]
ONE: Header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
TWO: Header = {**ONE, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}


def raw(file: Path, header: bytes, data: int, length: int | None = None) -> Path:
    """A file with the prefix, the ``header`` and ``data`` zero bytes."""
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data))
    return file


def described(file: Path, header: object, data: int) -> Path:
    """A safetensors file with that header."""
    return raw(file, json.dumps(header).encode(), data)


def refused(file: Path) -> str:
    """The message with which reading the header of ``file`` fails; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    message = str(caught.value)
    assert str(file) in message
    return message


# Headers that are read


def test_a_header_tells_every_tensor_in_its_order(tmp_path: Path) -> None:
    """A sound header gives name, type, shape and place of each tensor, in the order of the header."""
    file = described(tmp_path / "m.safetensors", {"b": TWO["b"], "a": TWO["a"]}, 32)
    assert read_header(file) == {
        "b": TensorInfo("b", "BF16", (4,), file, 24, 8),
        "a": TensorInfo("a", "F32", (2, 3), file, 0, 24),
    }
    assert list(read_header(file)) == ["b", "a"]


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    """A file of the safetensors library itself, with metadata, scalars and empty tensors, is read as it is."""
    from safetensors.torch import save_file

    tensors = {"x": torch.zeros(3, 5, dtype=torch.float16), "s": torch.tensor(1.0), "e": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "m.safetensors")
    assert {name: info.shape for name, info in found.items()} == {"x": (3, 5), "s": (), "e": (0, 4)}
    assert {name: info.nbytes for name, info in found.items()} == {"x": 30, "s": 4, "e": 0}


def test_padding_and_an_empty_file_of_no_tensors_are_read(tmp_path: Path) -> None:
    """Trailing blanks, with which the library aligns its data, belong to the header; no tensors is no fault here."""
    assert list(read_header(raw(tmp_path / "m", json.dumps(ONE).encode() + b"   ", 24))) == ["a"]
    assert read_header(raw(tmp_path / "n", b"{}", 0)) == {}


# Headers that are refused


@pytest.mark.parametrize("content", [b"", b"\x00", b"\x00" * 7])
def test_a_file_shorter_than_its_prefix_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file that does not even hold the eight bytes of the length is not a whole one."""
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    assert f"not a whole safetensors file: it has {len(content)} bytes; save or download it again" in refused(file)


@pytest.mark.parametrize("length", [3, 2**31, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_is_refused_before_anything_is_read(tmp_path: Path, length: int) -> None:
    """A header said to be longer than the file is refused at once, whatever memory it would take."""
    file = raw(tmp_path / "m.safetensors", b"{}", 0, length)
    assert f"claims a header of {length:,}" in refused(file)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"", "is not JSON"),
        (b"hello", "is not JSON"),
        (b'{"a":', "is not JSON"),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        (b"[]", "must be a JSON object, not list"),
        (b"null", "must be a JSON object, not NoneType"),
        (b"1", "must be a JSON object, not int"),
        (b"[" * 100_000, "is not JSON that can be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON that can be read"),
        (b'{"a": {}, "a": {}}', "names 'a' twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "names 'dtype' twice"),
    ],
)
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, header: bytes, said: str) -> None:
    """Bytes that are not one JSON object with distinct keys are refused, with the reason."""
    assert f"the safetensors header {said}" in refused(raw(tmp_path / "m.safetensors", header, 0))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (3, "its header entry is not an object"),
        (None, "its header entry is not an object"),
        ({}, "unknown dtype 'None'"),
        ({"dtype": "F33"}, "unknown dtype 'F33'"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"dtype": "F32"}, "its shape None is not a list of sizes"),
        ({"dtype": "F32", "shape": 4}, "its shape 4 is not a list of sizes"),
        ({"dtype": "F32", "shape": {"0": 4}}, "is not a list of sizes"),
        ({"dtype": "F32", "shape": [True]}, "its shape [True] is not a list of sizes"),
        ({"dtype": "F32", "shape": [-1]}, "its shape [-1] is not a list of sizes"),
        ({"dtype": "F32", "shape": [1.0]}, "its shape [1.0] is not a list of sizes"),
        ({"dtype": "F32", "shape": ["1"]}, "its shape ['1'] is not a list of sizes"),
        ({"dtype": "F32", "shape": [2**64]}, "is not a list of sizes"),
        ({"dtype": "F32", "shape": [1]}, "its data_offsets None are not a begin and an end"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "its data_offsets [0] are not a begin and an end"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}, "are not a begin and an end"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [False, 4]}, "are not a begin and an end"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "are not a begin and an end"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}, "takes 4 bytes, but its data_offsets hold 8"),
        ({"dtype": "BF16", "shape": [1], "data_offsets": [0, 4]}, "takes 2 bytes, but its data_offsets hold 4"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "takes 4 bytes, but its data_offsets hold -4"),
        ({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}, "] is larger than any file"),
        ({"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}, "its shape [3] of F4 does not end with a byte"),
        ({"dtype": "F32", "shape": [2**62] * 1000, "data_offsets": [0, 0]}, "is larger than any file"),
        ({"dtype": "F32", "shape": [2**62] * 200_000, "data_offsets": [0, 0]}, "is larger than any file"),
    ],
)
def test_an_entry_that_describes_no_tensor_is_refused(tmp_path: Path, entry: object, said: str) -> None:
    """Every way in which an entry can fail to describe a tensor is refused by the tensor's name."""
    message = refused(described(tmp_path / "m.safetensors", {"model.x": entry}, 4))
    assert "tensor 'model.x'" in message
    assert said in message
    assert len(message) < 1000


def entry(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "tensor 'b' overlaps the one before it (byte 4)"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "tensor 'b' overlaps the one before it (byte 4)"),
        ({"a": entry(0, 4), "b": entry(5, 6)}, 6, "tensor 'b' leaves a hole before it (byte 4)"),
        ({"a": entry(1, 4)}, 4, "tensor 'a' leaves a hole before it (byte 0)"),
        ({"a": entry(0, 4)}, 3, "describes 4 bytes of data, but the file holds 3"),
        ({"a": entry(0, 4)}, 5, "describes 4 bytes of data, but the file holds 5"),
        ({}, 5, "describes 0 bytes of data, but the file holds 5"),
        ({"a": entry(0, 4), "b": entry(4, 2**60)}, 8, "but the file holds 8"),
    ],
)
def test_data_that_the_header_does_not_cover_exactly_is_refused(
    tmp_path: Path, header: object, data: int, said: str
) -> None:
    """Tensors that overlap, leave holes, or end before or past the data's end are refused."""
    assert said in refused(described(tmp_path / "m.safetensors", header, data))


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    """Whatever is missing at the end of a sound file, the rest is never taken for the whole."""
    whole = described(tmp_path / "whole", TWO, 32).read_bytes()
    file = tmp_path / "m.safetensors"
    for kept in range(len(whole)):
        file.write_bytes(whole[:kept])
        refused(file)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    """No file, and a directory of that name, are told apart from a broken file."""
    assert refused(tmp_path / "m").endswith("the file of the weights is missing; save or download it again")
    assert "the file of the weights cannot be read" in refused(tmp_path)


def test_names_are_escaped_in_messages(tmp_path: Path) -> None:
    """A tensor's name cannot draw on the terminal or fill it."""
    message = refused(described(tmp_path / "m", {"\x1b[31m\n" + "x" * 5000: 3}, 0))
    assert "\x1b" not in message
    assert "\n" not in message
    assert "x1b[31m" in message
    assert len(message.removeprefix(str(tmp_path))) < 250


@given(st.text())
def test_printable_is_one_plain_line_of_bounded_length(text: str) -> None:
    """Whatever the text, what is shown of it is printable and not longer than its limit."""
    shown = printable(text, 50)
    assert shown.isprintable()
    assert len(shown) <= 51


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 30) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = VALUES | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4"]) | VALUES,
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(st.integers(), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | VALUES,
    }
)
HEADERS = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRIES, max_size=4).map(
    lambda header: json.dumps(header).encode()
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that fuzzing writes over and over."""
    return tmp_path_factory.mktemp("fuzz") / "m.safetensors"


@settings(deadline=None, max_examples=200)
@given(content=st.binary(max_size=60))
@example(content=(2).to_bytes(8, "little") + b"{}")
def test_arbitrary_bytes_are_read_or_refused(scratch: Path, content: bytes) -> None:
    """No file whatever makes reading raise anything but CheckpointError."""
    scratch.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        read_header(scratch)


@settings(deadline=None, max_examples=300)
@given(header=st.binary(max_size=30) | HEADERS, data=st.integers(0, 40))
def test_arbitrary_headers_are_read_or_refused(scratch: Path, header: bytes, data: int) -> None:
    """No header makes reading raise anything but CheckpointError; what is read covers the data exactly."""
    raw(scratch, header, data)
    try:
        tensors = read_header(scratch)
    except CheckpointError:
        return
    covered = sorted((t.begin, t.begin + t.nbytes) for t in tensors.values())
    assert [b for b, _ in covered] + [data] == [0] + [e for _, e in covered] or not tensors
    assert sum(t.nbytes for t in tensors.values()) == data


# JSON files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"\x80", "is not UTF-8"),
        (b"[1]", "must be a JSON object, not list"),
        (b'{"k": 1, "k": 2}', "names 'k' twice"),
    ],
)
def test_a_json_file_that_is_no_object_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    """The message names the file and what it is for."""
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'c.json'}: the config {said}")):
        read_json_object(tmp_path / "c.json", "the config")


def test_a_missing_unreadable_or_huge_json_file_is_refused(tmp_path: Path) -> None:
    """A file that is not there, is a directory, or would fill the memory is refused by name."""
    with pytest.raises(CheckpointError, match=r"c\.json: the config is missing"):
        read_json_object(tmp_path / "c.json", "the config")
    with pytest.raises(CheckpointError, match="the config cannot be read"):
        read_json_object(tmp_path, "the config")
    with (tmp_path / "huge.json").open("wb") as huge:
        huge.truncate(10**8 + 1)  # no larger, for not every file system takes a hole of any size
    with pytest.raises(CheckpointError, match="100,000,001 bytes; at most 100,000,000 are read"):
        read_json_object(tmp_path / "huge.json", "the config")


# Files and shards


def shards(folder: Path, weight_map: Mapping[str, object] | None = None) -> Path:
    """Two sound shards with their index, which says ``weight_map`` if given."""
    described(folder / "model-00001-of-00002.safetensors", {"a": entry(0, 4)}, 4)
    described(folder / "model-00002-of-00002.safetensors", {"b": entry(0, 4)}, 4)
    if weight_map is None:
        weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def not_read(folder: Path) -> str:
    """The message with which reading the weights in ``folder`` fails; it names the folder."""
    with pytest.raises(CheckpointError) as caught:
        read_tensors(folder, "model")
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    """The tensors of all shards are found, each with the file that holds it."""
    found = read_tensors(shards(tmp_path), "model")
    assert {name: info.file.name for name, info in found.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    """A shard that the index names and that is not there is named."""
    (shards(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: the file of the weights is missing" in not_read(tmp_path)


def test_a_shard_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    """A shard left over from another save is named, not ignored."""
    described(shards(tmp_path) / "model-00003-of-00003.safetensors", {}, 0)
    assert "model-00003-of-00003.safetensors: is a shard that model.safetensors.index.json does not name" in not_read(
        tmp_path
    )


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        (
            {"a": "model-00001-of-00002.safetensors"},
            "model-00002-of-00002.safetensors: is a shard that model.safetensors.index.json does not name",
        ),
        (
            {"b": "model-00002-of-00002.safetensors", "c": "model-00001-of-00002.safetensors"},
            "model-00001-of-00002.safetensors: holds tensor 'a', but model.safetensors.index.json does not name it",
        ),
        (
            {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
            "model-00001-of-00002.safetensors: holds tensor 'a', but model.safetensors.index.json puts it into "
            "'model-00002-of-00002.safetensors'",
        ),
        (
            {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
                "c": "model-00002-of-00002.safetensors",
            },
            "model-00002-of-00002.safetensors: does not hold tensor 'c'",
        ),
        ({"a": 1}, "has no weight_map from tensor names to files"),
        ({"a": None}, "has no weight_map from tensor names to files"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, weight_map: dict[str, object], said: str
) -> None:
    """Each disagreement between index and shards names the shard and the tensor."""
    assert said in not_read(shards(tmp_path, weight_map))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": null}', "[]", "x"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, content: str) -> None:
    """An index that maps nothing is refused by name."""
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json: " in not_read(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "sub/inner.safetensors",
        "..\\outside.safetensors",
        "a\0b",
        "a/",
        "\ud800",
        "x" * 5000,
    ],
)
def test_a_shard_outside_the_directory_is_never_opened(tmp_path: Path, shard: str) -> None:
    """An index cannot lead to a file anywhere but beside it."""
    described(tmp_path / "outside.safetensors", {"a": entry(0, 4)}, 4)
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    described(folder / "sub" / "inner.safetensors", {"a": entry(0, 4)}, 4)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    not_read(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path, name: str) -> None:
    """A link in the checkpoint to a file elsewhere is refused, and the message says where it leads."""
    (tmp_path / "outside").mkdir()
    target = described(tmp_path / "outside" / "secret", ONE, 24)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / name).symlink_to(target)
    assert f"{folder / name}: is a link out of the checkpoint, to {target}" in not_read(folder)


def test_a_shard_that_is_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    """The same holds for a shard."""
    (tmp_path / "checkpoint").mkdir()
    folder = shards(tmp_path / "checkpoint")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to("../elsewhere")
    assert f"{shard}: is a link out of the checkpoint" in not_read(folder)


def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    """A loop of links is the user's to mend, not a traceback."""
    folder = shards(tmp_path)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)
    not_read(folder)


def test_links_within_the_directory_and_to_the_directory_are_followed(tmp_path: Path) -> None:
    """A link to a file beside it is sound, and so is a directory that is itself reached by a link."""
    (tmp_path / "real").mkdir()
    described(tmp_path / "real" / "weights", ONE, 24)
    (tmp_path / "real" / "model.safetensors").symlink_to("weights")
    (tmp_path / "linked").symlink_to("real", target_is_directory=True)
    assert list(read_tensors(tmp_path / "real", "model")) == ["a"]
    assert list(read_tensors(tmp_path / "linked", "model")) == ["a"]


def test_the_hub_cache_keeps_its_links(tmp_path: Path) -> None:
    """In the hub's cache each file is a link from ``snapshots/REV`` to ``blobs``, and is read."""
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    described(repo / "blobs" / "ffff", ONE, 24)
    (snapshot / "model.safetensors").symlink_to("../../blobs/ffff")
    assert list(read_tensors(snapshot, "model")) == ["a"]


def test_a_link_in_the_hub_cache_to_another_repository_is_not_followed(tmp_path: Path) -> None:
    """Only the blobs of the same repository are part of a snapshot."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    described(other / "ffff", ONE, 24)
    (snapshot / "model.safetensors").symlink_to("../../../models--org--other/blobs/ffff")
    assert "is a link out of the checkpoint" in not_read(snapshot)


def test_a_plain_name_is_inside(tmp_path: Path) -> None:
    """A file of the directory is given back as its path there."""
    assert inside(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt"])
def test_pickled_weights_are_never_opened(tmp_path: Path, name: str) -> None:
    """A checkpoint that has only pickled weights is refused with the way out."""
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "pickled weights can run code and are never opened; save the model again" in not_read(tmp_path)


def test_no_weights_and_two_kinds_of_weights_are_refused(tmp_path: Path) -> None:
    """Neither a guess nor a preference: exactly one kind of weights must be there."""
    assert "no weights: neither model.safetensors nor model.safetensors.index.json is there" in not_read(tmp_path)
    described(shards(tmp_path) / "model.safetensors", ONE, 24)
    assert "holds both model.safetensors and model.safetensors.index.json" in not_read(tmp_path)


# Layers


def test_layer_two_comes_before_layer_ten(tmp_path: Path) -> None:
    """Numbers sort as numbers, and projections in the order in which a block runs them."""
    wanted = [
        f"model.layers.{i}.{part}"
        for i in (0, 2, 10)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "other.a", "other.b")
    ]  # fmt: skip
    ordered = in_model_order(tmp_path, [LayerSpec(name, 1, 2, 2) for name in sorted(wanted, reverse=True)])
    assert [layer.name for layer in ordered] == wanted


@given(st.lists(st.from_regex(r"[a-z0-9²٣]{1,3}(\.[a-z0-9²٣]{1,3}){0,3}", fullmatch=True), unique=True))
def test_any_names_have_an_order_that_does_not_depend_on_where_they_stood(names: list[str]) -> None:
    """The order is total: names of digits, letters and foreign numerals sort the same from any start."""
    backwards = names[::-1]
    assert sorted(names, key=model_order) == sorted(backwards, key=model_order)


@pytest.mark.parametrize("name", ["", "a::b", "a[1]", "a..b", ".a", "a.", "a b", "a\n", "ä", "a/b", "a\x1b[1m"])
def test_a_name_that_cannot_be_a_tests_is_refused(tmp_path: Path, name: str) -> None:
    """A name that would break a node id, or draws on the terminal, is refused."""
    with pytest.raises(CheckpointError, match="is not the name of a layer"):
        in_model_order(tmp_path, [LayerSpec(name, 1, 2, 2)])


def test_ranks_are_told_in_words(tmp_path: Path) -> None:
    """One rank is told as it is, several by their range."""

    def ranks(*given: int) -> str:
        layers = tuple(LayerSpec(f"l{i}", rank, 9, 9) for i, rank in enumerate(given))
        return Checkpoint(tmp_path, "LoRA-Null", tmp_path / "c", {}, layers, {}).ranks

    assert ranks(4, 4) == "rank 4"
    assert ranks(8, 4, 64) == "ranks 4-64"


# LoRA-Null directories

Q = "model.layers.0.self_attn.q_proj"


def changed(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> str:
    """The message with which opening a changed checkpoint fails; it names the directory."""
    tiny.lora_null(folder, change=change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound LoRA-Null directory."""
    return tiny.lora_null(tmp_path_factory.mktemp("sound"))


def test_a_directory_tells_its_layers(sound: Path) -> None:
    """Every replaced layer is found with its rank and widths, in model order, and the head is none of them."""
    checkpoint = open_checkpoint(sound)
    assert len(checkpoint.layers) == 3 * 7
    assert checkpoint.layers[0] == LayerSpec(Q, 4, 32, 32)
    assert checkpoint.layers[1] == LayerSpec("model.layers.0.self_attn.k_proj", 4, 32, 16)
    assert checkpoint.layers[-1] == LayerSpec("model.layers.2.mlp.down_proj", 4, 48, 32)
    assert checkpoint.config_file == sound / "config.json"
    assert checkpoint.config["lora_r"] == 4
    assert (checkpoint.format, checkpoint.ranks) == ("LoRA-Null", "rank 4")
    assert "model.embed_tokens.weight" in checkpoint.tensors


def test_shards_tell_the_same_layers(sound: Path, tmp_path: Path) -> None:
    """How the weights are split over files changes nothing about the layers."""
    assert open_checkpoint(tiny.lora_null(tmp_path, shards=3)).layers == open_checkpoint(sound).layers


def test_biases_and_the_protected_variant_are_found(tmp_path: Path) -> None:
    """Layers with a bias, and those with PALinear and PBLinear, are layers like the others."""
    checkpoint = open_checkpoint(tiny.lora_null(tmp_path, tiny.qwen2(), protected=3))
    assert checkpoint.layers[0] == LayerSpec(Q, 4, 32, 32)
    assert {f"{Q}.ALinear.bias", f"{Q}.PBLinear.weight"} <= set(checkpoint.tensors)


@pytest.mark.parametrize("part", ["BLinear.weight", "ALinear.weight", "weight_residual"])
def test_a_layer_without_one_of_its_parts_is_refused(tmp_path: Path, part: str) -> None:
    """A layer that lacks a part is incomplete, and the message names both."""
    message = changed(tmp_path, lambda tensors, _: tensors.__delitem__(f"{Q}.{part}"))
    assert f"layer {Q} has no {part}; the checkpoint is incomplete" in message


@pytest.mark.parametrize(("left", "missing"), [("PALinear", "PBLinear"), ("PBLinear", "PALinear")])
def test_half_of_the_protecting_maps_is_refused(tmp_path: Path, left: str, missing: str) -> None:
    """One of PALinear and PBLinear without the other is incomplete."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q}.{left}.weight"] = torch.zeros((32, 3) if left == "PALinear" else (3, 32))

    assert f"layer {Q} has no {missing}.weight" in changed(tmp_path, change)


@pytest.mark.parametrize(
    ("part", "shape", "said"),
    [
        ("BLinear.weight", (4, 31), "weight_residual has shape [32, 32], expected (32, 31)"),
        ("BLinear.weight", (32,), "BLinear.weight has shape [32], expected (?, ?)"),
        (
            "BLinear.weight",
            (0, 32),
            "BLinear.weight has shape [0, 32], expected (?, ?); an empty tensor is what ZeRO-3",
        ),
        ("ALinear.weight", (32, 5), "ALinear.weight has shape [32, 5], expected (?, 4)"),
        ("ALinear.weight", (31, 4), "weight_residual has shape [32, 32], expected (31, 32)"),
        ("weight_residual", (32, 32, 1), "weight_residual has shape [32, 32, 1], expected (32, 32)"),
        ("weight_residual", (0,), "weight_residual has shape [0], expected (32, 32); an empty tensor is what ZeRO-3"),
        ("ALinear.bias", (31,), "ALinear.bias has shape [31], expected (32)"),
        ("PBLinear.weight", (3, 31), "PBLinear.weight has shape [3, 31], expected (?, 32)"),
        ("PALinear.weight", (31, 3), "PALinear.weight has shape [31, 3], expected (32, 3)"),
    ],
)
def test_a_part_that_does_not_fit_the_others_is_refused(
    tmp_path: Path, part: str, shape: tuple[int, ...], said: str
) -> None:
    """Shapes that do not multiply are refused with both shapes."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        if part.startswith("P"):
            tensors |= {f"{Q}.PBLinear.weight": torch.zeros(3, 32), f"{Q}.PALinear.weight": torch.zeros(32, 3)}
        tensors[f"{Q}.{part}"] = torch.zeros(shape)

    assert f"layer {Q}: {said}" in changed(tmp_path, change)


def test_a_type_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    """Integer weights, as quantisation leaves them, are refused by their type."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q}.weight_residual"] = torch.zeros(32, 32, dtype=torch.int8)

    assert f"layer {Q}: weight_residual is I8, not a floating point type" in changed(tmp_path, change)


@pytest.mark.parametrize("other", ["BLinear.bias", "PALinear.bias", "PBLinear.bias"])
def test_a_tensor_that_no_known_layer_has_is_refused(tmp_path: Path, other: str) -> None:
    """A bias where the format has none would be left out silently, so it is refused."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q}.{other}"] = torch.zeros(4)

    assert f"layer {Q}: {other} belongs to no known LoRA-Null layer" in changed(tmp_path, change)


def test_a_rank_above_the_input_width_is_refused(tmp_path: Path) -> None:
    """More rows than the input is wide cannot be a null space."""

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors |= {f"{Q}.BLinear.weight": torch.zeros(33, 32), f"{Q}.ALinear.weight": torch.zeros(32, 33)}
        del config["lora_r"]

    assert f"layer {Q}: its rank 33 is above its input width 32" in changed(tmp_path, change)


def test_a_rank_that_differs_from_lora_r_is_refused(tmp_path: Path) -> None:
    """A config of another run is told by its rank."""
    message = changed(tmp_path, lambda _, config: config.update(lora_r=8))
    assert f"{tmp_path / 'config.json'}: lora_r is 8, but {Q}.BLinear.weight has rank 4" in message


@pytest.mark.parametrize("lora_r", [0, -1, True, "4", 4.0, [4]])
def test_a_lora_r_that_is_no_rank_is_refused(tmp_path: Path, lora_r: object) -> None:
    """Only a whole number from 1 is a rank."""
    message = changed(tmp_path, lambda _, config: config.update(lora_r=lora_r))
    assert f"lora_r must be a whole number from 1, not {lora_r!r}" in message


def test_no_lora_r_is_no_fault(tmp_path: Path) -> None:
    """The weights alone tell the ranks where the config does not."""
    folder = tiny.lora_null(tmp_path, change=lambda _, config: config.__delitem__("lora_r"))
    assert open_checkpoint(folder).ranks == "rank 4"


@pytest.mark.parametrize("model_type", [None, 3, ["llama"]])
def test_a_config_without_a_model_type_is_refused(tmp_path: Path, model_type: object) -> None:
    """Without an architecture there is no model to rebuild."""
    assert "has no model_type" in changed(tmp_path, lambda _, config: config.update(model_type=model_type))


def test_a_plain_model_is_refused(tmp_path: Path) -> None:
    """A directory without any adapted layer is told from a broken one."""
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="was the plain model saved instead of the adapted one"):
        open_checkpoint(tmp_path)


def test_what_is_no_checkpoint_directory_is_refused(tmp_path: Path) -> None:
    """Nothing there, a file, and a directory of something else are told apart."""
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'none'}: no such directory")):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; give the directory that holds it"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"not a checkpoint: .*config\.json"):
        open_checkpoint(tmp_path)


def test_a_layer_name_that_breaks_a_node_id_is_refused(tmp_path: Path) -> None:
    """A hostile tensor name never becomes the name of a test."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for part in ("BLinear.weight", "ALinear.weight", "weight_residual"):
            tensors[f"a::b[\x1b].{part}"] = tensors.pop(f"{Q}.{part}")

    message = changed(tmp_path, change)
    assert "a::b[" in message
    assert "is not the name of a layer" in message
    assert "\x1b" not in message


def test_opening_a_checkpoint_reads_no_weight(sound: Path, tmp_path: Path) -> None:
    """Only headers are read: a file whose data are a hole in the disk, gigabytes wide, opens at once."""
    rows = 2**28
    parts = {f"{Q}.BLinear.weight": [1, 2], f"{Q}.ALinear.weight": [rows, 1], f"{Q}.weight_residual": [rows, 2]}
    header, at = {}, 0
    for name, shape in parts.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    file = described(tmp_path / "model.safetensors", header, 0)
    os.truncate(file, file.stat().st_size + at)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_checkpoint(tmp_path).layers == (LayerSpec(Q, 1, 2, rows),)
