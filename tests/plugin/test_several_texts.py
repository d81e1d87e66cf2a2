"""Several preserved texts, each with a test and bounds of its own, as a user of the gate meets them."""

import json
import shutil
from pathlib import Path

import pytest

from fixtures import world
from fixtures.build import WORLD
from pytest_nullspace.run.saved import read
from tests.plugin.conftest import LOOSE, Gate

QUICK = ("--nullspace-calib-size=2", "--nullspace-seqlen=32", "--nullspace-drift")
LOUD = (*LOOSE, "--nullspace-threshold=divergence:90:90", "--nullspace-threshold=loss-rise:90:90")
WIKI, CODE = "--nullspace-calib-dataset=wiki=text.txt", "--nullspace-calib-dataset=code=code.txt"
LAYERS = 22
"""Tests of layers and their averages."""


@pytest.fixture
def texts(checkpoint: Path, pytester: pytest.Pytester) -> None:
    """A second text beside the first, of characters that the first does not have."""
    (pytester.path / "code.txt").write_text("{[(0123456789)]};_=+-*/<>\n" * 60)


@pytest.mark.parametrize("apart", [(), ("-n", "2")], ids=["plain", "xdist"])
def test_each_text_has_a_test_and_bounds_of_its_own(
    texts: None, gate: Gate, pytester: pytest.Pytester, apart: tuple[str, ...]
) -> None:
    """A bound that names a text fails its test alone; saved and replayed it is the same, and told in every format."""
    asked = (WIKI, CODE, *QUICK, *LOUD)
    bound = "--nullspace-threshold=code:divergence:0:0"
    result = gate(bound, "--nullspace-save-stats=s.json", "--nullspace-report=r.md", "-v", *apart, quick=asked)
    result.assert_outcomes(passed=LAYERS + 1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "nullspace: runs/ft *; text wiki: text.txt, 2 windows; *",
            "nullspace: text code: code.txt",
            "✓ drift on the preserved text wiki: loss *",
            "✗ drift on the preserved text code: loss *: divergence * > 0, *",
            "changed most on the preserved text wiki:",
            "changed most on the preserved text code:",
            "FAILED runs/ft/config.json::drift?code? - *divergence * > 0*",
        ]
    )
    page = (pytester.path / "r.md").read_text()
    assert "drift on the preserved text code" in page
    assert "<details><summary>Where the predictions changed most</summary>" in page
    document = json.loads((pytester.path / "s.json").read_text())
    assert document["text"]["name"] == "wiki"
    assert document["text[code]"]["given"] == "code.txt"
    assert set(document["stats"][0]["texts"]) == {"code"}
    shutil.rmtree(pytester.path / "runs")
    replayed = pytester.runpytest_subprocess("-p", "no:randomly", "--nullspace-stats=s.json", *LOUD, bound)
    replayed.assert_outcomes(passed=LAYERS + 1, failed=1)
    one = pytester.runpytest_subprocess("--nullspace-stats=s.json", *LOUD, "s.json::drift[wiki]")
    one.assert_outcomes(passed=1)


def test_a_layer_is_judged_by_the_text_on_which_it_is_worst(texts: None, gate: Gate, pytester: pytest.Pytester) -> None:
    """Whatever the order of the texts, each figure of a layer is the larger of the two that each text gives alone."""
    for name, given in (
        ("both", (WIKI, CODE)),
        ("turned", (CODE, WIKI)),
        ("wiki", ("--nullspace-calib-dataset=text.txt",)),
        ("code", ("--nullspace-calib-dataset=code.txt",)),
    ):
        gate(*LOUD[:2], f"--nullspace-save-stats={name}.json", "-k", "not drift", quick=(*given, *QUICK[:2]))

    both, turned, wiki, code = (read(pytester.path / f"{n}.json") for n in ("both", "turned", "wiki", "code"))
    for layers in zip(both.layers, turned.layers, wiki.layers, code.layers, strict=True):
        for figure in ("preservation", "leakage"):
            of_both, of_turned, of_wiki, of_code = (layer.figure(figure) for layer in layers)
            assert of_both == of_turned == pytest.approx(max(of_wiki, of_code), rel=1e-6)
    assert both.mean("leakage") > min(wiki.mean("leakage"), code.mean("leakage"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("text.txt", "code.txt"), "'code.txt' needs a name, as the text after the first does: give it as NAME=TEXT"),
        (("a=text.txt", "a=code.txt"), "two texts have the name a; give each its own"),
        (("drift=text.txt",), "*'drift' cannot be the name of a text: *"),
        (("my text=text.txt",), "*'my text' cannot be the name of a text: that takes up to 40 letters, *"),
        (("a\x1b[31m=text.txt",), "*cannot be the name of a text*"),
        (("wiki=nowhere.txt",), "*nowhere.txt: no such file or folder *"),
        (("wiki=",), "*is empty*"),
    ],
)
def test_names_that_cannot_be_are_a_usage_error(given: tuple[str, ...], said: str, texts: None, gate: Gate) -> None:
    """One sentence says what is wrong with a name, before anything is loaded."""
    result = gate(*(f"--nullspace-calib-dataset={text}" for text in given), quick=QUICK)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --nullspace-calib-dataset*{said}"])
    assert "\x1b" not in result.stderr.str()


def test_a_bound_for_a_text_that_is_not_given_is_a_usage_error(texts: None, gate: Gate) -> None:
    """As is one that names a text for a figure of layers, for which no text has a test."""
    for bound in ("poems:divergence:1:2", "code:leakage:1:2"):
        result = gate(WIKI, CODE, f"--nullspace-threshold={bound}", quick=QUICK)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["ERROR: *would never apply: it matches no test of *"])


def test_a_run_on_other_texts_does_not_compare(texts: None, gate: Gate, pytester: pytest.Pytester) -> None:
    """The further texts are a condition of their own, and a change on one of them is told by its name."""
    gate(WIKI, CODE, *LOUD, "--nullspace-save-stats=s.json", quick=QUICK)
    less = gate(WIKI, *LOUD, "--nullspace-compare=s.json", quick=QUICK)
    assert less.ret != 0
    assert "not comparable: texts (" in less.stdout.str() + less.stderr.str()
    same = gate(WIKI, CODE, *LOUD, "--nullspace-compare=s.json", "-v", quick=QUICK)
    same.assert_outcomes(passed=LAYERS + 2)


def test_hostile_text_is_shown_escaped(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """What a passage quotes holds control characters and directions only by their codes, and no Markdown of its own."""
    (pytester.path / "bad.txt").write_text("\x1b[31m\u202e`<b>|\x07 " * 60, "utf-8")
    result = gate("--nullspace-report=r.md", *LOUD, "-v", quick=("--nullspace-calib-dataset=bad.txt", *QUICK))
    shown, page = result.stdout.str(), (pytester.path / "r.md").read_text("utf-8")
    assert "changed most on the preserved text" in shown
    for text in (shown, page):
        assert not {"\x1b", "\u202e", "\x07"} & set(text)
        assert "\\x1b" in text.replace("\\\\", "\\")
    assert "<b>" not in page


def test_what_was_lost_is_told_where_it_stands(gate: Gate, pytester: pytest.Pytester) -> None:
    """A passage's characters are those of the text, its probabilities those of the two models."""
    facts = world.facts_text()
    gate(
        "-k", "drift", "--nullspace-save-stats=s.json", model=str(WORLD / "null-v2"),
        quick=(f"--nullspace-calib-dataset={WORLD / 'facts.txt'}", "--nullspace-seqlen=256", "--nullspace-calib-size=8",
               "--nullspace-drift"),
    )  # fmt: skip
    passages = json.loads((pytester.path / "s.json").read_text("utf-8"))["drift"]["preserved"]["passages"]
    assert len(passages) == 5
    divergences = [of["divergence"] for of in passages]
    assert divergences == sorted(divergences, reverse=True)
    for of in passages:
        assert facts[of["start"] : of["end"]] == of["token"]
        assert facts[: of["start"]].endswith(of["before"])
        assert of["base"] > of["adapted"]
