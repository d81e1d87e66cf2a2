"""``--nullspace-explain``: causes and figures, where the plugin is installed and no repository is at hand."""

import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pytest_nullspace.judging import activations, tensors
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.shell.explain import explain

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "causes").glob("*.md"))


def test_every_cause_is_explained_and_every_page_is_of_a_cause() -> None:
    """Each name that a cause can have prints its page, and no page is of another."""
    sources = "".join(inspect.getsource(room) for room in (activations, tensors))
    named = set(re.findall(r'Diagnosis\(\s*"([\w-]+)"', sources))
    assert named == {page.stem for page in PAGES}
    for page in PAGES:
        told, written = explain(page.stem), page.read_text("utf-8")
        assert told.split("```")[1::2] == written.split("```")[1::2]
        assert told.split() == re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", written).split()
        assert max(len(line) for part in told.split("```")[::2] for line in part.splitlines()) <= 80


def test_a_page_is_printed_in_place_of_a_run(pytester: pytest.Pytester) -> None:
    """With a name the page is printed, no test is collected, and the exit code is 0."""
    pytester.makepyfile("def test_own():\n    assert False\n")
    result = pytester.runpytest("--nullspace-explain=b-trained")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["[#] b-trained", "[#][#] How to fix it"])
    result.stdout.no_fnmatch_line("*collected*")


def test_every_figure_is_explained() -> None:
    """Each figure tells its formula, unit, text, bounds with what they mean, and what to do, in 80 columns."""
    for figure in FIGURES.values():
        told = explain(figure.name)
        whole = " ".join(told.split())
        assert told.startswith(f"# {figure.name}\n\n{figure.meaning[:40]}")
        assert max(map(len, told.splitlines())) <= 80
        said = (figure.formula[1:], figure.unit or "a ratio without unit", "Taken on", "It ", figure.cure)
        assert [part for part in said if part not in whole] == []
        assert f"--nullspace-threshold={figure.name}:{figure.trained.passes:g}:{figure.trained.fails:g}" in whole
        for words in (*figure.trained.words, *(figure.init.words if figure.init else ())):
            assert words.partition("{")[0] in whole
        assert len(figure.cure) > 20
    assert "passes > 0.0005 and fails < 0.0002" in " ".join(explain("contribution").split())


def test_without_a_name_every_cause_and_figure_is_listed(pytester: pytest.Pytester) -> None:
    """Without a name each cause and figure begins a line of its own, with a whole sentence in 80 columns."""
    result = pytester.runpytest("--nullspace-explain")
    assert result.ret == 0
    for name in (*(page.stem for page in PAGES), *FIGURES):
        result.stdout.re_match_lines([rf"{name} +\S"])
        assert re.search(rf"(?m)^{name} +\S(.|\n +)*?\.$", result.stdout.str())
    assert max(map(len, result.outlines)) <= 80


def test_a_name_that_is_none_is_a_usage_error(pytester: pytest.Pytester) -> None:
    """An unknown name ends with exit code 4 and the nearest that there are."""
    result = pytester.runpytest("--nullspace-explain=b-traind")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--nullspace-explain: no cause or figure is called 'b-traind'; there is b-trained*"])


def test_the_wheel_brings_the_pages(tmp_path: Path) -> None:
    """A wheel that is built from the repository holds each page where the installed plugin looks for it."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    assert {f"pytest_nullspace/causes/{page.name}" for page in PAGES} <= held
