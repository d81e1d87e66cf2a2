"""A model that does not fit, its blocks read one after the other, each for all windows: the same figures."""

import json
from pathlib import Path

from fixtures.build import WORLD
from tests.plugin.conftest import LOOSE, Gate
from tests.plugin.test_device_map import SHIPPED, numbers


def test_streamed_figures_are_those_of_the_model_in_memory(folder: Path, gate: Gate) -> None:
    """To the last saved digit, of the shipped adapter with a task text, its drift and its headroom."""
    documents = {}
    for name, more in (("whole", ()), ("streamed", ("--nullspace-device-map=stream",))):
        saved = "--nullspace-task-dataset=text.txt", f"--nullspace-save-stats={name}.json"
        result = gate(*LOOSE, *saved, *more, model=str(WORLD / "null-v2"), quick=SHIPPED, auto=True)
        assert result.parseoutcomes()["passed"] > 20
        documents[name] = json.loads((folder / f"{name}.json").read_text())
    result.stdout.fnmatch_lines(["*its blocks are read one after the other*"])
    whole, streamed = (dict(numbers({key: of[key] for key in ("stats", "drift")})) for of in documents.values())
    assert len(whole) > 100
    assert streamed == whole
