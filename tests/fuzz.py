"""What fuzzing aims at: every reader of a stranger's bytes, which may raise our own errors and no other.

Hypothesis drives these in ``tests/properties/test_readers.py``; for longer, with coverage as its guide, atheris does
(``pip install atheris``): ``python -m tests.fuzz header -max_total_time=600``.
"""

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.header import read_header, read_tensors
from pytest_nullspace.errors import CheckpointError, StatsError
from pytest_nullspace.judging.audit import Audit
from pytest_nullspace.judging.baseline import compare
from pytest_nullspace.judging.comparable import incomparable
from pytest_nullspace.judging.diagnosis import diagnose
from pytest_nullspace.judging.invariants import Expectations, Stage, judge, judge_averages, judge_drift
from pytest_nullspace.judging.start import Start
from pytest_nullspace.judging.weights import Weights
from pytest_nullspace.report import changes, markdown, notes, terminal, words
from pytest_nullspace.run.saved import from_json, to_json
from pytest_nullspace.run.stats import RunStats
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
    """A statistics file; what is read can be judged, compared, diagnosed, reported and saved."""
    sound, file = saved.full(), Path("f.json")

    def read(data: bytes) -> None:
        run = from_json(data.decode("utf-8", "replace"), "f.json")
        text = to_json(run)
        assert to_json(from_json(text, "f.json")) == text
        audited, _ = Audit.of(run.about, "f.json"), Weights.of(run.about)
        for now, before in ((run, sound), (sound, run)):
            start, compared = Start.of(before), compare(now, before, (), Stage.TRAINED)
            checks = [partial(start.check, trained=True)]
            if audited is not None:
                checks.append(partial(audited.check, trained=True))
            expectations = Expectations(Stage.TRAINED, (), checks)
            lines = [*changes.start_lines(start, file, now, True, True), *changes.comparison(compared, file, ())]
            lines += changes.explained(diagnose(now, audited, compared))
            str(incomparable(now, before))
            shown(now, expectations, [line for line, _ in lines])
        if audited is not None:
            list(changes.audit_lines(audited))

    return read


def shown(run: RunStats, expectations: Expectations, told: Sequence[str]) -> None:
    """Every report of a run."""
    verdicts = [judge(layer, expectations) for layer in run.layers]
    list(notes.saved_header(Path("f.json"), run, len(run.layers)))
    list(terminal.summary(run, verdicts, expectations))
    for layer, verdict in zip(run.layers, verdicts, strict=True):
        list(terminal.block(layer, verdict))
        words.layer_failure(layer, verdict)
    words.model_failure(run, judge_averages(run, expectations))
    if run.drift is not None:
        list(notes.drift(run.drift, judge_drift(run.drift, expectations)))
    markdown.report(run, expectations, told)


TARGETS: Mapping[str, tuple[Callable[[Path], Callable[[bytes], None]], Any]] = {
    "header": (header, {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {}}),
    "index": (index, INDEX),
    "adapter_config": (adapter_config, ADAPTER_CONFIG),
    "model_config": (model_config, MODEL_CONFIG),
    "stats": (stats, json.loads(to_json(saved.full()))),
}
"""Each reader by its name, with a sound document to begin from."""


VALUES: Sequence[Any] = (
    None, True, False, 0, -1, 1, 9, 2**31, 2**63, 10**400, 1e308, 1e-308, -0.5, 0.25, float("nan"), float("inf"),
    "", "nan", "not measured", ".", "../x", "/", "\x1b[31m", "(a+)+$", "\ud800", [], [[]], [1, "a"], {}, {"a": 1},
)  # fmt: skip


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON document: what holds it, and under which key."""
    keys = document.keys() if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [place for key in keys for place in ((document, key), *places(document[key]))]


def changed(text: bytes, choose: random.Random) -> bytes:
    """A JSON document in which a few places hold another value, or that of another place, or nothing any more."""
    document = json.loads(text)
    for _ in range(choose.randint(1, 3)):
        held = places(document)
        if not held:
            break
        (owner, key), (other, at) = choose.choice(held), choose.choice(held)
        match choose.randrange(6):
            case 0:
                del owner[key]
            case 1:
                owner[key] = json.loads(json.dumps(other[at]))
            case 2 if isinstance(owner[key], int | float):
                owner[key] *= choose.choice((0, -1, 2, 1e300))
            case _:
                owner[key] = choose.choice(VALUES)
    return json.dumps(document).encode()


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

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            head = 8 if name == "header" else 0
            choose = random.Random(seed)
            with suppress(ValueError, RecursionError, OverflowError):
                if choose.randrange(4):
                    length = int.from_bytes(data[:8], "little") if head else len(data)
                    text = changed(data[head : head + length], choose)
                    return (len(text).to_bytes(8, "little") + text + data[8 + length :] if head else text)[:most]
            return bytes(atheris.Mutate(data, most))

        atheris.Setup([*sys.argv, str(seeds)], one, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
