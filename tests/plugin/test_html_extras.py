"""What pytest-html's own report shows of the gate, where that plugin writes one."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import saved

RUN = ("--nullspace-stats=stats.json", "--html=all.html", "-p", "no:cacheprovider", "-p", "no:randomly")


def told_by(file: Path) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The text of pytest-html's report, and the extras of each of its tests."""
    text = file.read_text("utf-8")
    (blob,) = re.findall(r'data-jsonblob="([^"]*)"', text)
    tests = json.loads(html.unescape(blob))["tests"]
    return text, {name.rpartition("::")[2]: [*of[0]["extras"]] for name, of in tests.items()}


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "two workers"])
def test_each_test_of_the_gate_has_its_figures(pytester: pytest.Pytester, workers: tuple[str, ...]) -> None:
    """Beside each test stand its tier and figures and a link to the page, the verdict first; a user's has none."""
    saved.save(pytester.path / "stats.json", saved.run(mean_leakage=0.9))
    pytester.makepyfile(test_own="def test_own():\n    assert True\n")
    result = pytester.runpytest_inprocess(*RUN, "--nullspace-report=deep/page r.html", ".", *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    text, extras = told_by(pytester.path / "all.html")
    assert set(extras) == {*saved.NAMES, "model", "test_own"}
    assert extras["test_own"] == []
    for name in (*saved.NAMES, "model"):
        table, link = extras[name]
        assert table["format_type"] == "html"
        assert "<tr><td>preservation</td><td>0.03125</td><td>" in table["content"]
        assert "mean ‖BX‖ / mean ‖X‖" in table["content"]
        assert (link["format_type"], link["content"]) == ("url", "deep/page%20r.html")
    assert "<td>✗ fail</td>" in extras[saved.NAMES[0]][0]["content"]
    assert "<td>✓ pass</td>" in extras[saved.NAMES[1]][0]["content"]
    assert "<strong>verdict: ✗ DO NOT DEPLOY: " in text
    assert '<a href="deep/page%20r.html">nullspace report</a>' in text


def test_without_a_page_there_is_no_link(pytester: pytest.Pytester) -> None:
    """Where no page is written the extras hold the figures alone."""
    saved.save(pytester.path / "stats.json")
    pytester.runpytest_inprocess(*RUN)
    _, extras = told_by(pytester.path / "all.html")
    assert [extra["format_type"] for extra in extras[saved.NAMES[0]]] == ["html"]


def test_without_pytest_html_nothing_is_asked_of_it(pytester: pytest.Pytester) -> None:
    """With that plugin blocked, and with it where it writes nothing, the gate runs as ever."""
    saved.save(pytester.path / "stats.json")
    for off in (("-p", "no:html", "-p", "no:html_fixtures"), ()):
        result = pytester.runpytest("--nullspace-stats=stats.json", "-p", "no:cacheprovider", *off)
        result.assert_outcomes(passed=len(saved.NAMES) + 1)
