"""All texts of a measurement streamed together through a model whose blocks come into memory one at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.drift import Predictions, loss_of_last
from pytest_nullspace.measuring.factors import weight_norms
from pytest_nullspace.measuring.figuring import weighed
from pytest_nullspace.measuring.halfway import Halfway, whole
from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.measuring.scaling import by_scale, few_of, loss_on, scaled
from pytest_nullspace.measuring.streamed import CPU, Extra, Streaming, Text, switched_off
from pytest_nullspace.measuring.streaming import (
    NOTHING,
    Read,
    batch_of,
    counted_rows,
    first_round,
    in_rounds,
    with_rows,
)
from pytest_nullspace.model import AdaptedModel
from pytest_nullspace.model.shelf import UnfitError
from pytest_nullspace.model.shelved import ShelvedLayer
from pytest_nullspace.run.stats import LayerStats
from pytest_nullspace.text.windows import Shown, Window, counted_places

TASK = "task_text"


class Blockwise:
    """The windows of all texts, read in as few passes as their figures take: one, where their number is given.

    Attributes:
        predictions: Those of each text, where they are compared.
        streaming: What streams them.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        layers: Sequence[ShelvedLayer],
        drawn: Mapping[str, Sequence[Window]],
        predictions: Mapping[str, Predictions],
        ranks: Ranks,
        batches: list[int],
        halfway: Halfway,
        *,
        max_rows: int | None,
        seed: int,
        early: bool,
    ) -> None:
        """Read nothing yet.

        Args:
            adapted: The model, which has a shelf.
            layers: Those that are measured.
            drawn: The windows of each text.
            predictions: Takes those of each, where they are compared.
            ranks: The processes that share the windows.
            batches: The batch size, to which each smaller one is added.
            halfway: Keeps what each pass has done so far.
            max_rows: As `pytest_nullspace.measuring.streaming.measure` takes it.
            seed: Likewise.
            early: Whether a text may end before all of its windows are read.

        Raises:
            UnfitError: The model cannot be run so on these windows.
        """
        if any(isinstance(window.tokens, Shown) for windows in drawn.values() for window in windows):
            raise UnfitError("its text holds images")
        self._adapted, self._layers, self._drawn, self._ranks = adapted, layers, drawn, ranks
        self.streaming = Streaming(adapted, layers, ranks, batches, halfway)
        self._early, self._twice = early, partial(scaled, by=2.0)
        self._texts = {what: self._text(what, predictions.get(what), max_rows, seed) for what in drawn}
        self.predictions = dict(predictions)
        self._extras: list[Extra] = []
        self._down_ranks: dict[str, int] = {}
        self._doubled: dict[int, float] = {}
        self._begun: dict[int, float] = {}

    def _text(self, what: str, predictions: Predictions | None, max_rows: int | None, seed: int) -> Text:
        windows, counted = [window.tokens for window in self._drawn[what]], counted_places(self._drawn[what])
        rows = counted_rows(windows, counted, max_rows, seed)

        def batches(share: range, size: int) -> Iterator[Batch]:
            done = 0
            while done < len(share):
                batch = batch_of(windows, share[done : done + size], rows, CPU, counted is not None)
                yield batch
                done += len(batch.tokens)

        return Text(len(windows), batches, predictions)

    def also_begun(self, tokens: Sequence[int], first: int) -> None:
        """In the first pass ask the base for its loss on ``tokens`` as they are, and behind ``first``."""
        for before in ((), (first,)):

            def keep(loss: float, more: int = len(before)) -> None:
                self._begun[more] = loss

            take = partial(loss_of_last, tokens=tokens)
            self._extras.append(Extra(switched_off, (*before, *tokens), take, keep))

    @property
    def begun(self) -> tuple[float, float]:
        """What the base loses on those tokens, without and behind the one that begins a text, in nats a token."""
        return self._begun[0], self._begun[1]

    def also_doubled(self, checkpoint: Checkpoint) -> None:
        """In the first pass ask for the predictions at twice the update that the headroom on the task text takes."""
        if not by_scale(checkpoint):
            return
        first = first_round(len(self._drawn[TASK]), self._early)
        self._extras += self._at_twice(self._ranks.share(range(few_of(len(first)))))

    def doubled(self, share: Sequence[int]) -> dict[int, float]:
        """The loss on these windows of the task text at twice the update; in one more pass where it was not asked."""
        if any(number not in self._doubled for number in share):
            with self._adapted.without_grad():
                self.streaming.read({}, {}, list(self._at_twice(share)))
        return {number: self._doubled[number] for number in share}

    def _at_twice(self, share: Sequence[int]) -> Iterator[Extra]:
        predictions = self._texts[TASK].predictions
        assert predictions is not None
        for number in share:
            tokens = self._drawn[TASK][number].tokens

            def take(logits: Tensor, number: int = number, tokens: Sequence[int] = tokens) -> float:
                return loss_on(logits, predictions.targets(number, torch.tensor(list(tokens), device=logits.device)))

            yield Extra(self._twice, tokens, take, partial(self._doubled.__setitem__, number))

    def measure(
        self,
        what: str,
        settled: Callable[[tuple[LayerStats, ...]], bool] | None,
        progress: Callable[[int], None],
    ) -> tuple[LayerStats, ...]:
        """The figures of one text, as `pytest_nullspace.measuring.streaming.measure` gives them.

        Args:
            what: The text.
            settled: As it is asked there.
            progress: Told how many of the text's windows are done.

        Raises:
            UnfitError: The blocks do not run one after the other, or a layer is not run.
        """
        text, windows = self._texts[what], len(self._drawn[what])

        def read(part: range) -> Read:
            self.streaming.progress = lambda share: progress(part.start + int(share * len(part)))
            if not any(text.read for text in self._texts.values()):
                parts = {key: first_round(len(of), self._early) for key, of in self._drawn.items()}
                self.streaming.read(self._texts, parts, self._extras)
            elif part not in text.read:
                self.streaming.read(self._texts, {what: part})
            progress(part.stop)
            return self._taken(text, part)

        with self._adapted.without_grad():
            told = cache(lambda: weighed(self._layers, self._down_ranks, weight_norms(self._layers)()))
            figures, lost = in_rounds(self._layers, told, windows, read, self._ranks, text.predictions, settled)
        if lost:
            raise UnfitError(f"no row came to {lost[0].name}")
        return with_rows(figures, self._ranks, [of.seen for of in text.read.values()], ())

    def _taken(self, text: Text, part: range) -> Read:
        """What was taken of all layers, in their order."""
        share, of = self._ranks.share(part), text.read[part]
        if not self._layers:
            return share, *NOTHING
        self._down_ranks |= of.down_ranks
        places = {name: place for place, name in enumerate(of.names)}
        order = [places[layer.name] for layer in self._layers]
        return share, of.sums[order], whole(len(of.names), of.by_octave)[order]
