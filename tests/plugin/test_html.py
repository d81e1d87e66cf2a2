"""The page of `--nullspace-report=FILE.html`, as a browser shows it."""

import dataclasses
import html
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pytest_nullspace.judging.decision import decide
from pytest_nullspace.judging.invariants import Expectations
from pytest_nullspace.judging.profiles import Chosen, Profile
from pytest_nullspace.report.html import ROWS, Sheet, page, sheet
from pytest_nullspace.run.stats import RunStats
from tests import saved
from tests.browser import CHROMIUM, Browser, browser

HELD = Expectations(chosen=Chosen(Profile.NULLSPACE, "a LoRA-Null directory"), drift_judged=True)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def run_of(blocks: int) -> RunStats:
    """A run with so many blocks, of which every seventh has a layer that fails, and one of which nothing is known."""
    whole = saved.full()
    first = whole.layers[0]
    layers = [
        dataclasses.replace(
            first,
            name=f"model.layers.{block}.self_attn.{projection}",
            mean_leakage=0.9 if block % 7 == 3 and projection == "o_proj" else 0.001 * (1 + block % 5),
        )
        for block in range(blocks)
        for projection in PROJECTIONS
    ]
    return dataclasses.replace(whole, layers=tuple(layers), checkpoint_layers=len(layers))


def sheet_of(run: RunStats, name: str = "ft") -> Sheet:
    """Its sheet."""
    return sheet(name, run, HELD, decide(run, HELD))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for the tests of this module."""
    with browser() as shown:
        yield shown


class Balanced(HTMLParser):
    """Holds that every element ends where it must."""

    VOID = ("meta", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """An element begins."""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """It ends."""
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """It is empty."""


@pytest.mark.parametrize("blocks", [3, 30, 1429])
def test_a_page_stays_small_and_whole(blocks: int) -> None:
    """At 21, 210 and 10,003 layers a page is well formed, below 1 MB, and has every layer in its charts or table."""
    run = run_of(blocks)
    text = page([sheet_of(run)])
    assert len(text.encode()) < 1_000_000
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert text.count("<tr><td class=") == min(len(run.layers), ROWS)
    assert (f"and {len(run.layers) - ROWS} more layers" in text) is (len(run.layers) > ROWS)
    if blocks == 30:
        assert len(re.findall(r'<rect class="cell f-\w+" x="[\d.]+"', text)) == len(run.layers) * len(run.expected)


def test_hostile_names_are_shown_and_not_obeyed() -> None:
    """Markup, quotes and control characters in names and paths are text of the page, and nothing else."""
    evil = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e\x1b[31m"
    run = run_of(1)
    layer = dataclasses.replace(run.layers[0], name=f"model.layers.0.{evil}")
    run = dataclasses.replace(run, model_path=evil, calib_dataset=evil, layers=(layer,), checkpoint_layers=1)
    text = page([sheet_of(run, evil)])
    assert text.count("<script>") == 1
    assert "<img" not in text
    assert html.escape("<img src=x onerror=alert(2)>") in text
    assert not {"\u202e", "\x1b"} & set(text)


def test_several_candidates_stand_side_by_side() -> None:
    """With two adapters a table of both stands first, each with its verdict and a link to its part."""
    text = page([sheet_of(run_of(1), "one"), sheet_of(run_of(4), "two")])
    assert "<h1>2 candidates</h1>" in text
    for number, name in enumerate(("one", "two"), 1):
        assert f'<a href="#run-{number}">{name}</a>' in text
        assert f'<section id="run-{number}"' in text


def test_the_gate_writes_it(pytester: pytest.Pytester) -> None:
    """`--nullspace-report=r.html` writes the page with the verdict of the run; another suffix is a usage error."""
    saved.save(pytester.path / "stats.json", saved.run())
    pytester.runpytest("--nullspace-stats=stats.json", "--nullspace-report=r.html", "-p", "no:cacheprovider")
    text = (pytester.path / "r.html").read_text("utf-8")
    assert re.search(r'<p class="call \w+">. (SAFE|LOOK|DO NOT DEPLOY|NOT GATED)</p>', text)
    assert "stats" in text
    refused = pytester.runpytest("--nullspace-stats=stats.json", "--nullspace-report=r.pdf")
    assert refused.ret == 4
    told = "takes a file that ends in .md, .html, .prom or .sarif, not 'r.pdf'"
    refused.stderr.fnmatch_lines([f"*--nullspace-report: {told}*"])


@needs_browser
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_without_a_word_or_a_request(
    tmp_path: Path, chromium: Browser, width: int, dark: bool
) -> None:
    """No console message, no request but for the file, no wider than the window, and text that stands out (WCAG AA)."""
    file = tmp_path / "r.html"
    file.write_text(page([sheet_of(run_of(30)), sheet_of(run_of(3), "other")]), "utf-8")
    chromium.open(file, width, dark)
    assert chromium.complaints == []
    assert chromium.requests == [file.as_uri()]
    assert chromium.value("document.documentElement.scrollWidth") <= width
    contrasts = chromium.value(CONTRAST)
    assert contrasts
    assert min(contrasts.values()) >= 4.5, contrasts


CONTRAST = """
(() => {
  const light = (rgb) => {
    const [r, g, b] = rgb.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = {};
  for (const node of document.querySelectorAll("p, li, b, td, th, h1, h2, dt, dd, figcaption, code")) {
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    const key = node.tagName + "." + node.className;
    found[key] = Math.min(found[key] ?? 99, (a + 0.05) / (b + 0.05));
  }
  return found;
})()
"""


@needs_browser
def test_a_table_is_sorted_and_filtered_in_the_browser(tmp_path: Path, chromium: Browser) -> None:
    """A click on a head sorts by its numbers, a second one the other way; the filter hides what does not match."""
    file = tmp_path / "r.html"
    file.write_text(page([sheet_of(run_of(30))]), "utf-8")
    chromium.open(file)
    heads: list[str] = chromium.value("[...document.querySelectorAll('th')].map(t => t.textContent)")
    column = heads.index("leakage")
    cells = f"[...document.querySelectorAll('table.layers tbody tr')].map(r => r.cells[{column}].textContent)"
    shown = f"{cells}.map(t => parseFloat(t.replace(/[^0-9.e-]/g, '')))"
    click = f"document.querySelectorAll('table.layers th')[{column}].querySelector('button').click()"
    chromium.value(click)
    descending = chromium.value(shown)
    assert descending == sorted(descending, reverse=True)
    assert descending[0] > descending[-1]
    chromium.value(click)
    assert chromium.value(shown) == sorted(descending)
    chromium.value(
        "(() => { const box = document.querySelector('input'); box.value = 'layers.7.';"
        " box.dispatchEvent(new Event('input')); })()"
    )
    left = "[...document.querySelectorAll('table.layers tbody tr')].filter(r => !r.hidden).length"
    assert chromium.value(left) == len(PROJECTIONS)
    assert chromium.complaints == []
