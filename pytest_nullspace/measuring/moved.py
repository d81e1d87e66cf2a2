"""The update since the start of training, where the start already held a part of W: v1, CorDA, PiSSA, OLoRA.

There ``W = W_res + A₀B₀``, so what training changed is ``AB − A₀B₀``, and what it is added to is ``W x``. Both follow
from the forward that is measured, as the rows of ``B`` and of ``B − B₀`` read the same input.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pytest_nullspace import kernels
from pytest_nullspace.checkpoint import Checkpoint, lora_null, peft
from pytest_nullspace.checkpoint.arrays import read_tensor
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.model.layers import AdaptedLayer, AdaptedModel, Start
from pytest_nullspace.model.stored import stored


class Moved:
    """What became of the start of one layer."""

    def __init__(self, layer: AdaptedLayer, start: Start, device: torch.device) -> None:
        """Set its matrices out.

        Formed as ``(A − A₀) B + A₀ (B − B₀)`` in float64, what did not move gives zero, and what moved little keeps its
        digits.
        """
        self._exact = torch.float64 if device.type == "cpu" else torch.float32
        up = layer.scale * layer.up_matrix.to("cpu", torch.float64)
        both = torch.cat((up - start.up, start.up), dim=1)
        self._change = (layer.down_matrix() - start.down).to(device, self._exact)
        self._root, self._up = kernels.triangle(both).to(device, self._exact), start.up.to(device, self._exact)

    def of(self, x: Tensor, down: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norms of the update since the start, shape ``(n,)``, and ``W x``, shape ``(n, out)``.

        Args:
            x: The layer's input, shape ``(n, in)``.
            down: ``Bx``, shape ``(n, r)``.
            residual: ``W_res x``, shape ``(n, out)``.
        """
        change, root, up = (part.to(x.device) for part in (self._change, self._root, self._up))
        down, since = down.to(self._exact), x.to(self._exact) @ change.mT
        norms = kernels.row_norms(torch.cat((down, since), dim=-1) @ root.mT)
        return norms, residual + ((down - since) @ up.mT).to(torch.promote_types(residual.dtype, torch.float32))


def with_start(adapted: AdaptedModel, checkpoint: Checkpoint, initial: Checkpoint) -> AdaptedModel:
    """The model, its layers told from where training started where that held a part of W.

    Of a DoRA layer and of one with a bias of its own the update is more than ``AB``, and is left as it is.

    Raises:
        CheckpointError: A tensor of the start cannot be read.
    """
    if checkpoint.format != initial.format:
        return adapted
    layers = {name: _with_start(layer, initial) for name, layer in adapted.layers.items()}
    told = sum(layer.start is not None for layer in layers.values())
    if not told:
        return adapted
    remark = (
        f"update against the start {printable(initial.directory, 1000)}: that held a part of W in {told} of "
        f"{len(layers)} layers, so what is told of them is AB - A0B0 beside W x"
    )
    return replace(adapted, layers=layers, remarks=(*adapted.remarks, remark), since=str(initial.directory))


def _with_start(layer: AdaptedLayer, initial: Checkpoint) -> AdaptedLayer:
    is_peft = initial.format in peft.FORMATS
    prefix, parts = (peft.PREFIX, (peft.DOWN, peft.UP)) if is_peft else ("", (lora_null.DOWN, lora_null.UP))
    held = [initial.tensors.get(f"{prefix}{layer.name}.{part}") for part in parts]
    protected = f"{layer.name}.{lora_null.PROTECT_DOWN}" in initial.tensors
    has_more = protected or layer.update is not None or isinstance(getattr(layer.up, "bias", None), Tensor)
    if has_more or any(info is None for info in held):
        return layer
    # As the model rounds its own, so that what did not move is what it was.
    own = stored(layer.down, "weight"), layer.up_matrix
    down, up = (
        torch.from_numpy(read_tensor(info)).to(like.dtype).double()
        for info, like in zip(held, own, strict=True)
        if info is not None
    )
    scales = {spec.name: spec.scale for spec in initial.layers}
    scale = scales.get(layer.name)
    if (down.shape, up.shape) != tuple(part.shape for part in own) or not bool(up.any()):
        return layer
    return replace(layer, start=Start(down, (1.0 if scale is None else scale.value) * up))
