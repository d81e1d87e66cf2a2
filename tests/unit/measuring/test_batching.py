"""How many windows share a forward on a card: what its first forwards tell, here by a clock that is set by them."""

from pathlib import Path

import pytest
import torch

from pytest_nullspace.measuring.batching import GPU_TOKENS, LARGEST, MOST_PREDICTED, PREDICTED, Batching, suiting
from pytest_nullspace.measuring.streaming import measure
from tests import tiny
from tests.unit.measuring.test_measure import agree, load

TOKENS = 8


class Card:
    """A device whose forwards take a second to start, beside a second for so many tokens, and more at their first."""

    def __init__(self, each: int) -> None:
        self.now, self.each, self.seen = 0.0, each, set[int]()

    def run(self, tokens: int) -> None:
        self.now += 1 + tokens / self.each + (0 if tokens in self.seen else 100)
        self.seen.add(tokens)

    def clock(self) -> float:
        return self.now


def sizes(card: Card, first: int, windows: int) -> list[int]:
    """How many windows each forward took until so many were read."""
    batching, found = Batching(first, card.clock), list[int]()
    while sum(found) < windows:
        count = min(batching.size, windows - sum(found))
        began = batching.begin(count)
        card.run(count * TOKENS)
        batching.counted(count, count * TOKENS, began)
        found.append(count)
    assert batching.first == first
    return found


def test_the_size_doubles_until_that_gains_too_little() -> None:
    """Each size runs twice and is judged by its second forward; where it gains less than a twentieth it is given up."""
    # 8 tokens a second of starting: 1 window takes 1 + 1 s, 2 in one forward 1 + 2, ... so 16 gain 6 % over 8, 32 3 %.
    assert sizes(Card(TOKENS), 1, 110) == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 16]
    assert sizes(Card(TOKENS), 1, 200)[10:] == [32, 32, 16, 16, 16, 16, 10]


def test_what_is_slow_by_itself_stays_as_it_is() -> None:
    """Where a forward's start is nothing beside the rest, one doubling is tried, and no more."""
    assert sizes(Card(1), 4, 50) == [4, 4, 8, 8, 4, 4, 4, 4, 4, 4, 2]


def test_no_size_is_beyond_the_largest() -> None:
    """However much it would gain."""
    most = max(sizes(Card(10**9), 1, 4 * LARGEST // TOKENS))
    assert most * TOKENS == LARGEST
    assert Batching.trying(1, torch.device("cuda"), 151_936)._largest * 151_936 <= MOST_PREDICTED


def test_a_cpu_and_a_size_that_was_asked_for_stay() -> None:
    """Nothing is timed there."""
    for batching in Batching.trying(3, torch.device("cpu")), Batching(3):
        for _ in range(4):
            assert batching.begin(3) is None
            batching.counted(3, 3 * TOKENS, None)
        assert batching.size == 3


@pytest.mark.parametrize(
    ("seqlen", "predicted", "want"),
    [(2048, 0, 8), (2048, 32_000, 4), (2048, 151_936, 1), (512, 151_936, 3), (10**6, 0, 1)],
)
def test_what_suits_at_first(seqlen: int, predicted: int, want: int) -> None:
    """A card begins with some thousand tokens, fewer where the predictions of so many would be large."""
    assert suiting(torch.device("cuda"), seqlen, predicted) == want
    assert want == 1 or want * seqlen <= min(GPU_TOKENS, PREDICTED // max(1, predicted))


def test_figures_do_not_depend_on_what_was_tried(tmp_path: Path) -> None:
    """Each window is counted once, also where some size does not fit; that is told only where the first does not."""
    model = load(tiny.lora_null(tmp_path))
    windows = [[n % 50 + 1, *range(1, 12 + n // 30)] for n in range(60)]
    want = measure(model, windows)
    for most, told in ((100, []), (4, []), (1, [1])):
        card, shrunk, lengths = Card(TOKENS), list[int](), list[int]()

        def forward(_: object, args: tuple[torch.Tensor], __: object, most: int = most, card: Card = card) -> None:
            lengths.append(len(args[0]))  # noqa: B023
            if len(args[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            card.run(args[0].shape[0] * args[0].shape[1])

        handle = model.model.get_submodule("model.layers.1").register_forward_hook(forward)
        got = measure(model, windows, batch_size=Batching(2, card.clock), shrunk=shrunk.append)
        handle.remove()
        agree(got, want, 1e-6)
        assert shrunk == told
        assert max(lengths) == {100: 16, 4: 8, 1: 2}[most]


def test_what_fitted_before_is_taken_again(tmp_path: Path) -> None:
    """Where fewer windows than were to be tried are left, and too many, those of the beginning fit still."""
    model, shrunk, lengths = load(tiny.lora_null(tmp_path)), list[int](), list[int]()

    def forward(_: object, args: tuple[torch.Tensor], __: object) -> None:
        lengths.append(len(args[0]))
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.model.get_submodule("model.layers.1").register_forward_hook(forward)
    seconds = iter(range(9))
    windows = [[n + 1, *range(1, 12)] for n in range(7)]
    measure(model, windows, batch_size=Batching(2, lambda: next(seconds)), shrunk=shrunk.append)
    handle.remove()
    assert (lengths, shrunk) == ([2, 2, 3, 2, 1], [])
