"""What a merge writes: each layer's weight before and after, some rows at a time, straight from the files by numpy.

``W`` is what the base held before training. A PEFT adapter's lies in its base. A LoRA-Null directory's is ``W_res``
where ``A`` started at zero, else ``W_res + A₀B₀`` of the start, so that the update is what training changed. That start
is given, or told by the base that the directory was made from.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pytest_nullspace.checkpoint import Checkpoint, lora_null, peft, whole
from pytest_nullspace.checkpoint.arrays import is_orthonormal, read_tensor, rows_of
from pytest_nullspace.checkpoint.header import FLOATING, TensorInfo, printable, quoted, read_json_object, read_tensors
from pytest_nullspace.checkpoint.hub import base_of
from pytest_nullspace.checkpoint.layers import LayerSpec
from pytest_nullspace.checkpoint.rounding import NF4_BLOCK
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.judging.begun import Begun
from pytest_nullspace.judging.serve_names import tail

if TYPE_CHECKING:
    from pytest_nullspace.checkpoint.arrays import Array

BLOCK = 1 << 18
"""Numbers of a weight that are in memory at a time."""
UNMOVED = 2.0**-18
"""How far a norm that PEFT took in float32 may lie beside the true one."""
OPTION = "--nullspace-merge"


@dataclass(frozen=True)
class Factors:
    """Where an update ``scale · A B`` lies, or with protection ``A B (1 − P_A P_B)``."""

    down: TensorInfo
    up: TensorInfo
    scale: float
    protect: tuple[TensorInfo, TensorInfo] | None = None

    def read(self) -> "tuple[Array, Array]":
        """A with the scale, shape ``(out, r)``, and B, shape ``(r, in)``, both float64."""
        up, down = self.scale * read_tensor(self.up), read_tensor(self.down)
        if self.protect is not None:
            down = down - down @ read_tensor(self.protect[0]) @ read_tensor(self.protect[1])
        return up, down


class Part(NamedTuple):
    """Some rows of a layer, each of shape ``(n, in)``, float64.

    Attributes:
        before: W.
        update: ``ΔW``, what is to be added.
    """

    before: "Array"
    update: "Array"


@dataclass(frozen=True)
class Merge:
    """One layer's merge.

    Attributes:
        name: The layer's module path.
        shape: ``(out, in)``.
        held: W, or W_res where a start is known.
        turned: Whether the file holds it as ``(in, out)``.
        now: The update; None of a whole model.
        start: What the update was before training, where that held a part of W, or how the base tells it.
        magnitude: DoRA's, one number an output.
        began_at: The same of the start; what did not move since is then no update, however its norms were rounded.
        merged: What a whole model holds now.
    """

    name: str
    shape: tuple[int, int]
    held: TensorInfo
    turned: bool = False
    now: Factors | None = None
    start: Factors | Begun | None = None
    magnitude: TensorInfo | None = None
    began_at: TensorInfo | None = None
    merged: TensorInfo | None = None

    @property
    def stored(self) -> str:
        """The type in which W lies in its file."""
        return self.held.dtype

    def parts(self) -> "Iterator[Part]":
        """The rows of the layer in turn, each block a whole number of the blocks that share a scale."""
        out, width = self.shape
        step = NF4_BLOCK // math.gcd(NF4_BLOCK, width)
        step *= max(1, BLOCK // (step * width))
        now, began = None if self.now is None else self.now.read(), self.start
        start = (
            began.read() if isinstance(began, Factors) else None if began is None or now is None else began.read(*now)
        )
        magnitude, began_at = (
            None if info is None else read_tensor(info).reshape(-1, 1) for info in (self.magnitude, self.began_at)
        )
        for first in range(0, out, step):
            rows = slice(first, min(first + step, out))
            before = rows_of(self.held, rows, turned=self.turned)
            if self.merged is not None:
                yield Part(before, rows_of(self.merged, rows, turned=self.turned) - before)
                continue
            assert now is not None
            update = now[0][rows] @ now[1]
            if start is not None:
                held = start[0][rows] @ start[1]
                before, update = before + held, update - held
            if magnitude is not None:
                merged = _stretched(before + update, magnitude[rows])
                before = before if began_at is None else _stretched(before, began_at[rows])
                update = merged - before
            yield Part(before, update)


def _stretched(weight: "Array", magnitude: "Array") -> "Array":
    """DoRA's ``m ∘ V / ‖V‖``, by rows; where ``m`` is ``‖V‖`` but for rounding nothing is stretched."""
    import numpy as np

    factor = magnitude / np.linalg.norm(weight, axis=1, keepdims=True)
    stretched: Array = weight * np.where(np.abs(factor - 1) <= UNMOVED, 1.0, factor)
    return stretched


def merges(
    checkpoint: Checkpoint, layers: Collection[str], base: str | None, initial: Checkpoint | None = None
) -> list[Merge]:
    """Where the weights of each layer lie, before and after a merge, by headers alone.

    Args:
        checkpoint: The adapter.
        layers: The names of its layers.
        base: The base that the user names, if one is named.
        initial: From which training started, if that is known.

    Raises:
        CheckpointError: The weight of a layer is not at hand, quantised, or of another shape, or what training changed
            cannot be told.
    """
    specs = [spec for spec in checkpoint.layers if spec.name in layers]
    if checkpoint.is_whole:
        of_whole = _Base.read(checkpoint, checkpoint.base)
        return [
            Merge(
                spec.name,
                (spec.out_features, spec.in_features),
                *of_whole.weight(spec),
                merged=checkpoint.tensors[f"{spec.name}{whole.WEIGHT}"],
            )
            for spec in specs
        ]
    if checkpoint.carries_base:
        return [*_of_directory(checkpoint, specs, base, initial)]
    start = None if initial is None or initial.format not in peft.FORMATS else initial
    if checkpoint.changed_base is not None and start is None:
        raise CheckpointError(
            f"{OPTION}: {checkpoint.directory} started with a part of W in its own matrices, so what training changed "
            f"cannot be told from it; give the adapter as it was at the start by --nullspace-init=DIR"
        )
    of_base = _Base.read(checkpoint, base)
    return [
        Merge(
            spec.name,
            (spec.out_features, spec.in_features),
            *of_base.weight(spec),
            now=_factors(checkpoint, spec),
            start=None if start is None else _begun(start, spec),
            magnitude=_magnitude(checkpoint, spec),
            began_at=None if start is None else _magnitude(start, spec),
        )
        for spec in specs
    ]


def _of_directory(
    checkpoint: Checkpoint, specs: Collection[LayerSpec], base: str | None, initial: Checkpoint | None
) -> Iterator[Merge]:
    """The merge of each layer of a LoRA-Null or CorDA directory."""
    has_start = initial is not None and initial.carries_base and not initial.is_whole
    of_base = None if base is None or has_start else _Base.read(checkpoint, base)
    least = min(specs, key=lambda spec: spec.in_features * spec.out_features, default=None)
    for spec in specs:
        held, now = checkpoint.tensors[f"{spec.name}.{lora_null.BASE}"], _factors(checkpoint, spec)
        start: Factors | Begun | None = None
        if has_start and initial is not None:
            start = _begun(initial, spec)
        elif of_base is not None:
            start = Begun(spec.name, spec.rank, *of_base.weight(spec), held, str(checkpoint.directory))
            if spec is least:  # what one cannot tell none can, and a whole pass would be lost to it
                start.read(*now.read())
        elif not is_orthonormal(now.down):
            raise CheckpointError(
                f"{OPTION}: {checkpoint.directory}: layer {printable(spec.name)}: the rows of B are not orthonormal, "
                "so A need not have started at zero, and what training changed cannot be told from W_res and A B "
                "alone; give the checkpoint from which training started by --nullspace-init=DIR, or the base that it "
                "was made from by --nullspace-base=DIR"
            )
        yield Merge(spec.name, (spec.out_features, spec.in_features), held, now=now, start=start)


def _factors(checkpoint: Checkpoint, spec: LayerSpec) -> Factors:
    is_peft = checkpoint.format in peft.FORMATS
    prefix, parts = (peft.PREFIX, (peft.DOWN, peft.UP)) if is_peft else ("", (lora_null.DOWN, lora_null.UP))
    down, up = (checkpoint.tensors[f"{prefix}{spec.name}.{part}"] for part in parts)
    guards = [checkpoint.tensors.get(f"{spec.name}.{part}") for part in (lora_null.PROTECT_UP, lora_null.PROTECT_DOWN)]
    protect = (guards[0], guards[1]) if guards[0] is not None and guards[1] is not None else None
    return Factors(down, up, 1.0 if spec.scale is None else spec.scale.value, protect)


def _begun(initial: Checkpoint, spec: LayerSpec) -> Factors:
    """The update of that layer at the start.

    Raises:
        CheckpointError: The start has no such layer.
    """
    first = next((other for other in initial.layers if other.name == spec.name), None)
    if first is None or (first.in_features, first.out_features) != (spec.in_features, spec.out_features):
        raise CheckpointError(
            f"--nullspace-init: {initial.directory}: has no layer {printable(spec.name)} of the same shape; it is not "
            "the start of this checkpoint"
        )
    return _factors(initial, first)


def _magnitude(checkpoint: Checkpoint, spec: LayerSpec) -> TensorInfo | None:
    names = (f"{peft.PREFIX}{spec.name}.{name}" for name in peft.MAGNITUDES)
    return next((checkpoint.tensors[name] for name in names if name in checkpoint.tensors), None)


@dataclass(frozen=True)
class _Base:
    """The tensors of a base model.

    Attributes:
        tensors: All of them, by name.
        by_tail: The names of its weights by what stands of them from the list of blocks on.
        turned: Whether its linear layers hold their weight as ``(in, out)``.
        where: What it is, for messages.
    """

    tensors: Mapping[str, TensorInfo]
    by_tail: Mapping[str, list[str]]
    turned: bool
    where: str

    @classmethod
    def read(cls, checkpoint: Checkpoint, named: str | None) -> "_Base":
        """The base of an adapter or a whole model, by its headers.

        Raises:
            CheckpointError: It cannot be had, or is a GGUF file.
        """
        path = base_of(checkpoint, named)
        if path.is_file():
            raise CheckpointError(
                f"{OPTION}: {path}: a GGUF file holds its weights quantised, and a merge would begin with its "
                "rounding; give the base from which it was converted by --nullspace-base=DIR"
            )
        tensors = read_tensors(path, "model")
        config = read_json_object(path / "config.json", "the base model's config")
        turned = bool(checkpoint.config.get("fan_in_fan_out")) or config.get("model_type") in whole.TRANSPOSED
        by_tail: dict[str, list[str]] = {}
        for name in tensors:
            if name.endswith(whole.WEIGHT):
                by_tail.setdefault(tail(name.removesuffix(whole.WEIGHT)), []).append(name)
        return cls(tensors, by_tail, turned, str(path))

    def weight(self, spec: LayerSpec) -> tuple[TensorInfo, bool]:
        """W of a layer, and whether it is turned; a head that is tied is the embeddings.

        Raises:
            CheckpointError: It is not there under any name, or not as numbers of this shape.
        """
        known = [f"{spec.name}{whole.WEIGHT}"] if f"{spec.name}{whole.WEIGHT}" in self.tensors else []
        known = known or self.by_tail.get(tail(spec.name), [])
        if not known and spec.name.rpartition(".")[2] == "lm_head":
            known = self.by_tail.get("embed_tokens", []) or self.by_tail.get("wte", [])
        if len(known) != 1:
            told = f"no tensor {quoted(spec.name + whole.WEIGHT)}" if not known else f"several, such as {known[0]}"
            raise CheckpointError(
                f"{OPTION}: {self.where}: for layer {printable(spec.name)} there is {told}, so what a merge makes of "
                "it cannot be told; give the base that the adapter was trained on by --nullspace-base=DIR"
            )
        (name,) = known
        held = self.tensors[name]
        if held.dtype not in FLOATING:
            raise CheckpointError(
                f"{OPTION}: {held.file}: tensor {printable(name)} is {held.dtype}, quantised, and a merge would begin "
                f"with its rounding; give the base in bfloat16, float16 or float32 by --nullspace-base=DIR"
            )
        shape = spec.out_features, spec.in_features
        turned = self.turned and name not in self.by_tail.get("wte", [])
        if held.shape != (shape[::-1] if turned else shape):
            raise CheckpointError(
                f"{OPTION}: {held.file}: tensor {printable(name)} is {list(held.shape)}, but layer "
                f"{printable(spec.name)} {list(shape)}; give the base that the adapter was trained on by "
                f"--nullspace-base=DIR"
            )
        return held, turned
