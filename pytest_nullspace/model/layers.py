"""A model with adapted layers, as the measuring pass sees it, whatever the format it came from."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pytest_nullspace.kernels import at_hand, exact_row_norms, row_norms
from pytest_nullspace.model.shelf import Shelf
from pytest_nullspace.model.stored import stored

_vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm


class Join(Protocol):
    """Makes a layer's output ``base + scale · up``, as `pytest_nullspace.kernels.joined` does, and looks at both."""

    def __call__(self, base: Tensor, up: Tensor, scale: float) -> Tensor:
        """The output, in the type of ``base``."""


@dataclass(frozen=True)
class Start:
    """What an adapter was before training, where that is a part of the base's weight: ``W = W_res + up · down``.

    Attributes:
        down: B₀, shape ``(r, in)``, float64 on the CPU.
        up: A₀ with its scale, shape ``(out, r)``, likewise.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class AdaptedLayer:
    """Where to look at one adapted linear layer while the model runs.

    Its modules are called in each forward of the layer: ``layer(x) = scale · up(down(x)) + base(x) [+ bias]``, or,
    where it has a magnitude (DoRA), ``layer(x) = m ∘ (scale · up(down(x)) + base(x)) [+ bias]``, or, where it was
    merged or trained whole, ``layer(x) = update(x) + base(x) [+ bias]``; then ``up`` is not called.

    Attributes:
        name: Its module path in the plain model.
        layer: The module whose input is ``x`` and whose output is the layer's.
        down: Output ``Bx``, shape ``(…, r)``.
        up: Output ``ABx``, shape ``(…, out)``, before the scale.
        base: Output ``W_res x``, shape ``(…, out)``, with a bias where it has one of its own.
        scale: What ``up``'s output is multiplied by.
        down_matrix: Gives the matrix from ``x`` to ``Bx``, shape ``(r, in)``, float64, where its weight lies.
        base_matrix: Gives ``W_res`` or its transpose; None where it is quantised and cannot be had as numbers.
        has_bias: Whether the layer's output holds a bias on top of the two parts.
        update: Of a DoRA layer, or one that was trained whole, the module whose output is all that it changes,
            ``layer(x) - base(x)``.
        start: What it was before training, where that held a part of W and is known; its update is then what changed
            since, and ``W x`` what that is added to.
        effective_rank: Of an update that is a whole matrix, gives its effective rank; B has as many rows as were asked
            for then, or none.
        joined: Within this context a function makes the layer's output, before a bias of the layer's own, of what its
            two parts gave; None where the layer does more than add them.
    """

    name: str
    layer: nn.Module
    down: nn.Module
    up: nn.Module
    base: nn.Module
    scale: float
    down_matrix: Callable[[], Tensor]
    base_matrix: Callable[[], Tensor | None]
    has_bias: bool
    update: nn.Module | None = None
    start: Start | None = None
    effective_rank: Callable[[], float] | None = None
    joined: Callable[[Join], AbstractContextManager[None]] | None = None

    @property
    def out_features(self) -> int:
        """Width of the layer's output."""
        return self._shape(self.up)[0]

    @property
    def rank(self) -> int:
        """Width between the two projections."""
        return self._shape(self.up)[1]

    @property
    def in_features(self) -> int:
        """Width of the layer's input."""
        return self._shape(self.down)[1]

    @property
    def up_matrix(self) -> Tensor:
        """A as the model holds it, shape ``(out, r)``."""
        return stored(self.up, "weight")

    @property
    def is_whole(self) -> bool:
        """Whether its update is a whole matrix, that is not A B."""
        return self.effective_rank is not None

    def weight_norms(self, exact: bool = False) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The Frobenius norms of B, of A with its scale and, where it can be had, of W_res, summed in float64.

        They are left where the weights lie, which nobody waits for: so outside float32's range they must be asked for
        again, as ``exact`` ones, unless that is a CPU. Of an update that is a whole matrix its own stands for that of
        A, and B may be none.
        """
        down, base = stored(self.down, "weight"), self.base_matrix()
        whole = stored(self.update, "weight") if self.is_whole and self.update is not None else None
        up = abs(self.scale) * _frobenius(self.up_matrix if whole is None else whole, exact)
        return _frobenius(down, exact) if self.rank else None, up, None if base is None else _frobenius(base, exact)

    @staticmethod
    def _shape(linear: nn.Module) -> torch.Size:
        weight = linear.weight
        assert isinstance(weight, Tensor)
        return weight.shape


def _frobenius(matrix: Tensor, exact: bool) -> Tensor:
    matrix = matrix.detach()
    rows = exact_row_norms(matrix) if exact or at_hand(matrix.device) else row_norms(matrix)
    return _vector_norm(rows, dtype=torch.float64)


@dataclass(frozen=True)
class AdaptedModel:
    """A model ready for the measuring pass, in eval mode.

    Attributes:
        model: The whole model; takes ``input_ids``.
        layers: Its adapted layers by name.
        device: Where its inputs go.
        take_off: Frees the base model for the next adapter, after which this one can no longer be used.
        switched_off: Within this context the model is its base; None where it would not be without its adapter.
        kind: Its class and where that comes from, in words.
        remarks: What was done to fit adapter and base, in sentences.
        since: The start against which its update is told, where that held a part of W.
        without_grad: Within this context nothing is kept for a backward pass.
        base_name: What it is where it is switched off, in words.
        shelf: Where the numbers of its blocks lie, where they are brought one block at a time; tokens then go to the
            CPU, and ``device`` is where blocks run.
    """

    model: nn.Module
    layers: Mapping[str, AdaptedLayer]
    device: torch.device
    take_off: Callable[[], object] = lambda: None
    switched_off: Callable[[], AbstractContextManager[nn.Module]] | None = None
    kind: str = ""
    remarks: tuple[str, ...] = ()
    since: str = ""
    without_grad: Callable[[], AbstractContextManager[object]] = torch.inference_mode
    base_name: str = "the model with its adapter switched off"
    shelf: Shelf | None = None

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model reads text on two sides."""
        return is_encoder_decoder(self.model)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether ``model`` reads text on two sides."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
