"""A model that is larger than its device, spread over memory and disk: the same figures, or a plain refusal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fixtures.build import WORLD
from tests import tiny
from tests.adapters import adapter, change
from tests.plugin.conftest import LOOSE, Gate

EXACT = 1e-6
NOTHING = "--nullspace-device-map=cpu=1KB"
"""No layer has room in it, so all lie on disk."""
SHIPPED = (
    f"--nullspace-calib-dataset={WORLD / 'facts.txt'}", "--nullspace-calib-size=2", "--nullspace-seqlen=64",
)  # fmt: skip


def gpt2() -> Any:
    """A random GPT-2, whose Conv1D layers have biases that outweigh their outputs."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=30.0)
    return model


def made(kind: str, folder: Path) -> str:
    """The name of a checkpoint of this kind."""
    match kind:
        case "shipped":
            return str(WORLD / "null-v2")
        case "LoRA-Null":
            tiny.lora_null(folder / "whole")
            return "whole"
        case "biases":
            adapter(folder, tiny.qwen2(), r=4, target_modules="all-linear")
        case "Conv1D":
            adapter(folder, gpt2(), r=4, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    return "adapter"


def numbers(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON document, with its place in it."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(inner, f"{where}/{key}")
    elif isinstance(value, int | float):
        yield where, value


EVERYTHING = ("--nullspace-spectrum", "--nullspace-drift", "--nullspace-task-dataset=task.txt")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("shipped", EVERYTHING),
        ("LoRA-Null", (*EVERYTHING, "--nullspace-max-activation-samples=20")),
        ("biases", EVERYTHING),
        ("Conv1D", (*EVERYTHING, "--nullspace-max-activation-samples=20")),
    ],
    ids=["shipped", "LoRA-Null", "biases", "Conv1D"],
)
def test_a_model_on_disk_gives_the_same_figures(
    kind: str, options: tuple[str, ...], folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every weight on disk all figures are those of the model in memory, and nothing is left on the disk."""
    model = made(kind, folder)
    quick = {"quick": SHIPPED} if kind == "shipped" else {}
    (folder / "task.txt").write_text(f"{tiny.TEXT}.")
    (folder / "offload").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "offload"))
    whole = gate(*LOOSE, *options, "--nullspace-save-stats=whole.json", model=model, **quick)
    spread = gate(*LOOSE, *options, NOTHING, "--nullspace-save-stats=spread.json", model=model, **quick)
    assert spread.parseoutcomes()["passed"] == whole.parseoutcomes()["passed"] > 0
    assert spread.ret == whole.ret
    spread.stdout.fnmatch_lines(["*; cpu and disk float32; *"])
    documents = [json.loads((folder / f"{name}.json").read_text()) for name in ("whole", "spread")]
    assert [document["device"] for document in documents] == ["cpu", "cpu and disk"]
    of_whole, of_spread = (
        dict(numbers({key: document.get(key) for key in ("stats", "averages", "drift")})) for document in documents
    )
    assert len(of_whole) > 10
    assert of_spread == pytest.approx(of_whole, rel=EXACT)
    assert not list((folder / "offload").glob("nullspace-offload-*"))


def test_adapters_of_one_base_and_workers_each_have_it_spread(folder: Path, gate: Gate) -> None:
    """A second adapter of the base is measured as well, under xdist too; with room for all nothing lies on disk."""
    adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    adapter(folder, tiny.llama(), r=2, target_modules=["q_proj"], name="second")
    for more in ((), ("-n", "2")):
        gate(*LOOSE, NOTHING, "--nullspace-model=second", *more, model="adapter").assert_outcomes(passed=8)
    roomy = gate(*LOOSE, "--nullspace-device-map=cpu=1GiB", model="adapter")
    roomy.assert_outcomes(passed=4)
    assert "disk" not in roomy.stdout.str()


def test_what_is_not_finite_on_disk_fails(folder: Path, gate: Gate) -> None:
    """NaN in a weight that lies on disk fails its layer."""
    directory = adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    change(directory, lambda tensors, _: tensors.update({name: tensor * torch.nan for name, tensor in tensors.items()}))
    result = gate(*LOOSE, NOTHING, model="adapter")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.parseoutcomes()["failed"] >= 1
    result.stdout.fnmatch_lines(["*non-finite*"])


def test_an_error_after_the_model_was_spread_leaves_nothing_on_disk(
    folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run ends in an error, and warnings are errors, the files of the spread model are removed as well."""
    adapter(folder, tiny.qwen2(), r=4, target_modules=["q_proj"], bias="all")
    (folder / "offload").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "offload"))
    result = gate(*LOOSE, NOTHING, "--nullspace-seqlen=300", "-W", "error", model="adapter")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*300 tokens are more than the 256 that the model takes*"])
    assert not list((folder / "offload").glob("nullspace-offload-*"))


def test_a_layer_that_cannot_be_spread_is_refused(folder: Path, gate: Gate) -> None:
    """DoRA, which reads the whole weight outside its module, is an error that names layer and option."""
    adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"], use_dora=True)
    result = gate(*LOOSE, NOTHING, model="adapter")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*model.layers.0.self_attn.q_proj: is a DoRA layer, *leave --nullspace-device-map out*"]
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--nullspace-device-map=0:20GiB"], "takes auto, stream, or sizes such as 0=20GiB,cpu=60GiB, not '0:20GiB'"),
        (["--nullspace-device-map=cpu=lots"], "takes auto, stream, or sizes such as *, not 'cpu=lots'"),
        (["--nullspace-device-map=auto", "--nullspace-device=cpu"], "chooses the devices itself; leave *-device out"),
    ],
)
def test_a_map_that_says_nothing_is_a_usage_error(options: list[str], told: str, folder: Path, gate: Gate) -> None:
    """What is no map, or one beside a device, is refused with what the option takes."""
    tiny.lora_null(folder / "whole")
    result = gate(*options, model="whole")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --nullspace-device-map: {told}"])


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--nullspace-device-map=99=1GiB,cpu=1GiB", "--nullspace-device-map: torch sees no card 99 on this machine*"),
        ("--nullspace-device=cuda:99", "--nullspace-device: torch sees no cuda:99 on this machine; choose another, *"),
    ],
)
def test_a_card_that_is_not_there_is_named_before_tests_are_collected(
    option: str, told: str, folder: Path, gate: Gate
) -> None:
    """A device that torch does not see, alone or in a map, is one usage error, as every other bad option is."""
    tiny.lora_null(folder / "whole")
    result = gate(option, model="whole")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {told}"])
