"""The base by which drift is measured: whether it reads the text at all, and who is to blame where it does not."""

import dataclasses
import math
from typing import Any

import pytest

from pytest_nullspace.judging.sanity import ENOUGH, insane
from pytest_nullspace.run.predictions import Headroom
from pytest_nullspace.run.stats import Drift, RunStats, TextDrift
from tests import saved

TOLD = {"vocabulary": 1000, "unigram_loss": 4.5}


def drifted(base: float, adapted: float, tokens: int = 480, divergence: float = 0.01) -> TextDrift:
    return TextDrift(tokens, base, adapted, divergence, 0.0, 0.0)


def run(preserved: TextDrift, task: TextDrift | None = None, **about: Any) -> RunStats:
    """A run that measured so much drift, on texts of which ``about`` tells."""
    told = {**saved.ABOUT, "text": TOLD, "task_text": TOLD, **about}
    return dataclasses.replace(saved.run(), drift=Drift("the base", preserved, task), about=told)


SANE = drifted(2.0, 2.1)


@pytest.mark.parametrize(("gain", "said"), [(2.2, 0), (1.0, 1)], ids=["rises", "does not"])
def test_a_task_that_is_learned_with_every_bit_of_the_update_is_the_right_one(gain: float, said: int) -> None:
    """Where twice the update would gain twice as much, what is too little learned is the update's, not the text's."""
    of = run(SANE, drifted(9.0, 8.9))
    assert of.drift is not None
    told = dataclasses.replace(of, drift=dataclasses.replace(of.drift, headroom=Headroom(144, 0.1, 0.1 * gain, 0.01)))
    assert len(list(insane(told))) == said


@pytest.mark.parametrize(
    ("preserved", "task", "said"),
    [
        (SANE, None, None),
        (SANE, drifted(9.0, 1.0), None),
        (drifted(9.0, 9.1, ENOUGH - 1), None, None),
        (drifted(4.8, 4.9), None, "the loss on the preserved text, 4.8 nats a token, is not below that of counting"),
        (
            drifted(5.0, 5.0),
            None,
            "that of guessing less 2 nats (4.91) and that of counting the text's tokens (4.5): the",
        ),
        (drifted(6.9, 2.0), None, "the adapted model reads it (2), so it is the text of the task, or the base is not"),
        (drifted(6.9, 6.9), drifted(2.0, 1.0), "the base reads the other text, so this text is not of its language"),
        (drifted(6.9, 6.9), None, "the text, its tokenizer or the base's weights are wrong"),
        (SANE, drifted(9.0, 7.9), None),
        (SANE, drifted(7.9, 9.0), "the loss on the task text, 7.9 nats a token, and 9 with the adapter, is not below"),
        (
            SANE,
            drifted(math.inf, 9.0),
            "the loss on the task text, inf nats a token, and 9 with the adapter, is not below",
        ),
        (
            SANE,
            drifted(9.0, math.nan),
            "the loss on the task text, 9 nats a token, and nan with the adapter, is not below",
        ),
        (drifted(9.0, 7.9), None, "the loss on the preserved text, 9 nats a token, is not below"),
        (SANE, drifted(9.0, 8.0), "the loss on the task text, 9 nats a token, and 8 with the adapter, is not below"),
        (drifted(math.nan, 2.0), None, "the loss on the preserved text, nan nats a token"),
        (drifted(2.0, 2.0, divergence=0.0), None, "the update is up to 5% of a layer's output: the base was measured"),
        (drifted(2.0, 2.0, divergence=0.0), drifted(3.0, 2.0), None),
    ],
)
def test_a_base_that_cannot_read_is_told_by_name(
    preserved: TextDrift, task: TextDrift | None, said: str | None
) -> None:
    """Each bound, text and culprit; of the task text one model's reading will do, or a nat learned."""
    found = list(insane(run(preserved, task)))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


@pytest.mark.parametrize("told", [{}, "many", {"vocabulary": "x", "unigram_loss": True}, {"unigram_loss": 0.1}])
def test_what_a_file_does_not_tell_fails_nothing(told: Any) -> None:
    """An older file, one of another making, and a text that is all but one token, have no bound."""
    assert not list(insane(run(drifted(9.0, 9.0), text=told)))
    assert not list(insane(dataclasses.replace(saved.run(), drift=None)))
