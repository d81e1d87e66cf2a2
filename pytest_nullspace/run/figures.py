"""Every figure that is judged, in one record each: what it is, where it is better, its bounds, its words.

Judging, the saved file, reports, comparison and the documents take it from here. A new figure is one record more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Any


class Text(StrEnum):
    """On which text a figure is taken where there are two; where there is one, it is taken on that."""

    PRESERVED = "preserved"
    TASK = "task"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where a figure passes and where it fails, and what that means.

    Attributes:
        passes: The bound of the pass tier, itself outside it.
        fails: The bound of the fail tier, itself outside it.
        lower_is_better: Whether the pass tier lies below ``passes`` or above.
        words: What it means to pass, to warn and to fail. ``{against_chance}`` stands for how a leakage lies to chance.
    """

    passes: float
    fails: float
    lower_is_better: bool
    words: tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure.

    Attributes:
        name: How options, files and messages call it.
        symbol: How reports show it, in plain characters.
        short: How a narrow table heads it.
        formula: What it is, in words and norms.
        meaning: What it is for, in a sentence.
        cure: What to do where it does not pass.
        unit: Of what it is measured in; empty for a ratio.
        text: On which text it is taken.
        of_predictions: Whether it is one of a model's predictions, not of a layer.
        needs_task: Whether it is judged only beside a task text.
        trained: Its bounds after training.
        init: Its bounds before training; None where it is not judged then.
        sink_free: Whether it is a ratio of mean norms, so that a few rows can decide it and its value without them is
            told as well.
        key: Its key in a layer's entry of a saved run; empty where it is not in one.
        follows: From which keys of that entry it follows, as a formula.
        of: Gives it, of what was measured at one layer; where ``text`` is both, of what was on each. None where that
            has it by its name.
    """

    name: str
    symbol: str
    formula: str
    meaning: str
    cure: str = ""
    trained: Bounds
    init: Bounds | None = None
    short: str = ""
    unit: str = ""
    text: Text = Text.PRESERVED
    of_predictions: bool = False
    needs_task: bool = False
    sink_free: bool = False
    key: str = ""
    follows: str = ""
    of: Callable[..., float] | None = None

    def value(self, *of: Any) -> float:
        """The figure of what was measured on one text, or on the preserved and the task text where it is of both."""
        value: float = attrgetter(self.name)(*of) if self.of is None else self.of(*of)
        return value

    def bounds(self, lower_is_better: bool) -> Bounds:
        """Its bounds of that direction: those after training, unless only those before it go the same way."""
        return self.trained if self.init is None or self.trained.lower_is_better == lower_is_better else self.init

    @property
    def page(self) -> str:
        """Where the documentation tells of it."""
        return f"docs/figures.md#{self.name}"


_MOST_SELECTIVE = 1e12
"""Selectivity where the preserved text is not changed at all; more than any measurement could tell from it."""


def selectivity(preserved: Any, task: Any) -> float:
    """How many times larger the update is on the task text than on the preserved one, each beside ``‖W_res x‖``."""
    if task is None or not 0 < task.forgetting < math.inf:
        return math.nan
    times: float = task.forgetting / preserved.forgetting if preserved.forgetting else math.inf
    return min(times, _MOST_SELECTIVE)


_NATS = "nats a token"
_NULL_SPACE = Bounds(
    0.1,
    0.5,
    True,
    (
        "the null space is well kept; B is still approximately in it",
        "the null space is degraded, but acceptable",
        "the null space is lost: B reads what this text uses; was B trained, or is this other data?",
    ),
)
_QUIET = Bounds(
    0.5,
    0.75,
    True,
    (
        "the adapter's input space is {against_chance}",
        "the adapter's input space is only {against_chance}",
        "not a null space of this text: {against_chance}",
    ),
)
_DIVERGED = Bounds(
    0.05,
    0.15,
    True,
    (
        "the predictions hardly changed",
        "the predictions changed noticeably",
        "the predictions changed much: expect the model to have forgotten",
    ),
)
_RISEN = Bounds(
    0.05,
    0.15,
    True,
    (
        "the text is as likely as it was",
        "the text became noticeably less likely",
        "the text became much less likely: expect the model to have forgotten",
    ),
)

_OF_SPACE = (
    "Ordinary LoRA promises no null space: then say --nullspace-profile=lora. Else give the adapter before training by "
    "--nullspace-init=DIR, which tells whether B was trained by mistake; or gate on text like that which built it."
)
_LESS = (
    "--nullspace-suggest looks for a smaller scale that passes. Else train fewer steps, at a lower rate or rank, or "
    "with some of the preserved text mixed in."
)

FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        Figure(
            name="preservation",
            short="preserv.",
            symbol="||BX||/||X||",
            formula="mean ‖BX‖ / mean ‖X‖",
            meaning="How much of the input reaches the adapter's down projection.",
            cure=_OF_SPACE,
            trained=_NULL_SPACE,
            init=_NULL_SPACE,
            sink_free=True,
            key="BX_ratio",
            follows="BX_norm / X_norm",
        ),
        Figure(
            name="effectiveness",
            short="effect.",
            symbol="||ABX||/||X||",
            formula="mean ‖ABX‖ / mean ‖X‖",
            meaning="How large the learned update is.",
            cure="Was it trained at all: not frozen, in the optimiser, at a rate above 0? Is that text of its task?",
            text=Text.TASK,
            trained=Bounds(
                1e-4,
                1e-6,
                False,
                (
                    "the adapter learned: A moved from zero to a meaningful value",
                    "a small update; possibly under-fitted",
                    "nothing learned: A frozen by mistake, or the learning rate or the steps far too small",
                ),
            ),
            init=Bounds(
                1e-6,
                1e-4,
                True,
                (
                    "no update yet, as it must be before training",
                    "a small update already, although this is said to be the initial checkpoint",
                    "an update already: this is no initial checkpoint; drop --nullspace-stage=init",
                ),
            ),
            sink_free=True,
            key="ABX_ratio",
            follows="ABX_norm / X_norm",
        ),
        Figure(
            name="contribution",
            short="contrib.",
            symbol="||ABX||/||output||",
            formula="mean ‖ABX‖ / mean ‖output‖",
            meaning="The update's share of the layer's output.",
            cure="Train longer, at a higher rate or a higher rank; see that lora_alpha was not lost on the way.",
            text=Text.TASK,
            trained=Bounds(
                1e-2,
                1e-3,
                False,
                (
                    "a clear effect on the output",
                    "a small influence on the output",
                    "almost no influence on the output: rank, training time or learning rate too small",
                ),
            ),
            sink_free=True,
            key="adapter_contribution",
            follows="ABX_norm / FullOutput_norm",
        ),
        Figure(
            name="leakage",
            symbol="leakage / chance",
            formula="mean ‖PX‖²/‖X‖², over chance (rank of B / width)",
            meaning="How much of a row the adapter can read: 1 is as much as by chance, 0 is a perfect null space.",
            cure=_OF_SPACE,
            trained=_QUIET,
            init=_QUIET,
            key="leakage_over_chance",
            follows="leakage / leakage_chance",
        ),
        Figure(
            name="forgetting",
            short="forget.",
            symbol="||ABX||/||WX||",
            formula="mean ‖ABX‖ / mean ‖WX‖",
            meaning="The update's size on the preserved text beside what it is added to; not what was forgotten.",
            cure="Look at loss-rise and divergence, which tell what was forgotten. A smaller scale makes it smaller.",
            needs_task=True,
            trained=Bounds(
                0.1,
                0.125,
                True,
                (
                    "the update is small beside the layers' outputs; that tells little of what the model forgot",
                    "the update is noticeable beside the layers' outputs; measure what the model forgot by the drift",
                    "the update is large beside the layers' outputs: expect the model to have forgotten",
                ),
            ),
            sink_free=True,
            key="ABX_over_ResidualX",
            follows="ABX_norm / ResidualX_norm",
        ),
        Figure(
            name="selectivity",
            short="select.",
            symbol="task / preserved",
            formula="‖ABX‖ / ‖WX‖ on the task text, over that on the preserved one",
            meaning="How many times larger the update is on the task text than on the preserved one.",
            cure="Judge by loss-rise and task-gain. Fewer steps or a lower rate spare what the task does not need.",
            text=Text.BOTH,
            needs_task=True,
            trained=Bounds(
                1.5,
                0.5,
                False,
                (
                    "the update acts on the task, and much less on what is to be preserved",
                    "the update acts on the preserved text nearly as much as on the task",
                    "the update acts more on the preserved text than on the task",
                ),
            ),
            sink_free=True,
            key="selectivity",
            of=selectivity,
            follows="task ABX_over_ResidualX / ABX_over_ResidualX",
        ),
        Figure(
            name="divergence",
            symbol="KL(base || adapted)",
            formula="mean Kullback-Leibler divergence of the adapted predictions from the base model's",
            meaning="How far the predictions on the preserved text lie from the base model's.",
            cure=_LESS,
            unit=_NATS,
            of_predictions=True,
            trained=_DIVERGED,
            init=_DIVERGED,
        ),
        Figure(
            name="loss-rise",
            symbol="loss rise",
            formula="loss of the adapted model − loss of the base",
            meaning="How much less likely the preserved text became.",
            cure=_LESS,
            unit=_NATS,
            of_predictions=True,
            trained=_RISEN,
            init=_RISEN,
        ),
        Figure(
            name="task-gain",
            symbol="task gain",
            formula="loss of the base − loss of the adapted model, on the task text",
            meaning="How much more likely the task text became.",
            cure="Is that the text of its task, by the same template? Then train longer or at a higher rate.",
            unit=_NATS,
            text=Text.TASK,
            of_predictions=True,
            needs_task=True,
            trained=Bounds(
                0.01,
                0.0,
                False,
                ("the task was learned", "the task was hardly learned", "the task was not learned"),
            ),
        ),
        Figure(
            name="headroom",
            symbol="gain at 2x / gain",
            formula="the task gain with twice the update, over the task gain, on a quarter of the task text",
            meaning="Whether the task asks for more of it: near 2 where its scale was lost or training ended early.",
            cure="Was lora_alpha lost (scale-wrong)? Else train longer. After a scale that you lowered it is expected.",
            text=Text.TASK,
            of_predictions=True,
            needs_task=True,
            trained=Bounds(
                1.5,
                1.9,  # gently trained adapters reach 1.8, lost scales begin at 1.97 (docs/figures.md)
                True,
                (
                    "the task gains little from more of the update",
                    "the task would gain noticeably from more of the update",
                    "the task gains with the update as it grows: its scale was lost, or training ended early",
                ),
            ),
        ),
    )
}
"""By name, in the order of reports; those of layers first."""

OF_DOWN = ("preservation", "leakage")
"""Those of the down projection B, which an update that is a whole matrix has not."""


def of_layers() -> tuple[str, ...]:
    """The figures of a layer."""
    return tuple(name for name, figure in FIGURES.items() if not figure.of_predictions)


def of_predictions() -> tuple[str, ...]:
    """Those of the predictions."""
    return tuple(name for name, figure in FIGURES.items() if figure.of_predictions)


def of_one_text() -> tuple[str, ...]:
    """Those of a layer that one text gives."""
    return tuple(name for name in of_layers() if FIGURES[name].text is not Text.BOTH)


def beside_a_task() -> tuple[str, ...]:
    """Those of a layer that are judged only where a task text was measured beside the preserved one."""
    return tuple(name for name in of_layers() if FIGURES[name].needs_task)


def on_the_task() -> tuple[str, ...]:
    """All for which the task text is drawn where there is one; the others are for the preserved text."""
    return tuple(name for name, figure in FIGURES.items() if figure.text is not Text.PRESERVED)
