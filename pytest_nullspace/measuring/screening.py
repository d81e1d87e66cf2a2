"""Several adapters of one base and settings in, a screened run of each out: texts, base and adapters read once.

They may share a pass over the base because none of them runs. So each must leave the base as it is, and read what the
others read.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.arrays import require_finite
from pytest_nullspace.checkpoint.header import printable, require_unchanged
from pytest_nullspace.checkpoint.hub import base_of
from pytest_nullspace.errors import CheckpointError, OptionError
from pytest_nullspace.judging.screening import CURE, KEY, STATEMENT, ScreenedLayer, Screening
from pytest_nullspace.measuring import about
from pytest_nullspace.measuring.about import Clock
from pytest_nullspace.measuring.batching import suiting
from pytest_nullspace.measuring.hashing import hashes
from pytest_nullspace.measuring.inputs import Texts, sources
from pytest_nullspace.measuring.limits import require_known_tokens, window_length
from pytest_nullspace.measuring.loading import (
    Bases,
    device_name,
    device_of,
    dtype_of,
    half_precision,
    imported,
    load,
    one_of,
    shortage_told,
)
from pytest_nullspace.measuring.memory import free_earlier_models, keep_freed_memory
from pytest_nullspace.measuring.reading import Reading
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.run.texts import FIRST, name_of
from pytest_nullspace.settings import PREFIX, Settings
from pytest_nullspace.text.sources import SELF, SelfText
from pytest_nullspace.text.tokenizer import tokenizer_hashes
from pytest_nullspace.text.windows import Window, counted_places

if TYPE_CHECKING:
    from pytest_nullspace.model import AdaptedLayer, AdaptedModel

OPTION = f"{PREFIX}screen"

Asked = Sequence[tuple[Checkpoint, Collection[str]]]
"""The adapters, each with the names of its layers that are to be screened."""


def require_plain(checkpoint: Checkpoint) -> None:
    """Refuse, by its header, an adapter that is more than A B beside an untouched base.

    Raises:
        OptionError: It is.
    """
    if (why := _more_than_a_b(checkpoint)) is not None:
        raise OptionError(f"{OPTION}: {checkpoint.directory} {why}; gate it without {OPTION}")


def require_sharing(checkpoints: Sequence[Checkpoint], settings: Settings) -> None:
    """Refuse adapters of several bases, and what the base would first have to write.

    Raises:
        OptionError: It is so.
        NullspaceError: A base or a text is not there.
    """
    written = next((source for source in sources(settings).values() if isinstance(source, SelfText)), None)
    if written is not None:
        raise OptionError(
            f"{OPTION}: reads texts that are there, and {SELF} is first to be written; a run without {OPTION} keeps it "
            "in a file, and names that"
        )
    first = checkpoints[0]
    base = base_of(first, settings.base).resolve()
    for other in checkpoints[1:]:
        if (its := base_of(other, settings.base).resolve()) != base:
            raise OptionError(
                f"{OPTION}: takes adapters of one base, and {first.directory} names {base}, {other.directory} {its}; "
                f"screen them apart, or give the base of all by {PREFIX}base=DIR"
            )


def _more_than_a_b(checkpoint: Checkpoint) -> str | None:
    """Why an adapter cannot share its base's activations, or None."""
    if checkpoint.is_whole:
        return "is a whole model, and no adapter beside a base"
    if checkpoint.carries_base:
        return f"holds a base of its own (it is a {checkpoint.format} directory), so that it shares none"
    if checkpoint.changed_base is not None:
        return "was put on a base that its initialisation changed, which no other adapter has"
    if checkpoint.outside:
        of = f"{len(checkpoint.outside)} tensors, such as {printable(checkpoint.outside[0])}"
        return f"is more than A and B of linear layers, which is all that is screened: it trained {of}"
    return None


def screen_checkpoints(
    asked: Asked, settings: Settings, progress: Callable[[int, int], None] | None = None, texts: Texts | None = None
) -> list[RunStats]:
    """Run the preserved texts through the base once, for all adapters.

    Args:
        asked: The adapters, which `require_sharing` took.
        settings: On which text, and how.
        progress: Told how many windows of how many are done.
        texts: The texts, where they were read before.

    Returns:
        A run of each, which tells of its screen and holds no measured layer.

    Raises:
        NullspaceError: Any of it is not possible.
    """
    free_earlier_models()
    keep_freed_memory()
    settings = replace(settings, task_dataset=None)
    clock, first = Clock(), asked[0][0]
    read = Reading.of(first, settings, None, _preserved(texts), None)
    if read.images:
        raise OptionError(f"{OPTION}: reads text alone, and {settings.calib_dataset} holds images; gate without it")
    clock.on("text")
    with imported(first):
        clock.on("imports")
        device = device_of(settings)
        dtype: Any = dtype_of(settings.dtype, first, device, read.base)
        precision = str(dtype).removeprefix("torch.")
        running = f"{precision} on {device}"
        with shortage_told(lambda: _short(first, f"to load the base in {running}", half_precision(running, "take"))):
            base = _base(asked, settings, read, device, dtype)
        clock.on("model")
        seqlen = window_length(settings.seqlen, base.model.model)
        read = read.with_chats(settings, seqlen)
        drawn = read.windows(settings, seqlen)
        require_known_tokens(drawn.values(), base.model.model, first)
        _require_read_alike(asked, drawn, read, settings, seqlen)
        clock.on("windows")
        load_seconds = sum(clock.seconds.values())
        lower = f"lower {PREFIX}seqlen or {PREFIX}batch-size"
        with shortage_told(
            lambda: _short(first, f"in the screen, in {running}", (lower, *half_precision(running, "take")))
        ):
            found = _screened(base, drawn, settings, first, progress)
        clock.on("pass")
    require_unchanged(read.stamps.union(*(checkpoint.stamps for checkpoint, _ in asked)))
    told = {
        **about.of_texts(read.texts, drawn, seqlen, {}, None, settings.preserved, read.chats),
        "tokenizer": read.tokenizer.told(read.texts, drawn, seqlen),
        "settings": about.of_settings(settings),
        "device": str(device),
        "dtype": precision,
        "libraries": about.of_libraries(*about.libraries(first)),
        "measured": about.of_machine(device_name(device), [_batch_size(settings, device, seqlen)], load_seconds, clock),
    }
    return [_run(checkpoint, settings, base, owner, found, told) for owner, (checkpoint, _) in enumerate(asked)]


def _preserved(texts: Texts | None) -> Texts | None:
    """Those of ``texts`` that must survive: no task is looked at."""
    return None if texts is None else {what: text for what, text in texts.items() if what != "task_text"}


def _short(checkpoint: Checkpoint, what: str, cures: Sequence[str]) -> str:
    return f"{checkpoint.directory}: too little memory {what}; {one_of(*cures, 'take a machine with more')}"


class _Base(NamedTuple):
    """The plain base, and what each adapter would put on it.

    Attributes:
        model: The base, with the layers of all adapters.
        adapters: Each adapter's layers.
        remarks: What was done to fit each adapter and the base.
    """

    model: "AdaptedModel"
    adapters: "Sequence[Mapping[str, AdaptedLayer]]"
    remarks: Sequence[Sequence[str]]


def _base(asked: Asked, settings: Settings, read: Reading, device: Any, dtype: Any) -> _Base:
    """Put each adapter on the base, tensor by tensor as for a gate, and take it off again.

    Raises:
        CheckpointError: One does not fit, or would leave another base behind than it found.
    """
    from pytest_nullspace.measuring.finite import require_numbers
    from pytest_nullspace.measuring.forward import require_tokens_read
    from pytest_nullspace.measuring.screen import on_base

    bases: Bases = {}
    held, remarks, model = list[Mapping[str, "AdaptedLayer"]](), list[Sequence[str]](), None
    for checkpoint, layers in asked:
        adapted = load(checkpoint, settings, device, dtype, read.base, bases)
        require_finite(checkpoint.beside(adapted.layers))
        if not held:
            require_numbers(adapted, checkpoint, read.base)
            require_tokens_read(adapted, checkpoint)
        odd = next((name for name, layer in adapted.layers.items() if _is_more(layer)), None)
        model = model or adapted.model
        if adapted.switched_off is None or odd is not None or adapted.model is not model:
            what = f"its layer {odd} is more than A B" if odd else "its base would be another one"
            raise CheckpointError(f"{checkpoint.directory}: {what}, so it cannot share a screen; gate it by itself")
        held.append(on_base(adapted, layers))
        remarks.append(adapted.remarks)
        adapted.take_off()
        if not bases:
            raise CheckpointError(
                f"{checkpoint.directory}: does not leave the base as it was, so it cannot share a screen; gate it by "
                "itself"
            )
    layers_of_all = {name: layer for of in reversed(held) for name, layer in of.items()}
    return _Base(replace(adapted, layers=layers_of_all, switched_off=None), held, remarks)


def _is_more(layer: "AdaptedLayer") -> bool:
    return layer.update is not None or layer.start is not None or getattr(layer.up, "bias", None) is not None


def _require_read_alike(
    asked: Asked, drawn: Mapping[str, Sequence[Window]], read: Reading, settings: Settings, seqlen: int
) -> None:
    """Refuse an adapter whose tokenizer or chat template makes other windows of the texts: it reads something else.

    Raises:
        OptionError: There is one.
    """
    first, held = asked[0][0], tokenizer_hashes(read.tokenizer.used)

    def rows(windows: Sequence[Window]) -> list[tuple[object, ...]]:
        return [(window.tokens, window.counted) for window in windows]

    for checkpoint, _ in asked[1:]:
        its = Reading.of(checkpoint, settings, None, {**read.texts, **read.unrendered}, None)
        # Of conversations the template decides as well, which is none of the tokenizer's own files.
        is_one = not read.chats and tokenizer_hashes(its.tokenizer.used) == held
        if its.tokenizer.used == read.tokenizer.used or is_one:
            continue
        windows = its.with_chats(settings, seqlen).windows(settings, seqlen)
        if any(rows(windows[what]) != rows(of) for what, of in drawn.items()):
            what = "tokenizer, with its chat template," if read.chats else "tokenizer"
            raise OptionError(
                f"{OPTION}: the {what} of {checkpoint.directory} makes other tokens of the text than that of "
                f"{first.directory}, so they read different things; screen them apart"
            )


def _batch_size(settings: Settings, device: Any, seqlen: int) -> int:
    return settings.batch_size or suiting(device, seqlen, 0)


def _screened(
    base: _Base,
    drawn: Mapping[str, Sequence[Window]],
    settings: Settings,
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] | None,
) -> dict[str, list[dict[str, Any]]]:
    """What `screen.screen` gives on each text, by its name."""
    from pytest_nullspace.measuring.forward import model_told
    from pytest_nullspace.measuring.screen import places, screen

    held, total, before, found = places(base.adapters), sum(map(len, drawn.values())), 0, {}
    for what, windows in drawn.items():

        def tell(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        tell(0)
        tokens = [window.tokens for window in windows]
        with model_told(base.model, checkpoint, tokens[0]):
            found[settings.text_name if what == FIRST else name_of(what)] = screen(
                base.model,
                held,
                tokens,
                batch_size=_batch_size(settings, base.model.device, len(tokens[0])),
                max_rows=settings.max_activation_samples,
                seed=settings.seed,
                counted=counted_places(windows),
                progress=tell,
            )
        before += len(windows)
    return found


def _run(
    checkpoint: Checkpoint,
    settings: Settings,
    base: _Base,
    owner: int,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    told: Mapping[str, Any],
) -> RunStats:
    """The run of one adapter."""
    return RunStats(
        model_path=str(checkpoint.directory),
        calib_dataset=settings.calib_dataset,
        layers=(),
        checkpoint_layers=len(checkpoint.layers),
        about={
            **about.of_checkpoint(checkpoint, hashes(checkpoint)),
            **about.of_model(type(base.model.model).__name__, base.model.kind, base.remarks[owner], ""),
            "statement": f"{STATEMENT}: {CURE}",
            KEY: _entries(checkpoint, found, owner).to_dict(),
            **told,
        },
    )


def _entries(checkpoint: Checkpoint, found: Mapping[str, Sequence[Mapping[str, Any]]], owner: int) -> Screening:
    """What was screened of one adapter, in the order of its layers."""

    def entries() -> Iterator[ScreenedLayer]:
        for spec in checkpoint.layers:
            for text, of in found.items():
                if (told := of[owner].get(spec.name)) is not None:
                    means = told.means
                    yield ScreenedLayer(
                        name=spec.name,
                        text=text,
                        rows=means.rows,
                        in_features=spec.in_features,
                        rank=spec.rank,
                        down_rank=told.down_rank,
                        input_norm=means.input,
                        down_norm=means.down,
                        update_norm=means.update,
                        base_norm=means.base,
                        mean_leakage=means.leakage,
                        down_weight_norm=told.down_weight_norm,
                        unplaced=told.unplaced,
                    )

    return Screening(tuple(entries()), len(checkpoint.layers))
