"""What is gated in this run of pytest: a checkpoint, whose layers are measured, or what stands in its place."""

import traceback
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.errors import MeasurementError, NullspaceError, OptionError
from pytest_nullspace.judging.evidence import Diagnosis
from pytest_nullspace.judging.invariants import MODEL, Expectations
from pytest_nullspace.judging.screening import FIGURES as SCREENED
from pytest_nullspace.judging.survival import KEY
from pytest_nullspace.measuring import inputs, pipeline, unmeasured
from pytest_nullspace.measuring.inmemory import InMemory
from pytest_nullspace.measuring.left import merges_of
from pytest_nullspace.measuring.loading import Bases
from pytest_nullspace.report import notes
from pytest_nullspace.report import screened as screen_report
from pytest_nullspace.report import weights as weights_report
from pytest_nullspace.report.changes import in_names
from pytest_nullspace.run.figures import FIGURES, OF_DOWN, of_predictions
from pytest_nullspace.run.stats import WITHOUT_DRIFT, RunStats
from pytest_nullspace.run.texts import drift_test, preserved
from pytest_nullspace.settings import PREFIX, Settings
from pytest_nullspace.shell.against import Against
from pytest_nullspace.shell.once import MeasuredOnce
from pytest_nullspace.shell.served import Servers
from pytest_nullspace.shell.together import Together
from pytest_nullspace.text.readers import Text

READ_ALIKE = ("weights_sha256", "task_text", "settings", "dtype")
"""What the processes that measure together must have found alike, of what a run tells."""


class GatedRun(MeasuredOnce):
    """What one file stands for in this run of pytest: layers that are gated, those selected, and their figures.

    Attributes:
        path: What was given: a checkpoint's directory or a saved run.
        file: The file that stands for it among pytest's nodes.
        name: What ``{model}`` stands for in the names of files.
        layers: The names of the layers that it tells of, in model order.
        gated: The names of those that have a test.
        selected: The names of the layers to measure, once collection has ended.
        drift_selected: The selected tests of the predictions; they are measured where there is one.
        judged: The names of its tests that came to a verdict, once all have run.
        against: What it is held against.
        servers: The servers that are to take it.
        merges_selected: The selected tests of what a merge keeps; it is measured where there is one.
    """

    def __init__(self, path: Path, file: Path, name: str, layers: Sequence[str], settings: Settings) -> None:
        super().__init__()
        self.path, self.file, self.name, self.layers = path, file, name, tuple(layers)
        self.gated = tuple(layer for layer in layers if fnmatchcase(layer, settings.layers))
        if not self.gated:
            raise OptionError(
                f"{PREFIX}layers: {settings.layers!r} matches none of the {len(layers)} layers of "
                f"{path}; '*{layers[0].rpartition('.')[2]}' matches the first, {layers[0]}"
            )
        self.selected: set[str] = set()
        self.drift_selected: set[str] = set()
        self.merges_selected: set[str] = set()
        self.judged: Collection[str] | None = None
        self._settings = settings
        self.against = Against(path, name, layers, settings)
        self.servers = Servers(settings)

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
        """Whether tests hold the predictions against the base model's."""

    @property
    @abstractmethod
    def text_names(self) -> Sequence[str]:
        """How the preserved texts are called, the first first, which may have no name."""

    @property
    def drift_tests(self) -> Sequence[str]:
        """The tests that hold the predictions against the base model's, one for each preserved text."""
        return [drift_test(name) for name in self.text_names] if self.has_drift else []

    @property
    @abstractmethod
    def merge_types(self) -> Sequence[str]:
        """The types in which a merge is to keep its update."""

    @property
    def merge_tests(self) -> Mapping[str, str]:
        """The tests of what a merge keeps, each with its type."""
        return {f"{KEY}[{kind}]": kind for kind in self.merge_types}

    @property
    @abstractmethod
    def outside(self) -> Sequence[str]:
        """The trained tensors that no layer test covers."""

    @abstractmethod
    def header(self) -> Iterable[str]:
        """What is gated, in lines for the top of the run."""

    @property
    def weights_only(self) -> bool:
        """Whether its weights alone are gated."""
        return self._settings.weights_only

    @property
    def screened(self) -> bool:
        """Whether it is screened, to the first order, and not gated."""
        return self._settings.screen

    @property
    def gates_scope(self) -> bool:
        """Whether a test holds that nothing was trained outside the layers."""
        return self._settings.strict_scope

    def subjects(self, figure: str) -> Sequence[str]:
        """The tests that judge ``figure``."""
        return self.drift_tests if figure in of_predictions() else (*self.layers, MODEL)

    def unmeasured(self, figure: str) -> Path | None:
        """Where ``figure`` lacks to be compared with the earlier run: here or there; None if it lacks in neither."""
        return self.path if figure not in self.figures else self.against.unmeasured(figure)

    def expectations(self, outcome: RunStats) -> Expectations:
        """What its layers are held against, given what was measured."""
        tests = set(self.drift_tests)
        drifts_judged = bool(tests) and tests <= self.drift_selected
        return self.against.expectations(outcome, drifts_judged, self.judged)

    def diagnoses(self, outcome: RunStats) -> list[Diagnosis]:
        """The causes of what is wrong with it, told in the names of its files."""
        return in_names(self.against.diagnoses(outcome, self.expectations(outcome)), outcome)

    def _refusal(self, outcome: RunStats) -> OptionError | None:
        try:
            self.against.check_comparable(outcome)
        except OptionError as error:
            return error
        return None


class CheckpointRun(GatedRun):
    """A checkpoint, whose layers are measured when the first of them is asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        settings: Settings,
        bases: Bases,
        texts: dict[str, Text],
        live: InMemory | None = None,
        together: Together | None = None,
    ) -> None:
        directory, layers = checkpoint.directory, [spec.name for spec in checkpoint.layers]
        super().__init__(directory, checkpoint.config_file, name, layers, settings)
        if settings.strict_scope and checkpoint.carries_base:
            raise OptionError(
                f"{PREFIX}strict-scope: {checkpoint.directory} holds a whole model, and its files do not tell which of "
                "its other tensors were trained; leave the option out for it"
            )
        self.checkpoint, self.servers = checkpoint, Servers(settings, checkpoint)
        start = settings.init_directory
        self._initial = None if start is None else open_checkpoint(start, settings.base, is_start=True)
        self._bases, self._texts, self._live = bases, texts, live
        self._together = together
        self._screened = None if together is None else together.add(checkpoint, lambda: self.selected)
        asked = settings.drift is None and not settings.weights_only and not settings.screen
        self._without_drift = inputs.why_no_drift(checkpoint, settings) if asked else None
        if self.against.earlier is not None or self.against.start is not None:
            self.against.check_comparable(*unmeasured.planned(checkpoint, settings))

    @property
    def tells_all(self) -> bool:
        """That its files tell of every layer."""
        return True

    @property
    def figures(self) -> Collection[str]:
        """What the settings ask for."""
        if self.screened:
            return SCREENED
        has_task, has_drift = self._settings.task_dataset is not None, self.has_drift
        return [
            name
            for name, figure in FIGURES.items()
            if (has_task or not figure.needs_task) and (has_drift or not figure.of_predictions)
            if not (self.checkpoint.has_no_down and name in OF_DOWN)
        ]

    @property
    def has_audit(self) -> bool:
        """Whether its tensors are held against their start."""
        return self._initial is not None

    @property
    def has_drift(self) -> bool:
        """Whether the predictions are held against the base model's, as far as that is known yet."""
        asked, outcome = self._settings.drift, self.peek()
        if asked is not None or self.weights_only or self.screened:
            return bool(asked)
        return self._without_drift is None and (outcome is None or outcome.without_drift is None)

    @property
    def text_names(self) -> Sequence[str]:
        """Those of the texts that were given."""
        return [text.name for text in self._settings.preserved]

    @property
    def merge_types(self) -> Sequence[str]:
        """Those that were asked for."""
        return self._settings.merge

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
        if self.screened:
            return screen_report.header(self.checkpoint, len(self.gated), self._settings)
        reads_base = inputs.is_base_read(self.checkpoint, self._settings, self._initial)
        return notes.header(self.checkpoint, len(self.gated), self._settings, reads_base)

    def share(self, folder: Path, number: int) -> None:
        """Keep the outcome in ``folder`` as well, and that of all that are screened with it."""
        super().share(folder, number)
        if self._together is not None:
            self._together.share(folder)

    def check_models(self, *, look: bool) -> None:
        """Refuse a base model or a tokenizer that cannot be read; with ``look`` only what can be told at a glance."""
        if self._live is None:
            inputs.check_models(self.checkpoint, self._initial, self._settings, look=look)

    def check_merge(self) -> None:
        """Refuse a merge whose weights are not at hand."""
        merges_of(self.checkpoint, self._settings, self.gated, self._initial)

    def check_chat(self) -> None:
        """Refuse conversations among the texts that were read, where the tokenizer's template cannot write them."""
        known = None if self._live is None else self._live.tokenizer.used
        inputs.check_chat(self.checkpoint, self._initial, self._settings, self._texts, known)

    def check_processor(self) -> None:
        """Refuse rows of images for a model that has no processor of them."""
        if self._live is None:
            inputs.check_processor(self.checkpoint, self._initial, self._settings, self._texts)

    def _measure(self, progress: Callable[[int, int], None] | None) -> RunStats | NullspaceError:
        if progress is not None:
            progress(0, 0)  # the model loads, and how many windows its text has is not known yet
        try:
            with self._settings.ranks.joined() as ranks:
                outcome = self._measured_here(progress)
                ranks.agree({name: outcome.about.get(name) for name in (*READ_ALIKE, *preserved(outcome.about))})
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
        checkpoint, layers = self.checkpoint, self.selected or set(self.gated)
        settings = self._settings if self.merges_selected else replace(self._settings, merge=())
        if self.weights_only or not (self.selected or self.drift_selected):  # as where `frozen` alone is selected
            outcome = unmeasured.read_files(checkpoint, settings, layers, self._initial)
        elif self._screened is not None:
            outcome = self._screened(progress)
        else:
            outcome = pipeline.measure_checkpoint(
                checkpoint,
                settings if self.drift_selected else replace(settings, drift=False),
                self.selected,
                progress,
                self._bases,
                self._initial,
                self._texts,
                self._live,
            )
        if self._without_drift is not None:
            outcome = replace(outcome, about={**outcome.about, WITHOUT_DRIFT: self._without_drift})
        if self._initial is None:
            return outcome
        audited = unmeasured.audit_checkpoint(checkpoint, self._initial, settings, layers)
        return replace(outcome, about={**outcome.about, "audit": audited.to_dict()})
