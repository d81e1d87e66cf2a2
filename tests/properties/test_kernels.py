"""The kernels against synthetic subspaces and against plain float64 arithmetic."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pytest_nullspace import kernels, spectra

pytestmark = pytest.mark.filterwarnings("error")

WIDTHS = st.integers(2, 40)
SEEDS = st.integers(0, 2**31)
EXACT = 1e-6


def rows_in(basis: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random rows ``(count, d)`` inside the span of the orthonormal ``basis (k, d)``."""
    return torch.randn(count, len(basis), generator=generator, dtype=torch.float64) @ basis


def orthonormal(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows ``(count, width)``."""
    square = torch.randn(width, width, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(square)[0][:count]
    return basis


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state_of(x: Tensor, down: Tensor, up: Tensor, base: Tensor, scale: float = 1.0) -> Tensor:
    """The sums of these rows."""
    bx, wx = x @ down.mT, x @ base.mT
    return added(x, bx, wx, scale * bx @ up.mT + wx, kernels.factors(down, up, scale).matrices)


def added(x: Tensor, down: Tensor, base: Tensor, output: Tensor, factors: Tensor) -> Tensor:
    """The sums of the rows of these activations, of one layer."""
    projected, update = kernels.inner_norms(down, factors.to(down.dtype))
    norms = {"input": x, "down": down, "base": base, "output": output}
    taken = {name: kernels.row_norms(value) for name, value in norms.items()}
    return kernels.sums(projected=projected, update=update, **taken)


def naive(x: Tensor, down: Tensor, up: Tensor, base: Tensor, scale: float = 1.0) -> kernels.Means:
    """The same figures by their definitions, in float64, with an explicit projector."""
    x, down, up, base = (t.double() for t in (x, down, up, base))
    bx = x @ down.mT
    abx, wx = scale * bx @ up.mT, x @ base.mT
    projector = torch.linalg.pinv(down) @ down
    leakage = (x @ projector).norm(dim=1).square() / x.norm(dim=1).square()
    norms = [t.norm(dim=1) for t in (x, bx, abx, wx, abx + wx)]
    return kernels.Means(len(x), *(float(t.mean()) for t in (*norms, leakage)))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, B, A and W of one layer with random sizes, float32."""
    width, out, rows = draw(WIDTHS), draw(WIDTHS), draw(st.integers(1, 60))
    rank = draw(st.integers(1, width))
    generator = seeded(draw(SEEDS))
    shapes = ((rows, width), (rank, width), (out, rank), (out, width))
    x, down, up, base = (torch.randn(*shape, generator=generator) for shape in shapes)
    return x, down, up, base


@given(st.data(), WIDTHS, SEEDS)
def test_a_subspace_inside_the_complement_of_the_rows_leaks_nothing(data: st.DataObject, width: int, seed: int) -> None:
    """B inside the orthogonal complement of span(X) gives preservation 0 and leakage 0."""
    used = data.draw(st.integers(1, width - 1))
    rank = data.draw(st.integers(1, width - used))
    basis = orthonormal(width, width, seeded(seed))
    x, down = rows_in(basis[:used], 20, seeded(seed + 1)), basis[used : used + rank]
    means = kernels.compute(state_of(x, down, torch.ones(3, rank).double(), torch.ones(3, width).double()))
    assert means.down / means.input < 1e-14
    assert means.leakage < 1e-13


@given(st.data(), WIDTHS, SEEDS)
def test_a_subspace_that_holds_the_rows_takes_all(data: st.DataObject, width: int, seed: int) -> None:
    """B whose row space contains span(X) gives leakage 1, whatever B's own basis is."""
    rank = data.draw(st.integers(1, width))
    basis = orthonormal(rank, width, seeded(seed))
    mixed = torch.randn(rank, rank, generator=seeded(seed + 1), dtype=torch.float64) + 3 * torch.eye(rank)
    x = rows_in(basis, 20, seeded(seed + 2))
    down = mixed @ basis
    means = kernels.compute(state_of(x, down, torch.ones(3, rank).double(), torch.ones(3, width).double()))
    assert means.leakage == pytest.approx(1, rel=1e-6)


@given(st.integers(1, 16), SEEDS)
def test_a_random_subspace_leaks_rank_over_width(rank: int, seed: int) -> None:
    """A random B of rank r gives leakage r/d in expectation: over many rows, within five standard errors."""
    width, rows = 32, 4000
    x = torch.randn(rows, width, generator=seeded(seed))
    down = torch.randn(rank, width, generator=seeded(seed + 1))
    means = kernels.compute(state_of(x, down, torch.ones(2, rank), torch.ones(2, width)))
    # ‖Px‖²/‖x‖² of an isotropic x follows Beta(r/2, (d-r)/2).
    deviation = math.sqrt(2 * rank * (width - rank) / (width**2 * (width + 2)) / rows)
    assert abs(means.leakage - rank / width) < 5 * deviation


@given(layers(), st.floats(1e-6, 1e6))
def test_leakage_does_not_see_the_scale_of_b(layer: tuple[Tensor, Tensor, Tensor, Tensor], factor: float) -> None:
    """Leakage is unchanged when B is multiplied by a number, while preservation is multiplied by it."""
    x, down, up, base = (t.double() for t in layer)
    plain = kernels.compute(state_of(x, down, up, base))
    scaled = kernels.compute(state_of(x, factor * down, up, base))
    assert scaled.leakage == pytest.approx(plain.leakage, rel=1e-6, abs=1e-12)
    assert scaled.down == pytest.approx(factor * plain.down, rel=EXACT)


@given(layers(), st.floats(-4, 4).filter(lambda s: abs(s) > 0.01))
def test_every_mean_is_that_of_plain_float64_arithmetic(
    layer: tuple[Tensor, Tensor, Tensor, Tensor], scale: float
) -> None:
    """On float64 activations every figure agrees with its definition to 1e-9 relative."""
    x, down, up, base = (t.double() for t in layer)
    got = kernels.compute(state_of(x, down, up, base, scale))
    assert got == pytest.approx(naive(x, down, up, base, scale), rel=1e-7, abs=1e-12)


@given(layers(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_rows_are_measured_within_their_precision(
    layer: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    """The norm of half-precision rows is that of their float64 values: no precision beyond the rows' own is lost."""
    x = layer[0].to(dtype)
    assert kernels.row_norms(x).dtype == torch.float32
    torch.testing.assert_close(kernels.row_norms(x).double(), x.double().norm(dim=-1), rtol=EXACT, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_that_are_converted_in_parts_lose_none(dtype: torch.dtype) -> None:
    """Each of several parts, the last one shorter, gives the norms of its own rows, whatever the leading shape."""
    width = 1 << 14
    x = torch.randn(3, 2 * kernels.CONVERTED // width // 3 + 2, width, generator=seeded(0)).to(dtype)
    assert x.shape[0] * x.shape[1] * width % kernels.CONVERTED
    torch.testing.assert_close(kernels.row_norms(x).double(), x.double().norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 1031, 4096])
def test_no_rows_have_no_norms(width: int, dtype: torch.dtype) -> None:
    """Where a cap leaves a window no row, there is nothing to take and no error."""
    assert kernels.row_norms(torch.empty(0, width, dtype=dtype)).shape == (0,)
    assert kernels.row_norms(torch.empty(3, 0, width, dtype=dtype)).shape == (3, 0)


@pytest.mark.parametrize("width", [1024, 1536, 1031, 11008, 14336, 28672])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_are_summed_without_drift(width: int, dtype: torch.dtype) -> None:
    """Rounding does not add up over wide rows, not even where all their numbers are alike or one outweighs the rest."""
    x = torch.randn(4, width, generator=seeded(0))
    x[1], x[2] = 1.1, x[2].relu() ** 3
    x[3, 7] = 1e3
    x = x.to(dtype)
    torch.testing.assert_close(kernels.row_norms(x).double(), x.double().norm(dim=-1), rtol=1e-6, atol=0)


@given(layers(), st.data())
def test_any_split_of_the_rows_in_any_order_gives_the_same_answer(
    layer: tuple[Tensor, Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    """The sums of the parts add up to those of the whole, for every partition of the rows and whatever their order."""
    x, down, up, base = (t.double() for t in layer)
    whole = kernels.compute(state_of(x, down, up, base))
    order = torch.tensor(data.draw(st.permutations(range(len(x)))))
    parts = data.draw(st.integers(1, len(x)))
    states = [state_of(part, down, up, base) for part in x[order].tensor_split(parts)]
    split = kernels.compute(torch.stack(data.draw(st.permutations(states))).sum(dim=0))
    assert split == pytest.approx(whole, rel=EXACT, abs=1e-12)


@given(layers(), st.integers(-35, 35))
def test_norms_called_safe_are_right_whatever_their_magnitude(
    layer: tuple[Tensor, Tensor, Tensor, Tensor], exponent: int
) -> None:
    """Float32 norms are right wherever they are called safe; elsewhere those of float64 values are, and are safe."""
    x = layer[0].clamp(-3, 3) * 10.0**exponent
    want = x.double().norm(dim=-1)
    norms = kernels.row_norms(x)
    if bool(kernels.safe(norms)):
        torch.testing.assert_close(norms.double(), want, rtol=EXACT, atol=0)
    else:
        assert not (float(want.min()) > 1e-14 and float(want.max()) < 1e14)
    assert bool(kernels.safe(kernels.row_norms(x.double())))
    torch.testing.assert_close(kernels.row_norms(x.double()), want, rtol=1e-12, atol=0)


@given(layers(), st.lists(st.integers(-35, 35), min_size=1, max_size=4))
def test_exact_norms_are_right_whatever_the_magnitude_of_each_row(
    layer: tuple[Tensor, Tensor, Tensor, Tensor], exponents: list[int]
) -> None:
    """Each row has its norm to 1e-6, also one that float32 cannot square, beside rows of any other length and zeros."""
    x = layer[0].clamp(-3, 3)
    scales = torch.tensor([10.0**exponent for exponent in exponents])
    x = torch.cat((x * scales[torch.arange(len(x)) % len(scales), None], torch.zeros(1, x.shape[1])))
    torch.testing.assert_close(kernels.exact_row_norms(x), x.double().norm(dim=-1), rtol=EXACT, atol=0)


@given(layers(), st.integers(2, 4))
def test_layers_that_are_summed_together_are_summed_apart(
    layer: tuple[Tensor, Tensor, Tensor, Tensor], count: int
) -> None:
    """Leading dimensions are carried along: layers stacked give what each gives alone."""
    x, down, up, base = (t.double() for t in layer)
    xs = [x * (i + 1) for i in range(count)]
    factors = kernels.factors(down, up, 2.0).matrices
    parts = [(v, v @ down.mT, v @ base.mT, v @ base.mT + v @ down.mT @ up.mT) for v in xs]
    together = added(*(torch.stack(part) for part in zip(*parts, strict=True)), factors)  # type: ignore[call-arg]
    alone = torch.stack([added(*part, factors) for part in parts])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@given(st.integers(2, 30), SEEDS)
def test_a_rank_deficient_b_is_measured_by_the_space_that_it_spans(width: int, seed: int) -> None:
    """Repeated and zero rows of B change no leakage: the projector is on what B spans."""
    rank = max(1, width // 2)
    down = orthonormal(rank, width, seeded(seed))
    x = torch.randn(10, width, generator=seeded(seed + 1), dtype=torch.float64)
    deficient = torch.cat((down, down[:1], torch.zeros(1, width)))
    up, base = torch.ones(2, rank).double(), torch.ones(2, width).double()
    plain = kernels.compute(state_of(x, down, up, base))
    wide = kernels.compute(state_of(x, deficient, torch.ones(2, rank + 2).double(), base))
    assert wide.leakage == pytest.approx(plain.leakage, rel=1e-9, abs=1e-12)


@st.composite
def gauges(draw: st.DrawFn, rank: int) -> Tensor:
    """An invertible matrix ``(rank, rank)``: a mixing of moderate condition between two scalings by powers of two."""
    generator = seeded(draw(SEEDS))
    turns = [orthonormal(rank, rank, generator) for _ in range(2)]
    condition = draw(st.sampled_from([1.0, 10.0, 1e3]))
    mixing = turns[0] * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) @ turns[1]
    kind = draw(st.sampled_from(["mixing", "order", "scaled"]))
    if kind == "order":
        mixing = torch.eye(rank, dtype=torch.float64)[draw(st.permutations(range(rank)))]
    powers = draw(st.lists(st.integers(-40, 40), min_size=rank, max_size=rank))
    return mixing if kind == "mixing" else mixing * 2.0 ** torch.tensor(powers, dtype=torch.float64)[:, None]


@given(layers(), st.data())
def test_the_update_is_judged_and_not_how_it_is_written(
    layer: tuple[Tensor, Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    """``(A M⁻¹)(M B)`` is ``A B``: for any invertible M leakage and update are what they were, and so is the rank."""
    x, down, up, base = (t.double() for t in layer)
    gauge = data.draw(gauges(len(down)))
    other_down, other_up = gauge @ down, torch.linalg.solve(gauge, up, left=False)
    plain, other = (kernels.compute(state_of(x, b, a, base)) for b, a in ((down, up), (other_down, other_up)))
    figures = [(means.leakage, means.update, means.output) for means in (plain, other)]
    assert figures[1] == pytest.approx(figures[0], rel=EXACT, abs=1e-9)
    assert kernels.factors(other_down, other_up, 1.0).rank == kernels.factors(down, up, 1.0).rank


@given(layers(), st.integers(-100, 100), st.data())
def test_in_float32_a_scaled_row_is_a_row_like_any(
    layer: tuple[Tensor, Tensor, Tensor, Tensor], power: int, data: st.DataObject
) -> None:
    """A row of B by a power of two and its column of A by the inverse change no figure, though Bx is in float32."""
    x, down, up, base = layer
    row = data.draw(st.integers(0, len(down) - 1))
    other_down, other_up = down.clone(), up.clone()
    other_down[row] *= 2.0**power
    other_up[:, row] *= 2.0**-power
    bx, wx = x @ down.mT, x @ base.mT
    other_bx = bx.clone()
    other_bx[:, row] *= 2.0**power  # the float32 product may take another order where a matrix holds other numbers
    output = bx @ up.mT + wx
    plain, other = (
        kernels.compute(added(x, b, wx, output, kernels.factors(d, u, 1.0).matrices))
        for b, d, u in ((bx, down, up), (other_bx, other_down, other_up))
    )
    assert (other.leakage, other.update) == pytest.approx((plain.leakage, plain.update), rel=EXACT)


def test_what_only_float32_tells_from_nothing_counts_where_it_carries_the_update() -> None:
    """A row that is another one but for 2⁻²⁷ of a third direction spans that direction, if A makes up for it."""
    down, up = torch.eye(8)[:2], torch.ones(5, 2)
    mixed = torch.stack((down[0], down[0] + 2.0**-27 * down[1]))
    undone = torch.stack((up[:, 0] - 2.0**27 * up[:, 1], 2.0**27 * up[:, 1]), dim=1)
    assert kernels.factors(mixed, undone, 1.0).rank == 2
    assert kernels.factors(mixed, up, 1.0).rank == 1
    assert kernels.factors(mixed, torch.zeros(5, 2), 1.0).rank == 1


@given(st.integers(1, 6), st.integers(7, 40), SEEDS)
def test_rows_that_are_made_of_others_span_nothing_more(rank: int, width: int, seed: int) -> None:
    """Sums of others to float32's rounding, repeated rows and rows of zeros do not count, whatever their length."""
    down = torch.randn(rank, width, generator=seeded(seed))
    sums = torch.randn(3, rank, generator=seeded(seed + 1)) @ down
    made = torch.cat((down, 2.0**20 * sums, -down[:1], torch.zeros(1, width)))
    found = kernels.factors(made, torch.randn(9, len(made), generator=seeded(seed + 2)), 1.0)
    assert found.rank == rank
    assert not found.matrices[0, rank:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", range(4))
def test_a_single_non_finite_activation_makes_its_mean_non_finite(value: float, part: int) -> None:
    """NaN or infinity in one element of one row cannot vanish in a mean."""
    activations = [torch.randn(6, 4, generator=seeded(part)) for _ in range(4)]
    activations[part][3, 2] = value
    x, down, base, output = activations
    means = kernels.compute(added(x, down, base, output, kernels.factors(torch.eye(4), torch.eye(4), 1.0).matrices))
    assert not math.isfinite((means.input, means.down, means.base, means.output)[part])
    assert math.isfinite(means.update) == (part != 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_a_non_finite_weight_makes_what_is_measured_with_it_non_finite(value: float, part: int) -> None:
    """NaN or infinity in B or A cannot vanish in the factors that stand for them."""
    down, up = torch.eye(4), torch.eye(4)
    (down, up)[part][2, 1] = value
    x = torch.randn(6, 4, generator=seeded(part))
    means = kernels.compute(added(x, x, x, x, kernels.factors(down, up, 1.0).matrices))
    assert not math.isfinite((means.leakage, means.update)[part])


def test_rows_of_zeros_have_no_direction_and_do_not_dilute_leakage() -> None:
    """A zero row counts in the norms, but leakage is the mean over the rows that have a direction."""
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    state = state_of(x, torch.tensor([[1.0, 0.0]]), torch.ones(2, 1), torch.ones(2, 2))
    means = kernels.compute(state)
    assert means.leakage == pytest.approx(9 / 25)
    assert means.input == pytest.approx(2.5)


def test_no_rows_give_no_figures() -> None:
    """The mean of nothing is NaN, which no verdict passes; zero would pass."""
    means = kernels.compute(torch.zeros(len(kernels.Sums._fields)))
    assert means.rows == 0
    assert all(math.isnan(value) for value in means[1:])


def test_a_zero_b_spans_nothing() -> None:
    """B = 0 has no row space, so nothing leaks and nothing is divided by zero."""
    means = kernels.compute(state_of(torch.randn(5, 4), torch.zeros(2, 4), torch.ones(3, 2), torch.ones(3, 4)))
    assert means.leakage == 0
    assert means.down == 0


@st.composite
def norms_with_sinks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """The norms of rows, of which few or many may be far larger than the others, or zero, and others beside them."""
    rows, few = draw(st.integers(1, 60)), draw(st.integers(0, 8))
    generator = seeded(draw(SEEDS))
    x = torch.rand(rows + few, generator=generator, dtype=torch.float64) + 0.05
    x[:few] *= draw(st.sampled_from([2.0, 9.0, 40.0, 1e4]))
    x[few : few + draw(st.integers(0, rows))] *= draw(st.sampled_from([0.0, 1.0, 1e-3]))
    return x * 10.0 ** draw(st.integers(-6, 6)), torch.rand(len(x), generator=generator, dtype=torch.float64)


def without_sinks_by_definition(x: Tensor, other: Tensor, times: int) -> list[float]:
    """Rows, and sums over them, but those beyond ``times`` the median of what is not zero, rounded up."""
    seen = sorted(value for value in x.tolist() if value)
    median = seen[(len(seen) - 1) // 2] if seen else 0.0
    quiet = x < times * 2.0 ** math.frexp(median)[1] if seen else torch.ones_like(x, dtype=torch.bool)
    return [int(quiet.sum()), float(x[quiet].sum()), float(other[quiet].sum())]


@given(norms_with_sinks(), st.sampled_from([1, 2, 8, 64]), st.sampled_from([torch.float32, torch.float64]), st.data())
def test_rows_far_beyond_the_median_are_left_out_however_the_rows_are_split(
    norms: tuple[Tensor, Tensor], times: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """What is summed without sinks is the sum under the mask of the rule, whatever the split and order of the rows."""
    x, other = (part.to(dtype) for part in norms)
    want = without_sinks_by_definition(x.double(), other.double(), times)
    order = torch.tensor(data.draw(st.permutations(range(len(x)))))
    cuts = data.draw(st.integers(1, len(x)))
    split = [part[order].tensor_split(cuts) for part in (x, other)]
    summed = torch.stack([kernels.sums_by_octave(*of) for of in zip(*split, strict=True)]).sum(dim=0)
    assert summed[:, 0].sum() == len(x)
    assert kernels.without_sinks(summed, times).tolist() == pytest.approx(want, rel=1e-9)
    together = kernels.sums_by_octave(torch.stack((x, 2 * x)), torch.stack((other, other)))
    torch.testing.assert_close(together[0], kernels.sums_by_octave(x, other), rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_no_number_is_no_error_of_the_octaves(value: float) -> None:
    """Its layer is a defect by its own means; here it is a row of the last octave, as what overflows it is."""
    by_octave = kernels.sums_by_octave(torch.tensor([1.0, value, 1e30]))
    assert by_octave[:, 0].tolist() == [0.0] * 52 + [1.0] + [0.0] * (kernels.OCTAVES - 54) + [2.0]


def test_of_no_rows_none_are_sinks() -> None:
    """A layer that no row reached has sums of zero with and without sinks."""
    assert not kernels.without_sinks(kernels.sums_by_octave(torch.empty(0), torch.empty(0)), 8).any()


@given(st.data(), WIDTHS, WIDTHS, SEEDS)
def test_singular_values_and_vectors_are_those_of_the_whole_decomposition(
    data: st.DataObject, out: int, width: int, seed: int
) -> None:
    """Of a matrix of any rank: the values, the space of the leading right vectors, and orthonormal rows."""
    rank, generator = data.draw(st.integers(1, min(out, width))), seeded(seed)
    matrix = torch.randn(out, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    values, rows = spectra.singular(matrix, rank)
    assert torch.allclose(values, torch.linalg.svdvals(matrix.double()), atol=1e-6 * float(values[0]), rtol=0)
    assert torch.allclose(rows @ rows.mT, torch.eye(rank, dtype=torch.float64), atol=1e-9)
    if float(values[rank - 1]) > 1e-3 * float(values[0]):
        assert torch.allclose(matrix.double() @ rows.mT @ rows, matrix.double(), atol=1e-5 * float(values[0]))
    assert torch.allclose(spectra.singular(matrix, 0)[0], values, atol=1e-6 * float(values[0]), rtol=0)
    shares = values[values > 0] / values.sum()
    assert spectra.effective_rank(values) == pytest.approx(float((-shares * shares.log()).sum().exp()), rel=EXACT)


@given(st.integers(1, 20), st.integers(1, 20))
def test_the_effective_rank_of_equal_values_is_their_number(count: int, zeros: int) -> None:
    """N equal singular values give n, however many are zero beside them; none at all give 0."""
    values = torch.cat((torch.full((count,), 3.0), torch.zeros(zeros))).double()
    assert spectra.effective_rank(values) == pytest.approx(count, rel=EXACT)
    assert spectra.effective_rank(0 * values) == 0


def test_a_matrix_that_is_no_number_has_no_singular_values() -> None:
    """NaN gives NaN in the shapes that numbers would have, and no error of a library."""
    values, rows = spectra.singular(torch.full((3, 5), torch.nan), 2)
    assert (values.shape, rows.shape) == ((3,), (2, 5))
    assert bool(values.isnan().all())
    assert bool(rows.isnan().all())


def test_no_b_stands_for_nothing() -> None:
    """A layer without a down projection has no factors, and its rows no norms of ``Bx``."""
    none = kernels.factors(torch.empty(0, 5), torch.empty(7, 0), 1.0)
    assert (none.rank, none.matrices.shape) == (0, (2, 0, 0))
    projected, update = kernels.inner_norms(torch.empty(4, 0), none.matrices.float())
    assert (projected.tolist(), update.tolist()) == ([0.0] * 4, [0.0] * 4)


@given(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.booleans(), WIDTHS, SEEDS)
def test_what_joins_two_parts_adds_and_measures(dtype: torch.dtype, is_half: bool, width: int, seed: int) -> None:
    """The output is torch's own, in the base's type, and the norms are of the base and of that output, row by row."""
    base, up = torch.randn(2, 3, 4, width, generator=seeded(seed)).to(dtype)
    up, scale = up if is_half else up.to(torch.promote_types(dtype, torch.float32)), (seed % 7 + 1) / 3
    output, norms = kernels.joined(base, up, scale)
    assert torch.equal(output, (base + up * scale).to(dtype))
    assert output.dtype == dtype
    want = torch.stack([part.double().flatten(0, 1).norm(dim=-1) for part in (base, output)])
    torch.testing.assert_close(norms.double(), want, rtol=EXACT, atol=0)


@given(st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]), SEEDS)
def test_narrow_norms_are_those_of_float64(rank: int, dtype: torch.dtype, seed: int) -> None:
    """Of ``Bx`` alone, and of what two matrices make of it."""
    down, matrices = torch.randn(11, rank, generator=seeded(seed)).to(dtype), torch.randn(2, rank, rank).double()
    want = torch.stack([down.double().norm(dim=-1), *((down.double() @ matrix.mT).norm(dim=-1) for matrix in matrices)])
    torch.testing.assert_close(kernels.narrow_norms(down, matrices).double(), want, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 3), st.integers(0, 5), SEEDS)
def test_many_layers_lose_their_sinks_as_each_does(layers: int, sinks: int, seed: int) -> None:
    """The sums without sinks of many layers at once are those of each."""
    norms = 1 + torch.rand(layers, 40, generator=seeded(seed))
    norms[:, :sinks] *= 1e3
    apart = kernels.sums_by_octave(norms, norms)
    want = torch.stack([kernels.without_sinks(of, 8) for of in apart])
    torch.testing.assert_close(kernels.without_sinks(apart, 8), want, rtol=0, atol=0)
    for of, rows in zip(want, norms, strict=True):
        assert of[0] == 40 - sinks
        assert float(of[1]) == pytest.approx(float(rows[sinks:].sum()), rel=EXACT)


@pytest.mark.parametrize("short", [1e-170, 1e-200, 5e-324])
def test_rows_too_short_to_be_squared_count_as_none(short: float) -> None:
    """A B whose rows have no square in float64 spans nothing, alone or beside rows that do, and is no error."""
    down, up = torch.randn(3, 6, generator=seeded(0)).double(), torch.randn(5, 3, generator=seeded(1)).double()
    none = kernels.factors(down * short, up, 1.0)
    assert (none.rank, none.shortest) == (0, 0.0)
    assert not none.matrices[0].any()
    down[1] *= short
    some = kernels.factors(down, up, 1.0)
    assert some.rank == 2
    assert bool(some.matrices.isfinite().all())
