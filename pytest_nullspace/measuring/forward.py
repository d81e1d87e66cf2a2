"""Running a model on tokens, no further than the layers that are watched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.errors import CheckpointError, NullspaceError, first_line
from pytest_nullspace.measuring.rows import Batch
from pytest_nullspace.model import AdaptedLayer, AdaptedModel
from pytest_nullspace.model.layers import is_encoder_decoder
from pytest_nullspace.text.windows import Shown

_OTHER_INPUTS = ("pixel_values", "input_features", "input_values", "audio_values")
"""What a model that sees or hears reads beside token ids, or in place of them."""
PROBE_TOKENS = 8
"""Tokens of the uncounted forward that finds out where a forward may end."""


@contextmanager
def forwards(
    adapted: AdaptedModel, layers: Sequence[AdaptedLayer], windows: Sequence[Sequence[int]], *, whole: bool = False
) -> Iterator[Callable[[Batch], Any]]:
    """Within this context what is given runs the model on a batch until all ``layers`` have run.

    It is always the whole model that is called, for a head's forward can shape what its decoder computes: Longformer's
    puts global attention on the first token. What is left out is what would come after, by ending the forward there.

    Args:
        adapted: The model.
        layers: The layers that have to run.
        windows: Those of the text, of which a few tokens are run to find out where the others may end.
        whole: Whether a forward goes to its end, and gives the model's output.
    """

    def forward(batch: Batch) -> Any:
        with suppress(_PassedLastError):
            return run(adapted.model, batch.tokens, batch.beside)

    with ExitStack() as ends:
        ends.enter_context(adapted.without_grad())
        if not whole:
            decoder = _decoder(adapted.model, layers)
            ends.enter_context(_stopping_after(decoder))
            ends.enter_context(_stopping_after(_last_block(decoder, layers, adapted, telling(windows))))
        yield forward


def require_tokens_read(adapted: AdaptedModel, checkpoint: Checkpoint) -> None:
    """Refuse a model that does not run on token ids alone, be it that it reads none or that it wants more than them.

    Raises:
        CheckpointError: It is one.
    """
    taken, main = signature(adapted.model.forward).parameters, getattr(adapted.model, "main_input_name", "input_ids")
    others = [name for name in taken if name.startswith(_OTHER_INPUTS)]
    if main == "input_ids" and not others:
        return
    reads = f"reads {printable(others[0] if main == 'input_ids' else main)} and "
    if "input_ids" not in taken:
        raise CheckpointError(_not_on_text(adapted, checkpoint, reads))
    try:
        with adapted.without_grad():
            run(adapted.model, torch.zeros(1, 2, dtype=torch.long, device=adapted.device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each model complains in its own way that an input is missing
        why = error if main == "input_ids" else None
        raise CheckpointError(_not_on_text(adapted, checkpoint, reads, why)) from error


def requires_more(model: nn.Module) -> bool:
    """Whether a model cannot be called without what it sees or hears, as BLIP-2."""
    taken = signature(model.forward).parameters.values()
    return any(of.default is of.empty and of.name.startswith(_OTHER_INPUTS) for of in taken)


@contextmanager
def model_told(adapted: AdaptedModel, checkpoint: Checkpoint, tokens: Sequence[int]) -> Iterator[None]:
    """Within this context say in one sentence what the model complains of, if it does not run on ``tokens`` by itself.

    Raises:
        CheckpointError: Something was raised, and the model alone raises as well.
    """
    try:
        yield
    except (NullspaceError, torch.OutOfMemoryError):
        raise
    except Exception:
        try:
            with adapted.without_grad():
                batch = Batch.of([tokens], adapted.device)
                run(adapted.model, batch.tokens, batch.beside)
        except Exception as error:
            raise CheckpointError(_not_on_text(adapted, checkpoint, "", error)) from error
        raise


def _not_on_text(adapted: AdaptedModel, checkpoint: Checkpoint, reads: str, error: Exception | None = None) -> str:
    why = "" if error is None else f" ({type(error).__name__}: {printable(error, 200)})"
    return (
        f"{checkpoint.directory}: its base model, a {type(adapted.model).__name__}, {reads}does not run on token ids "
        f"alone{why}; what it is adapted to cannot be measured on text"
    )


def require_images_read(
    adapted: AdaptedModel, checkpoint: Checkpoint, sees: str, windows: Sequence[Sequence[int]]
) -> None:
    """Refuse images for a model that takes none, others than its processor makes, or such that it passes over.

    Args:
        adapted: The model.
        checkpoint: Of which it is.
        sees: The input that holds an image.
        windows: Those of the text.

    Raises:
        CheckpointError: It is so.
    """
    kind = type(adapted.model).__name__
    if sees not in signature(adapted.model.forward).parameters:
        raise CheckpointError(
            f"{checkpoint.directory}: its base model is run as a {kind}, which takes no images; give text alone, of a "
            "table by the name of its column as in FILE:text"
        )
    batch = Batch.of([telling(windows)], adapted.device)
    try:
        with adapted.without_grad():
            run(adapted.model, batch.tokens, batch.beside)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each model complains in its own way of what does not fit it
        raise CheckpointError(
            f"{checkpoint.directory}: its base model, a {kind}, cannot read what the processor makes of images: "
            f"{first_line(error)}; put the processor of the base model there, or give text alone"
        ) from error
    # Others than BLIP-2 complain by themselves where fewer tokens stand for images than they make of them.
    if (each := getattr(adapted.model.config, "num_query_tokens", None)) is None:
        return
    for shown in (window for window in windows if isinstance(window, Shown)):
        wanted = each * sum(shape[0] for name, _, shape in shown.form if name == sees)
        if (stand := sum(token in shown.unscored for token in shown)) != wanted:
            raise CheckpointError(
                f"{checkpoint.directory}: {shown.where}: {stand} tokens stand for images of which a {kind} makes "
                f"{wanted}, and it would pass over the others; give rows of one image, and the processor of the base "
                "model"
            )


class _PassedLastError(Exception):
    """Raised inside the model to end a forward after the last module that holds a measured layer."""


def _decoder(model: nn.Module, layers: Sequence[AdaptedLayer]) -> nn.Module:
    """The model without its head, which calls it once, where no measured layer lies outside it; else the whole."""
    decoder = getattr(model, "base_model", model)
    inside = set(map(id, decoder.modules()))
    return decoder if all(id(layer.layer) in inside for layer in layers) else model


def telling(windows: Sequence[Sequence[int]]) -> Sequence[int]:
    """A window that reaches what the others do: the first that holds an image, or else the first."""
    shown = (window for window in windows if isinstance(window, Shown) and not window.unscored.isdisjoint(window))
    return next(shown, windows[0])


def run(model: nn.Module, tokens: Tensor, beside: Mapping[str, Tensor] = MappingProxyType({})) -> Any:
    """What the model makes of ``tokens (b, length)``; an encoder-decoder reads them on both sides.

    What is ``beside`` them goes where they are, numbers in the model's precision.
    """
    given = {"input_ids": tokens, "use_cache": False}
    for name, value in beside.items():
        dtype = next(model.parameters()).dtype if value.is_floating_point() else value.dtype
        given[name] = value.to(tokens.device, dtype)
    if is_encoder_decoder(model):
        given["decoder_input_ids"] = tokens
    taken = signature(model.forward).parameters
    if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken.values()):
        given = {name: value for name, value in given.items() if name in taken}
    return model(**given)


def _last_block(
    decoder: nn.Module, layers: Sequence[AdaptedLayer], adapted: AdaptedModel, window: Sequence[int]
) -> nn.Module | None:
    """The block after which no measured layer can run, found by watching a short forward; None where there is none.

    A block is an element of an outermost `torch.nn.ModuleList`. The forward may end after one only if each measured
    layer lies in a block and each such block runs exactly once. Where every block holds one, nothing is to be gained.
    """
    blocks = _blocks(decoder)
    holding = {id(block): block for layer in layers if (block := blocks.get(id(layer.layer))) is not None}
    if not all(id(layer.layer) in blocks for layer in layers) or holding.keys() == set(map(id, blocks.values())):
        return None
    ran: list[nn.Module] = []
    with ExitStack() as hooks:
        for block in holding.values():
            hooks.callback(block.register_forward_hook(lambda module, *_: ran.append(module)).remove)
        with suppress(_PassedLastError):
            batch = Batch.of([window if isinstance(window, Shown) else window[:PROBE_TOKENS]], adapted.device)
            run(adapted.model, batch.tokens, batch.beside)
    return ran[-1] if len(ran) == len(holding) == len(set(map(id, ran))) else None


def _blocks(decoder: nn.Module) -> dict[int, nn.Module]:
    """For each module inside a block, by its id, that block."""
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in found:
            for block in module:
                for part in block.modules():
                    found.setdefault(id(part), block)
    return found


@contextmanager
def _stopping_after(module: nn.Module | None) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _PassedLastError

    handle = None if module is None else module.register_forward_hook(stop)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
