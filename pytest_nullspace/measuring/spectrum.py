"""The best that any subspace could do on a text: the spectrum of each distinct input, and where the adapter stands.

Leakage is ``mean ‖Px‖² / ‖x‖² = tr(P C)`` with ``C = mean x xᵀ / ‖x‖²``, so no subspace of rank r leaks less than the r
smallest eigenvalues of C add up to.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pytest_nullspace import kernels, spectra
from pytest_nullspace.measuring.distributed import ALONE, Ranks
from pytest_nullspace.measuring.forward import forwards, telling
from pytest_nullspace.measuring.rows import Batch, Rows
from pytest_nullspace.model import AdaptedLayer, AdaptedModel
from pytest_nullspace.run.stats import Spectrum

HELD_BYTES = 1 << 31
"""What the covariances that are taken in one pass may need together; one alone may need more."""

BLOCKS = 8
"""Blocks of columns of a covariance, of which nothing above the diagonal's is computed: it is symmetric."""


@dataclass
class _Input:
    """An input that some layers share, and its covariance while it is taken: float64, the lower triangle alone."""

    layers: list[AdaptedLayer] = field(default_factory=list)
    covariance: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    @property
    def width(self) -> int:
        return self.layers[0].in_features


def spectrum(
    adapted: AdaptedModel,
    windows: Sequence[Sequence[int]],
    layers: Sequence[str],
    *,
    held_bytes: int = HELD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    counted: Sequence[Sequence[int]] | None = None,
) -> Mapping[str, Spectrum]:
    """Take the covariance of each distinct input of ``layers``, as many in one pass as fit, and what follows from it.

    Args:
        adapted: The model; it is left as it was.
        windows: Token ids of the text.
        layers: Names of the layers.
        held_bytes: What the covariances of one pass may need.
        progress: Told how many windows of how many are done, all passes taken together.
        ranks: The processes that share the windows.
        counted: The places in each window of the tokens whose rows alone count; None where all do.

    Returns:
        For each layer that the first window reached, and whose input is finite, its `Spectrum`.
    """
    chosen = [adapted.layers[name] for name in layers]
    if not chosen:
        return {}
    groups = list(_groups(_inputs(adapted, chosen, windows), held_bytes))
    found: dict[str, Spectrum] = {}
    for number, group in enumerate(groups):
        with forwards(adapted, [layer for of in group for layer in of.layers], windows) as forward:
            with ExitStack() as hooks:
                hooks.enter_context((rows := Rows()).watching(adapted.model))
                for of in group:
                    of.covariance = torch.zeros(of.width, of.width, dtype=torch.float64, device=adapted.device)
                    hooks.callback(of.layers[0].layer.register_forward_pre_hook(_adding(of, rows)).remove)
                read = []
                for window in ranks.share(range(len(windows))):
                    places = None if counted is None else [counted[window]]
                    batch = Batch.of([windows[window]], adapted.device, window, places, counted is not None)
                    rows.start(batch)
                    forward(batch)
                    read.append(window)
                    if progress is not None:
                        done = min(ranks.size * len(read), len(windows))
                        progress(number * len(windows) + done, len(groups) * len(windows))
            held = [part for of in group for part in (of.rows, of.covariance)]
            ranks.add("the covariances", range(len(windows)), read, *held)
            for of in group:
                found |= _spectra(of)
                of.covariance = torch.empty(0)
    return {name: found[name] for name in layers if name in found}


def _inputs(adapted: AdaptedModel, layers: Sequence[AdaptedLayer], windows: Sequence[Sequence[int]]) -> list[_Input]:
    """The distinct inputs of ``layers``, in the order in which a forward meets them."""
    found: list[_Input] = []
    latest: Tensor | None = None

    def meet(layer: AdaptedLayer) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            nonlocal latest
            if any(other is layer for of in found for other in of.layers):
                return
            if args[0] is not latest:
                latest = args[0]
                found.append(_Input())
            found[-1].layers.append(layer)

        return hook

    with forwards(adapted, layers, windows) as forward, ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.layer.register_forward_pre_hook(meet(layer)).remove)
        forward(Batch.of([telling(windows)], adapted.device))
    return found


def _groups(inputs: Sequence[_Input], held_bytes: int) -> Iterator[list[_Input]]:
    group: list[_Input] = []
    for of in inputs:
        if group and sum(8 * other.width**2 for other in (*group, of)) > held_bytes:
            yield group
            group = []
        group.append(of)
    if group:
        yield group


def _adding(of: _Input, among: Rows) -> Callable[[nn.Module, Any], None]:
    def hook(layer: nn.Module, args: Any) -> None:
        layout = among.layout(args[0].shape, layer=layer)
        if layout is None:
            return
        rows = layout.counted(args[0]).to(of.covariance.device, torch.float64)
        norms = rows.norm(dim=-1, keepdim=True)
        rows = rows[norms[:, 0] != 0] / norms[norms[:, 0] != 0]  # what is no number stays, to be found
        for first in range(0, of.width, block := -(-of.width // BLOCKS)):
            part = of.covariance[first:, first : first + block]
            part.addmm_(rows[:, first:].mT, rows[:, first : first + block])
        of.rows += len(rows)

    return hook


def _spectra(of: _Input) -> dict[str, Spectrum]:
    if not of.rows or not bool(of.covariance.isfinite().all()):
        return {}
    eigenvalues, vectors = torch.linalg.eigh(of.covariance / of.rows, UPLO="L")
    effective = spectra.effective_rank(eigenvalues.clamp_min(0))
    found = {}
    for layer in of.layers:
        basis = _row_space(layer).to(vectors.device)
        rank = len(basis)
        if not rank:
            continue
        found[layer.name] = Spectrum(
            effective_rank=effective,
            least_leakage=float(eigenvalues[:rank].clamp_min(0).sum()),
            shared=float((basis @ vectors[:, :rank]).square().sum() / rank),
        )
    return found


def _row_space(layer: AdaptedLayer) -> Tensor:
    """An orthonormal basis of the rows of B, shape ``(their rank, in)``; none where they are not finite."""
    down, (matrices, rank, *_) = layer.down_matrix(), kernels.factors(layer.down_matrix(), layer.up_matrix, layer.scale)
    return matrices[0, :rank].to(down) @ down if bool(down.isfinite().all()) else down[:0]
