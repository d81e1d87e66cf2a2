"""Functional drift: what the adapter makes of the base model's predictions, token by token.

Both models read the same windows, one after the other; the predictions of one window are all that is kept.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, nll_loss

from pytest_nullspace.measuring.distributed import ALONE, Ranks
from pytest_nullspace.run.stats import TextDrift
from pytest_nullspace.run.uncertainty import jackknife

CHUNK = 64
"""Rows whose predictions are compared at once, so that no second copy of a window's is made."""

Base = Callable[[], AbstractContextManager[nn.Module]]
"""Within the context the model that it gives is the base model."""


def drift(
    model: nn.Module,
    base: Base,
    windows: Sequence[Sequence[int]],
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    base_device: torch.device | None = None,
) -> TextDrift:
    """Compare the adapted model's predictions with the base model's on one text.

    Args:
        model: A causal language model with its adapter on.
        base: Gives the base model.
        windows: Token ids of the text.
        device: Where the inputs of the adapted model go.
        progress: Told how many windows of how many are done.
        ranks: The processes that share the windows.
        base_device: Where the inputs of the base model go, if not to ``device``.

    Returns:
        Loss before and after, and the divergence, as means over tokens.
    """
    by_window = torch.zeros(len(windows), 5, dtype=torch.float64)
    share = ranks.share(range(len(windows)))
    read = []
    with torch.inference_mode():
        for number in share:
            tokens = torch.tensor([list(windows[number])], device=device)
            adapted = model(input_ids=tokens, use_cache=False).logits[0]
            with base() as plain:
                before = plain(input_ids=tokens.to(base_device or device), use_cache=False).logits[0]
            by_window[number] = _compared(adapted, before, tokens[0]).cpu()
            read.append(number)
            if progress is not None:
                progress(min(ranks.size * len(read), len(windows)), len(windows))
    ranks.add("the predictions", range(len(windows)), read, by_window)
    return _means(by_window)


def _compared(adapted: Tensor, before: Tensor, tokens: Tensor) -> Tensor:
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
    return TextDrift(
        tokens=int(whole[0]),
        base_loss=base,
        adapted_loss=adapted,
        divergence=divergence,
        loss_margin=jackknife([after - before for before, after, _ in without]),
        divergence_margin=jackknife([value for *_, value in without]),
    )
