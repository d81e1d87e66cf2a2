"""Some rows of each layer's input on each text, for what needs the rows themselves, not their norms."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pytest_nullspace.measuring.forward import forwards
from pytest_nullspace.measuring.rows import Batch, Rows
from pytest_nullspace.model import AdaptedLayer, AdaptedModel

if TYPE_CHECKING:
    from pytest_nullspace.checkpoint.arrays import Array

WINDOWS, ROWS = 4, 32
"""Windows that are read once more, spread evenly over the text, and rows of a layer that are kept of them together."""


def sampled(
    adapted: AdaptedModel,
    windows: Sequence[Sequence[int]],
    layers: Sequence[str],
    counted: Sequence[Sequence[int]] | None = None,
) -> "Mapping[str, Array]":
    """Read some windows once more, and keep rows of each layer's input, spread evenly over them.

    Args:
        adapted: The model; it is left as it was.
        windows: Token ids of the text.
        layers: Names of the layers.
        counted: The places in each window of the tokens whose rows alone count; None where all do.

    Returns:
        Of each layer that was reached its rows, shape ``(n, in)``, float32; layers that share an input share them.
    """
    chosen = [adapted.layers[name] for name in layers]
    read = sorted({len(windows) * place // WINDOWS for place in range(WINDOWS)})
    kept: dict[str, list[Tensor]] = {}
    latest: tuple[Tensor | None, Tensor] = None, torch.empty(0)

    def meet(layer: AdaptedLayer) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            nonlocal latest
            if args[0] is not latest[0]:
                layout = rows.layout(args[0].shape, layer=layer.layer)
                own = args[0].flatten(0, -2)[:0] if layout is None else layout.counted(args[0])
                most = -(-ROWS // len(read))
                picked = torch.arange((step := max(1, len(own) // most)) // 2, len(own), step, device=own.device)[:most]
                latest = args[0], own.index_select(0, picked).to("cpu", torch.float32)
            kept.setdefault(layer.name, []).append(latest[1])

        return hook

    with forwards(adapted, chosen, windows) as forward, ExitStack() as hooks:
        hooks.enter_context((rows := Rows()).watching(adapted.model))
        for layer in chosen:
            hooks.callback(layer.layer.register_forward_pre_hook(meet(layer)).remove)
        for window in read:
            places = None if counted is None else [counted[window]]
            batch = Batch.of([windows[window]], adapted.device, window, places, counted is not None)
            rows.start(batch)
            latest = None, latest[1]
            forward(batch)
    joined: dict[tuple[int, ...], Tensor] = {}
    for parts in kept.values():
        if (key := tuple(map(id, parts))) not in joined:
            joined[key] = torch.cat(parts)
    found = {name: joined[tuple(map(id, parts))] for name, parts in kept.items()}
    return {name: of.numpy() for name, of in found.items() if len(of)}
