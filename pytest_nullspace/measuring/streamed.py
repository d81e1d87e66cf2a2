"""The pass over a model whose blocks come into memory one at a time: block outside, windows inside.

Each block is read once from its files, by a thread while the one before it runs, and the windows of all texts go
through it: with the adapter, and beside them those of the base model, which is the same block with it switched off.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.drift import Predictions
from pytest_nullspace.measuring.forward import run
from pytest_nullspace.measuring.halfway import Halfway, OfPart, Pass, holds_stand_in, stand_ins, told_of
from pytest_nullspace.measuring.memory import give_back_freed_memory, keeping_little
from pytest_nullspace.measuring.recorder import Recorder
from pytest_nullspace.measuring.rows import Batch, Rows
from pytest_nullspace.measuring.waiting import Waiting, asking, tensors_in
from pytest_nullspace.model import AdaptedModel
from pytest_nullspace.model.ends import ends_of
from pytest_nullspace.model.light import lighten
from pytest_nullspace.model.shelf import UnfitError
from pytest_nullspace.model.shelved import ShelvedLayer

CPU = torch.device("cpu")
"""Where all but the blocks and the head is, and where hidden states wait."""

State = Callable[[AdaptedModel], AbstractContextManager[object]]
"""Within the context a block is in that state, given the model with the layers of that block alone."""


@dataclass
class Text:
    """A text whose windows are streamed.

    Attributes:
        windows: How many it has.
        batches: Gives the batches of some of its windows, of at most so many each.
        predictions: Takes the predictions, where they are compared.
        read: Of each part that was read what was taken on it.
    """

    windows: int
    batches: Callable[[range, int], Iterator[Batch]]
    predictions: Predictions | None
    read: dict[range, OfPart] = field(default_factory=dict)


@dataclass(frozen=True)
class Extra:
    """A forward beside those that are measured.

    Attributes:
        state: In which state of the model.
        tokens: What it reads.
        take: What is taken of the logits, shape ``(length, vocabulary)``.
        keep: Given that.
    """

    state: State
    tokens: Sequence[int]
    take: Callable[[Tensor], float]
    keep: Callable[[float], None]


@dataclass(frozen=True)
class _Forward:
    """A forward on its way through the blocks.

    Attributes:
        waiting: The forward.
        batch: What it reads.
        state: In which state of the model.
        of: The text whose norms are taken of it, where they are.
        rows: Which rows are whose, where they are.
        predictions: Of which the time that it takes is.
    """

    waiting: Waiting
    batch: Batch
    state: State = nullcontext
    of: Text | None = None
    rows: Rows = field(default_factory=Rows)
    predictions: Predictions | None = None


_ORDER = "its blocks do not run once each, one after the other"


def switched_off(adapted: AdaptedModel) -> AbstractContextManager[object]:
    """Within the context the model is its base."""
    assert adapted.switched_off is not None
    return adapted.switched_off()


class _SmallerError(Exception):
    """Raised where the rows of a batch cannot be told apart."""


class Streaming:
    """Streams windows through a model whose blocks lie on a shelf.

    Attributes:
        batches: The batch sizes, of which each but the first did not fit before it.
        progress: Told which share of a pass is done.
        starting: Told, once the first forward of a pass waits for a block, how many tokens all of them read, how many
            more bytes they will be between two blocks, and how many of all these are no windows of a text.
        expecting: Called once all that the first pass needs is in memory, but for one of two blocks.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        layers: Sequence[ShelvedLayer],
        ranks: Ranks,
        batches: list[int],
        halfway: Halfway,
    ) -> None:
        """Stream nothing yet.

        Args:
            adapted: The model, which has a shelf.
            layers: Those that are measured.
            ranks: The processes of which each streams its own windows.
            batches: The batch size to begin with.
            halfway: Keeps what each pass has done so far.

        Raises:
            UnfitError: The blocks cannot be run so.
        """
        assert adapted.shelf is not None
        if adapted.is_encoder_decoder:
            raise UnfitError("it is an encoder-decoder")
        self._adapted, self._shelf, self._ranks, self.batches = adapted, adapted.shelf, ranks, batches
        self._halfway = halfway
        self.progress: Callable[[float], None] = lambda _: None
        self.starting: Callable[[int, int, int], None] = lambda *_: None
        self.expecting: Callable[[], None] = lambda: None
        inside = [set(map(id, block.modules())) for block in self._shelf.blocks]
        self._layers = [[layer for layer in layers if id(layer.layer) in block] for block in inside]
        self._parts = [
            replace(adapted, layers={name: of for name, of in adapted.layers.items() if id(of.layer) in block})
            for block in inside
        ]
        for block in self._shelf.blocks:
            lighten(block)
        self._head = ends_of(adapted.model).predicts
        if self._head is not None and self._shelf.device != CPU:  # embeddings that it is tied to stay where they are
            for name, value in list(self._head.named_parameters(recurse=False)):
                moved = nn.Parameter(value.to(self._shelf.device), requires_grad=False)
                self._head.register_parameter(name, moved)

    def read(self, texts: Mapping[Any, Text], parts: Mapping[Any, range], extras: Sequence[Extra] = ()) -> None:
        """Read parts of some texts, and what is beside them, in one pass; what was read is in the texts.

        Raises:
            UnfitError: The blocks do not run one after the other.
            torch.OutOfMemoryError: A device has no memory even for one window.
        """
        chosen = [(texts[key], part) for key, part in parts.items()]
        while True:
            done = self._halfway.begin(list(parts.values()), len(extras), self.batches, len(self._shelf.blocks))
            goes_on = done.blocks > 0
            try:
                self._once(chosen, extras, done)
                break
            except Exception as error:
                # What fails where it goes on from an earlier run is tried from its beginning, where nothing is missing.
                if not goes_on:
                    if self.batches[-1] == 1 or not isinstance(error, _SmallerError | torch.OutOfMemoryError):
                        raise
                    # Where rows cannot be told apart one window alone can; what has no room may have in half.
                    self.batches.append(1 if isinstance(error, _SmallerError) else self.batches[-1] // 2)
            self._halfway.again(went_on=goes_on)

    def _once(self, chosen: Sequence[tuple[Text, range]], extras: Sequence[Extra], done: Pass) -> None:
        for (text, part), read in zip(chosen, done.read, strict=True):
            text.read[part] = read
        for layer in (layer for layers in self._layers for layer in layers if layer.name in done.norms):
            layer.kept[:] = [done.norms[layer.name]]
        if not done.ended:
            self._run(chosen, extras, done)
            done.ended = True
            if self._halfway.is_due:
                self._halfway.keep()
        for (text, _), compared in zip(chosen, done.compared, strict=True):
            for first, of in compared:
                assert text.predictions is not None
                text.predictions.add(first, of)
        for extra, taken in zip(extras, done.taken, strict=True):
            extra.keep(taken)

    def _run(self, chosen: Sequence[tuple[Text, range]], extras: Sequence[Extra], done: Pass) -> None:
        """Run what a pass has not yet done."""
        whole = bool(extras) or any(text.predictions is not None for text, _ in chosen)
        if whole and self._head is None:
            raise UnfitError("its head is not one module")
        pairs = [list(self._of(*of)) for of in chosen]
        beside = [self._forward(Batch.of([extra.tokens], CPU), state=extra.state) for extra in extras]
        forwards = [forward for of in pairs for pair in of for forward in pair] + beside
        with ExitStack() as stack:
            stack.enter_context(asking([*self._shelf.blocks, *([] if self._head is None else [self._head])]))
            stack.enter_context(closing(self._shelf))
            for forward in forwards:
                stack.callback(forward.waiting.leave)
            if done.blocks < len(self._shelf.blocks):
                self._shelf.ahead(done.blocks)
            self._start(forwards, done)
            self._through(forwards, chosen, done)
            if self._head is None:
                _require_ended(forwards)
            else:
                _require_waiting(forwards, self._head)
            done.compared = [[self._compared(*pair) for pair in of if len(pair) > 1] for of in pairs]
            done.taken = [extra.take(self._end(forward)[0]) for extra, forward in zip(extras, beside, strict=True)]

    def _of(self, text: Text, part: range) -> Iterator[list[_Forward]]:
        """The forwards of a text's batches, beside each the base's where predictions are compared."""
        for batch in text.batches(self._ranks.share(part), self.batches[-1]):
            pair = [self._forward(batch, of=text, predictions=text.predictions)]
            if text.predictions is not None:
                pair.append(self._forward(batch, state=switched_off, predictions=text.predictions))
            yield pair

    def _forward(self, batch: Batch, **of: Any) -> _Forward:
        def forward() -> Any:
            torch.set_num_threads(1)  # of this thread: else each would come to have as many as the machine has cores
            with self._adapted.without_grad():
                return run(self._adapted.model, batch.tokens, batch.beside)

        return _Forward(Waiting(forward), batch, **of)

    def _start(self, forwards: Sequence[_Forward], done: Pass) -> None:
        """Run each up to the first block that is not done."""
        threads = torch.get_num_threads()
        answers, done.answers = done.answers or [None] * len(forwards), []
        there = sum(of.nbytes for of in tensors_in(answers))  # what an earlier run left is in memory
        try:
            for forward, answer in zip(forwards, answers, strict=True):
                forward.rows.start(forward.batch)
                with forward.rows.watching(self._adapted.model) if forward.of is not None else nullcontext():
                    forward.waiting.go_on()
                if forward is forwards[0] and forward.waiting.call is not None:
                    each = forward.waiting.call.nbytes / forward.batch.tokens.numel()
                    tokens = sum(of.batch.tokens.numel() for of in forwards)
                    extra = sum(of.batch.tokens.numel() for of in forwards if of.of is None and of.predictions is None)
                    self.starting(tokens, int(each * tokens) - there, int(each * extra))
                for number in range(done.blocks):
                    _require_waiting([forward], self._shelf.blocks[number])
                    forward.waiting.go_on(answer if number == done.blocks - 1 else stand_ins(answer))
        finally:
            torch.set_num_threads(threads)
        if done.blocks and told_of(forwards[0].waiting.call) != done.met:
            raise UnfitError(_ORDER)

    def _through(self, forwards: Sequence[_Forward], chosen: Sequence[tuple[Text, range]], done: Pass) -> None:
        """Run all of them through all blocks: what comes back to one could not be known of before the last."""
        shelf, last = self._shelf, len(self._shelf.blocks) - 1
        with keeping_little():
            for number in range(done.blocks, last + 1):
                _require_waiting(forwards, shelf.blocks[number])
                values = shelf.ready(number)
                self.expecting()
                self.expecting = lambda: None
                shelf.ahead(number + 1)
                shelf.put(number, values)
                del values
                try:
                    self._block(forwards, chosen, number, done)
                finally:
                    shelf.clear(number)
                    give_back_freed_memory()
                shelf.ahead(number + 2)  # without waiting for the one between, so that never more than two are there
                done.blocks = number + 1
                if self._halfway.is_due:
                    done.answers = [forward.waiting.given for forward in forwards]
                    done.met = told_of(forwards[0].waiting.call)
                    self._halfway.keep()
                    done.answers = []
                self.progress((number + 1) / (last + 1))

    def _block(
        self,
        forwards: Sequence[_Forward],
        chosen: Sequence[tuple[Text, range]],
        number: int,
        done: Pass,
    ) -> None:
        """Run all of them through the one block that is there, that of this ``number``."""
        layers = self._layers[number]
        for layer in layers:
            done.norms[layer.name] = layer.norms()
        for (text, part), read in zip(chosen, done.read, strict=True):
            recorder = Recorder(self._shelf.device, text.windows)
            with recorder.watching(layers):
                for forward in forwards:
                    if forward.of is text:
                        forward.waiting.go_on(self._recorded(forward, recorder))
                if layers:
                    read.add([layer.name for layer in layers], recorder, part)
        states: dict[State, list[_Forward]] = {}
        for forward in forwards:
            if forward.of is None:
                states.setdefault(forward.state, []).append(forward)
        for state, alike in states.items():
            with state(self._parts[number]):
                for forward in alike:
                    began = time.perf_counter()
                    forward.waiting.go_on(self._called(forward))
                    if forward.predictions is not None:
                        forward.predictions.seconds += time.perf_counter() - began

    def _recorded(self, forward: _Forward, recorder: Recorder) -> Any:
        """What the block gives to a forward, its norms counted."""
        recorder.rows = forward.rows
        while True:
            recorder.start(forward.batch)
            output = self._called(forward)
            if (anew := recorder.end()) is None:
                return output
            if anew < len(forward.batch.tokens):
                raise _SmallerError

    def _called(self, forward: _Forward) -> Any:
        """What the module for which a forward waits gives; a block's is brought back to where the forward is."""
        call, device = forward.waiting.call, self._shelf.device
        assert call is not None
        if holds_stand_in(call.args) or holds_stand_in(call.kwargs):
            raise UnfitError(_ORDER)
        if device == CPU:
            return call.context.run(call.forward, *call.args, **call.kwargs)
        args, kwargs = send_to_device(call.args, device), send_to_device(call.kwargs, device)
        output = call.context.run(call.forward, *args, **kwargs)
        return output if call.module is self._head else send_to_device(output, CPU)

    def _end(self, forward: _Forward) -> Tensor:
        """The logits of a forward that waits for the head."""
        forward.waiting.go_on(self._called(forward))
        if not forward.waiting.ended:
            raise UnfitError("its head does not run last")
        logits: Tensor = forward.waiting.output.logits
        forward.waiting.output = None
        return logits

    def _compared(self, adapted: _Forward, base: _Forward) -> tuple[int, Tensor]:
        """The predictions of a batch beside the base's, by its first window."""
        logits, before = self._end(adapted), self._end(base)
        tokens, first = adapted.batch.tokens.to(logits.device), adapted.batch.first
        assert base.predictions is not None
        return first, base.predictions.held(logits, before, tokens, first)


def _require_waiting(forwards: Sequence[_Forward], module: nn.Module) -> None:
    """Refuse forwards of which one waits for another module than this, or for none."""
    for forward in forwards:
        if forward.waiting.call is None or forward.waiting.call.module is not module:
            raise UnfitError(_ORDER)


def _require_ended(forwards: Sequence[_Forward]) -> None:
    """Refuse forwards of which one did not end."""
    if not all(forward.waiting.ended for forward in forwards):
        raise UnfitError(_ORDER)
