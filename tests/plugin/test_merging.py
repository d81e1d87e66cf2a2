"""The test of a merge beside those of the layers, as its user meets it."""

import json
from pathlib import Path
from unittest.mock import ANY

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tests.adapters import adapter, change
from tests.plugin.conftest import LOOSE, Gate, Replay

ONLY = "--nullspace-weights-only"
Q0 = "model.layers.0.self_attn.q_proj"
LAYERS = 3


def peft(folder: Path, size: float = 1.0) -> Path:
    """An adapter on a base in bfloat16, its first layer's update that small."""
    directory = adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    file = folder / "base" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})

    def small(tensors: dict[str, Tensor], _: object) -> None:
        tensors[f"base_model.model.{Q0}.lora_B.weight"] *= size

    change(directory, small)
    return directory


@pytest.mark.parametrize("mode", [(), ("-n", "2")])
def test_each_type_is_a_test_that_tells_of_weights_and_activations(
    folder: Path, gate: Gate, replay: Replay, mode: tuple[str, ...]
) -> None:
    """What is kept stands in every report and in the statement, with what it does to texts; a saved run repeats it."""
    peft(folder, 2e-3)
    forms = ("md", "html", "sarif", "prom")
    reports = (*(f"--nullspace-report=r.{form}" for form in forms), "--nullspace-save-stats=s.json")
    beside = ("--nullspace-serve=vllm==99", "--nullspace-attest=a.json")
    result = gate(*LOOSE, "--nullspace-merge=fp16,bf16,fp8", *beside, *reports, *mode, model="adapter")
    result.assert_outcomes(passed=LAYERS + 1 + 3 + 1)
    stated = json.loads((folder / "a.json").read_text())["predicate"]
    of = "adapter/adapter_config.json::"
    assert {f"{of}merge[bf16]", f"{of}merge[fp16]"} <= {*stated["passedTests"]}
    assert {f"{of}merge[fp8]", f"{of}serve[vllm]"} <= {*stated["warnedTests"]}
    line = "merge[[]bf16]: a merge in bf16 keeps * of the update, * in the worst layer model.layers.*; "
    moved = "it moves activations by what the update does: on the preserved text * x"
    said = [line + moved, "merge: fp16 is the cheapest type that keeps it"]
    result.stdout.fnmatch_lines(said)
    for report in ("r.md", "r.html"):
        assert "fp16 is the cheapest type that keeps it" in (folder / report).read_text()
    results = json.loads((folder / "r.sarif").read_text())["runs"][0]["results"]
    named = {result["ruleId"]: (result["level"], result["message"]["text"]) for result in results}
    assert named["merge"] == ("warning", ANY)
    assert named["merge"][1].startswith("merge[fp8]: a merge in fp8 keeps ")
    assert named["serve"] == ("warning", ANY)
    assert named["serve"][1].startswith("serve[vllm]: nobody checked ")
    samples = (folder / "r.prom").read_text()
    for test, tier in (("merge[fp16]", "pass"), ("merge[fp8]", "warn"), ("serve[vllm]", "warn")):
        assert f'nullspace_test{{model="adapter",test="{test}",tier="{tier}"}} 1\n' in samples
    assert 'nullspace_merge_survival{model="adapter",type="bf16",layers="worst"} ' in samples
    assert 'nullspace_merge_moved{model="adapter",type="bf16",text="preserved text"} ' in samples
    told = json.loads((folder / "s.json").read_text())
    assert told["merge"]["types"] == ["fp16", "bf16", "fp8"]
    for layer in told["merge"]["layers"]:
        assert layer["types"]["bf16"]["survival"] == pytest.approx(1, abs=0.1)
        assert layer["types"]["bf16"]["moved"]["preserved text"] == pytest.approx(1, abs=0.1)
    again = replay(*LOOSE, "--nullspace-merge=bf16", stats="s.json")
    again.assert_outcomes(passed=LAYERS + 1 + 3)
    refused = replay("--nullspace-merge=nf4", stats="s.json")
    refused.stderr.fnmatch_lines(["ERROR: --nullspace-merge: *s.json does not tell of nf4; measure the model with *"])
    told["merge"]["layers"][0] |= {"update_norm": 0.0, "types": {}}
    (folder / "e.json").write_text(json.dumps(told))
    emptied = replay(stats="e.json")
    emptied.stderr.fnmatch_lines(
        [f"ERROR: *e.json: its entry 'merge' tells nothing of {Q0}, though that has an update; measure again"]
    )


def test_an_update_below_the_step_of_bfloat16_fails_by_name(folder: Path, gate: Gate) -> None:
    """By its weights alone, and what to do is said; a type that keeps it passes beside."""
    peft(folder, 1e-4)
    result = gate(ONLY, "--nullspace-merge=bf16,fp16", model="adapter")
    result.assert_outcomes(passed=LAYERS + 1, failed=1, warnings=LAYERS)
    failure = (
        f"a merge in bf16 keeps * of the update; 1 of 3 layers lose too much of it, and there is left * of {Q0}, *"
    )
    result.stdout.fnmatch_lines(
        [
            failure,
            f"  {Q0}: survival *, norm *, cosine *, noise *",
            "the update lies near or below the step of bf16 *: serve the adapter unmerged, or merge in float32 *",
            "verdict: DO NOT DEPLOY: the test merge[[]bf16] failed: a merge in bf16 keeps *",
            "merge: fp16 is the cheapest type that keeps it",
        ]
    )


def test_a_null_space_below_the_step_fails_in_its_directory(checkpoint: Path, gate: Gate) -> None:
    """A LoRA-Null directory is held as it lies; selected alone, the merge is still of every layer."""
    name = "model.layers.0.self_attn.q_proj"

    def small(tensors: dict[str, Tensor], _: object) -> None:
        tensors.update({each: tensor.bfloat16() for each, tensor in tensors.items()})
        tensors[f"{name}.ALinear.weight"] *= 1e-5

    tiny.lora_null(checkpoint, change=small)
    result = gate(ONLY, "--nullspace-merge=bf16", "-k", "merge")
    result.assert_outcomes(failed=1, deselected=21)
    result.stdout.fnmatch_lines([f"*1 of 21 layers lose too much of it, and there is left * of {name}, whose W is *"])


def test_it_is_asked_of_what_was_trained_and_in_known_types(folder: Path, gate: Gate) -> None:
    """Before training there is no update to keep, and no merge in a type that nobody knows."""
    peft(folder)
    for option, says in (
        (("--nullspace-merge=int8",), "ERROR: --nullspace-merge: *bf16*int8*"),
        (
            ("--nullspace-merge=bf16", "--nullspace-stage=init"),
            "ERROR: --nullspace-merge: before training there is no *",
        ),
    ):
        refused = gate(ONLY, *option, model="adapter")
        assert refused.ret == pytest.ExitCode.USAGE_ERROR
        refused.stderr.fnmatch_lines([says])


def test_the_command_of_the_document_runs(folder: Path, gate: Gate) -> None:
    """Each of the four types is a test, also where it is asked for twice, and an update this large survives."""
    peft(folder)
    (folder / "adapter").rename(folder / "ft")
    result = gate(ONLY, "--nullspace-merge=bf16,fp16,fp8,nf4", model="ft")
    result.assert_outcomes(passed=LAYERS + 4, warnings=LAYERS)
    twice = gate(ONLY, "--nullspace-merge=bf16,fp16", "--nullspace-merge=fp16,fp8", model="ft")
    twice.assert_outcomes(passed=LAYERS + 3, warnings=LAYERS)


def test_a_base_that_is_not_there_is_told_before_any_test(folder: Path, gate: Gate) -> None:
    """The merge needs W, though weights alone are gated; the file and the layer are named."""
    directory = peft(folder)
    (folder / "base").rename(folder / "elsewhere")
    result = gate(ONLY, "--nullspace-merge=bf16", model="adapter")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {directory}*base_model_name_or_path*; give a directory or owner/name by *"])
    assert gate(ONLY, "--nullspace-merge=bf16", "--nullspace-base=elsewhere", model="adapter").ret == 0
