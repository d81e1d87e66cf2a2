"""The verdict on a figure, a layer or the averages: thresholds and tiers, and what was found in words. Pure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from pytest_nullspace.errors import OptionError


class Tier(StrEnum):
    """How a figure is judged."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"

    @classmethod
    def worst(cls, tiers: Iterable["Tier"]) -> "Tier":
        """The most severe of ``tiers``; pass if there is none."""
        order = list(cls)
        return max(tiers, key=order.index, default=cls.PASS)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where a figure passes and where it fails; between the two it warns.

    Attributes:
        figure: A name in `pytest_nullspace.run.figures.FIGURES`.
        passes: The bound of the pass tier, itself outside it.
        fails: The bound of the fail tier, itself outside it.
        lower_is_better: Whether the pass tier lies below ``passes`` or above.
    """

    figure: str
    passes: float
    fails: float
    lower_is_better: bool

    def tier(self, value: float) -> Tier:
        """The tier of ``value``; what is not finite fails."""
        if not math.isfinite(value):
            return Tier.FAIL
        if value < self.passes if self.lower_is_better else value > self.passes:
            return Tier.PASS
        return Tier.FAIL if (value > self.fails if self.lower_is_better else value < self.fails) else Tier.WARN

    @property
    def bound(self) -> str:
        """Both bounds in words."""
        sign, beyond = ("<", ">") if self.lower_is_better else (">", "<")
        return f"pass {sign} {self.passes:g}, fail {beyond} {self.fails:g}"

    def replaced(self, passes: float, fails: float) -> "Threshold":
        """The threshold with other bounds.

        Raises:
            OptionError: They are not finite, or lie the wrong way round.
        """
        if not (math.isfinite(passes) and math.isfinite(fails)):
            raise OptionError(f"{self.figure}: the bounds must be finite, not {passes:g} and {fails:g}")
        if passes > fails if self.lower_is_better else passes < fails:
            better = "lower" if self.lower_is_better else "higher"
            raise OptionError(
                f"{self.figure}: {better} is better, so PASS {passes:g} cannot lie beyond FAIL {fails:g}; swap them"
            )
        return Threshold(self.figure, passes, fails, self.lower_is_better)


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure held against its threshold.

    Attributes:
        value: The figure.
        threshold: What it is held against.
        tier: Where it lies; a warning where it passes and what it is without sink rows does not.
        margin: How far it may lie from what more text would give; None if that was never estimated.
        without_sinks: What it is without sink rows; None if it has no part in them.
    """

    value: float
    threshold: Threshold
    tier: Tier
    margin: float | None = None
    without_sinks: float | None = None

    @property
    def decided_by_sinks(self) -> bool:
        """Whether it lies in another tier without sink rows."""
        tiers = {self.threshold.tier(value) for value in (self.value, self.without_sinks) if value is not None}
        return len(tiers) > 1

    @property
    def with_margin(self) -> str:
        """How far it may lie from what more text would give, to stand behind the value; empty where nobody knows."""
        if self.margin is None:
            return ""
        return f" ± {self.margin:.2g}" if math.isfinite(self.margin) else " (one window, so no margin)"

    @property
    def uncertain(self) -> bool:
        """Whether more text might put the value into another tier."""
        if self.margin is None or not math.isfinite(self.value):
            return False
        ends = self.value - self.margin, self.value + self.margin
        passes = {self.threshold.tier(end) is Tier.PASS for end in ends}
        fails = {self.threshold.tier(end) is Tier.FAIL for end in ends}
        return not math.isfinite(self.margin) or len(passes) > 1 or len(fails) > 1

    @property
    def distance(self) -> float:
        """How far the value lies from the nearest bound that parts two tiers."""
        from_pass, from_fail = (abs(self.value - bound) for bound in (self.threshold.passes, self.threshold.fails))
        return min(from_pass, from_fail)

    @property
    def badness(self) -> float:
        """How far the value lies towards the bad side, 1 being the bound of the pass tier; for sorting only."""
        values = [self.value] if self.without_sinks is None else [self.value, self.without_sinks]
        return max(map(self._badness, values))

    def _badness(self, value: float) -> float:
        if not math.isfinite(value):
            return math.inf
        better, worse = (self.threshold.passes, value)
        if not self.threshold.lower_is_better:
            better, worse = worse, better
        return worse / better if better > 0 else math.inf

    def __str__(self) -> str:
        """The verdict in a phrase, such as ``preservation 0.61 > 0.5``."""
        told = f"{self.threshold.figure} {self._against(self.value)}"
        if self.without_sinks is not None and self.decided_by_sinks:
            told += f", but {self._against(self.without_sinks)} without sink rows"
        return told

    def _against(self, value: float) -> str:
        """``value`` and its bound, such as ``0.61 > 0.5``."""
        if not math.isfinite(value):
            return f"{value:g} is not finite"
        shown, limit = _apart(value, self._bound(value))
        return f"{shown} {self._sign(value)} {limit}"

    @property
    def condition(self) -> str:
        """What holds of the value, the value left out, such as ``preservation >= 0.1``."""
        value, of = self.value, ""
        if self.without_sinks is not None and self.threshold.tier(value) is Tier.PASS and self.decided_by_sinks:
            value, of = self.without_sinks, " without sink rows"
        return f"{self.threshold.figure}{of} {self._sign(value)} {self._bound(value):g}"

    def _bound(self, value: float) -> float:
        """The bound that ``value`` missed, or that of the pass tier."""
        return self.threshold.fails if self.threshold.tier(value) is Tier.FAIL else self.threshold.passes

    def _sign(self, value: float) -> str:
        """Where ``value`` lies of that bound."""
        tier, lower = self.threshold.tier(value), self.threshold.lower_is_better
        if tier is Tier.WARN:
            return ">=" if lower else "<="
        return "<" if lower is (tier is Tier.PASS) else ">"


def _apart(value: float, bound: float) -> tuple[str, str]:
    """Both in as few digits as show on which side of ``bound`` the value lies."""
    for digits in range(4, 17):
        shown, limit = f"{value:.{digits}g}", f"{bound:.{max(digits, 6)}g}"
        if (float(shown) > float(limit)) == (value > bound) and (float(shown) < float(limit)) == (value < bound):
            return shown, limit
    return repr(value), repr(bound)


@dataclass(frozen=True)
class Verdict:
    """The judgement on one layer, or on the averages.

    Attributes:
        subject: The layer's name, or ``model``.
        findings: One for each figure that is judged.
        defect: Why nothing could be judged, or None.
        faults: What fails it beside its findings, in phrases.
        excuse: Why no figure had to be judged, or None.
        doubt: Why it cannot pass by its figures alone, or None.
        gated: Whether a test came to it; otherwise it is what a test would have said.
    """

    subject: str
    findings: tuple[Finding, ...]
    defect: str | None = None
    faults: tuple[str, ...] = ()
    excuse: str | None = None
    doubt: str | None = None
    gated: bool = True

    @property
    def tier(self) -> Tier:
        """The worst tier of its findings; a defect or fault fails, and so does nothing to judge unless excused."""
        if self.defect is not None or self.faults:
            return Tier.FAIL
        if self.excuse is not None:
            return Tier.WARN
        if not self.findings:
            return Tier.FAIL
        return Tier.worst([*(finding.tier for finding in self.findings), *([Tier.WARN] if self.doubt else [])])

    @property
    def unjudged(self) -> str | None:
        """Why its figures were not judged, be it a defect or an excuse."""
        return self.defect or self.excuse

    @property
    def severity(self) -> tuple[bool, int, float]:
        """A sort key: defects last, then by tier, then by how far its worst figure lies towards the bad side."""
        worst = max((finding.badness for finding in self.findings), default=math.inf)
        return self.defect is not None, list(Tier).index(self.tier), worst

    @property
    def summary(self) -> str:
        """The findings of its tier in one line, worst first to be read."""
        if self.defect is not None:
            return self.defect
        told = [*(str(finding) for finding in self.findings if finding.tier is self.tier), *self.faults]
        doubt = [self.doubt] if self.doubt is not None and self.tier is Tier.WARN else []
        return ", ".join([*told, *doubt]) or self.excuse or ""

    @property
    def warning(self) -> str:
        """Why it is in the warn tier, in words that are the same for all subjects alike."""
        told = [finding.condition for finding in self.findings if finding.tier is Tier.WARN]
        told += [self.doubt] if self.doubt is not None else []
        return self.excuse or f"in the warn tier: {', '.join(told)}"
