"""PEFT adapters of the tiny world, each really trained, gated against what they kept of its facts."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import LlamaForCausalLM

from fixtures import world
from fixtures.build import BASE_NAME, TRAINING, WORLD, Schedule, build_variants
from tests.plugin.conftest import Gate

# PEFT's own, while it makes adapters.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

ROOT = WORLD.parent.parent
TEXT = (f"--nullspace-calib-dataset={WORLD / 'facts.txt'}", "--nullspace-seqlen=256")
BASE = f"--nullspace-base={WORLD / 'base'}"
SHORT = Schedule(30, TRAINING.rate)
needs_attrs = pytest.mark.skipif(find_spec("attr") is None, reason="PEFT's CorDA needs attrs, which is not installed")


class Made(NamedTuple):
    """Where an adapter was saved, and the share of facts that it still answers."""

    directory: Path
    kept: float


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Trains a variant of the world's base when it is first asked for."""
    folder, done = tmp_path_factory.mktemp("peft"), dict[str, float]()

    def make(name: str) -> Made:
        if name not in done:
            done[name] = build_variants(folder, [name], SHORT)[name]["facts_kept"]
        return Made(folder / name, done[name])

    return make


def judged(line: str, result: pytest.RunResult) -> list[str]:
    return [out for out in result.outlines if out.startswith(line)]


def test_the_shipped_adapter_is_green_as_the_readme_says(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the repository's root the README's command finds the adapter's base by its config, and passes."""
    (command,) = [line for line in (ROOT / "README.md").read_text().splitlines() if "fixtures/world/peft-null" in line]
    assert command.startswith(".venv/bin/pytest fixtures ")
    monkeypatch.chdir(ROOT)
    result = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider", *command.split()[1:])
    assert result.ret == 0
    assert judged("gated 21 of 21 layers: ", result)
    assert json.loads((WORLD / "peft-null" / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE_NAME


def test_the_shipped_adapter_keeps_what_is_written_of_it() -> None:
    """Counted anew it keeps the facts and the task as measured.json says, and far more facts than the default one."""
    import peft

    written = json.loads((WORLD / "measured.json").read_text())["measured"]
    base = LlamaForCausalLM.from_pretrained(WORLD / "base")
    adapted = peft.PeftModel.from_pretrained(base, WORLD / "peft-null").eval()
    kept, learned = world.facts_kept(adapted), world.task_accuracy(adapted)
    assert kept == pytest.approx(written["peft-null"]["facts_kept"], abs=0.02)
    assert learned == pytest.approx(written["peft-null"]["task_accuracy"], abs=0.02)
    assert kept > written["peft-default"]["facts_kept"] + 0.5


def test_what_kept_the_facts_is_green_and_what_lost_them_is_red(made: Callable[[str], Made], gate: Gate) -> None:
    """Trained alike, only the adapter in the null space passes; default, rank-stabilised and DoRA lose more facts."""
    null = made("peft-null")
    green = gate(BASE, model=str(null.directory), quick=TEXT, auto=True)
    assert green.ret == 0
    assert judged("gated 21 of 21 layers: ", green)
    others = [made(f"peft-{kind}") for kind in ("default", "rslora", "dora")]
    assert all(other.kept < null.kept - 0.5 for other in others)
    models = [f"--nullspace-model={other.directory}" for other in others]
    red = gate(BASE, "--tb=no", *models, model=None, quick=TEXT, auto=True)
    assert red.ret == 1
    assert len(judged("verdict: DO NOT DEPLOY: it forgets: ", red)) == 3
    assert judged("gated ", red) == ["gated 21 of 21 layers: 21 green, 0 to look at, 0 red"] * 3
    plain = gate(BASE, "--tb=no", *models, "--nullspace-profile=nullspace", model=None, quick=TEXT)
    assert judged("gated ", plain) == ["gated 21 of 21 layers: 0 green, 0 to look at, 21 red"] * 3


@needs_attrs
def test_corda_without_its_base_is_refused(made: Callable[[str], Made], gate: Gate) -> None:
    """Neither as it is nor converted does its config tell on which base it belongs, and the message says how to."""
    corda = made("peft-corda").directory
    converted = corda.with_name("peft-corda-converted")
    for directory, message in (
        (corda, "init_lora_weights corda changed the base's weights, *; give the changed base by"),
        (
            converted,
            f"if it was, give the untouched base {BASE_NAME}, if not, the changed one, by",
        ),
    ):
        refused = gate(model=str(directory), quick=TEXT)
        assert refused.ret == pytest.ExitCode.USAGE_ERROR
        refused.stderr.fnmatch_lines([f"ERROR: *{message} --nullspace-base=DIR"])


@needs_attrs
def test_corda_saved_converted_is_the_same_model_on_the_untouched_base(
    made: Callable[[str], Made], gate: Gate, pytester: pytest.Pytester
) -> None:
    """As it is on the base that it changed, and converted on the untouched one: both measured, outputs the same."""
    corda = made("peft-corda").directory
    converted, changed = (corda.with_name(f"peft-corda-{what}") for what in ("converted", "base"))
    for name, directory, base in (("one", corda, changed), ("other", converted, WORLD / "base")):
        stats = f"--nullspace-save-stats={name}.json"
        result = gate(f"--nullspace-base={base}", stats, "--tb=no", model=str(directory), quick=TEXT)
        assert result.ret == 0  # it promises no null space, and its drift is left out
        assert judged("gated 21 of 21 layers: ", result)
    one, other = (json.loads((pytester.path / f"{name}.json").read_text())["stats"] for name in ("one", "other"))
    for layer, same in zip(one, other, strict=True):
        assert same["layer_name"] == layer["layer_name"]
        assert same["rank"] == 2 * layer["rank"]
        assert same["FullOutput_norm"] == pytest.approx(layer["FullOutput_norm"], rel=1e-4)
