"""Every planted mistake, really trained or broken, by exit code and cause; the table in the documentation."""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from fixtures import mistakes
from fixtures.mistakes import MISTAKES, RIGHT, Mistake
from pytest_nullspace.judging import activations, tensors

DOCS = Path(mistakes.__file__).parents[1] / "docs"
CAUSES = {
    cause
    for room in (activations, tensors)
    for cause in re.findall(r'Diagnosis\(\s*"([a-z0-9-]+)"', inspect.getsource(room))
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All adapters, made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen") else base) / "mistakes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partly = folder.with_name("mistakes-partly")
            mistakes.build(partly)
            partly.rename(folder)
    return folder


@pytest.mark.parametrize("held", [False, True], ids=["alone", "held"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.adapter)
def test_a_mistake_is_called_by_its_name(made: Path, pytester: pytest.Pytester, mistake: Mistake, held: bool) -> None:
    """The gate's exit code and the causes that it names are those of the table, by figures alone and with the start."""
    pytester.makeini("[pytest]")

    def run(args: Sequence[str]) -> int:
        return int(pytester.runpytest_inprocess("-p", "no:randomly", "-W", "default", "--tb=no", *args).ret)

    assert mistakes.outcome(made, mistake, held, run) == (mistake.held if held else mistake.alone)


def test_no_mistake_goes_unnoticed_and_none_is_seen_in_what_is_right() -> None:
    """With the start each mistake has exactly one cause; alone none has another one's than it may; right ones none."""
    for mistake in MISTAKES:
        right = mistake.adapter in RIGHT
        assert len(mistake.held.causes) == (not right)
        assert len(mistake.alone.causes) <= (not right)
        assert (mistake.held.exit, mistake.alone.exit) == (0, 0) if right else mistake.held.causes


def test_the_page_shows_what_the_test_sees() -> None:
    """``docs/mistakes.md`` is what its command prints."""
    assert (DOCS / "mistakes.md").read_text("utf-8") == mistakes.page()


def test_each_cause_has_its_page() -> None:
    """Each cause that a report can name has a page with all its parts, and no page is of another."""
    pages = {page.stem: page.read_text("utf-8") for page in (DOCS / "causes").glob("*.md")}
    assert set(pages) == CAUSES
    for cause, text in pages.items():
        assert text.startswith(f"# {cause}\n"), cause
        assert f"cause: {cause}: " in text, cause
        for part in ("## What it looks like", "## Why it happens", "## How to fix it", "## What tells it apart"):
            assert part in text, (cause, part)
        for named in re.findall(r"\]\(([a-z0-9-]+)\.md\)", text):
            assert named in CAUSES, (cause, named)
