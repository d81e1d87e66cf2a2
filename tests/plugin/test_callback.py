"""The gate while transformers' Trainer trains: what it logs, what it costs, and that it changes nothing."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_nullspace import NullspaceCallback, OptionError, gate
from pytest_nullspace.shell.watching import FIRST, Pace, Stop
from tests import tiny
from tests.plugin.test_live import QUICK, adapted, everything

# transformers' and PEFT's own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

WATCHED: dict[str, Any] = {"calib_size": 2, "seqlen": 32}
NAMES = {"divergence", "loss_rise", "worst_leakage", "verdict", "seconds"}


def trainer(folder: Path, *callbacks: Any, model: Any = None, **options: Any) -> Any:
    """A Trainer of a random LoRA with dropout on a tiny Llama, seeded."""
    import transformers

    options = {"max_steps": 12, "logging_steps": 4, **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"), per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], seed=1,
        use_cpu=True, disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 128, (40, 24), generator=seeded()).tolist()]
    model = model or adapted(folder, lora_dropout=0.2)
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def logged(of: Any) -> list[dict[str, float]]:
    """What the callback logged, without the prefix."""
    entries = [entry for entry in of.state.log_history if any(name.startswith("nullspace/") for name in entry)]
    return [{name.removeprefix("nullspace/"): value for name, value in entry.items()} for entry in entries]


def test_training_is_the_same_with_the_gate_as_without_bit_for_bit(tmp_path: Path) -> None:
    """Weights, optimizer, losses and what is logged beside are the very same, with dropout and checkpointing on."""
    ends = []
    for name, callbacks in (
        ("with", [NullspaceCallback(tmp_path / "with" / "text.txt", every=3, **WATCHED)]),
        ("without", []),
    ):
        (tmp_path / name).mkdir()
        how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trained = trainer(tmp_path / name, *callbacks, **how, weight_decay=0.1)
        trained.train()
        plain = [entry for entry in trained.state.log_history if not any(key.startswith("null") for key in entry)]
        losses = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in plain if "loss" in entry]
        optimizer = trained.optimizer.state_dict()["state"]
        ends.append((everything(trained.model), optimizer, losses, len(logged(trained))))
    (one, moments, losses, count), (other, others, other_losses, none) = ends
    assert (count, none) == (5, 0)
    assert losses == other_losses
    assert len(losses) == 3
    for name, value in one["numbers"].items():
        assert torch.equal(value, other["numbers"][name]), name
    for key, state in moments.items():
        assert all(torch.equal(value, others[key][name]) for name, value in state.items())
    for what in ("modes", "active", "config"):
        assert one[what] == other[what]
    assert torch.equal(one["chance"][0], other["chance"][0])
    assert one["chance"][1:] == other["chance"][1:]


def test_the_figures_go_where_the_trainer_logs(tmp_path: Path) -> None:
    """They are in the trainer's history and reach its other callbacks, at the steps asked for, the last as `gate()`."""
    import transformers

    heard: list[tuple[int, dict[str, float]]] = []

    class Reporter(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            heard.append((state.global_step, dict(logs)))

    watching = NullspaceCallback(tmp_path / "text.txt", tmp_path / "task.txt", every=4, **WATCHED)
    (tmp_path / "task.txt").write_text(tiny.TEXT[::-1])
    trained = trainer(tmp_path, Reporter(), watching, max_steps=10)
    trained.train()
    found = logged(trained)
    assert [entry["step"] for entry in found] == [0, 4, 8, 10]
    assert all(NAMES | {"task_gain"} <= entry.keys() for entry in found)
    assert [step for step, logs in heard if "nullspace/verdict" in logs] == [0, 4, 8, 10]
    assert [step for step, logs in heard if "loss" in logs] == [4, 8]
    options = {**QUICK, **WATCHED}
    report = gate(trained.model, tmp_path / "text.txt", tmp_path / "task.txt", **options)
    assert found[-1]["divergence"] == pytest.approx(report.run.drift.preserved.divergence, rel=1e-6)  # type: ignore[union-attr]
    assert found[-1]["worst_leakage"] == pytest.approx(max(row["leakage"] for row in report.layers), rel=1e-6)
    assert found[-1]["verdict"] == {"SAFE": 0, "LOOK": 1, "DO NOT DEPLOY": 2}[report.verdict]
    assert watching.report is not None
    assert watching.report.verdict == report.verdict
    assert watching.stopped is None


@pytest.mark.parametrize(
    ("stop_on", "said"),
    [
        ("drift>0.0001", r"drift is [\d.e-]+, above 0.0001"),
        (["divergence>1e9", "worst-leakage>0.01"], r"worst_leakage is [\d.]+, above 0.01"),
        ("DO NOT DEPLOY", r"the verdict is DO NOT DEPLOY"),
    ],
)
def test_a_bound_or_a_verdict_ends_the_training(
    stop_on: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first measurement between steps that is beyond it, not before the first step, with a reason."""
    loud: dict[str, Any] = {"profile": "nullspace", "threshold": ["leakage:0.000001:0.000002"], **WATCHED}
    watching = NullspaceCallback(tmp_path / "text.txt", every=3, stop_on=stop_on, **loud)
    trained = trainer(tmp_path, watching)
    trained.train()
    assert trained.state.global_step == 3
    assert re.fullmatch(said, watching.stopped or "")
    assert f"nullspace: the training ends after step 3: {watching.stopped}" in caplog.text
    assert [entry["step"] for entry in logged(trained)] == [0, 3]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("gone.txt", {}, "no such file"),
        ("text.txt", {"base": "no/such/base"}, "base: no/such/base is no directory"),
        ("text.txt", {"seqlen": 300}, "300 tokens are more than the 256 that the model takes"),
        ("text.txt", {"stop_on": "task_gain<0"}, "stop_on: task_gain<0: that figure is not measured of this adapter"),
    ],
)
def test_what_cannot_be_measured_is_told_once_and_the_training_goes_on(
    text: str, options: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The training ends as it would, and one warning says why nothing is gated."""
    trained = trainer(tmp_path, NullspaceCallback(tmp_path / text, every=1, **{**WATCHED, **options}), max_steps=3)
    with caplog.at_level(logging.WARNING, "pytest_nullspace"):
        trained.train()
    assert trained.state.global_step == 3
    (told,) = [record.getMessage() for record in caplog.records if record.name == "pytest_nullspace"]
    assert told.startswith("nullspace: the adapter is not gated any more, the training goes on: ")
    assert said in told


def test_an_error_amid_the_training_ends_the_gate_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What breaks in a measurement leaves the model as it was, so that the training ends as one without the gate."""
    ends = []
    for name, watched in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        model = adapted(tmp_path / name, lora_dropout=0.2)

        def break_off(module: Any, *_: Any) -> None:
            if not module.training and module.seen:
                raise RuntimeError("the card is gone")

        layer = model.get_base_model().model.layers[1]
        layer.seen = False
        layer.register_forward_hook(break_off)
        trained = trainer(
            tmp_path / name,
            *([NullspaceCallback(tmp_path / name / "text.txt", every=2, **WATCHED)] if watched else []),
            model=model,
        )
        trained.add_callback(Later(layer))
        trained.train()
        ends.append(everything(trained.model)["numbers"])
        assert len(logged(trained)) == (2 if watched else 0)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert caplog.text.count("the adapter is not gated any more, the training goes on: ") == 1
    assert "the card is gone" in caplog.text


def test_a_report_does_not_outlive_the_model_that_it_is_of(tmp_path: Path) -> None:
    """Once a measurement fails, as where a norm of the base is trained as well, no earlier report stands for it."""
    import transformers

    class Unfreezes(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            earlier.append(watching.report)
            given["model"].get_base_model().model.norm.weight.requires_grad_(state.global_step >= 2)

    earlier: list[Any] = []
    watching = NullspaceCallback(tmp_path / "text.txt", every=1, stop_on="drift>1000", **WATCHED)
    trainer(tmp_path, Unfreezes(), watching, max_steps=4).train()
    assert len(earlier) == 4
    assert earlier[1] is not None
    assert [earlier[2], watching.report, watching.stopped] == [None] * 3
    assert "model.norm.weight" in (watching.failed or "")
    assert (watching.failed or "").endswith("; stop_on cannot end it any more")


def Later(layer: Any) -> Any:  # noqa: N802
    """A callback after whose third step the layer breaks where it is not trained."""
    import transformers

    class Breaks(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            layer.seen = state.global_step >= 3

    return Breaks()


def test_by_default_the_gate_takes_two_hundredths_of_the_time_of_the_steps(tmp_path: Path) -> None:
    """However much a measurement costs, those between steps take no more than the share, and are as often as that."""
    pace, made = Pace(None, 0.02), []
    pace.cost = 0.4
    pace.plan(0)
    assert pace.next == FIRST
    for step in range(1, 2001):
        pace.steps, pace.trained = step, pace.trained + 0.1 * (1 + step % 3)
        if step >= pace.next:
            if pace.is_worth_it:
                pace.cost = 0.3 + 0.2 * (step % 2)
                pace.spent += pace.cost
                made.append(step)
            pace.plan(step)
            assert pace.next > step
    assert pace.spent <= 0.025 * pace.trained
    assert pace.spent >= 0.015 * pace.trained
    assert made[0] <= 110
    watching = NullspaceCallback(tmp_path / "text.txt", calib_size=2, seqlen=32)
    trained = trainer(tmp_path, watching, max_steps=60)
    trained.train()
    steps = [entry["step"] for entry in logged(trained)]
    assert steps[0] == 0
    assert steps[-1] == 60
    assert watching._pace.spent <= 0.02 * watching._pace.trained + watching._pace.cost


@pytest.mark.parametrize(
    ("given", "value", "ends"),
    [
        ("drift>0.15", {"divergence": 0.1, "loss_rise": 0.2}, True),
        ("drift>0.15", {"divergence": 0.1, "loss_rise": -0.2}, False),
        (" Loss-Rise > 1e-2 ", {"loss_rise": 0.02}, True),
        ("nullspace/leakage<0.5", {"worst_leakage": 0.4}, True),
        ("drift>0.15", {"divergence": math.nan, "loss_rise": 0.0}, True),
        ("task_gain<0", {"task_gain": math.nan}, True),
        ("LOOK", {"verdict": 2}, True),
        ("look", {"verdict": 0}, False),
        ("do_not_deploy", {"verdict": 1}, False),
        ("DO NOT DEPLOY", {"verdict": -1}, False),
    ],
)
def test_what_ends_a_training_is_read_as_it_is_written(given: str, value: dict[str, float], ends: bool) -> None:
    """A bound on a figure or a verdict, in any case; what is no number passes no bound."""
    assert (Stop.of(given).reached(value) is not None) is ends


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop_on": "drift=0.15"}, "stop_on: takes FIGURE>BOUND or FIGURE<BOUND, of drift, divergence, loss_rise, "),
        ({"stop_on": "speed>1"}, "stop_on: takes "),
        ({"stop_on": "drift>much"}, "stop_on: takes "),
        ({"stop_on": "drift>nan"}, "stop_on: takes "),
        ({"every": 0}, "every: takes a whole number from 1, or auto, not 0"),
        ({"every": "often"}, "every: takes a whole number from 1, or auto, not 'often'"),
        ({"share": 0}, "share: takes a number above 0, up to 1, not 0"),
        ({"calib": 3}, "gate: takes no option 'calib'"),
        ({"device": "cpu"}, "gate: a model in memory is measured where and as it is"),
    ],
)
def test_a_wrong_argument_is_told_before_the_training(options: dict[str, Any], said: str) -> None:
    """What is no value of an argument is an error of the call that made the callback."""
    with pytest.raises(OptionError, match=f"^{re.escape(said)}"):
        NullspaceCallback("text.txt", **options)


def test_without_a_trainer_the_history_is_told(tmp_path: Path) -> None:
    """In a loop of one's own that calls the handler, the figures are in the state's history."""
    import transformers

    state, control = transformers.TrainerState(), transformers.TrainerControl()
    state.is_world_process_zero = True
    watching = NullspaceCallback(tmp_path / "text.txt", every=1, **WATCHED)
    watching.on_train_begin(None, state, control, model=adapted(tmp_path))
    (entry,) = state.log_history
    assert entry["step"] == 0
    assert {f"nullspace/{name}" for name in NAMES} <= entry.keys()


@pytest.mark.skipif(find_spec("trl") is None, reason="needs trl, which is not installed")
def test_a_trainer_of_trl_is_watched_alike(tmp_path: Path) -> None:
    """SFTTrainer makes the PEFT model itself, brings its tokenizer, and logs the figures beside its own."""
    import datasets
    import peft
    import trl

    model = adapted(tmp_path).unload()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        logging_steps=2, save_strategy="no", disable_tqdm=True, max_length=32, bf16=False,
    )  # fmt: skip
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.eos_token = tokenizer.pad_token = "?"
    rows = datasets.Dataset.from_list([{"text": tiny.TEXT[i : i + 40]} for i in range(20)])
    trained = trl.SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        callbacks=[NullspaceCallback(tmp_path / "text.txt", every=2, **WATCHED)],
    )  # fmt: skip
    trained.train()
    found = logged(trained)
    assert [entry["step"] for entry in found] == [0, 2, 4, 6]
    assert all(entry.keys() >= NAMES for entry in found)
    assert [entry["step"] for entry in trained.state.log_history if "loss" in entry] == [2, 4, 6]


TWO = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch, transformers
from pytest_nullspace import NullspaceCallback
from tests.plugin.test_callback import WATCHED, logged, trainer
from tests.plugin.test_live import adapted
rank = int(__import__("os").environ["RANK"])
folder = Path(sys.argv[1]) / str(rank)
folder.mkdir()
loud = {"profile": "nullspace", "threshold": ["leakage:0.000001:0.000002"], **WATCHED}
text = folder / ("gone.txt" if sys.argv[2] == "fail" else "text.txt")
again = sys.argv[2] == "again"
watching = NullspaceCallback(text, every=2, stop_on=None if again else "DO NOT DEPLOY", **loud)
trained = trainer(folder, watching, max_steps=5)
class Loses(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if again and state.global_step == 5 and (folder / "base").exists():
            (folder / "base").rename(folder / "lost")
trained.add_callback(Loses())
trained.train()
measured = len(logged(trained))
if again:
    trained.train()
told = [trained.state.global_step, measured, watching.stopped, watching._is_on]
(folder / "told.json").write_text(json.dumps(told))
torch.distributed.barrier()
sys.stderr.flush()
__import__("os")._exit(0)  # torch itself aborts now and then as it takes a group of gloo down
"""


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("stop", [[2, 2, "the verdict is DO NOT DEPLOY", True], [2, 0, "the verdict is DO NOT DEPLOY", True]]),
        ("fail", [[5, 0, None, False], [5, 0, None, False]]),
        ("again", [[5, 3, None, False], [5, 0, None, False]]),
    ],
)
def test_several_processes_stop_together_and_none_waits_for_another(what: str, told: list[Any], tmp_path: Path) -> None:
    """Process 0 measures and logs alone; what it decides, or that it failed, also after the last step of a training
    that is followed by another, all of them follow at the same step."""
    root = Path(__file__).parents[2]
    (tmp_path / "two.py").write_text(TWO)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "two.py",
         tmp_path, what],
        env={**os.environ, "PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads((tmp_path / rank / "told.json").read_text()) for rank in "01"] == told
