"""A PEFT adapter on its base model: PEFT's own layers and arithmetic, with every tensor proved to have its place.

PEFT itself only warns about tensors that match nothing; here that is an error, for the base would be measured.
"""

import re
from collections.abc import Collection, Hashable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.arrays import read_tensor
from pytest_nullspace.checkpoint.header import printable, stamps
from pytest_nullspace.checkpoint.patterns import require_quick
from pytest_nullspace.checkpoint.peft import FIELDS
from pytest_nullspace.errors import CheckpointError, some
from pytest_nullspace.model.absent import not_whole, told_behind
from pytest_nullspace.model.bases import load_base, shelve_base
from pytest_nullspace.model.ends import ends_of
from pytest_nullspace.model.kinds import Kind, kind_of, reading
from pytest_nullspace.model.layers import AdaptedModel
from pytest_nullspace.model.matching import require_blocks, require_changed, require_scales, require_targets
from pytest_nullspace.model.names import OLDER, are_older, placed
from pytest_nullspace.model.shelf import Shelf, UnfitError
from pytest_nullspace.model.shelved import shelved
from pytest_nullspace.model.sizes import require_rows
from pytest_nullspace.model.views import view


def load(
    checkpoint: Checkpoint,
    base: Path,
    device: torch.device,
    dtype: torch.dtype,
    bases: MutableMapping[Hashable, nn.Module],
    *,
    shelve: bool = False,
) -> AdaptedModel:
    """Load the base model from ``base``, or take it from ``bases``, and put the adapter on it.

    Where it is to ``shelve`` the base's blocks they stay in their files, and what is loaded is on the CPU.

    Raises:
        UnfitError: They cannot be left there.
        CheckpointError: The base cannot be loaded, or adapter and base do not match, tensor by tensor.
    """
    key, kind, model, absent, shelf = _base(checkpoint, base, device, dtype, bases, shelve)
    where = device if shelf is None else torch.device("cpu")
    untouched = _Untouched(model)
    # What is off is left out: an older PEFT does not know every field.
    fields = {key: value for key in FIELDS if (value := checkpoint.config.get(key)) is not None and value is not False}
    require_quick(checkpoint.config, [name for name, _ in model.named_modules()], checkpoint.config_file)
    try:
        wrapped: Any = get_peft_model(model, LoraConfig(**fields))
    except Exception as error:  # PEFT raises many kinds for a config that does not fit the model
        strange = {spec.name for spec in checkpoint.layers} - {name for name, _ in model.named_modules()}
        cure = "write back what it was trained with, or give the base that it was trained on by --nullspace-base=DIR"
        cure = OLDER if are_older(model, strange) else cure
        raise CheckpointError(
            f"{checkpoint.config_file}: PEFT cannot put this adapter on the base model {base}: "
            f"{printable(error, 300)}; {cure}"
        ) from error
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    at = placed(wrapped, checkpoint)
    require_targets(checkpoint, base, found, model, at)
    require_blocks(checkpoint, base, model, set(at.layers.values()))
    _fill(wrapped, checkpoint, base)
    is_written = untouched.is_written()
    model.to(where).eval()
    require_rows(model, kind.fitted, checkpoint)
    views = {name: view(name, found[place], *found[place].lora_A) for name, place in at.layers.items()}
    views = views if shelf is None else shelved(views, shelf)
    behind = told_behind(model, absent, [layer.layer for layer in views.values()], base)
    if at.remarks:
        require_scales(checkpoint, views)
    if checkpoint.changed_base is not None:
        require_changed(checkpoint, base, views.values())
    read = reading(model)

    def take_off() -> None:
        wrapped.unload()
        if shelf is None and untouched.restored() and not absent:
            bases[key] = model

    @contextmanager
    def switched_off() -> Iterator[nn.Module]:
        with wrapped.disable_adapter():
            yield read

    # What was written into the base's own tensors stays on, and an initialisation that changed the base is not undone.
    # Nor is a vocabulary that was resized the base's.
    whole = checkpoint.changed_base is None and not is_written and kind.fitted.vocabulary is None and not absent
    told, remarks = f"{kind.build.__name__}, {kind.why}", kind.fitted.remarks + at.remarks + behind
    off = switched_off if whole else None
    return AdaptedModel(read, views, device, take_off, off, told, remarks, shelf=shelf)


class _Base(NamedTuple):
    """A base model: by which it is known again, as what it was built, its random weights, and its shelf if any."""

    key: Hashable
    kind: Kind
    model: nn.Module
    absent: tuple[str, ...]
    shelf: Shelf | None


def _base(
    checkpoint: Checkpoint,
    base: Path,
    device: torch.device,
    dtype: torch.dtype,
    bases: MutableMapping[Hashable, nn.Module],
    shelve: bool,
) -> _Base:
    kind = kind_of(checkpoint, base)
    replaced = tuple(checkpoint.config.get("modules_to_save") or ())
    key = base.resolve(), stamps(base), device, dtype, kind.build, kind.fitted, replaced
    if shelve:
        if checkpoint.outside or checkpoint.changed_base is not None:
            raise UnfitError("its adapter is more than A B beside its base")
        bases.clear()
        model, shelf = shelve_base(kind, base, device, dtype)
        return _Base(key, kind, model, (), shelf)
    kept, absent = bases.pop(key, None), tuple[str, ...]()
    if kept is not None:
        return _Base(key, kind, kept, absent, None)
    bases.clear()  # of the bases one is in memory at a time
    model, absent = load_base(kind, base, dtype, replaced)
    model.to(device)
    return _Base(key, kind, model, absent, None)


def load_plain(base: Path, device: torch.device, dtype: torch.dtype, adapter: Checkpoint | None) -> nn.Module:
    """A whole causal language model from ``base``, or one of ``adapter``'s class, without any adapter, in eval mode.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    kind = kind_of(adapter, base)
    of_adapter, kind = kind.fitted.vocabulary, replace(kind, fitted=replace(kind.fitted, vocabulary=None))
    loaded, absent = load_base(kind, base, dtype)
    if absent:
        raise not_whole(loaded, absent, base)
    model: Any = reading(loaded.to(device).eval())
    if adapter is not None and of_adapter is not None and of_adapter < ends_of(model).known:
        raise CheckpointError(
            f"{adapter.directory}: its vocabulary is smaller than that of the base {base}, so their predictions "
            "cannot be compared; leave --nullspace-drift out"
        )
    plain: nn.Module = model
    return plain


class _Untouched:
    """Remembers a base model, to tell whether an adapter that was taken off it left everything as it was.

    Some adapters do not: trained biases, saved embeddings and whatever else in the file is named as a tensor of the
    base is written into the base's own, and PEFT leaves the adapter's whole modules in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules, self._tensors = self._now()
        self._kept = [*model.parameters(), *model.buffers()]  # alive, so that no other tensor gets the id of one
        self._versions = list(map(_version, self._kept))

    def is_written(self) -> bool:
        """Whether a tensor that is the base's own was written to, so that it is not the base without its adapter."""
        return list(map(_version, self._kept)) != self._versions

    def restored(self) -> bool:
        """Put back modules that are not the base's own; whether they then hold the same tensors, none written to."""
        for name, (module, _) in self._modules.items():
            if name and self._model.get_submodule(name) is not module:
                self._model.set_submodule(name, module)
        modules, tensors = self._now()
        return modules == self._modules and tensors == self._tensors

    def _now(self) -> tuple[dict[str, tuple[nn.Module, int]], dict[str, tuple[int, int]]]:
        model = self._model
        modules = {
            name: (module, len(module._forward_hooks) + len(module._forward_pre_hooks))
            for name, module in model.named_modules(remove_duplicate=False)
        }
        tensors = {
            name: (id(tensor), _version(tensor))
            for name, tensor in (
                *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
            )
        }  # fmt: skip
        return modules, tensors


def _version(tensor: Tensor) -> int:
    """How often it was written to; an inference tensor does not tell."""
    return -1 if tensor.is_inference() else tensor._version


def _fill(wrapped: Any, checkpoint: Checkpoint, base: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        of_file = {name: info for name, info in checkpoint.tensors.items() if info.file == file}
        if all(info.data_at is not None for info in of_file.values()):  # no safetensors
            tensors |= {name: torch.from_numpy(read_tensor(info)) for name, info in of_file.items()}
            continue
        try:
            held = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: the weights cannot be read: {error}; save or download them again") from None
        for name, info in of_file.items():
            tensor = held[info.stored or name]
            tensors[name] = tensor.mT.contiguous() if info.transposed else tensor
    _drop_copies(tensors, wrapped)
    try:
        result = set_peft_model_state_dict(wrapped, tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.directory}: the adapter does not fit the base model {base}: "
            f"{_misfit(wrapped, tensors) or printable(error, 1000)}; give the base that it was trained on by "
            "--nullspace-base=DIR"
        ) from None
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.directory}: its config says that {printable(error.args[0])} was trained, but the adapter "
            "does not hold it; save the adapter again"
        ) from None
    lost = _lost_biases(wrapped, tensors)
    if lost and checkpoint.config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{checkpoint.directory}: its config says that biases were trained, but the adapter does not hold "
            f"{some(lost)}; save the adapter again"
        )
    if result.unexpected_keys:
        raise CheckpointError(
            f"{checkpoint.directory}: {some(result.unexpected_keys)} have no place in the base model {base}, so PEFT "
            "would leave them out; give the base that it was trained on by --nullspace-base=DIR, or save the adapter "
            "again"
        )


def _drop_copies(tensors: dict[str, Tensor], wrapped: Any) -> None:
    """Drop what PEFT writes twice of a vocabulary that was resized, and reads once: whole modules, tokens of a head."""
    modules, tokens = dict(wrapped.named_modules()), ".trainable_tokens_delta"
    for name in [name for name in tensors if ".modules_to_save." in name or name.endswith(tokens)]:
        copies = [tensors.get(name.replace(".modules_to_save.", "."))]
        if name.endswith(tokens):
            is_tied = getattr(modules.get(name.removesuffix(tokens)), "tied_adapter", None) is not None
            copies = [
                tensor for other, tensor in tensors.items() if is_tied and other != name and other.endswith(tokens)
            ]
        if any(copy is not None and copy.equal(tensors[name]) for copy in copies):
            del tensors[name]


def _misfit(wrapped: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor whose place in the model has another shape, in words."""
    places = {
        re.sub(r"\.(modules_to_save\.)?default(?=\.|$)", "", name): list(place.shape)
        for name, place in wrapped.state_dict().items()
    }
    wrong = [name for name, tensor in tensors.items() if places.get(name, list(tensor.shape)) != list(tensor.shape)]
    if not wrong:
        return None
    name = min(wrong)
    more = f", one of {len(wrong)}" if len(wrong) > 1 else ""
    return f"its tensor {printable(name)} is {list(tensors[name].shape)}, and the base would take {places[name]}{more}"


def _lost_biases(wrapped: Any, tensors: Collection[str]) -> list[str]:
    """The biases of the base that training may move and that ``tensors`` do not hold."""
    return [
        name
        for name, parameter in wrapped.named_parameters()
        if name.endswith(".bias")
        and parameter.requires_grad
        and not re.search(r"\.(lora_\w+|modules_to_save)\.", name)
        and name not in tensors
    ]
