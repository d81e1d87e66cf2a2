"""The figures on a card are those of the CPU, in one piece and in parts, through the kernels and through the gate."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.build import WORLD
from pytest_nullspace import kernels
from pytest_nullspace.measuring import distinct
from pytest_nullspace.measuring.recorder import Recorder
from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.run.stats import LayerStats
from tests import tiny
from tests.adapters import adapter
from tests.gpu.table import counts

pytestmark = pytest.mark.gpu

WINDOWS = torch.randint(0, 128, (8, 48), generator=torch.Generator().manual_seed(0)).tolist()
MEANS = ("input_norm", "down_norm", "update_norm", "base_norm", "output_norm", "mean_leakage")


@pytest.fixture(scope="module", params=["LoRA-Null", "PEFT", "DoRA"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("card")
    if request.param == "LoRA-Null":
        return tiny.lora_null(folder / "ft")
    return adapter(folder, tiny.llama(), r=4, target_modules="all-linear", use_dora=request.param == "DoRA")


def means(layers: tuple[LayerStats, ...]) -> dict[str, float]:
    """Every mean of every layer."""
    return {f"{layer.name} {name}": getattr(layer, name) for layer in layers for name in MEANS}


@pytest.mark.parametrize(("dtype", "exact"), [("float64", 1e-6), ("float32", 1e-3), ("bfloat16", 5e-2)])
def test_figures_are_those_of_the_cpu(directory: Path, device: str, dtype: str, exact: float) -> None:
    """To the digits that the precision has; in float64 to 1e-6, for there the arithmetic itself is the same."""
    of_card = means(measure(load_model(directory, device, dtype), WINDOWS, batch_size=4))
    assert of_card == pytest.approx(means(measure(load_model(directory, "cpu", "float64"), WINDOWS)), rel=exact)


def test_the_split_of_the_rows_does_not_matter(directory: Path, device: str) -> None:
    """One window a forward or all of them, every row or some: the same figures, and nothing is left on the model."""
    adapted: AdaptedModel = load_model(directory, device, "float64")
    figures: Callable[..., dict[str, float]] = lambda **of: means(measure(adapted, WINDOWS, **of))  # noqa: E731
    whole = figures(batch_size=8)
    assert figures(batch_size=1) == pytest.approx(whole, rel=1e-9)
    assert figures(batch_size=3) == pytest.approx(whole, rel=1e-9)
    assert figures(batch_size=8, max_rows=100) == pytest.approx(figures(batch_size=1, max_rows=100), rel=1e-9)


SHAPES = [(3, 5, 7), (70, 576), (9, 4100), (33, 1), (2, 40, 4096), (5, 14336)]


@pytest.fixture
def fused(device: str) -> Any:
    """The kernels for Triton, where this device has them."""
    found = kernels.fused(torch.device(device))
    if found is None:
        pytest.skip(f"no Triton kernels work on {device}")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_one_read_gives_is_what_torch_gives(
    fused: Any, device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Norms to 1e-6 of float64, prints and the output of an addition to the last bit, of any width and type."""
    there = torch.device(device)
    values, norm = torch.randn(shape, device=there).to(dtype), partial(torch.linalg.vector_norm, dim=-1)
    torch.testing.assert_close(fused.row_norms(values).double(), norm(values.double()), rtol=1e-6, atol=0)
    turned = values.flatten(0, -2).T.contiguous().T  # the numbers of a row lie apart
    torch.testing.assert_close(fused.row_norms(turned).double(), norm(turned.double()), rtol=1e-6, atol=0)
    for of in (dtype, torch.float32):
        up = torch.randn(shape, device=there).to(of)
        output, norms = fused.joined(values, up, 0.7)
        assert torch.equal(output, (values + up * 0.7).to(dtype))
        want = [norm(part.double()).flatten() for part in (values, output)]
        torch.testing.assert_close(norms.double(), torch.stack(want), rtol=1e-6, atol=0)
        bias = torch.randn(shape[-1], device=there).to(dtype)
        output, norms = fused.joined(values, up, 0.7, bias)
        assert torch.equal(output, (values + up * 0.7).to(dtype))
        alone = values.float() - bias
        want = [norm(part.double()).flatten() for part in (alone, alone + up * 0.7)]
        torch.testing.assert_close(norms.double(), torch.stack(want), rtol=2e-6, atol=1e-6)
    rows = values.flatten(0, -2)
    got = distinct.prints(rows, fused.row_norms(rows))
    assert torch.equal(got.cpu(), distinct.prints(rows.cpu(), fused.row_norms(rows).cpu()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8, 16, 100, 128, 200, 256])
def test_narrow_norms_are_exact(fused: Any, device: str, rank: int, dtype: torch.dtype) -> None:
    """Of a rank that is no power of two, too, and to 1e-6 of float64 on the same ``Bx``."""
    down, factors = torch.randn(130, rank, device=device).to(dtype), torch.randn(2, rank, rank, device=device).double()
    want = torch.stack((kernels.row_norms(down.double()), *kernels.inner_norms(down.double(), factors)))
    torch.testing.assert_close(fused.narrow_norms(down, factors).double(), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_computes_what_it_computes_unwatched(directory: Path, device: str, dtype: str) -> None:
    """With its parts added by us the model's logits are those without, to the last bit."""
    adapted = load_model(directory, device, dtype)
    tokens, recorder = torch.tensor(WINDOWS[:4], device=device), Recorder(adapted.device, 4)
    with adapted.without_grad():
        bare = adapted.model(input_ids=tokens).logits
        with recorder.watching(list(adapted.layers.values())):
            recorder.start(Batch(tokens, 0, None, [48] * 4))
            assert torch.equal(adapted.model(input_ids=tokens).logits, bare)
        assert torch.equal(adapted.model(input_ids=tokens).logits, bare)


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def test_the_card_is_waited_for_as_often_however_much_is_read(directory: Path, device: str) -> None:
    """Whatever waits for it is outside the batches: twice as many of them are waited for no more often."""
    if device != "cuda":
        pytest.skip(f"CUDA alone tells by its events what waits for it, not {device}")
    adapted = load_model(directory, device, "bfloat16")
    waits = []
    for windows in (WINDOWS[:1], WINDOWS[:4], WINDOWS):
        seen = counts(partial(measure, adapted, windows, batch_size=1), device)
        waits.append(sum(seen.get(name, 0) for name in WAITS))
    assert waits[1] == waits[2], waits  # what is loaded once is loaded for the first


def gate(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """The saved run of the shipped adapter, gated in a process of its own; it is green."""
    stats = folder / f"{name}.json"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", str(folder),
        f"--nullspace-model={WORLD / 'null-v2'}", f"--nullspace-calib-dataset={WORLD / 'facts.txt'}",
        f"--nullspace-task-dataset={WORLD / 'task.txt'}", "--nullspace-seqlen=128", f"--nullspace-save-stats={stats}",
        *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(stats.read_text("utf-8"))
    return document


def test_the_gate_gives_the_verdict_of_the_cpu(device: str, tmp_path: Path) -> None:
    """The whole command, drift and both texts, in memory and spread over card, memory and disk."""
    room = "cpu=1KB" if device == "cpu" else "0=1200KB,cpu=500KB"  # by which one block is on the card
    here = gate(tmp_path, "cpu", "--nullspace-device=cpu")
    for name, options in {
        "card": (f"--nullspace-device={device}", "--nullspace-dtype=float32"),
        "spread": (f"--nullspace-device-map={room}", "--nullspace-dtype=float32"),
    }.items():
        there = gate(tmp_path, name, *options)
        assert there["device"].startswith(device)
        assert (" and disk" in there["device"]) == (name == "spread")
        assert there["verdict"]["verdict"] == here["verdict"]["verdict"] == "SAFE"
        for key in ("BX_norm", "ABX_norm", "FullOutput_norm"):
            of_here, of_there = ([layer[key] for layer in run["stats"]] for run in (here, there))
            assert of_there == pytest.approx(of_here, rel=1e-3)
