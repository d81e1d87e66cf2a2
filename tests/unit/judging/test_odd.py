"""Layers that are unlike their own kind: the figures, the robust deviations, and what an adapter of any size costs."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.judging.odd import BOUND, FEWEST, FLOOR, family, oddities
from pytest_nullspace.judging.weights import LayerWeights, Weights, concentration, kurtosis, weigh
from pytest_nullspace.report.odd import lines
from tests import tiny

KIND = "model.layers.{}.self_attn.q_proj"


def layer(name: str, norm: float = 1.0, used: float = 4.0, sigma: float = 0.5, more: float = 2.0) -> LayerWeights:
    return LayerWeights(name, 8, 1.0, 1.0, 1.0, None, norm, used, sigma, 0.3, more)


def alike(count: int, kind: str = KIND) -> list[LayerWeights]:
    """A family whose sizes grow a little with depth."""
    return [layer(kind.format(n), 1 + 0.01 * n, sigma=0.5 + 0.005 * n) for n in range(count)]


def test_the_figures_are_those_of_the_update(tmp_path: Path) -> None:
    """Singular values, energy and kurtosis of A B by its factors are those of the whole matrix."""
    checkpoint = open_checkpoint(tiny.lora_null(tmp_path / "ft"))
    (first, *_) = weigh(checkpoint, {layer.name for layer in checkpoint.layers}).layers
    from safetensors.numpy import load_file

    held = load_file(tmp_path / "ft" / "model.safetensors")
    up, down = (held[f"{first.name}.{part}Linear.weight"].astype(np.float64) for part in "AB")
    values = np.linalg.svd(up @ down, compute_uv=False)[: len(down)]
    apart = values - values.mean()
    assert first.sigma == pytest.approx(values[0], rel=1e-6)
    assert first.concentration == pytest.approx(values[0] ** 2 / (values**2).sum(), rel=1e-6)
    assert first.kurtosis == pytest.approx((apart**4).mean() / (apart**2).mean() ** 2, rel=1e-6)


def test_what_has_no_figure_has_none() -> None:
    """Nothing is told of zeros; equal values, and fewer than four, have no kurtosis."""
    assert math.isnan(concentration(np.zeros(4)))
    assert math.isnan(kurtosis(np.zeros(4)))
    assert math.isnan(kurtosis(np.full(4, 0.1)))
    assert math.isnan(kurtosis(np.array([3.0, 2.0, 1.0])))
    assert math.isnan(kurtosis(np.full(4, math.nan)))


@pytest.mark.parametrize("size", [1e-170, 1e170])
def test_shares_and_shape_are_of_numbers_of_any_size(size: float) -> None:
    """What float64 cannot square has the energy in one direction, and the kurtosis, of the same at 1."""
    values = np.array([4.0, 2.0, 1.5, 1.0, 0.1])
    assert concentration(size * values) == pytest.approx(concentration(values), rel=1e-12)
    assert kurtosis(size * values) == pytest.approx(kurtosis(values), rel=1e-12)


@given(st.lists(st.floats(0.1, 10), min_size=FEWEST, max_size=30), st.floats(1e-3, 1e3))
def test_deviations_are_robust_and_keep_no_scale(norms: list[float], scale: float) -> None:
    """They are from the median in units of 1.4826 MAD of the logarithms, whatever the strength of the adapter."""
    layers = [layer(KIND.format(n), norm) for n, norm in enumerate(norms)]
    found = {odd.layer: odd.deviations for odd in oddities(Weights(tuple(layers))).found}
    logs = [math.log(norm) for norm in norms]
    usual = statistics.median(logs)
    spread = max(1.4826 * statistics.median([abs(value - usual) for value in logs]), FLOOR)
    naive = {KIND.format(n): (value - usual) / spread for n, value in enumerate(logs)}
    assert found == {name: pytest.approx(far) for name, far in naive.items() if abs(far) > BOUND}
    louder = tuple(layer(KIND.format(n), norm * scale) for n, norm in enumerate(norms))
    again = {odd.layer: odd.deviations for odd in oddities(Weights(louder)).found}
    shared = set(found) & set(again)
    assert all(again[name] == pytest.approx(found[name], rel=1e-6) for name in shared)
    assert all(abs(naive[name]) == pytest.approx(BOUND, rel=1e-6) for name in set(found) ^ set(again))


def test_a_planted_layer_is_odd_in_its_own_family_alone() -> None:
    """Another projection may be of another size, and another tower; the same size is odd where it is not usual."""
    loud = [layer(KIND.replace("q_proj", "v_proj").format(n), 50.0) for n in range(12)]
    tower = [layer(f"vision.layers.{n}.self_attn.q_proj", 50.0) for n in range(12)]
    held = [*alike(12), *loud, *tower]
    assert oddities(Weights(tuple(held))).found == ()
    held[3] = layer(KIND.format(3), 50.0)
    found = oddities(Weights(tuple(held)))
    assert [(odd.layer, odd.figure, odd.family) for odd in found.found] == [
        (KIND.format(3), "norm", "model.layers.*.self_attn.q_proj")
    ]
    assert found.held == 36
    (head, told) = (line for line, _ in lines(Weights(tuple(held))))
    assert head == "odd layers: 1 of 36 lie far from their own kind in this adapter"
    assert told.startswith(f"  {KIND.format(3)}: norm 46.9 x the usual (+")
    assert "backdoor" not in head + told
    assert "clean" not in head + told


def test_all_but_equal_layers_are_not_odd_by_their_last_digits() -> None:
    """Where half of a family is the very same, a hundredth more is nothing, and twice as much is odd."""
    same = [layer(KIND.format(n)) for n in range(10)]
    assert oddities(Weights((*same, layer(KIND.format(10), 1.01)))).found == ()
    assert [odd.layer for odd in oddities(Weights((*same, layer(KIND.format(10), 2.0)))).found] == [KIND.format(10)]


def test_small_families_and_dead_layers_tell_nothing() -> None:
    """Fewer than eight layers with an update are not held, which is said; dead ones and NaN do not count."""
    few = alike(FEWEST - 1)
    found = oddities(Weights((*few, layer(KIND.format(7), 0.0), layer(KIND.format(8), math.nan))))
    assert (found.found, found.held, len(found.alone)) == ((), 0, FEWEST - 1)
    assert [line for line, _ in lines(Weights(tuple(few)))] == [
        "odd layers: not told, for no family has 8 layers with an update"
    ]
    mixed = Weights((*few, *alike(FEWEST, "h.{}.mlp.c_fc")))
    assert [line for line, _ in lines(mixed)] == [
        "odd layers: 0 of 8 lie far from their own kind in this adapter; 7 in families of fewer than 8 were not held"
    ]
    assert list(lines(Weights(()))) == []


def test_a_family_is_a_path_with_its_numbers_left_open() -> None:
    """Blocks and experts are of one kind, towers and projections are not."""
    assert family("model.layers.11.mlp.experts.3.up_proj") == "model.layers.*.mlp.experts.*.up_proj"
    assert family("encoder.1.fc1") != family("decoder.1.fc1")


WIDTH, INNER, BLOCKS, RANK, MOST = 16384, 53248, 126, 64, 200
"""Of a model of 405 billion parameters, an adapter's rank, and the megabytes that reading it may take."""
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (1024, WIDTH), "self_attn.v_proj": (1024, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}  # fmt: skip


def huge(directory: Path, rank: int = RANK) -> Path:
    """An adapter of that size whose file is a hole but for its header."""
    directory.mkdir()
    header, end = {}, 0
    for block in range(BLOCKS):
        for part, (out, width) in SHAPES.items():
            for matrix, shape in (("A", (rank, width)), ("B", (out, rank))):
                begin, end = end, end + 2 * math.prod(shape)
                name = f"base_model.model.model.layers.{block}.{part}.lora_{matrix}.weight"
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "adapter_model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


MEASURE = """
import sys
from pathlib import Path
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.judging.odd import oddities
from pytest_nullspace.judging.weights import weigh
checkpoint = open_checkpoint(Path(sys.argv[1]))
layers = {layer.name for layer in checkpoint.layers if not sys.argv[2] or sys.argv[2] in layer.name}
oddities(weigh(checkpoint, layers))
assert "torch" not in sys.modules
# Not getrusage, which begins with what the parent had.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(checkpoint.layers), len(layers), int(peak) / 1024)
"""


def test_an_adapter_of_the_largest_model_takes_little_memory(tmp_path: Path) -> None:
    """Its header and the layers of one block, the largest among them, in less than 200 MB and without torch."""
    directory = huge(tmp_path / "huge")
    run = [sys.executable, "-c", MEASURE, str(directory), ".layers.60."]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    layers, weighed, megabytes = map(float, done.stdout.split())
    assert (layers, weighed) == (BLOCKS * len(SHAPES), len(SHAPES))
    assert megabytes < MOST
