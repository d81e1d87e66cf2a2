"""PEFT's own layers as the measuring pass sees them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor

from pytest_nullspace.model.layers import AdaptedLayer, Join
from pytest_nullspace.model.stored import stored, weight_of

_OF_ADAPTERS = frozenset({"adapter_names", "alora_offsets"})
"""Arguments of a forward that PEFT takes for itself; it gives its base layer all others."""


def view(name: str, layer: Any, adapter: str) -> AdaptedLayer:
    """One layer of PEFT's under one of its adapters."""
    down, base = layer.lora_A[adapter], layer.get_base_layer()
    return AdaptedLayer(
        name=name,
        layer=layer,
        down=down,
        up=layer.lora_B[adapter],
        base=base,
        scale=float(layer.scaling[adapter]),
        down_matrix=lambda: stored(down, "weight").double(),
        base_matrix=lambda: weight_of(base, {layer.in_features, layer.out_features}),
        has_bias=getattr(base, "bias", None) is not None,
        update=layer.lora_magnitude_vector[adapter] if layer.use_dora.get(adapter) else None,
        joined=_joined(layer, adapter),
    )


def _joined(layer: Any, adapter: str) -> Callable[[Join], AbstractContextManager[None]] | None:
    """What `AdaptedLayer.joined` is of a layer that is a plain linear one of PEFT's and does no more than add; or None.

    The forward that stands in for its own calls the same modules, in the same order and types.
    """
    if type(layer) is not Linear or adapter in layer.lora_variant:
        return None

    @contextmanager
    def joined(join: Join) -> Iterator[None]:
        own = layer.forward

        def forward(x: Tensor, *args: Any, **more: Any) -> Tensor:
            is_other = layer.disable_adapters or layer.merged or layer.active_adapters != [adapter]
            if is_other or not _OF_ADAPTERS.isdisjoint(more):
                result: Tensor = own(x, *args, **more)
                return result
            base = layer.base_layer(x, *args, **more)
            down = layer.lora_A[adapter]
            x = layer.lora_dropout[adapter](layer._cast_input_dtype(x, down.weight.dtype))
            return join(base, layer.lora_B[adapter](down(x)), layer.scaling[adapter])

        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward

    return joined
