"""Mistakes that show in the weights: what moved and must not have, what did not, and by what it is multiplied. Pure."""

from collections.abc import Iterator, Sequence
from statistics import median

from pytest_nullspace.judging.audit import SAME_SPACE
from pytest_nullspace.judging.evidence import Case, Diagnosis, in_how_many, names_of


def b_trained(case: Case) -> Iterator[Diagnosis]:
    """A B that left its space; without the start, rows that are not orthonormal."""
    if not case.is_v2:
        return
    moved = case.audited(lambda layer: layer.down > layer.tolerance and layer.angle >= SAME_SPACE and layer.up > 0)
    if moved and case.audit is not None:
        yield Diagnosis(
            "b-trained",
            f"B was trained {in_how_many(moved, case.audit.layers)}: it left its space, largest principal angle "
            f"{max(layer.angle for layer in moved):.3g}°",
            "the freezing condition probably tests for ALinear twice; freeze the parameters whose names hold BLinear "
            "(lora_A in PEFT), and train again from the start",
            "an adapter of variant v1 or plain LoRA trains B by design: then say so by --nullspace-variant",
            names_of(moved),
        )
    loud = [layer for layer in case.loud if not layer.is_orthonormal]
    if case.audit is None and loud:
        yield Diagnosis(
            "no-null-space",
            f"the input space is none that was chosen to be quiet {in_how_many(loud, case.sound)} (leakage "
            f"{median(layer.leakage for layer in loud):.3g}), and the rows of B are not orthonormal",
            "give the start by --nullspace-init: it tells which of the likely causes it is",
            "a trained B, plain LoRA and a v1 trained too far all look so",
            names_of(loud),
        )


def b_rescaled(case: Case) -> Iterator[Diagnosis]:
    """A B that moved within its own space."""
    if not case.is_v2:
        return
    scaled = case.audited(lambda layer: layer.down > layer.tolerance and layer.angle < SAME_SPACE and layer.up > 0)
    if scaled and case.audit is not None:
        yield Diagnosis(
            "b-rescaled",
            f"B was turned or rescaled within its own space {in_how_many(scaled, case.audit.layers)}: relative change "
            f"up to {max(layer.down for layer in scaled):.3g}, largest principal angle below {SAME_SPACE}°",
            "weight decay, a merge of scales or an orthonormalisation touched B: leave it out of the optimiser",
            "the space itself is kept: a trained B would have left it",
            names_of(scaled),
        )


def nothing_learned(case: Case) -> Iterator[Diagnosis]:
    """An A that did not move: in some layers, in all, or while B did."""
    still, scaled_to_zero = case.audited(lambda layer: layer.up == 0), set(case.scaled_to_zero)
    if case.audit is not None:
        dead = names_of(still)
    elif case.weights is not None:
        dead = names_of([layer for layer in case.weights.layers if layer.up_norm == 0])
    else:
        dead = names_of([layer for layer in case.sound if layer.up_weight_norm == 0])
    if case.audit is None:  # a norm of A with its scale does not tell the two apart
        dead = tuple(name for name in dead if name not in scaled_to_zero)
    if not dead:
        return
    if len(dead) < len(case.names):
        yield Diagnosis(
            "dead-layers",
            f"A did not move {in_how_many(dead, case.names)}: {_shared(dead, case.names)}",
            "look for these names in the list of trained parameters: a pattern or a device map leaves them out",
            "if no layer had moved, the freezing condition would be wrong for all",
            dead,
        )
        return
    turned = case.audited(lambda layer: layer.down > layer.tolerance)
    if turned:
        yield Diagnosis(
            "inverted-freeze",
            f"A did not move in any layer, but B did {in_how_many(turned, case.names)}",
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
        + ("; and float16 may have rounded A to zero: the start tells, or float32" if case.in_half else ""),
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


def scale_zero(case: Case) -> Iterator[Diagnosis]:
    """An update that is multiplied by 0."""
    zero = case.scaled_to_zero
    if zero:
        yield Diagnosis(
            "scale-zero",
            f"the scale is 0 {in_how_many(zero, case.names)}, so the update is zero whatever A and B hold",
            "write back lora_alpha and alpha_pattern into adapter_config.json as they were in training; the weights "
            "may be sound",
            "with the right scale the update is there; if it is not, A itself is zero",
            zero,
        )


def scale_wrong(case: Case) -> Iterator[Diagnosis]:
    """An update that is multiplied by something else than at the start."""
    zero = case.scaled_to_zero
    scaled = [layer for layer in case.rescaled if layer.name not in zero]
    if scaled and case.audit is not None:
        first = scaled[0]
        yield Diagnosis(
            "scale-wrong",
            f"the scale is not the one of the start {in_how_many(scaled, case.audit.layers)}: {first.scale}, was "
            f"{first.initial_scale}, in {first.name}",
            "write back lora_alpha, alpha_pattern and use_rslora into adapter_config.json as they were in training; "
            "the weights are sound",
            "with the right scale effectiveness changes by the quotient of the two; if training itself was run with "
            "another scale, the start is not its start",
            names_of(scaled),
        )


def v1_trained(case: Case) -> Iterator[Diagnosis]:
    """A v1 adapter may move B, and so out of the null space; a frozen one is told by `wrong_subspace`."""
    loud = {layer.name: layer for layer in case.loud}
    left = case.audited(lambda layer: layer.name in loud and not layer.down <= layer.tolerance)
    if case.audit is None or case.audit.variant != "v1" or not left:
        return
    leakage, angle = median(loud[layer.name].leakage for layer in left), median(layer.angle for layer in left)
    yield Diagnosis(
        "v1-left-null-space",
        f"B was trained, as v1 allows, and moved out of the null space {in_how_many(left, case.sound)}: median "
        f"principal angle {angle:.3g}° from its start, leakage {leakage:.3g}",
        "train fewer steps or at a lower learning rate, or freeze B as v2 does: v1 guarantees its space at the start "
        "alone",
        "if the start, measured by itself, leaks as much, its subspace was never a null space of this text",
        names_of(left),
    )


def wrong_base(case: Case) -> Iterator[Diagnosis]:
    """A base that is not the one of the start."""
    changed = case.audited(lambda layer: layer.base is not None and not layer.base <= layer.tolerance)
    named = () if case.audit is None else case.audit.bases
    if changed or named:
        told = [f"W_res changed {in_how_many(changed, case.run.layers)}"] if changed else []
        yield Diagnosis(
            "wrong-base",
            "; ".join([*told, *map(str, named)]),
            "train and measure on the base that the initial adapter was built from; W_res is never trained",
            "if all W_res differ it is another base; if few do, they were trained or damaged",
            names_of(changed),
        )


def outside(case: Case) -> Iterator[Diagnosis]:
    """Tensors outside the layers that moved."""
    others = () if case.audit is None else case.audit.tensors
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
