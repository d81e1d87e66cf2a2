"""Conversations in the model's own form, as a user of the gate meets them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.model import AdaptedModel, load_model
from tests import tiny
from tests.plugin.conftest import LOOSE, Gate

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '|' }}{% endgeneration %}"
    "{% else %}{{ m.content + '|' }}{% endif %}{% endfor %}"
)
EXACT = 1e-6
CHAT = ("--nullspace-calib-dataset=chat.jsonl", "--nullspace-seqlen=64")
SAVED = ("--nullspace-drift", "--nullspace-save-stats=s.json", *LOOSE)


@pytest.fixture
def talks(checkpoint: Path, pytester: pytest.Pytester) -> list[list[dict[str, str]]]:
    """Conversations in ``chat.jsonl``, short and long ones, and a template beside the tokenizer."""
    choose = random.Random(5)

    def said(most: int) -> str:
        return "".join(choose.choice("abcdefgh ") for _ in range(choose.randint(1, most)))

    rows = [
        [{"role": role, "content": said(60)} for _ in range(choose.randint(1, 3)) for role in ("user", "assistant")]
        for _ in range(12)
    ]
    (pytester.path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    with_template(checkpoint, TEMPLATE)
    return rows


def with_template(directory: Path, template: str | None) -> None:
    """Put a template, and the token that it begins with, into the tokenizer's config."""
    file = directory / "tokenizer_config.json"
    told = json.loads(file.read_text())
    told |= {"bos_token": "^"} if template is None else {"bos_token": "^", "chat_template": template}
    file.write_text(json.dumps(told))


def read(directory: Path, rows: list[list[dict[str, str]]], tokens: int) -> list[tuple[Tensor, Tensor]]:
    """The windows that are read of ``rows`` and where the assistant speaks in each, by transformers' own rendering."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    found: list[tuple[Tensor, Tensor]] = []
    for row in random.Random(42).sample(rows, len(rows)):
        if sum(len(ids) for ids, _ in found) >= tokens:
            break
        told = tokenizer.apply_chat_template(row, return_dict=True, return_assistant_tokens_mask=True)
        pairs = zip(*(_cut(told[w]) for w in ("input_ids", "assistant_masks")), strict=True)
        found += [(ids, mask.bool()) for ids, mask in pairs if len(ids) > 1]
    return found


def _cut(ids: list[int]) -> list[Tensor]:
    return [torch.tensor(ids[first : first + 64]) for first in range(0, len(ids), 64)]


def naive(
    adapted: AdaptedModel, layer: str, windows: list[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Any], list[float]]:
    """The mean norms of one layer over the counted rows, and losses and divergence over the counted predictions."""
    held, inputs = adapted.layers[layer], []
    handle = held.layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].double()))
    sums, scored = torch.zeros(3, dtype=torch.float64), 0
    assert adapted.switched_off is not None
    rows = []
    with torch.inference_mode():
        for ids, kept in windows:
            inputs.clear()
            q = adapted.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            rows.append(inputs[0][kept])
            with adapted.switched_off() as base:
                p = base(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            where = kept[1:]
            losses = [cross_entropy(of[:-1][where], ids[1:][where], reduction="sum") for of in (p, q)]
            sums += torch.stack([*losses, (p.exp() * (p - q))[:-1][where].sum()])
            scored += int(where.sum())
    handle.remove()
    x = torch.cat(rows)
    down = x @ held.down_matrix().double().mT
    norms = {"num_samples": len(x), "X_norm": x.norm(dim=-1).mean().item(), "BX_norm": down.norm(dim=-1).mean().item()}
    return norms, [scored, *(sums / scored).tolist()]


@pytest.mark.parametrize("mode", ["whole", "assistant"])
def test_figures_are_those_of_the_tokens_that_count(
    checkpoint: Path, talks: list[list[dict[str, str]]], gate: Gate, pytester: pytest.Pytester, mode: str
) -> None:
    """Norms, losses and divergence agree with plain float64 arithmetic on transformers' own rendering, to 1e-6."""
    result = gate(*CHAT, *SAVED, f"--nullspace-chat={mode}", "--nullspace-calib-size=8", "-v")
    document = json.loads((pytester.path / "s.json").read_text())
    adapted = load_model(open_checkpoint(checkpoint), torch.device("cpu"), torch.float32)
    windows = read(checkpoint, talks, 8 * 64)
    if mode == "whole":
        windows = [(ids, torch.ones_like(kept)) for ids, kept in windows]
    else:
        windows = [(ids, kept) for ids, kept in windows if kept[1:].any()]
    first = document["stats"][0]
    norms, (scored, *means) = naive(adapted, first["layer_name"], windows)
    assert {name: first[name] for name in norms} == pytest.approx(norms, rel=EXACT)
    told = document["drift"]["preserved"]
    if mode == "whole":  # nothing follows the last token of a window, but its prediction is another too
        assert told["tokens"] == scored + len(windows)
        means.pop()
    else:
        assert told["tokens"] == scored
        assert "figures of" in result.stdout.str()
    assert [told[of] for of in ("base_loss", "adapted_loss", "divergence")][: len(means)] == pytest.approx(
        means, rel=EXACT
    )
    entry = document["text"]
    assert entry["windows"] == len(windows)
    assert entry["chat"]["assistant_only"] == (mode == "assistant")
    assert entry["chat"]["counted_tokens"] == sum(int(kept.sum()) for _, kept in windows)


def test_conversations_are_taken_where_a_table_holds_nothing_else(
    talks: list[list[dict[str, str]]], gate: Gate
) -> None:
    """Without the option the column messages is rendered, which the report says with the template's digest."""
    result = gate(*CHAT, "--nullspace-calib-size=2", "-v", *LOOSE)
    assert result.ret == 0, result.outlines
    result.stdout.fnmatch_lines(
        ["text chat.jsonl: * windows, * tokens (* of 12 conversations by the chat template ????????????);*"]
    )
    result = gate(*CHAT, "--nullspace-calib-size=2", *LOOSE)
    result.stdout.fnmatch_lines(["* tokens of conversations by the tokenizer's chat template; cpu float32;*"])


def test_what_cannot_be_rendered_is_one_usage_error(
    checkpoint: Path, talks: list[list[dict[str, str]]], gate: Gate, pytester: pytest.Pytester
) -> None:
    """No template, one that does not end, no conversations, and a value that is none: each in a sentence, exit 4."""
    result = gate("--nullspace-chat")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*--nullspace-chat: no text holds conversations; give a table with a column *"])
    result = gate("--nullspace-chat=all")
    result.stderr.fnmatch_lines(["*--nullspace-chat: takes auto, whole, assistant or off, not 'all'"])
    result = gate(*CHAT, "--nullspace-chat=off")
    result.stderr.fnmatch_lines(["*chat.jsonl: say which column holds the text*its columns: messages"])
    with_template(checkpoint, "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    result = gate(*CHAT)
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*tokenizer_config.json: its chat template does not come to an end*"])
    told = json.loads((checkpoint / "tokenizer_config.json").read_text())
    del told["chat_template"]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(told))
    result = gate(*CHAT)
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*its tokenizer has no chat template*chat.jsonl holds conversations*"])


def test_runs_of_two_templates_do_not_compare(
    checkpoint: Path, talks: list[list[dict[str, str]]], gate: Gate, pytester: pytest.Pytester
) -> None:
    """The same conversations by another template are told as such, and may be allowed; by the same one they pair."""
    asked = (*CHAT, "--nullspace-calib-size=2", *LOOSE)
    gate(*asked, "--nullspace-save-stats=before.json")
    assert gate(*asked, "--nullspace-compare=before.json").ret == 0
    with_template(checkpoint, TEMPLATE.replace("'|'", "'#'"))
    result = gate(*asked, "--nullspace-compare=before.json")
    assert result.ret != 0
    told = result.stdout.str() + result.stderr.str()
    assert "chat (text by template " in told
    assert gate(*asked, "--nullspace-compare=before.json", "--nullspace-compare-allow=chat").ret == 0


def counting(folder: Path) -> Path:
    """A LoRA-Null directory of a Llama that was trained to count letters, but only behind the token ``~``."""
    torch.manual_seed(0)
    model: Any = tiny.llama(num_hidden_layers=1, bos_token_id=ord("~"), tie_word_embeddings=False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        starts = torch.randint(26, (16, 1))
        ids = ord("a") + (starts + torch.arange(24)) % 26
        ids[:8] = ord("a") + torch.randint(26, (8, 24))
        begun = torch.cat((torch.full((16, 1), ord("~")), ids), dim=1)
        begun[:8, 0] = ord("a")
        loss = model(input_ids=begun, labels=begun).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tiny.lora_null(folder, model.eval(), up_scale=0.001)


def test_a_first_token_that_the_base_needs_and_does_not_get_is_told(gate: Gate, pytester: pytest.Pytester) -> None:
    """A base that was trained behind its bos_token_id, under a tokenizer that adds none: both losses are told."""
    counting(pytester.path / "runs" / "ft")
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    (pytester.path / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 40)
    result = gate("--nullspace-drift", "-v", *LOOSE)
    told = [line for line in result.outlines if "does not begin a text with the token 126, bos_token_id" in line]
    assert len(told) == 1, result.outlines
    backend = Tokenizer.from_file(str(pytester.path / "runs" / "ft" / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="~ $A", special_tokens=[("~", ord("~"))])
    backend.save(str(pytester.path / "runs" / "ft" / "tokenizer.json"))
    result = gate("--nullspace-drift", "-v", *LOOSE)
    assert not any("does not begin a text" in line for line in result.outlines)
