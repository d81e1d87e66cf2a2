"""A remedy with a number: how much of the update may stay so that the predictions pass. Pure.

What it would be is found by asking for the drift at a few scales; `pytest_nullspace.measuring.scaling` answers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pytest_nullspace.errors import StatsError, printable
from pytest_nullspace.judging.invariants import Expectations, judge_drift
from pytest_nullspace.judging.verdicts import Finding, Tier
from pytest_nullspace.run.figures import FIGURES, Text
from pytest_nullspace.run.stats import Drift

KEY = "suggestion"
"""Under which a run tells it."""
ROUNDS, AT_ONCE = 4, 3
"""How often is asked at most, and for how many scales at once, which share the base's predictions."""
NEAR = 0.04
"""How near, relative, the scale that passes may be to one that does not."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """The largest scale of the update that was found to pass, or why there is none.

    Attributes:
        scale: What the update is multiplied with; None where none passes.
        said: What to write for it, as the adapter's format has it; or why none passes.
        figures: Each figure of the predictions at that scale, with its margin; empty where none passes.
        kept: Which share of the task's gain is kept; None without a task text, or where nothing was gained.
    """

    scale: float | None
    said: str
    figures: Mapping[str, tuple[float, float]]
    kept: float | None = None

    def __str__(self) -> str:
        """It in a sentence."""
        if self.scale is None:
            return f"no scale of the update passes: {self.said}"
        told = [f"{name} {value:.3g} ± {margin:.2g}" for name, (value, margin) in self.figures.items()]
        kept = "" if self.kept is None else f"; {self.kept:.0%} of the task's gain kept".replace("%", " %")
        return f"{self.said} would pass: {', '.join(told)}{kept}"

    def to_dict(self) -> dict[str, Any]:
        """As a saved run holds it."""
        return asdict(self)

    @classmethod
    def of(cls, about: Mapping[str, Any], where: str = "") -> "Remedy | None":
        """What a run tells of it; None if it was not asked for.

        Raises:
            StatsError: A file holds something else there.
        """
        told = about.get(KEY)
        if told is None:
            return None
        try:
            scale, kept = (None if told[name] is None else float(told[name]) for name in ("scale", "kept"))
            figures = {name: (float(value), float(margin)) for name, (value, margin) in told["figures"].items()}
            said = printable(told["said"], 300)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            said, figures, scale, kept = "", {"": (math.nan, math.nan)}, None, None
        numbers = [n for n in (scale, kept) if n is not None] + [n for pair in figures.values() for n in pair]
        if not all(map(math.isfinite, numbers)) or not figures.keys() <= FIGURES.keys():
            raise StatsError(f"{where}: {KEY}: not what a run tells of it; measure again")
        return cls(scale, said, figures, kept)


def passes(drift: Drift, expectations: Expectations, text: Text, surely: bool = True) -> bool:
    """Whether every figure of that text passes, and ``surely`` would with more text."""
    found = _findings(drift, expectations, text)
    return bool(found) and all(f.tier is Tier.PASS and not (surely and f.uncertain) for f in found)


def guess(drift: Drift, expectations: Expectations) -> float:
    """About the scale that passes, as a divergence and what goes with it grow with the square of the update."""
    shares = [
        finding.threshold.passes / (finding.value + finding.margin)
        for finding in _findings(drift, expectations, Text.PRESERVED)
        if finding.margin is not None and 0 < finding.threshold.passes < finding.value + finding.margin < math.inf
    ]
    return math.sqrt(min(shares, default=0.25))


def largest(fits: Callable[[Sequence[float]], Sequence[bool]], about: float) -> float:
    """The largest scale below 1 that was found to fit, to within `NEAR`; 0 where none above it does.

    Args:
        fits: Tells of several scales at once whether each fits; 0 is known to.
        about: Where it may lie.
    """
    low, high = 0.0, 1.0
    asked = sorted({0.8 * about, about, min(1.2 * about, (1 + about) / 2)})
    for _ in range(ROUNDS):
        fitting = [scale for scale, does in zip(asked, fits(asked), strict=True) if does]
        low = max(fitting, default=low)
        high = min((scale for scale in asked if scale > low), default=high)
        if low > 0 and high - low <= NEAR * high:
            break
        parts = [part / (AT_ONCE + 1) for part in range(1, AT_ONCE + 1)]
        asked = [low * (high / low) ** part if low else high * part for part in parts]
    return low


def _findings(drift: Drift, expectations: Expectations, text: Text) -> list[Finding]:
    found = [finding for name in drift.texts for finding in judge_drift(drift, expectations, name).findings]
    return [finding for finding in found if FIGURES[finding.threshold.figure].text is text]
