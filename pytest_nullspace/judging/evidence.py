"""What a cause is, and all that is known of a run for finding one. Pure."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pytest_nullspace.judging.audit import Audit, LayerAudit
from pytest_nullspace.judging.baseline import Comparison
from pytest_nullspace.judging.weights import LayerWeights, Weights
from pytest_nullspace.run.stats import LayerStats, RunStats

LOUD = 0.75
"""Leakage over chance from which a subspace is none that was chosen to be quiet: the fail bound."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One cause.

    Attributes:
        cause: Its name, as the documentation has it.
        evidence: What was measured that shows it.
        cure: What to do.
        apart: What would tell it from the next likely cause.
        layers: The layers that show it, in model order.
    """

    cause: str
    evidence: str
    cure: str
    apart: str
    layers: tuple[str, ...]

    @property
    def page(self) -> str:
        """The command that prints its page, which the project's repository has as ``docs/causes/<cause>.md``."""
        return f"pytest --nullspace-explain={self.cause}"

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """All that is known of one run; ``sound`` are the layers that can be judged, ``left_out`` figures that are not."""

    run: RunStats
    sound: Sequence[LayerStats]
    audit: Audit | None
    compared: Comparison | None
    weights: Weights | None
    left_out: Collection[str]

    @property
    def names(self) -> tuple[str, ...]:
        """Every layer that anything is known of."""
        return names_of(
            self.run.layers or (self.weights.layers if self.weights is not None else ()) or self.audited(bool)
        )

    def audited(self, holds: Callable[[LayerAudit], bool]) -> list[LayerAudit]:
        """The audited layers of which ``holds`` is true."""
        return [] if self.audit is None else [layer for layer in self.audit.layers if holds(layer)]

    @property
    def is_v2(self) -> bool:
        """Whether B was to stay frozen, as far as is known."""
        return self.audit is None or self.audit.variant == "v2"

    @property
    def loud(self) -> list[LayerStats]:
        """The sound layers whose subspace is none that was chosen to be quiet, where that is judged."""
        if "leakage" in self.left_out:
            return []
        return [layer for layer in self.sound if "leakage" not in layer.absent and layer.leakage > LOUD]

    @property
    def rescaled(self) -> list[LayerAudit]:
        """The layers whose update is multiplied with something else than at the start."""
        return self.audited(lambda layer: layer.is_rescaled)

    @property
    def scaled_to_zero(self) -> tuple[str, ...]:
        """The layers whose update is multiplied by 0, whatever their matrices hold."""
        known: Sequence[LayerStats | LayerWeights] = self.run.layers
        if not known and self.weights is not None:
            known = self.weights.layers
        return names_of([layer for layer in known if layer.scale == 0])

    @property
    def in_half(self) -> bool:
        """Whether it was measured in float16."""
        return bool(self.run.about.get("dtype") == "float16")


def names_of(layers: Sequence[LayerStats | LayerAudit | LayerWeights]) -> tuple[str, ...]:
    """Their names, in order."""
    return tuple(layer.name for layer in layers)


def in_how_many(part: Sequence[object], whole: Sequence[object]) -> str:
    """In how many of all layers."""
    return f"in {len(part)} of {len(whole)} layers"
