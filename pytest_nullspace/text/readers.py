"""A source read as one text. Local files are read where they lie, nothing is cached; `datasets` caches its own."""

import csv
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint.files import POINTER
from pytest_nullspace.errors import TextError, first_line, printable
from pytest_nullspace.text import gallery
from pytest_nullspace.text.conversations import AUTO, FORMS, OFF, TOOLS, Conversations, conversations
from pytest_nullspace.text.images import Images
from pytest_nullspace.text.sources import OPTION, PLAIN, FileText, FolderText, HubText, Source

if TYPE_CHECKING:
    import pyarrow

DEFAULT_COLUMNS = ("text", "sentence", "question", "content")
"""Where a text is looked for when no column is named, in this order."""
_MAX_CSV_FIELD = 2**31 - 1
_MOST_NUL = 1 / 8
"""The share of NUL characters above which a file is no text in UTF-8."""

Text = str | Conversations | Images
"""What a source holds: text, conversations, or rows of images and text."""


def read(source: Source, chat: str) -> Text:
    """All texts of ``source``, joined by a blank line, or its conversations, or its rows where they hold images.

    Args:
        source: Where they are.
        chat: One of `pytest_nullspace.text.conversations.MODES`.

    Raises:
        TextError: It cannot be read, has no such column, or holds no text.
    """
    folder, talking = None, partial(_conversing, chat=chat)
    match source:
        case FileText():
            table, folder = _read_file(source.path), source.path.parent
        case FolderText():
            part = source.path / source.split if source.split else source.path
            if part.is_dir() and gallery.is_gallery(part):
                return gallery.from_folder(part, source.column, _read_file, talking)
            plain = gallery.plain_texts(part) if part.is_dir() else ()
            table = _read_plain(plain) if plain else _read_folder(source)
        case HubText():
            table = _read_hub(source)
    if (images := gallery.from_table(table, str(source), source.column, folder, talking)) is not None:
        return images
    if held := talking(table, source.column, ()):
        values = {name: table.values(name) for name in (*held, TOOLS) if name in table.columns}
        return conversations(values, held, table.row, source)
    text = "\n\n".join(_texts(table, _column(table, source), source))
    if not text.strip():
        raise TextError(f"{source}: holds no text; give one of some 100,000 characters")
    if surrogate := re.search("[\ud800-\udfff]", text):
        raise TextError(
            f"{source}: character {surrogate.start()} of its text is half a surrogate pair, which cannot be encoded; "
            "remove or mend it"
        )
    return text


def _require_whole(path: Path) -> None:
    """Refuse what a clone without Git LFS holds in place of the file."""
    if path.is_file() and path.stat().st_size < 1024:
        with suppress(OSError), path.open("rb") as stream:  # what cannot be read, its reader tells
            if stream.read(len(POINTER)) == POINTER:
                raise TextError(f"{path}: only a Git LFS pointer to the text; run git lfs pull in that repository")


@dataclass(frozen=True)
class _Table:
    """Texts in columns, read only when asked for.

    Attributes:
        columns: Every column, and whether it holds strings.
        values: The values of one, None where there is none.
        row: What a row is called.
        media: The columns that hold something else than text, and what.
    """

    columns: Mapping[str, bool]
    values: Callable[[str], Sequence[object]]
    row: str = "row"
    media: Mapping[str, str] = field(default_factory=dict)


def _conversing(table: gallery.Table, column: str | None, texts: Sequence[str], *, chat: str) -> Sequence[str]:
    """The columns of ``table`` that hold conversations and are to be taken; none where a text is.

    Args:
        table: The table.
        column: The one that was asked for; None for what there is.
        texts: Those of which a text is taken in their place.
        chat: One of `pytest_nullspace.text.conversations.MODES`.
    """
    if chat == OFF:
        return ()
    if column is not None:
        if column not in table.columns or table.columns[column]:
            return ()
        held = next((value for value in table.values(column) if value is not None), None)
        return (column,) if isinstance(held, list) else ()
    if chat == AUTO and any(name in table.columns for name in (*DEFAULT_COLUMNS, *texts)):
        return ()
    return next((form for form in FORMS if all(name in table.columns for name in form)), ())


def _column(table: _Table, source: Source) -> str:
    """The column of ``table`` that ``source`` asks for, or the one that is taken unasked."""
    present = ", ".join(map(printable, table.columns)) or "none"
    if source.column is not None:
        if source.column not in table.columns:
            raise TextError(f"{source}: has no column {source.column!r}; its columns: {present}")
        return source.column
    if not table.columns:
        raise TextError(f"{source}: holds no text; give one of some 100,000 characters")
    for name in DEFAULT_COLUMNS:
        if name in table.columns:
            return name
    strings = [name for name, is_text in table.columns.items() if is_text]
    if len(strings) != 1:
        raise TextError(f"{source}: say which column holds the text, as in {_naming(source)}; its columns: {present}")
    return strings[0]


def _naming(source: Source) -> str:
    """How a column of ``source`` is named in the option."""
    match source:
        case FileText():
            return f"{source.path.name}:column"
        case FolderText():
            return f"{source.path.name}:{source.split or ''}:column"
        case HubText():
            return f"hub:{source.repo}:{source.config or ''}:{source.split}:column"


def _texts(table: _Table, column: str, source: Source) -> Iterator[str]:
    for number, value in enumerate(table.values(column), 1):
        if isinstance(value, str):
            yield value
        elif value is not None:
            kind = type(value).__name__
            raise TextError(f"{source}: {table.row} {number} of column {column!r} holds {kind}, not a string")


def _from_columns(columns: Mapping[str, list[Any]], row: str = "row") -> _Table:
    kinds = {name: {type(value) for value in values if value is not None} for name, values in columns.items()}
    strings = {name: found == {str} for name, found in kinds.items()}
    return _Table(strings, columns.__getitem__, row, gallery.media_of_columns(columns))


def _from_rows(rows: list[Any], path: Path, row: str = "row") -> _Table:
    """The table of JSON objects; a string stands for an object with that ``text``, null for one without anything."""
    for number, value in enumerate(rows, 1):
        if not isinstance(value, dict | str | None):
            raise TextError(f"{path}: {row} {number} holds {type(value).__name__}, neither an object nor a string")
    records = [{"text": value} if isinstance(value, str) else value or {} for value in rows]
    names = dict.fromkeys(name for record in records for name in record)
    return _from_columns({name: [record.get(name) for record in records] for name in names}, row)


def _decoded(path: Path) -> str:
    """The file's text with a byte order mark taken off.

    Raises:
        TextError: It cannot be read or is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None
    if (empty := text.count("\0")) > len(text) * _MOST_NUL:  # UTF-16 of ASCII is also UTF-8
        raise TextError(
            f"{path}: {empty:,} of its {len(text):,} characters are NUL, as where UTF-16 is read as UTF-8; save it as "
            "UTF-8"
        )
    return text


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """The JSON value of ``text``, which begins on that line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise TextError(f"{path}: {where}: not JSON ({error.msg}); mend or remove it") from None
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise TextError(f"{path}: line {line}: not JSON that can be read ({error}); mend or remove it") from None


def _read_txt(path: Path) -> _Table:
    # Ends of lines as a checkout on any system would have them, so that the windows are the same everywhere.
    return _from_columns({"text": [_decoded(path).replace("\r\n", "\n")]})


def _read_plain(files: Sequence[Path]) -> _Table:
    """The files of a folder as the rows of one column."""
    return _from_columns({"text": [text for file in files for text in _read_file(file).values("text")]}, "file")


def _read_json(path: Path) -> _Table:
    """Lines of JSON or one value, as the content says where a program wrote one under the suffix of the other."""
    text = _decoded(path)
    first, _, rest = text.strip().partition("\n")
    if (path.suffix.lower() == ".jsonl" and not first.startswith("[")) or (rest and _is_json(first)):
        lines = enumerate(text.split("\n"), 1)
        return _from_rows(
            [_parsed(line, path, number) if line.strip() else None for number, line in lines], path, "line"
        )
    match _parsed(text or "null", path):
        case None:
            return _from_columns({})
        case list(rows):
            return _from_rows(rows, path)
        case dict(columns) if all(isinstance(values, list) for values in columns.values()):
            return _from_columns(columns)
        case _:
            raise TextError(f"{path}: takes a list of objects or strings, or an object whose values are lists")


def _is_json(line: str) -> bool:
    with suppress(ValueError, RecursionError):
        json.loads(line)
        return True
    return False


def _read_csv(path: Path) -> _Table:
    header, *rows = _csv_rows(path) or [[]]
    if len(set(header)) < len(header):
        raise TextError(f"{path}: its header names a column twice: {', '.join(map(printable, header))}")
    return _from_columns({name: [row[index] for row in rows] for index, name in enumerate(header)})


def _csv_rows(path: Path) -> list[list[str]]:
    """The rows that are not blank, each as long as the first."""
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    rows: list[list[str]] = []
    limit = csv.field_size_limit(_MAX_CSV_FIELD)  # the default would stop at a document of 128 KiB
    try:
        for row in filter(None, reader):
            rows.append(row)
            if len(row) != len(rows[0]):
                fields = f"{len(row)} fields where the header has {len(rows[0])}"
                raise TextError(f"{path}: line {reader.line_num} has {fields}")
    except csv.Error as error:
        raise TextError(f"{path}: line {reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_parquet(path: Path) -> _Table:
    from pyarrow.parquet import ParquetFile

    with _reading_arrow(path):
        file = ParquetFile(path)

    def values(name: str) -> Sequence[object]:
        with _reading_arrow(path):
            column: list[object] = file.read(columns=[name]).column(name).to_pylist()
        return column

    return _Table(_string_columns(file.schema_arrow), values, media=gallery.media_of_schema(file.schema_arrow))


@contextmanager
def _reading_arrow(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise TextError(f"{path}: not a parquet file that can be read: {first_line(error)}") from error


def _string_columns(schema: "pyarrow.Schema") -> dict[str, bool]:
    from pyarrow import types

    return {field.name: types.is_string(field.type) or types.is_large_string(field.type) for field in schema}


def _read_folder(source: FolderText) -> _Table:
    import datasets

    if not gallery.is_saved(source.path):
        raise TextError(
            f"{source}: not a folder that save_to_disk of datasets wrote, and without {' and '.join(PLAIN)} files or "
            "images in it; give a folder of one of these, or a file"
        )
    try:
        with _without_bars():
            saved = datasets.load_from_disk(str(source.path))
    except Exception as error:
        reason = first_line(error)
        raise TextError(f"{source}: not a folder that save_to_disk of datasets wrote: {reason}") from error
    if isinstance(saved, datasets.DatasetDict):
        split = source.split or "train"
        if split not in saved:
            raise TextError(f"{source}: has no split {split!r}; its splits: {', '.join(map(str, saved))}")
        saved = saved[split]
    elif source.split not in (None, str(saved.split)):
        raise TextError(f"{source}: has no splits; leave {source.split!r} out, as in {source.path.name}::column")
    return _from_dataset(saved)


def _read_hub(source: HubText) -> _Table:
    import datasets

    # A single file is less than what the dataset's card counts, so there is nothing to hold it against.
    one_file: dict[str, Any] = (
        {"data_files": {source.split: source.file}, "verification_mode": "no_checks"} if source.file else {}
    )
    try:
        with _without_bars():
            found = datasets.load_dataset(
                source.repo, source.config, split=source.split, revision=source.revision, **one_file
            )
        return _from_dataset(found)
    except Exception as error:  # no network, offline, gated, no such name: datasets has an exception for each
        reason = first_line(error)
        raise TextError(
            f"{source}: cannot be loaded: {reason}. Mend that, or give a local file: {OPTION}=FILE.txt"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of `datasets`, and what the hub's client tells of each attempt to reach it.

    They would land in the output of a user's test; that it could not be reached is told once, by the error.
    """
    import datasets

    shown, client = not datasets.are_progress_bars_disabled(), logging.getLogger("huggingface_hub")
    level = client.level
    with warnings.catch_warnings(action="ignore"):  # where an environment variable has the last word
        datasets.disable_progress_bars()
    client.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        client.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def _from_dataset(dataset: Any) -> _Table:
    plain = dataset.with_format(None)
    for name, feature in plain.features.items():
        if (closed := _closed(feature)) != feature:  # images, whose bytes are opened here, within bounds
            plain = plain.cast_column(name, closed)
    schema = plain.features.arrow_schema
    return _Table(_string_columns(schema), lambda name: plain[name][:], media=gallery.media_of_schema(schema))


def _closed(feature: Any) -> Any:
    """The same type of a column with every image in it as its bytes or path."""
    import datasets

    match feature:
        case datasets.Image():
            return datasets.Image(decode=False)
        case dict():
            return {name: _closed(inner) for name, inner in feature.items()}
        case list():
            return [_closed(inner) for inner in feature]
        case datasets.List():
            return datasets.List(_closed(feature.feature), length=feature.length)
        case datasets.LargeList():
            return datasets.LargeList(_closed(feature.feature))
    return feature


def _read_file(path: Path) -> _Table:
    _require_whole(path)
    return _READERS[path.suffix.lower()](path)


_READERS: Mapping[str, Callable[[Path], _Table]] = {
    **dict.fromkeys(PLAIN, _read_txt),
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
