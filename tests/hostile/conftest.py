"""The plugin's own fixtures for runs of the gate, and an adapter that is made without PEFT."""

import json
from pathlib import Path

import pytest

from tests import fuzz
from tests.plugin.conftest import checkpoint, gate, made, replay

__all__ = ["checkpoint", "gate", "made", "replay"]


@pytest.fixture
def adapter(pytester: pytest.Pytester) -> Path:
    """A sound PEFT adapter of one layer in ``adapter``."""
    folder = pytester.mkdir("adapter")
    fuzz.weights(folder / "adapter_model.safetensors", fuzz.ADAPTER)
    (folder / "adapter_config.json").write_text(json.dumps(fuzz.ADAPTER_CONFIG))
    return folder
