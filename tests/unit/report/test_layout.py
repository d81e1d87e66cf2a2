"""How lines and tables fit a terminal: nothing is wider than it, and nothing that is copied is broken or mixed up."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.judging.invariants import Expectations, judge
from pytest_nullspace.report import terminal
from pytest_nullspace.report.layout import Form, shortened, table, with_faults, wrapped
from tests import saved

WORDS = st.text(st.sampled_from("ab/-.✓ "), max_size=200)


@given(WORDS, st.integers(8, 100))
def test_a_wrapped_line_holds_the_same_words_and_breaks_none(line: str, width: int) -> None:
    """The words stay whole and in order, and no line is wider than the terminal but where one word is."""
    parts = wrapped(line, width)
    assert " ".join(parts).split() == line.split()
    assert all(len(part) <= width or len(part.split()) <= 2 for part in parts)


def test_lines_that_follow_are_indented_below_the_words_of_the_first() -> None:
    """After a mark the words stand below the words, elsewhere two columns further in."""
    assert wrapped("✓ one two three", 9) == ["✓ one two", "  three"]
    assert wrapped("  cure: one two", 11) == ["  cure: one", "    two"]
    assert wrapped("one two", 5) == ["one", "  two"]
    assert wrapped("  a   b", 80) == wrapped("  a   b", math.inf) == ["  a   b"]
    path = "/a/long-path/that/one-copies.json"
    assert path in wrapped(f"saved to {path}", 12)[-1]


def test_shortened_names_stay_apart() -> None:
    """First parts go before the numbers of blocks do; where two names would become one, they stay as they are."""
    names = ["model.layers.1.self_attn.v_proj", "model.layers.2.self_attn.v_proj", "average"]
    assert shortened(names, 23) == ["…1.self_attn.v_proj", "…2.self_attn.v_proj", "average"]
    towers = ["encoder.layers.1.q", "decoder.layers.1.q"]
    assert shortened(towers, 13) == ["encode…rs.1.q", "decode…rs.1.q"]
    alike = ["aaaaaaaa1aaaaaaaa", "aaaaaaaa2aaaaaaaa"]
    assert shortened(alike, 5) == alike


def test_a_table_takes_the_first_form_that_fits() -> None:
    """A wide terminal shows the wide form, a narrow one the last, and every line of a table is as long as its title."""
    forms = (Form(("wide",), [("1.000e+00",), ("2.000e+00",)], 20), Form(("w",), [("1",), ("2",)]))
    for width, shown in ((40, "1.000e+00"), (20, "1"), (5, "1")):
        title, first, second = table("layers", ["✓ a", "  average"], forms, width)
        assert first.split() == ["✓", "a", shown]
        assert len(title) == len(first) == len(second)


def test_what_is_wrong_stands_beside_a_row_or_below_it() -> None:
    """Where a row's faults do not fit at its end they follow it, each on a line of its own."""
    assert list(with_faults("✗ a 1", ["lost"], 20)) == ["✗ a 1  lost"]
    assert list(with_faults("✗ a 1", ["lost", "moved"], 12)) == ["✗ a 1", "    lost", "    moved"]


@pytest.mark.parametrize("width", [60, 76, 100, 120, 196])
def test_the_table_of_a_summary_fits_the_terminal(width: int) -> None:
    """At each usual width the table fits; it has the figures' whole names where there is room for them."""
    names = [f"model.layers.{number}.self_attn.v_proj" for number in range(9)]
    task = saved.full().layers[0].task
    run = saved.run(*names, task=task)
    verdicts = [judge(layer, Expectations()) for layer in run.layers]
    lines = [line for line, _ in terminal.summary(run, verdicts, Expectations(), width)]
    start = next(number for number, line in enumerate(lines) if line.startswith("  worst layers"))
    rows = lines[start : start + terminal.WORST_SHOWN + 2]
    assert {len(line) for line in rows} == {len(rows[0])}
    assert len(rows[0]) <= max(width, 74)
    assert ("preservation" in rows[0]) is (width > 100)
