"""From figures, audit and comparison to causes by their names: one diagnosis a distinct cause, not one a layer.

Pure. A cause is named only on evidence that the good adapters do not show; what is not told apart says so.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from pytest_nullspace.judging.audit import SAME_SPACE, Audit, LayerAudit
from pytest_nullspace.judging.baseline import Comparison
from pytest_nullspace.judging.weights import LayerWeights, Weights
from pytest_nullspace.run.stats import LayerStats, RunStats

LOUD = 0.75
"""Leakage over chance from which a subspace is none that was chosen to be quiet: the fail bound."""
PRINCIPAL = 2.0
"""Leakage over chance that no random subspace reaches in the median of its layers."""
OVERTRAINED = 0.3
"""Mean contribution on preserved text beyond which what it knew is talked over."""
FORGETTING = 0.125
"""Mean forgetting beyond which the same is so where a task text says what the update is for: the fail bound."""
UNDERTRAINED = 1e-4
"""Effectiveness that a trained layer exceeds: the pass bound."""
ORTHONORMAL = 1e-3
"""How far ``‖B‖² / r`` may lie from 1 for rows that were made orthonormal and left so."""
QUIET = 0.5
"""Leakage over chance below which the first layer is quiet: the pass bound."""
HALF = 2.0**-25
"""What float16 rounds to zero: half of its smallest number."""
GROWN = 1.5
"""Growth of preservation since an earlier run that frozen weights do not explain."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One cause.

    Attributes:
        cause: Its name, as the documentation has it.
        evidence: What was measured that shows it.
        cure: What to do.
        apart: What would tell it from the next likely cause.
        layers: The layers that show it, in model order.
    """

    cause: str
    evidence: str
    cure: str
    apart: str
    layers: tuple[str, ...]

    @property
    def page(self) -> str:
        """The command that prints its page, which the project's repository has as ``docs/causes/<cause>.md``."""
        return f"pytest --nullspace-explain={self.cause}"

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class _Case:
    """All that is known of one run; ``sound`` are the layers that can be judged, ``left_out`` figures that are not."""

    run: RunStats
    sound: Sequence[LayerStats]
    audit: Audit | None
    compared: Comparison | None
    weights: Weights | None
    left_out: Collection[str]

    @property
    def names(self) -> tuple[str, ...]:
        """Every layer that anything is known of."""
        return _names(
            self.run.layers or (self.weights.layers if self.weights is not None else ()) or self.audited(bool)
        )

    def audited(self, holds: Callable[[LayerAudit], bool]) -> list[LayerAudit]:
        """The audited layers of which ``holds`` is true."""
        return [] if self.audit is None else [layer for layer in self.audit.layers if holds(layer)]

    @property
    def is_v2(self) -> bool:
        """Whether B was to stay frozen, as far as is known."""
        return self.audit is None or self.audit.variant == "v2"


def diagnose(
    run: RunStats,
    audit: Audit | None = None,
    compared: Comparison | None = None,
    weights: Weights | None = None,
    left_out: Collection[str] = (),
    passed: bool = False,
) -> list[Diagnosis]:
    """Name what is wrong with a trained adapter.

    Args:
        run: What was measured of it.
        audit: Its tensors against their start, if they were compared.
        compared: The run against an earlier one, if it was.
        weights: Its weights, where they alone are known.
        left_out: Figures that are not judged, so that no cause follows from them.
        passed: Whether every verdict is a pass, so that no cause follows from any figure: only an audit proves one.

    Returns:
        One diagnosis for each cause; none for an adapter that shows no mistake.
    """
    case = _Case(run, [layer for layer in run.layers if layer.defect is None], audit, compared, weights, left_out)
    finders = _FINDERS if not passed else () if audit is None else _PROVEN
    return [found for find in finders for found in find(case)]


def _names(layers: Sequence[LayerStats | LayerAudit | LayerWeights]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _of(part: Sequence[object], whole: Sequence[object]) -> str:
    return f"in {len(part)} of {len(whole)} layers"


def _non_finite(case: _Case) -> Iterator[Diagnosis]:
    defects = {layer.name: layer.defect or "" for layer in case.run.layers}
    if case.weights is not None:
        defects |= {layer.name: "" if layer.is_finite else "non-finite weights" for layer in case.weights.layers}
    lost = tuple(name for name, defect in defects.items() if "non-finite" in defect)
    if lost:
        weights = [name for name in lost if "weights" in defects[name]]
        told = f"NaN or infinity {_of(lost, case.names)}, {len(weights)} of them in the weights"
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


def _b_trained(case: _Case) -> Iterator[Diagnosis]:
    if not case.is_v2:
        return
    moved = case.audited(lambda layer: layer.down > layer.tolerance and layer.angle >= SAME_SPACE and layer.up > 0)
    if moved and case.audit is not None:
        yield Diagnosis(
            "b-trained",
            f"B was trained {_of(moved, case.audit.layers)}: it left its space, largest principal angle "
            f"{max(layer.angle for layer in moved):.3g}°",
            "the freezing condition probably tests for ALinear twice; freeze the parameters whose names hold BLinear "
            "(lora_A in PEFT), and train again from the start",
            "an adapter of variant v1 or plain LoRA trains B by design: then say so by --nullspace-variant",
            _names(moved),
        )
    loud = [layer for layer in _loud(case) if not _is_orthonormal(layer)]
    if case.audit is None and loud:
        yield Diagnosis(
            "no-null-space",
            f"the input space is none that was chosen to be quiet {_of(loud, case.sound)} (leakage / chance "
            f"{median(layer.leakage for layer in loud):.3g}), and the rows of B are not orthonormal",
            "give the start by --nullspace-init: it tells which of the likely causes it is",
            "a trained B, plain LoRA and a v1 trained too far all look so",
            _names(loud),
        )


def _b_rescaled(case: _Case) -> Iterator[Diagnosis]:
    if not case.is_v2:
        return
    scaled = case.audited(lambda layer: layer.down > layer.tolerance and layer.angle < SAME_SPACE and layer.up > 0)
    if scaled and case.audit is not None:
        yield Diagnosis(
            "b-rescaled",
            f"B was turned or rescaled within its own space {_of(scaled, case.audit.layers)}: relative change up to "
            f"{max(layer.down for layer in scaled):.3g}, largest principal angle below {SAME_SPACE}°",
            "weight decay, a merge of scales or an orthonormalisation touched B: leave it out of the optimiser",
            "the space itself is kept: a trained B would have left it",
            _names(scaled),
        )


def _nothing_learned(case: _Case) -> Iterator[Diagnosis]:
    still, scaled_to_zero = case.audited(lambda layer: layer.up == 0), set(_scaled_to_zero(case))
    if case.audit is not None:
        dead = _names(still)
    elif case.weights is not None:
        dead = _names([layer for layer in case.weights.layers if layer.up_norm == 0])
    else:
        dead = _names([layer for layer in case.sound if layer.up_weight_norm == 0])
    if case.audit is None:  # a norm of A with its scale does not tell the two apart
        dead = tuple(name for name in dead if name not in scaled_to_zero)
    if not dead:
        return
    if len(dead) < len(case.names):
        yield Diagnosis(
            "dead-layers",
            f"A did not move {_of(dead, case.names)}: {_shared(dead, case.names)}",
            "look for these names in the list of trained parameters: a pattern or a device map leaves them out",
            "if no layer had moved, the freezing condition would be wrong for all",
            dead,
        )
        return
    turned = case.audited(lambda layer: layer.down > layer.tolerance)
    if turned:
        yield Diagnosis(
            "inverted-freeze",
            f"A did not move in any layer, but B did {_of(turned, case.names)}",
            "the freezing condition is inverted: train ALinear (lora_B in PEFT) and freeze BLinear (lora_A)",
            "B can only have moved by weight decay, for its gradient is zero while A is",
            dead,
        )
        return
    yield Diagnosis(
        "nothing-trained",
        "A is what it was at the start in every layer, so the adapter changes nothing",
        "see that requires_grad is set for ALinear (lora_B in PEFT), and that the optimiser is given those parameters",
        "an inverted freeze looks the same: with A at zero the gradient of B is zero too; both frozen, or A alone, is "
        "told by the list of trained parameters"
        + ("; and float16 may have rounded A to zero: the start tells, or float32" if _in_half(case) else ""),
        dead,
    )


def _shared(some: Sequence[str], every: Sequence[str]) -> str:
    """What some layers have in common that no other has: their kind, or their depth."""
    kinds, held = {name.rpartition(".")[2] for name in some}, set(some)
    if not any(name.rpartition(".")[2] in kinds for name in every if name not in held):
        return f"all those named {', '.join(sorted(kinds))}"
    depths = {_depth(name) for name in some}
    if None not in depths and not any(_depth(name) in depths for name in every if name not in held):
        return f"all those of block {', '.join(map(str, sorted(d for d in depths if d is not None)))}"
    return f"{some[0]} among them"


def _depth(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _scaled_to_zero(case: _Case) -> tuple[str, ...]:
    """The layers whose update is multiplied by 0, whatever their matrices hold."""
    known: Sequence[LayerStats | LayerWeights] = case.run.layers
    if not known and case.weights is not None:
        known = case.weights.layers
    return _names([layer for layer in known if layer.scale == 0])


def _scale_zero(case: _Case) -> Iterator[Diagnosis]:
    zero = _scaled_to_zero(case)
    if zero:
        yield Diagnosis(
            "scale-zero",
            f"the scale is 0 {_of(zero, case.names)}, so the update is zero whatever A and B hold",
            "write back lora_alpha and alpha_pattern into adapter_config.json as they were in training; the weights "
            "may be sound",
            "with the right scale the update is there; if it is not, A itself is zero",
            zero,
        )


def _scale_wrong(case: _Case) -> Iterator[Diagnosis]:
    zero = _scaled_to_zero(case)
    scaled = [layer for layer in _rescaled(case) if layer.name not in zero]
    if scaled and case.audit is not None:
        first = scaled[0]
        yield Diagnosis(
            "scale-wrong",
            f"the scale is not the one of the start {_of(scaled, case.audit.layers)}: {first.scale}, was "
            f"{first.initial_scale}, in {first.name}",
            "write back lora_alpha, alpha_pattern and use_rslora into adapter_config.json as they were in training; "
            "the weights are sound",
            "with the right scale effectiveness changes by the quotient of the two; if training itself was run with "
            "another scale, the start is not its start",
            _names(scaled),
        )


def _v1_trained(case: _Case) -> Iterator[Diagnosis]:
    """A v1 adapter may move B, and so out of the null space; a frozen one is told by `_wrong_subspace`."""
    loud = {layer.name: layer for layer in _loud(case)}
    left = case.audited(lambda layer: layer.name in loud and not layer.down <= layer.tolerance)
    if case.audit is None or case.audit.variant != "v1" or not left:
        return
    leakage, angle = median(loud[layer.name].leakage for layer in left), median(layer.angle for layer in left)
    yield Diagnosis(
        "v1-left-null-space",
        f"B was trained, as v1 allows, and moved out of the null space {_of(left, case.sound)}: median principal angle "
        f"{angle:.3g}° from its start, leakage / chance {leakage:.3g}",
        "train fewer steps or at a lower learning rate, or freeze B as v2 does: v1 guarantees its space at the start "
        "alone",
        "if the start, measured by itself, leaks as much, its subspace was never a null space of this text",
        _names(left),
    )


def _wrong_base(case: _Case) -> Iterator[Diagnosis]:
    changed = case.audited(lambda layer: layer.base is not None and not layer.base <= layer.tolerance)
    named = [] if case.audit is None else [other for other in case.audit.others if other.name.startswith("base_model_")]
    if changed or named:
        told = [f"W_res changed {_of(changed, case.run.layers)}"] if changed else []
        yield Diagnosis(
            "wrong-base",
            "; ".join([*told, *map(str, named)]),
            "train and measure on the base that the initial adapter was built from; W_res is never trained",
            "if all W_res differ it is another base; if few do, they were trained or damaged",
            _names(changed),
        )


def _outside(case: _Case) -> Iterator[Diagnosis]:
    others = [] if case.audit is None else [o for o in case.audit.others if not o.name.startswith("base_model_")]
    if case.audit is not None and all(
        layer.base is not None and layer.base > layer.tolerance for layer in case.audit.layers
    ):
        return  # another base differs in all that it holds, and has its own name
    if others and case.audit is not None:
        yield Diagnosis(
            "trained-outside",
            f"{len(others)} of {case.audit.compared} tensors outside the layers are not what they were: "
            + "; ".join(map(str, others[:3])),
            "freeze everything but the up matrices: norms, embeddings and head carry what is to be kept",
            "a layer gate does not see what these change; --nullspace-drift would",
            (),
        )


def _loud(case: _Case) -> list[LayerStats]:
    left_out = "leakage" in case.left_out
    return [layer for layer in case.sound if not left_out and "leakage" not in layer.absent and layer.leakage > LOUD]


def _rescaled(case: _Case) -> list[LayerAudit]:
    return case.audited(lambda layer: layer.is_rescaled)


def _drowns_its_input(case: _Case) -> bool:
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
    unmoved = case.audit is not None or all(map(_is_orthonormal, case.sound))
    return unmoved and _talks_over(case, case.sound)


def _talks_over(case: _Case, layers: Sequence[LayerStats]) -> bool:
    """Whether the update takes over on text that is to be preserved; what is lost, a judged drift tells better."""
    both = case.run.drift is None and all(layer.task is not None for layer in layers)
    return fmean(layer.contribution for layer in layers) > OVERTRAINED or (
        both and fmean(layer.forgetting for layer in layers) > FORGETTING
    )


def _is_orthonormal(layer: LayerStats) -> bool:
    return bool(layer.rank) and math.isclose(layer.down_weight_norm**2, layer.rank, rel_tol=ORTHONORMAL)


def _wrong_subspace(case: _Case) -> Iterator[Diagnosis]:
    frozen = {layer.name for layer in case.audited(lambda layer: layer.down <= layer.tolerance)}
    loud = [x for x in _loud(case) if (x.name in frozen if case.audit is not None else _is_orthonormal(x))]
    if not case.sound or len(loud) < len(case.sound) / 2 or _drowns_its_input(case) or _rescaled(case):
        return
    level = median(layer.leakage for layer in loud)
    evidence = f"B is frozen and leaks {level:.3g} times chance in the median {_of(loud, case.sound)}"
    if level > PRINCIPAL:
        yield Diagnosis(
            "principal-directions",
            evidence + ": more than any random subspace",
            "take the eigenvectors of the smallest eigenvalues for B; eigh sorts them first, svd last",
            "a random subspace leaks about 1",
            _names(loud),
        )
    else:
        yield Diagnosis(
            "random-subspace",
            evidence + ", as a random subspace does",
            "build B from the covariance of the text that is to be preserved, and check that it was not left at its "
            "random initialisation",
            "B may be the null space of quite other data: the initial checkpoint, measured on its own text, tells",
            _names(loud),
        )


def _plain_lora(case: _Case) -> Iterator[Diagnosis]:
    loud = _loud(case)
    if case.audit is not None and case.audit.variant == "lora" and loud:
        yield Diagnosis(
            "plain-lora",
            f"{case.audit.decided}; leakage / chance {median(layer.leakage for layer in loud):.3g} "
            f"{_of(loud, case.sound)}",
            "this adapter was never given a null space: initialise it as LoRA-Null does",
            "a null-space adapter begins with orthonormal rows of B (v2) or with A not zero (v1)",
            _names(loud),
        )


def _shifted(case: _Case) -> list[str]:
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


def _data_shift(case: _Case) -> Iterator[Diagnosis]:
    grown = _shifted(case)
    if grown:
        yield Diagnosis(
            "data-shift",
            f"B is what it was, yet preservation grew by more than half {_of(grown, case.run.layers)}",
            "the text or the activations shifted: measure on the text from which the null space was computed",
            "a trained B would not be what it was",
            tuple(grown),
        )


def _underflown(case: _Case) -> list[LayerStats]:
    """The layers whose update is zero in the precision of the run, although A is not in the file.

    On the preserved text that may be what was wanted, so it is the task text that tells, where there is one.
    """
    least = HALF if _in_half(case) else 0.0
    moved = _names(case.audited(lambda layer: layer.up > 0))
    return [
        layer
        for layer in case.sound
        if (layer.up_weight_norm > 0 or layer.name in moved)
        and layer.scale != 0
        and (layer.task or layer).update_norm <= least * math.sqrt(layer.out_features)
    ]


def _in_half(case: _Case) -> bool:
    return case.run.about.get("dtype") == "float16"


def _underflow(case: _Case) -> Iterator[Diagnosis]:
    lost = _underflown(case)
    if lost:
        yield Diagnosis(
            "underflow",
            f"A is not zero, but ABx is to {case.run.about.get('dtype', 'the precision it was measured in')} "
            f"{_of(lost, case.sound)}",
            "measure and serve in bfloat16 or float32: the update lies below what half precision can hold",
            "in float32 a true zero of Bx would remain",
            _names(lost),
        )


def _strength(case: _Case) -> Iterator[Diagnosis]:
    lost = set(_names(_underflown(case)))
    live = [layer for layer in case.sound if (layer.task or layer).update_norm > 0 and layer.name not in lost]
    if not live or len(live) < len(case.run.layers) or _rescaled(case) or _shifted(case):
        return
    effects, shares = [layer.figure("effectiveness") for layer in live], [layer.contribution for layer in live]
    if max(effects) < UNDERTRAINED:
        yield Diagnosis(
            "undertrained",
            f"every layer moved, none by much: effectiveness {min(effects):.3g} to {max(effects):.3g}",
            "more steps or a higher learning rate; then a higher rank",
            "some layers at zero among others that learned would be dead layers",
            _names(live),
        )
    elif "leakage" not in case.left_out and _talks_over(case, live) and (not _loud(case) or _drowns_its_input(case)):
        yield Diagnosis(
            "overtrained",
            f"on text that is to be preserved the update makes {fmean(shares):.0%} of the output in the mean, although "
            f"{'B is quiet where no update reaches its input' if _loud(case) else 'the input space is quiet'}",
            "fewer steps, a lower learning rate or a lower rank: a quiet space can still be made loud by its A",
            "a lost null space would leak in the first layer too; a raised scale looks the same: the start tells",
            _names(live),
        )


_FINDERS: Sequence[Callable[[_Case], Iterator[Diagnosis]]] = (
    _non_finite,
    _b_trained,
    _b_rescaled,
    _nothing_learned,
    _scale_zero,
    _scale_wrong,
    _wrong_base,
    _outside,
    _wrong_subspace,
    _plain_lora,
    _v1_trained,
    _data_shift,
    _underflow,
    _strength,
)

_PROVEN: Sequence[Callable[[_Case], Iterator[Diagnosis]]] = (
    _b_trained,
    _b_rescaled,
    _nothing_learned,
    _scale_wrong,
    _wrong_base,
    _outside,
    _data_shift,
)
"""Those that find what an audit saw, whatever the figures."""
