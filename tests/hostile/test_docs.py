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


@pytest.mark.parametrize(
    "document", [str(file.relative_to(ROOT)) for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))]
)
def test_every_link_leads_somewhere(document: str) -> None:
    """Each relative link is on one line and names a file of the repository."""
    text = (ROOT / document).read_text("utf-8")
    for link in re.findall(r"\]\(([^)]*)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        file = link.partition("#")[0]
        assert link.startswith("https://") or (ROOT / document).parent.joinpath(file).exists(), f"{document}: {link!r}"
