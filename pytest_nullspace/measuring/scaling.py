"""The drift of an adapter whose update is scaled, at a few scales at once, and the largest scale that passes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.peft import GGUF, MLX
from pytest_nullspace.errors import printable
from pytest_nullspace.judging.invariants import Expectations
from pytest_nullspace.judging.remedy import Remedy, guess, largest, passes
from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.drift import IGNORED, Base, Predictions, chunks, compared
from pytest_nullspace.measuring.forward import run
from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.model import AdaptedModel
from pytest_nullspace.run.figures import Text
from pytest_nullspace.run.predictions import Headroom
from pytest_nullspace.run.stats import Drift, TextDrift
from pytest_nullspace.run.texts import key_of
from pytest_nullspace.run.uncertainty import jackknife

Windows = Sequence[Sequence[int]]
LEAST_WINDOWS = 4
"""Of the task text on which more of the update is tried, where it has so many: fewer tell no margin."""
NO_BASE = 1e-4
"""The divergence, in nats a token, from which on a model without its update is not its base; rounding makes less."""


@contextmanager
def scaled(adapted: AdaptedModel, by: float) -> Iterator[None]:
    """Within the context the update of every layer is ``by`` times what it is, as if its format's factor were."""

    def times(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return by * output

    with ExitStack() as hooks:
        for layer in adapted.layers.values():
            hooks.callback(layer.up.register_forward_hook(times).remove)
        yield


class Scales:
    """A measured model, asked for its drift at other scales of its update.

    A text's windows go through one at a time: the base's predictions once, then the adapter's at each scale.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        base: Base,
        place: torch.device,
        texts: Mapping[str, Windows],
        ranks: Ranks,
        counted: Mapping[str, Windows] | None = None,
    ) -> None:
        """Ask nothing yet.

        Args:
            adapted: The model.
            base: Gives the base model.
            place: Where that takes its input.
            texts: The windows of each text.
            ranks: The processes that share them.
            counted: Of a text the places in each window of the tokens that alone count, where not all do.
        """
        self._adapted, self._base, self._place, self._texts, self._ranks = adapted, base, place, texts, ranks
        self._counted = counted or {}

    def at(self, scales: Sequence[float], texts: Sequence[str]) -> list[dict[str, TextDrift]]:
        """The drift on some of the texts at each of ``scales``."""
        found: list[dict[str, TextDrift]] = [{} for _ in scales]
        for text in texts:
            for at, drift in zip(found, self._on(text, scales), strict=True):
                at[text] = drift
        return found

    def _on(self, text: str, scales: Sequence[float]) -> list[TextDrift]:
        windows, counted = self._texts[text], self._counted.get(text)
        kept = [Predictions(self._base, len(windows), self._place) for _ in scales]
        share, read = self._ranks.share(range(len(windows))), []
        with self._adapted.without_grad():
            for number in share:
                batch = Batch.of([windows[number]], self._adapted.device, number)
                places = None if counted is None else counted[number]
                with self._base() as plain:
                    before = run(plain, batch.tokens.to(self._place), batch.beside).logits[0]
                for scale, predictions in zip(scales, kept, strict=True):
                    with scaled(self._adapted, scale):
                        logits = run(self._adapted.model, batch.tokens, batch.beside).logits[0]
                    predictions.add(number, compared(logits, before, batch.tokens[0], places)[None].cpu())
                read.append(number)
        for predictions in kept:
            predictions.merge(self._ranks, range(len(windows)), read)
        return [predictions.of(len(windows)) for predictions in kept]


def few_of(windows: int) -> int:
    """Of so many windows of the task text, on how many more of the update is tried."""
    return min(windows, max(LEAST_WINDOWS, math.ceil(windows / 4)))


def loss_on(logits: Tensor, targets: Tensor) -> float:
    """The summed loss of the predictions of one window, in nats."""
    loss = torch.zeros((), dtype=torch.float64, device=targets.device)
    for rows in chunks(targets, logits.shape[-1]):
        predicted = logits[rows].to(targets.device).double()
        loss += cross_entropy(predicted, targets[rows], reduction="sum", ignore_index=IGNORED)
    return float(loss)


def headroom(
    checkpoint: Checkpoint,
    adapted: AdaptedModel,
    task: Predictions,
    windows: Windows,
    ranks: Ranks,
    streamed: Callable[[Sequence[int]], Mapping[int, float]] | None = None,
) -> Headroom | None:
    """What the task text would gain from twice the update, on a quarter of its windows.

    Args:
        checkpoint: Of which the model is.
        adapted: The model.
        task: Its predictions on the task text, as it is.
        windows: Of the task text, which were all read.
        ranks: The processes that share them.
        streamed: Gives the losses at twice the update where the model's blocks come and go, and its base is what it is
            when it is switched off.

    Returns:
        None where the update's scale is not that of what was learned alone, or nothing is gained there as it is.
    """
    if not windows or _not_by_scale(checkpoint) is not None:
        return None
    few = few_of(len(windows))
    share, doubled = ranks.share(range(few)), torch.zeros(few, dtype=torch.float64)
    if streamed is not None:
        for number, loss in streamed(share).items():
            doubled[number] = loss
    else:
        with adapted.without_grad():
            if checkpoint.carries_base and not _is_base_without(adapted, task, windows[0]):
                return None
            with scaled(adapted, 2.0):
                for number in share:
                    batch = Batch.of([windows[number]], adapted.device, number)
                    logits = run(adapted.model, batch.tokens, batch.beside).logits[0]
                    doubled[number] = loss_on(logits, task.targets(number, batch.tokens[0]))
    ranks.add("the predictions at twice the update", range(few), share, doubled)
    scored, base, as_it_is = task.losses(few).T
    gains, more = base - as_it_is, base - doubled
    gain = float(gains.sum())
    if not 0 < gain < math.inf or not math.isfinite(float(more.sum())):
        return None
    without = [float((more.sum() - more[left]) / (gain - gains[left])) for left in range(few)] if few > 1 else []
    count = int(scored.sum())
    return Headroom(count, gain / count, float(more.sum()) / count, jackknife(without))


def _is_base_without(adapted: AdaptedModel, task: Predictions, window: Sequence[int]) -> bool:
    """Whether the model without its update is its base: what a start put into A and B is none of what was learned."""
    batch = Batch.of([window], adapted.device)
    with scaled(adapted, 0.0):
        logits = run(adapted.model, batch.tokens, batch.beside).logits
        rows, _, _, _, divergence, *_ = task.compared(logits, batch.tokens, 0, batch.beside)[0].tolist()
    return bool(divergence / rows < NO_BASE)


def remedy(checkpoint: Checkpoint, drift: Drift, expectations: Expectations, scales: Scales) -> Remedy | None:
    """The largest scale of the update that passes every bound on the preserved text; None where it passes as it is.

    Args:
        checkpoint: Of which the model is.
        drift: Its drift as it is.
        expectations: The bounds.
        scales: Gives the drift at other scales, on texts called as those of `drift`.
    """
    if passes(drift, expectations, Text.PRESERVED, surely=False):
        return None
    if (why := _not_by_scale(checkpoint)) is not None:
        return Remedy(None, why, {})
    if not math.isfinite(drift.preserved.divergence_margin):
        return Remedy(None, "one window tells no margin; give more by --nullspace-calib-size", {})

    kept = ["preserved", *map(key_of, drift.further)]

    def moved(at: Mapping[str, TextDrift]) -> Drift:
        further = {name: at[key_of(name)] for name in drift.further}
        return replace(drift, preserved=at["preserved"], further=further, task=at.get("task"), headroom=None)

    def on_preserved(asked: Sequence[float]) -> list[Drift]:
        return [moved(at) for at in scales.at(asked, kept)]

    def fits(asked: Sequence[float]) -> list[bool]:
        return [passes(at, expectations, Text.PRESERVED) for at in on_preserved(asked)]

    (zero,) = on_preserved([0.0])
    # What a whole model lacks without its A was a part of W: on other text than this its loss may be knowledge.
    lacks = checkpoint.carries_base and not zero.preserved.divergence < NO_BASE
    if lacks or not passes(zero, expectations, Text.PRESERVED):
        return Remedy(None, _no_base(checkpoint, zero), {})
    exact, said = _written(checkpoint, largest(fits, guess(drift, expectations)))
    (measured,) = scales.at([exact], kept if drift.task is None else [*kept, "task"])
    at = moved(measured)
    if not exact or not passes(at, expectations, Text.PRESERVED):
        return Remedy(None, "only none of it keeps the preserved text", {})
    gains = [-of.task.loss_change for of in (at, drift) if of.task is not None]
    if gains and not passes(at, expectations, Text.TASK):
        little = f"{said} is the most that keeps the preserved text, and too little for the task"
        return Remedy(None, little, {})
    return Remedy(exact, said, at.figures, gains[0] / gains[1] if gains and gains[1] > 0 else None)


def by_scale(checkpoint: Checkpoint) -> bool:
    """Whether the factor of its format scales what was learned alone, as far as the files tell."""
    return _not_by_scale(checkpoint) is None


def _not_by_scale(checkpoint: Checkpoint) -> str | None:
    """Why the factor of the format does not scale what was learned alone, as far as the files tell."""
    if checkpoint.is_whole:
        return "a whole model has no factor of its update: scale the adapter before it is merged"
    if checkpoint.changed_base is not None:
        start = printable(checkpoint.config.get("init_lora_weights"), 60)
        return f"its start (init_lora_weights {start}) holds a part of W, so a smaller scale is no smaller update"
    others = [name for name in checkpoint.outside if ".lora_" in name and "magnitude" not in name]
    if others:
        return f"lora_alpha scales {printable(others[0], 200)} as well, which is measured as no layer"
    if not checkpoint.carries_base and not checkpoint.config.get("lora_alpha"):
        return "its lora_alpha is 0 already"
    return None


def _no_base(checkpoint: Checkpoint, zero: Drift) -> str:
    """Why the predictions do not pass although nothing of the update is left."""
    reasons = ["a start of LoRA-Null v1 or CorDA holds a part of W"] if checkpoint.carries_base else []
    if any("magnitude" in name for name in checkpoint.outside):
        reasons.append("DoRA's magnitudes were trained as well")
    others = [name for name in checkpoint.outside if ".lora_" not in name]
    if others:
        reasons.append(f"{printable(others[0], 200)} was trained as well")
    told = f"with none of it the model is not its base (divergence {zero.preserved.divergence:.3g})"
    return f"{told}: {', '.join(reasons)}" if reasons else told


def _written(checkpoint: Checkpoint, scale: float) -> tuple[float, str]:
    """A round factor not above ``scale``, and how the adapter's format is told of it."""
    if checkpoint.carries_base:
        exact = _round(scale)
        return exact, f"every ALinear.weight times {exact:g}"
    alpha = float(checkpoint.config["lora_alpha"])
    if checkpoint.format == MLX:
        held = alpha / checkpoint.config["r"]
        new = math.copysign(_round(abs(held) * scale), held)
        return new / held, f"lora_parameters.scale {new:g} in place of {held:g}"
    new = math.copysign(_round(abs(alpha) * scale), alpha)
    exact = new / alpha
    others = f", and each value of alpha_pattern times {exact:.4g}," if checkpoint.config.get("alpha_pattern") else ""
    name = "adapter.lora.alpha" if checkpoint.format == GGUF else "lora_alpha"
    return exact, f"{name} {new:g} in place of {alpha:g}{others}"


def _round(value: float) -> float:
    """The largest number of few digits that is not above ``value``: whole from 10 on, below of two digits."""
    if value >= 10 or value <= 0:
        return float(math.floor(value))
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.floor(value / unit * (1 + 1e-12)) * unit:.2g}")
