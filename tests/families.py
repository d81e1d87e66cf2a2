"""Random tiny models of families that see or hear beside reading."""

from collections.abc import Callable
from typing import Any

import transformers as hf

TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
ROTARY = {"rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}}
EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {**EYE, "image_size": 16, "patch_size": 4}
DEEP = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
}  # fmt: skip
DELTA = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
TOKENS = {"image_token_id": 120, "video_token_id": 121}


def qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config={**TEXT, **ROTARY}, vision_config=vision, **TOKENS)
    )


def qwen2_5_vl() -> Any:
    vision = {**DEEP, "fullatt_block_indexes": [0]}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config={**TEXT, **ROTARY}, vision_config=vision, **TOKENS)
    )


def qwen3_vl() -> Any:
    vision = {**DEEP, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config={**TEXT, **ROTARY, "head_dim": 8}, vision_config=vision, **TOKENS)
    )


def qwen3_5() -> Any:
    vision = {**DEEP, "num_position_embeddings": 16, "deepstack_visual_indexes": []}
    return hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(text_config={**TEXT, **ROTARY, **DELTA}, vision_config=vision, **TOKENS)
    )


def llava() -> Any:
    vision = {**PATCHES, "model_type": "clip_vision_model"}
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config={**TEXT, "model_type": "llama"}, vision_config=vision, image_token_index=120)
    )


def llava_next() -> Any:
    vision = {**PATCHES, "model_type": "clip_vision_model"}
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config=vision,
            image_token_index=120,
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        )
    )


def mistral3() -> Any:
    vision = {**PATCHES, "model_type": "pixtral", "head_dim": 16}
    text = {**TEXT, "model_type": "mistral", "head_dim": 8}
    return hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=120)
    )


def idefics3() -> Any:
    text = {**TEXT, "model_type": "llama"}
    return hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(text_config=text, vision_config=PATCHES, image_token_id=120, scale_factor=2)
    )


def smolvlm() -> Any:
    text = {**TEXT, "model_type": "llama"}
    return hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(text_config=text, vision_config=PATCHES, image_token_id=120, scale_factor=2)
    )


def internvl() -> Any:
    vision = {**EYE, "image_size": [16, 16], "patch_size": [4, 4]}
    text = {**TEXT, "model_type": "qwen2"}
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(text_config=text, vision_config=vision, image_token_id=120)
    )


def paligemma() -> Any:
    vision = {**PATCHES, "model_type": "siglip_vision_model"}
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=120, projection_dim=32)
    )


def glm4v() -> Any:
    text = {
        **TEXT, "head_dim": 8,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": 0,
    }  # fmt: skip
    return hf.Glm4vForConditionalGeneration(
        hf.Glm4vConfig(text_config=text, vision_config={**DEEP, "image_size": 16}, **TOKENS)
    )


def lfm2_vl() -> Any:
    text = {**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    vision = {**EYE, "patch_size": 4, "num_patches": 16, "model_type": "siglip2_vision_model"}
    return hf.Lfm2VlForConditionalGeneration(
        hf.Lfm2VlConfig(text_config=text, vision_config=vision, image_token_id=120)
    )


def qwen2_audio() -> Any:
    audio = {
        "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 32,
    }  # fmt: skip
    text = {**TEXT, "model_type": "qwen2"}
    return hf.Qwen2AudioForConditionalGeneration(
        hf.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=120)
    )


def gemma3() -> Any:
    text = {**TEXT, "head_dim": 8}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=PATCHES, image_token_id=120, mm_tokens_per_image=4)
    )


def mllama() -> Any:
    text = {
        **TEXT, "cross_attention_layers": [1], "num_hidden_layers": 3, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 16, "patch_size": 4, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "max_num_tiles": 4,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }  # fmt: skip
    return hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=120)
    )


def llama4() -> Any:
    text = {
        **TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1,
        "attention_chunk_size": 64, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        **PATCHES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    return hf.Llama4ForConditionalGeneration(
        hf.Llama4Config(text_config=text, vision_config=vision, image_token_index=120)
    )


def blip_2() -> Any:
    text = {
        "model_type": "opt", "vocab_size": 128, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32,
    }  # fmt: skip
    between = {**EYE, "vocab_size": 128, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    return hf.Blip2ForConditionalGeneration(
        hf.Blip2Config(
            text_config=text, vision_config=PATCHES, qformer_config=between, num_query_tokens=4, image_token_index=120
        )
    )


MAKERS: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5, llava, llava_next, mistral3, idefics3, smolvlm, internvl, paligemma,
        glm4v, lfm2_vl, qwen2_audio, gemma3, mllama, llama4, blip_2,
    )
}  # fmt: skip
"""By name, each family."""
