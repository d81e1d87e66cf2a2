"""What a page draws as bars: the predictions on every text, the passages that changed most, how quiet B could be. Pure.

All widths are in per cent, so that a bar is as wide as the window lets it be.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from pytest_nullspace.checkpoint.header import printable, quoted
from pytest_nullspace.judging.baseline import Change
from pytest_nullspace.judging.spoken import times
from pytest_nullspace.judging.verdicts import Finding, Tier, Verdict
from pytest_nullspace.report.notes import QUOTED, place_of
from pytest_nullspace.run.figures import FIGURES, Text, of_predictions
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats
from pytest_nullspace.run.texts import called, drift_test

TITLES = {
    "divergence": "How far the predictions moved",
    "loss-rise": "What was forgotten: by how much the loss rose",
    "task-gain": "What was learned: by how much the loss fell on the task text",
    "headroom": "Whether the task asks for more of it",
}
_ROOM = 1.15
"""How far beyond its largest value a scale reaches."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure of the predictions on one text.

    Attributes:
        label: The text.
        value: The figure with its margin.
        bound: Its bounds in words.
        tier: Where it lies.
        width: How far it reaches, in per cent of the scale.
        low: The lower end of its margin, likewise.
        high: The upper end.
        passes: Where the pass tier ends.
        fails: Where the fail tier begins.
        before: Where it lay in an earlier run; None where it is compared with none.
    """

    label: str
    value: str
    bound: str
    tier: str
    width: float
    low: float
    high: float
    passes: float
    fails: float
    before: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """One figure of the predictions on every text, all on one scale from zero.

    Attributes:
        figure: Its name.
        title: What it tells.
        unit: Of its values.
        bars: One for each text.
    """

    figure: str
    title: str
    unit: str
    bars: Sequence[Bar]


class _Found(NamedTuple):
    """What was found on the text of a name, and whether a test came to it."""

    name: str
    finding: Finding
    gated: bool


def groups(verdicts: Sequence[Verdict], changes: Sequence[Change] = ()) -> list[Group]:
    """The figures of the predictions that were found, each with a bar for every text.

    Args:
        verdicts: On the predictions, text by text.
        changes: Of the same since an earlier run.
    """
    found: dict[str, list[_Found]] = {figure: [] for figure in of_predictions()}
    for verdict in verdicts:
        for finding in verdict.findings:
            name = "".join(called(verdict.subject)[1:])
            found[finding.threshold.figure].append(_Found(name, finding, verdict.gated))
    was = {(change.figure, change.text): change.before for change in changes if math.isfinite(change.before)}
    return [
        Group(figure, TITLES[figure], FIGURES[figure].unit, _bars(figure, of, was))
        for figure, of in found.items()
        if of
    ]


def _bars(figure: str, found: Sequence[_Found], was: Mapping[tuple[str, str], float]) -> list[Bar]:
    earlier = {of.name: was.get((figure, of.name)) for of in found}
    ends = [of.finding.value + _margin(of.finding) for of in found if math.isfinite(of.finding.value)]
    limits = [limit for of in found for limit in (of.finding.threshold.passes, of.finding.threshold.fails)]
    most = _ROOM * max(1e-12, *ends, *limits, *(value for value in earlier.values() if value is not None))

    def far(value: float) -> float:
        return round(100 * min(max(value, 0.0), most) / most, 2) if math.isfinite(value) else 0.0

    whole = "task text" if FIGURES[figure].text is Text.TASK else "preserved text"
    bars = []
    for name, finding, gated in found:
        margin, before = _margin(finding), earlier[name]
        bars.append(
            Bar(
                whole if whole == "task text" else f"{whole} {printable(name)}".rstrip(),
                f"{finding.value:.3g}{finding.with_margin}",
                finding.threshold.bound,
                str(finding.tier) if gated else "none",
                far(finding.value),
                far(finding.value - margin),
                far(finding.value + margin),
                far(finding.threshold.passes),
                far(finding.threshold.fails),
                None if before is None else far(before),
            )
        )
    return bars


def _margin(finding: Finding) -> float:
    return finding.margin if finding.margin is not None and math.isfinite(finding.margin) else 0.0


@dataclass(frozen=True, slots=True)
class Quote:
    """A passage in which the predictions changed much, as a reader sees what was lost.

    Attributes:
        where: Which place of the text it is.
        before: What stands before the token.
        token: The token.
        after: What stands behind it.
        moved: How much less or more likely the token became, in words.
        tier: The colour of that: it fails where the token was lost.
        models: What each model holds of it: who, its probability of the token, the same in per cent, and what it would
            write instead.
        divergence: Of the adapted prediction from the base's.
    """

    where: str
    before: str
    token: str
    after: str
    moved: str
    tier: str
    models: Sequence[tuple[str, str, float, str]]
    divergence: str


@dataclass(frozen=True, slots=True)
class Quotes:
    """The passages of one preserved text.

    Attributes:
        text: The text.
        tier: Where the predictions on it lie; empty where no test judged them.
        open: Whether a reader sees them without asking: where they do not pass.
        quotes: The most changed first.
    """

    text: str
    tier: str
    open: bool
    quotes: Sequence[Quote]


def quotes(drift: Drift, verdicts: Sequence[Verdict]) -> Iterator[Quotes]:
    """The passages of each preserved text that has some, that first whose verdict is the worst."""
    tiers = {verdict.subject: verdict.tier if verdict.gated else None for verdict in verdicts}
    order = [Tier.FAIL, Tier.WARN, Tier.PASS, None]
    texts = sorted(drift.texts.items(), key=lambda pair: order.index(tiers.get(drift_test(pair[0]))))
    for name, text in texts:
        tier = tiers.get(drift_test(name))
        told = []
        for of in text.passages:
            moved, colour = _likelier(of.base, of.adapted)
            models = [
                ("base", f"{of.base:.2g}", _percent(of.base), quoted(of.likeliest, 200)),
                ("adapted", f"{of.adapted:.2g}", _percent(of.adapted), quoted(of.instead, 200)),
            ]
            before, token, after = (printable(part, QUOTED) for part in (of.before, of.token, of.after))
            told.append(Quote(place_of(of), before, token, after, moved, colour, models, f"{of.divergence:.2g}"))
        if told:
            yield Quotes(f"preserved text {printable(name)}".rstrip(), str(tier or ""), tier is not Tier.PASS, told)


def _likelier(base: float, adapted: float) -> tuple[str, str]:
    """How the probability of a token changed, and how that is coloured."""
    if not (math.isfinite(base) and math.isfinite(adapted)):
        return "no number", str(Tier.FAIL)
    if adapted >= base:
        return (f"▲ {times(adapted / base)} as likely" if base else "▲ likely now"), ""
    return (f"▼ {times(base / adapted)} less likely" if adapted else "▼ impossible now"), str(Tier.FAIL)


def _percent(share: float) -> float:
    return round(100 * min(max(share, 0.0), 1.0), 2) if math.isfinite(share) else 0.0


@dataclass(frozen=True, slots=True)
class Stand:
    """Where the adapter stands on one text between chance and the best that any subspace could do.

    Attributes:
        text: The text.
        leakage: Its leakage over chance, the median of the layers.
        least: The least that any subspace of its rank has, likewise.
        standing: From chance, 0, to that, 1: the median and the lowest.
        width: The median in per cent.
        lowest: The layer of the lowest.
        shared: How much of the best subspace it shares.
        ranks: The effective ranks of the inputs.
    """

    text: str
    leakage: str
    least: str
    standing: str
    width: float
    lowest: str
    shared: str
    ranks: str


def stands(run: RunStats) -> Iterator[Stand]:
    """The same on each preserved text whose spectrum was measured."""
    first = "" if run.drift is None else run.drift.name
    texts: dict[str, list[LayerStats]] = {f"preserved text {printable(first)}".rstrip(): list(run.layers)}
    for layer in run.layers:
        for name, of in layer.further.items():
            texts.setdefault(f"preserved text {printable(name)}", []).append(of)
    for text, layers in texts.items():
        known = [(of, of.spectrum, of.standing) for of in layers]
        found = [(of, best, at) for of, best, at in known if best is not None and at is not None and math.isfinite(at)]
        if not found:
            continue
        worst, _, lowest = min(found, key=lambda entry: entry[2])
        middle = median(at for *_, at in found)
        ranks = [best.effective_rank for _, best, _ in found]
        yield Stand(
            text,
            f"{median(of.leakage for of, *_ in found):.3g}",
            f"{median(best.least_leakage / of.chance for of, best, _ in found):.3g}",
            f"{middle:.3f}",
            _percent(middle),
            f"{lowest:.3f} in {printable(worst.name)}",
            f"{median(best.shared for _, best, _ in found):.0%}",
            f"{min(ranks):.1f} to {max(ranks):.1f}",
        )
