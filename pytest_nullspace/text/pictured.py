"""Conversations with images, as tables hold them: among the parts of the messages, in a column beside them, or both."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_nullspace.errors import TextError
from pytest_nullspace.text.conversations import Talk, as_json, named, talks
from pytest_nullspace.text.images import Images, Picture, Row, pictures_of

MARK = "<image>"
"""What a text says, of whatever model, where an image stands."""


def pictured(
    columns: Mapping[str, Sequence[object]],
    names: Sequence[str],
    row: str,
    source: str,
    beside: str | None,
    folder: Path | None,
) -> Images:
    """The conversations in the columns ``names``, each with its images.

    An image stands where a message has a part of its kind, or where its text says `MARK`; where none does, those of the
    column come first in what the user says first, as TRL has it.

    Args:
        columns: Their values, those of the tools, if there are any, and those of the images.
        names: One of `pytest_nullspace.text.conversations.FORMS`, or a column that the user named.
        row: What a row is called, for messages.
        source: What they were read from, likewise.
        beside: The column of images; None where there is none.
        folder: In which paths of images lie; None where none can.

    Raises:
        TextError: A conversation is none, or its images are not those that its messages have places for.
    """
    rows = []
    for talk in talks(columns, names, row, source, seeing=True):
        where = f"{source}: {row} {talk.number}"
        held = None if beside is None else pictures_of(columns[beside][talk.number - 1], folder, where)
        messages, cells = _placed(talk, None if held is None else len(held))
        owned = [() if cell is None or type(cell) is int else pictures_of(cell, folder, where) for cell in cells]
        lent = iter(_in_order([cell for cell, own in zip(cells, owned, strict=True) if not own], held or (), talk))
        pictures = tuple(own[0] if own else next(lent) for own in owned)
        rows.append(Row("", pictures, where, as_json({**talk.told, "messages": messages}, talk.refused)))
    if not rows:
        raise TextError(f"{source}: holds no conversation in {named(names)}")
    if not any(of.pictures for of in rows):
        raise TextError(f"{source}: holds no image")
    return Images(source, tuple(rows))


def _placed(talk: Talk, beside: int | None) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages with a part where each image stands, and what each of these says of its image.

    Args:
        talk: The conversation.
        beside: How many images the column holds; None where there is none, and `MARK` is a text like others.
    """
    own, messages = iter(talk.images), []
    marked = beside is not None and not talk.images
    for message in talk.told["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if marked and parts is not None:
            parts = [piece for part in parts for piece in _split(part["text"])]
        messages.append({**message, "content": parts})
    cells = [next(own, None) for message in messages for part in message["content"] or () if part["type"] == "image"]
    if beside and not cells:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise talk.refused("no user speaks in it, before whose text its images could stand; say where they do")
        first["content"] = [*({"type": "image"} for _ in range(beside)), *(first["content"] or ())]
        cells = [None] * beside
    return messages, cells


def _split(text: str) -> Iterator[dict[str, str]]:
    """A text in parts, cut where it says that an image stands."""
    for place, piece in enumerate(text.split(MARK)):
        if place:
            yield {"type": "image"}
        if piece:
            yield {"type": "text", "text": piece}


def _in_order(cells: Sequence[int | None], held: Sequence[Picture], talk: Talk) -> Sequence[Picture]:
    """The images of the column in the order of the places that have none of their own, which may tell their numbers."""
    if len(cells) != len(held):
        raise talk.refused(
            f"its messages have places for {len(cells)} images beside those that they hold, and {len(held)} stand "
            "beside them; mend one of them"
        )
    numbers = [place if cell is None else cell for place, cell in enumerate(cells)]
    if sorted(numbers) != list(range(len(held))):
        raise talk.refused(
            f"its messages number their images {numbers}, and each of {len(held)} stands once; mend them"
        )
    return [held[number] for number in numbers]
