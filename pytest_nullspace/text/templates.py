"""The chat template beside a tokenizer: a stranger's data, bounded, and run only in `sandbox`'s own process."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pytest_nullspace.checkpoint import gguf
from pytest_nullspace.checkpoint.header import opened
from pytest_nullspace.errors import CheckpointError, TextError, printable
from pytest_nullspace.text import sandbox
from pytest_nullspace.text.processor import PROCESSOR
from pytest_nullspace.text.tokenizer import CONFIG, SPECIAL, configuration, content

FILE = "chat_template.jinja"
LEGACY = "chat_template.json"
"""Where earlier versions of transformers put a processor's."""
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that a template may name."""
MAX_TEMPLATE = 1_000_000
"""Characters of a template; the longest that models have are 20,000."""
MAX_RENDERED = 20_000_000
"""Characters that it may write of one conversation."""
SECONDS, WALL_SECONDS, MEMORY = 10, 120, 1 << 30
"""What it may take for one batch of conversations: of a processor, in all, and in bytes."""


class Rendered(NamedTuple):
    """A conversation as a template wrote it.

    Attributes:
        text: All of it.
        spans: Where the assistant speaks, first character and the one after the last.
    """

    text: str
    spans: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template.

    Attributes:
        file: Where it lies.
        text: What it is.
        special: The special tokens that it may name.
    """

    file: Path
    text: str
    special: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """The digest of all that decides what it writes."""
        told = json.dumps([self.text, dict(self.special)], sort_keys=True)
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def beside(cls, directory: Path) -> "Template | None":
        """The template of the tokenizer in ``directory``; None where it has none, as a GGUF file's, which is not read.

        Raises:
            CheckpointError: What holds it cannot be read, or it is longer than any is.
        """
        if directory.suffix == gguf.SUFFIX or directory.is_file():
            return None
        file = directory / (FILE if (directory / FILE).is_file() else CONFIG)
        return cls._held(file, directory)

    @classmethod
    def of_processor(cls, directory: Path, tokenizer: Path) -> "Template | None":
        """The template of the processor in ``directory``, where transformers looks for it, or else its tokenizer's.

        Raises:
            CheckpointError: What holds it cannot be read, or it is longer than any is.
        """
        for name in (PROCESSOR, LEGACY, FILE):
            if (directory / name).is_file() and (found := cls._held(directory / name, tokenizer)) is not None:
                return found
        return cls.beside(tokenizer)

    @classmethod
    def _held(cls, file: Path, tokenizer: Path) -> "Template | None":
        """The one in ``file``, with the special tokens that lie in ``tokenizer``."""
        config = configuration(tokenizer / CONFIG)
        text = _read(file) if file.name == FILE else _default(configuration(file).get("chat_template"))
        if text is None:
            return None
        if len(text) > MAX_TEMPLATE:
            raise CheckpointError(
                f"{file}: its chat template has {len(text):,} characters; at most {MAX_TEMPLATE:,} are read"
            )
        told = {**configuration(tokenizer / SPECIAL), **config}
        special = {name: token for name in TOKENS if (token := content(told.get(name))) is not None}
        return cls(file, text, special)

    def render(self, conversations: Sequence[str], *, assistant: bool) -> list[Rendered]:
        """Each of the ``conversations``, with what the assistant says in them where that is asked for.

        Raises:
            TextError: The template does not end, takes too much, or refuses one.
        """
        asked = {
            "template": self.text,
            "special": self.special,
            "conversations": conversations,
            "assistant": assistant,
            "most": MAX_RENDERED,
            "seconds": SECONDS,
            "memory": MEMORY,
        }
        answer = self._asked(json.dumps(asked).encode("ascii"))
        if "error" in answer:
            number = answer["number"]  # below 0 where it cannot be read at all
            talk = (
                ""
                if number < 0
                else f", in the conversation {printable(conversations[number])}: mend that if it is odd"
            )
            raise self._refused(f"cannot be followed: {printable(answer['error'], 400)}{talk}")
        return [
            Rendered(text, [(first, after) for first, after in spans])
            for text, spans in zip(answer["texts"], answer["spans"], strict=True)
        ]

    def _asked(self, question: bytes) -> dict[str, Any]:
        """What `sandbox` answers in a process of its own."""
        import jinja2
        import markupsafe

        folders = dict.fromkeys(str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe))
        command = [sys.executable, "-I", "-S", sandbox.__file__, *folders]
        try:
            done = subprocess.run(command, input=question, capture_output=True, timeout=WALL_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise self._endless() from None
        except OSError as error:
            raise TextError(f"{self.file}: no process could be started for its chat template: {error}") from None
        killed = {-getattr(signal, name) for name in ("SIGXCPU", "SIGKILL") if hasattr(signal, name)}
        if done.returncode in killed:
            raise self._endless()
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise self._refused(f"ended its process: {printable(lines[-1] if lines else done.returncode)}") from None
        return answer

    def _endless(self) -> TextError:
        return self._refused(f"does not come to an end: it was stopped after {SECONDS} s")

    def _refused(self, reason: str) -> TextError:
        return TextError(f"{self.file}: its chat template {reason}. Put the base model's own there, or give plain text")


def require_template(directory: Path, source: object) -> Template:
    """The template in ``directory``, which the conversations of ``source`` need.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    template = Template.beside(directory)
    if template is None:
        raise CheckpointError(
            f"{directory}: its tokenizer has no chat template (looked for {FILE}, and chat_template in {CONFIG}), and "
            f"{source} holds conversations, which it would write; save the base model's tokenizer with its template "
            "there, or name a column of plain text"
        )
    return template


def require_template_of_images(processor: Path, tokenizer: Path, source: str) -> Template:
    """The template of the ``processor``'s directory, which the conversations with images of ``source`` need.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    template = Template.of_processor(processor, tokenizer)
    if template is None:
        raise CheckpointError(
            f"{processor}: its processor has no chat template (looked for {FILE}, {LEGACY}, and chat_template in "
            f"{PROCESSOR} and {CONFIG}), and {source} holds conversations, which it would write; save the base model's "
            "processor with its template there, or name a column of plain text"
        )
    return template


def _read(file: Path) -> str:
    with opened(file, "the chat template") as (stream, status):
        if status.st_size > 4 * MAX_TEMPLATE:
            raise CheckpointError(f"{file}: has {status.st_size:,} bytes, and no chat template has so many")
        try:
            return stream.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8 text (byte {error.start})") from None


def _default(told: object) -> str | None:
    """The template of a config: itself, or of several that have names the one called ``default``."""
    if isinstance(told, list):
        named = {of.get("name"): of.get("template") for of in told if isinstance(of, Mapping)}
        told = named.get("default")
    elif isinstance(told, Mapping):
        told = told.get("default")
    return told if isinstance(told, str) else None
