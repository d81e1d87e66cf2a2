"""Where a checkpoint's model runs and in what precision; that model and its true base, loaded there.

Torch is imported only inside functions.
"""

import platform
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import read_json_object
from pytest_nullspace.checkpoint.hub import base_of, tensors_of
from pytest_nullspace.errors import MeasurementError, OptionError
from pytest_nullspace.measuring.memory import set_aside
from pytest_nullspace.settings import PREFIX, Settings

if TYPE_CHECKING:
    from pytest_nullspace.measuring.drift import Base
    from pytest_nullspace.model import AdaptedModel

Bases = MutableMapping[Hashable, Any]
"""The base model that adapters share, kept from one to the next; shared by the runs that are still to be measured."""


def device_of(settings: Settings) -> Any:
    """The device on which a model's inputs go.

    Raises:
        OptionError: This machine does not have it.
    """
    import torch

    from pytest_nullspace.model import device_named

    name, ranks = settings.device, settings.ranks
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator is not None and accelerator.type in ("cuda", "xpu") else "cpu"
    cards = 0 if name == "cpu" else torch.accelerator.device_count()  # an Apple GPU takes no sums in float64
    for card in _spread_over(settings) or ():
        if card != "cpu" and card not in range(cards):
            raise OptionError(f"{PREFIX}device-map: torch sees no card {card} on this machine; leave it out")
    if set(_spread_over(settings) or ()) == {"cpu"}:
        name = "cpu"
    if ranks.size > 1 and name in ("cuda", "xpu"):
        if ranks.local >= cards > 0:
            raise OptionError(
                f"{PREFIX}device: this machine has more processes than cards: process {ranks.local} takes card "
                f"{ranks.local}, and torch sees {cards}; start one process for each card, or give {PREFIX}device=cpu"
            )
        name = f"{name}:{ranks.local}"
    return device_named(name, f"{PREFIX}device")


def require_device(settings: Settings) -> None:
    """Refuse a device that was named and that this machine does not have; where none was, torch is not imported.

    Raises:
        OptionError: There is one.
    """
    if settings.device not in ("auto", "cpu") or {*(_spread_over(settings) or ())} - {"cpu"}:
        device_of(settings)


def dtype_of(name: str, checkpoint: Checkpoint, device: Any, base: Path | None = None) -> Any:
    """The precision of that ``name``; for ``auto`` float32 on a CPU, elsewhere that in which the base is stored.

    Args:
        name: As the option gives it.
        checkpoint: What is measured.
        device: Where it runs.
        base: The base of an adapter; the one that its config names if None.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return getattr(torch, _precision(checkpoint, base))


_PRECISIONS = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def _precision(checkpoint: Checkpoint, base: Path | None) -> str:
    """That of most bytes of the base. What is quantised tells none: then its config's, or else bfloat16."""
    if checkpoint.carries_base:
        base, tensors = checkpoint.directory, list(checkpoint.tensors.values())
    else:
        base = base or base_of(checkpoint, None)
        tensors = tensors_of(base)
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    most = max(sizes, key=sizes.__getitem__, default="")
    if most in _PRECISIONS:
        return _PRECISIONS[most]
    config = {} if base.is_file() else read_json_object(base / "config.json", "the base model's config")
    said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return said if said in _PRECISIONS.values() else "bfloat16"


def device_name(device: Any) -> str:
    """What the device calls itself."""
    import torch

    return str(getattr(torch, device.type).get_device_name(device)) if device.type != "cpu" else platform.machine()


def imported(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """The context in which the libraries are there that ``checkpoint`` takes, and are `set_aside`."""

    def libraries() -> None:
        from pytest_nullspace.model import import_libraries

        import_libraries(checkpoint)

    return set_aside(libraries)


def load(
    checkpoint: Checkpoint,
    settings: Settings,
    device: Any,
    dtype: Any,
    base: Path | None,
    bases: Bases | None = None,
) -> "AdaptedModel":
    """The checkpoint's model on ``device``, or spread over several."""
    import torch

    from pytest_nullspace.model import load_model
    from pytest_nullspace.model.spread import spread

    if (over := _spread_over(settings)) is None:
        return load_model(checkpoint, device, dtype, base, bases)
    return spread(load_model(checkpoint, torch.device("cpu"), dtype, base), over)


def _spread_over(settings: Settings) -> Mapping[int | str, int] | None:
    """What a model is spread over; of one that was to be streamed what there is, if no other process takes it."""
    if not isinstance(settings.device_map, str):
        return settings.device_map
    return {} if settings.ranks.size == 1 else None


def load_base(
    base: Path, settings: Settings, device: Any, dtype: Any, adapter: Checkpoint | None = None
) -> tuple[Any, Any]:
    """A base model without any adapter, of the class that ``adapter`` adapts, and where it takes its input."""
    import torch

    from pytest_nullspace.model import load_plain
    from pytest_nullspace.model.spread import spread_plain

    if (over := _spread_over(settings)) is None:
        return load_plain(base, device, dtype, adapter), device
    model = load_plain(base, torch.device("cpu"), dtype, adapter)
    return model, spread_plain(model, over)


class TrueBase(NamedTuple):
    """The base model whose predictions the adapter's are held against.

    Attributes:
        name: What it is, in words.
        load: Gives it, and where it takes its input.
    """

    name: str
    load: Callable[[], tuple["Base", Any]]


def true_base(
    adapted: "AdaptedModel",
    checkpoint: Checkpoint,
    initial: Checkpoint | None,
    base: Path | None,
    settings: Settings,
    device: Any,
    dtype: Any,
) -> TrueBase:
    """The true base model, found before it is loaded.

    Raises:
        OptionError: It cannot be had, or the model is none whose predictions can be compared.
    """
    if not _is_compared(adapted):
        raise OptionError(f"{PREFIX}drift: {checkpoint.directory} is no causal language model; leave the option out")
    if checkpoint.cut:
        raise OptionError(f"{PREFIX}drift: {checkpoint.directory}: {checkpoint.cut}; leave the option out")
    if initial is not None:
        of_start = None if initial.carries_base else base_of(initial, settings.base)

        def start() -> tuple["Base", Any]:
            loaded = load(initial, settings, device, dtype, of_start)
            return lambda: nullcontext(loaded.model), loaded.device

        return TrueBase(f"the start {initial.directory}", start)
    # What an adapter of PEFT writes into its base, such as saved embeddings or biases, no switch takes out again.
    is_written = not checkpoint.carries_base and checkpoint.changed_base is None and adapted.switched_off is None
    if base is not None and (checkpoint.carries_base or is_written):

        def plain() -> tuple["Base", Any]:
            adapter = None if checkpoint.carries_base else checkpoint
            model, place = load_base(base, settings, device, dtype, adapter)
            return lambda: nullcontext(model), place

        return TrueBase(f"the base {base}", plain)
    if (at_hand := base_at_hand(adapted)) is not None:
        return at_hand
    raise OptionError(
        f"{PREFIX}drift: {checkpoint.directory} does not hold its base model, for with the adapter switched off its "
        f"weights are others; give the checkpoint from which training started by {PREFIX}init=DIR"
        + (f", or the base model by {PREFIX}base=DIR" if checkpoint.carries_base else "")
    )


def base_at_hand(adapted: "AdaptedModel") -> TrueBase | None:
    """The base model where it is there without loading another, and its predictions can be compared."""
    switched_off = adapted.switched_off
    if switched_off is None or not _is_compared(adapted):
        return None
    return TrueBase(adapted.base_name, lambda: (switched_off, adapted.device))


def _is_compared(adapted: "AdaptedModel") -> bool:
    return not adapted.is_encoder_decoder and _writes_text(adapted.model)


def _writes_text(model: Any) -> bool:
    """Whether a model predicts the next token; some have a head of another name than most."""
    from pytest_nullspace.model.ends import ends_of

    if hasattr(model, "lm_head"):
        return True
    is_decoder = getattr(getattr(model, "config", None), "is_decoder", True)
    writes = is_decoder and hasattr(model, "can_generate") and model.can_generate()
    return bool(writes) and ends_of(model).predicts is not None


def half_precision(running: str, cure: str) -> tuple[str, ...]:
    """``cure``, which asks for half precision, as a remedy where what is ``running`` is not in it already."""
    return (f"{cure} {PREFIX}dtype=bfloat16",) if running.startswith("float32") else ()


def one_of(*cures: str) -> str:
    """The remedies in words, each of them enough."""
    *others, last = cures
    return f"{', '.join(others)}, or {last}" if others else last


@contextmanager
def shortage_told(message: Callable[[], str]) -> Iterator[None]:
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
