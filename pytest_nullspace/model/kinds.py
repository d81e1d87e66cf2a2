"""Which class of transformers a base model is built as."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.auto_factory import _get_model_class

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import quoted
from pytest_nullspace.checkpoint.hub import tensors_of
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.bounds import LEADS_TO_CODE, check_counts, held_to, without
from pytest_nullspace.model.known import known_config, told_of
from pytest_nullspace.model.names import of_today
from pytest_nullspace.model.sizes import NOT_FITTED, Fitted, sizes_of

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_LAST = "AutoModelForImageTextToText"
"""What a base is that names no class, for a task that has none for it: of what sees beside reading there is one."""
_OF_PARTS = ("AutoModelForMultimodalLM", _LAST)
"""What the part is that reads text of a model that only generates."""
_ENCODER = "AutoModelForTextEncoding"
"""What an encoder is that is adapted without the decoder beside it, as T5's."""


@dataclass(frozen=True)
class Kind:
    """What a base model is built as.

    Attributes:
        build: The class of transformers.
        config: What it is built from; None where a GGUF file tells it.
        why: Where the class comes from, in words.
        fitted: How its sizes differ from those that the base's config says.
    """

    build: Any
    config: Any
    why: str
    fitted: Fitted = NOT_FITTED

    def empty(self) -> nn.Module:
        """The model without its numbers."""
        with torch.device("meta"):
            model = self.build._from_config(copy.deepcopy(self.config))
        assert isinstance(model, nn.Module)
        return model


def kind_of(checkpoint: Checkpoint | None, base: Path) -> Kind:
    """As what ``base`` is built: the first of the classes that may be meant in which the adapter's layers are.

    They are that of the adapter's task, or for no adapter the one that writes text, that which the base's config
    names, and that from which the adapter was saved. Vision-language models have no class that writes text alone, or
    one without their tower, and are adapted in either shape.

    Raises:
        CheckpointError: Its config cannot be read or asks for too much, or transformers has no class of its own for it.
    """
    task = "CAUSAL_LM" if checkpoint is None else str(checkpoint.config.get("task_type"))
    if base.is_file():  # a GGUF file does not name the class, and most are of models that write text
        return Kind(getattr(transformers, _CLASSES.get(task, _CLASSES["CAUSAL_LM"])), None, f"of {base.name}")
    fields = known_config(base)
    check_counts(fields, base / "config.json")
    tensors = tensors_of(base)
    with told_of(base), held_to(tensors, base / "config.json"):
        kinds = _kinds(checkpoint, task, fields, base)
        if checkpoint is None:
            return kinds[0]
        if len(kinds) == 1:
            return _fitted(kinds[0], checkpoint)
        names = [layer.name for layer in checkpoint.layers]
        held: list[tuple[int, int]] = []
        for kind in kinds:
            held.append(_held(kind, names))
            if held[-1][0] == len(names):
                break
        kind = kinds[held.index(max(held))]
        return _fitted(kind, checkpoint)


def kind_as_saved(directory: Path) -> Kind:
    """As what a whole model was saved: the class that its config names, else the one that writes text.

    Raises:
        CheckpointError: Its config cannot be read or asks for too much, or transformers has no class of its own for it.
    """
    fields = known_config(directory)
    check_counts(fields, directory / "config.json")
    with told_of(directory), held_to(tensors_of(directory), directory / "config.json"):
        kinds = _kinds(None, "" if fields.get("architectures") else "CAUSAL_LM", fields, directory)
        return kinds[0]


def _kinds(checkpoint: Checkpoint | None, task: str, fields: Mapping[str, Any], base: Path) -> list[Kind]:
    """The classes that may be meant, in order; never none."""
    named, parent = fields.get("architectures"), None if checkpoint is None else checkpoint.config.get("auto_mapping")
    first = named[0] if isinstance(named, list) and named else ""
    adapted = parent.get("base_model_class") if isinstance(parent, Mapping) else None
    described = without(LEADS_TO_CODE, fields)
    config = AutoConfig.for_model(described.pop("model_type", ""), **described)
    named_by = [
        _named(first, config, "named by the base's architectures"),
        _named(adapted, config, "named by the adapter's auto_mapping"),
    ]
    if adapted != first:  # that from which the adapter was saved, which may be a part of what lies there
        named_by.reverse()
    of_task = _of_task(task, config)
    encoder = _of_mapping(_ENCODER, config, "which encodes text alone")
    is_part = encoder is not None and of_task is not None and encoder.build is not of_task.build
    found = [
        encoder if is_part and task == "FEATURE_EXTRACTION" and _reads_alone(checkpoint) else None,
        of_task,
        *named_by,
        _of_mapping(_LAST, config, "of its model_type") if task == "CAUSAL_LM" else None,
    ]
    if any(kind is not None and not runs(kind.build) for kind in found):
        parts = [getattr(config, name) for name in config.sub_configs]
        of_parts = [auto for auto in _OF_PARTS if hasattr(transformers, auto)]
        found += [_of_mapping(auto, part, "the part of the base that runs") for part in parts for auto in of_parts]
    kinds: dict[Any, Kind] = {}
    for kind in found:
        if kind is not None:
            kinds.setdefault(kind.build, kind)
    if not kinds:
        raise CheckpointError(
            f"{base}: its architecture {quoted(first)} is not one of transformers' own"
            + (f", which have none of task_type {task} for its model_type either" if task in _CLASSES else "")
            + "; give another base by --nullspace-base=DIR"
        )
    return list(kinds.values())


def runs(build: Any) -> bool:
    """Whether a class has a forward, and does not generate alone."""
    return build.forward is not nn.Module.forward


def reading(model: nn.Module) -> nn.Module:
    """What of a model reads token ids: itself, or the part that has a forward, as Qwen-Omni's thinker."""
    if runs(type(model)):
        return model
    parts = (
        part for part in model.children() if runs(type(part)) and "input_ids" in signature(part.forward).parameters
    )
    return next(parts, model)


def _of_task(task: str, config: Any) -> Kind | None:
    """The class that transformers has for ``task`` and this config, if any."""
    return _of_mapping(_CLASSES[task], config, f"of task_type {task}") if task in _CLASSES else None


def _reads_alone(checkpoint: Checkpoint | None) -> bool:
    """Whether an adapter has no layer in a decoder."""
    return checkpoint is not None and not any("decoder" in layer.name.split(".") for layer in checkpoint.layers)


def _of_mapping(auto: str, config: Any, why: str) -> Kind | None:
    """The class that the auto class of that name has for this config, if any; some take a part of the config alone."""
    mapping = getattr(transformers, auto)._model_mapping
    if type(config) not in mapping:
        return None
    build = _get_model_class(config, mapping)
    part = config.sub_configs.get("text_config")
    if part is not None and build.config_class is part:
        packed, config = getattr(config, "quantization_config", None), config.get_text_config()
        if packed is not None:
            config.quantization_config = packed
    return Kind(build, config, why)


def _named(name: Any, config: Any, why: str) -> Kind | None:
    """The class of that name, where transformers itself has it, for this config or a part of it."""
    build = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(build, type) and issubclass(build, transformers.PreTrainedModel)):
        return None
    parts = (config, *(getattr(config, name, None) for name in config.sub_configs))
    own = next(
        (part for part in parts if part is not None and type(part) is getattr(build, "config_class", None)), None
    )
    return None if own is None else Kind(build, own, why)


def _held(kind: Kind, layers: Collection[str]) -> tuple[int, int]:
    """How many of ``layers`` a model of that kind has, and how many under names of an older transformers."""
    try:
        model = kind.empty()
    except CheckpointError:
        raise
    except Exception:  # what cannot be built is told when it is loaded
        return 0, 0
    modules = {name for name, _ in model.named_modules()}
    return sum(name in modules for name in layers), sum(name in modules for name in of_today(model, layers).values())


def _fitted(kind: Kind, checkpoint: Checkpoint) -> Kind:
    """``kind`` with as many labels and as large a vocabulary as the adapter was trained with."""
    weights = [name for name in checkpoint.outside if ".lora_" not in name]
    if not weights:
        return kind
    fitted = sizes_of(kind.empty(), checkpoint, weights)
    config = copy.deepcopy(kind.config)
    if fitted.labels is not None:
        config.num_labels = fitted.labels
    return replace(kind, config=config, fitted=fitted)
