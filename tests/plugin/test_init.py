"""Trained against initial in the gate: what moved and must not have fails its layer, the rest fails `frozen`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fixtures import lora_null
from tests import adapters, saved, tiny
from tests.plugin.conftest import LOOSE, Gate, Replay

LAYERS = 21
Q0 = "model.layers.0.self_attn.q_proj"
INIT = ("--nullspace-init=start", *LOOSE)


@pytest.fixture
def start(checkpoint: Path, pytester: pytest.Pytester) -> Path:
    """The start of ``runs/ft``: the same adapter with A = 0."""
    return tiny.lora_null(pytester.path / "start", up_scale=0.0)


def test_what_only_moved_as_it_might_is_green(start: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """A moved and nothing else: each layer passes, `frozen` too, and the saved run replays the same without weights."""
    result = gate(*INIT, "-n", "2", "--nullspace-save-stats=ft.json", "--nullspace-report=r.md")
    result.assert_outcomes(passed=LAYERS + 2)
    result.stdout.fnmatch_lines(
        [
            "against its start *start: variant v2, the rows of B are orthonormal at the start",
            "  B moved in 0 of 21 layers, largest principal angle 0°; W_res changed in 0; A moved in 21",
            "  0 of 8 tensors outside the layers moved",
        ]
    )
    assert "variant v2" in (pytester.path / "r.md").read_text()
    replayed = pytester.runpytest_subprocess("-p", "no:randomly", "--nullspace-stats=ft.json", *LOOSE)
    replayed.assert_outcomes(passed=LAYERS + 2)
    document = json.loads((pytester.path / "ft.json").read_text())
    document["audit"]["layers"] = 3
    (pytester.path / "ft.json").write_text(json.dumps(document))
    refused = pytester.runpytest_subprocess("-p", "no:randomly", "--nullspace-stats=ft.json", *LOOSE)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: *ft.json: its entry 'audit' is no audit; measure again"])


def test_what_moved_and_must_not_have_fails_by_name(start: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """A trained B fails its own layer with change and angle, a trained norm fails `frozen`; as v1 B may move."""

    def mistake(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q0}.BLinear.weight"] = tensors[f"{Q0}.BLinear.weight"] + 0.05
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5

    tiny.lora_null(pytester.path / "wrong", change=mistake)
    result = gate(*INIT, "-v", "--tb=no", "--nullspace-save-stats=wrong.json", "--nullspace-report=r.md", model="wrong")
    assert result.ret == 1
    result.assert_outcomes(failed=2, passed=LAYERS)
    result.stdout.fnmatch_lines(
        [
            f"FAILED wrong/config.json::{Q0} - Failed: B left its space: relative change 0.283, largest principal *",
            "FAILED wrong/config.json::frozen - Failed: 1 of 8 tensors outside the layers moved: model.norm.weight *",
        ]
    )
    result.stdout.fnmatch_lines(
        [
            "  B moved in 1 of 21 layers, largest principal angle *",
            "cause: b-trained: B was trained in 1 of 21 layers: it left its space, largest principal angle *",
            "  cure: the freezing condition probably tests for ALinear twice; *",
            "cause: trained-outside: 1 of 8 tensors outside the layers *model.norm.weight*",
        ]
    )
    saved = json.loads((pytester.path / "wrong.json").read_text())
    assert {"b-trained", "trained-outside"} <= {cause["cause"] for cause in saved["diagnosis"]}
    assert "cause: b-trained" in (pytester.path / "r.md").read_text()
    gate(*INIT, "--nullspace-variant=v1", "--tb=no", model="wrong").assert_outcomes(failed=1, passed=LAYERS + 1)


def test_an_init_that_is_none_is_a_usage_error(start: Path, gate: Gate, replay: Replay) -> None:
    """A missing directory and a run without weights end pytest with exit code 4."""
    missing = gate("--nullspace-init=nowhere")
    assert missing.ret == pytest.ExitCode.USAGE_ERROR
    missing.stderr.fnmatch_lines(["ERROR: *nowhere: no such directory; give the one that training saved"])
    of_saved = replay("--nullspace-init=start")
    assert of_saved.ret == pytest.ExitCode.USAGE_ERROR
    of_saved.stderr.fnmatch_lines(
        ["ERROR: --nullspace-init: *start compares weights, and a saved run holds none; give the *"]
    )


ZERO: dict[str, Any] = {"update_norm": 0.0, "up_weight_norm": 0.0}
"""What a start has in place of an update."""


def initial_run(file: Path, *names: str, **changes: Any) -> Path:
    """A saved run of the start of `tests.saved`'s."""
    layers = [dataclasses.replace(layer, **ZERO, **changes) for layer in saved.run(*names).layers]
    return saved.save(file, dataclasses.replace(saved.run(), layers=tuple(layers), checkpoint_layers=len(layers)))


def test_two_saved_runs_are_held_against_each_other(replay: Replay, pytester: pytest.Pytester) -> None:
    """Without a model: what training may have made of its start is green and shown; a grown B fails its layer."""
    initial_run(pytester.path / "init.json")
    result = replay("--nullspace-init=init.json", "--nullspace-report=r.md", "-v")
    result.assert_outcomes(passed=len(saved.NAMES) + 1)
    result.stdout.fnmatch_lines(
        [
            "against its start *init.json, a saved run: variant v2, *; 0 of 9 layers are not what training may make *",
            "  preservation 0.03125 → 0.03125 (+0.000%) in the mean; by most: preservation 0.03125 → * in model.*",
            "  effectiveness 0 → 0.0625 (from zero) in the mean; by most: *",
            "  ‖B‖ 2 → 2 (+0.000%) in the mean; *",
            "  ‖A‖ 0 → 3 (from zero) in the mean; *",
            f"  {saved.NAMES[0]}: preservation *; ‖W_res‖ 40 → 40 (+0.000%)",
        ]
    )
    assert "a saved run: variant v2" in (pytester.path / "r.md").read_text()
    saved.save(pytester.path / "bad.json", saved.run(down_weight_norm=2.5, down_norm=2.0))
    bad = replay("--nullspace-init=init.json", "--tb=short", stats="bad.json")
    assert bad.ret == 1
    bad.assert_outcomes(failed=1, passed=len(saved.NAMES))
    bad.stdout.fnmatch_lines([f"FAILED bad.json::{saved.NAMES[0]} - Failed: *‖B‖ 2 → 2.5 (+25.000%) since the start,*"])
    replay("--nullspace-init=init.json", "--nullspace-stage=init", stats="init.json").assert_outcomes(passed=10)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            {},
            "in-sample: the saved start read the same windows of the same text (sha256 000000000000); if B was built*",
        ),
        ({"starts": [7]}, "in-sample: the saved start read other windows of the same text (sha256 000000000000); *"),
        ({"sha256": "1" * 64}, "held out: the saved start read another text (sha256 111111111111)"),
        (
            None,
            "held out: unknown, for nothing tells from which text B was built; the text that built B is no evidence *",
        ),
    ],
)
def test_a_text_that_the_start_was_measured_on_is_told(
    text: dict[str, Any] | None, told: str, replay: Replay, pytester: pytest.Pytester
) -> None:
    """By the digest that the saved start tells, in-sample windows are told from held-out text, here and in Markdown."""
    layers = tuple(dataclasses.replace(layer, **ZERO) for layer in saved.run().layers)
    about = {key: value for key, value in saved.ABOUT.items() if key != "text"}
    about |= {} if text is None else {"text": {**saved.ABOUT["text"], **text}}
    saved.save(pytester.path / "init.json", dataclasses.replace(saved.run(), layers=layers, about=about))
    allow = [f"--nullspace-compare-allow={what}" for what in ("text", "unrecorded")]
    replay("--nullspace-init=init.json", "--nullspace-report=r.md", *allow).stdout.fnmatch_lines([told])
    assert told[:9] in (pytester.path / "r.md").read_text()


def test_without_a_start_it_is_unknown_whether_the_text_is_held_out(replay: Replay) -> None:
    """Nothing tells then on which text B was built, which a report says where it is asked for everything."""
    assert "held out: unknown" in replay("-v").stdout.str()
    assert "held out: unknown" not in replay().stdout.str()


def test_two_files_of_the_reference_are_held_against_each_other(replay: Replay, pytester: pytest.Pytester) -> None:
    """Neither tells text or rank, so nothing is asked to be allowed; ours against theirs is, unless allowed."""
    saved.reference(pytester.path / "ref.json")
    document = json.loads((pytester.path / "ref.json").read_text())
    for layer in document["stats"]:
        layer.pop("ABX_over_ResidualX", None)
        layer |= {"ABX_norm": 0.0, "ABX_ratio": 0.0, "adapter_contribution": 0.0, "A_weight_norm": 0.0}
    (pytester.path / "init.json").write_text(json.dumps(document))
    replay("--nullspace-init=init.json", stats="ref.json").assert_outcomes(passed=len(saved.NAMES) + 1)
    refused = replay("--nullspace-init=init.json")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: --nullspace-init: not comparable: unrecorded (only one of the runs tells *"])
    allowed = replay("--nullspace-init=init.json", "--nullspace-compare-allow=unrecorded")
    allowed.assert_outcomes(passed=len(saved.NAMES) + 1)


def test_a_start_of_other_layers_is_a_usage_error(replay: Replay, pytester: pytest.Pytester) -> None:
    """A layer that only one of the two runs has is named, unless the glob leaves it out."""
    initial_run(pytester.path / "init.json", *saved.NAMES[:-1])
    refused = replay("--nullspace-init=init.json")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines([f"ERROR: *init.json: not the start of *: only one of them has {saved.NAMES[-1]}"])
    replay("--nullspace-init=init.json", "--nullspace-layers=*.0.*").assert_outcomes(passed=3)
    written = replay("--nullspace-init=init.json", "--nullspace-layers=*.0.*", "--nullspace-save-stats=init.json")
    written.stderr.fnmatch_lines(["ERROR: --nullspace-save-stats: *init.json would replace what --nullspace-init *"])


def test_a_measured_run_is_held_against_a_saved_start(start: Path, gate: Gate) -> None:
    """Measured alike it passes, on other windows it is refused."""
    saving = ("--nullspace-stage=init", "--nullspace-save-stats=init.json")
    gate(*LOOSE, *saving, model="start").assert_outcomes(passed=LAYERS + 1)
    loud = [f"--nullspace-threshold={figure}:9:9" for figure in ("preservation", "leakage")]
    result = gate(*loud, "--nullspace-init=init.json", "-k", "layers.0.self_attn.q", "-n", "2")
    result.assert_outcomes(passed=1)
    other = gate(*loud, "--nullspace-init=init.json", "--nullspace-seqlen=16")
    assert other.ret == pytest.ExitCode.USAGE_ERROR
    other.stderr.fnmatch_lines(["ERROR: --nullspace-init: not comparable: seqlen (16, was 32): *"])


def test_of_a_start_that_held_a_part_of_w_what_changed_is_judged(gate: Gate, pytester: pytest.Pytester) -> None:
    """Its update is what training made of it, also in the saved run, with a line; by the script's letter it is AB."""

    def trained(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("ALinear.weight"):
                tensors[name] = 1.01 * tensors[name]

    (pytester.path / "text.txt").write_text(tiny.TEXT)
    tiny.lora_null(pytester.path / "start")
    tiny.lora_null(pytester.path / "ft", change=trained)
    effects = []
    for profile in ("auto", "reference"):
        save = f"--nullspace-save-stats={profile}.json"
        result = gate(*INIT, save, f"--nullspace-profile={profile}", model="ft")
        told = json.loads((pytester.path / f"{profile}.json").read_text())
        effects.append(told["stats"][0]["ABX_ratio"])
        said = [line for line in result.outlines if line.startswith("update against the start")]
        assert len(said) == (profile == "auto"), result.outlines
    assert effects[0] == pytest.approx(effects[1] * 0.01 / 1.01, rel=1e-5)
    held = gate("--nullspace-compare=auto.json", *LOOSE, model="ft")
    held.stdout.fnmatch_lines(["*not comparable: update (as a whole, was since start)*"])
    result = gate("--nullspace-init=start", *LOOSE, "--nullspace-report=r.md", model="start")
    assert "update against the start " in (pytester.path / "r.md").read_text()
    result.stdout.fnmatch_lines(["*effectiveness 0 *"])


def test_the_base_tells_the_update_where_the_start_is_not_there(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """Of v1 `--nullspace-base` gives the update that `--nullspace-init` gives, the two compare, and a line says how."""
    model: Any = tiny.llama(initializer_range=0.2)
    model.save_pretrained(pytester.path / "base")
    tiny.tokenizer(pytester.path / "base")
    tokenizer: Any = AutoTokenizer.from_pretrained(pytester.path / "base")
    lora_null.initialise_v1(model, lora_null.covariances(model, torch.randint(3, 100, (4, 60))), 4)
    lora_null.save(model, pytester.path / "start", tokenizer)
    for name, parameter in model.named_parameters():
        if "Linear.weight" in name:
            parameter.data *= 1.1
    lora_null.save(model, pytester.path / "ft", tokenizer)
    gate(*LOOSE, "--nullspace-init=start", "--nullspace-save-stats=s.json", model="ft")
    saving = ("--nullspace-compare=s.json", "--nullspace-save-stats=b.json")
    result = gate(*LOOSE, "--nullspace-base=base", *saving, "-v", model="ft")
    assert result.ret == 0, result.outlines
    told = "update against the base *base: W - W_res is the A0B0 of the start in 21 of 21 layers, *"
    result.stdout.fnmatch_lines([told])
    by_start, by_base = (json.loads((pytester.path / name).read_text())["stats"] for name in ("s.json", "b.json"))
    for now, then in zip(by_base, by_start, strict=True):
        assert now["ABX_norm"] == pytest.approx(then["ABX_norm"], rel=1e-5)
    adapters.edit(pytester.path / "base", lambda of: of.update({f"{Q0}.weight": 2 * of[f"{Q0}.weight"]}))
    wrong = gate(*LOOSE, "--nullspace-base=base", model="ft")
    assert wrong.ret == 1
    wrong.stdout.fnmatch_lines([f"*ft: W - W_res of {Q0} is not of rank 4: *"])
