"""Which tokenizer cuts the text, and whether that of the base would have cut it alike."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pytest_nullspace.report.doubts import other_tokenizer
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.text.choice import FIRST_IDS, TokenizerChoice
from pytest_nullspace.text.tokenizer import LoadedTokenizer, load_tokenizer, tokenizer_sha256
from pytest_nullspace.text.windows import Window, draw_windows
from tests.saved import LAYER
from tests.tiny import TEXT

SEQLEN = 16


def save(folder: Path, vocabulary: Mapping[str, int], adds_bos: bool = False) -> Path:
    """A tokenizer of characters."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.WordLevel({"<s>": 0, "?": 1, **vocabulary}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


LETTERS = {chr(i): i for i in range(2, 128)}


def told(choice: TokenizerChoice, count: int = 4) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """What the choice tells of windows that it drew, and their ids."""
    windows = draw_windows(TEXT, load_tokenizer(choice.used), count=count, seqlen=SEQLEN, seed=7)
    return choice.told({"text": TEXT}, {"text": windows}, SEQLEN), [window.tokens for window in windows]


def digest(folder: Path) -> dict[str, str]:
    return {"tokenizer.json": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()}


def note(about: object) -> str | None:
    return other_tokenizer(RunStats("model", "text", (LAYER,), 1, {"tokenizer": about}))


def test_an_older_copy_without_the_first_token_is_told(tmp_path: Path) -> None:
    """The adapter's own tokenizer is taken; that its base's puts a token first is told, with both digests and ids."""
    own, base = save(tmp_path / "own", LETTERS), save(tmp_path / "base", LETTERS, adds_bos=True)
    choice = TokenizerChoice.of(own, base)
    assert choice.used == own
    about, ids = told(choice)
    assert about == {
        "files": digest(own),
        "sha256": tokenizer_sha256(own),
        "first_ids": list(ids[0][:FIRST_IDS]),
        "base_files": digest(base),
        "base_first_ids": [0, *ids[0][: FIRST_IDS - 1]],
        "windows": 4,
        "windows_differ": 4,
        "first_difference": {"text": "text", "token": 0, "id": ids[0][0], "base_id": 0},
    }
    line = note(json.loads(json.dumps(about)))
    assert line is not None
    assert "gives other ids than its base's in 4 of 4 windows" in line
    assert f"first at token 0 {ids[0][0]}, where the base's gives 0; " in line
    assert "remove the older copy from its directory" in line


def test_only_the_windows_that_were_drawn_count(tmp_path: Path) -> None:
    """A token that was added for training and that the text does not hold makes no difference that is told."""
    own, base = save(tmp_path / "own", LETTERS | {"§": 128}), save(tmp_path / "base", LETTERS)
    about, _ = told(TokenizerChoice.of(own, base))
    assert about["windows_differ"] == 0
    assert about["base_files"] == digest(base) != about["files"]
    assert "first_difference" not in about
    assert note(about) is None


@pytest.mark.parametrize("held", [("own",), ("base",), ("own", "base")])
def test_one_tokenizer_or_two_alike_are_compared_with_nothing(held: tuple[str, ...], tmp_path: Path) -> None:
    """Where only one directory has a tokenizer, or both the same, its digest stands alone in the file."""
    for name in ("own", "base"):
        (tmp_path / name).mkdir()
        if name in held:
            save(tmp_path / name, LETTERS)
    choice = TokenizerChoice.of(tmp_path / "own", tmp_path / "base")
    assert choice.used == tmp_path / held[0]
    about, ids = told(choice)
    used = tmp_path / held[0]
    first = list(ids[0][:FIRST_IDS])
    assert about == {"files": digest(used), "sha256": tokenizer_sha256(used), "first_ids": first}
    assert note(about) is None


def test_a_base_whose_tokenizer_cannot_be_read_fails_nothing(tmp_path: Path) -> None:
    """What is only compared with may be broken: the report says why it was not."""
    own, base = save(tmp_path / "own", LETTERS), save(tmp_path / "base", LETTERS)
    (base / "tokenizer.json").write_text('{"version": "9"}')
    about, _ = told(TokenizerChoice.of(own, base))
    assert about["base_files"] == digest(base)
    assert "its tokenizer cannot be loaded" in about["base_unread"]
    line = note(about)
    assert line is not None
    assert "which could not be held against it: " in line


def test_a_gguf_file_is_the_tokenizer_where_no_other_is(tmp_path: Path) -> None:
    """A GGUF file holds its tokenizer itself, unless one lies beside it or in the adapter's directory."""
    own, file = tmp_path / "own", tmp_path / "base" / "base.gguf"
    for folder in (own, file.parent):
        folder.mkdir()
    file.write_text("GGUF")
    assert TokenizerChoice.of(own, file) == TokenizerChoice(file)
    save(file.parent, LETTERS)
    assert TokenizerChoice.of(own, file) == TokenizerChoice(file.parent)
    save(own, LETTERS)
    assert TokenizerChoice.of(own, file) == TokenizerChoice(own, file.parent)


@given(st.lists(st.tuples(*[st.lists(st.integers(0, 5), min_size=1, max_size=6)] * 2), min_size=1, max_size=5))
def test_windows_that_differ_are_counted_exactly(pairs: list[tuple[list[int], list[int]]]) -> None:
    """The count, and the first place where two windows differ, are those of a comparison id by id."""
    windows = [Window(at, tuple(own)) for at, (own, _) in enumerate(pairs)]
    text = "".join(map(str, range(len(pairs))))
    choice = TokenizerChoice(Path("own"), Path("base"))

    def tokenize(of: str) -> list[int]:
        return pairs[int(of[0])][1]

    of_base = LoadedTokenizer(tokenize, str, lambda _: None, lambda of: (tokenize(of), None))
    about = choice.compared(of_base, {"text": text}, {"text": windows}, 6)
    unlike = [(own, other) for own, other in pairs if own != other]
    assert about["windows_differ"] == len(unlike)
    if unlike:
        own, other = unlike[0]
        place = next(i for i in range(7) if own[i : i + 1] != other[i : i + 1])
        first = about["first_difference"]
        assert (first["token"], first["id"], first["base_id"]) == (
            place,
            own[place] if place < len(own) else None,
            other[place] if place < len(other) else None,
        )


@pytest.mark.parametrize(
    "about", [None, 3, {}, {"windows_differ": "4"}, {"windows_differ": 4}, {"windows_differ": 1, "first_difference": 7}]
)
def test_a_file_of_another_making_says_nothing_of_tokenizers(about: object) -> None:
    """What a stranger's saved run holds in that place is no cause of an error."""
    assert note(about) is None
