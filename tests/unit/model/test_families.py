"""Models that see or hear beside reading are built as what their adapter was trained on, and measured on text."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from pytest_nullspace import gate
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.judging.verdicts import Verdict
from pytest_nullspace.measuring.forward import model_told, require_tokens_read
from pytest_nullspace.measuring.loading import _writes_text
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import load_model
from pytest_nullspace.report.model import built_as, remarks, unreached
from pytest_nullspace.run.stats import UNREACHED, RunStats
from tests import tiny
from tests.adapters import adapter, change
from tests.families import MAKERS, PATCHES
from tests.real.architectures import Family, built
from tests.releases import five
from tests.unit.model.test_peft import SMALL, WINDOWS, check_figures, opened

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

READS = r".*(language_model|text_model).*\.(q_proj|in_proj_qkv|gate_proj)"
"""What of them reads text, as those write it who train such models."""
QUICK = (
    "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava", "mistral3", "idefics3", "paligemma", "glm4v", "lfm2_vl",
    "qwen2_audio", "llama4",
)  # fmt: skip


def same_logits(directory: Path, adapted: Any, kind: type) -> None:
    """The model as loaded gives what PEFT's own does on that class."""
    base = kind.from_pretrained(directory.parent / "base", dtype=torch.float32)  # type: ignore[attr-defined]
    theirs = peft.PeftModel.from_pretrained(base, directory).get_base_model().eval()
    tokens = torch.tensor(WINDOWS)
    with torch.inference_mode():
        want, plain = (of(input_ids=tokens).logits for of in (theirs, kind.from_pretrained(directory.parent / "base")))  # type: ignore[attr-defined]
        torch.testing.assert_close(adapted.model(input_ids=tokens).logits, want, rtol=1e-6, atol=1e-6)
    assert (want - plain).abs().max() > 1e-3, "the adapter does something"


@five
@pytest.mark.parametrize("family", QUICK)
def test_an_adapter_is_put_on_the_class_that_has_its_layers(family: str, tmp_path: Path) -> None:
    """Saved as CAUSAL_LM, for which there is no class or one of another shape: figures and logits are PEFT's own."""
    torch.manual_seed(0)
    model = MAKERS[family]()
    directory = adapter(tmp_path, model, r=4, target_modules=READS)
    _, adapted = opened(directory)
    assert type(adapted.model) is type(model)
    check_figures(adapted)
    same_logits(directory, adapted, type(model))
    require_tokens_read(adapted, open_checkpoint(directory))
    assert _writes_text(adapted.model)


@five
@pytest.mark.parametrize(
    ("family", "inside", "targets"),
    [
        ("qwen3_5", "model.language_model.", ["q_proj", "in_proj_qkv", "out_proj"]),
        ("llama4", "language_model.model.", ["q_proj", "down_proj"]),
        ("mllama", "model.language_model.", ["v_proj"]),
    ],
)
def test_both_shapes_of_one_base_are_measured_alike(
    family: str, inside: str, targets: list[str], tmp_path: Path
) -> None:
    """Some are adapted whole, and as the text model that their auto class gives: one update, the same figures."""
    how: dict[str, Any] = {"r": 4, "target_modules": targets, "exclude_modules": ".*(visual|vision).*"}
    torch.manual_seed(0)
    whole = adapter(tmp_path, MAKERS[family](), **how)
    text = adapter(tmp_path / "text", MAKERS[family](), **how)

    def as_text(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        config["base_model_name_or_path"] = str(tmp_path / "base")
        for name in list(tensors):
            tensors[name.replace(inside, "model.")] = tensors.pop(name)

    change(text, as_text)
    (_, one), (_, two) = opened(whole), opened(text)
    assert one.kind.endswith("ForConditionalGeneration, named by the base's architectures")
    assert two.kind.endswith("ForCausalLM, of task_type CAUSAL_LM")
    by_name = {layer.name.replace(inside, "model."): layer for layer in measure(one, WINDOWS)}
    assert any(layer.rows for layer in by_name.values())
    for layer in measure(two, WINDOWS):
        assert layer.rows == by_name[layer.name].rows
        for figure in ("input_norm", "down_norm", "update_norm", "base_norm", "output_norm"):
            assert getattr(layer, figure) == pytest.approx(getattr(by_name[layer.name], figure), rel=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("task", "edit", "why"),
    [
        ("SEQ_2_SEQ_LM", {}, "named by the base's architectures"),
        (None, {}, "named by the base's architectures"),
        ("CAUSAL_LM", {}, "of task_type CAUSAL_LM"),
        (None, {"architectures": None}, "named by the adapter's auto_mapping"),
        ("SEQ_2_SEQ_LM", {"architectures": ["NoSuchModel"]}, "named by the adapter's auto_mapping"),
    ],
)
def test_the_class_is_found_whatever_the_task_says(
    task: str | None, edit: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """A decoder's adapter with a wrong task, or on a base that names no class, is measured all the same."""
    directory = adapter(tmp_path, tiny.llama(), None, r=4, target_modules=["q_proj"])
    change(directory, lambda _, config: config.update(task_type=task))
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | edit))
    _, adapted = opened(directory)
    assert adapted.kind == f"LlamaForCausalLM, {why}"
    same_logits(directory, adapted, transformers.LlamaForCausalLM)
    told = RunStats("ft", "c4", (), 1, about={"model": {"class": adapted.kind, "remarks": ["a"]}})
    assert list(built_as(told)) == [f"base model built as {adapted.kind}"]
    assert remarks(told) == ["a"]


@pytest.mark.parametrize("saved_as", ["T5EncoderModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize(
    ("task", "why"),
    [("FEATURE_EXTRACTION", "which encodes text alone"), (None, "named by the (base's arch|adapter's auto_map)")],
)
def test_an_encoder_that_is_adapted_alone_needs_no_decoder(
    saved_as: str, task: str | None, why: str, tmp_path: Path
) -> None:
    """T5's is trained by itself, on the files of the whole: its targets would name the decoder, which is not there."""
    config = transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    whole = transformers.T5ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "whole")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "whole")
    directory = adapter(tmp_path, encoder, task, r=4, target_modules=["q", "v"])
    if saved_as != "T5EncoderModel":
        whole.save_pretrained(tmp_path / "base")
    _, adapted = opened(directory)
    assert re.match(f"T5EncoderModel, {why}", adapted.kind)
    check_figures(adapted)
    both = adapter(tmp_path / "both", transformers.T5Model(config), "FEATURE_EXTRACTION", r=4, target_modules=["q"])
    assert opened(both)[1].kind == "T5Model, of task_type FEATURE_EXTRACTION"


def test_the_half_of_clip_that_reads_is_gated_on_the_files_of_the_whole(tmp_path: Path) -> None:
    """Its text encoder is adapted by itself, and the base that the adapter names holds the eye beside it."""
    torch.manual_seed(0)
    text = {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=PATCHES))
    whole.save_pretrained(tmp_path / "whole")
    encoder = transformers.CLIPTextModel.from_pretrained(tmp_path / "whole")
    directory = adapter(tmp_path, encoder, None, r=4, target_modules=["q_proj", "fc1"])
    whole.save_pretrained(tmp_path / "base")
    checkpoint, adapted = opened(directory)
    assert adapted.kind == "CLIPTextModel, named by the adapter's auto_mapping"
    require_tokens_read(adapted, checkpoint)
    check_figures(adapted)


@five
def test_a_base_that_sees_and_names_no_class_is_what_its_type_is(tmp_path: Path) -> None:
    """Where neither task, config nor adapter name a class that transformers has, the one of its type is taken."""
    torch.manual_seed(0)
    directory = adapter(tmp_path, MAKERS["qwen2_5_vl"](), r=4, target_modules=READS)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["SomeonesOwnModel"]}))
    _, adapted = opened(directory)
    assert adapted.kind == "Qwen2_5_VLForConditionalGeneration, of its model_type"
    same_logits(directory, adapted, transformers.Qwen2_5_VLForConditionalGeneration)


def test_a_base_of_no_class_of_transformers_is_an_error(tmp_path: Path) -> None:
    """A name that is none of transformers' models, be it that of a function there, is refused by name."""
    directory = adapter(tmp_path, tiny.llama(), None, r=4, target_modules=["q_proj"])
    change(directory, lambda _, config: config.update(task_type="SEQ_2_SEQ_LM", auto_mapping=None))
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["pipeline"]}))
    with pytest.raises(
        CheckpointError, match="its architecture 'pipeline' is not one of transformers' own, which have"
    ):
        load_model(directory)


def test_a_package_that_a_model_wants_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models are built with packages of others, such as timm; that one is missing is said in one sentence."""
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"])

    def needs_timm(*_: Any, **__: Any) -> Any:
        raise ImportError("TimmWrapperModel requires the timm library")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", needs_timm)
    with pytest.raises(CheckpointError, match=r"with a package that is not installed: TimmWrapperModel requires the"):
        load_model(directory)


@five
def test_a_float_that_json_cannot_write_is_read(tmp_path: Path) -> None:
    """Mamba-2's limit of its time steps is infinite, which transformers writes in a way of its own."""
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1
    )
    directory = adapter(tmp_path, transformers.Mamba2ForCausalLM(config), r=4, target_modules=["in_proj"])
    assert '"__float__"' in (tmp_path / "base" / "config.json").read_text()
    _, adapted = opened(directory)
    check_figures(adapted)
    same_logits(directory, adapted, transformers.Mamba2ForCausalLM)


def whisper() -> Any:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=32,
            max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        )
    )  # fmt: skip


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**SMALL, "intermediate_size": 48, "image_size": 16, "patch_size": 4})
    )


def clip() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**sizes, "vocab_size": 128}, vision_config={**sizes, "image_size": 16, "patch_size": 4}
        )
    )


@pytest.mark.parametrize(
    ("make", "reads"), [(whisper, "input_features"), (vit, "pixel_values"), (clip, "pixel_values")]
)
def test_a_model_that_does_not_run_on_text_is_refused_by_what_it_reads(make: Any, reads: str, tmp_path: Path) -> None:
    """It is told in one sentence, before the pass, with the name of its input."""
    torch.manual_seed(0)
    model = make()
    directory = adapter(
        tmp_path, model, None, r=4, target_modules=["q_proj", "query"] if make is not vit else "all-linear"
    )
    checkpoint, adapted = opened(directory)
    with pytest.raises(CheckpointError, match=f"a {type(model).__name__}, reads {reads} and does not run on token ids"):
        require_tokens_read(adapted, checkpoint)


def xmod(**changes: Any) -> Any:
    return transformers.XmodForSequenceClassification(
        transformers.XmodConfig(**{**SMALL, "intermediate_size": 48, "max_position_embeddings": 130}, **changes)
    )


def test_what_a_model_complains_of_is_told_and_what_we_do_is_not_hidden(tmp_path: Path) -> None:
    """X-MOD wants a language by its config: one sentence of its own words, and an error of ours stays what it is."""
    directory = adapter(tmp_path / "without", xmod(), "SEQ_CLS", r=4, target_modules=["query"])
    checkpoint, adapted = opened(directory)
    complaint = r"a XmodForSequenceClassification, does not run on token ids alone \(ValueError: Input language unknown"
    with pytest.raises(CheckpointError, match=complaint), model_told(adapted, checkpoint, WINDOWS[0]):
        measure(adapted, WINDOWS)
    directory = adapter(tmp_path, xmod(default_language="en_XX"), "SEQ_CLS", r=4, target_modules=["query"])
    checkpoint, adapted = opened(directory)
    check_figures(adapted)
    with pytest.raises(ZeroDivisionError), model_told(adapted, checkpoint, WINDOWS[0]):
        raise ZeroDivisionError


def test_a_model_without_a_table_of_tokens_is_measured(tmp_path: Path) -> None:
    """CANINE hashes characters, and raises where it is asked for its embedding."""
    torch.manual_seed(0)
    config = transformers.CanineConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, num_hash_buckets=64)
    directory = adapter(
        tmp_path, transformers.CanineForSequenceClassification(config), "SEQ_CLS", r=4, target_modules=["query"]
    )
    _, adapted = opened(directory)
    check_figures(adapted)


def test_a_part_that_text_does_not_reach_is_told_in_one_line() -> None:
    """Several layers under one module become one line with the glob that allows them; a layer alone becomes none."""
    tower = [
        f"model.vision_tower.layers.{layer}.self_attn.{kind}" for layer in range(27) for kind in ("q_proj", "v_proj")
    ]
    other = ["model.audio_tower.layers.0.fc1", "model.audio_tower.layers.0.fc2", "model.text.layers.0.lost"]
    read = [Verdict(f"model.text.layers.{layer}.q_proj", ()) for layer in range(2)]
    told = list(unreached([*read, *(Verdict(name, (), UNREACHED) for name in (*tower, *other))]))
    assert told == [
        "2 layers of model.audio_tower are reached by sound only; to allow them: "
        "--nullspace-allow-unreached='model.audio_tower.*'",
        "54 layers of model.vision_tower are reached by images only; to allow them: "
        "--nullspace-allow-unreached='model.vision_tower.*'; rows of images in place of the text reach them "
        "(docs/texts.md)",
    ]
    (line,) = unreached([*read, *(Verdict(name, (), UNREACHED) for name in tower)], saw=True)
    assert "are reached by no row of this text; to allow them" in line, "where images were read"
    assert not list(unreached(read))
    part = [Verdict(f"model.mlp.experts.{n}.wi", (), UNREACHED) for n in range(2)]
    (line,) = unreached([*read, *part])
    assert line.startswith("2 layers of model.mlp are reached by no row of this text")


@five
def test_a_model_that_only_generates_is_gated_by_its_part_that_runs(tmp_path: Path) -> None:
    """Qwen-Omni adapted whole, in memory or as thinker, with equal figures and drift; the pickle beside stays shut."""
    family = Family("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration", None)
    whole = adapter(tmp_path, built(family), r=4, target_modules=r".*language_model.*\.(q_proj|up_proj)")
    (tmp_path / "base/spk_dict.pt").write_bytes(b"no pickle")
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    change(part, lambda tensors, _: renamed(tensors, "model.thinker.", "model."))
    change(
        part, lambda _, config: config.update(target_modules=["q_proj", "up_proj"], exclude_modules=".*(audio|vis).*")
    )
    (tmp_path / "text.txt").write_text("the cat sees a dog in the house and runs to the old tree by the river " * 4)
    live = peft.PeftModel.from_pretrained(built(family), whole)
    told = [gate(of, tmp_path / "text.txt", calib_size=2, seqlen=16).run for of in (whole, live, part)]
    kinds = [run.about["model"]["class"].split(",")[0] for run in told]
    assert kinds == [family.build, family.build, "Qwen2_5OmniThinkerForConditionalGeneration"]
    for run in told:
        assert [f"thinker.{layer.name.removeprefix('thinker.')}" for layer in run.layers] == [
            layer.name for layer in told[0].layers
        ]
        assert [layer.norms for layer in run.layers] == [layer.norms for layer in told[0].layers]
    assert all(layer.rows == 32 for layer in told[0].layers)
    drifts = [run.drift.preserved.divergence for run in told if run.drift is not None]
    assert drifts[0] == drifts[1] == drifts[2] > 0


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    """Call each tensor otherwise."""
    for name in list(tensors):
        tensors[name.replace(old, new, 1)] = tensors.pop(name)
