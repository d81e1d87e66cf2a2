"""PEFT adapters gated as their user meets it."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.adapters import adapter
from tests.plugin.conftest import LOOSE, Gate

LAYERS = 3


@pytest.fixture
def folder(pytester: pytest.Pytester) -> Path:
    """The test's own folder, with a text in it."""
    (pytester.path / "text.txt").write_text(tiny.TEXT)
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    return pytester.path


OUTSIDE = (
    "outside the guarantee: trained tensors that no layer test covers, 4 in all: 1 whole weights (lm_head.weight); "
    "3 DoRA magnitudes (model.layers.0.self_attn.q_proj.lora_magnitude_vector, "
    "model.layers.1.self_attn.q_proj.lora_magnitude_vector, …)"
)


def test_what_lies_outside_is_told_saved_and_a_failure_if_asked(folder: Path, gate: Gate) -> None:
    """Trained tensors outside the layers stand in header, summary, Markdown and JSON; strict scope makes them fail."""
    model = tiny.llama(tie_word_embeddings=False)
    adapter(folder, model, r=4, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    result = gate(*LOOSE, "--nullspace-save-stats=s.json", "--nullspace-report=r.md", model="adapter")
    result.assert_outcomes(passed=LAYERS + 1)
    assert f"nullspace: {OUTSIDE}" in result.outlines
    assert OUTSIDE in result.outlines
    assert "covers, 4 in all: 1 whole weights" in (folder / "r.md").read_text()
    saved = json.loads((folder / "s.json").read_text())["outside"]
    assert len(saved) == 4
    assert saved[0] == "base_model.model.lm_head.weight"
    strict = gate(*LOOSE, "--nullspace-strict-scope", model="adapter")
    strict.assert_outcomes(passed=LAYERS + 1, failed=1)
    strict.stdout.fnmatch_lines(["FAILED adapter/adapter_config.json::scope - Failed: outside the guarantee: *"])
    alone = gate("-o", "nullspace_strict_scope=true", "adapter/adapter_config.json::scope", model="adapter")
    alone.assert_outcomes(failed=1)
    workers = gate(*LOOSE, "-n", "2", "--nullspace-strict-scope", model="adapter")
    workers.assert_outcomes(passed=LAYERS + 1, failed=1)


def test_strict_scope_passes_where_only_layers_were_trained(folder: Path, gate: Gate) -> None:
    """An adapter of linear layers alone passes the scope; a bad ini value and a whole model are usage errors."""
    adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    result = gate(*LOOSE, "--nullspace-strict-scope", model="adapter")
    result.assert_outcomes(passed=LAYERS + 2)
    assert "outside" not in result.stdout.str()
    wrong = gate("-o", "nullspace_strict_scope=maybe", model="adapter")
    assert wrong.ret == pytest.ExitCode.USAGE_ERROR
    wrong.stderr.fnmatch_lines(["ERROR: nullspace_strict_scope: takes true or false, not 'maybe'"])
    tiny.lora_null(folder / "whole")
    whole = gate("--nullspace-strict-scope", model="whole")
    assert whole.ret == pytest.ExitCode.USAGE_ERROR
    whole.stderr.fnmatch_lines(["ERROR: --nullspace-strict-scope: *whole holds a whole model, and its files do not *"])
