"""The gate while transformers' Trainer, or one of TRL's, trains an adapter: `NullspaceCallback`."""

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import distributed
from transformers import ProcessorMixin, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pytest_nullspace.errors import NullspaceError, OptionError, first_line
from pytest_nullspace.shell.called import IN_MEMORY, Report, Texts, asked, of_model, texts_of
from pytest_nullspace.shell.watching import Pace, figures_of, stops

PREFIX = "nullspace/"
WINDOWS, LENGTH = 8, 128
"""Windows and tokens of each, where nothing else is asked for."""

logger = logging.getLogger("pytest_nullspace")


class NullspaceCallback(TrainerCallback):  # type: ignore[misc]
    """Gates the adapter while it is trained, and logs what it finds to whatever the trainer logs to.

    Once before the first step, from time to time, and once after the last: ``nullspace/divergence``,
    ``nullspace/loss_rise``, ``nullspace/task_gain`` (with a task text), ``nullspace/worst_leakage``,
    ``nullspace/verdict`` (0 SAFE, 1 LOOK, 2 DO NOT DEPLOY, -1 NOT GATED) and ``nullspace/seconds``. The model and
    chance are left as they were, so the training is the same as without, bit for bit. What goes wrong is told once, and
    ends the gating but not the training.

    Attributes:
        report: The last measurement; None where there was none yet, or where the last one failed.
        failed: Why nothing is measured any more, nor ends the training, in words; None where all went well.
        stopped: Why the training was ended, in words; None where it was not.
    """

    def __init__(
        self,
        preserved: Texts = "wikitext2",
        task: str | os.PathLike[str] | None = None,
        *,
        every: int | str = "auto",
        stop_on: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        share: float = 0.02,
        **options: Any,
    ) -> None:
        """Measure nothing yet.

        Args:
            preserved: The text that must survive, as `pytest_nullspace.gate` takes it.
            task: The text of what is learned.
            every: Steps from one measurement to the next, or ``auto``: as often as takes no more than ``share`` of the
                time of the steps.
            stop_on: What ends the training: a bound such as ``drift>0.15`` (the larger of divergence and loss rise) or
                ``worst_leakage>0.5``, or the verdict ``LOOK`` or ``DO NOT DEPLOY``; a list for several.
            tokenizer: The tokenizer, or its directory; that of the trainer, or else of the base, if None.
            share: What ``auto`` may take.
            **options: As `pytest_nullspace.gate` takes them; ``calib_size`` is 8 and ``seqlen`` 128 at most by default.

        Raises:
            OptionError: One of them is no value that it takes.
        """
        if every != "auto" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise OptionError(f"every: takes a whole number from 1, or auto, not {every!r}")
        if not 0 < share <= 1:
            raise OptionError(f"share: takes a number above 0, up to 1, not {share!r}")
        self._pace, self._stops = Pace(None if every == "auto" else int(every), share), stops(stop_on)
        self._asked = asked(IN_MEMORY, preserved, task, {"calib_size": WINDOWS, **options})
        self._tokenizer, self._texts = tokenizer, dict[str, Any]()
        self._is_on, self._began, self._last = True, 0.0, -1
        self.report: Report | None = None
        self.failed: str | None = None
        self.stopped: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Measure once before the first step, so that what is wrong is told now."""
        self._measure(state, control, given, may_stop=False)  # also where it is off, for the others may not know

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Measure where it is due."""
        if not self._is_on:
            return
        due, pace = state.global_step >= self._pace.next, self._pace
        if due:
            _wait()
        pace.trained += time.perf_counter() - self._began
        pace.steps += 1
        if due:
            self._measure(state, control, given, may_stop=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Measure once more what was trained."""
        if self._is_on and self._last != state.global_step and state.is_world_process_zero:
            self._one(state, control, given)

    def _measure(
        self, state: TrainerState, control: TrainerControl, given: Mapping[str, Any], *, may_stop: bool
    ) -> None:
        """Measure in process 0, if it is worth it, and tell the others what follows."""
        if state.is_world_process_zero:
            figures, since = None, time.perf_counter()
            if self._is_on and (not may_stop or self._pace.is_worth_it):
                figures = self._one(state, control, given)
                if may_stop:
                    self._pace.spent += time.perf_counter() - since
            ends = [why for stop in self._stops if figures and may_stop and (why := stop.reached(figures))]
            decided = (self._is_on, self._pace.plan(state.global_step), ends[0] if ends else None)
        else:
            decided = (True, 0, None)
        self._is_on, self._pace.next, why = _agreed(decided)
        if why is not None:
            self.stopped = why
            control.should_training_stop = True
            logger.warning("nullspace: the training ends after step %d: %s", state.global_step, why)

    def _one(self, state: TrainerState, control: TrainerControl, given: Mapping[str, Any]) -> dict[str, float] | None:
        """Measure and log; None, and no more of it, where that failed."""
        try:
            model = given["model"]
            settings = self._asked if self._asked.seqlen else replace(self._asked, seqlen=_length(model))
            tokenizer = self._tokenizer if self._tokenizer is not None else _tokenizer(given.get("processing_class"))
            self._texts = self._texts or texts_of(settings)
            since = time.perf_counter()
            self.report = of_model(model, tokenizer, settings, self._texts)
            _wait()
            self._pace.cost, self._last = time.perf_counter() - since, state.global_step
            figures = figures_of(self.report)
            self._require_told(figures)
            logged = {f"{PREFIX}{name}": value for name, value in figures.items()}
            self._log(state, control, logged | {f"{PREFIX}seconds": round(self._pace.cost, 3)})
        except Exception as error:
            what = str(error) if isinstance(error, NullspaceError) else f"{type(error).__name__}: {first_line(error)}"
            what += "; stop_on cannot end it any more" if self._stops else ""
            logger.warning("nullspace: the adapter is not gated any more, the training goes on: %s", what)
            self._is_on, self.report, self.failed = False, None, what  # an earlier report is of another model
            return None
        return figures

    def _require_told(self, figures: Mapping[str, float]) -> None:
        lacking = next((stop for stop in self._stops if stop.value(figures) is None), None)
        if lacking is not None:
            raise OptionError(f"stop_on: {lacking.text}: that figure is not measured of this adapter")

    def _log(self, state: TrainerState, control: TrainerControl, figures: dict[str, float]) -> None:
        """Have the trainer log the figures; it is the one that calls, for callbacks are not given it."""
        frame, trainer = sys._getframe(1).f_back, None
        while frame is not None and trainer is None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, Trainer) and any(one is self for one in caller.callback_handler.callbacks):
                trainer = caller
            frame = frame.f_back
        if trainer is None:
            state.log_history.append({**figures, "step": state.global_step})
            return
        also = control.should_log  # which to log takes back
        trainer.log(figures)
        control.should_log = also


def _tokenizer(of_trainer: Any) -> Any:
    """The trainer's tokenizer; None where what it prepares its inputs by is none."""
    return of_trainer if isinstance(of_trainer, PreTrainedTokenizerBase | ProcessorMixin) else None


def _length(model: Any) -> int:
    """Tokens a window, no more than a small model takes."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(LENGTH, limit) if isinstance(limit, int) and limit > 0 else LENGTH


def _wait() -> None:
    """Wait for what the device was given before, whose time is not that of what follows."""
    kind = getattr(torch.accelerator.current_accelerator(check_available=True), "type", None)
    if kind in ("cuda", "xpu"):  # on an Apple GPU is not measured
        getattr(torch, kind).synchronize()


def _agreed(decided: tuple[bool, int, str | None]) -> tuple[bool, int, str | None]:
    """What process 0 decided, in every process: they all come to the same steps."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return decided
    shared = [decided]
    distributed.broadcast_object_list(shared, src=0)
    return shared[0]
