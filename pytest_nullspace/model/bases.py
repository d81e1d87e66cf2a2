"""The base model of an adapter, the whole of it loaded, or its blocks left in their files."""

import copy
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig

from pytest_nullspace.checkpoint import gguf
from pytest_nullspace.checkpoint.header import TensorInfo, printable, quoted, read_tensors
from pytest_nullspace.checkpoint.hub import tensors_of
from pytest_nullspace.checkpoint.strangers import require_unwrapped
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.bounds import held_to
from pytest_nullspace.model.kinds import Kind, runs
from pytest_nullspace.model.known import own_code, quantiser, told_of
from pytest_nullspace.model.shelf import Shelf, UnfitError, stack_of
from pytest_nullspace.model.sizes import NOT_FITTED, resize
from pytest_nullspace.model.weights import WHOLE_NUMBERS, fill, misshapen

_MISFIT = ("ignore_mismatched_sizes", "size mismatch for ")
"""What the error says for a tensor of another shape: that of transformers, and before 5.0 that of torch."""


def load_base(
    kind: Kind, base: Path, dtype: torch.dtype, replaced: Collection[str] = ()
) -> tuple[nn.Module, tuple[str, ...]]:
    """The base model, on the CPU, and the names of its weights that ``base`` does not hold, which are random.

    Args:
        kind: As what it is built.
        base: Its directory or GGUF file.
        dtype: In which precision.
        replaced: The names of modules that need no weights, for the adapter brings them.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    with told_of(base):
        config, tensors, how = _from_gguf(base) if base.is_file() else _from_directory(kind, base)
        with _misfit_named(kind, base, tensors), held_to(tensors, base if base.is_file() else base / "config.json"):
            model, report = _loading(kind.build)(
                str(base.parent if base.is_file() else base),
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=kind.fitted.labels is not None,
                **how,
            )
            resize(model, kind.fitted)
    # Before 5.0 these are names alone, which now come with both shapes.
    mismatched = [of if isinstance(of, str) else of[0] for of in report["mismatched_keys"]]
    missing = sorted(report["missing_keys"])
    wrong = [key for key in (*missing, *mismatched) if not any(part in replaced for part in key.split("."))]
    assert isinstance(model, nn.Module)
    return model, tuple(wrong)


@contextmanager
def _misfit_named(kind: Kind, base: Path, tensors: Collection[TensorInfo]) -> Iterator[None]:
    """Name the tensor of another shape than the config's, which transformers only prints."""
    try:
        yield
    except RuntimeError as error:
        if kind.config is None or not any(said in str(error) for said in _MISFIT):
            raise
        places = {name: tuple(value.shape) for name, value in kind.empty().state_dict().items()}
        wrong = next((of for of in tensors if places.get(of.name, of.shape) != of.shape), None)
        if wrong is None:
            raise
        raise CheckpointError(
            f"{misshapen(wrong, places[wrong.name])}{own_code(base)}; copy both from one save, or give another base by "
            "--nullspace-base=DIR"
        ) from error


def shelve_base(kind: Kind, base: Path, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Shelf]:
    """The base model on the CPU, the numbers of its blocks left in their files.

    Raises:
        UnfitError: What lies there is not the numbers of this model one for one.
        CheckpointError: It cannot be loaded.
    """
    if base.is_file() or quantiser(base) is not None or kind.fitted != NOT_FITTED:
        raise UnfitError("its base is quantised, a GGUF file, or of other sizes than the adapter")
    if not runs(kind.build):
        raise UnfitError("its base only generates, and a part of it runs")
    with told_of(base):
        with held_to(tensors_of(base), base / "config.json"), init_empty_weights(include_buffers=False):
            model = kind.build._from_config(copy.deepcopy(kind.config), dtype=dtype)
        own, needless = model.state_dict().keys(), model._keys_to_ignore_on_load_unexpected or ()
        tensors = {
            name: info
            for name, info in read_tensors(base, "model").items()
            if name in own or not any(re.search(of, name) for of in needless)
        }
        kept = (model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict)
        if _converts(model, tensors) or (dtype != torch.float32 and any(kept)):
            raise UnfitError("its weights are not computed with as they lie in the files")
        shelf = Shelf(stack_of(model), device, dtype)
        try:
            fill(model, tensors, torch.device("cpu"), dtype, shelf)
        except CheckpointError as error:
            raise UnfitError(f"its files do not hold its weights one for one ({printable(error, 300)})") from None
    return model.eval(), shelf


def _converts(model: nn.Module, names: Collection[str]) -> bool:
    """Whether transformers makes weights of other weights as it loads this model; a name alone it may change."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # it did not, once
        return False
    converters = [of for of in get_model_conversion_mapping(model) if isinstance(of, WeightConverter)]
    return any(of.rename_source_key(name)[1] is not None for of in converters for name in names)


def _loading(build: Any) -> Any:
    """How a class loads a model: as all do, past what some do beside, who would open a pickle, or meet our pair."""
    if not issubclass(build, transformers.PreTrainedModel):  # of a GGUF file, which says itself what it is
        return build.from_pretrained
    return MethodType(vars(transformers.PreTrainedModel)["from_pretrained"].__func__, build)


def _from_directory(kind: Kind, base: Path) -> tuple[Any, list[TensorInfo], dict[str, Any]]:
    """A saved base's config, its tensors, and what else ``from_pretrained`` is told."""
    tensors = tensors_of(base)
    require_unwrapped(base, (tensor.name for tensor in tensors))
    if quantiser(base) is None and (of := next(filter(_is_quantised, tensors), None)) is not None:
        raise CheckpointError(
            f"{of.file}: tensor {quoted(of.name)} ({of.dtype}) is of quantised weights, and config.json has no "
            "quantization_config that says how they are computed with; copy both from one save, or give another base "
            "by --nullspace-base=DIR"
        )
    return kind.config, tensors, {"use_safetensors": True}


def _is_quantised(tensor: TensorInfo) -> bool:
    """Whether it is of weights whose numbers are not those that a plain layer computes with."""
    is_whole = tensor.dtype in WHOLE_NUMBERS and tensor.name.endswith(".weight")
    return is_whole or tensor.name.endswith((".weight_scale", ".weight_scale_inv"))


def _from_gguf(file: Path) -> tuple[Any, list[TensorInfo], dict[str, Any]]:
    """The same of a GGUF file, whose weights are taken out of their blocks: PEFT adapts plain layers."""
    tensors = gguf.read_header(file)
    # Of an absolute path transformers reads this very file, and not one of its name in the current folder.
    how: dict[str, Any] = {"gguf_file": str(file.absolute())}
    config = AutoConfig.from_pretrained(str(file.parent), **how, local_files_only=True, trust_remote_code=False)
    if hasattr(transformers, "GgufConfig"):  # which else fetches kernels from the hub for what it keeps in blocks
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return config, [*tensors.values()], how
