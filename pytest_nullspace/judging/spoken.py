"""What a figure says to who knows no figure. Pure."""

import math
from collections.abc import Callable, Mapping

from pytest_nullspace.judging.verdicts import Finding, Verdict
from pytest_nullspace.run.texts import called


def said(verdict: Verdict, finding: Finding) -> str:
    """What a finding of a verdict says to who knows no figure, the text named where it has a name."""
    told, (_, *name) = plain(finding.threshold.figure, finding.value), called(verdict.subject)
    whole = "the preserved text"
    if not name:
        return told
    return told.replace(whole, f"{whole} {name[0]}") if whole in told else f"{told} on the text {name[0]}"


def plain(figure: str, value: float) -> str:
    """What a figure of the predictions, or an average over layers, says to who knows no figure."""
    if not math.isfinite(value):
        return f"{figure} is no number"
    return PLAIN[figure](value)


def share(part: float) -> str:
    """A share in per cent, in as many digits as people read."""
    percent = 100 * part
    return f"{percent:,.0f} %" if percent >= 10 else f"{percent:.2g} %"


def times(ratio: float) -> str:
    """How many times, likewise."""
    return f"{ratio:,.0f} x" if ratio >= 10 else f"{ratio:.2g} x"


def _likelier(text: str, nats: float) -> str:
    """How much the probability of a token changed, where its mean logarithm rose by ``nats``."""
    if nats < 0:
        return f"the {text} text is {share(-math.expm1(nats))} less likely"
    if nats > math.log(2):
        return f"the {text} text is {times(math.exp(min(nats, 20.0)))} as likely"
    return f"the {text} text is {share(math.expm1(nats + 0.0))} more likely"  # of -0.0 it is 0


def against_chance(leakage: float) -> str:
    """How a leakage lies to that of a random subspace."""
    if leakage > 1:
        return f"{times(leakage)} louder than chance"
    return f"{times(1 / leakage)} quieter than chance" if leakage else "perfectly quiet"


PLAIN: Mapping[str, Callable[[float], str]] = {
    "loss-rise": lambda value: _likelier("preserved", -value),
    "divergence": lambda value: f"predictions moved by {value:.2g} nats a token",
    "task-gain": lambda value: _likelier("task", value),
    "headroom": lambda value: f"twice the update would gain {times(value)} as much on the task",
    "leakage": lambda value: f"its space is {against_chance(value)}",
    "preservation": lambda value: f"{share(value)} of the preserved text's activations reach it",
    "effectiveness": lambda value: f"its update is {share(value)} of its input",
    "contribution": lambda value: f"its update is {share(value)} of the layers' output",
    "forgetting": lambda value: f"its update is {share(value)} of what the base computes on the preserved text",
    "selectivity": lambda value: f"its update is {times(value)} as large on the task text as on the preserved one",
}
"""By figure."""


def place(of: tuple[Verdict, Finding]) -> int:
    """Where a finding is told among others: the loss before what else moved, whatever the verdict."""
    return [*PLAIN].index(of[1].threshold.figure)
