"""A whole model beside its base, each of the linear layers that differ in two parts: the base's W, and ΔW.

Both are loaded by transformers. What of a layer changed is taken from the files, so that it is exact whatever the
precision of the run, and it is applied in float32 at least: ``W x`` and ``ΔW x`` are two products, and nothing
is left of a difference of two. The base stays a model of its own, which shares what it can.
"""

from collections.abc import Collection
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from pytest_nullspace import spectra
from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import TensorInfo, printable, read_tensors
from pytest_nullspace.checkpoint.whole import WEIGHT
from pytest_nullspace.errors import CheckpointError, some
from pytest_nullspace.model.absent import not_whole
from pytest_nullspace.model.bases import load_base
from pytest_nullspace.model.kinds import Kind, kind_as_saved
from pytest_nullspace.model.layers import AdaptedLayer, AdaptedModel
from pytest_nullspace.model.names import of_today
from pytest_nullspace.model.stored import stored

ROUNDED = 0.01
"""Of ``‖ΔW‖``: the rounding of a stored type that makes less is not told."""
_DIGITS = {"BF16": 8, "F16": 11}
"""Of the numbers of each type of half precision, the leading one included."""
_HALVES = {"BF16": "bfloat16", "F16": "float16"}


class _Product(nn.Module):
    """``W x`` for a weight that may be in a higher precision than ``x``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product, in the precision of the weight."""
        return linear(x.to(self.weight.dtype), self.weight)


class WholeLinear(nn.Module):
    """``y = W x + ΔW x [+ bias]``; beside it the down projection that stands for ΔW's, where a rank is given."""

    def __init__(self, weight: Tensor, change: Tensor, bias: Tensor | None, rank: int, *, transposed: bool) -> None:
        """Take the parts in.

        Args:
            weight: W, shape ``(out, in)``, in the precision of the run.
            change: ΔW, likewise, in float32 at least.
            bias: Of the whole model, shape ``(out,)``.
            rank: Of the down projection; 0 for none.
            transposed: Whether its model reads its weight as ``(in, out)``.
        """
        super().__init__()
        self.base, self.delta = _Product(weight), _Product(change)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._transposed = transposed
        self._values: Tensor | None = None
        rows = change.new_empty(0, change.shape[1])
        if rank:
            self._values, rows = spectra.singular(change, rank)
        self.down = _Product(rows.to(change.dtype))
        self.up = _Product((change.to(rows.dtype) @ rows.mT).to(change.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x``, shape ``(…, in)``; returns ``(…, out)``."""
        self.down(x)  # for who watches it
        y: Tensor = self.base(x) + self.delta(x)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """W′, for a model that computes with it in its own way."""
        whole = (self.base.weight + self.delta.weight).to(self.base.weight.dtype)
        return whole.mT if self._transposed else whole

    @cached_property
    def effective_rank(self) -> float:
        """Of ΔW."""
        values = spectra.singular(self.delta.weight, 0)[0] if self._values is None else self._values
        return spectra.effective_rank(values)


def load(checkpoint: Checkpoint, base: Path, device: torch.device, dtype: torch.dtype) -> AdaptedModel:
    """Load the model and its base, and put each layer that differs into its two parts.

    Raises:
        CheckpointError: One of them cannot be loaded, they are not of one class, or no linear layer differs.
    """
    kind, of_base = kind_as_saved(checkpoint.directory), kind_as_saved(base)
    if kind.build is not of_base.build:
        raise CheckpointError(
            f"{checkpoint.directory}: is a {kind.build.__name__}, its base {base} a {of_base.build.__name__}, by their "
            "architectures; save both as one class"
        )
    plain, model = _loaded(of_base, base, dtype).to(device).eval(), _loaded(kind, checkpoint.directory, dtype)
    held, views, noises, others = read_tensors(base, "model"), {}, [], []
    places = of_today(model, [spec.name for spec in checkpoint.layers])
    for spec in checkpoint.layers:
        info, place = checkpoint.tensors[f"{spec.name}{WEIGHT}"], places[spec.name]
        now, before = _read(info), _read(held[info.name])
        module = _linear(model, place, now)
        if module is None:
            others.append(spec.name)
            continue
        change = now - before
        noises.append((_rounding(now, info.dtype) / float(change.double().norm()), info.dtype))
        weight, transposed = stored(plain.get_submodule(place), "weight"), isinstance(module, Conv1D)
        whole = WholeLinear(
            weight.mT if transposed else weight,
            (change.mT if transposed else change).to(device, torch.promote_types(dtype, torch.float32)),
            None if module.bias is None else module.bias.detach().to(device),
            spec.rank,
            transposed=transposed,
        )
        model.set_submodule(place, whole)
        views[spec.name] = _view(spec.name, whole)
    _share(model, plain, device)
    return AdaptedModel(
        model.to(device).eval(),
        views,
        device,
        switched_off=None if checkpoint.cut else lambda: nullcontext(plain),
        kind=f"{kind.build.__name__}, {kind.why}",
        remarks=(*checkpoint.remarks, *_told(others, views, checkpoint.directory), *_rounded(noises)),
        base_name=f"the base {base}",
    )


def _loaded(kind: Kind, directory: Path, dtype: torch.dtype) -> nn.Module:
    model, absent = load_base(kind, directory, dtype)
    if absent:
        raise not_whole(model, absent, directory)
    return model


def _linear(model: nn.Module, place: str, weight: Tensor) -> Any:
    """The linear layer of that place, whose weight is the one in the file; None where there is none such."""
    module = dict(model.named_modules()).get(place)
    own = getattr(module, "weight", None)
    fits = isinstance(module, nn.Linear | Conv1D) and own is not None and _are_alike(own, weight.to(own.dtype))
    return module if fits else None


def _told(others: list[str], views: Collection[str], directory: Path) -> tuple[str, ...]:
    """What differs and is no linear layer in the model, so that no test can cover it.

    Raises:
        CheckpointError: There is nothing else.
    """
    if not others:
        return ()
    told = f"{some(others)} differ from the base's, but are no linear layers in the model, so no test can cover them"
    if not views:
        raise CheckpointError(f"{directory}: {told}")
    return (f"{told}; choose the others by --nullspace-layers=GLOB",)


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, what is no number included."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _read(info: TensorInfo) -> Tensor:
    """A tensor as its file holds it, in float32 or more."""
    try:
        with safe_open(info.file, framework="pt") as file:
            value: Tensor = file.get_tensor(info.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{info.file}: the weights cannot be read: {printable(error, 300)}; save or download them again"
        ) from None
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _share(model: nn.Module, plain: nn.Module, device: torch.device) -> None:
    """Let the model take from its base what is the same there, so that it is in memory once."""
    others = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        own, other = parameter.data.to(device), others.get(name)
        parameter.data = other.data if other is not None and _are_alike(own, other) else own


def _rounding(weight: Tensor, dtype: str) -> float:
    """The norm of what rounding to the stored type of half precision makes of a weight; 0 of others, and of zeros."""
    if dtype not in _DIGITS:
        return 0.0
    units = torch.ldexp((weight != 0).to(weight.dtype), torch.frexp(weight).exponent - _DIGITS[dtype])
    return float(units.norm()) / 12**0.5


def _rounded(noises: list[tuple[float, str]]) -> tuple[str, ...]:
    """How much of the change the stored types may have made, by its share of each and the type, where it matters."""
    share = median(share for share, _ in noises) if noises else 0.0
    if not share >= ROUNDED:
        return ()
    halves = [_HALVES[dtype] for _, dtype in noises if dtype in _HALVES]
    which = "its weights" if len(halves) == len(noises) else f"{len(halves)} of {len(noises)} of its weights"
    types = " and ".join(sorted({*halves}))
    return (
        f"{which} are stored in {types}, whose rounding alone makes about {share:.0%} of ||ΔW|| (median over "
        "layers): a merge in float32 tells the update without it",
    )


def _view(name: str, whole: WholeLinear) -> AdaptedLayer:
    return AdaptedLayer(
        name=name,
        layer=whole,
        down=whole.down,
        up=whole.up,
        base=whole.base,
        scale=1.0,
        down_matrix=lambda: stored(whole.down, "weight").double(),
        base_matrix=lambda: stored(whole.base, "weight"),
        has_bias=whole.bias is not None,
        update=whole.delta,
        effective_rank=lambda: whole.effective_rank,
    )
