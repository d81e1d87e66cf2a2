"""The import rules: which wing of the plugin may know of which, and what importing it costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_nullspace
from tests import structure
from tests.structure import imports, own, sources, wing, wings

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "transformers", "datasets", "accelerate", "peft", "pyarrow", "safetensors")
TENSORS = {
    "callback", "fused", "kernels", "measuring.blockwise", "measuring.bypassed",
    "measuring.digits", "measuring.distinct", "measuring.drift", "measuring.factors", "measuring.figuring",
    "measuring.finite", "measuring.forward", "measuring.halfway", "measuring.moved", "measuring.recorder",
    "measuring.rows", "measuring.sampled", "measuring.scaling", "measuring.screen", "measuring.spectrum",
    "measuring.stowed", "measuring.streamed", "measuring.streaming", "measuring.summing", "measuring.tiles",
    "measuring.transfer", "measuring.waiting", "measuring.writing", "model", "spectra",
}  # fmt: skip
"""The wings and modules that hold tensors, and so import torch as they are imported."""
DOORS = {
    "measuring.pipeline", "measuring.loading", "measuring.measurement", "measuring.distributed", "measuring.inmemory",
    "measuring.batching", "measuring.fitting", "measuring.screening",
}  # fmt: skip
"""Those that reach them, inside functions only."""
PYTEST = {"plugin", "shell.gate", "shell.last", "shell.extras", "shell.collect", "shell.fixtures", "shell.progress"}
"""Those that import pytest."""
PYTEST_TYPES = PYTEST | {"shell.asked", "shell.declared", "shell.outputs", "shell.values", "report.terminal"}
"""Those that may name it for their types."""


def holds_tensors(module: str) -> bool:
    """Whether a module is one of `TENSORS`."""
    return module in TENSORS or wing(module) in TENSORS


LIGHT = [module for module in sources() if not holds_tensors(module)]


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after ``statement``."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_what_holds_no_tensors_loads_nothing_heavy() -> None:
    """A run of pytest that gates nothing, and collection alone, never pay for torch or what comes with it."""
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module('pytest_nullspace' + ('.' + name if name else ''))\n"
        f"    assert not set({HEAVY!r}) & sys.modules.keys(), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    """What pytest loads in every run, gated or not, is a few small modules of ours, and none that pytest had not."""
    code = (
        "import sys, pytest\nbefore = set(sys.modules)\nimport pytest_nullspace.plugin\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    of_shell = ("shell.asked", "shell.declared", "shell.fixtures", "shell.options", "shell.values")
    ours = ("errors", "plugin", "settings", "shell", *of_shell)
    assert done.stdout.split() == ["pytest_nullspace", *(f"pytest_nullspace.{module}" for module in ours)]


def test_every_wing_imports_what_architecture_says() -> None:
    """The map's table names every wing once, and for each all that it imports and nothing else; it has no circle."""
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)/?` \| .* \| (.*) \|$", text, re.MULTILINE)
    told = {room: set(re.findall(r"`(\w+)`", may)) for room, may in rows}
    assert len(rows) == len(told)
    assert told == structure.arrows()
    assert structure.floors(told)


ORDERS = {
    "checkpoint": "header layers arrays gguf lora_null peft hub",
    "run": "texts figures windows predictions stats uncertainty paired entries saved",
    "judging": (
        "verdicts invariants baseline start audit weights evidence tensors diagnosis served serve_checks servers "
        "serving"
    ),
    "text": "sources images gallery readers windows tokenizer processor",
    "measuring": (
        "memory digests followed hashing inmemory written passages about distributed digits rows forward drift moved "
        "recorder streaming screen spectrum sampled scaling waiting stowed halfway streamed blockwise writing loading "
        "fitting measurement reading screening pipeline"
    ),
    "model": "stored shelf layers shelved weights kinds bases matching lora_null peft",
    "shell": (
        "values options declared asked shared together once served against runs replayed opening outputs progress "
        "collect gate"
    ),
}
"""Inside a wing, the modules whose order matters: none imports one that stands after it."""


@pytest.mark.parametrize("within", ORDERS)
def test_inside_a_wing_imports_go_one_way(within: str) -> None:
    """In each wing with an order no module imports a later one."""
    order = [f"{within}.{module}" for module in ORDERS[within].split()]
    assert set(order) <= set(sources())
    for place, module in enumerate(order):
        assert own(imports(sources()[module])).isdisjoint(order[place + 1 :]), module


def test_no_module_and_no_function_is_too_long_to_be_read_at_once() -> None:
    """No module has more than 400 lines, no function more than 60 without its docstring."""
    assert {name: lines for name, lines in structure.module_lengths().items() if lines > 400} == {}
    assert {name: lines for name, lines in structure.function_lengths().items() if lines > 60} == {}


def test_what_holds_tensors_is_reached_through_its_doors() -> None:
    """Beside what holds tensors only the doors import torch, and only inside functions."""
    for name, file in sources().items():
        if holds_tensors(name):
            continue
        reached = imports(file)
        heavy = {n for n in reached if n.split(".")[0] == "torch"} | {m for m in own(reached) if holds_tensors(m)}
        assert not heavy or name in DOORS, name
        assert not {n for n in imports(file, deferred=False) if n.split(".")[0] in HEAVY}, name


@pytest.mark.parametrize("name", [n for n in sources() if wing(n) == "report"])
def test_reports_are_made_from_a_run_alone(name: str) -> None:
    """A report imports nothing of the shell nor anything that measures, not even for its types."""
    assert wings(imports(sources()[name], for_types=True)).isdisjoint({"shell", "measuring", "model", "kernels"})


@pytest.mark.parametrize("name", [n for n in sources() if n not in PYTEST])
def test_only_the_shell_knows_pytest(name: str) -> None:
    """Only the modules that are pytest's import it; options and the terminal report name it for their types alone."""
    file = sources()[name]
    assert not {n for n in imports(file) if n.split(".")[0] in ("pytest", "_pytest")}
    if name not in PYTEST_TYPES:
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
