"""A text cut into token windows, drawn as the reference draws them."""

import hashlib
import math
import random
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from pytest_nullspace.errors import TextError

Tokenize = Callable[[str], Sequence[int]]
"""A text's token ids, special tokens included."""

CONTEXT = 64
"""Tokens that no text repeats by chance, or so seldom that it does not count."""


class Stretch(NamedTuple):
    """A part of a text that is cut into tokens as a whole, as a conversation is.

    Attributes:
        begin: Its first character.
        end: The one after its last.
        before: How many of its tokens come before the window.
    """

    begin: int
    end: int
    before: int


class Shown(tuple[int, ...]):
    """The token ids of a row of text and images, and what the model reads beside them.

    Attributes:
        beside: Gives it, each tensor by the name of the model's input, on the CPU.
        unscored: The ids that stand for parts of an image, which nobody predicts.
        sha256: A digest of what is read beside, in hexadecimal.
        where: Which row it is, in words.
        form: Names, types and shapes of what is read beside: windows that share it, and their length, share a forward.
    """

    beside: Callable[[], Mapping[str, Any]]
    unscored: frozenset[int]
    sha256: str
    where: str
    form: tuple[Any, ...]

    def __new__(
        cls,
        ids: Iterable[int],
        beside: Callable[[], Mapping[str, Any]],
        unscored: frozenset[int],
        sha256: str,
        where: str,
        form: tuple[Any, ...] = (),
    ) -> Self:
        """The ids, and what is beside them."""
        shown = super().__new__(cls, ids)
        shown.beside, shown.unscored, shown.sha256, shown.where, shown.form = beside, unscored, sha256, where, form
        return shown


def _unscored(tokens: Sequence[int]) -> frozenset[int]:
    return tokens.unscored if isinstance(tokens, Shown) else frozenset()


@dataclass(frozen=True, slots=True)
class Window:
    """One calibration sequence.

    Attributes:
        start: The character of the text at which it begins; of rows of images the number of the row.
        tokens: Its token ids.
        counted: The places of those that count; None where all do.
        within: The part of the text that it is of, where that brings its own special tokens.
    """

    start: int
    tokens: tuple[int, ...]
    counted: tuple[int, ...] | None = None
    within: Stretch | None = None

    @property
    def places(self) -> Sequence[int]:
        """The places of the tokens that count and that a model can predict, which no part of an image is."""
        unscored = _unscored(self.tokens)
        counted = range(len(self.tokens)) if self.counted is None else self.counted
        return [place for place in counted if self.tokens[place] not in unscored] if unscored else counted

    @property
    def predicted(self) -> tuple[int, ...]:
        """The tokens that count among those that a model predicts, which is all but the first."""
        return tuple(self.tokens[place] for place in self.places if place)


def counted_places(windows: Sequence[Window]) -> list[tuple[int, ...]] | None:
    """Of each of ``windows`` the places of the tokens that count; None where all of all do."""
    places = [window.counted for window in windows]
    if all(of is None for of in places):
        return None
    return [tuple(range(len(window.tokens))) if of is None else of for window, of in zip(windows, places, strict=True)]


def predicted_places(windows: Sequence[Window]) -> Sequence[Sequence[int]] | None:
    """Of each of ``windows`` the places of the tokens whose predictions count; None where all of all do."""
    if all(window.counted is None and not _unscored(window.tokens) for window in windows):
        return None
    return [window.places for window in windows]


def draw_windows(text: str, tokenize: Tokenize, *, count: int, seqlen: int, seed: int) -> tuple[Window, ...]:
    """``count`` windows of at most ``seqlen`` tokens, drawn as the reference draws them.

    Each begins at a uniformly random character and holds the first tokens of the ``10 * seqlen`` characters from there;
    nothing is padded.

    Raises:
        TextError: The text is too short for one window, or one comes out without tokens.
    """
    require_length(text, seqlen)
    last = len(text) - seqlen - 1
    chosen = random.Random(seed)
    return tuple(_window(text, tokenize, chosen.randint(0, last), seqlen) for _ in range(count))


def windows_at(text: str, tokenize: Tokenize, starts: Sequence[int], seqlen: int) -> tuple[Window, ...]:
    """The windows that begin at these characters of ``text``, likewise.

    Raises:
        TextError: One comes out without tokens.
    """
    return tuple(_window(text, tokenize, start, seqlen) for start in starts)


def require_length(text: str, seqlen: int) -> None:
    """Refuse a text from which no window of ``seqlen`` tokens can be drawn.

    Raises:
        TextError: It is too short, whatever its tokens are.
    """
    if len(text) <= seqlen:
        raise TextError(
            f"the text has {len(text)} characters, and windows of {seqlen} tokens need at least "
            f"{seqlen + 1}; give a longer text or a smaller --nullspace-seqlen"
        )


def tokens_at(text: str, tokenize: Tokenize, start: int, seqlen: int) -> tuple[int, ...]:
    """The tokens of the window that begins at character ``start``."""
    return tuple(tokenize(text[start : start + 10 * seqlen])[:seqlen])


def _window(text: str, tokenize: Tokenize, start: int, seqlen: int) -> Window:
    tokens = tokens_at(text, tokenize, start, seqlen)
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
        # The same tokens behind another image are others.
        image = window.tokens.sha256.encode() if isinstance(window.tokens, Shown) else b""
        seen.update(hash(image + data[max(0, end - 8 * CONTEXT) : end]) for end in ends)
    return len(seen)


def unigram_loss(windows: Sequence[Window], vocabulary: int) -> float | None:
    """The loss of a model that only counts tokens, in nats a token; None where no token is predicted.

    Each token that a model predicts, and that counts, is predicted here from how often it is
    among the others, so that a short text, which an entropy of its own counts would flatter, does not look easy. What
    is new has the chance of Witten and Bell, as many as there are distinct tokens, spread over the vocabulary.
    """
    counts = Counter(token for window in windows for token in window.predicted)
    others = counts.total() - 1
    if others < 1:
        return None
    loss = 0.0
    for count in counts.values():
        distinct = len(counts) - (count == 1)
        loss -= count * math.log((count - 1 + distinct / vocabulary) / (others + distinct))
    return loss / counts.total()


def text_hash(text: str) -> str:
    """The SHA-256 of ``text`` as UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def windows_hash(windows: Sequence[Window]) -> str:
    """The SHA-256 of all that is read of ``windows``, in hexadecimal: two runs that share it read the very same."""
    digest = hashlib.sha256()
    for window in windows:
        tokens = array("q", (len(window.tokens), *window.tokens))
        if sys.byteorder == "big":
            tokens.byteswap()
        digest.update(tokens.tobytes())
        if isinstance(window.tokens, Shown):
            digest.update(window.tokens.sha256.encode())
    return digest.hexdigest()
