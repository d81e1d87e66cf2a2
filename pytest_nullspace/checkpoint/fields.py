"""Fields of an adapter's config that do not reach PEFT: harmless ones, and others, which are refused by name.

Whatever is set and not passed on might change what the adapter computes, and then every figure would be of another
model. So each such field is either known to change nothing in eval mode, or nothing is measured.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pytest_nullspace.errors import CheckpointError, printable, quoted

HARMLESS: Mapping[str, str] = {
    **dict.fromkeys(("peft_type", "peft_version", "auto_mapping", "inference_mode"), "says what was saved"),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision"), "says on what, and is read here"),
    **dict.fromkeys(("lora_dropout", "merge_weights"), "off, or the same figures, in eval mode"),
    **dict.fromkeys(("monteclora_config", "velora_config"), "acts in training alone; in eval mode it is plain B·A"),
    **dict.fromkeys(("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"), "ms-swift's, of training"),
    **dict.fromkeys(
        ("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        "made the start; where that changed the base, `changed_base` tells",
    ),
    "runtime_config": "says where intermediate results lie",
    "megatron_core": "names a library that only megatron_config puts to use",
    "qalora_group_size": "is of use_qalora, and not null without it",
}
"""Each field that may be set although PEFT is not told of it, and why."""

_PLAIN = "gate a plain LoRA"
REFUSED: Mapping[str, tuple[str, str]] = {
    "alora_invocation_tokens": (
        "an activated LoRA acts only after its invocation tokens",
        "to gate it as if it acted on every token, take the field out of a copy of the adapter",
    ),
    "arrow_config": ("Arrow routes each token through several adapters", "gate each of those by itself"),
    "enable_lora": ("parts of the layers are left out", _PLAIN),
    "kasa_config": (
        "KaSA scales every rank by lora_diag, and cuts the smallest singular values off the base's weights",
        _PLAIN,
    ),
    "layer_replication": (
        "the base's layers are copied, and each copy has a LoRA of its own",
        "save the base with its layers copied, give it by --nullspace-base=DIR, and take the field out",
    ),
    "megatron_config": ("the layers are Megatron's, split over processes", "save it for the base's plain layers"),
    "use_bdlora": (
        "BD-LoRA stores the diagonal blocks of a matrix alone",
        "write the matrices out whole, zero beside the blocks, and take the field out",
    ),
    "use_qalora": ("QA-LoRA averages the input over groups before lora_A", _PLAIN),
}
"""Each field that changes what the adapter computes in a way that is not measured: how, and what to do."""

_UNUSED = {"monteclora_config": r"\.lora_monteclora_sampler\.[^.]+$", "velora_config": r"\.lora_velora_embed$"}
"""The tensors that a harmless field adds, of which eval mode makes no use."""


def unused(tensors: Collection[str], config: Mapping[str, Any]) -> frozenset[str]:
    """Names of ``tensors`` that only training reads, by what ``config`` says."""
    patterns = [pattern for field, pattern in _UNUSED.items() if config.get(field) not in (None, False)]
    return frozenset(name for name in tensors if any(re.search(pattern, name) for pattern in patterns))


def require_lora(config: Mapping[str, Any], passed_on: Collection[str], config_file: Path) -> None:
    """Refuse an adapter that is no LoRA, or one of a kind that would not be measured as it computes.

    Raises:
        CheckpointError: It is of another PEFT type, or a field is set that is neither in ``passed_on`` nor harmless.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{config_file}: peft_type is {quoted(kind)}: not a LoRA adapter, so it has no layers to gate; where its "
            "method allows, peft.save_as_lora(DIR, model, rank=R) of PEFT 0.20 writes the loaded PeftModel as LoRA "
            "into DIR; give that"
        )
    for field, (how, cure) in REFUSED.items():
        value = config.get(field)
        if value or isinstance(value, dict):  # an empty one stands for a method's defaults
            raise CheckpointError(f"{config_file}: {field} is set: {how}, which is not measured; {cure}")
    for field, value in config.items():
        if value and field not in passed_on and field not in HARMLESS:
            raise CheckpointError(
                f"{config_file}: {quoted(field)} is set to {printable(value, 60)}, and what it changes is not known "
                "here, so the figures might be of another model; update pytest-nullspace, or take it out of a copy of "
                "the adapter if all it concerns is training"
            )
