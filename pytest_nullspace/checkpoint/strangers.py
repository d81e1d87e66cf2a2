"""What other programs leave where a checkpoint or a base model is looked for, told by names and by small JSON.

Whatever is recognised is refused with what it is and what to do. Of a weight file at most the header is read.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pytest_nullspace.checkpoint.header import printable, quoted, read_header, read_json_object
from pytest_nullspace.errors import CheckpointError

ADAPTER, MODEL = "adapter_config.json", "config.json"

_MOST_SEEN = 10_000
"""Of the entries of one directory; a folder with more is no checkpoint."""
_DEEPEST = 2
_SHOWN = 3


class _Kind(NamedTuple):
    """What was found, and what to do about it."""

    what: str
    cure: str


_TO_PEFT = (
    "convert it to PEFT: an adapter_config.json, and an adapter_model.safetensors with lora_A.weight (r, in) and "
    "lora_B.weight (out, r) of each layer"
)
_NO_TEXT = "it makes images, so there is no text on which it could be measured; give an adapter of a language model"
_MLX = _Kind(
    "a part of an MLX adapter",
    f"it is read where {ADAPTER} and adapters.safetensors of one save lie together and nothing of PEFT's beside them; "
    "what a step of training left, such as 0000100_adapters.safetensors, is copied to that name",
)
_ADAPTERS = _Kind(
    "an adapter of the library adapters, such as a bottleneck", "it has no LoRA layers to gate; give a LoRA adapter"
)
_DIFFUSERS, _KOHYA = _Kind("an adapter of diffusers", _NO_TEXT), _Kind("an adapter in kohya's format", _NO_TEXT)
_PICKLE = "pickles can run code and are never opened; "
_SAVE = "save the adapter with save_pretrained"

_NAMES: Mapping[str, _Kind] = {
    r"(\d+_)?adapters\.(safetensors|npz)": _MLX,
    r"adapter_(\d+|model)\.pt": _Kind(
        "a torchtune adapter",
        f"{_PICKLE}give the folder into which its checkpointer for Hugging Face wrote {ADAPTER} and "
        "adapter_model.safetensors",
    ),
    r"lit_model\.pth(\.lora)?": _Kind("a LitGPT checkpoint", f"{_PICKLE}{_TO_PEFT}"),
    r"pytorch_lora_weights\.(safetensors|bin)": _DIFFUSERS,
    r"model_index\.json": _Kind("a pipeline of diffusers", _NO_TEXT),
    r"pytorch_adapter\.bin|pytorch_model_head\.bin": _ADAPTERS,
    r".*\.nemo": _Kind("a NeMo checkpoint", _TO_PEFT),
    r"global_step\d+|zero_to_fp32\.py": _Kind(
        "a DeepSpeed checkpoint, whose weights lie in pieces",
        f"gather them (stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py) and {_SAVE}",
    ),
    r"pytorch_model_fsdp_\d+|.*\.distcp": _Kind(
        "a distributed checkpoint of torch, whose weights lie in pieces",
        f"join them (FULL_STATE_DICT, or accelerate merge-weights) and {_SAVE}",
    ),
    r".*\.gguf": _Kind(
        "a GGUF file, a LoRA for llama.cpp or a whole model",
        f"a LoRA is read where it is alone in its directory, without {MODEL} or {ADAPTER}; or give the PEFT directory "
        "from which it was converted",
    ),
    r"adapter_model\.(safetensors(\.index\.json)?|bin)": _Kind(
        f"the weights of a PEFT adapter without their {ADAPTER}",
        "without it the scale of the update is unknown; copy it from the same save",
    ),
}
"""Names in a directory, and what the first that fits is the sign of."""

_KEYS: Mapping[str, _Kind] = {
    r"(lora_(unet|te\d?|transformer|prior)|lycoris)_.*": _KOHYA,
    r"(unet|transformer|text_encoder(_\d)?|diffusion_model)\..*": _DIFFUSERS,
    r".*\.lora_[ab]": _MLX,
    r".*\.lora_[AB]\..*": _Kind(f"LoRA weights without an {ADAPTER}", f"{_SAVE}, which writes both"),
}
"""Keys of a safetensors file, where its name told nothing."""

_OTHER_NAMES: Mapping[str, _Kind] = {
    r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)": _Kind(
        f"the weights of a model without their {MODEL}",
        f"copy it from the same save, or, where an adapter was trained, {_SAVE}",
    ),
    r".*\.(pt|pth|bin|ckpt|pkl)": _Kind("a pickle", f"{_PICKLE}{_SAVE}, which writes safetensors"),
}
"""Names, where the keys told nothing either."""

_CONFIGS: tuple[tuple[Callable[[Mapping[str, Any]], bool], _Kind], ...] = (
    (lambda config: "fine_tune_type" in config or "lora_parameters" in config, _MLX),
    (
        lambda config: (
            str(config.get("version")).startswith("adapters.")
            or str(config.get("model_class")).endswith("AdapterModel")
            or (isinstance(config.get("config"), Mapping) and "reduction_factor" in config["config"])
        ),
        _ADAPTERS,
    ),
)
"""Fields of an adapter's config that has no ``peft_type``."""


def require_ours(directory: Path) -> None:
    """Refuse a directory by what it holds instead of a checkpoint.

    Raises:
        CheckpointError: It is of another program, the folder of a run, or holds nothing that is known.
    """
    if (directory / ADAPTER).exists():
        _require_peft(directory / ADAPTER)
        stem = "adapter_model"
    elif (directory / MODEL).exists():
        stem = "model"
    else:
        nothing = f"neither {MODEL} nor {ADAPTER} is in it; give the directory that training saved"
        raise CheckpointError(f"{directory}: not a checkpoint: {_recognised(directory) or nothing}")
    if _has_weights(directory, stem):
        return
    if (told := _below(directory) or _beside_a_model(directory) or _recognised(directory)) is not None:
        raise CheckpointError(f"{directory}: no weights of its own: {told}")


def _has_weights(directory: Path, stem: str) -> bool:
    return any(re.match(rf"(pytorch_)?{stem}[.-]", name) for name in _names(directory))


def _beside_a_model(directory: Path) -> str | None:
    """That the config of an adapter lies beside a whole model, and what to do; None where no model is there."""
    if not ((directory / MODEL).exists() and _has_weights(directory, "model")):
        return None
    return (
        f"an {ADAPTER} beside a whole model; to gate that take {ADAPTER} out of a copy, or else copy the adapter's "
        "weights there from the same save"
    )


def _require_peft(config_file: Path) -> None:
    """Refuse an adapter's config that PEFT did not write, or not for a language model."""
    config = read_json_object(config_file, "the adapter's config")
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else None
    if isinstance(library, str) and library.partition(".")[0] == "diffusers":
        raise CheckpointError(f"{config_file}: describes {_DIFFUSERS.what}; {_DIFFUSERS.cure}")
    if config.get("peft_type") is None:
        kind = next((kind for fits, kind in _CONFIGS if fits(config)), None)
        raise CheckpointError(
            f"{config_file}: has no peft_type, so PEFT did not write it"
            + (f": {kind.what}; {kind.cure}" if kind else "; give a LoRA adapter that PEFT's save_pretrained wrote")
        )


def whole_model(directory: Path, tensors: Iterable[str]) -> str:
    """What to do about a transformers model that holds no layer of ours."""
    if any(".lora_A." in name for name in tensors):
        return f"it is a whole model with PEFT's layers inside, as a training state holds it; {_SAVE}"
    return (
        "was the plain model saved instead of the adapted one? If it is merged or fully fine-tuned, give its base by "
        "--nullspace-base=DIR, and what differs from that is gated, or "
        f"{_below(directory) or 'give the directory of the adapter before it was merged'}"
    )


_WRAPPERS: Mapping[str, str] = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "module": "DistributedDataParallel or DeepSpeed",
}
"""The names by which wrappers hold the module that they wrap, and whose they are."""


def require_unwrapped(directory: Path, tensors: Iterable[str]) -> None:
    """Refuse weights that were saved with a wrapper's name in their own.

    Raises:
        CheckpointError: One has it, so no model has a place for it.
    """
    wrapped = {name: found for name in tensors if (found := _wrappers_in(name))}
    if not wrapped:
        return
    found = sorted({part for parts in wrapped.values() for part in parts})
    whose = " and ".join(f"{part}. of {_WRAPPERS[part]}" for part in found)
    raise CheckpointError(
        f"{directory}: tensor {quoted(min(wrapped))} carries {whose}, which wrapped the model when it was saved; strip "
        "it from every key: save_file({re.sub("
        rf"r'\b({'|'.join(found)})\.', '', k): v for k, v in load_file(FILE).items()}}, NEW, {{'format': 'pt'}}) with "
        "safetensors.torch, or unwrap the model and save it again"
    )


def _wrappers_in(name: str) -> list[str]:
    parts = name.split(".")
    numbers = (place for place, part in enumerate(parts) if part.isdecimal())
    first = next(numbers, len(parts))  # behind it `module` may be one of the model's own
    return [part for place, part in enumerate(parts) if part in _WRAPPERS and (part != "module" or place < first)]


def check_base(base: Path, how: str) -> Path:
    """``base`` itself, unless it is no base model, or transformers would take it for another.

    Args:
        base: A directory or a GGUF file.
        how: Which option or field said so, for messages.

    Raises:
        CheckpointError: It is an adapter, has one beside it, or is of another program.
    """
    directory = base.parent if base.is_file() else base
    is_model = base.is_file() or (directory / MODEL).exists()
    if (directory / ADAPTER).exists():
        if is_model:
            raise CheckpointError(
                f"{how}: {directory}: holds an {ADAPTER} beside the base model, and transformers would put that "
                "adapter on it first; move one of the two into a directory of its own"
            )
        _require_peft(directory / ADAPTER)
        on = read_json_object(directory / ADAPTER, "the adapter's config").get("base_model_name_or_path")
        raise CheckpointError(
            f"{how}: {directory}: is an adapter itself, on {printable(on)}, and no base model; merge it into that "
            "first, by PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(DIR), save the "
            "tokenizer there as well, and give the result by --nullspace-base=DIR"
        )
    if not is_model and (told := _recognised(directory)) is not None:
        raise CheckpointError(f"{how}: {directory}: is no base model: {told}")
    if is_model and base.is_dir():
        _check_model(directory, how)
    return base


def _check_model(directory: Path, how: str) -> None:
    config = read_json_object(directory / MODEL, "the base model's config")
    if "lora_r" in config:
        keys = (key for file in sorted(directory.glob("*.safetensors")) for key in read_header(file))
        if (key := next((key for key in keys if ".BLinear." in key), None)) is not None:
            raise CheckpointError(
                f"{how}: {directory}: is a LoRA-Null checkpoint itself ({quoted(key)}), and no base model; merge it "
                "first, W_res + A B in each layer, and give the result by --nullspace-base=DIR"
            )
    if isinstance(config.get("quantization"), Mapping) and "group_size" in config["quantization"]:
        raise CheckpointError(
            f"{how}: {directory}: is a model that MLX quantised, which transformers cannot read; give the model from "
            "which it was converted by --nullspace-base=DIR"
        )


def _recognised(directory: Path) -> str | None:
    """What lies in ``directory`` and what to do, by the first sign; None where there is none."""
    if below := _below(directory):
        return below
    names = _names(directory)
    told = _sign(_NAMES, names)
    if told is None:
        weights = [name for name in names if name.endswith(".safetensors")]
        keys = (key for name in weights[:_SHOWN] for key in read_header(directory / name))
        told = _sign(_KEYS, keys) or _sign(_OTHER_NAMES, names)
    if told is None and directory.parent.name == "snapshots":
        return (
            "of a repository on the hub only what lies at its top is downloaded, no pickles, and no adapter is among "
            "it; where one lies in a folder there, download that and give the folder"
        )
    return told


def _sign(signs: Mapping[str, _Kind], names: Iterable[str]) -> str | None:
    """The first of ``signs`` that fits one of ``names``, in words."""
    found = [*names]
    for pattern, kind in signs.items():
        name = next((name for name in found if re.fullmatch(pattern, name)), None)
        if name is not None:
            return f"{kind.what} ({quoted(name)}); {kind.cure}"
    return None


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(islice(directory.iterdir(), _MOST_SEEN))
    except OSError:  # a folder that may not be read tells nothing
        return []


def _names(directory: Path) -> list[str]:
    return [path.name for path in _entries(directory)]


def _below(directory: Path) -> str | None:
    """The adapters in folders of ``directory``, and to give one of them; None where there are none."""
    seen = islice(_walk(directory, _DEEPEST), _MOST_SEEN)
    found = {path.parent for path in seen if path.parent != directory and _is_config(path)}
    if not found:
        return None
    listed = [printable(path, 1000) for path in sorted(found, key=_latest_first)]
    more = f", or one of {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"adapters lie below: give {' or '.join(listed[:_SHOWN])}{more}"


def _walk(directory: Path, depth: int) -> Iterator[Path]:
    """The files of ``directory`` and of its folders; links to folders are not followed."""
    for path in _entries(directory):
        if path.is_symlink() or not path.is_dir():
            yield path
        elif depth > 0 and not path.name.startswith("."):
            yield from _walk(path, depth - 1)


def _is_config(file: Path) -> bool:
    """Whether ``file`` stands for an adapter: PEFT's, or the config of a LoRA-Null model."""
    if file.name != MODEL:
        return file.name == ADAPTER
    try:
        return "lora_r" in read_json_object(file, "the model's config")
    except CheckpointError:
        return False


def _latest_first(folder: Path) -> tuple[int, str]:
    step = re.search(r"\d+$", folder.name)
    return -int(step[0]) if step else 1, str(folder)
