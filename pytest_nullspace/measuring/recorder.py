"""What is taken of the layers while the model runs: hooks on their parts that add norms to sums, no activation kept.

A layer's hooks take the norms of its wide activations while these are still in the cache, and keep them, with the
narrow ``Bx``, until enough layers have come together to be summed at once. On a CPU they see at once whether a norm
left float32's range, or ``Bx`` lost its digits to cancellation, and take it in float64 where it did.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pytest_nullspace import kernels
from pytest_nullspace.measuring.digits import blurs, cancels, has_bias, norms_of, outweighs, product, weight_of
from pytest_nullspace.measuring.distinct import DistinctRows, all_found, prints
from pytest_nullspace.measuring.factors import Begun, of_layers
from pytest_nullspace.measuring.moved import Moved
from pytest_nullspace.measuring.rows import Batch, Layout, Rows, is_routed
from pytest_nullspace.measuring.summing import Summing, Taken
from pytest_nullspace.measuring.transfer import fetched
from pytest_nullspace.model import AdaptedLayer
from pytest_nullspace.model.stored import stored, without_bias

_Take = Callable[[nn.Module, Any, Tensor], Tensor]
"""What is taken of a module's output, in a forward hook on it."""


@dataclass(frozen=True)
class Watched:
    """A layer under measurement.

    Attributes:
        number: Which one it is.
        layer: Where its parts are.
        is_joined: Whether its parts are looked at as they are added.
        in_parts: Whether they must be put together anew, for a bias, a start or an update that is more than A B.
        moved: What became of its start, where that held a part of W.
        seen: What its parts gave in the forward that is under way.
    """

    number: int
    layer: AdaptedLayer
    is_joined: bool
    in_parts: bool
    moved: Moved | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)

    @property
    def updates_by_more(self) -> bool:
        """Whether its update is more than ``scale · A B x``."""
        return self.layer.update is not None or has_bias(self.layer.up)


class Recorder:
    """Takes the norms of each watched layer while it runs, and adds them to its sums.

    Attributes:
        sums: What they add up to.
        rows: Which rows of the batch are whose.
        alone: Whether it takes a batch of one window to know this.
        unplaced: Of each layer whose rows not even that tells apart, in how many windows.
    """

    def __init__(self, device: torch.device, windows: int) -> None:
        self._device = device
        self.sums = Summing(device, windows)
        self._down_ranks: dict[str, int] = {}
        self.rows, self.alone = Rows(), False
        self.unplaced: Counter[str] = Counter()
        self._is_silent = False
        self._distinct: dict[tuple[str, bool], DistinctRows] = {}
        self._batch = Batch(torch.empty(0, 0), 0, None, [])
        self._layout: Layout | None = None
        self._unclear: set[str] = set()
        self._watched: list[Watched] = []
        self._factors: list[kernels.Factors] = []
        self._rounded: list[Tensor] = []
        self._begun: Begun | None = None
        self._down_types: set[torch.dtype] = set()
        self._input: Tensor | None = None
        self._input_norms = torch.empty(0)
        self._input_rows: DistinctRows | None = None
        self._outweighed: dict[nn.Module, bool] = {}
        self._weighing: dict[nn.Module, Tensor] = {}

    def start(self, batch: Batch) -> None:
        """From here on count the rows of ``batch``."""
        self.forget()
        self._batch = batch
        self.rows.start(batch)

    def forget(self) -> None:
        """Let go of all that was seen of a batch that did not come to its end."""
        self._input = None
        self.sums.forget()
        self._unclear.clear()
        for watched in self._watched:
            watched.seen.clear()

    def end(self) -> int | None:
        """Count the batch; where it cannot be, of how many windows it is to be run anew, and nothing is counted.

        Of one where `alone` its rows can be told apart; of as many as it has where on a card something was presumed of
        the weights that is not so.
        """
        self.sums.sum_held()
        if not self._presumed_rightly():
            self.forget()
            return len(self._batch.tokens)
        of_tokens = {self._watched[number].layer.name for number in self.sums.of_tokens()}
        if unplaced := self._unclear - of_tokens:  # other rows may have been told, but not those of the tokens
            if len(self._batch.tokens) > 1:
                self.alone = True
                self.forget()
                return 1
            self.unplaced.update(unplaced)
        self.sums.count(self._batch.first)
        return None

    @property
    def down_ranks(self) -> Mapping[str, int]:
        """How many directions the rows of each layer's B span."""
        if self._begun is not None:  # of several processes one may have read nothing
            self._presumed_rightly()
        return self._down_ranks

    def taken(self, windows: range) -> tuple[Tensor, Tensor]:
        """What `Summing.taken` gives."""
        return self.sums.taken(windows)

    def distinct(self) -> dict[str, Tensor | None]:
        """What `DistinctRows.found` gives of the input of each layer to which rows came, as far as they are counted."""
        found = all_found(dict.fromkeys(self._distinct.values()))
        return {name: found[rows] for (name, _), rows in sorted(self._distinct.items(), key=lambda of: of[0])}

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within this context nothing is taken: another model runs through the watched layers."""
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False

    @contextmanager
    def watching(self, layers: Sequence[AdaptedLayer]) -> Iterator[None]:
        """Hooks on every layer of ``layers``, removed at the end whatever happens."""
        with ExitStack() as hooks:
            begun = of_layers(layers)
            for layer in layers:
                watched = self._met(layer)
                self._watched.append(watched)
                handle = layer.layer.register_forward_pre_hook(partial(self._meet, watched))
                hooks.callback(handle.remove)
                for part, take in self._takes(watched).items():
                    handle = getattr(layer, part).register_forward_hook(partial(self._keep, watched.seen, part, take))
                    hooks.callback(handle.remove)
                if watched.is_joined and layer.joined is not None:
                    hooks.enter_context(layer.joined(partial(self._join, watched)))
                handle = layer.layer.register_forward_hook(partial(self._take, watched))
                hooks.callback(handle.remove)
            self.sums.start(len(layers))
            self._begun = begun
            if kernels.at_hand(self._device):
                self._presumed_rightly()
            else:
                self._use(begun.presumed)
            try:
                yield
            finally:
                self._input = self._begun = None
                self.sums.forget_held()

    def _use(self, factors: Sequence[kernels.Factors]) -> None:
        """Take these for what stands for the layers' weights."""
        self._factors = [of._replace(matrices=of.matrices.to(self._device)) for of in factors]
        self._rounded = [] if kernels.at_hand(self._device) else [of.matrices.float() for of in self._factors]
        self.sums.factors = [of.matrices for of in self._factors]

    def _presumed_rightly(self) -> bool:
        """Learn of the weights what was presumed of them, so that a card need not be waited for; False if wrongly."""
        weighed = dict(zip(self._weighing, (bool(of) for of in fetched([*self._weighing.values()])), strict=True))
        self._weighing.clear()
        self._outweighed |= weighed
        if self._begun is None:
            return not any(weighed.values())
        (presumed, told), self._begun = self._begun, None
        found = told()
        self._use(found)
        self._down_ranks |= {of.layer.name: known.rank for of, known in zip(self._watched, found, strict=True)}
        return not any(weighed.values()) and all(
            known.matrices is of.matrices and not any(blurs(known, dtype) for dtype in self._down_types)
            for known, of in zip(found, presumed, strict=True)
        )

    def _met(self, layer: AdaptedLayer) -> Watched:
        moved = None if layer.start is None else Moved(layer, layer.start, self._device)
        by_more = layer.update is not None or has_bias(layer.up) or moved is not None
        # A forward on the instance is somebody else's, such as accelerate's, and brings weights and inputs together.
        is_plain = layer.joined is not None and not by_more and "forward" not in vars(layer.layer)
        # On a CPU what was just made is in the cache still, and the norms of parts cost less than another addition.
        is_joined = is_plain and not kernels.at_hand(self._device)
        in_parts = by_more or (layer.has_bias and not is_joined)
        return Watched(len(self._watched), layer, is_joined, in_parts, moved)

    def _takes(self, watched: Watched) -> dict[str, _Take]:
        """What is taken of which parts of a layer."""
        if watched.is_joined:
            return {"down": self._output}
        if watched.in_parts:
            up = "up" if watched.layer.update is None else "update"
            return {"down": self._output, "base": self._product, up: self._output}
        return {"down": self._output, "base": self._output_norms}

    def _join(self, watched: Watched, base: Tensor, up: Tensor, scale: float) -> Tensor:
        """The output of a layer, whose norms and those of ``base`` are taken by the very addition."""
        module = watched.layer.base
        bias = stored(module, "bias").to(base.device) if has_bias(module) else None
        output, norms = kernels.joined(base, up, scale, bias)
        if not self._is_silent:
            watched.seen["joined"] = norms = self._counted(norms.mT).mT
            if bias is not None and module not in self._outweighed and norms.numel():
                self._weighing[module] = outweighs(bias, norms[0])
        return output

    def _keep(
        self, seen: dict[str, Tensor], part: str, take: _Take, module: nn.Module, args: Any, output: Tensor
    ) -> None:
        if not self._is_silent:
            seen[part] = take(module, args, output)

    def _meet(self, watched: Watched, _: nn.Module, args: Any) -> None:
        if self._is_silent:
            return
        of = watched.layer
        self._layout = self.rows.layout(args[0].shape, routed=is_routed(of.name), layer=of.layer)

    def _take(self, watched: Watched, _: nn.Module, args: Any, output: Tensor) -> None:
        if self._is_silent:
            return
        x, layer = args[0], watched.layer
        if self._layout is None:
            self._unclear.add(layer.name)
            watched.seen.clear()
            return
        down = watched.seen["down"]
        if x is not self._input:
            self._input, self._input_norms, self._input_rows = x, self._norms(x), None
        self._tell_apart(layer, self._layout, x)
        factors = self._factors[watched.number]
        self._down_types.add(down.dtype)
        cancelled = kernels.at_hand(self._device) and _loses_digits(down, self._input_norms, factors, x.shape[-1])
        if cancelled or blurs(factors, down.dtype):
            down = self._counted(x).double() @ layer.down_matrix().to(x.device).mT
        if watched.is_joined and self._outweighed.get(layer.base, False):
            alone = without_bias(layer.base, self._counted(x))
            taken = [norms_of(alone), norms_of(alone + layer.scale * layer.up(watched.seen["down"]))]
        elif watched.is_joined:
            taken = [watched.seen["joined"]]
        elif watched.in_parts:
            # A bias can outweigh the output: adding the parts again is exact where subtracting it is not.
            update = watched.seen["update"] if layer.update is not None else layer.scale * watched.seen["up"]
            base = watched.seen["base"]
            output = norms_of(base + update)
            change = [norms_of(update)] if watched.updates_by_more else []
            if watched.moved is not None:
                since, base = watched.moved.of(self._counted(x), down, base)
                change = [since]
            taken = [norms_of(base), output, *change]
        else:
            taken = [watched.seen["base"], self._norms(output)]
        watched.seen.clear()
        # An input may be seen before accelerate brings it to where its layer runs.
        norms = [part.to(self._device) for part in (self._input_norms, *taken)]
        norms = [part if part.ndim == 2 else part[None] for part in norms]
        kept: Tensor | None = down
        if not kernels.at_hand(self._device):  # few operations on many rows: there is nothing to be put together
            exact = down.dtype == torch.float64
            matrices = factors.matrices if exact else self._rounded[watched.number]
            norms.append(kernels.narrow_norms(down.to(self._device), matrices))
            kept = None
        if len({part.dtype for part in norms}) > 1:
            norms = [part.double() for part in norms]
        self.sums.hold(Taken(watched.number, self._layout, norms, kept))

    def _tell_apart(self, layer: AdaptedLayer, layout: Layout, x: Tensor) -> None:
        """Add the rows of the layer's input to those that it had, once for the layers that share it."""
        rows = self._distinct.get((layer.name, layout.whole), self._input_rows)
        if rows is None:
            rows = DistinctRows(layer.in_features, self._device)
        if rows is not self._input_rows and not rows.enough:
            rows.add(prints(layout.counted(x), self._input_norms))
        self._distinct[layer.name, layout.whole] = rows
        if self._input_rows is None:
            self._input_rows = rows

    def _output(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return self._counted(output)

    def _output_norms(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return self._norms(output)

    def _product(self, base: nn.Module, args: Any, output: Tensor) -> Tensor:
        """``W x`` of the counted rows, from what ``base`` gave with a bias of its own."""
        return product(base, lambda: self._counted(args[0]), self._counted(output), self._outweighed)

    def _norms(self, values: Tensor) -> Tensor:
        return norms_of(self._counted(values))

    def _counted(self, values: Tensor) -> Tensor:
        return values.flatten(0, -2) if self._layout is None else self._layout.counted(values)


def _loses_digits(down: Tensor, input_norms: Tensor, factors: kernels.Factors, width: int) -> bool:
    """Whether a float32 ``Bx`` is not exact, because its inputs are not or because it is mostly cancelled."""
    if input_norms.dtype == torch.float64:
        return True
    if down.dtype != torch.float32:
        return False
    down_norms = kernels.row_norms(down).sum().item()
    return bool(cancels(weight_of(factors, width), input_norms.norm().item(), down_norms))
