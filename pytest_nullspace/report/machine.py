"""The report for programs: OpenMetrics, which GitLab compares between branches, and SARIF for code scanning."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.invariants import Expectations, judge, verdicts_of
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.run.stats import RunStats

MOST_RESULTS = 1_000
"""Results that one SARIF file holds at most; code scanning takes 25,000, and nobody reads a thousand."""
_HELP = "https://pypi.org/project/pytest-nullspace/"


@dataclass(frozen=True)
class Gated:
    """One run as these reports need it.

    Attributes:
        name: What it is called.
        file: The file that stands for it, relative to where pytest was started where it lies below.
        run: What was measured.
        expectations: What it was held against.
        decision: The verdict on it.
    """

    name: str
    file: str
    run: RunStats
    expectations: Expectations
    decision: Decision


def openmetrics(gated: Sequence[Gated]) -> str:
    """Every average, every figure of the predictions and the count of layers by tier, as OpenMetrics has them."""
    lines = ["# TYPE nullspace_figure gauge", "# HELP nullspace_figure The average over layers, or of the predictions."]
    lines += [
        _sample("nullspace_figure", value, model=of.name, figure=figure)
        for of in gated
        for figure, value in _figures(of.run)
    ]
    lines += ["# TYPE nullspace_layers gauge", "# HELP nullspace_layers Layers by tier."]
    for of in gated:
        tiers = [judge(layer, of.expectations).tier for layer in of.run.layers]
        lines += [_sample("nullspace_layers", tiers.count(tier), model=of.name, tier=str(tier)) for tier in Tier]
    lines += ["# TYPE nullspace_verdict gauge", "# HELP nullspace_verdict 1 for the verdict on the model."]
    lines += [_sample("nullspace_verdict", 1, model=of.name, verdict=str(of.decision.call)) for of in gated]
    return "\n".join([*lines, "# EOF"]) + "\n"


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
    told = f"{figure.formula}. {figure.meaning}" if figure else "What keeps the adapter from being deployed."
    return {"id": name, "shortDescription": {"text": told}}


def _results(of: Gated) -> Iterator[dict[str, Any]]:
    """The verdict first, then each figure of each test that fails or warns, the worst first."""
    tier = of.decision.call.tier
    if tier is not Tier.PASS:
        yield _result("verdict", tier or Tier.FAIL, f"{of.decision.call}: {of.decision.sentence}", of)
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
