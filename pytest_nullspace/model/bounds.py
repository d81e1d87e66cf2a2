"""What a config may ask for: no more than the files beside it can fill, held before any memory is taken."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from pytest_nullspace.checkpoint.header import TensorInfo, printable
from pytest_nullspace.errors import CheckpointError

MOST = 1_000_000
"""The largest count of anything in a config, such as layers, heads, experts or labels."""
LEADS_TO_CODE = frozenset(
    ("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
     "experts_implementation", "_experts_implementation", "_name_or_path")
)  # fmt: skip
"""Fields by which a config names code, be it a file beside it or a kernel on the hub."""
SLACK_TENSORS, SLACK_BYTES = 1_000, 1 << 28
"""Beside the files' own: a head that is tied, masks and frequencies."""


def without(fields: Collection[str], value: Any) -> Any:
    """The JSON ``value`` without ``fields``, at any depth."""
    if isinstance(value, Mapping):
        return {key: without(fields, inner) for key, inner in value.items() if key not in fields}
    return [without(fields, inner) for inner in value] if isinstance(value, list) else value


def check_counts(config: Mapping[str, Any], config_file: Path) -> None:
    """Refuse a count that no model has: the library would make lists of that length.

    Raises:
        CheckpointError: A field named ``num_…`` or ``n_…`` lies beyond `MOST`.
    """
    for field, value in config.items():
        if isinstance(value, Mapping):
            check_counts(value, config_file)
        elif field.startswith(("num_", "n_")) and isinstance(value, int | float) and not value <= MOST:
            raise CheckpointError(
                f"{config_file}: {printable(field)} is {printable(value)}, more than any model has; give the config "
                "that was saved with the weights"
            )


@contextmanager
def held_to(tensors: Iterable[TensorInfo], config_file: Path) -> Iterator[None]:
    """Within this context a model may be built, without memory, only as large as ``tensors`` can fill.

    Raises:
        CheckpointError: Its parameters and buffers become more, or larger in bytes, than the files could be.
    """
    held = list(tensors)
    taken = sum(tensor.nbytes for tensor in held)
    # Twice for tied weights; sixteen-fold for float32 from half bytes, twice again for the same.
    most, largest = 2 * len(held) + SLACK_TENSORS, 16 * taken + SLACK_BYTES
    count = size = 0

    def hold(_: nn.Module, __: str, value: Tensor | None) -> None:
        nonlocal count, size
        if value is None:
            return
        count, size = count + 1, size + value.numel() * value.element_size()
        if count > most or size > largest:
            raise CheckpointError(
                f"{config_file}: describes a model far larger than the {len(held):,} tensors of {taken:,} bytes "
                "that lie beside it; give the config that was saved with them"
            )

    hooks = register_module_parameter_registration_hook(hold), register_module_buffer_registration_hook(hold)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
