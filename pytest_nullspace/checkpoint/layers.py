"""A checkpoint and its adapted layers, whatever their format."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint.header import Stamps, TensorInfo, quoted
from pytest_nullspace.errors import CheckpointError

_LAYER_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_IN_BLOCK = re.compile(r"(.*?)\.(\d{1,6})\.(.+)")
"""A name's stack of blocks, the number of its block, and its name within that."""
_OTHER_TESTS = ("model", "scope", "frozen")  # the gate has tests of these names beside the layers'

# The order in which the common decoder blocks run their projections; names not listed sort after, by name.
_FORWARD_ORDER = ("self_attn", "attn", "attention", "mlp", "q_proj", "k_proj", "v_proj", "o_proj",
                  "gate_proj", "up_proj", "down_proj")  # fmt: skip
PREFIX = "base_model.model."
"""Before the name of a layer in those of PEFT's tensors."""
_PLACE = {name: place for place, name in enumerate(_FORWARD_ORDER)}


@dataclass(frozen=True, slots=True)
class Scale:
    """What PEFT multiplies a layer's update with: ``alpha / r``, or ``alpha / √r`` with rsLoRA."""

    alpha: float
    rank: int
    rslora: bool

    @property
    def value(self) -> float:
        """The factor."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __str__(self) -> str:
        """The factor and where it comes from, such as ``alpha 32 / rank 16 = 2``."""
        root, flag = ("√", ", rsLoRA") if self.rslora else ("", "")
        return f"alpha {self.alpha:g} / {root}rank {self.rank} = {self.value:.4g}{flag}"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One adapted linear layer.

    Attributes:
        name: Its module path in the plain model.
        rank: Rows of its down projection; 0 where its update is a whole matrix, and so there is none.
        in_features: Width of its input.
        out_features: Width of its output.
        scale: What its update is multiplied with; None where the format has no such factor.
    """

    name: str
    rank: int
    in_features: int
    out_features: int
    scale: Scale | None = None


@dataclass(frozen=True, slots=True)
class LastBlocks:
    """What mlx-lm adapts: in the last blocks of a model the layers of these names, whose other tensors it leaves out.

    Attributes:
        count: How many blocks; all where it is below 1.
        keys: Names within a block, or whole ones; None where the config leaves them to the version of mlx-lm, so that
            each block must hold what another does.
    """

    count: int
    keys: frozenset[str] | None

    def of(self, modules: Iterable[str], saved: Collection[str]) -> tuple[int, set[str]]:
        """How many blocks a model has, and which of its ``modules`` get an adapter.

        Args:
            modules: The names of all of them.
            saved: Those that the adapter holds; they tell where the blocks are.
        """
        places = {name: _IN_BLOCK.match(name) for name in modules}
        stacks = Counter(of[1] for name in saved if (of := _IN_BLOCK.match(name)))
        stacks = stacks or Counter(of[1] for of in places.values() if of)
        stack = stacks.most_common(1)[0][0] if stacks else ""
        inner = {name: (int(of[2]), of[3]) for name, of in places.items() if of and of[1] == stack}
        keys = self.keys
        if keys is None:
            keys = frozenset(inner[name][1] for name in saved if name in inner)
        blocks = 1 + max((block for block, _ in inner.values()), default=-1)
        first = blocks - self.count if self.count > 0 else 0
        within = {name for name, (block, key) in inner.items() if block >= first and key in keys}
        return blocks, within | {name for name in places if name in keys}


@dataclass(frozen=True)
class Checkpoint:
    """An adapter on disk.

    Attributes:
        directory: Where it lies.
        format: ``LoRA-Null``, ``PEFT LoRA``, ``MLX LoRA``, ``GGUF LoRA`` or ``whole model``.
        config_file: The file that stands for it among the tests.
        config: That file's content, of an adapter that PEFT did not save as PEFT would have it.
        layers: Its adapted layers, in model order; never empty.
        tensors: Every tensor in its weight files, by name, but those that only training reads.
        outside: Names of trained tensors that no layer's test covers, as far as the format tells.
        base: The base model that its config names, a path or a hub id; None where it carries its base.
        base_revision: That base's revision on the hub.
        changed_base: Where an initialisation changed the base's weights, which base must be given, and why.
        is_whole: Whether it is a model without an adapter, whose layers are those that differ from its base's.
        cut: Why its predictions cannot be compared with its base's, whose vocabulary is larger; empty where they can.
        remarks: What its files tell beside, in sentences.
        last_blocks: Which layers its config says that it adapts, of an adapter of mlx-lm.
    """

    directory: Path
    format: str
    config_file: Path
    config: Mapping[str, Any]
    layers: tuple[LayerSpec, ...]
    tensors: Mapping[str, TensorInfo]
    outside: tuple[str, ...] = ()
    base: str | None = None
    base_revision: str | None = None
    changed_base: str | None = None
    is_whole: bool = False
    cut: str = ""
    remarks: tuple[str, ...] = ()
    last_blocks: LastBlocks | None = None

    @property
    def carries_base(self) -> bool:
        """Whether the directory holds the whole model."""
        return self.base is None

    def beside(self, layers: Collection[str]) -> list[TensorInfo]:
        """What training may have written, and is of none of ``layers``; of a whole model what differs from its base."""
        weights = (f"{layer.name}.weight" for layer in self.layers)
        names = sorted({*self.outside, *weights}) if self.is_whole else self.tensors
        return of_none((self.tensors[name] for name in names), layers)

    @property
    def has_no_down(self) -> bool:
        """Whether its updates are whole matrices, for which no down projection was asked."""
        return self.is_whole and all(layer.rank == 0 for layer in self.layers)

    @property
    def stamps(self) -> Stamps:
        """The files of its tensors as they were when their headers were read."""
        return frozenset((tensor.file, tensor.stamp) for tensor in self.tensors.values())

    @property
    def ranks(self) -> str:
        """The ranks of its layers in words: ``rank 16`` or ``ranks 8-64``."""
        ranks = {layer.rank for layer in self.layers}
        if ranks == {0}:
            return "no down projection"
        return f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)}-{max(ranks)}"


def of_none(tensors: Iterable[TensorInfo], layers: Collection[str]) -> list[TensorInfo]:
    """Those of ``tensors`` that lie in none of ``layers``, by their names here or as PEFT has them."""
    own = {f"{prefix}{name}" for name in layers for prefix in ("", PREFIX)}
    return [info for info in tensors if own.isdisjoint(accumulate(info.name.split("."), "{}.{}".format))]


def model_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts layer 2 before layer 10 and a block's projections in the order in which they run."""
    return tuple(
        (0, int(part), "") if part.isdecimal() and part.isascii() else (1, _PLACE.get(part, len(_PLACE)), part)
        for part in name.split(".")
    )


def is_layer_name(name: str) -> bool:
    """Whether ``name`` can be a layer's, and so a test's."""
    return _LAYER_NAME.fullmatch(name) is not None and name not in _OTHER_TESTS


def in_model_order(directory: Path, layers: Iterable[LayerSpec]) -> tuple[LayerSpec, ...]:
    """``layers``, sorted, each with a name that can be a test's.

    Raises:
        CheckpointError: A name holds characters that no module path has, such as ``::`` or ``[``.
    """
    layers = tuple(layers)
    for layer in layers:
        if not is_layer_name(layer.name):
            raise CheckpointError(
                f"{directory}: {quoted(layer.name)} is not the name of a layer; save the checkpoint again"
            )
    return tuple(sorted(layers, key=lambda layer: model_order(layer.name)))
