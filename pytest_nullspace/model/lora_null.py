"""The plain architecture of a LoRA-Null directory, rebuilt with its adapted layers in their places.

The directory's Python files are never imported: its config names a plain architecture that transformers itself has,
and its tensors say which linear layers were replaced.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.arrays import ORTHONORMAL
from pytest_nullspace.checkpoint.header import TensorInfo, printable, quoted
from pytest_nullspace.checkpoint.lora_null import BIAS, PROTECT_DOWN
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.bounds import LEADS_TO_CODE, check_counts, held_to, without
from pytest_nullspace.model.known import require_known
from pytest_nullspace.model.layers import AdaptedLayer, AdaptedModel, Join
from pytest_nullspace.model.light import Light, lighten
from pytest_nullspace.model.shelf import Shelf, stack_of
from pytest_nullspace.model.shelved import shelved
from pytest_nullspace.model.stored import stored
from pytest_nullspace.model.weights import fill

_NOT_ARCHITECTURE = LEADS_TO_CODE | {
    "architectures", "lora_r", "quantization_config", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "num_labels", "id2label", "label2id",
}  # fmt: skip
"""What leads to code, to other weights, to a dtype of its own or to endless lists of labels; none of it shapes the
plain architecture."""


class _Linear(Light, nn.Linear):
    """A linear layer whose weight comes from a file: it is never filled with random numbers before."""

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class AdaptedLinear(Light):
    """``y = A B x + W_res x [+ bias]``, with ``x − P_A P_B x`` in place of B's input in the protecting variant.

    The names of its parameters are those in the files.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool, protected: int | None) -> None:
        super().__init__()
        self.BLinear = _Linear(in_features, rank, bias=False)
        self.ALinear = _Linear(rank, out_features, bias=False)
        self.residual = _Linear(in_features, out_features, bias=False)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.PBLinear = None if protected is None else _Linear(in_features, protected, bias=False)
        self.PALinear = None if protected is None else _Linear(protected, in_features, bias=False)
        self.is_on = True
        self.join: Join | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x``, shape ``(…, in)``; returns ``(…, out)``."""
        kept = x if self.PALinear is None or self.PBLinear is None else x - self.PALinear(self.PBLinear(x))
        y: Tensor = self.residual(x)
        if self.is_on:
            update: Tensor = self.ALinear(self.BLinear(kept))
            y = y + update if self.join is None else self.join(y, update, 1.0)
        return y if self.bias is None else y.add_(self.bias)

    @contextmanager
    def joined(self, join: Join) -> Iterator[None]:
        """Within this context ``join`` puts the two parts together."""
        self.join = join
        try:
            yield
        finally:
            self.join = None

    def down_matrix(self) -> Tensor:
        """The matrix from ``x`` to ``Bx``, shape ``(r, in)``, float64, where B lies."""
        down = stored(self.BLinear, "weight").double()
        if self.PALinear is None or self.PBLinear is None:
            return down
        protect_up = stored(self.PALinear, "weight").to(down)
        protect_down = stored(self.PBLinear, "weight").to(down)
        return down - (down @ protect_up) @ protect_down


_PARAMETER_OF = {"weight_residual": "residual.weight", BIAS: "bias"}
"""Names in the files that differ from the names in `AdaptedLinear`."""


def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, shelve: bool = False) -> AdaptedModel:
    """Rebuild the checkpoint's model on ``device``, or on the CPU with its blocks left in their files for it.

    Raises:
        CheckpointError: The architecture is unknown or does not have the checkpoint's layers, a tensor has no place,
            or a parameter has no tensor.
    """
    model = _plain_model(checkpoint, dtype)
    for spec in checkpoint.layers:
        protect = checkpoint.tensors.get(f"{spec.name}.{PROTECT_DOWN}")
        adapted = _empty(
            AdaptedLinear,
            spec.in_features,
            spec.out_features,
            spec.rank,
            bias=f"{spec.name}.{BIAS}" in checkpoint.tensors,
            protected=None if protect is None else protect.shape[0],
        )
        _replace(model, spec.name, adapted, checkpoint)
    tensors = _by_parameter(checkpoint)
    shelf = Shelf(stack_of(model), device, dtype) if shelve else None
    fill(model, tensors, torch.device("cpu") if shelve else device, dtype, shelf)
    modules = {spec.name: _adapted(model, spec.name) for spec in checkpoint.layers}

    @contextmanager
    def switched_off() -> Iterator[nn.Module]:
        for module in modules.values():
            module.is_on = False
        try:
            yield model
        finally:
            for module in modules.values():
                module.is_on = True

    layers = {name: _view(module, name) for name, module in modules.items()}
    if shelf is not None:
        layers = shelved(layers, shelf)
    downs = (
        module.BLinear.weight if shelf is None else shelf.taken(tensors[f"{name}.BLinear.weight"])
        for name, module in modules.items()
    )
    # Orthonormal rows are those of v2, which leaves W_res = W; v1 and CorDA take the adapter's start out of it.
    off = switched_off if all(map(_is_orthonormal, downs)) else None
    if shelf is not None:
        shelf.close()
    return AdaptedModel(model.eval(), layers, device, switched_off=off, shelf=shelf)


def _is_orthonormal(down: Tensor) -> bool:
    down = down.detach().to("cpu", torch.float64)
    off = down @ down.mT - torch.eye(len(down), dtype=torch.float64)
    return bool(off.abs().max() <= ORTHONORMAL)


def _plain_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    model_type = checkpoint.config["model_type"]
    try:
        require_known(checkpoint.config, checkpoint.config_file)
        fields = without(_NOT_ARCHITECTURE, checkpoint.config)
        del fields["model_type"]
        check_counts(fields, checkpoint.config_file)
        config = AutoConfig.for_model(model_type, **fields)
        # First without memory, buffers included: the config is a stranger's, and can ask for any size.
        with held_to(checkpoint.tensors.values(), checkpoint.config_file), torch.device("meta"):
            AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises many kinds for a config that it cannot build from
        raise CheckpointError(
            f"{checkpoint.config_file}: transformers cannot build a causal {quoted(model_type)} model from it: "
            f"{printable(error, 300)}; give the config that was saved with the weights"
        ) from error
    return model


def _empty(kind: type[AdaptedLinear], *args: int, bias: bool, protected: int | None) -> AdaptedLinear:
    with torch.device("meta"):
        adapted = kind(*args, bias=bias, protected=protected)
    lighten(adapted)
    return adapted


def _replace(model: nn.Module, name: str, adapted: AdaptedLinear, checkpoint: Checkpoint) -> None:
    try:
        original = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"{checkpoint.directory}: the weights adapt {name}, but a {checkpoint.config['model_type']} model of this "
            "config has no such layer; config.json and the weights are of different models"
        ) from None
    if not isinstance(original, nn.Linear):
        raise CheckpointError(f"{checkpoint.directory}: {name} is a {type(original).__name__}, not a linear layer")
    shape = (adapted.residual.out_features, adapted.residual.in_features)
    if tuple(original.weight.shape) != shape:
        raise CheckpointError(
            f"{checkpoint.directory}: {name} is {shape} in the weights, {tuple(original.weight.shape)} by config.json"
        )
    if original.bias is not None and adapted.bias is None:
        raise CheckpointError(
            f"{checkpoint.directory}: {name} has a bias by config.json, but there is no {name}.{BIAS}"
        )
    model.set_submodule(name, adapted)


def _by_parameter(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        parameter = _parameter_of(name)
        if parameter in tensors:
            raise CheckpointError(
                f"{checkpoint.directory}: tensors {printable(tensors[parameter].name)} and {printable(name)} are for "
                "the same parameter"
            )
        tensors[parameter] = info
    return tensors


def _parameter_of(name: str) -> str:
    for part, parameter in _PARAMETER_OF.items():
        if name.endswith(f".{part}"):
            return name.removesuffix(part) + parameter
    return name


def _adapted(model: nn.Module, name: str) -> AdaptedLinear:
    adapted = model.get_submodule(name)
    assert isinstance(adapted, AdaptedLinear)
    return adapted


def _view(adapted: AdaptedLinear, name: str) -> AdaptedLayer:
    return AdaptedLayer(
        name=name,
        layer=adapted,
        down=adapted.BLinear,
        up=adapted.ALinear,
        base=adapted.residual,
        scale=1.0,
        down_matrix=adapted.down_matrix,
        base_matrix=lambda: stored(adapted.residual, "weight"),
        has_bias=adapted.bias is not None,
        joined=adapted.joined,
    )
