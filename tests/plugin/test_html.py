"""The page of `--nullspace-report=FILE.html`, as a browser shows it."""

import dataclasses
import html
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pytest_nullspace.judging.baseline import Limit, compare
from pytest_nullspace.judging.candidates import Candidate, candidate
from pytest_nullspace.judging.decision import decide
from pytest_nullspace.judging.invariants import Expectations, Override, Stage
from pytest_nullspace.judging.profiles import Chosen, Profile
from pytest_nullspace.judging.remedy import KEY, Remedy
from pytest_nullspace.report.html import ROWS, Sheet, page, sheet
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.predictions import Passage
from pytest_nullspace.run.stats import Drift, RunStats, Spectrum, TextDrift
from tests import saved
from tests.browser import CHROMIUM, Browser, browser

PASSAGES = (
    Passage(1204, 1208, "The ruler of Karipo is ", "Mara", ". Who", 0.97, 0.0021, "Mara", "Zeta", 6.1),
    Passage(88, None, "Q: <b>2 & 2</b>?\n", "4", "", 0.5, 0.25, "4", "5", 3.2),
    Passage(5, 8, "the ", "end", " of it", 0.02, 0.4, "x", "end", 1.2),
)
LIMITS = (Limit("leakage", 0.2, relative=True),)
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


def sheet_of(run: RunStats, name: str = "ft", earlier: RunStats | None = None, among: int = 0) -> Sheet:
    """Its sheet, beside an ``earlier`` run if there is one."""
    compared = None if earlier is None else compare(run, earlier, LIMITS, Stage.TRAINED)
    return sheet(name, run, HELD, decide(run, HELD), (), compared, among)


def candidate_of(run: RunStats, name: str) -> Candidate:
    """What is told of it beside others."""
    return candidate(name, decide(run, HELD), run, HELD)


def of_several_texts(blocks: int, further: float = 0.2) -> RunStats:
    """A run on three preserved texts, ``facts`` moved by ``further``, with passages and the spectrum of two."""
    whole = run_of(blocks)
    drift = Drift(
        "the base",
        TextDrift(480, 2.0, 2.01, 0.01, 0.001, 0.002, None, (PASSAGES[2],)),
        TextDrift(480, 3.0, 2.5, 0.5, 0.01, 0.02),
        "wiki",
        {
            "facts": TextDrift(480, 2.0, 2.0 + further, further, 0.01, 0.02, None, PASSAGES[:2]),
            "self": TextDrift(480, 2.0, 2.003, 0.03, 0.001, 0.005),
        },
    )
    best = Spectrum(effective_rank=9.5, least_leakage=0.0001, shared=0.5)
    layers = tuple(
        dataclasses.replace(layer, further={"facts": dataclasses.replace(layer, task=None, spectrum=best)})
        for layer in whole.layers
    )
    return dataclasses.replace(whole, layers=layers, drift=drift)


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
        cells = re.findall(r'<path class="f-\w+" d="M[\d.]+ \d+h12v16h-12z"><title>model', text)
        assert len(cells) == len(run.layers) * len(run.expected)


@pytest.mark.parametrize(("runs", "blocks"), [(2, 30), (4, 30), (2, 715)])
def test_a_page_of_several_stays_small(runs: int, blocks: int) -> None:
    """Also with several adapters, each beside an earlier run, the page stays below 1 MB, and shows rows of each."""
    run, earlier = run_of(blocks), of_several_texts(blocks, 0.1)
    among = runs * len(run.layers)
    several = [sheet_of(run, f"ft-{number}", earlier, among) for number in range(runs)]
    text = page(several, [candidate_of(run, f"ft-{number}") for number in range(runs)])
    assert len(text.encode()) < 1_000_000
    assert all(len(of.rows) + of.left == len(run.layers) for of in several)
    assert sum(len(of.rows) for of in several) <= ROWS
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []


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
    """With two adapters a table of both stands first, with verdict, figures, worst layer and the best marked."""
    runs = {"one": of_several_texts(1, 0.2), "two": of_several_texts(1, 0.02)}
    beside = [candidate_of(run, name) for name, run in runs.items()]
    text = page([sheet_of(run, name) for name, run in runs.items()], beside)
    assert "<h1>2 candidates</h1>" in text
    table = html.unescape(text.partition('<table class="rivals">')[2].partition("</table>")[0])
    first, second = table.split("<tr")[2:]
    assert '<a href="#run-1">one</a>' in first
    assert ("✗ DO NOT DEPLOY" in first, "★" in first) == (True, False)
    assert '<a href="#run-2">two</a>' in second
    assert ("⚠ LOOK" in second or "✓ SAFE" in second, "★" in second) == (True, True)
    for row, divergence in ((first, "0.2"), (second, "0.03")):  # of the text on which it moved most
        assert f"<title>divergence {divergence}, " in row
        assert "<title>task-gain 0.5, " in row
        assert "<title>forgetting 0.0667, " in row
        assert "model.layers.0.self_attn" in row
    assert '<section id="run-2"' in text


def test_each_text_has_its_bar_and_its_own_bounds() -> None:
    """The predictions on every text are drawn on one scale, each with its own margin, bounds and earlier place."""
    loose = Override("facts", "divergence", 0.3, 0.4)
    held = dataclasses.replace(HELD, overrides=(loose,))
    run, earlier = of_several_texts(1), of_several_texts(1, 0.1)
    compared = compare(run, earlier, (), Stage.TRAINED)
    group = sheet("ft", run, held, decide(run, held), (), compared).drift[0]
    assert group.figure == "divergence"
    most = 0.4 * 1.15
    told = {bar.label: bar for bar in group.bars}
    assert list(told) == ["preserved text wiki", "preserved text facts", "preserved text self"]
    facts, own = told["preserved text facts"], told["preserved text self"]
    assert (facts.value, facts.bound, facts.tier) == ("0.2 ± 0.02", "pass < 0.3, fail > 0.4", "pass")
    assert own.bound == "pass < 0.05, fail > 0.15"
    for shown, value in (
        (facts.width, 0.2), (facts.low, 0.18), (facts.high, 0.22), (facts.passes, 0.3), (facts.fails, 0.4),
        (facts.before, 0.1), (own.width, 0.03), (own.passes, 0.05),
    ):  # fmt: skip
        assert shown == pytest.approx(100 * value / most, abs=0.01)


def test_what_was_lost_is_quoted() -> None:
    """Each passage has its place, its token marked, both probabilities and what each model holds likeliest."""
    sheet = sheet_of(of_several_texts(1))
    assert [(of.text, of.tier, of.open) for of in sheet.quotes] == [
        ("preserved text facts", "fail", True),
        ("preserved text wiki", "pass", False),
    ]
    text = page([sheet])
    assert '<p class="passage">…The ruler of Karipo is <mark>Mara</mark>. Who…</p>' in text
    assert '<p class="passage">…Q: &lt;b&gt;2 &amp; 2&lt;/b&gt;?\\n<mark>4</mark>…</p>' in text
    for told in ("▼ 462 x less likely</b> · characters 1,204 to 1,208 · divergence 6.1", "from character 88 on"):
        assert told in text
    assert "▲ 20 x as likely" in text
    for probability, width, instead in (("0.97", 97.0, "Mara"), ("0.0021", 0.21, "Zeta")):
        assert f'height="10" width="{width}%"' in text
        assert f"<strong>{probability}</strong> likeliest <code>&#39;{instead}&#39;</code>" in text


def test_a_passage_in_a_row_of_images_is_placed_by_its_row() -> None:
    """Where rows hold images a passage's place is its row, for no file has its characters."""
    whole = of_several_texts(1)
    assert whole.drift is not None
    passage = dataclasses.replace(PASSAGES[1], row="photos/metadata.jsonl: line <2>")
    drift = dataclasses.replace(whole.drift, preserved=dataclasses.replace(whole.drift.preserved, passages=(passage,)))
    sheet = sheet_of(dataclasses.replace(whole, drift=drift))
    assert [one.where for of in sheet.quotes for one in of.quotes][-1] == "photos/metadata.jsonl: line <2>"
    assert "photos/metadata.jsonl: line &lt;2&gt; · divergence 3.2" in page([sheet])


def test_a_value_without_a_margin_says_so() -> None:
    """Of one window there is no margin, which stands beside the value as in the other reports."""
    whole = of_several_texts(1)
    assert whole.drift is not None
    one = dataclasses.replace(whole.drift.preserved, divergence_margin=math.inf)
    bar = sheet_of(dataclasses.replace(whole, drift=dataclasses.replace(whole.drift, preserved=one))).drift[0].bars[0]
    assert bar.value == "0.01 (one window, so no margin)"
    assert bar.low == bar.high == bar.width


def test_the_averages_are_read_by_name() -> None:
    """In words each average has the name that the tables head it by, and no symbol."""
    sheet = sheet_of(run_of(1))
    assert sheet.reading
    for line in sheet.reading:
        assert line.words.partition(" ")[0] in FIGURES
        assert "||" not in line.words
    assert sheet.reading[0].words.startswith("preservation 0.0312 ")


def test_the_profile_calls_the_matrices_as_the_files_do() -> None:
    """Why a profile was chosen names PEFT's lora_A, as every other sentence on the page does."""
    whole = run_of(1)
    of_peft = dataclasses.replace(whole, about={**whole.about, "format": "PEFT LoRA"})
    held = dataclasses.replace(HELD, chosen=Chosen(Profile.NULLSPACE, "the rows of B are orthonormal"))
    facts = sheet("ft", of_peft, held, decide(of_peft, held)).facts
    assert any("(profile nullspace: the rows of lora_A are orthonormal)" in fact for fact in facts)


def test_what_has_no_figure_is_not_said_twice() -> None:
    """The sentence of the verdict tells it; the list below it begins with what else there is."""
    whole = run_of(1)
    part = dataclasses.replace(whole, checkpoint_layers=len(whole.layers) + 1)
    text = page([sheet("ft", part, HELD, decide(part, HELD))])
    box = text.partition('<div class="verdict')[2].partition("</div>")[0]
    assert "NOT GATED" in box
    assert box.count(f"only {len(whole.layers)} of {len(whole.layers) + 1} layers were measured") == 1


def test_what_would_pass_stands_with_the_verdict() -> None:
    """Where a scale that passes was looked for, what to write for it stands in the box of the verdict."""
    run = run_of(1)
    found = Remedy(0.5, "lora_alpha 8 in place of 16", {"divergence": (0.04, 0.01)}, 0.9)
    text = page([sheet_of(dataclasses.replace(run, about={**run.about, KEY: found.to_dict()}))])
    box = text.partition('<div class="verdict')[2].partition("</div>")[0]
    assert "<p><strong>suggestion: lora_alpha 8 in place of 16 would pass: divergence 0.04 ± 0.01" in box


def test_how_quiet_it_could_be_is_told_of_every_text() -> None:
    """Where the spectrum was measured on several texts, each has its row: the medians of its layers, and the lowest."""
    first, second = sheet_of(of_several_texts(3)).stands
    assert (first.text, second.text) == ("preserved text wiki", "preserved text facts")
    assert (second.least, second.shared, second.ranks) == ("0.00213", "50%", "9.5 to 9.5")
    # chance is 3 / 64, the median leakage 0.002 and the best 0.0001
    assert float(second.standing) == pytest.approx((3 / 64 - 0.002) / (3 / 64 - 0.0001), abs=1e-3)
    assert "self_attn" in second.lowest


def test_old_and_new_are_told_for_better_and_worse() -> None:
    """Beside an earlier run each figure that changed has its old and new value, and each layer its shade."""
    run = of_several_texts(3, 0.02)
    earlier = of_several_texts(3, 0.2)
    quieter, louder = (
        dataclasses.replace(earlier.layers[n], mean_leakage=value, further={}) for n, value in ((0, 1e-4), (1, 0.1))
    )
    earlier = dataclasses.replace(earlier, layers=(quieter, louder, *earlier.layers[2:]))
    sheet = sheet_of(run, earlier=earlier)
    told = {(of.figure, of.text): of for of in sheet.since}
    facts = told["divergence", "facts"]
    assert (facts.before, facts.now, facts.share, facts.tier, facts.worse) == ("0.2", "0.02", "-90.0%", "pass", False)
    assert facts.told == "better by 0.18"
    assert ("divergence", "wiki") not in told
    assert "divergence wiki" in sheet.same
    (heat,) = sheet.shifted
    assert heat.counts == {"w3": 1, "b3": 1, "c0": 19}
    rows = {row.name: row.cells[sheet.figures.index("leakage")] for row in sheet.rows}
    assert rows[quieter.name][2:] == ("+900% ✗ worse", "fail")
    assert rows[louder.name][2:] == ("-99% better", "pass")
    assert "= no change: " in page([sheet])


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
    runs = {"ft": of_several_texts(30), "other": of_several_texts(3, 0.02)}
    sheets = [sheet_of(run, name, of_several_texts(30, 0.1)) for name, run in runs.items()]
    file.write_text(page(sheets, [candidate_of(run, name) for name, run in runs.items()]), "utf-8")
    chromium.open(file, width, dark)
    assert chromium.complaints == []
    assert chromium.requests == [file.as_uri()]
    assert chromium.value("document.documentElement.scrollWidth") <= width
    chromium.value("document.querySelectorAll('details').forEach(folded => { folded.open = true; })")
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
  for (const node of document.querySelectorAll("body *:not(svg, svg *, script, main, section, div)")) {
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
    heads: list[str] = chromium.value("[...document.querySelectorAll('table.layers thead th')].map(t => t.textContent)")
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
