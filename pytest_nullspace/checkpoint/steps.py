"""How many steps a regex may take, counted before it is used.

Python's ``re`` walks back through every way in which a regex can match. The count goes through the regex as ``re``
parses it, with a list that holds for each position in the worst string how many ways lead there. It is never too
small. To be less too large, it knows that what follows a repeat can hold it: words that do not overlap stand so far
apart, and of a class that does not hold the next character one end alone is left.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# Python's own parser is not documented, but has long been what it is; an operation that is new to it is refused.
from re import _parser as parser  # type: ignore[attr-defined]  # isort: skip

MAX_STEPS = 4_000_000_000
"""What all regexes of an adapter may take over all names together; measured, a step takes 0.3 to 4 ns."""
_MOST_WORDS = 32
"""In one place of a regex; where there are more, nothing is known of how far apart they stand."""

_Nodes = Sequence[tuple[Any, Any]]
_Ways = list[int]
_SINGLE = {"LITERAL", "NOT_LITERAL", "ANY", "IN"}
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}
_CHANGING = re.IGNORECASE | re.ASCII | re.LOCALE
"""Flags that change what a class holds, or which words are alike: with them nothing is known of what stands apart."""


class TooSlowError(Exception):
    """The steps exceed what is left, or the regex does what is not counted."""


def steps(pattern: str, length: int, most: int = MAX_STEPS) -> int:
    """How many steps ``re.match`` of ``pattern`` takes at most on a string of ``length`` characters.

    Raises:
        TooSlowError, re.error: As `counted`.
    """
    return counted(pattern, length, most)[0]


def counted(pattern: str, length: int, most: int) -> tuple[int, list[int]]:
    """The steps, and in how many ways the pattern can match at most, by how many characters they take at least.

    Raises:
        TooSlowError: They are more than ``most``, or it holds a back reference or a condition.
        re.error: It is no regex.
    """
    try:
        parsed = parser.parse(pattern)
        count = _Count(length, most, 1 + parsed.state.groups // 8, not parsed.state.flags & _CHANGING)
        ways = count.sequence(list(parsed), [1] + [0] * length)
    except (RecursionError, OverflowError) as error:
        raise TooSlowError(str(error)) from None
    return count.steps, ways


class _Count:
    """The steps so far, and how each part of a regex passes ways on.

    Moving a way to an earlier position can only add to what follows, as more of the name is left; so wherever a part
    ends in one place that the name decides, the ways are put at the earliest.
    """

    def __init__(self, length: int, most: int, weight: int, refined: bool) -> None:
        self.length, self.most, self.weight, self.refined = length, most, weight, refined
        self.steps = 0

    def take(self, steps: int) -> None:
        """Count ``steps``, each with what ``re`` keeps of its groups."""
        self.steps += steps * self.weight
        if self.steps > self.most:
            raise TooSlowError(f"more than {self.most:,} steps")

    def sequence(self, nodes: _Nodes, ways: _Ways) -> _Ways:
        """The ways after all of ``nodes``, one after the other."""
        at = 0
        while at < len(nodes) and any(ways):
            kind, of = str(nodes[at][0]), nodes[at][1]
            is_scan = kind in _REPEATS and len(of[2]) == 1 and str(of[2][0][0]) in _SINGLE
            words, after = self._words(nodes, at + 1) if is_scan else (None, at)
            if words is not None:
                ways, at = self._repeat_and_words(of, words, ways), after
            else:
                ways, at = self._node(kind, of, ways), at + 1
        return ways

    def _node(self, kind: str, of: Any, ways: _Ways) -> _Ways:
        self.take(sum(ways) + 1)
        if kind in _SINGLE:
            self.take(sum(ways) * _width(kind, of))
            return _moved(ways, 1)
        if kind == "AT":
            return ways
        if kind in ("ASSERT", "ASSERT_NOT"):
            self.sequence(list(of[1]), ways)
            return ways
        if kind in ("SUBPATTERN", "ATOMIC_GROUP"):
            if kind == "SUBPATTERN" and of[1]:
                self.refined = False  # from here on
            return self.sequence(list(of[3] if kind == "SUBPATTERN" else of), ways)
        if kind == "BRANCH":
            if (words := self._words([(kind, of)], 0)[0]) is not None:
                return self._after_words(words, ways)
            ends = [self.sequence(list(branch), ways) for branch in of[1]]
            return [sum(column) for column in zip(*ends, strict=True)]
        if kind in _REPEATS:
            return self._repeat(of, ways)
        raise TooSlowError(f"{kind.lower()} is not counted")

    def _repeat(self, of: tuple[int, int, Any], ways: _Ways) -> _Ways:
        """Every number of times: as often as the name has characters for it."""
        least, most, body = of
        if most > 1 and body.getwidth()[0] == 0:
            raise TooSlowError("what may be empty is repeated")
        ends = ways if least == 0 else [0] * len(ways)
        for times in range(1, min(most, self.length + 1) + 1):
            ways = self.sequence(list(body), ways)
            if not any(ways):
                break
            if times >= least:
                ends = [end + way for end, way in zip(ends, ways, strict=True)]
                self.take(len(ends))
        return ends

    def _repeat_and_words(self, of: tuple[int, int, Any], words: Sequence[str], ways: _Ways) -> _Ways:
        """A repeat of one character and the words after it: each way goes on from where one of them stands."""
        least, most, body = of
        kind, what = body[0]
        scanned = _width(str(kind), what) + _attempt(words)
        self.take(sum(way * (min(most, self.length - at) + 1) for at, way in enumerate(ways)) * scanned)
        self.take(len(ways))
        shortest, at_once = min(map(len, words)), _at_once(words)
        ahead = _moved(ways, least)
        if not any(_holds(str(kind), what, word[0]) for word in words):
            return [at_once * way for way in _moved(ahead, shortest)]
        apart = _apart(words)
        for at in range(apart, len(ahead)):
            ahead[at] += ahead[at - apart]
        return [at_once * way for way in _moved(ahead, shortest)]

    def _after_words(self, words: Sequence[str], ways: _Ways) -> _Ways:
        self.take(sum(ways) * _attempt(words))
        return [_at_once(words) * way for way in _moved(ways, min(map(len, words)))]

    def _words(self, nodes: _Nodes, at: int) -> tuple[Sequence[str] | None, int]:
        """The words that stand at ``at``, if nothing else does, and where what follows them begins."""
        if not self.refined or at >= len(nodes):
            return None, at
        kind, of = str(nodes[at][0]), nodes[at][1]
        if kind == "LITERAL":
            end = at
            while end < len(nodes) and str(nodes[end][0]) == "LITERAL":
                end += 1
            return ["".join(chr(code) for _, code in nodes[at:end])], end
        if kind == "SUBPATTERN" and not of[1] and not of[2]:
            words, end = self._words(list(of[3]), 0)
            return (words, at + 1) if end == len(of[3]) else (None, at)
        if kind == "BRANCH":
            found = [self._words(list(branch), 0) for branch in of[1]]
            if all(words is not None and end == len(branch) for (words, end), branch in zip(found, of[1], strict=True)):
                return [word for words, _ in found for word in words or ()], at + 1
        return None, at


def _width(kind: str, of: Any) -> int:
    return len(of) if kind == "IN" else 1


def _moved(ways: _Ways, by: int) -> _Ways:
    by = min(by, len(ways))
    return [0] * by + ways[: len(ways) - by]


def _attempt(words: Sequence[str]) -> int:
    """The steps in which words are tried in one place: one of them as a whole, of the others what they share."""
    ordered = sorted(words)
    shared = [_shared(one, other) for one, other in pairwise(ordered)]
    alike = [max(shared[max(at - 1, 0) : at + 1], default=0) for at in range(len(ordered))]
    return sum(alike) + len(words) + max(map(len, words))


def _shared(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _at_once(words: Sequence[str]) -> int:
    """How many of the words can stand in one place: those that begin one another."""
    return max(sum(word.startswith(other) for other in words) for word in words)


def _apart(words: Sequence[str]) -> int:
    """How far the places are apart, at least, in which the words can stand."""
    shortest = min(map(len, words))
    if len(words) > _MOST_WORDS:
        return 1
    for by in range(1, shortest):
        if any(_shared(word[by:], other) in (len(word) - by, len(other)) for word in words for other in words):
            return by
    return max(shortest, 1)


def _holds(kind: str, of: Any, character: str) -> bool:
    """Whether a single-character part takes ``character``."""
    if kind == "ANY":
        return True
    if kind in ("LITERAL", "NOT_LITERAL"):
        return (kind == "LITERAL") is (of == ord(character))
    negated = str(of[0][0]) == "NEGATE"
    return negated is not any(_item_holds(str(item), value, character) for item, value in of[negated:])


_CATEGORIES = {"DIGIT": r"\d", "WORD": r"\w", "SPACE": r"\s"}


def _item_holds(item: str, value: Any, character: str) -> bool:
    if item == "LITERAL":
        return bool(value == ord(character))
    if item == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    _, *negated, name = str(value).split("_")
    return bool(negated) is not bool(re.match(_CATEGORIES[name], character))
