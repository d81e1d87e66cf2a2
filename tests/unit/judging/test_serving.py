"""Adapters held against the rules of servers: what each would refuse is told by tensor and rule, the rest passes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.hub import at_hand
from pytest_nullspace.errors import OptionError
from pytest_nullspace.judging.serve_checks import installed_fields
from pytest_nullspace.judging.served import SERVERS, Asked, asked, base_at_hand
from pytest_nullspace.judging.servers import RULES, rules_of
from pytest_nullspace.judging.serving import Outcome, hold
from pytest_nullspace.judging.verdicts import Tier
from tests import tiny

BLOCKS, WIDTH, VOCABULARY = 2, 8, 32
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TEXT, NESTED = "model.layers", "model.language_model.layers"
FIRST = f"base_model.model.{TEXT}.0.mlp.down_proj.lora_A.weight"


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def blocks(prefix: str = TEXT, parts: Sequence[str] = (*ATTENTION, *MLP), count: int = BLOCKS) -> list[str]:
    return [f"{prefix}.{block}.{part}" for block in range(count) for part in parts]


def base(folder: Path, architecture: str = "LlamaForCausalLM", modules: Sequence[str] = (), **config: Any) -> Path:
    """A base model of a few modules, of whose tensors nobody reads more than the header."""
    (folder / "base").mkdir()
    told = {"architectures": [architecture], "num_hidden_layers": BLOCKS, "vocab_size": VOCABULARY, **config}
    (folder / "base" / "config.json").write_text(json.dumps(told))
    tensors = {f"{module}.weight": zeros(WIDTH, WIDTH) for module in modules or [*blocks(), "model.embed_tokens"]}
    tensors["model.norm.weight"] = zeros(WIDTH)
    save_file(tensors, folder / "base" / "model.safetensors")
    return folder / "base"


def lora(modules: Sequence[str], rank: int = 8) -> dict[str, Any]:
    """The two matrices of each module."""
    parts = {"lora_A": (rank, WIDTH), "lora_B": (WIDTH, rank)}
    return {f"base_model.model.{m}.{part}.weight": zeros(*shape) for m in modules for part, shape in parts.items()}


def adapter(folder: Path, tensors: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """An adapter on ``folder/base``, of all modules of its blocks unless told otherwise."""
    (folder / "ft").mkdir()
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none",
        "target_modules": ["down_proj"], "base_model_name_or_path": str(folder / "base"), **config,
    }  # fmt: skip
    (folder / "ft" / "adapter_config.json").write_text(json.dumps(told))
    save_file(dict(tensors if tensors is not None else lora(blocks())), folder / "ft" / "adapter_model.safetensors")
    return folder / "ft"


def held(folder: Path, server: str) -> Outcome:
    """What becomes of the adapter of ``folder`` before a server, as the option names it."""
    checkpoint = open_checkpoint(folder / "ft")
    return hold(asked(server)[0], checkpoint, base_at_hand(checkpoint, None))


def refused(outcome: Outcome, rule: str) -> str:
    """What the only refusal says, which must be of that rule, and have its source beside it."""
    assert outcome.tier is Tier.FAIL
    (only,) = outcome.of(Tier.FAIL)
    assert only.rule.name == rule
    told = "\n".join(outcome.lines())
    assert only.rule.says in told
    assert only.rule.source in told
    assert only.finding.what in outcome.summary
    return only.finding.what


@pytest.mark.parametrize("name", ["a--b", "x/y.git", "someone/not-here", ".", "x/y.git@v1"])
def test_a_base_that_no_cache_can_hold_is_not_at_hand(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that the hub would refuse, or that was never fetched, is no base here and no error."""
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path, base_model_name_or_path=name)
    assert base_at_hand(open_checkpoint(tmp_path / "ft"), None) is None
    assert at_hand(name, None) == (Path() if name == "." else None)


@pytest.mark.parametrize("server", ["vllm", "sglang", "tgi --num-shard 1", "llama.cpp", "peft==0.21"])
def test_an_ordinary_adapter_is_taken_by_all(tmp_path: Path, server: str) -> None:
    """LoRA on every projection of a Llama: no server refuses it, and nobody has a doubt."""
    base(tmp_path)
    adapter(tmp_path)
    outcome = held(tmp_path, server)
    assert (outcome.tier, outcome.held, outcome.unchecked) == (Tier.PASS, (), ())
    assert "takes it by all" in outcome.summary


@pytest.mark.parametrize(
    ("server", "config"),
    [
        ("vllm", {"use_rslora": True}),
        ("tgi", {"use_rslora": True}),
        ("peft==0.21", {"use_rslora": True, "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]}),
        ("llama.cpp", {"rank_pattern": {"q_proj": 2}}),
    ],
)
def test_what_a_server_takes_passes(tmp_path: Path, server: str, config: dict[str, Any]) -> None:
    """A rank-stabilised scale is read by vLLM and TGI, a rank a layer by llama.cpp, and all of it by PEFT."""
    base(tmp_path)
    q = blocks(parts=["self_attn.q_proj"])
    tensors = lora(blocks()) | (lora(q, rank=2) if "rank_pattern" in config else {})
    adapter(tmp_path, tensors, **config)
    assert held(tmp_path, server).tier is Tier.PASS


# --- public reports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["Qwen3_5ForConditionalGeneration", "Gemma3ForConditionalGeneration"])
def test_vllm_34186_names_of_the_text_model_alone_serve_the_base(tmp_path: Path, architecture: str) -> None:
    """Trained as a text model and served as one that sees: no module is found, which vLLM does not say."""
    base(tmp_path, architecture, blocks(NESTED))
    adapter(tmp_path)
    told = refused(held(tmp_path, "vllm"), "names")
    assert told == (
        "none of its 14 modules would be found, and the base alone served: tensor "
        f"'{FIRST}', and the base has 'language_model.model.layers.0.mlp.down_proj'"
    )


def test_vllm_finds_names_of_the_text_model_in_mistral_3_since_it_maps_them(tmp_path: Path) -> None:
    """The one wrapper beside Qwen2-VL whose prefixes hold them in 0.33; up to 0.28 they were not found."""
    base(tmp_path, "Mistral3ForConditionalGeneration", blocks(NESTED))
    adapter(tmp_path)
    assert held(tmp_path, "vllm").tier is Tier.PASS
    assert "none of its 14 modules" in refused(held(tmp_path, "vllm==0.22"), "names to 0.28")


def test_vllm_39278_a_suffix_that_is_known_is_not_a_module_that_is_found(tmp_path: Path) -> None:
    """down_proj alone passes vLLM's own look at suffixes; on a wrapper none is found. The nested names are."""
    base(tmp_path, "Qwen3_5ForConditionalGeneration", blocks(NESTED))
    adapter(tmp_path, lora(blocks(parts=["mlp.down_proj"])))
    assert refused(held(tmp_path, "vllm"), "names").startswith("none of its 2 modules would be found")
    other = tmp_path / "nested"
    other.mkdir()
    base(other, "Qwen3_5ForConditionalGeneration", blocks(NESTED))
    adapter(other, lora(blocks(NESTED)))
    assert held(other, "vllm").tier is Tier.PASS


def test_names_that_both_files_and_adapter_have_otherwise_are_found(tmp_path: Path) -> None:
    """An old Gemma 3 holds language_model.model, a new adapter model.language_model: vLLM has one name for both."""
    base(tmp_path, "Gemma3ForConditionalGeneration", blocks("language_model.model.layers"))
    adapter(tmp_path, lora(blocks(NESTED)))
    assert held(tmp_path, "vllm").tier is Tier.PASS


def test_vllm_qwen_2_vl_takes_both_names(tmp_path: Path) -> None:
    """The prefixes of Qwen2-VL map model.layers as well, so an adapter of the text model is found."""
    base(tmp_path, "Qwen2VLForConditionalGeneration", blocks(NESTED))
    adapter(tmp_path)
    assert held(tmp_path, "vllm").tier is Tier.PASS


def test_vllm_55193_a_server_restricted_to_other_modules_serves_the_base(tmp_path: Path) -> None:
    """An adapter of down_proj alone before --lora-target-modules qkv_proj; with down_proj it is taken."""
    base(tmp_path, "Qwen2ForCausalLM")
    adapter(tmp_path, lora(blocks(parts=["mlp.down_proj"])))
    told = refused(held(tmp_path, "vllm --lora-target-modules qkv_proj"), "lora-target-modules")
    assert told == (
        "2 of its 2 modules are not among --lora-target-modules qkv_proj, so that the base alone is served: tensor "
        f"'{FIRST}'"
    )
    assert held(tmp_path, "vllm --lora-target-modules down_proj qkv_proj").tier is Tier.PASS
    assert held(tmp_path, "vllm --lora-target-modules=down_proj").tier is Tier.PASS


def test_a_packed_module_stands_for_its_parts(tmp_path: Path) -> None:
    """qkv_proj among the targets is q_proj, k_proj and v_proj of the adapter."""
    base(tmp_path)
    adapter(tmp_path, lora(blocks(parts=ATTENTION[:3])))
    assert held(tmp_path, "vllm --lora-target-modules qkv_proj").tier is Tier.PASS
    assert held(tmp_path, "sglang --lora-target-modules q_proj").tier is Tier.PASS


def test_sglang_18634_a_tied_head_is_lost(tmp_path: Path) -> None:
    """LoRA on the head of a model that ties it is lost in 0.5.8, and not where the head stands alone or later."""
    base(tmp_path, tie_word_embeddings=True)
    adapter(tmp_path, lora([*blocks(), "lm_head"]))
    told = refused(held(tmp_path, "sglang==0.5.8"), "head")
    assert told == "tensor 'base_model.model.lm_head.lora_A.weight' is on a head that the base ties to its embedding"
    assert held(tmp_path, "sglang").tier is Tier.PASS
    apart = tmp_path / "apart"
    apart.mkdir()
    base(apart, modules=[*blocks(), "lm_head"], tie_word_embeddings=False)
    adapter(apart, lora([*blocks(), "lm_head"]))
    assert held(apart, "sglang==0.5.8").tier is Tier.PASS


def test_sglang_25913_a_layer_without_its_value_is_a_missing_weight(tmp_path: Path) -> None:
    """Gemma 4's nested names with a block that shares its values: v_proj is looked for there and not found."""
    base(tmp_path, "Gemma4ForConditionalGeneration", blocks(NESTED))
    tensors = lora(blocks(NESTED, ATTENTION))
    for part in ("lora_A", "lora_B"):
        del tensors[f"base_model.model.{NESTED}.1.self_attn.v_proj.{part}.weight"]
    adapter(tmp_path, tensors)
    told = refused(held(tmp_path, "sglang==0.5.12"), "attention")
    assert told.startswith(f"tensor 'base_model.model.{NESTED}.1.self_attn.v_proj.lora_A.weight' is looked for")
    other = tmp_path / "regex"
    other.mkdir()
    base(other, "Gemma4ForConditionalGeneration", blocks(NESTED))
    adapter(other, lora(blocks(NESTED)), target_modules=r".*language_model.*\.(q|v)_proj")
    assert refused(held(other, "sglang==0.5.12"), "target_modules").startswith("target_modules is the regex ")


# --- one rule each --------------------------------------------------------------------------------------------------

BIAS = f"base_model.model.{TEXT}.0.mlp.down_proj.lora_B.bias"
MAGNITUDE = f"base_model.model.{TEXT}.0.mlp.down_proj.lora_magnitude_vector"
NORM = "base_model.model.model.norm.weight"
HEAD, EMBEDDING = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens"


@pytest.mark.parametrize(
    ("server", "rule", "named", "tensors", "config"),
    [
        ("vllm", "modules_to_save", HEAD, {HEAD: (32, 8)}, {"modules_to_save": ["lm_head"]}),
        ("vllm", "modules_to_save", "modules_to_save", {}, {"modules_to_save": ["lm_head"]}),
        ("sglang", "modules_to_save", HEAD, {HEAD: (32, 8)}, {"modules_to_save": ["lm_head"]}),
        ("llama.cpp", "tensors", HEAD, {HEAD: (32, 8)}, {"modules_to_save": ["lm_head"]}),
        ("llama.cpp", "tensors", f"{NORM}' is a norm, which is converted and then not loaded", {NORM: (8,)}, {}),
        ("llama.cpp", "scale", "a lora_alpha of 0 is taken for none", {}, {"lora_alpha": 0}),
        ("tgi", "names", HEAD, {HEAD: (32, 8)}, {"modules_to_save": ["lm_head"]}),
        *((server, "dora", MAGNITUDE, {MAGNITUDE: (8,)}, {"use_dora": True}) for server in SERVERS if server != "peft"),
        *((server, "bias", BIAS, {BIAS: (8,)}, {"lora_bias": True}) for server in ("vllm", "sglang", "llama.cpp")),
        ("tgi", "names", BIAS, {BIAS: (8,)}, {"lora_bias": True}),
        ("vllm", "bias", "bias is all", {}, {"bias": "all"}),
        ("sglang", "scale", "use_rslora", {}, {"use_rslora": True}),
        ("llama.cpp", "scale", "use_rslora", {}, {"use_rslora": True}),
        *((s, "scale", "alpha_pattern", {}, {"alpha_pattern": {"q_proj": 2}}) for s in ("sglang", "tgi", "llama.cpp")),
        ("vllm==0.22", "scale to 0.22", "alpha_pattern", {}, {"alpha_pattern": {"q_proj": 2}}),
        ("vllm", "start", "init_lora_weights is 'pissa_niter_4'", {}, {"init_lora_weights": "pissa_niter_4"}),
        ("vllm", "tokens", "trainable_tokens_delta", {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (1, 8)}, {}),
        ("vllm", "embedding", "40 rows", {f"{EMBEDDING}.base_layer.weight": (40, 8)}, {}),
        ("llama.cpp", "embedding", "40 rows", {f"{EMBEDDING}.base_layer.weight": (40, 8)}, {}),
        ("vllm", "vocabulary", "40 tokens", {f"{EMBEDDING}.lora_embedding_A": (4, 40)}, {}),
    ],
)
def test_a_refusal_names_the_tensor_and_the_rule(
    tmp_path: Path, server: str, rule: str, named: str, tensors: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    """Each thing that a server does not take is refused by its rule, which names the tensor or the field."""
    base(tmp_path)
    adapter(tmp_path, lora(blocks()) | {name: zeros(*shape) for name, shape in tensors.items()}, **config)
    assert named in refused(held(tmp_path, server), rule)


def test_the_factor_that_would_be_served_is_told(tmp_path: Path) -> None:
    """With rsLoRA, rank 4 and alpha 8 an update is trained with 4, and served by llama.cpp with 2."""
    base(tmp_path)
    adapter(tmp_path, lora(blocks(), rank=4), r=4, lora_alpha=8, use_rslora=True)
    told = refused(held(tmp_path, "llama.cpp"), "scale")
    assert told.endswith("was trained with alpha 8 / √rank 4 = 4, rsLoRA, and would be served with 2")


def test_a_rank_of_its_own_is_refused_where_one_fills_all(tmp_path: Path) -> None:
    """A layer of another rank does not fill SGLang's rows; vLLM scaled it by the config's rank up to 0.22."""
    base(tmp_path)
    adapter(tmp_path, lora(blocks()) | lora(blocks(parts=["mlp.up_proj"]), rank=2), rank_pattern={"up_proj": 2})
    rules = [one.rule.name for one in held(tmp_path, "sglang").of(Tier.FAIL)]
    assert rules == ["ranks", "scale"]
    assert "up_proj" in refused(held(tmp_path, "vllm==0.22"), "scale to 0.22")
    assert held(tmp_path, "vllm").tier is held(tmp_path, "vllm==0.33.0").tier is Tier.PASS
    assert held(tmp_path, "vllm==0.30").tier is Tier.WARN


@pytest.mark.parametrize("server", ["vllm", "sglang", "tgi"])
def test_without_a_rank_of_the_config_the_factor_is_a_doubt(tmp_path: Path, server: str) -> None:
    """Where every rank stands in rank_pattern and ``r`` is missing, nobody can tell by what a server divides."""
    base(tmp_path)
    adapter(tmp_path, r=None, rank_pattern={part.rpartition(".")[2]: 8 for part in (*ATTENTION, *MLP)})
    said = [one.finding.what for one in held(tmp_path, server).of(Tier.WARN) if one.rule.name == "scale"]
    assert said == ["the config's r is None, so by what the update would be scaled was not checked"]


@pytest.mark.parametrize(("rank", "least"), [(17, 32), (64, 64)])
def test_a_rank_above_the_default_is_taken_with_a_note(tmp_path: Path, rank: int, least: int) -> None:
    """Up to 512 is taken by vLLM if it is started so; what it was started with is what counts where that is told."""
    base(tmp_path)
    adapter(tmp_path, lora(blocks(), rank), r=rank, lora_alpha=rank)
    outcome = held(tmp_path, "vllm")
    assert outcome.tier is Tier.PASS
    assert f"start it with --max-lora-rank {least}" in outcome.summary
    assert held(tmp_path, f"vllm --max-lora-rank {least}").held == ()
    assert f"rank {rank}, more than --max-lora-rank 16" in refused(held(tmp_path, "vllm --max-lora-rank=16"), "rank")
    assert "more than --max-lora-rank 8" in refused(held(tmp_path, "sglang --max-lora-rank 8"), "rank")


def test_no_rank_beyond_the_largest_choice(tmp_path: Path) -> None:
    """Rank 513 is more than vLLM can be started with."""
    base(tmp_path)
    adapter(tmp_path, lora(blocks(), 513), r=513)
    assert refused(held(tmp_path, "vllm"), "rank").endswith("has rank 513, more than any --max-lora-rank")


def test_tgi_wants_a_projection_in_every_block(tmp_path: Path) -> None:
    """Adapted in one of two blocks it would be left out of both; a nested or other name is not looked for."""
    base(tmp_path)
    adapter(tmp_path, lora(blocks(parts=["self_attn.q_proj"], count=1)))
    assert refused(held(tmp_path, "tgi"), "blocks").startswith("q_proj is adapted in 1 of 2 blocks, not in block 1")
    other = tmp_path / "nested"
    other.mkdir()
    base(other, modules=blocks(NESTED))
    adapter(other, lora(blocks(NESTED)))
    assert "28 of its 28 tensors would be left out, and the base alone" in refused(held(other, "tgi"), "names")


@pytest.mark.parametrize(("rank", "cards", "part"), [(4, 1, 0.5), (20, 1, 0.625), (8, 2, 0.5), (16, 4, 0.5)])
def test_tgi_scales_by_a_padded_rank(tmp_path: Path, rank: int, cards: int, part: float) -> None:
    """All kinds of projections but the first are served with r / (the rank that zeros fill) of their scale."""
    base(tmp_path)
    adapter(tmp_path, lora(blocks(parts=["self_attn.q_proj", "mlp.up_proj"]), rank), r=rank)
    told = refused(held(tmp_path, f"tgi --num-shard {cards}"), "padding")
    assert told.endswith(f"layers.0.mlp.up_proj.lora_A.weight' would be served with {part:.3g} of its scale")


def test_tgi_takes_a_rank_that_needs_no_padding_and_says_on_how_many_cards(tmp_path: Path) -> None:
    """Rank 48 fills six shards; of one kind of projection the scale is told before any padding."""
    base(tmp_path)
    adapter(tmp_path, lora(blocks(), 48), r=48)
    assert "start it with --num-shard 6" in held(tmp_path, "tgi").summary
    assert held(tmp_path, "tgi --num-shard 6").held == ()
    assert "padded to 64" in refused(held(tmp_path, "tgi --num-shard 8"), "padding")
    (tmp_path / "one").mkdir()
    base(tmp_path / "one")
    adapter(tmp_path / "one", lora(blocks(parts=["self_attn.q_proj"]), 4), r=4)
    assert held(tmp_path / "one", "tgi").held == ()


def test_shards_are_read_by_some(tmp_path: Path) -> None:
    """An adapter in two files is none for vLLM, llama.cpp and PEFT; SGLang and TGI read every file."""
    base(tmp_path)
    folder = adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate((sorted(lora(blocks()))[::2], sorted(lora(blocks()))[1::2]), 1):
        file = f"adapter_model-0000{number}-of-00002.safetensors"
        save_file({name: lora(blocks())[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for server in ("vllm", "llama.cpp", "peft==0.21"):
        assert "adapter_model-00001-of-00002.safetensors" in refused(held(tmp_path, server), "file")
    assert held(tmp_path, "sglang").tier is held(tmp_path, "tgi").tier is Tier.PASS


@pytest.mark.parametrize(("number", "tier"), [(VOCABULARY - 1, Tier.PASS), (VOCABULARY, Tier.FAIL)])
def test_sglang_takes_no_added_tokens(tmp_path: Path, number: int, tier: Tier) -> None:
    """A token beyond the base's vocabulary is refused; those of the base's own tokenizer are not."""
    base(tmp_path)
    (adapter(tmp_path) / "added_tokens.json").write_text(json.dumps({"<new>": number}))
    outcome = held(tmp_path, "sglang")
    assert outcome.tier is tier
    if tier is Tier.FAIL:
        assert refused(outcome, "added tokens") == "added_tokens.json adds '<new>' to the base's 32 tokens"


def test_a_tower_is_not_served_unless_it_is_asked_for(tmp_path: Path) -> None:
    """LoRA in the tower that sees is left out by vLLM without a setting, and taken for the text's by SGLang."""
    seen = "model.visual.blocks.0.attn.qkv"
    base(tmp_path, "Qwen3VLForConditionalGeneration", [*blocks(NESTED), seen])
    adapter(tmp_path, lora([*blocks(NESTED), seen]))
    assert f"tensor 'base_model.model.{seen}.lora_A.weight'" in refused(held(tmp_path, "vllm"), "tower")
    assert held(tmp_path, "vllm --enable-tower-connector-lora").tier is Tier.PASS
    assert refused(held(tmp_path, "sglang"), "tower")


def test_what_peft_would_leave_out_or_invent_is_told(tmp_path: Path) -> None:
    """A module that the base has not is refused, one that has no tensors is a doubt."""
    base(tmp_path, modules=blocks(count=3))
    adapter(tmp_path, lora(blocks(parts=["mlp.down_proj"])))
    assert held(tmp_path, "peft==0.21").tier is Tier.WARN
    assert "1 of the 3 modules that target_modules names have no tensors here" in held(tmp_path, "peft==0.21").summary
    other = tmp_path / "other"
    other.mkdir()
    base(other, modules=blocks(count=1))
    adapter(other, lora(blocks(parts=["mlp.down_proj"])))
    assert f"'base_model.model.{TEXT}.1.mlp.down_proj.lora_A.weight'" in refused(held(other, "peft==0.21"), "names")


def test_the_fields_of_the_installed_peft_are_read_without_importing_it() -> None:
    """They are those of its own dataclass."""
    peft = pytest.importorskip("peft")
    assert installed_fields() >= set(peft.LoraConfig.__dataclass_fields__)


# --- what nobody knows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
def test_without_its_base_nothing_is_green(tmp_path: Path, server: str) -> None:
    """The names were held against nothing, which is said, and no failure."""
    adapter(tmp_path, base_model_name_or_path="nobody/nothing")
    outcome = held(tmp_path, server)
    assert outcome.tier is Tier.WARN
    assert "its base is not at hand" in outcome.summary


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ("vllm==0.99", "nobody checked 16 of 17 rules for vllm==0.99"),
        ("vllm==0.9", "nobody checked"),
        ("sglang==0.5.13", "nobody checked"),
        ("tgi==4", "nobody checked"),
        ("peft==0.5", "nobody checked"),
        ("llama.cpp==b6000", "nobody checked 12 of 12 rules for llama.cpp==b6000"),
    ],
)
def test_a_version_that_nobody_checked_warns(tmp_path: Path, server: str, said: str) -> None:
    """It passes no test; what would be refused by another version is said, and is no failure."""
    base(tmp_path)
    adapter(tmp_path)
    outcome = held(tmp_path, server)
    assert outcome.tier is Tier.WARN
    assert said in outcome.summary
    other = tmp_path / "dora"
    other.mkdir()
    base(other)
    adapter(other, use_dora=True)
    assert held(other, server).tier is Tier.WARN
    assert said in "\n".join(held(other, server).lines())


@pytest.mark.parametrize(
    "server", ["vllm==0.11", "vllm==0.11.2", "vllm==v0.22.1", "vllm==0.33.0", "sglang==0.5.9", "tgi==3.3.4"]
)
def test_a_version_that_was_checked_is_green(tmp_path: Path, server: str) -> None:
    """A version with more numbers is of the one with fewer."""
    base(tmp_path)
    adapter(tmp_path)
    assert held(tmp_path, server).tier is Tier.PASS


def test_a_rule_of_older_versions_does_not_stand_for_newer_ones(tmp_path: Path) -> None:
    """LoRA on the head of a Qwen3 is unexpected in vLLM 0.15, and taken since."""
    base(tmp_path, "Qwen3ForCausalLM", [*blocks(), "lm_head"])
    adapter(tmp_path, lora([*blocks(), "lm_head"]))
    assert "on the head or the embedding of a Qwen" in refused(held(tmp_path, "vllm==0.15.1"), "qwen-head")
    assert held(tmp_path, "vllm==0.20").tier is held(tmp_path, "vllm").tier is Tier.PASS


def test_an_unknown_class_is_a_doubt_and_one_without_lora_a_refusal(tmp_path: Path) -> None:
    """Of a class that stands in no list nobody knows; GPT-NeoX took none in vLLM up to 0.22."""
    base(tmp_path, "SomethingForCausalLM")
    adapter(tmp_path)
    assert held(tmp_path, "vllm").tier is held(tmp_path, "tgi").tier is Tier.WARN
    other = tmp_path / "neox"
    other.mkdir()
    base(other, "GPTNeoXForCausalLM")
    adapter(other)
    assert "a GPTNeoXForCausalLM, which takes no adapter" in refused(held(other, "vllm==0.22"), "architecture to 0.22")
    assert held(other, "vllm").tier is Tier.PASS


def test_names_as_on_disk_prove_nothing_of_a_class_that_nobody_checked(tmp_path: Path) -> None:
    """Gemma 4 holds the adapter's very names in its files, and vLLM has served its base all the same (41754)."""
    base(tmp_path, "Gemma4ForConditionalGeneration", blocks(NESTED))
    adapter(tmp_path, lora(blocks(NESTED)))
    outcome = held(tmp_path, "vllm")
    assert outcome.tier is Tier.WARN
    assert "whether Gemma4ForConditionalGeneration takes adapters was not checked" in outcome.summary


def test_a_head_is_tied_where_neither_config_nor_files_tell_of_one(tmp_path: Path) -> None:
    """A config leaves out what is its class's default: then the head is tied where the files hold none."""
    base(tmp_path, "GemmaForCausalLM")
    adapter(tmp_path, lora([*blocks(), "lm_head"]))
    assert "ties to its embedding" in refused(held(tmp_path, "llama.cpp"), "head")
    assert held(tmp_path, "vllm").tier is Tier.PASS


def test_a_base_saved_without_the_class_of_its_head_has_the_same_modules(tmp_path: Path) -> None:
    """Its files lack the first part of every name, which the loader of a server puts back."""
    base(tmp_path, modules=blocks("layers"))
    adapter(tmp_path)
    assert held(tmp_path, "vllm").tier is held(tmp_path, "peft==0.21").tier is Tier.PASS
    (tmp_path / "gpt2").mkdir()
    base(tmp_path / "gpt2", "GPT2LMHeadModel", ["h.0.attn.c_attn", "wte"])
    adapter(tmp_path / "gpt2", lora(["transformer.h.0.attn.c_attn"]), target_modules=["c_attn"])
    assert held(tmp_path / "gpt2", "peft==0.21").tier is Tier.PASS


@pytest.mark.parametrize(("heads", "tier"), [(2, Tier.PASS), (4, Tier.WARN)])
def test_sizes_that_one_config_cannot_tell_are_a_doubt_before_sglang(tmp_path: Path, heads: int, tier: Tier) -> None:
    """Where q_proj is not as wide as heads and their size say, as with Qwen3.5's gate, a class must know better."""
    base(tmp_path, num_attention_heads=heads, head_dim=4, hidden_size=WIDTH, intermediate_size=WIDTH)
    adapter(tmp_path)
    outcome = held(tmp_path, "sglang")
    assert outcome.tier is tier
    assert ("is of a module of 8 to 8, and the base's config makes it" in outcome.summary) is (tier is Tier.WARN)


def test_a_tower_is_a_doubt_before_llama_cpp(tmp_path: Path) -> None:
    """The conversion of the text model has no place for it, and says so of lm_head alone."""
    seen = "model.visual.blocks.0.attn.qkv"
    base(tmp_path, "Qwen3VLForConditionalGeneration", [*blocks(NESTED), seen])
    adapter(tmp_path, lora([*blocks(NESTED), seen]))
    assert held(tmp_path, "llama.cpp").tier is Tier.WARN


def test_experts_are_a_doubt(tmp_path: Path) -> None:
    """How an expert's tensors must be named was not written down by anybody."""
    base(tmp_path, "Qwen3MoeForCausalLM")
    adapter(tmp_path, lora([*blocks(), "model.layers.0.mlp.experts.3.up_proj"]))
    outcome = held(tmp_path, "vllm")
    assert outcome.tier is Tier.WARN
    assert "is of experts" in outcome.summary


@pytest.mark.parametrize("server", SERVERS)
def test_a_whole_lora_null_model_is_no_adapter(tmp_path: Path, server: str) -> None:
    """A LoRA-Null directory has no adapter_config.json; each server is told so once, and nothing else is asked."""
    checkpoint = open_checkpoint(tiny.lora_null(tmp_path / "ft"))
    outcome = hold(Asked(server, "0.21" if server == "peft" else None), checkpoint, None)
    assert "its config.json is of LoRA-Null, not of PEFT; merge it" in refused(outcome, "adapter")
    assert outcome.rules == 1


# --- the table and the option ---------------------------------------------------------------------------------------


def test_every_rule_has_its_source_and_its_date() -> None:
    """A line of the table without one is no rule; names are unique within a server, and versions in order."""
    for server in SERVERS:
        names = [rule.name for rule in rules_of(server)]
        assert len(names) == len({*names}) > 5
        assert rules_of(server)[0].name == "adapter"
    for rule in RULES:
        assert rule.server in SERVERS
        assert rule.says
        assert rule.source
        assert len(rule.read) == len("2026-11-27")
        assert bool(rule.first) is bool(rule.last)


def test_servers_are_named_with_versions_and_settings() -> None:
    """Several in one value, a version, and the settings of one."""
    assert asked("vllm,sglang==0.5.9, peft".replace(" ", "")) == (
        Asked("vllm"),
        Asked("sglang", "0.5.9"),
        Asked("peft"),
    )
    (one,) = asked("vllm==0.17 --max-lora-rank=64 --lora-target-modules q_proj o_proj")
    assert one.flags == {"max-lora-rank": ("64",), "lora-target-modules": ("q_proj", "o_proj")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ollama", "takes servers of vllm, sglang, tgi, llama.cpp, peft, such as vllm, *, not 'ollama'"),
        ("vllm==new", "takes servers of *, not 'vllm==new'"),
        ("vllm==", "takes servers of *, not 'vllm=='"),
        ("vllm '", "takes servers such as *"),
        ("vllm,tgi --max-lora-rank 8", "takes settings of one server alone, *"),
        ("vllm --dtype half", "knows no setting 'dtype' of vllm *; there are: --max-lora-rank, *"),
        ("tgi --max-lora-rank 8", "knows no setting 'max-lora-rank' of tgi *; there are: --num-shard"),
        ("peft --max-lora-rank 8", "knows no setting 'max-lora-rank' of peft that a rule asks for; there are: none"),
        ("tgi --num-shard 0", "--num-shard of tgi takes one whole number, not '0'"),
        ("vllm --max-lora-rank many", "--max-lora-rank of vllm takes one whole number, not 'many'"),
        ("vllm more", "knows no setting '' of vllm *"),
    ],
)
def test_what_names_no_server_is_refused(text: str, said: str) -> None:
    """One sentence says what is taken."""
    import fnmatch

    with pytest.raises(OptionError) as refusal:
        asked(text)
    assert fnmatch.fnmatchcase(str(refusal.value), said)
