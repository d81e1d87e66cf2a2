"""Weights from safetensors files straight into a model's parameters: each tensor used, each parameter filled."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pytest_nullspace.checkpoint.header import TensorInfo, printable
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.shelf import Shelf

_SHOWN = 5
WHOLE_NUMBERS = frozenset({"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
"""Types of tensors that are no weights as they are computed with: what quantised ones mean is told elsewhere."""


def fill(
    model: nn.Module,
    tensors: Mapping[str, TensorInfo],
    device: torch.device,
    dtype: torch.dtype,
    shelf: Shelf | None = None,
) -> None:
    """Put every tensor into the parameter of its name; tied parameters share one.

    Where device and dtype are those of the file, the parameter *is* the memory-mapped file.

    Args:
        model: Built on the meta device, buffers excepted.
        tensors: By the name of the parameter or persistent buffer that they fill.
        device: Where the model shall be.
        dtype: To what floating point weights are converted.
        shelf: Takes those of its blocks that are not tied.

    Raises:
        CheckpointError: A tensor has no parameter or not its shape, or is quantised, a parameter has no tensor, or two
            tensors of one tied parameter differ.
    """
    tie_weights = getattr(model, "tie_weights", None)
    if tie_weights is not None:
        tie_weights()
    places = _places(model)
    known = {name for names in places for name in names}
    unused = sorted(set(tensors) - known)
    empty = sorted(names[0] for names in places if not any(name in tensors for name in names))
    if unused or empty:
        raise CheckpointError(_mismatch(tensors, unused, empty))
    _check_forms(model, tensors)
    files: defaultdict[Path, list[tuple[str, ...]]] = defaultdict(list)
    for names in places:
        if shelf is not None and len(names) == 1 and shelf.takes(model, names[0], tensors[names[0]]):
            continue
        files[next(tensors[name].file for name in names if name in tensors)].append(names)
    for file, held in files.items():
        _fill_from(file, model, held, tensors, device, dtype)
    for name, buffer in model.named_buffers():
        if buffer.device != device:
            _put(model, name, buffer.to(device))


def _places(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of each distinct parameter or persistent buffer; several where it is tied."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for name, value in model.state_dict(keep_vars=True).items():
        groups[id(value)].append(name)
    return [tuple(names) for names in groups.values()]


def _mismatch(tensors: Mapping[str, TensorInfo], unused: list[str], empty: list[str]) -> str:
    where = next(iter(tensors.values())).file.parent
    parts = [
        f"{len(names)} {what}: {', '.join(map(printable, names[:_SHOWN]))}{' …' if len(names) > _SHOWN else ''}"
        for what, names in (("tensors that the model has no place for", unused), ("parameters without a tensor", empty))
        if names
    ]
    return (
        f"{where}: the weights are not those of the model that config.json describes: {'; '.join(parts)}; copy both "
        "from one save"
    )


def misshapen(info: TensorInfo, shape: Iterable[int]) -> str:
    """That a tensor has another shape than its model's config gives it."""
    return (
        f"{info.file}: tensor {printable(info.name)} has shape {list(info.shape)}, but config.json makes it "
        f"{list(shape)}"
    )


def _check_forms(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> None:
    for name, value in model.state_dict(keep_vars=True).items():
        if name in tensors and tensors[name].shape != tuple(value.shape):
            raise CheckpointError(f"{misshapen(tensors[name], value.shape)}; copy both from one save")
        if name in tensors and tensors[name].dtype in WHOLE_NUMBERS and value.is_floating_point():
            raise CheckpointError(
                f"{tensors[name].file}: tensor {printable(tensors[name].name)} is {tensors[name].dtype}, quantised, "
                "and nothing says how it is computed with; save it in 16 or 32 bits"
            )


def _fill_from(
    file: Path,
    model: nn.Module,
    places: list[tuple[str, ...]],
    tensors: Mapping[str, TensorInfo],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for names in places:
                filled = [name for name in names if name in tensors]
                value = _read(stored, tensors[filled[0]], dtype)
                for other in filled[1:]:
                    _check_tied(file, filled[0], other, value, _read_alone(tensors[other], device, dtype))
                shared = nn.Parameter(value, requires_grad=False)
                for name in names:
                    _put(model, name, shared)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: the weights cannot be read: {printable(error, 300)}; save or download them again"
        ) from None


def _read(stored: safe_open, info: TensorInfo, dtype: torch.dtype) -> Tensor:
    value: Tensor = stored.get_tensor(info.name)  # type: ignore[no-untyped-call]
    return value.to(dtype) if value.is_floating_point() else value


def _read_alone(info: TensorInfo, device: torch.device, dtype: torch.dtype) -> Tensor:
    with safe_open(info.file, framework="pt", device=str(device)) as stored:
        return _read(stored, info, dtype)


def _check_tied(file: Path, first: str, second: str, value: Tensor, other: Tensor) -> None:
    if not torch.equal(value, other):
        raise CheckpointError(
            f"{file}: config.json ties {first} and {second}, but their tensors differ; set "
            "tie_word_embeddings to false if they were trained apart"
        )


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    current = getattr(owner, attribute)
    if isinstance(current, nn.Parameter):
        owner.register_parameter(
            attribute, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )
    else:
        owner.register_buffer(attribute, value.detach(), persistent=attribute not in owner._non_persistent_buffers_set)
