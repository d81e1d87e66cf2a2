"""Holds how a text is named, read, and cut into windows, and which tokenizer cuts it."""

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.errors import CheckpointError, TextError
from pytest_nullspace.text.sources import (
    NAMED_SETS,
    FileText,
    FolderText,
    HubText,
    SelfText,
    Source,
    parse_source,
)
from pytest_nullspace.text.sources import named as taken
from pytest_nullspace.text.tokenizer import load_tokenizer
from pytest_nullspace.text.windows import CONTEXT, Window, distinct_rows, draw_windows, text_hash, unigram_loss
from tests.plain import read_text

TAKES = (
    "It takes wikitext2, c4, ptb, triviaqa, nqopen, self, a file (.txt .md .jsonl .json .csv .parquet; FILE:column), "
    "a folder of texts, of images or saved by datasets (DIR:split:column), or hub:owner/name[:config[:split[:column]]]."
)


COLON = pytest.param("g:h.csv", marks=pytest.mark.skipif(os.name == "nt", reason="no colons in names there"))


def refused(call: Callable[[], Any], error: type[Exception] = TextError) -> str:
    """The message with which ``call`` fails."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def named(spec: str, folder: Path = Path()) -> Source:
    """What ``spec`` names, which must be there to be read."""
    source = parse_source(spec, folder)
    assert not isinstance(source, SelfText)
    return source


def words(text: str) -> list[int]:
    """A tokenizer that gives every character but a blank its code point."""
    return [ord(character) for character in text if character != " "]


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., FileText]:
    """A function that writes a file and gives it as a source."""

    def write(name: str, content: str | bytes, column: str | None = None) -> FileText:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return FileText(path, column)

    return write


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., FileText]:
    """A function that writes columns as a parquet file and gives it as a source."""
    import pyarrow
    import pyarrow.parquet

    def write(columns: dict[str, list[Any]], column: str | None = None) -> FileText:
        path = tmp_path / "data.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return FileText(path, column)

    return write


class TestSource:
    @pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb", "triviaqa", "nqopen"])
    def test_a_named_set_is_a_train_split_of_the_hub(self, name: str) -> None:
        """Each set of the reference goes by its own name and stands for a column of a train split."""
        source = parse_source(name)
        assert source is NAMED_SETS[name]
        assert isinstance(source, HubText)
        assert source.split == "train"
        assert source.column == {"ptb": "sentence", "triviaqa": "question", "nqopen": "question"}.get(name, "text")

    def test_a_named_set_wins_over_a_folder_of_its_name(self, tmp_path: Path) -> None:
        """A local folder called as a named set must be given as ./name."""
        (tmp_path / "ptb").mkdir()
        assert parse_source("ptb", tmp_path) is NAMED_SETS["ptb"]
        assert parse_source("./ptb", tmp_path) == FolderText(tmp_path / "ptb")

    def test_self_wins_over_a_folder_of_its_name(self, tmp_path: Path) -> None:
        """What the base writes is meant by ``self`` alone; a folder of this name is written ./self."""
        (tmp_path / "self").mkdir()
        (tmp_path / "self.txt").touch()
        assert parse_source("self", tmp_path) == SelfText()
        assert parse_source("./self", tmp_path) == FolderText(tmp_path / "self")
        assert parse_source("self.txt", tmp_path) == FileText(tmp_path / "self.txt")

    def test_a_name_stands_before_what_it_names(self, tmp_path: Path) -> None:
        """Unless a file or folder has the equals sign in its own name, which then wins, also with a column after it."""
        assert taken("wiki=a.txt", tmp_path) == ("wiki", "a.txt")
        assert taken("wiki=a=b.txt", tmp_path) == ("wiki", "a=b.txt")
        assert taken("code=hub:a/b:c", tmp_path) == ("code", "hub:a/b:c")
        assert taken("own=self", tmp_path) == ("own", "self")
        assert taken("a.txt", tmp_path) == ("", "a.txt")
        (tmp_path / "wiki=a.txt").touch()
        (tmp_path / "b=c").mkdir()
        assert taken("wiki=a.txt", tmp_path) == ("", "wiki=a.txt")
        assert taken("wiki=a.txt:body", tmp_path) == ("", "wiki=a.txt:body")
        assert taken("b=c:train:body", tmp_path) == ("", "b=c:train:body")
        assert taken("x=wiki=a.txt", tmp_path) == ("x", "wiki=a.txt")

    @pytest.mark.parametrize("name", ["", "a b", "drift", "model", "task", "./a", "a[b]", "é", "x" * 41])
    def test_what_cannot_be_a_name_is_refused(self, name: str, tmp_path: Path) -> None:
        """One sentence says that there is no such file, and what a name takes."""
        message = refused(lambda: taken(f"{name}=a.txt", tmp_path))
        assert "there is no such file or folder, and" in message
        assert "letters, digits, '_', '.' and '-', and is not drift, model or task" in message

    def test_the_task_is_nothing_that_the_base_writes(self) -> None:
        """The word is refused as a task text, with how a folder of its name is given."""
        message = refused(lambda: parse_source("self", option="--nullspace-task-dataset"))
        assert message.startswith(
            "--nullspace-task-dataset=self: the base model writes what it knows, which is no text"
        )
        assert message.endswith("as ./self)")

    @pytest.mark.parametrize(
        ("spec", "source"),
        [
            ("hub:a/b", HubText("a/b")),
            ("hub:a/b:c", HubText("a/b", "c")),
            ("hub:a/b:c:test", HubText("a/b", "c", "test")),
            ("hub:a/b:c:test:body", HubText("a/b", "c", "test", "body")),
            ("hub:a-1/b_2.x::train[:10%]:x:y", HubText("a-1/b_2.x", None, "train[:10%]", "x:y")),
            ("hub:a/b:::body", HubText("a/b", None, "train", "body")),
        ],
    )
    def test_a_hub_dataset_is_taken_apart(self, spec: str, source: HubText) -> None:
        """Config, split (a slice too) and column follow the name, and each left empty is the default."""
        assert parse_source(spec) == source

    @pytest.mark.parametrize("spec", ["hub:", "hub:squad", "hub:a/b/c", "hub:../b", "hub:a/b:c:train:", "hub:a b/c"])
    def test_a_malformed_hub_name_is_refused(self, spec: str) -> None:
        """What is not owner/name with its parts is refused with the form that is wanted."""
        assert refused(lambda: parse_source(spec)) == (
            f"--nullspace-calib-dataset={spec}: not of the form hub:owner/name[:config[:split[:column]]]. {TAKES}"
        )

    @pytest.mark.parametrize("name", ["a.txt", "a.md", "b.jsonl", "c.json", "d.csv", "e.parquet", "F.TXT", COLON])
    def test_a_file_is_known_by_its_suffix(self, name: str, tmp_path: Path) -> None:
        """A file is found relative to the folder, with or without a column, even with a colon in its name."""
        (tmp_path / name).touch()
        assert parse_source(name, tmp_path) == FileText(tmp_path / name)
        assert parse_source(f"{name}:body", tmp_path) == FileText(tmp_path / name, "body")
        assert parse_source(str(tmp_path / name)) == FileText(tmp_path / name)

    def test_a_page_of_markdown_is_the_text_that_it_holds(self, tmp_path: Path) -> None:
        """A .md file is read as a .txt is, marks and all."""
        page = tmp_path / "page.md"
        page.write_bytes(b"# Head\r\n\n*said*")
        assert read_text(FileText(page)) == "# Head\n\n*said*"

    def test_a_folder_takes_a_split_and_a_column(self, tmp_path: Path) -> None:
        """A folder may be followed by a split, by a split and a column, or by a column alone."""
        folder = tmp_path / "saved"
        folder.mkdir()
        assert parse_source("saved", tmp_path) == FolderText(folder)
        assert parse_source("saved:test", tmp_path) == FolderText(folder, "test")
        assert parse_source("saved:test:body", tmp_path) == FolderText(folder, "test", "body")
        assert parse_source("saved::body", tmp_path) == FolderText(folder, None, "body")

    def test_a_leading_tilde_is_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The shell leaves the tilde of --option=~/file alone, so it is replaced here; ~nobody is a file's name."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        (tmp_path / "a.txt").touch()
        (tmp_path / "~nobody.txt").touch()
        assert parse_source("~/a.txt") == FileText(tmp_path / "a.txt")
        assert parse_source("~nobody.txt", tmp_path) == FileText(tmp_path / "~nobody.txt")

    def test_what_is_missing_is_named_with_where_it_was_looked_for(self, tmp_path: Path) -> None:
        """A name that stands for nothing is refused with each path that was tried and all that the option takes."""
        assert refused(lambda: parse_source("wikitext:a", tmp_path)) == (
            "--nullspace-calib-dataset=wikitext:a: no such file or folder "
            f"(looked for {tmp_path / 'wikitext:a'} and {tmp_path / 'wikitext'}). {TAKES}"
        )

    def test_an_unknown_suffix_is_refused(self, tmp_path: Path) -> None:
        """A file that no reader is for is refused before it is opened."""
        path = tmp_path / "a.docx"
        path.touch()
        assert refused(lambda: parse_source("a.docx", tmp_path)) == (
            f"--nullspace-calib-dataset=a.docx: {path} has none of the suffixes that can be read. {TAKES}"
        )

    def test_a_file_has_no_splits(self, tmp_path: Path) -> None:
        """Two selectors after a file are one too many."""
        (tmp_path / "a.csv").touch()
        assert refused(lambda: parse_source("a.csv:train:body", tmp_path)) == (
            f"--nullspace-calib-dataset=a.csv:train:body: {tmp_path / 'a.csv'} is a file, which has no splits. {TAKES}"
        )

    def test_a_text_given_in_place_of_a_path_is_refused(self) -> None:
        """A name longer than any file system takes is as missing as any other."""
        told = refused(lambda: parse_source("word " * 2000))
        assert "no such file or folder" in told
        assert len(told) < 1500, "a text is not repeated as where a path was looked for"


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.txt", "é one\n\ntwo"),
            ("bom.txt", "\ufeffé one\n\ntwo"),
            ("crlf.txt", "é one\r\n\r\ntwo"),
            ("a.jsonl", '{"id": 1, "text": "é one"}\n\n{"id": 2, "text": "two"}\n'),
            ("strings.jsonl", '"é one"\r\n"two"'),
            ("bom.jsonl", '\ufeff"é one"\n"two"'),
            ("a.json", '[{"text": "é one"}, {"text": null}, {"id": 1}, null, {"text": "two"}]'),
            ("strings.json", '["é one", "two"]'),
            ("columns.json", '{"id": [1, 2], "text": ["é one", "two"]}'),
            ("lines.json", '{"id": 1, "text": "é one"}\r\n{"id": 2, "text": "two"}\n'),
            ("one list.jsonl", '[{"text": "é one"},\n{"text": "two"}]\n'),
            ("a.csv", 'id,text\n1,é one\n\n2,"two"\n'),
            ("bom.csv", "\ufefftext\r\né one\r\ntwo\r\n"),
        ],
    )
    def test_every_kind_of_file_gives_its_texts(self, name: str, content: str, file: Callable[..., FileText]) -> None:
        """Texts are joined by a blank line whatever the file's kind; nulls and blank lines are passed over."""
        assert read_text(file(name, content)) == "é one\n\ntwo"

    def test_parquet_gives_its_texts(self, parquet: Callable[..., FileText]) -> None:
        """A parquet column is read without the others, and its nulls are passed over."""
        assert read_text(parquet({"id": [1, 2, 3], "text": ["é one", None, "two"]})) == "é one\n\ntwo"

    @pytest.mark.parametrize(
        ("columns", "text"),
        [
            ({"content": "d", "question": "c", "sentence": "b", "text": "a"}, "a"),
            ({"content": "d", "question": "c", "sentence": "b"}, "b"),
            ({"content": "d", "question": "c", "other": "x"}, "c"),
            ({"content": "d", "other": "x"}, "d"),
            ({"id": 1, "other": "x", "none": None}, "x"),
        ],
    )
    def test_the_default_column(self, columns: dict[str, Any], text: str, file: Callable[..., FileText]) -> None:
        """Unasked, the first of the usual names is taken, else the only column of strings."""
        assert read_text(file("a.jsonl", json.dumps(columns))) == text

    @pytest.mark.parametrize("name", ["body", "a.b", "weird:name"])
    def test_a_column_is_taken_by_name(self, name: str, parquet: Callable[..., FileText]) -> None:
        """A column that was asked for is taken even where a usual name is present."""
        assert read_text(parquet({"text": ["x"], name: ["y"]}, name)) == "y"

    def test_a_missing_column_is_refused_with_those_there_are(self, file: Callable[..., FileText]) -> None:
        """The message lists the columns that could have been asked for."""
        source = file("a.csv", "id,body\n1,x\n", "text")
        assert refused(lambda: read_text(source)) == f"{source.path}: has no column 'text'; its columns: id, body"

    def test_two_candidates_are_refused(self, parquet: Callable[..., FileText]) -> None:
        """Among several columns of strings none is guessed."""
        source = parquet({"a": ["x"], "b": ["y"]})
        assert refused(lambda: read_text(source)) == (
            f"{source.path}: say which column holds the text, as in data.parquet:column; its columns: a, b"
        )

    def test_a_value_that_is_no_string_is_refused(self, file: Callable[..., FileText]) -> None:
        """A number among the texts is named by line, column and type."""
        source = file("a.jsonl", '{"text": "x"}\n\n{"text": 3}\n')
        assert refused(lambda: read_text(source)) == (f"{source.path}: line 3 of column 'text' holds int, not a string")

    def test_a_parquet_value_that_is_no_string_is_refused(self, parquet: Callable[..., FileText]) -> None:
        """A column of numbers that was asked for is refused at its first row."""
        source = parquet({"id": [7]}, "id")
        assert refused(lambda: read_text(source)) == f"{source.path}: row 1 of column 'id' holds int, not a string"

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("a.txt", b"caf\xe9", "not UTF-8 text (byte 3); save it as UTF-8"),
            ("b.txt", b"\xef\xbb\xbfcaf\xe9", "not UTF-8 text (byte 6); save it as UTF-8"),
            (
                "utf16.txt",
                "words".encode("utf-16-le"),
                "5 of its 10 characters are NUL, as where UTF-16 is read as UTF-8; save it as UTF-8",
            ),
            ("a.jsonl", '"x"\n{"text": }\n', "line 2, column 10: not JSON (Expecting value); mend or remove it"),
            ("lines.json", '"x"\n{"text": }\n', "line 2, column 10: not JSON (Expecting value); mend or remove it"),
            ("lists.jsonl", '["x"]\n["y"]\n', "line 1 holds list, neither an object nor a string"),
            ("b.jsonl", '"x"\n[1]\n', "line 2 holds list, neither an object nor a string"),
            ("a.json", '[\n"x",\n]', "line 3, column 1: not JSON (Expecting value); mend or remove it"),
            ("b.json", "[1]", "row 1 holds int, neither an object nor a string"),
            ("c.json", '{"text": "x"}', "takes a list of objects or strings, or an object whose values are lists"),
            ("d.json", '"x"', "takes a list of objects or strings, or an object whose values are lists"),
            (
                "e.json",
                '["a\\ud800"]',
                "character 1 of its text is half a surrogate pair, which cannot be encoded; remove or mend it",
            ),
            ("a.csv", "a,b\n1,2\n3\n", "line 3 has 1 fields where the header has 2"),
            ("b.csv", 'a\n"x\n', "line 2: not CSV (unexpected end of data)"),
            ("c.csv", "a,b,a\n", "its header names a column twice: a, b, a"),
        ],
    )
    def test_a_file_that_is_not_what_it_says_is_refused(
        self, name: str, content: str | bytes, reason: str, file: Callable[..., FileText]
    ) -> None:
        """The message says where the file stops being of its kind."""
        source = file(name, content)
        assert refused(lambda: read_text(source)) == f"{source.path}: {reason}"

    def test_a_broken_parquet_file_is_refused(self, file: Callable[..., FileText]) -> None:
        """What does not end as parquet does is refused in one line."""
        source = file("a.parquet", b"PAR1 no, really not")
        assert refused(lambda: read_text(source)).startswith(f"{source.path}: not a parquet file that can be read: ")

    def test_a_broken_parquet_column_is_refused(self, parquet: Callable[..., FileText]) -> None:
        """Damage that only shows when the column is read is refused just so."""
        source = parquet({"text": ["x" * 100]})
        data = source.path.read_bytes()
        source.path.write_bytes(data[:4] + b"\xff" * 30 + data[34:])
        assert refused(lambda: read_text(source)).startswith(f"{source.path}: not a parquet file that can be read: ")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
    def test_an_empty_file_is_refused(self, name: str, file: Callable[..., FileText]) -> None:
        """A file of nothing holds no text."""
        source = file(name, "")
        assert (
            refused(lambda: read_text(source)) == f"{source.path}: holds no text; give one of some 100,000 characters"
        )

    @pytest.mark.parametrize(
        ("name", "content"), [("a.txt", " \n"), ("a.jsonl", '{"text": null}\n'), ("a.json", "[]"), ("a.csv", "text\n")]
    )
    def test_a_file_without_text_is_refused(self, name: str, content: str, file: Callable[..., FileText]) -> None:
        """Neither blanks nor nulls nor a header alone are text."""
        source = file(name, content, None if name == "a.json" else "text")
        assert (
            refused(lambda: read_text(source)) == f"{source.path}: holds no text; give one of some 100,000 characters"
        )

    def test_an_unreadable_file_is_refused(self, tmp_path: Path) -> None:
        """A file that was there when it was named and is gone when it is read is no traceback."""
        source = FileText(tmp_path / "gone.txt")
        assert refused(lambda: read_text(source)) == f"{source.path}: cannot be read: No such file or directory"

    def test_a_long_csv_field_is_read(self, file: Callable[..., FileText]) -> None:
        """A document longer than the csv module's default limit is read, and the limit is put back."""
        import csv

        before = csv.field_size_limit()
        assert len(read_text(file("a.csv", f"text\n{'x' * 200_000}\n"))) == 200_000
        assert csv.field_size_limit() == before


class TestFolders:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        """A folder with two splits, beside one with none."""
        import datasets

        def split(text: str) -> Any:
            return datasets.Dataset.from_dict({"id": [1, 2, 3], "text": [text, None, "end"], "body": ["p", "q", "r"]})

        datasets.DatasetDict({"train": split("é one"), "test": split("two")}).save_to_disk(str(tmp_path / "splits"))
        split("three").select([2, 0]).save_to_disk(str(tmp_path / "single"))
        return tmp_path

    @pytest.mark.parametrize(
        ("spec", "text"),
        [
            ("splits", "é one\n\nend"),
            ("splits:test", "two\n\nend"),
            ("splits:test:body", "p\n\nq\n\nr"),
            ("splits::body", "p\n\nq\n\nr"),
            ("single", "end\n\nthree"),
            ("single::body", "r\n\np"),
        ],
    )
    def test_a_saved_folder_gives_its_texts(self, spec: str, text: str, saved: Path) -> None:
        """The split defaults to train, rows keep the order that was saved, nulls are passed over."""
        assert read_text(named(spec, saved)) == text

    def test_a_missing_split_is_refused_with_those_there_are(self, saved: Path) -> None:
        """The message lists the splits that could have been asked for."""
        assert refused(lambda: read_text(named("splits:dev", saved))) == (
            f"{saved / 'splits'}: has no split 'dev'; its splits: train, test"
        )

    def test_a_single_set_has_no_splits(self, saved: Path) -> None:
        """A split of a set that has none is refused rather than ignored."""
        assert refused(lambda: read_text(named("single:train:body", saved))) == (
            f"{saved / 'single'}: has no splits; leave 'train' out, as in single::column"
        )

    def test_a_folder_of_other_things_is_refused(self, tmp_path: Path) -> None:
        """A folder that datasets did not save is refused in one line."""
        (tmp_path / "notes.pdf").touch()
        assert refused(lambda: read_text(FolderText(tmp_path))) == (
            f"{tmp_path}: not a folder that save_to_disk of datasets wrote, and without .txt and .md files or images "
            "in it; give a folder of one of these, or a file"
        )
        (tmp_path / "state.json").write_text("{")
        message = refused(lambda: read_text(FolderText(tmp_path)))
        assert message.startswith(f"{tmp_path}: not a folder that save_to_disk of datasets wrote: ")
        assert "\n" not in message

    def test_a_folder_of_texts_is_read_in_the_order_of_its_paths(self, tmp_path: Path) -> None:
        """Files in it and below, hidden ones left out, are one text; another folder in it is named as a split."""
        (tmp_path / "texts" / "sub").mkdir(parents=True)
        (tmp_path / "texts" / ".cache").mkdir()
        for name in ("b.txt", "a.md", "sub/c.TXT", ".cache/d.txt", ".e.txt"):
            (tmp_path / "texts" / name).write_text(f"of {name}")
        (tmp_path / "texts" / "code.py").touch()
        assert read_text(named("texts", tmp_path)) == "of a.md\n\nof b.txt\n\nof sub/c.TXT"
        assert read_text(named("texts:sub", tmp_path)) == "of sub/c.TXT"
        (tmp_path / "texts" / "a.md").write_bytes(b"\xff")
        assert refused(lambda: read_text(named("texts", tmp_path))) == (
            f"{tmp_path / 'texts' / 'a.md'}: not UTF-8 text (byte 0); save it as UTF-8"
        )

    def test_a_folder_of_texts_and_rows_is_refused(self, tmp_path: Path) -> None:
        """Nothing is passed over that may be part of the text, as in a dataset's folder with its README."""
        for name in ("README.md", "rows.jsonl"):
            (tmp_path / name).write_text("{}")
        assert refused(lambda: read_text(FolderText(tmp_path))) == (
            f"{tmp_path}: holds rows.jsonl beside README.md; give that file, or a folder of .txt and .md files alone"
        )

    def test_an_undecided_column_is_named_with_its_split(self, tmp_path: Path) -> None:
        """The form that the message recommends keeps the split."""
        import datasets

        rows = datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]})
        datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "two"))
        assert refused(lambda: read_text(named("two:test", tmp_path))) == (
            f"{tmp_path / 'two'}: say which column holds the text, as in two:test:column; its columns: a, b"
        )


class TestCaches:
    def test_local_texts_leave_nothing_behind(self, tmp_path: Path) -> None:
        """Reading every kind of local file and folder writes no file, beside them or in any cache."""
        work = tmp_path / "work"
        work.mkdir()
        script = (
            "import datasets, sys; from pathlib import Path; from pytest_nullspace.text.sources import *\n"
            "from pytest_nullspace.text.readers import *; from pytest_nullspace.text.windows import *\n"
            "from pytest_nullspace.text.tokenizer import *\n"
            "root = Path(sys.argv[1]); rows = datasets.Dataset.from_dict({'text': ['x']})\n"
            "rows.save_to_disk(str(root / 'saved')); rows.to_parquet(str(root / 'a.parquet'))\n"
            "for name in ('a.txt', 'a.csv'): (root / name).write_text('text\\nx\\n')\n"
            "for name in ('a.json', 'a.jsonl'): (root / name).write_text('[\"x\"]' if name == 'a.json' else '\"x\"')\n"
            "names = sorted(path.name for path in root.iterdir())\n"
            "before = sorted(Path(sys.argv[2]).rglob('*'))\n"
            "for name in names: read(parse_source(name, root), 'off')\n"
            "assert sorted(Path(sys.argv[2]).rglob('*')) == before, 'something was written'\n"
            "assert len(names) == 6\n"
        )
        environment = os.environ | {
            "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path),
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        subprocess.run([sys.executable, "-c", script, str(work), str(tmp_path)], check=True, env=environment)


class TestHub:
    @pytest.mark.parametrize(
        ("spec", "shown"),
        [
            ("wikitext2", "Salesforce/wikitext (wikitext-2-raw-v1, train)"),
            ("ptb", "ptb-text-only/ptb_text_only (train)"),
            ("hub:owner/name::test", "owner/name (test)"),
        ],
    )
    def test_a_hub_that_cannot_be_reached_is_refused(
        self, spec: str, shown: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Without the hub the message names the dataset and how to give a file instead."""
        import datasets

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        source = parse_source(spec)
        assert isinstance(source, HubText)
        assert refused(lambda: read_text(source)) == (
            f"hub dataset {shown}: cannot be loaded: Couldn't reach '{source.repo}' on the Hub (OfflineModeIsEnabled). "
            "Mend that, or give a local file: --nullspace-calib-dataset=FILE.txt"
        )

    @pytest.mark.parametrize(
        ("spec", "asked"),
        [
            ("triviaqa", (("mandarjoshi/trivia_qa", "rc.nocontext"), {"split": "train", "revision": None})),
            ("hub:o/n:c:test[:3]:question", (("o/n", "c"), {"split": "test[:3]", "revision": None})),
            (
                "c4",
                (
                    ("allenai/c4", None),
                    {
                        "split": "train",
                        "revision": None,
                        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                        "verification_mode": "no_checks",
                    },
                ),
            ),
        ],
    )
    def test_what_the_hub_is_asked_for(self, spec: str, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The hub is asked for the named split and nothing about trusting its code; the named column is read."""
        import datasets

        calls: list[Any] = []

        def load_dataset(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return datasets.Dataset.from_dict({"question": ["é one", None, "two"], "text": ["é one", None, "two"]})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert read_text(named(spec)) == "é one\n\ntwo"
        assert calls == [asked]

    def test_an_undecided_column_is_named_in_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The form that the message recommends keeps what was given."""
        import datasets

        rows = datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
        assert refused(lambda: read_text(HubText("o/n"))) == (
            "hub dataset o/n (train): say which column holds the text, as in hub:o/n::train:column; its columns: a, b"
        )


class TestWindows:
    TEXT = "".join(random.Random(0).choices("ab cd\n", k=3000))

    @pytest.mark.parametrize("seed", [0, 42, 2**40])
    def test_windows_are_those_of_the_reference(self, seed: int) -> None:
        """Starts and tokens are what Python's own random gives when it is seeded with the seed."""
        state = random.getstate()
        random.seed(seed)
        expected = []
        for _ in range(16):
            start = random.randint(0, len(self.TEXT) - 32 - 1)
            expected.append(Window(start, tuple(words(self.TEXT[start : start + 320])[:32])))
        random.setstate(state)
        assert draw_windows(self.TEXT, words, count=16, seqlen=32, seed=seed) == tuple(expected)

    def test_the_global_stream_is_left_alone(self) -> None:
        """Drawing windows neither seeds nor advances Python's random."""
        state = random.getstate()
        draw_windows(self.TEXT, words, count=4, seqlen=32, seed=1)
        assert random.getstate() == state

    @given(
        text=st.text(st.characters(exclude_characters=" ", exclude_categories=["Cs"]), min_size=9, max_size=400),
        seed=st.integers(0, 2**32),
        count=st.integers(1, 5),
    )
    def test_windows_are_prefixes_of_their_slices(self, text: str, seed: int, count: int) -> None:
        """The same text and seed give the same windows, each the first tokens of its slice and none too long."""
        windows = draw_windows(text, words, count=count, seqlen=8, seed=seed)
        assert windows == draw_windows(text, words, count=count, seqlen=8, seed=seed)
        assert len(windows) == count
        for window in windows:
            assert 0 <= window.start < len(text) - 8
            assert 0 < len(window.tokens) <= 8
            assert list(window.tokens) == words(text[window.start : window.start + 80])[: len(window.tokens)]

    def test_a_short_window_is_not_padded(self) -> None:
        """At the end of the text a window has as many tokens as are left."""
        assert draw_windows("a b c d", words, count=1, seqlen=6, seed=0) == (Window(0, (97, 98, 99, 100)),)

    def test_a_text_too_short_is_refused(self) -> None:
        """The message has the length, what is needed, and the option that lowers it; one more character is enough."""
        assert refused(lambda: draw_windows("x" * 8, words, count=1, seqlen=8, seed=0)) == (
            "the text has 8 characters, and windows of 8 tokens need at least 9; "
            "give a longer text or a smaller --nullspace-seqlen"
        )
        assert len(draw_windows("x" * 9, words, count=1, seqlen=8, seed=0)) == 1

    def test_a_window_without_tokens_is_refused(self) -> None:
        """A stretch in which the tokenizer sees nothing would be a window of nothing."""
        assert refused(lambda: draw_windows(" " * 9, words, count=1, seqlen=8, seed=0)) == (
            "the window at character 0 of the text has no tokens; "
            "give a text without long blanks, or check the tokenizer"
        )

    def test_the_hash_is_of_the_encoded_text(self) -> None:
        """The hash is what sha256sum gives for the text as a UTF-8 file."""
        assert text_hash("é\n") == "edd3a863872a04239eb29ad4bc12fc892b3d4ae57cc7e786a3697816f8e141c2"


CORPUS = ["the cat sat on the mat", "the dog ate the cat"]
TRAP = "from pathlib import Path\nPath(__file__).with_name('SPRUNG').touch()\nraise SystemExit('code was run')\n"


class TestDistinctRows:
    """How much of the windows is new."""

    NEW = tuple(range(300))

    def test_what_was_there_before_does_not_count(self) -> None:
        """The same window again adds nothing, another one all its tokens."""
        windows = [Window(0, self.NEW), Window(0, self.NEW), Window(9, tuple(range(300, 400)))]
        assert distinct_rows(windows) == 400

    def test_a_text_that_goes_round_is_as_new_as_one_round(self) -> None:
        """Wherever windows begin in a text that repeats itself, only the first round and their beginnings count."""
        around = self.NEW * 4
        assert distinct_rows([Window(0, around)]) == 300 + CONTEXT - 1
        assert distinct_rows([Window(0, around), Window(7, around[7:])]) == 300 + 2 * (CONTEXT - 1)

    def test_an_overlap_does_not_count_twice(self) -> None:
        """Of a window that begins within another only what reaches beyond it is new, and its beginning."""
        assert distinct_rows([Window(0, self.NEW[:200]), Window(100, self.NEW[100:])]) == 300 + CONTEXT - 1

    def test_common_words_are_new_where_what_precedes_them_is(self) -> None:
        """Two tokens in any order are as many rows as there are, for what precedes them tells them apart."""
        choose = random.Random(0)
        assert distinct_rows([Window(0, tuple(choose.choices((1, 2), k=1000)))]) == 1000


class TestTokenizer:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        """A checkpoint as LoRA-Null leaves it: a config whose auto_map names code, with a trap in its place."""
        code = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model", "AutoTokenizer": "trap.Tokenizer"}
        config = {"model_type": "llama", "architectures": ["CovSVDLlamaForCausalLM"], "lora_r": 2, "auto_map": code}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "trap.py").write_text(TRAP)
        return tmp_path

    def save(self, directory: Path, **config: Any) -> Any:
        """Save a tiny word tokenizer that begins every text with <s>; return it."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from tokenizers.processors import TemplateProcessing
        from tokenizers.trainers import WordLevelTrainer

        tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.train_from_iterator(CORPUS, WordLevelTrainer(special_tokens=["<unk>", "<s>"]))
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(
            json.dumps({"unk_token": "<unk>", "bos_token": "<s>"} | config)
        )
        return tokenizer

    @pytest.mark.parametrize("model_type", ["llama", "qwen2", "unheard_of"])
    @pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "TrapTokenizer"])
    def test_a_text_becomes_the_ids_of_its_tokenizer(
        self, model_type: str, tokenizer_class: str, directory: Path
    ) -> None:
        """The ids are those of tokenizer.json, its special tokens included, whatever the model and the class it names.

        AutoTokenizer would rebuild the tokenizer as the model's usual one, and cut the text differently.
        """
        config = json.loads((directory / "config.json").read_text()) | {"model_type": model_type}
        (directory / "config.json").write_text(json.dumps(config))
        expected = self.save(directory, tokenizer_class=tokenizer_class).encode("the cat flew").ids
        assert load_tokenizer(directory)("the cat flew") == expected
        assert expected[0] == 1
        assert expected[-1] == 0
        assert not (directory / "SPRUNG").exists()

    def test_a_long_text_is_no_cause_for_warning(
        self, directory: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """A text beyond the model's length is tokenized whole and without the library's remark on it."""
        self.save(directory, model_max_length=4)
        assert len(load_tokenizer(directory)("the cat " * 50)) == 101
        assert caplog.records == []
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("code", [{"AutoTokenizer": [None, "trap.Tokenizer"]}, ["trap.Tokenizer", None]])
    def test_code_beside_a_tokenizer_file_is_not_run(self, code: Any, directory: Path) -> None:
        """With a tokenizer.json the Python code that a checkpoint names is neither needed nor touched."""
        self.save(directory, auto_map=code, tokenizer_class="TrapTokenizer")
        assert load_tokenizer(directory)("the cat")[0] == 1
        assert not (directory / "SPRUNG").exists()

    def test_a_tokenizer_that_needs_code_is_refused(self, directory: Path) -> None:
        """Without a tokenizer.json such a tokenizer is refused, and the code still not run."""
        self.save(directory, auto_map={"AutoTokenizer": ["trap.Tokenizer", None]})
        (directory / "tokenizer.json").rename(directory / "vocab.json")
        assert refused(lambda: load_tokenizer(directory), CheckpointError) == (
            f"{directory / 'tokenizer_config.json'}: auto_map names Python code "
            '({"AutoTokenizer": ["trap.Tokenizer", null]}), which is never run, and no tokenizer.json lies beside it; '
            "save a fast tokenizer into the directory"
        )
        assert not (directory / "SPRUNG").exists()

    def test_older_vocabulary_files_are_read(self, directory: Path) -> None:
        """Without a tokenizer.json the class that transformers has is used, and no code of the checkpoint."""
        config = json.loads((directory / "config.json").read_text()) | {"model_type": "gpt2"}
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
        (directory / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
        (directory / "merges.txt").write_text("#version: 0.2\na b\n")
        assert load_tokenizer(directory)("abba") == [2, 1, 0]
        assert not (directory / "SPRUNG").exists()

    def test_a_missing_tokenizer_is_refused(self, directory: Path) -> None:
        """The message lists what was looked for and what to do."""
        assert refused(lambda: load_tokenizer(directory), CheckpointError) == (
            f"{directory}: no tokenizer lies in it (looked for tokenizer.json, tokenizer.model, vocab.json, vocab.txt, "
            "spiece.model, tekken.json); save the base model's tokenizer into the directory"
        )

    def test_a_broken_tokenizer_is_refused(self, directory: Path) -> None:
        """What the library says of a file that it cannot read is passed on in one line."""
        (directory / "tokenizer.json").write_text("{}")
        message = refused(lambda: load_tokenizer(directory), CheckpointError)
        assert re.fullmatch(rf"{re.escape(str(directory))}: its tokenizer cannot be loaded: .+", message)

    def test_only_the_standard_library_is_needed_to_name_a_text(self) -> None:
        """Importing the module and naming a text load none of the large libraries."""
        script = (
            "import sys; from pytest_nullspace.text.sources import parse_source; parse_source('wikitext2')\n"
            "assert not {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", script], check=True)


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=12), min_size=1, max_size=5))
def test_the_unigram_loss_predicts_each_token_from_the_others(tokens: list[list[int]]) -> None:
    """It is that of counting by hand, each token left out in turn, what is new shared evenly over the vocabulary."""
    predicted = [token for of in tokens for token in of[1:]]
    losses = []
    for place, token in enumerate(predicted):
        others = predicted[:place] + predicted[place + 1 :]
        distinct = len(set(others))
        if others:
            losses.append(-math.log((others.count(token) + distinct / 10) / (len(others) + distinct)))
    found = unigram_loss([Window(0, tuple(of)) for of in tokens], 10)
    assert found == (pytest.approx(sum(losses) / len(losses), rel=1e-9) if losses else None)
