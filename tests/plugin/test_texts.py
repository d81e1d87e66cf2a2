"""Two texts, drift, and whether there was text enough, as a user of the gate meets them."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from fixtures import world
from fixtures.build import WORLD
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.model import load_model
from pytest_nullspace.text.tokenizer import load_tokenizer
from pytest_nullspace.text.windows import draw_windows
from tests import tiny
from tests.adapters import adapter, change, switch
from tests.plugin.conftest import LOOSE, Gate

FACTS, TASK = (
    f"--nullspace-{what}-dataset={WORLD / name}" for what, name in (("calib", "facts.txt"), ("task", "task.txt"))
)
SHIPPED = (FACTS, "--nullspace-seqlen=256", "--nullspace-calib-size=8")
NULL = str(WORLD / "null-v2")
EXACT = 1e-6


def test_the_shipped_adapter_is_judged_on_two_texts(gate: Gate, pytester: pytest.Pytester) -> None:
    """With the task text the good adapter passes without a warning, and the report holds both texts' figures."""
    result = gate(
        TASK,
        "-v",
        "--nullspace-drift",
        "--nullspace-save-stats=s.json",
        "--nullspace-report=r.md",
        model=NULL,
        quick=SHIPPED,
    )
    result.assert_outcomes(passed=23)
    result.stdout.fnmatch_lines(
        [
            f"nullspace: task text {WORLD / 'task.txt'}",
            "*8 windows, 2,048 tokens*; task text *8 windows, 2,048 tokens*",
            "gated 21 of 21 layers: 21 green, 0 to look at, 0 red",
            "✓ drift on the preserved text: loss * → *, divergence *",
            "✓ drift on the task text: loss * → *: task-gain * > 0.01, headroom * < 1.5",
            "  base: the model with its adapter switched off",
            "verdict: SAFE: preserved text * less likely, task text * as likely",
        ]
    )
    result.stdout.no_fnmatch_line("✓ selectivity *")  # it is shown, and decides only by a bound of the user's
    document = json.loads((pytester.path / "s.json").read_text())
    assert {"text", "task_text", "task_dataset", "drift"} <= set(document)
    assert document["stats"][0]["task"]["ABX_norm"] > document["stats"][0]["ABX_norm"]
    assert "- ✓ drift on the preserved text" in (pytester.path / "r.md").read_text()
    replayed = pytester.runpytest_subprocess("-p", "no:randomly", "--nullspace-stats=s.json", "--nullspace-drift")
    replayed.assert_outcomes(passed=23)


def test_drift_is_the_change_of_loss_and_the_divergence_from_the_base(gate: Gate, pytester: pytest.Pytester) -> None:
    """Losses and divergence agree with plain float64 arithmetic on the logits of the two models to 1e-6 relative."""
    gate(TASK, "--nullspace-drift", "--nullspace-save-stats=s.json", "-k", "drift", model=NULL, quick=SHIPPED)
    told = json.loads((pytester.path / "s.json").read_text())["drift"]
    models = (
        LlamaForCausalLM.from_pretrained(WORLD / "base").eval(),
        load_model(open_checkpoint(WORLD / "null-v2"), torch.device("cpu"), torch.float32).model,
    )
    for name, text in (("preserved", world.facts_text()), ("task", world.task_text())):
        sums = torch.zeros(3, dtype=torch.float64)
        windows = draw_windows(text, load_tokenizer(WORLD / "base"), count=8, seqlen=256, seed=42)
        for window in windows:
            tokens = torch.tensor([window.tokens])
            with torch.inference_mode():
                p, q = (model(input_ids=tokens).logits[0].double().log_softmax(-1) for model in models)
            losses = [cross_entropy(of[:-1], tokens[0, 1:], reduction="sum") for of in (p, q)]
            sums += torch.stack([*losses, (p.exp() * (p - q)).sum()])
        means = (sums / torch.tensor([8 * 255, 8 * 255, 8 * 256])).tolist()
        got = [told[name][figure] for figure in ("base_loss", "adapted_loss", "divergence")]
        assert got == pytest.approx(means, rel=EXACT)


@pytest.mark.parametrize("apart", [(), ("-n", "2"), ("-p", "no:xdist")], ids=["plain", "xdist", "without xdist"])
def test_two_texts_and_drift_are_measured_once_for_all_workers(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, apart: tuple[str, ...]
) -> None:
    """Random adapters pass by the bounds given, in one process and in several; the drift is a test, forgetting none."""
    (pytester.path / "task.txt").write_text(tiny.TEXT.upper())
    loose = (*LOOSE, *(f"--nullspace-threshold={f}" for f in ("selectivity:0:0", "divergence:9:9")))
    more = ("--nullspace-threshold=loss-rise:9:9", "--nullspace-threshold=task-gain:-9:-9")
    off = ("--nullspace-task-dataset=task.txt", "--nullspace-drift")
    result = gate(*loose, *more, *off, "-v", *apart)
    assert result.ret == 0, result.outlines
    assert any("::drift PASSED" in line or "PASSED runs/ft/config.json::drift" in line for line in result.outlines)
    result.stdout.fnmatch_lines(
        ["gated 21 of 21 layers: 21 green, 0 to look at, 0 red", "✓ selectivity *the update acts on the task*"]
    )
    assert not any(line.startswith(("⚠", "✗")) for line in result.outlines)


def test_without_drift_forgetting_fails(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """The same adapters fail by forgetting where no drift is judged, also where its test is deselected."""
    (pytester.path / "task.txt").write_text(tiny.TEXT.upper())
    asked = (*LOOSE, "--nullspace-threshold=selectivity:0:0", "--nullspace-task-dataset=task.txt")
    for more in ((), ("--nullspace-drift", "-k", "not drift")):
        result = gate(*asked, *more)
        assert result.ret == 1
        result.stdout.fnmatch_lines(["*forgetting * > 0.125*"])


def test_an_adapter_that_ruins_the_predictions_fails_by_its_drift(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """A loud update fails the drift item with both losses and the divergence in its message."""
    result = gate("--nullspace-drift", "-v", "-k", "drift", "--nullspace-threshold=divergence:0:0")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["divergence * > 0*", "✗ drift on the preserved text: loss * nats a token*"])


def test_a_base_that_cannot_be_had_is_refused(gate: Gate, pytester: pytest.Pytester) -> None:
    """Where the adapter switched off is not the base, drift needs the start or the base; either gives it."""
    (pytester.path / "text.txt").write_text(tiny.TEXT)
    plain = tiny.llama()
    plain.save_pretrained(pytester.path / "base")
    tiny.tokenizer(pytester.path / "base")

    tiny.lora_null(pytester.path / "v1", change=oblique("proj"))
    tiny.lora_null(pytester.path / "start", up_scale=0.0, change=oblique("proj"))
    refused = gate("--nullspace-drift", "-k", "drift", model="v1")
    assert refused.ret == 1
    refused.stdout.fnmatch_lines(
        ["*drift: *v1 does not hold its base model*--nullspace-init=DIR*--nullspace-base=DIR*"]
    )
    loose = ("--nullspace-threshold=divergence:9:9", "--nullspace-threshold=loss-rise:9:9", "-k", "drift")
    for base in ("--nullspace-base=base", "--nullspace-init=start"):
        result = gate("--nullspace-drift", base, *loose, "-v", model="v1")
        assert result.ret == 0, result.outlines
        result.stdout.fnmatch_lines([f"  base: the {base[12:16].replace('init', 'start')}*"])


def oblique(*layers: str) -> Callable[[dict[str, torch.Tensor], object], None]:
    """An edit that leaves B no orthonormal rows in the layers whose names end so."""

    def edit(tensors: dict[str, torch.Tensor], _: object) -> None:
        for name in tensors:
            if name.endswith(tuple(f"{layer}.BLinear.weight" for layer in layers)):
                tensors[name] = 2 * tensors[name]

    return edit


FREE = tuple(
    f"--nullspace-threshold={f}" for f in ("divergence:9:9", "loss-rise:9:9", "leakage:99:99", "preservation:9:9")
)


@pytest.mark.parametrize(
    ("ini", "asked", "tests"),
    [
        ("", (), 23),
        ("auto", (), 23),
        ("true", (), 23),
        ("false", (), 22),
        ("true", ("--nullspace-no-drift",), 22),
        ("false", ("--nullspace-drift",), 23),
        ("", ("--nullspace-layers=*_proj", "--nullspace-profile=reference"), 22),
        ("", ("--nullspace-layers=*.q_proj",), 3),
    ],
)
def test_drift_is_there_where_the_adapter_switched_off_is_the_base(
    ini: str, asked: tuple[str, ...], tests: int, checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """Unasked the test is there, unless by the script to the letter or of a part of the layers; a word decides."""
    (pytester.path / "pytest.ini").write_text(f"[pytest]\n{ini and f'nullspace_drift = {ini}'}\n")
    result = gate("--collect-only", "-q", *asked, auto=True)
    assert len([line for line in result.outlines if "::" in line]) == tests
    assert any(line.endswith("::drift") for line in result.outlines) == (tests == 23)


def test_a_word_that_drift_does_not_take_is_refused(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """The ini key takes three words, and says which."""
    (pytester.path / "pytest.ini").write_text("[pytest]\nnullspace_drift = perhaps\n")
    result = gate(auto=True)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: nullspace_drift: takes auto, true or false, not 'perhaps'"])


@pytest.mark.parametrize(
    ("layers", "outcomes", "why"),
    [
        (("proj",), {"passed": 22}, "the rows of B are not orthonormal*--nullspace-drift with --nullspace-init=DIR*"),
        (("1.mlp.up_proj",), {"passed": 22, "skipped": 1}, "the model with its adapter switched off is not the base*"),
    ],
    ids=["told by the files", "told once loaded"],
)
def test_drift_that_cannot_be_had_is_left_out_with_a_line(
    layers: tuple[str, ...], outcomes: dict[str, int], why: str, gate: Gate, pytester: pytest.Pytester
) -> None:
    """Where nobody demanded it a base that is not at hand fails nothing, and terminal, Markdown and file say why."""
    (pytester.path / "text.txt").write_text(tiny.TEXT)
    tiny.lora_null(pytester.path / "ft", change=oblique(*layers))
    result = gate(*FREE[2:], "-v", "--nullspace-report=r.md", "--nullspace-save-stats=s.json", model="ft", auto=True)
    result.assert_outcomes(**outcomes)
    assert result.ret == 0, result.outlines
    result.stdout.fnmatch_lines([f"drift not measured: {why}"])
    assert "drift not measured: " in (pytester.path / "r.md").read_text()
    assert "drift" not in json.loads((pytester.path / "s.json").read_text())
    alone = gate(*FREE, "-k", "drift", model="ft", auto=True)
    assert alone.ret != 0


NOTHING_MEASURED = """
import pytest_nullspace.measuring.streaming


def measure(*args, **more):
    raise AssertionError("the pass began")


pytest_nullspace.measuring.streaming.measure = measure
"""


@pytest.mark.parametrize("kind", ["no base", "no causal language model"])
def test_what_drift_lacks_is_told_before_the_pass(kind: str, gate: Gate, pytester: pytest.Pytester) -> None:
    """No text is run through a model whose predictions cannot be compared, and no figure of such a pass is lost."""
    (pytester.path / "text.txt").write_text(tiny.TEXT)
    if kind == "no base":
        directory = adapter(pytester.path, tiny.llama(), r=4, target_modules=["q_proj"])
        change(directory, lambda _, config: config.update(init_lora_weights="pissa"))
        told = "does not hold its base model*--nullspace-init=DIR"
    else:
        adapter(pytester.path, switch(), "SEQ_2_SEQ_LM", r=4, target_modules=["q"])
        told = "is no causal language model; leave the option out"
    pytester.makeconftest(NOTHING_MEASURED)
    result = gate("--nullspace-drift", "--nullspace-base=base", model="adapter")
    result.stdout.fnmatch_lines([f"*--nullspace-drift: *adapter {told}"])
    result.stdout.no_fnmatch_line("*the pass began*")


def test_an_adapter_that_promises_no_null_space_is_judged_by_the_rest(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """A random subspace fails as a null space and not as plain LoRA, unless a bound is given; reports say by what."""
    assert gate("--tb=no").ret == 1
    result = gate("-v", "--nullspace-profile=lora", "--nullspace-report=r.md", "--nullspace-save-stats=s.json")
    assert result.ret == 0
    told = "judged by what it forgets and what it learned, for it promises no null space*"
    result.stdout.fnmatch_lines([told])
    result.stdout.no_fnmatch_line("*✓ leakage*")
    assert "udged by what it forgets" in (pytester.path / "r.md").read_text()
    saved = json.loads((pytester.path / "s.json").read_text())
    assert saved["diagnosis"] == []
    assert saved["stats"][0]["leakage_over_chance"] > 0
    assert gate("--nullspace-threshold=leakage:0.1:0.2", "--nullspace-profile=lora", "--tb=no").ret == 1
    assert gate("--nullspace-stats=s.json", "--nullspace-profile=nullspace", "--tb=no", model=None).ret == 1
    assert gate("--nullspace-stats=s.json", "--nullspace-variant=lora", model=None).ret == 0


def test_too_few_rows_and_repeats_are_told(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """Fewer distinct rows than a layer is wide are told with what would be enough, and so is text that repeats."""
    loose = (*LOOSE, "-v")
    result = gate(*loose, "--nullspace-calib-size=1", "--nullspace-report=r.md", "--nullspace-layers=*.down_proj")
    result.stdout.fnmatch_lines(
        ["too few rows: * in * of * layers, *(32 distinct rows in a width of 48): *; about 2 such windows *"]
    )
    assert "too few rows: " in (pytester.path / "r.md").read_text()
    letters = "".join(random.Random(0).choices("abcdefg ", k=4000))
    (pytester.path / "text.txt").write_text(letters)
    result = gate(*loose, "--nullspace-calib-size=8", "--nullspace-layers=*.q_proj")
    result.stdout.fnmatch_lines(
        ["too few rows: * 1 of 3 layers, * *.layers.0.* (8 distinct rows in a width of 32): *; * of more different *"]
    )
    result.stdout.no_fnmatch_line("repeated text*")
    (pytester.path / "text.txt").write_text("all work and no play makes a dull text. " * 100)
    result = gate(*loose, "--nullspace-seqlen=128")
    result.stdout.fnmatch_lines(["repeated text: only * of 256 tokens are new, *"])
    (pytester.path / "text.txt").write_text(world.facts_text())
    result = gate(*loose, "--nullspace-calib-size=8")
    result.stdout.no_fnmatch_line("too few rows*")
    result.stdout.no_fnmatch_line("repeated text*")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("threshold=selectivity:2:1",), "selectivity is not measured of *ft; measure with --nullspace-task-dataset"),
        (("threshold=divergence:1:2",), "divergence is not measured of *ft; measure with --nullspace-drift"),
        (("threshold=loss-rise:1:2", "task-dataset=text.txt"), "loss-rise is not measured of *ft; measure with *drift"),
        (("threshold=task-gain:2:1",), "task-gain is not measured of *; * --nullspace-drift --nullspace-task-dataset"),
        (("threshold=task-gain:2:1", "drift"), "task-gain is not measured of *ft; measure with *"),
    ],
)
def test_a_bound_on_what_is_not_measured_is_refused(
    checkpoint: Path, gate: Gate, options: tuple[str, ...], said: str
) -> None:
    """A bound on a figure that would not be judged is a usage error, not a silent nothing."""
    result = gate(*(f"--nullspace-{option}" for option in options))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --nullspace-threshold: {said}, or leave the bound out"])


def test_a_missing_task_text_is_told_by_its_option(checkpoint: Path, gate: Gate) -> None:
    """The message names the option that is to blame."""
    result = gate("--nullspace-task-dataset=nowhere.txt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--nullspace-task-dataset=nowhere.txt: no such file or folder*"])


def test_a_task_text_that_is_to_be_preserved_too_is_refused(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """What was learned cannot be told from what was kept on one text, whatever it is called: said before collection."""
    (pytester.path / "copy.txt").write_text(tiny.TEXT)
    (pytester.path / "other.txt").write_text(f"{tiny.TEXT}.")
    (pytester.path / "folder").mkdir()
    (pytester.path / "folder" / "copy.md").write_text(tiny.TEXT)
    further = "--nullspace-calib-dataset=other.txt", "--nullspace-calib-dataset=code=text.txt"
    for task, preserved in (("text.txt", ()), ("copy.txt", ()), ("folder", ()), ("text.txt", further)):
        result = gate(f"--nullspace-task-dataset={task}", *preserved)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(
            [f"ERROR: --nullspace-task-dataset={task}: the same text as is given to be preserved (*), *; give *"]
        )


def test_windows_are_drawn_until_every_verdict_is_settled(gate: Gate, pytester: pytest.Pytester) -> None:
    """``auto`` ends as soon as no margin reaches over a bound, and at the stated maximum at the latest."""
    quick = (FACTS, "--nullspace-seqlen=64", "--nullspace-save-stats=s.json", "--nullspace-calib-size=auto:40")

    def windows() -> int:
        return int(json.loads((pytester.path / "s.json").read_text())["text"]["windows"])

    gate(model=NULL, quick=quick)
    means = json.loads((pytester.path / "s.json").read_text())["stats"]
    middle = sorted(layer["BX_ratio"] for layer in means)[10]
    unsettled = gate("-v", f"--nullspace-threshold=preservation:{middle}:0.5", model=NULL, quick=quick)
    assert windows() == 40
    unsettled.stdout.fnmatch_lines(["uncertain: * would settle half of them, so raise N in *-calib-size=auto:N"])
    loose = ("contribution:0:0", "preservation:0.5:0.6", "effectiveness:0:0")
    settled = gate(*(f"--nullspace-threshold={bound}" for bound in loose), model=NULL, quick=quick)
    assert windows() == 16
    assert not any("uncertain" in line for line in settled.outlines)


def test_a_verdict_that_more_text_might_change_is_told(gate: Gate) -> None:
    """A bound within a figure's margin is told as uncertain, with the windows that would settle it."""
    quick = (FACTS, "--nullspace-seqlen=64", "--nullspace-calib-size=4")
    result = gate("-v", "--nullspace-threshold=preservation:0.0500:0.5", model=NULL, quick=quick)
    result.stdout.fnmatch_lines(
        ["uncertain: * verdict on * of 21 layers*, *windows would settle half of them, or try *-calib-size=auto"]
    )
    one = gate("-v", model=NULL, quick=(*quick[:2], "--nullspace-calib-size=1"))
    one.stdout.fnmatch_lines(["uncertain: *one window tells nothing of how the figures vary*"])
