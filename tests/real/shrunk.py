"""Any model of transformers, as small as it can be: its own config with every size cut down."""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING

VOCABULARY, SPECIAL = 192, 140
"""Tokens in all, and from where on those lie that stand for an image or begin a turn: no character is one of them."""

_SIZES: tuple[tuple[str, int], ...] = (
    (r"(num|n)_(hidden_|encoder_|decoder_|transformer_)?(layers?|blocks|hidden_layers)|(en|de)coder_layers|depth", 2),
    (r"(encoder|decoder|vision|text)_(num_)?(hidden_)?layers|n_layers?", 2),
    (r"hidden_size|hidden_dim|d_model|n_embd|dim|embed_dim|embedding_size|word_embed_proj_dim|emb_dim|model_dim", 32),
    (r"out_hidden_size|projection_dim|projector_.*_dim|vision_output_dim|dim_model|.*_hidden_size|output_dim", 32),
    (r"(.*_)?(intermediate_size|ffn_hidden_size)(_mlp)?|d_ff|d_inner|(.*_)?ffn_dim|ffn_dim|dim_ff|.*_ffn_dim", 48),
    (r"(num|n)_(attention_)?heads?|(en|de)coder_attention_heads|attention_heads|.*num_attention_heads", 4),
    (r"num_query_heads|n_heads|encoder_num_heads|(en|de)coder_num_heads", 4),
    (r"(num_)?(attention_)?(key_value|kv)_heads|n_kv_heads?|.*num_key_value_heads|num_attention_groups", 2),
    (r"(num|n)_mamba_heads", 4),
    (r"(attention_)?head_dim|d_kv|dim_head|head_size|.*_head_dim|v_head_dim|kv_channels", 8),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|.*_num_experts", 4),
    (r"num_experts_per_tok(en)?|num_experts_per_token|moe_top_?k|top_k_experts|moe_k|experts_per_token", 2),
    (r"n_shared_experts|n_group|topk_group|num_expert_group.*", 1),
    (r"(kv|q|o)_lora_rank|.*_lora_rank|lora_rank", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(en|de)coder_position_embeddings|seq_length", 256),
    (r"max_(source|target)_positions|max_sequence_length|max_length_.*", 256),
    (r"sliding_window|attention_window_size|attention_chunk_size|local_attention", 64),
    (r"(ssm_)?state_size|mamba_d_state|ssm_state_size|linear_.*_head_dim", 8),
    (r"mamba_(n|num)_heads|mamba_num_heads|n_mamba_heads|linear_num_value_heads", 4),
    (r"mamba_(d|head)_(head|dim)|mamba_head_dim|linear_key_head_dim|linear_value_head_dim", 8),
    (r"mamba_n_groups|n_groups|mamba_ngroups|linear_num_key_heads", 2),
    (r"rotary_dim", 8),
    (r"mamba_chunk_size|chunk_size|mamba_d_ssm", 64),
    (r"image_size|img_size|input_size", 16),
    (r"patch_size", 4),
    (r"num_mel_bins", 8),
)  # fmt: skip


def shrunk(config: Any, own: Mapping[str, Any]) -> Any:
    """The config of that class with small sizes; ``own`` are a family's further changes, in parts by their names."""
    plain = config()
    changes: dict[str, Any] = {}
    special = iter(range(SPECIAL, VOCABULARY))
    for name, default in _defaults(config):
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
        if re.fullmatch(r"(padded_)?vocab_size|.*_vocab_size|vocab_size_.*", name) and isinstance(default, int):
            changes[name] = VOCABULARY
        elif name == "head_dim" and default is None:
            changes[name] = 8
        elif size is not None and isinstance(default, int) and not isinstance(default, bool):
            changes[name] = min(size, default) if default > 0 else default
        elif name.endswith(("_token_id", "_token_index")) and isinstance(default, int) and default > 3:
            changes[name] = next(special)
    if "kv_lora_rank" in changes and "num_key_value_heads" in changes:  # latent attention has no groups
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    for name in config.sub_configs:
        part = getattr(plain, name, None)
        given = dict(own.get(name, {}))
        kind = CONFIG_MAPPING[given["model_type"]] if "model_type" in given else type(part)
        if part is not None or given:
            changes[name] = shrunk(kind, given).to_dict()
    own = copy.deepcopy({key: value for key, value in own.items() if key not in config.sub_configs})  # it is written to
    return config(**{**changes, **own})


def _defaults(config: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a config with their defaults."""
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            yield field.name, field.default


ROTARY = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}
"""Positions in three dimensions, whose frequencies are halves of a head's width."""
_ROTARY: Mapping[str, Any] = {"text_config": {"rope_parameters": ROTARY}}
_GROUPLESS: Mapping[str, Any] = {"num_key_value_heads": 4}
_QUANTISER: Mapping[str, Any] = {
    "base_channels": 32, "channel_multiplier": [1, 1], "latent_channels": 32, "num_embeddings": 64
}  # fmt: skip
_BY_KIND: Mapping[str, Any] = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
_HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
OWN: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 256, "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "chameleon": {"vocabulary_map": {"<image>": 150}, "vq_config": {**_QUANTISER, "embed_dim": 32}},
    "cohere_compass": {"text_config": _BY_KIND},
    "cohere_compass_text": _BY_KIND,
    "colqwen2": {"vlm_config": _ROTARY},
    "cosmos3_edge": _ROTARY,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _GROUPLESS},
    "dots3_note_text": _GROUPLESS,
    "emu3": {"vocabulary_map": {"<image>": 150}, "vq_config": _QUANTISER},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [24, 24], "rope_parameters": ROTARY}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 3, "position_embedding_type": "rotary"},
    "florence2": {"vision_config": {
        "depths": [1, 1], "embed_dim": [32, 32], "num_heads": [2, 2], "num_groups": [2, 2], "patch_size": [7, 3],
        "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True],
    }},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm46v": _ROTARY,
    "glm4v": _ROTARY,
    "glm4v_moe": {"text_config": {"rope_parameters": ROTARY | {"mrope_section": [1, 1, 0]}}},
    "glm5_next": {"text_config": _GROUPLESS},
    "glm_ocr": _ROTARY,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]], "qformer_config": {"model_type": "blip_2_qformer", "num_attention_heads": 4},
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**ROTARY, "mrope_section": [1, 1, 1, 1]}}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "janus": {"vq_config": _QUANTISER},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "led": {"attention_window": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {"vision_config": {"num_hidden_layers": 4}},
    "neomme": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": _ROTARY,
    "pegasus_x": {"block_size": 16, "num_global_tokens": 8},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
                  "num_cross_attention_heads": 4},
    "qwen2_5_omni": {"enable_audio_output": False, "thinker_config": _ROTARY},
    "qwen2_5_omni_thinker": _ROTARY,
    "qwen2_5_vl": _ROTARY,
    "qwen2_vl": _ROTARY,
    "qwen3_5": {"text_config": {"layer_types": ["linear_attention", "full_attention"]}},
    "qwen3_5_moe": {"text_config": {"layer_types": ["linear_attention", "full_attention"]}},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 4},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "num_key_value_heads": 4, "layers_block_type": _HYBRID},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": _HYBRID, "adapter_rank": 4},
}  # fmt: skip
"""What a family needs beside small sizes."""
