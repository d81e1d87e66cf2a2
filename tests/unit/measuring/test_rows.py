"""Each row that counts is a token of its own window, however a model lays its activations out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pytest_nullspace.judging.invariants import Expectations, judge
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.measuring.rows import Batch, Rows
from pytest_nullspace.measuring.spectrum import spectrum
from pytest_nullspace.measuring.streaming import draw_rows, measure
from pytest_nullspace.model import AdaptedModel
from pytest_nullspace.run.saved import from_json, to_json
from pytest_nullspace.run.stats import UNPLACED, LayerStats, RunStats
from tests.adapters import adapter, switch
from tests.unit.model.test_peft import EXACT, SMALL, figures, opened

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

LENGTH, WINDOW = 20, 16
TEXT = torch.randint(3, 120, (6, LENGTH), generator=torch.Generator().manual_seed(5)).tolist()
LARGE: dict[str, Any] = {**SMALL, "intermediate_size": 48, "initializer_range": 0.2}


def longformer() -> Any:
    sizes = {**LARGE, "attention_window": WINDOW, "max_position_embeddings": 200, "pad_token_id": 0}
    return transformers.LongformerModel(transformers.LongformerConfig(**sizes))


def xlnet() -> Any:
    sizes = {"vocab_size": 128, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "initializer_range": 0.2}
    return transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes))


SIDE = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
"""Of each side of LED."""


def deberta() -> Any:
    how = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8}
    return transformers.DebertaV2Model(
        transformers.DebertaV2Config(**LARGE, **how, max_position_embeddings=64, type_vocab_size=0)
    )


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**LARGE))


def albert() -> Any:
    return transformers.AlbertModel(transformers.AlbertConfig(**LARGE, embedding_size=16))


Text = Callable[[Tensor], Tensor]
"""Takes the rows of one window's tokens out of what a layer reads, ``(…, d)`` to ``(rows, d)``."""

LAYOUTS: dict[str, tuple[Callable[[], Any], str, list[str], int, Text]] = {
    "tokens first, padded": (
        longformer, "FEATURE_EXTRACTION", ["query", "value"], LENGTH, lambda x: x[:LENGTH, 0],
    ),
    "padded": (longformer, "FEATURE_EXTRACTION", ["intermediate.dense"], LENGTH, lambda x: x[0, :LENGTH]),
    "tokens first": (xlnet, "CAUSAL_LM", ["layer_1", "layer_2"], LENGTH, lambda x: x[:, 0]),
    "distances besides": (
        deberta, "FEATURE_EXTRACTION", ["query_proj", "key_proj"], LENGTH,
        lambda x: x[0] if x.shape[1] == LENGTH else x[0, :0],
    ),
    "one row a window": (bert, "SEQ_CLS", ["pooler.dense"], 1, lambda x: x),
    "several times": (albert, "FEATURE_EXTRACTION", ["query"], 2 * LENGTH, lambda x: x[0]),
}  # fmt: skip
"""A model, its task, the adapted layers, the rows of one window in each, and which these are."""


def loaded(kind: str, folder: Path) -> AdaptedModel:
    make, task, targets, _, _ = LAYOUTS[kind]
    torch.manual_seed(0)
    return opened(adapter(folder, make(), task, r=4, target_modules=targets))[1]


def truth(adapted: AdaptedModel, text: Text) -> dict[str, tuple[int, list[float]]]:
    """Rows, and the means of ``‖x‖`` and ``‖Bx‖`` in float64, of windows that run one by one, without hooks of ours."""
    rows: dict[str, list[Tensor]] = {name: [] for name in adapted.layers}
    handles = [
        layer.layer.register_forward_pre_hook(lambda _, args, name=name: rows[name].append(text(args[0]).double()))
        for name, layer in adapted.layers.items()
    ]
    with torch.inference_mode():
        for window in TEXT:
            adapted.model(input_ids=torch.tensor([window]))
    for handle in handles:
        handle.remove()
    found = {}
    for name, parts in rows.items():
        x = torch.cat(parts)
        means = [x, x @ adapted.layers[name].down_matrix().mT]
        found[name] = len(x), [float(part.norm(dim=1).mean()) for part in means]
    return found


def agree(measured: tuple[LayerStats, ...], others: tuple[LayerStats, ...]) -> None:
    for one, other in zip(measured, others, strict=True):
        assert (one.name, one.rows, one.defect) == (other.name, other.rows, None)
        assert figures(one) == pytest.approx(figures(other), rel=EXACT)
        assert one.margins == pytest.approx(other.margins, rel=1e-3)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_rows_are_the_tokens_of_their_windows(kind: str, tmp_path: Path) -> None:
    """Rows, figures and margins are those of the text's own tokens, window by window, whatever shares a forward."""
    adapted, (_, _, _, rows, text) = loaded(kind, tmp_path), LAYOUTS[kind]
    alone = measure(adapted, TEXT)
    for layer in alone:
        count, means = truth(adapted, text)[layer.name]
        assert layer.rows == count == rows * len(TEXT)
        assert [layer.input_norm, layer.down_norm] == pytest.approx(means, rel=EXACT)
    for batch_size in (2, 4, 6):
        agree(measure(adapted, TEXT, batch_size=batch_size), alone)


@pytest.mark.parametrize("most", [None, 60])
def test_the_margins_of_an_expert_do_not_depend_on_the_batch(most: int | None, tmp_path: Path) -> None:
    """Whose rows were routed to it only one window tells, so where an expert is adapted each runs by itself."""
    adapted = opened(adapter(tmp_path, switch(), "SEQ_2_SEQ_LM", r=4, target_modules=["wi"]))[1]
    alone = measure(adapted, TEXT, batch_size=1, max_rows=most)
    reached = [layer.name for layer in alone if layer.rows]
    assert any(0 < layer.rows < len(TEXT) * LENGTH and ".experts." in layer.name for layer in alone)
    for size in (2, 3, 6):
        together = measure(adapted, TEXT, batch_size=size, max_rows=most)
        assert [layer.name for layer in together if layer.rows] == reached
        agree(*(tuple(layer for layer in of if layer.rows) for of in (alone, together)))


def test_a_shared_expert_reads_every_token(tmp_path: Path) -> None:
    """What is called an expert and shared by all tokens reads them as they lie, so windows share a forward."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = transformers.Qwen2MoeConfig(**LARGE, num_key_value_heads=2, **sizes, shared_expert_intermediate_size=16)
    name = "model.layers.1.mlp.shared_expert.up_proj"
    model = transformers.Qwen2MoeForCausalLM(config)
    adapted = opened(adapter(tmp_path, model, r=4, target_modules=["shared_expert.up_proj"]))[1]
    calls: list[int] = []
    adapted.layers[name].layer.register_forward_pre_hook(lambda *_: calls.append(1))
    together = measure(adapted, TEXT, batch_size=3)
    assert len(calls) == 2
    assert [layer.rows for layer in together] == [len(TEXT) * LENGTH] * 2
    agree(measure(adapted, TEXT, batch_size=1), together)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_cap_draws_the_same_rows_whatever_the_layout(kind: str, tmp_path: Path) -> None:
    """With a cap the drawn rows are the same ones in every batch."""
    adapted = loaded(kind, tmp_path)
    alone = measure(adapted, TEXT, max_rows=30)
    assert all(0 < layer.rows <= 2 * 30 for layer in alone)
    agree(measure(adapted, TEXT, max_rows=30, batch_size=4), alone)


def test_what_nobody_can_tell_to_be_tokens_is_refused_as_that(tmp_path: Path) -> None:
    """LED embeds its padding apart: its layers ran, so no glob of unreached layers excuses them.

    Windows as long as its attention window are not padded: of them every token is a row.
    """
    sizes = {"vocab_size": 128, "d_model": 32, "attention_window": WINDOW, "pad_token_id": 0}
    sides = {f"{side}_{of}": n for side in ("encoder", "decoder") for of, n in SIDE.items()}
    model = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**sizes, **sides))
    adapted = opened(adapter(tmp_path, model, "SEQ_2_SEQ_LM", r=4, target_modules=["fc1"]))[1]
    whole = [window[:WINDOW] for window in TEXT]
    assert [(layer.rows, layer.defect) for layer in measure(adapted, whole)] == [(6 * WINDOW, None)] * 2
    for windows, unplaced in ((TEXT, 6), (TEXT[:2] + whole[2:], 2)):
        decoder, encoder = measure(adapted, windows, batch_size=3)
        assert (decoder.rows, decoder.defect) == (sum(map(len, windows)), None)
        assert (encoder.rows, encoder.unplaced) == ((6 - unplaced) * WINDOW, unplaced)
        verdict = judge(encoder, Expectations(unreached=("*",)))
        assert (verdict.tier, verdict.summary) == (Tier.FAIL, f"in {unplaced} windows {UNPLACED}")
        run = RunStats("m", "t", (decoder, encoder), 2)
        assert [layer.unplaced for layer in from_json(to_json(run), "f").layers] == [0, unplaced]


def test_rows_beside_the_tokens_do_not_stand_for_them(tmp_path: Path) -> None:
    """PEGASUS-X pads every other block, so its tokens cannot be told there: global rows alone make no figure."""
    sizes = {"vocab_size": 128, "d_model": 32, "block_size": WINDOW, "num_global_tokens": 4, "pad_token_id": 0}
    sides = {f"{side}_{of}": n for side in ("encoder", "decoder") for of, n in (SIDE | {"layers": 2}).items()}
    model = transformers.PegasusXForConditionalGeneration(transformers.PegasusXConfig(**sizes, **sides))
    directory = adapter(tmp_path, model, "SEQ_2_SEQ_LM", r=4, target_modules=r".*encoder.*self_attn.k_proj")
    whole = [window[:WINDOW] for window in TEXT]
    even, staggered = measure(opened(directory)[1], whole, batch_size=2)
    assert (even.rows, even.defect) == (6 * WINDOW, None)
    assert staggered.defect == f"in 6 windows {UNPLACED}"


def test_as_many_windows_as_tokens_do_not_share_a_forward(tmp_path: Path) -> None:
    """Where both are as many the two axes look alike, so a forward takes one window fewer."""
    adapted = loaded("tokens first", tmp_path)
    short = [window[:5] for window in TEXT]
    agree(measure(adapted, short, batch_size=5), measure(adapted, short))


def test_padding_has_no_part_in_the_spectrum(tmp_path: Path) -> None:
    """The spectrum of a padded layer is that of its tokens: the identity, where each row is one direction."""
    adapted = loaded("tokens first, padded", tmp_path)
    name, layer = next(iter(adapted.layers.items()))
    seen: list[Tensor] = []
    handle = layer.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][:LENGTH, 0].double()))
    with torch.inference_mode():
        for window in TEXT:
            adapted.model(input_ids=torch.tensor([window]))
    handle.remove()
    x = torch.cat(seen)
    x = x / x.norm(dim=1, keepdim=True)
    least = float(torch.linalg.eigvalsh(x.mT @ x / len(x))[: layer.rank].sum())
    assert spectrum(adapted, TEXT, [name])[name].least_leakage == pytest.approx(least, rel=EXACT)


SHAPES = st.sampled_from(["b l", "l b", "b p", "p b", "bl", "bp"])


@given(windows=st.integers(1, 6), length=st.integers(2, 7), extra=st.integers(1, 5), shape=SHAPES, data=st.data())
def test_every_layout_gives_the_rows_in_order(
    windows: int, length: int, extra: int, shape: str, data: st.DataObject
) -> None:
    """However tokens, windows and padding lie, what is counted is each window's tokens in order, or nothing at all."""
    tokens = torch.arange(1, windows * length + 1).view(windows, length)
    most = data.draw(st.none() | st.integers(windows, windows * length))
    drawn = draw_rows([length] * windows, most, 3)
    rows = None if drawn is None else torch.tensor([i * length + row for i, of in enumerate(drawn) for row in of])
    among = Rows()
    model = nn.Embedding(100, 1)
    among.start(Batch(tokens, 0, rows, [length] * windows if drawn is None else list(map(len, drawn))))
    filled = nn.functional.pad(tokens, (0, extra))
    with among.watching(model):
        model(filled if "p" in shape else tokens)
    values = filled if "p" in shape else tokens
    values = values.mT if shape in ("l b", "p b") else values
    values = values.reshape(-1, 1) if " " not in shape else values.unsqueeze(-1)
    layout = among.layout(values.shape)
    if layout is None:
        assert windows == values.shape[0] == values.shape[1] > 1
        return
    want = tokens.reshape(-1) if rows is None else tokens.reshape(-1)[rows]
    assert layout.counted(values).flatten().tolist() == want.tolist()
    assert sum(layout.counts) == len(want)


def test_what_is_no_padding_is_not_taken_for_it() -> None:
    """Rows behind the tokens count as padding only where the embeddings were given one and the same token there."""
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for ids, known in (
        ([[5, 6, 7, 0, 0], [8, 9, 10, 0, 0]], True),
        ([[5, 6, 7, 0, 1], [8, 9, 10, 0, 1]], False),
        ([[0, 0, 5, 6, 7], [0, 0, 8, 9, 10]], False),
    ):
        among = Rows()
        among.start(Batch(tokens, 0, None, [3, 3]))
        model = nn.Embedding(20, 1)
        with among.watching(model):
            model(torch.tensor(ids))
        assert (among.layout(torch.Size((2, 5, 8))) is not None) == known
        assert not model._forward_pre_hooks
