"""The hashes of the weights, taken beside the pass."""

import gc
import hashlib
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from threading import Event

import pytest

from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.measuring.hashing import Hashes, hashed_meanwhile, hashes
from pytest_nullspace.measuring.memory import uncollected
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
        assert hashed() == expected


def test_hashes_that_were_cut_short_are_none(sharded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the measurement failed the thread ends soon, and of a part of a file there is no hash."""
    over = Event()
    over.set()
    with pytest.raises(CancelledError):
        hashes(sharded, over)

    def late(checkpoint: Checkpoint, until: Event) -> Hashes:
        assert until.wait(60)
        return hashes(checkpoint, until)

    monkeypatch.setattr("pytest_nullspace.measuring.hashing.hashes", late)
    waited: list[Callable[[], Hashes]] = []

    def measured() -> None:
        with hashed_meanwhile(sharded) as hashed:
            waited.append(hashed)
            raise RuntimeError("the model does not load")

    with pytest.raises(RuntimeError, match="the model"):
        measured()
    with pytest.raises(CancelledError):
        waited[0]()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    """Cycles are not looked for inside, and afterwards as the user has it, also where an import failed."""
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with suppress(ImportError), uncollected():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
