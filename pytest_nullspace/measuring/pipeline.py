"""A checkpoint and settings in, a run out: the text read, the model loaded, the layers measured and audited.

The parts that hold tensors are reached from here and from `loading` alone, and only inside functions.
"""

import hashlib
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import require_unchanged
from pytest_nullspace.checkpoint.raw import Early
from pytest_nullspace.errors import OptionError, TextError
from pytest_nullspace.measuring import about
from pytest_nullspace.measuring.about import Clock
from pytest_nullspace.measuring.digests import base_sha256, program_sha256, times_of
from pytest_nullspace.measuring.fitting import first_read, load_fitting
from pytest_nullspace.measuring.hashing import Hashing, hashed_meanwhile
from pytest_nullspace.measuring.inmemory import InMemory
from pytest_nullspace.measuring.inputs import (
    NOT_AT_HAND,
    Texts,
    sources,
)
from pytest_nullspace.measuring.left import Sampled, left
from pytest_nullspace.measuring.limits import (
    require_known_to_base,
    require_known_tokens,
    window_length,
)
from pytest_nullspace.measuring.loading import (
    Bases,
    base_at_hand,
    device_name,
    device_of,
    dtype_of,
    half_precision,
    imported,
    one_of,
    shortage_told,
    true_base,
)
from pytest_nullspace.measuring.measurement import HeldAgainst, Measurement
from pytest_nullspace.measuring.memory import free_earlier_models, keep_freed_memory
from pytest_nullspace.measuring.reading import Reading
from pytest_nullspace.measuring.written import Request, Written, had, require_base
from pytest_nullspace.run.predictions import Headroom
from pytest_nullspace.run.stats import WITHOUT_DRIFT, LayerStats, RunStats
from pytest_nullspace.run.texts import FIRST
from pytest_nullspace.settings import PREFIX, STREAM, Settings
from pytest_nullspace.text.sources import OPTION, SELF, SelfText
from pytest_nullspace.text.tokenizer import tokenizer_hashes
from pytest_nullspace.text.windows import Window

if TYPE_CHECKING:
    from pytest_nullspace.model import AdaptedModel, UnfitError


def measure_checkpoint(
    checkpoint: Checkpoint,
    settings: Settings,
    layers: Collection[str],
    progress: Callable[[int, int], None] | None = None,
    bases: Bases | None = None,
    initial: Checkpoint | None = None,
    texts: Texts | None = None,
    live: InMemory | None = None,
) -> RunStats:
    """Read the text, load the model, and measure ``layers`` in one pass.

    Args:
        checkpoint: What to measure.
        settings: On which text, and how.
        layers: The names of its layers to measure.
        progress: Told how many windows of how many are done.
        bases: Keeps the base model of an adapter for the next adapter of the same base.
        initial: The checkpoint from which training started, if it is known.
        texts: The texts, where they were read before.
        live: The checkpoint's model, where it is in memory.

    Raises:
        NullspaceError: Any of it is not possible.
    """
    if live is None:  # else the process is somebody else's, amid training
        free_earlier_models()
        keep_freed_memory()
    clock = Clock()
    read = Reading.of(checkpoint, settings, initial, texts, live)
    clock.on("text")

    with (
        hashed_meanwhile(checkpoint, read.base, at_once=settings.device_map != STREAM) as hashed,
        first_read(checkpoint, settings, read.base, initial, is_live=live is not None) as early,
        imported(checkpoint),  # only now torch, for what is wrong with the text need not wait for it
    ):
        clock.on("imports")
        load = partial(_loaded, checkpoint, settings, read, bases, initial, live, hashed, early)
        loaded = load()
        clock.on("model")
        seqlen = window_length(settings.seqlen, loaded.adapted.model)
        read = _with_written(read, checkpoint, settings, loaded, seqlen).with_chats(settings, seqlen)
        drawn = read.windows(settings, seqlen)
        _require_known(read, drawn, loaded, checkpoint)
        clock.on("windows")
        load_seconds = sum(clock.seconds.values())
        first = loaded.measurement(checkpoint, settings, drawn, seqlen, progress)
        with _keeping(first, read, layers) as (run, kept):
            run, passed = _measured(run, load, layers, clock)
            told = about.of_checkpoint(checkpoint, *hashed()) | left(checkpoint, settings, layers, initial, passed.rows)
    from pytest_nullspace.model.spread import places

    adapted = run.adapted
    clock.on("hashes")
    require_unchanged(read.stamps)
    return RunStats(
        model_path=str(checkpoint.directory),
        calib_dataset=settings.calib_dataset,
        layers=passed.figures,
        checkpoint_layers=len(checkpoint.layers),
        drift=read.with_passages(run, passed.headroom),
        about={
            **(told | passed.told),
            **about.of_model(type(adapted.model).__name__, adapted.kind, (*adapted.remarks, *kept), adapted.since),
            **({WITHOUT_DRIFT: NOT_AT_HAND} if settings.drift is None and run.drift is None else {}),
            **({"task_dataset": settings.task_dataset} if settings.task_dataset is not None else {}),
            **read.told(run),
            "settings": about.of_settings(settings),
            "device": places(adapted),
            "dtype": loaded.precision,
            "libraries": about.of_libraries(*about.libraries(checkpoint)),
            "measured": about.of_machine(device_name(adapted.device), passed.batches, load_seconds, clock),
        },
    )


def _require_known(
    read: Reading, drawn: Mapping[str, Sequence[Window]], loaded: "_Loaded", checkpoint: Checkpoint
) -> None:
    """Refuse tokens that the model, or the base it is held against, does not know, and images that it cannot read."""
    require_known_tokens(drawn.values(), loaded.adapted.model, checkpoint)
    if loaded.held_against is not None:
        with loaded.held_against.base() as plain:
            require_known_to_base(drawn.values(), plain, checkpoint)
    if read.processor is not None:
        from pytest_nullspace.measuring.forward import require_images_read

        for what in read.images:
            windows = [window.tokens for window in drawn[what]]
            require_images_read(loaded.adapted, checkpoint, read.processor.sees, windows)


@contextmanager
def _keeping(run: Measurement, read: Reading, layers: Collection[str]) -> Iterator[tuple[Measurement, Sequence[str]]]:
    """Within this context a measurement whose model is streamed keeps what it has so far; with what is told of that."""
    if run.adapted.shelf is None:
        yield run, ()
        return
    import torch

    from pytest_nullspace.measuring.halfway import keeping

    checkpoint, settings, base = run.checkpoint, run.settings, read.base
    folders = [folder for folder in (checkpoint.directory, base) if folder is not None and folder.is_dir()]
    files = {file for file, _ in read.stamps}.union(*(folder.iterdir() for folder in folders))
    machine = platform.platform(), device_name(run.adapted.device), torch.backends.cpu.get_cpu_capability()
    libraries = about.of_libraries(*about.libraries(checkpoint))
    held = sorted((str(file), *times_of(file.stat())) for file in files if file.is_file())
    of = {
        "files": (held, repr(checkpoint.config), checkpoint.layers),  # the config as it was read, be it another since
        "texts": [(what, repr(windows)) for what, windows in run.drawn.items()],
        "options": (repr(settings), sorted(layers), run.seqlen, run.running),
        "versions": (program_sha256(), libraries, machine, torch.get_num_threads()),
    }
    require_unchanged(read.stamps)  # so what is told of them is of those whose headers were read
    digests = {name: hashlib.sha256(repr(told).encode()).hexdigest() for name, told in of.items()}
    with keeping(checkpoint.directory, settings.ranks.rank, digests) as halfway:
        yield replace(run, halfway=halfway), halfway.told


class _Passed(NamedTuple):
    """What the model gave: figures, batch sizes, what more of the update would gain, what is told, and some rows."""

    figures: tuple[LayerStats, ...]
    batches: list[int]
    headroom: Headroom | None
    told: dict[str, Any]
    rows: Sampled


def _measured(
    run: Measurement, again: Callable[["UnfitError"], "_Loaded"], layers: Collection[str], clock: Clock
) -> tuple[Measurement, _Passed]:
    """The measurement, and what it gave; of the model loaded ``again`` where only running it could tell it is unfit."""
    from pytest_nullspace.measuring.forward import model_told
    from pytest_nullspace.model import UnfitError

    first = run.drawn[FIRST][0].tokens
    try:
        with model_told(run.adapted, run.checkpoint, first):
            return run, _passed(run, layers, clock)
    except UnfitError as error:
        why = error
    run.adapted.take_off()
    run = again(why).measurement(run.checkpoint, run.settings, run.drawn, run.seqlen, run.progress)
    with model_told(run.adapted, run.checkpoint, first):
        return run, _passed(run, layers, clock)


def _passed(run: Measurement, layers: Collection[str], clock: Clock) -> _Passed:
    """All that the model is there for, and off it goes."""
    figures, batches = run.figures(layers)
    if run.settings.spectrum:
        figures = run.with_spectrum(figures)
    clock.on("pass", drift=run.drift_seconds)
    headroom = run.headroom()
    if headroom is not None:
        clock.on("headroom")
    suggested, unbegun = run.suggestion(figures), run.unbegun()
    rows = run.rows(layers) if run.settings.merge else {}
    run.adapted.take_off()
    clock.on("suggestion" if suggested else "checks")
    return _Passed(figures, batches, headroom, suggested | unbegun, rows)


class _Loaded(NamedTuple):
    """The model, and how it runs.

    Attributes:
        adapted: The model.
        held_against: The true base beside it, where its predictions are asked for.
        precision: In which numbers it runs.
        running: Precision and device, in words.
    """

    adapted: "AdaptedModel"
    held_against: HeldAgainst | None
    precision: str
    running: str

    def measurement(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        drawn: Mapping[str, Sequence[Window]],
        seqlen: int,
        progress: Callable[[int, int], None] | None,
    ) -> Measurement:
        """Its measurement on these windows, without predictions where a text has none, as in windows of one token.

        Raises:
            TextError: They are asked for.
        """
        against = self.held_against
        for what, windows in drawn.items():
            if against is not None and not any(window.predicted for window in windows):
                if settings.drift:
                    raise TextError(
                        f"{sources(settings)[what]}: none of its windows holds a token that is predicted, which takes "
                        f"one before it; give a larger {PREFIX}seqlen, or leave {PREFIX}drift out"
                    )
                against = None
        return Measurement(checkpoint, settings, self.adapted, drawn, seqlen, self.running, progress, against)


def _loaded(
    checkpoint: Checkpoint,
    settings: Settings,
    read: Reading,
    bases: Bases | None,
    initial: Checkpoint | None,
    live: InMemory | None,
    hashed: Hashing,
    early: Early,
    unfit: "UnfitError | None" = None,
) -> _Loaded:
    """Load the model unless it is there, and what its predictions are held against.

    Where it was tried to stream it, ``unfit`` says why it could not be.
    """
    from pytest_nullspace.measuring.finite import require_numbers
    from pytest_nullspace.measuring.forward import require_tokens_read
    from pytest_nullspace.measuring.moved import with_base, with_start

    base = read.base
    device = device_of(settings) if live is None else live.adapted.device
    dtype: Any = dtype_of(settings.dtype, checkpoint, device, base) if live is None else live.adapted.model.dtype
    precision = str(dtype).removeprefix("torch.")
    running = f"{precision} on {device}"
    with shortage_told(
        lambda: (
            f"{checkpoint.directory}: too little memory to load the model in {running}; "
            + one_of(*half_precision(running, "lower it by"), "take a machine with more")
        )
    ):
        adapted = (
            load_fitting(checkpoint, settings, device, dtype, base, bases, initial, early, unfit)
            if live is None
            else live.adapted
        )
    require_numbers(adapted, checkpoint, base)
    if adapted.shelf is not None:
        adapted.shelf.files.read_by = hashed.follow(adapted.shelf.pieces())
        adapted.shelf.ahead(0)  # while all else is made ready
    else:
        hashed.begin()
    if read.has_text(settings):
        require_tokens_read(adapted, checkpoint)
    if settings.profile != "reference":  # whose formulas know of no start
        if initial is not None:
            adapted = with_start(adapted, checkpoint, initial)
        elif checkpoint.carries_base and base is not None:
            adapted = with_base(adapted, checkpoint, base)
    found = None
    if settings.drift:
        found = true_base(adapted, checkpoint, initial, base, settings, adapted.device, dtype)
    elif settings.drift is None:
        found = base_at_hand(adapted)
    if found is None:
        return _Loaded(adapted, None, precision, running)
    return _Loaded(adapted, HeldAgainst.of(checkpoint, found, running), precision, running)


def _with_written(read: Reading, checkpoint: Checkpoint, settings: Settings, loaded: _Loaded, seqlen: int) -> Reading:
    """The same with what the base writes itself, where that is asked for.

    Raises:
        NullspaceError: The base cannot be had, or writes too little.
    """
    asked = [what for what, source in sources(settings).items() if isinstance(source, SelfText)]
    if not asked:
        return read
    text = _written(read, checkpoint, settings, loaded, seqlen)
    texts = {what: text.text if what in asked else read.texts[what] for what in sources(settings)}
    return replace(read, texts=texts, written=dict.fromkeys(asked, text))


def _written(read: Reading, checkpoint: Checkpoint, settings: Settings, loaded: _Loaded, seqlen: int) -> Written:
    """What the base writes itself, as it is kept or now."""
    from pytest_nullspace.measuring.writing import first_token, stretches

    adapted = loaded.adapted
    require_base(adapted, checkpoint)
    if read.base is None and not checkpoint.carries_base:  # by whose files the text is known again
        raise OptionError(f"{OPTION}={SELF}: the base model in memory names no directory of its own; give it as base=")
    switched_off = adapted.switched_off
    assert switched_off is not None
    request = Request(
        base_sha256(checkpoint, read.base),
        tokenizer_hashes(read.tokenizer.used),
        settings.most_windows,
        seqlen,
        settings.seed,
        loaded.precision,
        adapted.device.type,
    )

    def write() -> Sequence[str]:
        with switched_off() as base:
            return stretches(
                base,
                read.tokenize.decode,
                adapted.device,
                count=request.windows,
                seqlen=seqlen,
                seed=settings.seed,
            )

    with shortage_told(
        lambda: (
            f"{checkpoint.directory}: too little memory to have the base write texts of {seqlen} tokens in "
            f"{loaded.running}; " + one_of(f"lower {PREFIX}seqlen", *half_precision(loaded.running, "take"))
        )
    ):
        return had(request, write, first_token(adapted.model))
