"""A run of pytest stated in one piece: what lies in its folder, what is asked, and all that must come of it."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_CLOCK = re.compile(r"\d+(?:\.\d+)?(?= ?s\b)")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")
_FIRST, _LAST = re.compile(r"^=+ test session starts =+$"), re.compile(r"^=+ .* in \S+ =+$")
CLOSE = 0.02
"""How far a figure may lie from the stated one, relative: processors round differently, and reports round further."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        code: The exit code.
        text: All that pytest printed from the first line on which the plugin has a say, times as ``0``.
    """

    code: int
    text: str


@dataclass(frozen=True)
class Example:
    """One run of pytest, in a process and a folder of its own.

    Attributes:
        options: What follows ``pytest`` on the command line.
        copied: What lies in the folder: each name with the file or folder of which it is a copy.
        files: What else lies there: each name with its text.
        columns: How wide the terminal is.
    """

    options: tuple[str, ...]
    copied: Mapping[str, Path] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    columns: int = 80

    def run(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Outcome:
        """What pytest makes of it."""
        for name, of in self.copied.items():
            place = pytester.path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if of.is_dir() else shutil.copy)(of, place)
        for name, text in {"pytest.ini": "[pytest]\n", **self.files}.items():
            (pytester.path / name).write_text(text, "utf-8")
        monkeypatch.setenv("COLUMNS", str(self.columns))
        for name in ("CI", "BUILD_NUMBER"):  # where pytest cuts no line
            monkeypatch.delenv(name, raising=False)
        result = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider", *self.options)
        return Outcome(int(result.ret), _told("\n".join(result.outlines), pytester.path))


def _told(printed: str, folder: Path) -> str:
    """What was printed, without pytest's own header, the folder's name, and what the clock says."""
    lines = [line.rstrip() for line in printed.replace(str(folder), ".").splitlines()]
    own = ("platform ", "rootdir: ", "configfile: ", "plugins: ", "benchmark: ", "cachedir: ", "Using --randomly")
    kept = [line for line in lines if not line.startswith(own) and not _FIRST.match(line)]
    return _CLOCK.sub("0", "\n".join(kept)).strip("\n") + "\n"


def differences(text: str, stated: str) -> list[tuple[str, str]]:
    """The lines of a report that are not the stated ones: other words, or a figure farther off than `CLOSE`."""
    told, wanted = text.splitlines(), _CLOCK.sub("0", stated).splitlines()
    length = max(len(told), len(wanted))
    pairs = zip(told + [""] * (length - len(told)), wanted + [""] * (length - len(wanted)), strict=True)
    return [(line, other) for line, other in pairs if not _alike(line, other)]


def _alike(line: str, stated: str) -> bool:
    if _LAST.match(line) and _LAST.match(stated):  # its rules are as long as the clock leaves room for
        line, stated = line.strip("= "), stated.strip("= ")
    if _NUMBER.sub("#", line) != _NUMBER.sub("#", stated):
        return False
    figures, others = (list(map(float, _NUMBER.findall(of))) for of in (line, stated))
    return all(figure == pytest.approx(other, rel=CLOSE) for figure, other in zip(figures, others, strict=True))
