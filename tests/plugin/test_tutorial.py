"""The ten minutes of the documents, from the first command to the last."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from fixtures.build import WORLD
from tests.plugin.test_documents import blocks

ROOT = Path(__file__).parents[2]
PAGE = "docs/ten-minutes.md"
ROUGHLY = 0.25
"""How far a figure may lie from the stated one, relative: another processor trains another adapter."""
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def compared(report: str) -> list[tuple[str, list[float]]]:
    """The lines of a report down to what it was judged by, each without its numbers, and these."""
    start, end = report.index("verdict: "), report.index("\nprofile ")
    lines = [line for line in report[start:end].splitlines() if "loaded in" not in line]
    figures = [_NUMBER.findall(line.partition(": ")[0]) for line in lines]
    return [
        (_NUMBER.sub("#", line), [float(number.replace(",", "")) for number in numbers])
        for line, numbers in zip(lines, figures, strict=True)
    ]


def test_the_ten_minutes_go_as_they_are_told(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, a red gate, the mended scale and a green gate, with the figures and the words that the page shows."""
    shutil.copytree(WORLD / "base", pytester.path / "base")
    for name, of in (("preserved.txt", "facts.txt"), ("task.txt", "task.txt")):
        shutil.copy(WORLD / of, pytester.path / name)
    monkeypatch.setenv("COLUMNS", "80")
    run = [(kind, code) for remark, kind, code in blocks(PAGE) if remark.startswith("run by ")]
    stated = re.findall(r"```text\n(.*?)```", (ROOT / PAGE).read_text("utf-8"), re.DOTALL)
    assert [kind for kind, _ in run] == ["python", "sh", "sh", "sh", "sh"]
    (pytester.path / "train.py").write_text(run[0][1])
    results = []
    for _, code in run[1:]:
        words = shlex.split(code.replace("\\\n", " "))
        if words[0] == "python":
            words[0] = sys.executable
        elif words[0] == "pytest":
            words[:1] = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider"]
        results.append(pytester.run(*words))
    trained, red, mended, green = results
    assert (trained.ret, red.ret, mended.ret, green.ret) == (0, 1, 0, 0)
    assert [line.partition(":")[0] for line in trained.outlines] == [f"step {step}" for step in (0, 20, 40)]
    for result, report in ((red, stated[1]), (green, stated[2])):
        told, wanted = compared("\n".join(result.outlines)), compared(report)
        assert [line for line, _ in told] == [line for line, _ in wanted]
        for (line, figures), (_, others) in zip(told, wanted, strict=True):
            assert figures[:1] == pytest.approx(others[:1], rel=ROUGHLY), line
    red.stdout.fnmatch_lines(["suggestion: lora_alpha * in place of 16 would pass: *"])
    green.stdout.fnmatch_lines(["nullspace: card: the result stands in runs/ft/README.md"])
    assert (pytester.path / "gate.html").is_file()
