"""The script that holds the table of servers against a server's source finds what was planted there."""

from pathlib import Path

from tests.server_sources import differences

REGISTRY = """
A = {"LlamaForCausalLM": ("llama", "LlamaForCausalLM"), "MistralForCausalLM": ("llama", "MistralForCausalLM")}
B = {"Gemma3ForConditionalGeneration": ("wrapper", "Wrapper"), "MPTForCausalLM": ("llama", "MistralForCausalLM")}
"""
LLAMA = """
from .interfaces import SupportsLoRA
class Llama: hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.visual.": "visual."})
class LlamaForCausalLM(Module, SupportsLoRA): pass
class MistralForCausalLM(LlamaForCausalLM): hf_to_vllm_mapper = Llama.hf_to_vllm_mapper | WeightsMapper()
"""
WRAPPER = """
from vllm.model_executor.models.llama import LlamaForCausalLM as Other
class Wrapper(Other): hf_to_vllm_mapper = made()
"""
RANKS = 'MaxLoRARanks = Literal[1, 8]\nsaid = f"vLLM does not yet support {what}DoRA."'


def test_what_a_source_says_otherwise_is_found(tmp_path: Path) -> None:
    """Classes that are gone, take or rename otherwise, ranks and texts; through bases, aliases and joined mappers."""
    for name, text in {
        "model_executor/models/registry.py": REGISTRY,
        "model_executor/models/llama.py": LLAMA,
        "model_executor/models/wrapper.py": WRAPPER,
        "config/lora.py": RANKS,
        "lora/utils.py": "",
    }.items():
        (tmp_path / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vllm" / name).write_text(text)
    found = [*differences("vllm", tmp_path)]
    assert "rule bias: no text of the source says “Adapter bias is not supported.”" in found
    assert not any(line.startswith("rule dora") for line in found)
    assert "Qwen2ForCausalLM: no such class is registered" in found
    assert "MPTForCausalLM: takes adapters" in found
    assert "Gemma3ForConditionalGeneration: its prefixes are no plain dictionary, so nobody read them" in found
    assert (
        "MistralForCausalLM: model.visual.0.proj is looked for as visual.0.proj, in the table as model.visual.0.proj"
        in found
    )
    assert not any(line.startswith("LlamaForCausalLM") for line in found)
    assert found[-1].startswith("max_lora_rank takes (1, 8), not (1, 8, 16,")


def test_what_llama_cpp_and_tgi_say_otherwise_is_found(tmp_path: Path) -> None:
    """Scales, norms, paddings and the order of projections, each where the sources have them."""
    tgi, package = tmp_path / "tgi", "server/text_generation_server"
    for name, text in {
        "convert_lora_to_gguf.py": "use_rslora = 1",
        "src/llama-adapter.cpp": 'if (str_endswith(name, "_norm.weight")) {\n// none\ncontinue;}',
        "src/llama-adapter.h": "scale = alpha / rank;",
        f"tgi/{package}/adapters/lora.py": "config.r = padded_rank",
        f"tgi/{package}/utils/adapter.py": "",
        f"tgi/{package}/utils/sgmv.py": "MIN_SGMV_RANK = 8\nSGMV_BLOCK_SIZE = 32\n",
        f"tgi/{package}/models/__init__.py": 'adapter_layers = [\n"k_proj",\n"q_proj"]',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [*differences("llama.cpp", tmp_path)]
    assert found[-2:] == [
        "use_rslora is read, which the table says it is not",
        "the scale is not alpha over the rank, and 1 where alpha is 0",
    ]
    assert [line.partition(",")[0] for line in differences("tgi", tgi)] == [
        "SGMV_BLOCK_SIZE is not 16",
        "projections are prepared in the order ('k_proj'",
    ]
