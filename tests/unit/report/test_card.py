"""The result in a model card: what is written, what is kept, and what is refused."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.judging.decision import decide
from pytest_nullspace.judging.invariants import Expectations
from pytest_nullspace.report import card
from tests import saved

OWN = """\
---
# what the reader should know
license: apache-2.0   # as its base
model-index:
- name: my-adapter
  results:
  - task:
      type: text-generation   # by hand
    dataset:
      type: gsm8k
      name: GSM8K
    metrics:
    - type: accuracy
      value: 0.90
# the end of it
tags: [lora, "null space"]
---

# My adapter

It learns.
"""


def result(**about: Any) -> card.Result:
    """A whole run that passes, told as ``about`` says."""
    run = saved.full()
    run = dataclasses.replace(run, about={**run.about, "weights_sha256": {"a.safetensors": "ab" * 32}, **about})
    return card.Result("ft", run, Expectations(), decide(run, Expectations()), "0.1.0")


def results(text: str) -> list[dict[str, Any]]:
    """The results of this plugin in a card's metadata, as the hub reads them."""
    found = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    assert found is not None
    index = yaml.safe_load(found[1])["model-index"]
    every = [of for item in index for of in item["results"]]
    return [of for of in every if (of.get("source") or {}).get("name") == "pytest-nullspace"]


def metrics(text: str) -> Mapping[str, object]:
    """Their metrics by type."""
    return {metric["type"]: metric["value"] for of in results(text) for metric in of["metrics"]}


def test_a_new_card_names_library_base_and_result() -> None:
    """A card made from nothing is one that the hub takes, with the figures of each text under its name."""
    written = card.renewed(card.created("peft", "org/base"), result(), "README.md")
    read = ModelCard(written)
    assert (read.data.get("library_name"), read.data.get("base_model")) == ("peft", "org/base")
    assert [(of["dataset"]["name"], of["dataset"]["args"]) for of in results(written)] == [
        ("text.txt", {"windows": 16, "tokens": 512}),
        ("task.txt", {"windows": 16, "tokens": 512}),
    ]
    told = metrics(written)
    assert told["nullspace-verdict"] == str(result().decision.call)
    assert told["nullspace-divergence"] == 0.01
    assert told["nullspace-loss-rise"] == 0.01
    assert told["nullspace-task-gain"] == 2.0
    assert told["nullspace-preservation"] == pytest.approx(0.25 / 8.0, rel=1e-5)
    assert "# ft\n" in written
    assert written.count(card.BEGIN) == written.count(card.END) == 1
    assert "ab" * 32 in written
    assert "2 of 2 layers on text.txt (16 windows, 512 tokens) and task text task.txt" in written


def test_all_that_the_user_wrote_stays_byte_for_byte() -> None:
    """Without what this plugin added the card is what it was: comments, order, numbers, text and line ends."""
    for own in (OWN, OWN.replace("\n", "\r\n"), "\ufeff" + OWN):
        written = card.renewed(own, result(), "README.md")
        newline = "\r\n" if "\r\n" in own else "\n"
        added = re.search(r"(?<=\n)- name: my-adapter\r?\n(?:  .*\n)*?(?=# the end)", written.partition("0.90")[2])
        assert added is not None
        section = written[written.index(card.BEGIN) : written.index(card.END) + len(card.END)]
        assert written.replace(added[0], "").replace(newline + section + newline, "") == own
        assert len(metrics(written)) > 5
        assert ("\r\n" in written) == (newline == "\r\n")
        assert not re.search(r"(?<!\r)\n", written) or newline == "\n"


@pytest.mark.parametrize(
    "own",
    [
        "",
        "# only text\n",
        "no line end",
        "---\n---\ntext\n",
        "---\nlicense: mit\n---",
        "---\nlicense: mit\nmodel-index: []\ntags: [a]\n---\nx\n",
        "---\nmodel-index:\nlicense: mit\n---\nx\n",
        "---\nmodel-index:\n  - name: a\n    results: []\nlicense: mit\n---\nx\n",
        "---\nmodel-index: [{name: a, results: []}] # mine\nlicense: mit\n---\nx\n",
        OWN,
        OWN.replace("\n", "\r\n"),
        f"# a\n\n{card.BEGIN}\nold\n{card.END}\n\nbelow\n",
    ],
)
def test_twice_is_as_once(own: str) -> None:
    """The second run leaves every byte as the first wrote it, and another result takes the place of the first."""
    once = card.renewed(own, result(), "README.md")
    assert card.renewed(once, result(), "README.md") == once
    other = dataclasses.replace(result(), version="0.2.0")
    later = card.renewed(once, other, "README.md")
    assert later == once.replace(" 0.1.0: ", " 0.2.0: ")
    assert ModelCard(later).data.get("eval_results")


def test_a_value_without_a_margin_says_so() -> None:
    """Of one window there is no margin, which the table says in words."""
    of = result()
    assert of.run.drift is not None
    one = dataclasses.replace(of.run.drift.preserved, divergence_margin=math.inf)
    run = dataclasses.replace(of.run, drift=dataclasses.replace(of.run.drift, preserved=one))
    written = card.renewed("", dataclasses.replace(of, run=run), "README.md")
    assert "| divergence | 0.01 (one window, so no margin) |" in written


def test_what_stands_around_the_section_stays() -> None:
    """A section within the text is renewed in its place."""
    own = f"above\n\n{card.BEGIN}\nold\n{card.END}\n\nbelow\n"
    written = card.renewed(own, result(), "README.md")
    assert written.endswith(f"{card.END}\n\nbelow\n")
    assert "above\n\n<!--" in written
    assert "old" not in written


def test_results_that_a_tool_put_among_others_are_renewed() -> None:
    """Where another program wrote the card anew and joined all results, ours are taken out and told once."""
    joined = ModelCard(card.renewed(OWN, result(), "README.md"))
    text = str(joined)
    assert len(yaml.safe_load(text.split("---")[1])["model-index"]) == 1
    later = card.renewed(text, result(), "README.md")
    assert len(results(later)) == 2
    assert sum(of.dataset_type == "gsm8k" for of in ModelCard(later).data["eval_results"]) == 1
    assert card.renewed(later, result(), "README.md") == later


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ("---\nlicense: [\n---\n", "its metadata cannot be parsed: .*line 3"),
        ("---\nlicense: mit\n", "never closed"),
        ("---\njust words\n---\n", "cannot be parsed"),
        ("---\nmodel-index: {a: b}\n---\n", "cannot be parsed"),
        ("---\nmodel-index:\n- results: 3\n---\n", "cannot be parsed"),
        ("---\nmodel-index:\n- name: a\n  results:\n  - source: x\n---\n", "cannot be parsed"),
        ("---\n{license: mit}\n---\n", "within braces"),
        ("---\na: 1\na: 2\n---\n", "a key twice"),
        ("---\na: &x [1]\nb: *x\n---\n", "aliases"),
        ("---\na: !!python/object:os.system {}\n---\n", "cannot be parsed"),
        (f"---\na: {'[' * 5000}\n---\n", "cannot be parsed"),
        (f"---\na: {'x' * 300_000}\n---\n", "characters"),
        (f"{card.BEGIN}\n", "needs one line"),
        (f"{card.END}\n{card.BEGIN}\n", "needs one line"),
        (f"{card.BEGIN}\n{card.END}\n{card.BEGIN}\n{card.END}\n", "needs one line"),
    ],
)
def test_a_card_that_cannot_be_kept_is_refused(own: str, why: str) -> None:
    """It is told in one line with its file, and what to do."""
    with pytest.raises(CheckpointError, match=why) as error:
        card.renewed(own, result(), "runs/ft/README.md")
    told = str(error.value)
    assert told.startswith("runs/ft/README.md: ")
    assert told.endswith("mend the card, or leave --nullspace-card out")
    assert "\n" not in told


def test_a_figure_that_is_no_number_is_told_in_words() -> None:
    """An adapter with a NaN is red, its card says so, and the hub can still read it."""
    told = result()
    layers = (dataclasses.replace(told.run.layers[0], down_norm=float("nan")), *told.run.layers[1:])
    told = dataclasses.replace(told, run=dataclasses.replace(told.run, layers=layers))
    told = dataclasses.replace(told, decision=decide(told.run, told.expectations))
    once = card.renewed(OWN, told, "README.md")
    assert card.renewed(once, told, "README.md") == once
    assert metrics(once)["nullspace-verdict"] == "DO NOT DEPLOY"
    assert metrics(once)["nullspace-preservation"] == "not finite"


HOSTILE = "a|b`<script>x</script>\x1b[31m\n---\n# x <!-- pytest-nullspace: end --> *_.txt"


def test_hostile_names_are_shown_letter_by_letter() -> None:
    """Neither the name of a text nor that of a file ends the metadata, the section or the table, or becomes markup."""
    told = result(weights_sha256={HOSTILE: HOSTILE}, task_dataset=HOSTILE)
    told = dataclasses.replace(told, name=HOSTILE, run=dataclasses.replace(told.run, calib_dataset=HOSTILE))
    once = card.renewed("", told, "README.md")
    assert card.renewed(once, told, "README.md") == once
    _, *rest = once.split("\n---\n")
    (text,) = rest
    assert (text.count(card.BEGIN), text.count(card.END)) == (1, 1)
    assert "<script>" not in text
    assert "\x1b" not in once
    assert len(results(once)) == 2


def test_the_paths_of_this_machine_stay_here() -> None:
    """Of a text's path the card tells the last name alone."""
    told = result(task_dataset="/home/me/secret/task.txt")
    written = card.renewed("", told, "README.md")
    assert "task.txt" in written
    assert "secret" not in written


PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20)


@given(
    st.dictionaries(PLAIN.filter(lambda key: key not in ("model-index", "")), PLAIN | st.integers(), max_size=4), PLAIN
)
def test_any_metadata_and_text_are_kept(data: dict[str, object], text: str) -> None:
    """Whatever plain metadata and text a card has, the result is added to both, and nothing else changes."""
    own = f"---\n{yaml.safe_dump(data, allow_unicode=True)}---\n{text}" if data else text
    written = card.renewed(own, result(), "README.md")
    assert card.renewed(written, result(), "README.md") == written
    assert len(results(written)) == 2
    assert text in written
