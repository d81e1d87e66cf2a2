"""What the sums of all layers come to: the means, by what these vary, and what each window gave."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from pytest_nullspace import kernels
from pytest_nullspace.measuring.factors import WeightNorms
from pytest_nullspace.model import AdaptedLayer
from pytest_nullspace.run.figures import FIGURES, OF_DOWN, of_one_text
from pytest_nullspace.run.norms import Ratios
from pytest_nullspace.run.stats import SINK, LayerStats, WithoutSinks
from pytest_nullspace.run.uncertainty import students_t
from pytest_nullspace.run.windows import OF_LAYER, ByWindow

_MEANS = ("input_norm", "down_norm", "update_norm", "base_norm", "output_norm", "mean_leakage")
"""What a layer's record calls `kernels.Means` after the rows."""
_NO_DOWN: dict[str, Any] = {"down_norm": None, "mean_leakage": None}
"""Of them, those that there are not where there is no B."""


def weighed(
    layers: Sequence[AdaptedLayer], down_ranks: Mapping[str, int], norms: Sequence[WeightNorms]
) -> list[LayerStats]:
    """What is told of the layers before any row came.

    Args:
        layers: They.
        down_ranks: How many directions the rows of their B span.
        norms: Of their weights.
    """
    return [_of_weights(layer, down_ranks[layer.name], of) for layer, of in zip(layers, norms, strict=True)]


def _of_weights(layer: AdaptedLayer, down_rank: int, norms: WeightNorms) -> LayerStats:
    has_down = layer.rank > 0
    return LayerStats(
        name=layer.name,
        rows=0,
        in_features=layer.in_features,
        rank=layer.rank,
        out_features=layer.out_features,
        input_norm=math.nan,
        down_norm=math.nan if has_down else None,
        update_norm=math.nan,
        base_norm=math.nan,
        output_norm=math.nan,
        mean_leakage=math.nan if has_down else None,
        down_weight_norm=norms[0],
        up_weight_norm=norms[1],
        base_weight_norm=norms[2],
        down_rank=down_rank if has_down else None,
        scale=None if layer.is_whole else layer.scale,
        effective_rank=None if layer.effective_rank is None else layer.effective_rank(),
    )


def figured(layers: Sequence[LayerStats], sums: Tensor, by_octave: Tensor) -> tuple[LayerStats, ...]:
    """The figures of ``layers``, of which what is given tells what their weights do.

    Args:
        layers: They, `weighed`.
        sums: Of each layer and window, shape ``(layers, windows, len(kernels.Sums))``.
        by_octave: Of each layer, as `kernels.sums_by_octave` gives them.
    """
    if not layers:
        return ()
    whole = sums.sum(dim=1)
    rows, means = whole[:, 0].tolist(), kernels.means(whole).tolist()
    margins = _margins(layers, whole[:, None] - sums, sums[..., 0] > 0)
    quiet, windows = kernels.without_sinks(by_octave, SINK).tolist(), sums.mT.tolist()
    found = []
    for number, layer in enumerate(layers):
        of: dict[str, Any] = dict(zip(_MEANS, means[number], strict=True)) | ({} if layer.rank else _NO_DOWN)
        of["rows"] = int(rows[number])
        of |= {"without_sinks": _without_sinks(of, *quiet[number]), "by_window": _kept(of, windows[number])}
        found.append(replace(layer, margins=margins[number], **of))
    return tuple(found)


class _Left(Ratios):
    """The mean norms of all layers with one window left out, each in turn, shape ``(layers, windows)``."""

    def __init__(self, means: Tensor, chance: Tensor) -> None:
        for name, mean in zip(_MEANS, means.unbind(dim=-1), strict=True):
            setattr(self, name, mean)
        self._chance = chance

    @property
    def leakage(self) -> Tensor:
        """Their leakage over chance."""
        mean: Tensor = vars(self)["mean_leakage"]
        return mean / self._chance


def _margins(layers: Sequence[LayerStats], left: Tensor, there: Tensor) -> list[dict[str, float]]:
    """The margin of each figure of each layer, as `pytest_nullspace.run.uncertainty.jackknife` gives it.

    Args:
        layers: They.
        left: The sums over all windows but one, each in turn.
        there: Which windows had rows, shape ``(layers, windows)``.
    """
    chance = left.new_tensor([layer.chance for layer in layers])[:, None]
    of_each, count = _Left(kernels.means(left), chance), there.sum(dim=1)
    quantile = left.new_tensor([students_t(n - 1) if n > 1 else math.inf for n in count.tolist()])
    found: dict[str, list[float]] = {}
    for name in of_one_text():
        values: Any = FIGURES[name].value(of_each)
        middle = values.where(there, 0.0).sum(dim=1) / count
        spread = (values - middle[:, None]).where(there, 0.0).square().sum(dim=1)
        margin = quantile * ((count - 1) / count * spread).sqrt()
        found[name] = margin.where(count > 1, math.inf).tolist()
    lacking = [() if layer.rank else OF_DOWN for layer in layers]
    return [
        {name: margins[number] for name, margins in found.items() if name not in without}
        for number, without in enumerate(lacking)
    ]


def _kept(means: Mapping[str, Any], by_window: Sequence[Sequence[float]]) -> ByWindow | None:
    summed = dict(zip(kernels.Sums._fields, by_window, strict=True))
    sums = {name: summed[name.removeprefix("mean_").removesuffix("_norm")] for name in OF_LAYER.over}
    return ByWindow.of(OF_LAYER, SimpleNamespace(**means), (summed["rows"], summed["directed"]), sums)


def _without_sinks(means: Mapping[str, Any], total: float, *norms: float) -> WithoutSinks:
    rows, names = int(total), _MEANS[: len(norms)]
    if rows == means["rows"]:  # the mean norms are the very same, not added up in another order
        return WithoutSinks(rows, *(means[name] for name in names))
    found: list[Any] = [None if means[n] is None else norm / rows for n, norm in zip(names, norms, strict=True)]
    return WithoutSinks(rows, *found)
