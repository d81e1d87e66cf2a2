"""The JSON of a safetensors header: what the library's own reader takes is taken, and nothing else.

Python's reader takes more (NaN, numbers beyond a float, halves of surrogate pairs), and where a header is read in two
ways two programs see two models. `tests/differential.py` holds both readers against each other.
"""

import json
import math
import re
from typing import Any

DEEPEST = 127
"""Levels of objects and lists, one in the other, that are read."""

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Object(dict[str, Any]):
    """A JSON object.

    Attributes:
        twice: The keys that stood in it more than once.
    """

    twice: frozenset[str] = frozenset()


def parsed(text: str) -> Any:
    """The value that ``text`` is, whose objects are `Object`.

    Raises:
        ValueError: It is no JSON, or none that the library reads; json.JSONDecodeError says where.
        RecursionError: It is nested too deeply for Python.
    """
    value = json.loads(
        text,
        object_pairs_hook=_object,
        parse_constant=_no_constant,
        parse_float=_finite,
        parse_int=_whole,
    )
    if _ESCAPED_SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def is_deeper(value: object, levels: int) -> bool:
    """Whether ``value`` is nested over more than so many levels."""
    level = [value]
    while level := [of for of in level if isinstance(of, dict | list)]:
        if levels <= 0:
            return True
        level = [part for of in level for part in (of.values() if isinstance(of, dict) else of)]
        levels -= 1
    return False


def _object(pairs: list[tuple[str, Any]]) -> Object:
    found = Object(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        found.twice = frozenset(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is out of range")
    return number


def _whole(text: str) -> int | float:
    if text == "-0":
        return -0.0
    _finite(text)
    return int(text)
