"""The rules of the servers, a record each: what a server takes of an adapter, where it is written, when it was read.

A rule is added here, with a check of `serve_checks`, `serve_scales` or `serve_names`; docs/serving.md is written from
this table. The sources are files of the servers' own repositories at a commit, their issues and pull requests, and
their documentation. None of it was held against a running server but the rules of PEFT, which loads adapters in this
project's tests; `tests.server_sources` holds names, classes and quoted texts against the sources of the others.
"""

from dataclasses import dataclass

from pytest_nullspace.checkpoint.peft import FORMAT, GGUF
from pytest_nullspace.judging import serve_checks as has
from pytest_nullspace.judging import serve_names as names
from pytest_nullspace.judging import serve_scales as scales
from pytest_nullspace.judging.served import Check

READ = "2026-11-27"
"""When the sources were read."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What one server asks of an adapter.

    Attributes:
        server: A key of `pytest_nullspace.judging.served.SERVERS`.
        name: How the rule is called.
        says: The server's own rule.
        source: Where it is written.
        first: The first version of which it was read; empty where nobody held it against a version.
        last: The last.
        check: What looks; None for what is taken as it is.
        until: The last version for which it holds; empty where it holds still.
        since: The first version for which it holds; empty where it always did.
        read: When its source was read.
        of: The format of the adapters that it is a rule for.
    """

    server: str
    name: str
    says: str
    source: str
    first: str
    last: str
    check: Check | None = None
    until: str = ""
    since: str = ""
    read: str = READ
    of: str = FORMAT


_TEXT_OF_WRAPPER = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
_TEXT_OF_QWEN2 = {**_TEXT_OF_WRAPPER, "model.": "language_model.model."}
VLLM_WRAPPERS = {
    **dict.fromkeys(
        (
            "Gemma3ForConditionalGeneration", "Lfm2VlForConditionalGeneration", "LlavaForConditionalGeneration",
            "Qwen3VLForConditionalGeneration", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
        ),
        _TEXT_OF_WRAPPER,
    ),
    **dict.fromkeys(
        (
            "Mistral3ForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
        ),
        _TEXT_OF_QWEN2,
    ),
    "OPTForCausalLM": {"decoder.": "model.decoder."},
}  # fmt: skip
"""Classes that vLLM names otherwise than their files do, and the prefixes that it puts in place of theirs."""
_VLLM_WRAPPERS_0_28 = {**VLLM_WRAPPERS, "Mistral3ForConditionalGeneration": _TEXT_OF_WRAPPER}

VLLM_PLAIN = (
    "CohereForCausalLM", "Cohere2ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Exaone4ForCausalLM",
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GlmForCausalLM", "Glm4ForCausalLM",
    "Glm4MoeForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM", "InternLM3ForCausalLM",
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "NemotronForCausalLM", "OlmoForCausalLM",
    "Olmo2ForCausalLM", "Olmo3ForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM",
    "SolarForCausalLM", "Starcoder2ForCausalLM",
)  # fmt: skip
"""Classes that take adapters in vLLM, under the names of their files."""
_VLLM_SINCE_0_33 = ("GPTNeoXForCausalLM", "OlmoeForCausalLM")
"""Classes that took none up to 0.22, and do in 0.33."""

VLLM_WITHOUT = (
    "ArcticForCausalLM", "BloomForCausalLM", "DbrxForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM",
    "GPT2LMHeadModel", "GPTJForCausalLM", "Gemma3nForCausalLM", "Gemma3nForConditionalGeneration",
    "MPTForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "OrionForCausalLM",
    "StableLmForCausalLM", "Zamba2ForCausalLM",
)  # fmt: skip
"""Classes that take none."""

TGI_TAKEN = (
    "LlamaForCausalLM", "MistralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
)  # fmt: skip
"""Classes of which pull requests or issues say that TGI takes adapters."""

SGLANG_MODULES = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "in_proj", "gate_proj", "up_proj", "gate_up_proj",
    "down_proj", "embed_tokens", "lm_head", "unembed_tokens", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj",
    "in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z", "in_proj_qkvz", "fc1_latent_proj",
    "fc2_latent_proj",
)  # fmt: skip

_VLLM_HELPER = "vllm/lora/peft_helper.py@e745baf, docs.vllm.ai/en/v0.10.0 and latest"
_VLLM_MODEL = "vllm/lora/lora_model.py@0306474, docs.vllm.ai/en/v0.22.1"
_SGLANG_LORA = "python/sglang/srt/lora/lora.py and lora_config.py@0ceb81f"
_TGI_LORA = "server/text_generation_server/adapters/lora.py@45d95bd"
_TGI_LOOKUP = "server/text_generation_server/utils/adapter.py@4b56934, models/__init__.py"
_GGUF = "convert_lora_to_gguf.py@0b03ada, the same in llama-cpp-python 0.3.36"
_GGUF_LORA = "src/llama-adapter.cpp@0650ea8"
_PEFT = "peft/utils/save_and_load.py and peft/config.py of 0.21.2"

_TGI_NAMES = (
    r"base_model\.model\.model\.layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate|up|down)_proj)\."
    r"lora_[AB]\.weight"
)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def _v(
    name: str, says: str, source: str, check: Check | None, last: str = "0.33", until: str = "", since: str = ""
) -> Rule:
    return Rule("vllm", name, says, source, since or "0.10", until or last, check, until, since)


def _now(name: str, says: str, source: str, check: Check | None, since: str) -> Rule:
    """A rule as vLLM 0.33 has it, that is another than the one that was read before ``since``."""
    return Rule("vllm", name, says, source, "0.33", "0.33", check, since=since)


def _s(name: str, says: str, source: str, check: Check | None, last: str = "0.5.12", until: str = "") -> Rule:
    return Rule("sglang", name, says, source, "0.5", last, check, until)


def _t(name: str, says: str, source: str, check: Check | None) -> Rule:
    return Rule("tgi", name, says, source, "2.1", "3.3", check)


def _g(name: str, says: str, source: str, check: Check | None) -> Rule:
    return Rule("llama.cpp", name, says, source, "", "", check)


def _gg(name: str, says: str, source: str, check: Check | None) -> Rule:
    """A rule for what was converted already, which llama.cpp opens as it is."""
    return Rule("llama.cpp", f"gguf {name}", says, source, "", "", check, of=GGUF)


def _p(name: str, says: str, source: str, check: Check | None) -> Rule:
    return Rule("peft", name, says, source, "0.21", "0.21", check)


RULES = (
    _v("adapter", "adapter_config.json is read, with r, lora_alpha and target_modules", _VLLM_HELPER, has.is_adapter),
    _v(
        "file", "adapter_model.safetensors is opened, or adapter_model.bin or .pt; what lies in shards “doesn't "
        "contain tensors”", _VLLM_MODEL, has.one_file,
    ),
    _v(
        "names to 0.28", "a module takes what lies under its whole name after the class's own prefixes were put in "
        "place; what lies under another name is kept and never used, with no warning",
        "vllm/lora/model_manager.py@bb1d76e, issues 34186 (open), 48019, pull requests 39278 and 39369",
        names.found(_VLLM_WRAPPERS_0_28, VLLM_PLAIN), until="0.28",
    ),
    _now(
        "names", "a module takes what lies under its whole name after the class's own prefixes were put in place, of "
        "Mistral 3 also those of the text model alone; what lies under another name is kept and never used",
        "vllm/lora/worker_manager.py, vllm/model_executor/models of 0.33.0, issue 34186",
        names.found(VLLM_WRAPPERS, (*VLLM_PLAIN, *_VLLM_SINCE_0_33)), since="0.29",
    ),
    _v(
        "architecture to 0.22", "a class that has no LoRA in the list of models takes no adapter; Gemma 4 has it, and "
        "its adapters are reported as without effect (issue 41754, open)", "docs/models/supported_models.md@0046f77",
        has.architectures((*VLLM_PLAIN, *VLLM_WRAPPERS), (*VLLM_WITHOUT, *_VLLM_SINCE_0_33)), until="0.22",
    ),
    _now(
        "architecture", "a class that does not come from SupportsLoRA takes no adapter; Gemma 4 does, and its adapters "
        "are reported as without effect (issue 41754, open)", "vllm/model_executor/models/registry.py of 0.33.0",
        has.architectures((*VLLM_PLAIN, *VLLM_WRAPPERS, *_VLLM_SINCE_0_33), VLLM_WITHOUT), since="0.23",
    ),
    _v(
        "lora-target-modules", "modules outside --lora-target-modules are left out without a word", "issue 55193 "
        "(observed with 0.28.0), pull request 34984", names.among_targets, since="0.17",
    ),
    _v(
        "rank", "r is at most max_lora_rank: 16, or what --max-lora-rank says of 1, 8, 16, 32, 64, 128, 256, 320, 512",
        "vllm/config/lora.py@01230b4, docs.vllm.ai/en/v0.11.0 and v0.22.1", scales.rank(VLLM_RANKS, 16),
    ),
    _v(
        "scale to 0.22", "one factor for all modules, lora_alpha / r, or / √r with use_rslora; rank_pattern and "
        "alpha_pattern are no fields of the config that is read", _VLLM_HELPER,
        scales.scaled(rslora=True, by_layer=False), until="0.22",
    ),
    _now("scale", "rank_pattern, alpha_pattern and use_rslora are read as PEFT reads them",
         "vllm/lora/peft_helper.py of 0.33.0", scales.scaled_as_trained, since="0.23"),
    _now(
        "start", "“vLLM does not support init_lora_weights=” of PiSSA, OLoRA, CorDA and LoftQ, which “modify the base "
        "model weights when PEFT loads the adapter”", "vllm/lora/peft_helper.py of 0.33.0",
        has.plain_start(("gaussian", "eva", "orthogonal", "mica", "lora_ga")), since="0.23",
    ),
    _v("modules_to_save", "“vLLM only supports modules_to_save being” None; in 0.33 also the head of a classifier",
       _VLLM_HELPER,
       has.no_whole_modules(silently=False)),
    _v("dora", "“vLLM does not yet support DoRA.”", _VLLM_HELPER, has.no_dora),
    _v(
        "bias", "“Adapter bias is not supported.”, before 0.11 not without bias_enabled; a tensor that "
        "ends in bias “is unsupported LoRA weight”", f"{_VLLM_HELPER}, vllm/lora/utils.py@0fd1570", has.no_bias,
    ),
    _v(
        "tokens", "every tensor is lora_A, lora_B or lora_embedding, any other “is unsupported LoRA weight”; a later "
        "version takes trained tokens with --max-lora-trainable-tokens", "vllm/lora/utils.py@0fd1570",
        has.no_tensors("tokens", told="rows of the embedding, trained by trainable_token_indices"),
    ),
    _v(
        "embedding", "base_layer.weight of embed_tokens and lm_head is skipped; since lora_extra_vocab_size went with "
        "0.12, no token can be added", "vllm/lora/utils.py@0fd1570, vllm/config/lora.py@01230b4", has.no_added_rows,
    ),
    _v(
        "vocabulary", "“The embedding LoRA size must be consistent with the base model's vocabulary size”", _VLLM_MODEL,
        has.embedding_of_base,
    ),
    _v(
        "qwen-head", "Qwen2 and Qwen3 register no embedding_modules, so that LoRA on lm_head or embed_tokens is an "
        "unexpected module", "pull request 33234, issue 21500", has.no_head, until="0.15",
    ),
    _v(
        "tower", "LoRA acts in the language model alone, unless --enable-tower-connector-lora; what is elsewhere “will "
        "be ignored”", "vllm/lora/model_manager.py@bb1d76e", names.only_text("enable-tower-connector-lora"),
    ),
    _v("experts", "experts are taken one by one, or as one tensor of three dimensions", _VLLM_MODEL, has.known_experts),
    _v("dtype", "any floating type, cast to that of the model (lora_dtype auto)", "vllm/config/lora.py@01230b4", None),
    _s("adapter", "adapter_config.json is read, with r, lora_alpha and target_modules", _SGLANG_LORA, has.is_adapter),
    _s(
        "target_modules", "“Only 'all' or 'all-linear' can be used as the string for target module”",
        "python/sglang/srt/lora/utils.py@01235a1, issue 25913", has.listed_targets,
    ),
    _s(
        "attention", "q_proj, k_proj and v_proj of a layer are joined: a missing k_proj is zero, a missing q_proj or "
        "v_proj is a KeyError for its lora_A", "python/sglang/srt/lora/lora.py (normalize_qkv_proj), issue 25913 (seen "
        "with 0.5.12), pull request 28199 (open)", names.query_with_value,
    ),
    _s(
        "head", "a head that the base ties to its embedding is no module of its own, and its LoRA is lost silently",
        "pull request 18634 (of 2026-02-11; which release has it first was not checked)", has.head_apart, last="0.5.8",
        until="0.5.8",
    ),
    _s(
        "lora-target-modules", "the adapter's target_modules are among --lora-target-modules, else it “is incompatible "
        "with the current LoRA memory pool configuration”", "python/sglang/srt/lora/mem_pool.py (can_support)",
        names.among_targets,
    ),
    _s(
        "rank", "r is at most --max-lora-rank, which is the largest of those that the server starts with",
        "python/sglang/srt/lora/mem_pool.py (can_support), docs.sglang.io/advanced_features/lora.html",
        scales.rank((), None),
    ),
    _s("ranks", "each layer's tensors fill the r rows that the config gives", "python/sglang/srt/lora/mem_pool.py",
       scales.one_rank),
    _s(
        "scale", "one factor, lora_alpha / r; use_rslora and alpha_pattern are not read",
        "python/sglang/srt/lora/lora.py (scaling)", scales.scaled(rslora=False, by_layer=False),
    ),
    _s("dora", "“LoRA serving currently doesn't support DoRA adapters”, in older versions left out without a word",
       "python/sglang/srt/lora/lora_manager.py (validate_new_adapter)", has.no_dora),
    _s("bias", "what is not lora_A is copied as lora_B", "python/sglang/srt/lora/mem_pool.py", has.no_bias),
    _s("modules_to_save", "the field is not read; a whole module is no lora_A or lora_B, and is skipped at debug level",
       "python/sglang/srt/lora/lora.py (_process_weight)", has.no_whole_modules(silently=True)),
    _s("tokens", "trained rows of the embedding are not read", "python/sglang/srt/lora/lora.py (_process_weight)",
       has.no_tensors("tokens", told="rows of the embedding, which are not read")),
    _s(
        "added tokens", "“LoRA serving currently doesn't support adapters that add tokens to the vocabulary”: "
        "added_tokens.json names none beyond the base's", f"{_SGLANG_LORA}, lora_manager.py (validate_new_adapter)",
        has.no_added_tokens,
    ),
    _s("tower", "modules are told by the number after layers., so that a tower's are lost or taken for the text's",
       "issue 28784", names.only_text()),
    _s("modules", "sizes are known for these modules, else get_hidden_dim is “not implemented”",
       "python/sglang/srt/lora/utils.py@01235a1", has.pooled(SGLANG_MODULES)),
    _s("sizes", "one size for all blocks by the config, unless a class has get_hidden_dim of its own; else the shapes "
       "do not fit", "python/sglang/srt/lora/utils.py@01235a1 (get_default_hidden_dim), pull request 19974", has.sized),
    _s("names", "what stands before layers.N does not matter", "python/sglang/srt/layers/utils.py (get_layer_id)",
       names.found_by_tail("no module of the base ends so")),
    _s("experts", "experts are taken in some classes", "python/sglang/srt/lora/lora.py", has.known_experts),
    _s("shards", "every *.safetensors of the directory is read", "python/sglang/srt/lora/lora.py", None),
    _t("adapter", "PEFT's own LoraConfig reads adapter_config.json", _TGI_LORA, has.is_adapter),
    _t(
        "names", "looked for is base_model.model.model.layers.N.self_attn.{q,k,v,o}_proj and mlp.{gate,up,down}_proj "
        "with lora_A and lora_B; all else is left out", _TGI_LOOKUP + ", issue 2441", names.in_blocks(_TGI_NAMES),
    ),
    _t("blocks", "a projection that is missing in one block is left out in all; their matrices are stacked, so of one "
       "rank", _TGI_LORA + " (prepare_weights)", has.in_every_block),
    _t("scale", "one factor, lora_alpha / r, or / √r with use_rslora; the patterns are not read", _TGI_LORA,
       scales.scaled(rslora=True, by_layer=False)),
    _t("padding", "zeros fill the rank up to 8 a shard, beyond to a multiple of 16, and the config then has that rank: "
       "of the kinds of projections all after the first are scaled by it", _TGI_LORA + " (prepare_weights), utils/"
       "sgmv.py@04e1af9 (pad_rank), models/__init__.py", scales.padded),
    _t("dora", "the magnitudes are no lora_A or lora_B, and are left out", _TGI_LORA, has.no_dora),
    _t("architecture", "the class has model.layers with self_attn.query_key_value; others are an AttributeError",
       _TGI_LOOKUP + ", pull requests 2482, 2567, 3089, issues 2847, 2926, 3335", has.architectures(TGI_TAKEN, (
       "Qwen2VLForConditionalGeneration", "LlavaNextForConditionalGeneration"))),
    _t("shards", "every safetensors file of the adapter is read", _TGI_LOOKUP, None),
    _g("adapter", "adapter_config.json and its weights are converted to a GGUF file", _GGUF, has.is_adapter),
    _g("file", "adapter_model.safetensors is read, or adapter_model.bin", _GGUF, has.one_file),
    _g("tensors", "“Unexpected name”, “Not a lora_A or lora_B tensor” of all but LoRA, base_layer.weight and norms; "
       "norms are converted, and passed over when the file is loaded", f"{_GGUF}, issue 11554, pull request 9948, "
       "src/llama-adapter.cpp@0650ea8", has.no_whole_modules(silently=False, by_name=True)),
    _g("bias", "“Unexpected name” as well", _GGUF, has.no_bias),
    _g("tokens", "“Unexpected name” as well", _GGUF, has.no_tensors("tokens", told="trained rows of the embedding")),
    _g("dora", "“Unexpected name” of a magnitude", _GGUF, has.no_dora),
    _g("scale", "lora_alpha over the rank of each pair, 1 where it is 0; use_rslora and alpha_pattern are not read",
       f"{_GGUF}, src/llama-adapter.h (get_scale)", scales.scaled(rslora=False, by_layer=True)),
    _g("head", "a head that is tied is no tensor of the model: “lm_head is present in adapter, but is ignored in base "
       "model”, or it “does not exist in base model”", f"{_GGUF}, issue 9065, src/llama-adapter.cpp", has.head_apart),
    _g("embedding", "base_layer.weight is left out", _GGUF, has.no_added_rows),
    _g("names", "each name is that of a tensor of the base, with or without language_model before it", f"{_GGUF}, "
       "src/llama-adapter.cpp", names.found_by_tail("the conversion maps no such name, or the model has none")),
    _g("tower", "a tensor for which the text model has no place is left out, without an error but for lm_head", _GGUF,
       names.only_text(known=False)),
    _g("experts", "experts are joined in some classes", _GGUF, has.known_experts),
    _gg("kind", "general.type is adapter and adapter.type lora, “expect general.type to be 'adapter'”; each tensor is "
        "lora_a or lora_b, each pair is whole", _GGUF_LORA, names.held_when_opened),
    _gg("architecture", "general.architecture is that of the model, else “model arch and LoRA arch mismatch”",
        _GGUF_LORA, names.held_when_opened),
    _gg("scale", "adapter.lora.alpha over the rank of each pair; without an alpha, or with 0, nothing is divided",
        "src/llama-adapter.h@215841f (get_scale)", names.held_when_opened),
    _gg("names", "each pair is of a tensor of the model, else it “does not exist in base model (hint: maybe wrong base "
        "model?)”", _GGUF_LORA, names.found_by_tail("the model has none of that name")),
    _gg("head", "a head that is tied is no tensor of the model, so that output.weight “does not exist in base model”",
        _GGUF_LORA, has.head_apart),
    _gg("shapes", "lora_a is as wide as the tensor's rows and lora_b has as many, else the tensor “has incorrect shape "
        "(hint: maybe wrong base model?)”", _GGUF_LORA, names.shaped_as_base),
    _gg("types", "any type in which ggml holds a matrix", _GGUF_LORA, None),
    _p("adapter", "adapter_config.json with peft_type", _PEFT, has.is_adapter),
    _p("file", "adapter_model.safetensors is opened, or adapter_model.bin", _PEFT, has.one_file),
    _p("names", "a tensor that fits no adapted module of the model by its whole name is left out, with a warning at "
       "most", _PEFT + ", issues 2566 and 2699", names.found({}, (*VLLM_PLAIN, *_VLLM_SINCE_0_33))),
    _p("missing", "a module that target_modules names is adapted; without tensors it stays as it was made, with “Found "
       "missing adapter keys”", _PEFT, has.none_missing),
    _p("fields", "a field that the installed LoraConfig does not know is ignored", _PEFT, has.known_fields),
    _p("the rest", "DoRA, rsLoRA, biases, whole modules, trained tokens, rank and alpha by layer are PEFT's own", _PEFT,
       None),
)  # fmt: skip
"""All rules, by server."""


def rules_of(server: str) -> tuple[Rule, ...]:
    """The rules of one server."""
    return tuple(rule for rule in RULES if rule.server == server)
