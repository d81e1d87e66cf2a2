"""The examples run as they stand: the notebook cell by cell, the script on the shipped base."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fixtures.build import WORLD

ROOT = WORLD.parents[1]
NOTEBOOK = ROOT / "examples" / "gate.ipynb"
CELLS = """
import ast, json, sys
names = {}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] != "code":
        continue
    *body, last = ast.parse("".join(cell["source"])).body
    shown = isinstance(last, ast.Expr)
    exec(compile(ast.Module(body if shown else [*body, last], []), "cell", "exec"), names)
    if shown:
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        if value is not None:
            print(value._repr_html_())
"""
"""Runs the cells one after the other, and shows what a notebook would show of the last line of each."""


def python(*arguments: str, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_notebook_runs_cell_by_cell_and_shows_table_and_report() -> None:
    """From the repository or from its own folder, it prints the verdict, a table of layers, and the page in a frame."""
    out = python("-c", CELLS, str(NOTEBOOK), cwd=NOTEBOOK.parent)
    assert out.startswith(("SAFE: ", "LOOK: "))
    assert "<th>leakage</th>" in out
    (told,) = [line for line in out.splitlines() if line.startswith("largest difference in leakage: ")]
    assert float(told.rpartition(" ")[2]) < 1e-6
    assert out.count('<iframe srcdoc="&lt;!DOCTYPE html&gt;') == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    not (find_spec("nbclient") and find_spec("ipykernel")),
    reason="needs nbclient and ipykernel, which are not installed",
)
def test_the_notebook_runs_in_a_kernel_of_jupyter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter itself executes it without an error, and the last cell shows the report as HTML."""
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    (shown,) = notebook.cells[-1].outputs
    assert shown.data["text/html"].startswith("<iframe srcdoc=")


def test_the_notebook_is_shipped_without_what_it_printed() -> None:
    """No output and no count of executions is committed."""
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_script_trains_gates_and_prints_the_verdict(tmp_path: Path) -> None:
    """On another model and texts than its own: figures while it trains, the adapter saved, the verdict, the page."""
    out = python(
        "examples/train_and_gate.py", f"--model={WORLD / 'base'}", f"--preserved={WORLD / 'facts.txt'}",
        f"--task={WORLD / 'task.txt'}", "--steps=4", "--every=2", f"--out={tmp_path}",
    )  # fmt: skip
    assert out.count("'nullspace/verdict': ") == 2
    *_, verdict, page = out.splitlines()
    assert verdict.startswith(("SAFE: ", "LOOK: ", "DO NOT DEPLOY: "))
    assert page == f"the whole report: {tmp_path / 'report.html'}"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "<!DOCTYPE html>" in (tmp_path / "report.html").read_text("utf-8")
