"""Each mistake by its name, once, with its evidence; none on an adapter without one."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest

from pytest_nullspace.judging.activations import FORGETTING, OVERTRAINED
from pytest_nullspace.judging.audit import Audit, LayerAudit, Moved
from pytest_nullspace.judging.baseline import compare
from pytest_nullspace.judging.diagnosis import diagnose
from pytest_nullspace.judging.evidence import Diagnosis
from pytest_nullspace.judging.invariants import Expectations, Stage, passes
from pytest_nullspace.run.predictions import Headroom
from pytest_nullspace.run.stats import Drift, RunStats, TextDrift
from tests import saved

NAMES = saved.NAMES
STILL = LayerAudit("", 0.0, 0.0, 1.0, 0.0, None, 1e-6)
"""A layer that was trained as v2 is: A moved, nothing else."""


def run(some: tuple[str, ...] = NAMES, **changes: Any) -> RunStats:
    """The passing run with other figures in some of its layers."""
    layers = [dataclasses.replace(layer, **(changes if layer.name in some else {})) for layer in saved.run().layers]
    return dataclasses.replace(saved.run(), layers=tuple(layers))


def in_half(found: RunStats) -> RunStats:
    return dataclasses.replace(found, about={**found.about, "dtype": "float16"})


def audited(
    some: tuple[str, ...] = NAMES, variant: str = "v2", others: tuple[Moved, ...] = (), **changes: Any
) -> Audit:
    """A right training with other movements in some of its layers."""
    layers = tuple(dataclasses.replace(STILL, name=name, **(changes if name in some else {})) for name in NAMES)
    return Audit("start", variant, "as it was said", layers, others, 8)


TRAINED_B: Mapping[str, Any] = {"down": 0.4, "angle": 31.2}
LEAKING: Mapping[str, Any] = {"mean_leakage": 4 / 64}


def test_what_a_task_text_shows_to_be_too_much_is_overtrained() -> None:
    """Forgetting beyond its fail bound has that name beside a task text, but not without, nor where drift is judged."""
    loud, task = run(update_norm=1.5), saved.run().layers[0]
    layers = tuple(dataclasses.replace(layer, task=task) for layer in loud.layers)
    both = dataclasses.replace(loud, layers=layers)
    moved = Drift("its base", TextDrift(10, 1.0, 1.1, 0.1, 0.0, 0.0), None)
    assert loud.layers[0].forgetting > FORGETTING
    assert loud.layers[0].contribution < OVERTRAINED
    assert [cause.cause for cause in diagnose(both, None)] == ["overtrained"]
    assert diagnose(loud, None) == []
    assert diagnose(dataclasses.replace(both, drift=moved), None) == []
    lost = dataclasses.replace(moved, preserved=dataclasses.replace(moved.preserved, divergence=2.5))
    assert [cause.cause for cause in diagnose(dataclasses.replace(run(), drift=lost), None)] == ["overtrained"]


def test_with_a_task_text_it_is_the_text_on_which_an_update_may_be_too_weak() -> None:
    """An update that the preserved text hardly sees, or not at all, is no mistake where the task text sees it."""
    for unseen in (1e-9, 0.0):
        quiet = run(update_norm=unseen)
        assert [cause.cause for cause in diagnose(quiet)] == ["undertrained" if unseen else "underflow"]
        for seen, causes in ((1.0, []), (1e-9, ["undertrained"]), (0.0, ["underflow"])):
            task = dataclasses.replace(saved.run().layers[0], update_norm=seen)
            layers = tuple(dataclasses.replace(layer, task=task) for layer in quiet.layers)
            found = diagnose(dataclasses.replace(quiet, layers=layers))
            assert [cause.cause for cause in found] == causes, (unseen, seen)
            assert all("effectiveness 1.25e-10 to" in cause.evidence for cause in found if seen)


def test_a_gain_that_grows_with_the_update_is_a_lost_scale_or_little_training() -> None:
    """Near twice the gain from twice the update names the scale, unless the start has named it already."""
    task = TextDrift(480, 3.0, 2.9, 0.5, 0.01, 0.02)
    drift = Drift(
        "the base", TextDrift(480, 2.0, 2.0, 0.001, 0.001, 0.001), task, headroom=Headroom(144, 0.1, 0.22, 0.01)
    )
    weak = dataclasses.replace(run(), drift=drift)
    (cause,) = diagnose(weak)
    assert cause.cause == "scale-wrong"
    assert cause.evidence == "the task gain grows with the update: 0.1 nats a token as it is, 0.22 with twice of it"
    sated = dataclasses.replace(drift, headroom=Headroom(144, 0.1, 0.12, 0.01))
    assert not diagnose(dataclasses.replace(weak, drift=sated))
    told: dict[str, Any] = {"scale": "alpha 1 / rank 4 = 0.25", "initial_scale": "alpha 8 / rank 4 = 2"}
    (cause,) = diagnose(weak, audited(NAMES, **told))
    assert cause.evidence.startswith("the scale is not the one of the start")


def test_a_scale_of_zero_has_its_own_name() -> None:
    """An update that its scale makes zero is neither underflow nor a scale that is another, with a start or not."""
    some = NAMES[:2]
    off = run(some, update_norm=0.0, scale=0.0)
    told: dict[str, Any] = {"scale": "alpha 0 / rank 4 = 0", "initial_scale": "alpha 8 / rank 4 = 2"}
    for audit in (None, audited(some, **told)):
        (cause,) = diagnose(off, audit)
        assert (cause.cause, cause.layers) == ("scale-zero", some)
        assert cause.evidence.startswith("the scale is 0 in 2 of 9 layers")
    (cause,) = diagnose(run(update_norm=0.0, scale=2.0))
    assert cause.cause == "underflow"
    causes = diagnose(run(some, update_norm=0.0, scale=0.0), audited(NAMES[1:3], **told))
    assert [(cause.cause, cause.layers) for cause in causes] == [("scale-zero", some), ("scale-wrong", NAMES[2:3])]


def test_where_every_verdict_is_a_pass_only_an_audit_proves_a_cause() -> None:
    """No figure that passed is explained; what the weights show against their start is, whatever the figures."""
    quiet = run(update_norm=1e-9)
    assert diagnose(quiet)
    assert diagnose(quiet, passed=True) == []
    assert diagnose(quiet, audited(), passed=True) == []
    assert [cause.cause for cause in diagnose(run(), audited(**TRAINED_B), passed=True)] == ["b-trained"]


@pytest.mark.parametrize("change", [{}, {"update_norm": 1e-9}, {"mean_leakage": 0.04}])
def test_a_run_passes_if_every_verdict_does(change: dict[str, float]) -> None:
    """One layer that fails or warns, drift that does, or nothing measured, is not a pass."""
    assert passes(run(NAMES[:1], **change), Expectations()) is not bool(change)
    nothing = dataclasses.replace(run(), layers=())
    moved = Drift("its base", TextDrift(10, 1.0, 1.2, 0.1, 0.0, 0.0), None)
    part = dataclasses.replace(run(), checkpoint_layers=len(NAMES) + 1)
    assert not passes(nothing, Expectations())
    assert not passes(dataclasses.replace(run(), drift=moved), Expectations())
    assert passes(part, Expectations())


@pytest.mark.parametrize("against", [None, audited(variant="lora", **TRAINED_B)], ids=["alone", "held"])
@pytest.mark.parametrize("orthonormal", [False, True])
def test_no_cause_follows_from_a_figure_that_is_not_judged(against: Audit | None, orthonormal: bool) -> None:
    """Leakage of what was said to be plain LoRA is no mistake, and does not make a loud update quiet either."""
    loud = run(mean_leakage=0.5, output_norm=0.02)
    found = loud if orthonormal else run(mean_leakage=0.5, output_norm=0.02, down_weight_norm=5.0)
    assert diagnose(found, against)
    assert diagnose(found, against, left_out=("leakage",)) == []


@pytest.mark.parametrize(
    ("found", "against", "cause", "evidence", "layers"),
    [
        (run(), audited(**TRAINED_B), "b-trained", "B was trained in 9 of 9 layers: *angle 31.2°", 9),
        (run(), audited(NAMES[:4], **TRAINED_B), "b-trained", "B was trained in 4 of 9 layers*", 4),
        (run(), audited(down=2.0, angle=0.001), "b-rescaled", "B was turned or rescaled within its own space in 9*", 9),
        (run(update_norm=0.0, up_weight_norm=0.0), audited(up=0.0), "nothing-trained", "A is what it was*", 9),
        (run(update_norm=0.0, up_weight_norm=0.0), None, "nothing-trained", "A is what it was*", 9),
        (
            run(update_norm=0.0, up_weight_norm=0.0),
            audited(up=0.0, down=0.1),
            "inverted-freeze",
            "A did not move in any layer, but B did in 9 of 9 layers",
            9,
        ),
        (
            run(NAMES[:3], update_norm=0.0, up_weight_norm=0.0),
            None,
            "dead-layers",
            "A did not move in 3 of 9 layers: all those of block 0",
            3,
        ),
        (
            run(NAMES[1::3], update_norm=0.0, up_weight_norm=0.0),
            audited(NAMES[1::3], up=0.0),
            "dead-layers",
            "A did not move in 3 of 9 layers: all those named up_proj",
            3,
        ),
        (
            run(NAMES[1:5], update_norm=0.0, up_weight_norm=0.0),
            None,
            "dead-layers",
            f"A did not move in 4 of 9 layers: {NAMES[1]} among them",
            4,
        ),
        (run(), audited(base=0.3), "wrong-base", "W_res changed in 9 of 9 layers", 9),
        (
            run(),
            audited(others=(Moved("base_model_name_or_path", math.nan, "b, was a"),)),
            "wrong-base",
            "base_model_name_or_path (b, was a)",
            0,
        ),
        (run(), audited(others=(Moved("model.norm.weight", 0.5),)), "trained-outside", "1 of 8 tensors outside*", 0),
        (run(**LEAKING), audited(), "random-subspace", "B is frozen and leaks 1 times chance*", 9),
        (run(**LEAKING), None, "random-subspace", "B is frozen and leaks 1 times chance*", 9),
        (run(mean_leakage=0.3), audited(), "principal-directions", "B is frozen and leaks 4.8 times chance*", 9),
        (run(mean_leakage=0.3), None, "principal-directions", "B is frozen and leaks 4.8 times chance*", 9),
        (run(**LEAKING, down_weight_norm=3.0), None, "no-null-space", "the input space is none that was chosen*", 9),
        (run(**LEAKING), audited(variant="lora", **TRAINED_B), "plain-lora", "as it was said; leakage 1 *", 9),
        (
            run(**LEAKING, down_weight_norm=3.0),
            audited(variant="v1", **TRAINED_B),
            "v1-left-null-space",
            "B was trained, as v1 allows, and moved out of the null space in 9 of 9 layers: *leakage 1",
            9,
        ),
        (
            run(**LEAKING, down_weight_norm=3.0),
            audited(variant="v1"),
            "random-subspace",
            "B is frozen and leaks 1 *",
            9,
        ),
        (
            run(),
            audited(NAMES[:2], scale="alpha 8 / rank 4 = 2", initial_scale="alpha 16 / rank 4 = 4"),
            "scale-wrong",
            f"the scale is not the one of the start in 2 of 9 layers: alpha 8 / rank 4 = 2, was *4, in {NAMES[0]}",
            2,
        ),
        (run(update_norm=0.0), audited(), "underflow", "A is not zero, but ABx is to *in 9 of 9 layers", 9),
        (
            run(update_norm=1e-5),
            audited(),
            "undertrained",
            "every layer moved, none by much: effectiveness 1.25e-06*",
            9,
        ),
        (run(update_norm=6.0), audited(), "overtrained", "on text that is to be preserved the update makes 60%*", 9),
        (
            run(NAMES[1:], mean_leakage=0.1, update_norm=6.0),
            audited(),
            "overtrained",
            "on text that is to be preserved*",
            9,
        ),
        (run(NAMES[1:], mean_leakage=0.1, update_norm=6.0), None, "overtrained", "on text that is to be preserved*", 9),
        (
            run(NAMES[1:], mean_leakage=0.1, update_norm=6.0),
            audited(scale="alpha 8 / rank 4 = 2", initial_scale="alpha 4 / rank 4 = 1"),
            "scale-wrong",
            "the scale is not the one of the start in 9 of 9 layers*",
            9,
        ),
        (in_half(run(update_norm=1e-8)), None, "underflow", "A is not zero, but ABx is to float16 in 9 of 9 layers", 9),
        (
            in_half(run(update_norm=0.0, up_weight_norm=0.0)),
            audited(),
            "underflow",
            "A is not zero, but ABx is to float16 in 9 of 9 layers",
            9,
        ),
        (run(NAMES[:2], **LEAKING), audited(variant="lora", **TRAINED_B), "plain-lora", "as it was said; leakage *", 2),
        (run(NAMES[:1], down_norm=math.nan), None, "non-finite", "NaN or infinity in 1 of 9 layers, 0 of them in*", 1),
        (run(NAMES[:2], up_weight_norm=math.inf), None, "non-finite", "NaN or infinity in 2 of 9 layers, 2 of*", 2),
        (
            in_half(run(NAMES[:1], down_norm=math.nan)),
            None,
            "non-finite",
            "float16, in which it was measured, ends at 65,504: NaN or infinity in 1 of 9 layers, 0 of them in*",
            1,
        ),
        (in_half(run(NAMES[:2], up_weight_norm=math.inf)), None, "non-finite", "NaN or infinity in 2 of 9 *", 2),
    ],
)
def test_a_mistake_has_one_name(found: RunStats, against: Audit | None, cause: str, evidence: str, layers: int) -> None:
    """What was planted is the one cause that is named, with its evidence and all its layers."""
    (told,) = diagnose(found, against)
    assert told.cause == cause
    start, _, end = evidence.partition("*")
    assert told.evidence.startswith(start)
    assert told.evidence.endswith(end)
    assert len(told.layers) == layers
    assert told.cure
    assert told.apart


@pytest.mark.parametrize(
    ("found", "against"),
    [
        (run(), None),
        (run(), audited()),
        (run(mean_leakage=0.01), audited(variant="v1", **TRAINED_B)),
        (run(down_weight_norm=5.0), audited(variant="lora", **TRAINED_B)),
        (run(mean_leakage=None), None),
        (run(), audited(scale="alpha 8 / rank 4 = 2", initial_scale="alpha 8 / rank 4 = 2")),
        (run(), audited(scale="alpha 8 / rank 4 = 2")),
        (run(NAMES[:2], update_norm=1e-5), audited()),
        (in_half(run()), audited()),
        (run(NAMES[:2], **LEAKING), audited()),
    ],
)
def test_a_good_adapter_has_no_cause(found: RunStats, against: Audit | None) -> None:
    """v2, v1 and LoRA adapters that do what they may, and single weak or leaking layers, are not diagnosed."""
    assert diagnose(found, against) == []


def test_an_a_that_half_precision_may_have_rounded_to_zero_is_not_blamed_alone() -> None:
    """Without the start an A of zeros is nothing-trained, which in float16 tells how it might be an underflow."""
    (told,) = diagnose(in_half(run(update_norm=0.0, up_weight_norm=0.0)))
    assert told.cause == "nothing-trained"
    assert told.apart.endswith("float16 may have rounded A to zero: the start tells, or float32")
    (in_full,) = diagnose(run(update_norm=0.0, up_weight_norm=0.0))
    assert "float16" not in in_full.apart


def test_data_that_shifted_are_told_from_a_trained_b() -> None:
    """B is what it was and preservation grew in most layers: it is the data; with B trained it is not."""
    now, before = run(down_norm=0.5), run()
    compared = compare(now, before, [], Stage.TRAINED)
    (told,) = diagnose(now, audited(), compared)
    assert told.cause == "data-shift"
    loud = run(down_norm=0.5, update_norm=6.0)
    assert [d.cause for d in diagnose(loud, audited(), compare(loud, before, [], Stage.TRAINED))] == ["data-shift"]
    behind = run(NAMES[1:], down_norm=0.5, update_norm=6.0)
    told_behind = diagnose(behind, audited(), compare(behind, before, [], Stage.TRAINED))
    assert [d.cause for d in told_behind] == ["overtrained"]
    assert [d.cause for d in diagnose(now, audited(**TRAINED_B), compared)] == ["b-trained"]
    assert diagnose(before, audited(), compare(before, before, [], Stage.TRAINED)) == []


def test_distinct_causes_are_each_named_once() -> None:
    """Several mistakes in one adapter are several diagnoses, and each can be saved; another base explains the rest."""
    norm = (Moved("model.norm.weight", 0.5),)
    causes = diagnose(run(), audited(NAMES[:3], **TRAINED_B, base=0.1, others=norm))
    assert [cause.cause for cause in causes] == ["b-trained", "wrong-base", "trained-outside"]
    assert [cause.cause for cause in diagnose(run(), audited(base=0.1, others=norm))] == ["wrong-base"]
    assert Diagnosis(**causes[0].to_dict()) == causes[0]
