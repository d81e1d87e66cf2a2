"""What the weights alone tell, from the files: norms, the rank that is used, what is dead or no number. Pure.

No text, no forward, no torch: what the layers do to activations stays unknown, and `STATEMENT` says so.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pytest_nullspace.checkpoint import Checkpoint, LayerSpec, lora_null
from pytest_nullspace.checkpoint.arrays import norm, read_tensor, triangle
from pytest_nullspace.checkpoint.header import TensorInfo
from pytest_nullspace.checkpoint.threads import side_by_side
from pytest_nullspace.errors import StatsError
from pytest_nullspace.judging.audit import Place, places
from pytest_nullspace.run.entries import plain
from pytest_nullspace.run.stats import SCALE_ZERO

EQUAL = 1e-6
"""The share of the largest singular value within which all are taken for equal."""
WORKERS = 4
"""Layers that are read at once at most, each with some rows in memory."""
STATEMENT = "gated on weights, activations not measured"
"""What every report of such a run says."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights.

    Attributes:
        name: Its module path.
        rank: Of its adapter.
        scale: What its update is multiplied with, ``alpha / r`` in PEFT.
        down_norm: Frobenius norm of B.
        up_norm: Frobenius norm of A, scale included.
        base_norm: Frobenius norm of W_res; None where the checkpoint does not carry it.
        update_norm: Frobenius norm of ``scale · A B``.
        rank_used: The effective rank of ``A B``: e to the entropy of its singular values' shares; 0 of no update.
        sigma: The largest singular value of ``scale · A B``.
        concentration: Its share in their energy, σ₁² over the sum of all σ²; NaN of no update.
        kurtosis: Their fourth central moment over the square of the second; NaN of fewer than four, or equal ones.
    """

    name: str
    rank: int
    scale: float
    down_norm: float
    up_norm: float
    base_norm: float | None
    update_norm: float
    rank_used: float
    sigma: float = math.nan
    concentration: float = math.nan
    kurtosis: float = math.nan

    @property
    def is_finite(self) -> bool:
        """Whether all its weights are numbers."""
        return all(map(math.isfinite, (self.down_norm, self.up_norm, self.base_norm or 0.0, self.update_norm)))

    def faults(self, trained: bool) -> Iterator[str]:
        """What its weights alone show to be wrong, in phrases."""
        if not self.is_finite:
            yield "non-finite weights (NaN or infinity)"
        elif trained and self.scale == 0:
            yield f"dead: {SCALE_ZERO}, so with the adapter the output is the same as without"
        elif trained and self.update_norm == 0:
            what = "A is" if self.up_norm == 0 else "B is" if self.down_norm == 0 else "A B is"
            yield f"dead: {what} zero, so with the adapter the output is the same as without"
        elif not trained and self.update_norm != 0:
            yield f"an update already: ‖A B‖ {self.update_norm:.4g}; this is no initial checkpoint"


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint's layers, in model order."""

    layers: tuple[LayerWeights, ...]

    def layer(self, name: str) -> LayerWeights | None:
        """The layer of that name, if it was weighed."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> Mapping[str, LayerWeights]:
        return {layer.name: layer for layer in self.layers}

    def to_list(self) -> list[dict[str, Any]]:
        """The weights as JSON holds them, no number as ``null``."""
        return [{**plain(asdict(layer)), "has_base": layer.base_norm is not None} for layer in self.layers]

    @classmethod
    def of(cls, about: Mapping[str, Any], where: str = "the run") -> "Weights | None":
        """The weights that a run tells of, if it was gated on them.

        Args:
            about: Of the run.
            where: The file it was saved in, for messages.

        Raises:
            StatsError: What it tells is none.
        """
        told = about.get("weights")
        if told is None:
            return None
        try:
            return cls(tuple(map(_layer, told)))
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            raise StatsError(f"{where}: its entry 'weights' holds no weights; weigh again") from None


def _layer(entry: Mapping[str, Any]) -> LayerWeights:
    told = {key: _told(key, value) for key, value in entry.items() if key != "has_base"}
    return LayerWeights(**{**told, **({} if entry["has_base"] else {"base_norm": None})})


def _told(key: str, value: Any) -> Any:
    if key == "name" and isinstance(value, str):
        return value
    if key == "name" or isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(key)
    return int(value) if key == "rank" and value is not None else math.nan if value is None else float(value)


def weigh(checkpoint: Checkpoint, layers: Collection[str]) -> Weights:
    """Read the weights of ``layers``, some rows of a few layers in memory at a time.

    Raises:
        CheckpointError: A file cannot be read.
    """
    held = places(checkpoint)
    specs = [spec for spec in checkpoint.layers if spec.name in layers]
    return Weights(side_by_side(lambda spec: _weighed(checkpoint, spec, held), specs, WORKERS))


def _weighed(checkpoint: Checkpoint, spec: LayerSpec, held: Mapping[Place, TensorInfo]) -> LayerWeights:
    """The weights of one layer; what float64 cannot square is told as infinite."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        return _layer_of(checkpoint, spec, held)


def _layer_of(checkpoint: Checkpoint, spec: LayerSpec, held: Mapping[Place, TensorInfo]) -> LayerWeights:
    import numpy as np

    up, down = triangle(held[spec.name, "up"]), triangle(held[spec.name, "down"], turned=True)
    base = held.get((spec.name, "base"))
    scale = 1.0 if spec.scale is None else spec.scale.value
    down_norm, up_norm = float(np.linalg.norm(down)), abs(scale) * float(np.linalg.norm(up))
    protect = [checkpoint.tensors.get(f"{spec.name}.{p}") for p in (lora_null.PROTECT_UP, lora_null.PROTECT_DOWN)]
    if protect[0] is not None and protect[1] is not None:
        whole = read_tensor(held[spec.name, "down"])
        down = (whole - whole @ read_tensor(protect[0]) @ read_tensor(protect[1])).T
    values = singular_values(up, down)
    return LayerWeights(
        spec.name,
        spec.rank,
        scale,
        down_norm,
        up_norm,
        None if base is None else norm(base),
        abs(scale) * float(np.linalg.norm(values)),
        effective_rank(values),
        abs(scale) * float(values.max()),
        concentration(values),
        kurtosis(values),
    )


def singular_values(up: Any, down: Any) -> Any:
    """Those of ``up @ down.T``, shapes ``(…, r)``, of which each may be a triangle; NaN where a number is none."""
    import numpy as np

    if not (np.isfinite(up).all() and np.isfinite(down).all()):
        return np.full(down.shape[1], np.nan)
    root: Any = np.linalg.qr(down, mode="r")
    return np.linalg.svd(up @ root.T, compute_uv=False)


def concentration(values: Any) -> float:
    """``σ₁² / Σ σ²``."""
    most = float(values.max())
    return 1 / float(((values / most) ** 2).sum()) if most else math.nan


def kurtosis(values: Any) -> float:
    """The fourth central moment of singular values over the square of their second."""
    most = float(values.max())
    if len(values) < 4 or not math.isfinite(most) or not most:
        return math.nan
    apart = (values - values.mean()) / most
    second = float((apart**2).mean())
    if second <= EQUAL**2:
        return math.nan
    return float((apart**4).mean()) / second**2


def effective_rank(values: Any) -> float:
    """``exp(−Σ p ln p)`` of the shares ``p`` of singular values: n equal ones give n, one alone gives 1, none 0."""
    import numpy as np

    total = float(values.sum())
    if not math.isfinite(total):
        return math.nan
    shares = values[values > 0] / total if total else values[:0]
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0
