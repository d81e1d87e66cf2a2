"""The update since the start of training, where the start already held a part of W: v1, CorDA, PiSSA, OLoRA.

There ``W = W_res + A₀B₀``, so what training changed is ``AB − A₀B₀``, and what it is added to is ``W x``. Both follow
from the forward that is measured, as the rows of ``B`` and of ``B − B₀`` read the same input.

Of a directory that holds ``W_res`` the untouched base tells the product ``A₀B₀ = W − W_res`` as well as the start does,
up to the rounding of what is stored. What that left beyond the adapter's rank tells how coarse it was.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pytest_nullspace import kernels, spectra
from pytest_nullspace.checkpoint import Checkpoint, lora_null, peft
from pytest_nullspace.checkpoint.arrays import read_tensor
from pytest_nullspace.checkpoint.header import TensorInfo, printable, read_tensors
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.judging.begun import NEGLIGIBLE, NOISE, ROUNDING, Begun, apart
from pytest_nullspace.measuring.digits import has_bias
from pytest_nullspace.model.layers import AdaptedLayer, AdaptedModel, Start
from pytest_nullspace.model.stored import stored
from pytest_nullspace.settings import PREFIX

_svdvals: Callable[..., Tensor] = torch.linalg.svdvals
_solve: Callable[..., Tensor] = torch.linalg.solve

_ALIGNED = 1e6
"""The condition up to which rows of B and of the start are taken to span one space."""
_FACTORS = lora_null.UP, lora_null.DOWN


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
        self._change = (layer.down_matrix().cpu() - start.down).to(device, self._exact)
        self._root, self._up = spectra.triangle(both).to(device, self._exact), start.up.to(device, self._exact)

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

    Of a DoRA layer and of one with a bias of its own the update is more than ``AB``, and is left as it is, and said.

    Raises:
        CheckpointError: A tensor of the start cannot be read.
    """
    if checkpoint.format != initial.format:
        return adapted
    starts = {name: _start(layer, initial) for name, layer in adapted.layers.items()}
    told = sum(start is not None for start in starts.values())
    remark = (
        f"update against the start {printable(initial.directory, 1000)}: that held a part of W in {told} of "
        f"{len(starts)} layers, so what is told of them is AB - A0B0 beside W x"
    )
    more = [name for name, layer in adapted.layers.items() if _is_more(layer, initial) and _is_held(layer, initial)]
    if more:
        whole = (
            f"update as a whole in {len(more)} of {len(starts)} layers, such as {printable(more[0])}, though the start "
            "held a part of W there: norms (DoRA) or biases are more than AB, so what is told of these layers is not "
            "since the start"
        )
        adapted = replace(adapted, remarks=(*adapted.remarks, whole))
    return _since(adapted, starts, remark, initial.directory)


def _since(adapted: AdaptedModel, starts: Mapping[str, Start | None], remark: str, directory: Path) -> AdaptedModel:
    if not any(starts.values()):
        return adapted
    layers = {name: replace(layer, start=starts[name]) for name, layer in adapted.layers.items()}
    return replace(adapted, layers=layers, remarks=(*adapted.remarks, remark), since=str(directory))


def _start(layer: AdaptedLayer, initial: Checkpoint) -> Start | None:
    held = _parts(layer, initial)
    if _is_more(layer, initial) or any(info is None for info in held):
        return None
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
        return None
    return Start(down, (1.0 if scale is None else scale.value) * up)


def _parts(layer: AdaptedLayer, initial: Checkpoint) -> list[TensorInfo | None]:
    """B₀ and A₀ of a layer."""
    is_peft = initial.format in peft.FORMATS
    prefix, parts = (peft.PREFIX, (peft.DOWN, peft.UP)) if is_peft else ("", (lora_null.DOWN, lora_null.UP))
    return [initial.tensors.get(f"{prefix}{layer.name}.{part}") for part in parts]


def _is_held(layer: AdaptedLayer, initial: Checkpoint) -> bool:
    """Whether the start's product is anything: its A₀ is not zero."""
    up = _parts(layer, initial)[1]
    return up is not None and bool(read_tensor(up).any())


def _is_more(layer: AdaptedLayer, checkpoint: Checkpoint) -> bool:
    """Whether the layer's update is more than ``A B x``."""
    protected = f"{layer.name}.{lora_null.PROTECT_DOWN}" in checkpoint.tensors
    return protected or layer.update is not None or has_bias(layer.up)


class _Held(NamedTuple):
    """What the start held of W in one layer, as its base tells it.

    Attributes:
        noise: What rounding made of it, beside the update since; both in the Frobenius norm.
        start: Its factors; None where rounding is too much of what is left for that to be called an update.
    """

    noise: float
    start: Start | None


def with_base(adapted: AdaptedModel, checkpoint: Checkpoint, base: Path) -> AdaptedModel:
    """The model of a LoRA-Null directory, its layers told from ``W − W_res``, which is what its start held of W.

    What is rounded so coarsely that nobody can tell it from an update is left as it is, and said.

    Args:
        adapted: The model.
        checkpoint: Its directory, which holds ``W_res``.
        base: The untouched base, a directory or a GGUF file.

    Raises:
        CheckpointError: The base lacks a layer, or ``W − W_res`` is not of the adapter's rank.
    """
    if adapted.switched_off is not None:  # W_res is W
        return adapted
    if base.is_file():
        remark = f"update as a whole: {printable(base, 1000)} holds numbers that were quantised, not those of W"
        return replace(adapted, remarks=(*adapted.remarks, remark))
    weights = read_tensors(base, "model")
    found = {
        name: None if _is_more(layer, checkpoint) else _held(layer, checkpoint, weights, base)
        for name, layer in adapted.layers.items()
    }
    held = {name: of for name, of in found.items() if of is not None}
    lost = {name: of.noise for name, of in held.items() if of.start is None}
    if lost:
        name = max(lost, key=lost.__getitem__)
        remark = (
            f"update as a whole in {len(lost)} of {len(found)} layers: W - W_res is rounded too coarsely for what "
            f"changed since, to {lost[name]:.2g} of it in {printable(name)}; {PREFIX}init=DIR, from which training "
            "started, tells it"
        )
        adapted = replace(adapted, remarks=(*adapted.remarks, remark))
    told = [of.noise for of in held.values() if of.start is not None]
    remark = (
        f"update against the base {printable(base, 1000)}: W - W_res is the A0B0 of the start in {len(told)} of "
        f"{len(found)} layers, so what is told of them is AB - A0B0 beside W x, of which rounding is "
        f"{max(told, default=0.0):.2g} at most; how B and A moved is not judged without {PREFIX}init=DIR"
    )
    return _since(adapted, {name: None if of is None else of.start for name, of in found.items()}, remark, base)


def _held(layer: AdaptedLayer, checkpoint: Checkpoint, weights: Mapping[str, TensorInfo], base: Path) -> _Held | None:
    """What the start held of W in a layer; None where that is nothing but rounding.

    Raises:
        CheckpointError: It is not of the layer's rank.
    """
    info, other = checkpoint.tensors[f"{layer.name}.{lora_null.BASE}"], _weight(layer.name, weights)
    if other is None or other.shape != info.shape or not {info.dtype, other.dtype} <= ROUNDING.keys():
        shape = "×".join(map(str, info.shape))
        raise CheckpointError(
            f"{printable(base, 1000)}: holds no weight of {printable(layer.name)} of shape {shape}, so it is not the "
            f"base of {checkpoint.directory}; give the one that it was made from by {PREFIX}base=DIR, or leave the "
            "option out"
        )
    held = Begun(layer.name, layer.rank, other, False, info, str(checkpoint.directory), at_once=True).held()
    if held is None or not math.isfinite(held.beyond):
        return None
    own = (layer.scale * layer.up_matrix.to("cpu", torch.float64)).numpy(), layer.down_matrix().cpu().numpy()
    file_up, file_down = (read_tensor(checkpoint.tensors[f"{layer.name}.{part}"]) for part in _FACTORS)
    noise, update = math.hypot(held.beyond, apart(own, (file_up, file_down))), apart(own, held[:2])
    is_told = noise <= max(NOISE * update, NEGLIGIBLE * held.whole)
    start = _aligned(torch.from_numpy(held.up), torch.from_numpy(held.down), torch.from_numpy(own[1]))
    return _Held(noise / update if update else 0.0, start if is_told else None)


def _weight(name: str, weights: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The layer's weight in the base, which may have been saved without its head."""
    return weights.get(f"{name}.weight") or weights.get(f"{name.partition('.')[2]}.weight")


def _aligned(up: Tensor, down: Tensor, like: Tensor) -> Start:
    """The same product of rows as near to those of B as it allows: what hardly moved then hardly differs."""
    turned = like @ down.mT
    values = _svdvals(turned)
    if not bool(values[-1] * _ALIGNED > values[0]):
        return Start(down, up)
    return Start(turned @ down, _solve(turned, up, left=False))
