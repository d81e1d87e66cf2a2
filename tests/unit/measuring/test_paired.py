"""Two measured runs on the same windows: what is the same says so, and what changed is found sooner than apart."""

import json
import math
import random
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
import torch

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.judging.baseline import Comparison, Limit, compare
from pytest_nullspace.judging.invariants import Stage
from pytest_nullspace.measuring.about import of_texts
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.run.figures import of_layers
from pytest_nullspace.run.saved import from_json, to_json
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.text.tokenizer import load_tokenizer
from pytest_nullspace.text.windows import Window, draw_windows
from tests import tiny

WORLD = Path(__file__).parents[3] / "fixtures" / "world"
FEW = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
NONE_AT_ALL = [Limit(figure, 0, True) for figure in of_layers()]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    """A tiny model with random adapters."""
    directory = tiny.lora_null(tmp_path_factory.mktemp("made") / "ft")
    return load_model(open_checkpoint(directory), torch.device("cpu"), torch.float32)


def drawn(seed: int, count: int) -> list[Window]:
    """So many windows of tokens, of which each has its own few, so that they differ as texts do."""
    choose = random.Random(seed)
    chosen = []
    for start in range(count):
        few = [choose.randrange(3, 90) for _ in range(4)]
        chosen.append(Window(start, tuple(choose.choice(few) for _ in range(16))))
    return chosen


def run(
    adapted: AdaptedModel, windows: Sequence[Window], batch_size: int = 1, of: Collection[str] | None = None
) -> RunStats:
    """The run that a file of it gives."""
    layers = measure(adapted, [window.tokens for window in windows], batch_size=batch_size, layers=of)
    told = of_texts({"text": "a text"}, {"text": windows}, 16, {})
    return from_json(to_json(RunStats("ft", "text.txt", layers, len(layers), told)), "f.json")


def compared(now: RunStats, before: RunStats) -> Comparison:
    """Held against each other, no change for the worse allowed."""
    return compare(now, before, NONE_AT_ALL, Stage.TRAINED)


def test_a_thing_compared_with_itself_never_fails(adapted: AdaptedModel) -> None:
    """Of a hundred draws of windows, measured twice and in batches of another size, none is anything but no change."""
    for seed in range(100):
        windows = drawn(seed, 4)
        found = compared(run(adapted, windows, 1 + seed % 4, FEW), run(adapted, windows, of=FEW))
        assert found.unpaired is None
        assert found.is_none
        assert not any(found.regressions.values())


def test_a_planted_rise_is_found_with_a_third_of_the_windows() -> None:
    """A tenth more of every A is beyond the paired margin of 6 windows in each layer; two margins of 18 still miss it.

    In the shipped world, whose layers react to one another.
    """
    model = load_model(open_checkpoint(WORLD / "peft-null"), torch.device("cpu"), torch.float32, WORLD / "base")
    tokenize = load_tokenizer(WORLD / "base")
    windows = draw_windows((WORLD / "facts.txt").read_text(), tokenize, count=18, seqlen=64, seed=1)
    before = run(model, windows[:6]), run(model, windows)
    for layer in model.layers.values():
        layer.up.weight.data.mul_(1.1)  # type: ignore[operator]
    now = run(model, windows[:6]), run(model, windows)
    found, missed = compared(now[0], before[0]), 0
    for name, changes in found.changes.items():
        change = next(change for change in changes if change.figure == "effectiveness")
        apart = [told for of in (now, before) if (told := of[1].layer(name)) is not None]
        moved = apart[0].effectiveness - apart[1].effectiveness
        assert change.margin is not None
        assert change.now - change.before > change.margin
        missed += moved < math.hypot(*(told.margins["effectiveness"] for told in apart))
    assert missed


def test_the_windows_are_told_by_their_tokens() -> None:
    """Only windows of the very same tokens have the same digest, in this order."""
    windows = drawn(1, 3)
    digests = {
        str(of_texts({"text": "t"}, {"text": told}, 16, {})["text"]["windows_sha256"])
        for told in (windows, windows[::-1], windows[:2], [*windows[:2], Window(2, windows[2].tokens[:-1])])
    }
    assert len(digests) == 4
    same = [Window(9, window.tokens) for window in windows]
    assert of_texts({"text": "t"}, {"text": same}, 16, {})["text"]["windows_sha256"] in digests


def test_a_file_without_its_windows_is_compared_as_it_was(adapted: AdaptedModel) -> None:
    """A run that an older version saved gives changes without margins, and one reason."""
    whole = run(adapted, drawn(1, 4))
    document = json.loads(to_json(whole))
    for entry in document["stats"]:
        del entry["by_window"]
    old = from_json(json.dumps(document), "old.json")
    found = compared(whole, old)
    assert found.unpaired == "the earlier run does not tell what each window gave"
    assert found.is_none
    assert all(change.margin is None for changes in found.changes.values() for change in changes)
