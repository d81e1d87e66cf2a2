"""Whole models without an adapter, merged or trained whole: which linear layers differ from those of their base.

Both are directories as transformers saves them, with tensors of the same names. What differs of ``<layer>.weight`` is
the update of that layer; what else differs, such as norms, embeddings, heads, biases, routers or experts that are
fused, is told as trained outside the layers.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint.arrays import is_same
from pytest_nullspace.checkpoint.header import FLOATING, TensorInfo, inside, printable, read_json_object, read_tensors
from pytest_nullspace.checkpoint.layers import Checkpoint, LayerSpec, in_model_order
from pytest_nullspace.checkpoint.strangers import require_unwrapped, whole_model
from pytest_nullspace.errors import PREFIX, CheckpointError, some

CONFIG_FILE = "config.json"
FORMAT = "whole model"
WEIGHT = ".weight"

TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""The architectures whose linear layers hold their weight as ``(in, out)``."""
_ROWS = re.compile(r"embed|(^|\.)(wte|wpe|shared|lm_head)$|relative_attention_bias")
"""In the names of matrices that have a row for each token or place."""
_PLACES = re.compile(r"(^|\.)wpe$|(^|[._])pos(ition(s|al)?)?([._]|$)|token_type|relative_attention_bias")
"""In those of them that have none for a token."""
_NOT_CALLED = re.compile(r"(^|\.)(gate|router|dt_proj)$|\.router\.|\.experts\.\d+\.")
"""In those of routers, of experts, which transformers 5 fuses, and of what Mamba computes with in its own way."""
_COMES_AND_GOES = re.compile(
    r"(^|\.)(lm_head|embed_tokens)\.weight$|\.(inv_freq|position_ids|masked_bias)$|attn\.bias$"
)
"""Tensors that are saved or not: heads that are tied, buffers of older versions."""


def read(directory: Path, base: Path, rank: int = 0) -> Checkpoint:
    """Hold a model's tensors against its base's, one of each in memory.

    Args:
        directory: The model.
        base: Its base, a directory.
        rank: How many right singular vectors of each change stand for a down projection; 0 for none.

    Raises:
        CheckpointError: One of them cannot be read, they are not of one architecture, or no linear layer differs.
    """
    config_file = directory / CONFIG_FILE
    config = read_json_object(inside(directory, CONFIG_FILE), "the model's config")
    _check_base(directory, config, base)
    tensors, held = read_tensors(directory, "model"), read_tensors(base, "model")
    require_unwrapped(directory, tensors)
    require_unwrapped(base, held)
    if any(".lora_A." in name for name in tensors):
        raise CheckpointError(f"{directory}: {whole_model(directory, tensors)}")
    _check_names(directory, tensors, base, held)
    common = [name for name in tensors if name in held]
    resized = _resized(common, tensors, held)
    differ = [name for name in common if name in resized or not is_same(tensors[name], held[name])]
    only_here = [name for name in tensors if name not in held and not _is_tied(tensors[name], held)]
    if not differ:
        raise CheckpointError(
            f"{directory}: is byte for byte its base {base}, or that in another precision: none of {len(common)} "
            "tensors differs; the merge wrote the base, as merge tools do whose keys match nothing, or what was "
            "trained was not saved; merge or save it again, or gate the adapter itself"
        )
    moved = {*differ}
    linear = [name for name in common if _is_linear(name, tensors[name])]
    changed = [name for name in linear if name in moved]
    if not changed:
        raise CheckpointError(
            f"{directory}: no linear layer differs from its base {base}, only {some(differ)}; there is nothing "
            "here that a layer test could cover"
        )
    vocabulary, is_cut = _vocabulary(resized, tensors, held)
    layers = in_model_order(directory, (_layer(tensors[name], held[name], config, rank) for name in changed))
    return Checkpoint(
        directory=directory,
        format=FORMAT,
        config_file=config_file,
        config=config,
        layers=layers,
        tensors=tensors,
        outside=tuple(sorted({*moved, *only_here} - {*changed})),
        base=str(base),
        is_whole=True,
        cut=vocabulary if is_cut else "",
        remarks=(*_unchanged(linear, moved), *_places(resized, tensors, held), *filter(None, [vocabulary])),
    )


def _check_base(directory: Path, config: Mapping[str, Any], base: Path) -> None:
    """Refuse two models that cannot be one before and after training, by what their configs say."""
    option = f"{PREFIX}base"
    if base.is_file():
        raise CheckpointError(
            f"{option}: {base}: a GGUF file holds quantised weights, and what differs from them would be their "
            f"rounding; give the base from which it was converted by {option}=DIR"
        )
    if directory.resolve() == base.resolve():
        raise CheckpointError(f"{option}: {base}: is the model itself; give the base from which training started")
    other = read_json_object(base / CONFIG_FILE, "the base model's config")
    for where, of in ((directory, config), (base, other)):
        if of.get("quantization_config"):
            raise CheckpointError(
                f"{where / CONFIG_FILE}: has a quantization_config, and what differs between quantised weights would "
                "be their rounding; give the model in float32, bfloat16 or float16"
            )
    kinds = [of.get("model_type") for of in (config, other)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{directory}: is a {printable(kinds[0])} model, its base {base} a {printable(kinds[1])}; give the base "
            f"that it was trained on by {option}=DIR"
        )


def _check_names(
    directory: Path, tensors: Mapping[str, TensorInfo], base: Path, held: Mapping[str, TensorInfo]
) -> None:
    """Refuse tensors that only one of the two has, but for those that come and go."""

    def only(here: Iterable[str], there: Mapping[str, TensorInfo]) -> list[str]:
        return sorted(name for name in here if name not in there and not _COMES_AND_GOES.search(name))

    lacking, stray = only(held, tensors), only(tensors, held)
    both = f"{len(lacking)} of {len(held)} tensors" if lacking else f"{len(stray)} of {len(tensors)} tensors"
    if lacking and stray:
        raise CheckpointError(
            f"{directory}: {both} of the base {base} are not in it, such as {printable(lacking[0])}, but others, such "
            f"as {printable(stray[0])}: they are named otherwise, or of another architecture; load both with one "
            "version of transformers and save them again, or give the base that it was trained on"
        )
    if lacking:
        raise CheckpointError(
            f"{directory}: {both} of the base {base} are not in it, such as {some(lacking)}; it is incomplete, or of "
            "another base: save it again, or give the base that it was trained on"
        )
    if stray:
        raise CheckpointError(
            f"{directory}: {both} are not in the base {base}, such as {some(stray)}; what was added to it has nothing "
            "to be held against: take them out of a copy, or give the base that it was trained on"
        )


def _resized(common: Iterable[str], tensors: Mapping[str, TensorInfo], held: Mapping[str, TensorInfo]) -> list[str]:
    """The names of what has another number of rows, as a vocabulary that was resized.

    Raises:
        CheckpointError: Something else has another shape.
    """
    other = [name for name in common if tensors[name].shape != held[name].shape]
    for name in other:
        shapes = tensors[name].shape, held[name].shape
        if not _ROWS.search(name.removesuffix(WEIGHT)) or shapes[0][1:] != shapes[1][1:]:
            raise CheckpointError(
                f"{tensors[name].file}: tensor {printable(name)} is {list(shapes[0])}, but {list(shapes[1])} in the "
                f"base {held[name].file}: they are of two architectures; give the base that it was trained on by "
                f"{PREFIX}base=DIR"
            )
    return other


def _is_linear(name: str, tensor: TensorInfo) -> bool:
    """Whether a tensor is the weight of a linear layer, as far as its name and shape tell."""
    layer = name.removesuffix(WEIGHT)
    return (
        name.endswith(WEIGHT)
        and len(tensor.shape) == 2
        and 0 not in tensor.shape
        and not _ROWS.search(layer)
        and not _NOT_CALLED.search(layer)
    )


def _is_tied(tensor: TensorInfo, held: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor that the base has not is no weight, or what the base holds as its embeddings."""
    rows = (of for name, of in held.items() if _ROWS.search(name.removesuffix(WEIGHT)) and of.shape == tensor.shape)
    return not tensor.name.endswith(WEIGHT) or any(is_same(tensor, of) for of in rows)


def _layer(now: TensorInfo, before: TensorInfo, config: Mapping[str, Any], rank: int) -> LayerSpec:
    for tensor in (now, before):
        if tensor.dtype not in FLOATING:
            raise CheckpointError(
                f"{tensor.file}: tensor {printable(tensor.name)} is {tensor.dtype}, not a floating point type whose "
                "change could be measured; give the model in float32, bfloat16 or float16"
            )
    out_features, in_features = now.shape if config.get("model_type") not in TRANSPOSED else now.shape[::-1]
    if rank > min(now.shape):
        raise CheckpointError(
            f"{PREFIX}rank: {rank} is above what {printable(now.name)}, {list(now.shape)}, can have; give a smaller one"
        )
    return LayerSpec(now.name.removesuffix(WEIGHT), rank, in_features, out_features)


def _unchanged(linear: list[str], changed: Collection[str]) -> Iterable[str]:
    """Which linear layers are no tests."""
    same = [name for name in linear if name not in changed]
    if same:
        yield (
            f"{len(same)} of {len(linear)} linear layers, such as {printable(same[0].removesuffix(WEIGHT))}, are the "
            "base's own and no tests"
        )


def _places(resized: Iterable[str], tensors: Mapping[str, TensorInfo], held: Mapping[str, TensorInfo]) -> Iterable[str]:
    """What became of tables that have another number of rows, and none for a token."""
    for name in resized:
        if _PLACES.search(name.removesuffix(WEIGHT)):
            before, now = held[name].shape[0], tensors[name].shape[0]
            yield f"{printable(name)}, a table of positions or types, has {now} rows, and {before} in the base"


def _vocabulary(
    resized: Iterable[str], tensors: Mapping[str, TensorInfo], held: Mapping[str, TensorInfo]
) -> tuple[str, bool]:
    """What became of a vocabulary of another size, if one did, and whether it is smaller than the base's."""
    grown = {
        name: tensors[name].shape[0] - held[name].shape[0]
        for name in resized
        if not _PLACES.search(name.removesuffix(WEIGHT))
    }
    if not grown:
        return "", False
    name = min(grown, key=lambda name: grown[name])
    before, now = held[name].shape[0], tensors[name].shape[0]
    told = "are compared on what both know" if now > before else "cannot be held against the base's"
    said = f"the vocabulary of {before} was resized to {now}, as {printable(name)} has, so the predictions {told}"
    return said, now < before
