"""Whether a PEFT adapter, its config and the base model belong together, layer by layer."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.errors import CheckpointError, some
from pytest_nullspace.model.layers import AdaptedLayer
from pytest_nullspace.model.names import OLDER, Placed, are_older


def require_targets(
    checkpoint: Checkpoint, base: Path, found: Mapping[str, LoraLayer], model: nn.Module, at: Placed
) -> None:
    """Refuse an adapter whose layers are not, one for one, those that its config has PEFT adapt in the base.

    Args:
        checkpoint: The adapter.
        base: The base's directory, for messages.
        found: What PEFT made of the base's layers, by name.
        model: The base, with them in it.
        at: Where the adapter's layers are there.

    Raises:
        CheckpointError: They are not.
    """
    saved = set(at.layers.values())
    modules = {name for name, _ in model.named_modules()}
    missing = sorted(saved - set(found))
    strange = [name for name in missing if name not in modules]
    astray = [old for old, new in at.layers.items() if new in strange and old in modules]
    if astray:
        raise CheckpointError(
            f"{checkpoint.directory}: {len(astray)} of its layers, such as {printable(astray[0])}, are in the base "
            f"model {base}, but PEFT takes them for an older transformers' and looks for "
            f"{printable(at.layers[astray[0]])}, so it would leave them out; take a newer peft"
        )
    if strange and are_older(model, strange):
        raise CheckpointError(
            f"{checkpoint.directory}: {len(strange)} of its layers, such as {printable(strange[0])}, are not in the "
            f"base model {base} under these names, and PEFT does not map them: {OLDER}"
        )
    if strange:
        raise CheckpointError(
            f"{checkpoint.directory}: {len(strange)} of its layers, such as {printable(strange[0])}, are not in the "
            f"base model {base}, whose own are named like {printable(min(found))}: that is of another architecture, or "
            "the adapter's tensors have a prefix too many or too few; give the base by --nullspace-base=DIR, or save "
            "the adapter with save_pretrained"
        )
    if missing:
        raise CheckpointError(
            f"{checkpoint.config_file}: the adapter holds {some(missing)}, but its target_modules do not name them "
            f"in the base model {base}, so PEFT would leave them out; add them to target_modules"
        )
    bare = {name: module.parameter_name for name in saved if isinstance(module := found[name], ParamWrapper)}
    if bare:
        name, parameter = min(bare.items())
        raise CheckpointError(
            f"{checkpoint.config_file}: target_parameters put LoRA on the bare parameter {printable(parameter)} of "
            f"{printable(name)}, which no layer test covers, and without its module's name it looks like a linear "
            f"layer's; call it {printable(name.rpartition('.')[2])}.{printable(parameter)} there"
        )
    unsaved = sorted(name for name in found if name not in saved and name not in at.modules)
    if unsaved:
        raise CheckpointError(
            f"{checkpoint.config_file}: target_modules name {some(unsaved)}, but the adapter holds no weights for "
            "them, so they would be measured with random ones; save it again, or give its own base by --nullspace-base"
        )


def require_blocks(checkpoint: Checkpoint, base: Path, model: nn.Module, saved: set[str]) -> None:
    """Refuse an adapter of mlx-lm that holds fewer layers than its config says, or others, which mlx-lm leaves out.

    Raises:
        CheckpointError: It does.
    """
    if (asked := checkpoint.last_blocks) is None:
        return
    blocks, wanted = asked.of([name for name, _ in model.named_modules() if ".base_layer" not in name], saved)
    where = f"{checkpoint.config_file}: num_layers {asked.count}" + (" and lora_parameters.keys" if asked.keys else "")
    if asked.count > blocks:
        raise CheckpointError(
            f"{checkpoint.config_file}: num_layers is {asked.count}, but the base model {base} has {blocks} blocks: "
            "config and base are of different runs; give the base that it was trained on by --nullspace-base=DIR, or "
            "write back what it was trained with"
        )
    if lost := sorted(wanted - saved):
        raise CheckpointError(
            f"{where} name {some(lost)}, but the adapter holds no weights for them: it is incomplete; save or copy it "
            "again"
        )
    if stray := sorted(saved - wanted):
        raise CheckpointError(
            f"{where} leave out {some(stray)}, which the adapter holds, so mlx-lm would run it without them; write "
            "back what it was trained with"
        )


def require_scales(checkpoint: Checkpoint, views: Mapping[str, AdaptedLayer]) -> None:
    """Refuse layers whose own ``alpha_pattern`` was lost when their names were mapped: PEFT maps no names there.

    Raises:
        CheckpointError: One was.
    """
    for spec in checkpoint.layers:
        if spec.scale is not None and not math.isclose(spec.scale.value, views[spec.name].scale):
            raise CheckpointError(
                f"{checkpoint.config_file}: the lora_alpha of {printable(spec.name)} is told under that name, {OLDER}"
            )


def require_changed(checkpoint: Checkpoint, base: Path | str, layers: Iterable[AdaptedLayer]) -> None:
    """Refuse a base that still holds what the adapter's initialisation took out of it.

    PiSSA, CorDA and OLoRA start from ``s·A₀B₀``, take it out of W, and make it orthogonal to what is left. So the share
    of the update that W holds, ``⟨W, s·A B⟩ / ‖s·A B‖²``, is 1 on the untouched base and 0 on the changed one. Training
    blurs it: for PiSSA and OLoRA, which start from much of W, not by half; for CorDA, which starts from little, wholly.

    Raises:
        CheckpointError: It does.
    """
    start, shares = str(checkpoint.config.get("init_lora_weights", "")).lower(), []
    for layer in layers:
        weight = layer.base_matrix()
        if weight is None:
            continue
        weight = weight.detach().float()
        if getattr(layer.layer, "fan_in_fan_out", False):
            weight = weight.mT
        down, up = layer.down_matrix().to(weight), layer.up_matrix.detach().to(weight)
        held = float((up * (weight @ down.mT)).sum() / ((up.mT @ up) * (down @ down.mT)).sum())
        # OLoRA alone does not divide A₀B₀ by the scale, so it takes s times the share that W holds.
        shares.append((held - (1 - layer.scale if start == "olora" else 0)) / layer.scale)
    share = median(shares) if shares and all(map(math.isfinite, shares)) else 0.0
    if 0.5 < share < 1.5:
        raise CheckpointError(
            f"{base}: is not the base that the initialisation of {checkpoint.directory} changed, for it still holds "
            f"{share:.0%} of what that takes out, and every figure would be wrong; give the base as PEFT left it by "
            "--nullspace-base=DIR"
        )
