"""Several adapters of one base to the first order: what each would make of the base's own activations, in one pass.

No adapter runs. A hook on each linear layer of the plain base has its input ``x`` and its output ``W x``; the B of all
adapters, stacked, make one product with ``x``, and `kernels.Factors` give the rest from it. So how many adapters there
are changes the width of that product alone. What an adapter does in one layer reaches none of the later ones here,
which is why the figures are of the first order.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pytest_nullspace import kernels
from pytest_nullspace.measuring.digits import blurs, cancels, product, weight_of
from pytest_nullspace.measuring.factors import of_layers
from pytest_nullspace.measuring.forward import forwards
from pytest_nullspace.measuring.rows import Batch, Layout, Rows, is_routed
from pytest_nullspace.measuring.streaming import batch_of, counted_rows
from pytest_nullspace.model import AdaptedLayer, AdaptedModel
from pytest_nullspace.model.stored import stored


class Screened(NamedTuple):
    """What one adapter would make of the base's activations at one layer.

    Attributes:
        means: The mean norms; the output's is that of ``W x``, for no sum of the two is taken.
        down_rank: How many directions the rows of B span.
        down_weight_norm: Frobenius norm of B.
        unplaced: In how many batches its rows could not be told to be tokens of the text.
    """

    means: kernels.Means
    down_rank: int
    down_weight_norm: float
    unplaced: int


@dataclass(frozen=True)
class Place:
    """A linear layer of the base under all adapters that adapt it.

    Attributes:
        name: Its module path.
        module: The layer.
        owners: The numbers of these adapters.
        ranks: How many directions the rows of B span, of each.
        lengths: The Frobenius norm of B, of each.
        down: Their B as they are stored, rows of zeros where one has fewer than another, shape ``(n · r, in)``.
        weights: `digits.weight_of` each, shape ``(n,)``, float64; zeros where ``Bx`` is no float32.
        blurs: Whether the rounding of a product in its precision would outweigh what is asked for.
        matrices: What follows from them, padded likewise, whitening above root, shape ``(n, 2r, r)``, float64.
        quick: The same as it is multiplied with.
    """

    name: str
    module: nn.Module
    owners: Sequence[int]
    ranks: Sequence[int]
    lengths: Sequence[float]
    down: Tensor
    weights: Tensor
    blurs: bool
    matrices: Tensor
    quick: Tensor

    @classmethod
    def of(
        cls, name: str, owners: Sequence[int], layers: Sequence[AdaptedLayer], found: Sequence[kernels.Factors]
    ) -> "Place":
        """The layer of that name, as each of its ``owners`` adapts it."""
        each = [layer.down_matrix() for layer in layers]
        most = max(map(len, each))
        down = torch.stack([_padded(of, most) for of in each])
        matrices = torch.stack([_padded(_padded(of.matrices, most).mT, most).mT for of in found]).flatten(1, 2).to(down)
        dtype = reduce(torch.promote_types, {stored(layer.down, "weight").dtype for layer in layers})
        weights = [weight_of(of, down.shape[-1]) if dtype == torch.float32 else 0.0 for of in found]
        return cls(
            name,
            layers[0].base,
            owners,
            [of.rank for of in found],
            kernels.row_norms(down.flatten(1)).tolist(),
            down.flatten(0, 1).to(dtype),
            torch.tensor(weights, dtype=torch.float64),
            any(blurs(of, dtype) for of in found),
            matrices,
            matrices.to(torch.promote_types(dtype, torch.float32)),
        )

    def sums(self, read: "_Input", base: Tensor, room: "_Room", exact: int) -> Tensor | None:
        """What rows add up to, each figure and the same over ``‖x‖²``; None where float32 is seen to lose digits.

        Rows lie along the last dimension, so that sums over the few directions of an adapter run over many of them at
        once.

        Args:
            read: The rows ``x``.
            base: ``W x``, shape ``(rows, out)``.
            room: Where products may lie.
            exact: What is taken in float64: 0, nothing; 1, ``Bx``; 2, all that is made of it as well.

        Returns:
            ``‖W x‖``, ``‖Bx‖`` of each adapter, and in turn ``‖Px‖²`` and ``‖scale · ABx‖`` of each; shape
            ``(1 + 3n, 2)``.
        """
        count, matrices = len(self.owners), self.matrices if exact > 1 else self.quick
        rows, kept = (read.rows, self.down.double()) if exact else (read.rows.to(self.down.dtype), self.down)
        down = torch.mm(kept, rows.mT, out=room.of(0, kept, len(kept), len(rows)))
        down = down.to(matrices.dtype).view(count, len(kept) // count, len(rows))
        inside = torch.bmm(matrices, down, out=room.of(1, down, *matrices.shape[:2], len(rows)))
        inside = inside.view(2 * count, *down.shape[1:])
        length = kernels.row_norms(base.double() if exact > 1 else base)
        each = torch.cat((length[None].square(), down.square_().sum(dim=1), inside.square_().sum(dim=1)))
        looked = exact < 2 and kernels.at_hand(each.device)
        if looked and not (read.is_exact and _holds(each)):
            return None
        each[: 1 + count].sqrt_()
        each[2 + count :: 2].sqrt_()
        sums = each.double() @ read.weights.mT
        cancelled = looked and not exact and cancels(self.weights, read.length, sums[1 : 1 + count, 0]).any()
        return None if cancelled else sums


class _Room:
    """Memory that each layer uses again: it stays in the cache, where what was freed would be fetched anew."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.dtype], Tensor] = {}

    def of(self, number: int, like: Tensor, *shape: int) -> Tensor:
        """That of this ``number``, of this shape, in the type of ``like`` and where that lies."""
        size, held = math.prod(shape), self._held.get((number, like.dtype))
        if held is None or len(held) < size:
            held = self._held[number, like.dtype] = like.new_empty(size)
        return held[:size].view(shape)


def _holds(squares: Tensor) -> bool:
    """Whether all squares of norms are exact."""
    low, high = squares.aminmax() if squares.numel() else (1.0, 1.0)
    return kernels.FLOAT32_SAFE[0] ** 2 <= float(low) and float(high) <= kernels.FLOAT32_SAFE[1] ** 2


def _padded(rows: Tensor, most: int) -> Tensor:
    """``rows (…, r, d)`` with rows of zeros behind them, ``most`` in all."""
    lacking = most - rows.shape[-2]
    return nn.functional.pad(rows, (0, 0, 0, lacking)) if lacking else rows


def places(adapters: Sequence[Mapping[str, AdaptedLayer]]) -> list[Place]:
    """Each layer that one of the ``adapters`` adapts, in the order in which they name them."""
    flat = [(owner, name, layer) for owner, layers in enumerate(adapters) for name, layer in layers.items()]
    held: dict[str, list[tuple[int, AdaptedLayer, kernels.Factors]]] = {}
    for (owner, name, layer), of in zip(flat, of_layers([layer for *_, layer in flat]).told(), strict=True):
        held.setdefault(name, []).append((owner, layer, of))
    return [Place.of(name, *zip(*of, strict=True)) for name, of in held.items()]


class _Input(NamedTuple):
    """What layers read, once for all that share it.

    Attributes:
        rows: The counted ones, shape ``(rows, in)``.
        told: How many there are, how many are not zero, and the sum of the norms, shape ``(3,)``.
        weights: What a figure of a row weighs in its sum: 1, or ``‖x‖⁻²``; shape ``(2, rows)``, float64.
        length: The norm of the norms.
        is_exact: Whether the norms are, as far as they were looked at.
    """

    rows: Tensor
    told: Tensor
    weights: Tensor
    length: Tensor
    is_exact: bool

    @classmethod
    def of(cls, rows: Tensor) -> "_Input":
        """Of these rows."""
        norms = kernels.row_norms(rows)
        wide = norms.double()
        directed = wide > 0
        weights = torch.stack((torch.ones_like(wide), wide.pow(-2).where(directed, 0.0)))
        told = torch.stack((weights[0], directed.double(), wide)).sum(dim=1)
        return cls(rows, told, weights, wide.norm(), not kernels.at_hand(norms.device) or kernels.safe(norms))


class Screen:
    """Takes what all adapters would make of the base's activations while it runs."""

    def __init__(self, held: Sequence[Place], device: torch.device) -> None:
        self._places, self._device = held, device
        self.rows = Rows()
        # Of each place beside the rows of tokens those that were routed there, which count where there are no others.
        self._told = torch.zeros(len(held), 2, 3, dtype=torch.float64, device=device)
        most = max(len(place.owners) for place in held)
        self._sums = self._told.new_zeros(len(held), 2, 1 + 3 * most, 2)
        self._of = [
            [(told, sums[: 1 + 3 * len(place.owners)]) for told, sums in zip(*both, strict=True)]
            for place, *both in zip(held, self._told, self._sums, strict=True)
        ]
        self._unplaced = [0] * len(held)
        self._exact = [2 if place.blurs else 0 for place in held]
        self._outweighed: dict[nn.Module, bool] = {}
        self._room = _Room()
        self._x: Tensor | None = None
        self._layout: Layout | None = None
        self._inputs: dict[bool, _Input] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every layer, removed at the end whatever happens."""
        with ExitStack() as hooks:
            for number, place in enumerate(self._places):
                routed = is_routed(place.name)
                hooks.callback(place.module.register_forward_hook(partial(self._see, number, routed)).remove)
            try:
                yield
            finally:
                self.forget()

    def forget(self) -> None:
        """Let go of the last input."""
        self._x = self._layout = None
        self._inputs.clear()

    def found(self) -> list[dict[str, Screened]]:
        """What there is of each adapter, by the names of its layers."""
        flat = []
        parts = zip(self._places, self._unplaced, self._told.tolist(), self._sums.tolist(), strict=True)
        for place, unplaced, both, sums in parts:
            of_tokens, count = both[1][0] > 0, len(place.owners)
            (rows, directed, x), ((base, _), *of) = both[of_tokens], sums[of_tokens][: 1 + 3 * count]
            own = zip(
                place.owners, place.ranks, place.lengths, of[:count], of[count::2], of[count + 1 :: 2], strict=True
            )
            for owner, rank, length, (down, _), (_, share), (update, _) in own:
                told = [rows, directed, share, x, down, update, base, base]
                flat.append((owner, place.name, told, (rank, length, unplaced)))
        means = kernels.means(torch.tensor([told for _, _, told, _ in flat], dtype=torch.float64)).tolist()
        found: list[dict[str, Screened]] = [{} for _ in range(1 + max(owner for owner, *_ in flat))]
        for (owner, name, (rows, *_), about), its in zip(flat, means, strict=True):
            found[owner][name] = Screened(kernels.Means(int(rows), *its), *about)
        return found

    def _see(self, number: int, routed: bool, module: nn.Module, args: Any, output: Tensor) -> None:
        x, place = args[0], self._places[number]
        layout = self.rows.layout(x.shape, routed=routed, layer=module)
        if layout is None:
            self._unplaced[number] += 1
            return
        if x is not self._x or layout is not self._layout:
            self.forget()
            self._x, self._layout = x, layout
        base = product(module, lambda: layout.counted(x), layout.counted(output), self._outweighed)
        exact = 2 if x.dtype == torch.float64 else self._exact[number]
        while (sums := place.sums(self._input(x, layout, exact > 0), base, self._room, exact)) is None:
            exact = self._exact[number] = exact + 1  # as it will have to be in the batches that follow
        told, held = self._of[number][layout.whole]
        told.add_(self._input(x, layout, exact > 0).told)
        held.add_(sums)

    def _input(self, x: Tensor, layout: Layout, exact: bool) -> _Input:
        """It as it is, or in float64."""
        if exact not in self._inputs:
            rows = layout.counted(x)
            self._inputs[exact] = _Input.of(rows.double() if exact else rows)
        return self._inputs[exact]


def on_base(adapted: AdaptedModel, names: Collection[str]) -> dict[str, AdaptedLayer]:
    """The layers of these names, each seen where the base alone runs; they outlive that the adapter is taken off."""
    return {name: replace(layer, layer=layer.base) for name, layer in adapted.layers.items() if name in names}


def screen(
    model: AdaptedModel,
    held: Sequence[Place],
    windows: Sequence[Sequence[int]],
    *,
    batch_size: int = 1,
    max_rows: int | None = None,
    seed: int = 42,
    counted: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Screened]]:
    """Run ``windows`` through the base once, for all adapters of ``held``.

    Args:
        model: The base without any adapter; of its ``layers`` each that is in ``held``.
        held: As `places` gives them.
        windows: Token ids.
        batch_size: Windows a forward.
        max_rows: At most so many rows a layer, drawn as `streaming.measure` draws them.
        seed: Of that draw.
        counted: The places in each window of the tokens whose rows alone count; None where all do.
        progress: Told how many windows are done.

    Returns:
        Of each adapter what it would do, by the names of its layers.
    """
    drawn, taking, done = counted_rows(windows, counted, max_rows, seed), Screen(held, model.device), 0
    running = forwards(model, list(model.layers.values()), windows)
    with running as forward, taking.rows.watching(model.model), taking.watching():
        while done < len(windows):
            numbers = range(done, min(done + batch_size, len(windows)))
            batch: Batch = batch_of(windows, numbers, drawn, model.device, counted is not None)
            taking.rows.start(batch)
            forward(batch)
            taking.forget()
            done += len(batch.tokens)
            if progress is not None:
                progress(done)
    return taking.found()
