"""Where the predictions changed most: the places of the text, and the probabilities of both models there."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import topics
from pytest_nullspace.measuring.drift import APART, SPOTS, Predictions
from pytest_nullspace.measuring.forward import run
from pytest_nullspace.measuring.passages import AFTER, BEFORE, LONGEST, TOLD, Spot, passages
from pytest_nullspace.text.tokenizer import LoadedTokenizer, load_tokenizer
from pytest_nullspace.text.windows import Window, draw_windows, windows_at
from tests import tiny

CPU = torch.device("cpu")
LENGTH = 50


@pytest.fixture
def tokenizer(tmp_path: Path) -> LoadedTokenizer:
    """The tiny models' own, one token a character."""
    tiny.tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def spots(model: Any, base: Any, windows: list[list[int]]) -> list[Spot]:
    """Those of two models."""
    predictions = Predictions(lambda: nullcontext(base), len(windows), CPU)
    with torch.inference_mode():
        for number, window in enumerate(windows):
            tokens = torch.tensor([window])
            predictions.add(number, predictions.compared(run(model, tokens).logits, tokens))
    return predictions.spots(len(windows))


def test_the_places_are_those_of_the_largest_divergence() -> None:
    """In each window the largest of every few places, with what both models predict there, as naively in float64."""
    model, base = tiny.llama(initializer_range=0.5, vocab_size=120), tiny.llama(initializer_range=0.4, vocab_size=120)
    torch.manual_seed(3)
    windows = [torch.randint(0, 120, (LENGTH,)).tolist(), [5, 9], [7]]
    found = spots(model, base, windows)
    assert [spot.window for spot in found] == [0] * SPOTS + [1]  # what follows nothing is no place
    with torch.inference_mode():
        p, q = (of(input_ids=torch.tensor([windows[0]])).logits[0].double().softmax(-1) for of in (base, model))
    divergences = (p * (p.log() - q.log())).sum(-1)[:-1].tolist()
    blocks = [range(first, min(first + APART, LENGTH - 1)) for first in range(0, LENGTH - 1, APART)]
    want = sorted((max(block, key=divergences.__getitem__) for block in blocks), key=divergences.__getitem__)[::-1]
    assert [spot.place for spot in found[:SPOTS]] == want[:SPOTS]
    for spot in found[:SPOTS]:
        target = windows[0][spot.place + 1]
        numbers = (spot.divergence, spot.base, spot.adapted)
        naive = (divergences[spot.place], float(p[spot.place, target]), float(q[spot.place, target]))
        assert numbers == pytest.approx(naive, rel=1e-6)
        assert (spot.likeliest, spot.instead) == (int(p[spot.place].argmax()), int(q[spot.place].argmax()))


def test_predictions_that_are_no_numbers_are_no_places() -> None:
    """What cannot be compared is left out, and the others are told."""
    model = tiny.llama()
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[3] = torch.nan
    assert spots(model, tiny.llama(), [[1, 2, 3, 4]]) == []


def test_a_passage_stands_where_the_text_has_it(tokenizer: LoadedTokenizer) -> None:
    """Its characters are the token's, what stands before it ends there, and no more is quoted than is read."""
    text = tiny.TEXT
    windows = draw_windows(text, tokenizer, count=4, seqlen=LENGTH, seed=1)
    drawn = [Spot(number, place, place / 10, 0.9, 0.1, 97, 98) for number in range(4) for place in (2, 30, 48)]
    found = passages(drawn, windows, text, tokenizer, LENGTH)
    assert len(found) <= TOLD
    assert [of.divergence for of in found] == sorted((of.divergence for of in found), reverse=True)
    for of in found:
        assert of.end is not None
        assert text[of.start : of.end] == of.token
        assert text[: of.start].endswith(of.before)
        assert text[of.end :].startswith(of.after)
        assert any(window.start + LENGTH >= of.end + len(of.after) for window in windows if window.start <= of.start)
        assert (len(of.before) <= BEFORE, len(of.after) <= AFTER) == (True, True)
        assert (of.likeliest, of.instead) == ("a", "b")


def test_windows_that_overlap_tell_a_place_once(tokenizer: LoadedTokenizer) -> None:
    """The same characters are not told again from another window."""
    text = "".join(map(chr, range(33, 126))) * 2
    windows = windows_at(text, tokenizer, (0, 10), LENGTH)
    both = [Spot(0, 30, 2.0, 0.9, 0.1, 97, 98), Spot(1, 20, 1.9, 0.9, 0.1, 97, 98)]
    assert len(passages(both, windows, text, tokenizer, LENGTH)) == 1


def test_a_tokenizer_that_does_not_tell_where_gives_the_window() -> None:
    """Then the passage is told by what its tokens are, from the character at which the window begins."""
    tokenizer = LoadedTokenizer(
        lambda text: list(map(ord, text)),
        lambda ids: "".join(map(chr, ids)),
        lambda _: None,
        lambda text: (list(map(ord, text)), None),
    )
    window = Window(7, tuple(map(ord, "abcdefgh")))
    (found,) = passages([Spot(0, 3, 1.0, 0.9, 0.1, 97, 98)], [window], "…", tokenizer, 8)
    assert (found.start, found.end, found.before, found.token, found.after) == (7, None, "abcd", "e", "fgh")
    assert len(found.likeliest) <= LONGEST


@pytest.mark.parametrize("seed", range(3))
def test_a_topic_that_was_forgotten_is_named(seed: int) -> None:
    """Of three topics of the world the one whose answers were trained anew does not pass, and the others do."""
    found = topics.measured(seed)
    assert found.is_named, found
