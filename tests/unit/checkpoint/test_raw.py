"""The bytes of tensors: read in few large pieces, and of a first block before its model is there, or not at all."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pytest_nullspace.checkpoint.header import TensorInfo, read_header
from pytest_nullspace.checkpoint.raw import AT_ONCE, Early, RawFiles, first_block, spans
from pytest_nullspace.errors import CheckpointError


def infos(file: Path, **dtypes: torch.dtype) -> list[TensorInfo]:
    """Of a file with a tensor of three numbers under each name; ``_`` stands for a point."""
    tensors = {name.replace("_", "."): torch.arange(3).to(dtype) for name, dtype in dtypes.items()}
    save_file(tensors, file)
    return list(read_header(file).values())


def of(name: str, begin: int, nbytes: int, dtype: str = "F32", file: str = "a") -> TensorInfo:
    """One that lies there."""
    return TensorInfo(name, dtype, (nbytes,), Path(file), begin, nbytes)


def read(span: Sequence[TensorInfo]) -> bytes:
    """What lies there."""
    place = bytearray(sum(info.nbytes for info in span))
    with closing(RawFiles()) as files:
        files.read(span, memoryview(place))
    return bytes(place)


def named(found: Sequence[Sequence[TensorInfo]]) -> list[str]:
    """The names of each span."""
    return ["".join(info.name for info in span) for span in found]


def test_what_lies_together_is_read_as_one() -> None:
    """In the files' order, up to so many bytes; a gap, another type, another file or one that is too large ends it."""
    given = [
        of("b", 4, 4), of("a", 0, 4), of("n", 8, 0), of("c", 8, 4, "BF16"), of("d", 12, 4, "BF16"),
        of("e", 20, AT_ONCE - 4), of("f", 16 + AT_ONCE, 4), of("g", 20 + AT_ONCE, 4), of("x", 0, 2 * AT_ONCE, file="b"),
        of("y", 2 * AT_ONCE, 4, file="b"), of("z", 0, 4, file="c"),
    ]  # fmt: skip
    assert named(spans(given)) == ["abn", "cd", "ef", "g", "x", "y", "z"]
    assert spans([]) == []
    assert named(spans([of("n", 0, 0), of("a", 0, 4)])) == ["na"]


def test_the_first_block_is_known_by_names() -> None:
    """The lowest number of the outermost list that has most bytes; in a model without one it is nothing."""
    given = [
        of("model.layers.1.w", 0, 8), of("model.layers.0.experts.7.w", 8, 8), of("model.layers.0.v", 16, 1),
        of("vision.blocks.0.w", 17, 10), of("model.embed.weight", 27, 99), of("model.layers.10.w", 126, 4),
    ]  # fmt: skip
    assert [info.name for info in first_block(given)] == ["model.layers.0.experts.7.w", "model.layers.0.v"]
    assert first_block([of("embed.weight", 0, 4)]) == ()


def test_a_first_block_is_read_early_once(tmp_path: Path) -> None:
    """As it lies in the file, each span of it; of what is no part of it, was cut off or let go of there is nothing."""
    file = tmp_path / "a.safetensors"
    tensors = infos(file, h_0_a=torch.float32, h_0_b=torch.float32, h_0_c=torch.bfloat16, h_1_a=torch.float32)
    early = Early(lambda: tensors)
    first = spans(first_block(tensors))
    assert early.taken(first[0]) is None
    early.begin()
    early.begin()
    for span in first:
        found = early.taken(span)
        assert found is not None
        assert found.tobytes() == read(span)
    assert early.bytes_read == 12 + 12 + 6
    (other,) = (info for info in tensors if info.name == "h.1.a")
    assert early.taken([other]) is None
    early.end()
    assert early.taken(first[0]) is None


def test_what_cannot_be_read_early_is_told_by_who_reads_it(tmp_path: Path) -> None:
    """A file that lost its end or is gone: the early reader says nothing, and the other one which tensor it is."""
    file = tmp_path / "a.safetensors"
    tensors = infos(file, h_0_a=torch.float32, h_0_b=torch.float32)
    (span,) = spans(tensors)
    file.write_bytes(file.read_bytes()[:-1])
    early = Early(lambda: tensors)
    early.begin()
    assert early.taken(span) is None
    early.end()
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: ends before its tensor {span[1].name} does"):
        read(span)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: the weights cannot be read: No such file"):
        read(span)


def test_a_block_for_which_there_is_no_room_yet_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops the early reader ends no run: it has nothing of that block."""

    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("pytest_nullspace.checkpoint.raw.mmap", full)
    tensors = infos(tmp_path / "a.safetensors", h_0_a=torch.float32)
    early = Early(lambda: tensors)
    early.begin()
    assert early.taken(tensors) is None
    early.end()


def test_reading_ends_amid_a_block_that_nobody_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after the piece that is under way is not read, and its file is closed."""
    file = tmp_path / "a.safetensors"
    tensors = infos(file, h_0_a=torch.float32, h_0_b=torch.bfloat16)
    monkeypatch.setattr("pytest_nullspace.checkpoint.raw.AT_ONCE", 2)
    early = Early(lambda: tensors)
    ask = early._require_asked

    def ended(*_: object) -> None:
        early._is_over = True
        ask()

    early._files.read_by = ended
    early.begin()
    assert [early.taken(span) for span in spans(tensors)] == [None, None]
    early.end()
    assert early.bytes_read == 0
    assert not early._files._files
