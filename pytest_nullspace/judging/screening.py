"""What a screen tells of one adapter: figures to the first order, from the base's own activations. Pure.

In a run of the adapter each layer reads what the layers before it changed; here each reads what the base gives. So the
figures lie beside those of a gate (docs/screening.md says by how much), and a run that tells of them is never a proof:
it has no layers that were measured, and `CURE` says what to do.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar

from pytest_nullspace.errors import StatsError
from pytest_nullspace.judging import spoken
from pytest_nullspace.judging.invariants import MODEL, Expectations, Stage
from pytest_nullspace.judging.verdicts import Finding, Tier, Verdict
from pytest_nullspace.run.entries import plain
from pytest_nullspace.run.norms import Ratios, ratio
from pytest_nullspace.run.stats import ORTHONORMAL, UNPLACED, UNREACHED

KEY = "screened"
"""Under which a run tells of it."""
STATEMENT = "screened, first order"
"""What everything that shows such a figure says of it."""
CURE = "gate it before you deploy"
FIGURES = ("leakage", "preservation", "forgetting")
"""All that is judged, those first that weigh most."""
UNDECIDED = "no figure of a single layer decides where no null space is promised"
"""Why a layer that was screened has no verdict of its own."""


@dataclass(frozen=True, slots=True)
class ScreenedLayer(Ratios):
    """One adapted layer on one text, of whose output nothing is told.

    Attributes:
        name: Its module path.
        text: The name of the text; empty where it has none.
        rows: Activation rows of the base that were seen.
        in_features: Width of its input.
        rank: Of its adapter.
        down_rank: How many directions the rows of B span.
        input_norm: Mean of ``‖x‖``.
        down_norm: Mean of ``‖Bx‖``.
        update_norm: Mean of ``‖ABx‖``, scale included.
        base_norm: Mean of ``‖W x‖``.
        mean_leakage: Mean of ``‖Px‖² / ‖x‖²``.
        down_weight_norm: Frobenius norm of B.
        unplaced: In how many batches its rows could not be told to be tokens of the text.
    """

    name: str
    text: str
    rows: int
    in_features: int
    rank: int
    down_rank: int
    input_norm: float
    down_norm: float
    update_norm: float
    base_norm: float
    mean_leakage: float
    down_weight_norm: float
    unplaced: int = 0
    absent: ClassVar[tuple[str, ...]] = ()

    @property
    def leakage(self) -> float:
        """Leakage over that of a random subspace as large as B's row space."""
        return ratio(self.mean_leakage, ratio(self.down_rank, self.in_features))

    @property
    def is_orthonormal(self) -> bool:
        """Whether the rows of B have the norm of orthonormal ones."""
        return abs(self.down_weight_norm**2 / self.rank - 1) <= ORTHONORMAL

    @property
    def defect(self) -> str | None:
        """Why it cannot be judged at all, or None."""
        if not math.isfinite(self.down_weight_norm):
            return "non-finite weights (NaN or infinity)"
        if not self.down_rank:
            return "its down projection B is zero, so nothing can reach it"
        if self.unplaced:
            return f"in {self.unplaced} batches {UNPLACED}"
        if not self.rows:
            return UNREACHED
        norms = (self.input_norm, self.down_norm, self.update_norm, self.base_norm, self.mean_leakage)
        if not all(map(math.isfinite, norms)):
            return "non-finite activations or update (NaN or infinity)"
        return "its input is zero in every row" if not self.input_norm else None

    def figure(self, name: str) -> float:
        """The figure of that name in `FIGURES`."""
        value: float = getattr(self, name)
        return value


@dataclass(frozen=True)
class Screening:
    """What was screened of one adapter.

    Attributes:
        entries: Each layer on each text, in model order.
        of: How many layers the adapter has.
    """

    entries: tuple[ScreenedLayer, ...]
    of: int

    @cached_property
    def layers(self) -> Mapping[str, Sequence[ScreenedLayer]]:
        """What there is of each layer, the first text's first."""
        held: dict[str, list[ScreenedLayer]] = {}
        for entry in self.entries:
            held.setdefault(entry.name, []).append(entry)
        return held

    def figure(self, name: str, figure: str) -> float:
        """A layer's figure on the text on which it is worst; what is no number is worse than any."""
        values = [of.figure(figure) for of in self.layers[name]]
        return math.nan if any(map(math.isnan, values)) else max(values)

    def mean(self, figure: str) -> float:
        """Its average over the layers that a row reached."""
        reached = [name for name, of in self.layers.items() if all(one.rows for one in of)]
        return fmean(self.figure(name, figure) for name in reached) if reached else math.nan

    def to_dict(self) -> dict[str, Any]:
        """It as JSON holds it, no number as ``null``."""
        return {"of": self.of, "layers": [plain(asdict(one)) for one in self.entries]}

    @classmethod
    def told(cls, about: Mapping[str, Any], where: str = "the run") -> "Screening | None":
        """What a run tells of a screen, if it was one.

        Args:
            about: Of the run.
            where: The file it was saved in, for messages.

        Raises:
            StatsError: What it tells is none.
        """
        held = about.get(KEY)
        if held is None:
            return None
        try:
            entries: list[dict[str, Any]] = [
                {key: math.nan if v is None else v for key, v in one.items()} for one in held["layers"]
            ]
            return cls(tuple(ScreenedLayer(**entry) for entry in entries), int(held["of"]))
        except (TypeError, KeyError, ValueError, AttributeError):
            raise StatsError(f"{where}: its entry '{KEY}' is of no screen; screen again") from None


def verdict(told: Screening, subject: str, expectations: Expectations) -> Verdict:
    """The first-order verdict on a layer of that name, or on ``model``, the averages."""
    value = told.mean if subject == MODEL else lambda figure: told.figure(subject, figure)
    defect, excuse = _lacking(told, subject, expectations)
    findings = tuple(
        Finding(value(t.figure), t, t.tier(value(t.figure)))
        for t in expectations.thresholds(subject)
        if t.figure in FIGURES and excuse is None
    )
    if not findings and defect is None and excuse is None:
        excuse = UNDECIDED
    return Verdict(subject, findings, defect, excuse=excuse, gated=expectations.gates(subject))


def _lacking(told: Screening, subject: str, expectations: Expectations) -> tuple[str | None, str | None]:
    """Why there is nothing to judge: the defect, or what excuses it."""

    def excused(name: str, defect: str | None) -> bool:
        return defect == UNREACHED and any(fnmatchcase(name, glob) for glob in expectations.unreached)

    found = {name: _defect(of, expectations.stage) for name, of in told.layers.items()}
    if subject == MODEL:
        wrong = [name for name, defect in found.items() if defect is not None and not excused(name, defect)]
        if len(found) < told.of:
            return f"only {len(found)} of {told.of} layers were screened", None
        return f"{len(wrong)} of {told.of} layers could not be judged, {wrong[0]} among them" if wrong else None, None
    defect = found[subject]
    return (None, f"{UNREACHED}, which is allowed") if excused(subject, defect) else (defect, None)


def _defect(of: Sequence[ScreenedLayer], stage: Stage) -> str | None:
    found = next((one.defect for one in of if one.defect is not None), None)
    if found is None and stage is Stage.TRAINED and not any(one.update_norm for one in of):
        return "its update is zero: nothing was trained, or its scale is 0"
    return found


def verdicts(told: Screening, expectations: Expectations) -> list[Verdict]:
    """Those on the averages, where all layers were screened, and on every layer."""
    averages = [MODEL] if len(told.layers) == told.of else []
    return [verdict(told, subject, expectations) for subject in (*averages, *told.layers)]


def sentence(told: Screening, asked: Collection[str], expectations: Expectations) -> str:
    """Why a screen that nothing failed gates nothing: what it saw, and what to do.

    Args:
        told: The screen.
        asked: The names of all tests that it has.
        expectations: What it was held against, and which tests came to a verdict.
    """
    return f"{', '.join(_seen(told, asked, expectations))}; {CURE}"


def _seen(told: Screening, asked: Collection[str], expectations: Expectations) -> Iterator[str]:
    judged, found = expectations.judged, verdicts(told, expectations)
    if judged is not None and (left := [name for name in asked if name not in judged]):
        yield f"only {len(asked) - len(left)} of {len(asked)} tests came to a verdict, not {left[0]}"
    elif len(told.layers) < told.of:
        yield f"only {len(told.layers)} of {told.of} layers"
    if looks := sum(one.tier is Tier.WARN and one.excuse is None for one in found):
        yield f"{looks} of {len(found)} tests to look at"
    decide = {threshold.figure for threshold in expectations.thresholds(MODEL)}
    said = [figure for figure in FIGURES if figure in decide]
    yield from (
        spoken.plain(figure, told.mean(figure)) for figure in said if figure != "preservation" or len(said) == 1
    )
