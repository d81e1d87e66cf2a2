"""The loaded model and the windows that go through it: figures, the spectrum, the drift.

What holds tensors is imported inside functions.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.judging.invariants import Expectations, Stage, judge, judge_averages, judge_drift
from pytest_nullspace.judging.profiles import choose
from pytest_nullspace.judging.remedy import KEY as SUGGESTION
from pytest_nullspace.measuring.about import of_format
from pytest_nullspace.measuring.batching import Batching, suiting
from pytest_nullspace.measuring.fitting import require_room, told_needed
from pytest_nullspace.measuring.limits import of_text, vocabulary, window_length
from pytest_nullspace.measuring.loading import TrueBase, half_precision, one_of, shortage_told
from pytest_nullspace.run.figures import FIGURES, on_the_task
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats
from pytest_nullspace.run.texts import FIRST, key_of, name_of
from pytest_nullspace.settings import PREFIX, Settings
from pytest_nullspace.text.windows import Shown, Window, counted_places, predicted_places

if TYPE_CHECKING:
    from pytest_nullspace.measuring.blockwise import Blockwise
    from pytest_nullspace.measuring.drift import Base, Predictions
    from pytest_nullspace.measuring.halfway import Halfway
    from pytest_nullspace.measuring.left import Sampled
    from pytest_nullspace.model import AdaptedModel
    from pytest_nullspace.run.predictions import Headroom

BEGUN, UNBEGUN = 256, 0.5
"""Tokens that are read with and without the one that begins a text, and by how many nats a token these must differ."""

Figures = tuple[LayerStats, ...]


def with_further(first: Figures, further: Mapping[str, Figures]) -> Figures:
    """The figures of the first preserved text, each layer's on the further ones beside them, by the texts' names."""
    return tuple(
        replace(layer, further={name: of[place] for name, of in further.items()}) for place, layer in enumerate(first)
    )


def with_task(preserved: Figures, task: Figures) -> Figures:
    """The figures of the preserved text, each layer's on the task text beside them."""
    return tuple(replace(layer, task=other) for layer, other in zip(preserved, task, strict=True))


class HeldAgainst(NamedTuple):
    """The base model, loaded, against whose predictions the adapter's are held.

    Attributes:
        name: What it is, in words.
        base: Gives it.
        place: Where it takes its input.
    """

    name: str
    base: "Base"
    place: Any

    @classmethod
    def of(cls, checkpoint: Checkpoint, found: TrueBase, running: str) -> "HeldAgainst":
        """Load what was ``found``, beside a model that is ``running`` already."""
        with shortage_told(
            lambda: (
                f"{checkpoint.directory}: too little memory to load {found.name} beside the model for {PREFIX}drift, "
                f"in {running}; "
                + one_of(*half_precision(running, "take"), "take a machine with more", f"leave {PREFIX}drift out")
            )
        ):
            return cls(found.name, *found.load())


@dataclass(frozen=True)
class Measurement:
    """The loaded model and the windows that go through it.

    Attributes:
        checkpoint: Of which the model is.
        settings: How it is measured.
        adapted: The model.
        drawn: The windows of each text, of which ``auto`` may use fewer.
        seqlen: Tokens a window.
        running: Precision and device, in words.
        progress: Told how many windows of how many are done.
        held_against: The true base, loaded, where its predictions are asked for.
        used: How many windows of each text were used, once it was read.
        predictions: Those of each text, beside the base's.
        streamed: Reads all texts together, once begun, where the model's blocks come and go.
        halfway: Keeps what that has done so far.
    """

    checkpoint: Checkpoint
    settings: Settings
    adapted: "AdaptedModel"
    drawn: Mapping[str, Sequence[Window]]
    seqlen: int
    running: str
    progress: Callable[[int, int], None] | None
    held_against: HeldAgainst | None = None
    used: dict[str, int] = field(default_factory=dict)
    predictions: "dict[str, Predictions]" = field(default_factory=dict)
    streamed: "list[Blockwise]" = field(default_factory=list)
    halfway: "Halfway | None" = None

    @property
    def read(self) -> dict[str, Sequence[Window]]:
        """The windows of each text that were used."""
        return {what: self.drawn[what][:count] for what, count in self.used.items()}

    @property
    def _short(self) -> str:
        return f"{self.checkpoint.directory}: too little memory"

    def figures(self, layers: Collection[str]) -> tuple[Figures, list[int]]:
        """Measure ``layers`` on each text; with how many windows a forward began, and to how many it had to go back."""
        predicted = 0 if self.held_against is None else vocabulary(self.adapted.model) or 0
        batches = [self.settings.batch_size or suiting(self.adapted.device, self.seqlen, predicted)]
        tries = self.settings.batch_size is None
        batching = Batching.trying(batches[0], self.adapted.device, predicted) if tries else Batching(batches[0])
        of = partial(self._of, layers=layers, batches=batches, batching=batching)

        def short() -> str:
            together = min(batches[-1], max(map(len, self.drawn.values())))
            lower = f"{PREFIX}seqlen or {PREFIX}batch-size" if together > 1 else f"{PREFIX}seqlen"
            without = () if self.held_against is None else (f"give {PREFIX}no-drift",)
            return (
                f"{self._short} in the pass of windows of {self.seqlen} tokens, {together} a forward, in "
                f"{self.running}; {one_of(f'lower {lower}', *half_precision(self.running, 'take'), *without)}"
            )

        has_task = "task_text" in self.drawn
        # Each text is asked for what will be judged on it, and no more.
        preserved = [figure for figure in FIGURES if not has_task or figure not in on_the_task()]

        def settled(own: Figures, name: str) -> bool:
            return self._settled(with_task(own, own) if has_task else own, preserved, name)

        with shortage_told(short):
            if self.adapted.shelf is not None:
                self.streamed.append(self._blockwise(layers, batches))
            name = self.settings.text_name
            own = of(FIRST, settled=lambda own: settled(own, name))
            further = {
                text.name: of(key_of(text.name), settled=partial(settled, name=text.name))
                for text in self.settings.further
            }
            own = with_further(own, further)
            if not has_task:
                return own, batches
            task = of("task_text", settled=lambda task: self._settled(with_task(own, task), on_the_task(), name))
            return with_task(own, task), batches

    def _predictions(self, what: str) -> "Predictions":
        from pytest_nullspace.measuring.drift import Predictions

        assert self.held_against is not None
        _, base, place = self.held_against
        return Predictions(base, len(self.drawn[what]), place, predicted_places(self.drawn[what]))

    def _blockwise(self, layers: Collection[str], batches: list[int]) -> "Blockwise":
        """All texts, to be read together, and what else is asked of the model."""
        from pytest_nullspace.measuring.blockwise import Blockwise
        from pytest_nullspace.measuring.halfway import Halfway
        from pytest_nullspace.model.shelved import ShelvedLayer

        of = (layer for name, layer in self.adapted.layers.items() if name in layers)
        chosen = [layer for layer in of if isinstance(layer, ShelvedLayer)]
        against = self.held_against is not None
        streamed = Blockwise(
            self.adapted,
            chosen,
            self.drawn,
            {what: self._predictions(what) for what in self.drawn} if against else {},
            self.settings.ranks,
            batches,
            self.halfway or Halfway(),
            max_rows=self.settings.max_activation_samples,
            seed=self.settings.seed,
            early=self.settings.calib_size is None,
        )
        sizes = list(map(len, self.drawn.values()))
        streamed.streaming.starting = partial(require_room, self.adapted, self.checkpoint, sizes, against)
        streamed.streaming.expecting = partial(self._tell_memory, batches)
        if (begin := self._beginning) is not None:
            streamed.also_begun(*begin)
        if self._asks_for_headroom:
            streamed.also_doubled(self.checkpoint)
        return streamed

    def _tell_memory(self, batches: Sequence[int]) -> None:
        """Tell what the pass that begins will take of memory, to whom is told more than how far it is."""
        say = getattr(self.progress, "say", None)
        if say is not None:
            tokens = batches[-1] * max(len(window.tokens) for windows in self.drawn.values() for window in windows)
            say(told_needed(self.adapted, tokens, is_compared=self.held_against is not None))

    def _of(
        self,
        what: str,
        *,
        layers: Collection[str],
        batches: list[int],
        batching: Batching,
        settled: Callable[[Figures], bool],
    ) -> Figures:
        from pytest_nullspace.measuring.streaming import measure

        before, total = sum(self.used.values()), sum(map(len, self.drawn.values()))
        # Of a text that ended early what was left out is not waited for.
        total -= sum(len(self.drawn[earlier]) - count for earlier, count in self.used.items())
        self.used[what] = len(self.drawn[what])
        if self.held_against is not None:
            self.predictions[what] = self._predictions(what)

        def tell(done: int, _: int = 0) -> None:
            self.used[what] = done
            if self.progress is not None:
                self.progress(before + done, total)

        if self.progress is not None:
            self.progress(before, total)
        may_end = None if self.settings.calib_size is not None else settled
        for streamed in self.streamed:
            if what in streamed.predictions:
                self.predictions[what] = streamed.predictions[what]
            return streamed.measure(what, may_end, tell)
        return measure(
            self.adapted,
            [window.tokens for window in self.drawn[what]],
            layers=layers,
            batch_size=batching,
            shrunk=batches.append,
            max_rows=self.settings.max_activation_samples,
            seed=self.settings.seed,
            progress=tell,
            ranks=self.settings.ranks,
            settled=may_end,
            predictions=self.predictions.get(what),
            counted=counted_places(self.drawn[what]),
        )

    def with_spectrum(self, figures: Figures) -> Figures:
        """The figures, with the best that any subspace could do on the preserved text."""
        from pytest_nullspace.measuring.spectrum import spectrum

        with shortage_told(
            lambda: (
                f"{self._short} for the spectrum, whose sums are in float64 and as wide as the layers, in "
                f"{self.running}; leave {PREFIX}spectrum out, or lower {PREFIX}seqlen"
            )
        ):
            best = spectrum(
                self.adapted,
                [window.tokens for window in self.read["text"]],
                [layer.name for layer in figures],
                progress=self.progress,
                ranks=self.settings.ranks,
                counted=counted_places(self.read["text"]),
            )
        return tuple(replace(layer, spectrum=best.get(layer.name)) for layer in figures)

    def rows(self, layers: Collection[str]) -> "Sampled":
        """Some rows of each layer's input on each text that was read, by the text's name in words."""
        from pytest_nullspace.measuring.sampled import sampled

        named = {FIRST: "preserved text", "task_text": "task text"}
        ordered = [name for name in self.adapted.layers if name in layers]
        with shortage_told(lambda: f"{self._short} for the rows on which a merge is held, in {self.running}"):
            return {
                named.get(what, f"preserved text {name_of(what)}"): sampled(
                    self.adapted, [window.tokens for window in of], ordered, counted_places(of)
                )
                for what, of in self.read.items()
            }

    @property
    def drift(self) -> Drift | None:
        """How far the predictions lie from the true base's on each text that was read so far, if that is asked for."""
        if self.held_against is None:
            return None
        found = {what: predictions.of(self.used[what]) for what, predictions in self.predictions.items()}
        further = {text.name: found[key] for text in self.settings.further if (key := key_of(text.name)) in found}
        return Drift(self.held_against.name, found[FIRST], found.get("task_text"), self.settings.text_name, further)

    @property
    def _asks_for_headroom(self) -> bool:
        return "task_text" in self.drawn and self.held_against is not None and self.settings.stage == Stage.TRAINED

    def headroom(self) -> "Headroom | None":
        """What the task text would gain from more of the update; None where there is none, or nothing was trained."""
        if not self._asks_for_headroom:
            return None
        from pytest_nullspace.measuring.scaling import headroom

        task, windows = self.predictions["task_text"], [window.tokens for window in self.read["task_text"]]
        doubled = self.streamed[0].doubled if self.streamed else None
        with shortage_told(lambda: f"{self._short} for the predictions at twice the update, in {self.running}"):
            return headroom(self.checkpoint, self.adapted, task, windows, self.settings.ranks, doubled)

    @property
    def _beginning(self) -> tuple[Sequence[int], int] | None:
        """Of the preserved text what the base is to read with and without the token that begins one, and that token."""
        from pytest_nullspace.measuring.forward import requires_more

        window, first = self.drawn[FIRST][0], of_text(self.adapted.model.config, "bos_token_id")
        # Of a row of images its text, which alone is asked about.
        of_row = tuple(window.tokens[place] for place in window.places) if isinstance(window.tokens, Shown) else None
        room = window_length(None, self.adapted.model) - 1  # one more is read before them
        tokens = (window.tokens if of_row is None else of_row)[: min(BEGUN, room)]
        is_id = isinstance(first, int) and 0 <= first < (vocabulary(self.adapted.model) or 0)
        is_first = window.within is None or not window.within.before
        if self.held_against is None or not is_id or not is_first or len(tokens) < 2 or tokens[0] == first:
            return None
        if of_row is not None and requires_more(self.adapted.model):
            return None
        return tokens, first

    def unbegun(self) -> dict[str, Any]:
        """That the base reads the preserved text far better behind the token that begins one, which it does not have.

        A tokenizer that lost it makes Gemma's kind a model that cannot read; others hardly mind.
        """
        if self.held_against is None or (begin := self._beginning) is None:
            return {}
        from pytest_nullspace.measuring.drift import begun

        _, base, place = self.held_against
        without, behind = self.streamed[0].begun if self.streamed else begun(base, *begin, place)
        if not without - behind > UNBEGUN:
            return {}
        return {"first_token": {"id": begin[1], "base_loss": without, "base_loss_behind": behind}}

    def suggestion(self, figures: Figures) -> dict[str, Any]:
        """The largest scale of the update whose predictions pass, as a run tells it; nothing where they pass already.

        Nor where it was not asked for, or nothing was trained yet.
        """
        drift, wanted = self.drift, self.settings.suggest and self.settings.stage == Stage.TRAINED
        if drift is None or self.held_against is None or not wanted:
            return {}
        from pytest_nullspace.measuring.scaling import Scales, remedy

        _, base, place = self.held_against
        names = {"text": "preserved", "task_text": "task"}
        texts = {names.get(what, what): [window.tokens for window in windows] for what, windows in self.read.items()}
        kept = {
            names.get(what, what): places
            for what, of in self.read.items()
            if (places := predicted_places(of)) is not None
        }
        short = f"{self._short} for the predictions at other scales, in {self.running}; "
        with shortage_told(lambda: short + one_of(f"lower {PREFIX}seqlen", f"leave {PREFIX}suggest out")):
            scales = Scales(self.adapted, base, place, texts, self.settings.ranks, kept)
            found = remedy(self.checkpoint, drift, self._expected(figures, drift), scales)
        return {} if found is None else {SUGGESTION: found.to_dict()}

    @property
    def drift_seconds(self) -> float | None:
        """What the base's forwards and the comparisons took of the pass."""
        return sum(of.seconds for of in self.predictions.values()) if self.predictions else None

    def _settled(self, figures: Figures, judged: Collection[str], name: str) -> bool:
        """Whether more text would change no verdict.

        Args:
            figures: Of the selected layers, so far.
            judged: The figures that are judged on the text.
            name: Of the preserved text whose predictions are judged.
        """
        drift = self.drift
        expectations = self._expected(figures, drift)
        run = RunStats("", "", figures, len(self.checkpoint.layers))
        if any(not (layer.task or layer).rows and not expectations.excuses(layer) for layer in figures):
            return False  # one row would give what has no figures yet, and so nothing uncertain, a verdict
        verdicts = [judge(layer, expectations) for layer in figures]
        if run.complete:
            verdicts.append(judge_averages(run, expectations))
        if drift is not None:
            verdicts.append(judge_drift(drift, expectations, name))
        findings = [finding for verdict in verdicts for finding in verdict.findings]
        return not any(finding.uncertain for finding in findings if finding.threshold.figure in judged)

    def _expected(self, figures: Figures, drift: Drift | None) -> Expectations:
        """What the selected layers are held against, whose figures decide by what."""
        settings = self.settings
        run = RunStats("", "", figures, len(self.checkpoint.layers), of_format(self.checkpoint))
        chosen = choose(run, settings.profile, settings.variant)
        stage = Stage(settings.stage)
        return Expectations(stage, settings.overrides, (), settings.allow_unreached, chosen, drift is not None)
