"""A streamed run that was killed goes on from its last block, with the same figures, or begins anew and says why."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.measuring import pipeline
from pytest_nullspace.measuring.distributed import HeardError
from pytest_nullspace.measuring.drift import Predictions
from pytest_nullspace.measuring.halfway import Halfway
from pytest_nullspace.measuring.reading import Reading
from pytest_nullspace.measuring.stowed import stow, stowed
from pytest_nullspace.measuring.summing import OCTAVES
from pytest_nullspace.model.shelf import Shelf
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.settings import STREAM
from tests import tiny
from tests.adapters import adapter
from tests.unit.measuring.conftest import Measured
from tests.unit.measuring.test_streamed import made

ROUNDS = {"calib_size": None, "calib_most": 40}
"""More than one pass: as many windows as settle the verdicts."""


@contextmanager
def ended_at(block: int, by: type[BaseException] = KeyboardInterrupt) -> Iterator[list[int]]:
    """Within this context a run is ended when it comes to its block of that number, over all passes; gives those read.

    What is interrupted leaves the same files as what is killed.
    """
    read, put = list[int](), Shelf.put

    def counted(shelf: Shelf, number: int, values: Any) -> None:
        if len(read) == block:
            raise by
        read.append(number)
        put(shelf, number, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shelf, "put", counted)
        yield read


def end_at(block: int, measured: Measured, directory: Path, **changes: Any) -> None:
    """Begin a run that is ended there."""
    with ended_at(block), pytest.raises(KeyboardInterrupt):
        measured(directory, device_map=STREAM, **changes)


def interrupted(*_: Any) -> None:
    """Whatever else calls it, the run ends here."""
    raise KeyboardInterrupt


def go_on(measured: Measured, directory: Path, **changes: Any) -> tuple[RunStats, list[int]]:
    """Run it again to its end, and which blocks were read for that; nothing may be left behind."""
    with ended_at(-1) as read:
        run = measured(directory, device_map=STREAM, **changes)
    assert not list((directory.parent / "cache").rglob("*"))
    return run, read


def told(run: RunStats) -> list[str]:
    """What the report says of an earlier run."""
    remarks: list[str] = run.about["model"]["remarks"]
    assert remarks[0] == "its blocks are read one after the other"
    return remarks[1:]


@pytest.mark.parametrize(
    ("kind", "changes", "blocks"),
    [
        ("LoRA-Null", ROUNDS, (3, 8)),
        ("sliding", {}, (1,)),
        ("Conv1D", {"batch_size": 1}, (1,)),
        ("one layer", {"drift": False}, (2,)),
    ],
)
def test_a_run_goes_on_from_its_last_block(
    kind: str, changes: dict[str, Any], blocks: tuple[int, ...], measured: Measured, tmp_path: Path
) -> None:
    """Wherever it was ended, in whichever pass: the blocks that are left are read, and all figures are the same."""
    directory = made(kind, tmp_path)
    whole = measured(directory, **changes)
    _, read = go_on(measured, directory, **changes)
    for block in blocks:
        end_at(block, measured, directory, **changes)
        run, left = go_on(measured, directory, **changes)
        assert left == read[block:]
        assert told(run)[0].startswith("an earlier run did not come to its end, so it goes on after block ")
        assert run.layers == whole.layers
        assert run.drift == whole.drift
        assert run.about.get("first_token") == whole.about.get("first_token")
        assert run.about["measured"]["batch_sizes"] == whole.about["measured"]["batch_sizes"]


def test_what_an_earlier_run_left_is_not_wanted_twice(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states that came with the earlier run's file are in memory, and no room is asked for them again."""
    asked = list[tuple[int, int]]()
    monkeypatch.setattr("pytest_nullspace.measuring.measurement.require_room", lambda *of: asked.append(of[4:6]))
    directory = made("LoRA-Null", tmp_path)
    end_at(1, measured, directory)
    _, left = go_on(measured, directory)
    assert left == [1, 2]
    (tokens, whole), (again, more) = asked
    assert again == tokens
    assert whole - more == tokens * 32 * 4  # float32, as wide as the model is


def test_a_run_that_is_ended_again_and_again_comes_to_its_end(measured: Measured, tmp_path: Path) -> None:
    """One block at a time, and after the last one the head: what lies in the folder is one file, the newest."""
    directory = tiny.lora_null(tmp_path / "whole")
    whole = measured(directory)
    for _ in range(2):
        end_at(1, measured, directory)
        assert len(list((tmp_path / "cache").rglob("*.*"))) == 2  # and the lock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictions, "held", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measured(directory, device_map=STREAM)
    run, read = go_on(measured, directory)
    assert (run.layers, run.drift) == (whole.layers, whole.drift)
    assert read == []
    assert told(run) == ["an earlier run did not come to its end, so it goes on after block 3 of 3"]


@pytest.mark.parametrize("changed", ["files", "texts", "options", "versions"])
def test_what_followed_from_something_else_is_begun_anew(
    changed: str, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a file that was changed has its old size and time; the report says what changed."""
    directory, changes = tiny.lora_null(tmp_path / "whole"), {}
    end_at(2, measured, directory)
    file = directory / "model.safetensors"
    match changed:
        case "files":
            was, data = file.stat(), bytearray(file.read_bytes())
            data[-3] ^= 1
            file.write_bytes(data)
            os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
        case "texts":
            (tmp_path / "task.txt").write_text(tiny.TEXT[1:] + ".")
        case "options":
            changes = {"stage": "init"}
        case "versions":
            monkeypatch.setattr(pipeline, "program_sha256", lambda: "another")
    run, read = go_on(measured, directory, **changes)
    assert read == [0, 1, 2]
    assert told(run) == [f"an earlier run did not come to its end, but its {changed} were others, so it begins anew"]
    if changed == "files":
        assert run.layers == measured(directory).layers


def test_a_config_that_changed_while_its_model_loaded_is_another(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed read the old scale, and what it kept is not gone on with at the new one."""
    directory, of = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"]), Reading.of
    config = directory / "adapter_config.json"

    def rescaled(*given: Any) -> Reading:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 40}))
        return of(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Reading, "of", rescaled)
        end_at(2, measured, directory)
    run, read = go_on(measured, directory)
    assert read == [0, 1, 2]
    assert told(run) == ["an earlier run did not come to its end, but its files were others, so it begins anew"]
    assert run.layers == measured(directory).layers


@pytest.mark.parametrize("how", ["cut", "edited", "of another kind"])
def test_what_is_not_whole_is_begun_anew(how: str, measured: Measured, tmp_path: Path) -> None:
    """A file that lacks its end, or in which one bit is another, gives no figure, not even a wrong one."""
    directory = tiny.lora_null(tmp_path / "whole")
    end_at(2, measured, directory)
    (kept,) = (tmp_path / "cache").rglob("*.stowed")
    data = kept.read_bytes()
    match how:
        case "cut":
            kept.write_bytes(data[: len(data) // 2])
        case "edited":
            kept.write_bytes(data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
        case "of another kind":
            kept.write_bytes(b"")
            kept.rename(kept.with_name("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855.stowed"))
    run, read = go_on(measured, directory)
    assert read == [0, 1, 2]
    assert told(run) == ["an earlier run did not come to its end and what it kept is not whole, so it begins anew"]


def other_form(kept: dict[str, Any], how: str) -> Any:
    """What another version of this program might have kept, or nobody."""
    (told,) = kept["passes"]
    part = told["read"][0]
    match how:
        case "an unknown key":
            told["schema"] = 2
        case "a key less":
            del told["extras"]
        case "no passes":
            return {"of": kept["of"], "blocks": told}
        case "a list":
            return [kept]
        case "nothing of what it follows from":
            return {"passes": [told]}
        case "octaves that are all there":
            part["by_octave"] = torch.zeros(len(part["names"]), *OCTAVES)
        case "a layer less":
            del part["names"][0]
        case "another part":
            del part["down_ranks"]
        case "words for sums":
            part["sums"] = "none"
        case "a text less":
            del told["read"][0]
    return kept


FORMS = (
    "a key less", "no passes", "a list", "nothing of what it follows from", "octaves that are all there",
    "a layer less", "another part", "words for sums", "a text less", "an unknown key",
)  # fmt: skip


def test_what_has_another_form_is_begun_anew(measured: Measured, tmp_path: Path) -> None:
    """A file that is whole, and follows from the same, but is none that would be written today: no error, one line."""
    directory = tiny.lora_null(tmp_path / "whole")
    end_at(2, measured, directory, drift=False)
    (file,) = (tmp_path / "cache").rglob("*.stowed")
    folder, data = file.parent, file.read_bytes()
    why = "an earlier run did not come to its end and what it kept has another form, so it begins anew"
    assert not Halfway(folder, stowed(file)["of"]).told
    for how in FORMS:
        file.write_bytes(data)
        kept = stowed(file)
        stow(folder, other_form(kept, how))
        if how != FORMS[-1]:
            assert Halfway(folder, kept["of"]).told == [why], how
            assert not list(folder.iterdir()), how
    run, read = go_on(measured, directory, drift=False)
    assert read == [0, 1, 2]
    assert told(run) == [why]


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ('[{"tensor": 0}, [["float32", [2]]]]', b"1234567"),
        ('[{"tensor": 0}, [["float32", [2]]]]', b"123456789"),
        ('[{"tensor": 0}, [["float5", [2]]]]', b"12345678"),
        ('[{"tensor": 0}, [["nn", [2]]]]', b"12345678"),
        ('[{"tensor": 0}, [["float32", [-2]]]]', b""),
        ('[{"tensor": 1, "tuple": 2}, []]', b""),
        ('[{"set": 1}, []]', b""),
        ("{}", b""),
    ],
)
def test_what_is_no_such_file_holds_nothing(text: str, data: bytes, tmp_path: Path) -> None:
    """Though it is named by its SHA-256: cut, too long, of an unknown type or form, there is nothing and no error."""
    whole = len(text).to_bytes(8, "little") + text.encode() + data
    file = tmp_path / f"{hashlib.sha256(whole).hexdigest()}.stowed"
    file.write_bytes(whole)
    assert stowed(file) is None


def test_a_model_that_looks_back_further_is_begun_anew(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first block gave, and the last one reads as well, is no more there: nothing is made up for it."""
    first, call = dict[int, Any](), LlamaDecoderLayer.__call__

    def looks_back(block: Any, hidden: Any, **given: Any) -> Any:
        number = block.self_attn.layer_idx
        output = call(block, hidden + first[get_ident()] if number == 2 else hidden, **given)
        if number == 0:
            first[get_ident()] = output
        return output

    monkeypatch.setattr(LlamaDecoderLayer, "__call__", looks_back)
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"])
    whole = measured(directory)
    end_at(2, measured, directory)
    run, read = go_on(measured, directory)
    assert read == [0, 1, 2]
    (remark,) = told(run)
    assert remark.endswith("its model cannot be brought back to where it was, so it begins anew")
    assert (run.layers, run.drift) == (whole.layers, whole.drift)


def test_an_error_leaves_nothing_behind(measured: Measured, tmp_path: Path) -> None:
    """A run that came to an end by itself, be it red, is not gone on with."""
    directory = tiny.lora_null(tmp_path / "whole")
    with ended_at(2, CheckpointError), pytest.raises(CheckpointError):
        measured(directory, device_map=STREAM)
    assert not list((tmp_path / "cache").rglob("*"))


def test_what_another_process_ended_is_gone_on_with(measured: Measured, tmp_path: Path) -> None:
    """Of several that measure together one may be killed: what the others have so far is kept as well."""
    directory = tiny.lora_null(tmp_path / "whole")
    with ended_at(2, HeardError), pytest.raises(HeardError):
        measured(directory, device_map=STREAM)
    assert go_on(measured, directory)[1] == [2]


def test_two_runs_at_once_do_not_share_what_they_keep(measured: Measured, tmp_path: Path) -> None:
    """The second keeps nothing, says so, and leaves what the first has."""
    directory = tiny.lora_null(tmp_path / "whole")
    end_at(2, measured, directory)
    (kept,) = (tmp_path / "cache").rglob("*.stowed")
    with FileLock(kept.parent.with_suffix(".lock")):
        run = measured(directory, device_map=STREAM)
    (remark,) = told(run)
    assert remark.startswith("another run of it is under way, so this one keeps nothing in ")
    assert kept.is_file()
    assert go_on(measured, directory)[1] == [2]


def test_a_folder_without_room_stops_no_run(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are there, with a line that nothing was kept."""

    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    run, _ = go_on(measured, tiny.lora_null(tmp_path / "whole"))
    (remark,) = told(run)
    assert "cannot be kept" in remark
    assert "No space left on device" in remark
