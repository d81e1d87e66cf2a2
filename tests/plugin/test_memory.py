"""A model that was measured, or could not be, is no longer in memory when the next one is loaded."""

from pathlib import Path

import pytest

from tests import tiny
from tests.plugin.conftest import LOOSE, Gate

WATCHED = """
import gc
import weakref
import torch
import pytest_nullspace.measuring.streaming as measure
import pytest_nullspace.model as model

real, load, earlier, gone = measure.measure, model.load_model, [], []


def failing(adapted, *args, **more):
    activation = torch.ones(3)
    {body}


def watching(*args, **more):
    gone.extend(model() is None for model in earlier)
    adapted = load(*args, **more)
    earlier.append(weakref.ref(adapted.model))
    return adapted


def pytest_unconfigure():
    print("models that were gone:", *gone)


measure.measure, model.load_model = failing, watching
gc.disable()
"""
"""A conftest that tells at each loading whether the models of before are still there, and collects nothing itself."""

BODIES = {
    "refused": "raise measure.MeasurementError('refused')",
    "out of memory": "raise torch.OutOfMemoryError('CUDA out of memory')",
    "a bug": "raise KeyError('a bug')",
    "measured": "return real(adapted, *args, **more)",
}


@pytest.mark.parametrize("how", BODIES)
@pytest.mark.parametrize("spread", [(), ("--nullspace-device-map=cpu=1KB",)], ids=["in one place", "spread"])
def test_a_model_is_freed_before_the_next_is_loaded(
    how: str, spread: tuple[str, ...], checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """However its measurement ended, nothing keeps a model while a second one is loaded."""
    tiny.lora_null(pytester.path / "second")
    pytester.makeconftest(WATCHED.format(body=BODIES[how]))
    result = gate(*LOOSE, *spread, "--nullspace-model=second", "--tb=short", "-s")
    assert result.ret == (0 if how == "measured" else 1)
    result.stdout.fnmatch_lines(["*models that were gone: True"])
