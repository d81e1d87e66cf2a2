"""pytest-nullspace: a pytest gate for fine-tuned adapters. Importing it imports neither torch nor transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pytest_nullspace.errors import (
    CheckpointError,
    MeasurementError,
    NullspaceError,
    NullspaceWarning,
    OptionError,
    StatsError,
    TextError,
)

if TYPE_CHECKING:
    from pytest_nullspace.callback import NullspaceCallback
    from pytest_nullspace.checkpoint import Checkpoint, LayerSpec, open_checkpoint
    from pytest_nullspace.judging.invariants import Expectations, Override, Stage, judge
    from pytest_nullspace.judging.verdicts import Threshold, Tier, Verdict
    from pytest_nullspace.measuring.streaming import measure
    from pytest_nullspace.model import load_model
    from pytest_nullspace.run.stats import LayerStats, RunStats
    from pytest_nullspace.shell.called import Report, gate

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "checkpoint",
    "LayerSpec": "checkpoint",
    "open_checkpoint": "checkpoint",
    "Expectations": "judging.invariants",
    "Override": "judging.invariants",
    "Stage": "judging.invariants",
    "Threshold": "judging.invariants",
    "Tier": "judging.invariants",
    "Verdict": "judging.invariants",
    "judge": "judging.invariants",
    "measure": "measuring.streaming",
    "load_model": "model",
    "LayerStats": "run.stats",
    "RunStats": "run.stats",
    "Report": "shell.called",
    "gate": "shell.called",
    "NullspaceCallback": "callback",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Expectations",
    "LayerSpec",
    "LayerStats",
    "MeasurementError",
    "NullspaceCallback",
    "NullspaceError",
    "NullspaceWarning",
    "OptionError",
    "Override",
    "Report",
    "RunStats",
    "Stage",
    "StatsError",
    "TextError",
    "Threshold",
    "Tier",
    "Verdict",
    "gate",
    "judge",
    "load_model",
    "measure",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module where it lives, when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """All public names, imported or not."""
    return [*__all__, "__version__"]
