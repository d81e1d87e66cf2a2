"""The reports: the reference's block, the summary, the reading in words, Markdown; rendered from statistics alone."""

import dataclasses
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.checkpoint import Checkpoint, LayerSpec
from pytest_nullspace.judging.decision import decide
from pytest_nullspace.judging.invariants import Expectations, Stage, judge, judge_averages
from pytest_nullspace.judging.profiles import Chosen, Profile
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report import brief, doubts, html, markdown, notes, terminal, words
from pytest_nullspace.run.figures import beside_a_task, of_layers
from pytest_nullspace.run.stats import UNREACHED, Drift, LayerStats, RunStats, TextDrift
from pytest_nullspace.settings import GivenText
from tests import saved

TRAINED, INIT = Expectations(), Expectations(Stage.INIT)
# The figures of the reference's own example.
EXAMPLE = LayerStats(
    name="model.layers.0.self_attn.q_proj",
    rows=100,
    in_features=4096,
    rank=128,
    out_features=4096,
    input_norm=12.345678,
    down_norm=0.123456,
    update_norm=0.234567,
    base_norm=11.987654,
    output_norm=12.456789,
    mean_leakage=0.0001,
    down_weight_norm=123.456789,
    up_weight_norm=45.678901,
    base_weight_norm=234.56789,
)
BLOCK = """\
============================================================
Layer: model.layers.0.self_attn.q_proj
============================================================
samples: 100
input width: 4096, rank: 128, output width: 4096
------------------------------------------------------------
activation norms:
  ||X|| (avg):           12.345678
  ||BX|| (avg):          0.123456
  ||ABX|| (avg):         0.234567
  ||W_residual @ X||:    11.987654
  ||full output||:       12.456789
------------------------------------------------------------
null-space figures:
  ||BX||/||X||:          1.000e-02  ✓
  ||ABX||/||X||:         1.900e-02  ✓
  leakage / chance:      3.200e-03  ✓
------------------------------------------------------------
adapter contribution:
  ||ABX||/||output||:    1.883e-02  ✓
------------------------------------------------------------
weight norms:  ||B||_F 123.456789   ||A||_F 45.678901   ||W_residual||_F 234.567890"""
LOST = dataclasses.replace(EXAMPLE, name="model.layers.1.mlp.up_proj", down_norm=9.0, mean_leakage=0.5)
WEAK = dataclasses.replace(EXAMPLE, name="model.layers.2.mlp.up_proj", update_norm=0.05)
BROKEN = dataclasses.replace(EXAMPLE, name="model.layers.3.mlp.up_proj", output_norm=math.nan)


def run_of(*layers: LayerStats, of: int | None = None) -> RunStats:
    return RunStats("models/ft", "wikitext2", layers, len(layers) if of is None else of)


def summary(run: RunStats, expectations: Expectations = TRAINED) -> list[tuple[str, Tier | None]]:
    return list(terminal.summary(run, [judge(layer, expectations) for layer in run.layers], expectations))


def read(layer: LayerStats, expectations: Expectations = TRAINED) -> str:
    return "\n".join(line for line, _ in words.reading(judge(layer, expectations)))


# The block


def test_the_block_is_the_references() -> None:
    """Every line of the reference's block is there in its order and precision, leakage beside it."""
    assert "\n".join(terminal.block(EXAMPLE, judge(EXAMPLE, TRAINED))) == BLOCK


def test_the_block_tells_of_rows_of_b_that_add_nothing() -> None:
    """Where B spans less than its rank, the block says how much."""
    deficient = dataclasses.replace(EXAMPLE, down_rank=96)
    lines = list(terminal.block(deficient, judge(deficient, TRAINED)))
    assert "input width: 4096, rank: 128 (B spans 96), output width: 4096" in lines


def test_the_block_marks_each_figure_by_its_own_tier() -> None:
    """One figure's failure does not mark another, and a defect is said below the numbers."""
    lines = list(terminal.block(LOST, judge(LOST, TRAINED)))
    assert [line[-1] for line in lines if line.startswith("  ||BX||/") or line.startswith("  leakage")] == ["✗", "✗"]
    assert next(line for line in lines if line.startswith("  ||ABX||/||X||")).endswith("✓")
    assert any(line.endswith("⚠") for line in terminal.block(WEAK, judge(WEAK, TRAINED)))
    assert list(terminal.block(BROKEN, judge(BROKEN, TRAINED)))[-1] == "  ✗ non-finite output (NaN or infinity)"


def test_a_figure_that_is_not_judged_has_no_mark() -> None:
    """At the initial stage contribution is shown but not judged."""
    line = next(li for li in terminal.block(EXAMPLE, judge(EXAMPLE, INIT)) if li.startswith("  ||ABX||/||output||"))
    assert line == "  ||ABX||/||output||:    1.883e-02"


# The summary


def test_the_summary_counts_and_averages() -> None:
    """Layers are counted by tier, averages are shown below the table, and the reading follows."""
    lines = [line for line, _ in summary(run_of(EXAMPLE, LOST, WEAK))]
    assert lines[0] == "gated 3 of 3 layers: 1 green, 1 to look at, 1 red"
    average = next(line for line in lines if line.startswith("  average"))
    mean = (0.123456 * 2 + 9.0) / 3 / 12.345678
    assert average.split()[1] == f"{mean:.3g}"
    assert "reading (averages over all layers):" in lines
    assert len(lines) - lines.index("reading (averages over all layers):") == 1 + len(of_layers()) - len(
        beside_a_task()
    )


def test_the_worst_layers_come_first_and_few_are_shown() -> None:
    """Of many layers only the worst are listed, defects before failures before warnings, each in its colour."""
    many = [dataclasses.replace(EXAMPLE, name=f"model.layers.{i}.mlp.gate_proj") for i in range(20)]
    found = summary(run_of(*many, WEAK, LOST, BROKEN))
    rows = [(line.split()[:2], tier) for line, tier in found if re.match(r". model\.", line)]
    assert len(rows) == terminal.WORST_SHOWN
    assert rows[:3] == [
        (["✗", BROKEN.name], Tier.FAIL),
        (["✗", LOST.name], Tier.FAIL),
        (["⚠", WEAK.name], Tier.WARN),
    ]
    assert {tier for _, tier in rows[3:]} == {None}
    assert any(line.startswith("  worst layers ") for line, _ in found)
    assert any(line.endswith("non-finite output (NaN or infinity)") for line, _ in found)


def test_the_table_is_aligned() -> None:
    """Every row of the table is as wide as its title, whatever the length of the names."""
    lines = [line for line, _ in summary(run_of(EXAMPLE, LOST))]
    title = next(line for line in lines if line.startswith("  layers"))
    rows = [line for line in lines if line[2:].startswith(("model.", "average"))]
    assert len(rows) == 3
    assert {len(line) for line in rows} == {len(title)}


@pytest.mark.parametrize(
    ("layers", "of", "tier"),
    [
        ((EXAMPLE,), 1, Tier.PASS),
        ((EXAMPLE,), 2, Tier.WARN),
        ((EXAMPLE, WEAK), 2, Tier.WARN),
        ((EXAMPLE, LOST), 2, Tier.FAIL),
        ((EXAMPLE, LOST), 3, Tier.FAIL),
    ],
)
def test_the_count_has_the_colour_of_the_worst(layers: tuple[LayerStats, ...], of: int, tier: Tier) -> None:
    """The counting line is green only where every adapted layer was gated and passed."""
    assert next(t for line, t in summary(run_of(*layers, of=of)) if line.startswith("gated")) is tier


def test_an_incomplete_run_has_no_reading_of_averages() -> None:
    """Averages over some of the layers are not read as if they were the model's."""
    assert not any("reading" in line for line, _ in summary(run_of(EXAMPLE, of=2)))
    assert "null space is well kept" not in markdown.report(run_of(EXAMPLE, of=2), TRAINED)


def test_a_run_of_no_layers_is_still_reported() -> None:
    """A statistics file without layers is told as one, not with a traceback."""
    assert summary(run_of(of=3))[0][0] == "gated 0 of 3 layers: 0 green, 0 to look at, 0 red"
    assert "Gated 0 of 3 layers" in markdown.report(run_of(of=3), TRAINED)


def test_what_was_run_is_told_where_it_is_known() -> None:
    """Text, device and times open the summary of a run of ours; a run that lacks them is reported without."""
    about = {
        "text": {"windows": 16, "tokens": 32768},
        "device": "cuda:0",
        "dtype": "bfloat16",
        "measured": {"seconds": {"load": 2.04, "pass": 3.06}},
    }
    first = summary(dataclasses.replace(run_of(EXAMPLE), about=about))[0][0]
    assert first == "text wikitext2: 16 windows, 32,768 tokens; cuda:0 bfloat16; loaded in 2.0 s, pass 3.1 s"
    assert summary(run_of(EXAMPLE))[0][0].startswith("gated")


def test_a_summary_of_a_foreign_file_is_not_stopped_by_what_it_lacks() -> None:
    """Whatever else a statistics file holds under our names, its figures are reported."""
    huge = {
        "text": {"windows": 16, "tokens": 32768},
        "device": "cpu",
        "dtype": "float32",
        "measured": {"seconds": {"load": 10**400, "pass": 1}},
    }
    for about in (
        {"text": {"windows": 3}},
        {"text": 3, "measured": []},
        {"text": None, "measured": {"seconds": "x"}},
        huge,
    ):
        assert summary(dataclasses.replace(run_of(EXAMPLE), about=about))[0][0].startswith("gated")


@pytest.mark.parametrize(("verbose", "blocks"), [(0, 0), (1, 0), (2, 2), (3, 2)])
def test_blocks_are_printed_when_asked_for(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, verbose: int, blocks: int
) -> None:
    """The real terminal reporter prints the summary always, and from ``-vv`` on a block for each layer."""
    out = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(pytestconfig.option, "verbose", verbose)
        run = run_of(EXAMPLE, LOST)
        terminal.write(pytest.TerminalReporter(pytestconfig, out), run, TRAINED, decide(run, TRAINED))
    assert out.getvalue().count("Layer: ") == blocks
    assert "gated 2 of 2 layers: 1 green, 0 to look at, 1 red" in out.getvalue()


# The reading


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "✓ preservation 0.01 (pass < 0.1, fail > 0.5): the null space is well kept"),
        (
            {"down_norm": 3.0},
            "⚠ preservation 0.243 (pass < 0.1, fail > 0.5): the null space is degraded, but acceptable",
        ),
        ({"down_norm": 9.0}, "✗ preservation 0.729 (pass < 0.1, fail > 0.5): the null space is lost"),
        ({}, "✓ effectiveness 0.019 (pass > 0.0001, fail < 1e-06): the adapter learned"),
        ({"update_norm": 1e-4}, "⚠ effectiveness 8.1e-06 (pass > 0.0001, fail < 1e-06): a small update"),
        ({"update_norm": 0.0}, "✗ effectiveness 0 (pass > 0.0001, fail < 1e-06): no update at all"),
        ({"update_norm": 1e-6}, "✗ effectiveness 8.1e-08 (pass > 0.0001, fail < 1e-06): nothing learned"),
        ({"update_norm": 1e-6}, "✗ contribution 8.03e-06 % (pass > 1 %, fail < 0.1 %): almost no influence"),
        ({}, "✓ contribution 1.88 % (pass > 1 %, fail < 0.1 %): a clear effect"),
        ({"update_norm": 0.05}, "⚠ contribution 0.401 % (pass > 1 %, fail < 0.1 %): a small influence"),
        (
            {"update_norm": 0.0},
            "✗ contribution 0 % (pass > 1 %, fail < 0.1 %): no influence on the output, for",
        ),
        ({}, "✓ leakage 0.0032 (pass < 0.5, fail > 0.75): the adapter's input space is 312 times quieter"),
        ({"mean_leakage": 0.02}, "⚠ leakage 0.64"),
        ({"mean_leakage": 0.0625}, "not a null space of this text: 2.0 times louder than a random subspace"),
        ({"mean_leakage": 0.0}, "the adapter's input space is perfectly quiet"),
        ({"mean_leakage": math.nan}, "not a null space of this text: not measurable against chance"),
    ],
)
def test_each_tier_of_each_figure_is_read_in_words(change: dict[str, float], said: str) -> None:
    """Every tier of every figure has its own words, with the value and both bounds before them."""
    layer = dataclasses.replace(EXAMPLE, **change)  # type: ignore[arg-type]
    assert said in read(layer)


def test_before_training_an_update_is_read_as_the_fault() -> None:
    """At the initial stage the words for the update are the reverse, in the summary as in a failure's message."""
    untouched = dataclasses.replace(EXAMPLE, update_norm=0.0)
    assert "no update yet, as it must be before training" in read(untouched, INIT)
    assert "this is no initial checkpoint; drop --nullspace-stage=init" in read(EXAMPLE, INIT)
    message = words.layer_failure(EXAMPLE, judge(EXAMPLE, INIT))
    assert "this is no initial checkpoint" in message
    assert "the adapter learned" not in message
    assert "this is no initial checkpoint" in markdown.report(run_of(EXAMPLE), INIT)


def test_a_defect_is_all_that_is_read() -> None:
    """Where nothing could be judged, no figure is read as if it meant anything."""
    assert list(words.reading(judge(BROKEN, TRAINED))) == [("✗ non-finite output (NaN or infinity)", Tier.FAIL)]


# Failures


def test_a_failed_layers_message_is_the_verdict_then_everything() -> None:
    """The first line is the verdict; below stand the norms it comes from, and every figure with its bounds."""
    lines = words.layer_failure(LOST, judge(LOST, TRAINED)).splitlines()
    assert lines[0] == "preservation 0.729 > 0.5, leakage 16 > 0.75"
    assert lines[1] == ""
    assert lines[2] == (
        "mean norms over 100 rows: input 12.3457, behind B 9, update 0.234567, without the update 11.9877, "
        "output 12.4568"
    )
    assert [line[0] for line in lines[3:]] == ["✗", "✓", "✓", "✗"]


def test_an_update_that_is_exactly_zero_says_what_makes_it_so() -> None:
    """A zero A, a scale of 0 and a product that is lost are three reasons, and each layer has its own."""
    reasons: tuple[tuple[dict[str, Any], str], ...] = (
        ({"up_weight_norm": 0.0, "scale": 2.0}, "its A is zero"),
        ({"scale": 0.0}, "its scale is 0: lora_alpha or an alpha_pattern is 0 in adapter_config.json"),
        ({"scale": 2.0}, "A B x is zero"),
        ({}, "A B x is zero"),
    )
    for changes, why in reasons:
        layer = dataclasses.replace(EXAMPLE, update_norm=0.0, **changes)
        lines = words.layer_failure(layer, judge(layer, TRAINED)).splitlines()
        assert lines[1] == f"the update is exactly zero ({why}): with the adapter the output is the same as without"
    off = RunStats("ft", "text", (dataclasses.replace(EXAMPLE, update_norm=0.0, scale=0.0),), 1)
    assert "(every scale is 0)" in words.model_failure(off, judge_averages(off, TRAINED))


def test_a_defect_and_failed_averages_have_their_message() -> None:
    """A defect is told with the norms alone; averages are told with the number of layers behind them."""
    message = words.layer_failure(BROKEN, judge(BROKEN, TRAINED))
    assert message.splitlines()[0] == "non-finite output (NaN or infinity)"
    assert message.endswith("output nan")
    run = run_of(LOST, LOST)
    assert "averages over 2 layers" in words.model_failure(run, judge_averages(run, TRAINED))


# Markdown


def cells(row: str) -> list[str]:
    """The cells of a table row, as GitHub splits it: at every bar that no backslash precedes."""
    return re.split(r"(?<!\\)\|", row)[1:-1]


def test_the_markdown_table_is_one() -> None:
    """Each row has the cells that its header has, so that the table is shown as one, formulas and reasons included."""
    text = markdown.report(run_of(EXAMPLE, LOST, BROKEN), TRAINED)
    shown, folded = text.split("<details><summary>1 more layers</summary>")
    wrong, passed = ([line for line in of.splitlines() if line[:1] == "|"] for of in (shown, folded))
    rows = [*wrong, *passed]
    assert (len(wrong), len(passed)) == (2 + 2, 2 + 1 + 1)
    assert {len(cells(row)) for row in rows} == {3 + len(of_layers()) - len(beside_a_task())}
    assert cells(rows[0])[2].strip() == "preservation"
    assert cells(passed[2])[2:6] == [" 0.01 ", " 0.019 ", " 1.88 % ", " 0.0032 "]
    assert "non-finite output" in wrong[3]
    assert cells(rows[-1])[1].strip() == "average"


def test_the_markdown_counts_and_reads() -> None:
    """The counts stand above the table, and the reading in words unfolds below it."""
    text = markdown.report(run_of(EXAMPLE, WEAK), TRAINED)
    assert "## nullspace: models/ft" in text
    assert "Gated 2 of 2 layers on wikitext2: **1 green, 1 to look at, 0 red**." in text
    assert "- ✓ preservation 0.01 (pass &lt; 0.1, fail > 0.5): the null space is well kept" in text
    assert text.endswith("</details>\n")


def test_what_does_not_decide_is_shown_and_does_not_look_green() -> None:
    """Leakage of plain LoRA stays in the tables, has no mark and no reading, and a line says by what it is judged."""
    lora = Expectations(chosen=Chosen(Profile.LORA, "an ordinary LoRA by its leakage, 16 x chance"), drift_judged=True)
    lines = summary(run_of(LOST), lora)
    told = (
        "judged by what it forgets and what it learned, for it promises no null space (profile lora: an ordinary "
        "LoRA by its leakage, 16 x chance); if it should have one, use --nullspace-profile=nullspace"
    )
    assert (told, None) in lines
    assert not any("leakage" in line and "✓" in line for line, _ in lines)
    assert any(line.startswith("✓ model.layers.1") and " 16" in line for line, _ in lines)
    assert next(line for line in terminal.block(LOST, judge(LOST, lora)) if "leakage" in line).endswith("1.600e+01")
    assert told[1:] in markdown.report(run_of(LOST), lora).replace("\\", "")
    assert "judged by" not in markdown.report(run_of(LOST), TRAINED)


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({}, "about 122 windows would settle half of them, or try --nullspace-calib-size=auto"),
        ({"settings": {"calib_size": 32}}, "would settle half of them, or try --nullspace-calib-size=auto"),
        ({"settings": {"calib_size": None}}, "would settle half of them, so raise N in --nullspace-calib-size=auto:N"),
        ({"task_text": {"windows": 1}}, "so draw more by --nullspace-calib-size"),
        ({"task_text": {"windows": "many"}}, "more text might change the verdict on 1 of 1 layers and the averages"),
        ({"task_text": {"windows": -1}}, "more text might change the verdict on 1 of 1 layers and the averages"),
    ],
)
def test_what_would_settle_a_verdict_is_told_of_the_text_that_it_is_given_on(about: dict[str, Any], told: str) -> None:
    """A margin falls with the windows of its own text, of which ``auto`` may have drawn more than of the other."""
    task = dataclasses.replace(EXAMPLE, output_norm=10.0, update_norm=0.102, margins={"contribution": 0.00039})
    windows = {"text": {"windows": 16}, "task_text": {"windows": 32}}
    run = dataclasses.replace(run_of(dataclasses.replace(EXAMPLE, task=task)), about={**windows, **about})
    line = doubts.uncertain([judge(layer, TRAINED) for layer in run.layers], run, TRAINED)
    assert line is not None
    assert line.endswith(told), line


def told_of_text(layer: LayerStats, tokens: int, distinct: int, **settings: int) -> tuple[str | None, str | None]:
    """What is said of repeats and of few rows."""
    about = {"text": {"windows": 4, "tokens": tokens, "distinct": distinct}, "settings": settings}
    run = dataclasses.replace(run_of(layer, EXAMPLE), about=about)
    lines, document = [line for line, _ in summary(run)], markdown.report(run, TRAINED)
    found = doubts.repeated(run), doubts.few_rows(run)
    for line in found:
        assert (line in lines) == (line is not None)
        assert line is None or f"\n{markdown.escape(line)}.\n" in document
    return found


def test_rows_fewer_than_the_width_are_told() -> None:
    """A line counts the layers that are wider than their rows are many, and says how many windows would be enough."""
    enough = dataclasses.replace(EXAMPLE, name="enough", in_features=100)
    repeats, few = told_of_text(enough, tokens=100, distinct=100)
    assert repeats is None
    assert few is not None
    assert few.startswith("too few rows: leakage proves little in 1 of 2 layers, such as ")
    assert f"{EXAMPLE.name} (100 distinct rows in a width of 4,096)" in few
    assert few.endswith("about 164 such windows would be enough (--nullspace-calib-size=164)")
    _, capped = told_of_text(enough, tokens=5000, distinct=5000, max_activation_samples=100)
    assert capped is not None
    assert capped.endswith("--nullspace-max-activation-samples=4096 would be enough, or leave it out")
    plenty = dataclasses.replace(EXAMPLE, rows=4096)
    assert doubts.few_rows(run_of(plenty)) is None


def test_rows_that_repeat_where_the_text_does_not_are_told() -> None:
    """What was counted of a layer's own input decides: more windows of the same few tokens would not give it more."""
    first = dataclasses.replace(EXAMPLE, name="first", rows=5000, in_features=64, distinct_rows=8)
    run = dataclasses.replace(run_of(first), about={"text": {"windows": 4, "tokens": 5000, "distinct": 5000}})
    few = doubts.few_rows(run)
    assert few is not None
    assert "such as first (8 distinct rows in a width of 64): " in few
    assert few.endswith(
        "; its rows repeat, as those do that hold a token without its context: give a text of more different tokens"
    )
    assert doubts.few_rows(run_of(dataclasses.replace(first, distinct_rows=64))) is None


def test_text_that_repeats_is_told_and_does_not_count_as_rows() -> None:
    """From a tenth on repeats are told, and rows that repeat do not make up for a layer's width."""
    plenty = dataclasses.replace(EXAMPLE, name="x", rows=5000, in_features=2000)
    assert told_of_text(plenty, tokens=5000, distinct=4501)[0] is None
    repeats, few = told_of_text(plenty, tokens=5000, distinct=1000)
    assert repeats is not None
    assert repeats.startswith("repeated text: only 1,000 of 5,000 tokens are new, ")
    assert few is not None
    assert few.startswith("too few rows: leakage proves little in 2 of 2 layers")


HOSTILE = "<img src=x onerror=alert(1)>\n# [x](y) | `z` &amp; \x1b[31m"


def test_no_name_can_write_markdown_html_or_control_characters() -> None:
    """Names from files and the command line are shown letter by letter, in every report."""
    layer = dataclasses.replace(EXAMPLE, name=HOSTILE)
    run = RunStats(HOSTILE, HOSTILE, (layer,), 1)
    text = markdown.report(run, TRAINED)
    assert "<img" not in text.replace("\\<", "")
    assert "\x1b" not in text
    assert "\n# " not in text
    assert {len(cells(row)) for row in text.splitlines() if row[:1] == "|"} == {
        3 + len(of_layers()) - len(beside_a_task())
    }
    plain = "\n".join([*terminal.block(layer, judge(layer, TRAINED)), *(line for line, _ in summary(run))])
    assert "\x1b" not in plain


@given(st.text())
def test_escaped_text_leaves_no_markup_bare(text: str) -> None:
    """After escaping, every character that Markdown or HTML could read has its backslash, and it is one line."""
    escaped = markdown.escape(text)
    assert escaped.isprintable()
    bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", re.sub(r"(?<=\S )[<>](?= )", "", escaped))  # a sign between two words
    assert not set(bare) & set("\\`*[]<>#|&~$")
    assert not re.search(r"(?<![^\W_])_|_(?![^\W_])", re.sub(r"\\_", "", escaped))


NORMS = st.floats(0, 1e6) | st.just(math.nan)


@given(x=NORMS, bx=NORMS, abx=NORMS, y=NORMS, leak=NORMS, rows=st.integers(0, 3), stage=st.sampled_from(Stage))
def test_any_figures_can_be_reported(
    x: float, bx: float, abx: float, y: float, leak: float, rows: int, stage: Stage
) -> None:
    """No figures, not even NaN or zeros everywhere, stop any report."""
    layer = dataclasses.replace(
        EXAMPLE, rows=rows, input_norm=x, down_norm=bx, update_norm=abx, output_norm=y, mean_leakage=leak
    )
    run, expectations = run_of(layer, EXAMPLE), Expectations(stage)
    verdict = judge(layer, expectations)
    assert list(terminal.block(layer, verdict))
    assert summary(run, expectations)
    assert words.layer_failure(layer, verdict)
    assert words.model_failure(run, judge_averages(run, expectations))
    assert markdown.report(run, expectations)


# The header


@dataclasses.dataclass
class Asked:
    """The settings that the header shows."""

    calib_dataset: str = "wikitext2"
    text_name: str = ""
    further: tuple[GivenText, ...] = ()
    calib_size: int | None = 16
    calib_most: int = 128
    task_dataset: str | None = None
    device: str = "auto"


def test_the_header_says_what_will_be_gated(tmp_path: Path) -> None:
    """Directory, format, layers, ranks and text are told in one line before anything is loaded."""
    layers = (LayerSpec("a", 4, 8, 8), LayerSpec("b", 8, 8, 8))
    checkpoint = Checkpoint(tmp_path, "LoRA-Null", tmp_path / "config.json", {}, layers, {})
    asked = Asked()
    assert list(notes.header(checkpoint, 2, asked)) == [  # type: ignore[arg-type]
        f"nullspace: {tmp_path} (LoRA-Null, 2 layers, ranks 4-8); text wikitext2, 16 windows; device auto"
    ]
    assert "1 of 2 layers" in next(notes.header(checkpoint, 1, asked))  # type: ignore[arg-type]
    auto = Asked(calib_size=None, task_dataset="sums.txt")
    first, second = notes.header(checkpoint, 2, auto)  # type: ignore[arg-type]
    assert "up to 128 windows" in first
    assert second == "nullspace: task text sums.txt"


@pytest.mark.parametrize(
    ("told", "peft"),
    [
        ("A moved from zero; B is still in it", "lora_B moved from zero; lora_A is still in it"),
        ("‖B‖ 2, ||A||_F 3: A B x is zero", "‖lora_A‖ 2, ||lora_B||_F 3: lora_B lora_A x is zero"),
        ("the rows of B. Then", "the rows of lora_A. Then"),
        ("runs/A/B, blocks.B.q_proj, lora_A, ||ABX||, C-B", "runs/A/B, blocks.B.q_proj, lora_A, ||ABX||, C-B"),
    ],
)
def test_the_matrices_are_called_as_the_adapters_files_do(told: str, peft: str) -> None:
    """PEFT's adapters have lora_A and lora_B, mlx-lm's lora_a and lora_b; names, paths and symbols stay, and so
    do LoRA-Null's A and B.
    """
    of_peft = dataclasses.replace(run_of(EXAMPLE), about={"format": "PEFT LoRA"})
    assert words.named(told, of_peft) == peft
    of_mlx = dataclasses.replace(of_peft, about={"format": "MLX LoRA"})
    assert words.named(told, of_mlx) == (peft if told == peft else peft.replace("ra_A", "ra_a").replace("ra_B", "ra_b"))
    assert words.named(told, run_of(EXAMPLE)) == told


def test_a_layer_that_no_row_reached_fails_in_a_line() -> None:
    """Where nothing was measured its message is the defect alone, without five norms that are no numbers."""
    lost = dataclasses.replace(EXAMPLE, rows=0, without_sinks=None)
    assert words.layer_failure(lost, judge(lost, TRAINED)) == UNREACHED
    task = dataclasses.replace(lost, task=EXAMPLE)
    assert "mean norms over" in words.layer_failure(task, judge(task, TRAINED))
    moved = dataclasses.replace(judge(lost, TRAINED), faults=("B was trained",))
    assert words.layer_failure(lost, moved).splitlines()[1:] == ["✗ B was trained"]


@pytest.mark.parametrize(
    ("about", "gain", "told"),
    [
        ({}, 2.0, "these texts alone were checked; --nullspace-calib-dataset=self adds one"),
        ({"update_against": "start"}, 2.0, "these texts alone were checked"),
        ({"text[self]": {"written": {"was_kept": True}}}, 2.0, None),
        ({}, 0.0, None),
    ],
    ids=["safe", "no base that writes", "one that the base wrote", "not safe"],
)
def test_a_safe_verdict_says_which_texts_it_is_of(about: dict[str, Any], gain: float, told: str | None) -> None:
    """What was in none of the texts was not checked: said where all is green, on the terminal and in Markdown."""
    layer = dataclasses.replace(saved.LAYER, task=saved.LAYER)
    drift = Drift("the base", TextDrift(480, 2.0, 2.0, 0.0, 0.0, 0.0), TextDrift(480, 3.0, 3.0 - gain, 0.5, 0.01, 0.02))
    run = RunStats("ft", "text.txt", (layer,), 1, about, drift)
    held = Expectations(chosen=Chosen(Profile.LORA, "said"), drift_judged=True)
    decision = decide(run, held)
    assert (decision.call == "SAFE") is (gain > 0)
    assert notes.unread(run, decision) == told
    lines = [line for line, _ in brief.summary(run, [judge(layer, held)], held, decision, 80)]
    page = markdown.page(run, held, (), decision).whole
    assert ("these texts alone" in "".join(lines), "These texts alone" in page) == (told is not None,) * 2


def test_a_red_adapter_of_green_layers_shows_its_largest_updates_and_a_next_step() -> None:
    """Where the predictions alone failed no layer is the worst: those that change most stand there, and what to try."""
    names = (
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.2.mlp.up_proj",
        "model.layers.3.a",
    )
    layers = tuple(
        dataclasses.replace(
            saved.LAYER, name=name, update_norm=size, task=dataclasses.replace(saved.LAYER, name=name, update_norm=2.0)
        )
        for name, size in zip(names, (0.1, 0.6, 0.3, 0.2), strict=True)
    )
    text = TextDrift(480, 2.0, 2.4, 0.4, 0.05, 0.05)
    run = RunStats(
        "ft", "text.txt", layers, 4, drift=Drift("the base", text, TextDrift(480, 3.0, 1.0, 0.5, 0.01, 0.02))
    )
    held = Expectations(chosen=Chosen(Profile.LORA, "said"), drift_judged=True)
    verdicts = [judge(layer, held) for layer in layers]
    lines = [line for line, _ in brief.summary(run, verdicts, held, decide(run, held), 80)]
    assert "next: --nullspace-suggest looks for a smaller scale that passes" in lines
    assert "more: pytest --nullspace-explain=loss-rise" in lines
    document = markdown.page(run, held, (), decide(run, held)).whole
    assert "\n- ✗ loss-rise 0.4 ± 0.05 > 0.15: preserved tokens 33 % less likely\n" in document
    assert "\n- next: --nullspace-suggest looks for a smaller scale that passes\n" in document
    shown = [step.words for step in html.sheet("ft", run, held, decide(run, held)).remedy]
    assert shown == [line for line in lines if line.startswith(("more: ", "next: "))]
    at = next(number for number, line in enumerate(lines) if line.startswith("  largest updates"))
    assert [line.split()[1] for line in lines[at + 1 : at + 4]] == [names[1], names[2], names[3]]
    near = dataclasses.replace(
        run, drift=Drift("the base", dataclasses.replace(text, loss_margin=0.3, divergence_margin=math.inf))
    )
    told = decide(near, held)
    assert told.sentence == "it forgets: the preserved text is 33 % less likely, but more text might change that"
    lines = [line for line, _ in brief.summary(near, verdicts, held, told, 80)]
    assert "next: --nullspace-calib-size=auto reads text until that is settled" in lines
    assert not any(line.startswith(("uncertain: ", "too few rows: ")) for line in lines)
    assert "divergence 0.4 (one window, so no margin), bound 0.15" in [reason.detail for reason in told.reasons]
    gained = Drift("the base", dataclasses.replace(text, adapted_loss=1.0, divergence=2.0), text)
    swapped = dataclasses.replace(run, drift=gained)
    lines = [line for line, _ in brief.summary(swapped, verdicts, held, decide(swapped, held), 80)]
    assert lines[0] == "verdict: DO NOT DEPLOY: it learned the preserved text: predictions moved by 2 nats a token"
    (step,) = (line for line in lines if line.startswith("next: "))
    assert step == "next: is that the text of the task? --nullspace-calib-dataset takes the one that must survive"
    asked = dataclasses.replace(run, about={"suggestion": {}})
    assert not any(line.startswith("next:") for line, _ in brief.summary(asked, verdicts, held, decide(run, held), 80))
