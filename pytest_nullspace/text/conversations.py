"""Conversations as tables hold them: messages in a column, or a prompt and its completion in two."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from pytest_nullspace.errors import TextError, printable, quoted

MODES = AUTO, WHOLE, ASSISTANT, OFF = "auto", "whole", "assistant", "off"
"""Whether conversations are rendered: where a table holds nothing else, demanded, demanded and the figures of what the
assistant says alone, never."""
FORMS: Sequence[tuple[str, ...]] = (("messages",), ("conversations",), ("prompt", "completion"))
"""The columns that hold conversations where none is named, in this order."""
TOOLS = "tools"
"""The column of what an assistant may call, beside any of them."""
MAX_CHARACTERS = 10_000_000
"""Of one conversation as JSON."""
IMAGES = ("image", "image_url")
"""What a part of a message is called that is an image."""
_SAID_BY = {"human": "user", "gpt": "assistant", "bing": "assistant", "bard": "assistant"}
"""What ShareGPT calls who speaks."""


@dataclass(frozen=True)
class Conversations:
    """A text of conversations.

    Attributes:
        rows: Each as JSON: an object with ``messages`` and, where there are any, ``tools``.
    """

    rows: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """The digest of them all, whatever the template."""
        return hashlib.sha256("\n".join(self.rows).encode("utf-8", "surrogatepass")).hexdigest()


def conversations(
    columns: Mapping[str, Sequence[object]], names: Sequence[str], row: str, source: object
) -> Conversations:
    """The conversations in the columns ``names``.

    Args:
        columns: Their values, and those of the tools, if there are any.
        names: One of `FORMS`, or a column that the user named.
        row: What a row is called, for messages.
        source: What they were read from, likewise.

    Raises:
        TextError: One is none, or none is there.
    """
    found = tuple(as_json(talk.told, talk.refused) for talk in talks(columns, names, row, source, seeing=False))
    if not found:
        raise TextError(f"{source}: holds no conversation in {named(names)}")
    return Conversations(found)


_Refused = Callable[[str], TextError]


class Talk(NamedTuple):
    """One conversation.

    Attributes:
        number: Of its row, from 1.
        told: An object with ``messages`` and, where there are any, ``tools``.
        images: What each image among its parts says of itself: see `_of_image`.
        refused: Makes an error of a reason, with where it stands.
    """

    number: int
    told: dict[str, Any]
    images: Sequence[Any]
    refused: _Refused


def talks(
    columns: Mapping[str, Sequence[object]], names: Sequence[str], row: str, source: object, *, seeing: bool
) -> Iterator[Talk]:
    """The conversations in the columns ``names``, one by one; those that are empty left out.

    Args:
        columns: As in `conversations`.
        names: Likewise.
        row: Likewise.
        source: Likewise.
        seeing: Whether a message may hold images.

    Raises:
        TextError: One is none.
    """
    for number, values in enumerate(zip(*(columns[name] for name in names), strict=True), 1):
        where = f"{source}: {row} {number}"

        def refused(reason: str, where: str = where) -> TextError:
            return TextError(f"{where}: {reason}")

        images: list[Any] = []
        messages = _messages(values, names, refused, images if seeing else None)
        if not messages:
            continue
        told: dict[str, Any] = {"messages": messages}
        if TOOLS in columns and (tools := _tools(columns[TOOLS][number - 1], refused)):
            told[TOOLS] = tools
        yield Talk(number, told, images, refused)


def holds_images(values: Sequence[object]) -> bool:
    """Whether a message in a column of conversations has an image among its parts."""
    return any(
        isinstance(part, Mapping) and part.get("type") in IMAGES
        for messages in values
        if isinstance(messages, list)
        for message in messages
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def named(names: Sequence[str]) -> str:
    """What columns are called in a message."""
    return f"its column{'s' if len(names) > 1 else ''} {' and '.join(map(quoted, names))}"


def _messages(
    values: tuple[object, ...], names: Sequence[str], refused: _Refused, images: list[Any] | None
) -> list[dict[str, Any]]:
    """The messages of one row; none where it is empty."""
    if any(value is None for value in values):
        return []
    if len(values) == 1:
        return list(_of_list(values[0], names[0], refused, images))
    found: list[dict[str, Any]] = []
    for value, name, role in zip(values, names, ("user", "assistant"), strict=True):
        one = isinstance(value, str)
        found += [{"role": role, "content": value}] if one else _of_list(value, name, refused, images)
    return found


def _of_list(value: object, name: str, refused: _Refused, images: list[Any] | None) -> Iterator[dict[str, Any]]:
    if not isinstance(value, list):
        raise refused(f"column {quoted(name)} holds {type(value).__name__}, not a list of messages")
    for place, message in enumerate(value, 1):
        where = f"message {place}"
        if not isinstance(message, Mapping):
            raise refused(f"{where} is {type(message).__name__}, not an object with a role and its content")
        # A table fills in what only other rows have.
        told = {str(key): part for key, part in message.items() if part is not None}
        if "from" in told and "role" not in told:
            said_by = told.pop("from")
            told = {"role": _SAID_BY.get(said_by, said_by), "content": told.pop("value", None), **told}
        if not isinstance(told.get("role"), str):
            raise refused(f"{where} has no role; it takes an object such as {{'role': 'user', 'content': 'Hello'}}")
        yield told | {"content": _content(told.get("content"), where, refused, images)}


def _content(
    content: object, where: str, refused: _Refused, images: list[Any] | None
) -> str | list[dict[str, Any]] | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refused(f"the content of {where} is {type(content).__name__}, not a string")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if images is not None and isinstance(part, Mapping) and kind in IMAGES:
            images.append(_of_image(part))
            parts.append({"type": "image"})
            continue
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            only = "only text is" if images is None else "only text and images are"
            raise refused(f"{where} holds {quoted(kind, 40)}, and {only} rendered; leave such rows out")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _of_image(part: Mapping[str, Any]) -> Any:
    """The image of a part, as a cell of a table holds one; its number among those of its row, or None for the next."""
    if part.get("base64") is not None:
        return f"data:;base64,{part['base64']}"
    value = next((part[name] for name in (*IMAGES, "url", "path", "bytes") if part.get(name) is not None), None)
    if isinstance(value, Mapping) and isinstance(value.get("url"), str):
        return value["url"]
    return part.get("index") if value is None else value


def _tools(value: object, refused: _Refused) -> list[Any]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise refused(f"column {quoted(TOOLS)} holds a string that is no JSON") from None
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise refused(f"column {quoted(TOOLS)} holds {type(value).__name__}, not a list")
    return value


def as_json(told: Mapping[str, Any], refused: _Refused) -> str:
    """A conversation as it is kept.

    Raises:
        TextError: It is no plain text, or longer than any is.
    """
    try:
        text = json.dumps(told, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise refused(f"holds what is no plain text or number ({printable(error)})") from None
    if len(text) > MAX_CHARACTERS:
        raise refused(
            f"has {len(text):,} characters, more than the {MAX_CHARACTERS:,} of one conversation that are read"
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise refused("holds half a surrogate pair, which cannot be encoded; remove or mend it")
    return text
