"""What other programs leave, recognised by names and small JSON: each is named, with what to do."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.hub import base_of
from pytest_nullspace.checkpoint.strangers import check_base
from pytest_nullspace.errors import CheckpointError, TextError
from pytest_nullspace.model import load_plain
from pytest_nullspace.text.sources import FileText
from pytest_nullspace.text.tokenizer import load_tokenizer
from tests import tiny
from tests.adapters import adapter
from tests.plain import read_text

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3443586272\n"
TABLE = Path(__file__).parents[3] / "docs/bad-days.md"
PEFT = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base"}
KEYS: dict[str, tuple[str, str]] = {
    "kohya.safetensors": ("lora_unet_down_blocks_0.lora_down.weight", "lora_te1_text_model.alpha"),
    "flux.safetensors": ("transformer.blocks.0.attn.to_q.lora_A.weight", "other"),
    "mine.safetensors": ("base_model.model.model.layers.0.q_proj.lora_A.weight", "other"),
    "model.safetensors": ("model.embed_tokens.weight", "model.norm.weight"),
}
"""Safetensors files, where their keys are looked at."""

Files = Mapping[str, object]
STRANGERS: dict[str, tuple[Files, str]] = {
    "the config of an adapter beside a whole model": (
        {"adapter_config.json": PEFT, "config.json": {"model_type": "llama"}, "model.safetensors": ""},
        "an adapter_config.json beside a whole model; to gate that take adapter_config.json out of a copy, or else",
    ),
    "an MLX adapter of old": (
        {"adapter_config.json": {"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, "adapters.npz": ""},
        "a part of an MLX adapter; it is read where adapter_config.json and adapters.safetensors of one save lie",
    ),
    "an MLX adapter without its config": (
        {"0000100_adapters.safetensors": ""}, "a part of an MLX adapter ('0000100_adapters",
    ),
    "an adapter of the library adapters": (
        {"adapter_config.json": {"config": {"reduction_factor": 16}, "version": "adapters.1.0.1"}},
        "an adapter of the library adapters",
    ),
    "a config that names no method": (
        {"adapter_config.json": {"base_model": "smolvla"}},
        "has no peft_type, so PEFT did not write it; give a LoRA adapter",
    ),
    "an adapter of torchtune": ({"adapter_0.pt": ""}, "a torchtune adapter ('adapter_0.pt'); pickles can run code"),
    "torchtune's pickle beside PEFT's config": (
        {"adapter_config.json": PEFT, "adapter_0.pt": ""}, "no weights of its own: a torchtune adapter",
    ),
    "a LoRA for llama.cpp beside PEFT's config": (
        {"adapter_config.json": PEFT, "lora.gguf": "GGUF"}, "a LoRA for llama.cpp or a whole model ('lora.gguf'); a",
    ),
    "an adapter of diffusers": ({"pytorch_lora_weights.safetensors": ""}, "an adapter of diffusers"),
    "an adapter of diffusers by its keys": ({"flux.safetensors": None}, "diffusers ('transformer.blocks.0"),
    "a PEFT adapter of a diffusion model": (
        {"adapter_config.json": PEFT | {"auto_mapping": {"parent_library": "diffusers.models.unets"}}},
        "describes an adapter of diffusers",
    ),
    "an adapter of kohya's": ({"kohya.safetensors": None}, "an adapter in kohya's format ('lora_te1_text_model"),
    "LoRA weights by another name": ({"mine.safetensors": None}, "LoRA weights without an adapter_config.json ("),
    "an adapter without its config": ({"adapter_model.safetensors": ""}, "without their adapter_config.json"),
    "a model without its config": ({"model.safetensors": None}, "the weights of a model without their config.json"),
    "a state of DeepSpeed": ({"latest": "global_step5", "global_step5/x.pt": ""}, "a DeepSpeed checkpoint"),
    "a state of FSDP": ({"pytorch_model_fsdp_0/__0_0.distcp": ""}, "a distributed checkpoint of torch"),
    "a checkpoint of Lightning": ({"epoch=3.ckpt": ""}, "a pickle ('epoch=3.ckpt')"),
    "a run's folder": (
        {f"{name}/adapter_config.json": PEFT for name in ("checkpoint-500", "checkpoint-1000", "final")},
        "adapters lie below: give here/checkpoint-1000 or here/checkpoint-500 or here/final",
    ),
    "a run's folder of LoRA-Null": (
        {"ft/config.json": {"lora_r": 4}, "logs/config.json": {}}, "adapters lie below: give here/ft",
    ),
    "a run's folder with a config of its own": (
        {"config.json": {"model_type": "llama"}, "checkpoint-5/default/adapter_config.json": PEFT},
        "no weights of its own: adapters lie below: give here/checkpoint-5/default",
    ),
    "a Git LFS pointer in place of the config": (
        {"adapter_config.json": POINTER}, "the adapter's config is not there, only a Git LFS pointer",
    ),
    "a Git LFS pointer in place of the weights": (
        {"adapter_config.json": PEFT, "adapter_model.safetensors": POINTER},
        "adapter_model.safetensors: the file of the weights is not there, only a Git LFS pointer to it; run git lfs",
    ),
}  # fmt: skip


def make(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            save_file({key: torch.ones(2) for key in KEYS[name]}, file)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("what", STRANGERS)
def test_what_another_program_left_is_named(what: str, tmp_path: Path) -> None:
    """A directory of no format of ours is told by its own name, with what to do, as the table of bad days says."""
    files, message = STRANGERS[what]
    with pytest.raises(
        CheckpointError, match=re.escape(message).replace("here/", f"{re.escape(str(tmp_path))}/")
    ) as told:
        open_checkpoint(make(tmp_path, files))
    said = str(told.value).replace(str(tmp_path), "here")
    assert f"| {what} | `{said}` |" in TABLE.read_text("utf-8").splitlines()


def test_many_adapters_below_are_counted_and_links_are_not_followed(tmp_path: Path) -> None:
    """Of more than three adapters below the latest are named; a link to a folder is none more, nor are hidden ones."""
    make(tmp_path, {f"checkpoint-{step}/adapter_config.json": PEFT for step in (5, 50, 400, 30, 20)})
    make(tmp_path, {".cache/adapter_config.json": PEFT, "a/b/c/adapter_config.json": PEFT})
    (tmp_path / "latest").symlink_to(tmp_path / "checkpoint-5")
    listed = " or ".join(f"{tmp_path}/checkpoint-{step}" for step in (400, 50, 30))
    with pytest.raises(CheckpointError, match=f"give {re.escape(listed)}, or one of 2 more$"):
        open_checkpoint(tmp_path)


def test_a_whole_model_is_told_from_one_with_layers_of_peft_inside(tmp_path: Path) -> None:
    """A merged or fully tuned model has no adapter left, one with PEFT's layers inside has it in no file of its own."""
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"was the plain model saved .* If it is merged .* before it was merged$"):
        open_checkpoint(tmp_path)
    make(tmp_path, {"checkpoint-7/adapter_config.json": PEFT})
    with pytest.raises(CheckpointError, match=r"give its base by .*, or adapters lie below: give .*-7$"):
        open_checkpoint(tmp_path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    save_file(load_file(tmp_path / "model.safetensors") | {key: torch.ones(2, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a whole model with PEFT's layers inside.*save_pretrained$"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("part", ["_orig_mod", "_checkpoint_wrapped_module", "module"])
def test_a_wrapper_in_the_names_of_a_whole_model_is_named(part: str, tmp_path: Path) -> None:
    """A LoRA-Null directory and a base model whose keys hold a wrapper's name are refused by that name."""
    tiny.lora_null(tmp_path / "own")
    tiny.llama().save_pretrained(tmp_path / "base")
    for folder in (tmp_path / "own", tmp_path / "base"):
        (file,) = folder.glob("*.safetensors")
        save_file({f"{part}.{name}": tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=rf"own: tensor .* carries {part}\. of .*strip it from every key"):
        open_checkpoint(tmp_path / "own")
    with pytest.raises(CheckpointError, match=rf"base: tensor .* carries {part}\. of .*strip it from every key"):
        load_plain(tmp_path / "base", torch.device("cpu"), torch.float32)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"])


def on_base(saved: Path, edit: Callable[[Path], object]) -> str:
    """What is said of the adapter ``saved`` once its base was edited."""
    edit(saved.parent / "base")
    with pytest.raises(CheckpointError) as told:
        load_plain(base_of(open_checkpoint(saved), None), torch.device("cpu"), torch.float32)
    return str(told.value)


def test_a_base_that_is_an_adapter_itself_is_to_be_merged_first(saved: Path) -> None:
    """An adapter trained on an adapter names that as its base: both stages are needed, so it is told to merge one."""
    second = saved.rename(saved.with_name("second"))
    adapter(saved.parent, tiny.llama(), name="first", r=4, target_modules=["v_proj"])
    config = second / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(saved.parent / "first")})
    )
    told = on_base(second, lambda _: None)
    assert (
        f"base_model_name_or_path: {saved.parent / 'first'}: is an adapter itself, on {saved.parent / 'base'}" in told
    )
    assert "merge_and_unload" in told
    with pytest.raises(CheckpointError, match=r"--nullspace-base: .*first: is an adapter itself"):
        base_of(open_checkpoint(second), str(saved.parent / "first"))


def test_an_adapter_beside_the_base_is_refused(saved: Path, tmp_path: Path) -> None:
    """An adapter that transformers would put on the base by itself makes it another base; so too beside a GGUF file."""
    assert "transformers would put that adapter on it first" in on_base(
        saved, lambda base: (base / "adapter_config.json").write_text(json.dumps(PEFT))
    )
    make(tmp_path / "gguf", {"adapter_config.json": PEFT, "base.gguf": "GGUF"})
    with pytest.raises(CheckpointError, match="transformers would put that adapter on it first"):
        check_base(tmp_path / "gguf" / "base.gguf", "it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}},
            r"no model_type 'mine' of its own, and the code that auto_map names \(.*modeling_mine.*\) is never run",
        ),
        ({"model_type": "mine"}, "no model_type 'mine' of its own; take a newer transformers"),
        (
            {"hidden_size": 64, "auto_map": {"AutoModel": "a.B"}},
            r"tensor \S+weight has shape \[.*\], but config\.json makes it \[.*\]; its auto_map names code of its own",
        ),
        (
            {"num_hidden_layers": 5, "auto_map": {"AutoModel": "a.B"}},
            "not those of a whole .*; its auto_map names code of its own, which is never run",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, "a model that MLX quantised"),
    ],
)
def test_a_base_that_transformers_cannot_build_is_named(changes: dict[str, Any], message: str, saved: Path) -> None:
    """A base that needs code of its own, a newer transformers, or MLX, is refused by that, and nothing of it runs."""

    def edit(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | changes))
        (base / "modeling_mine.py").write_text("raise SystemExit('ran')")

    assert re.search(message, on_base(saved, edit))


def test_a_lora_null_checkpoint_is_no_base(saved: Path) -> None:
    """A base that is a LoRA-Null directory is to be merged first; the same config over plain weights is a base."""
    base = saved.parent / "base"
    config = json.loads((base / "config.json").read_text()) | {"lora_r": 4}
    (base / "config.json").write_text(json.dumps(config))
    assert check_base(base, "it") == base
    assert "is a LoRA-Null checkpoint itself" in on_base(saved, tiny.lora_null)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pointer_in_place_of_a_file_of_the_base_is_named(name: str, saved: Path) -> None:
    """A clone without Git LFS has a base of pointers, whatever the file."""
    assert "only a Git LFS pointer to it; run git lfs pull" in on_base(
        saved, lambda base: (base / name).write_text(POINTER)
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pointer_in_place_of_the_tokenizer_is_named(name: str, tmp_path: Path) -> None:
    """A tokenizer of a clone without Git LFS is named as what it is, also one that transformers would open."""
    make(tmp_path, {name: POINTER, "tokenizer_config.json": {}})
    with pytest.raises(CheckpointError, match=f"{name}: the tokenizer is not there, only a Git LFS pointer"):
        load_tokenizer(tmp_path)


def test_a_pointer_in_place_of_the_text_is_named(tmp_path: Path) -> None:
    """A text of a clone without Git LFS is not measured as those three lines."""
    make(tmp_path, {"text.txt": POINTER})
    with pytest.raises(TextError, match=r"text\.txt: only a Git LFS pointer to the text; run git lfs pull"):
        read_text(FileText(tmp_path / "text.txt"))
