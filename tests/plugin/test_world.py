"""The trained fixture: a world in which what was kept and what was learned can be counted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from fixtures import world
from fixtures.build import WORLD, build_variants
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import load_model
from pytest_nullspace.text.sources import FileText
from pytest_nullspace.text.tokenizer import load_tokenizer
from pytest_nullspace.text.windows import draw_windows
from tests.plain import read_text
from tests.plugin.conftest import Gate

SHIPPED = (f"--nullspace-calib-dataset={WORLD / 'facts.txt'}", "--nullspace-seqlen=256")
EXACT = 1e-6


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the shipped base trained here and now, right and wrong, with what was measured of them."""
    folder = tmp_path_factory.mktemp("variants")
    measured = build_variants(folder, ["plain", "null-v1", "random", "b-trained", "a-frozen"])
    (folder / "measured.json").write_text(json.dumps(measured))
    return folder


def test_the_shipped_adapter_learns_and_keeps_more_than_a_plain_one(variants: Path) -> None:
    """Trained alike, the null-space adapter learns the task and keeps more of the facts than plain LoRA."""
    plain = json.loads((variants / "measured.json").read_text())["plain"]
    written = json.loads((WORLD / "measured.json").read_text())["measured"]
    adapted = load_model(open_checkpoint(WORLD / "null-v2"), torch.device("cpu"), torch.float32).model
    base = LlamaForCausalLM.from_pretrained(WORLD / "base").eval()
    assert world.facts_kept(base) == 1
    kept, learned = world.facts_kept(adapted), world.task_accuracy(adapted)
    assert kept == pytest.approx(written["null-v2"]["facts_kept"], abs=0.02)
    assert learned == pytest.approx(written["null-v2"]["task_accuracy"], abs=0.02)
    assert learned > world.task_accuracy(base) + 0.2
    assert kept > plain["facts_kept"] + 0.2


def test_the_shipped_adapter_is_green(gate: Gate) -> None:
    """The README's main command passes on what the repository ships, every layer of it."""
    result = gate("-v", model=str(WORLD / "null-v2"), quick=SHIPPED)
    result.assert_outcomes(passed=22, warnings=0)
    result.stdout.fnmatch_lines(["gated 21 of 21 layers: 21 green, 0 to look at, 0 red", "*times quieter than*"])


def test_the_shipped_initial_checkpoint_is_green_at_stage_init(gate: Gate) -> None:
    """Before training the update is zero: green at stage init, red as a trained checkpoint."""
    initial = str(WORLD / "null-v2-init")
    assert gate("--nullspace-stage=init", model=initial, quick=SHIPPED).ret == 0
    as_trained = gate(model=initial, quick=SHIPPED)
    as_trained.stdout.fnmatch_lines(["FAILED *::model - Failed: effectiveness 0 < 1e-06*"])


@pytest.mark.parametrize(
    ("variant", "figure"),
    [("plain", "leakage"), ("random", "leakage"), ("a-frozen", "effectiveness"), ("b-trained", "leakage")],
)
def test_a_training_mistake_is_red(variants: Path, gate: Gate, variant: str, figure: str) -> None:
    """Really trained mistakes fail, by the figure that shows them."""
    result = gate("--tb=no", model=str(variants / variant), quick=SHIPPED)
    assert result.ret == 1
    assert any(line.startswith("FAILED") and f"{figure} " in line for line in result.outlines)


def test_every_figure_on_the_trained_fixture_is_that_of_float64_arithmetic() -> None:
    """Each mean of each layer agrees with its definition in float64 on the same inputs to 1e-6 relative."""
    adapted = load_model(open_checkpoint(WORLD / "null-v2"), torch.device("cpu"), torch.float32)
    text = read_text(FileText(WORLD / "facts.txt"))
    windows = [w.tokens for w in draw_windows(text, load_tokenizer(WORLD / "base"), count=8, seqlen=256, seed=42)]
    rows: dict[str, list[torch.Tensor]] = {}
    handles = [
        layer.layer.register_forward_hook(
            lambda _, args, __, name=name: rows.setdefault(name, []).append(args[0].double().flatten(0, -2))
        )
        for name, layer in adapted.layers.items()
    ]
    with torch.inference_mode():
        for window in windows:
            adapted.model(input_ids=torch.tensor([window]))
    for handle in handles:
        handle.remove()
    measured = measure(adapted, windows)
    assert len(measured) == 21
    for layer in measured:
        view, x = adapted.layers[layer.name], torch.cat(rows[layer.name])
        up, base = view.up.weight, view.base.weight
        assert isinstance(up, torch.Tensor)
        assert isinstance(base, torch.Tensor)
        bx = x @ view.down_matrix().mT
        abx, wx = bx @ up.double().mT, x @ base.double().mT
        projector = torch.linalg.pinv(view.down_matrix()) @ view.down_matrix()
        leakage = (x @ projector).norm(dim=1).square() / x.norm(dim=1).square()
        want = [float(t.norm(dim=1).mean()) for t in (x, bx, abx, wx, abx + wx)] + [float(leakage.mean())]
        got = [layer.input_norm, layer.down_norm, layer.update_norm, layer.base_norm, layer.output_norm]
        assert [*got, layer.mean_leakage] == pytest.approx(want, rel=EXACT), layer.name


def test_the_python_files_beside_the_weights_are_never_executed(gate: Gate, pytester: pytest.Pytester) -> None:
    """The shipped checkpoint's auto_map names files that would raise when imported, and that leave no bytecode."""
    copy = pytester.path / "copy"
    shutil.copytree(WORLD / "null-v2", copy)
    traps = sorted(copy.glob("*.py"))
    assert traps
    for trap in traps:
        trap.write_text(f"open({str(pytester.path / 'fired')!r}, 'w'); raise RuntimeError\n")
    assert gate(model="copy", quick=SHIPPED).ret == 0
    assert not (pytester.path / "fired").exists()
    assert not list(copy.rglob("__pycache__"))
