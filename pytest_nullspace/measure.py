"""The streaming pass: text through the model once, forward hooks that add to sums, no activation kept."""

import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from pytest_nullspace import kernels
from pytest_nullspace.model import AdaptedLayer, AdaptedModel
from pytest_nullspace.stats import LayerStats

CANCELLATION = 5e-8
"""The relative error to which cancellation in a float32 ``Bx`` may add up over a batch before a CPU takes it again in
float64."""

PROBE_TOKENS = 8
"""Tokens of the uncounted forward that finds out where the pass may end."""

Progress = Callable[[int, int], None]
"""Told how many windows of how many are done."""


def measure(
    adapted: AdaptedModel,
    windows: Sequence[Sequence[int]],
    *,
    layers: Collection[str] | None = None,
    batch_size: int = 1,
    max_rows: int | None = None,
    seed: int = 42,
    progress: Progress | None = None,
) -> tuple[LayerStats, ...]:
    """Run ``windows`` through the model and take every figure of the chosen layers.

    Args:
        adapted: The model; it is left as it was, hooks removed.
        windows: Token ids; windows of equal length that follow one another share a batch, so nothing is padded.
        layers: The names of the layers to measure; all if None.
        batch_size: Windows a forward.
        max_rows: At most so many rows a layer, drawn evenly and seeded from all windows; all rows if None.
        seed: Of that draw.
        progress: Called after each batch.

    Returns:
        The figures in the model's order of layers. A layer that saw no row, or saw NaN or infinity, has a `defect`.
    """
    chosen = [layer for name, layer in adapted.layers.items() if layers is None or name in layers]
    if not chosen:
        return ()
    drawn = draw_rows([len(window) for window in windows], max_rows, seed)
    entry = _entry(adapted.model, chosen)
    recorder = _Recorder(adapted.device)
    done = 0
    with torch.inference_mode():
        last_block = _last_block(entry, chosen, adapted, windows[0][:PROBE_TOKENS])
        with recorder.watching(chosen), _stopping_after(last_block):
            for tokens, rows in _batches(windows, drawn, batch_size, adapted.device):
                recorder.start_batch(rows, tokens.numel())
                with suppress(_PassedLastBlockError):
                    _forward(entry, adapted, tokens)
                done += len(tokens)
                if progress is not None:
                    progress(done, len(windows))
    return tuple(_stats(layer, recorder.means(layer)) for layer in chosen)


def _stats(layer: AdaptedLayer, means: kernels.Means) -> LayerStats:
    down, up, base = layer.weight_norms()
    return LayerStats(
        name=layer.name,
        rows=means.rows,
        in_features=layer.in_features,
        rank=layer.rank,
        out_features=layer.out_features,
        input_norm=means.input,
        down_norm=means.down,
        update_norm=means.update,
        base_norm=means.base,
        output_norm=means.output,
        mean_leakage=means.leakage,
        down_weight_norm=down,
        up_weight_norm=up,
        base_weight_norm=base,
    )


def draw_rows(lengths: Sequence[int], max_rows: int | None, seed: int) -> list[list[int]] | None:
    """Which rows of each window are counted when ``max_rows`` caps them.

    Each window gives its share, to within one row.

    Args:
        lengths: Rows of each window.
        max_rows: How many rows to keep.
        seed: Of the choice within each window.

    Returns:
        Sorted row numbers for each window, ``min(max_rows, sum(lengths))`` in all; None where every row counts.
    """
    total = sum(lengths)
    if max_rows is None or max_rows >= total:
        return None
    choose = random.Random(seed)
    drawn, before = [], 0
    for length in lengths:
        share = (before + length) * max_rows // total - before * max_rows // total
        drawn.append(sorted(choose.sample(range(length), share)))
        before += length
    return drawn


def _batches(
    windows: Sequence[Sequence[int]], drawn: list[list[int]] | None, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Token batches ``(b, length)``, each with the numbers of the counted rows among its ``b · length``."""
    for length, run in groupby(range(len(windows)), key=lambda i: len(windows[i])):
        numbers = list(run)
        for first in range(0, len(numbers), batch_size):
            batch = numbers[first : first + batch_size]
            tokens = torch.tensor([list(windows[i]) for i in batch], device=device)
            rows = None
            if drawn is not None:
                counted = [position * length + row for position, i in enumerate(batch) for row in drawn[i]]
                rows = torch.tensor(counted, dtype=torch.long, device=device)
            yield tokens, rows


class _Recorder:
    """Collects each watched layer's activations while it runs, and adds them to its sums when it ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: dict[str, Tensor] = {}
        self._rows: Tensor | None = None
        self._of = 0
        self._input: Tensor | None = None
        self._input_norms = torch.empty(0)

    def start_batch(self, rows: Tensor | None, of: int) -> None:
        """From here on count the rows numbered in ``rows``, or all, out of ``of``."""
        self._rows, self._of = rows, of
        self._input = None

    def means(self, layer: AdaptedLayer) -> kernels.Means:
        return kernels.compute(self._states[layer.name])

    @contextmanager
    def watching(self, layers: Sequence[AdaptedLayer]) -> Iterator[None]:
        """Hooks on every layer of ``layers``, removed at the end whatever happens."""
        with ExitStack() as hooks:
            for layer in layers:
                self._states[layer.name] = kernels.empty(self._device)
                seen: dict[str, Tensor] = {}
                parts = layer.has_magnitude or layer.has_bias or _has_bias(layer.up)
                watched = {"down": self._counted, "base": self._counted if parts else self._norms}
                if parts:
                    watched["up"] = self._counted
                for part, what in watched.items():
                    handle = getattr(layer, part).register_forward_hook(partial(_keep, seen, part, what))
                    hooks.callback(handle.remove)
                if not layer.has_magnitude:
                    hooks.enter_context(_bias_apart(layer.base))
                factors = kernels.factors(layer.down_matrix(), layer.up_matrix, layer.scale, self._device)
                handle = layer.layer.register_forward_hook(partial(self._add, layer, seen, factors))
                hooks.callback(handle.remove)
            try:
                yield
            finally:
                self._input = None

    def _add(
        self,
        layer: AdaptedLayer,
        seen: dict[str, Tensor],
        factors: kernels.Factors,
        _: nn.Module,
        args: Any,
        output: Tensor,
    ) -> None:
        x = args[0]
        if x is not self._input:
            self._input, self._input_norms = x, self._norms(x)
        down, base, output = seen["down"], seen["base"], self._counted(output)
        down_norms, update_norms = kernels.row_norms(down), None
        if "up" in seen:
            base, output, change = _parts(layer, base, seen["up"], output)
            base, update_norms = kernels.row_norms(base), kernels.row_norms(change)
        if self._cancelled(down, down_norms, layer):
            down = self._counted(x).double() @ layer.down_matrix().mT
            down_norms = kernels.row_norms(down)
        projected, inner = kernels.inner_norms(down, factors)
        exact = not (layer.has_magnitude or _has_bias(layer.up))
        kernels.add(
            self._states[layer.name],
            input=self._input_norms,
            down=down_norms,
            update=inner if exact or update_norms is None else update_norms,
            base=base,
            output=kernels.row_norms(output),
            projected=projected,
        )
        seen.clear()

    def _norms(self, values: Tensor) -> Tensor:
        return kernels.row_norms(self._counted(values))

    def _counted(self, values: Tensor) -> Tensor:
        values = values.reshape(-1, values.shape[-1])
        if self._rows is None:
            return values
        if len(values) == self._of:
            return values.index_select(0, self._rows)
        # An expert sees only the rows that were routed to it: of them the same share is counted, spread alike.
        share: Tensor = (self._rows * len(values) // self._of).unique()  # type: ignore[no-untyped-call]
        return values.index_select(0, share)

    def _cancelled(self, down: Tensor, norms: Tensor, layer: AdaptedLayer) -> bool:
        """Whether rounding errors in ``down``, a random walk of ``in`` steps, have grown beside what is left of it."""
        if down.dtype != torch.float32 or down.device.type != "cpu":
            return False
        error = 2.0**-22 * self._input_norms.norm() / math.sqrt(layer.in_features)
        return bool((error > CANCELLATION * norms.sum()).item())


def _parts(layer: AdaptedLayer, base: Tensor, up: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``W_res x``, the layer's whole output and its update, where they are not simply what the modules give.

    A bias can outweigh the output: adding the parts again is exact where subtracting it is not. What a magnitude made
    of the parts is only in the output.
    """
    if not layer.has_magnitude:
        change = layer.scale * up
        return base, base + change, change
    bias = getattr(layer.base, "bias", None)
    change = output - base
    return (base - bias, output - bias, change) if isinstance(bias, Tensor) else (base, output, change)


def _has_bias(module: nn.Module) -> bool:
    return isinstance(getattr(module, "bias", None), Tensor)


def _keep(
    seen: dict[str, Tensor], part: str, what: Callable[[Tensor], Tensor], _: nn.Module, __: Any, output: Tensor
) -> None:
    seen[part] = what(output)


@contextmanager
def _bias_apart(base: nn.Module) -> Iterator[None]:
    """Within this context ``base`` adds its bias in a last hook of its own, so that earlier hooks see ``W x`` alone."""
    bias = getattr(base, "bias", None)
    if not isinstance(bias, nn.Parameter):
        yield
        return
    handle = base.register_forward_hook(lambda _, __, output: output + bias)
    base.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    try:
        yield
    finally:
        base.bias = bias
        handle.remove()


class _PassedLastBlockError(Exception):
    """Raised inside the model to end a forward after the last block that holds a measured layer."""


def _entry(model: nn.Module, layers: Sequence[AdaptedLayer]) -> nn.Module:
    """The decoder without its head where no measured layer lies outside it, else the whole model."""
    decoder = getattr(model, "base_model", model)
    inside = set(map(id, decoder.modules()))
    return decoder if all(id(layer.layer) in inside for layer in layers) else model


def _forward(entry: nn.Module, adapted: AdaptedModel, tokens: Tensor) -> None:
    """Run the model on ``tokens (b, length)``; an encoder-decoder reads them on both sides."""
    both = {"decoder_input_ids": tokens} if adapted.is_encoder_decoder else {}
    entry(input_ids=tokens, use_cache=False, **both)


def _last_block(
    entry: nn.Module, layers: Sequence[AdaptedLayer], adapted: AdaptedModel, tokens: Sequence[int]
) -> nn.Module | None:
    """The block after which no measured layer can run, found by watching a short forward; None where there is none.

    A block is an element of an outermost `torch.nn.ModuleList`. The forward may end after one only if each measured
    layer lies in a block and each such block runs exactly once.
    """
    blocks = _blocks(entry)
    holding = {id(block): block for layer in layers if (block := blocks.get(id(layer.layer))) is not None}
    if not all(id(layer.layer) in blocks for layer in layers):
        return None
    ran: list[nn.Module] = []
    with ExitStack() as hooks:
        for block in holding.values():
            hooks.callback(block.register_forward_hook(lambda module, *_: ran.append(module)).remove)
        _forward(entry, adapted, torch.tensor([list(tokens)], device=adapted.device))
    return ran[-1] if len(ran) == len(holding) == len(set(map(id, ran))) else None


def _blocks(entry: nn.Module) -> dict[int, nn.Module]:
    """For each module inside a block, by its id, that block."""
    found: dict[int, nn.Module] = {}
    for module in entry.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in found:
            for block in module:
                for part in block.modules():
                    found.setdefault(id(part), block)
    return found


@contextmanager
def _stopping_after(block: nn.Module | None) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _PassedLastBlockError

    handle = None if block is None else block.register_forward_hook(stop)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
