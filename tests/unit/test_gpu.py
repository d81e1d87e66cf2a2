"""What is run on a card, run here on the CPU in its place: the script is ready where one can be had."""

from functools import partial
from pathlib import Path

import pytest
import torch

from pytest_nullspace.measuring.streaming import measure
from tests.gpu import __main__ as script
from tests.gpu import table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("made", [table.lora_null, table.peft])
def test_the_table_is_of_the_model_that_it_names(made: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer but the head is measured, finite; each line has a figure, and counts stand beside the bare ones."""
    adapted = made(table.SMALL, "cpu", torch.bfloat16)  # type: ignore[operator]
    assert len(adapted.layers) == 7 * table.SMALL.sizes["num_hidden_layers"]
    assert not any(layer.defect for layer in measure(adapted, [[1, 2, 3, 4, 5, 6, 7, 8]]))
    monkeypatch.setattr(table, "ROUNDS", 1)
    told = dict(table.rows(adapted, table.SMALL, "cpu"))
    assert len(told) >= 2 * 5 + 2 * 3
    for what in ("bare decoder, s", "pass, s", "pass ÷ bare", "before the first window, s"):
        assert float(told[f"4 windows of 64, 2 a forward: {what}"]) > 0
    passed, bare = (int(of.replace(",", "")) for of in told["two batches of 2: dispatched, pass and bare"].split(", "))
    assert passed > bare > 0


MARKED = """
import os
import pytest

@pytest.mark.gpu
def test_of_a_card(device):
    assert device == "cpu"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ

def test_of_the_cpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"
"""


def test_a_card_is_hidden_until_its_tests_are_asked_for(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --device what needs a card is skipped with the reason, and no process finds one; with it all else is."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pytester.makeconftest((ROOT / "conftest.py").read_text("utf-8"))
    pytester.makepyfile(MARKED)
    pytester.makeini("[pytest]\nmarkers = gpu")
    run = partial(pytester.runpytest_subprocess, "-p", "no:randomly", "-rs")
    hidden = run()
    hidden.assert_outcomes(passed=1, skipped=1)
    hidden.stdout.fnmatch_lines(
        ["device: cpu, cards are hidden", "*--device=cuda, which runs the tests of a card, was not given"]
    )
    run("--device=cpu").assert_outcomes(passed=1, deselected=1)
    if not torch.cuda.is_available():
        absent = run("--device=cuda")
        assert absent.ret == pytest.ExitCode.USAGE_ERROR
        absent.stderr.fnmatch_lines(["*--device=cuda: torch sees none on this machine; --device=cpu stands in for it"])


def test_the_script_is_done_in_six_minutes(tmp_path: Path) -> None:
    """Its steps may take so long together, and each names files that are there."""
    steps = script.steps("cuda", False, tmp_path)
    assert sum(seconds for seconds, _ in steps.values()) <= 360
    for _, command in steps.values():
        for word in command:
            assert not word.startswith("tests/") or (ROOT / word).exists()
