"""The import rules: which part of the plugin may know of which, and what importing it costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pytest_nullspace

PACKAGE = Path(pytest_nullspace.__file__).parent
ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "pyarrow", "safetensors")
LIGHT = (
    "pytest_nullspace",
    "pytest_nullspace.errors",
    "pytest_nullspace.plugin",
    "pytest_nullspace.shell.options",
    "pytest_nullspace.shell.fixtures",
    "pytest_nullspace.checkpoint",
    "pytest_nullspace.run.stats",
    "pytest_nullspace.run.saved",
    "pytest_nullspace.judging.invariants",
    "pytest_nullspace.judging.audit",
    "pytest_nullspace.judging.baseline",
    "pytest_nullspace.judging.diagnosis",
    "pytest_nullspace.judging.start",
    "pytest_nullspace.judging.weights",
    "pytest_nullspace.measuring.distributed",
    "pytest_nullspace.measuring.loading",
    "pytest_nullspace.measuring.pipeline",
    "pytest_nullspace.report.weights",
    "pytest_nullspace.report.terminal",
    "pytest_nullspace.report.markdown",
    "pytest_nullspace.shell.collect",
    "pytest_nullspace.shell.gate",
    "pytest_nullspace.shell.runs",
)
SHELL = {"options", "session", "collect", "gate", "plugin", "fixtures", "progress"}
CORE = {"checkpoint", "stats", "saved", "invariants", "audit", "baseline", "diagnosis", "start", "weights"}
MAY_KNOW_PYTEST = {"plugin", "gate", "collect", "fixtures", "progress"}


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after ``statement``."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def sources() -> dict[str, Path]:
    """Every module of the package by its name within it, such as ``report.terminal``."""
    names = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = file
    return names


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(file: Path, *, deferred: bool = True, for_types: bool = False) -> set[str]:
    """The full names of the modules that ``file`` imports.

    Args:
        file: The source.
        deferred: Also those imported inside functions.
        for_types: Also those under ``if TYPE_CHECKING``.
    """
    found: set[str] = set()

    def visit(nodes: Iterator[ast.AST] | list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                module = node.module or ""
                found.add(module)
                if module == "pytest_nullspace" or (PACKAGE.parent / module.replace(".", "/")).is_dir():
                    found.update(f"{module}.{alias.name}" for alias in node.names)
            elif is_type_checking(node) and not for_types:
                assert isinstance(node, ast.If)
                visit(node.orelse)
            elif deferred or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(ast.iter_child_nodes(node))

    visit(ast.parse(file.read_text("utf-8")).body)
    return found


def rooms(names: set[str]) -> set[str]:
    """Of imported modules, the parts of this package that they belong to."""
    return {name.split(".")[1] for name in names if name.startswith("pytest_nullspace.")}


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    """A run of pytest that gates nothing, and collection alone, never pay for torch or what comes with it."""
    assert loaded_by(f"import {module}").isdisjoint(HEAVY)


def test_asking_for_a_light_public_name_loads_nothing_heavy() -> None:
    """The public names are resolved one by one: those that need no torch do not bring it."""
    light = "open_checkpoint, LayerStats, RunStats, Expectations, Threshold, judge, CheckpointError"
    assert loaded_by(f"from pytest_nullspace import {light}").isdisjoint(HEAVY)


def test_every_public_name_is_there() -> None:
    """Each name in ``__all__`` leads to an object, ``dir`` lists it, and no other name does."""
    for name in pytest_nullspace.__all__:
        assert getattr(pytest_nullspace, name) is not None
        assert name in dir(pytest_nullspace)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pytest_nullspace.nothing


def test_the_plugin_brings_nothing_but_its_options() -> None:
    """What pytest loads in every run, gated or not, is four small modules of ours, and none that pytest had not."""
    code = (
        "import sys, pytest\nbefore = set(sys.modules)\nimport pytest_nullspace.plugin\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "pytest_nullspace",
        *(f"pytest_nullspace.{room}" for room in ("errors", "fixtures", "options", "plugin")),
    ]


@pytest.mark.parametrize("name", [n for n in sources() if n.split(".")[0] in CORE])
def test_the_core_knows_neither_the_shell_nor_the_model(name: str) -> None:
    """What lies on disk, statistics and invariants know nothing of options, pytest, or tensors."""
    assert rooms(imports(sources()[name], for_types=True)).isdisjoint(
        SHELL | {"drift", "measure", "model", "kernels", "report"}
    )


@pytest.mark.parametrize("name", [n for n in sources() if n.split(".")[0] == "report"])
def test_reports_are_made_from_statistics_alone(name: str) -> None:
    """A report imports neither the shell nor anything that measures; for its types it may name options."""
    assert rooms(imports(sources()[name])).isdisjoint(SHELL | {"drift", "measure", "model", "kernels"})
    assert rooms(imports(sources()[name], for_types=True)).isdisjoint(
        (SHELL | {"drift", "measure", "model", "kernels"}) - {"options"}
    )


def test_every_room_imports_what_architecture_says() -> None:
    """The map's table names every room once, and for each all that it imports and nothing else; it has no circle."""
    rows = re.findall(r"^\| `(\w+)/?` \| .* \| (.*) \|$", (ROOT / "ARCHITECTURE.md").read_text("utf-8"), re.MULTILINE)
    told = {room: set(re.findall(r"`(\w+)`", may)) for room, may in rows}
    found: dict[str, set[str]] = {}
    for name, file in sources().items():
        room = name.split(".")[0]
        if room:
            found.setdefault(room, set()).update(rooms(imports(file)) - {room})
    assert len(rows) == len(told)
    assert told == found
    assert list(TopologicalSorter(told).static_order())


def test_only_loading_and_pipeline_reach_what_holds_tensors() -> None:
    """Beside the parts that hold tensors only these three import torch, and only inside functions."""
    tensors = {"drift", "forward", "kernels", "measure", "model", "spectrum"}
    for name, file in sources().items():
        if name.split(".")[0] in tensors:
            continue
        reached = imports(file)
        heavy = {n for n in reached if n.split(".")[0] == "torch"} | (rooms(reached) & tensors)
        assert not heavy or name in ("loading", "pipeline", "distributed"), name
        assert not {n for n in imports(file, deferred=False) if n.split(".")[0] in HEAVY}, name


@pytest.mark.parametrize("name", [n for n in sources() if n not in MAY_KNOW_PYTEST])
def test_only_the_shell_knows_pytest(name: str) -> None:
    """Only the modules that are pytest's import it; options and the terminal report name it for their types alone."""
    file = sources()[name]
    assert not {n for n in imports(file) if n.split(".")[0] in ("pytest", "_pytest")}
    if name not in ("options", "report.terminal"):
        assert not {n for n in imports(file, for_types=True) if n.split(".")[0] in ("pytest", "_pytest")}


def test_nothing_runs_code_from_a_checkpoint() -> None:
    """No module unpickles, evaluates, or lets transformers trust remote code."""
    for name, file in sources().items():
        tree = ast.parse(file.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), name
                assert node.value.value is False, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "pickle.load", "pickle.loads"), name
