"""What a merge keeps of the update, in lines that every report shares."""

from collections.abc import Iterator

from pytest_nullspace.judging.survival import SHOWN, OfType, Survival, figures
from pytest_nullspace.judging.verdicts import Tier


def lines(survival: Survival, every: bool = False) -> Iterator[tuple[str, Tier | None]]:
    """A line for each type, and which is the cheapest that keeps it; with ``every`` each layer's figures below.

    Args:
        survival: What each type leaves.
        every: Whether each layer is told, else those that do not pass.
    """
    for kind in survival.types:
        kept = survival.of_type(kind)
        told = [f"on the {text} {value:.2g} x" for text in kept.texts if (value := kept.moved(text)) is not None]
        moves = f"; it moves activations by what the update does: {', '.join(told)}" if told else ""
        yield f"merge[{kind}]: {kept.summary}{moves}", None if kept.tier is Tier.PASS else kept.tier
        yield from _layers(kept, every)
    if len(survival.types) > 1:
        cheapest = survival.cheapest
        yield f"merge: {f'{cheapest} is the cheapest type that keeps it' if cheapest else 'no type keeps it'}", None


def _layers(kept: OfType, every: bool) -> Iterator[tuple[str, Tier | None]]:
    for layer, left in kept.told if every else kept.lost[:SHOWN]:
        yield f"  {layer.name}: {figures(left)}", None if left.tier is Tier.PASS else left.tier
