"""Several candidates side by side, and which of them is the best. Pure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pytest_nullspace.judging.decision import Call, Decision
from pytest_nullspace.judging.invariants import Expectations, judge
from pytest_nullspace.run.entries import plain
from pytest_nullspace.run.stats import RunStats

FIGURES_TOLD = ("divergence", "task-gain", "forgetting")
"""By which candidates are told apart: what moved, what was learned, how loud the update is."""
_DEPLOYABLE = (Call.SAFE, Call.LOOK)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One run of several.

    Attributes:
        name: How reports name it.
        call: The verdict on it.
        divergence: How far its predictions moved on the preserved text on which they moved most; NaN where that was not
            measured.
        gain: How much the task text gained; NaN likewise.
        forgetting: The average of its layers; NaN likewise.
        worst: Its worst layer; empty where none was measured.
    """

    name: str
    call: Call
    divergence: float = math.nan
    gain: float = math.nan
    forgetting: float = math.nan
    worst: str = ""

    @property
    def figures(self) -> dict[str, float]:
        """Its figures by their names; NaN where one was not measured."""
        return dict(zip(FIGURES_TOLD, (self.divergence, self.gain, self.forgetting), strict=True))

    def to_dict(self, is_best: bool) -> dict[str, Any]:
        """What is told of it, as JSON holds it."""
        known = {name: plain(value) for name, value in self.figures.items()}
        return {
            "name": self.name,
            "verdict": str(self.call),
            **known,
            "worst_layer": self.worst or None,
            "best": is_best,
        }


def candidate(name: str, decision: Decision, run: RunStats | None, expectations: Expectations | None) -> Candidate:
    """What is told of one run beside others; of one that was not measured there is the verdict alone."""
    if run is None or expectations is None:
        return Candidate(name, decision.call)
    drift = run.drift
    divergence = math.nan if drift is None else max((of.divergence for of in drift.texts.values()), key=_unknown_most)
    gain = math.nan if drift is None or drift.task is None else -drift.task.loss_change
    forgetting = run.mean("forgetting") if run.layers and "forgetting" not in run.absent else math.nan
    worst = max((judge(layer, expectations) for layer in run.layers), key=lambda of: of.severity, default=None)
    return Candidate(name, decision.call, divergence, gain, forgetting, "" if worst is None else worst.subject)


def _unknown_most(divergence: float) -> float:
    return math.inf if math.isnan(divergence) else divergence


def best(candidates: Iterable[Candidate]) -> Candidate | None:
    """Of those that may be deployed the safest, of these the one that learned most, then that which moved least."""
    fit = [one for one in candidates if one.call in _DEPLOYABLE]
    return min(fit, key=_place, default=None)


def _place(one: Candidate) -> tuple[int, float, float]:
    return _DEPLOYABLE.index(one.call), -_known(one.gain, -1), _known(one.divergence, 1)


def _known(value: float, side: int) -> float:
    """``value`` to sort by; what was not measured lies on its bad side."""
    return value if math.isfinite(value) else side * math.inf
