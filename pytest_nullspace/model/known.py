"""What transformers can build with its own code; code that a config names is never run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable, quoted, read_json_object
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.model.bounds import check_counts

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def require_known(config: Mapping[str, Any], config_file: Path) -> None:
    """Refuse a model of which transformers itself has no code.

    Raises:
        CheckpointError: Its ``model_type`` is unknown, so it needs a newer transformers or code of its own.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    unknown = f"{config_file}: transformers {transformers.__version__} has no model_type {quoted(kind)} of its own"
    if code := config.get("auto_map"):
        raise CheckpointError(
            f"{unknown}, and the code that auto_map names ({printable(json.dumps(code), 200)}) is never run; take a "
            "copy of the model that was converted to an architecture of transformers, and train and gate on that, or "
            "a newer transformers where that has it"
        )
    raise CheckpointError(f"{unknown}; take a newer transformers where that has it, or mend the config")


def known_config(base: Path) -> dict[str, Any]:
    """The config of the base model in ``base``, as it lies there.

    Raises:
        CheckpointError: It cannot be read, or transformers itself has no code for it.
    """
    config = read_json_object(base / "config.json", "the base model's config")
    require_known(config, base / "config.json")
    return config


def own_code(base: Path) -> str:
    """That a base whose weights do not fit may need the code that its config names; nothing where it names none."""
    if base.is_file() or not known_config(base).get("auto_map"):
        return ""
    return "; its auto_map names code of its own, which is never run, and that may be of another architecture"


def class_of(checkpoint: Checkpoint, base: Path) -> Any:
    """The class of transformers that builds ``base``: that of the adapter's task, else the one that its config names.

    Raises:
        CheckpointError: Its config cannot be read, asks for too much, or names no class of transformers' own.
    """
    if base.is_file():  # a GGUF file does not name the class, and most are of models that write text
        return getattr(transformers, _CLASSES.get(str(checkpoint.config.get("task_type")), "AutoModelForCausalLM"))
    config = known_config(base)
    check_counts(config, base / "config.json")
    named = config.get("architectures")
    name = _CLASSES.get(str(checkpoint.config.get("task_type"))) or (
        named[0] if isinstance(named, list) and named else ""
    )
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if name not in _CLASSES.values() and not (
        isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    ):
        raise CheckpointError(
            f"{base}: its architecture {quoted(name)} is not one of transformers' own; give another base by "
            "--nullspace-base=DIR"
        )
    return kind
