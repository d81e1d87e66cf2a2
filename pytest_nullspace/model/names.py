"""Names of layers and tensors from one version of transformers to another, by the libraries' own tables."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.checkpoint.peft import DOWN, PREFIX
from pytest_nullspace.errors import CheckpointError


def of_today(model: nn.Module, names: Collection[str]) -> Mapping[str, str]:
    """What transformers makes of the ``names`` of layers when it loads weights that an older one saved."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before 5.0 a model held its own table
        return {name: _by_its_own_table(model, f"{name}.weight").removesuffix(".weight") for name in names}
    tables = [table for table in get_model_conversion_mapping(model) if isinstance(table, WeightRenaming)]
    return {name: str(rename_source_key(f"{name}.weight", tables, [])[0]).removesuffix(".weight") for name in names}


def _by_its_own_table(model: nn.Module, name: str) -> str:
    """As `PreTrainedModel._get_key_renaming_mapping` of transformers 4.57 has it: the first pattern that is found."""
    table: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    for pattern, new in table.items():
        renamed, times = re.subn(pattern, re.sub(r"\(.*\)", "", new.lstrip("^")), name)
        if times:
            return renamed
    return name


def are_older(model: nn.Module, names: Collection[str]) -> bool:
    """Whether layers of ``names``, which ``model`` has not, are in it as transformers names them today."""
    modules = {name for name, _ in model.named_modules()}
    return bool(names) and all(today in modules for today in of_today(model, names).values())


OLDER = "that is how an older transformers named them; load the adapter there and save it again under the newer"


@dataclass(frozen=True)
class Placed:
    """Where PEFT puts what an adapter holds.

    Attributes:
        layers: For each layer, by its name in the adapter, its name in the model.
        modules: The modules that get a LoRA, also those of which several in the adapter are merged into one.
    """

    layers: Mapping[str, str]
    modules: frozenset[str]

    @property
    def remarks(self) -> tuple[str, ...]:
        """That layers are named otherwise in the model, if so."""
        moved = [(old, new) for old, new in self.layers.items() if old != new]
        if not moved:
            return ()
        old, new = map(printable, moved[0])
        return (
            f"{len(moved)} of {len(self.layers)} layers are named as an older transformers did, mapped as PEFT does: "
            f"{old} is {new} in the model",
        )


def placed(wrapped: Any, checkpoint: Checkpoint) -> Placed:
    """Where PEFT will put the tensors of the adapter when it loads them into ``wrapped``.

    Raises:
        CheckpointError: PEFT cannot tell, or merges what is a layer in the adapter into another.
    """
    held = {name: torch.empty(tensor.shape, device="meta") for name, tensor in checkpoint.tensors.items()}
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # an older PEFT loads them under their own names
        loaded = held
    else:
        try:
            loaded = convert_peft_adapter_state_dict_for_transformers(wrapped, wrapped.peft_config["default"], held)
        except Exception as error:  # of names and shapes that fit no model
            raise CheckpointError(
                f"{checkpoint.directory}: PEFT cannot map its tensors to those of the base model: "
                f"{printable(error, 300)}; save the adapter again"
            ) from error
    names = {id(tensor): name for name, tensor in loaded.items()}
    layers = {}
    for spec in checkpoint.layers:
        name = names.get(id(held[f"{PREFIX}{spec.name}.{DOWN}"]))
        if name is None:
            raise CheckpointError(
                f"{checkpoint.directory}: layer {printable(spec.name)} is no layer of its own in the base model, where "
                "PEFT merges it with others; no test can cover it"
            )
        layers[spec.name] = name.removeprefix(PREFIX).removesuffix(f".{DOWN}")
    return Placed(layers, frozenset(name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in loaded))
