"""No file is written twice in one run, and none that is read is replaced: both are refused before anything runs."""

import os
import re
from pathlib import Path

import pytest

from pytest_nullspace.shell import outputs
from tests import saved
from tests.plugin.conftest import Gate, Replay

SAVE, REPORT = "--nullspace-save-stats", "--nullspace-report"
TWICE = {
    "statistics and report": (REPORT, f"{SAVE}=o.md", f"{REPORT}=o.md"),
    "written another way": (REPORT, f"{SAVE}=sub/../o.md", f"{REPORT}=./o.md"),
    "by a link to a file": (REPORT, f"{SAVE}=link.md", f"{REPORT}=there.md"),
    "by a link to a folder": (REPORT, f"{SAVE}=linked/o.md", f"{REPORT}=sub/o.md"),
    "with the model's name": (REPORT, f"{SAVE}={{model}}.md", f"{REPORT}=stats.md"),
    "one report twice": (REPORT, f"{REPORT}=o.md", f"{REPORT}=o.md"),
    "JUnit": ("--junit-xml", f"{SAVE}=o.xml", "--junit-xml=o.xml"),
    "JUnit by a variable": ("--junit-xml", f"{REPORT}=o.md", "--junit-xml=$HERE/o.md"),
    "the log": ("--log-file", f"{SAVE}=o.log", "--log-file=o.log"),
    "the log by ini": ("--log-file", f"{SAVE}=o.log", "-o", "log_file=o.log"),
    "benchmarks": ("--benchmark-json", f"{SAVE}=o.json", "--benchmark-json=o.json"),
    "the job's summary": ("GITHUB_STEP_SUMMARY", f"{SAVE}=summary"),
}
"""What is written by the first option after it, and by the one that stands before."""
REPLACED = {
    "what is gated": ("--nullspace-stats", f"{SAVE}=stats.json"),
    "what is gated, by a link": ("--nullspace-stats", f"{SAVE}=alias.json"),
    "what is gated, by JUnit": ("--nullspace-stats", "--junit-xml=stats.json"),
    "the earlier run": ("--nullspace-compare", f"{SAVE}=there.json", "--nullspace-compare=there.json"),
    "the text": ("--nullspace-calib-dataset", f"{SAVE}=text.txt", "--nullspace-calib-dataset=text.txt"),
}
"""What the first option after it would write, and the one that stands before reads."""


@pytest.mark.parametrize("case", [*TWICE, *REPLACED])
def test_one_file_for_two_is_a_usage_error(
    replay: Replay, pytester: pytest.Pytester, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever two names lead to one file: nothing runs, nothing is written, and both options are named."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary")
    monkeypatch.setenv("HERE", str(pytester.path))
    (pytester.path / "sub").mkdir()
    (pytester.path / "linked").symlink_to("sub")
    (pytester.path / "there.md").write_text("there")
    (pytester.path / "link.md").symlink_to("there.md")
    (pytester.path / "alias.json").symlink_to("stats.json")
    (pytester.path / "text.txt").write_text("a text")
    saved.save(pytester.path / "there.json")
    before = (pytester.path / "stats.json").read_bytes()
    other, *options = (TWICE | REPLACED)[case]
    said = f"is written by {other} as well" if case in TWICE else f"would replace what {other} reads"
    result = replay(*options, apart=True)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {options[0].partition('=')[0]}: {pytester.path}/* {said}; give *"])
    assert (pytester.path / "stats.json").read_bytes() == before
    assert (pytester.path / "there.md").read_text() == "there"
    assert (pytester.path / "text.txt").read_text() == "a text"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_no_file_of_a_model_is_replaced(checkpoint: Path, gate: Gate, name: str) -> None:
    """A file of the checkpoint is refused by its name, by whatever way its folder is reached, and stays as it was."""
    (checkpoint.parent / "alias").symlink_to(checkpoint)
    was = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    result = gate(f"--nullspace-save-stats=runs/alias/{name}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {SAVE}: *{name} would replace what --nullspace-model reads; give *"])
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == was


def test_beside_a_models_files_a_run_may_be_saved_again_and_again(checkpoint: Path, gate: Gate) -> None:
    """The folder of the model may hold what was saved of it, also from a run before."""
    for _ in range(2):
        result = gate("-k", "layers.0.mlp.up_proj", f"{SAVE}=runs/ft/stats.json", f"{REPORT}=runs/ft/report.md")
        assert "statistics saved to" in result.stdout.str()
    assert (checkpoint / "report.md").read_text().startswith("## nullspace")


def test_devices_are_no_files(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is thrown away twice is not one file."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", os.devnull)
    assert replay(f"--log-file={os.devnull}").ret == 0


@pytest.mark.parametrize("quiet", [("-p", "no:terminal"), ("-p", "no:terminal", "-n", "2"), ()])
def test_what_keeps_a_run_from_being_green_is_told_without_a_terminal(
    replay: Replay, pytester: pytest.Pytester, quiet: tuple[str, ...]
) -> None:
    """Where no summary can tell why a run is not green, stderr does, once; where one does, stderr is silent."""
    pytester.mkdir("taken.json")
    result = replay(f"{SAVE}=taken.json", *quiet, apart=True)
    assert result.ret == 1
    told, silent = (result.stderr, result.stdout) if quiet else (result.stdout, result.stderr)
    told.fnmatch_lines(["nullspace: NOT GATED: *taken.json: cannot be written: *"])
    assert told.str().count("NOT GATED") == 1
    assert "NOT GATED" not in silent.str()


MANY = saved.run(*(f"model.layers.{i}.up_proj" for i in range(99, -1, -1)), down_norm=6.0)
"""Of a hundred layers one fails, by its number the last."""


@pytest.mark.parametrize("before", [0, 3000, 9500, 10_000])
def test_the_jobs_summary_keeps_below_what_github_shows(
    replay: Replay, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """With what an earlier run wrote, and of two runs, the summary keeps within its bound, and says so if none fits."""
    assert outputs.MOST_OF_SUMMARY == 2**20
    monkeypatch.setattr(outputs, "MOST_OF_SUMMARY", 10_000)
    for file in ("one.json", "two.json"):
        saved.save(pytester.path / file, MANY)
    summary = pytester.path / "summary"
    summary.write_text("x" * before)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    result = replay("--nullspace-stats=two.json", f"{REPORT}=r.md", stats="one.json")
    assert result.ret == 1
    text, whole = summary.read_text(), (pytester.path / "r.md").read_text()
    assert len(text.encode()) <= 10_000 < len(whole.encode())
    assert text.startswith("x" * before)
    assert text.count("**DO NOT DEPLOY**: 1 of 100 layers ") == (0 if before == 10_000 else 2)
    assert ("so no report is shown there" in result.stdout.str()) is (before == 10_000)
    assert whole.count("\n| ✓") == 2 * 99
    if before == 0:
        assert len(text.encode()) > 8800, "as many rows as fit"
    if before < 9000:
        rows = [line for line in text.splitlines() if line.startswith(("| ✗", "| ✓"))]
        assert [line[:3] for line in rows].count("| ✗") == 2
        assert rows[0].startswith("| ✗ | model.layers.99.up_proj |")
        counted = sum(int(n) for n in re.findall(r"… and (\d+) more layers \(\1 passed\), for which there is no", text))
        assert counted + len(rows) == 200
