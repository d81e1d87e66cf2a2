"""The test of a server beside those of the layers, as its user meets it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests import tiny
from tests.adapters import adapter, change
from tests.plugin.conftest import LOOSE, Gate

LAYERS = 3
ONLY = "--nullspace-weights-only"


def test_an_adapter_of_peft_is_taken_by_all_and_each_server_is_a_test(folder: Path, gate: Gate) -> None:
    """What PEFT saved of a Llama passes for each; notes stand in the summary, all of it in JUnit and JSON."""
    adapter(folder, tiny.llama(), r=32, lora_alpha=20, target_modules=["q_proj", "v_proj"])
    servers = "--nullspace-serve=vllm,sglang,tgi,llama.cpp,peft==0.21"
    result = gate(*LOOSE, servers, "--nullspace-save-stats=s.json", "--junit-xml=j.xml", "-v", model="adapter")
    result.assert_outcomes(passed=2 * LAYERS + 1 + 5)
    result.stdout.fnmatch_lines(
        [
            "adapter/adapter_config.json::serve[[]vllm] PASSED*",
            "adapter/adapter_config.json::serve[[]llama.cpp] PASSED*",
            "serve[[]vllm]: vllm takes it by all * rules that are known; * start it with --max-lora-rank 32",
        ]
    )
    told = {one["server"]: one for one in json.loads((folder / "s.json").read_text())["servers"]}
    assert [one["tier"] for one in told.values()] == ["pass"] * 5
    assert told["vllm"]["found"][0]["rule"] == "rank"
    assert '<property name="server" value="peft==0.21"' in (folder / "j.xml").read_text()


def test_what_a_server_would_refuse_is_not_to_be_deployed(folder: Path, gate: Gate) -> None:
    """A refusal fails its own test and the verdict, names tensor, rule and source, and stands in every report."""
    directory = adapter(folder, tiny.llama(), r=4, use_rslora=True, target_modules=["q_proj", "v_proj"])
    reports = ("--nullspace-report=r.md", "--nullspace-report=r.html", "--nullspace-save-stats=s.json")
    result = gate(ONLY, "--nullspace-serve=vllm", "--nullspace-serve=sglang", *reports, model="adapter")
    result.assert_outcomes(passed=2 * LAYERS + 1, failed=1, warnings=2 * LAYERS)
    refusal = (
        "sglang would not serve it as it was trained: rule scale: 6 of 6 layers would be scaled wrongly, for "
        "use_rslora is not read: tensor 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' was trained "
        "with *, and would be served with 2"
    )
    result.stdout.fnmatch_lines(
        [
            refusal,
            "rule scale: *",
            "    sglang's rule: one factor, lora_alpha / r; *(python/sglang/srt/lora/lora.py (scaling); for 0.5 to *)",
            f"verdict: DO NOT DEPLOY: the test serve[[]sglang] failed: {refusal}",
            "serve[[]vllm]: vllm takes it by all * rules that are known",
            f"serve[[]sglang]: {refusal}",
        ]
    )
    assert "sglang would not serve it" in (folder / "r.md").read_text()
    assert "sglang would not serve it" in (folder / "r.html").read_text()
    assert json.loads((folder / "s.json").read_text())["verdict"]["verdict"] == "DO NOT DEPLOY"
    change(directory, lambda _, config: config.update(use_rslora=False))
    assert gate(ONLY, "--nullspace-serve=sglang", model="adapter").ret == 0


@pytest.mark.parametrize("mode", [(), ("-n", "2")])
def test_what_nobody_knows_is_not_safe(folder: Path, gate: Gate, mode: tuple[str, ...]) -> None:
    """A version that nobody checked warns, which fails where warnings do, and it has a say in the verdict."""
    adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    result = gate(*LOOSE, "--nullspace-serve=vllm==99", *mode, model="adapter")
    result.assert_outcomes(passed=LAYERS + 2)
    result.stdout.fnmatch_lines(["verdict: LOOK: nobody checked * of * rules for vllm==99: *"])
    error = ("-W", "error::pytest_nullspace.NullspaceWarning")
    strict = gate(*error, "--nullspace-serve=vllm==99", "-k", "serve", *mode, model="adapter")
    strict.assert_outcomes(failed=1)
    strict.stdout.fnmatch_lines(["(warnings are errors here)"])


def test_the_commands_of_the_document_run(folder: Path, pytester: pytest.Pytester) -> None:
    """Each command of docs/serving.md ends well for an adapter that is taken; here without its pass."""
    adapter(folder / "runs", tiny.llama(), name="ft", r=4, target_modules=["q_proj"])
    document = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    commands = re.findall(r"^pytest (.*)$", document, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        result = pytester.runpytest_subprocess(*shlex.split(command), ONLY, "-p", "no:randomly")
        assert result.ret == 0, command
        result.stdout.fnmatch_lines(["serve[[]vllm]: vllm* takes it by all * rules that are known*"])


def test_it_stands_in_for_no_measurement(folder: Path, gate: Gate) -> None:
    """Alone it passes and leaves the run not gated; where it fails alone, that is known without a measurement."""
    adapter(folder, tiny.llama(), r=4, use_rslora=True, target_modules=["q_proj"])
    alone = gate("--nullspace-serve=vllm", "-k", "serve", model="adapter")
    alone.assert_outcomes(passed=1, deselected=LAYERS + 1)
    alone.stdout.fnmatch_lines(["serve[[]vllm]: vllm takes it *", "verdict: NOT GATED: not measured"])
    wrong = gate("adapter/adapter_config.json::serve[llama.cpp]", "--nullspace-serve=llama.cpp", model="adapter")
    wrong.assert_outcomes(failed=1)
    wrong.stdout.fnmatch_lines(
        ["verdict: DO NOT DEPLOY: the test serve[[]llama.cpp] failed: llama.cpp would not serve *"]
    )


def test_a_server_in_two_versions_is_two_tests(folder: Path, gate: Gate) -> None:
    """Then each has its version in its name; ini lines may carry settings."""
    adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    (folder / "pytest.ini").write_text(
        "[pytest]\nnullspace_serve =\n    vllm==0.11\n    vllm==0.20 --max-lora-rank 1\n    tgi\n"
    )
    result = gate(ONLY, "-v", model="adapter")
    result.stdout.fnmatch_lines(
        ["*::serve[[]vllm==0.11] PASSED*", "*::serve[[]vllm==0.20] FAILED*", "*::serve[[]tgi] PASSED*"]
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ollama", "--nullspace-serve: takes servers of vllm, *, not 'ollama'"),
        ("vllm,vllm", "--nullspace-serve: vllm is given twice"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(folder: Path, gate: Gate, given: str, said: str) -> None:
    """It is refused before anything is read."""
    result = gate(f"--nullspace-serve={given}", model="adapter")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {said}"])
