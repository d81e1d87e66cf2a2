"""The gate called from Python."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fixtures.build import WORLD
from pytest_nullspace import OptionError, TextError, gate
from tests import tiny
from tests.plugin.test_html import Balanced

QUICK: dict[str, Any] = {"seqlen": 128, "calib_size": 4}


def test_a_call_says_what_the_command_says(pytester: pytest.Pytester) -> None:
    """Verdict, figures and drift of `gate()` are those that a run of pytest saves, to the last digit but rounding."""
    report = gate(WORLD / "null-v2", WORLD / "facts.txt", WORLD / "task.txt", **QUICK)
    pytester.runpytest(
        f"--nullspace-model={WORLD / 'null-v2'}", f"--nullspace-calib-dataset={WORLD / 'facts.txt'}",
        f"--nullspace-task-dataset={WORLD / 'task.txt'}", "--nullspace-seqlen=128", "--nullspace-calib-size=4",
        "--nullspace-save-stats=s.json", "-p", "no:cacheprovider",
    )  # fmt: skip
    saved = json.loads((pytester.path / "s.json").read_text("utf-8"))
    assert report.verdict == saved["verdict"]["verdict"]
    assert str(report) == f"{report.verdict}: {saved['verdict']['sentence']}"
    rows = report.layers
    assert [row["layer"] for row in rows] == [entry["layer_name"] for entry in saved["stats"]]
    for row, entry in zip(rows, saved["stats"], strict=True):
        assert math.isclose(row["leakage"], entry["leakage_over_chance"], rel_tol=1e-6)
        assert math.isclose(row["preservation"], entry["BX_ratio"], rel_tol=1e-6)
    report.save(pytester.path / "again.json")
    again = json.loads((pytester.path / "again.json").read_text("utf-8"))
    assert again["verdict"]["verdict"] == report.verdict
    parser = Balanced()
    parser.feed(report.html())
    assert parser.open == []
    assert report._repr_html_().startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    assert report.verdict in report.markdown()


def test_a_call_takes_the_options_of_the_command() -> None:
    """Bounds, profile and switches work by their names; a red gate gives a report and no exception."""
    report = gate(
        WORLD / "null-v2", WORLD / "facts.txt", **QUICK, threshold=["leakage:0.000001:0.000002"], drift=False,
        profile="nullspace",
    )  # fmt: skip
    assert report.verdict == "DO NOT DEPLOY"
    assert report.run.drift is None
    assert {row["tier"] for row in report.layers} == {"fail"}
    assert all(row["why"].startswith("leakage") for row in report.layers)


def test_windows_in_which_no_token_is_predicted_tell_no_drift(tmp_path: Path) -> None:
    """Of one token a window no loss is taken, which is no number; who demands it is told what to do."""
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    directory = tiny.lora_null(tmp_path / "ft")
    report = gate(directory, tmp_path / "text.txt", seqlen=1, calib_size=4)
    assert report.run.drift is None
    assert "broken" not in str(report)
    with pytest.raises(TextError, match=r"text\.txt: none of its windows holds a token that is predicted"):
        gate(directory, tmp_path / "text.txt", seqlen=1, calib_size=4, drift=True)


def test_a_report_tells_what_the_command_tells_below_the_figures(tmp_path: Path) -> None:
    """Its page and its Markdown hold the lines of merges, servers and the start, and what it saves the servers."""
    report = gate(
        WORLD / "null-v2", WORLD / "facts.txt", **QUICK, merge=["bf16,fp16", "fp8"], serve="sglang", drift=False,
        init=WORLD / "null-v2-init",
    )  # fmt: skip
    page, text = report.html(), report.markdown().replace("\\", "")
    for said in ("merge[bf16]: ", "merge[fp16]: ", "merge[fp8]: ", "serve[sglang]: ", "null-v2-init"):
        assert said in page
        assert said in text
    report.save(tmp_path / "s.json")
    saved = json.loads((tmp_path / "s.json").read_text("utf-8"))
    assert [told["server"] for told in saved["servers"]] == ["sglang"]
    assert saved["gated_layers"] == len(report.layers)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calib": 3}, "gate: takes no option 'calib'"),
        ({"windows": 3}, "gate: takes no option 'windows' (did you mean calib_size?); see docs/options.md"),
        ({"html": "r.html"}, "gate: takes no option 'html'; see docs/options.md"),
        ({"calib_sise": 3}, "gate: takes no option 'calib_sise' (did you mean calib_size?); see docs/options.md"),
        ({"report": "r.md"}, "gate: takes no option 'report'; see docs/options.md"),
        ({"calib_size": "many"}, "calib_size: "),
        ({"profile": "strict"}, "profile: "),
    ],
)
def test_a_call_refuses_what_the_command_refuses(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    """A name that is no option, or a value that it does not take, is one error that names it."""
    with pytest.raises(OptionError, match=f"^{re.escape(said)}"):
        gate(tmp_path, **options)


def test_the_readme_shows_a_call_that_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """README's call prints the verdict on the shipped adapter."""
    root = WORLD.parents[1]
    readme = (root / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(from pytest_nullspace import gate\n.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(root)
    exec(compile(code, "README.md", "exec"), {})
    assert re.match(r"(SAFE|LOOK): \w", capsys.readouterr().out)
