"""The mean norms of a layer's activations, and the figures that are ratios of them. Pure."""

import math
from dataclasses import dataclass
from typing import Any, overload

SINK = 8
"""A row is a sink where its norm is beyond so many times the median norm of its layer's rows.

The median is of the rows that are not zero, and rounded up to a power of two. In SmolLM2 the largest rows lie within 8
times the median in most layers, and between 13 and 630 times in those where they carry up to half of mean ``‖x‖``.
"""


class Ratios:
    """The figures that are ratios of mean norms."""

    __slots__ = ()
    input_norm: float
    down_norm: float | None
    update_norm: float
    base_norm: float
    output_norm: float

    @property
    def norms(self) -> tuple[float, float | None, float, float, float]:
        """Of ``x``, ``Bx``, ``ABx``, ``W_res x`` and the output."""
        return self.input_norm, self.down_norm, self.update_norm, self.base_norm, self.output_norm

    @property
    def preservation(self) -> float:
        """``‖Bx‖ / ‖x‖``: how much of the input reaches the down projection."""
        return math.nan if self.down_norm is None else ratio(self.down_norm, self.input_norm)

    @property
    def effectiveness(self) -> float:
        """``‖ABx‖ / ‖x‖``: how large the learned update is."""
        return ratio(self.update_norm, self.input_norm)

    @property
    def contribution(self) -> float:
        """``‖ABx‖ / ‖output‖``: the update's share of the layer's output."""
        return ratio(self.update_norm, self.output_norm)

    @property
    def forgetting(self) -> float:
        """``‖ABx‖ / ‖W_res x‖``: the update's size beside what it is added to."""
        return ratio(self.update_norm, self.base_norm)


@dataclass(frozen=True, slots=True)
class WithoutSinks(Ratios):
    """The mean norms over one layer's rows but its sinks, the few that may outweigh all others: see `SINK`.

    Where there is no sink, they are what they are over all rows.

    Attributes:
        rows: How many rows are left.
        input_norm: Mean of ``‖x‖`` over them.
        down_norm: Mean of ``‖Bx‖``; None where there is no B.
        update_norm: Mean of ``‖ABx‖``, scale included.
        base_norm: Mean of ``‖W_res x‖``.
        output_norm: Mean of ``‖ABx + W_res x‖``, bias left out.
    """

    rows: int
    input_norm: float
    down_norm: float | None
    update_norm: float
    base_norm: float
    output_norm: float


@overload
def ratio(part: float, whole: float) -> float: ...


@overload
def ratio(part: Any, whole: Any) -> Any: ...


def ratio(part: Any, whole: Any) -> Any:
    """``part / whole``, which is no number where there is no whole; of many at once, each by each."""
    if isinstance(whole, float | int) and not whole:
        return math.nan
    return part / whole
