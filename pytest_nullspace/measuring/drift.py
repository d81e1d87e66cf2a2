"""Functional drift: what the adapter makes of the base model's predictions, token by token.

The adapted predictions are those of the forward that is measured; the base reads the same windows once more. The
predictions of one batch are all that is kept.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, nll_loss

from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.forward import run
from pytest_nullspace.run.stats import TextDrift
from pytest_nullspace.run.uncertainty import jackknife
from pytest_nullspace.run.windows import OF_PREDICTIONS, ByWindow

CHUNK = 64
"""Rows whose predictions are compared at once, so that no second copy of a batch's is made."""

Base = Callable[[], AbstractContextManager[nn.Module]]
"""Within the context the model that it gives is the base model."""


class Predictions:
    """The adapted model's predictions on one text, compared with the base model's batch by batch.

    Attributes:
        seconds: What the base's forwards and the comparisons took.
    """

    def __init__(self, base: Base, windows: int, place: torch.device) -> None:
        """Begin with nothing compared.

        Args:
            base: Gives the base model.
            windows: How many windows there are at most.
            place: Where the base model takes its input.
        """
        self._base, self._place = base, place
        self._by_window = torch.zeros(windows, 5, dtype=torch.float64)
        self.seconds = 0.0

    def compared(self, adapted: Tensor, tokens: Tensor) -> Tensor:
        """Compare the predictions of one batch; nothing is counted yet.

        Args:
            adapted: The adapted model's logits, shape ``(b, length, vocabulary)``.
            tokens: What it read, shape ``(b, length)``.

        Returns:
            Shape ``(b, 5)``, for `add`.
        """
        _wait(tokens.device)
        start = time.perf_counter()
        with self._base() as plain:
            before = run(plain, tokens.to(self._place)).logits
        found = torch.stack([compared(*of) for of in zip(adapted, before, tokens, strict=True)]).cpu()
        self.seconds += time.perf_counter() - start
        return found

    def add(self, first: int, compared: Tensor) -> None:
        """Count a batch whose first window is the one of that number."""
        self._by_window[first : first + len(compared)] = compared

    def merge(self, ranks: Ranks, windows: range, read: Sequence[int]) -> None:
        """Add what the other processes counted of ``windows``, of which this one has ``read`` some."""
        ranks.add("the predictions", windows, read, self._by_window[windows.start : windows.stop])

    def of(self, windows: int) -> TextDrift:
        """Losses before and after, and the divergence, as means over the tokens of the first ``windows``."""
        return _means(self._by_window[:windows])


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
            tokens = torch.tensor([list(window)], device=device)
            predictions.add(number, predictions.compared(run(model, tokens).logits, tokens))
    return predictions.of(len(windows))


def _wait(device: torch.device) -> None:
    """Wait for what ``device`` was given before, whose time is not that of what follows."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compared(adapted: Tensor, before: Tensor, tokens: Tensor) -> Tensor:
    """Tokens predicted from, tokens scored, and sums of base loss, adapted loss and divergence, shape ``(5,)``."""
    sums = torch.zeros(3, dtype=torch.float64, device=tokens.device)
    targets = torch.cat((tokens[1:], tokens.new_full((1,), -100)))  # nothing follows the last token
    for first in range(0, len(tokens), CHUNK):
        rows = slice(first, first + CHUNK)
        # In float32 what is left of a small divergence once its parts cancel is rounding.
        q, p = (log_softmax(logits[rows].to(tokens.device).double(), dim=-1) for logits in (adapted, before))
        divergence = kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)
        losses = [nll_loss(of, targets[rows], reduction="none") for of in (p, q)]
        sums += torch.stack([part.sum() for part in (*losses, divergence)])
    counts = torch.tensor([len(tokens), len(tokens) - 1], dtype=torch.float64, device=tokens.device)
    return torch.cat((counts, sums))


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
