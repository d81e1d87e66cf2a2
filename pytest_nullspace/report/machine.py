"""The report for programs: OpenMetrics, which GitLab compares between branches, and SARIF for code scanning."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.invariants import Expectations, judge, verdicts_of
from pytest_nullspace.judging.screening import FIGURES as FIRST_ORDER
from pytest_nullspace.judging.screening import STATEMENT, Screening
from pytest_nullspace.judging.survival import Survival
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.judging.weights import Weights
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.stats import RunStats

MOST_RESULTS = 1_000
"""Results that one SARIF file holds at most; code scanning takes 25,000, and nobody reads a thousand."""
_HELP = "https://pypi.org/project/pytest-nullspace/"
_SAYS = {
    "merge": "What a merge in this type leaves of the update.",
    "serve": "Whether this server would take the adapter and find all of it.",
    "frozen": "That nothing outside the layers moved in training.",
    "scope": "That nothing was trained outside the layers.",
    "verdict": "What keeps the adapter from being deployed.",
}
"""What the rules say that are no figures."""
_DEFECT = "What is wrong with a layer, or with the average, beside the figures of a gate."


class Beside(NamedTuple):
    """What became of a test that no figure tells of, such as that of a merge or a server.

    Attributes:
        name: Of the test, such as ``merge[bf16]``.
        tier: How it was judged.
        words: What it says; may be empty where it passes.
    """

    name: str
    tier: Tier
    words: str


@dataclass(frozen=True)
class Gated:
    """One run as these reports need it.

    Attributes:
        name: What it is called.
        file: The file that stands for it, relative to where pytest was started where it lies below.
        run: What was measured.
        expectations: What it was held against.
        decision: The verdict on it.
        beside: The tests that its figures do not tell of, as far as they came to a verdict.
    """

    name: str
    file: str
    run: RunStats
    expectations: Expectations
    decision: Decision
    beside: Sequence[Beside] = ()


def openmetrics(gated: Sequence[Gated]) -> str:
    """Averages, figures of predictions and merges, layers by tier and the tests beside, as OpenMetrics has them."""
    lines = ["# TYPE nullspace_figure gauge", "# HELP nullspace_figure The average over layers, or of the predictions."]
    lines += [
        _sample("nullspace_figure", value, model=of.name, figure=figure)
        for of in gated
        for figure, value in _figures(of.run)
    ]
    lines += ["# TYPE nullspace_layers gauge", "# HELP nullspace_layers Layers by tier."]
    for of in gated:
        tiers = _tiers(of)
        lines += [_sample("nullspace_layers", tiers.count(tier), model=of.name, tier=str(tier)) for tier in Tier]
    lines += [*_screened(gated), *_merges(gated)]
    if any(of.beside for of in gated):
        lines += [
            "# TYPE nullspace_test gauge",
            "# HELP nullspace_test 1 for what became of each test beside the layers.",
        ]
    for of in gated:
        lines += [_sample("nullspace_test", 1, model=of.name, test=it.name, tier=str(it.tier)) for it in of.beside]
    lines += ["# TYPE nullspace_verdict gauge", "# HELP nullspace_verdict 1 for the verdict on the model."]
    lines += [_sample("nullspace_verdict", 1, model=of.name, verdict=str(of.decision.call)) for of in gated]
    return "\n".join([*lines, "# EOF"]) + "\n"


def _tiers(of: Gated) -> list[Tier]:
    """How each layer was judged; by its weights alone or to the first order none passes without a warning."""
    weighed, screened = Weights.of(of.run.about), Screening.told(of.run.about)
    if weighed is None and screened is None:
        return [judge(layer, of.expectations).tier for layer in of.run.layers]
    names = [*screened.layers] if screened is not None else [layer.name for layer in weighed.layers] if weighed else []
    failed = {it.name for it in of.beside if it.tier is Tier.FAIL}
    return [Tier.FAIL if name in failed else Tier.WARN for name in names]


def _screened(gated: Sequence[Gated]) -> Iterator[str]:
    """The averages of what was screened, under a name that no figure of a gate has."""
    told = [(of.name, found) for of in gated if (found := Screening.told(of.run.about)) is not None]
    if told:
        yield "# TYPE nullspace_screened_figure gauge"
        yield f"# HELP nullspace_screened_figure The average over layers, {STATEMENT}: it gates nothing."
    for name, found in told:
        for figure in FIRST_ORDER:
            yield _sample("nullspace_screened_figure", found.mean(figure), model=name, figure=figure)


def _merges(gated: Sequence[Gated]) -> Iterator[str]:
    """What a merge in each type keeps, and what it does to each text's activations."""
    measured = [(of.name, found) for of in gated if (found := Survival.of(of.run.about)) is not None]
    if not measured:
        return
    kept = [(name, found.of_type(kind)) for name, found in measured for kind in found.types]
    yield "# TYPE nullspace_merge_survival gauge"
    yield "# HELP nullspace_merge_survival What a merge leaves of the update, 1 all of it, by type."
    for name, of in kept:
        for layers, value in (("average", of.average), ("worst", of.told[0][1].survival if of.told else math.nan)):
            yield _sample("nullspace_merge_survival", value, model=name, type=of.kind, layers=layers)
    yield "# TYPE nullspace_merge_moved gauge"
    yield "# HELP nullspace_merge_moved By how much it moves a text's activations, beside what the update does."
    for name, of in kept:
        for text in of.texts:
            if (moved := of.moved(text)) is not None:
                yield _sample("nullspace_merge_moved", moved, model=name, type=of.kind, text=text)


def _figures(run: RunStats) -> Iterator[tuple[str, float]]:
    if run.layers:
        yield from ((figure, run.mean(figure)) for figure in run.measured)
    if run.drift is not None:
        yield from ((figure, value) for figure, (value, _) in run.drift.figures.items())


def _sample(metric: str, value: float, **labels: str) -> str:
    told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    shown = repr(value) if math.isfinite(value) else "NaN" if math.isnan(value) else f"{value:+}".title()
    return f"{metric}{{{told}}} {shown}"


def _escaped(text: str) -> str:
    return printable(text, 1000).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def sarif(gated: Sequence[Gated], version: str) -> str:
    """What fails or is to be looked at, as SARIF 2.1.0; its list of results is empty where all is green."""
    results = [result for of in gated for result in _results(of)]
    driver = {
        "name": "pytest-nullspace",
        "version": version,
        "informationUri": _HELP,
        "rules": [_rule(name) for name in sorted({result["ruleId"] for result in results})],
    }
    run: dict[str, Any] = {"tool": {"driver": driver}, "results": results[:MOST_RESULTS]}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _rule(name: str) -> dict[str, Any]:
    figure = FIGURES.get(name)
    told = f"{figure.formula}. {figure.meaning}" if figure else _SAYS.get(name, _DEFECT)
    return {"id": name, "shortDescription": {"text": told}}


def _results(of: Gated) -> Iterator[dict[str, Any]]:
    """The verdict first, then the tests beside the figures, then each figure that fails or warns, the worst first."""
    tier = of.decision.call.tier
    if tier is not Tier.PASS:
        yield _result("verdict", tier or Tier.FAIL, f"{of.decision.call}: {of.decision.sentence}", of)
    for it in sorted((it for it in of.beside if it.tier is not Tier.PASS), key=lambda it: it.tier is Tier.WARN):
        kind = it.name.partition("[")[0]
        yield _result(kind if kind in _SAYS else "defect", it.tier, f"{it.name}: {it.words}", of)
    for verdict in sorted(verdicts_of(of.run, of.expectations), key=lambda verdict: verdict.severity, reverse=True):
        if verdict.tier is Tier.PASS or not verdict.gated:
            continue
        for fault in (*([verdict.defect] if verdict.defect else []), *verdict.faults):
            yield _result("defect", Tier.FAIL, f"{verdict.subject}: {fault}", of)
        for finding in verdict.findings if verdict.unjudged is None else ():
            if finding.tier is not Tier.PASS:
                yield _result(finding.threshold.figure, finding.tier, f"{verdict.subject}: {finding}", of)


def _result(rule: str, tier: Tier, message: str, of: Gated) -> dict[str, Any]:
    return {
        "ruleId": rule,
        "level": "error" if tier is Tier.FAIL else "warning",
        "message": {"text": printable(message, 1000)},
        "locations": [
            {"physicalLocation": {"artifactLocation": {"uri": of.file.replace(" ", "%20")}, "region": {"startLine": 1}}}
        ],
    }
