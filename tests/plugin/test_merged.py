"""Merged and fully trained models gated against their base, as their user meets it."""

import json
import re
from pathlib import Path

import pytest

from tests import tiny
from tests.adapters import adapter, edit, merged
from tests.plugin.conftest import LOOSE, Gate

LAYERS = 3
BASE = "--nullspace-base=base"


@pytest.fixture
def folder(folder: Path) -> Path:
    """A base, a LoRA on it and both merged in the test's own folder, with a text."""
    directory = adapter(folder, tiny.llama(), r=4, lora_alpha=8, target_modules=["q_proj"])
    merged(folder, directory)
    return folder


def test_a_merged_model_is_gated_as_its_adapter_is(folder: Path, gate: Gate) -> None:
    """The same tests, verdict and drift as of the LoRA; that there is no B is told, and nothing is said of A and B."""
    before = gate("--nullspace-save-stats=before.json", model="adapter", auto=True)
    before.assert_outcomes(passed=LAYERS + 2)
    result = gate(BASE, "-vv", "--nullspace-save-stats=s.json", model="merged", auto=True)
    result.assert_outcomes(passed=LAYERS + 2)
    result.stdout.fnmatch_lines(
        [
            "nullspace: merged (whole model, 3 layers, no down projection); text text.txt, 2 windows; device auto",
            "nullspace: base model base, named by --nullspace-base",
            "nullspace: 18 of 21 linear layers, such as model.layers.0.mlp.down_proj, are the base's own and no tests",
            "*merged/config.json::model.layers.0.self_attn.q_proj PASSED*",
            "input width: 32, effective rank: 3.*, output width: 32",
            "*||ΔWX|| (avg): *",
            "weight norms:  ||ΔW||_F *   ||W||_F *",
            "judged by what it forgets and what it learned, *(profile lora: a whole model)",
            "no down projection: preservation and leakage are not measured of a whole model, *--nullspace-rank=R *",
            "effective rank of ΔW: 3.* to 3.*, median 3.*; the largest in model.layers.*.self_attn.q_proj",
            "  base: the base *base",
            "*it learned: its weights moved from the base's",
        ]
    )
    assert not {"BX", "lora_A", "lora_B"} & {*result.stdout.str().replace("|", " ").split()}
    assert before.outlines[-1] == result.outlines[-1]
    saved, earlier = (json.loads((folder / name).read_text()) for name in ("s.json", "before.json"))
    assert saved["drift"]["preserved"]["divergence"] == pytest.approx(
        earlier["drift"]["preserved"]["divergence"], rel=1e-6
    )
    for layer, was in zip(saved["stats"], earlier["stats"], strict=True):
        assert layer["ABX_ratio"] == pytest.approx(was["ABX_ratio"], rel=1e-6)
        assert not {"BX_norm", "BX_ratio", "B_weight_norm", "leakage"} & layer.keys()


def test_by_a_rank_its_down_projection_is_judged(folder: Path, gate: Gate) -> None:
    """The leading singular vectors stand for B: the profile of a null space fails by them, and is refused without."""
    asked = BASE, "--nullspace-profile=nullspace"
    refused = gate(*asked, model="merged")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: --nullspace-profile: *merged is a whole model that has none; measure it *"])
    result = gate(*asked, "--nullspace-rank=4", "--nullspace-spectrum", "-v", model="merged")
    result.assert_outcomes(failed=LAYERS + 1)
    result.stdout.fnmatch_lines(["*(whole model, 3 layers, rank 4)*", "best possible on this text: *"])
    assert "lora_A" not in result.stdout.str()
    gate(*asked, "--nullspace-rank=4", *LOOSE, model="merged").assert_outcomes(passed=LAYERS + 1)
    bound = gate(BASE, "--nullspace-threshold=leakage:5:6", model="merged")
    assert bound.ret == pytest.ExitCode.USAGE_ERROR
    bound.stderr.fnmatch_lines(["ERROR: --nullspace-threshold: leakage is not measured of *; measure with *rank=R*"])


def test_its_saved_run_is_gated_reported_and_compared_alike(folder: Path, gate: Gate) -> None:
    """A saved run of whole updates passes through every report and comparison, window by window with another such."""
    files = [f"--nullspace-report=r.{suffix}" for suffix in ("html", "md", "prom", "sarif")]
    gate(BASE, "--nullspace-save-stats=s.json", *files, model="merged", auto=True).assert_outcomes(passed=LAYERS + 2)
    first = [(folder / f"r.{suffix}").read_text() for suffix in ("md", "prom")]
    assert "effective rank of ΔW" in first[0]
    assert "preservation" not in first[1]
    page = (folder / "r.html").read_text()
    assert "effective rank of ΔW" in page
    assert not {">nan<", ">NaN<", ">None<"} & {*re.findall(r">\w+<", page)}
    again = gate("--nullspace-stats=s.json", *files, model=None, auto=True)
    again.assert_outcomes(passed=LAYERS + 2)
    assert "effective rank of ΔW" in (folder / "r.md").read_text()
    scaled = "model.layers.0.self_attn.q_proj.weight"
    edit(folder / "merged", lambda tensors: tensors.update({scaled: 1.1 * tensors[scaled]}))
    against = gate(BASE, "-v", "--nullspace-compare=s.json", "--nullspace-compare-fail=forgetting:1%", model="merged")
    assert against.ret == pytest.ExitCode.USAGE_ERROR  # forgetting is judged beside a task text alone
    against = gate(
        BASE, "-v", "--nullspace-compare=s.json", "--nullspace-compare-fail=effectiveness:90%", model="merged"
    )
    against.assert_outcomes(passed=LAYERS + 1)
    against.stdout.fnmatch_lines(["against *s.json: 0 of 3 layers are worse than allowed*"])
    refused = gate("--nullspace-stats=s.json", "--nullspace-profile=reference", model=None)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: --nullspace-profile: *s.json is a whole model that has none; *"])


def test_an_update_that_is_loud_is_told_in_words_of_whole_updates(folder: Path, gate: Gate) -> None:
    """A failed layer's message names ΔW, never A and B."""
    result = gate(BASE, "-v", "--nullspace-threshold=effectiveness:8:7", model="merged")
    result.assert_outcomes(failed=LAYERS + 1)
    result.stdout.fnmatch_lines(["mean norms over 64 rows: input *, update *, without the update *, output *"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--nullspace-weights-only",),
            "--nullspace-weights-only: *merged is a whole model without A and B to weigh; *",
        ),
        (("--nullspace-init=adapter",), "--nullspace-init: *merged is a whole model, and its start is its base, *"),
        (("--nullspace-spectrum",), "--nullspace-spectrum: asks what reaches a down projection, and *merged *"),
        (("--nullspace-variant=v2",), "--nullspace-variant: asks what reaches a down projection, and *merged *"),
        (
            ("--nullspace-rank=64",),
            "--nullspace-rank: 64 is above what model.*q_proj.weight, [[]32, 32[]], can have; *",
        ),
    ],
)
def test_what_nothing_tells_of_a_whole_model_is_refused(
    folder: Path, gate: Gate, options: tuple[str, ...], told: str
) -> None:
    """One sentence before any test."""
    result = gate(BASE, *options, model="merged")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {told}"])


def test_the_base_again_without_one_and_a_rank_of_an_adapter_are_errors(folder: Path, gate: Gate) -> None:
    """A merge that wrote the base is named so, a model without base says how to give it, an adapter has a rank."""
    (folder / "merged" / "model.safetensors").write_bytes((folder / "base" / "model.safetensors").read_bytes())
    for options, model, told in (
        ((BASE,), "merged", "*merged: is byte for byte its base *base, *; merge or save it again, *"),
        ((), "merged", "*If it is merged or fully fine-tuned, give its base by --nullspace-base=DIR, *"),
        (("--nullspace-rank=4",), "adapter", "--nullspace-rank: *adapter has down projections of its own; *"),
    ):
        result = gate(*options, model=model)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"ERROR: {told}"])


def test_what_else_was_trained_is_told_and_fails_where_asked(folder: Path, gate: Gate) -> None:
    """Norms and embeddings that changed stand in header and summary, and strict scope fails by them."""
    names = "model.norm.weight", "model.embed_tokens.weight"
    edit(folder / "merged", lambda tensors: tensors.update({name: 1.1 * tensors[name] for name in names}))
    result = gate(BASE, "--nullspace-strict-scope", model="merged", auto=True)
    result.assert_outcomes(passed=LAYERS + 2, failed=1)
    result.stdout.fnmatch_lines(
        ["nullspace: outside the guarantee: trained tensors that no layer test covers, 2 in all: 2 whole weights *"]
    )


def test_a_vocabulary_that_was_cut_is_gated_without_its_drift(folder: Path, gate: Gate) -> None:
    """The layers are judged, why no drift is told, and where it is demanded that is an error."""
    model = tiny.llama()
    model.resize_token_embeddings(124)
    model.save_pretrained(folder / "ft")
    scaled = "model.layers.1.mlp.up_proj.weight"
    edit(folder / "ft", lambda tensors: tensors.update({scaled: 1.1 * tensors[scaled]}))
    result = gate(BASE, "-v", model="ft", auto=True)
    result.stdout.fnmatch_lines(["*drift not measured: the vocabulary of 128 was resized to 124, *"])
    result.assert_outcomes(passed=2)
    demanded = gate(BASE, "--nullspace-drift", model="ft", auto=True)
    demanded.stdout.fnmatch_lines(["*--nullspace-drift: *ft: the vocabulary of 128 was resized to 124, *"])
    assert demanded.ret == pytest.ExitCode.TESTS_FAILED
