"""A stranger's regexes against the names of layers, in bounded time.

PEFT matches them as Python's ``re`` does, which may take for ever. So before any is used, here or there, its steps are
counted for names as long as those at hand (`checkpoint.steps`), and what may take more than `MAX_STEPS` is refused.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint.header import MAX_NAME
from pytest_nullspace.checkpoint.steps import MAX_STEPS, TooSlowError, steps
from pytest_nullspace.errors import CheckpointError, quoted

MAX_REGEX = 10_000
"""Characters of one regex."""
KEPT = 200
"""Regexes that ``re`` keeps compiled at any rate; of more, each may be compiled anew for every name."""

_COMPILING, _COUNTING, _LOOKING = 2_000, 5, 600
"""Steps in which a character of a regex is compiled, a position counted, and a shape of plain keys looked for."""
_LENGTHS = 16
"""Names are counted as of the next length that this divides."""

_PLAIN = re.compile(rf"[\w.-]{{1,{MAX_NAME}}}")
"""A key of letters, digits and dots alone, of which each dot stands for any character."""
_AS_PEFT_WRITES: Mapping[str, str] = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
"""Fields that hold regexes, and what PEFT makes of each before it is matched with a name."""


def require_quick(config: Mapping[str, Any], names: Collection[str], config_file: Path) -> None:
    """Refuse regexes that might take more than `MAX_STEPS` on ``names``, and lists that are too long for them.

    Raises:
        CheckpointError: The field and the regex are named.
    """
    lengths = Counter(-(-len(name) // _LENGTHS) * _LENGTHS for name in names)
    left = MAX_STEPS
    for field, form in _AS_PEFT_WRITES.items():
        where, value = f"{config_file}: {field}", config.get(field)
        _require_few(value, names, where)
        regexes = _regexes(field, value)
        compiled = len(names) if len(regexes) > KEPT else 1
        for regex in regexes:
            try:
                left -= compiled * _COMPILING * len(regex)
                left -= _cost(form.replace("{}", regex), lengths, left)
            except TooSlowError:
                raise CheckpointError(
                    f"{where}: the regex {quoted(regex)} could take too long on {len(names):,} names of up to "
                    f"{max(map(len, names)):,} characters: it repeats too much within itself, or too many stand "
                    "beside it; write it with fewer repeats, or name the layers"
                ) from None
            except re.error as error:
                raise CheckpointError(f"{where}: {quoted(regex)} is no regex: {error}; mend it") from None


def _require_few(value: object, names: Collection[str], where: str) -> None:
    """Refuse more entries than are of use, each of which is held against every name."""
    entries = len(value) if isinstance(value, list | Mapping) else 0
    is_of_layers = isinstance(value, Mapping) and entries > max(len(names), KEPT)
    looked_up = table(tuple(value)).shapes if isinstance(value, Mapping) and not is_of_layers else entries
    if is_of_layers or looked_up * len(names) * _LOOKING > MAX_STEPS:
        raise CheckpointError(
            f"{where}: has {entries:,} entries for the {len(names):,} names of this adapter, each held against every "
            "name; leave out those of no use"
        )


def _regexes(field: str, value: object) -> list[str]:
    """What of the field's value is a regex; plain keys are looked up (`NameTable`), and most lists are of names."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [key for key in value if not _PLAIN.fullmatch(key)]
    return list(value) if isinstance(value, list) and field in ("layers_pattern", "modules_to_save") else []


def _cost(regex: str, lengths: Mapping[int, int], most: int) -> int:
    """The steps that ``regex`` may take on so many names of each length, and those of counting them."""
    if len(regex) > MAX_REGEX:
        raise TooSlowError(f"more than {MAX_REGEX} characters")
    taken = 0
    for length, count in lengths.items():
        taken += _COUNTING * length * len(regex)
        taken += count * steps(regex, length, (most - taken) // count)
    return taken


@lru_cache(maxsize=4)
def table(keys: tuple[str, ...]) -> "NameTable":
    """The table of ``keys``, made once."""
    return NameTable(keys)


class NameTable:
    """The keys of ``rank_pattern`` or ``alpha_pattern``: the first that is, as a regex, an end of a layer's name.

    The rule is PEFT's own, of ``peft.utils.other.get_pattern_key``. Plain keys, of which adapters with a rank for each
    layer have thousands, are looked up by where they have dots.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._regexes: list[tuple[int, str]] = []
        for number, key in enumerate(keys):
            if _PLAIN.fullmatch(key):
                dots = tuple(at for at, character in enumerate(key) if character == ".")
                self._plain.setdefault((len(key), dots), {}).setdefault(key, number)
            else:
                self._regexes.append((number, _AS_PEFT_WRITES["rank_pattern"].replace("{}", key)))

    @cached_property
    def _compiled(self) -> list[tuple[int, re.Pattern[str]]]:
        """The others, once they are known to be quick."""
        return [(number, re.compile(regex)) for number, regex in self._regexes]

    @property
    def shapes(self) -> int:
        """How many look-ups a name takes."""
        return len(self._plain)

    def first(self, name: str) -> int | None:
        """The number of the first key that fits ``name``, if one does."""
        found = [
            number
            for (length, dots), keys in self._plain.items()
            if len(name) == length or name[-length - 1 : -length] == "."
            if (number := keys.get(_dotted(name[-length:], dots))) is not None
        ]
        first = min(found, default=None)
        for number, regex in self._compiled:
            if first is not None and number > first:
                break
            if regex.match(name):
                return number
        return first


def _dotted(name: str, dots: Sequence[int]) -> str:
    if not dots:
        return name
    characters = list(name)
    for at in dots:
        characters[at] = "."
    return "".join(characters)
