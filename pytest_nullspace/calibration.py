"""Named sets, hub datasets and local files, read as one text and cut into token windows.

    spec ──parse_source──▶ Source ──read_text──▶ text ──draw_windows──▶ Windows
                                                  load_tokenizer ──▲

Local files are read where they lie and nothing is cached; a hub dataset is cached where `datasets` keeps its own.
No code that lies in a checkpoint or a dataset is ever run.
"""

import csv
import hashlib
import io
import json
import random
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint import gguf
from pytest_nullspace.checkpoint.header import opened, printable, read_json_object
from pytest_nullspace.errors import CheckpointError, TextError

if TYPE_CHECKING:
    import pyarrow

Tokenize = Callable[[str], Sequence[int]]
"""A text's token ids, special tokens included."""

OPTION, TASK_OPTION = "--nullspace-calib-dataset", "--nullspace-task-dataset"
DEFAULT_COLUMNS = ("text", "sentence", "question", "content")
"""Where a text is looked for when no column is named, in this order."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""A directory with none of these holds no tokenizer."""

MAX_TOKENIZER_BYTES = 200_000_000
"""Ten times the largest vocabulary that models have."""

CONTEXT = 64
"""Tokens that no text repeats by chance, or so seldom that it does not count."""

_MAX_CSV_FIELD = 2**31 - 1
_HUB_SPEC = re.compile(
    r"hub:(?P<repo>\w[\w.-]*/\w[\w.-]*)"
    r"(?::(?P<config>[^:]*)(?::(?P<split>[^:\[]*(?:\[[^\]]*\])?)(?::(?P<column>.+))?)?)?"
)


@dataclass(frozen=True)
class FileText:
    """A local file.

    Attributes:
        path: The file; its suffix says how it is read.
        column: The column that holds the text; None for the default.
    """

    path: Path
    column: str | None = None

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class FolderText:
    """A folder that ``save_to_disk`` of `datasets` wrote.

    Attributes:
        path: The folder.
        split: The split; None for ``train``, or for all of a set that has no splits.
        column: The column that holds the text; None for the default.
    """

    path: Path
    split: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubText:
    """A dataset of the Hugging Face hub.

    Attributes:
        repo: Its ``owner/name``.
        config: Its configuration; None for the default.
        split: The split, which `datasets` allows to be a slice such as ``train[:1000]``.
        column: The column that holds the text; None for the default.
        file: The one file of the repository to read; None for all that the configuration has.
        revision: The branch; None for the main one.
    """

    repo: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"hub dataset {self.repo} ({', '.join(filter(None, (self.config, self.split)))})"


Source = FileText | FolderText | HubText

NAMED_SETS: Mapping[str, HubText] = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", column="text"),
    "c4": HubText("allenai/c4", column="text", file="en/c4-train.00000-of-01024.json.gz"),
    # The main branch holds a loading script, which datasets no longer runs; the hub's own conversion is plain data.
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        column="sentence",
        file="penn_treebank/train/0000.parquet",
        revision="refs/convert/parquet",
    ),
    # The questions of `rc`, in its order, without the gigabytes of web pages.
    "triviaqa": HubText("mandarjoshi/trivia_qa", "rc.nocontext", column="question"),
    "nqopen": HubText("google-research-datasets/nq_open", "nq_open", column="question"),
}
"""The calibration sets of the reference under their present hub names, train split."""


@dataclass(frozen=True, slots=True)
class Window:
    """One calibration sequence.

    Attributes:
        start: The character of the text at which it begins.
        tokens: Its token ids.
    """

    start: int
    tokens: tuple[int, ...]


def parse_source(spec: str, folder: Path = Path(), option: str = OPTION) -> Source:
    """What ``spec`` describes; nothing is read, only looked whether a path exists.

    A named set wins over a file or folder of its name, which must be written ``./name``.

    Args:
        spec: A named set, ``FILE[:column]``, ``DIR[:split[:column]]`` or ``hub:owner/name[:config[:split[:column]]]``;
            a part left empty is the default one.
        folder: The folder to which a path is relative.
        option: Where it was given, for messages.

    Raises:
        TextError: It is none of these.
    """
    if spec in NAMED_SETS:
        return NAMED_SETS[spec]
    if spec.startswith("hub:"):
        return _parse_hub(spec, option)
    path, selectors = _split_path(spec, folder, option)
    if path.is_dir():
        split, column = (*selectors, "", "")[:2]
        return FolderText(path, split or None, column or None)
    if path.suffix.lower() not in _READERS:
        raise _refusal(option, spec, f"{path} has none of the suffixes that can be read")
    if len(selectors) > 1:
        raise _refusal(option, spec, f"{path} is a file, which has no splits")
    return FileText(path, "".join(selectors) or None)


def _parse_hub(spec: str, option: str) -> HubText:
    match = _HUB_SPEC.fullmatch(spec)
    if not match:
        raise _refusal(option, spec, "not of the form hub:owner/name[:config[:split[:column]]]")
    return HubText(match["repo"], match["config"] or None, match["split"] or "train", match["column"])


def _split_path(spec: str, folder: Path, option: str) -> tuple[Path, list[str]]:
    """The longest part of ``spec`` before a colon that exists, and what follows it: two selectors at most."""
    cuts = [spec.rsplit(":", colons) for colons in range(min(spec.count(":"), 2) + 1)]
    candidates = [(folder / _at_home(name), selectors) for name, *selectors in cuts]
    for path, selectors in candidates:
        if _exists(path):
            return path, selectors
    looked_for = " and ".join(str(path.absolute()) for path, _ in candidates)
    raise _refusal(option, spec, f"no such file or folder (looked for {looked_for})")


def _at_home(name: str) -> Path:
    """The path ``name``, a leading ``~`` replaced where it stands for someone's home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name too long for the file system
        return False


def _refusal(option: str, spec: str, reason: str) -> TextError:
    return TextError(
        f"{option}={printable(spec)}: {reason}. It takes {', '.join(NAMED_SETS)}, a file ({' '.join(_READERS)}; "
        "FILE:column), a folder saved by datasets (DIR:split:column), or hub:owner/name[:config[:split[:column]]]."
    )


def read_text(source: Source) -> str:
    """All texts of ``source``, joined by a blank line.

    Raises:
        TextError: It cannot be read, has no such column, or holds no text.
    """
    match source:
        case FileText():
            table = _READERS[source.path.suffix.lower()](source.path)
        case FolderText():
            table = _read_folder(source)
        case HubText():
            table = _read_hub(source)
    text = "\n\n".join(_texts(table, _column(table, source), source))
    if not text.strip():
        raise TextError(f"{source}: holds no text")
    if surrogate := re.search("[\ud800-\udfff]", text):
        raise TextError(
            f"{source}: character {surrogate.start()} of its text is half a surrogate pair, which cannot be encoded; "
            "remove or mend it"
        )
    return text


@dataclass(frozen=True)
class _Table:
    """Texts in columns, read only when asked for.

    Attributes:
        columns: Every column, and whether it holds strings.
        values: The values of one, None where there is none.
        row: What a row is called.
    """

    columns: Mapping[str, bool]
    values: Callable[[str], Sequence[object]]
    row: str = "row"


def _column(table: _Table, source: Source) -> str:
    """The column of ``table`` that ``source`` asks for, or the one that is taken unasked."""
    present = ", ".join(map(printable, table.columns)) or "none"
    if source.column is not None:
        if source.column not in table.columns:
            raise TextError(f"{source}: has no column {source.column!r}; its columns: {present}")
        return source.column
    if not table.columns:
        raise TextError(f"{source}: holds no text")
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
    return _Table({name: found == {str} for name, found in kinds.items()}, columns.__getitem__, row)


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
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None


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


def _read_jsonl(path: Path) -> _Table:
    lines = _decoded(path).split("\n")
    rows = [_parsed(line, path, number) if line.strip() else None for number, line in enumerate(lines, 1)]
    return _from_rows(rows, path, "line")


def _read_json(path: Path) -> _Table:
    match _parsed(_decoded(path) or "null", path):
        case None:
            return _from_columns({})
        case list(rows):
            return _from_rows(rows, path)
        case dict(columns) if all(isinstance(values, list) for values in columns.values()):
            return _from_columns(columns)
        case _:
            raise TextError(f"{path}: takes a list of objects or strings, or an object whose values are lists")


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

    return _Table(_string_columns(file.schema_arrow), values)


@contextmanager
def _reading_arrow(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise TextError(f"{path}: not a parquet file that can be read: {_first_line(error)}") from error


def _string_columns(schema: "pyarrow.Schema") -> dict[str, bool]:
    from pyarrow import types

    return {field.name: types.is_string(field.type) or types.is_large_string(field.type) for field in schema}


def _read_folder(source: FolderText) -> _Table:
    import datasets

    try:
        saved = datasets.load_from_disk(str(source.path))
    except Exception as error:
        reason = _first_line(error)
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
        return _from_dataset(
            datasets.load_dataset(source.repo, source.config, split=source.split, revision=source.revision, **one_file)
        )
    except Exception as error:  # no network, offline, gated, no such name: datasets has an exception for each
        reason = _first_line(error)
        raise TextError(
            f"{source}: cannot be loaded: {reason}. Mend that, or give a local file: {OPTION}=FILE.txt"
        ) from error


def _from_dataset(dataset: Any) -> _Table:
    plain = dataset.with_format(None)
    return _Table(_string_columns(plain.features.arrow_schema), lambda name: plain[name][:])


def _first_line(error: Exception) -> str:
    """What an exception of another library says, short enough to stand within a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0].rstrip(".: "), limit=300)


_READERS: Mapping[str, Callable[[Path], _Table]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def draw_windows(text: str, tokenize: Tokenize, *, count: int, seqlen: int, seed: int) -> tuple[Window, ...]:
    """``count`` windows of at most ``seqlen`` tokens, drawn as the reference draws them.

    Each begins at a uniformly random character and holds the first tokens of the ``10 * seqlen`` characters from there;
    nothing is padded.

    Raises:
        TextError: The text is too short for one window, or one comes out without tokens.
    """
    last = len(text) - seqlen - 1
    if last < 0:
        raise TextError(
            f"the text has {len(text)} characters, and windows of {seqlen} tokens need at least "
            f"{seqlen + 1}; give a longer text or a smaller --nullspace-seqlen"
        )
    chosen = random.Random(seed)
    return tuple(_window(text, tokenize, chosen.randint(0, last), seqlen) for _ in range(count))


def _window(text: str, tokenize: Tokenize, start: int, seqlen: int) -> Window:
    tokens = tuple(tokenize(text[start : start + 10 * seqlen])[:seqlen])
    if not tokens:
        raise TextError(
            f"the window at character {start} of the text has no tokens; "
            "give a text without long blanks, or check the tokenizer"
        )
    return Window(start, tokens)


def distinct_rows(windows: Sequence[Window]) -> int:
    """How many tokens come for the first time with the `CONTEXT` tokens up to them, or all that their window has.

    Windows that overlap, and a text that repeats itself, give rows that are almost the same again.
    """
    seen: set[int] = set()
    for window in windows:
        data = array("q", window.tokens).tobytes()
        ends = range(8, len(data) + 1, 8)
        seen.update(hash(data[max(0, end - 8 * CONTEXT) : end]) for end in ends)
    return len(seen)


def load_tokenizer(directory: Path) -> Callable[[str], list[int]]:
    """The tokenizer that lies in ``directory``, as a function from a text to its ids with the default special tokens.

    ``directory`` may also be a GGUF file, which holds its own.

    A ``tokenizer.json`` is read as it stands and alone: AutoTokenizer might rebuild it as the model's usual one, and
    would open the configuration and the chat templates beside it. Without it the older vocabulary files are read by the
    class that `transformers` has for them. Code beside them is never run, and the hub is never asked.

    Raises:
        CheckpointError: There is no tokenizer, it needs code of its own, or it cannot be loaded.
    """
    if directory.suffix == gguf.SUFFIX:
        gguf.read_header(directory)
    else:
        _require_tokenizer(directory)
    try:
        return _fast(directory) if (directory / "tokenizer.json").is_file() else _slow(directory)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{directory}: its tokenizer cannot be loaded: {_first_line(error)}; save the base model's tokenizer into "
            "the directory"
        ) from error


def _fast(directory: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    with opened(directory / "tokenizer.json", "the tokenizer") as (stream, status):
        if (size := status.st_size) > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"{directory / 'tokenizer.json'}: has {size:,} bytes; at most {MAX_TOKENIZER_BYTES:,} are read; "
                "save the base model's tokenizer into the directory"
            )
        data = stream.read()
    tokenizer = Tokenizer.from_buffer(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return tokenize


def _slow(directory: Path) -> Callable[[str], list[int]]:
    from transformers import AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(directory)}
    if directory.suffix == gguf.SUFFIX:
        place = {"pretrained_model_name_or_path": str(directory.parent), "gguf_file": str(directory.absolute())}
    tokenizer = AutoTokenizer.from_pretrained(**place, local_files_only=True, trust_remote_code=False)

    def tokenize(text: str) -> list[int]:
        # Quiet, because a text longer than the model's context is cut to a window afterwards.
        ids: list[int] = tokenizer(text, verbose=False).input_ids
        return ids

    return tokenize


def _require_tokenizer(directory: Path) -> None:
    """Refuse a directory without a tokenizer, or with one that only its own code can build."""
    present = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    config = directory / "tokenizer_config.json"
    if "tokenizer.json" in present:
        return
    if config.is_file() and (code := read_json_object(config, "the tokenizer's configuration").get("auto_map")):
        raise CheckpointError(
            f"{config}: auto_map names Python code ({printable(json.dumps(code))}), which is never run, and no "
            "tokenizer.json lies beside it; save a fast tokenizer into the directory"
        )
    if not present:
        raise CheckpointError(
            f"{directory}: no tokenizer lies in it (looked for {', '.join(TOKENIZER_FILES)}); "
            "save the base model's tokenizer into the directory"
        )


def text_hash(text: str) -> str:
    """The SHA-256 of ``text`` as UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
