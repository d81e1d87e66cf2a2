"""What a model can read, and in what precision it runs where nobody says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import CheckpointError, TextError
from pytest_nullspace.measuring.limits import DEFAULT_SEQLEN, default_length, require_known_tokens, window_length
from pytest_nullspace.measuring.loading import dtype_of
from pytest_nullspace.text.windows import Window
from tests import tiny
from tests.adapters import adapter, change

SMALL: dict[str, Any] = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
CUDA = torch.device("cuda")


def gemma3() -> Any:
    """A vision-language model, whose config says of text only in a part of its own."""
    text = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    eye = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**eye, "image_size": 16, "patch_size": 4},
        image_token_id=150,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def xlnet() -> Any:
    sizes = {"vocab_size": 160, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
    return transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes))


def mpt() -> Any:
    return transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=160, d_model=32, n_heads=4, n_layers=1, max_seq_len=64)
    )


def led() -> Any:
    sides = {
        f"{side}_{of}": n
        for side in ("encoder", "decoder")
        for of, n in {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()
    }
    positions = {"max_encoder_position_embeddings": 96, "max_decoder_position_embeddings": 48}
    return transformers.LEDModel(
        transformers.LEDConfig(vocab_size=160, d_model=32, attention_window=16, pad_token_id=1, **sides, **positions)
    )


def encoder(kind: str) -> Any:
    sizes = {**SMALL, "num_attention_heads": 4, "max_position_embeddings": 66, "pad_token_id": 1}
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))


def prophetnet() -> Any:
    side = {"num_decoder_layers": 1, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = transformers.ProphetNetConfig(
        vocab_size=128, hidden_size=32, max_position_embeddings=66, is_encoder_decoder=False, **side
    )
    return transformers.ProphetNetForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "longest"),
    [
        (tiny.llama, 256),
        (lambda: tiny.llama(max_position_embeddings=10**6), None),
        (gemma3, 256),
        (xlnet, None),
        (mpt, 64),
        (led, 48),
        (lambda: encoder("Bert"), 66),
        (lambda: encoder("Roberta"), 64),
        (lambda: encoder("XLMRoberta"), 64),
        (prophetnet, 64),
    ],
    ids=[
        "plain",
        "more than is asked for",
        "in text_config",
        "no limit is -1",
        "mpt",
        "led",
        "bert",
        "roberta",
        "xlm-roberta",
        "prophetnet",
    ],
)
def test_a_window_is_as_long_as_the_model_takes(make: Any, longest: int | None) -> None:
    """Windows are as long as the model reads, wherever its config says so, and 2,048 tokens where it allows more."""
    model = make().eval()
    length = window_length(None, model)
    assert length == (longest or DEFAULT_SEQLEN)
    with torch.inference_mode():
        assert model(input_ids=torch.full((1, min(length, 256)), 97))[0].isfinite().all()
    if longest is None:
        assert window_length(5000, model) == 5000
        return
    with pytest.raises(TextError, match=f"seqlen: {longest + 1} tokens are more than the {longest} that the model"):
        window_length(longest + 1, model)


@pytest.mark.parametrize("value", [0, -2, 1.5, "many"])
def test_a_limit_that_is_no_number_is_refused(value: object) -> None:
    """What is no whole number from 1, and not the -1 of a model without a limit, is to be mended."""
    model = tiny.llama()
    model.config.__dict__["max_position_embeddings"] = value
    with pytest.raises(TextError, match="max_position_embeddings must be a whole number from 1"):
        window_length(None, model)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"text_config": {"max_position_embeddings": 128}}, 128),
        ({"max_position_embeddings": -1}, DEFAULT_SEQLEN),
        ({"max_position_embeddings": None}, DEFAULT_SEQLEN),
        ({"text_config": "none", "max_position_embeddings": 64}, 64),
        ({}, None),
        ({"n_positions": 64}, None),
    ],
)
def test_the_default_window_is_known_from_the_file(config: dict[str, Any], length: int | None) -> None:
    """Before a model is loaded its config.json tells the window, in the part that is of the text, or nothing does."""
    assert default_length(config) == length


@pytest.mark.parametrize("make", [lambda: tiny.llama(vocab_size=160), gemma3, xlnet], ids=["plain", "nested", "xlnet"])
def test_a_token_that_the_model_does_not_know_is_refused(make: Any, tmp_path: Path) -> None:
    """The tokenizer of another model is told by its first token too many, wherever the config holds the vocabulary."""
    checkpoint, model = open_checkpoint(tiny.lora_null(tmp_path)), make()
    require_known_tokens([[Window(0, (1, 159))]], model, checkpoint)
    with pytest.raises(CheckpointError, match="gives the token 160, but the model knows only 160"):
        require_known_tokens([[Window(0, (1, 2)), Window(9, (160, 3))]], model, checkpoint)


def based(folder: Path, stored: torch.dtype, of_adapter: torch.dtype) -> Path:
    """A base stored in one type under an adapter stored in another."""
    directory = adapter(folder, tiny.llama().to(stored), r=4, target_modules=["q_proj"])
    change(directory, lambda tensors, _: tensors.update({name: t.to(of_adapter) for name, t in tensors.items()}))
    return directory


@pytest.mark.parametrize("of_adapter", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_runs_in_the_precision_of_the_base(stored: torch.dtype, of_adapter: torch.dtype, tmp_path: Path) -> None:
    """On an accelerator the base's stored type decides, not the adapter's; on a CPU it is float32; and what is said."""
    checkpoint = open_checkpoint(based(tmp_path, stored, of_adapter))
    assert dtype_of("auto", checkpoint, CUDA) == stored
    assert dtype_of("auto", checkpoint, CUDA, tmp_path / "base") == stored
    assert dtype_of("auto", checkpoint, torch.device("cpu")) == torch.float32
    assert dtype_of("float16", checkpoint, CUDA) == torch.float16


@pytest.mark.parametrize("said", ["float16", "bfloat16", "float32", None])
def test_a_quantised_base_runs_in_the_precision_that_its_config_says(said: str | None, tmp_path: Path) -> None:
    """What is packed into whole numbers tells no precision: its config does, or else it is bfloat16."""
    from safetensors.torch import load_file, save_file

    checkpoint = open_checkpoint(based(tmp_path, torch.float32, torch.float32))
    file = tmp_path / "base" / "model.safetensors"
    packed = {name: t.to(torch.uint8) if t.ndim == 2 else t.half() for name, t in load_file(file).items()}
    save_file(packed, file)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | ({} if said is None else {"dtype": said})))
    assert dtype_of("auto", checkpoint, CUDA) == getattr(torch, said or "bfloat16")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_runs_a_checkpoint_that_carries_its_base_as_most_of_it_is_stored(
    stored: torch.dtype, tmp_path: Path
) -> None:
    """A few float32 tensors beside a base in half precision do not double what it takes."""
    small = "model.layers.0.self_attn.q_proj.BLinear.weight"

    def widen(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        tensors[small] = tensors[small].float()

    checkpoint = open_checkpoint(tiny.lora_null(tmp_path, dtype=stored, change=widen))
    assert dtype_of("auto", checkpoint, CUDA) == stored
