"""What is told of a checkpoint without a pass: the run as planned, its weights alone, its tensors and their start."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.arrays import require_finite
from pytest_nullspace.checkpoint.header import TensorInfo, read_tensors, require_unchanged
from pytest_nullspace.checkpoint.hub import base_of
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.judging.audit import Audit, audit
from pytest_nullspace.judging.odd import oddities
from pytest_nullspace.judging.weights import STATEMENT, weigh
from pytest_nullspace.measuring import about
from pytest_nullspace.measuring.hashing import hashes
from pytest_nullspace.measuring.inputs import may_be_rows
from pytest_nullspace.measuring.left import left
from pytest_nullspace.measuring.limits import default_length
from pytest_nullspace.measuring.measurement import with_task
from pytest_nullspace.run.stats import LayerStats, RunStats
from pytest_nullspace.settings import PREFIX, Settings


def planned(checkpoint: Checkpoint, settings: Settings) -> tuple[RunStats, frozenset[str]]:
    """The run as it will be, as far as that is known before the text is read and the model loaded.

    Returns:
        A run without figures, and the names in `judging.comparable.COMPARED` that it already tells.
    """
    seqlen = settings.seqlen
    if seqlen is None and checkpoint.carries_base:
        seqlen = default_length(checkpoint.config)
    lost = math.nan
    down = (None if checkpoint.has_no_down else lost,)
    layers = tuple(
        LayerStats(
            spec.name, 0, spec.in_features, spec.rank, spec.out_features,
            lost, *down, lost, lost, lost, *down, *down, lost, lost,
        )
        for spec in checkpoint.layers
    )  # fmt: skip
    if settings.task_dataset is not None:
        layers = with_task(layers, layers)
    told = {"windows": None if may_be_rows(settings) else settings.calib_size, "seqlen": seqlen}
    libraries = about.of_libraries(*about.libraries(checkpoint))
    tells = {"text": told, "settings": {"seed": settings.seed}, "libraries": libraries}
    known = {"seed", "rank", "widths", "figures", "libraries"} | {
        what for what, value in told.items() if value is not None
    }
    return RunStats(str(checkpoint.directory), settings.calib_dataset, layers, len(layers), tells), frozenset(known)


def read_files(
    checkpoint: Checkpoint, settings: Settings, layers: Collection[str], initial: Checkpoint | None = None
) -> RunStats:
    """A run in which nothing was measured: no text, no model, no torch; weighed where the settings ask for it."""
    if settings.weights_only:
        require_finite(checkpoint.beside([spec.name for spec in checkpoint.layers]))
    weighed: dict[str, Any] = {}
    if settings.weights_only:
        weights = weigh(checkpoint, layers)
        odd = oddities(weights).to_dict()
        weighed = {"statement": STATEMENT, "weights": weights.to_list(), "odd_layers": odd}
    return RunStats(
        model_path=str(checkpoint.directory),
        calib_dataset="",
        layers=(),
        checkpoint_layers=len(checkpoint.layers),
        about={
            **weighed,
            **left(checkpoint, settings, layers, initial),
            **about.of_checkpoint(checkpoint, hashes(checkpoint)),
            "settings": {"layers": settings.layers, "stage": settings.stage},
            "libraries": about.of_libraries(),
        },
    )


def audit_checkpoint(checkpoint: Checkpoint, initial: Checkpoint, settings: Settings, layers: Collection[str]) -> Audit:
    """Hold every tensor of the checkpoint against its start; across formats against the tensors of the base as well.

    Raises:
        CheckpointError: The two do not belong together, or a file cannot be read.
    """

    def base(of: Checkpoint, other: Checkpoint) -> Mapping[str, TensorInfo] | None:
        if of.carries_base or not other.carries_base:
            return None
        path = base_of(of, settings.base)
        if path.is_file():
            raise CheckpointError(
                f"{path}: {PREFIX}init holds the base's weights against those of the start one by one, and a GGUF file "
                f"holds others, quantised; give them as safetensors by {PREFIX}base=DIR"
            )
        return read_tensors(path, "model")

    require_unchanged(checkpoint.stamps | initial.stamps)
    return audit(
        checkpoint,
        initial,
        layers=layers,
        variant=settings.variant,
        trained_base=base(checkpoint, initial),
        initial_base=base(initial, checkpoint),
    )
