"""The predictions against the base model's, where the two models do not begin on one device."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring import loading
from pytest_nullspace.measuring.drift import drift
from pytest_nullspace.model import AdaptedModel, load_model
from tests import tiny

CPU, META = torch.device("cpu"), torch.device("meta")
WINDOWS = [list(range(3, 40)), list(range(60, 100))]


class Elsewhere(nn.Module):
    """A base model that takes its input on the meta device, which stands for another card."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        with torch.inference_mode():
            self._answers = iter([model(input_ids=torch.tensor([window])) for window in WINDOWS])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert input_ids.device == META
        assert not use_cache
        return next(self._answers)


@pytest.fixture
def adapted(tmp_path: Path) -> AdaptedModel:
    """A tiny model with random adapters."""
    return load_model(open_checkpoint(tiny.lora_null(tmp_path / "ft")), CPU, torch.float32)


def test_each_model_gets_the_tokens_where_it_begins(adapted: AdaptedModel) -> None:
    """A base that takes its input on another device than the adapted model gets it there, and the drift is the same."""
    base, elsewhere = tiny.llama(), Elsewhere(tiny.llama())
    want = drift(adapted.model, lambda: nullcontext(base), WINDOWS, CPU)
    assert drift(adapted.model, lambda: nullcontext(elsewhere), WINDOWS, CPU, base_device=META) == want
    assert want.divergence > 0


@pytest.mark.parametrize("which", ["start", "base"])
def test_a_base_that_is_spread_tells_where_it_begins(
    which: str, adapted: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a start and of a plain base under a device map the first card that it was given is where its tokens go."""
    tiny.llama().save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "ft")
    monkeypatch.setattr("accelerate.infer_auto_device_map", lambda *_, **__: {"model": "cpu", "lm_head": 1})
    monkeypatch.setattr("accelerate.dispatch_model", lambda *_, **__: None)
    settings: Any = SimpleNamespace(device_map={"cpu": 1}, base=None)
    initial, base = (checkpoint, None) if which == "start" else (None, tmp_path / "base")
    _, place = loading.true_base(adapted, checkpoint, initial, base, settings, CPU, torch.float32).load()
    assert place == torch.device("cuda:1")
