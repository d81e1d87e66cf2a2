"""The tokenizer that lies beside a model, read as data: code beside it is never run, and the hub is never asked."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint import gguf
from pytest_nullspace.checkpoint.header import opened, printable, read_json_object
from pytest_nullspace.errors import CheckpointError, first_line

FILE = "tokenizer.json"
TOKENIZER_FILES = (FILE, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""A directory with none of these holds no tokenizer."""

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
"""What says of a tokenizer which its special tokens are."""
_BESIDE = ("merges.txt", CONFIG, SPECIAL, "added_tokens.json")
"""What is read with older vocabulary files."""
MAX_TOKENIZER_BYTES = 200_000_000
"""Ten times the largest vocabulary that models have."""


Spans = list[tuple[int, int]]
"""Of each token the characters of the text from which it comes, the first and the one after the last."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer, called with a text for its ids with the default special tokens.

    Attributes:
        encode: The ids of a text.
        decode: The text of ids, special tokens left out.
        spans: Of each id of a text the characters that it stands for; None where the tokenizer does not tell.
        bare: The ids of a text that brings its own special tokens, and the characters of each likewise.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    spans: Callable[[str], Spans | None]
    bare: Callable[[str], tuple[list[int], Spans | None]]

    def __call__(self, text: str) -> list[int]:
        """The ids of ``text``."""
        return self.encode(text)


def load_tokenizer(directory: Path) -> LoadedTokenizer:
    """The tokenizer that lies in ``directory``.

    ``directory`` may also be a GGUF file, which holds its own.

    A ``tokenizer.json`` is read as it stands and alone: AutoTokenizer might rebuild it as the model's usual one, and
    would open the configuration and the chat templates beside it. Without it the older vocabulary files are read by the
    class that `transformers` has for them. Code beside them is never run, and the hub is never asked.

    Raises:
        CheckpointError: There is no tokenizer, it needs code of its own, or it cannot be loaded.
    """
    require_tokenizer(directory)
    try:
        return _fast(directory) if (directory / "tokenizer.json").is_file() else _slow(directory)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{directory}: its tokenizer cannot be loaded: {first_line(error)}; save the base model's tokenizer into "
            "the directory"
        ) from error


def backend(directory: Path) -> Any:
    """The tokenizer in ``directory`` as the object of transformers that a model's processor wants.

    Built of ``tokenizer.json`` and the names of the special tokens, where there is one, of nothing else.

    Raises:
        CheckpointError: There is no tokenizer, or it needs code of its own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    require_tokenizer(directory)
    if not (directory / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    told = configuration(directory / CONFIG)
    special = told.get("extra_special_tokens")
    named = {**told, **(special if isinstance(special, dict) else {})}
    tokens = {name: token for name, value in named.items() if name.endswith("_token") and (token := content(value))}
    return PreTrainedTokenizerFast(tokenizer_object=_whole(directory), **tokens)


def configuration(file: Path) -> Mapping[str, Any]:
    """What ``file`` beside a tokenizer says of it; nothing where there is none."""
    return read_json_object(file, "the tokenizer's configuration") if file.is_file() else {}


def content(told: object) -> str | None:
    """A special token's text, which a configuration may hold with how it is split off."""
    text = told.get("content") if isinstance(told, Mapping) else told
    return text if isinstance(text, str) else None


def tokenizer_hashes(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file that `load_tokenizer` reads in ``directory``, by name; of a GGUF file none.

    Raises:
        CheckpointError: One cannot be read.
    """
    names = ("tokenizer.json",) if (directory / "tokenizer.json").is_file() else (*TOKENIZER_FILES, *_BESIDE)
    hashes = {}
    for name in names:
        if (directory / name).is_file():
            with opened(directory / name, "the tokenizer") as (stream, _):
                hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def tokenizer_sha256(directory: Path) -> str | None:
    """The digest of what decides which ids a tokenizer makes of a text, whoever saved it; None of a GGUF file's.

    How a ``tokenizer.json`` pads and cuts, which training writes into it, is left out, for it is not followed here; so
    is how older and newer versions write the same thing.

    Raises:
        CheckpointError: A file cannot be read.
    """
    hashes = tokenizer_hashes(directory)
    deciding: object = hashes
    if FILE in hashes:
        with opened(directory / FILE, "the tokenizer") as (stream, _):
            try:
                deciding = _deciding(json.load(stream))
            except (ValueError, RecursionError):  # which the library reads all the same
                deciding = hashes
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest() if hashes else None


def _deciding(told: object) -> object:
    """What a ``tokenizer.json`` says that its ids follow from."""
    if not isinstance(told, dict):
        return told
    kept = {key: value for key, value in told.items() if key not in ("padding", "truncation")}
    if isinstance(model := told.get("model"), dict):
        kept["model"] = {key: value for key, value in model.items() if value is not None and value is not False}
        if isinstance(merges := model.get("merges"), list):
            kept["model"]["merges"] = [" ".join(map(str, of)) if isinstance(of, list) else of for of in merges]
    return kept


def check_tokenizer(directory: Path) -> None:
    """Refuse what `load_tokenizer` refuses, as far as that can be told without `transformers`."""
    if (directory / "tokenizer.json").is_file():
        load_tokenizer(directory)
    else:
        require_tokenizer(directory)


def _whole(directory: Path) -> Any:
    """What ``tokenizer.json`` describes, without cutting or padding."""
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
    return tokenizer


def _fast(directory: Path) -> LoadedTokenizer:
    tokenizer = _whole(directory)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids))
        return text

    def spans(text: str) -> Spans:
        found: Spans = tokenizer.encode(text).offsets
        return found

    def bare(text: str) -> tuple[list[int], Spans]:
        found = tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    return LoadedTokenizer(encode, decode, spans, bare)


def _slow(directory: Path) -> LoadedTokenizer:
    from transformers import AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(directory)}
    if directory.suffix == gguf.SUFFIX:
        place = {"pretrained_model_name_or_path": str(directory.parent), "gguf_file": str(directory.absolute())}
    with warnings.catch_warnings(action="ignore"):  # of how transformers itself builds it, under a user's -W error
        tokenizer = AutoTokenizer.from_pretrained(**place, local_files_only=True, trust_remote_code=False)

    def encode(text: str) -> list[int]:
        # Quiet, because a text longer than the model's context is cut to a window afterwards.
        ids: list[int] = tokenizer(text, verbose=False).input_ids
        return ids

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def spans(text: str) -> Spans | None:
        if not tokenizer.is_fast:
            return None
        found: Spans = tokenizer(text, verbose=False, return_offsets_mapping=True).offset_mapping
        return found

    def bare(text: str) -> tuple[list[int], Spans | None]:
        told = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
        return told.input_ids, told.get("offset_mapping")

    return LoadedTokenizer(encode, decode, spans, bare)


def require_tokenizer(directory: Path) -> None:
    """Refuse a directory without a tokenizer, or with one that only its own code can build; nothing is loaded.

    Raises:
        CheckpointError: It is so, or ``directory`` is a GGUF file that cannot be read.
    """
    if directory.suffix == gguf.SUFFIX:
        gguf.read_header(directory)
        return
    present = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    config = directory / CONFIG
    if "tokenizer.json" in present:
        return
    if code := configuration(config).get("auto_map"):
        raise CheckpointError(
            f"{config}: auto_map names Python code ({printable(json.dumps(code))}), which is never run, and no "
            "tokenizer.json lies beside it; save a fast tokenizer into the directory"
        )
    for name in present:  # which transformers will open
        with opened(directory / name, "the tokenizer"):
            pass
    if not present:
        raise CheckpointError(
            f"{directory}: no tokenizer lies in it (looked for {', '.join(TOKENIZER_FILES)}); "
            "save the base model's tokenizer into the directory"
        )
