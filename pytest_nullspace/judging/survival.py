"""What a merge leaves of an update: ``R = round(W + ΔW) − round(W)`` in the type in which the merged model is served.

``survival`` is ``⟨R, ΔW⟩ / ‖ΔW‖²``, how much of the update is in what the merge changes: 1 all of it, 0 nothing. It is
the product of a share, ``‖R‖ / ‖ΔW‖``, and the cosine between the two, both of which are told beside it. What is
changed beside the update is noise, ``‖R − ΔW‖ / ‖ΔW‖``.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint.rounding import BITS, TYPES
from pytest_nullspace.checkpoint.threads import side_by_side
from pytest_nullspace.errors import StatsError, printable
from pytest_nullspace.judging.merging import Merge
from pytest_nullspace.judging.verdicts import Threshold, Tier
from pytest_nullspace.run.entries import plain
from pytest_nullspace.run.norms import ratio
from pytest_nullspace.run.stats import RunStats

if TYPE_CHECKING:
    from pytest_nullspace.checkpoint.arrays import Array

KEY = "merge"
"""Under which a run tells of it."""
THRESHOLD = Threshold("survival", 0.9, 0.5, lower_is_better=False)
"""Where a layer's survival passes and fails; measured, see docs/merging.md."""
NOISE = Threshold("noise", 1.0, math.inf, lower_is_better=True)
"""Where it only warns: what is changed beside the update outweighs it."""
_ROUNDED = 1e-6
SHOWN = 3
"""Layers that do not pass, of which each report tells."""
WORKERS = 8
"""Layers that are rounded at once at most, each with its blocks in memory."""


@dataclass(frozen=True, slots=True)
class Left:
    """What one type leaves of one layer's update.

    Attributes:
        survival: ``⟨R, ΔW⟩ / ‖ΔW‖²``; NaN where a number is none or leaves the type's range.
        share: ``‖R‖ / ‖ΔW‖``.
        cosine: Between ``R`` and ``ΔW``; NaN where nothing is left.
        moved: For each text whose rows were at hand mean ``‖Rx‖`` over mean ``‖ΔWx‖``.
    """

    survival: float
    share: float
    cosine: float
    moved: Mapping[str, float] = field(default_factory=dict)

    @property
    def noise(self) -> float:
        """``‖R − ΔW‖ / ‖ΔW‖``."""
        return math.sqrt(max(0.0, 1 - 2 * self.survival + self.share**2)) if math.isfinite(self.survival) else math.nan

    @property
    def is_possible(self) -> bool:
        """Whether its figures can be of one rounding: survival is the share times the cosine."""
        if not math.isfinite(self.survival):
            return True
        follows = self.share * self.cosine if self.share else 0.0
        alike = math.isclose(self.survival, follows, rel_tol=_ROUNDED, abs_tol=_ROUNDED)
        return alike and self.share >= 0 and not abs(self.cosine) > 1 + _ROUNDED

    @property
    def tier(self) -> Tier:
        """How it is judged; noise alone does not fail."""
        return Tier.worst([THRESHOLD.tier(self.survival), NOISE.tier(self.noise)])


@dataclass(frozen=True, slots=True)
class LayerLeft:
    """What a merge leaves of one layer's update.

    Attributes:
        name: Its module path.
        stored: The type in which its W lies in its file.
        update_norm: ``‖ΔW‖``, Frobenius.
        types: What each type leaves; nothing where there is no update.
        is_part: Whether a pass measures more: of a DoRA layer also the start, where that held a part of W.
    """

    name: str
    stored: str
    update_norm: float
    types: Mapping[str, Left]
    is_part: bool = False


def left_of(merge: Merge, types: Sequence[str], rows: "Mapping[str, Array]") -> LayerLeft:
    """Round a layer's weight with and without its update, some rows at a time.

    Args:
        merge: Where both lie.
        types: Names in `pytest_nullspace.checkpoint.rounding.TYPES`.
        rows: For each text some rows of the layer's input, shape ``(n, in)``.

    Raises:
        CheckpointError: A file cannot be read.
    """
    import numpy as np

    inputs = {text: np.asarray(of, np.float64).T for text, of in rows.items()}
    whole = 0.0
    far = {text: np.zeros(of.shape[1]) for text, of in inputs.items()}
    sums = {kind: [0.0, 0.0] for kind in types}
    moved = {kind: {text: np.zeros(of.shape[1]) for text, of in inputs.items()} for kind in types}
    with np.errstate(invalid="ignore", over="ignore"):
        for before, update in merge.parts():
            whole += float(np.vdot(update, update))
            for text, x in inputs.items():
                far[text] += np.square(update @ x).sum(axis=0)
            bare, merged = before.astype(np.float32), (before + update).astype(np.float32)
            for kind in types:
                rest = TYPES[kind](merged).astype(np.float64) - TYPES[kind](bare)
                sums[kind][0] += float(np.vdot(rest, update))
                sums[kind][1] += float(np.vdot(rest, rest))
                for text, x in inputs.items():
                    moved[kind][text] += np.square(rest @ x).sum(axis=0)
    norm, lengths = math.sqrt(whole), {text: float(np.sqrt(of).mean()) for text, of in far.items()}
    found = {}
    for kind, (common, own) in sums.items() if norm else ():
        reached = {text: ratio(float(np.sqrt(of).mean()), lengths[text]) for text, of in moved[kind].items()}
        size = math.sqrt(own)
        found[kind] = Left(common / whole, size / norm, ratio(common, size * norm), reached)
    return LayerLeft(merge.name, merge.stored, norm, found, merge.start is not None and merge.magnitude is not None)


@dataclass(frozen=True)
class Survival:
    """What a merge leaves of an adapter's updates.

    Attributes:
        types: The types that were asked for.
        layers: Each layer, in model order.
    """

    types: tuple[str, ...]
    layers: tuple[LayerLeft, ...]

    @classmethod
    def measured(
        cls, merges: Sequence[Merge], types: Sequence[str], rows: "Mapping[str, Mapping[str, Array]]"
    ) -> "Survival":
        """Round every layer, several at once.

        Args:
            merges: Where their weights lie.
            types: The types.
            rows: For each text, and then each layer that it reached, some rows of the layer's input.

        Raises:
            CheckpointError: A file cannot be read.
        """

        def left(merge: Merge) -> LayerLeft:
            return left_of(merge, types, {text: of[merge.name] for text, of in rows.items() if merge.name in of})

        return cls(tuple(types), side_by_side(left, merges, WORKERS))

    def of_type(self, kind: str) -> "OfType":
        """What one type leaves."""
        return OfType(kind, tuple((layer, layer.types.get(kind)) for layer in self.layers))

    @property
    def cheapest(self) -> str | None:
        """The type of fewest bits, of those that were asked for, that passes; None where none does."""
        kept = [kind for kind in self.types if self.of_type(kind).tier is Tier.PASS]
        return min(kept, key=BITS.__getitem__, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON holds them, no number as ``null``."""
        verdicts = {kind: str(self.of_type(kind).tier) for kind in self.types}
        return {**plain(asdict(self)), "tiers": verdicts, "cheapest": self.cheapest}

    @classmethod
    def of(cls, about: Mapping[str, Any], where: str = "the run") -> "Survival | None":
        """What a run tells of it, if it does.

        Args:
            about: Of the run.
            where: The file it was saved in, for messages.

        Raises:
            StatsError: What it tells is none.
        """
        told = about.get(KEY)
        if told is None:
            return None
        try:
            types, layers = tuple(told["types"]), tuple(map(_layer, told["layers"]))
            if not types or not layers or not {*types} <= {*TYPES}:
                raise ValueError(types)
            if any({*layer.types} != ({*types} if layer.update_norm else set()) for layer in layers):
                raise ValueError(types)  # a layer without a figure would be green unmeasured
            if not all(left.is_possible for layer in layers for left in layer.types.values()):
                raise ValueError(layers)  # of which one was edited, and one alone is judged
            return cls(types, layers)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            raise StatsError(f"{where}: its entry '{KEY}' does not tell of a merge; measure again") from None

    @classmethod
    def of_run(cls, run: RunStats, where: str) -> "Survival | None":
        """The same of a saved run, which must tell of every layer whose update it measured.

        Raises:
            StatsError: What it tells is none, or a layer lacks, which would be green unmeasured.
        """
        found = cls.of(run.about, where)
        told = set() if found is None else {layer.name for layer in found.layers if layer.types or layer.is_part}
        lacking = [layer.name for layer in run.layers if layer.update_norm > 0 and layer.name not in told]
        if found is not None and lacking:
            raise StatsError(
                f"{where}: its entry '{KEY}' tells nothing of {printable(lacking[0])}, though that has an update; "
                "measure again"
            )
        return found


def _layer(told: Mapping[str, Any]) -> LayerLeft:
    types = {
        str(kind): Left(
            _number(left["survival"]),
            _number(left["share"]),
            _number(left["cosine"]),
            {str(text): _number(value) for text, value in left["moved"].items()},
        )
        for kind, left in told["types"].items()
    }
    name, stored, norm = str(told["name"]), str(told["stored"]), _number(told["update_norm"])
    return LayerLeft(name, stored, norm, types, told.get("is_part") is True)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(value)
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class OfType:
    """What one type leaves of every layer's update.

    Attributes:
        kind: The type.
        layers: Each layer, with what the type leaves of it; None of one without an update.
    """

    kind: str
    layers: tuple[tuple[LayerLeft, Left | None], ...]

    @cached_property
    def told(self) -> list[tuple[LayerLeft, Left]]:
        """The layers that have an update, the worst first; what is no number is worse than any."""
        with_update = [(layer, left) for layer, left in self.layers if left is not None]
        return sorted(with_update, key=lambda of: of[1].survival if math.isfinite(of[1].survival) else -math.inf)

    @property
    def tier(self) -> Tier:
        """That of the worst layer; where none has an update nothing can be left of it."""
        return Tier.worst(left.tier for _, left in self.told) if self.told else Tier.FAIL

    @property
    def average(self) -> float:
        """The mean survival over layers that have an update."""
        return sum(left.survival for _, left in self.told) / len(self.told) if self.told else math.nan

    def moved(self, text: str) -> float | None:
        """The median over layers of how much of what the update does to a text's activations the merge does."""
        found = [left.moved[text] for _, left in self.told if math.isfinite(left.moved.get(text, math.nan))]
        return median(found) if found else None

    @property
    def lost(self) -> list[tuple[LayerLeft, Left]]:
        """The layers that do not pass, the worst first: by what is left of them or, where that passes, by noise."""
        found = [(layer, left) for layer, left in self.told if left.tier is not Tier.PASS]
        is_kept = all(THRESHOLD.tier(left.survival) is Tier.PASS for _, left in found)
        return sorted(found, key=lambda of: -of[1].noise) if is_kept else found

    @property
    def texts(self) -> Collection[str]:
        """The texts whose rows were at hand."""
        return dict.fromkeys(text for _, left in self.told for text in left.moved)

    @property
    def summary(self) -> str:
        """What is left, in one line, the worst layer by name."""
        if not self.told:
            return f"no layer has an update that a merge in {self.kind} could keep"
        layer, worst = self.told[0]
        loud = max(self.told, key=lambda of: of[1].noise)
        if not math.isfinite(worst.survival):
            return f"{self.kind} cannot hold {layer.name}: a number of it is none, or leaves the type's range"
        kept = f"a merge in {self.kind} keeps {percent(self.average)} of the update"
        if self.tier is Tier.PASS:
            return f"{kept}, {percent(worst.survival)} in the worst layer {layer.name}"
        short = sum(THRESHOLD.tier(left.survival) is not Tier.PASS for _, left in self.told)
        many = f"{short or len(self.lost)} of {len(self.layers)} layers"
        if not short:
            beside = f"{loud[1].noise:.3g} x as much in {loud[0].name}"
            return f"{kept}, but in {many} changes more beside the update than by it, {beside}"
        held = f"{percent(worst.survival)} of {layer.name}, whose W is stored as {layer.stored}"
        return f"{kept}; {many} lose too much of it, and there is left {held}"

    def lines(self) -> Iterator[str]:
        """All that a failure says."""
        yield self.summary
        for layer, left in self.lost[:SHOWN]:
            beside = "".join(f", {value:.3g} of ‖ΔWx‖ on the {text}" for text, value in left.moved.items())
            yield f"  {layer.name}: {figures(left)}{beside}"
        if self.lost:
            yield (
                f"the update lies near or below the step of {self.kind} beside W, and is rounded away or drowned: "
                "serve the adapter unmerged, or merge in float32 and keep it so"
            )


def figures(left: Left) -> str:
    """All that is told of the weights."""
    told = {"survival": left.survival, "norm": left.share, "cosine": left.cosine, "noise": left.noise}
    return ", ".join(f"{name} {value:.3g}" for name, value in told.items())


def percent(part: float) -> str:
    """A share in per cent."""
    return f"{100 * part:.3g} %"
