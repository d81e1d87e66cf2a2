"""Mistakes that show in the figures: what the activations make of weights that may all be as they should. Pure."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from pytest_nullspace.judging.evidence import Case, Diagnosis, in_how_many, names_of
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.predictions import Headroom
from pytest_nullspace.run.stats import LayerStats

PRINCIPAL = 2.0
"""Leakage over chance that no random subspace reaches in the median of its layers."""
OVERTRAINED = 0.3
"""Mean contribution on preserved text beyond which what it knew is talked over."""
FORGETTING = 0.125
"""Mean forgetting beyond which the same is so where a task text says what the update is for: the fail bound."""
LOST = FIGURES["divergence"].trained.fails
"""Divergence beyond which the predictions on the preserved text tell that it is so: the fail bound."""
UNDERTRAINED = 1e-4
"""Effectiveness that a trained layer exceeds: the pass bound."""
QUIET = 0.5
"""Leakage over chance below which the first layer is quiet: the pass bound."""
HALF = 2.0**-25
"""What float16 rounds to zero: half of its smallest number."""
GROWN = 1.5
"""Growth of preservation since an earlier run that frozen weights do not explain."""


def non_finite(case: Case) -> Iterator[Diagnosis]:
    """NaN or infinity, in weights or in activations alone."""
    defects = {layer.name: layer.defect or "" for layer in case.run.layers}
    if case.weights is not None:
        defects |= {layer.name: "" if layer.is_finite else "non-finite weights" for layer in case.weights.layers}
    lost = tuple(name for name, defect in defects.items() if "non-finite" in defect)
    if lost:
        weights = [name for name in lost if "weights" in defects[name]]
        told = f"NaN or infinity {in_how_many(lost, case.names)}, {len(weights)} of them in the weights"
        training = (
            "find the first step whose loss is not finite: lower the learning rate, clip gradients, or train in "
            "bfloat16 or float32"
        )
        apart = "weights are lost for good; activations alone point at the precision of the measurement"
        cure = f"{training}; measure in float32 if only activations are affected"
        if case.run.about.get("dtype") == "float16" and not weights:
            told = f"float16, in which it was measured, ends at 65,504: {told}"
            cure = f"measure in bfloat16 or float32, by --nullspace-dtype; if it stays, {training}"
        yield Diagnosis("non-finite", told, cure, apart, lost)


def _drowns_its_input(case: Case) -> bool:
    """Whether updates, and not B, make deeper layers loud.

    No update reaches the input of the first layer. If B is what it was and is quiet there, it is a null space; what
    leaks behind it are activations that large updates have changed.
    """
    if (
        not case.sound
        or case.sound[0].leakage >= QUIET
        or case.audited(lambda layer: not layer.down <= layer.tolerance)
    ):
        return False
    unmoved = case.audit is not None or all(layer.is_orthonormal for layer in case.sound)
    return unmoved and _talks_over(case, case.sound)


def _talks_over(case: Case, layers: Sequence[LayerStats]) -> bool:
    """Whether the update takes over on text that is to be preserved; what is lost, a judged drift tells best."""
    if fmean(layer.contribution for layer in layers) > OVERTRAINED:
        return True
    if case.run.drift is not None:
        return any(text.divergence > LOST for text in case.run.drift.texts.values())
    return all(layer.task is not None for layer in layers) and fmean(layer.forgetting for layer in layers) > FORGETTING


def wrong_subspace(case: Case) -> Iterator[Diagnosis]:
    """A frozen B that is quiet on no text, or on another."""
    frozen = {layer.name for layer in case.audited(lambda layer: layer.down <= layer.tolerance)}
    loud = [x for x in case.loud if (x.name in frozen if case.audit is not None else x.is_orthonormal)]
    if not case.sound or len(loud) < len(case.sound) / 2 or _drowns_its_input(case) or case.rescaled:
        return
    level = median(layer.leakage for layer in loud)
    evidence = f"B is frozen and leaks {level:.3g} times chance in the median {in_how_many(loud, case.sound)}"
    if level > PRINCIPAL:
        yield Diagnosis(
            "principal-directions",
            evidence + ": more than any random subspace",
            "take the eigenvectors of the smallest eigenvalues for B; eigh sorts them first, svd last",
            "a random subspace leaks about 1",
            names_of(loud),
        )
    else:
        yield Diagnosis(
            "random-subspace",
            evidence + ", as a random subspace does",
            "build B from the covariance of the text that is to be preserved, and check that it was not left at its "
            "random initialisation",
            "B may be the null space of quite other data: the initial checkpoint, measured on its own text, tells",
            names_of(loud),
        )


def plain_lora(case: Case) -> Iterator[Diagnosis]:
    """An adapter that never had a null space."""
    loud = case.loud
    if case.audit is not None and case.audit.variant == "lora" and loud:
        yield Diagnosis(
            "plain-lora",
            f"{case.audit.decided}; leakage {median(layer.leakage for layer in loud):.3g} "
            f"{in_how_many(loud, case.sound)}",
            "this adapter was never given a null space: initialise it as LoRA-Null does",
            "a null-space adapter begins with orthonormal rows of B (v2) or with A not zero (v1)",
            names_of(loud),
        )


def _shifted(case: Case) -> list[str]:
    """The layers in which a B that did not move became louder, where they are most and the first is among them.

    No update reaches the input of the first layer, so if that stayed quiet it is the updates that grew.
    """
    if case.compared is None or case.audit is None or case.audited(lambda layer: layer.down > layer.tolerance):
        return []
    grown = [
        name
        for name, changes in case.compared.changes.items()
        for change in changes
        if change.figure == "preservation" and change.now > GROWN * change.before
    ]
    every = case.compared.changes
    return grown if len(grown) > len(every) / 2 and next(iter(every)) in grown else []


def data_shift(case: Case) -> Iterator[Diagnosis]:
    """A text that became louder in a B that did not move."""
    grown = _shifted(case)
    if grown:
        yield Diagnosis(
            "data-shift",
            f"B is what it was, yet preservation grew by more than half {in_how_many(grown, case.run.layers)}",
            "the text or the activations shifted: measure on the text from which the null space was computed",
            "a trained B would not be what it was",
            tuple(grown),
        )


def _underflown(case: Case) -> list[LayerStats]:
    """The layers whose update is zero in the precision of the run, although A is not in the file.

    On the preserved text that may be what was wanted, so it is the task text that tells, where there is one.
    """
    least = HALF if case.in_half else 0.0
    moved = names_of(case.audited(lambda layer: layer.up > 0))
    return [
        layer
        for layer in case.sound
        if (layer.up_weight_norm > 0 or layer.name in moved)
        and layer.scale != 0
        and (layer.task or layer).update_norm <= least * math.sqrt(layer.out_features)
    ]


def underflow(case: Case) -> Iterator[Diagnosis]:
    """An update that the precision of the run rounds to zero."""
    lost = _underflown(case)
    if lost:
        yield Diagnosis(
            "underflow",
            f"A is not zero, but ABx is to {case.run.about.get('dtype', 'the precision it was measured in')} "
            f"{in_how_many(lost, case.sound)}",
            "measure and serve in bfloat16 or float32: the update lies below what half precision can hold",
            "in float32 a true zero of Bx would remain",
            names_of(lost),
        )


def _rising(case: Case) -> Headroom | None:
    """What the task would gain from more of the update, where that is so much that it fails."""
    headroom = None if case.run.drift is None else case.run.drift.headroom
    return headroom if headroom is not None and headroom.ratio > FIGURES["headroom"].trained.fails else None


def strength(case: Case) -> Iterator[Diagnosis]:
    """An update that is too small for anything, or so large that it talks over the base."""
    lost = set(names_of(_underflown(case)))
    live = [layer for layer in case.sound if (layer.task or layer).update_norm > 0 and layer.name not in lost]
    if not live or len(live) < len(case.run.layers) or case.rescaled or _shifted(case):
        return
    effects, shares = [layer.figure("effectiveness") for layer in live], [layer.contribution for layer in live]
    if max(effects) < UNDERTRAINED:
        yield Diagnosis(
            "undertrained",
            f"every layer moved, none by much: effectiveness {min(effects):.3g} to {max(effects):.3g}",
            "more steps or a higher learning rate; then a higher rank",
            "some layers at zero among others that learned would be dead layers",
            names_of(live),
        )
    elif (headroom := _rising(case)) is not None:
        yield Diagnosis(
            "scale-wrong",
            f"the task gain grows with the update: {headroom.gain:.3g} nats a token as it is, {headroom.doubled:.3g} "
            "with twice of it",
            "hold lora_alpha, alpha_pattern and use_rslora in adapter_config.json against those of training; where "
            "they are the same, training ended early: more steps or a higher learning rate",
            "the start tells a lost scale from little training (--nullspace-init)",
            names_of(live),
        )
    elif "leakage" not in case.left_out and _talks_over(case, live) and (not case.loud or _drowns_its_input(case)):
        yield Diagnosis(
            "overtrained",
            f"on text that is to be preserved the update makes {fmean(shares):.0%} of the output in the mean, although "
            f"{'B is quiet where no update reaches its input' if case.loud else 'the input space is quiet'}",
            "fewer steps, a lower learning rate or a lower rank: a quiet space can still be made loud by its A",
            "a lost null space would leak in the first layer too; a raised scale looks the same: the start tells",
            names_of(live),
        )
