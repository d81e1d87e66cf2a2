"""A statement of the result that others can verify, in the form of in-toto: files by digest, tests by name, figures.

It is unsigned and holds no keys; whoever runs the gate signs it. Sources: the in-toto Attestation Framework's Statement
v1, https://in-toto.io/Statement/v1, and its predicate https://in-toto.io/attestation/test-result/v0.1.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_nullspace.judging.decision import Call, Decision
from pytest_nullspace.judging.invariants import Expectations, verdicts_of
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.run.entries import plain
from pytest_nullspace.run.figures import of_layers
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.run.texts import preserved

STATEMENT = "https://in-toto.io/Statement/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
FIGURES = "https://pypi.org/project/pytest-nullspace/figures/v1"
"""The field of the predicate that holds what was measured; in-toto wants fields of others named by a URI."""
_RESULT = {Call.SAFE: "PASSED", Call.LOOK: "WARNED", Call.STOP: "FAILED"}
_DIGEST = "sha256"


@dataclass(frozen=True)
class Attested:
    """What a statement is made of.

    Attributes:
        subjects: The SHA-256 of every file of the adapter and of its base, by ``adapter/NAME`` and ``base/NAME``.
        run: What was measured.
        expectations: What it was held against, and the tests that came to a verdict.
        decision: The verdict.
        failed: The names of the tests that failed.
        excused: Those of the tests that failed as a mark of the user's expects, or only warn without a figure.
        prefix: How the ids of the tests begin.
        url: Where the run can be looked at, if it has a page.
    """

    subjects: Mapping[str, str]
    run: RunStats
    expectations: Expectations
    decision: Decision
    failed: Collection[str]
    excused: Collection[str]
    prefix: str
    url: str | None = None


def statement(of: Attested) -> str:
    """The statement, as JSON.

    Raises:
        ValueError: The run came to no verdict, so there is nothing to state.
    """
    if of.decision.call not in _RESULT:
        raise ValueError(of.decision.sentence)
    predicate: dict[str, Any] = {"result": _RESULT[of.decision.call], "configuration": _configuration(of)}
    if of.url is not None:
        predicate["url"] = of.url
    told = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {_DIGEST: digest}} for name, digest in sorted(of.subjects.items())],
        "predicateType": TEST_RESULT,
        "predicate": {**predicate, **_tests(of), FIGURES: _figures(of)},
    }
    return json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _tests(of: Attested) -> dict[str, list[str]]:
    """The tests that came to a verdict, by what became of them; one that a mark expects to fail is a warned one."""
    tiers = {verdict.subject: verdict.tier for verdict in verdicts_of(of.run, of.expectations)}
    found: dict[str, list[str]] = {"passedTests": [], "warnedTests": [], "failedTests": []}
    for name in sorted(of.expectations.judged or ()):
        warned = name in of.excused or tiers.get(name, Tier.PASS) is not Tier.PASS
        kind = "failed" if name in of.failed else "warned" if warned else "passed"
        found[f"{kind}Tests"].append(f"{of.prefix}{name}")
    return found


def _configuration(of: Attested) -> list[dict[str, Any]]:
    """What the result depends on beside the subjects: bounds, texts, tokenizer, settings and versions."""
    about, expectations = of.run.about, of.expectations
    bounds = {
        "stage": str(expectations.stage),
        "profile": None if expectations.profile is None else str(expectations.profile),
        "layers": {t.figure: [t.passes, t.fails] for t in expectations.thresholds("")},
        "averages and predictions": {t.figure: [t.passes, t.fails] for t in of.decision.thresholds},
        "given": [[o.layers, o.figure, o.passes, o.fails] for o in expectations.overrides],
        "left out": list(expectations.left_out),
    }
    parts = [_described("thresholds", bounds)]
    for key in dict.fromkeys([*preserved(about), "task_text"]):
        if isinstance(entry := about.get(key), Mapping) and isinstance(entry.get("sha256"), str):
            kept = {name: entry[name] for name in ("windows", "seqlen", "tokens", "windows_sha256") if name in entry}
            parts.append({"name": key, "digest": {_DIGEST: entry["sha256"]}, "annotations": kept})
    parts += [_described(key, about[key]) for key in ("tokenizer", "settings") if key in about]
    libraries = about.get("libraries")
    for name, version in libraries.items() if isinstance(libraries, Mapping) else ():
        kind = "generic" if name == "python" else "pypi"
        parts.append({"name": str(name), "uri": f"pkg:{kind}/{name}@{version}"})
    return parts


def _described(name: str, value: Any) -> dict[str, Any]:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
    return {"name": name, "digest": {_DIGEST: digest}, "mediaType": "application/json", "annotations": {"value": value}}


def _figures(of: Attested) -> dict[str, Any]:
    run = of.run
    averages = {name: plain(run.mean(name)) for name in of_layers() if name in run.measured}
    drift = {} if run.drift is None else run.drift.figures
    predictions = {name: [plain(value), plain(margin)] for name, (value, margin) in drift.items()}
    return {
        "verdict": of.decision.to_dict(),
        "layers": len(run.layers),
        "averages": averages,
        "predictions": predictions,
    }
