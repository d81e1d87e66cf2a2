"""What a merge would leave of a checkpoint's updates, as a run tells it."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.judging.merging import Merge, merges
from pytest_nullspace.judging.survival import KEY, Survival
from pytest_nullspace.settings import Settings

if TYPE_CHECKING:
    from pytest_nullspace.checkpoint.arrays import Array

Sampled = Mapping[str, "Mapping[str, Array]"]
"""For each text, and then each layer that it reached, some rows of the layer's input."""


def merges_of(
    checkpoint: Checkpoint, settings: Settings, layers: Collection[str], initial: Checkpoint | None
) -> list[Merge]:
    """Where the weights of ``layers`` lie before and after the merge that the settings ask about; see `merges`."""
    return merges(checkpoint, layers, settings.base, initial) if settings.merge else []


def left(
    checkpoint: Checkpoint,
    settings: Settings,
    layers: Collection[str],
    initial: Checkpoint | None,
    rows: Sampled | None = None,
) -> dict[str, Any]:
    """What each type leaves of each layer's update; nothing where that is not asked for.

    Raises:
        CheckpointError: A weight cannot be had, or what training changed cannot be told.
    """
    if not settings.merge:
        return {}
    found = Survival.measured(merges_of(checkpoint, settings, layers, initial), settings.merge, rows or {})
    return {KEY: found.to_dict()}
