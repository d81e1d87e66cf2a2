"""A dozen of the families that transformers has, each of another kind; `tox -e models` runs all of them."""

from pathlib import Path

import pytest

from tests.real import table
from tests.real.architectures import Row, append, families, of
from tests.real.table import PAGE, TITLES, of_page, page

# PEFT's and transformers' own, while the tests make adapters with them.
pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = {
    "llama/LlamaForCausalLM": "gated",
    "gpt2/GPT2LMHeadModel": "gated",
    "mamba/MambaForCausalLM": "gated",
    "jamba/JambaForCausalLM": "gated",
    "qwen3_moe/Qwen3MoeForCausalLM": "gated",
    "t5/T5ForConditionalGeneration": "gated",
    "deberta-v2/DebertaV2ForSequenceClassification": "gated",
    "canine/CanineForSequenceClassification": "gated",
    "qwen3_vl_moe/Qwen3VLMoeForConditionalGeneration": "gated",
    "llama4/Llama4ForConditionalGeneration": "gated",
    "mllama/MllamaForConditionalGeneration": "gated",
    "qwen2_audio/Qwen2AudioForConditionalGeneration": "gated",
    "blip-2/Blip2ForConditionalGeneration": "refused",
    "musicgen/MusicgenForCausalLM": "refused",
}


@pytest.mark.parametrize("name", QUICK)
def test_a_family_is_gated_with_the_figures_of_pefts_own_forward_or_refused(name: str, tmp_path: Path) -> None:
    """Outputs and figures are those of PEFT's own model; what does not run on text is refused in one sentence."""
    row = of(families()[name], tmp_path)
    assert (row.outcome, row.note if row.outcome == "wrong" else "") == (QUICK[name], "")
    if row.outcome == "refused":
        assert "does not run on token ids alone" in row.note
        assert "\n" not in row.note
    else:
        assert row.layers > row.unreached + row.bypassed
        assert row.bypassed == (2 if name.startswith("mamba") else 1 if name.startswith("jamba") else 0)


def test_the_page_tells_of_every_family_that_transformers_has() -> None:
    """A family that a newer transformers brings has its row, and none went wrong."""
    told = of_page(PAGE.read_text())
    assert set(families()) - set(told) == set()
    assert set(told.values()) == {TITLES[outcome] for outcome in ("gated", "refused", "not built")}
    assert {name for name, outcome in QUICK.items() if told[name] != TITLES[outcome]} == set()


def test_a_row_is_written_so_that_it_is_read_again(tmp_path: Path) -> None:
    """The page gives back what it was written from, whatever a note holds."""
    row = of(families()["blip-2/Blip2ForConditionalGeneration"], tmp_path)
    row.note = "a | b\n<c>"
    written = page({row.name: row})
    assert of_page(written) == {row.name: "Refused"}
    assert r"a \| b \<c\>" in written


def test_a_page_of_some_families_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of a few leaves the page of all; the last that was lacking has it written."""
    monkeypatch.setattr(table, "PAGE", tmp_path / "models.md")
    rows, first = tmp_path / "rows.jsonl", next(iter(families()))
    for name in list(families())[1:]:
        append(rows, Row(name, "refused"))
    table.main([str(rows)])
    assert not (tmp_path / "models.md").exists()
    assert f"holds {len(families()) - 1} of {len(families())} families" in capsys.readouterr().out
    append(rows, Row(first, "refused"))
    table.main([str(rows)])
    assert of_page((tmp_path / "models.md").read_text()).keys() == families().keys()
