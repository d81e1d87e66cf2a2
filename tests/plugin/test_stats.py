"""Gating saved runs: the same tests, tiers and reports, without a model and without torch."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import saved
from tests.plugin.conftest import LOOSE, Gate, Replay

LAYERS = len(saved.NAMES)
Q0 = saved.NAMES[0]
HEAVY = "{'torch', 'numpy', 'transformers', 'datasets', 'safetensors', 'pyarrow'}"


def test_a_saved_run_has_the_same_tests_and_reports(replay: Replay, pytester: pytest.Pytester) -> None:
    """Each layer is a test under the file's own path, the averages too, with header, summary, Markdown and JUnit."""
    result = replay("--nullspace-report=report.md", "--junit-xml=junit.xml", "-vv")
    result.assert_outcomes(passed=LAYERS + 1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "nullspace: *stats.json (saved run of runs/ft, 9 of 9 layers); text text.txt; nothing is measured now",
            f"stats.json::{Q0} PASSED*",
            "stats.json::model PASSED*",
            "*nullspace: stats.json*",
            f"Layer: {Q0}",
            "gated 9 of 9 layers: 9 green, 0 to look at, 0 red",
            "reading (averages over all layers):",
        ]
    )
    assert (pytester.path / "report.md").read_text().count("\n| ✓ | model") == LAYERS
    assert '<property name="leakage" value="0.016"' in (pytester.path / "junit.xml").read_text()


@pytest.mark.parametrize("mode", [(), ("-n", "2")])
def test_torch_is_never_imported(
    replay: Replay, pytester: pytest.Pytester, mode: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that gates needs nothing heavy, in the controller and in every worker."""
    pytester.makeconftest(
        "import sys\n"
        "def pytest_sessionfinish(session):\n"
        f"    assert not {HEAVY} & set(sys.modules), sorted({HEAVY} & set(sys.modules))\n"
    )
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # another plugin may import it
    plugins = "-p", "pytest_nullspace.plugin", *(("-p", "xdist") if mode else ())
    result = replay(*plugins, *mode, apart=True)
    result.assert_outcomes(passed=LAYERS + 1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["gated 9 of 9 layers: 9 green*"])


def test_tiers_thresholds_and_stage_hold_as_for_a_measured_run(replay: Replay, pytester: pytest.Pytester) -> None:
    """A layer beyond its bound fails by its figure, with an id that runs it alone when copied."""
    saved.save(pytester.path / "bad.json", saved.run(down_norm=6.0))
    result = replay(stats="bad.json")
    assert result.ret == 1
    result.assert_outcomes(failed=1, passed=LAYERS, warnings=1)
    result.stdout.fnmatch_lines([f"FAILED bad.json::{Q0} - Failed: preservation 0.75 > 0.5"])
    again = replay(f"bad.json::{Q0}", stats="bad.json")
    again.assert_outcomes(failed=1)
    again.stdout.fnmatch_lines(["gated 1 of 9 layers: 0 green, 0 to look at, 1 red"])
    replay("--nullspace-threshold=preservation:1:2", stats="bad.json").assert_outcomes(passed=LAYERS + 1)
    assert replay("--nullspace-stage=init").ret == 1


@pytest.mark.parametrize("mode", [(), ("-n", "2")])
def test_selection_works_as_for_any_test(replay: Replay, mode: tuple[str, ...]) -> None:
    """-k gates what it names and says how much that is; the averages go with the rest."""
    result = replay("-k", "layers.1.", *mode)
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["gated 3 of 9 layers: 3 green*"])
    replay("--nullspace-layers=*.down_proj", *mode).assert_outcomes(passed=3)


def test_a_measured_run_is_replayed_with_the_same_verdicts(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """What was measured and saved gives, replayed elsewhere, the same failures and the same table."""

    def told(result: pytest.RunResult) -> list[str]:
        lines = [line for line in result.outlines if line.startswith(("FAILED", "gated", "✗", "✓", "⚠"))]
        return [line.replace("runs/ft/config.json", "ft.json") for line in lines]

    measured = gate("--tb=no", "--nullspace-save-stats={model}.json")
    replayed = pytester.runpytest_subprocess("-p", "no:randomly", "--tb=no", "--nullspace-stats=ft.json")
    assert measured.ret == replayed.ret == 1
    assert told(measured) == told(replayed)
    both = gate(*LOOSE, "--nullspace-stats=ft.json")
    both.assert_outcomes(passed=2 * (21 + 1))


def test_users_tests_get_the_saved_figures(replay: Replay, pytester: pytest.Pytester) -> None:
    """nullspace_layer and nullspace_run are of the saved run."""
    pytester.makepyfile(
        "def test_layer(nullspace_layer): assert nullspace_layer.leakage < 0.1\n"
        "def test_run(nullspace_run): assert nullspace_run.complete\n"
    )
    replay().assert_outcomes(passed=2 * (LAYERS + 1))


def test_the_references_file_is_gated_without_what_it_lacks(replay: Replay, pytester: pytest.Pytester) -> None:
    """Leakage, which the reference does not measure, is told as absent and judged nowhere; the rest is gated."""
    saved.reference(pytester.path / "ref.json")
    result = replay("-vv", "--junit-xml=junit.xml", "--nullspace-report=r.md", stats="ref.json")
    result.assert_outcomes(passed=LAYERS + 1)
    result.stdout.fnmatch_lines(
        ["  leakage / chance:      –", "not measured: leakage; left out of judging", "* average * –*"]
    )
    assert 'name="leakage"' not in (pytester.path / "junit.xml").read_text()
    assert "not measured: leakage" in (pytester.path / "r.md").read_text()
    assert "nan" not in result.stdout.str()


def test_a_figure_that_is_no_number_fails(replay: Replay, pytester: pytest.Pytester) -> None:
    """A leakage of null was measured and is not finite: that is no absence, and it fails."""
    saved.save(pytester.path / "nan.json", saved.run(mean_leakage=math.nan))
    result = replay(stats="nan.json")
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"FAILED nan.json::{Q0} - Failed: leakage nan is not finite"])


def test_a_partial_run_has_no_averages_to_judge(replay: Replay, pytester: pytest.Pytester) -> None:
    """A run that was measured in part gates its layers and says of how many; it has no test `model`."""
    saved.save(pytester.path / "part.json", saved.run(*saved.NAMES[:4], of=9))
    result = replay(stats="part.json")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["gated 4 of 9 layers: 4 green, 0 to look at, 0 red"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: d["stats"][1].update(BX_norm=0.01),
            "stats[[]1]: BX_ratio is 0.03125, but BX_norm / X_norm is 0.00125; the file was edited or damaged*",
        ),
        (lambda d: d.update(stats=[], num_layers=0), "holds no layer, so there is nothing to gate"),
        (
            lambda d: d["stats"][0].update(layer_name="a::b[c]"),
            "'a::b[[]c[]]' is not the name of a layer; measure again",
        ),
        (lambda d: d["stats"][0].update(layer_name="model"), "'model' is not the name of a layer; measure again"),
    ],
)
def test_what_no_run_can_hold_is_a_usage_error(
    replay: Replay, pytester: pytest.Pytester, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    """Ratios that do not follow from their norms, no layers, and names that no test can have end pytest at once."""
    document = json.loads((pytester.path / "stats.json").read_text())
    change(document)
    (pytester.path / "edited.json").write_text(json.dumps(document))
    result = replay(stats="edited.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *edited.json: {said}"])


@pytest.mark.parametrize("figure", ["forgetting", "divergence", "task-gain", "leakage"])
def test_a_bound_on_what_no_saved_run_tells_is_refused(replay: Replay, pytester: pytest.Pytester, figure: str) -> None:
    """Of what a saved run does not hold no bound can be set; it is enough that one of several runs holds it."""
    saved.reference(pytester.path / "ref.json")
    bound = f"--nullspace-threshold={figure}:{'2:1' if figure == 'task-gain' else '1:2'}"
    refused = replay(bound, stats="ref.json")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines([f"ERROR: --nullspace-threshold: {figure} is not measured of *ref.json; measure *"])
    saved.save(pytester.path / "full.json", saved.full())
    assert replay(bound, "--nullspace-stats=full.json", stats="ref.json").ret != pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("*.dwn_proj preservation 0.2 0.6", "model.layers.0.mlp.down_proj"),
        ("modle preservation 0.2 0.6", "model"),
        ("*.down_proj divergence 0.2 0.6", "drift"),
        ("drift preservation 0.2 0.6", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_line_that_would_never_apply_is_refused(
    replay: Replay, pytester: pytest.Pytester, line: str, nearest: str
) -> None:
    """A glob that names no layer, nor the averages or the drift, is told with the line and the nearest names."""
    whole = dataclasses.replace(saved.run(), drift=saved.full().drift)
    saved.save(pytester.path / "whole.json", whole)
    refused = replay("-o", f"nullspace_threshold={line}", stats="whole.json")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    (said,) = [text for text in refused.errlines if text.startswith("ERROR: ")]
    assert said.startswith(f"ERROR: nullspace_threshold: '{line}' would never apply: it matches no test of ")
    assert nearest in said.partition("the nearest")[2]
    assert "Traceback" not in refused.stderr.str()


def test_a_line_may_name_what_is_not_selected(replay: Replay, pytester: pytest.Pytester) -> None:
    """Lines are held against all layers, those left out by --nullspace-layers too, of any of the runs."""
    saved.save(pytester.path / "other.json", saved.run("other.a", "other.b"))
    saved.save(pytester.path / "part.json", saved.run(*saved.NAMES[:4], of=9))
    lines = "*.down_proj preservation 1 2\nmodel leakage 1 2"
    replay("-o", f"nullspace_threshold={lines}", "--nullspace-layers=*.q_proj").assert_outcomes(passed=3)
    both = f"nullspace_threshold={lines}\nother.* leakage 1 2"
    replay("-o", both, "--nullspace-stats=other.json").assert_outcomes(passed=LAYERS + 1 + 3)
    assert replay("-o", both).ret == pytest.ExitCode.USAGE_ERROR
    replay("-o", both, stats="part.json").assert_outcomes(passed=4)  # for it does not tell what the other layers are


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON: *"),
        (b"", "not JSON: *"),
        (b"\xff\xfe", "not JSON: not UTF-8 text (byte 0)"),
        (b"[]", "not a statistics file: it has no list 'stats'"),
        (None, "the statistics file cannot be read: No such file or directory"),
    ],
)
def test_what_is_no_saved_run_is_a_usage_error(
    replay: Replay, pytester: pytest.Pytester, content: bytes | None, said: str
) -> None:
    """Broken JSON, another file and a missing one end pytest with exit code 4 and one sentence."""
    if content is not None:
        (pytester.path / "x.json").write_bytes(content)
    result = replay(stats="x.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *x.json: {said}*"])
    assert "Traceback" not in result.stderr.str()


def test_a_saved_run_is_never_written_over(replay: Replay, pytester: pytest.Pytester) -> None:
    """Saving a part of a run over the run it was read from is refused; so is the same file twice."""
    before = (pytester.path / "stats.json").read_bytes()
    result = replay("--nullspace-save-stats=stats.json", "-k", "layers.0")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --nullspace-save-stats: *stats.json would replace what --nullspace-stats*"])
    assert (pytester.path / "stats.json").read_bytes() == before
    twice = replay("--nullspace-stats=stats.json")
    assert twice.ret == pytest.ExitCode.USAGE_ERROR
    twice.stderr.fnmatch_lines(["ERROR: --nullspace-stats: *stats.json is given twice"])


def test_the_ini_twin_holds(replay: Replay, pytester: pytest.Pytester) -> None:
    """nullspace_stats in an ini file, relative to that file, gates alone."""
    (pytester.path / "pytest.ini").write_text("[pytest]\nnullspace_stats = stats.json\n")
    pytester.runpytest_subprocess("-p", "no:randomly").assert_outcomes(passed=LAYERS + 1)


def test_strict_scope_holds_for_a_saved_run_that_tells(replay: Replay, pytester: pytest.Pytester) -> None:
    """A saved run of an adapter names what was trained outside its layers; one that does not say is refused."""
    refused = replay("--nullspace-strict-scope")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: --nullspace-strict-scope: *stats.json does not tell what was trained*"])
    about = {**saved.ABOUT, "base": "base", "outside": ["base_model.model.model.norm.weight"]}
    saved.save(pytester.path / "peft.json", dataclasses.replace(saved.run(), about=about))
    result = replay("--nullspace-strict-scope", stats="peft.json")
    result.assert_outcomes(passed=LAYERS + 1, failed=1)
    result.stdout.fnmatch_lines(["FAILED peft.json::scope - *1 whole weights (model.norm.weight)"])
