"""The documents promise nothing that no test holds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["SECURITY.md", "docs/bad-days.md"])
def test_every_test_that_a_document_names_is_there(document: str) -> None:
    """Each file, and each function in it, that SECURITY.md and the table of bad days name exists."""
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / document).read_text("utf-8"))
    assert len(named) > 5
    for file, function in named:
        text = (ROOT / file).read_text("utf-8")
        assert not function or f"def {function}(" in text, f"{document}: {file}::{function}"


def test_every_case_stands_in_the_table() -> None:
    """A hostile case that is tested is told."""
    from tests.hostile.test_refused import REFUSED, STATS

    table = (ROOT / "docs/bad-days.md").read_text("utf-8")
    assert [case for case in (*REFUSED, *STATS) if f"| {case} |" not in table] == []
