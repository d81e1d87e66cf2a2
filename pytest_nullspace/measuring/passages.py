"""Where in a text the predictions changed most, told in the text's own characters, so that one sees what was lost."""

from collections.abc import Sequence
from typing import NamedTuple

from pytest_nullspace.run.predictions import Passage
from pytest_nullspace.text.tokenizer import LoadedTokenizer
from pytest_nullspace.text.windows import Shown, Window

TOLD = 5
"""Passages of each text."""
BEFORE, AFTER = 240, 120
"""Characters that are told before the token, so that one sees what it is about, and behind it."""
NEAR = 60
"""Characters before a token within which another is the same place."""
LONGEST = 200
"""Characters that are told of what a token stands for."""


class Spot(NamedTuple):
    """One prediction of a window that changed much.

    Attributes:
        window: The number of the window.
        place: The place in it of the last token that was read; the next one was to be predicted.
        divergence: Of the adapted prediction from the base's, in nats.
        base: The base's probability of the next token.
        adapted: The adapted model's.
        likeliest: The token that the base holds likeliest.
        instead: The token that the adapted model does.
    """

    window: int
    place: int
    divergence: float
    base: float
    adapted: float
    likeliest: int
    instead: int


def passages(
    spots: Sequence[Spot], windows: Sequence[Window], text: str, tokenizer: LoadedTokenizer, seqlen: int
) -> tuple[Passage, ...]:
    """The most changed of ``spots``, as the text has them; of windows that overlap each place once."""
    found: list[Passage] = []
    for spot in sorted(spots, key=lambda spot: spot.divergence, reverse=True):
        passage = _passage(spot, windows[spot.window], text, tokenizer, seqlen)
        if not any(_overlap(passage, other) for other in found):
            found.append(passage)
        if len(found) == TOLD:
            break
    return tuple(found)


def _passage(spot: Spot, window: Window, text: str, tokenizer: LoadedTokenizer, seqlen: int) -> Passage:
    target = spot.place + 1
    spans, begin = _spans(window, text, tokenizer, seqlen)
    start: int
    end: int | None
    if spans is None:
        start, end = window.start, None
        before = tokenizer.decode(window.tokens[max(0, target - BEFORE) : target])
        token = tokenizer.decode(window.tokens[target : target + 1])
        after = tokenizer.decode(window.tokens[target + 1 : target + 1 + AFTER])
    else:
        start, end = (begin + at for at in spans[target])
        read = begin + spans[min(len(window.tokens), len(spans)) - 1][1]
        before, token = text[max(window.start, start - BEFORE) : start], text[start:end]
        after = text[end : min(end + AFTER, read)]
    likeliest, instead = (tokenizer.decode([which])[:LONGEST] for which in (spot.likeliest, spot.instead))
    row = window.tokens.where[-LONGEST:] if isinstance(window.tokens, Shown) else ""
    quoted = before[-BEFORE:], token[:LONGEST], after[:AFTER]
    return Passage(start, end, *quoted, spot.base, spot.adapted, likeliest, instead, spot.divergence, row)


def _spans(
    window: Window, text: str, tokenizer: LoadedTokenizer, seqlen: int
) -> tuple[Sequence[tuple[int, int]] | None, int]:
    """The characters of each token of ``window``, and from which one of the text they are counted."""
    if isinstance(window.tokens, Shown):
        return None, window.start
    if window.within is None:
        return tokenizer.spans(text[window.start : window.start + 10 * seqlen]), window.start
    begin, end, before = window.within
    spans = tokenizer.bare(text[begin:end])[1]
    return (None if spans is None else spans[before : before + seqlen]), begin


def _overlap(one: Passage, other: Passage) -> bool:
    """Whether one stands in what the other tells."""
    if one.end is None or other.end is None:
        return one == other
    return one.start - min(NEAR, len(one.before)) < other.end and other.start - min(NEAR, len(other.before)) < one.end
