"""When ``--nullspace-calib-size=auto`` has drawn enough: once no verdict that will be given can change."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.measurement import Figures
from pytest_nullspace.measuring.pipeline import measure_checkpoint
from pytest_nullspace.run.stats import TextDrift
from pytest_nullspace.settings import Settings
from tests import saved, tiny

SURE: Mapping[str, float] = dict.fromkeys(("preservation", "effectiveness", "contribution", "leakage", "forgetting"), 0)
LAYER = dataclasses.replace(saved.LAYER, update_norm=0.25, margins=SURE)
"""A layer of which every figure is certain; as a task text's its selectivity is 1, and warns."""
Settled = Callable[[Figures], bool]
Asked = Callable[..., tuple[Settled, ...]]


def layers(count: int = 21, **changes: Any) -> Figures:
    """So many layers that are certain, the first of them changed."""
    figures = [dataclasses.replace(LAYER, name=f"layers.{i}") for i in range(count)]
    return (dataclasses.replace(figures[0], **changes), *figures[1:])


def unsure(*figures: str, **changes: Any) -> Figures:
    """One layer whose ``figures`` more text might change, among others."""
    return layers(margins={**SURE, **dict.fromkeys(figures, math.inf)}, **changes)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Measure in name only; gives what the pass over each text asks, to know whether it may end."""
    directory = tiny.lora_null(tmp_path / "ft")
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    (tmp_path / "task.txt").write_text(f"{tiny.TEXT}.")

    def ask(**changes: Any) -> tuple[Settled, ...]:
        found: list[Settled] = []

        def measure(*_: object, settled: Settled, **__: object) -> Figures:
            found.append(settled)
            return layers()

        monkeypatch.setattr(import_module("pytest_nullspace.measuring.streaming"), "measure", measure)
        given: dict[str, Any] = {
            "models": (), "stats": (), "base": None, "calib_dataset": "text.txt", "text_folder": tmp_path,
            "calib_size": None, "calib_most": 2, "seqlen": 32, "max_activation_samples": None, "seed": 42,
            "batch_size": None, "device": "cpu", "dtype": "auto", "layers": "*", "stage": "trained", "overrides": (),
            "save_stats": None, "reports": (), "ranks": Ranks(), "task_folder": tmp_path,
        }  # fmt: skip
        measure_checkpoint(open_checkpoint(directory), Settings(**{**given, **changes}), ())
        return tuple(found)

    return ask


def test_one_text_is_drawn_until_each_of_its_figures_is_certain(asked: Asked) -> None:
    """Without a task text every figure but those of two texts can prolong the pass."""
    (settled,) = asked()
    assert settled(layers())
    assert settled(unsure("forgetting"))
    for figure in ("preservation", "effectiveness", "contribution", "leakage"):
        assert not settled(unsure(figure)), figure


def test_each_of_two_texts_is_drawn_until_what_is_judged_on_it_is_certain(asked: Asked) -> None:
    """What the update is for prolongs the task text's pass alone, what must survive the preserved text's alone."""
    preserved, task = asked(task_dataset="task.txt")
    assert preserved(layers())
    assert task(layers())
    for figure in ("preservation", "leakage"):
        assert (preserved(unsure(figure)), task(unsure(figure))) == (False, True), figure
    for figure in ("effectiveness", "contribution"):
        assert (preserved(unsure(figure)), task(unsure(figure))) == (True, False), figure
    assert not preserved(unsure("forgetting"))
    assert task(unsure("forgetting"))  # which is of the task text a part of the selectivity, by which nothing is judged


def test_a_layer_that_no_row_reached_yet_is_not_settled(asked: Asked) -> None:
    """Its verdict would change with the first row, on either text, unless no row need reach it."""
    unreached = layers(rows=0, input_norm=math.nan, down_norm=math.nan, update_norm=math.nan)
    for settled in (*asked(), *asked(task_dataset="task.txt")):
        assert not settled(unreached)
    (settled,) = asked(allow_unreached=("layers.0",))
    assert settled(unreached)


def test_the_averages_are_settled_too_where_they_are_judged(asked: Asked) -> None:
    """An average that more text might put beyond its bound prolongs the pass, where all layers are measured."""
    margins = {**SURE, "preservation": 0.02}
    figures = tuple(  # each certain to lie below the bound of 0.1 or above it, and their mean at it
        dataclasses.replace(layer, down_norm=layer.input_norm * (0.01 if i % 2 else 0.19), margins=margins)
        for i, layer in enumerate(layers())
    )
    (settled,) = asked()
    assert not settled(figures)
    assert settled(figures[:20])


@pytest.mark.parametrize("sure", [True, False])
def test_the_drift_is_settled_too_where_it_is_judged(sure: bool, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure of the drift that more text might change prolongs the pass of the text on which it is judged."""
    margin = 0.0 if sure else 1.0
    near = TextDrift(480, 2.0, 2.01, 0.01, margin, margin)
    monkeypatch.setattr("pytest_nullspace.measuring.drift.Predictions.of", lambda *_: near)
    preserved, task = asked(drift=True, task_dataset="task.txt")
    assert (preserved(layers()), task(layers())) == (sure, sure)
    (alone,) = asked(drift=True)
    assert alone(layers()) is sure
