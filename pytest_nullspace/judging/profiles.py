"""By what an adapter is judged: which figures decide, for what it promises. Pure.

Only the change of the predictions tells what a model forgot (docs/prediction.md). A layer's figures tell whether it
keeps what the adapter promises: a null space that the preserved text hardly reaches, and an update that is not zero.
The others show where something happened; they decide only where a bound is given for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Protocol

from pytest_nullspace.checkpoint import lora_null, whole
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.stats import RunStats


class Profile(StrEnum):
    """What is expected of an adapter."""

    REFERENCE = "reference"
    NULLSPACE = "nullspace"
    LORA = "lora"


WORDS: Mapping[Profile, str] = {
    Profile.REFERENCE: "the reference script's three ratios, to the letter",
    Profile.NULLSPACE: "its null space, what it forgets and what it learned",
    Profile.LORA: "what it forgets and what it learned, for it promises no null space",
}
"""By what each judges."""

_REFERENCE = frozenset({"preservation", "effectiveness", "contribution"})
_NULL_SPACE = frozenset({"preservation", "leakage", "effectiveness"})
_LEARNED = frozenset({"effectiveness"})
OF_LAYERS: Mapping[Profile, frozenset[str]] = {
    Profile.REFERENCE: _REFERENCE,
    Profile.NULLSPACE: _NULL_SPACE,
    Profile.LORA: _LEARNED,
}
"""The figures that decide in a single layer."""
OF_AVERAGES: Mapping[Profile, frozenset[str]] = {
    Profile.REFERENCE: _REFERENCE,
    Profile.NULLSPACE: _NULL_SPACE | {"contribution"},
    Profile.LORA: _LEARNED | {"contribution"},
}
"""Those that decide in the averages. A good adapter of low rank contributes little to a first layer, and not to all."""
KEPT = frozenset({"divergence", "loss-rise"})
"""The figures of the predictions that decide what was forgotten: those that predict it, by the study."""
STAND_IN = frozenset({"forgetting"})
"""Those that decide in the averages where nobody judges the predictions, of which they tell little."""
_CONTRIBUTES = {"contribution": (5e-4, 2e-4)}
BOUNDS: Mapping[Profile, Mapping[str, tuple[float, float]]] = {
    Profile.NULLSPACE: _CONTRIBUTES,
    Profile.LORA: _CONTRIBUTES,
}
"""Where a profile's bounds are not the figure's own: good adapters of SmolLM2 of rank 8 and 32 lie above, on
the preserved text as well, where they are to be weak; one whose scale was lost lies below."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A profile, and why that one."""

    profile: Profile
    why: str


QUIET = 0.5
"""Mean leakage over chance below which an input space was chosen to be quiet: the pass bound."""


class Known(Protocol):
    """What a layer tells of the space that its B reads."""

    @property
    def defect(self) -> str | None: ...  # noqa: D102
    @property
    def absent(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def leakage(self) -> float: ...  # noqa: D102
    @property
    def is_orthonormal(self) -> bool: ...  # noqa: D102


def choose(
    run: RunStats,
    asked: str = "auto",
    variant: str = "auto",
    start: tuple[str, str] | None = None,
    screened: Sequence[Known] = (),
) -> Chosen:
    """The profile of a run.

    Args:
        run: What was measured; its ``about`` tells the format and how its config says that it was initialised.
        asked: A profile, or ``auto`` to decide.
        variant: What training might move, if that was said.
        start: What training might move as its start tells, and how it does; None where no start is known.
        screened: What is known of its layers where none was measured.
    """
    if asked != "auto":
        return Chosen(Profile(asked), "as --nullspace-profile says")
    if variant != "auto":
        return Chosen(_of_variant(variant), f"as --nullspace-variant={variant} says")
    named = run.about.get("format")
    if named is None:
        return Chosen(Profile.REFERENCE, "its file tells no more than the reference script's")
    if named == whole.FORMAT:
        return Chosen(Profile.LORA, "a whole model")
    if named == lora_null.FORMAT:
        return Chosen(Profile.NULLSPACE, "a LoRA-Null directory")
    initialised = run.about.get("init_lora_weights")  # a file of another making may hold anything
    if isinstance(initialised, str):
        return Chosen(Profile.LORA, f"its config says init_lora_weights={printable(initialised)}")
    if start is not None and start[0] != "v1":
        return Chosen(_of_variant(start[0]), start[1])
    return _measured(run.layers or screened)


def _of_variant(variant: str) -> Profile:
    return Profile.LORA if variant == "lora" else Profile.NULLSPACE


def _measured(layers: Sequence[Known]) -> Chosen:
    """From the figures alone: a space that is quiet was chosen to be, and so were rows that are orthonormal."""
    known = [layer for layer in layers if layer.defect is None]
    if known and all(layer.is_orthonormal for layer in known):
        return Chosen(Profile.NULLSPACE, "the rows of B are orthonormal")
    leaks = [layer.leakage for layer in known if "leakage" not in layer.absent]
    if not leaks:
        return Chosen(Profile.LORA, "nothing tells of a null space")
    quiet = fmean(leaks) < QUIET
    if quiet:
        return Chosen(Profile.NULLSPACE, f"a null space was found (leakage {fmean(leaks):.3g} x chance)")
    return Chosen(Profile.LORA, f"an ordinary LoRA by its leakage, {fmean(leaks):.3g} x chance")


def decides(figure: str, profile: Profile | None, averages: bool, drift_judged: bool) -> bool:
    """Whether a figure decides, in the averages or in a single layer; without a profile each does."""
    if profile is None or FIGURES[figure].of_predictions:
        return True
    if averages and figure in STAND_IN and profile is not Profile.REFERENCE:
        return not drift_judged
    return figure in (OF_AVERAGES if averages else OF_LAYERS)[profile]
