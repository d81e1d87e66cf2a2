"""``--nullspace-card``: the result of a whole run in the adapter's own model card."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fixtures.build import WORLD
from tests.unit.report.test_card import OWN, metrics


@pytest.fixture
def adapter(pytester: pytest.Pytester) -> Path:
    """The shipped PEFT adapter, in a folder of its own, and texts to gate it on."""
    shutil.copytree(WORLD / "peft-null", pytester.path / "ft")
    for name in ("facts.txt", "task.txt"):
        shutil.copy(WORLD / name, pytester.path / name)
    return pytester.path / "ft"


def gated(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """A run of the gate with a card."""
    return pytester.runpytest_subprocess(
        "--nullspace-model=ft",
        f"--nullspace-base={WORLD / 'base'}",
        "--nullspace-calib-dataset=facts.txt",
        "--nullspace-task-dataset=task.txt",
        "--nullspace-seqlen=128",
        "--nullspace-calib-size=4",
        "--nullspace-card",
        *arguments,
    )


def test_a_whole_run_writes_a_card_and_the_second_changes_no_byte(adapter: Path, pytester: pytest.Pytester) -> None:
    """Where there is no card one is made, with what the gate found; a second run, on two workers, leaves it alone."""
    first = gated(pytester)
    assert first.ret == 0, first.outlines
    first.stdout.fnmatch_lines(["nullspace: card: the result stands in ft/README.md"])
    written = (adapter / "README.md").read_bytes()
    card = ModelCard(written.decode())
    assert card.data.get("library_name") == "peft"
    assert card.data.get("base_model") is None  # a folder of this machine is no id
    found = metrics(written.decode())
    assert found["nullspace-verdict"] in ("SAFE", "LOOK")
    assert isinstance(found["nullspace-task-gain"], float)
    assert found["nullspace-task-gain"] > 1
    assert b"21 of 21 layers on facts.txt (4 windows, 512 tokens) and task text task.txt" in written
    assert str(pytester.path).encode() not in written
    assert gated(pytester, "-n", "2").ret == 0
    assert (adapter / "README.md").read_bytes() == written


def test_a_card_of_the_user_is_kept_and_one_of_peft_too(adapter: Path, pytester: pytest.Pytester) -> None:
    """All that the user wrote is there afterwards, and what the file permits is as it was."""
    card = adapter / "README.md"
    card.write_text(OWN, "utf-8")
    card.chmod(0o640)
    assert gated(pytester).ret == 0
    written = card.read_text("utf-8")
    assert [line for line in OWN.splitlines() if line not in written.splitlines()] == []
    assert card.stat().st_mode & 0o777 == 0o640
    assert "nullspace-divergence" in metrics(written)


def test_a_red_run_is_told_in_the_card_too(adapter: Path, pytester: pytest.Pytester) -> None:
    """An adapter that fails is told so where its users look."""
    assert gated(pytester, "--nullspace-threshold=divergence:1e-9:1e-8").ret == 1
    assert metrics((adapter / "README.md").read_text("utf-8"))["nullspace-verdict"] == "DO NOT DEPLOY"


@pytest.mark.parametrize(
    "arguments",
    [
        ("-k", "layers.0.self_attn.q_proj"),
        ("--nullspace-layers=*.q_proj",),
        ("--nullspace-layers=*.q_proj", "--nullspace-threshold=preservation:1e-9:1e-8"),
    ],
)
def test_a_run_in_part_writes_nothing_and_says_so(
    arguments: tuple[str, ...], adapter: Path, pytester: pytest.Pytester
) -> None:
    """What was left out, or was not measured, leaves the card as it was, red or not."""
    (adapter / "README.md").write_text(OWN, "utf-8")
    result = gated(pytester, *arguments)
    result.stdout.fnmatch_lines(["nullspace: card: ft/README.md is left as it was: *only * of *"])
    assert (adapter / "README.md").read_text("utf-8") == OWN


def test_a_card_that_cannot_be_parsed_is_a_usage_error_before_anything_runs(
    adapter: Path, pytester: pytest.Pytester
) -> None:
    """One line tells it with its place, the exit code is 4, and the card is untouched."""
    (adapter / "README.md").write_text("---\nlicense: [\n---\n", "utf-8")
    result = gated(pytester)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *ft/README.md: its metadata cannot be parsed: *; mend the card, or leave *"])
    assert (adapter / "README.md").read_text("utf-8") == "---\nlicense: [\n---\n"
    (adapter / "README.md").write_bytes(b"\xff\xfe")
    result = gated(pytester)
    result.stderr.fnmatch_lines(["ERROR: *ft/README.md: is not UTF-8 (byte 0); *"])
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to(pytester.path / "elsewhere.md")
    result = gated(pytester)
    result.stderr.fnmatch_lines(["ERROR: *ft/README.md: is a link, *"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--nullspace-stats=run.json",), "a saved run has no card*"),
        (("--nullspace-model=org/name",), "org/name lies on the hub*"),
        (("--nullspace-model=ft", "--nullspace-stage=init"), "before training*"),
        (("--nullspace-model=ft", "--nullspace-weights-only"), "*measures no activations*"),
    ],
)
@pytest.mark.usefixtures("adapter")
def test_what_has_no_card_is_refused(arguments: tuple[str, ...], why: str, pytester: pytest.Pytester) -> None:
    """A card is of a trained adapter in a directory, gated whole."""
    result = pytester.runpytest_subprocess("--nullspace-card", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *nullspace-card: {why}"])


def test_a_report_that_would_replace_the_card_is_refused(adapter: Path, pytester: pytest.Pytester) -> None:
    """Two options never write one file."""
    result = gated(pytester, f"--nullspace-report={adapter / 'README.md'}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *README.md is written by --nullspace-card as well*"])
