"""Whether all that the model holds beside the weights of tested layers is numbers, also what no text asks for.

The weights of a layer are told by its test. A token's row that the text never holds, or an expert to which it is never
routed, shows in no figure, and answers somebody later.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.arrays import require_finite
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.checkpoint.hub import tensors_of
from pytest_nullspace.checkpoint.layers import of_none
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.known import quantiser
from pytest_nullspace.model.layers import AdaptedLayer, AdaptedModel
from pytest_nullspace.model.shelf import is_shelved
from pytest_nullspace.model.stored import stored
from pytest_nullspace.settings import PREFIX


def require_numbers(adapted: AdaptedModel, checkpoint: Checkpoint, base: Path | None) -> None:
    """Refuse NaN and infinity beside the tested layers, in the files of the adapter and in the model as it runs.

    What of a streamed model is not in memory yet is looked at when it is read.

    Args:
        adapted: The model.
        checkpoint: Of which it is.
        base: Its base, a directory or a GGUF file; None where it is not known, or ``checkpoint`` carries it.

    Raises:
        CheckpointError: There is one.
    """
    beside, is_alone = checkpoint.beside(adapted.layers), checkpoint.carries_base or checkpoint.is_whole
    if base is not None and base.is_dir() and not is_alone:
        of_base = of_none(tensors_of(base), adapted.layers)
        if adapted.shelf is not None:
            adapted.shelf.require_finite([*beside, *of_base])
        elif quantiser(base) is not None:  # what its numbers are made of is no parameter
            beside += of_base
    elif adapted.shelf is not None:
        beside = adapted.shelf.require_finite(beside)
    require_finite(beside)
    for name, dtype in _broken(adapted):
        of = "" if base is None or is_alone else f", on the base {base},"
        raise CheckpointError(
            f"{checkpoint.directory}: tensor {printable(name)}{of} holds NaN or infinity as the model runs in {dtype}, "
            f"and no layer test covers it; save or download it again, give another base by {PREFIX}base=DIR, or, where "
            f"{dtype} cannot hold its numbers, {PREFIX}dtype=float32"
        )


def _broken(adapted: AdaptedModel) -> Iterator[tuple[str, str]]:
    """The name and type of what in memory is not finite, by one look at the numbers of each device."""
    found: dict[torch.device, list[tuple[str, torch.dtype, Tensor]]] = {}  # what is read of a disk is let go of at once
    with torch.no_grad():
        for name, value, is_buffer in _beside(adapted):
            if value.is_floating_point() and value.numel():
                least, most = (value if value.dtype.itemsize > 1 else value.float()).aminmax()
                # A buffer may be a mask, whose infinities are meant.
                whole = ~least.isnan() if is_buffer else least.isfinite() & most.isfinite()
                found.setdefault(value.device, []).append((name, value.dtype, whole))
    for told in found.values():
        are_whole = torch.stack([whole for *_, whole in told]).tolist()
        for (name, dtype, _), is_whole in zip(told, are_whole, strict=True):
            if not is_whole:
                yield name.replace(".base_layer.", "."), str(dtype).removeprefix("torch.")


def _beside(adapted: AdaptedModel) -> Iterator[tuple[str, Tensor, bool]]:
    """Each parameter and saved buffer whose norm no layer's test takes, by its name, and whether it is a buffer."""
    met = {id(value) for layer in adapted.layers.values() for value in _weights(layer)}
    for name, module in adapted.model.named_modules():
        for attribute, value in (*module._parameters.items(), *module._buffers.items()):
            if value is None or id(value) in met or attribute in module._non_persistent_buffers_set:
                continue
            met.add(id(value))
            if adapted.shelf is None or not is_shelved(value):
                held = stored(module, attribute) if value.is_meta else value.detach()
                whole: Tensor = held.dequantize() if type(held).__module__.startswith("torchao.") else held
                yield f"{name}.{attribute}".lstrip("."), whole, not isinstance(value, nn.Parameter)


def _weights(layer: AdaptedLayer) -> Iterator[object]:
    """What a layer's defects are told of, whether or not a row reaches it: not its biases, nor the norms of DoRA."""
    for part in (layer.down, layer.up, layer.base, layer.update if layer.is_whole else None):
        yield None if part is None else part._parameters.get("weight")
