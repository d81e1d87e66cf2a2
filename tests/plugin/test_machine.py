"""Reports for programs: OpenMetrics and SARIF."""

import dataclasses
import json
import math
import re

import pytest
from torch import Tensor

from fixtures.build import WORLD
from pytest_nullspace.judging.decision import decide
from pytest_nullspace.judging.invariants import Expectations
from pytest_nullspace.judging.profiles import Chosen, Profile
from pytest_nullspace.report.machine import MOST_RESULTS, Gated, openmetrics, sarif
from pytest_nullspace.run.stats import RunStats
from tests import saved, tiny
from tests.adapters import adapter, change
from tests.plugin.test_merging import Q0

HELD = Expectations(chosen=Chosen(Profile.NULLSPACE, "a LoRA-Null directory"), drift_judged=True)
SAMPLE = re.compile(r'(\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)+)\} (\S+)')


def gated(run: RunStats, name: str = "ft") -> Gated:
    """As the gate tells of it."""
    return Gated(name, "runs/ft/config.json", run, HELD, decide(run, HELD))


def test_every_sample_of_openmetrics_is_one_and_holds_its_figure() -> None:
    """Each line is a comment or a sample, each metric is declared before it, and the averages are those of the run."""
    run = saved.full()
    text = openmetrics([gated(run), gated(run, 'o"d\\d\n')])
    *lines, end = text.splitlines()
    assert end == "# EOF"
    declared, found = set(), {}
    for line in lines:
        if line.startswith("#"):
            declared.add(line.split()[2])
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        assert match[1] in declared
        found[match[1], match[2]] = float(match[3])
    assert len(found) == sum(not line.startswith("#") for line in lines)
    assert found["nullspace_figure", 'model="ft",figure="leakage"'] == run.mean("leakage")
    layers = [value for (metric, labels), value in found.items() if metric == "nullspace_layers" and '"ft"' in labels]
    assert sum(layers) == len(run.layers)


def test_what_is_no_number_is_told_as_openmetrics_has_it() -> None:
    """NaN and infinity are samples too."""
    layer = dataclasses.replace(saved.run().layers[0], down_norm=math.nan)
    run = dataclasses.replace(saved.run(), layers=(layer,), checkpoint_layers=1)
    assert 'figure="preservation"} NaN' in openmetrics([gated(run)])


def test_sarif_is_empty_where_all_is_green_and_names_what_is_not() -> None:
    """A safe run has no result; one loud layer is an error of its figure at the adapter's file, the verdict first."""
    safe = saved.full()
    decision = dataclasses.replace(decide(safe, HELD), call=type(decide(safe, HELD).call).SAFE)
    none = json.loads(sarif([Gated("ft", "f", dataclasses.replace(safe, layers=safe.layers[:0]), HELD, decision)], "1"))
    assert none["runs"][0]["results"] == []
    layers = saved.run().layers
    loud = dataclasses.replace(layers[0], mean_leakage=0.9)
    run = dataclasses.replace(saved.run(), layers=(loud, *layers[1:]))
    told = json.loads(sarif([gated(run)], "1"))
    assert told["version"] == "2.1.0"
    (only,) = told["runs"]
    first, *rest = only["results"]
    assert first["ruleId"] == "verdict"
    assert first["message"]["text"].startswith("DO NOT DEPLOY: ")
    errors = [result for result in rest if result["level"] == "error" and result["ruleId"] == "leakage"]
    assert any(result["message"]["text"].startswith(loud.name) for result in errors)
    assert errors[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "runs/ft/config.json"
    assert {result["ruleId"] for result in only["results"]} == {rule["id"] for rule in only["tool"]["driver"]["rules"]}


def test_sarif_has_no_more_results_than_somebody_reads() -> None:
    """Of ten thousand failing layers the worst are told."""
    layer = dataclasses.replace(saved.run().layers[0], mean_leakage=0.9)
    layers = tuple(dataclasses.replace(layer, name=f"model.layers.{i}.q") for i in range(MOST_RESULTS + 5))
    run = dataclasses.replace(saved.run(), layers=layers, checkpoint_layers=len(layers))
    assert len(json.loads(sarif([gated(run)], "1"))["runs"][0]["results"]) == MOST_RESULTS


def test_the_gate_writes_both(pytester: pytest.Pytester) -> None:
    """Each suffix gives its form in one run."""
    saved.save(pytester.path / "stats.json", saved.run())
    pytester.runpytest("--nullspace-stats=stats.json", "--nullspace-report=r.prom", "--nullspace-report=r.sarif")
    assert (pytester.path / "r.prom").read_text().endswith("# EOF\n")
    assert json.loads((pytester.path / "r.sarif").read_text())["runs"]


def test_what_could_not_be_measured_is_in_every_report(pytester: pytest.Pytester) -> None:
    """A measurement that breaks leaves NOT GATED in each form; an empty SARIF would look as that of a safe adapter."""
    (pytester.path / "text.txt").write_text((WORLD / "facts.txt").read_text() * 20)
    forms = [f"--nullspace-report=r.{suffix}" for suffix in ("sarif", "prom", "html", "md")]
    result = pytester.runpytest_inprocess(
        f"--nullspace-model={WORLD / 'null-v2'}", "--nullspace-calib-dataset=text.txt", "--nullspace-seqlen=100000",
        "-p", "no:cacheprovider", *forms,
    )  # fmt: skip
    assert result.ret == 1
    (found,) = json.loads((pytester.path / "r.sarif").read_text())["runs"][0]["results"]
    assert (found["level"], found["message"]["text"][:27]) == ("error", "NOT GATED: --nullspace-seql")
    assert 'verdict="NOT GATED"} 1' in (pytester.path / "r.prom").read_text()
    assert "NOT GATED</p>" in (pytester.path / "r.html").read_text("utf-8")
    assert "**NOT GATED**" in (pytester.path / "r.md").read_text("utf-8")


def test_tests_beside_the_figures_are_told_to_programs(pytester: pytest.Pytester) -> None:
    """By its weights alone a layer that fails is an error by its name, beside what became of the test of a server."""
    directory = adapter(pytester.path, tiny.llama(), r=32, target_modules=["q_proj"])

    def dead(tensors: dict[str, Tensor], _: object) -> None:
        tensors[f"base_model.model.{Q0}.lora_B.weight"].zero_()

    change(directory, dead)
    pytester.runpytest_inprocess(
        "--nullspace-model=adapter", "--nullspace-weights-only", "--nullspace-serve=vllm==0.33",
        "--nullspace-report=r.prom", "--nullspace-report=r.sarif",
        "-W", "default::pytest_nullspace.errors.NullspaceWarning",
    )  # fmt: skip
    results = json.loads((pytester.path / "r.sarif").read_text())["runs"][0]["results"]
    named = {result["ruleId"]: (result["level"], result["message"]["text"]) for result in results}
    assert named["defect"][0] == "error"
    assert named["defect"][1].startswith(f"{Q0}: dead: lora_B is zero")
    samples = (pytester.path / "r.prom").read_text()
    assert 'nullspace_layers{model="adapter",tier="fail"} 1\n' in samples
    assert 'nullspace_layers{model="adapter",tier="warn"} 2\n' in samples
    assert f'nullspace_test{{model="adapter",test="{Q0}",tier="fail"}} 1\n' in samples
    assert 'nullspace_test{model="adapter",test="serve[vllm]",tier="pass"} 1\n' in samples
