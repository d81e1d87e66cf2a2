"""The gate as its user meets it: ids, selection, verdicts, exit codes, and every way to a false green."""

import json
import os
import pty
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.plugin.conftest import LOOSE, QUICK, Gate

LAYERS = 21
Q0 = "model.layers.0.self_attn.q_proj"


def test_one_test_per_layer_and_one_for_the_averages(checkpoint: Path, gate: Gate) -> None:
    """A passing checkpoint is green with a test for each layer and one for the averages, and says what it gated."""
    result = gate(*LOOSE)
    result.assert_outcomes(passed=LAYERS + 1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "nullspace: *runs/ft (LoRA-Null, 21 layers, rank 4); text text.txt, 2 windows; device auto",
            "runs/ft/config.json .*",
            "*nullspace: runs/ft*",
            "64 tokens; cpu float32; *",
            "gated 21 of 21 layers: 21 green, 0 to look at, 0 red",
            "*worst layers*preservation*",
            "*average*",
            "verdict: LOOK: *",
        ]
    )


def test_a_failure_begins_with_its_verdict(checkpoint: Path, gate: Gate) -> None:
    """The FAILED line and the message begin with the figure that failed; all figures with their bounds follow."""
    result = gate("--nullspace-threshold=preservation:0.01:0.02", "--nullspace-threshold=leakage:5:6", "-v")
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"FAILED runs/ft/config.json::{Q0} - Failed: preservation 0.* > 0.02"])
    result.stdout.fnmatch_lines(
        [
            "preservation 0.* > 0.02",
            "",
            "mean norms over 64 rows: input *",
            "✗ preservation *pass < 0.01, fail > 0.02*",
            "✓ effectiveness *pass > 0.0001, fail < 1e-06*",
        ]
    )


def test_ids_come_in_model_order_without_torch(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """--collect-only lists ``<config.json>::<layer>`` in model order and imports no torch."""
    tiny.lora_null(pytester.path / "deep", tiny.llama(num_hidden_layers=11))
    pytester.makeconftest(
        "import sys\n"
        "def pytest_unconfigure(config):\n"
        "    print('heavy:', sorted({'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)))\n"
    )
    result = gate("--collect-only", "-q", "-s", model="deep")
    ids = [line for line in result.outlines if "::" in line]
    assert ids[0] == f"deep/config.json::{Q0}"
    assert ids[-1] == "deep/config.json::model"
    assert ids.index("deep/config.json::model.layers.2.mlp.up_proj") < ids.index(
        "deep/config.json::model.layers.10.self_attn.q_proj"
    )
    assert [name.rpartition(".")[2] for name in ids[:7]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip
    result.stdout.fnmatch_lines(["heavy: []"])


@pytest.mark.parametrize("where", [".", "sub", ".."])
def test_an_id_copied_from_a_failed_line_runs_that_layer_alone(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a FAILED line names can be given back to pytest, from any folder, and runs just that layer."""
    away = pytester.mkdir("sub") if where == "sub" else pytester.path
    rootdir = str(pytester.path / "runs" if where == ".." else pytester.path)
    monkeypatch.chdir(away)
    options = (f"--nullspace-calib-dataset={pytester.path}/text.txt", "--nullspace-seqlen=32")
    first = gate("--rootdir", rootdir, "--tb=no", "-rf", model=str(checkpoint), quick=options)
    failed = [line.split()[1] for line in first.outlines if line.startswith("FAILED") and "down_proj" in line]
    again = gate("--rootdir", rootdir, *LOOSE, failed[0], model=str(checkpoint), quick=options)
    again.assert_outcomes(passed=1)
    again.stdout.fnmatch_lines(["gated 1 of 21 layers: 1 green, 0 to look at, 0 red"])


def test_two_ids_of_one_checkpoint_run_two_layers(checkpoint: Path, gate: Gate) -> None:
    """Several ids can be given at once."""
    result = gate(*LOOSE, f"runs/ft/config.json::{Q0}", "runs/ft/config.json::model.layers.2.mlp.down_proj")
    result.assert_outcomes(passed=2)


def test_the_averages_can_be_asked_for_alone(checkpoint: Path, gate: Gate) -> None:
    """The id of the averages measures every layer, for a verdict on all of them."""
    result = gate(*LOOSE, "runs/ft/config.json::model")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "gated 0 of 21 layers: 0 green, 0 to look at, 0 red",
            "judged: model alone; the tests of 21 measured layers were left out or not run, and none of them would *",
        ]
    )


def test_k_deselects_and_the_averages_go_with_the_rest(checkpoint: Path, gate: Gate) -> None:
    """-k gates only the layers that it names; the averages exist only over all layers."""
    result = gate(*LOOSE, "-k", "model.layers.1.", "-v")
    result.assert_outcomes(passed=7, deselected=LAYERS + 1 - 7)
    result.stdout.fnmatch_lines(["gated 7 of 21 layers: 7 green*"])
    assert "reading" not in result.stdout.str()


def test_deselect_drops_a_layer_and_the_averages(checkpoint: Path, gate: Gate) -> None:
    """--deselect takes an id; the averages are then not over all layers."""
    result = gate(*LOOSE, f"--deselect=runs/ft/config.json::{Q0}")
    result.assert_outcomes(passed=LAYERS - 1, deselected=2)


def test_lf_runs_what_failed(checkpoint: Path, gate: Gate) -> None:
    """--lf after a failure runs only the layers that failed."""
    bounds = ("-o", f"nullspace_threshold=* leakage 5 6\n* preservation 2 3\n{Q0} preservation 0.01 0.02")
    assert gate(*bounds).ret == 1
    result = gate(*bounds, "--lf")
    assert result.parseoutcomes().get("failed") == 1
    assert "passed" not in result.parseoutcomes()


def test_x_stops_at_the_first_failure(checkpoint: Path, gate: Gate) -> None:
    """-x behaves as for any test."""
    result = gate("-x", "--nullspace-threshold=preservation:0.01:0.02")
    result.assert_outcomes(failed=1)


def test_layers_glob_narrows_the_gate(checkpoint: Path, gate: Gate) -> None:
    """--nullspace-layers gates the layers that match, says so, and then judges no averages."""
    result = gate(*LOOSE, "--nullspace-layers=*.down_proj")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*(LoRA-Null, 3 of 21 layers, rank 4)*", "gated 3 of 21 layers*"])


def test_it_needs_no_test_file_and_gates_beside_a_users_tests(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """A user's own tests run in the same session, and may be named by path without losing the gate."""
    pytester.makepyfile(test_own="def test_own(): pass")
    gate(*LOOSE).assert_outcomes(passed=LAYERS + 2)
    gate(*LOOSE, "test_own.py").assert_outcomes(passed=LAYERS + 2)
    gate(*LOOSE, "runs").assert_outcomes(passed=LAYERS + 1)


@pytest.mark.parametrize("place", ["build/ft", ".cache/ft", "dist", "node_modules/x", "../outside/ft"])
def test_no_place_hides_a_checkpoint(checkpoint: Path, gate: Gate, pytester: pytest.Pytester, place: str) -> None:
    """Folders that pytest does not recurse into, and folders outside rootdir, are gated all the same."""
    moved = pytester.path / place
    moved.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(checkpoint, moved)
    result = gate(*LOOSE, model=place)
    result.assert_outcomes(passed=LAYERS + 1)
    ids = [line for line in gate("--collect-only", "-q", model=place).outlines if "::" in line]
    assert ids[0] == (place if not place.startswith("..") else str(moved.resolve())) + f"/config.json::{Q0}"
    gate(*LOOSE, ids[0], model=place).assert_outcomes(passed=1)


def test_several_models_are_gated_in_one_run(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """--nullspace-model may be repeated: each checkpoint has its own tests, report and statistics."""
    shutil.copytree(checkpoint, pytester.path / "other")
    result = gate("--nullspace-model=other", "--nullspace-save-stats={model}.json", *LOOSE)
    result.assert_outcomes(passed=2 * (LAYERS + 1))
    result.stdout.fnmatch_lines(["*nullspace: runs/ft*", "*nullspace: other*"])
    assert json.loads((pytester.path / "ft.json").read_text())["num_layers"] == LAYERS
    assert json.loads((pytester.path / "other.json").read_text())["num_layers"] == LAYERS


def test_without_a_model_the_plugin_is_inert(pytester: pytest.Pytester) -> None:
    """With no option nothing is imported, printed or collected."""
    pytester.makepyfile(
        "import sys\n"
        "def test_own():\n"
        "    ours = {m for m in sys.modules if m.startswith('pytest_nullspace')}\n"
        "    assert ours == {'pytest_nullspace'} | {'pytest_nullspace.' + m for m in "
        "('errors', 'plugin', 'settings', 'shell', 'shell.asked', 'shell.declared', 'shell.fixtures', 'shell.options', "
        "'shell.values')}\n"
        "    assert not {'torch', 'transformers', 'datasets', 'safetensors', 'filelock'} & set(sys.modules)\n"
    )
    result = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    assert "nullspace" not in result.stdout.str().replace("plugins: ", "").split("collected")[1]


def test_p_no_nullspace_switches_it_off(checkpoint: Path, gate: Gate) -> None:
    """-p no:nullspace removes the plugin and its options, so that asking for a gate is then an error."""
    result = gate("-p", "no:nullspace")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unrecognized arguments: --nullspace-model=runs/ft*"])


def test_a_warn_tier_passes_and_warns_and_can_be_made_strict(checkpoint: Path, gate: Gate) -> None:
    """Between the bounds a layer passes with a NullspaceWarning, which -W error turns into a failure."""
    bounds = ("--nullspace-threshold=preservation:0.01:3", "--nullspace-threshold=leakage:5:6")
    brief = gate(*bounds)
    brief.stdout.fnmatch_lines([f"verdict: LOOK: {LAYERS} of {LAYERS} layers lie between the bounds of preservation"])
    assert "NullspaceWarning" not in brief.stdout.str(), "the report's own lines tell it"
    result = gate(*bounds, "-v")
    assert result.ret == brief.ret == 0
    result.assert_outcomes(passed=LAYERS + 1, warnings=LAYERS + 1)
    told = [line.partition("NullspaceWarning: ")[2] for line in result.outlines if "NullspaceWarning: " in line]
    assert told[0] == "in the warn tier: preservation >= 0.01", "told once of all layers"
    assert re.fullmatch(r"model: preservation 0\.\d+ >= 0\.01", told[1])
    assert len(told) == 2
    result.stdout.fnmatch_lines([f"*config.json: {LAYERS} warnings"])
    strict = gate(*bounds, "-v", "-W", "error::pytest_nullspace.NullspaceWarning")
    assert strict.ret == 1
    strict.assert_outcomes(failed=LAYERS + 1)
    strict.stdout.fnmatch_lines(["preservation 0.* >= 0.01", "(warnings are errors here)"])


def test_very_verbose_prints_the_references_block_for_every_layer(checkpoint: Path, gate: Gate) -> None:
    """-vv shows for each layer what the reference script shows, with one line that says what its letters mean."""
    result = gate(*LOOSE, "-vv")
    result.stdout.fnmatch_lines(
        [
            f"runs/ft/config.json::{Q0} PASSED*",
            "In the blocks X is a layer's input, BX what B, its down projection, makes of it, and*",
            f"Layer: {Q0}",
            "samples: 64",
            "input width: 32, rank: 4, output width: 32",
            "activation norms:",
            "  ||X|| (avg):           *",
            "  ||full output||:       *",
            "null-space figures:",
            "  ||BX||/||X||: *e-01  ✓",
            "adapter contribution:",
            "weight norms:  ||B||_F 2.000000   ||A||_F *",
        ]
    )
    assert sum(line.startswith("Layer: ") for line in result.outlines) == LAYERS


def test_stage_init_expects_no_update_yet(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """An initial checkpoint passes at stage init and fails as a trained one; a trained one fails at stage init."""
    tiny.lora_null(pytester.path / "init", up_scale=0.0)
    assert gate(*LOOSE, "--nullspace-stage=init", model="init").ret == 0
    as_trained = gate(*LOOSE, model="init")
    as_trained.stdout.fnmatch_lines(["FAILED *effectiveness 0 < 1e-06*"])
    trained = gate(*LOOSE, "--nullspace-stage=init")
    trained.stdout.fnmatch_lines(["FAILED *effectiveness 0.* > 0.0001*"])


def test_statistics_are_a_superset_of_the_references_json(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """--nullspace-save-stats writes the reference's keys, and what tells two runs apart."""
    assert gate(*LOOSE, "--nullspace-save-stats=out/stats.json").ret == 0
    document = json.loads((pytester.path / "out/stats.json").read_text())
    assert document["model_path"] == str(checkpoint)
    assert document["calib_dataset"] == "text.txt"
    assert document["num_layers"] == len(document["stats"]) == LAYERS
    layer = document["stats"][0]
    assert set(layer) >= {
        "layer_name", "num_samples", "X_norm", "BX_norm", "ABX_norm", "ResidualX_norm", "FullOutput_norm", "BX_ratio",
        "ABX_ratio", "adapter_contribution", "B_weight_norm", "A_weight_norm", "Residual_weight_norm",
    }  # fmt: skip
    assert layer["BX_ratio"] == pytest.approx(layer["BX_norm"] / layer["X_norm"])
    assert set(document["weights_sha256"]) == {"model.safetensors"}
    assert document["text"]["tokens"] == 64
    assert {"torch", "transformers", "pytest-nullspace"} <= set(document["libraries"])


def test_reports_carry_the_figures(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JUnit has each layer's figures as properties; Markdown goes to the file named and to GitHub's summary."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    assert gate(*LOOSE, "--junit-xml=junit.xml", "--nullspace-report=report.md").ret == 0
    junit = (pytester.path / "junit.xml").read_text()
    assert junit.count('<property name="preservation" value="0.') == LAYERS + 1
    report = (pytester.path / "report.md").read_text()
    assert report.count("\n| ✓ | model") == LAYERS
    assert (pytester.path / "summary.md").read_text().strip() == report.strip()


@pytest.mark.parametrize("mode", [("-n", "2"), ("-n", "2", "--dist=loadfile"), ("-p", "no:xdist"), ()])
def test_the_same_verdicts_and_figures_under_xdist_and_without(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, mode: tuple[str, ...]
) -> None:
    """With any number of workers, or without xdist, the model is measured once and the figures are the same."""
    pytester.makeconftest(
        "import pytest_nullspace.measuring.pipeline as s\n"
        "real = s.measure_checkpoint\n"
        "def counted(*a, **k):\n"
        "    open('measured.log', 'a').write('x')\n"
        "    return real(*a, **k)\n"
        "s.measure_checkpoint = counted\n"
    )
    result = gate(*LOOSE, *mode, "--nullspace-save-stats=stats.json")
    result.assert_outcomes(passed=LAYERS + 1)
    result.stdout.fnmatch_lines(["gated 21 of 21 layers: 21 green, 0 to look at, 0 red"])
    assert (pytester.path / "measured.log").read_text() == "x"
    got = json.loads((pytester.path / "stats.json").read_text())["stats"][0]["BX_ratio"]
    assert got == pytest.approx(0.3, rel=0.5)
    strict = gate(*mode, "-v")
    assert strict.ret == 1
    strict.stdout.fnmatch_lines(["FAILED runs/ft/config.json::model.layers.0.mlp.down_proj - Failed: leakage * > 0.75"])


USER_TESTS = """
import pytest
def test_layer(nullspace_layer):
    assert nullspace_layer.preservation < 1
    assert nullspace_layer.rows == 64
def test_run(nullspace_run):
    assert nullspace_run.complete and len(nullspace_run.layers) == 21
"""


@pytest.mark.parametrize("mode", [(), ("-n", "2")])
def test_users_tests_share_the_measurement(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, mode: tuple[str, ...]
) -> None:
    """nullspace_layer runs a user's test once per layer, nullspace_run gives them all, beside the gate."""
    pytester.makepyfile(test_own=USER_TESTS)
    gate(*LOOSE, *mode).assert_outcomes(passed=LAYERS + 1 + LAYERS + 1)
    gate(*LOOSE, *mode, f"test_own.py::test_layer[{Q0}]", "-k", "test_own").assert_outcomes(passed=1)


def test_users_tests_skip_without_a_model(pytester: pytest.Pytester) -> None:
    """Without a model the fixtures skip and say why."""
    pytester.makepyfile(test_own=USER_TESTS)
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*no --nullspace-model was given*"])


# --- no false green -------------------------------------------------------------------------------------------------


def usage_error(result: pytest.RunResult, *lines: str) -> None:
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(lines)
    assert "Traceback" not in result.stderr.str() + result.stdout.str()


def test_what_is_no_checkpoint_is_a_usage_error(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """A missing directory, a file, an empty directory and a plain model are errors, never an empty green run."""
    usage_error(gate(model="nowhere"), "ERROR: *nowhere: no such directory; give the one that training saved")
    usage_error(gate(model="text.txt"), "ERROR: *text.txt: is a file; give the directory that holds it")
    told = "; give the option once for each directory:"
    usage_error(
        gate(model="runs/f*"), f"ERROR: --nullspace-model: 'runs/f*' is a pattern*{told} 1 match, such as runs/ft"
    )
    usage_error(
        gate(model="nowhere-?"), f"ERROR: --nullspace-model: 'nowhere-?' is a pattern*{told} nothing matches it"
    )
    pytester.mkdir("empty")
    usage_error(
        gate(model="empty"), "ERROR: *empty: not a checkpoint: neither config.json nor adapter_config.json is in it*"
    )
    plain = pytester.path / "plain"
    tiny.llama().save_pretrained(plain)
    usage_error(gate(model="plain"), "ERROR: *plain: no adapted layer*was the plain model saved*merged*")
    usage_error(
        gate("--nullspace-layers=nothing.*"), "ERROR: --nullspace-layers: 'nothing.[*]' matches none of the 21*"
    )
    usage_error(gate("--nullspace-model=runs/ft"), "ERROR: --nullspace-model: *runs/ft is given twice")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("calib-size=0", "--nullspace-calib-size: takes a whole number from 1*, not '0'"),
        ("seqlen=many", "--nullspace-seqlen: takes a whole number from 1, not 'many'"),
        ("device=gpu", "--nullspace-device: takes auto, cpu, cuda, cuda:N, xpu or xpu:N, not 'gpu'"),
        ("device=mps", "*xpu:N, not 'mps': an Apple GPU has no float64, in which sums are taken; choose cpu"),
        ("dtype=int8", "--nullspace-dtype: takes auto, float32, float16 or bfloat16, not 'int8'"),
        ("stage=later", "--nullspace-stage: takes trained or init, not 'later'"),
        ("report=x.pdf", "--nullspace-report: takes a file that ends in .md, .html, .prom or .sarif, not 'x.pdf'"),
        (
            "threshold=preservation",
            "--nullspace-threshold: takes [[]GLOB:]FIGURE:PASS:FAIL, such as *, not 'preservation'",
        ),
        ("threshold=beauty:1:2", "--nullspace-threshold: no figure 'beauty' is judged at stage trained*"),
        ("threshold=preservation:0.5:0.1", "--nullspace-threshold: preservation: lower is better, so PASS 0.5 *"),
        ("threshold=preservation:nan:1", "--nullspace-threshold: takes finite bounds, not 'preservation:nan:1'"),
    ],
)
def test_a_bad_option_is_a_usage_error_that_says_what_it_takes(
    checkpoint: Path, gate: Gate, option: str, message: str
) -> None:
    """A value that an option does not take ends pytest with exit code 4 and one sentence."""
    usage_error(gate(f"--nullspace-{option}"), f"ERROR: {message}")


def test_a_selection_that_leaves_nothing_is_not_green(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """Deselecting every layer beside passing tests of one's own fails: a gate of no layers has gated nothing."""
    pytester.makepyfile(test_own="def test_own(): pass")
    result = gate("-k", "test_own")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["nullspace: NOT GATED: no layer was gated*"])
    assert gate("-k", "nothing_at_all").ret == pytest.ExitCode.NO_TESTS_COLLECTED


SABOTAGE = {
    "skip marks": (
        "import pytest\ndef pytest_collection_modifyitems(items):\n    for i in items: i.add_marker(pytest.mark.skip)\n"
    ),
    "skip in setup": "import pytest\ndef pytest_runtest_setup(item): pytest.skip('no')\n",
    "protocol taken over": "def pytest_runtest_protocol(item, nextitem): return True\n",
    "exit 0": "import pytest\ndef pytest_runtest_teardown(): pytest.exit('enough', returncode=0)\n",
    "items cleared": "def pytest_collection_finish(session): session.items.clear()\n",
    "one item dropped at the end": "def pytest_collection_finish(session): del session.items[3]\n",
    "items removed unsaid": "def pytest_collection_modifyitems(items): del items[5:]\n",
    "items removed last": (
        "import pytest\n@pytest.hookimpl(trylast=True)\n"
        "def pytest_collection_modifyitems(items): items[:] = [i for i in items if i.name != 'model']\n"
    ),
    "items never collected": (
        "import pytest\n@pytest.hookimpl(wrapper=True)\ndef pytest_make_collect_report(collector):\n"
        "    report = yield\n    report.result = report.result[:5]\n    return report\n"
    ),
    "loop taken over": "def pytest_runtestloop(session): return True\n",
}
ON_WORKERS = (
    "skip marks",
    "protocol taken over",
    "exit 0",
    "items removed unsaid",
    "items removed last",
    "items never collected",
)


@pytest.mark.parametrize(
    ("how", "mode"),
    [(how, ()) for how in SABOTAGE] + [(how, ("-n", "2")) for how in ON_WORKERS],
)
def test_what_was_not_judged_is_not_green(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, how: str, mode: tuple[str, ...]
) -> None:
    """Whatever a conftest does to keep layers from being judged, the run does not exit 0."""
    pytester.makeconftest(SABOTAGE[how])
    assert gate(*LOOSE, *mode).ret != 0


def test_a_removed_test_is_told_by_its_name(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """What a conftest removes without deselecting comes back as an error that says so; what it deselects does not."""
    pytester.makeconftest(
        "def pytest_collection_modifyitems(config, items):\n"
        "    config.hook.pytest_deselected(items=items[7:])\n"
        "    del items[6:]\n"
    )
    result = gate(*LOOSE)
    assert result.ret == 1
    result.assert_outcomes(passed=6, errors=1, deselected=LAYERS + 1 - 7)
    result.stdout.fnmatch_lines(["ERROR runs/ft/config.json::* - Failed: *: a conftest file or plugin removed this *"])


def test_the_gate_cannot_be_blocked_behind_its_option(checkpoint: Path, gate: Gate) -> None:
    """-p no:nullspace-gate would leave the option without its gate, so it is an error."""
    usage_error(gate("-p", "no:nullspace-gate"), "ERROR: *the gate is blocked by -p no:nullspace-gate")


@pytest.mark.parametrize("option", ["--setup-only", "--setup-plan", "--fixtures"])
def test_a_run_without_calls_is_not_green(checkpoint: Path, gate: Gate, option: str) -> None:
    """--setup-only and --setup-plan run no test, so the gate does not pass; --fixtures does not gate at all."""
    assert (gate(*LOOSE, option).ret == 0) == (option == "--fixtures")


def test_an_xfail_of_the_users_own_is_accepted(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """A layer that the user marks as expected to fail is measured and does not fail the run."""
    pytester.makeconftest(
        "import pytest\n"
        "def pytest_collection_modifyitems(items):\n"
        f"    for i in items:\n        if i.name in ('{Q0}', 'model'): i.add_marker(pytest.mark.xfail)\n"
    )
    result = gate("-o", f"nullspace_threshold=* preservation 2 3\n* leakage 5 6\n{Q0} preservation 0.01 0.02")
    assert result.ret == 0
    assert result.parseoutcomes()["xfailed"] == 1


def test_a_failed_measurement_is_told_once_per_layer_and_made_once(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """What prevents the measurement is an error of every item, told whole by one, and is not tried again."""
    for mode in ((), ("-n", "2")):
        result = gate("--nullspace-seqlen=300", *mode)
        assert result.ret == 1
        result.assert_outcomes(errors=LAYERS + 1)
        assert sum("300 tokens are more than the 256" in line for line in result.outlines if "ERROR" in line) == 1
        assert "Traceback" not in result.stdout.str()


def test_a_worker_that_dies_while_measuring_fails_the_run(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """A worker killed inside the pass neither hangs the others nor has them try it again."""
    pytester.makeconftest(
        "import os, pytest_nullspace.measuring.pipeline as s\n"
        "def killed(*a, **k):\n"
        "    open('measured.log', 'a').write('x')\n"
        "    os.kill(os.getpid(), 9)\n"
        "s.measure_checkpoint = killed\n"
    )
    result = gate("-n", "2", *LOOSE)
    assert result.ret == 1
    assert (pytester.path / "measured.log").read_text() == "x"
    result.stdout.fnmatch_lines(["*the worker that measured this checkpoint died*"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["ALinear.weight", "BLinear.weight", "weight_residual"])
def test_a_non_finite_weight_fails_by_the_name_of_its_layer(
    pytester: pytest.Pytester, checkpoint: Path, gate: Gate, part: str, value: float
) -> None:
    """NaN or infinity in one weight fails that layer, and the averages with it."""
    name = "model.layers.2.mlp.down_proj"

    def poison(tensors: dict[str, object], _: object) -> None:
        tensors[f"{name}.{part}"][1, 1] = value  # type: ignore[index]

    tiny.lora_null(pytester.path / "sick", change=poison)  # type: ignore[arg-type]
    result = gate(*LOOSE, model="sick")
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"FAILED sick/config.json::{name} - Failed: non-finite weights*"])
    result.stdout.fnmatch_lines(["FAILED sick/config.json::model - Failed: * of 21 layers could not be judged*"])


def test_float16_overflow_fails_and_is_named(pytester: pytest.Pytester, checkpoint: Path, gate: Gate) -> None:
    """An output beyond float16's range is told as non-finite, never averaged away."""

    def enlarge(tensors: dict[str, object], _: object) -> None:
        tensors["model.layers.1.mlp.up_proj.ALinear.weight"] *= 60000.0 / 4  # type: ignore[operator]

    tiny.lora_null(pytester.path / "loud", change=enlarge)  # type: ignore[arg-type]
    result = gate(*LOOSE, "--nullspace-dtype=float16", model="loud")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["FAILED loud/config.json::model.layers.1.* - Failed: non-finite*"])


def test_statistics_that_cannot_be_written_fail_the_run(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """A green run whose statistics could not be saved is not green."""
    pytester.mkdir("taken.json")
    result = gate(*LOOSE, "--nullspace-save-stats=taken.json")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["nullspace: NOT GATED: *taken.json: cannot be written*"])


def test_ini_twins_hold_and_their_paths_are_relative_to_the_ini_file(
    checkpoint: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option can stand in an ini file; the command line wins over it. The predictions are a test by default."""
    (pytester.path / "pytest.ini").write_text(
        "[pytest]\nnullspace_model = runs/ft\nnullspace_calib_dataset = text.txt\nnullspace_seqlen = 32\n"
        "nullspace_calib_size = 3\nnullspace_threshold =\n    * preservation 2 3\n    *.down_proj leakage 5 6\n"
        "    *_proj leakage 5 6\n    model leakage 5 6\n"
    )
    monkeypatch.chdir(pytester.mkdir("elsewhere"))
    result = pytester.runpytest_subprocess("-p", "no:randomly")
    result.assert_outcomes(passed=LAYERS + 2)
    result.stdout.fnmatch_lines(["96 tokens*"])
    again = pytester.runpytest_subprocess("-p", "no:randomly", "--nullspace-calib-size=2", "--nullspace-no-drift")
    again.assert_outcomes(passed=LAYERS + 1)
    again.stdout.fnmatch_lines(["64 tokens*"])


def test_progress_shows_on_a_terminal_and_leaves_no_trace(checkpoint: Path, pytester: pytest.Pytester) -> None:
    """On a tty one line counts the windows while the first item measures; the report after it is whole."""
    output = bytearray()

    def read(terminal: int) -> bytes:
        data = os.read(terminal, 4096)
        output.extend(data)
        return data

    one_by_one = "--nullspace-batch-size=1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:randomly",
        "--nullspace-model=runs/ft",
        *QUICK,
        *LOOSE,
        one_by_one,
    ]
    assert pty.spawn(command, read) == 0
    shown = output.decode()
    assert "nullspace: window 1 of 2" in shown
    assert "nullspace: window 2 of 2" in shown
    after = shown.rpartition("nullspace: window 2 of 2")[2]
    assert "runs/ft/config.json " in after
    assert "gated 21 of 21 layers: 21 green" in after


NO_MEMORY = """
import torch


def full(module, args, output):
    if type(module).__name__ == "LlamaDecoderLayer" and len(output) > {most}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


torch.nn.modules.module.register_module_forward_hook(full)
"""
"""A conftest under which a forward of more than ``most`` windows fails as on a GPU whose memory is full."""


def test_a_batch_that_did_not_fit_is_told(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """The gate goes on with half the windows a forward, says so once, and gates every layer."""
    pytester.makeconftest(NO_MEMORY.format(most=2))
    result = gate(*LOOSE, "--nullspace-calib-size=6", "--nullspace-batch-size=6", "--nullspace-save-stats=s.json")
    result.assert_outcomes(passed=22)
    result.stdout.fnmatch_lines(["*no memory for 6 windows a forward, so 1"])
    assert json.loads((pytester.path / "s.json").read_text())["measured"]["batch_sizes"] == [6, 3, 1]


def test_a_window_that_does_not_fit_is_told_as_one(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """Where batches were halved down to one window and it was refused as well, no smaller batch is advised."""
    pytester.makeconftest(NO_MEMORY.format(most=0))
    result = gate("--nullspace-calib-size=6", "--nullspace-batch-size=6")
    result.stdout.fnmatch_lines(
        [
            "*ft: too little memory in the pass of windows of 32 tokens, 1 a forward, in float32 on cpu; lower "
            "--nullspace-seqlen, or take --nullspace-dtype=bfloat16"
        ]
    )
    halved = gate("--nullspace-calib-size=6", "--nullspace-dtype=bfloat16")
    halved.stdout.fnmatch_lines(["*ft: too little memory in the pass * in bfloat16 on cpu; lower --nullspace-seqlen"])


REFUSED = """
import torch
import {module}


def full(*args, **more):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


{module}.{function} = full
"""
"""A conftest under which a function meets a GPU whose memory is full."""


@pytest.mark.parametrize(
    ("module", "function", "told"),
    [
        (
            "pytest_nullspace.measuring.spectrum",
            "spectrum",
            "for the spectrum, * in float32 on cpu; leave --nullspace-spectrum out, or lower --nullspace-seqlen",
        ),
        (
            "pytest_nullspace.model",
            "load_plain",
            "to load the base *base beside the model for --nullspace-drift, in float32 on cpu; take "
            "--nullspace-dtype=bfloat16, take a machine with more, or leave --nullspace-drift out",
        ),
        (
            "pytest_nullspace.measuring.drift",
            "compared",
            "in the pass of windows of 32 tokens, 1 a forward, in float32 on cpu; lower --nullspace-seqlen, take "
            "--nullspace-dtype=bfloat16, or give --nullspace-no-drift",
        ),
    ],
    ids=["spectrum", "load", "drift"],
)
def test_memory_that_lacks_is_told_with_its_own_cure(
    module: str, function: str, told: str, checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """Spectrum and drift, and the base that drift loads, each say what was too much and what helps there."""
    tiny.llama().save_pretrained(pytester.path / "base")
    pytester.makeconftest(REFUSED.format(module=module, function=function))
    result = gate("--nullspace-drift", "--nullspace-spectrum", "--nullspace-base=base")
    result.assert_outcomes(errors=23)
    result.stdout.fnmatch_lines([f"*ft: too little memory {told}"])


def test_where_the_time_went_is_told_on_request(checkpoint: Path, gate: Gate) -> None:
    """With ``-v``, and not without, the report tells the seconds of each part of the start-up and of the pass."""
    part = r"\d+\.\d s"
    line = (
        f"start-up: text {part}, imports {part}, model {part}, windows {part}; measuring {part}; "
        f"waiting for the weights' hashes {part}"
    )
    gate(*LOOSE, "-v").stdout.re_match_lines([line])
    gate(*LOOSE).stdout.no_re_match_line("start-up")
