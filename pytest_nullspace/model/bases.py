"""The base model of an adapter: which class of transformers it is, and the whole of it loaded."""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.auto_factory import _get_model_class

from pytest_nullspace.checkpoint import Checkpoint, gguf
from pytest_nullspace.checkpoint.header import (
    TensorInfo,
    printable,
    quoted,
    read_json_object,
    read_tensors,
)
from pytest_nullspace.checkpoint.hub import tensors_of
from pytest_nullspace.checkpoint.strangers import require_unwrapped
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.bounds import LEADS_TO_CODE, check_counts, held_to, without
from pytest_nullspace.model.known import known_config, own_code
from pytest_nullspace.model.names import of_today
from pytest_nullspace.model.shelf import Shelf, UnfitError, stack_of
from pytest_nullspace.model.sizes import NOT_FITTED, Fitted, sizes_of
from pytest_nullspace.model.weights import fill

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
_WHOLE_NUMBERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
_QUANTISERS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}
"""The packages that read a base quantised so; of others transformers' message tells."""


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
    with _told_of(base), held_to(tensors, base / "config.json"):
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
    with _told_of(directory), held_to(tensors_of(directory), directory / "config.json"):
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
    if any(kind is not None and not _runs(kind.build) for kind in found):
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


def _runs(build: Any) -> bool:
    """Whether a class has a forward, and does not generate alone."""
    return build.forward is not nn.Module.forward


def reading(model: nn.Module) -> nn.Module:
    """What of a model reads token ids: itself, or the part that has a forward, as Qwen-Omni's thinker."""
    if _runs(type(model)):
        return model
    parts = (
        part for part in model.children() if _runs(type(part)) and "input_ids" in signature(part.forward).parameters
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
    with _told_of(base):
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
            if kind.fitted.vocabulary is not None:  # of whose rows each comes from the adapter
                model.resize_token_embeddings(kind.fitted.vocabulary, mean_resizing=False)
    missing, mismatched = sorted(report["missing_keys"]), [key for key, *_ in report["mismatched_keys"]]
    wrong = [key for key in (*missing, *mismatched) if not any(part in replaced for part in key.split("."))]
    assert isinstance(model, nn.Module)
    return model, tuple(wrong)


@contextmanager
def _misfit_named(kind: Kind, base: Path, tensors: Collection[TensorInfo]) -> Iterator[None]:
    """Name the tensor of another shape than the config's, which transformers only prints."""
    try:
        yield
    except RuntimeError as error:
        if kind.config is None or "ignore_mismatched_sizes" not in str(error):
            raise
        places = {name: tuple(value.shape) for name, value in kind.empty().state_dict().items()}
        wrong = next((of for of in tensors if places.get(of.name, of.shape) != of.shape), None)
        if wrong is None:
            raise
        raise CheckpointError(
            f"{wrong.file}: tensor {printable(wrong.name)} has shape {list(wrong.shape)}, but config.json makes it "
            f"{list(places[wrong.name])}{own_code(base)}; copy both from one save, or give another base by "
            "--nullspace-base=DIR"
        ) from error


def shelve_base(kind: Kind, base: Path, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Shelf]:
    """The base model on the CPU, the numbers of its blocks left in their files.

    Raises:
        UnfitError: What lies there is not the numbers of this model one for one.
        CheckpointError: It cannot be loaded.
    """
    if base.is_file() or _quantiser(base) is not None or kind.fitted != NOT_FITTED:
        raise UnfitError("its base is quantised, a GGUF file, or of other sizes than the adapter")
    if not _runs(kind.build):
        raise UnfitError("its base only generates, and a part of it runs")
    with _told_of(base):
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


@contextmanager
def _told_of(base: Path) -> Iterator[None]:
    """Say in one sentence what transformers, which raises many kinds of errors, cannot load of ``base``."""
    try:
        yield
    except CheckpointError:
        raise
    except ImportError as error:
        method = None if base.is_file() else _quantiser(base)
        if method is None:
            raise CheckpointError(
                f"{base}: transformers builds this model with a package that is not installed: {printable(error, 300)}"
            ) from error
        raise CheckpointError(
            f"{base}: its weights are quantised by {printable(method)}, and what reads them is not installed: "
            f"{printable(error, 300)}; pip install {_QUANTISERS.get(method, 'what it names')}"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{base}: transformers cannot load the base model: {printable(error, 300)}{own_code(base)}; save it "
            "again with safe_serialization=True, or give another by --nullspace-base=DIR"
        ) from error


def _from_directory(kind: Kind, base: Path) -> tuple[Any, list[TensorInfo], dict[str, Any]]:
    """A saved base's config, its tensors, and what else ``from_pretrained`` is told."""
    tensors = tensors_of(base)
    require_unwrapped(base, (tensor.name for tensor in tensors))
    if _quantiser(base) is None and (of := next(filter(_is_quantised, tensors), None)) is not None:
        raise CheckpointError(
            f"{of.file}: tensor {quoted(of.name)} ({of.dtype}) is of quantised weights, and config.json has no "
            "quantization_config that says how they are computed with; copy both from one save, or give another base "
            "by --nullspace-base=DIR"
        )
    return kind.config, tensors, {"use_safetensors": True}


def _is_quantised(tensor: TensorInfo) -> bool:
    """Whether it is of weights whose numbers are not those that a plain layer computes with."""
    is_whole = tensor.dtype in _WHOLE_NUMBERS and tensor.name.endswith(".weight")
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


def _quantiser(base: Path) -> str | None:
    config = read_json_object(base / "config.json", "the base model's config").get("quantization_config")
    return str(config.get("quant_method")) if isinstance(config, dict) else None
