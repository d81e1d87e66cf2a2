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
