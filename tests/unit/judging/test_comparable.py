"""Whether two runs compare: what is refused, what is a doubt, and what is only told."""

import dataclasses
from typing import Any

import pytest

from pytest_nullspace.judging.comparable import COMPARED, OPTIONAL, doubts, incomparable
from pytest_nullspace.run.stats import Drift, RunStats, TextDrift
from tests import saved

LIBRARIES = {
    "python": "3.12.1",
    "pytest-nullspace": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21",
}
TOLD: dict[str, Any] = {
    "base_model": {
        "files": {"model-1.safetensors": "a" * 64, "model-2.safetensors": "b" * 64},
        "config_sha256": "c" * 64,
        "quantisation": "none",
    },
    "tokenizer": {"sha256": "d" * 64},
    "processor": {"class": "SomeProcessor", "files": {"preprocessor_config.json": "e" * 64}},
    "model_class": "LlamaForCausalLM",
    "libraries": LIBRARIES,
    "dtype": "float32",
}


def told(loss: float = 2.0, windows: str = "1" * 64, **changes: Any) -> RunStats:
    """A run that tells of all it was measured with, and how well its base reads those windows."""
    text = {**saved.ABOUT["text"], "windows_sha256": windows}
    drift = Drift("base", TextDrift(480, loss, 2.01, 0.01, 0.001, 0.002))
    return dataclasses.replace(saved.run(), about={**saved.ABOUT, "text": text, **TOLD, **changes}, drift=drift)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            told(base_model={**TOLD["base_model"], "files": {"model.safetensors": "f" * 64}}),
            "base-files (ffffffffffff, was aaaaaaaaaaaa, bbbbbbbbbbbb)",
        ),
        (
            told(base_model={**TOLD["base_model"], "config_sha256": "f" * 64}),
            "config (ffffffffffff, was cccccccccccc)",
        ),
        (
            told(base_model={**TOLD["base_model"], "quantisation": "bitsandbytes 0123"}),
            "quantisation (bitsandbytes 0123, was none)",
        ),
        (told(tokenizer={"sha256": "f" * 64}), "tokenizer (ffffffffffff, was dddddddddddd)"),
        (
            told(processor={"files": {"preprocessor_config.json": "f" * 64}}),
            "processor (preprocessor_config.json ffffffffffff, was preprocessor_config.json eeeeeeeeeeee)",
        ),
        (told(model_class="LlamaModel"), "class (LlamaModel, was LlamaForCausalLM)"),
        (
            told(libraries={**LIBRARIES, "transformers": "4.57.1", "torch": "3.0.0a1"}),
            "libraries (torch: 3.0.0a1, was 2.13.0 and 1 more)",
        ),
        (told(libraries={**LIBRARIES, "pytest-nullspace": "0.2.0"}), "libraries (pytest-nullspace: 0.2.0, was 0.1.0)"),
        (told(loss=2.011), "base-loss (on the windows 111111111111: 2.011, was 2)"),
        (told(loss=2.009), None),
        (told(loss=3.0, windows="2" * 64), "tokens (text: 222222222222, was 111111111111)"),
        (told(loss=float("nan")), None),
        (told(base_model={**TOLD["base_model"], "files": {"a": "b" * 64, "c": "a" * 64}}), None),
        (told(libraries={**LIBRARIES, "transformers": "5.24.2", "torch": "2.13.1", "peft": "0.22"}), None),
        (told(libraries="none"), None),
        (told(base_model=7, tokenizer=[], processor=None, model_class={}), None),
    ],
)
def test_what_a_run_was_measured_with_must_be_alike(run: RunStats, said: str | None) -> None:
    """Base, config, quantisation, what makes tokens, class and libraries differ by name, with both values."""
    assert [str(difference) for difference in incomparable(run, told())] == ([] if said is None else [said])


def test_what_a_stranger_s_file_tells_is_shown_as_text() -> None:
    """Digests, names and versions that hold what a terminal would follow are escaped, and cut where they are long."""
    bad = "\x1b[31m" + "x" * 1000
    strange = told(
        windows=bad,
        loss=9.0,
        base_model={"files": {bad: bad}, "config_sha256": bad, "quantisation": bad},
        processor={"files": {bad: bad}},
        model_class=bad,
        libraries={**LIBRARIES, "torch": bad, bad: bad},
        dtype=bad,
    )
    other = told(windows=bad, libraries={**LIBRARIES, bad: "1"})
    lines = [*map(str, incomparable(strange, other)), *doubts(strange, other)]
    assert {line.partition(" ")[0] for line in lines} > {"base-files", "base-loss", "class", "config", "libraries"}
    assert not any("\x1b" in line for line in lines)
    assert max(len(line) for line in lines[:-2]) < 1000


def test_a_run_that_tells_none_of_it_compares_with_a_doubt() -> None:
    """A run of an earlier version is held against a newer one, either way round, and what is not known is told."""
    older = saved.run()
    names = "base-files, base-loss, class, config, libraries, processor, quantisation, tokenizer, tokens"
    assert {*names.split(", ")} == OPTIONAL <= {*COMPARED}
    assert incomparable(told(), older) == incomparable(older, told()) == ()
    assert [*doubts(told(), older)] == [f"not known to be alike, for the earlier run does not tell it: {names}"]
    assert [*doubts(older, told())] == [f"not known to be alike, for this run does not tell it: {names}"]
    assert [*doubts(older, older)] == [*doubts(told(), told())] == []


def test_other_tokens_of_the_same_text_are_refused_whoever_cut_them() -> None:
    """An earlier run that tells no tokenizer compares on the same windows alone; a tokenizer that differs is told."""
    older = told(tokenizer=None)
    assert incomparable(told(), older) == ()
    (difference,) = incomparable(told(windows="2" * 64), older)
    assert str(difference) == "tokens (text: 222222222222, was 111111111111)"
    (difference,) = incomparable(told(windows="2" * 64, tokenizer={"sha256": "f" * 64}), told())
    assert difference.what == "tokenizer"
    task = {"sha256": "7" * 64, "windows_sha256": "3" * 64}
    (difference,) = incomparable(told(task_text=task), told(task_text={**task, "windows_sha256": "4" * 64}))
    assert str(difference) == "tokens (task text: 333333333333, was 444444444444)"


def test_other_releases_that_promise_to_be_compatible_are_told() -> None:
    """No patch of a library refuses a run: it is a line, as other numbers are, and what was allowed stands beside."""
    now = told(libraries={**LIBRARIES, "python": "3.13.0", "transformers": "5.24.2", "peft": "0.22"}, dtype="bfloat16")
    assert [*doubts(now, told())] == [
        "measured by transformers 5.24.2, was 5.23.0; peft 0.22, was 0.21; dtype bfloat16, was float32"
    ]
    assert [*doubts(told(model_class="A"), told())] == ["not alike, which was allowed: class (A, was LlamaForCausalLM)"]
