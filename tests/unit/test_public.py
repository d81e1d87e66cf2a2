"""The public names as a user's own Python meets them: imported, given plain strings, and called as the README shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pytest_nullspace
from pytest_nullspace import CheckpointError, OptionError, load_model, measure, open_checkpoint
from pytest_nullspace.model import load_plain
from tests import tiny
from tests.adapters import adapter
from tests.releases import five

ROOT = Path(__file__).parents[2]
IN_EVERY_ORDER = """
import sys
from itertools import permutations
from types import ModuleType

import pytest_nullspace

for pair in permutations(pytest_nullspace.__all__, 2):
    for module in [name for name in sys.modules if name.partition(".")[0] == "pytest_nullspace"]:
        del sys.modules[module]
    for name in (*pair, *pair):
        found = getattr(__import__("pytest_nullspace", fromlist=[name]), name)
        assert not isinstance(found, ModuleType), pair
        assert found.__name__ == name, pair
print("done")
"""
FRESH = {
    "open_checkpoint": "print(len(open_checkpoint('ft').layers))",
    "load_model": "print(len(load_model('ft').layers))",
    "measure": "from pytest_nullspace import load_model\nprint(len(measure(load_model('ft'), [range(1, 30)])))",
    "judge": (
        "from pytest_nullspace import Expectations, load_model, measure\n"
        "print(len([judge(layer, Expectations()).tier for layer in measure(load_model('ft'), [[1, 2, 3]])]))"
    ),
    "gate": "print(len(gate('ft', 'text.txt', calib_size=2, seqlen=32).layers))",
}
"""What calls each public function on ``ft`` and ``text.txt`` in the working folder, and prints how many layers."""


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def ft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LoRA-Null directory of that name, with a text beside it; never changed."""
    folder = tmp_path_factory.mktemp("public")
    (folder / "text.txt").write_text(tiny.TEXT)
    return tiny.lora_null(folder / "ft")


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PEFT adapter with its base beside it; never changed."""
    return adapter(tmp_path_factory.mktemp("public"), tiny.llama(), r=4, target_modules=["q_proj"])


def test_public_names_are_the_same_in_every_order() -> None:
    """A public name is what it is, whichever was imported before it, and no module takes its place."""
    done = python(IN_EVERY_ORDER)
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize("name", pytest_nullspace.__all__)
def test_each_public_name_is_imported_in_a_fresh_process(name: str) -> None:
    """``from pytest_nullspace import NAME`` gives a class or a function of that name."""
    done = python(f"from pytest_nullspace import {name}\nprint({name}.__name__, callable({name}))")
    assert (done.stdout, done.stderr) == (f"{name} True\n", "")


FUNCTIONS = [name for name in pytest_nullspace.__all__ if not isinstance(getattr(pytest_nullspace, name), type)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_public_function_is_called_in_a_fresh_process(name: str, ft: Path) -> None:
    """Every public function takes plain strings, prints nothing of its own, and works on what the others give."""
    done = python(f"from pytest_nullspace import {name}\n{FRESH[name]}", ft.parent)
    assert (done.stdout, done.stderr) == ("21\n", "")


@five
def test_the_document_shows_plain_python_that_runs() -> None:
    """The last code block of docs/python.md measures the shipped adapter: one line a layer, none of which fails."""
    *_, code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
    done = python(code)
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for _, name, _ in lines] == [spec.name for spec in open_checkpoint("fixtures/world/peft-null").layers]
    assert {tier for tier, _, _ in lines} <= {"pass", "warn"}
    assert all(0 < float(leakage) < 0.25 for _, _, leakage in lines)


def test_paths_devices_and_precisions_are_taken_as_strings_and_as_objects(ft: Path, peft: Path) -> None:
    """However path, base, device and precision are written, the same model comes of them."""
    tokens = [[1, 2, 3, 4, 5, 6, 7, 8]]
    plain = measure(load_model(str(ft), "cpu", "bfloat16"), tokens)
    assert plain == measure(load_model(open_checkpoint(ft), torch.device("cpu"), torch.bfloat16), tokens)
    assert plain == measure(load_model(ft, device="cpu:0", dtype="torch.bfloat16"), tokens)
    for base in (None, str(peft.parent / "base"), peft.parent / "base"):
        model = load_model(open_checkpoint(str(peft)), base=base)
        assert len(model.layers) == 3
        assert next(model.model.parameters()).dtype is torch.float32
        assert model.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "float33"}, "dtype: takes float32, float16, bfloat16 or float64, not 'float33'"),
        ({"dtype": torch.int8}, "dtype: takes .*, not 'torch.int8'"),
        ({"dtype": ""}, "dtype: takes .*, not ''"),
        ({"device": "gpu"}, "device: takes cpu, cuda, cuda:N, xpu or xpu:N, not 'gpu'"),
        ({"device": "meta"}, "device: takes .*, not 'meta'"),
        ({"device": "mps"}, "device: takes .*, not 'mps': an Apple GPU has no float64, .*; choose cpu"),
        ({"device": ""}, "device: takes .*, not ''"),
        ({"device": "cuda:99"}, "device: torch sees no cuda:99 on this machine"),
    ],
)
def test_a_device_or_precision_that_is_none_is_one_error(wrong: dict[str, object], message: str, ft: Path) -> None:
    """What torch does not know, or cannot be measured in or on, is refused by the name of the argument."""
    with pytest.raises(OptionError, match=f"^{message}"):
        load_model(ft, **wrong)  # type: ignore[arg-type]


def test_a_base_that_is_not_there_is_named(peft: Path) -> None:
    """A wrong path is an error that says which, given as a string or a Path."""
    for base in ("no/such/base", Path("no/such/base")):
        with pytest.raises(CheckpointError, match=r"^base: no/such/base is no directory"):
            load_model(peft, base=base)
    for given in ("no/such/adapter", Path("no/such/adapter")):
        with pytest.raises(CheckpointError, match=r"^no/such/adapter: no such directory"):
            load_model(given)


@five
def test_loading_shows_nothing_of_the_libraries_and_leaves_them_as_they_were(
    peft: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No progress bar, report or warning of a library is printed while a model is loaded; afterwards all are again."""
    import logging

    from transformers import AutoModelForCausalLM

    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "accelerate")]
    before, stream = [logger.level for logger in loggers], sys.stderr
    load_model(peft)
    load_plain(peft.parent / "base", torch.device("cpu"), torch.float32)
    assert capfd.readouterr() == ("", "")
    assert ([logger.level for logger in loggers], sys.stderr) == (before, stream)
    AutoModelForCausalLM.from_pretrained(peft.parent / "base")
    assert "Loading weights" in capfd.readouterr().err
