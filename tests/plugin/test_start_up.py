"""What a gate imports, and what it does beside the pass."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.adapters import adapter
from tests.plugin.conftest import LOOSE, Gate

UNUSED = {"datasets", "pandas", "pyarrow", "matplotlib", "librosa", "cv2"}
"""What no gate of a text file needs, nor any library that it needs imports by itself. Of what is installed transformers
imports scipy, torchvision, torchaudio and soundfile with every model."""


@pytest.mark.parametrize("kind", ["LoRA-Null", "PEFT"])
def test_a_gate_imports_nothing_that_it_does_not_need(
    kind: str, folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first window of a text file, and at the end, nothing is imported for other texts, images or formats."""
    model = "adapter"
    if kind == "PEFT":
        adapter(folder, tiny.llama(), r=4, target_modules="all-linear")
    else:
        tiny.lora_null(folder / model)
    told = folder / "started.json"
    monkeypatch.setenv("NULLSPACE_STARTED", str(told))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others may import what they like
    (folder / "conftest.py").write_text(
        "import sys\n"
        "def pytest_unconfigure():\n"
        "    print('at the end:', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    result = gate(*LOOSE, "-p", "pytest_nullspace.plugin", "-p", "tests.benchmarks.started", model=model, auto=True)
    assert result.ret == 0
    at_first = {name.partition(".")[0] for name in json.loads(told.read_text())["modules"]}
    (line,) = (line for line in result.outlines if line.startswith("at the end: "))
    for imported in at_first, set(line.split()):
        assert {"torch", "transformers"} <= imported
        assert not UNUSED & imported
        assert ("peft" in imported) == (kind == "PEFT")
