"""The plugin's own fixtures for runs of the gate, and an adapter that is made without PEFT."""

import json
from pathlib import Path

import pytest

from tests import fuzz
from tests.plugin.conftest import checkpoint, folder, gate, made, replay

__all__ = ["checkpoint", "folder", "gate", "made", "replay"]


@pytest.fixture
def adapter(pytester: pytest.Pytester) -> Path:
    """A sound PEFT adapter of one layer in ``adapter``."""
    where = pytester.mkdir("adapter")
    fuzz.weights(where / "adapter_model.safetensors", fuzz.ADAPTER)
    (where / "adapter_config.json").write_text(json.dumps(fuzz.ADAPTER_CONFIG))
    return where
