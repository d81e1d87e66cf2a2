"""Several adapters of one base to the first order: what each would make of the base's own activations, in one pass.

No adapter runs. A hook on each linear layer of the plain base has its input ``x`` and its output ``W x``; the B of all
adapters, stacked, make one product with ``x``, and `kernels.Factors` give the rest from it. So how many adapters there
are changes the width of that product alone. What an adapter does in one layer reaches none of the later ones here,
which is why the figures are of the first order.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pytest_nullspace import kernels
from pytest_nullspace.measuring.digits import blurs, cancels, norms_of, product, weight_of
from pytest_nullspace.measuring.factors import of_layers
from pytest_nullspace.measuring.forward import forwards
from pytest_nullspace.measuring.rows import Batch, Rows, is_routed
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
class Summed:
    """What the rows of a layer add up to under all adapters, as `kernels.sums` adds it up under one.

    Attributes:
        shared: The rows, those that are not zero, and the norms of ``x`` and ``W x``, shape ``(4,)``.
        own: The leakage and the norms of ``A B x`` and ``B x`` of each adapter, shape ``(3, n)``.
    """

    shared: Tensor
    own: Tensor

    @classmethod
    def none(cls, count: int, device: torch.device) -> "Summed":
        """Of no row."""
        zeros = torch.zeros(4 + 3 * count, dtype=torch.float64, device=device)
        return cls(zeros[:4], zeros[4:].view(3, count))

    def add(self, x: Tensor, base: Tensor, narrow: Tensor) -> None:
        """Add rows, from their norms and those that `Screen` takes of all adapters, shape ``(3, n, rows)``."""
        directed = x > 0
        share = (narrow[0] / x).square().where(directed, 0.0)
        exact = torch.promote_types(x.dtype, base.dtype)  # norms that float32 cannot hold are float64
        parts = (torch.ones_like(x, dtype=exact), directed.to(exact), x.to(exact), base.to(exact))
        self.shared.add_(torch.stack(parts).sum(dim=-1, dtype=torch.float64).to(self.shared.device))
        self.own[0].add_(share.sum(dim=-1, dtype=torch.float64).to(self.own.device))
        self.own[1:].add_(narrow[1:].sum(dim=-1, dtype=torch.float64).to(self.own.device))

    def each(self) -> list[kernels.Means]:
        """The means under each adapter."""
        (rows, directed, x, base), own = self.shared.tolist(), self.own.mT.tolist()
        return [
            kernels.compute(torch.tensor([rows, directed, share, x, down, update, base, base], dtype=torch.float64))
            for share, update, down in own
        ]


@dataclass(frozen=True)
class Place:
    """A linear layer of the base under all adapters that adapt it.

    Attributes:
        name: Its module path.
        module: The layer.
        owners: The numbers of these adapters.
        factors: `kernels.Factors` of each.
        down: Their B as they are stored, rows of zeros where one has fewer than another, shape ``(n · r, in)``.
        lengths: The Frobenius norm of each.
        blurs: Whether the rounding of a product in its precision would outweigh what is asked for.
        matrices: What follows from them, padded likewise, whitening above root, shape ``(n, 2r, r)``, float64.
        quick: The same as it is multiplied with.
    """

    name: str
    module: nn.Module
    owners: Sequence[int]
    factors: Sequence[kernels.Factors]
    down: Tensor
    lengths: Sequence[float]
    blurs: bool
    matrices: Tensor
    quick: Tensor

    @classmethod
    def of(
        cls, name: str, owners: Sequence[int], layers: Sequence[AdaptedLayer], found: Sequence[kernels.Factors]
    ) -> "Place":
        """The layer of that name, as each of its ``owners`` adapts it."""
        most = max(layer.rank for layer in layers)
        down = torch.stack([_padded(layer.down_matrix(), most) for layer in layers])
        matrices = torch.stack([_padded(_padded(of.matrices.to(down), most).mT, most).mT for of in found]).flatten(1, 2)
        dtype = torch.cat([stored(layer.down, "weight")[:0].flatten() for layer in layers]).dtype  # the widest of all
        return cls(
            name,
            layers[0].base,
            owners,
            found,
            down.flatten(0, 1).to(dtype),
            kernels.row_norms(down.flatten(1)).tolist(),
            any(blurs(of, dtype) for of in found),
            matrices,
            matrices.to(torch.promote_types(dtype, torch.float32)),
        )


def _padded(rows: Tensor, most: int) -> Tensor:
    """``rows (…, r, d)`` with rows of zeros behind them, ``most`` in all."""
    lacking = most - rows.shape[-2]
    return nn.functional.pad(rows, (0, 0, 0, lacking)) if lacking else rows


def places(adapters: Sequence[Mapping[str, AdaptedLayer]]) -> list[Place]:
    """Each layer that one of the ``adapters`` adapts, in the order in which they name them."""
    flat = [(owner, name, layer) for owner, layers in enumerate(adapters) for name, layer in layers.items()]
    held: dict[str, list[tuple[int, AdaptedLayer, kernels.Factors]]] = {}
    for (owner, name, layer), of in zip(flat, of_layers([layer for *_, layer in flat])(), strict=True):
        held.setdefault(name, []).append((owner, layer, of))
    return [Place.of(name, *zip(*of, strict=True)) for name, of in held.items()]


class Screen:
    """Takes what all adapters would make of the base's activations while it runs."""

    def __init__(self, held: Sequence[Place], device: torch.device) -> None:
        self._places, self._device = held, device
        self.rows = Rows()
        # Beside those of tokens the rows that were routed there, which count where there are no others.
        self._sums = [[Summed.none(len(of.owners), device) for _ in range(2)] for of in held]
        self._unplaced = [0] * len(held)
        self._input: Tensor | None = None
        self._counted = self._norms = torch.empty(0)
        self._exact: Tensor | None = None
        self._outweighed: dict[nn.Module, bool] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every layer, removed at the end whatever happens."""
        with ExitStack() as hooks:
            for number, place in enumerate(self._places):
                hooks.callback(place.module.register_forward_hook(partial(self._see, number)).remove)
            try:
                yield
            finally:
                self.forget()

    def forget(self) -> None:
        """Let go of the last input."""
        self._input = self._exact = None

    def found(self) -> list[dict[str, Screened]]:
        """What there is of each adapter, by the names of its layers."""
        told: dict[int, dict[str, Screened]] = {owner: {} for place in self._places for owner in place.owners}
        for place, (routed, whole), unplaced in zip(self._places, self._sums, self._unplaced, strict=True):
            of_tokens = whole if whole.shared[0] else routed
            each = zip(place.owners, place.factors, of_tokens.each(), place.lengths, strict=True)
            for owner, of, means, length in each:
                told[owner][place.name] = Screened(means, of.rank, length, unplaced)
        return [told.get(owner, {}) for owner in range(1 + max(told))]

    def _see(self, number: int, module: nn.Module, args: Any, output: Tensor) -> None:
        x, place = args[0], self._places[number]
        layout = self.rows.layout(x.shape, routed=is_routed(place.name), layer=module)
        if layout is None:
            self._unplaced[number] += 1
            return
        if x is not self._input:
            self._input, self._counted, self._exact = x, layout.counted(x), None
            self._norms = norms_of(self._counted)
        base = norms_of(product(module, lambda: self._counted, layout.counted(output), self._outweighed))
        self._sums[number][layout.whole].add(self._norms, base, self._narrow(place))

    def _narrow(self, place: Place) -> Tensor:
        """``‖Px‖``, ``‖scale · ABx‖`` and ``‖Bx‖`` of each adapter, shape ``(3, n, rows)``."""
        count = len(place.owners)
        if not place.blurs and self._norms.dtype != torch.float64:
            norms = _inner(place.down @ self._counted.to(place.down.dtype).mT, count, place.quick)
            at_hand = kernels.at_hand(norms.device)
            if not at_hand or (kernels.safe(norms) and not self._loses_digits(norms[2], place)):
                return norms
        if self._exact is None:
            self._exact = self._counted.double()
        return _inner(place.down.double() @ self._exact.mT, count, place.matrices)

    def _loses_digits(self, down: Tensor, place: Place) -> bool:
        """Whether a float32 ``Bx`` of one adapter is mostly cancelled, as `recorder` asks it of one layer."""
        if down.dtype != torch.float32:
            return False
        inputs, width = self._norms.norm().item(), place.down.shape[1]
        told = zip(place.factors, down.sum(dim=1).tolist(), strict=True)
        return any(cancels(weight_of(of), inputs, width, length) for of, length in told)


def _inner(down: Tensor, count: int, matrices: Tensor) -> Tensor:
    """The norms of ``P x``, ``A B x`` and ``B x``, from that of all adapters, shape ``(n · r, rows)``.

    Rows lie along the last dimension, so that sums over the few directions of an adapter run over many of them at once.
    """
    each = down.to(torch.promote_types(down.dtype, torch.float32)).view(count, -1, down.shape[1])
    both = (matrices @ each).view(count, 2, *each.shape[1:])
    squares = both.square_().sum(dim=2), each.square().sum(dim=1, keepdim=True)
    return torch.cat(squares, dim=1).sqrt_().transpose(0, 1)


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
