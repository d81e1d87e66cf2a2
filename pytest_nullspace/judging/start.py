"""Trained against initial from two saved runs: by norms and figures, where the weights are not at hand. Pure.

What training does to B, A and W_res shows in their norms; `pytest_nullspace.audit` holds every element where both
checkpoints are there, and finds what a norm cannot.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from pytest_nullspace.judging.baseline import Change
from pytest_nullspace.run.figures import of_layers
from pytest_nullspace.run.stats import LayerStats, RunStats

UNCHANGED = 1e-4
"""How far the norm of a frozen matrix may lie from its start, relative: rounding to half precision stays below."""
CLOSE, QUIET = 3.0, 1e-2
"""How many times louder ``‖BX‖/‖X‖`` may become as the layers before it learn; at most ``QUIET`` is close in any case,
for an initial adapter may be as loud. In the trained world of the tests right training reaches a factor of 2."""
NO_UPDATE, UPDATE = 1e-6, 1e-4
"""``‖ABX‖/‖X‖`` that an initial adapter stays below, and a trained one exceeds."""
ZERO = 1e-6
"""``‖A‖`` up to which A counts as zero."""


def quantities() -> Mapping[str, Callable[[LayerStats], float | None]]:
    """Of what reports show the change; None where a quantised weight does not tell it."""
    return {figure: partial(LayerStats.figure, name=figure) for figure in of_layers()} | {
        "‖B‖": lambda layer: layer.down_weight_norm,
        "‖A‖": lambda layer: layer.up_weight_norm,
        "‖W_res‖": lambda layer: layer.base_weight_norm,
    }


@dataclass(frozen=True)
class Start:
    """A saved run of the checkpoint from which training started.

    Attributes:
        run: The saved run.
        variant: What training might move: ``v2`` A alone, ``v1`` and ``lora`` both.
        decided: Why that one.
    """

    run: RunStats
    variant: str
    decided: str

    @classmethod
    def of(cls, run: RunStats, variant: str = "auto") -> "Start":
        """The start that ``run`` was measured of, its variant decided from its norms if ``auto``."""
        if variant != "auto":
            return cls(run, variant, "as --nullspace-variant says")
        zero = all(layer.up_weight_norm <= ZERO for layer in run.layers)
        if not zero:
            return cls(run, "v1", "A is not zero at the start")
        if all(layer.rank == 0 for layer in run.layers):
            return cls(run, "v2", "A is zero at the start, and the file does not tell the rank")
        if all(layer.is_orthonormal for layer in run.layers):
            return cls(run, "v2", "‖B‖² is the rank at the start, as of orthonormal rows")
        return cls(run, "lora", "A is zero at the start, and the rows of B are not orthonormal")

    def check(self, layer: LayerStats, trained: bool) -> Iterator[str]:
        """What of ``layer`` training cannot have made of its start, in phrases.

        Args:
            layer: As it is now.
            trained: Whether it was trained; an initial checkpoint need not have learned.
        """
        before = self.run.layer(layer.name)
        if before is None:
            yield "its start has no such layer"
            return
        moves = {change.figure: change for change in layer_moves(layer, before)}
        for frozen in ("‖B‖", "‖W_res‖") if self.variant == "v2" else ("‖W_res‖",):
            if frozen not in moves:
                if layer.base_weight_norm is not before.base_weight_norm:
                    yield f"{frozen} was measured on one side only, so nothing tells that it did not change"
            elif not abs(moves[frozen].share) <= UNCHANGED:
                yield f"{moves[frozen]} since the start, where it must not change"
        reached = layer.rows > 0  # else its figures are no numbers, and its norms are all there is to hold
        if reached and self.variant == "v2" and not layer.preservation <= max(CLOSE * before.preservation, QUIET):
            yield f"{moves['preservation']} since the start: more than {CLOSE:g} times as loud"
        if self.variant != "v1" and not before.up_weight_norm <= ZERO:
            yield f"‖A‖ was {before.up_weight_norm:.4g} at the start, where it must be zero"
        if (reached or before.rows) and self.variant != "v1" and not before.effectiveness < NO_UPDATE:
            yield f"effectiveness was {before.effectiveness:.4g} at the start, where there must be no update yet"
        if not trained:
            return
        if layer.up_weight_norm == before.up_weight_norm:
            yield f"‖A‖ {layer.up_weight_norm:.4g} is what it was at the start: A did not move"
        if reached and not layer.figure("effectiveness") > UPDATE:
            yield f"{moves['effectiveness']} since the start: no clear update, which is above {UPDATE:g}"

    def moves(self, run: RunStats) -> dict[str, tuple[Change, ...]]:
        """Of each layer that both runs hold, the change of every quantity."""
        found = ((layer, self.run.layer(layer.name)) for layer in run.layers)
        return {layer.name: layer_moves(layer, before) for layer, before in found if before is not None}


def layer_moves(layer: LayerStats, before: LayerStats) -> tuple[Change, ...]:
    """The change of every quantity that both runs measured."""
    absent = {*layer.absent, *before.absent}
    values = {name: (value(before), value(layer)) for name, value in quantities().items() if name not in absent}
    return tuple(
        Change(name, was, now, lower_is_better=True)
        for name, (was, now) in values.items()
        if was is not None and now is not None
    )


def unpaired(layers: set[str], start: RunStats, gated: Callable[[str], bool]) -> list[str]:
    """The layers that only one of the two has, in order of their names; those that are not ``gated`` do not count."""
    return sorted(name for name in layers ^ {layer.name for layer in start.layers} if gated(name))
