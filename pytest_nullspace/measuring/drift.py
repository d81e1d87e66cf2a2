"""Functional drift: what the adapter makes of the base model's predictions, token by token.

The adapted predictions are those of the forward that is measured; the base reads the same windows once more. The
predictions of one batch are all that is kept.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, nll_loss

from pytest_nullspace import kernels
from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.forward import run
from pytest_nullspace.measuring.passages import Spot
from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.measuring.transfer import sent
from pytest_nullspace.run.stats import TextDrift
from pytest_nullspace.run.uncertainty import jackknife
from pytest_nullspace.run.windows import OF_PREDICTIONS, ByWindow

CHUNK, CHUNK_BYTES = 64, 1 << 26
"""Rows whose predictions are compared at once, so that no second copy of a batch's is made: so many, and on a card,
where each operation costs its start, as many more as take these bytes in float64."""

IGNORED = -100
"""The target of what is not scored."""

SPOTS, APART = 3, 16
"""Predictions of each window that are kept as the most changed, at most one of so many that follow each other."""
_SUMS, _OF_SPOT = 5, 6

Base = Callable[[], AbstractContextManager[nn.Module]]
"""Within the context the model that it gives is the base model."""


class Predictions:
    """The adapted model's predictions on one text, compared with the base model's batch by batch.

    Attributes:
        seconds: What the base's forwards and the comparisons took.
    """

    def __init__(
        self, base: Base, windows: int, place: torch.device, counted: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Begin with nothing compared.

        Args:
            base: Gives the base model.
            windows: How many windows there are at most.
            place: Where the base model takes its input.
            counted: The places in each of the tokens whose predictions alone count; None where all do.
        """
        self._base, self._place, self._counted = base, place, counted
        self._by_window = torch.zeros(windows, _SUMS, dtype=torch.float64)
        self._spots = torch.full((windows, SPOTS * _OF_SPOT), -1.0, dtype=torch.float64)
        self.seconds = 0.0

    def compared(
        self, adapted: Tensor, tokens: Tensor, first: int = 0, beside: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Tensor:
        """Compare the predictions of one batch; nothing is counted yet.

        Args:
            adapted: The adapted model's logits, shape ``(b, length, vocabulary)``.
            tokens: What it read, shape ``(b, length)``.
            first: The number of its first window.
            beside: What it read beside them.

        Returns:
            A row a window, for `add`.
        """
        _wait(tokens.device)
        start = time.perf_counter()
        with self._base() as plain:
            before = run(plain, tokens.to(self._place), beside).logits
        self.seconds += time.perf_counter() - start
        return self.held(adapted, before, tokens, first)

    def held(self, adapted: Tensor, before: Tensor, tokens: Tensor, first: int = 0) -> Tensor:
        """The same where the base model's logits, ``before``, are there."""
        start = time.perf_counter()
        kept = [None] * len(tokens) if self._counted is None else self._counted[first : first + len(tokens)]
        found = torch.stack([compared(*of) for of in zip(adapted, before, tokens, kept, strict=True)]).cpu()
        self.seconds += time.perf_counter() - start
        return found

    def targets(self, window: int, tokens: Tensor) -> Tensor:
        """What is to be predicted from each of the ``tokens`` of the window of that number, as far as it counts."""
        return targets_of(tokens, None if self._counted is None else self._counted[window])

    def add(self, first: int, compared: Tensor) -> None:
        """Count a batch whose first window is the one of that number."""
        windows = slice(first, first + len(compared))
        self._by_window[windows], self._spots[windows] = compared[:, :_SUMS], compared[:, _SUMS:]

    def merge(self, ranks: Ranks, windows: range, read: Sequence[int]) -> None:
        """Add what the other processes counted of ``windows``, of which this one has ``read`` some."""
        own = slice(windows.start, windows.stop)
        for number in set(windows).difference(read):
            self._spots[number] = 0  # another process tells of it, and what all tell is added
        ranks.add("the predictions", windows, read, self._by_window[own], self._spots[own])

    def losses(self, windows: int) -> Tensor:
        """Of each of the first ``windows``: tokens scored, and the sums of the base's and of the adapted loss."""
        return self._by_window[:windows, 1:4]

    def of(self, windows: int) -> TextDrift:
        """Losses before and after, and the divergence, as means over the tokens of the first ``windows``."""
        return _means(self._by_window[:windows])

    def spots(self, windows: int) -> list[Spot]:
        """The most changed predictions of the first ``windows``."""
        rows = self._spots[:windows].reshape(windows, SPOTS, _OF_SPOT).tolist()
        return [
            Spot(window, int(place), divergence, base, adapted, int(likeliest), int(instead))
            for window, kept in enumerate(rows)
            for place, divergence, base, adapted, likeliest, instead in kept
            if place >= 0
        ]


def drift(
    model: nn.Module,
    base: Base,
    windows: Sequence[Sequence[int]],
    device: torch.device,
    base_device: torch.device | None = None,
) -> TextDrift:
    """Compare two models' predictions on one text, where neither is measured beside.

    Args:
        model: A causal language model with its adapter on.
        base: Gives the base model.
        windows: Token ids of the text.
        device: Where the inputs of the adapted model go.
        base_device: Where the inputs of the base model go, if not to ``device``.
    """
    predictions = Predictions(base, len(windows), base_device or device)
    with torch.inference_mode():
        for number, window in enumerate(windows):
            batch = Batch.of([window], device, number)
            logits = run(model, batch.tokens, batch.beside).logits
            predictions.add(number, predictions.compared(logits, batch.tokens, number, batch.beside))
    return predictions.of(len(windows))


def begun(base: Base, tokens: Sequence[int], first: int, place: torch.device) -> tuple[float, float]:
    """The base's loss on ``tokens``, in nats a token, as they are and behind the token ``first``."""
    losses = []
    for before in ((), (first,)):
        read = torch.tensor([[*before, *tokens]], device=place)
        with torch.no_grad(), base() as plain:
            losses.append(loss_of_last(run(plain, read).logits[0], tokens))
    return losses[0], losses[1]


def loss_of_last(logits: Tensor, tokens: Sequence[int]) -> float:
    """The mean loss on the last ``tokens`` of what was read, but for the first of them, in nats."""
    predicted = logits[-len(tokens) : -1].double()
    return float(cross_entropy(predicted, torch.tensor(tokens[1:], device=logits.device)))


def _wait(device: torch.device) -> None:
    """Wait for what ``device`` was given before, whose time is not that of what follows."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compared(adapted: Tensor, before: Tensor, tokens: Tensor, counted: Sequence[int] | None = None) -> Tensor:
    """Tokens predicted from, tokens scored, sums of base loss, adapted loss and divergence, and the window's spots.

    Args:
        adapted: Logits, shape ``(length, vocabulary)``, of one as large as the base's or larger.
        before: The base's.
        tokens: What both read, none of them unknown to the base.
        counted: The places of the tokens whose predictions alone count, which are then all of both; None for all.
    """
    divergences = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    sums = torch.zeros(3, dtype=torch.float64, device=tokens.device)
    targets = targets_of(tokens, counted)
    left_out = torch.zeros_like(targets, dtype=torch.bool) if counted is None else targets == IGNORED
    for rows in chunks(targets, adapted.shape[-1]):
        # In float32 what is left of a small divergence once its parts cancel is rounding.
        q, p = (log_softmax(logits[rows].to(tokens.device).double(), dim=-1) for logits in (adapted, before))
        q = q[:, : p.shape[-1]]  # to tokens that training added the base gives nothing, so they add nothing
        divergence = kl_div(q, p, reduction="none", log_target=True).sum(dim=-1).masked_fill(left_out[rows], 0)
        losses = [nll_loss(of, targets[rows], reduction="none") for of in (p, q)]
        sums += torch.stack([part.sum() for part in (*losses, divergence)])
        divergences[rows] = divergence
    counts = torch.stack([(~left_out).sum(), (targets != IGNORED).sum()]).double()
    divergences = divergences.masked_fill(left_out, -math.inf)
    return torch.cat((counts, sums, _most_changed(divergences[:-1], adapted, before, tokens)))


def targets_of(tokens: Tensor, counted: Sequence[int] | None) -> Tensor:
    """The token that is to be predicted from each of ``tokens``; `IGNORED` at the last, and where it does not count."""
    targets = torch.cat((tokens[1:], tokens.new_full((1,), IGNORED)))  # nothing follows the last token
    if counted is None:
        return targets
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    places = sent([place - 1 for place in counted if place], tokens.device)
    return targets.masked_fill(~kept.index_fill(0, places, True), IGNORED)


def chunks(targets: Tensor, vocabulary: int) -> Iterator[slice]:
    """The rows of the ``targets`` in parts, of which each is compared at once."""
    size = rows_at_once(targets.device, vocabulary)
    return (slice(first, first + size) for first in range(0, len(targets), size))


def rows_at_once(device: torch.device, vocabulary: int) -> int:
    """How many rows of predictions of so many tokens are compared at once on the ``device``."""
    return CHUNK if kernels.at_hand(device) else max(CHUNK, CHUNK_BYTES // (8 * vocabulary))


def _most_changed(divergences: Tensor, adapted: Tensor, before: Tensor, tokens: Tensor) -> Tensor:
    """The spots of one window as numbers, one after the other, −1 where there are no more."""
    found = divergences.new_full((SPOTS, _OF_SPOT), -1.0)
    if len(divergences):
        lacking = -len(divergences) % APART
        blocks = torch.nn.functional.pad(divergences, (0, lacking), value=-math.inf).view(-1, APART)
        places = blocks.argmax(dim=1) + APART * torch.arange(len(blocks), device=tokens.device)
        places = places[divergences[places].topk(min(SPOTS, len(places))).indices]
        q, p = (logits[places].to(tokens.device).double().softmax(dim=-1) for logits in (adapted, before))
        targets = tokens[places + 1][:, None]
        told = (
            places,
            divergences[places].clamp(min=0),
            p.gather(1, targets)[:, 0],
            q.gather(1, targets)[:, 0],
            p.argmax(dim=-1),
            q.argmax(dim=-1),
        )
        rows = torch.stack([column.double() for column in told], dim=-1)
        are_numbers = rows.isfinite().all(dim=-1) & divergences[places].isfinite()
        found[: len(places)] = rows.where(are_numbers[:, None], -1.0)
    return found.flatten()


def _means(by_window: Tensor) -> TextDrift:
    def means(summed: Tensor) -> tuple[float, float, float]:
        rows, scored, base, adapted, divergence = summed.tolist()
        return (base / scored, adapted / scored, divergence / rows) if scored else (float("nan"),) * 3

    whole = by_window.sum(dim=0)
    base, adapted, divergence = means(whole)
    without = [means(whole - window) for window in by_window]
    found = TextDrift(
        tokens=int(whole[0]),
        base_loss=base,
        adapted_loss=adapted,
        divergence=divergence,
        loss_margin=jackknife([after - before for before, after, _ in without]),
        divergence_margin=jackknife([value for *_, value in without]),
    )
    rows, scored, *summed = by_window.T.tolist()
    sums = dict(zip(("base_loss", "adapted_loss", "divergence"), summed, strict=True))
    return replace(found, by_window=ByWindow.of(OF_PREDICTIONS, found, (rows, scored), sums))
