"""Trained against initial in the gate: what moved and must not have fails its layer, the rest fails `frozen`."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests import tiny
from tests.plugin.conftest import LOOSE, Gate, Replay

LAYERS = 21
Q0 = "model.layers.0.self_attn.q_proj"
INIT = ("--nullspace-init=start", *LOOSE)


@pytest.fixture
def start(checkpoint: Path, pytester: pytest.Pytester) -> Path:
    """The start of ``runs/ft``: the same adapter with A = 0."""
    return tiny.lora_null(pytester.path / "start", up_scale=0.0)


def test_what_only_moved_as_it_might_is_green(start: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """A moved and nothing else: each layer passes, `frozen` too, and the saved run replays the same without weights."""
    result = gate(*INIT, "-n", "2", "--nullspace-save-stats=ft.json", "--nullspace-report=r.md")
    result.assert_outcomes(passed=LAYERS + 2)
    result.stdout.fnmatch_lines(
        [
            "against its start *start: variant v2, the rows of B are orthonormal at the start",
            "  B moved in 0 of 21 layers, largest principal angle 0°; W_res changed in 0; A moved in 21",
            "  0 of 8 tensors outside the layers moved",
        ]
    )
    assert "variant v2" in (pytester.path / "r.md").read_text()
    replayed = pytester.runpytest_subprocess("-p", "no:randomly", "--nullspace-stats=ft.json", *LOOSE)
    replayed.assert_outcomes(passed=LAYERS + 2)
    document = json.loads((pytester.path / "ft.json").read_text())
    document["audit"]["layers"] = 3
    (pytester.path / "ft.json").write_text(json.dumps(document))
    refused = pytester.runpytest_subprocess("-p", "no:randomly", "--nullspace-stats=ft.json", *LOOSE)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: *ft.json: its entry 'audit' is no audit; measure again"])


def test_what_moved_and_must_not_have_fails_by_name(start: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """A trained B fails its own layer with change and angle, a trained norm fails `frozen`; as v1 B may move."""

    def mistake(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q0}.BLinear.weight"] = tensors[f"{Q0}.BLinear.weight"] + 0.05
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5

    tiny.lora_null(pytester.path / "wrong", change=mistake)
    result = gate(*INIT, "--tb=no", "--nullspace-save-stats=wrong.json", "--nullspace-report=r.md", model="wrong")
    assert result.ret == 1
    result.assert_outcomes(failed=2, passed=LAYERS)
    result.stdout.fnmatch_lines(
        [
            f"FAILED wrong/config.json::{Q0} - Failed: B left its space: relative change 0.283, largest principal *",
            "FAILED wrong/config.json::frozen - Failed: 1 of 8 tensors outside the layers moved: model.norm.weight *",
        ]
    )
    result.stdout.fnmatch_lines(
        [
            "  B moved in 1 of 21 layers, largest principal angle *",
            "diagnosis: b-trained: B was trained in 1 of 21 layers: it left its space, largest principal angle *",
            "  cure: the freezing condition probably tests for ALinear twice; *",
            "diagnosis: trained-outside: 1 of 8 tensors outside the layers *model.norm.weight*",
        ]
    )
    saved = json.loads((pytester.path / "wrong.json").read_text())
    assert {"b-trained", "trained-outside"} <= {cause["cause"] for cause in saved["diagnosis"]}
    assert "b\\-trained" in (pytester.path / "r.md").read_text()
    gate(*INIT, "--nullspace-variant=v1", "--tb=no", model="wrong").assert_outcomes(failed=1, passed=LAYERS + 1)


def test_an_init_that_is_none_is_a_usage_error(start: Path, gate: Gate, replay: Replay) -> None:
    """A missing directory and a run without weights end pytest with exit code 4."""
    missing = gate("--nullspace-init=nowhere")
    assert missing.ret == pytest.ExitCode.USAGE_ERROR
    missing.stderr.fnmatch_lines(["ERROR: *nowhere: no such directory"])
    saved = replay("--nullspace-init=start")
    assert saved.ret == pytest.ExitCode.USAGE_ERROR
    saved.stderr.fnmatch_lines(["ERROR: --nullspace-init: compares weights, and a saved run holds none; give the *"])
