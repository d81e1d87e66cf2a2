"""Every command that a document shows is run as it stands, in a folder that has the files which it names."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.build import WORLD

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    file.relative_to(ROOT).as_posix() for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if file.is_file()
)
BLOCK = re.compile(
    r"(?:<!-- (?P<remark>[^\n]*?) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
LESS = {"--nproc-per-node=8": "--nproc-per-node=2"}
"""What a document asks of a large machine, and a small one does instead."""


def blocks(document: str) -> Iterator[tuple[str, str, str]]:
    """Each block of code in a document: the remark above it, its kind and its text; what is only printed left out."""
    for match in BLOCK.finditer((ROOT / document).read_text("utf-8")):
        if match["kind"] != "text":
            yield match["remark"] or "", match["kind"], match["code"]


def commands(code: str) -> Iterator[list[str]]:
    """The calls of pytest in a block of shell, without what installs."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = [LESS.get(word, word) for word in shlex.split(command, comments=True)]
            if not words or words[0] == "pip" or words[0].endswith(("/pip", "python3")):
                continue
            if words[0].endswith("pytest"):
                yield [sys.executable, "-m", "pytest", *words[1:]]
            elif words[0] == "torchrun":
                yield [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            else:
                yield words


def run_by_a_test(remark: str) -> bool:
    """Whether the remark names a test that is there, or says why nothing runs it and what it prints."""
    if named := re.fullmatch(r"run by (tests/[\w/]+\.py)::(\w+)", remark):
        return f"def {named[2]}(" in (ROOT / named[1]).read_text("utf-8")
    return remark == "test command" or re.fullmatch(r"not run: .+; prints .+", remark) is not None


RUN = [
    pytest.param(document, code, id=f"{document}-{number}")
    for document in DOCUMENTS
    for number, (remark, kind, code) in enumerate(blocks(document))
    if kind == "sh" and not remark
]


@pytest.fixture
def place(pytester: pytest.Pytester) -> Path:
    """A folder with the files that documents name: a trained adapter, its start, both texts, and the fixtures."""
    for name, of in (("runs/ft", "null-v2"), ("runs/init", "null-v2-init")):
        shutil.copytree(WORLD / of, pytester.path / name)
    for name, of in (("preserved.txt", "facts.txt"), ("task.txt", "task.txt")):
        shutil.copy(WORLD / of, pytester.path / name)
    (pytester.path / "fixtures").symlink_to(ROOT / "fixtures")
    (pytester.path / "pytest.ini").write_text(
        "[pytest]\nnullspace_calib_dataset = preserved.txt\nnullspace_seqlen = 256\nnullspace_calib_size = 4\n"
    )
    return pytester.path


@pytest.mark.parametrize(("document", "code"), RUN)
def test_every_command_of_a_document_runs(document: str, code: str, place: Path, pytester: pytest.Pytester) -> None:
    """Each command line ends with exit code 0 where the files that it names are there."""
    for command in commands(code):
        result = pytester.run(*command)
        assert result.ret == 0, (document, command, result.outlines, result.errlines)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_no_test_runs_says_why(document: str) -> None:
    """A block that is not run as it stands names the test that runs it, or says why not and what it prints."""
    with_remark = [(remark, code) for remark, kind, code in blocks(document) if kind != "sh" or remark]
    assert [code for remark, code in with_remark if not run_by_a_test(remark)] == []


def test_the_ini_file_of_the_document_gates(place: Path, pytester: pytest.Pytester) -> None:
    """The pytest.ini of docs/ci.md gates the adapter beside it, thresholds and all, with no option given."""
    (ini,) = (code for _, kind, code in blocks("docs/ci.md") if kind == "ini")
    (place / "pytest.ini").write_text(f"{ini}nullspace_model = runs/ft\nnullspace_seqlen = 256\n")
    result = pytester.runpytest_subprocess("runs/ft")
    assert result.ret == 0, result.outlines
    result.stdout.fnmatch_lines(["*task text *task.txt*", "gated 21 of 21 layers: *"])


@pytest.mark.usefixtures("place")
def test_the_tests_of_the_document_run(pytester: pytest.Pytester) -> None:
    """The tests of docs/your-tests.md, copied as they are, run beside the gate and pass on the shipped adapter."""
    (code,) = (code for _, kind, code in blocks("docs/your-tests.md") if kind == "python")
    pytester.makepyfile(test_own=code)
    result = pytester.runpytest_subprocess("--nullspace-model=runs/ft", "--nullspace-task-dataset=task.txt")
    assert result.ret == 0, result.outlines
    result.assert_outcomes(passed=21 + 1 + 23)
