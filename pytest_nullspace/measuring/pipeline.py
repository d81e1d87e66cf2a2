"""A checkpoint and settings in, a run out: the text read, the model loaded, the layers measured and audited.

The parts that hold tensors are reached from here and from `loading` alone, and only inside functions.
"""

import gc
import hashlib
import math
import platform
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import TensorInfo, read_tensors, require_unchanged, stamps
from pytest_nullspace.checkpoint.hub import base_of
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.judging.audit import Audit, audit
from pytest_nullspace.judging.invariants import Expectations, Stage, judge, judge_averages
from pytest_nullspace.judging.weights import STATEMENT, weigh
from pytest_nullspace.measuring.limits import default_length, require_known_tokens, window_length
from pytest_nullspace.measuring.loading import (
    Bases,
    TrueBase,
    device_name,
    device_of,
    dtype_of,
    half_precision,
    load,
    one_of,
    shortage_told,
    true_base,
)
from pytest_nullspace.measuring.memory import keep_freed_memory
from pytest_nullspace.run.figures import of_layers, on_the_task
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats
from pytest_nullspace.settings import PREFIX, Settings
from pytest_nullspace.text.choice import TokenizerChoice
from pytest_nullspace.text.readers import read_text
from pytest_nullspace.text.sources import OPTION, TASK_OPTION, parse_source
from pytest_nullspace.text.tokenizer import load_tokenizer
from pytest_nullspace.text.windows import Window, distinct_rows, draw_windows, text_hash

if TYPE_CHECKING:
    from pytest_nullspace.model import AdaptedModel

CPU_TOKENS, GPU_TOKENS = 256, 16384
"""Tokens of the windows that share a forward. Below so many a CPU spends its time between the matrix products, beyond
them little is gained (docs/cost.md); a GPU wants more, as far as they fit."""


def measure_checkpoint(
    checkpoint: Checkpoint,
    settings: Settings,
    layers: Collection[str],
    progress: Callable[[int, int], None] | None = None,
    bases: Bases | None = None,
    initial: Checkpoint | None = None,
) -> RunStats:
    """Read the text, load the model, and measure ``layers`` in one pass.

    Args:
        checkpoint: What to measure.
        settings: On which text, and how.
        layers: The names of its layers to measure.
        progress: Told how many windows of how many are done.
        bases: Keeps the base model of an adapter for the next adapter of the same base.
        initial: The checkpoint from which training started, if it is known.

    Raises:
        NullspaceError: Any of it is not possible.
    """
    _free_garbage()
    spent = _Spent()
    keep_freed_memory()
    is_base_read = not checkpoint.carries_base or (settings.drift and initial is None and settings.base is not None)
    base = base_of(checkpoint, settings.base) if is_base_read else None
    require_unchanged(checkpoint.stamps)
    read = checkpoint.stamps | (stamps(base) if base is not None else frozenset())
    if settings.drift and initial is not None:
        read |= initial.stamps
    texts = {"text": _text(settings.calib_dataset, settings.text_folder, OPTION)}
    if settings.task_dataset is not None:
        texts["task_text"] = _text(settings.task_dataset, settings.task_folder, TASK_OPTION)
    tokenizer = TokenizerChoice.of(checkpoint.directory, base)
    tokenize = load_tokenizer(tokenizer.used)
    spent.on("text")

    # Only now torch, for what is wrong with the text need not wait for it.
    from pytest_nullspace.model import import_libraries
    from pytest_nullspace.model.spread import places

    import_libraries(checkpoint)
    spent.on("imports")
    device = device_of(settings)
    dtype = dtype_of(settings.dtype, checkpoint, device, base)
    running = f"{str(dtype).removeprefix('torch.')} on {device}"
    with shortage_told(
        lambda: (
            f"{checkpoint.directory}: too little memory to load the model in {running}; "
            + one_of(*half_precision(running, "lower it by"), "take a machine with more")
        )
    ):
        adapted = load(checkpoint, settings, device, dtype, base, bases)
    held_against = (
        true_base(adapted, checkpoint, initial, base, settings, adapted.device, dtype) if settings.drift else None
    )
    spent.on("model")
    seqlen = window_length(settings.seqlen, adapted.model)
    count = settings.calib_most if settings.calib_size is None else settings.calib_size
    drawn = {
        what: draw_windows(text, tokenize, count=count, seqlen=seqlen, seed=settings.seed)
        for what, text in texts.items()
    }
    for windows in drawn.values():
        require_known_tokens(windows, adapted.model, checkpoint)
    spent.on("windows")
    load_seconds = sum(spent.seconds.values())

    run = _Pass(checkpoint, settings, adapted, drawn, seqlen, running, progress)
    figures, batches = run.figures(layers)
    if settings.spectrum:
        figures = run.with_spectrum(figures)
    moved = None if held_against is None else run.drift(held_against)
    adapted.take_off()
    spent.on("pass")
    hashes = _hashes(checkpoint)
    spent.on("hashes")
    require_unchanged(read)
    return RunStats(
        model_path=str(checkpoint.directory),
        calib_dataset=settings.calib_dataset,
        layers=figures,
        checkpoint_layers=len(checkpoint.layers),
        drift=moved,
        about={
            "format": checkpoint.format,
            "base": checkpoint.base,
            "outside": list(checkpoint.outside),
            "weights_sha256": hashes,
            **({"task_dataset": settings.task_dataset} if settings.task_dataset is not None else {}),
            **{what: _about_text(texts[what], windows, seqlen) for what, windows in run.read.items()},
            "tokenizer": tokenizer.told(texts, run.read, seqlen),
            "settings": {
                "calib_size": settings.calib_size,
                "max_activation_samples": settings.max_activation_samples,
                "seed": settings.seed,
                "processes": settings.ranks.size,
                "batch_size": settings.batch_size,
                "layers": settings.layers,
                "stage": settings.stage,
                "allow_unreached": list(settings.allow_unreached),
            },
            "device": places(adapted),
            "dtype": str(dtype).removeprefix("torch."),
            "libraries": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("pytest-nullspace", "torch", "transformers", "safetensors")},
            },
            "measured": {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "host": platform.node(),
                "batch_sizes": batches,
                "device_name": device_name(adapted.device),
                "seconds": {
                    "load": round(load_seconds, 3),
                    **{what: round(took, 3) for what, took in spent.seconds.items()},
                },
            },
        },
    )


def _free_garbage() -> None:
    """Free the model of an earlier measurement, which else may lie in memory beside the next.

    Nothing refers to it any more, but accelerate's hooks, and frames that the import of a library leaves, hold it in
    cycles; and what was freed of an accelerator's memory is not what accelerate sees as free.
    """
    torch = sys.modules.get("torch")
    if torch is None:  # then none was measured
        return
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


class _Spent:
    """Where the time went: the seconds of each part, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def on(self, what: str) -> None:
        """All since the last part ended went on this one."""
        now = time.perf_counter()
        self.seconds[what], self._since = now - self._since, now


Figures = tuple[LayerStats, ...]


def with_task(preserved: Figures, task: Figures) -> Figures:
    """The figures of the preserved text, each layer's on the task text beside them."""
    return tuple(replace(layer, task=other) for layer, other in zip(preserved, task, strict=True))


@dataclass(frozen=True)
class _Pass:
    """The loaded model and the windows that go through it.

    Attributes:
        checkpoint: Of which the model is.
        settings: How it is measured.
        adapted: The model.
        drawn: The windows of each text, of which ``auto`` may use fewer.
        seqlen: Tokens a window.
        running: Precision and device, in words.
        progress: Told how many windows of how many are done.
        used: How many windows of each text were used, once it was read.
    """

    checkpoint: Checkpoint
    settings: Settings
    adapted: "AdaptedModel"
    drawn: Mapping[str, Sequence[Window]]
    seqlen: int
    running: str
    progress: Callable[[int, int], None] | None
    used: dict[str, int] = field(default_factory=dict)

    @property
    def read(self) -> dict[str, Sequence[Window]]:
        """The windows of each text that were used."""
        return {what: self.drawn[what][:count] for what, count in self.used.items()}

    @property
    def _short(self) -> str:
        return f"{self.checkpoint.directory}: too little memory"

    def figures(self, layers: Collection[str]) -> tuple[Figures, list[int]]:
        """Measure ``layers`` on each text; with the batch sizes, of which each but the first did not fit before it."""
        device, settings, of = self.adapted.device, self.settings, len(self.checkpoint.layers)
        batches = [settings.batch_size or _batch_size(self.seqlen, device)]

        def short() -> str:
            together = min(batches[-1], max(map(len, self.drawn.values())))
            lower = f"{PREFIX}seqlen or {PREFIX}batch-size" if together > 1 else f"{PREFIX}seqlen"
            return (
                f"{self._short} in the pass of windows of {self.seqlen} tokens, {together} a forward, in "
                f"{self.running}; {one_of(f'lower {lower}', *half_precision(self.running, 'take'))}"
            )

        with shortage_told(short):
            if "task_text" not in self.drawn:
                whole = of_layers()
                return self._of("text", layers, batches, lambda own: _settled(own, of, settings, whole)), batches
            # Each text is asked for what will be judged on it, and no more.
            preserved = [figure for figure in of_layers() if figure not in on_the_task()]
            own = self._of("text", layers, batches, lambda own: _settled(with_task(own, own), of, settings, preserved))
            task = self._of(
                "task_text", layers, batches, lambda task: _settled(with_task(own, task), of, settings, on_the_task())
            )
            return with_task(own, task), batches

    def _of(
        self, what: str, layers: Collection[str], batches: list[int], settled: Callable[[Figures], bool]
    ) -> Figures:
        from pytest_nullspace.measuring.streaming import measure

        before, total = sum(self.used.values()), sum(map(len, self.drawn.values()))
        # Of a text that ended early what was left out is not waited for.
        total -= sum(len(self.drawn[earlier]) - count for earlier, count in self.used.items())
        self.used[what] = len(self.drawn[what])

        def tell(done: int, _: int) -> None:
            self.used[what] = done
            if self.progress is not None:
                self.progress(before + done, total)

        return measure(
            self.adapted,
            [window.tokens for window in self.drawn[what]],
            layers=layers,
            batch_size=batches[-1],
            shrunk=batches.append,
            max_rows=self.settings.max_activation_samples,
            seed=self.settings.seed,
            progress=tell,
            ranks=self.settings.ranks,
            settled=None if self.settings.calib_size is not None else settled,
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
            )
        return tuple(replace(layer, spectrum=best.get(layer.name)) for layer in figures)

    def drift(self, held_against: TrueBase) -> Drift:
        """How far the predictions lie from the true base's, on each text."""
        from pytest_nullspace.measuring.drift import drift

        half = half_precision(self.running, "take")
        with shortage_told(
            lambda: (
                f"{self._short} to load {held_against.name} beside the model for {PREFIX}drift, in {self.running}; "
                + one_of(*half, "take a machine with more", f"leave {PREFIX}drift out")
            )
        ):
            base, place = held_against.load()
        with shortage_told(
            lambda: (
                f"{self._short} for both models' predictions of windows of {self.seqlen} tokens, in {self.running}; "
                + one_of(f"lower {PREFIX}seqlen", *half, f"leave {PREFIX}drift out")
            )
        ):
            found = {
                what: drift(
                    self.adapted.model,
                    base,
                    [window.tokens for window in windows],
                    self.adapted.device,
                    self.progress,
                    self.settings.ranks,
                    place,
                )
                for what, windows in self.read.items()
            }
        return Drift(held_against.name, found["text"], found.get("task_text"))


def _settled(figures: Figures, of: int, settings: Settings, judged: Collection[str]) -> bool:
    """Whether more text would change no verdict.

    Args:
        figures: Of the selected layers, so far.
        of: How many layers the checkpoint has.
        settings: What they are held against.
        judged: The figures that are judged on the text.
    """
    expectations = Expectations(
        Stage(settings.stage), settings.overrides, (), settings.allow_unreached, settings.variant, settings.drift
    )
    if any(not (layer.task or layer).rows and not expectations.excuses(layer) for layer in figures):
        return False  # one row would give what has no figures yet, and so nothing uncertain, a verdict
    run, verdicts = RunStats("", "", figures, of), [judge(layer, expectations) for layer in figures]
    if run.complete:
        verdicts.append(judge_averages(run, expectations))
    findings = [finding for verdict in verdicts for finding in verdict.findings]
    return not any(finding.uncertain for finding in findings if finding.threshold.figure in judged)


def _text(spec: str, folder: Path, option: str) -> str:
    return read_text(parse_source(spec, folder, option))


def _about_text(text: str, windows: Sequence[Window], seqlen: int) -> dict[str, Any]:
    return {
        "sha256": text_hash(text),
        "windows": len(windows),
        "seqlen": seqlen,
        "tokens": sum(len(window.tokens) for window in windows),
        "distinct": distinct_rows(windows),
        "starts": [window.start for window in windows],
    }


def planned(checkpoint: Checkpoint, settings: Settings) -> tuple[RunStats, frozenset[str]]:
    """The run as it will be, as far as that is known before the text is read and the model loaded.

    Returns:
        A run without figures, and the conditions in `pytest_nullspace.baseline.COMPARED` that it already tells.
    """
    seqlen = settings.seqlen
    if seqlen is None and checkpoint.carries_base:
        seqlen = default_length(checkpoint.config)
    lost = math.nan
    layers = tuple(
        LayerStats(
            spec.name, 0, spec.in_features, spec.rank, spec.out_features,
            lost, lost, lost, lost, lost, lost, lost, lost, lost,
        )
        for spec in checkpoint.layers
    )  # fmt: skip
    if settings.task_dataset is not None:
        layers = with_task(layers, layers)
    told = {"windows": settings.calib_size, "seqlen": seqlen}
    about = {"text": told, "settings": {"seed": settings.seed}}
    known = {"seed", "rank", "widths", "figures"} | {what for what, value in told.items() if value is not None}
    return RunStats(str(checkpoint.directory), settings.calib_dataset, layers, len(layers), about), frozenset(known)


def read_files(checkpoint: Checkpoint, settings: Settings, layers: Collection[str]) -> RunStats:
    """A run in which nothing was measured: no text, no model, no torch; weighed where the settings ask for it."""
    weighed = {"statement": STATEMENT, "weights": weigh(checkpoint, layers).to_list()} if settings.weights_only else {}
    return RunStats(
        model_path=str(checkpoint.directory),
        calib_dataset="",
        layers=(),
        checkpoint_layers=len(checkpoint.layers),
        about={
            **weighed,
            "format": checkpoint.format,
            "base": checkpoint.base,
            "outside": list(checkpoint.outside),
            "weights_sha256": _hashes(checkpoint),
            "settings": {"layers": settings.layers, "stage": settings.stage},
            "libraries": {"python": platform.python_version(), "pytest-nullspace": version("pytest-nullspace")},
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
        path = base_of(of, settings.base)
        if path.is_file():
            raise CheckpointError(
                f"{path}: {PREFIX}init holds the base's weights against those of the start one by one, and a GGUF file "
                f"holds others, quantised; give them as safetensors by {PREFIX}base=DIR"
            )
        return read_tensors(path, "model")

    require_unchanged(checkpoint.stamps | initial.stamps)
    return audit(
        checkpoint,
        initial,
        layers=layers,
        variant=settings.variant,
        trained_base=base(checkpoint, initial),
        initial_base=base(initial, checkpoint),
    )


def _batch_size(seqlen: int, device: Any) -> int:
    """Windows a forward that suit ``device``; how many fit is found out by trying."""
    return max(1, (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS) // seqlen)


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
