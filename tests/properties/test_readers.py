"""Whatever a file holds, its reader gives what it says or one of our own errors, in bounded time and memory."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_nullspace.errors import CheckpointError, StatsError
from tests import fuzz

EXAMPLES = 250
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.sampled_from(
        [2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", ".", "..", "../x", "/", "\x1b[31m", "(a+)+$"]
    )
    | st.floats()
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def paths(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [at, *(path for key, value in inner for path in paths(value, (*at, key)))]


@st.composite
def documents(draw: st.DrawFn, sound: Any) -> bytes:
    """A sound document in which a few places hold something else, cut short or with bytes changed at times."""
    document = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(0, 3))):
        *way, last = draw(st.sampled_from(paths(document)[1:] or [("x",)]))
        place = document
        for key in way:
            place = place[key]
        if draw(st.integers(0, 4)):
            place[last] = draw(VALUES)
        elif isinstance(place, dict):
            place.pop(last, None)
    data = bytearray(json.dumps(document).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))]) if not draw(st.integers(0, 5)) else bytes(data)


@pytest.fixture(scope="module")
def read(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], None]:
    """The reader of that name, in a folder of its own."""
    make, _ = fuzz.TARGETS[request.param]
    return make(tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("read", "name"), [(name, name) for name in fuzz.TARGETS], indirect=["read"])
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_document_is_read_or_refused(read: Callable[[bytes], None], name: str, data: st.DataObject) -> None:
    """A sound document with any values in any places raises nothing but our own errors."""
    document = data.draw(documents(fuzz.TARGETS[name][1]))
    if name == "header":
        document = len(document).to_bytes(8, "little") + document + bytes(24)
    with suppress(CheckpointError, StatsError):
        read(document)


@pytest.mark.parametrize("read", fuzz.TARGETS, indirect=True)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(read: Callable[[bytes], None], document: bytes) -> None:
    """Bytes of no kind at all raise nothing but our own errors."""
    with suppress(CheckpointError, StatsError):
        read(document)
