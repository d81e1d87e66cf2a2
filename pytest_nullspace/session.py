"""Measure each checkpoint once per run, whatever the number of workers, and keep the outcome, good or bad.

A saved run stands in for a checkpoint: it is gated alike, and nothing is measured.

Only this module reaches torch, and only inside a function.
"""

import hashlib
import platform
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_nullspace import calibration
from pytest_nullspace.audit import Audit, audit
from pytest_nullspace.baseline import Comparison, Difference, compare, incomparable, regressions
from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.checkpoint.header import TensorInfo, printable, read_tensors
from pytest_nullspace.checkpoint.layers import is_layer_name
from pytest_nullspace.diagnosis import Diagnosis, diagnose
from pytest_nullspace.errors import (
    CheckpointError,
    MeasurementError,
    NullspaceError,
    OptionError,
    StatsError,
    TextError,
)
from pytest_nullspace.hub import directory_of, downloaded
from pytest_nullspace.invariants import Check, Expectations, Stage
from pytest_nullspace.options import PREFIX, Settings, model_name, stats_file
from pytest_nullspace.report import terminal
from pytest_nullspace.stats import RunStats, from_json, read, write, write_atomically

Bases = MutableMapping[Hashable, Any]
"""The base model that adapters share, kept from one to the next; shared by the runs that are still to be measured."""

DEFAULT_SEQLEN = 2048
"""Tokens a window, as in the reference, where the model allows as many."""


class GatedRun(ABC):
    """What one file stands for in this run of pytest: layers that are gated, those selected, and their figures.

    Attributes:
        path: What was given: a checkpoint's directory or a saved run.
        file: The file that stands for it among pytest's nodes.
        name: What ``{model}`` stands for in the names of files.
        gated: The names of the layers that have a test, in model order.
        selected: The names of the layers to measure, once collection has ended.
        earlier_file: The earlier run that it is compared with, if it is.
        missing: The names of the layers that only the earlier run has.
    """

    def __init__(self, path: Path, file: Path, name: str, layers: Sequence[str], settings: Settings) -> None:
        self.path, self.file, self.name = path, file, name
        self.gated = tuple(layer for layer in layers if fnmatchcase(layer, settings.layers))
        if not self.gated:
            raise OptionError(
                f"{PREFIX}layers: {settings.layers!r} matches none of the {len(layers)} layers of "
                f"{path}; the first is {layers[0]}"
            )
        self.selected: set[str] = set()
        self._settings = settings
        self.earlier_file = None if settings.compare is None else stats_file(settings.compare, name)
        self._earlier = None if self.earlier_file is None else read_run(self.earlier_file)
        held = set(layers)
        self.missing = tuple(
            layer.name
            for layer in (self._earlier.layers if self._earlier is not None else ())
            if layer.name not in held and fnmatchcase(layer.name, settings.layers)
        )
        self._outcome: RunStats | NullspaceError | None = None
        self._shared: _SharedOutcome | None = None

    @property
    @abstractmethod
    def gates_all(self) -> bool:
        """Whether every adapted layer has a test."""

    @property
    @abstractmethod
    def has_audit(self) -> bool:
        """Whether its tensors are, or were, held against their start."""

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
    def gates_scope(self) -> bool:
        """Whether a test holds that nothing was trained outside the layers."""
        return self._settings.strict_scope

    def expectations(self, outcome: RunStats) -> Expectations:
        """What its layers are held against, given what was measured."""
        settings, earlier, audited = self._settings, self._earlier, Audit.of(outcome.about)
        stage = Stage(settings.stage)
        checks: list[Check] = []
        if earlier is not None:
            checks.append(lambda layer: regressions(layer, earlier, settings.limits, stage))
        if audited is not None:
            checks.append(lambda layer: audited.check(layer, trained=stage is Stage.TRAINED))
        return Expectations(stage, settings.overrides, checks, settings.allow_unreached)

    def compared(self, outcome: RunStats) -> Comparison | None:
        """The outcome against the earlier run, if there is one that compares."""
        if self._earlier is None or self._refused(outcome):
            return None
        return compare(outcome, self._earlier, self._settings.limits, Stage(self._settings.stage))

    def diagnoses(self, outcome: RunStats) -> list[Diagnosis]:
        """The causes of what is wrong with a trained adapter; an initial one has none yet."""
        if self._settings.stage != Stage.TRAINED:
            return []
        return diagnose(outcome, Audit.of(outcome.about), self.compared(outcome))

    def _refused(self, outcome: RunStats) -> list[Difference]:
        """What keeps the outcome from being compared, and is not allowed."""
        if self._earlier is None:
            return []
        return [d for d in incomparable(outcome, self._earlier) if d.what not in self._settings.allowed]

    def _check_comparable(self, outcome: RunStats) -> None:
        refused = self._refused(outcome)
        if refused:
            raise OptionError(
                f"{PREFIX}compare: not comparable: {'; '.join(map(str, refused))}: this run of {self.path}, and "
                f"{self.earlier_file}; measure both alike, or allow it by "
                + " ".join(f"{PREFIX}compare-allow={difference.what}" for difference in refused)
            )

    def share(self, folder: Path, number: int) -> None:
        """Keep the outcome in ``folder`` as well, for the other processes of this run of pytest."""
        self._shared = _SharedOutcome(folder, number)

    def measured(self, progress: Callable[[int, int], None] | None = None) -> RunStats:
        """What was measured, measuring first if no process of this run has.

        Raises:
            NullspaceError: The measurement failed, now or before, and is not tried again; or the earlier run is not
                comparable.
        """
        if self._outcome is None:
            self._outcome = (
                self._measure(progress)
                if self._shared is None
                else self._shared.get_or(lambda: self._measure(progress))
            )
        if isinstance(self._outcome, NullspaceError):
            raise self._outcome
        self._check_comparable(self._outcome)
        return self._outcome

    def peek(self) -> RunStats | None:
        """What was measured, if it was; nothing is measured now."""
        outcome = self._outcome if self._shared is None else self._shared.peek()
        return outcome if isinstance(outcome, RunStats) else None


class CheckpointRun(GatedRun):
    """A checkpoint, whose layers are measured when the first of them is asked for."""

    def __init__(self, checkpoint: Checkpoint, name: str, settings: Settings, bases: Bases) -> None:
        directory, layers = checkpoint.directory, [spec.name for spec in checkpoint.layers]
        super().__init__(directory, checkpoint.config_file, name, layers, settings)
        if settings.strict_scope and checkpoint.carries_base:
            raise OptionError(
                f"{PREFIX}strict-scope: {checkpoint.directory} holds a whole model, and its files do not tell which of "
                "its other tensors were trained; leave the option out for it"
            )
        self.checkpoint = checkpoint
        self._initial = None if settings.init is None else open_checkpoint(settings.init)
        self._bases = bases

    @property
    def has_audit(self) -> bool:
        """Whether its tensors are held against their start."""
        return self._initial is not None

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
        return terminal.header(self.checkpoint, len(self.gated), self._settings)

    def _measure(self, progress: Callable[[int, int], None] | None) -> RunStats | NullspaceError:
        try:
            outcome = measure_checkpoint(self.checkpoint, self._settings, self.selected, progress, self._bases)
            if self._initial is None:
                return outcome
            audited = audit_checkpoint(self.checkpoint, self._initial, self._settings, self.selected)
            return replace(outcome, about={**outcome.about, "audit": audited.to_dict()})
        except NullspaceError as error:
            return error
        except Exception as error:
            return MeasurementError(
                f"{self.checkpoint.directory}: the measurement failed unexpectedly: {type(error).__name__}: {error}\n"
                + "".join(traceback.format_exception(error))
            )
        finally:
            self._bases = {}  # the last run to let go of what is shared frees it


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
        super().__init__(file, file, file.stem, names, settings)
        self._check_comparable(self._saved)

    @property
    def gates_all(self) -> bool:
        """Whether every adapted layer was measured and has a test."""
        return self._saved.complete and len(self.gated) == len(self._saved.layers)

    @property
    def has_audit(self) -> bool:
        """Whether the saved run tells of an audit."""
        return self._audited is not None

    @property
    def outside(self) -> Sequence[str]:
        """The trained tensors that the saved run names."""
        return terminal.outside_of(self._saved)

    def header(self) -> Iterable[str]:
        """Which run is gated."""
        return terminal.saved_header(self.path, self._saved, len(self.gated))

    def _measure(self, _: Callable[[int, int], None] | None) -> RunStats:
        return replace(self._saved, layers=tuple(layer for layer in self._saved.layers if layer.name in self.selected))


def read_run(file: Path) -> RunStats:
    """A saved run whose layers can be tests.

    Raises:
        StatsError: It cannot be read, holds no layer, or one whose name no layer can have.
    """
    run = read(file)
    if not run.layers:
        raise StatsError(f"{file}: holds no layer, so there is nothing to gate")
    unfit = next((layer.name for layer in run.layers if not is_layer_name(layer.name)), None)
    if unfit is not None:
        raise StatsError(f"{file}: {printable(unfit)!r} is not the name of a layer")
    return run


class _SharedOutcome:
    """One outcome in a folder that several processes share: the first that asks makes it, the others read it."""

    def __init__(self, folder: Path, number: int) -> None:
        self._lock = folder / f"{number}.lock"
        self._started = folder / f"{number}.started"
        self._measured = folder / f"{number}.json"
        self._failed = folder / f"{number}.failed"

    def get_or(self, measure: Callable[[], RunStats | NullspaceError]) -> RunStats | NullspaceError:
        from filelock import FileLock

        with FileLock(self._lock):
            outcome = self.peek()
            if outcome is not None:
                return outcome
            if self._started.exists():
                return MeasurementError(
                    "the worker that measured this checkpoint died before it had finished, perhaps out of memory; "
                    f"lower {PREFIX}seqlen or {PREFIX}batch-size, or run without -n to see it happen"
                )
            self._started.touch()
            outcome = measure()
            if isinstance(outcome, NullspaceError):
                write_atomically(self._failed, str(outcome))
            else:
                write(outcome, self._measured)
            return outcome

    def peek(self) -> RunStats | NullspaceError | None:
        if self._measured.exists():
            return from_json(self._measured.read_text("utf-8"), str(self._measured))
        return MeasurementError(self._failed.read_text("utf-8")) if self._failed.exists() else None


def open_runs(settings: Settings) -> tuple[GatedRun, ...]:
    """Every checkpoint and every saved run that the settings name, read without torch.

    Raises:
        CheckpointError: A directory is no checkpoint.
        StatsError: A file is no saved run.
        OptionError: The option ``layers`` matches no layer of one.
    """
    bases: Bases = {}
    return (
        *(CheckpointRun(_opened(model), model_name(model), settings, bases) for model in settings.models),
        *(SavedRun(file, settings) for file in settings.stats),
    )


def _opened(model: Path | str) -> Checkpoint:
    return open_checkpoint(model if isinstance(model, Path) else downloaded(model, None, f"{PREFIX}model"))


def measure_checkpoint(
    checkpoint: Checkpoint,
    settings: Settings,
    layers: Collection[str],
    progress: Callable[[int, int], None] | None = None,
    bases: Bases | None = None,
) -> RunStats:
    """Read the text, load the model, and measure ``layers`` in one pass.

    Args:
        checkpoint: What to measure.
        settings: On which text, and how.
        layers: The names of its layers to measure.
        progress: Told how many windows of how many are done.
        bases: Keeps the base model of an adapter for the next adapter of the same base.

    Raises:
        NullspaceError: Any of it is not possible.
    """
    import torch

    from pytest_nullspace.measure import measure
    from pytest_nullspace.model import load_model

    started = time.perf_counter()
    base = None if checkpoint.carries_base else base_directory(checkpoint, settings.base)
    source = calibration.parse_source(settings.calib_dataset, settings.text_folder)
    text = calibration.read_text(source)
    tokenize = calibration.load_tokenizer(_tokenizer_directory(checkpoint, base))
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, checkpoint, device)
    adapted = load_model(checkpoint, device, dtype, base, bases)
    seqlen = _seqlen(settings.seqlen, adapted.model)
    windows = calibration.draw_windows(text, tokenize, count=settings.calib_size, seqlen=seqlen, seed=settings.seed)
    loaded = time.perf_counter()
    figures = measure(
        adapted,
        [window.tokens for window in windows],
        layers=layers,
        batch_size=settings.batch_size,
        max_rows=settings.max_activation_samples,
        seed=settings.seed,
        progress=progress,
    )
    adapted.take_off()
    passed = time.perf_counter()
    return RunStats(
        model_path=str(checkpoint.directory),
        calib_dataset=settings.calib_dataset,
        layers=figures,
        checkpoint_layers=len(checkpoint.layers),
        about={
            "format": checkpoint.format,
            "base": checkpoint.base,
            "outside": list(checkpoint.outside),
            "weights_sha256": _hashes(checkpoint),
            "text": {
                "sha256": calibration.text_hash(text),
                "windows": len(windows),
                "seqlen": seqlen,
                "tokens": sum(len(window.tokens) for window in windows),
                "starts": [window.start for window in windows],
            },
            "settings": {
                "calib_size": settings.calib_size,
                "max_activation_samples": settings.max_activation_samples,
                "seed": settings.seed,
                "batch_size": settings.batch_size,
                "layers": settings.layers,
                "stage": settings.stage,
                "allow_unreached": list(settings.allow_unreached),
            },
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "libraries": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("pytest-nullspace", "torch", "transformers", "safetensors")},
            },
            "measured": {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "host": platform.node(),
                "device_name": _device_name(torch, device),
                "seconds": {"load": round(loaded - started, 3), "pass": round(passed - loaded, 3)},
            },
        },
    )


def audit_checkpoint(checkpoint: Checkpoint, initial: Checkpoint, settings: Settings, layers: Collection[str]) -> Audit:
    """Hold every tensor of the checkpoint against its start; across formats against the tensors of the base as well.

    Raises:
        CheckpointError: The two do not belong together, or a file cannot be read.
    """

    def base(of: Checkpoint, other: Checkpoint) -> Mapping[str, TensorInfo] | None:
        if of.carries_base or not other.carries_base:
            return None
        return read_tensors(base_directory(of, settings.base), "model")

    return audit(
        checkpoint,
        initial,
        layers=layers,
        variant=settings.variant,
        trained_base=base(checkpoint, initial),
        initial_base=base(initial, checkpoint),
    )


def base_directory(checkpoint: Checkpoint, asked: str | None) -> Path:
    """Where the base model of ``checkpoint`` lies: what the option says, else what the adapter's config names.

    Raises:
        CheckpointError: Neither says, it cannot be had, or the config's base is not the one that was trained on.
    """
    if asked is not None:
        return directory_of(asked, None, f"{PREFIX}base")
    if checkpoint.changed_base is not None:
        raise CheckpointError(
            f"{checkpoint.config_file}: init_lora_weights {checkpoint.changed_base} changed the base's weights, and "
            f"the adapter was not saved converted: on the untouched base {printable(checkpoint.base)} every figure "
            f"would be wrong; give the changed base by {PREFIX}base=DIR"
        )
    if not checkpoint.base:
        raise CheckpointError(
            f"{checkpoint.config_file}: names no base_model_name_or_path; give it by {PREFIX}base=DIR"
        )
    how = f"{checkpoint.config_file}: base_model_name_or_path"
    return directory_of(checkpoint.base, checkpoint.base_revision, how)


def _tokenizer_directory(checkpoint: Checkpoint, base: Path | None) -> Path:
    """The adapter's own tokenizer if one was saved with it, else its base's."""
    has_own = any((checkpoint.directory / name).is_file() for name in calibration.TOKENIZER_FILES)
    return checkpoint.directory if base is None or has_own else base


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator is not None and accelerator.type in ("cuda", "xpu") else "cpu"
    device = torch.device(name)
    if device.type != "cpu":
        module = getattr(torch, device.type)
        if not module.is_available() or (device.index or 0) >= module.device_count():
            raise OptionError(f"{PREFIX}device: torch sees no {name} on this machine; choose cpu or leave it at auto")
    return device


def _dtype(name: str, checkpoint: Checkpoint, device: Any) -> Any:
    import torch

    if name != "auto":
        return getattr(torch, name)
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    if device.type == "cpu" or "F32" in stored or "F64" in stored:
        return torch.float32
    return torch.bfloat16 if "BF16" in stored else torch.float16


def _device_name(torch: Any, device: Any) -> str:
    return str(getattr(torch, device.type).get_device_name(device)) if device.type != "cpu" else platform.machine()


def _seqlen(asked: int | None, model: Any) -> int:
    limit = getattr(model.config, "max_position_embeddings", None)
    if asked is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if limit is not None and asked > limit:
        raise TextError(f"{PREFIX}seqlen: {asked} tokens are more than the {limit} that the model takes")
    return asked


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
