"""What the adapter made of the base model's predictions: on which text how far, and where most. Pure data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_nullspace.run.windows import ByWindow


@dataclass(frozen=True, slots=True)
class Passage:
    """A place in a text where the predictions changed much.

    Attributes:
        start: The character of the text at which the token begins that was to be predicted, or, where the tokenizer
            does not tell, at which its window does.
        end: The character after it; None where the tokenizer does not tell.
        before: What stands before it.
        token: The token, as text.
        after: What stands behind it; empty in a run that an earlier version saved.
        base: Its probability in the base model.
        adapted: Its probability in the adapted one.
        likeliest: What the base holds likeliest there.
        instead: What the adapted model does.
        divergence: Of the adapted prediction from the base's, in nats.
        row: Which row it is where rows hold images; empty in a text.
    """

    start: int
    end: int | None
    before: str
    token: str
    after: str
    base: float
    adapted: float
    likeliest: str
    instead: str
    divergence: float
    row: str = ""


@dataclass(frozen=True, slots=True)
class TextDrift:
    """What the adapter makes of the base model's predictions on one text.

    Attributes:
        tokens: How many predictions were compared.
        base_loss: The base model's mean cross entropy, in nats a token.
        adapted_loss: The adapted model's.
        divergence: Mean Kullback-Leibler divergence from the base model's predictions to the adapted one's, in nats.
        loss_margin: How far the change of loss may lie from what more text would give.
        divergence_margin: The same of the divergence.
        by_window: Losses and divergence of each window; None if they were not kept.
        passages: Where the predictions changed most, the most changed first.
    """

    tokens: int
    base_loss: float
    adapted_loss: float
    divergence: float
    loss_margin: float
    divergence_margin: float
    by_window: ByWindow | None = None
    passages: tuple[Passage, ...] = ()

    @property
    def loss_change(self) -> float:
        """By how much the adapter raised the loss."""
        return self.adapted_loss - self.base_loss


@dataclass(frozen=True, slots=True)
class Headroom:
    """What the task text would gain from twice the update, on some of its windows.

    Attributes:
        tokens: How many predictions were scored.
        gain: By how much the update lowers the loss there, in nats a token.
        doubled: By how much twice the update would.
        margin: How far the quotient of the two may lie from what more text would give.
    """

    tokens: int
    gain: float
    doubled: float
    margin: float

    @property
    def ratio(self) -> float:
        """What twice the update gains over what it gains: near 2 where the loss falls on and on with its scale."""
        return self.doubled / self.gain if self.gain else math.nan


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the adapted model's predictions lie from the base model's.

    Attributes:
        base: What served as the base model, in words.
        preserved: On the preserved text.
        task: On the task text, if there was one.
        name: How the preserved text is called, if it has a name.
        further: On each further preserved text, by its name.
        headroom: What the task text would gain from more of the update; None where it gains nothing from it, or where
            its scale is not that of what was learned alone.
    """

    base: str
    preserved: TextDrift
    task: TextDrift | None = None
    name: str = ""
    further: Mapping[str, TextDrift] = field(default_factory=dict)
    headroom: Headroom | None = None

    @property
    def texts(self) -> Mapping[str, TextDrift]:
        """On every preserved text, by its name."""
        return {self.name: self.preserved, **self.further}

    @property
    def figures(self) -> dict[str, tuple[float, float]]:
        """The figures that are judged in the test of the first text, each with its margin."""
        return self.figures_on(self.name)

    def figures_on(self, name: str) -> dict[str, tuple[float, float]]:
        """The figures that are judged in the test of the text of that name; in the first's also those of the task."""
        text = self.texts[name]
        found = {
            "divergence": (text.divergence, text.divergence_margin),
            "loss-rise": (text.loss_change, text.loss_margin),
        }
        if self.task is not None and name == self.name:
            found["task-gain"] = -self.task.loss_change, self.task.loss_margin
            if self.headroom is not None:
                found["headroom"] = self.headroom.ratio, self.headroom.margin
        return found
