"""The readings: what figures mean, in words and marks that are the same in every format."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from pytest_nullspace.checkpoint import peft
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.verdicts import Finding, Threshold, Tier, Verdict
from pytest_nullspace.run.figures import FIGURES, Text, of_layers
from pytest_nullspace.run.stats import SCALE_ZERO, SINK, LayerStats, RunStats

MARKS = {Tier.PASS: "✓", Tier.WARN: "⚠", Tier.FAIL: "✗"}


def mark(verdict: Verdict, tier: Tier | None = None) -> str:
    """The mark of the verdict, or of one of its tiers; a blank where no test came to it."""
    return MARKS[tier or verdict.tier] if verdict.gated else " "


def colour(verdict: Verdict, tier: Tier | None = None) -> Tier | None:
    """The tier that colours it, likewise."""
    return (tier or verdict.tier) if verdict.gated else None


def figures(of: LayerStats | RunStats, columns: Iterable[str]) -> list[str]:
    """Figures of a layer, or their averages over a run, as tables show them; a dash where one was not measured."""
    return [scanned_figure(of, figure) for figure in columns]


def shown(of: LayerStats | RunStats, figure: str) -> str:
    """One of them as the reference has it."""
    value = of.mean if isinstance(of, RunStats) else of.figure
    return "–" if figure in of.absent else f"{value(figure):.3e}"


def beside(of: LayerStats | RunStats, figure: str) -> str:
    """What a figure is without sink rows, to stand beside it; nothing where that is what it is."""
    value = of.mean if isinstance(of, RunStats) else of.figure
    own, other = value(figure), value(figure, sinks=False)
    return "" if own == other or math.isnan(own) else f"{other:.3e} {_WITHOUT}"


_WITHOUT = "without sink rows"
ALIKE = 0.05
"""How near the two values lie that a reading need not tell apart; the block of each layer tells both."""


def scanned_figure(of: LayerStats | RunStats, figure: str) -> str:
    """One of them as people scan a table."""
    value = of.mean if isinstance(of, RunStats) else of.figure
    return "–" if figure in of.absent else scanned(figure, value(figure))


def scanned(figure: str, value: float) -> str:
    """A figure in three digits; a share in per cent."""
    return f"{100 * value:.3g} %" if figure == "contribution" else f"{value:.3g}"


_LETTER = re.compile(r"(?<![\w./\\-])(A|B)(?:Linear(?: \(lora_[AB](?: in PEFT)?\))?)?(?![\w/\\-]|\.\w)")
_FILES = {
    peft.FORMAT: {"A": "lora_B", "B": "lora_A"},
    **{other: {"A": "lora_b", "B": "lora_a"} for other in (peft.MLX, peft.GGUF)},
}
"""What our matrices are called in the files of other formats."""


_WHOLE = (
    (
        ", BX what B, its down projection, makes of it, and ABX what A, its up projection, makes of that: the update",
        " and ΔWX what its update makes of that",
    ),
    ("the adapter learned: A moved from zero to a meaningful value", "it learned: its weights moved from the base's"),
    ("nothing learned: A frozen by mistake, or the", "nothing learned: the"),
    ("no update at all: A is zero, or the scale is, or the product is too small", "no update at all: it is too small"),
    (" (every A B x is zero): with the adapter the output is the same as without", ": the output is the base's"),
    (" (A B x is zero): with the adapter the output is the same as without", ": the output is the base's"),
    ("A B x", "ΔW x"),
    ("ABX", "ΔWX"),
    ("||W_residual @ X||:", "||W @ X||:         "),
    ("W_residual", "W"),
)
"""What is said of A B, and what of an update that is a whole matrix."""


def of_whole(told: str) -> str:
    """A sentence about A B as one about an update that is a whole matrix."""
    for ours, whole in _WHOLE:
        told = told.replace(ours, whole)
    return told


def named(told: str, run: RunStats) -> str:
    """A sentence with the matrices called as in its files: PEFT's ``lora_A`` and the ``lora_a`` of others are ``B``.

    Of a whole model there is neither: its update is ``ΔW``.
    """
    if run.is_whole:
        return of_whole(told)
    names = _FILES.get(str(run.about.get("format")))
    return told if names is None else _LETTER.sub(lambda letter: names[letter[1]], told)


def reading(verdict: Verdict) -> Iterator[tuple[str, Tier | None]]:
    """What the verdict's figures mean, a line each."""
    if verdict.defect is not None:
        yield f"{mark(verdict)} {verdict.defect}", colour(verdict)
        return
    for finding in verdict.findings:
        figure = finding.threshold.figure
        value, other = scanned(figure, finding.value), finding.without_sinks
        if other is not None and (finding.decided_by_sinks or not math.isclose(other, finding.value, rel_tol=ALIKE)):
            value += f", {scanned(figure, other)} {_WITHOUT}"
        told = f"{mark(verdict, finding.tier)} {figure} {value} ({_bound(finding.threshold)})"
        yield f"{told}: {_meaning(finding)}", colour(verdict, finding.tier)
    if verdict.doubt is not None:
        yield f"{mark(verdict, Tier.WARN)} {verdict.doubt}", colour(verdict, Tier.WARN)


def _bound(threshold: Threshold) -> str:
    """Both bounds, in per cent where the value is."""
    if threshold.figure != "contribution":
        return threshold.bound
    hundredfold = replace(threshold, passes=100 * threshold.passes, fails=100 * threshold.fails)
    return f"{hundredfold.bound.replace(',', ' %,')} %"


def _meaning(finding: Finding) -> str:
    figure, tier = finding.threshold.figure, finding.threshold.tier
    words = dict(zip(Tier, FIGURES[figure].bounds(finding.threshold.lower_is_better).words, strict=True))
    if figure == "leakage":
        return words[finding.tier].format(against_chance=_against_chance(finding.value))
    if finding.value == 0 and finding.tier is Tier.FAIL and figure in _NOTHING:
        return _NOTHING[figure]
    if finding.without_sinks is None or not finding.decided_by_sinks:
        return words[finding.tier]
    own, other = words[tier(finding.value)], words[tier(finding.without_sinks)]
    return f"sink rows decide this; with them: {own}; without them: {other}"


def _against_chance(leakage: float) -> str:
    if not math.isfinite(leakage):
        return "not measurable against chance"
    if leakage > 1:
        return f"{leakage:.1f} times louder than a random subspace"
    return f"{1 / leakage:.3g} times quieter than a random subspace" if leakage else "perfectly quiet"


_NOTHING = {
    "effectiveness": "no update at all: A is zero, or the scale is, or the product is too small for the precision",
    "contribution": "no influence on the output, for there is no update",
}
"""What is said of a figure that is exactly zero and must not be."""


def faults(verdict: Verdict) -> Sequence[str]:
    """What there is to say of a verdict beside its figures."""
    if not verdict.gated:
        return [not_gated(verdict)]
    return verdict.faults if verdict.unjudged is None else [verdict.unjudged, *verdict.faults]


def not_gated(verdict: Verdict) -> str:
    """That no test came to the verdict, and what would have failed it."""
    return f"not gated, would fail: {verdict.summary}" if verdict.tier is Tier.FAIL else "not gated"


def sink_rows(layer: LayerStats) -> str:
    """How many of its rows are sinks, and how much they carry."""
    return f"{layer.sinks} sink rows (beyond {SINK} times the median norm, {layer.sink_share:.1%} of the mean norm)"


_OF_PRESERVED = tuple(name for name in of_layers() if FIGURES[name].text is Text.PRESERVED)


def layer_failure(layer: LayerStats, verdict: Verdict) -> str:
    """The message of a failed layer: the verdict first, then every figure with its bounds, then a reading.

    Of a layer to which no row came there are none.
    """
    if not any(of.rows for of in (layer, *layer.further.values(), layer.task or layer)):
        return "\n".join([verdict.summary, *(f"{MARKS[Tier.FAIL]} {fault}" for fault in verdict.faults)])
    norms = f"mean norms over {layer.rows} rows: {_norms(layer.norms)}"
    if layer.without_sinks is not None and layer.sinks:
        norms += f"\nwithout {sink_rows(layer)}: {_norms(layer.without_sinks.norms)}"
    norms += "".join(
        f"\non the text {printable(name)}, over {of.rows} rows: "
        + ", ".join(f"{figure} {of.figure(figure):.4g}" for figure in _OF_PRESERVED if figure in layer.measured)
        for name, of in layer.further.items()
    )
    zero = SCALE_ZERO if layer.scale == 0 else "its A is zero" if layer.up_weight_norm == 0 else "A B x is zero"
    return _failure(verdict, norms, _zero_update(verdict, zero))


def _norms(norms: Iterable[float | None]) -> str:
    """The mean norms that there are."""
    named_so = zip(("input", "behind B", "update", "without the update", "output"), norms, strict=True)
    return ", ".join(f"{name} {norm:.6g}" for name, norm in named_so if norm is not None)


def model_failure(run: RunStats, verdict: Verdict) -> str:
    """The message of failed averages, likewise."""
    zero = "every A is zero" if all(layer.up_weight_norm == 0 for layer in run.layers) else "every A B x is zero"
    if all(layer.scale == 0 for layer in run.layers):
        zero = "every scale is 0"
    return _failure(verdict, f"averages over {len(run.layers)} layers", _zero_update(verdict, zero))


def _zero_update(verdict: Verdict, what: str) -> str | None:
    for finding in verdict.findings:
        if finding.threshold.figure == "effectiveness" and finding.tier is Tier.FAIL and finding.value == 0:
            return f"the update is exactly zero ({what}): with the adapter the output is the same as without"
    return None


def _failure(verdict: Verdict, measured: str, plainly: str | None) -> str:
    lines = [verdict.summary, *([] if plainly is None else [plainly]), "", measured]
    lines += [f"{MARKS[Tier.FAIL]} {fault}" for fault in verdict.faults]
    if verdict.defect is None:
        lines += [line for line, _ in reading(verdict)]
    return "\n".join(lines)
