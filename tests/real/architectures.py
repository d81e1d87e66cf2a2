"""Every family of transformers that takes text, tiny and random, under the LoRA that trainers write: gated or refused.

``python -m tests.real.architectures FILE.jsonl`` runs what FILE does not hold yet, and adds a line for each family;
with names behind it, those families alone. ``tests.real.table`` makes ``docs/models.md`` of it. What a model gives
under the hooks is held against PEFT's own, ‖BX‖/‖X‖ against float64 arithmetic on what hooks on PEFT's forward catch.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

from tests.real.shrunk import OWN, shrunk

LINEAR = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj", "out_proj",
    "query_key_value", "c_attn", "Wqkv", "query", "key", "value", "q", "k", "v", "o", "wi_0", "wi_1", "wo", "fc1",
    "fc2", "in_proj", "x_proj", "dt_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_ba", "in_proj_z", "linear_attn",
    "q_lin", "v_lin", "query_proj", "value_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "receptance",
)  # fmt: skip
"""What trainers name, of which a family has some."""
ELSEWHERE = r".*(vision|visual|image|img|audio|speech|sound|tower|projector|connector|perceiver|aligner|vq).*"
"""What they leave out where a model sees or hears."""
TEXT = "the cat sees a dog in the house and runs to the old tree by the river while it rains on them all day. " * 20
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""In which PEFT refuses ``out_proj``."""
LENGTH, WINDOWS, AT_ONCE, SECONDS = 32, 3, 12, 300
EXACT, SAME = 1e-6, 1e-5


@dataclass(frozen=True)
class Family:
    """One row of the matrix: a ``model_type``, the class that is adapted, and the task that the adapter says."""

    type: str
    build: str
    task: str | None

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.type}/{self.build}"


OTHERS = (
    *(Family(kind, build, "FEATURE_EXTRACTION") for kind, build in (
        ("colmodernvbert", "ColModernVBertForRetrieval"), ("colpali", "ColPaliForRetrieval"),
        ("colqwen2", "ColQwen2ForRetrieval"), ("dpr", "DPRQuestionEncoder"), ("mistral", "MistralModel"),
        ("embedding_gemma2", "EmbeddingGemma2Model"), ("qwen2_vl", "Qwen2VLModel"), ("qwen3", "Qwen3Model"),
        ("t5", "T5EncoderModel"),
    )),
    *(Family(kind, build, "SEQ_CLS") for kind, build in (
        ("gemma3", "Gemma3ForSequenceClassification"), ("llama", "LlamaForSequenceClassification"),
        ("qwen2", "Qwen2ForSequenceClassification"),
    )),
    *(Family(kind, build, "TOKEN_CLS") for kind, build in (
        ("bert", "BertForTokenClassification"), ("llama", "LlamaForTokenClassification"),
        ("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification"),
    )),
    *(Family(kind, build, "QUESTION_ANS") for kind, build in (
        ("bert", "BertForQuestionAnswering"), ("qwen2", "Qwen2ForQuestionAnswering"),
        ("splinter", "SplinterForQuestionAnswering"),
    )),
    *(Family(kind, build, None) for kind, build in (
        ("clip", "CLIPModel"), ("dinov2", "Dinov2ForImageClassification"), ("hubert", "HubertForCTC"),
        ("siglip", "SiglipModel"), ("siglip_text_model", "SiglipTextModel"),
    )),
)  # fmt: skip
"""What is adapted for other tasks: to embed, to judge, to mark tokens, to answer; and what sees or hears alone."""


@dataclass
class Row:
    """What became of a family.

    Attributes:
        name: Of the family.
        outcome: ``gated``, ``refused``, ``wrong``, or ``not built`` where transformers or PEFT themselves cannot.
        task: What its adapter says.
        built_as: The class that was gated, and where that comes from.
        layers: How many layers are gated.
        unreached: How many of them text does not reach.
        bypassed: How many are never called, for the model reads their weight alone.
        unplaced: Of how many nobody can tell which rows are tokens, so that they fail.
        outside: Trained tensors that no layer covers.
        ratio: The largest relative difference of ‖BX‖/‖X‖ from that of PEFT's own forward in float64.
        logits: The largest difference of the outputs under the hooks from PEFT's own.
        note: A refusal, or what is to be known.
        seconds: It took.
    """

    name: str
    outcome: str
    task: str | None = None
    built_as: str = ""
    layers: int = 0
    unreached: int = 0
    bypassed: int = 0
    unplaced: int = 0
    outside: int = 0
    ratio: float | None = None
    logits: float | None = None
    note: str = ""
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)


def families() -> dict[str, Family]:
    """All of them, by name: what writes text, on one side or two, what sees or hears beside it, what classifies it."""
    from transformers.models.auto import modeling_auto as auto

    def names(of: str) -> dict[str, str]:
        found = getattr(auto, f"MODEL_FOR_{of}_MAPPING_NAMES")
        return {kind: one if isinstance(one, str) else one[0] for kind, one in found.items()}

    encoders, heard = names("MASKED_LM"), names("SPEECH_SEQ_2_SEQ")
    written = {kind: build for kind, build in names("CAUSAL_LM").items() if kind not in encoders.keys() | heard.keys()}
    listed = [
        ("CAUSAL_LM", written),
        ("SEQ_2_SEQ_LM", names("SEQ_TO_SEQ_CAUSAL_LM")),
        ("CAUSAL_LM", names("MULTIMODAL_LM")),  # of which trainers say so
        ("SEQ_CLS", names("SEQUENCE_CLASSIFICATION")),
        (None, encoders | names("TEXT_ENCODING")),
        (None, heard | {"vit": "ViTForImageClassification", "wav2vec2": "Wav2Vec2ForCTC"}),
    ]
    rows = {row.name: row for row in OTHERS}
    for task, builds in listed:
        known = {row.type for row in rows.values() if row not in OTHERS} if task in ("SEQ_CLS", None) else set()
        for row in (Family(kind, build, task) for kind, build in builds.items() if kind not in known):
            rows.setdefault(row.name, row)
    return rows


def built(family: Family) -> Any:
    """The tiny model, with random weights and biases."""
    import torch
    import transformers

    build = getattr(transformers, family.build)
    config = shrunk(transformers.CONFIG_MAPPING[family.type], OWN.get(family.type, {}))
    if build.config_class is not type(config):
        text = config.get_text_config(decoder=True)
        own = OWN.get(build.config_class.model_type, {})
        config = text if type(text) is build.config_class else shrunk(build.config_class, own)
    torch.manual_seed(0)
    model = build._from_config(config).eval()
    if (
        family.task == "SEQ_CLS" and getattr(config, "pad_token_id", None) is None
    ):  # without it a batch has no last token
        model.config.pad_token_id = 0
    if (size := sum(parameter.numel() for parameter in model.parameters())) > 12_000_000:
        raise ValueError(f"{size:,} parameters are not tiny")
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def targets(model: Any) -> dict[str, Any]:
    """What a trainer would have PEFT adapt in ``model``: its attention and MLP by name, or else what is linear."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    parts = model.config.sub_configs
    named = [*parts, *(name for part in parts if (of := getattr(model.config, part)) for name in of.sub_configs)]
    sees = any(re.search("vision|audio|speech|image", name) for name in named)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    kept = [name for name in linear if not (sees and re.fullmatch(ELSEWHERE, name))]
    leaves = {name.rpartition(".")[2] for name in kept} & set(LINEAR)
    leaves -= {"out_proj"} if model.config.model_type in MAMBA else set()
    chosen: dict[str, Any] = {"target_modules": sorted(leaves) or "all-linear"}
    if any(isinstance(model.get_submodule(name), Conv1D) for name in kept):
        chosen["fan_in_fan_out"] = True
    return chosen | ({"exclude_modules": ELSEWHERE} if len(kept) < len(linear) else {})


def of(family: Family, folder: Path) -> Row:
    """What becomes of it, everything caught."""
    from pytest_nullspace.errors import NullspaceError
    from tests.adapters import adapter

    row, began = Row(family.name, "not built", family.task), time.monotonic()
    try:
        model = built(family)
        directory = adapter(folder, model, family.task, r=4, lora_alpha=8, **targets(model))
    except Exception as error:
        row.note = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return row
    row.outcome = "wrong"
    try:
        gated(row, directory, type(model))
    except NullspaceError as error:
        row.outcome, row.note = "refused", str(error).replace(str(folder), "DIR")
        if "\n" in row.note:
            row.outcome = "wrong"
    except Exception as error:
        row.note = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        if os.environ.get("TRACE"):
            traceback.print_exc()
    row.seconds = round(time.monotonic() - began, 1)
    return row


def gated(row: Row, directory: Path, kind: Any) -> None:
    """Gate it, and hold what was measured against PEFT's own model of the class that was adapted."""
    from pytest_nullspace import gate
    from pytest_nullspace.checkpoint import open_checkpoint
    from pytest_nullspace.run.stats import UNREACHED

    (directory.parent / "text.txt").write_text(TEXT)
    report = gate(directory, directory.parent / "text.txt", calib_size=WINDOWS, seqlen=LENGTH)
    run, checkpoint = report.run, open_checkpoint(directory)
    model = run.about["model"]
    row.built_as, row.remarks = model["class"], list(model.get("remarks", ()))
    row.layers, row.outside = len(run.layers), len(checkpoint.outside)
    row.unreached = sum(layer.defect == UNREACHED for layer in run.layers)
    row.bypassed = sum(layer.bypassed or 0 for layer in run.layers)
    row.unplaced = sum(layer.unplaced > 0 for layer in run.layers)
    defects = Counter(layer.defect for layer in run.layers if layer.defect not in (None, UNREACHED))
    row.note = "; ".join(f"{count} layers: {defect}" for defect, count in defects.items())
    rows = [[ord(character) for character in TEXT[start : start + LENGTH]] for start in run.about["text"]["starts"]]
    ratios, theirs = of_peft(directory, kind, rows)
    assert set(ratios) == {layer.name for layer in run.layers if layer.rows or layer.unplaced}, "which layers run"
    told = {layer.name: layer.preservation for layer in run.layers if layer.defect is None}
    apart = [abs(ratio / ratios[name] - 1) for name, ratio in told.items()]
    row.ratio, row.logits = max(apart, default=0.0), float((under_hooks(directory, rows) - theirs).abs().max())
    if all(difference < EXACT for difference in apart) and row.logits < SAME:
        row.outcome = "gated" if told else "refused"


def of_peft(directory: Path, kind: Any, rows: Sequence[Sequence[int]]) -> tuple[dict[str, float], Any]:
    """‖BX‖/‖X‖ of each layer that runs in PEFT's own forward, in float64, and what the model gives."""
    import peft
    import torch
    import transformers
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    from pytest_nullspace.measuring.forward import run
    from pytest_nullspace.model.kinds import reading

    # Past what a class looks for beside its weights, as Qwen2.5-Omni for the voices of its talker.
    load = MethodType(transformers.PreTrainedModel.from_pretrained.__func__, kind)
    base = load(directory.parent / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, directory).get_base_model().eval()
    norms: dict[str, list[tuple[int, float, float]]] = {}

    def catch(name: str, down: Any, x: Any) -> None:
        wide = x.double().flatten(0, -2)
        narrow = wide @ down.weight.double().mT
        norms.setdefault(name, []).append((len(wide), float(narrow.norm(dim=1).sum()), float(wide.norm(dim=1).sum())))

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and "default" in module.lora_A:
            down = module.lora_A["default"]
            module.register_forward_pre_hook(lambda _, given, name=name, down=down: catch(name, down, given[0]))
    with torch.inference_mode():
        given = run(reading(model), torch.tensor(rows))
    sums = {name: [sum(part) for part in zip(*of_tokens(calls), strict=True)] for name, calls in norms.items()}
    return {name: narrow / wide if wide else math.nan for name, (_, narrow, wide) in sums.items()}, output(given)


def of_tokens(calls: Sequence[tuple[int, float, float]]) -> Sequence[tuple[int, float, float]]:
    """Those in which a layer read the tokens, where it reads others beside them: distances, or what all attend to."""
    return [call for call in calls if call[0] % (WINDOWS * LENGTH) == 0] or calls


def under_hooks(directory: Path, rows: Sequence[Sequence[int]]) -> Any:
    """What the gate's model gives while it is watched."""
    import torch

    from pytest_nullspace.measuring.forward import run
    from pytest_nullspace.measuring.recorder import Recorder
    from pytest_nullspace.measuring.rows import Batch
    from pytest_nullspace.model import load_model

    adapted = load_model(directory)
    recorder, tokens = Recorder(adapted.device, len(rows)), torch.tensor(rows)
    with (
        torch.inference_mode(),
        recorder.rows.watching(adapted.model),
        recorder.watching(list(adapted.layers.values())),
    ):
        recorder.start(Batch(tokens, 0, None, [LENGTH] * len(rows)))
        return output(run(adapted.model, tokens))


def output(given: Any) -> Any:
    """The logits of a model, or what else comes first."""
    found = getattr(given, "logits", None)
    return given[0] if found is None else found


def worked(names: Sequence[str], file: Path) -> None:
    """Run families one after another in this process, a line each; the rest of those of a process that dies is lost."""
    import transformers

    transformers.logging.set_verbosity_error()
    for name in names:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            append(file, of(families()[name], Path(folder)))


def append(file: Path, row: Row) -> None:
    """Write one line, and show it."""
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(row)) + "\n")
    print(
        row.outcome,
        row.name,
        row.layers,
        row.unreached,
        row.ratio,
        row.logits,
        row.note[:200],
        f"{row.seconds} s",
        flush=True,
    )


def read(file: Path) -> dict[str, Row]:
    """The rows that a file holds, the last of each name."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {row.name: row for row in (Row(**json.loads(line)) for line in lines)}


def run(names: Sequence[str], file: Path) -> None:
    """Run families in processes of some each, so that one that dies or hangs takes no other with it."""
    while left := [name for name in names if name not in read(file)]:
        command = [sys.executable, "-m", "tests.real.architectures", "--here", str(file), *left[:AT_ONCE]]
        try:
            subprocess.run(command, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            print("too slow", flush=True)
        undone = [name for name in left[:AT_ONCE] if name not in read(file)]
        if undone:  # the first of them was at work
            append(file, Row(undone[0], "wrong", note="its process died or took too long"))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--here", action="store_true")
    given = parser.parse_args()
    known = families()
    names = [name for name in known if not given.names or name in given.names or known[name].type in given.names]
    if given.here:
        worked(names, given.file)
        return 0
    run(names, given.file)
    rows = read(given.file)
    print(Counter(row.outcome for row in rows.values()))
    return int(any(row.outcome == "wrong" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
