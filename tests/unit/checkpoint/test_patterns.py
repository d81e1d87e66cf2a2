"""A stranger's regexes: their steps are never counted too few, those in use are taken, and no config takes for ever."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_nullspace.checkpoint.patterns import KEPT, NameTable, require_quick
from pytest_nullspace.checkpoint.peft import pattern_value
from pytest_nullspace.checkpoint.steps import MAX_STEPS, TooSlowError, counted, steps
from pytest_nullspace.errors import CheckpointError

CONFIG = Path("adapter_config.json")
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.language_model.layers.{block}.{part}" for block in range(94) for part in PARTS]
VISION = "vision|image|visual|patch|language|text"
BLOCKS, LINEAR = (
    "self_attn|attention|attn|mlp|feed_forward|ffn|dense",
    "k_proj|q_proj|v_proj|o_proj|gate_proj|up_proj|down_proj",
)
IN_USE = (
    "q_proj",
    r".*\.(q|k|v)_proj",
    r"model\.layers\.\d+\.mlp",
    r"model\.layers\.\d+\..*(attn|mlp).*(q|k|v|o)_proj",
    r"^(?!.*visual)(?=.*(q_proj|v_proj)).*$",
    r"^(?!.*(vision_tower|multi_modal_projector)).*\.(q_proj|k_proj|v_proj|o_proj)$",
    rf".*language_model.*\.({LINEAR})$",
    ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    # What unsloth writes for a model that sees.
    rf"(?:.*?(?:{VISION}).*?(?:{BLOCKS}).*?(?:{LINEAR}).*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{BLOCKS})\.(?:(?:{LINEAR})))",
)


@pytest.mark.parametrize("regex", IN_USE)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "modules_to_save"]
)
def test_regexes_in_use_are_taken(regex: str, field: str) -> None:
    """Patterns as people and tools write them are taken for a model of 94 blocks, in every field."""
    value: Any = {regex: 8} if field == "rank_pattern" else [regex] if field == "modules_to_save" else regex
    require_quick({field: value}, NAMES, CONFIG)


SLOW = (
    "(a+)+$", "(a|a)*b", r"(.)\1", r"(?P<x>.)(?P=x)", "(a)?(?(1)b|c)", ".*.*.*.*.*.*.*b", "a?" * 30 + "a" * 30,
    "(a?){30}", "x" * 20_000, ".*a.*a.*a.*a.*a.*!", r"(\w+\.?)+!", "(?:a|aa)+$", "(.*a){12}", "a{4294967296}",
    "(?i:.*a.*A.*a.*A.*a.*)!", "(" * 5000 + ")" * 5000, "(?=(a+)+$)a", "((a{0,9}){0,9}){0,9}{0,9}!",
)  # fmt: skip


@pytest.mark.parametrize("regex", SLOW)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "layers_pattern", "alpha_pattern", "modules_to_save"]
)
def test_regexes_that_can_take_for_ever_are_refused(regex: str, field: str) -> None:
    """Nested repeats, back references, conditions and too many repeats are refused unseen, in every field, at once."""
    value: Any = {regex: 8} if field == "alpha_pattern" else [regex] if field != "target_modules" else regex
    value = regex if field == "exclude_modules" else value
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=rf"^{CONFIG}: {field}: .*(could take too long on 564 names|is no regex)"):
        require_quick({field: value}, NAMES, CONFIG)
    assert time.process_time() - begun < 5


def test_many_regexes_are_held_to_one_bound(tmp_path: Path) -> None:
    """Regexes that are quick by themselves are refused where there are too many, and so are more keys than layers."""
    many = {f".*a{i}.*b.*": 1 for i in range(564)}
    with pytest.raises(CheckpointError, match="too many stand beside it"):
        require_quick({"rank_pattern": many}, NAMES, CONFIG)
    with pytest.raises(CheckpointError, match="rank_pattern: has 100,000 entries for the 564 names"):
        require_quick({"rank_pattern": {f"layer{i}": 1 for i in range(100_000)}}, NAMES, CONFIG)
    with pytest.raises(CheckpointError, match="target_modules: has 100,000 entries"):
        require_quick({"target_modules": [f"layer{i}" for i in range(100_000)]}, NAMES * 4, CONFIG)
    require_quick({"rank_pattern": dict.fromkeys(map(str, range(KEPT)), 1)}, NAMES[:1], CONFIG)


def test_a_rank_for_each_of_ten_thousand_layers_is_looked_up(tmp_path: Path) -> None:
    """An adapter that names every layer is read in a second or two, not in the product of keys and layers."""
    names = [f"model.layers.{i // 100}.mlp.experts.{i % 100}.up_proj" for i in range(10_000)]
    ranks = {name: number for number, name in enumerate(names)}
    begun = time.process_time()
    require_quick({"rank_pattern": ranks}, names, CONFIG)
    assert [pattern_value(ranks, name, None) for name in names[::100]] == list(range(0, 10_000, 100))
    assert time.process_time() - begun < 5


KEYS = st.lists(st.one_of(st.text("ab.", min_size=1, max_size=5), st.sampled_from(["a|b", "[ab]+", r"a\.b", ".*b"])))


@given(KEYS, st.text("ab.", max_size=8))
def test_the_first_key_is_the_one_that_peft_takes(keys: list[str], name: str) -> None:
    """The table gives what PEFT's own loop over the keys gives, dots standing for any character."""
    expected = next((i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name)), None)
    assert NameTable(keys).first(name) == expected


class Walker:
    """A matcher as simple as can be, that walks every way to its end, and counts what it tries."""

    def __init__(self, name: str, most: int) -> None:
        self.name, self.most, self.tried = name, most, 0

    def ends(self, nodes: Sequence[tuple[Any, Any]], at: int) -> Iterator[int]:
        """Where ``nodes`` can end that begin at ``at``: each way by itself."""
        if not nodes:
            yield at
            return
        for end in self.one(str(nodes[0][0]), nodes[0][1], at):
            yield from self.ends(nodes[1:], end)

    def one(self, kind: str, of: Any, at: int) -> Iterator[int]:
        """The same of one node."""
        self.tried += 1
        if self.tried > self.most:
            raise OverflowError
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            if at < len(self.name) and takes(kind, of, self.name[at]):
                yield at + 1
        elif kind == "SUBPATTERN":
            yield from self.ends(list(of[3]), at)
        elif kind == "BRANCH":
            for branch in of[1]:
                yield from self.ends(list(branch), at)
        elif kind in ("ASSERT", "ASSERT_NOT"):
            if any([True for _ in self.ends(list(of[1]), at)]) is (kind == "ASSERT"):  # noqa: C419 all of them
                yield at
        else:
            assert kind in ("MAX_REPEAT", "MIN_REPEAT"), kind
            yield from self.repeated(of, at, 0)

    def repeated(self, of: tuple[int, int, Any], at: int, times: int) -> Iterator[int]:
        """Every number of times, from ``times`` on."""
        least, most, body = of
        if times < most:
            for end in self.ends(list(body), at):
                if end > at or times < least:
                    yield from self.repeated(of, end, times + 1)
        if times >= least:
            yield at


def takes(kind: str, of: Any, character: str) -> bool:
    """Whether Python itself says that a single part takes the character."""
    if kind == "ANY":
        return True
    if kind in ("LITERAL", "NOT_LITERAL"):
        return (chr(of) == character) is (kind == "LITERAL")
    inside = "".join({"NEGATE": "^", "LITERAL": "{}", "RANGE": "{}"}[str(item)].format(
        chr(value) if str(item) == "LITERAL" else "" if value is None else f"{chr(value[0])}-{chr(value[1])}"
    ) for item, value in of)  # fmt: skip
    return re.fullmatch(f"[{inside}]", character) is not None


def grown(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Regexes of regexes."""
    joined = st.lists(parts, min_size=1, max_size=4).map("".join)
    either = st.lists(joined, min_size=1, max_size=3).map(lambda some: f"(?:{'|'.join(some)})")
    count = st.sampled_from(["*", "+", "?", "*?", "{0,2}", "{2}", "{1,}"])
    assertion = st.sampled_from(["(?=", "(?!"])
    return st.one_of(
        joined,
        either,
        st.tuples(either, count).map("".join),
        st.tuples(assertion, joined).map(lambda pair: f"{pair[0]}{pair[1]})"),
    )


ATOMS = st.one_of(
    st.text("ab", min_size=1, max_size=4),
    st.tuples(
        st.sampled_from([".", "a", "b", "[ab]", "[^a]", "[a-b]"]), st.sampled_from(["", "*", "+", "*?", "{1,3}"])
    ).map("".join),
)
REGEXES = st.recursive(ATOMS, grown, max_leaves=8)


@settings(max_examples=400)
@given(REGEXES, st.text("ab", max_size=14))
def test_steps_are_never_counted_too_few(regex: str, name: str) -> None:
    """On any name the walk through every way tries no more than is counted for the worst name of its length."""
    try:
        most, ways = counted(regex, len(name), 50_000)
    except TooSlowError:
        return
    walker = Walker(name, most)
    ends = list(walker.ends(list(parser.parse(regex)), 0))
    assert walker.tried <= most
    assert len(ends) <= sum(ways)


SCANS = st.sampled_from([".*", "a*", "b+", "[ab]*", "[^a]*", ".{0,3}", "a{2,}", ".+?"])
WORDS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(
    lambda some: f"(?:{'|'.join(some)})"
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(SCANS, WORDS).map("".join), min_size=1, max_size=3).map("".join))
def test_no_name_has_more_ways_than_are_counted(regex: str) -> None:
    """Of all names of eight letters none is matched in more ways, nor in more tries, than were counted."""
    most, ways = counted(regex, 8, 10**9)
    parsed = list(parser.parse(regex))
    for letters in product("ab", repeat=8):
        walker = Walker("".join(letters), most)
        assert len(list(walker.ends(parsed, 0))) <= sum(ways)


@settings(max_examples=200, deadline=None)
@given(REGEXES, st.integers(1, 200), st.sampled_from(["a", "ab", "b", "aab"]))
def test_what_is_taken_is_quick(regex: str, length: int, unit: str) -> None:
    """What is accepted for one name ends within what its steps may take, on names made to be walked through."""
    name = (unit * length)[:length]
    try:
        most = steps(regex, length, MAX_STEPS // 100)
    except TooSlowError:
        return
    compiled = re.compile(regex)
    begun = time.process_time()
    compiled.match(name)
    assert time.process_time() - begun < 0.05 + most * 20e-9


def test_no_accepted_config_hangs_python() -> None:
    """The slowest regex that is taken for a hundred names ends within a generous minute, in a process of its own."""
    names = ["a" * 100] * 100
    regex = next(r for n in range(8, 0, -1) if taken(r := ".*a" * n + "!", names))
    assert regex.count("*") >= 3
    code = f"import re\nfor name in {names[:1]!r} * 100: assert not re.match(r'(.*\\.)?({regex})$', name)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def taken(regex: str, names: Sequence[str]) -> bool:
    """Whether the regex is accepted as a key for the names."""
    try:
        require_quick({"rank_pattern": {regex: 1}}, names, CONFIG)
    except CheckpointError:
        return False
    return True
