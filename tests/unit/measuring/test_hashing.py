"""The hashes of the weights, taken beside the pass."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.measuring.digests import PrefixDigest, PrefixOf, file_sha256, no_prefix, of_base
from pytest_nullspace.measuring.followed import Followed
from pytest_nullspace.measuring.hashing import Hashed, Hashes, hashed_meanwhile, hashes
from pytest_nullspace.model.shelf import Shelf
from tests import tiny


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of several files, one of them larger than what is hashed at once."""
    wide = tiny.llama(vocab_size=50_000)
    return open_checkpoint(tiny.lora_null(tmp_path_factory.mktemp("hashing") / "ft", wide, shards=3))


def test_each_file_has_the_hash_of_its_bytes(sharded: Checkpoint) -> None:
    """Beside other work or alone, in one piece or in several, it is SHA-256 of the whole file."""
    files = sorted(sharded.directory.glob("*.safetensors"))
    assert len(files) == 3
    assert max(file.stat().st_size for file in files) > 4 << 20
    expected = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert hashes(sharded) == expected
    with hashed_meanwhile(sharded) as hashed:
        assert hashed().weights == expected


def test_a_base_is_known_by_its_files_or_by_what_lies_beside_the_layers(sharded: Checkpoint) -> None:
    """Of a checkpoint that carries it another W_res is no other base, and another embedding is."""
    files = sorted(sharded.directory.glob("*.safetensors"))
    with hashed_meanwhile(sharded) as hashed:
        carried = hashed().base["base_model"]
    assert set(carried) == {"beside_sha256", "config_sha256", "quantisation"}
    config = replace(sharded, config={**sharded.config, "rms_norm_eps": 1e-4})
    assert of_base(config, None)["base_model"]["config_sha256"] != carried["config_sha256"]
    fewer = replace(sharded, tensors={name: t for name, t in sharded.tensors.items() if "embed_tokens" not in name})
    assert of_base(fewer, None)["base_model"]["beside_sha256"] != carried["beside_sha256"]
    layer = f"{sharded.layers[0].name}."
    trained = replace(sharded, tensors={name: t for name, t in sharded.tensors.items() if not name.startswith(layer)})
    assert of_base(trained, None)["base_model"] == carried
    told = of_base(replace(sharded, base="elsewhere"), sharded.directory)["base_model"]["files"]
    assert told == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("is_followed", [False, True])
def test_a_base_that_is_replaced_while_it_is_read_leaves_no_digest_to_the_next_model(
    tmp_path: Path, sharded: Checkpoint, is_followed: bool
) -> None:
    """A digest of two files, as what was read of one and the rest of another give, is kept for neither of them."""
    file, other = tmp_path / "model.safetensors", tmp_path / "other"
    whole = os.urandom(99)
    file.write_bytes(whole)
    adapter = replace(sharded, base="elsewhere")

    def told(prefix_of: PrefixOf = no_prefix) -> str:
        digest: str = of_base(adapter, tmp_path, None, prefix_of)["base_model"]["files"][file.name]
        return digest

    def replaced(_: Path) -> PrefixDigest:
        file.rename(other)
        file.write_bytes(whole[::-1])
        return PrefixDigest(hashlib.sha256(whole[:64]), 64) if is_followed else no_prefix(file)

    told(replaced)
    assert told() == hashlib.sha256(file.read_bytes()).hexdigest()
    other.rename(file)
    assert told() == hashlib.sha256(whole).hexdigest()


def test_hashes_that_were_cut_short_are_none(sharded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the measurement failed the thread ends soon, and of a part of a file there is no hash."""
    over = Event()
    over.set()
    with pytest.raises(CancelledError):
        hashes(sharded, over)
    with pytest.raises(CancelledError):
        of_base(sharded, None, over)

    def late(checkpoint: Checkpoint, until: Event, _: PrefixOf) -> Hashes:
        assert until.wait(60)
        return hashes(checkpoint, until)

    monkeypatch.setattr("pytest_nullspace.measuring.hashing.hashes", late)
    waited: list[Callable[[], Hashed]] = []

    def measured() -> None:
        with hashed_meanwhile(sharded) as hashed:
            waited.append(hashed)
            raise RuntimeError("the model does not load")

    with pytest.raises(RuntimeError, match="the model"):
        measured()
    with pytest.raises(CancelledError):
        waited[0]()


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_digest_of_what_others_read_is_that_of_the_file(
    sizes: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In whatever order pieces come, though some never do, and what lies between them is read by nobody."""
    file = tmp_path_factory.mktemp("followed") / "weights"
    file.write_bytes(bytes(range(sum(sizes))) if sum(sizes) < 256 else os.urandom(sum(sizes)))
    begins = list(accumulate(sizes, initial=0))[:-1]
    told = [begin for begin in begins if data.draw(st.booleans())]
    followed = Followed((file, begin) for begin in told)
    try:
        for begin in data.draw(st.permutations(told)):
            if data.draw(st.integers(0, 5)):
                size = sizes[begins.index(begin)]
                followed.add(file, begin, memoryview(file.read_bytes())[begin : begin + size])
        assert file_sha256(file, None, followed.prefix) == hashlib.sha256(file.read_bytes()).hexdigest()
    finally:
        followed.end()


def test_where_it_is_over_nothing_is_read_ahead_any_more(sharded: Checkpoint) -> None:
    """After an error or Ctrl-C the reader of a streamed block ends at its next piece, however slow the disk is."""
    with hashed_meanwhile(sharded, at_once=False) as hashed:
        shelf = Shelf([], torch.device("cpu"), torch.float32)
        shelf.files.read_by = hashed.follow([])
        info = sharded.tensors["model.norm.weight"]
        assert shelf.taken(info).shape == info.shape
    with pytest.raises(CancelledError):
        shelf.taken(info)
    shelf.close()
