"""Tiny models of `tests.families` with the processors that read images for them, and images to read."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pytest_nullspace.text.conversations import AUTO
from pytest_nullspace.text.images import Images
from pytest_nullspace.text.readers import read
from pytest_nullspace.text.sources import Source
from tests.adapters import adapter
from tests.families import MAKERS

IMAGE, VIDEO, START, END = 120, 121, 122, 123
"""The ids of what stands for an image, as the models of `tests.families` have them."""
_QWEN = {
    "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 1024,
    "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
_SQUARE = {"size": {"height": 16, "width": 16}}
_VISION = {VIDEO: "<|video_pad|>", IMAGE: "<|image_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}


def rows(source: Source) -> Images:
    """What a source holds, which are rows of images."""
    found = read(source, AUTO)
    assert isinstance(found, Images)
    return found


class Kind:
    """How a family reads images: its special tokens, and the fields of its processor's two files."""

    def __init__(
        self,
        tokens: Mapping[int, str],
        preprocessor: Mapping[str, Any],
        processor: Mapping[str, Any] | None = None,
        named: Mapping[str, int] | None = None,
    ) -> None:
        self.tokens, self.preprocessor, self.processor, self.named = tokens, preprocessor, processor or {}, named or {}


KINDS: Mapping[str, Kind] = {
    "qwen2_vl": Kind(_VISION, {**_QWEN, "processor_class": "Qwen2VLProcessor"}),
    "qwen2_5_vl": Kind(_VISION, {**_QWEN, "processor_class": "Qwen2_5_VLProcessor"}),
    "gemma3": Kind(
        {IMAGE: "<image_soft_token>", START: "<start_of_image>", END: "<end_of_image>"},
        {**_SQUARE, "image_processor_type": "Gemma3ImageProcessor", "do_convert_rgb": None},
        {"image_seq_length": 4, "processor_class": "Gemma3Processor"},
        {"image_token": IMAGE, "boi_token": START, "eoi_token": END},
    ),
    "blip_2": Kind(
        {IMAGE: "<image>"},
        {**_SQUARE, "image_processor_type": "BlipImageProcessor"},
        {"num_query_tokens": 4, "processor_class": "Blip2Processor"},
    ),
    "llava": Kind(
        {IMAGE: "<image>"},
        {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16}, "processor_class": "LlavaProcessor",
        },
        {
            "patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
            "image_token": "<image>", "processor_class": "LlavaProcessor",
        },
    ),
    "paligemma": Kind(
        {IMAGE: "<image>", START: "<bos>", END: "<eos>"},
        {**_SQUARE, "image_processor_type": "SiglipImageProcessor", "image_seq_length": 16},
        {"processor_class": "PaliGemmaProcessor"},
        {"image_token": IMAGE, "bos_token": START, "eos_token": END},
    ),
    "llava_next": Kind(
        {IMAGE: "<image>"},
        {
            "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16}, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
            "processor_class": "LlavaNextProcessor",
        },
        {
            "patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
            "image_token": "<image>", "processor_class": "LlavaNextProcessor",
        },
    ),
    "idefics3": Kind(
        {
            IMAGE: "<image>", 1: "<fake_token_around_image>", 2: "<global-img>", 3: "<end_of_utterance>",
            **{4 + place: f"<row_{1 + place // 2}_col_{1 + place % 2}>" for place in range(4)},
        },
        {
            "image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 32},
            "max_image_size": {"longest_edge": 16}, "processor_class": "Idefics3Processor",
        },
        {"image_seq_len": 4, "processor_class": "Idefics3Processor"},
    ),
    "mllama": Kind(
        {IMAGE: "<|image|>", START: "<bos>"},
        {
            **_SQUARE, "max_image_tiles": 4, "image_processor_type": "MllamaImageProcessor",
            "processor_class": "MllamaProcessor",
        },
        named={"bos_token": START},
    ),
}  # fmt: skip
"""By name, each family whose processor is built here."""


def tokenizer(folder: Path, kind: Kind) -> None:
    """A tokenizer of ASCII characters, the last of which are what stands for images, saved into ``folder``."""
    vocabulary = {kind.tokens.get(i, chr(i)): i for i in range(128)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(kind.tokens.values()))
    named: dict[str, Any] = {name: kind.tokens[token] for name, token in kind.named.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)


def processor(folder: Path, kind: Kind) -> None:
    """The files of a processor, as a model's directory has them."""
    (folder / "preprocessor_config.json").write_text(json.dumps(kind.preprocessor))
    if kind.processor:
        (folder / "processor_config.json").write_text(json.dumps(kind.processor))


def seeing(folder: Path, family: str, **config: Any) -> Path:
    """An adapter on a tiny model of ``family`` as ``folder/adapter``, its base with tokenizer and processor beside."""
    torch.manual_seed(0)
    model = MAKERS[family]()
    for parameter in model.parameters():
        if not bool(parameter.any()):  # Gemma's projection of images, without which they would all be one
            torch.nn.init.normal_(parameter)
    directory = adapter(folder, model, **{"r": 4, "target_modules": "all-linear", **config})
    tokenizer(folder / "base", KINDS[family])
    processor(folder / "base", KINDS[family])
    return directory


def image(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """Noise in colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(width: int = 24, height: int = 16, seed: int = 0) -> bytes:
    """Its file."""
    stream = io.BytesIO()
    image(width, height, seed).save(stream, "PNG")
    return stream.getvalue()


CAPTIONS = ("a cat on a mat", "the dog in the fog", "a red bus", "no one is here at all", "it rains")
SIZES = ((24, 16), (16, 24), (32, 32), (24, 16), (8, 40))


def gallery(folder: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    """A folder of images with ``metadata.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, caption in enumerate(captions):
        (folder / f"{number}.png").write_bytes(png(*SIZES[number % len(SIZES)], seed=number))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


CHATS: Mapping[str, str] = {
    "qwen2_5_vl": (
        "{% for message in messages %}[{{ message.role[0] }}]{% for part in message.content %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
        "{% if message.role == 'assistant' %}{% generation %}{{ part.text }};{% endgeneration %}"
        "{% else %}{{ part.text }}{% endif %}{% endif %}{% endfor %}{% endfor %}"
    ),
    "gemma3": (
        "{{ bos_token }}{% for message in messages %}[{{ message.role[0] }}]{% for part in message.content %}"
        "{% if part.type == 'image' %}<start_of_image>{% else %}"
        "{% if message.role == 'assistant' %}{% generation %}{{ part.text }};{% endgeneration %}"
        "{% else %}{{ part.text }}{% endif %}{% endif %}{% endfor %}{% endfor %}"
    ),
    "llava": (
        "{% for message in messages %}{{ message.role[0] }}: {% for part in message.content "
        "| selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}{% for part in message.content "
        "| selectattr('type', 'equalto', 'text') %}{% if message.role == 'assistant' %}"
        "{% generation %}{{ part.text }} {% endgeneration %}{% else %}{{ part.text }} {% endif %}"
        "{% endfor %}{% endfor %}"
    ),
}
"""Chat templates as the families have them, cut to what matters."""


def said(role: str, *parts: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """A message of parts: a string is text, None an image that stands beside."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", **(part or {})} for part in parts
    ]
    return {"role": role, "content": content}
