"""What keeps a figure from being trusted as it stands: drift by its marks, bounds that only warn, too little text."""

import dataclasses
import re
from typing import Any

import pytest

from pytest_nullspace.judging.invariants import Expectations, Stage, judge, judge_drift
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report import doubts, markdown, notes, terminal, words
from pytest_nullspace.run.stats import Drift, RunStats, TextDrift
from tests import saved

TRAINED = Expectations()
PLAIN = TextDrift(480, 2.0, 2.01, 0.01, 0.001, 0.002)
GAINED = TextDrift(480, 3.0, 1.0, 0.5, 0.01, 0.02)
LOUD = dataclasses.replace(PLAIN, adapted_loss=2.3)
LOST = dataclasses.replace(GAINED, adapted_loss=3.5)
NEAR = dataclasses.replace(PLAIN, adapted_loss=2.06, loss_margin=0.12)


def run_of(drift: Drift, **about: Any) -> RunStats:
    """A sound run with that drift."""
    sound = saved.full()
    return dataclasses.replace(sound, drift=drift, about={**sound.about, **about})


def told(run: RunStats, expectations: Expectations = TRAINED) -> tuple[list[tuple[str, Tier | None]], str]:
    """The lines of the terminal's summary, and the Markdown with its escapes taken away."""
    lines = list(terminal.summary(run, [judge(layer, expectations) for layer in run.layers], expectations))
    return lines, re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown.report(run, expectations))


@pytest.mark.parametrize(
    ("preserved", "task", "tiers", "said"),
    [
        (PLAIN, GAINED, (Tier.PASS, Tier.PASS), ("divergence 0.001 < 0.05, loss-rise 0.01 < 0.05", "2 > 0.01")),
        (LOUD, GAINED, (Tier.FAIL, Tier.PASS), ("divergence 0.001 < 0.05, loss-rise 0.3 > 0.15", "2 > 0.01")),
        (PLAIN, LOST, (Tier.PASS, Tier.FAIL), ("divergence 0.001 < 0.05, loss-rise 0.01 < 0.05", "-0.5 < 0")),
        (NEAR, GAINED, (Tier.WARN, Tier.PASS), ("divergence 0.001 < 0.05, loss-rise 0.06 >= 0.05", "2 > 0.01")),
    ],
)
def test_each_line_of_drift_has_the_mark_of_what_is_judged_on_its_text(
    preserved: TextDrift, task: TextDrift, tiers: tuple[Tier, Tier], said: tuple[str, str]
) -> None:
    """Divergence and loss-rise mark the preserved text's line, task-gain the task text's, in every format alike."""
    preserved = dataclasses.replace(preserved, divergence=0.001)
    lines, document = told(run_of(Drift("the base", preserved, task)))
    for name, tier, judged in zip(("preserved", "task"), tiers, said, strict=True):
        (line,) = [(line, of) for line, of in lines if f"drift on the {name} text: loss" in line]
        assert line[1] is tier
        assert line[0].startswith(f"{words.MARKS[tier]} drift")
        assert line[0].endswith(judged)
        assert f"- {line[0]}\n" in document


def test_drift_that_is_not_judged_has_no_mark() -> None:
    """Before training nothing can have been gained, so the task text's line has no mark and no bound."""
    expectations = Expectations(Stage.INIT)
    drift = Drift("the base", PLAIN, GAINED)
    preserved, task, base = notes.drift(drift, judge_drift(drift, expectations))
    assert preserved[0].startswith("✓ drift on the preserved")
    assert task == (
        "  drift on the task text: loss 3 → 1 (-2 ± 0.01 nats a token), divergence 0.5 ± 0.02, over 480 tokens",
        None,
    )
    assert base == ("  base: the base", None)


@pytest.mark.parametrize(
    ("preserved", "about", "said"),
    [
        (NEAR, {}, "; about 2,304 windows would settle it, or try --nullspace-calib-size=auto"),
        (
            NEAR,
            {"settings": {"calib_size": None}},
            "; about 2,304 windows would settle it, so raise N in --nullspace-calib-size=auto:N",
        ),
        (NEAR, {"text": {"windows": 1}}, "; one window tells nothing of how the figures vary, so draw more by "),
        (NEAR, {"text": "many"}, ": pass < 0.05, fail > 0.15)"),
        (
            dataclasses.replace(NEAR, adapted_loss=2.05, base_loss=2.0),
            {},
            "; no text would settle what lies on its bound",
        ),
    ],
)
def test_drift_that_more_text_might_change_is_told(preserved: TextDrift, about: dict[str, Any], said: str) -> None:
    """A drift figure within its margin of a bound is told in every format, with the windows that would settle it."""
    run = run_of(Drift("the base", preserved, GAINED), **{"text": {"windows": 16}, **about})
    found = doubts.uncertain_drift(run, TRAINED)
    assert found is not None
    start = (
        f"uncertain: more text might change the verdict on the drift (loss-rise {preserved.loss_change:.2g} ± 0.12: "
    )
    assert found.startswith(start)
    assert said in found
    lines, document = told(run)
    assert (found, Tier.WARN) in lines
    assert f"\n{found}.\n" in document


def test_settled_drift_is_not_told() -> None:
    """Where no bound lies within a margin there is nothing to tell, nor where nothing was measured."""
    assert doubts.uncertain_drift(run_of(Drift("the base", PLAIN, GAINED)), TRAINED) is None
    assert doubts.uncertain_drift(dataclasses.replace(saved.full(), drift=None), TRAINED) is None


def test_the_task_texts_windows_settle_its_gain() -> None:
    """How much text the gain needs is counted in windows of the task text."""
    near = dataclasses.replace(GAINED, adapted_loss=2.98, loss_margin=0.02)
    run = run_of(Drift("the base", PLAIN, near), text={"windows": 16}, task_text={"windows": 8})
    found = doubts.uncertain_drift(run, TRAINED)
    assert found is not None
    assert "; about 32 windows would settle it, " in found


def test_averages_within_their_margin_of_a_bound_are_told() -> None:
    """The averages are a verdict too, so what more text might change there is told where every layer is settled."""
    margins = {"preservation": 0.01}
    levels = (0.02, 0.17)  # far from the bound of 0.1, and so is their mean not
    layers = tuple(
        dataclasses.replace(layer, down_norm=level * layer.input_norm, margins=margins, task=None)
        for layer, level in zip(saved.full().layers, levels, strict=True)
    )
    run = dataclasses.replace(saved.run(), layers=layers, checkpoint_layers=2, about={"text": {"windows": 16}})
    found = doubts.uncertain([judge(layer, TRAINED) for layer in layers], run, TRAINED)
    assert found == (
        "uncertain: more text might change the verdict on the averages, such as model (preservation 0.095 ± 0.01); "
        "about 64 windows would settle half of them, or try --nullspace-calib-size=auto"
    )
    assert (
        doubts.uncertain(
            [judge(layer, TRAINED) for layer in layers], dataclasses.replace(run, checkpoint_layers=3), TRAINED
        )
        is None
    )


def test_the_windows_of_the_text_on_which_a_layer_is_worst_are_counted() -> None:
    """A layer in doubt on a further text needs more of that text, of which another number may have been read."""
    margins = {"preservation": 0.01}
    first = dataclasses.replace(saved.full().layers[0], margins=margins, task=None, further={})
    quiet, near = (dataclasses.replace(first, down_norm=level * first.input_norm) for level in (0.02, 0.095))
    about = {"text": {"windows": 16}, "text[code]": {"windows": 64}}
    for layer, windows in (
        (dataclasses.replace(quiet, further={"code": near}), 256),
        (dataclasses.replace(near, further={"code": quiet}), 64),
    ):
        run = dataclasses.replace(saved.run(), layers=(layer,), checkpoint_layers=2, about=about)
        found = doubts.uncertain([judge(layer, TRAINED)], run, TRAINED)
        assert found is not None
        assert f"; about {windows} windows would settle half of them" in found
