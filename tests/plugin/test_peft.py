"""PEFT adapters gated as their user meets it."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.adapters import adapter, change, switch
from tests.plugin.conftest import LOOSE, Gate

LAYERS = 3


OUTSIDE = (
    "outside the guarantee: trained tensors that no layer test covers, 4 in all: 1 whole weights (lm_head.weight); "
    "3 DoRA magnitudes (model.layers.0.self_attn.q_proj.lora_magnitude_vector, "
    "model.layers.1.self_attn.q_proj.lora_magnitude_vector, …)"
)


def test_what_lies_outside_is_told_saved_and_a_failure_if_asked(folder: Path, gate: Gate) -> None:
    """Trained tensors outside the layers stand in header, summary, Markdown and JSON; strict scope makes them fail."""
    model = tiny.llama(tie_word_embeddings=False)
    adapter(folder, model, r=4, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    result = gate(*LOOSE, "--nullspace-save-stats=s.json", "--nullspace-report=r.md", model="adapter")
    result.assert_outcomes(passed=LAYERS + 1)
    assert f"nullspace: {OUTSIDE}" in result.outlines
    assert OUTSIDE in result.outlines
    assert "covers, 4 in all: 1 whole weights" in (folder / "r.md").read_text()
    saved = json.loads((folder / "s.json").read_text())["outside"]
    assert len(saved) == 4
    assert saved[0] == "base_model.model.lm_head.weight"
    strict = gate(*LOOSE, "--nullspace-strict-scope", model="adapter")
    strict.assert_outcomes(passed=LAYERS + 1, failed=1)
    strict.stdout.fnmatch_lines(["FAILED adapter/adapter_config.json::scope - Failed: outside the guarantee: *"])
    alone = gate("-o", "nullspace_strict_scope=true", "adapter/adapter_config.json::scope", model="adapter")
    alone.assert_outcomes(failed=1)
    workers = gate(*LOOSE, "-n", "2", "--nullspace-strict-scope", model="adapter")
    workers.assert_outcomes(passed=LAYERS + 1, failed=1)


def test_strict_scope_passes_where_only_layers_were_trained(folder: Path, gate: Gate) -> None:
    """An adapter of linear layers alone passes the scope; a bad ini value and a whole model are usage errors."""
    adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    result = gate(*LOOSE, "--nullspace-strict-scope", model="adapter")
    result.assert_outcomes(passed=LAYERS + 2)
    assert "outside" not in result.stdout.str()
    wrong = gate("-o", "nullspace_strict_scope=maybe", model="adapter")
    assert wrong.ret == pytest.ExitCode.USAGE_ERROR
    wrong.stderr.fnmatch_lines(["ERROR: nullspace_strict_scope: takes true or false, not 'maybe'"])
    tiny.lora_null(folder / "whole")
    whole = gate("--nullspace-strict-scope", model="whole")
    assert whole.ret == pytest.ExitCode.USAGE_ERROR
    whole.stderr.fnmatch_lines(["ERROR: --nullspace-strict-scope: *whole holds a whole model, and its files do not *"])


def test_an_adapter_that_changes_nothing_fails_plainly(folder: Path, gate: Gate) -> None:
    """With lora_B zero in every layer each test fails, and says that the adapter does nothing at all."""
    directory = adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    change(directory, lambda tensors, _: tensors.update({n: 0 * t for n, t in tensors.items() if "lora_B" in n}))
    result = gate(*LOOSE, "-v", model="adapter")
    result.assert_outcomes(failed=LAYERS + 1)
    result.stdout.fnmatch_lines(
        [
            "effectiveness 0 < 1e-06",
            "the update is exactly zero (its lora_B is zero): with the adapter the output is the same as without",
            "effectiveness 0 < 1e-06, contribution 0 < 0.0002",
            "the update is exactly zero (every lora_B is zero): with the adapter the output is the same as without",
        ]
    )


def test_a_layer_that_no_row_reached_fails_unless_allowed(folder: Path, gate: Gate) -> None:
    """An expert without rows fails and says so; allowed by glob it warns, and the averages leave it out."""
    adapter(folder, switch(), "SEQ_2_SEQ_LM", r=4, target_modules=["wi"])
    quick = ("--nullspace-calib-dataset=text.txt", "--nullspace-calib-size=1", "--nullspace-seqlen=8")
    bounds = ("--nullspace-threshold=preservation:9:9", "--nullspace-threshold=leakage:9:9")
    strict = gate(*bounds, "-v", model="adapter", quick=quick)
    failed = strict.parseoutcomes()["failed"]
    strict.stdout.fnmatch_lines(
        [
            "FAILED adapter/adapter_config.json::*experts* - Failed: no activation row reached it",
            "FAILED adapter/adapter_config.json::model - Failed: * layers could not be judged*",
        ]
    )
    allowed = gate(*bounds, "-v", "--nullspace-allow-unreached=*.experts.*", model="adapter", quick=quick)
    assert allowed.ret == 0
    assert allowed.parseoutcomes()["warnings"] >= failed - 1
    allowed.stdout.fnmatch_lines(
        ["*NullspaceWarning: no activation row reached it, which is allowed", "*preservation [0-9]*"]
    )
    twin = gate(*bounds, "-o", "nullspace_allow_unreached=*.experts.*", model="adapter", quick=quick)
    assert twin.ret == 0
    only = [line.split()[1] for line in strict.outlines if line.startswith("FAILED") and "experts" in line][:1]
    alone = gate(*bounds, "--nullspace-allow-unreached=*", *only, model="adapter", quick=quick)
    assert alone.ret == 1
    alone.stdout.fnmatch_lines(["nullspace: NOT GATED: no activation row reached any selected layer of *adapter"])


def test_adapters_of_one_base_load_it_once(folder: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """Several adapters of one base in one run load it once, and their figures are those of runs of their own."""
    names = ("one", "two", "three")
    for rank, name in enumerate(names, 2):
        adapter(folder, tiny.llama(), r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj"], name=name)
    pytester.makeconftest(
        "import pytest_nullspace.measuring.pipeline as s\n"
        "real = s.measure_checkpoint\n"
        "def counted(*a):\n"
        "    import transformers\n"
        "    kind = transformers.PreTrainedModel\n"
        "    load = vars(kind)['from_pretrained'].__func__\n"
        "    logged = lambda cls, *a, **k: (open('loads.log', 'a').write('x'), load(cls, *a, **k))[1]\n"
        "    kind.from_pretrained = classmethod(logged)\n"
        "    return real(*a)\n"
        "s.measure_checkpoint = counted\n"
    )
    others = [f"--nullspace-model={name}" for name in names[1:]]
    together = gate(*LOOSE, *others, "--nullspace-save-stats=all-{model}.json", model="one")
    together.assert_outcomes(passed=3 * (2 * LAYERS + 1))
    assert (folder / "loads.log").read_text() == "x"
    assert gate(*LOOSE, "--nullspace-save-stats=alone.json", model="three").ret == 0
    alone, among = (json.loads((folder / f"{name}.json").read_text())["stats"] for name in ("alone", "all-three"))
    assert alone == among


def test_a_gguf_base_named_in_an_ini_file_lies_beside_it(
    folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like every path in an ini file, that of a GGUF base is relative to the file, whatever folder pytest runs in."""
    adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    (folder / "base.gguf").write_bytes(b"no such format")
    (folder / "pytest.ini").write_text("[pytest]\nnullspace_base = base.gguf\n")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    result = gate(f"--nullspace-calib-dataset={folder / 'text.txt'}", model=str(folder / "adapter"))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {folder / 'base.gguf'}: not a GGUF file: it does not begin with GGUF; *"])


def test_a_tokenizer_other_than_the_base_s_is_told_in_every_report(folder: Path, gate: Gate) -> None:
    """An older copy that leaves out the first token is used as it lies there; each report and a saved run say so."""
    directory = adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    tiny.tokenizer(directory)
    alike = gate(*LOOSE, model="adapter")
    assert "tokenizer: " not in alike.stdout.str()
    file = folder / "base" / "tokenizer.json"
    first = {"SpecialToken": {"id": "a", "type_id": 0}}
    ids = {"a": {"id": "a", "ids": [97], "tokens": ["a"]}}
    begins = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": ids,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": begins}))
    told = gate(*LOOSE, "--nullspace-save-stats=s.json", "--nullspace-report=r.md", model="adapter")
    told.assert_outcomes(passed=LAYERS + 1)
    line = "tokenizer: the adapter's own, which was taken, gives other ids than its base's in 2 of 2 windows: first at "
    assert line in told.stdout.str()
    assert line in (folder / "r.md").read_text()
    saved = json.loads((folder / "s.json").read_text())["tokenizer"]
    assert saved["base_first_ids"][0] == 97
    assert saved["base_first_ids"][1:] == saved["first_ids"][:-1]
    assert saved["base_files"] != saved["files"]
    again = gate(*LOOSE, "--nullspace-stats=s.json", model=None)
    assert line in again.stdout.str()
