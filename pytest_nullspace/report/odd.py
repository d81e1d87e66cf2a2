"""Which layers are odd beside their own kind, in lines that every report shares."""

import math
from collections.abc import Iterator

from pytest_nullspace.errors import printable
from pytest_nullspace.judging.odd import FEWEST, FIGURES, Odd, oddities
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.judging.weights import Weights

SHOWN = 5


def lines(weights: Weights, every: bool = False) -> Iterator[tuple[str, Tier | None]]:
    """How many layers are odd, and those that lie farthest; nothing of it decides."""
    found = oddities(weights)
    by_layer = found.of_layers()
    alone = f"; {len(found.alone)} in families of fewer than {FEWEST} were not held" if found.alone else ""
    if not found.held:
        if found.alone:
            yield f"odd layers: not told, for no family has {FEWEST} layers with an update", None
        return
    yield f"odd layers: {len(by_layer)} of {found.held} lie far from their own kind in this adapter{alone}", None
    for name, odds in list(by_layer.items())[: None if every else SHOWN]:
        yield f"  {printable(name)}: {'; '.join(map(told, odds))}", None
    if len(by_layer) > SHOWN and not every:
        yield f"  and {len(by_layer) - SHOWN} more", None


def told(odd: Odd) -> str:
    """One figure in words: sizes as a multiple of what is usual, the others as they are."""
    words = FIGURES[odd.figure][0]
    if odd.figure in ("sigma", "norm"):
        return f"{words} {math.exp(min(odd.value - odd.usual, 700.0)):.3g} x the usual ({odd.deviations:+.1f})"
    return f"{words} {odd.value:.3g}, usually {odd.usual:.3g} ({odd.deviations:+.1f})"
