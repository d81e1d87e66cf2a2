"""Gated on weights alone: quick, without torch, and never to be mistaken for a measured run."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests import tiny
from tests.plugin.conftest import LOOSE, Gate, Replay

LAYERS = 21
Q0 = "model.layers.0.self_attn.q_proj"
ONLY = "--nullspace-weights-only"
STATEMENT = "gated on weights, activations not measured"


@pytest.fixture
def start(checkpoint: Path, pytester: pytest.Pytester) -> Path:
    """The start of ``runs/ft``, and a conftest by which neither torch nor a text library may be imported."""
    pytester.makeconftest(
        "import sys\n"
        "def pytest_sessionfinish(session):\n"
        "    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    return tiny.lora_null(pytester.path / "start", up_scale=0.0)


@pytest.mark.parametrize("mode", [(), ("-n", "2")])
def test_a_pass_says_what_it_is_of(start: Path, gate: Gate, pytester: pytest.Pytester, mode: tuple[str, ...]) -> None:
    """Header, warnings, summary, Markdown and JSON state it; there are no averages, no text and no torch."""
    outputs = ("--nullspace-save-stats=w.json", "--nullspace-report=r.md", "--junit-xml=j.xml")
    nowhere = "--nullspace-calib-dataset=nowhere.txt"
    result = gate(ONLY, "-v", "--nullspace-init=start", nowhere, *outputs, *mode, quick=())
    assert result.ret == 0
    result.assert_outcomes(passed=LAYERS + 1, warnings=LAYERS)
    result.stdout.fnmatch_lines(
        [
            f"nullspace: *ft (LoRA-Null, 21 of 21 layers, rank 4); {STATEMENT}",
            f"*NullspaceWarning: {STATEMENT}",
            f"{STATEMENT}: 21 of 21 layers, 0 failed, none measured",
            "  layers, by norms * B * scale * rank used",
            "  model.layers.* of 4",
            "against its start *start: variant v2*",
        ]
    )
    assert "✓" not in result.stdout.str()
    assert f"**{STATEMENT}" in (pytester.path / "r.md").read_text()
    saved = json.loads((pytester.path / "w.json").read_text())
    assert (saved["statement"], saved["stats"], len(saved["weights"])) == (STATEMENT, [], LAYERS)
    assert '<property name="gated_on" value="weights"' in (pytester.path / "j.xml").read_text()


def test_it_stands_in_for_no_measured_run(checkpoint: Path, gate: Gate, replay: Replay) -> None:
    """What it saved can be neither gated, nor compared with, nor a start; nor is it asked for beside figures."""
    assert gate(ONLY, "--nullspace-save-stats=w.json").ret == 0
    for refused in (
        replay(stats="w.json"),
        replay("--nullspace-compare=w.json"),
        replay("--nullspace-init=w.json"),
    ):
        assert refused.ret == pytest.ExitCode.USAGE_ERROR
        refused.stderr.fnmatch_lines(["ERROR: *w.json: is of weights alone: its activations were not measured,*"])
    for option in ("compare=stats.json", "stats=stats.json", "init=stats.json", "drift", "spectrum"):
        both = gate(ONLY, f"--nullspace-{option}")
        assert both.ret == pytest.ExitCode.USAGE_ERROR
        name = option.partition("=")[0]
        both.stderr.fnmatch_lines([f"ERROR: --nullspace-weights-only: *and --nullspace-{name}* is of them; leave *"])


def test_dead_moved_and_broken_layers_fail(start: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """Each by its own phrase, with the causes named; and a strict run fails even without a fault."""

    def mistake(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q0}.ALinear.weight"] *= 0
        tensors["model.layers.1.mlp.up_proj.BLinear.weight"] += 0.05

    tiny.lora_null(pytester.path / "wrong", change=mistake)
    result = gate(ONLY, "--nullspace-init=start", "--tb=no", model="wrong")
    assert result.ret == 1
    result.assert_outcomes(failed=2, passed=LAYERS - 1, warnings=LAYERS - 2)
    result.stdout.fnmatch_lines(
        [
            "cause: b-trained; more: *",
            "cause: dead-layers; more: *",
            f"{STATEMENT}: 21 of 21 layers, 2 failed, none measured",
            f"✗ {Q0} * dead: A is zero*",
            "✗ model.layers.1.mlp.up_proj * B left its space*",
            f"FAILED wrong/config.json::{Q0} - Failed: dead: A is zero*",
        ]
    )
    strict = gate(ONLY, "-W", "error::pytest_nullspace.NullspaceWarning", "-k", "layers.0.mlp.up")
    strict.assert_outcomes(failed=1)


def test_tests_of_activations_are_not_fed_with_nothing(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """A user's test of figures errs, where an empty run would satisfy every ``all(…)``."""
    pytester.makepyfile("def test_all(nullspace_run): assert all(x.leakage < 0 for x in nullspace_run.layers)")
    result = gate(ONLY, "-k", "test_all")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no activation was measured: --nullspace-weights-only gates weights alone*"])


def test_frozen_alone_loads_no_model(start: Path, gate: Gate) -> None:
    """Its id runs it from the files: no torch, and the report says that no layer was measured."""
    nothing = ("--nullspace-init=start",)
    result = gate(*nothing, "-v", "runs/ft/config.json::frozen")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["no layer was measured; what follows is read from the files", "against its start *"])
    assert gate(*nothing, *LOOSE, "runs/ft/config.json::model", "--nullspace-calib-dataset=nowhere.txt").ret == 4
