"""What a run measured: pure data, without torch, pytest or files.

A figure that is no number is NaN, which no verdict passes. One that was never measured is left out of judging.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from pytest_nullspace.run.figures import FIGURES, OF_DOWN, Text, beside_a_task, of_layers, selectivity
from pytest_nullspace.run.norms import SINK as SINK
from pytest_nullspace.run.norms import Ratios, ratio
from pytest_nullspace.run.norms import WithoutSinks as WithoutSinks
from pytest_nullspace.run.predictions import Drift as Drift
from pytest_nullspace.run.predictions import TextDrift as TextDrift
from pytest_nullspace.run.texts import FIRST, key_of
from pytest_nullspace.run.windows import ByWindow

ORTHONORMAL = 1e-3
"""How far ``‖B‖² / r`` may lie from 1 for rows that were made orthonormal and left so."""

UNREACHED = "no activation row reached it"
"""The defect of a layer whose weights are sound and whose activations the text does not tell."""

BYPASSED = "the model computes with its weight and never calls it, so this LoRA has no effect on any input"
"""The defect of a layer to which no text brings a row, such as Mamba's ``dt_proj``."""

UNPLACED = (
    "not every row that it read is a token of the text, and which ones are cannot be told, as where a model pads its "
    "windows; give a --nullspace-seqlen that it does not pad"
)
"""The defect of a layer that ran, but on rows of which nobody knows whose they are."""

SCALE_ZERO = "its scale is 0: lora_alpha or an alpha_pattern is 0 in adapter_config.json"
"""Why an update is zero although its matrices are not."""


WITHOUT_DRIFT = "without_drift"
"""Where a run tells why its predictions were not held against the base's, although nobody had left that out."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What the preserved text would allow at best in one layer.

    Attributes:
        effective_rank: Of its input: the exponential of the entropy of the covariance's spectrum.
        least_leakage: The least mean leakage that any subspace of the adapter's rank has on this text.
        shared: How much of that subspace the adapter's shares: 1 all of it, r / in by chance.
    """

    effective_rank: float
    least_leakage: float
    shared: float


@dataclass(frozen=True, slots=True)
class LayerStats(Ratios):
    """What was measured at one layer.

    Of a model that was merged or trained whole, ``AB`` is ``ΔW = W′ − W`` and ``W_res`` is its base's W.

    Attributes:
        name: Its module path.
        rows: Activation rows that were seen.
        in_features: Width of its input.
        rank: Rank of its adapter; 0 where its update is a whole matrix.
        out_features: Width of its output.
        input_norm: Mean of ``‖x‖`` over rows.
        down_norm: Mean of ``‖Bx‖``; None where the update is a whole matrix, and so there is no B.
        update_norm: Mean of ``‖ABx‖``, scale included.
        base_norm: Mean of ``‖W_res x‖``.
        output_norm: Mean of ``‖ABx + W_res x‖``, bias left out.
        mean_leakage: Mean of ``‖Px‖² / ‖x‖²``, P the projector on B's row space; in [0, 1]. None if never measured.
        down_weight_norm: Frobenius norm of B; None where there is none.
        up_weight_norm: Frobenius norm of A, scale included; of ΔW where the update is a whole matrix.
        base_weight_norm: Frobenius norm of W_res. None if it is quantised in a way that does not give it.
        down_rank: How many directions the rows of B span. None if never counted, which is taken as ``rank``.
        distinct_rows: How many rows of its input were unlike each other, ``in_features`` where as many or more. None if
            never counted.
        unplaced: In how many windows it ran without its rows being counted, for nobody can tell which are tokens.
        bypassed: 1 where no row came for the model computes with its weight itself; None where rows came, or may.
        margins: Half the width of each figure's confidence interval; empty if never estimated.
        task: The same layer on the task text, if that was measured too; what is here is then of the preserved text.
        spectrum: What the text would allow at best, if that was measured.
        without_sinks: What the mean norms are without the sink rows. None if never measured.
        scale: What the update is multiplied with, as PEFT's alpha / r. None if the file does not tell.
        by_window: The mean norms and the leakage of each window; None if they were not kept.
        further: The same layer on each further preserved text, by its name.
        effective_rank: Of an update that is a whole matrix: e to the entropy of its singular values' shares. None of
            other updates.
    """

    name: str
    rows: int
    in_features: int
    rank: int
    out_features: int
    input_norm: float
    down_norm: float | None
    update_norm: float
    base_norm: float
    output_norm: float
    mean_leakage: float | None
    down_weight_norm: float | None
    up_weight_norm: float
    base_weight_norm: float | None
    down_rank: int | None = None
    distinct_rows: int | None = None
    unplaced: int = 0
    bypassed: int | None = None
    margins: Mapping[str, float] = field(default_factory=dict)
    task: "LayerStats | None" = None
    spectrum: Spectrum | None = None
    without_sinks: WithoutSinks | None = None
    scale: float | None = None
    by_window: ByWindow | None = None
    further: Mapping[str, "LayerStats"] = field(default_factory=dict)
    effective_rank: float | None = None

    @property
    def is_orthonormal(self) -> bool:
        """Whether the rows of B have the norm of orthonormal ones, as they do where they were made so and left so."""
        norm = self.down_weight_norm
        return bool(self.rank) and norm is not None and abs(norm**2 / self.rank - 1) <= ORTHONORMAL

    @property
    def chance(self) -> float:
        """``rank of B / in``: the leakage of a random subspace as large as B's row space, on any data."""
        return ratio(self.rank if self.down_rank is None else self.down_rank, self.in_features)

    @property
    def leakage(self) -> float:
        """Leakage over chance: 1 is what a random subspace gets, 0 is a perfect null space."""
        return math.nan if self.mean_leakage is None else ratio(self.mean_leakage, self.chance)

    @property
    def selectivity(self) -> float:
        """How many times larger the update is on the task text than on the preserved one, each beside ``‖W_res x‖``."""
        return selectivity(self, self.task)

    @property
    def without(self) -> tuple[str, ...]:
        """The figures that no text gives: leakage by the reference script, B's where there is none."""
        lacking = {"preservation": self.down_norm, "leakage": self.mean_leakage}
        return tuple(figure for figure, needs in lacking.items() if needs is None)

    @property
    def absent(self) -> tuple[str, ...]:
        """The figures that were never measured: those, and others without a task text."""
        return (*self.without, *beside_a_task()) if self.task is None else self.without

    @property
    def standing(self) -> float | None:
        """Where the leakage lies between chance, 0, and the best that any subspace could reach, 1."""
        if self.spectrum is None or self.mean_leakage is None:
            return None
        return ratio(self.chance - self.mean_leakage, self.chance - self.spectrum.least_leakage)

    @property
    def measured(self) -> tuple[str, ...]:
        """The figures that were."""
        absent = self.absent
        return tuple(figure for figure in of_layers() if figure not in absent)

    def figure(self, name: str, sinks: bool = True) -> float:
        """The figure of that name in `FIGURES`; what an update is for is taken on the task text where there is one.

        Where there are several preserved texts it is that of the one on which the layer is worst.

        Args:
            name: Of the figure.
            sinks: Whether sink rows count. Where nobody looked for them they do, and in the leakage, a mean of shares
                to which each row gives alike.
        """
        return self._worst(name, sinks)._own(name, sinks)

    def _own(self, name: str, sinks: bool = True) -> float:
        """The figure of the first preserved text."""
        figure, of = FIGURES[name], self._judged_on(name)
        if figure.text is Text.BOTH:
            both = (self, self.task) if sinks else (self._quiet, self.task and self.task._quiet)
            return figure.value(*both)
        return figure.value(of if sinks or not figure.sink_free else of._quiet)

    def _worst(self, name: str, sinks: bool = True) -> "LayerStats":
        """The layer on the preserved text on which that figure is worst; what is no number is worse than any."""
        text = self.worst_on(name, sinks)
        return replace(self.further[text], task=self.task) if text else self

    def worst_on(self, name: str, sinks: bool = True) -> str:
        """The name of the further preserved text on which that figure is worst; empty where it is the first."""
        if not self.further or FIGURES[name].text is Text.TASK:
            return ""
        sign = 1 if FIGURES[name].trained.lower_is_better else -1

        def badness(of: LayerStats) -> float:
            value = of._own(name, sinks)
            return math.inf if math.isnan(value) else sign * value

        on = {"": self, **{text: replace(of, task=self.task) for text, of in self.further.items()}}
        return max(on, key=lambda text: badness(on[text]))

    @property
    def _quiet(self) -> Ratios:
        return self if self.without_sinks is None else self.without_sinks

    @property
    def sinks(self) -> int:
        """How many of the rows are sinks; 0 also where nobody looked for them."""
        return 0 if self.without_sinks is None else self.rows - self.without_sinks.rows

    @property
    def sink_share(self) -> float:
        """How much of mean ``‖x‖`` is that of sink rows, from 0 to 1."""
        if not self.sinks or self.without_sinks is None:
            return 0.0
        return 1 - ratio(self.without_sinks.rows * self.without_sinks.input_norm, self.rows * self.input_norm)

    def margin(self, name: str) -> float | None:
        """How far `figure` may lie from what more text would give; None if that was never estimated."""
        of = self._worst(name)
        if name != "selectivity" or of.task is None:
            return of._judged_on(name).margins.get(name)
        parts = [(layer.margins.get("forgetting"), layer.forgetting) for layer in (of, of.task)]
        if any(margin is None or not value for margin, value in parts):
            return None
        return of.selectivity * math.hypot(*(margin / value for margin, value in parts if margin is not None))

    def _judged_on(self, figure: str) -> "LayerStats":
        return self.task if self.task is not None and FIGURES[figure].text is Text.TASK else self

    @property
    def defect(self) -> str | None:
        """Why the layer cannot be judged at all, or None."""
        norms = (self.down_weight_norm, self.up_weight_norm, self.base_weight_norm)
        if not all(math.isfinite(norm) for norm in norms if norm is not None):
            return "non-finite weights (NaN or infinity)"
        if self.down_rank == 0 or (self.down_rank is None and self.down_weight_norm == 0):
            return "its down projection B is zero, so nothing can reach it"
        if self.unplaced:
            return f"in {self.unplaced} windows {UNPLACED}"
        if not self.rows:
            return BYPASSED if self.bypassed else UNREACHED
        if self.task is not None and self.task.defect is not None:
            return f"on the task text: {self.task.defect}"
        for name, of in self.further.items():
            if of.defect is not None:
                return f"on the text {name}: {of.defect}"
        if not all(math.isfinite(norm) for norm in self.norms[:-1] if norm is not None):
            return "non-finite activations (NaN or infinity)"
        if not math.isfinite(self.output_norm):
            return "non-finite output (NaN or infinity)"
        if self.input_norm == 0:
            return "its input is zero in every row"
        if self.output_norm == 0:
            return "its output is zero in every row"
        return None


@dataclass(frozen=True)
class RunStats:
    """All that was measured of one checkpoint in one run.

    Attributes:
        model_path: The checkpoint, as it was given.
        calib_dataset: The text, as it was given.
        layers: What was measured, in model order.
        checkpoint_layers: How many layers the checkpoint adapts, measured or not.
        about: Settings, hashes, library versions, and whatever else tells two runs apart.
        drift: How far the model's predictions lie from its base's, if that was measured.
    """

    model_path: str
    calib_dataset: str
    layers: tuple[LayerStats, ...]
    checkpoint_layers: int
    about: Mapping[str, Any] = field(default_factory=dict)
    drift: Drift | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is of a whole model, whose updates are whole matrices."""
        return any(layer.effective_rank is not None for layer in self.layers)

    @property
    def has_no_down(self) -> bool:
        """Whether nothing stands for the down projections that a whole model has not."""
        return any(layer.down_norm is None for layer in self.layers)

    @property
    def without_drift(self) -> str | None:
        """Why the predictions were not held against the base's, where that was neither demanded nor left out."""
        why = self.about.get(WITHOUT_DRIFT)
        return None if why is None or self.drift is not None else str(why)

    def layer(self, name: str) -> LayerStats | None:
        """The layer of that name, if it was measured."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> Mapping[str, LayerStats]:
        return {layer.name: layer for layer in self.layers}

    @property
    def on_further(self) -> "Mapping[str, RunStats]":
        """The run as if each further preserved text had been the first, by that text's name."""
        names = dict.fromkeys(name for layer in self.layers for name in layer.further)
        return {
            name: replace(
                self,
                layers=tuple(layer.further[name] for layer in self.layers if name in layer.further),
                about={**self.about, FIRST: self.about.get(key_of(name))},
            )
            for name in names
        }

    @property
    def complete(self) -> bool:
        """Whether every adapted layer was measured."""
        return len(self.layers) == self.checkpoint_layers

    @cached_property
    def absent(self) -> tuple[str, ...]:
        """The figures that were not measured in every layer."""
        absent = {figure for layer in self.layers for figure in layer.absent}
        return tuple(figure for figure in of_layers() if figure in absent)

    @property
    def measured(self) -> tuple[str, ...]:
        """The figures that were measured in every layer."""
        absent = self.absent
        return tuple(figure for figure in of_layers() if figure not in absent)

    @property
    def expected(self) -> tuple[str, ...]:
        """The figures that its texts can give of its layers."""
        known = (figure for figure in of_layers() if self.has_task or not FIGURES[figure].needs_task)
        return tuple(figure for figure in known if not (self.has_no_down and figure in OF_DOWN))

    def mean(self, figure: str, sinks: bool = True) -> float:
        """The average of a figure over the layers that a row reached, as the reference's summary takes it."""
        values = [layer.figure(figure, sinks) for layer in self.layers if layer.rows]
        return fmean(values) if values else math.nan

    def margin(self, figure: str) -> float | None:
        """How far `mean` may lie from what more text would give, at most: the layers' own margins, averaged."""
        values = [layer.margin(figure) for layer in self.layers if layer.rows]
        known = [value for value in values if value is not None]
        return fmean(known) if known and len(known) == len(values) else None

    @cached_property
    def has_task(self) -> bool:
        """Whether a task text was measured too."""
        return any(layer.task is not None for layer in self.layers)
