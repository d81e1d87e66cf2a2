"""What is told of a model while it is trained, how often that is worth its time, and what ends the training."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_nullspace.errors import OptionError, quoted
from pytest_nullspace.judging.decision import Call
from pytest_nullspace.shell.called import Report

NUMBERS: Mapping[str, int] = {Call.NOT_GATED: -1, Call.SAFE: 0, Call.LOOK: 1, Call.STOP: 2}
"""What stands for each verdict where only numbers are logged."""
FIGURES = ("divergence", "loss_rise", "task_gain", "worst_leakage")
DRIFT = "drift"
"""The larger of divergence and loss rise, which the test of that name holds."""
FIRST = 10
"""Steps after which it is known what a step takes."""


def figures_of(report: Report) -> dict[str, float]:
    """The figures of one measurement by their names, those that were measured; of several texts the worst."""
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    measured = [layer for layer in report.run.layers if layer.rows and "leakage" not in layer.absent]
    found["worst_leakage"] = [layer.figure("leakage") for layer in measured]
    drift = report.run.drift
    if drift is not None:
        for text in drift.texts.values():
            found["divergence"].append(text.divergence)
            found["loss_rise"].append(text.loss_change)
        found["task_gain"] = [] if drift.task is None else [-drift.task.loss_change]
    told = {name: max(of) if all(map(math.isfinite, of)) else math.nan for name, of in found.items() if of}
    return {**told, "verdict": NUMBERS[report.verdict]}


@dataclass(frozen=True)
class Stop:
    """What ends the training: a figure beyond a bound, or a verdict that is as bad as one.

    Attributes:
        figure: Its name among those of `figures_of`, `DRIFT`, or ``verdict``.
        is_above: Whether it is above the bound that it ends it.
        bound: That bound.
        text: As it was given.
    """

    figure: str
    is_above: bool
    bound: float
    text: str

    @classmethod
    def of(cls, given: str) -> "Stop":
        """Read ``drift>0.15``, ``task_gain<0``, ``LOOK`` or ``DO NOT DEPLOY``.

        Raises:
            OptionError: It is none.
        """
        verdict = given.strip().upper().replace("_", " ")
        if verdict in (Call.LOOK, Call.STOP):
            return cls("verdict", True, NUMBERS[verdict] - 0.5, given)
        match = re.fullmatch(r"\s*(?:nullspace/)?([\w-]+)\s*([<>])\s*([-+.\w]+)\s*", given)
        figure = match[1].replace("-", "_").lower() if match else ""
        figure = "worst_leakage" if figure == "leakage" else figure
        try:
            bound = float(match[3]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or figure not in (DRIFT, *FIGURES) or math.isnan(bound):
            raise OptionError(
                f"stop_on: takes FIGURE>BOUND or FIGURE<BOUND, of {', '.join((DRIFT, *FIGURES))}, or {Call.LOOK} or "
                f"{Call.STOP}, not {quoted(given)}"
            )
        return cls(figure, match[2] == ">", bound, given.strip())

    def value(self, figures: Mapping[str, float]) -> float | None:
        """Its figure among those that were told; None where it is not one of them."""
        if self.figure != DRIFT:
            return figures.get(self.figure)
        found = [figures[name] for name in ("divergence", "loss_rise") if name in figures]
        return next((value for value in found if math.isnan(value)), max(found, default=None))

    def reached(self, figures: Mapping[str, float]) -> str | None:
        """Why the training ends, in words; None where it goes on."""
        value = self.value(figures)
        if value is not None and math.isnan(value):
            return f"{self.figure} is no number"
        if value is None or not (value > self.bound if self.is_above else value < self.bound):
            return None
        if self.figure == "verdict":
            name = next(call for call, number in NUMBERS.items() if number == value)
            return f"the verdict is {name}"
        return f"{self.figure} is {value:.4g}, {'above' if self.is_above else 'below'} {self.bound:g}"


def stops(given: str | Sequence[str] | None) -> tuple[Stop, ...]:
    """What ends the training, as it was given.

    Raises:
        OptionError: One of it is neither bound nor verdict.
    """
    return tuple(Stop.of(str(one)) for one in ([given] if isinstance(given, str) else given or ()))


@dataclass
class Pace:
    """When to measure: every so many steps, or as often as takes no more than a share of the time of the steps.

    Attributes:
        every: How many steps; None for as many as the share asks for.
        share: That share.
        steps: How many were made.
        trained: The seconds that these took, measurements left out.
        spent: The seconds of the measurements between them.
        cost: What the last one took.
        next: The step after which the next is due.
    """

    every: int | None
    share: float
    steps: int = 0
    trained: float = 0.0
    spent: float = 0.0
    cost: float = 0.0
    next: int = 0

    @property
    def is_worth_it(self) -> bool:
        """Whether one more keeps to the share."""
        return self.every is not None or self.spent + self.cost <= self.share * self.trained

    def plan(self, step: int) -> int:
        """Say after which step the next is due, now that ``step`` is over."""
        if self.every is not None:
            self.next = (step // self.every + 1) * self.every
        elif not self.trained:
            self.next = step + FIRST
        else:
            missing = (self.spent + self.cost) / self.share - self.trained
            self.next = step + max(1, math.ceil(missing / (self.trained / self.steps)))
        return self.next
