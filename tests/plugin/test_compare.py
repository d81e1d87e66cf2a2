"""Run against run in the gate: regressions, layers that come and go, and runs that do not compare."""

import dataclasses
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import saved, tiny
from tests.plugin.conftest import LOOSE, Gate, Replay

LAYERS = len(saved.NAMES)
Q0 = saved.NAMES[0]
AGAINST = ("--nullspace-compare=before.json", "--nullspace-compare-fail=preservation:5%")


@pytest.fixture
def before(pytester: pytest.Pytester) -> Path:
    """An earlier run, the same as ``stats.json`` of the replay fixture."""
    return saved.save(pytester.path / "before.json")


def test_an_equal_run_passes_and_the_baseline_stays_as_it_was(
    replay: Replay, before: Path, pytester: pytest.Pytester
) -> None:
    """Nothing became worse: green, the comparison is in both reports, and the earlier file is not touched."""
    content, written = before.read_bytes(), before.stat().st_mtime_ns
    result = replay(*AGAINST, "--nullspace-report=r.md", "--nullspace-save-stats=new.json")
    result.assert_outcomes(passed=LAYERS + 1)
    result.stdout.fnmatch_lines(
        [
            "against *before.json: 0 of 9 layers are worse than allowed; no change; unpaired: the earlier run does not "
            "tell what each window gave",
        ]
    )
    assert "0 of 9 layers are worse than allowed" in (pytester.path / "r.md").read_text()
    assert (before.read_bytes(), before.stat().st_mtime_ns) == (content, written)


@pytest.mark.parametrize("mode", [(), ("-n", "2")])
def test_a_layer_fails_on_its_own_regression(
    replay: Replay, before: Path, pytester: pytest.Pytester, mode: tuple[str, ...]
) -> None:
    """Only the layer that became worse fails, by figure and limit, although it still passes its thresholds."""
    saved.save(pytester.path / "now.json", saved.run(down_norm=0.28))
    result = replay(*AGAINST, *mode, stats="now.json")
    assert result.ret == 1
    result.assert_outcomes(failed=1, passed=LAYERS)
    result.stdout.fnmatch_lines(
        [f"FAILED now.json::{Q0} - Failed: preservation 0.03125 → 0.035 (+12.000%) is worse by more than 5%"]
    )
    result.stdout.fnmatch_lines(["gated 9 of 9 layers: 8 green, 0 to look at, 1 red", "✗ *is worse by more than 5%"])
    loose = replay("--nullspace-compare=before.json", "--nullspace-compare-fail=preservation:0.01", stats="now.json")
    loose.assert_outcomes(passed=LAYERS + 1)


def test_missing_and_new_layers_fail(replay: Replay, before: Path, pytester: pytest.Pytester) -> None:
    """A layer that the earlier run does not have fails, and so does a test in the name of each that is gone."""
    saved.save(pytester.path / "now.json", saved.run(*saved.NAMES[1:], "model.layers.9.mlp.up_proj"))
    result = replay("--nullspace-compare=before.json", stats="now.json")
    result.assert_outcomes(failed=2, passed=LAYERS)
    result.stdout.fnmatch_lines(
        [
            "FAILED now.json::model.layers.9.mlp.up_proj - Failed: new: the earlier run has no such layer",
            f"FAILED now.json::{Q0} - Failed: missing: only the earlier run *before.json has this layer",
        ]
    )
    alone = replay("--nullspace-compare=before.json", f"now.json::{Q0}", stats="now.json")
    assert alone.ret == 1
    glob = replay("--nullspace-compare=before.json", "--nullspace-layers=*.1.*", stats="now.json")
    glob.assert_outcomes(passed=3)


def test_a_selection_is_no_missing_layer(replay: Replay, before: Path) -> None:
    """Layers that -k leaves out are not missing from the run."""
    replay(*AGAINST, "-k", "layers.1.").assert_outcomes(passed=3)


def test_runs_that_do_not_compare_are_refused_unless_allowed(
    replay: Replay, before: Path, pytester: pytest.Pytester
) -> None:
    """Other text and seed: exit code 4 with both named and the options that allow them."""
    about = {
        **saved.ABOUT,
        "text": {**saved.ABOUT["text"], "sha256": "f" * 64},
        "settings": {**saved.ABOUT["settings"], "seed": 7},
    }
    saved.save(pytester.path / "now.json", dataclasses.replace(saved.run(), about=about))
    refused = replay(*AGAINST, stats="now.json")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(
        [
            "ERROR: --nullspace-compare: not comparable: text (ffffffffffff, was 000000000000); seed (7, was 42): "
            "this run of *now.json, and *before.json; measure both alike, or allow it by "
            "--nullspace-compare-allow=text --nullspace-compare-allow=seed"
        ]
    )
    one = replay(*AGAINST, "--nullspace-compare-allow=seed", stats="now.json")
    assert one.ret == pytest.ExitCode.USAGE_ERROR
    both = replay(*AGAINST, "--nullspace-compare-allow=seed", "--nullspace-compare-allow=text", stats="now.json")
    both.assert_outcomes(passed=LAYERS + 1)


def test_a_reference_file_is_a_baseline_if_one_allows_what_it_does_not_tell(
    replay: Replay, pytester: pytest.Pytester
) -> None:
    """The reference records neither text nor seed: refused by default, compared by name."""
    saved.reference(pytester.path / "before.json")
    assert replay(*AGAINST).ret == pytest.ExitCode.USAGE_ERROR
    allowed = ("--nullspace-compare-allow=unrecorded", "--nullspace-compare-allow=figures")
    replay(*AGAINST, *allowed).assert_outcomes(passed=LAYERS + 1)


def test_a_limit_on_what_neither_run_tells_is_refused(replay: Replay, before: Path, pytester: pytest.Pytester) -> None:
    """A figure needs both runs to compare it, a saved one and an earlier one alike; else its limit limits nothing."""
    limit = ("--nullspace-compare=before.json", "--nullspace-compare-fail=forgetting:5%")
    refused = replay(*limit)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(
        [
            "ERROR: --nullspace-compare-fail: forgetting is not measured of *stats.json; measure with "
            "--nullspace-task-dataset, or leave the bound out"
        ]
    )
    saved.save(pytester.path / "full.json", saved.full())
    allowed = [f"--nullspace-compare-allow={what}" for what in ("figures", "unrecorded")]
    one_sided = replay(*limit, *allowed, stats="full.json")
    assert one_sided.ret == pytest.ExitCode.USAGE_ERROR
    one_sided.stderr.fnmatch_lines(["ERROR: *: forgetting is not measured of *before.json; *"])
    saved.save(before, saved.full())
    assert replay(*limit, stats="full.json").ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("compare=nowhere.json",),
            "*nowhere.json: the statistics file cannot be read: No such file or directory; give*",
        ),
        (("compare-fail=leakage:5%",), "--nullspace-compare-fail: needs an earlier run to compare with*"),
        (("compare-allow=text",), "--nullspace-compare-allow: needs an earlier run to compare with*"),
        (
            ("compare=before.json", "compare-fail=beauty:5%"),
            "--nullspace-compare-fail: no figure 'beauty' is judged at stage trained; there are preservation*",
        ),
        (("compare=before.json", "compare-fail=leakage"), "--nullspace-compare-fail: takes FIGURE:5% or FIGURE:0.001*"),
        (("compare=before.json", "compare-fail=leakage:-1"), "--nullspace-compare-fail: takes FIGURE:5%*"),
        (("compare=before.json", "compare-fail=leakage:nan%"), "--nullspace-compare-fail: takes FIGURE:5%*"),
        (("compare=before.json", "compare-allow=mood"), "--nullspace-compare-allow: takes text, *windows,*not 'mood'"),
        (
            ("compare=before.json", "save-stats=before.json"),
            "--nullspace-save-stats: *before.json would replace what --nullspace-compare reads; give another name",
        ),
        (
            ("compare=before.json", "stats=before.json"),
            "--nullspace-compare: *before.json would be of several models at once; put {model} into its name*",
        ),
    ],
)
def test_what_cannot_be_compared_is_a_usage_error(
    replay: Replay, before: Path, options: tuple[str, ...], said: str
) -> None:
    """Each bad use of the options ends pytest with exit code 4 and one sentence."""
    result = replay(*(f"--nullspace-{option}" for option in options))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {said}"])


def test_a_measured_run_is_compared_too(checkpoint: Path, gate: Gate) -> None:
    """Against itself a checkpoint passes; measured on other windows it errs in every item with what differs."""
    assert gate(*LOOSE, "--nullspace-save-stats=before.json").ret == 0
    again = gate(*LOOSE, *AGAINST, "-n", "2")
    again.assert_outcomes(passed=21 + 1)
    again.stdout.fnmatch_lines(["against *before.json: 0 of 21 layers are worse than allowed; no change"])
    assert again.stdout.str().count("no change") == 1
    other = gate(*LOOSE, *AGAINST, "--nullspace-seed=7", "-k", "layers.0.")
    assert other.ret == pytest.ExitCode.USAGE_ERROR
    text = (checkpoint.parents[1] / "text.txt").read_text()
    (checkpoint.parents[1] / "text.txt").write_text(text.upper())
    late = gate(*LOOSE, *AGAINST, "-k", "layers.0.")
    assert late.ret == 1
    late.stdout.fnmatch_lines(["ERROR *not comparable: text (*"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("seqlen=16",), "seqlen (16, was 32)"),
        (("seed=7",), "seed (7, was 42)"),
        (("calib-size=3", "seqlen=8"), "windows (3, was 16); seqlen (8, was 32)"),
    ],
)
def test_what_is_known_early_is_refused_before_the_pass(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, options: tuple[str, ...], said: str
) -> None:
    """Settings, ranks and widths that cannot compare end pytest before the text is sought or a model loaded."""
    spec = {"in_features": 32, "rank": 4, "out_features": 32}
    run = saved.run("model.layers.0.self_attn.q_proj", **spec)
    saved.save(pytester.path / "before.json", run)
    asked = {"calib-size": "16", "seqlen": "32", **dict(option.split("=") for option in options)}
    given = [f"--nullspace-{name}={value}" for name, value in asked.items()]
    against, quick = ("--nullspace-compare=before.json",), ("--nullspace-calib-dataset=nowhere.txt",)
    refused = gate(*given, *against, quick=quick)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines([f"ERROR: --nullspace-compare: not comparable: {said}: this run of *"])
    saved.save(
        pytester.path / "before.json", dataclasses.replace(run, layers=(dataclasses.replace(run.layers[0], rank=8),))
    )
    ranks = gate("--nullspace-calib-size=16", "--nullspace-seqlen=32", *against, quick=quick)
    ranks.stderr.fnmatch_lines(
        ["ERROR: --nullspace-compare: not comparable: rank (model.layers.0.self_attn.q_proj: 4, *"]
    )


def test_on_the_same_windows_a_change_is_told_with_its_own_margin(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """A louder B fails its layer by the difference and its margin, and so do the predictions that changed by it."""
    drift = ("--nullspace-drift", "--nullspace-base=base", "--nullspace-threshold=divergence:9:9")
    tiny.llama().save_pretrained(pytester.path / "base")
    file = checkpoint / "model.safetensors"

    def louder(times: float) -> None:
        tensors = load_file(file)
        save_file({name: t * times if name.endswith("BLinear.weight") else t for name, t in tensors.items()}, file)

    louder(0.1)  # so that the base is not drowned
    gate(*LOOSE, *drift, "--nullspace-save-stats=before.json")
    louder(1.5)
    result = gate(*LOOSE, *drift, *AGAINST, "--nullspace-compare-fail=divergence:1e-9")
    result.stdout.fnmatch_lines(
        [
            f"*{Q0} - Failed: preservation *(+50.000%), worse by * ± *: more than the 5% allowed*",
            "*drift - Failed: divergence * → * (*%), worse by * ± *: more than the 1e-09 allowed*",
        ]
    )
