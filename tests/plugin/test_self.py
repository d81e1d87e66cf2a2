"""The text that the base writes itself, as a user of the gate meets it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fixtures.build import WORLD
from pytest_nullspace.shell.asked import read_settings
from tests import tiny
from tests.adapters import adapter
from tests.plugin.conftest import LOOSE, Gate
from tests.unit.measuring.test_written import oblique

SELF = ("--nullspace-calib-dataset=self", "--nullspace-calib-size=2", "--nullspace-seqlen=32")


@pytest.fixture
def cache(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(pytester.path / "cache"))
    return pytester.path / "cache" / "pytest-nullspace" / "self"


def read(file: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(file.read_text("utf-8"))["text"]
    return told


def test_two_runs_have_the_same_windows(checkpoint: Path, gate: Gate, pytester: pytest.Pytester, cache: Path) -> None:
    """Written once and kept, told in report and saved run; another seed is another text; without the cache it is that
    of the first run again, and the kept file is a text itself."""
    first = gate(*LOOSE, "-v", "--nullspace-save-stats=a.json", "-n", "2", quick=SELF)
    first.assert_outcomes(passed=22)
    first.stdout.fnmatch_lines(["text self: 2 windows, 6? tokens (written by the base in * s); *"])
    again = gate(*LOOSE, "-v", "--nullspace-save-stats=b.json", quick=SELF)
    again.stdout.fnmatch_lines(["text self: 2 windows, 6? tokens (written by the base before); *"])
    one, two = (read(pytester.path / name) for name in ("a.json", "b.json"))
    alike = ("sha256", "starts", "tokens", "windows")
    assert [one[what] for what in alike] == [two[what] for what in alike]
    (kept,) = cache.glob("*.json")
    assert one["written"]["kept"] == str(kept)
    text = f"--nullspace-calib-dataset={kept}"
    gate(*LOOSE, "--nullspace-save-stats=c.json", quick=(text, *SELF[1:])).assert_outcomes(passed=22)
    assert read(pytester.path / "c.json")["sha256"] == one["sha256"]
    shutil.rmtree(cache)
    gate(*LOOSE, "--nullspace-save-stats=d.json", "-k", "layers.0.self", quick=SELF)
    assert read(pytester.path / "d.json")["sha256"] == one["sha256"]
    gate(*LOOSE, "--nullspace-save-stats=e.json", "--nullspace-seed=1", "-k", "layers.0.self", quick=SELF)
    assert read(pytester.path / "e.json")["sha256"] != one["sha256"]
    replayed = pytester.runpytest_subprocess("-p", "no:randomly", "--nullspace-stats=a.json", *LOOSE)
    replayed.assert_outcomes(passed=22)
    replayed.stdout.fnmatch_lines(["*text self*"])


def test_self_alone_stands_beside_the_texts_of_the_ini_file(gate: Gate, pytester: pytest.Pytester) -> None:
    """As the report advises it: what the base writes adds a text; any other on the command line takes their place."""
    (pytester.path / "a.txt").write_text(tiny.TEXT, "utf-8")
    for said, texts in ("", ("a.txt",)), ("self", ("a.txt", "self")):
        pytester.makeini(f"[pytest]\nnullspace_calib_dataset =\n    a.txt\n    {said}\n")
        for given, want in ((), texts), (("self",), ("a.txt", "self")), (("b=a.txt",), ("b",)), (("x=self",), ("x",)):
            options = [f"--nullspace-calib-dataset={text}" for text in given]
            config = pytester.parseconfig("--nullspace-model=ft", *options)
            settings = read_settings(config)
            assert settings is not None
            assert tuple(text.name or text.spec for text in settings.preserved) == want


def test_a_base_that_cannot_be_had_writes_nothing(gate: Gate, pytester: pytest.Pytester, cache: Path) -> None:
    """An adapter that is not its base when off is refused in one sentence, and nothing is kept."""
    tiny.lora_null(pytester.path / "v1", change=oblique)
    result = gate(model="v1", quick=SELF)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*--nullspace-calib-dataset=self: *v1 with its adapter switched off is not its base *"]
    )
    assert not cache.exists()


@pytest.mark.filterwarnings("ignore")
def test_the_base_of_a_peft_adapter_writes(gate: Gate, pytester: pytest.Pytester, cache: Path) -> None:
    """It is the base in its own directory, switched to by leaving the adapter off."""
    adapter(pytester.path, tiny.llama(), r=2, target_modules=["q_proj"])
    result = gate(
        *LOOSE, "-v", "--nullspace-drift", "--nullspace-threshold=divergence:9:9", model="adapter", quick=SELF
    )
    result.stdout.fnmatch_lines(["*drift on the preserved text*", "*the model with its adapter switched off*"])
    assert "internal error" not in result.stdout.str().lower()


def test_the_base_of_the_world_writes_what_it_knows(gate: Gate, cache: Path) -> None:
    """The world's base writes its own facts, and the shipped adapter keeps them as it keeps those of the true text."""
    own = ("--nullspace-calib-dataset=self", "--nullspace-calib-size=4", "--nullspace-seqlen=256")
    task = f"--nullspace-task-dataset={WORLD / 'task.txt'}"
    gate(task, "--nullspace-drift", "-k", "drift", model=str(WORLD / "null-v2"), quick=own).assert_outcomes(passed=1)
    facts = f"--nullspace-calib-dataset={WORLD / 'facts.txt'}"
    both = gate(task, "--nullspace-drift", "-k", "drift", model=str(WORLD / "null-v2"), quick=(facts, *own))
    both.assert_outcomes(passed=2)  # a further text, and named by itself
    both.stdout.fnmatch_lines(["nullspace: text self: self"])
    (kept,) = cache.glob("*.json")
    lines = "\n".join(json.loads(kept.read_text("utf-8"))["text"]).splitlines()
    known = set((WORLD / "facts.txt").read_text("utf-8").splitlines())
    assert sum(line in known for line in lines) > 0.6 * len(lines)
