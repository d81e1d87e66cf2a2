"""Is the base itself sane? What it makes of each text, held against a model that knows no language. Pure.

A drift says nothing where the base cannot read the text: its tokenizer is another one, its labels are not shifted, the
base is not the one that was trained on, or its adapter was on while it was measured.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.run.texts import FIRST, key_of

ENOUGH = 100
"""Predictions below which a loss tells too little."""
BELOW_CHANCE = 2.0
"""By how many nats a token a loss must lie below that of guessing among all tokens."""
LEAST_UNIGRAM = 1.0
"""The loss of counting tokens below which a text is all but one token, and says nothing of who reads it."""
LEARNED = 1.0
"""By how many nats a token the loss on the task text must have fallen for that alone to show that it is the task."""
SHARE = 0.01
"""The share of an output that an update has which no precision rounds away."""


class _Read(NamedTuple):
    """What the two models make of one text, and below what a loss must lie."""

    name: str
    base: float
    adapted: float
    bounds: Mapping[str, float]

    def is_sane(self, loss: float) -> bool:
        return all(loss < bound for bound in self.bounds.values())

    @property
    def is_known(self) -> bool:
        """Whether the base reads it; of the task, which it need not know, whether either does or much was learned."""
        if self.name != "task":
            return self.is_sane(self.base)
        return any(map(self.is_sane, (self.base, self.adapted))) or LEARNED < self.base - self.adapted < math.inf


def insane(run: RunStats) -> Iterator[str]:
    """What is wrong with the base by which the drift of ``run`` was measured, in phrases.

    The base must be sane on each preserved text. On the task text, which it need not know, one of the two models must
    be, or the loss must have fallen: an adapter of low rank learns much of a strange task, and not all.
    """
    if run.drift is None:
        return
    read = list(_read(run))
    for of in read:
        # A task that is learned the better the more of the update acts is the right one, however little was learned.
        if not of.is_known and not (of.name == "task" and _rises(run)):
            adapted = f", and {of.adapted:.3g} with the adapter," if of.name == "task" else ","
            missed = " and ".join(f"{words} ({bound:.3g})" for words, bound in of.bounds.items() if of.base >= bound)
            yield (
                f"the loss on the {of.name} text, {of.base:.3g} nats a token{adapted} is not below {missed}: "
                f"{_blamed(of, read)}; what drift says of it cannot be trusted"
            )
    texts = [text for text in (*run.drift.texts.values(), run.drift.task) if text is not None]
    shares = [layer.figure("contribution") for layer in run.layers if layer.rows]
    if shares and max(shares) > SHARE and all(text.divergence == 0 and text.tokens >= ENOUGH for text in texts):
        yield (
            f"base and adapted model predict the very same, although the update is up to {max(shares):.0%} of a "
            "layer's output: the base was measured with its adapter on"
        )


def _rises(run: RunStats) -> bool:
    headroom = run.drift.headroom if run.drift is not None else None
    return headroom is not None and headroom.ratio > FIGURES["headroom"].trained.passes


def _read(run: RunStats) -> Iterator[_Read]:
    assert run.drift is not None
    texts = [("preserved", FIRST, run.drift.preserved), ("task", "task_text", run.drift.task)]
    further = [(f"preserved {name}", key_of(name), text) for name, text in run.drift.further.items()]
    for name, key, text in (*texts, *further):
        if text is not None and text.tokens >= ENOUGH and (bounds := _bounds(run.about, key)):
            yield _Read(name, text.base_loss, text.adapted_loss, bounds)


def _bounds(about: Mapping[str, Any], key: str) -> dict[str, float]:
    """Below what a loss must lie, in words, as far as the run tells; a file of another making may hold anything."""
    entry = about.get(key)
    told = entry if isinstance(entry, Mapping) else {}
    vocabulary, unigram = told.get("vocabulary"), told.get("unigram_loss")
    found = {}
    if isinstance(vocabulary, int) and 1 < vocabulary < 2**40:
        found["that of guessing less 2 nats"] = math.log(vocabulary) - BELOW_CHANCE
    if isinstance(unigram, float) and LEAST_UNIGRAM <= unigram < math.inf:
        found["that of counting the text's tokens"] = float(unigram)
    return found


def _blamed(of: _Read, read: list[_Read]) -> str:
    """Which of text, tokenizer and base is likelier wrong."""
    if of.is_sane(of.adapted):
        reads = f"the adapted model reads it ({of.adapted:.3g})"
        return f"{reads}, so it is the text of the task, or the base is not the one that was trained on"
    if any(other.is_sane(other.base) for other in read if other is not of):
        return "the base reads the other text, so this text is not of its language or its kind"
    return "the text, its tokenizer or the base's weights are wrong"
