"""A checkpoint and settings in, a run out: the text read, the model loaded, the layers measured and audited.

Only this module reaches torch, and only inside a function.
"""

import gc
import hashlib
import math
import platform
import sys
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_nullspace import calibration
from pytest_nullspace.audit import Audit, audit
from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import TensorInfo, printable, read_tensors, require_unchanged, stamps
from pytest_nullspace.distributed import Ranks
from pytest_nullspace.errors import CheckpointError, MeasurementError, OptionError, TextError
from pytest_nullspace.hub import base_path
from pytest_nullspace.invariants import Expectations, Stage, judge, judge_averages
from pytest_nullspace.memory import keep_freed_memory
from pytest_nullspace.options import PREFIX, Settings
from pytest_nullspace.stats import FIGURES, ON_TASK, Drift, LayerStats, RunStats
from pytest_nullspace.weights import STATEMENT, weigh

if TYPE_CHECKING:
    from pytest_nullspace.drift import Base
    from pytest_nullspace.model import AdaptedModel

Bases = MutableMapping[Hashable, Any]
"""The base model that adapters share, kept from one to the next; shared by the runs that are still to be measured."""

DEFAULT_SEQLEN = 2048
"""Tokens a window, as in the reference, where the model allows as many."""
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
    texts = {"text": _text(settings.calib_dataset, settings.text_folder, calibration.OPTION)}
    if settings.task_dataset is not None:
        texts["task_text"] = _text(settings.task_dataset, settings.task_folder, calibration.TASK_OPTION)
    tokenize = calibration.load_tokenizer(_tokenizer_directory(checkpoint, base))
    spent.on("text")

    import torch  # only now, for what is wrong with the text need not wait for it

    from pytest_nullspace.measure import measure
    from pytest_nullspace.model import import_libraries
    from pytest_nullspace.model.spread import places

    import_libraries(checkpoint)
    spent.on("imports")
    device = _device(settings)
    dtype = _dtype(settings.dtype, checkpoint, device)
    running = f"{str(dtype).removeprefix('torch.')} on {device}"
    short = f"{checkpoint.directory}: too little memory"
    with _memory_told(
        lambda: (
            f"{short} to load the model in {running}; lower it by {PREFIX}dtype=bfloat16, or take a machine with more"
        )
    ):
        adapted = _loaded(checkpoint, settings, device, dtype, base, bases)
        device = adapted.device
    true_base = _base(adapted, checkpoint, initial, base, settings, device, dtype) if settings.drift else None
    spent.on("model")
    seqlen = _seqlen(settings.seqlen, adapted.model)
    count = settings.calib_most if settings.calib_size is None else settings.calib_size
    drawn = {
        what: calibration.draw_windows(text, tokenize, count=count, seqlen=seqlen, seed=settings.seed)
        for what, text in texts.items()
    }
    for windows in drawn.values():
        _require_known_tokens(windows, adapted.model, checkpoint)
    spent.on("windows")
    load = sum(spent.seconds.values())

    used: dict[str, int] = {}
    batches = [settings.batch_size or _batch_size(seqlen, device)]

    def measured(what: str, settled: Callable[[Figures], bool]) -> Figures:
        before = sum(used.values())

        used[what] = len(drawn[what])

        def tell(done: int, _: int) -> None:
            used[what] = done
            if progress is not None:
                progress(before + done, before + sum(len(drawn[w]) for w in drawn if w == what or w not in used))

        return measure(
            adapted,
            [window.tokens for window in drawn[what]],
            layers=layers,
            batch_size=batches[-1],
            shrunk=batches.append,
            max_rows=settings.max_activation_samples,
            seed=settings.seed,
            progress=tell,
            ranks=settings.ranks,
            settled=None if settings.calib_size is not None else settled,
        )

    def short_in_pass() -> str:
        together = min(batches[-1], max(map(len, drawn.values())))
        lower = f"{PREFIX}seqlen or {PREFIX}batch-size" if together > 1 else f"{PREFIX}seqlen"
        return (
            f"{short} in the pass of windows of {seqlen} tokens, {together} a forward, in {running}; lower {lower}, or "
            f"take {PREFIX}dtype=bfloat16"
        )

    with _memory_told(short_in_pass):
        of = len(checkpoint.layers)
        if "task_text" not in texts:
            figures = measured("text", lambda own: _settled(own, of, settings, tuple(FIGURES)))
        else:  # each text is asked for what will be judged on it, and no more
            preserved = measured("text", lambda own: _settled(with_task(own, own), of, settings, _ON_PRESERVED))
            of_task = measured("task_text", lambda task: _settled(with_task(preserved, task), of, settings, ON_TASK))
            figures = with_task(preserved, of_task)
    if settings.spectrum:
        from pytest_nullspace.spectrum import spectrum

        names = [layer.name for layer in figures]
        with _memory_told(
            lambda: (
                f"{short} for the spectrum, whose sums are in float64 and as wide as the layers, in {running}; "
                f"leave {PREFIX}spectrum out, or lower {PREFIX}seqlen"
            )
        ):
            best = spectrum(
                adapted,
                [w.tokens for w in drawn["text"][: used["text"]]],
                names,
                progress=progress,
                ranks=settings.ranks,
            )
        figures = tuple(replace(layer, spectrum=best.get(layer.name)) for layer in figures)
    moved = None
    if true_base is not None:
        over = {what: drawn[what][:count] for what, count in used.items()}
        with _memory_told(
            lambda: (
                f"{short} to load {true_base.name} beside the model for {PREFIX}drift, in {running}; take "
                f"{PREFIX}dtype=bfloat16 or a machine with more, or leave {PREFIX}drift out"
            )
        ):
            loaded = true_base.load()
        with _memory_told(
            lambda: (
                f"{short} for both models' predictions of windows of {seqlen} tokens, in {running}; lower "
                f"{PREFIX}seqlen, take {PREFIX}dtype=bfloat16, or leave {PREFIX}drift out"
            )
        ):
            moved = _drift(adapted, true_base.name, loaded, over, progress, settings.ranks)
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
            **{what: _about_text(texts[what], drawn[what][:count], seqlen) for what, count in used.items()},
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
                "device_name": _device_name(torch, device),
                "seconds": {"load": round(load, 3), **{what: round(took, 3) for what, took in spent.seconds.items()}},
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


_ON_PRESERVED = tuple(figure for figure in FIGURES if figure not in ON_TASK)


def _settled(figures: Figures, of: int, settings: Settings, judged: Collection[str]) -> bool:
    """Whether more text would change no verdict.

    Args:
        figures: Of the selected layers, so far.
        of: How many layers the checkpoint has.
        settings: What they are held against.
        judged: The figures that are judged on the text.
    """
    expectations = Expectations(
        Stage(settings.stage), settings.overrides, unreached=settings.allow_unreached, variant=settings.variant
    )
    if any(not (layer.task or layer).rows and not expectations.excuses(layer) for layer in figures):
        return False  # one row would give what has no figures yet, and so nothing uncertain, a verdict
    run, verdicts = RunStats("", "", figures, of), [judge(layer, expectations) for layer in figures]
    if run.complete:
        verdicts.append(judge_averages(run, expectations))
    findings = [finding for verdict in verdicts for finding in verdict.findings]
    return not any(finding.uncertain for finding in findings if finding.threshold.figure in judged)


class _TrueBase(NamedTuple):
    """The base model whose predictions the adapter's are held against.

    Attributes:
        name: What it is, in words.
        load: Gives it, and where it takes its input.
    """

    name: str
    load: Callable[[], tuple["Base", Any]]


def _drift(
    adapted: "AdaptedModel",
    name: str,
    loaded: tuple["Base", Any],
    windows: Mapping[str, Sequence[calibration.Window]],
    progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> Drift:
    from pytest_nullspace.drift import drift

    base, place = loaded
    found = {
        what: drift(adapted.model, base, [window.tokens for window in of], adapted.device, progress, ranks, place)
        for what, of in windows.items()
    }
    return Drift(name, found["text"], found.get("task_text"))


def _base(
    adapted: "AdaptedModel",
    checkpoint: Checkpoint,
    initial: Checkpoint | None,
    base: Path | None,
    settings: Settings,
    device: Any,
    dtype: Any,
) -> _TrueBase:
    """The true base model, found before anything is measured and loaded only after.

    Raises:
        OptionError: It cannot be had, or the model is none whose predictions can be compared.
    """
    if adapted.is_encoder_decoder or not hasattr(adapted.model, "lm_head"):
        raise OptionError(f"{PREFIX}drift: {checkpoint.directory} is no causal language model; leave the option out")
    if initial is not None:
        of_start = None if initial.carries_base else base_of(initial, settings.base)

        def start() -> tuple["Base", Any]:
            loaded = _loaded(initial, settings, device, dtype, of_start)
            return lambda: nullcontext(loaded.model), loaded.device

        return _TrueBase(f"the start {initial.directory}", start)
    if checkpoint.carries_base and base is not None:

        def plain() -> tuple["Base", Any]:
            model, place = _loaded_plain(base, settings, device, dtype)
            return lambda: nullcontext(model), place

        return _TrueBase(f"the base {base}", plain)
    switched_off = adapted.switched_off
    if switched_off is not None:
        return _TrueBase("the model with its adapter switched off", lambda: (switched_off, adapted.device))
    raise OptionError(
        f"{PREFIX}drift: {checkpoint.directory} does not hold its base model, for with the adapter switched off its "
        f"weights are others; give the checkpoint from which training started by {PREFIX}init=DIR"
        + (f", or the base model by {PREFIX}base=DIR" if checkpoint.carries_base else "")
    )


def _text(spec: str, folder: Path, option: str) -> str:
    return calibration.read_text(calibration.parse_source(spec, folder, option))


def _about_text(text: str, windows: Sequence[calibration.Window], seqlen: int) -> dict[str, Any]:
    return {
        "sha256": calibration.text_hash(text),
        "windows": len(windows),
        "seqlen": seqlen,
        "tokens": sum(len(window.tokens) for window in windows),
        "distinct": calibration.distinct_rows(windows),
        "starts": [window.start for window in windows],
    }


def planned(checkpoint: Checkpoint, settings: Settings) -> tuple[RunStats, frozenset[str]]:
    """The run as it will be, as far as that is known before the text is read and the model loaded.

    Returns:
        A run without figures, and the conditions in `pytest_nullspace.baseline.COMPARED` that it already tells.
    """
    seqlen = settings.seqlen
    if seqlen is None and checkpoint.carries_base:
        seqlen = _default_seqlen(checkpoint.config.get("max_position_embeddings"))
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


def base_of(checkpoint: Checkpoint, asked: str | None) -> Path:
    """The base model of ``checkpoint``, a directory or a GGUF file: as the option says, else as its config does.

    Raises:
        CheckpointError: Neither says, it cannot be had, or the config's base is not the one that was trained on.
    """
    if asked is not None:
        return base_path(asked, None, f"{PREFIX}base")
    if checkpoint.changed_base is not None:
        raise CheckpointError(f"{checkpoint.config_file}: {checkpoint.changed_base} by {PREFIX}base=DIR")
    if not checkpoint.base:
        raise CheckpointError(
            f"{checkpoint.config_file}: names no base_model_name_or_path; give it by {PREFIX}base=DIR"
        )
    how = f"{checkpoint.config_file}: base_model_name_or_path"
    return base_path(checkpoint.base, checkpoint.base_revision, how)


def _tokenizer_directory(checkpoint: Checkpoint, base: Path | None) -> Path:
    """The adapter's own tokenizer if one was saved with it, else its base's; a GGUF file holds one itself."""
    places = [checkpoint.directory]
    if base is not None:
        places.append(base.parent if base.is_file() else base)
    held = (place for place in places if any((place / name).is_file() for name in calibration.TOKENIZER_FILES))
    return next(held, base or checkpoint.directory)


def _loaded(
    checkpoint: Checkpoint,
    settings: Settings,
    device: Any,
    dtype: Any,
    base: Path | None,
    bases: MutableMapping[Hashable, Any] | None = None,
) -> "AdaptedModel":
    """The checkpoint's model on ``device``, or spread over several."""
    import torch

    from pytest_nullspace.model import load_model
    from pytest_nullspace.model.spread import spread

    if settings.device_map is None:
        return load_model(checkpoint, device, dtype, base, bases)
    return spread(load_model(checkpoint, torch.device("cpu"), dtype, base), settings.device_map)


def _loaded_plain(base: Path, settings: Settings, device: Any, dtype: Any) -> tuple[Any, Any]:
    """A base model without any adapter, and where it takes its input."""
    import torch

    from pytest_nullspace.model import load_plain
    from pytest_nullspace.model.spread import spread_plain

    if settings.device_map is None:
        return load_plain(base, device, dtype), device
    model = load_plain(base, torch.device("cpu"), dtype)
    return model, spread_plain(model, settings.device_map)


def _device(settings: Settings) -> Any:
    import torch

    name, ranks = settings.device, settings.ranks
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator is not None and accelerator.type in ("cuda", "xpu") else "cpu"
    cards = 0 if name == "cpu" else torch.accelerator.device_count()  # an Apple GPU takes no sums in float64
    for card in settings.device_map or ():
        if card != "cpu" and card not in range(cards):
            raise OptionError(f"{PREFIX}device-map: torch sees no card {card} on this machine; leave it out")
    if settings.device_map and set(settings.device_map) == {"cpu"}:
        name = "cpu"
    if ranks.size > 1 and name in ("cuda", "xpu"):
        name = f"{name}:{ranks.local}"
    device = torch.device(name)
    if device.type != "cpu":
        module = getattr(torch, device.type)
        if not module.is_available() or (device.index or 0) >= module.device_count():
            raise OptionError(f"{PREFIX}device: torch sees no {name} on this machine; choose cpu or leave it at auto")
    return device


def _batch_size(seqlen: int, device: Any) -> int:
    """Windows a forward that suit ``device``; how many fit is found out by trying."""
    return max(1, (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS) // seqlen)


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
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise TextError(
            f"config.json: max_position_embeddings must be a whole number from 1, not {printable(limit)}; mend it"
        )
    if asked is None:
        return _default_seqlen(limit)
    if limit is not None and asked > limit:
        raise TextError(f"{PREFIX}seqlen: {asked} tokens are more than the {limit} that the model takes; lower it")
    return asked


def _default_seqlen(limit: Any) -> int:
    return min(DEFAULT_SEQLEN, limit) if isinstance(limit, int) and limit else DEFAULT_SEQLEN


def _require_known_tokens(windows: Sequence[calibration.Window], model: Any, checkpoint: Checkpoint) -> None:
    largest = max(max(window.tokens) for window in windows)
    known = getattr(model.config, "vocab_size", None)
    if isinstance(known, int) and largest >= known:
        raise CheckpointError(
            f"{checkpoint.directory}: its tokenizer gives the token {largest}, but the model knows only {known}; save "
            "the base model's tokenizer into the directory"
        )


@contextmanager
def _memory_told(message: Callable[[], str]) -> Iterator[None]:
    """Say what ``message`` then gives where memory was refused, whatever a library made of that."""
    try:
        yield
    except Exception as error:
        if _is_out_of_memory(error):
            raise MeasurementError(message()) from None
        raise


_NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "Cannot allocate memory", "not enough memory")


def _is_out_of_memory(error: BaseException | None) -> bool:
    if error is None:
        return False
    refused = isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _NO_MEMORY)
    return refused or isinstance(error, MemoryError) or _is_out_of_memory(error.__cause__ or error.__context__)


def _hashes(checkpoint: Checkpoint) -> dict[str, str]:
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
