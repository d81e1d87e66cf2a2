"""Which tensors a forward computes with, whoever holds them and whether or not their module is called."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Uses(TorchFunctionMode):
    """Within this context tells of each of some tensors that something is computed with it.

    To ask for a type or a shape gives no tensor, and is no use.
    """

    def __init__(self, tensors: Iterable[Tensor], tell: Callable[[int], object]) -> None:
        """Begin to watch ``tensors``; ``tell`` is given the id of each that is used."""
        super().__init__()
        self._watched, self._tell = frozenset(map(id, tensors)), tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what was asked for."""
        given = kwargs or {}
        result = func(*args, **given)
        if _holds_tensor(result):
            for one in (*args, *given.values()):
                for used in self._watched.intersection(map(id, one if isinstance(one, tuple | list) else [one])):
                    self._tell(used)
        return result


def _holds_tensor(result: object) -> bool:
    """Whether ``result`` is a tensor or holds one, as that of a split or of an LSTM does."""
    if isinstance(result, Mapping):
        return any(map(_holds_tensor, result.values()))
    return isinstance(result, Tensor) or (isinstance(result, tuple | list) and any(map(_holds_tensor, result)))
