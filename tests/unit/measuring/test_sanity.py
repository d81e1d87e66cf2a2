"""Mistakes in how a base is measured: each makes it look as if it could not read, and is told."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.build import WORLD
from pytest_nullspace import gate
from pytest_nullspace.judging.sanity import insane
from pytest_nullspace.measuring.about import of_texts
from pytest_nullspace.measuring.drift import begun, drift
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.run.stats import Drift, RunStats
from pytest_nullspace.text.tokenizer import load_tokenizer
from pytest_nullspace.text.windows import Window, draw_windows
from tests import saved, tiny
from tests.adapters import adapter

CPU = torch.device("cpu")


class Counting(nn.Module):
    """A model that has learned to count, but only behind the token that begins a text."""

    BEGIN, VOCABULARY = 0, 200

    def forward(self, input_ids: Tensor) -> Any:
        """Its logits, each for the number that comes next."""
        logits = torch.zeros(*input_ids.shape, self.VOCABULARY)
        logits.scatter_(-1, ((input_ids + 1) % self.VOCABULARY)[..., None], 9.0)
        return SimpleNamespace(logits=logits * (input_ids[:, :1] == self.BEGIN)[..., None])


class Unshifted(nn.Module):
    """A model whose logits are held against the token that it has just read, as with labels that are not shifted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        """The logits of the model, one place late."""
        return SimpleNamespace(logits=self.model(input_ids=input_ids).logits.roll(-1, dims=1))


@pytest.fixture(scope="module")
def shipped() -> AdaptedModel:
    """The adapter that the repository ships."""
    return load_model(WORLD / "null-v2")


def told(model: nn.Module, base: Any, windows: Sequence[Window], vocabulary: int) -> list[str]:
    """What is said of the base by which the drift of ``model`` on these windows was measured."""
    moved = drift(model, base, [window.tokens for window in windows], CPU)
    about = {**saved.ABOUT, **of_texts({"text": "a text"}, {"text": windows}, 128, {}, vocabulary)}
    return list(insane(RunStats("ft", "text", saved.run().layers, 9, about, Drift("the base", moved))))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("none", None),
        ("wrong tokenizer", "the text, its tokenizer or the base's weights are wrong"),
        ("labels not shifted", "is not below"),
        ("adapter on", "the base was measured with its adapter on"),
    ],
)
def test_a_mistake_in_measuring_the_base_is_told(mistake: str, said: str | None, shipped: AdaptedModel) -> None:
    """Of the shipped adapter nothing is said, until its tokens are others, its labels late or its adapter stays on."""
    text = Path(WORLD / "facts.txt").read_text("utf-8")
    windows = draw_windows(text, load_tokenizer(WORLD / "base"), count=4, seqlen=128, seed=1)
    config: Any = shipped.model.config
    vocabulary: int = config.vocab_size
    if mistake == "wrong tokenizer":
        windows = tuple(Window(w.start, tuple((7 * t + 3) % vocabulary for t in w.tokens)) for w in windows)
    assert shipped.switched_off is not None
    base: Any = (lambda: nullcontext(shipped.model)) if mistake == "adapter on" else shipped.switched_off
    model: nn.Module = shipped.model
    if mistake == "labels not shifted":
        with shipped.switched_off() as plain:
            late = Unshifted(plain)
            found = told(late, lambda: nullcontext(late), windows, vocabulary)
    else:
        found = told(model, base, windows, vocabulary)
    assert bool(found) == (said is not None)
    assert said is None or any(said in fault for fault in found)


@pytest.mark.parametrize("begins", [True, False], ids=["with BOS", "BOS missing"])
def test_a_missing_first_token_is_told(begins: bool) -> None:
    """A model that reads only what begins with its first token cannot read the same windows without it."""
    tokens = [tuple(range(first, first + 60)) for first in (5, 50, 100)]
    windows = [Window(0, (Counting.BEGIN, *of) if begins else of) for of in tokens]
    found = told(Counting(), lambda: nullcontext(Counting()), windows, Counting.VOCABULARY)
    wrong = [fault for fault in found if "is not below" in fault]
    assert bool(wrong) is not begins


def test_what_the_first_token_is_worth_is_the_difference_of_losses() -> None:
    """Without it the loss is that of guessing, behind it that of counting, of the very same predictions."""
    without, behind = begun(lambda: nullcontext(Counting()), range(5, 60), Counting.BEGIN, CPU)
    assert without == pytest.approx(math.log(Counting.VOCABULARY), rel=1e-6)
    assert behind == pytest.approx(math.log(1 + (Counting.VOCABULARY - 1) * math.exp(-9)), rel=1e-5)


def test_the_first_token_fits_before_a_window_as_long_as_the_model_takes(tmp_path: Path) -> None:
    """Of a model with a table of positions no more is read than it has, though the windows fill it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    directory = adapter(tmp_path, transformers.GPT2LMHeadModel(config), r=2, target_modules=["c_attn"])
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    report = gate(directory, tmp_path / "text.txt", calib_size=2)
    assert report.run.drift is not None
    assert report.run.about["text"]["seqlen"] == 64
