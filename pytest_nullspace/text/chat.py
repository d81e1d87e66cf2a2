"""Conversations in the model's own form, cut into windows: each begins where one begins, or goes on in a long one.

No window holds two conversations, for a model reads one at a time, and none is padded: those of different lengths are
different forwards. What they have in common with windows of plain text is how many tokens they are in all.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_nullspace.errors import TextError
from pytest_nullspace.text.conversations import Conversations
from pytest_nullspace.text.images import Images, Row
from pytest_nullspace.text.processor import Processor
from pytest_nullspace.text.templates import Rendered, Template
from pytest_nullspace.text.tokenizer import LoadedTokenizer
from pytest_nullspace.text.windows import Stretch, Window

BATCH = 64
"""Conversations that are rendered at once."""


@dataclass(frozen=True)
class Chat:
    """Conversations as one model reads them.

    Attributes:
        text: Those that were drawn, as the template wrote them, one after the other.
        windows: What was cut of them.
        sha256: The digest of all conversations, drawn or not, whatever the template.
        about: What a run tells of them beside.
    """

    text: str
    windows: tuple[Window, ...]
    sha256: str
    about: Mapping[str, Any]


def chat(
    conversations: Conversations,
    template: Template,
    tokenizer: LoadedTokenizer,
    *,
    count: int,
    seqlen: int,
    seed: int,
    assistant: bool,
) -> Chat:
    """As many of the ``conversations``, in an order drawn by ``seed``, as fill ``count`` windows; each at most once.

    Args:
        conversations: All there are.
        template: Writes them.
        tokenizer: Cuts what it wrote into tokens; special ones are those that the template writes.
        count: How many windows they fill, if there are so many.
        seqlen: Tokens a window at most.
        seed: Of the order.
        assistant: Whether only what the assistant says counts.

    Raises:
        TextError: The template cannot be followed, or no window is left.
    """
    order = random.Random(seed).sample(conversations.rows, len(conversations.rows))
    texts: list[str] = []
    windows: list[Window] = []
    begin = tokens = 0
    for rendered in _rendered(order, template, assistant):
        if tokens >= count * seqlen:
            break
        cut = list(_cut(rendered, begin, template, tokenizer, seqlen, assistant))
        texts.append(rendered.text)
        begin += len(rendered.text)
        windows += cut
        tokens += sum(len(window.tokens) for window in cut)
    if not windows:
        what = "nothing that the assistant says" if assistant else "no two tokens"
        raise TextError(f"{template.file}: of {len(order):,} conversations its chat template leaves {what}")
    about = _about(template, windows, len(texts), len(order), assistant)
    return Chat("".join(texts), tuple(windows), conversations.sha256, about)


def chat_of_images(
    images: Images, template: Template, processor: Processor, *, count: int, seqlen: int, seed: int, assistant: bool
) -> Chat:
    """Conversations with images, ``count`` of them drawn by ``seed``: each a window, its text cut at the end.

    Args:
        images: All there are.
        template: Writes them.
        processor: Makes tokens and pixels of what it wrote.
        count: How many are drawn, if there are so many.
        seqlen: Tokens a window at most.
        seed: Of the draw.
        assistant: Whether only what the assistant says counts.

    Raises:
        TextError: The template cannot be followed, a row cannot be read, or no window is left.
    """
    numbers = images.drawn(count, seed)
    windows = []
    for number, rendered in zip(
        numbers, _rendered([images.rows[number].talk for number in numbers], template, assistant), strict=True
    ):
        row = replace(images.rows[number], text=rendered.text)
        shown = processor.window(row, seqlen)
        counted = _counted(row, rendered, processor, len(shown)) if assistant else None
        if counted is None or any(counted):
            windows.append(Window(number, shown, counted))
    if not windows:
        raise TextError(
            f"{template.file}: of {len(numbers):,} conversations with images its chat template leaves nothing that the "
            f"assistant says in the first {seqlen:,} tokens; raise --nullspace-seqlen"
        )
    return Chat(
        "", tuple(windows), images.sha256(), _about(template, windows, len(windows), len(images.rows), assistant)
    )


def _counted(row: Row, rendered: Rendered, processor: Processor, length: int) -> tuple[int, ...]:
    """The places of the first ``length`` tokens that are the assistant's; what stands for an image is nobody's."""
    spans = processor.spans(row)
    said = _said(spans, rendered.spans)
    return tuple(place for place, (first, after) in enumerate(spans[:length]) if place in said and first < after)


def _about(
    template: Template, windows: Sequence[Window], conversations: int, of: int, assistant: bool
) -> Mapping[str, Any]:
    """What a run tells of conversations that became these windows."""
    return {
        "template_sha256": template.sha256,
        "conversations": conversations,
        "of": of,
        "assistant_only": assistant,
        "counted_tokens": sum(len(of.tokens if of.counted is None else of.counted) for of in windows),
    }


def _rendered(order: Sequence[str], template: Template, assistant: bool) -> Iterator[Rendered]:
    for first in range(0, len(order), BATCH):
        yield from template.render(order[first : first + BATCH], assistant=assistant)


def _cut(
    rendered: Rendered, begin: int, template: Template, tokenizer: LoadedTokenizer, seqlen: int, assistant: bool
) -> Iterator[Window]:
    """The windows of one conversation, whose text begins at that character, but for one that predicts nothing."""
    ids, spans = tokenizer.bare(rendered.text)
    if spans is None and assistant:
        raise TextError(
            f"{template.file.parent}: its tokenizer does not tell of which characters a token is, so nobody can tell "
            "which the assistant says; save a fast tokenizer (tokenizer.json) there"
        )
    said = _said(spans or [], rendered.spans) if assistant else frozenset()
    end = begin + len(rendered.text)
    for first in range(0, len(ids), seqlen):
        tokens = tuple(ids[first : first + seqlen])
        counted = tuple(place for place in range(len(tokens)) if first + place in said) if assistant else None
        if len(tokens) > 1 and (counted is None or any(counted)):
            start = begin + (spans[first][0] if spans is not None else 0)
            yield Window(start, tokens, counted, Stretch(begin, end, first))


def _said(tokens: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> frozenset[int]:
    """The numbers of the tokens that lie in ``spans``, from the first that reaches into one to the last that does."""
    found: set[int] = set()
    place = 0
    for first, after in sorted(spans):
        while place < len(tokens) and tokens[place][1] <= first:
            place += 1
        inside = place
        while inside < len(tokens) and tokens[inside][0] < after:
            inside += 1
        found.update(range(place, inside))
    return frozenset(found)
