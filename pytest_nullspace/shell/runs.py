"""Measure each checkpoint once per run, whatever the number of workers, and keep the outcome, good or bad.

A saved run stands in for a checkpoint: it is gated alike, and nothing is measured.
"""

import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.checkpoint.header import quoted
from pytest_nullspace.checkpoint.hub import downloaded
from pytest_nullspace.checkpoint.layers import is_layer_name
from pytest_nullspace.errors import MeasurementError, NullspaceError, OptionError, StatsError, first_line
from pytest_nullspace.judging.audit import Audit
from pytest_nullspace.judging.baseline import COMPARED, Comparison, Difference, compare, incomparable, regressions
from pytest_nullspace.judging.diagnosis import diagnose
from pytest_nullspace.judging.evidence import Diagnosis
from pytest_nullspace.judging.invariants import DRIFT, MODEL, Check, Expectations, Stage, passes
from pytest_nullspace.judging.start import Start, unpaired
from pytest_nullspace.judging.weights import LayerWeights, Weights
from pytest_nullspace.measuring import inputs, pipeline
from pytest_nullspace.measuring.loading import Bases
from pytest_nullspace.report import notes
from pytest_nullspace.report import weights as weights_report
from pytest_nullspace.run.figures import FIGURES, of_predictions
from pytest_nullspace.run.saved import read
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.settings import PREFIX, Settings, model_name, stats_file
from pytest_nullspace.shell.shared import SharedOutcome

READ_ALIKE = ("weights_sha256", "text", "task_text", "settings", "dtype")
"""What the processes that measure together must have found alike, of what a run tells."""


@dataclass(frozen=True)
class Told:
    """What an outcome tells beside its figures."""

    outcome: RunStats
    audit: Audit | None
    weights: Weights | None


class GatedRun(ABC):
    """What one file stands for in this run of pytest: layers that are gated, those selected, and their figures.

    Attributes:
        path: What was given: a checkpoint's directory or a saved run.
        file: The file that stands for it among pytest's nodes.
        name: What ``{model}`` stands for in the names of files.
        layers: The names of the layers that it tells of, in model order.
        gated: The names of those that have a test.
        selected: The names of the layers to measure, once collection has ended.
        drift_selected: Whether the drift is to be measured.
        judged: The names of its tests that came to a verdict, once all have run.
        earlier_file: The earlier run that it is compared with, if it is.
        missing: The names of the layers that only the earlier run has.
        start_file: The saved run of the initial checkpoint, if one is given.
        start: What it holds, and what must have come of it.
    """

    def __init__(self, path: Path, file: Path, name: str, layers: Sequence[str], settings: Settings) -> None:
        self.path, self.file, self.name, self.layers = path, file, name, tuple(layers)
        self.gated = tuple(layer for layer in layers if fnmatchcase(layer, settings.layers))
        if not self.gated:
            raise OptionError(
                f"{PREFIX}layers: {settings.layers!r} matches none of the {len(layers)} layers of "
                f"{path}; the first is {layers[0]}"
            )
        self.selected: set[str] = set()
        self.drift_selected = False
        self.judged: Collection[str] | None = None
        self._settings = settings
        self.earlier_file = None if settings.compare is None else stats_file(settings.compare, name)
        self._earlier = None if self.earlier_file is None else read_run(self.earlier_file)
        held = set(layers)
        self.missing = tuple(
            layer.name
            for layer in (self._earlier.layers if self._earlier is not None else ())
            if layer.name not in held and fnmatchcase(layer.name, settings.layers)
        )
        self.start_file = settings.saved_init
        self.start = self._saved_start(layers)
        self._outcome: RunStats | NullspaceError | None = None
        self._shared: SharedOutcome | None = None
        self._wrong: NullspaceError | None = None
        self._broken_off: BaseException | None = None
        self._teller: str | None = None
        self._told: Told | None = None

    def _saved_start(self, layers: Sequence[str]) -> Start | None:
        file = self.start_file
        if file is None:
            return None
        start = read_run(file)
        gone = unpaired(set(layers), start, lambda name: fnmatchcase(name, self._settings.layers))
        if gone:
            more = f" and {len(gone) - 1} more layers" if len(gone) > 1 else ""
            raise StatsError(f"{file}: not the start of {self.path}: only one of them has {gone[0]}{more}")
        return Start.of(start, self._settings.variant)

    @property
    @abstractmethod
    def gates_all(self) -> bool:
        """Whether every adapted layer has a test."""

    @property
    @abstractmethod
    def tells_all(self) -> bool:
        """Whether ``layers`` are all that the checkpoint adapts."""

    @property
    @abstractmethod
    def figures(self) -> Collection[str]:
        """What is, or was, measured of its layers and predictions."""

    @property
    @abstractmethod
    def has_audit(self) -> bool:
        """Whether its tensors are, or were, held against their start."""

    @property
    @abstractmethod
    def has_drift(self) -> bool:
        """Whether a test holds the predictions against the base model's."""

    @property
    @abstractmethod
    def outside(self) -> Sequence[str]:
        """The trained tensors that no layer test covers."""

    @abstractmethod
    def header(self) -> Iterable[str]:
        """What is gated, in lines for the top of the run."""

    @abstractmethod
    def _measure(self, progress: Callable[[int, int], None] | None) -> RunStats | NullspaceError:
        """The figures of the selected layers, or what prevented them."""

    @property
    def weights_only(self) -> bool:
        """Whether its weights alone are gated."""
        return self._settings.weights_only

    @property
    def gates_scope(self) -> bool:
        """Whether a test holds that nothing was trained outside the layers."""
        return self._settings.strict_scope

    def subjects(self, figure: str) -> Sequence[str]:
        """The tests that judge ``figure``."""
        return (DRIFT,) if figure in of_predictions() else (*self.layers, MODEL)

    def unmeasured(self, figure: str) -> Path | None:
        """Where ``figure`` lacks to be compared with the earlier run: here or there; None if it lacks in neither."""
        if figure not in self.figures:
            return self.path
        earlier = () if self._earlier is None else self._earlier.layers
        return None if any(figure in layer.measured for layer in earlier) else self.earlier_file

    def told(self, outcome: RunStats) -> Told:
        """What the outcome tells beside its figures, read once, for each of its layers asks."""
        if self._told is None or self._told.outcome is not outcome:
            self._told = Told(outcome, Audit.of(outcome.about), Weights.of(outcome.about))
        return self._told

    def expectations(self, outcome: RunStats) -> Expectations:
        """What its layers are held against, given what was measured."""
        settings, earlier, audited = self._settings, self._earlier, self.told(outcome).audit
        stage = Stage(settings.stage)
        checks: list[Check] = []
        if earlier is not None:
            checks.append(lambda layer: regressions(layer, earlier, settings.limits, stage))
        if audited is not None:
            checks.append(lambda layer: audited.check(layer, trained=stage is Stage.TRAINED))
        if (start := self.start) is not None:
            checks.append(lambda layer: start.check(layer, trained=stage is Stage.TRAINED))
        drifted = self.drift_selected and outcome.drift is not None
        return Expectations(
            stage, settings.overrides, checks, settings.allow_unreached, settings.variant, drifted, self.judged
        )

    def compared(self, outcome: RunStats) -> Comparison | None:
        """The outcome against the earlier run, if there is one that compares."""
        if self._earlier is None or self._refused(outcome, self._earlier):
            return None
        return compare(outcome, self._earlier, self._settings.limits, Stage(self._settings.stage))

    def diagnoses(self, outcome: RunStats) -> list[Diagnosis]:
        """The causes of what is wrong with a trained adapter; an initial one has none yet."""
        if self._settings.stage != Stage.TRAINED:
            return []
        told, expected = self.told(outcome), self.expectations(outcome)
        compared, passed = self.compared(outcome), passes(outcome, expected)
        return diagnose(outcome, told.audit, compared, told.weights, expected.left_out, passed)

    def weight_faults(self, outcome: RunStats, layer: LayerWeights) -> list[str]:
        """What fails a layer of which the weights alone are gated."""
        trained = self._settings.stage == Stage.TRAINED
        audited = self.told(outcome).audit
        moved = () if audited is None else audited.faults(layer.name, trained)
        return list(dict.fromkeys([*layer.faults(trained), *moved]))

    def _refused(
        self, outcome: RunStats, earlier: RunStats, conditions: Collection[str] = tuple(COMPARED)
    ) -> list[Difference]:
        """What keeps the outcome from being compared with another run, and is not allowed."""
        return [d for d in incomparable(outcome, earlier, conditions) if d.what not in self._settings.allowed]

    def _check_comparable(self, outcome: RunStats, known: Collection[str] = tuple(COMPARED)) -> None:
        """Refuse an outcome that does not compare with the earlier run or the saved start, by what is ``known``."""
        against = [("compare", self.earlier_file, self._earlier, set(COMPARED))]
        if self.start is not None:  # whether W_res is what it was is a test of its own, and figures may lack
            against.append(("init", self.start_file, self.start.run, {*COMPARED} - {"base", "figures"}))
        for option, file, other, conditions in against:
            refused = [] if other is None else self._refused(outcome, other, conditions & {*known})
            if refused:
                raise OptionError(
                    f"{PREFIX}{option}: not comparable: {'; '.join(map(str, refused))}: this run of {self.path}, and "
                    f"{file}; measure both alike, or allow it by "
                    + " ".join(f"{PREFIX}compare-allow={difference.what}" for difference in refused)
                )

    def _refusal(self, outcome: RunStats) -> OptionError | None:
        try:
            self._check_comparable(outcome)
        except OptionError as error:
            return error
        return None

    def share(self, folder: Path, number: int) -> None:
        """Keep the outcome in ``folder`` as well, for the other processes of this run of pytest."""
        self._shared = SharedOutcome(folder, number)

    def measured(self, progress: Callable[[int, int], None] | None = None) -> RunStats:
        """What was measured, measuring first if no process of this run has.

        Raises:
            NullspaceError: The measurement failed, now or before, and is not tried again; or the earlier run is not
                comparable.
        """
        if self._outcome is None:
            self._outcome = (
                self._made(progress) if self._shared is None else self._shared.get_or(lambda: self._made(progress))
            )
            self._wrong = self._outcome if isinstance(self._outcome, NullspaceError) else self._refusal(self._outcome)
            broken_off, self._broken_off = self._broken_off, None
            if broken_off is not None:
                raise broken_off
        if self._wrong is not None:
            raise self._wrong.with_traceback(None)
        assert isinstance(self._outcome, RunStats)
        return self._outcome

    def _made(self, progress: Callable[[int, int], None] | None) -> RunStats | NullspaceError:
        """The outcome; one that stays also where a timeout of the test, or Ctrl-C, breaks the measurement off."""
        try:
            return self._measure(progress)
        except BaseException as error:
            self._broken_off = error
            return MeasurementError(
                f"{self.path}: the measurement was broken off by {type(error).__name__}: {first_line(error)}; it is "
                "made once for all tests, within the first of them: give that one more time"
            )

    def tells(self, test: str) -> bool:
        """Whether ``test``, which met what went wrong, is the one that tells it; the others only name it."""
        if self._teller is None:
            self._teller = test if self._shared is None else self._shared.teller(test)
        return self._teller == test

    def peek(self) -> RunStats | None:
        """What was measured, if it was; nothing is measured now."""
        outcome = self._outcome if self._shared is None else self._shared.peek()
        return outcome if isinstance(outcome, RunStats) else None


class CheckpointRun(GatedRun):
    """A checkpoint, whose layers are measured when the first of them is asked for."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, settings: Settings, bases: Bases, texts: dict[str, str]
    ) -> None:
        directory, layers = checkpoint.directory, [spec.name for spec in checkpoint.layers]
        super().__init__(directory, checkpoint.config_file, name, layers, settings)
        if settings.strict_scope and checkpoint.carries_base:
            raise OptionError(
                f"{PREFIX}strict-scope: {checkpoint.directory} holds a whole model, and its files do not tell which of "
                "its other tensors were trained; leave the option out for it"
            )
        self.checkpoint = checkpoint
        self._initial = None if settings.init_directory is None else open_checkpoint(settings.init_directory)
        self._bases, self._texts = bases, texts
        if self._earlier is not None or self.start is not None:
            self._check_comparable(*pipeline.planned(checkpoint, settings))

    @property
    def tells_all(self) -> bool:
        """That its files tell of every layer."""
        return True

    @property
    def figures(self) -> Collection[str]:
        """What the settings ask for."""
        has_task, has_drift = self._settings.task_dataset is not None, self._settings.drift
        return [
            name
            for name, figure in FIGURES.items()
            if (has_task or not figure.needs_task) and (has_drift or not figure.of_predictions)
        ]

    @property
    def has_audit(self) -> bool:
        """Whether its tensors are held against their start."""
        return self._initial is not None

    @property
    def has_drift(self) -> bool:
        """Whether the predictions are held against the base model's."""
        return self._settings.drift

    @property
    def gates_all(self) -> bool:
        """Whether every adapted layer has a test."""
        return len(self.gated) == len(self.checkpoint.layers)

    @property
    def outside(self) -> Sequence[str]:
        """The trained tensors in its files that belong to no layer."""
        return self.checkpoint.outside

    def header(self) -> Iterable[str]:
        """What will be measured, and how."""
        if self.weights_only:
            return weights_report.header(self.checkpoint, len(self.gated))
        return notes.header(self.checkpoint, len(self.gated), self._settings)

    def check_models(self, *, look: bool) -> None:
        """Refuse a base model or a tokenizer that cannot be read; with ``look`` only what can be told at a glance."""
        inputs.check_models(self.checkpoint, self._initial, self._settings, look=look)

    def _measure(self, progress: Callable[[int, int], None] | None) -> RunStats | NullspaceError:
        try:
            with self._settings.ranks.joined() as ranks:
                outcome = self._measured_here(progress)
                ranks.agree({name: outcome.about.get(name) for name in READ_ALIKE})
            return outcome
        except NullspaceError as error:
            # Kept to the end of the run, it must not keep the frames that hold the model.
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)
        except Exception as error:
            return MeasurementError(
                f"{self.checkpoint.directory}: the measurement failed unexpectedly: {type(error).__name__}: {error}\n"
                + "".join(traceback.format_exception(error, chain=False))
            )
        finally:
            self._bases, self._texts = {}, {}  # the last run to let go of what is shared frees it

    def _measured_here(self, progress: Callable[[int, int], None] | None) -> RunStats:
        checkpoint, settings, layers = self.checkpoint, self._settings, self.selected or set(self.gated)
        if self.weights_only or not (self.selected or self.drift_selected):  # as where `frozen` alone is selected
            outcome = pipeline.read_files(checkpoint, settings, layers)
        else:
            outcome = pipeline.measure_checkpoint(
                checkpoint,
                settings if self.drift_selected else replace(settings, drift=False),
                self.selected,
                progress,
                self._bases,
                self._initial,
                self._texts,
            )
        if self._initial is None:
            return outcome
        audited = pipeline.audit_checkpoint(checkpoint, self._initial, settings, layers)
        return replace(outcome, about={**outcome.about, "audit": audited.to_dict()})


class SavedRun(GatedRun):
    """A saved run, gated as it was measured."""

    def __init__(self, file: Path, settings: Settings) -> None:
        self._saved = read_run(file)
        self._audited = Audit.of(self._saved.about, str(file))
        names = [layer.name for layer in self._saved.layers]
        if settings.strict_scope and (self._saved.about.get("base") is None or "outside" not in self._saved.about):
            raise OptionError(
                f"{PREFIX}strict-scope: {file} does not tell what was trained outside its layers; "
                "leave the option out for it"
            )
        if settings.drift and self._saved.drift is None:
            raise OptionError(f"{PREFIX}drift: {file} does not tell of it; measure the model with the option")
        super().__init__(file, file, file.stem, names, settings)
        self._check_comparable(self._saved)

    @property
    def gates_all(self) -> bool:
        """Whether every adapted layer was measured and has a test."""
        return self._saved.complete and len(self.gated) == len(self._saved.layers)

    @property
    def tells_all(self) -> bool:
        """Whether every layer was measured."""
        return self._saved.complete

    @property
    def figures(self) -> Collection[str]:
        """What the saved run tells of some layer or of the predictions."""
        drift = () if self._saved.drift is None else self._saved.drift.figures
        return {*drift, *(figure for layer in self._saved.layers for figure in layer.measured)}

    @property
    def has_drift(self) -> bool:
        """Whether the saved run tells of the predictions."""
        return self._saved.drift is not None

    @property
    def has_audit(self) -> bool:
        """Whether the saved run tells of an audit."""
        return self._audited is not None

    @property
    def outside(self) -> Sequence[str]:
        """The trained tensors that the saved run names."""
        return notes.outside_of(self._saved)

    def header(self) -> Iterable[str]:
        """Which run is gated."""
        return notes.saved_header(self.path, self._saved, len(self.gated))

    def _measure(self, _: Callable[[int, int], None] | None) -> RunStats:
        return replace(self._saved, layers=tuple(layer for layer in self._saved.layers if layer.name in self.selected))


def read_run(file: Path) -> RunStats:
    """A saved run whose layers can be tests.

    Raises:
        StatsError: It cannot be read, holds no layer, or one whose name no layer can have.
    """
    run = read(file)
    if Weights.of(run.about, str(file)) is not None:
        raise StatsError(
            f"{file}: is of weights alone: its activations were not measured, so it can stand in for no measured run; "
            "measure without --nullspace-weights-only"
        )
    if not run.layers:
        raise StatsError(f"{file}: holds no layer, so there is nothing to gate")
    unfit = next((layer.name for layer in run.layers if not is_layer_name(layer.name)), None)
    if unfit is not None:
        raise StatsError(f"{file}: {quoted(unfit)} is not the name of a layer; measure again")
    return run


def open_runs(settings: Settings, texts: dict[str, str]) -> tuple[GatedRun, ...]:
    """Every checkpoint and every saved run that the settings name, read without torch.

    Args:
        settings: What is gated.
        texts: Holds the texts where they were read before the measurement.

    Raises:
        CheckpointError: A directory is no checkpoint.
        StatsError: A file is no saved run.
        OptionError: The option ``layers`` matches no layer of one, or a bound would hold nothing.
    """
    bases: Bases = {}
    runs = (
        *(CheckpointRun(_opened(model), model_name(model), settings, bases, texts) for model in settings.models),
        *(SavedRun(file, settings) for file in settings.stats),
    )
    _require_held(runs, settings)
    return runs


def check_inputs(runs: Sequence[GatedRun], settings: Settings, texts: dict[str, str], *, look: bool) -> None:
    """Refuse texts, base models and tokenizers that cannot be read, before any test asks for the measurement.

    Args:
        runs: What is gated.
        settings: Which texts.
        texts: Takes the texts, so that they are not read again.
        look: Whether they are only looked for, as where tests are listed.

    Raises:
        CheckpointError: A base or a tokenizer cannot be read.
        TextError: A text cannot be read.
    """
    measured = [run for run in runs if isinstance(run, CheckpointRun)]
    # Several processes must first meet, to fail together.
    if not measured or settings.weights_only or settings.ranks.size > 1:
        return
    if look:
        inputs.sources(settings)
    else:
        texts |= inputs.read_texts(settings)
    for run in measured:
        run.check_models(look=look)


def _require_held(runs: Sequence[GatedRun], settings: Settings) -> None:
    """Refuse the user's bounds against which nothing would be held in any of the runs."""
    for limit in settings.limits:
        lacking = [run.unmeasured(limit.figure) for run in runs]
        if None not in lacking:
            raise _not_measured("compare-fail", limit.figure, lacking[0])
    for override in settings.overrides:
        telling = [run for run in runs if override.figure in run.figures]
        if not telling:
            raise _not_measured("threshold", override.figure, runs[0].path)
        names = [name for run in telling for name in run.subjects(override.figure)]
        # The layers that a run in part does not tell of may be what a line is for.
        if all(run.tells_all for run in telling) and not any(fnmatchcase(name, override.layers) for name in names):
            alike = {re.sub(r"\d+", "", name): name for name in reversed(names)}  # one of each block is enough
            line = f"{override.layers} {override.figure} {override.passes:g} {override.fails:g}"
            raise OptionError(
                f"nullspace_threshold: {quoted(line)} would never apply: it matches no test of "
                f"{', '.join(str(run.path) for run in telling)} that judges {override.figure}; the nearest are "
                f"{', '.join(get_close_matches(override.layers, alike.values(), cutoff=0))}; mend it or leave it out"
            )


def _not_measured(option: str, figure: str, where: Path | None) -> OptionError:
    record = FIGURES[figure]
    needs = (("drift", record.of_predictions), ("task-dataset", record.needs_task))
    by = " ".join(f"{PREFIX}{name}" for name, is_needed in needs if is_needed) or "this plugin"
    return OptionError(
        f"{PREFIX}{option}: {figure} is not measured of {where}; measure with {by}, or leave the bound out"
    )


def _opened(model: Path | str) -> Checkpoint:
    return open_checkpoint(model if isinstance(model, Path) else downloaded(model, None, f"{PREFIX}model"))
