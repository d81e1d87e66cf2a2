"""What fuzzing aims at: every reader of a stranger's bytes, which may raise our own errors and no other.

Hypothesis drives these in ``tests/properties/test_readers.py``; for longer, with coverage as its guide, atheris does
(``pip install atheris``): ``python -m tests.fuzz header -max_total_time=600``.
"""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.header import read_header, read_tensors
from pytest_nullspace.errors import CheckpointError, StatsError
from pytest_nullspace.invariants import Expectations, judge, judge_averages
from pytest_nullspace.stats import from_json, to_json
from tests import saved

Q = "model.layers.0.self_attn.q_proj"
ADAPTER = {f"base_model.model.{Q}.lora_A.weight": [2, 4], f"base_model.model.{Q}.lora_B.weight": [4, 2]}
LORA_NULL = {f"{Q}.BLinear.weight": [2, 4], f"{Q}.ALinear.weight": [4, 2], f"{Q}.weight_residual": [4, 4]}
ADAPTER_CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {}, "alpha_pattern": {},
    "base_model_name_or_path": "base", "revision": None, "task_type": "CAUSAL_LM", "target_parameters": None,
    "layer_replication": None, "auto_mapping": None,
}  # fmt: skip
MODEL_CONFIG = {"model_type": "llama", "lora_r": 2, "auto_map": {"AutoConfig": "trap.Trap"}}
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


def weights(file: Path, shapes: Mapping[str, list[int]]) -> Path:
    """A safetensors file of float32 zeros, written by hand."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4
        for width in shape:
            size *= width
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    return file


def header(folder: Path) -> Callable[[bytes], None]:
    """The header of one safetensors file."""

    def read(data: bytes) -> None:
        (folder / "m.safetensors").write_bytes(data)
        read_header(folder / "m.safetensors")

    return read


def index(folder: Path) -> Callable[[bytes], None]:
    """The index of two shards."""
    for number, name in enumerate("ab", 1):
        weights(folder / f"model-0000{number}-of-00002.safetensors", {name: [1]})

    def read(data: bytes) -> None:
        (folder / "model.safetensors.index.json").write_bytes(data)
        read_tensors(folder, "model")

    return read


def adapter_config(folder: Path) -> Callable[[bytes], None]:
    """The config of a PEFT adapter beside sound weights."""
    weights(folder / "adapter_model.safetensors", ADAPTER)
    return _config(folder, "adapter_config.json")


def model_config(folder: Path) -> Callable[[bytes], None]:
    """The config of a LoRA-Null directory beside sound weights."""
    weights(folder / "model.safetensors", LORA_NULL)
    return _config(folder, "config.json")


def _config(folder: Path, name: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        (folder / name).write_bytes(data)
        open_checkpoint(folder)

    return read


def stats(_: Path) -> Callable[[bytes], None]:
    """A statistics file; what is read can be judged and saved."""

    def read(data: bytes) -> None:
        run = from_json(data.decode("utf-8", "replace"), "f.json")
        for layer in run.layers:
            judge(layer, Expectations())
        judge_averages(run, Expectations())
        to_json(run)

    return read


TARGETS: Mapping[str, tuple[Callable[[Path], Callable[[bytes], None]], Any]] = {
    "header": (header, {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {}}),
    "index": (index, INDEX),
    "adapter_config": (adapter_config, ADAPTER_CONFIG),
    "model_config": (model_config, MODEL_CONFIG),
    "stats": (stats, json.loads(to_json(saved.run()))),
}
"""Each reader by its name, with a sound document to begin from."""


def main() -> None:
    """Fuzz one target with atheris; the arguments after its name are libFuzzer's."""
    import atheris

    name = sys.argv.pop(1)
    make, seed = TARGETS[name]
    atheris.instrument_all()
    with TemporaryDirectory() as folder:
        read, seeds = make(Path(folder)), Path(folder) / "seeds"
        seeds.mkdir()
        text = json.dumps(seed).encode()
        (seeds / "sound").write_bytes(len(text).to_bytes(8, "little") + text + bytes(24) if name == "header" else text)

        def one(data: bytes) -> None:
            with suppress(CheckpointError, StatsError):
                read(data)

        atheris.Setup([*sys.argv, str(seeds)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
