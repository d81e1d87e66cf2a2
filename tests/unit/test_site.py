"""The documents as a site: every page is in it, every link holds, and nothing is fetched from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_nullspace.judging.decision import Call
from pytest_nullspace.judging.profiles import Profile
from pytest_nullspace.run.figures import FIGURES
from tests import site

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))


def pages() -> Iterator[str]:
    """The pages that the nav lists."""
    for entry in CONFIG["nav"]:
        for of in entry.values():
            yield from [of] if isinstance(of, str) else [file for page in of for file in page.values()]


def test_the_nav_lists_every_page_once() -> None:
    """Each document is in the site, and each page of the site is a document."""
    listed = list(pages())
    assert len(listed) == len(set(listed))
    there = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}
    assert set(listed) == there | {page for file, page in site.PAGES.items() if file.endswith(".md")}
    assert [page for page in listed if not (ROOT / site.source(page)).is_file()] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as MkDocs builds it, with every warning an error."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install -c constraints.txt '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_can_be_searched(built: Path) -> None:
    """A strict build, in which no link or anchor is broken, has each page, its Markdown, and an index to search."""
    for page in pages():
        folder = built / page.removesuffix(".md") if page != "index.md" else built
        assert (folder / "index.html").is_file(), page
        assert (built / page).read_text("utf-8").startswith("# "), page
    index = (built / "search" / "search_index.json").read_text("utf-8")
    assert "leakage" in index
    assert not (built / "prediction.json").exists()


def test_nothing_is_fetched_from_elsewhere(built: Path) -> None:
    """No page loads a script, style, font or picture from another host."""
    loads = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="?(?:https?:)?//|<link\b[^>]*href="?(?:https?:)?//')
    for file in built.rglob("*.html"):
        assert loads.findall(file.read_text("utf-8")) == [], file
    for file in built.rglob("*.css"):
        assert re.findall(r"url\(['\"]?(?:https?:)?//", file.read_text("utf-8")) == [], file


def test_llms_txt_names_every_page_with_what_it_says(built: Path) -> None:
    """Title, summary, sections, and a link to the Markdown of each page, which is there."""
    text = (built / "llms.txt").read_text("utf-8")
    assert text.startswith(f"# pytest-nullspace\n\n> {CONFIG['site_description']}\n\n## ")
    links = re.findall(r"^- \[([^\]]+)\]\(([^)]+)\): (\S.{9,})$", text, re.MULTILINE)
    assert [file for _, file, _ in links] == list(pages())
    assert [file for _, file, _ in links if not (built / file).is_file()] == []
    told: Mapping[str, str] = {file: sentence for _, file, sentence in links}
    assert told["causes/b-trained.md"] == "In LoRA-Null-v2 B holds the null space and must stay as it was."


def test_links_of_the_repository_become_those_of_the_site() -> None:
    """A file that is a page is linked as such, another one is told as text, and code is left alone."""
    assert site.linked("[a](../../README.md) [b](../cost.md)", "causes/x.md") == "[a](../index.md) [b](../cost.md)"
    assert site.linked("[a](../README.md#in-ci)", "ci.md") == "[a](index.md#in-ci)"
    assert site.linked("![p](docs/report.png) [c](docs/causes)", "index.md") == "![p](report.png) [c](symptoms.md)"
    assert site.linked("[`y`](ci/gitlab.yml)\n```text\n[y](ci/gitlab.yml)\n```\n", "index.md") == (
        "`y`\n```text\n[y](ci/gitlab.yml)\n```\n"
    )
    assert site.linked("[x](https://a.b/c) [d](prediction.json)", "prediction.md") == "[x](https://a.b/c) d"


def test_the_glossary_has_every_word_of_a_report() -> None:
    """Each figure, verdict and profile, and each kind of test, has an entry or stands in that of its kind."""
    text = (DOCS / "glossary.md").read_text("utf-8")
    headings = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert headings >= {*FIGURES, *map(str, Call), "model", "frozen", "scope", "drift", "margin", "in-sample"}
    assert [str(profile) for profile in Profile if f"`{profile}`" not in text] == []


def test_symptoms_lead_to_every_cause_and_each_verdict_to_what_to_do() -> None:
    """No cause is without a symptom, and no verdict without a table."""
    symptoms = (DOCS / "symptoms.md").read_text("utf-8")
    causes = {file.stem for file in (DOCS / "causes").glob("*.md")}
    assert causes == set(re.findall(r"\(causes/([\w-]+)\.md\)", symptoms))
    decisions = (DOCS / "what-to-do.md").read_text("utf-8")
    assert [call for call in Call if f"\n## {call}\n" not in decisions] == []


def test_the_report_that_is_explained_is_the_one_that_was_printed() -> None:
    """The walk-through shows the report of the ten minutes, which a test runs."""
    (shown,) = re.findall(r"```text\n(.*?)```", (DOCS / "report.md").read_text("utf-8"), re.DOTALL)
    assert f"```text\n{shown}```" in (DOCS / "ten-minutes.md").read_text("utf-8")
