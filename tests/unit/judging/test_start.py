"""Trained against a saved run of the start: what training may have made of it, by norms and figures."""

import dataclasses
import math
from typing import Any

import pytest

from pytest_nullspace.judging.start import Start, unpaired
from pytest_nullspace.run.stats import LayerStats, RunStats
from tests import saved

Q0 = saved.NAMES[0]
INITIAL: dict[str, Any] = {"update_norm": 0.0, "up_weight_norm": 0.0}


def initial(**changes: Any) -> RunStats:
    """The passing run before training, every layer changed."""
    layers = [dataclasses.replace(layer, **{**INITIAL, **changes}) for layer in saved.run().layers]
    return dataclasses.replace(saved.run(), layers=tuple(layers))


def now(**changes: Any) -> LayerStats:
    return saved.run(**changes).layers[0]


@pytest.mark.parametrize(
    ("layer", "start", "said"),
    [
        (now(), initial(), None),
        (now(down_weight_norm=2.0001), initial(), None),
        (now(down_weight_norm=2.001), initial(), "‖B‖ 2 → 2.001 (+0.050%) since the start, where it must not change"),
        (now(base_weight_norm=41.0), initial(), "‖W_res‖ 40 → 41 (+2.500%) since the start, where it must not change"),
        (now(down_norm=0.7), initial(), None),
        (now(down_norm=0.8), initial(), "preservation 0.03125 → 0.1 (+220.000%) since the start: more than 3 times*"),
        (now(down_norm=0.07), initial(down_norm=0.008), None),
        (now(up_weight_norm=0.0), initial(), "‖A‖ 0 is what it was at the start: A did not move"),
        (now(update_norm=1e-4), initial(), "effectiveness 0 → 1.25e-05 (from zero) since the start: no clear update*"),
        (now(), initial(update_norm=0.1), "effectiveness was 0.0125 at the start, where there must be no update yet"),
        (now(down_weight_norm=math.nan), initial(), "‖B‖ 2 → nan (+nan%) since the start, where it must not change"),
    ],
)
def test_training_makes_of_a_v2_start_what_it_may(layer: LayerStats, start: RunStats, said: str | None) -> None:
    """B and W_res keep their norm, A leaves zero, the space stays quiet, the update appears: each by its own phrase."""
    told = list(Start.of(start, "v2").check(layer, trained=True))
    if said is None:
        assert told == []
    else:
        (phrase,) = told
        assert phrase.startswith(said.removesuffix("*"))


def test_b_may_move_in_v1_and_lora() -> None:
    """Where training moves B, its norm and its loudness are no fault; a changed W_res is."""
    layer = now(down_weight_norm=3.0, down_norm=4.0)
    assert list(Start.of(initial(), "lora").check(layer, trained=True)) == []
    v1 = Start.of(initial(up_weight_norm=1.0, update_norm=0.1), "v1")
    assert list(v1.check(layer, trained=True)) == []
    assert len(list(v1.check(now(base_weight_norm=1.0), trained=True))) == 1


def test_an_initial_checkpoint_need_not_have_learned() -> None:
    """At the initial stage the start itself has no fault; as a trained one it has two."""
    start = Start.of(initial())
    assert list(start.check(initial().layers[0], trained=False)) == []
    assert len(list(start.check(initial().layers[0], trained=True))) == 2


def test_of_a_layer_without_rows_the_norms_are_held() -> None:
    """Where no row reached a layer its weights still must be those of its start, and its NaN figures are no fault."""
    unreached: dict[str, Any] = dict.fromkeys(
        ("input_norm", "down_norm", "update_norm", "base_norm", "output_norm"), math.nan
    )
    start = Start.of(initial(), "v2")
    for before in (start, Start.of(initial(rows=0, **unreached), "v2")):
        assert list(before.check(now(rows=0, **unreached), trained=True)) == []
        (moved,) = before.check(now(rows=0, base_weight_norm=41.0, **unreached), trained=True)
        assert moved.startswith("‖W_res‖ 40 → 41")
        (still,) = before.check(now(rows=0, up_weight_norm=0.0, **unreached), trained=True)
        assert still.endswith("A did not move")
    updated = Start.of(initial(update_norm=0.1), "v2")
    (early,) = updated.check(now(rows=0, **unreached), trained=True)
    assert early.startswith("effectiveness was 0.0125 at the start")


@pytest.mark.parametrize(
    ("start", "variant"),
    [
        (initial(), "v2"),
        (initial(down_weight_norm=3.0), "lora"),
        (initial(up_weight_norm=3.0), "v1"),
        (initial(rank=0, down_weight_norm=3.0), "v2"),
    ],
)
def test_the_variant_follows_from_the_norms(start: RunStats, variant: str) -> None:
    """‖B‖² is the rank where its rows are orthonormal; a file without ranks is of the reference, which checks v2."""
    assert Start.of(start).variant == variant


def test_layers_that_only_one_side_has_are_found() -> None:
    """On either side, but only those that are gated."""
    held = {*saved.NAMES[1:], "extra"}
    assert unpaired(held, initial(), lambda _: True) == ["extra", Q0]
    assert unpaired(held, initial(), lambda name: name != Q0) == ["extra"]
