"""The digest of a tokenizer: of what decides its ids, whoever saved it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_nullspace.text.tokenizer import FILE, tokenizer_sha256
from tests import tiny


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The directory of a tokenizer."""
    tiny.tokenizer(tmp_path / "own")
    return tmp_path / "own"


def edited(directory: Path, edit: Callable[[dict[str, Any]], object]) -> str | None:
    """The digest of a copy whose ``tokenizer.json`` was edited."""
    copy = Path(shutil.copytree(directory, directory.with_name("copy"), dirs_exist_ok=True))
    told = json.loads((directory / FILE).read_text())
    edit(told)
    (copy / FILE).write_text(json.dumps(told))
    return tokenizer_sha256(copy)


@pytest.mark.parametrize(
    ("edit", "alike"),
    [
        (lambda told: None, True),
        (lambda told: told.update(padding={"length": 8}, truncation={"max_length": 8}), True),
        (lambda told: told["model"].update(ignore_merges=False, dropout=None), True),
        (lambda told: told["model"].update(ignore_merges=True), False),
        (lambda told: told.update(normalizer={"type": "Lowercase"}), False),
        (lambda told: told["model"]["vocab"].update(another=9999), False),
    ],
)
def test_the_digest_is_of_what_decides_the_ids(
    own: Path, edit: Callable[[dict[str, Any]], object], alike: bool
) -> None:
    """Padding, cutting, layout and defaults that are spelled out change nothing; all else does."""
    assert (edited(own, edit) == tokenizer_sha256(own)) is alike


def test_merges_are_the_same_in_both_forms(own: Path) -> None:
    """Pairs that older versions wrote as one text are those that newer ones write as two."""
    one = edited(own, lambda told: told["model"].update(merges=["a b", "c d"]))
    assert edited(own, lambda told: told["model"].update(merges=[["a", "b"], ["c", "d"]])) == one
    assert edited(own, lambda told: told["model"].update(merges=[["a", "b"], ["c", "e"]])) != one


def test_without_a_fast_one_all_files_count(tmp_path: Path) -> None:
    """A copy of older vocabulary files has the same digest, another vocabulary another; nothing has none."""
    for name, words in (("one", "a\nb\n"), ("two", "a\nb\n"), ("three", "a\nc\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text(words)
    one, two, three = (tokenizer_sha256(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three
    assert tokenizer_sha256(tmp_path) is None


def test_what_only_the_library_can_read_has_a_digest_all_the_same(own: Path) -> None:
    """A digest that cannot be had of the content is that of the bytes."""
    (own / FILE).write_text("{" * 100_000)
    assert tokenizer_sha256(own)
