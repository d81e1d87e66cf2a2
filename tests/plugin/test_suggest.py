"""The remedy with a number: what the gate suggests passes when it is written."""

import json
import shutil

import pytest

from fixtures.build import WORLD
from tests import saved
from tests.plugin.conftest import Gate, Replay

TEXTS = (
    f"--nullspace-base={WORLD / 'base'}",
    f"--nullspace-calib-dataset={WORLD / 'facts.txt'}",
    f"--nullspace-task-dataset={WORLD / 'task.txt'}",
    "--nullspace-calib-size=16",
    "--nullspace-seqlen=64",
    "--nullspace-suggest",
    "-k",
    "drift",
)


def test_the_suggested_lora_alpha_passes_when_it_is_written(gate: Gate, pytester: pytest.Pytester) -> None:
    """An adapter that is far too loud fails by its predictions; with what is suggested it passes, unsuggested."""
    directory = pytester.path / "ft"
    shutil.copytree(WORLD / "peft-null", directory)
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))

    def gated(alpha: float) -> pytest.RunResult:
        file.write_text(json.dumps(config | {"lora_alpha": alpha}), "utf-8")
        return gate("--nullspace-save-stats=run.json", "--nullspace-report=r.md", model=str(directory), quick=TEXTS)

    loud = 3 * config["lora_alpha"]
    failed = gated(loud)
    failed.assert_outcomes(failed=1, deselected=22)
    run = json.loads((pytester.path / "run.json").read_text("utf-8"))
    suggestion = run["suggestion"]
    assert 0.1 < suggestion["scale"] < 0.9
    failed.stdout.fnmatch_lines(
        [
            f"suggestion: lora_alpha {loud * suggestion['scale']:g} in place of {loud} would pass: divergence 0.0*, "
            "loss-rise *, task-gain *; * % of the task's gain kept"
        ]
    )
    assert "would pass: divergence" in (pytester.path / "r.md").read_text("utf-8")
    told, before = suggestion["figures"]["divergence"], run["drift"]["preserved"]["divergence"]
    passed = gated(loud * suggestion["scale"])
    passed.assert_outcomes(passed=1, deselected=22)
    passed.stdout.no_fnmatch_line("suggestion:*")
    then = json.loads((pytester.path / "run.json").read_text("utf-8"))["drift"]["preserved"]["divergence"]
    assert then == pytest.approx(told[0], rel=1e-4)
    assert then < 0.05 < before


def test_a_saved_run_tells_what_was_suggested_and_cannot_be_asked(replay: Replay, pytester: pytest.Pytester) -> None:
    """The sentence is in the report of a saved run; to look for one needs the model; a damaged one is refused."""
    file = saved.save(pytester.path / "stats.json")
    document = json.loads(file.read_text("utf-8"))
    told = {"scale": 0.5, "said": "lora_alpha 8 in place of 16", "figures": {"divergence": [0.04, 0.002]}, "kept": 0.9}
    file.write_text(json.dumps(document | {"suggestion": told}), "utf-8")
    replay().stdout.fnmatch_lines(
        ["suggestion: lora_alpha 8 in place of 16 would pass: divergence 0.04 ± 0.002; 90 % of the task's gain kept"]
    )
    asked = replay("--nullspace-suggest")
    assert asked.ret == pytest.ExitCode.USAGE_ERROR
    asked.stderr.fnmatch_lines(
        ["ERROR: --nullspace-suggest: asks the model for its predictions*give the model as well"]
    )
    file.write_text(json.dumps(document | {"suggestion": told | {"scale": "all"}}), "utf-8")
    damaged = replay()
    assert damaged.ret == pytest.ExitCode.USAGE_ERROR
    damaged.stderr.fnmatch_lines(["ERROR: *stats.json: suggestion: not what a run tells of it; measure again"])
