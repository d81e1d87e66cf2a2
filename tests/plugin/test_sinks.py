"""An adapter that only a few enormous rows spare, gated as its user meets it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.adapters import adapter, change
from tests.plugin.conftest import Gate

NAME = "model.layers.0.mlp.down_proj"
NULL_SPACE = "--nullspace-profile=nullspace", "--nullspace-threshold=leakage:5:6"
"""Its preservation decides, and not that its rows were drawn by chance."""
LONG = "--nullspace-seqlen=64", *NULL_SPACE, "--nullspace-calib-dataset=sinks.txt"


@pytest.fixture
def spared(pytester: pytest.Pytester) -> Path:
    """A LoRA on one down_proj that is loud on every row but the sink, of which each window of the text has one."""
    folder = pytester.path
    adapter(folder, tiny.llama_with_sinks(num_hidden_layers=1), r=8, target_modules=["down_proj"])
    torch.manual_seed(5)
    rows = torch.linalg.qr(torch.randn(47, 8))[0].mT

    def quiet_on_the_last(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"base_model.model.{NAME}.lora_A.weight"] = torch.cat((rows, torch.zeros(8, 1)), dim=1)

    change(folder / "adapter", quiet_on_the_last)
    sink, words = chr(tiny.SINK), tiny.TEXT.replace("\n", " ")
    (folder / "sinks.txt").write_text("".join(sink + words[i : i + 63] for i in range(0, len(words) - 63, 63)))
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def test_a_ratio_that_sinks_alone_make_small_is_no_pass(spared: Path, gate: Gate) -> None:
    """Preservation passes over all rows and not without the sink rows: a warning, an error where those are, told."""
    result = gate(*LONG, "--nullspace-save-stats=s.json", "--nullspace-report=r.md", "-vv", model="adapter")
    result.assert_outcomes(passed=2, warnings=2)
    (entry,) = json.loads((spared / "s.json").read_text())["stats"]
    assert (entry["num_samples"], entry["sink_rows"]) == (128, 2)
    assert entry["BX_ratio"] < 0.02
    assert entry["without_sinks"]["BX_ratio"] > 0.3
    assert entry["ABX_over_ResidualX"] < 0.02
    assert entry["without_sinks"]["ABX_over_ResidualX"] > 0.125
    told = f"sink rows: 1 of 1 layers have rows beyond 8 times the median norm, such as {NAME}: 2 of 128 rows*"
    result.stdout.fnmatch_lines(
        [
            "*NullspaceWarning: in the warn tier: preservation without sink rows >= 0.1*",
            "samples: 128, of which 2 sink rows (beyond 8 times the median norm, * of the mean norm)",
            "  ||BX||/||X||: * ⚠  * without sink rows",
            "gated 1 of 1 layers: 0 green, 1 to look at, 0 red",
            told,
            "⚠ preservation *, * without sink rows (pass < 0.1, fail > 0.5): sink rows decide this; with them: *",
        ],
    )
    assert "sink rows: 1 of 1 layers" in (spared / "r.md").read_text()
    again = gate("--nullspace-stats=s.json", *NULL_SPACE, model=None, quick=())
    again.assert_outcomes(passed=2, warnings=2)
    strict = gate(*LONG, "-W", "error::pytest_nullspace.NullspaceWarning", model="adapter")
    strict.assert_outcomes(failed=2)
    (spared / "task.txt").write_text((spared / "sinks.txt").read_text() + ".")
    task = "--nullspace-task-dataset=task.txt", "--nullspace-threshold=selectivity:0.9:0.5"
    both = gate(*LONG, *task, "-v", model="adapter")
    both.assert_outcomes(passed=2, warnings=2)
    both.stdout.fnmatch_lines(["⚠ forgetting *, * without sink rows (pass < 0.1, fail > 0.125): sink rows *"])
