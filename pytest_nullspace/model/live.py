"""A PEFT model in memory: what it would save, its layers where they run, and all of it left as it was.

What is measured is the module tree that is there, in its precision and on its devices. The adapter's own tensors are
written as PEFT saves them, so that they are read, refused and judged as those of any saved adapter.
"""

import copy
import math
import random
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.checkpoint.fields import require_lora
from pytest_nullspace.checkpoint.header import read_json_object
from pytest_nullspace.checkpoint.hub import at_hand
from pytest_nullspace.checkpoint.peft import CONFIG_FILE, PREFIX, writes_into_base
from pytest_nullspace.errors import CheckpointError, OptionError, first_line, printable, some
from pytest_nullspace.model import device_named
from pytest_nullspace.model.kinds import reading
from pytest_nullspace.model.layers import AdaptedModel
from pytest_nullspace.model.matching import require_changed
from pytest_nullspace.model.views import view

SMALL = 1 << 20
"""Numbers of the largest buffer of which a copy is kept: what a forward writes into is smaller."""
_ADAPTABLE = LoraLayer, nn.Linear, Conv1D
_WITHIN = re.compile(r"(^|\.)(base_layer|lora_\w+)(\.|$)")
"""In the names of what PEFT puts into a layer."""
_AROUND = ("_orig_mod", "module")
"""What a compiled model, and one that is spread by copies, call the model within."""


def peft_model(model: object) -> PeftModel:
    """The PEFT model that was given, taken out of what training wrapped around it.

    Raises:
        OptionError: It is none.
    """
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, PeftModel):
        inner = next((part for name in _AROUND if (part := inner._modules.get(name)) is not None), None)
    if not isinstance(inner, PeftModel):
        raise OptionError(
            f"gate: takes an adapter's directory or a peft.PeftModel, not a {type(model).__name__}; give what "
            "get_peft_model or PeftModel.from_pretrained returned"
        )
    base = inner.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise OptionError(
            f"gate: the adapter's base is a {type(base).__name__}, no model of transformers; no other is gated"
        )
    return inner


def saved(model: PeftModel, folder: Path) -> Checkpoint:
    """The active adapter of ``model`` as a checkpoint, whose files are written into ``folder``.

    Raises:
        CheckpointError: It cannot be saved so that the saved adapter would be the same model, or is of no kind that is
            gated.
    """
    adapter = _active(model)
    name = Path(f"PeftModel '{printable(adapter)}'")
    _require_whole(model, adapter, name)
    # Before its tensors are asked for, which not every kind can tell.
    require_lora({"peft_type": getattr(model.peft_config[adapter].peft_type, "value", None)}, (), name / CONFIG_FILE)
    config = copy.deepcopy(model.peft_config[adapter])
    base = model.get_base_model()
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    config.inference_mode = True
    kind = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    try:
        with warnings.catch_warnings(action="ignore"):
            tensors = get_peft_model_state_dict(
                model, adapter_name=adapter, save_embedding_layers=_whether_embeddings(model, config)
            )
            config.save_pretrained(folder, auto_mapping_dict=kind if config.task_type is None else None)
    except CheckpointError:
        raise
    except Exception as error:  # PEFT raises many kinds
        raise CheckpointError(
            f"{name}: PEFT cannot tell the tensors of its adapter: {first_line(error)}; gate what save_pretrained saves"
        ) from error
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError(
            f"{name}: its adapter was moved off its device; save it, and gate the directory with --nullspace-device-map"
        )
    # One that another shares would be refused.
    save_file({key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), str(name))) from None
    _require_saved(model, tensors, name)
    return replace(checkpoint, directory=name)


@contextmanager
def measured(model: PeftModel, checkpoint: Checkpoint) -> Iterator[AdaptedModel]:
    """Within this context the model can be measured, its active adapter on; afterwards it is as it was.

    That is every attribute of every module and what requires a gradient, also where an error ends the context.

    Args:
        model: The model.
        checkpoint: What it `saved`.

    Raises:
        CheckpointError: Its layers are not those of the checkpoint.
        OptionError: It is on a device on which is not measured.
    """
    adapter, base = _active(model), model.get_base_model()
    read = reading(base)
    device = device_named(_input_device(model, base), "gate: the model's device")
    found = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    lost = [spec.name for spec in checkpoint.layers if spec.name not in found]
    if lost:
        raise CheckpointError(f"{checkpoint.directory}: {some(lost)} are saved under names that the model has not")
    _require_all(model, checkpoint, adapter)
    views = {spec.name: view(spec.name, found[spec.name], adapter) for spec in checkpoint.layers}
    for spec in checkpoint.layers:
        if spec.scale is not None and not math.isclose(spec.scale.value, views[spec.name].scale, rel_tol=1e-6):
            raise CheckpointError(
                f"{checkpoint.directory}: the update of {printable(spec.name)} is scaled by "
                f"{views[spec.name].scale:.6g}, but its config says {spec.scale}, which is saved; put the scale back, "
                "or write it into lora_alpha"
            )
    if checkpoint.changed_base is not None:
        require_changed(checkpoint, "the base in memory", views.values())
    switches = [module for module in base.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]

    def switch(*, off: bool) -> None:
        # PEFT's own way would also set what requires a gradient.
        for module in switches:
            module._disable_adapters = off

    @contextmanager
    def switched_off() -> Iterator[nn.Module]:
        switch(off=True)
        try:
            yield read
        finally:
            switch(off=False)

    with _left_as_it_was(model, device):
        model.eval()
        switch(off=False)
        yield AdaptedModel(
            read,
            views,
            device,
            switched_off=None if checkpoint.changed_base or writes_into_base(checkpoint) else switched_off,
            kind=f"{type(base).__name__}, in memory",
            without_grad=torch.no_grad,  # an inference tensor that a module kept could not be trained on
        )


def _active(model: PeftModel) -> str:
    """The name of the one adapter that is active, which is measured also where it is switched off."""
    names = list(dict.fromkeys(model.active_adapters))
    if len(names) != 1:
        raise CheckpointError(
            f"PeftModel: {len(names)} adapters are active, {some(names, 5)}, which no saved adapter is; choose one by "
            "set_adapter"
        )
    return str(names[0])


def _require_whole(model: PeftModel, adapter: str, name: Path) -> None:
    """Refuse a model whose parts are elsewhere, merged, or not all of one adapter."""
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh"):
            raise CheckpointError(f"{name}: its parameters are spread over several processes; gate what is saved of it")
    for place, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise CheckpointError(f"{name}: its parameters are spread over several processes; gate what is saved of it")
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        if module.merged_adapters:
            raise CheckpointError(
                f"{name}: {some(module.merged_adapters)} is merged into the base at {printable(place)}, where its "
                "update cannot be told from W; call unmerge_adapter first"
            )
        held = {each for part in module.adapter_layer_names for each in getattr(module, part, None) or ()}
        if adapter in held and list(module.active_adapters) != [adapter]:
            raise CheckpointError(
                f"{name}: at {printable(place)} {some(module.active_adapters) or 'no adapter'} is active, elsewhere "
                f"{printable(adapter)}; choose one for all layers by set_adapter"
            )


def _require_saved(model: PeftModel, tensors: dict[str, Tensor], name: Path) -> None:
    """Refuse a model of which more is trained than PEFT saves: the saved adapter would be another one."""
    own = {id(p) for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper) for p in m.parameters()}
    lost = [
        place
        for place, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in place and place not in tensors and id(parameter) not in own
    ]
    if lost:
        raise CheckpointError(
            f"{name}: {some(lost)} may be trained, and are not saved with the adapter, so that the saved one would be "
            "another model; freeze them, or name their modules in modules_to_save"
        )


def _require_all(model: PeftModel, checkpoint: Checkpoint, adapter: str) -> None:
    """Refuse a model in which a layer that is to have the adapter has lost it: the saved one would not load."""
    config = model.peft_config[adapter]
    held = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in checkpoint.tensors}
    lost = [
        name
        for name, module in model.get_base_model().named_modules()
        if name not in held
        and (
            (isinstance(module, LoraLayer) and adapter in module.r)
            or (
                isinstance(module, _ADAPTABLE) and not _WITHIN.search(name) and check_target_module_exists(config, name)
            )
        )
    ]
    if lost:
        raise CheckpointError(
            f"{checkpoint.directory}: target_modules name {some(lost)}, but the adapter holds no weights for them, so "
            "that the saved one would be refused; put them back, or take what they name out of target_modules"
        )


def _whether_embeddings(model: PeftModel, config: Any) -> str | bool:
    """What PEFT is to decide by itself, where it would not ask the hub for it."""
    named = config.base_model_name_or_path
    targets = config.target_modules or ()
    if not named or isinstance(targets, str) or {"embed_tokens", "lm_head"} & {*targets}:
        return "auto"
    folder = at_hand(named, config.revision)
    file = None if folder is None else folder / "config.json"
    if file is None or not file.is_file():
        return False
    known = read_json_object(file, "the base model's config")
    held = getattr(model.config, "vocab_size", None)
    return held is not None and known.get("vocab_size", held) != held


def _input_device(model: PeftModel, base: nn.Module) -> torch.device:
    """Where tokens go; what accelerate keeps elsewhere it brings to its device itself."""
    place = next(iter((getattr(base, "hf_device_map", None) or {}).values()), None)
    held: torch.device = next(model.parameters()).device
    if held.type != "meta":
        return held
    accelerator = torch.accelerator.current_accelerator()
    if isinstance(place, int) and accelerator is not None:
        return torch.device(accelerator.type, place)
    return torch.device("cpu") if place in ("cpu", "disk", None) else torch.device(place)


@contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back whatever is changed within of the modules; nothing is compiled or kept for a gradient."""
    modules = list(model.modules())
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    attributes += [(held, dict(held)) for _, own in attributes for held in own.values() if isinstance(held, dict)]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (buffer, buffer._version, buffer.clone())
        for buffer in model.buffers()
        if buffer.numel() <= SMALL and not buffer.is_meta and not buffer.is_inference()
    ]
    with ExitStack() as within:
        within.enter_context(torch.no_grad())
        for each in {"cpu", device.type}:
            within.enter_context(torch.autocast(each, enabled=False))
        if "torch._dynamo" in sys.modules:  # what is compiled passes by the hooks
            within.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            for held, was in attributes:
                held.clear()
                held.update(was)
            for parameter, needs in wanted:
                if parameter.requires_grad is not needs:
                    parameter.requires_grad_(needs)
            for buffer, version, copied in buffers:
                if buffer._version != version:
                    buffer.copy_(copied)


@contextmanager
def chance_kept(model: nn.Module) -> Iterator[None]:
    """Put back the state of every generator of random numbers that the model may draw from."""
    chance, numbers = random.getstate(), numpy.random.get_state()
    cards = {tensor.device for tensor in model.parameters() if tensor.device.type not in ("cpu", "meta")}
    kind = next(iter(cards)).type if cards else "cuda"
    try:
        with torch.random.fork_rng(sorted(cards, key=str), device_type=kind):
            yield
    finally:
        random.setstate(chance)
        numpy.random.set_state(numbers)
