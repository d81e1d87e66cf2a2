"""Saved runs made by hand, for tests that measure nothing."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_nullspace.judging.audit import Audit, LayerAudit, Moved
from pytest_nullspace.run.predictions import Headroom
from pytest_nullspace.run.saved import write
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats, Spectrum, TextDrift

LAYER = LayerStats(
    name="model.layers.0.self_attn.q_proj",
    rows=100,
    in_features=64,
    rank=4,
    out_features=32,
    input_norm=8.0,
    down_norm=0.25,
    update_norm=0.5,
    base_norm=7.5,
    output_norm=10.0,
    mean_leakage=0.001,
    down_weight_norm=2.0,
    up_weight_norm=3.0,
    base_weight_norm=40.0,
)
"""A layer that passes."""
NAMES = tuple(
    f"model.layers.{block}.{part}"
    for block in range(3)
    for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
)
ABOUT: Mapping[str, Any] = {
    "format": "LoRA-Null",
    "base": None,
    "text": {"sha256": "0" * 64, "windows": 16, "seqlen": 32, "tokens": 512, "starts": [0]},
    "settings": {"calib_size": 16, "max_activation_samples": None, "seed": 42, "batch_size": 1, "stage": "trained"},
}
REFERENCE_LACKS = ("leakage", "leakage_over_chance", "leakage_chance", "in_features", "rank", "out_features")


def run(*names: str, of: int | None = None, **changes: Any) -> RunStats:
    """A run whose layers all pass; ``changes`` hold for its first layer."""
    layers = [dataclasses.replace(LAYER, name=name) for name in names or NAMES]
    layers[0] = dataclasses.replace(layers[0], **changes)
    return RunStats("runs/ft", "text.txt", tuple(layers), len(layers) if of is None else of, ABOUT)


def full() -> RunStats:
    """A run of two layers that tells of everything: margins, a task text, the spectrum, drift and an audit."""
    spectrum = Spectrum(effective_rank=12.5, least_leakage=0.0005, shared=0.9)
    margins = {
        "preservation": 0.001,
        "effectiveness": 0.002,
        "contribution": 0.003,
        "leakage": 0.004,
        "forgetting": 0.1,
    }
    layers = []
    for name in NAMES[:2]:
        task = dataclasses.replace(LAYER, name=name, update_norm=4.0, margins=margins)
        layers.append(
            dataclasses.replace(
                LAYER, name=name, margins=margins, task=task, spectrum=spectrum, down_rank=3, distinct_rows=60
            )
        )
    moved = [LayerAudit(name, 0.0, 0.5, 0.0, None, 0.0, 1e-6, "alpha 4 / rank 4 = 1", None) for name in NAMES[:2]]
    audited = Audit("runs/init", "v2", "A is zero at the start", tuple(moved), (Moved("model.norm.weight", 0.1),), 3)
    about = {
        **ABOUT,
        "task_dataset": "task.txt",
        "task_text": {"sha256": "1" * 64, "windows": 16, "seqlen": 32, "tokens": 512, "overlapping": 9, "starts": [0]},
        "outside": ["base_model.model.lm_head.weight"],
        "device": "cpu",
        "dtype": "float32",
        "measured": {"at": "now", "host": "here", "device_name": "x86", "seconds": {"load": 1.0, "pass": 2.0}},
        "audit": audited.to_dict(),
    }
    drift = Drift(
        "the base",
        TextDrift(480, 2.0, 2.01, 0.01, 0.001, 0.002),
        TextDrift(480, 3.0, 1.0, 0.5, 0.01, 0.02),
        headroom=Headroom(120, 2.0, 1.5, 0.1),
    )
    return RunStats("runs/ft", "text.txt", tuple(layers), len(layers), about, drift)


def save(file: Path, saved: RunStats | None = None) -> Path:
    """Write a run, the whole passing one by default."""
    write(saved or run(), file)
    return file


def reference(file: Path) -> Path:
    """Write the same run as the reference script would."""
    document = json.loads(save(file).read_text("utf-8"))
    kept = ("model_path", "calib_dataset", "num_layers")
    layers = [{key: value for key, value in layer.items() if key not in REFERENCE_LACKS} for layer in document["stats"]]
    file.write_text(json.dumps({**{key: document[key] for key in kept}, "stats": layers}), "utf-8")
    return file
