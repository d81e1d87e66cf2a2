"""The documents promise nothing that no test holds."""

import re
from pathlib import Path

import pytest

from tests import generated

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


def test_the_tables_of_documents_are_those_of_the_code() -> None:
    """What is written by ``python -m tests.generated`` is up to date, and the options are told somewhere."""
    found = generated.documents()
    assert ROOT / "docs" / "options.md" in found
    assert [file.name for file in found if generated.renewed(file.read_text("utf-8")) != file.read_text("utf-8")] == []


def test_every_step_of_contributing_names_what_is_there() -> None:
    """Each file and folder that CONTRIBUTING.md names exists, and each name of code stands in a file beside it."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    steps = re.findall(r"^\d\. (.*(?:\n   .*)*)", text, re.MULTILINE)
    assert len(steps) == 20
    for step in steps:
        quoted = re.findall(r"`([^`]+)`", step)
        files = [ROOT / name for name in quoted if "/" in name]
        assert [file for file in files if not file.exists()] == []
        sources = [file.read_text("utf-8") for file in files if file.is_file()]
        for name in quoted:
            if re.fullmatch(r"[A-Z_]\w+", name) and sources:
                assert any(re.search(rf"\b{name}\b", source) for source in sources), f"{step}: {name}"


@pytest.mark.parametrize(
    "document", [str(file.relative_to(ROOT)) for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))]
)
def test_every_link_leads_somewhere(document: str) -> None:
    """Each relative link is on one line and names a file of the repository."""
    text = (ROOT / document).read_text("utf-8")
    for link in re.findall(r"\]\(([^)]*)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        file = link.partition("#")[0]
        assert link.startswith("https://") or (ROOT / document).parent.joinpath(file).exists(), f"{document}: {link!r}"
