"""A Markdown report where there is little room: what is most urgent, within the bytes there are."""

import re

from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report.page import Page, Row, fitted, joined, kind

KINDS = ("failed", "warned", "would fail if gated", "passed", "not gated")
ROWS = st.lists(
    st.builds(Row, st.sampled_from(KINDS), st.text("abü✗", min_size=40, max_size=300).map("| {} |".format)), min_size=9
)
PAGES = st.lists(
    st.builds(
        Page,
        st.just("## nullspace: ft\n\nGated 1 of 2 layers.\n\nmore\n|-|"),
        ROWS,
        st.sampled_from(["", "| average |"]),
    ),
    min_size=1,
    max_size=3,
)


@given(PAGES, st.integers(-10, 3000))
def test_no_report_takes_more_room_than_there_is(pages: list[Page], room: int) -> None:
    """Whatever there is to show, the bytes keep to the room; what fits as a whole is shown whole."""
    text = fitted(pages, room)
    assert len(text.encode()) <= max(room, 0)
    if len(joined(pages).encode()) <= room:
        assert text == joined(pages)


@given(PAGES, st.integers(0, 1000))
def test_what_is_left_out_is_counted_and_less_urgent(pages: list[Page], room: int) -> None:
    """Shown and counted rows are all rows, and no row is shown while a more urgent one of any report is left out."""
    text = fitted(pages, room + sum(len(page.shortened(()).encode()) + 600 for page in pages))
    assume(text != joined(pages))
    assert text.count("more\n|-|") == len(pages)
    counts = {what: sum(int(n) for n in re.findall(rf"(?<=[(\s])(\d+) {what}(?=[,)])", text)) for what in KINDS}
    every = [row.kind for page in pages for row in page.rows]
    shown = [line for line in text.splitlines() if line.startswith("| ") and line not in ("| average |", "| |")]
    assert len(shown) + sum(counts.values()) == len(every)
    first_left_out = next((at for at, what in enumerate(KINDS) if counts[what]), len(KINDS))
    assert all(counts[what] == every.count(what) for what in KINDS[first_left_out + 1 :])


def test_failed_layers_come_first_and_where_all_rows_are_is_said() -> None:
    """Of a thousand layers the one that failed is the first row, and the last line counts the others."""
    rows = [Row("passed", f"| ✓ | layer {i} |") for i in range(1000)]
    rows[700] = Row("failed", "| ✗ | layer 700 |")
    lines = fitted([Page("## nullspace: ft\n\nGated", rows, "| average |")], 2000).splitlines()
    assert lines[:7] == ["## nullspace: ft", "", "Gated", "", "| |", "|---|", "| ✗ | layer 700 |"]
    left = 1000 - sum("| layer " in line for line in lines[:-1])
    assert lines[-1] == (
        f"… and {left} more layers ({left} passed), for which there is no room here: all rows are in the file of "
        "`--nullspace-report=FILE.md`."
    )
    assert 0 < left < 950


def test_titles_and_verdicts_are_shown_where_nothing_else_fits() -> None:
    """Of reports whose heads alone are too large, as many titles and verdicts are shown as fit."""
    page = Page("## nullspace: ft\n\nGated 1 of 1 layers.\n\n" + "x" * 1000, [Row("failed", "| ✗ |")])
    assert fitted([page] * 3, 100) == "## nullspace: ft\n\nGated 1 of 1 layers.\n\n".removesuffix("\n") + (
        "\n## nullspace: ft\n\nGated 1 of 1 layers.\n"
    )
    assert fitted([page], 10) == ""


def test_what_a_row_tells_follows_from_its_verdict() -> None:
    """A layer without a test is told apart, and first where it would have failed."""
    assert [kind(tier) for tier in Tier] == ["passed", "warned", "failed"]
    assert [kind(tier, gated=False) for tier in Tier] == ["not gated", "not gated", "would fail if gated"]
