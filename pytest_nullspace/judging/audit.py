"""Trained against initial, tensor by tensor, straight from the files: what moved, how far, and whether it might.

One tensor of each side is in memory at a time. Nothing needs torch; numpy is imported where numbers are needed.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint import Checkpoint, lora_null, peft
from pytest_nullspace.checkpoint.arrays import change, is_finite, largest_angle, read_tensor, relative
from pytest_nullspace.checkpoint.header import TensorInfo, printable
from pytest_nullspace.errors import CheckpointError, StatsError
from pytest_nullspace.run.entries import plain
from pytest_nullspace.run.stats import LayerStats

if TYPE_CHECKING:
    from pytest_nullspace.checkpoint.arrays import Array

VARIANTS = ("v1", "v2", "lora")
"""What training may move: v2 A alone, v1 and plain LoRA A and B."""

SAME_DTYPE, OTHER_DTYPE = 1e-6, 1e-2
"""How far a frozen tensor may lie from its start, relative: stored alike, or rounded to another precision."""
SAME_SPACE = 0.1
"""Below this angle in degrees, B spans what it did."""
ORTHONORMAL = 1e-2
"""How far ``B Bᵀ`` may lie from the identity, in any element; half precision rounds."""

_DOWN, _UP, _BASE, _BIAS = "down", "up", "base", "bias"


@dataclass(frozen=True, slots=True)
class LayerAudit:
    """How far one layer's tensors lie from their start.

    Attributes:
        name: Its module path.
        down: ``‖B − B₀‖ / ‖B₀‖``.
        angle: The largest principal angle between the row spaces of B and B₀, in degrees.
        up: ``‖A − A₀‖``; absolute, for A mostly starts at zero.
        base: ``‖W_res − W₀‖ / ‖W₀‖``; None where neither checkpoint carries it.
        bias: The same of the bias; None where there is none.
        tolerance: How far a frozen tensor may lie from its start.
        scale: What PEFT multiplies its update with, in words; None in a format without such a factor.
        initial_scale: The same of the start.
    """

    name: str
    down: float
    angle: float
    up: float
    base: float | None
    bias: float | None
    tolerance: float
    scale: str | None = None
    initial_scale: str | None = None

    @property
    def is_rescaled(self) -> bool:
        """Whether its update is multiplied with something else than at the start, as far as both tell."""
        return None not in (self.scale, self.initial_scale) and self.scale != self.initial_scale

    def faults(self, variant: str, trained: bool) -> Iterator[str]:
        """What moved and must not have, and what must have moved and did not, in phrases."""
        if variant == "v2" and not self.down <= self.tolerance:
            what = "B turned or rescaled within its space" if self.angle < SAME_SPACE else "B left its space"
            yield f"{what}: relative change {self.down:.3g}, largest principal angle {self.angle:.3g}°"
        for label, far in (("W_res", self.base), ("bias", self.bias)):
            if far is not None and not far <= self.tolerance:
                yield f"{label} changed: relative change {far:.3g}"
        if self.is_rescaled:
            yield f"the scale is {self.scale}, but was {self.initial_scale}"
        if trained and self.up == 0:
            yield "A did not move from its start"


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor outside the layers that is not what it was: how far it lies, or why that cannot be said."""

    name: str
    change: float
    why: str = ""

    def __str__(self) -> str:
        """The tensor with its relative change, or the reason."""
        return f"{printable(self.name)} ({printable(self.why, 1000) or f'relative change {self.change:.3g}'})"


@dataclass(frozen=True)
class Audit:
    """All that differs between a checkpoint and its start.

    Attributes:
        initial: Where the start lies.
        variant: One of `VARIANTS`.
        decided: Why that one.
        layers: Each audited layer, in model order.
        others: The tensors outside the layers that moved, came or went.
        compared: How many tensors outside the layers there are in one or both of the two.
    """

    initial: str
    variant: str
    decided: str
    layers: tuple[LayerAudit, ...]
    others: tuple[Moved, ...]
    compared: int

    def check(self, layer: LayerStats, trained: bool) -> Iterator[str]:
        """What fails ``layer``, in phrases."""
        yield from self.faults(layer.name, trained)

    def faults(self, layer: str, trained: bool) -> Iterator[str]:
        """The same by the layer's name."""
        audited = self._by_name.get(layer)
        if audited is not None:
            yield from audited.faults(self.variant, trained)

    @cached_property
    def _by_name(self) -> Mapping[str, LayerAudit]:
        return {audited.name: audited for audited in self.layers}

    @property
    def bases(self) -> tuple[Moved, ...]:
        """That training is told of another base than its start, if it is."""
        return tuple(other for other in self.others if other.name == _BASE_NAMED)

    @property
    def tensors(self) -> tuple[Moved, ...]:
        """The tensors outside the layers that moved."""
        return tuple(other for other in self.others if other.name != _BASE_NAMED)

    def to_dict(self) -> dict[str, Any]:
        """The audit as JSON holds it."""
        told: dict[str, Any] = plain(asdict(self), "nan")
        return told

    @classmethod
    def of(cls, about: Mapping[str, Any], where: str = "the run") -> "Audit | None":
        """The audit that a run tells of, if it does.

        Args:
            about: Of the run.
            where: The file it was saved in, for messages.

        Raises:
            StatsError: What it tells is none.
        """
        told = about.get("audit")
        if told is None:
            return None
        try:
            layers = tuple(LayerAudit(**{key: _told(key, value) for key, value in e.items()}) for e in told["layers"])
            others = tuple(Moved(**{key: _told(key, value) for key, value in m.items()}) for m in told["others"])
            words: dict[str, Any] = {key: _told(key, told[key]) for key in ("initial", "variant", "decided")}
            words["compared"] = int(_told("compared", told["compared"]))
            return cls(**{**told, **words, "layers": layers, "others": others})
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            raise StatsError(f"{where}: its entry 'audit' is no audit; measure again") from None


_BASE_NAMED = "base_model_name_or_path"
_OPTIONAL = ("base", "bias", "scale", "initial_scale")
_WORDS = ("name", "why", "scale", "initial_scale", "initial", "variant", "decided")


def _told(key: str, value: Any) -> Any:
    """What a file holds under ``key``: null is a number that is none, or what is not there at all.

    Raises:
        TypeError: It is of another type.
    """
    if value is None and key in _OPTIONAL:
        return None
    if key in _WORDS and isinstance(value, str):
        return printable(value, 1000)
    if key not in _WORDS and (value is None or value == "nan"):
        return math.nan
    if key in _WORDS or isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(key)
    return float(value)


def audit(
    trained: Checkpoint,
    initial: Checkpoint,
    *,
    layers: Collection[str],
    variant: str = "auto",
    trained_base: Mapping[str, TensorInfo] | None = None,
    initial_base: Mapping[str, TensorInfo] | None = None,
) -> Audit:
    """Compare every tensor of a checkpoint with its start.

    Args:
        trained: The checkpoint.
        initial: Its start, in the same format or the other.
        layers: The layers to audit.
        variant: One of `VARIANTS`, or ``auto`` to decide from the initial weights.
        trained_base: The tensors of the base model, where the checkpoint does not carry them and they are to be
            compared.
        initial_base: The same for the start.

    Raises:
        CheckpointError: A layer is only in one of the two, has another shape, or a file cannot be read.
    """
    now, before = places(trained, trained_base), places(initial, initial_base)
    names = [spec.name for spec in trained.layers if spec.name in layers]
    gone = {spec.name for spec in initial.layers} ^ {spec.name for spec in trained.layers}
    if gone:
        raise CheckpointError(
            f"{initial.directory}: not the start of {trained.directory}: only one of them adapts {min(gone)}"
            + (f" and {len(gone) - 1} more layers" if len(gone) > 1 else "")
        )
    scales = [{spec.name: spec.scale for spec in of.layers} for of in (trained, initial)]
    # Conv1D, as in GPT-2, stores its weight transposed, and PEFT calls that fan_in_fan_out.
    turned = bool(trained.config.get("fan_in_fan_out")) != bool(initial.config.get("fan_in_fan_out"))
    starts, audited = [], []
    for name in names:
        starts.append(_start(before, name))
        was, is_now = (None if of[name] is None else str(of[name]) for of in reversed(scales))
        audited.append(replace(_layer(now, before, name, turned), scale=is_now, initial_scale=was))
    if variant == "auto":
        variant, decided = _decide(starts)
    else:
        decided = "as --nullspace-variant says"
    others, compared = _others(now, before)
    # A LoRA for llama.cpp names none, nor does a model in memory whose base was never saved.
    both_name_one = peft.GGUF not in (trained.format, initial.format) and trained.base and initial.base
    if both_name_one and trained_base is None and initial_base is None and trained.base != initial.base:
        others.insert(0, Moved(_BASE_NAMED, math.nan, f"{trained.base}, was {initial.base}"))
    return Audit(str(initial.directory), variant, decided, tuple(audited), tuple(others), compared)


Place = tuple[str, str]
"""A layer and a part of it, or ``""`` and the name of a tensor outside all layers."""


def places(checkpoint: Checkpoint, base: Mapping[str, TensorInfo] | None = None) -> dict[Place, TensorInfo]:
    """Every tensor by the place that it has in the plain model, whatever the format."""
    names = {spec.name for spec in checkpoint.layers}
    found: dict[Place, TensorInfo] = {}
    if checkpoint.format in peft.FORMATS:
        parts, prefix = {peft.DOWN: _DOWN, peft.UP: _UP}, peft.PREFIX
    else:
        parts = {lora_null.DOWN: _DOWN, lora_null.UP: _UP, lora_null.BASE: _BASE, lora_null.BIAS: _BIAS}
        prefix = ""
    for tensor in checkpoint.tensors.values():
        found[_place(tensor.name.removeprefix(prefix), parts, names)] = tensor
    for tensor in (base or {}).values():
        found[_place(tensor.name, {"weight": _BASE, "bias": _BIAS}, names)] = tensor
    return found


def _place(tensor: str, parts: Mapping[str, str], layers: Collection[str]) -> Place:
    for suffix, part in parts.items():
        layer = tensor.removesuffix(f".{suffix}")
        if layer != tensor and layer in layers:
            return layer, part
    return "", tensor


@dataclass(frozen=True, slots=True)
class _Start:
    """How a layer began."""

    up_is_zero: bool
    down_is_orthonormal: bool


def _start(before: Mapping[Place, TensorInfo], name: str) -> _Start:
    import numpy as np

    for info in (before[name, _DOWN], before[name, _UP]):
        if not is_finite(info):
            raise CheckpointError(
                f"{info.file}: tensor {printable(info.stored or info.name)} holds NaN or infinity, so no training can "
                "have started from it; give the start as it was saved"
            )
    down = read_tensor(before[name, _DOWN])
    off = np.abs(down @ down.T - np.eye(len(down))).max()
    return _Start(not read_tensor(before[name, _UP]).any(), bool(off <= ORTHONORMAL))


def _decide(starts: Collection[_Start]) -> tuple[str, str]:
    if all(start.down_is_orthonormal for start in starts):
        return "v2", "the rows of B are orthonormal at the start"
    if all(start.up_is_zero for start in starts):
        return "lora", "A is zero at the start, and the rows of B are not orthonormal"
    return "v1", "A is not zero at the start"


def _layer(now: Mapping[Place, TensorInfo], before: Mapping[Place, TensorInfo], name: str, turned: bool) -> LayerAudit:
    down, start = read_tensor(now[name, _DOWN]), read_tensor(before[name, _DOWN])
    if down.shape != start.shape:
        raise CheckpointError(
            f"{before[name, _DOWN].file}: layer {printable(name)}: B is {_shape(start)} at the start, but "
            f"{_shape(down)} now; this is not the start of that checkpoint"
        )
    up = change(now[name, _UP], before[name, _UP], absolute=True)
    parts = [(now[name, part], before[name, part]) for part in (_DOWN, _BASE) if _both(now, before, (name, part))]
    return LayerAudit(
        name,
        relative(down, start),
        largest_angle(down, start),
        up,
        _base_change(now, before, name, turned),
        _change(now, before, (name, _BIAS)),
        SAME_DTYPE if all(a.dtype == b.dtype for a, b in parts) else OTHER_DTYPE,
    )


def _shape(array: "Array") -> str:
    return "×".join(map(str, array.shape))


def _both(now: Mapping[Place, TensorInfo], before: Mapping[Place, TensorInfo], place: Place) -> bool:
    return place in now and place in before


def _change(now: Mapping[Place, TensorInfo], before: Mapping[Place, TensorInfo], place: Place) -> float | None:
    return change(now[place], before[place]) if _both(now, before, place) else None


def _base_change(
    now: Mapping[Place, TensorInfo], before: Mapping[Place, TensorInfo], name: str, turned: bool
) -> float | None:
    """The change of W_res, of which one side is stored transposed where ``turned`` or its shape says so."""
    place = name, _BASE
    if not _both(now, before, place):
        return None
    a, b = now[place], before[place]
    if turned or (a.shape != b.shape and a.shape == b.shape[::-1]):
        return relative(read_tensor(a), read_tensor(b).T) if a.shape == b.shape[::-1] else math.inf
    return change(a, b)


def _others(now: Mapping[Place, TensorInfo], before: Mapping[Place, TensorInfo]) -> tuple[list[Moved], int]:
    moved, outside = [], sorted({place for place in (*now, *before) if not place[0]})
    for place in outside:
        name = place[1]
        if not _both(now, before, place):
            moved.append(Moved(name, math.nan, "new" if place in now else "gone"))
            continue
        a, b = now[place], before[place]
        if a.shape != b.shape:
            moved.append(Moved(name, math.nan, f"shape {list(a.shape)}, was {list(b.shape)}"))
        elif not (far := change(a, b)) <= (SAME_DTYPE if a.dtype == b.dtype else OTHER_DTYPE):
            moved.append(Moved(name, far))
    return moved, len(outside)
