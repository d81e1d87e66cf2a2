"""What the start of a LoRA-Null directory held of W, as its untouched base tells it: ``A₀B₀ = W − W_res``.

Rounding of what is stored lies beside it. What that left beyond the adapter's rank tells how coarse it was. By numpy,
some rows at a time, several times over, so that the whole difference need not be in memory.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_nullspace.checkpoint.arrays import rows_of
from pytest_nullspace.checkpoint.header import TensorInfo
from pytest_nullspace.errors import CheckpointError, printable

if TYPE_CHECKING:
    from pytest_nullspace.checkpoint.arrays import Array

ROUNDING: Mapping[str, float] = {"F64": 2.0**-53, "F32": 2.0**-24, "BF16": 2.0**-9, "F16": 2.0**-11}
"""The share of a matrix that storing its numbers rounds off, by its norm; of a single number up to twice that."""
BEYOND = 4.0
"""How many times what storing may have rounded off may lie beyond the rank of the start; more is another W."""
NOISE = 0.25
"""Of the update, what rounding may be for it to be told: then its norm is right to a few hundredths."""
NEGLIGIBLE = 2.0**-20
"""Of W, what is below all that is judged, be it an update or rounding."""
_MORE = 8
"""Directions beside those of the rank in which the range of the difference is looked for."""
_COARSE = 2.0**-3
"""The same of what is stored in eight bits."""
_NUMBERS = 1 << 18
"""Of the difference, those that are in memory at a time."""


class Held(NamedTuple):
    """What the start of one layer held of W; no numbers where the difference is none.

    Attributes:
        up: A₀, shape ``(out, r)``, float64.
        down: B₀, shape ``(r, in)``, likewise.
        beyond: How much of ``W − W_res`` lies beside their product, which is rounding; in the Frobenius norm.
        whole: How much W is.
    """

    up: "Array"
    down: "Array"
    beyond: float
    whole: float


@dataclass(frozen=True)
class Begun:
    """Where what the start of one layer held lies.

    Attributes:
        name: The layer's module path.
        rank: The adapter's.
        weight: W, in the base.
        turned: Whether the base holds it as ``(in, out)``.
        residual: W_res, shape ``(out, in)``.
        where: The directory, for messages.
        at_once: Whether the whole difference may be in memory, and is read but once.
    """

    name: str
    rank: int
    weight: TensorInfo
    turned: bool
    residual: TensorInfo
    where: str
    at_once: bool = False

    def read(self, up: "Array", down: "Array") -> "tuple[Array, Array] | None":
        """A₀, shape ``(out, r)``, and B₀, shape ``(r, in)``, float64; None where W_res is W but for rounding.

        Args:
            up: A as it is now, with the scale.
            down: B as it is now.

        Raises:
            CheckpointError: The difference is not of the adapter's rank, so this is not the base; or rounding is too
                much of what training changed.
        """
        held = self.held()
        if held is None:
            return None
        update = apart((up, down), held[:2])
        if held.beyond > max(NOISE * update, NEGLIGIBLE * held.whole):
            raise CheckpointError(
                f"{self.where}: W - W_res of {printable(self.name)} is rounded too coarsely for what training changed, "
                f"to {held.beyond / update if update else math.inf:.2g} of it; give the checkpoint from which training "
                "started by --nullspace-init=DIR"
            )
        return held[:2]

    def held(self) -> Held | None:
        """What the start held; None where W_res is W but for rounding.

        Raises:
            CheckpointError: The difference is not of the adapter's rank.
        """
        import numpy as np

        whole, part = self._norms()
        if not math.isfinite(part):
            out, width = self.residual.shape
            return Held(np.full((out, self.rank), np.nan), np.full((self.rank, width), np.nan), part, whole)
        rounded = sum(ROUNDING.get(info.dtype, _COARSE) for info in (self.weight, self.residual)) * whole
        if part <= BEYOND * rounded:
            return None
        start = self._leading()
        beyond = self._beyond(*start)
        if beyond > BEYOND * rounded + NEGLIGIBLE * part:
            base = printable(self.weight.file.parent, 1000)
            raise CheckpointError(
                f"{self.where}: W - W_res of {printable(self.name)} is not of rank {self.rank}: beyond it lies "
                f"{beyond / part:.2g} of its norm, and rounding makes {rounded / part:.2g} at most; W_res was changed, "
                f"or {base} is not the base that it was made from: give that by --nullspace-base=DIR"
            )
        return Held(*start, beyond, whole)

    def _leading(self) -> "tuple[Array, Array]":
        """The best product of the adapter's rank.

        The range is found from products with some more random rows than that, twice (Halko et al. 2011, algorithm 4.4).
        """
        import numpy as np

        out, width = self.residual.shape
        more = min(self.rank + _MORE, out, width)
        found = self._times(np.random.default_rng(0).normal(size=(width, more)))
        columns = _basis(self._times(_basis(self._turned_times(_basis(found)))))
        inside = self._turned_times(columns).T
        down: Array = np.linalg.svd(inside, full_matrices=False)[2][: self.rank]
        return columns @ (inside @ down.T), down

    def _beyond(self, up: "Array", down: "Array") -> float:
        """``‖W − W_res − up down‖``, Frobenius."""
        import numpy as np

        return math.sqrt(sum(float(np.square(part - up[rows] @ down).sum()) for rows, _, part in self._parts()))

    def _norms(self) -> tuple[float, float]:
        """``‖W‖`` and ``‖W − W_res‖``."""
        import numpy as np

        both = [(whole, float(np.vdot(part, part))) for _, whole, part in self._parts()]
        return math.sqrt(sum(one for one, _ in both)), math.sqrt(sum(other for _, other in both))

    def _times(self, right: "Array") -> "Array":
        import numpy as np

        return np.concatenate([part @ right for _, _, part in self._parts()])

    def _turned_times(self, left: "Array") -> "Array":
        import numpy as np

        found = np.zeros((self.residual.shape[1], left.shape[1]))
        for rows, _, part in self._parts():
            found += part.T @ left[rows]
        return found

    def _parts(self) -> "Iterable[tuple[slice, float, Array]]":
        """Some rows, the square of the norm of W there, and ``W − W_res``."""
        return self._kept if self.at_once else self._read()

    @cached_property
    def _kept(self) -> "list[tuple[slice, float, Array]]":
        return [*self._read()]

    def _read(self) -> "Iterator[tuple[slice, float, Array]]":
        import numpy as np

        out, width = self.residual.shape
        step = max(1, _NUMBERS // width)
        for first in range(0, out, step):
            rows = slice(first, min(first + step, out))
            whole = rows_of(self.weight, rows, turned=self.turned)
            yield rows, float(np.vdot(whole, whole)), whole - rows_of(self.residual, rows)


def _basis(matrix: "Array") -> "Array":
    import numpy as np

    found: Array = np.linalg.qr(matrix, mode="reduced")[0]
    return found


def apart(one: "tuple[Array, Array]", other: "tuple[Array, Array]") -> float:
    """How far two products lie apart in the Frobenius norm, without forming either."""
    import numpy as np

    left: Any = np.linalg.qr(np.concatenate((one[0], other[0]), axis=1), mode="r")
    right: Any = np.linalg.qr(np.concatenate((one[1], -other[1])).T, mode="r")
    return float(np.linalg.norm(left @ right.T))
