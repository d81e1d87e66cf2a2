"""Where rows hold images: a folder of them with captions, or a table with a column of them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pytest_nullspace.errors import TextError, printable, quoted
from pytest_nullspace.text.conversations import FORMS, TOOLS, holds_images
from pytest_nullspace.text.images import SUFFIXES, Images, Picture, Row, pictures_of
from pytest_nullspace.text.pictured import pictured
from pytest_nullspace.text.sources import PLAIN
from pytest_nullspace.text.sources import SUFFIXES as READ

if TYPE_CHECKING:
    import pyarrow

IMAGE, SOUND, FILM = "image", "sound", "video"
CAPTIONS = ("text", "caption", "sentence", "question", "content")
"""Where the text of an image is looked for when no column is named, in this order."""
_NAMED = ("images", "image")
"""What a column of paths must be called to be one of images."""
_FILES = ("file_names", "file_name")
"""What ``metadata`` of a folder of images calls them."""
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What `datasets` writes into a folder that it saves."""
_SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".opus")
_HEARD = ("audio", "sound", "speech", "wav")


class Table(Protocol):
    """Texts and images in columns."""

    @property
    def columns(self) -> Mapping[str, bool]:
        """Every column, and whether it holds strings."""

    @property
    def media(self) -> Mapping[str, str]:
        """The columns that hold something else than text, and what."""

    @property
    def values(self) -> Callable[[str], Sequence[object]]:
        """The values of one, None where there is none."""

    @property
    def row(self) -> str:
        """What a row is called."""


def media_of_schema(schema: "pyarrow.Schema") -> dict[str, str]:
    """The columns of an Arrow table with images, sound or video, as `datasets` describes them, or by their form."""
    described: Any = {}
    with suppress(ValueError, KeyError, TypeError, AttributeError):  # a file of another making has no such description
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    kinds = {"Image": IMAGE, "Audio": SOUND, "Video": FILM}
    found = {}
    for field in schema:
        told = described.get(field.name) if isinstance(described, Mapping) else None
        kind = next((kinds[name] for name in _types(told) if name in kinds), None)
        if kind is None and (_is_file(field.type) or (field.name in _NAMED and _is_path(field.type))):
            kind = _by_name(field.name)
        if kind is not None:
            found[field.name] = kind
    return found


def _types(feature: Any) -> Iterator[str]:
    """What `datasets` calls a column, or what the list in it holds."""
    match feature:
        case [inner] | {"feature": inner}:
            yield from _types(inner)
        case {"_type": str(name)}:
            yield name


def _by_name(name: str) -> str:
    lower = name.lower()
    return SOUND if any(part in lower for part in _HEARD) else FILM if "video" in lower else IMAGE


def _is_file(kind: Any) -> bool:
    """Whether an Arrow type is that of files, which hold bytes, a path or both, or a list of them."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _is_file(kind.value_type)
    if types.is_struct(kind):
        return {field.name for field in kind} == {"bytes", "path"}
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_path(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _is_path(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind))


def media_of_columns(columns: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """The columns of a table of JSON or CSV that hold images or sound, by their names and what stands in them."""
    found = {}
    for name, values in columns.items():
        first = next((item for value in values for item in _items(value)), None)
        is_file = isinstance(first, str) or (isinstance(first, Mapping) and bool(first.keys() & {"path", "bytes"}))
        if name in _NAMED and is_file:
            found[name] = IMAGE
        elif name.lower() in _HEARD and is_file and (not isinstance(first, str) or first.lower().endswith(_SOUNDS)):
            found[name] = SOUND
    return found


def _items(value: Any) -> list[Any]:
    return [item for item in value if item is not None] if isinstance(value, list) else [] if value is None else [value]


Talking = Callable[[Table, str | None, Sequence[str]], Sequence[str]]
"""The columns of a table that hold conversations and are to be taken, if its column of that name is asked for, or of
none the first of those that hold text."""


def from_table(table: Table, source: str, column: str | None, folder: Path | None, talking: Talking) -> Images | None:
    """The rows of ``table`` with their images; None where it is to be read as text.

    Args:
        table: The table.
        source: What it was read from, in words.
        column: The column that was asked for: of a text, which is then read alone, of images, which then have no text,
            or both as ``images+text``; None for what there is.
        folder: In which paths of images lie; None where none can.
        talking: Which columns hold conversations.

    Raises:
        TextError: It holds sound or video, or it cannot be told which column is meant.
    """
    if column is None:
        for name, kind in table.media.items():
            if kind != IMAGE:
                raise TextError(_unread(name, kind, source))
        talk = talking(table, None, CAPTIONS if table.media else ())
        if not table.media:
            return _conversing(table, source, talk, None, folder) if _shows(table, talk) else None
        held = _only(table.media, source)
        if talk:
            return _conversing(table, source, talk, held, folder)
        return _rows(table, source, held, _caption(table, held, source), folder)
    held, plus, text = (column, "", "") if column in table.columns else column.partition("+")
    if talk := talking(table, text or held, ()):
        if not plus and not _shows(table, talk):
            return None
        named = [name for name, kind in table.media.items() if kind == IMAGE]
        beside = held if plus else _only(dict.fromkeys(named, IMAGE), source) if named else None
        return _conversing(table, source, talk, beside, folder)
    kind = table.media.get(held, "" if not plus else IMAGE)
    if not kind or (plus and not {held, text} <= table.columns.keys()):
        return None  # a text, or a column that is not there, whose message lists those that are
    if kind != IMAGE:
        raise TextError(_unread(held, kind, source))
    return _rows(table, source, held, text or None, folder)


def _shows(table: Table, talk: Sequence[str]) -> bool:
    """Whether messages hold images."""
    return any(holds_images(table.values(name)) for name in talk)


def _conversing(table: Table, source: str, talk: Sequence[str], beside: str | None, folder: Path | None) -> Images:
    wanted = (*talk, *((TOOLS,) if TOOLS in table.columns else ()), *((beside,) if beside else ()))
    return pictured({name: table.values(name) for name in wanted}, talk, table.row, source, beside, folder)


def _unread(name: str, kind: str, source: str) -> str:
    return (
        f"{source}: column {quoted(name)} holds {kind}, which is not measured; name the column of the text to read "
        "that alone"
    )


def _only(media: Mapping[str, str], source: str) -> str:
    named = [name for name in _NAMED if name in media]
    if len(media) > 1 and not named:
        raise TextError(
            f"{source}: holds images in {', '.join(map(printable, media))}; say which, and of which text, as in "
            "FILE:image+caption"
        )
    return (named or list(media))[0]


def _caption(table: Table, held: str, source: str) -> str | None:
    """The column of the text of images; None where there is none."""
    strings = [name for name, is_text in table.columns.items() if is_text and name not in (held, *_FILES)]
    for name in CAPTIONS:
        if name in strings:
            return name
    if (talk := next((form[0] for form in FORMS if form[0] in table.columns and len(form) == 1), None)) is not None:
        raise TextError(
            f"{source}: holds images beside conversations in {quoted(talk)}, which --nullspace-chat=off does not read; "
            f"leave that out, or name a column of plain text, as in FILE:{printable(held)}+caption"
        )
    if len(strings) > 1:
        raise TextError(
            f"{source}: say which column holds the text of the images, as in FILE:{printable(held)}+caption; its "
            f"columns: {', '.join(map(printable, table.columns))}"
        )
    return strings[0] if strings else None


def _rows(table: Table, source: str, held: str, caption: str | None, folder: Path | None) -> Images:
    cells = table.values(held)
    texts: Sequence[object] = [None] * len(cells) if caption is None else table.values(caption)
    rows = []
    for number, (cell, text) in enumerate(zip(cells, texts, strict=True), 1):
        where = f"{source}: {table.row} {number}"
        if not isinstance(text, str | None):
            raise TextError(f"{where} of column {quoted(caption)} holds {type(text).__name__}, not a string")
        row = Row(text or "", pictures_of(cell, folder, where), where)
        if row.text.strip() or row.pictures:
            rows.append(row)
    return _held(source, rows)


def _held(source: str, rows: Sequence[Row]) -> Images:
    if not any(row.pictures for row in rows):
        raise TextError(f"{source}: holds no image")
    return Images(source, tuple(rows))


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a folder."""
    return any((folder / name).is_file() for name in _SAVED)


def plain_texts(folder: Path) -> list[Path]:
    """The files of text in a folder and below, by their paths; none where `datasets` saved it or it holds none.

    Raises:
        TextError: A file of rows lies beside them, of which it cannot be told whether it is part of the text.
    """
    if is_saved(folder):
        return []
    seen = [file for file in folder.rglob("*") if not any(p.startswith(".") for p in file.relative_to(folder).parts)]
    found = sorted(file for file in seen if file.suffix.lower() in PLAIN and file.is_file())
    rows = sorted(file for file in seen if file.suffix.lower() in {*READ} - {*PLAIN})
    if found and rows:
        other, text = (printable(files[0].relative_to(folder)) for files in (rows, found))
        raise TextError(
            f"{folder}: holds {other} beside {text}; give that file, or a folder of {' and '.join(PLAIN)} files alone"
        )
    return found


def is_gallery(folder: Path) -> bool:
    """Whether a folder is one of images, or of sound, and none that `datasets` saved."""
    if is_saved(folder):
        return False
    return any(name.suffix.lower() in (*SUFFIXES, *_SOUNDS) for name in folder.rglob("*"))


def from_folder(folder: Path, column: str | None, read: Callable[[Path], Table], talking: Talking) -> Images:
    """The images of a folder, with the text that its ``metadata``, or a ``.txt`` of its name beside each, gives them.

    Args:
        folder: The folder.
        column: The column of the text in ``metadata``; None for the default.
        read: Reads such a file.
        talking: Which columns hold conversations.

    Raises:
        TextError: It holds no image, or its metadata cannot be read.
    """
    source = str(folder)
    for name in _METADATA:
        if (file := folder / name).is_file():
            table = read(file)
            held = next((held for held in _FILES if held in table.columns), None)
            if held is None:
                raise TextError(f"{file}: has no column file_name, which says of which image a row tells")
            if column is not None and column not in table.columns:
                present = ", ".join(map(printable, table.columns))
                raise TextError(f"{file}: has no column {column!r}; its columns: {present}")
            if talk := talking(table, column, CAPTIONS):
                return _conversing(table, str(file), talk, held, folder)
            return _rows(table, str(file), held, column or _caption(table, held, str(file)), folder)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files and is_gallery(folder):
        raise TextError(f"{source}: holds {SOUND}, which is not measured; give text or images")
    rows = []
    for file in files:
        where = str(file)
        rows.append(Row(_beside(file), (Picture(file, where),), where))
    return _held(source, rows)


def _beside(file: Path) -> str:
    """The text in the ``.txt`` of the image's name; empty where there is none."""
    text = file.with_suffix(".txt")
    if not text.is_file():
        return ""
    try:
        return text.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{text}: not UTF-8 text that can be read: {error}; save it as UTF-8") from None
