"""Hostile checkpoints and broken files, as their user meets them: one sentence, exit code 4, and no traceback."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nullspace.checkpoint import files
from pytest_nullspace.checkpoint.header import read_header, read_json_object, require_unchanged, stamps
from pytest_nullspace.errors import CheckpointError, NullspaceError, printable, quoted
from tests import fuzz

Edit = Callable[[Path], object]
Q = fuzz.Q
DOWN = f"base_model.model.{Q}.lora_A.weight"


def config(**fields: Any) -> Edit:
    """Set fields of the adapter's config."""

    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return edit


def described(change: Callable[[dict[str, Any]], object], **raw: Any) -> Edit:
    """Change the header of the adapter's weights, their data left as they are."""

    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        told = json.loads(data[8:end])
        change(told)
        text = raw.get("text") or json.dumps(told).encode()
        file.write_bytes(raw.get("length", len(text)).to_bytes(8, "little") + text + data[end:] + raw.get("more", b""))

    return edit


def written(name: str, data: bytes) -> Edit:
    """Write a file into the directory."""
    return lambda folder: (folder / name).write_bytes(data)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch SPRUNG'\ntR.")


def linked(name: str) -> Edit:
    """Move a file out of the directory and leave a link to it."""

    def edit(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return edit


def pipe(name: str) -> Edit:
    """Put a pipe, which blocks whoever opens it, into a file's place."""

    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


def sharded(shard: str, tensor: str = DOWN) -> Edit:
    """An index that puts ``tensor`` into ``shard``."""

    def edit(folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model-00001-of-00001.safetensors")
        index = {
            "weight_map": dict.fromkeys(fuzz.ADAPTER, "adapter_model-00001-of-00001.safetensors") | {tensor: shard}
        }
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))

    return edit


def renamed(name: str) -> Edit:
    """Give the layer another name."""

    def edit(folder: Path) -> None:
        fuzz.weights(folder / "adapter_model.safetensors", {k.replace(Q, name): v for k, v in fuzz.ADAPTER.items()})

    return edit


def shaped(down: list[int], up: list[int]) -> Edit:
    """Give the two matrices other shapes."""

    def edit(folder: Path) -> None:
        fuzz.weights(folder / "adapter_model.safetensors", dict(zip(fuzz.ADAPTER, (down, up), strict=True)))

    return edit


def entry(**fields: Any) -> Edit:
    """Set fields of one tensor's entry in the header."""
    return described(lambda told: told[DOWN].update(fields))


WEIGHTS, CONFIG = "*adapter/adapter_model.safetensors: ", "*adapter/adapter_config.json: "
AGAIN = "; save or download it again"
REFUSED: Mapping[str, tuple[Edit, str]] = {
    # no code
    "pickled weights": (
        pickled,
        "*adapter/adapter_model.bin: pickled weights can run code and are never opened; save the model again with "
        "safe_serialization=True",
    ),
    "a conftest.py in the checkpoint": (
        written("conftest.py", b"open('SPRUNG', 'w')"),
        "*adapter/conftest.py: pytest would run it as a part of your tests; remove it",
    ),
    # paths
    "a shard that climbs out": (
        sharded("../secret.safetensors"),
        "*adapter: '../secret.safetensors' is not the name of a file in this directory" + AGAIN,
    ),
    "an absolute shard": (
        sharded("/etc/passwd"), "*adapter: '/etc/passwd' is not the name of a file in this directory" + AGAIN
    ),
    "a shard that is not there": (
        sharded("gone.safetensors", "x"), "*adapter/gone.safetensors: the file of the weights is missing" + AGAIN
    ),
    "an index that disagrees with its shards": (
        sharded("gone.safetensors"),
        "*adapter_model-00001-of-00001.safetensors: holds tensor '*lora_A.weight', but "
        "adapter_model.safetensors.index.json puts it into 'gone.safetensors'" + AGAIN,
    ),
    "weights that are a link out": (
        linked("adapter_model.safetensors"),
        WEIGHTS + "is a link out of the checkpoint, to *elsewhere; copy the file into the directory",
    ),
    "a config that is a link out": (
        linked("adapter_config.json"),
        CONFIG + "is a link out of the checkpoint, to *elsewhere; copy the file into the directory",
    ),
    "weights that are a pipe": (
        pipe("adapter_model.safetensors"), WEIGHTS + "cannot be read: it is not a regular file; put one there"
    ),
    "a tokenizer that is a pipe": (
        pipe("tokenizer.json"), "*adapter/tokenizer.json: cannot be read: it is not a regular file; put one there"
    ),
    "a layer named with `::`": (
        renamed("a::b"), "*adapter: 'a::b' is not the name of a layer; save the checkpoint again"
    ),
    "a layer named with a terminal escape": (
        renamed("a\x1b[31mb\n"),
        r"*adapter: 'a\x1b[[]31mb\n' is not the name of a layer; save the checkpoint again",
    ),
    "a layer named with markup": (
        renamed("a<script>"), "*adapter: 'a<script>' is not the name of a layer; save the checkpoint again"
    ),
    # headers
    "a header longer than the file": (
        described(lambda _: None, length=2**62),
        WEIGHTS + "not a whole safetensors file: it has * bytes and claims a header of 4,611,686,018,427,387,904"
        + AGAIN,
    ),
    "a file cut short": (
        lambda folder: os.truncate(folder / "adapter_model.safetensors", 300),
        WEIGHTS + "its header describes 64 bytes of data, but the file holds *; it was cut short or altered: save or "
        "download it again",
    ),
    "a header that is not JSON": (
        described(lambda _: None, text=b"hello"),
        WEIGHTS + "the safetensors header is not JSON: Expecting value at line 1" + AGAIN,
    ),
    "a key twice in the header": (
        described(lambda _: None, text=b'{"a": {}, "a": {}}'),
        WEIGHTS + "the safetensors header names 'a' twice" + AGAIN,
    ),
    "a hole in the data": (
        entry(data_offsets=[16, 48]),
        WEIGHTS + "the data of tensor '*lora_A.weight' leaves a hole before it (byte 0)" + AGAIN,
    ),
    "an offset past the end": (
        entry(data_offsets=[0, 2**62]),
        WEIGHTS + "tensor '*lora_A.weight': shape [[]2, 4] of F32 takes 32 bytes, but its data_offsets hold "
        "4,611,686,018,427,387,904" + AGAIN,
    ),
    "an unknown dtype": (
        entry(dtype="F33"),
        WEIGHTS + "tensor '*lora_A.weight': unknown dtype 'F33'; save it in a floating point type",
    ),
    "a shape that overflows": (
        entry(shape=[2**62, 2**62]),
        WEIGHTS + "tensor '*lora_A.weight': its shape [[]4611686018427387904, 4611686018427387904] is larger than any "
        "file" + AGAIN,
    ),
    "a million tensors": (
        described(lambda _: None, text=b'{"a":[' + b"[]," * 4_000_000 + b"[]]}"),
        WEIGHTS + "the safetensors header has more than 4,000,000 values, which no model needs" + AGAIN,
    ),
    # values
    "rank 0, or what ZeRO-3 leaves": (
        shaped([0, 4], [4, 0]),
        f"*adapter: layer {Q}: lora_A.weight has shape [[]0, 4], expected two dimensions; an empty tensor is what "
        "ZeRO-3 leaves when it is saved ungathered; gather it first",
    ),
    "two matrices of different ranks": (
        shaped([2, 4], [4, 3]),
        f"*adapter: layer {Q}: lora_A.weight has rank 2, lora_B.weight has rank 3: they are of different runs; "
        "copy both from one save",
    ),
    # configs
    "an empty config": (
        written("adapter_config.json", b""),
        CONFIG + "the adapter's config is not JSON: Expecting value at line 1" + AGAIN,
    ),
    "a config in UTF-16": (
        lambda folder: (folder / "adapter_config.json").write_text("{}", "utf-16"),
        CONFIG + "the adapter's config is not UTF-8 text (byte 0)" + AGAIN,
    ),
    "a config that is a list": (
        written("adapter_config.json", b"[]"), CONFIG + "the adapter's config must be a JSON object, not list" + AGAIN
    ),
    "a config nested without end": (
        written("adapter_config.json", b'{"a":' * 100_000),
        CONFIG + "the adapter's config is not JSON that can be read: *" + AGAIN,
    ),
    "another method than LoRA": (
        config(peft_type="\x1b[2JIA3"),
        CONFIG + r"peft_type is '\x1b[[]2JIA3': not a LoRA adapter, so it has no layers to gate; where its method "
        "allows, peft.save_as_lora(DIR, model, rank=R) of PEFT 0.20 writes the loaded PeftModel as LoRA into DIR; give "
        "that",
    ),
    "a field of the wrong type": (
        config(target_parameters=7),
        CONFIG + "target_parameters must be a list of texts, not 7; mend it or save the adapter again",
    ),
    "a scale that is no number": (
        config(lora_alpha=float("nan")),
        CONFIG + "lora_alpha must be a number below a billion, not nan; mend it or save the adapter again",
    ),
    "an absurd number": (
        config(layers_to_transform=10**12),
        CONFIG + "layers_to_transform must be a whole number or a list of them, not 1000000000000; mend it or save the "
        "adapter again",
    ),
    "a field that nobody knows": (
        config(**{"use_\x1b[2Jmagic": [1]}),
        CONFIG + r"'use_\x1b[[]2Jmagic' is set to [[]1], and what it changes is not known here, so the figures might "
        "be of another model; update pytest-nullspace, or take it out of a copy of the adapter if all it concerns is "
        "training",
    ),
    "a rank that the weights do not have": (
        config(r=8),
        CONFIG + f"gives {Q} the rank 8, but its lora_A.weight has rank 2; config and weights are of different runs, "
        "and the scale alpha / r would be wrong; copy both from one save",
    ),
    "a regex that never ends": (
        config(rank_pattern={r"(\w+\.?)+!": 2}),
        CONFIG + r"rank_pattern: the regex '(\w+\.[?])+!' could take too long on 1 names of up to 31 characters: it "
        "repeats too much within itself, or too many stand beside it; write it with fewer repeats, or name the layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_adapter_is_a_usage_error_of_one_sentence(
    pytester: pytest.Pytester, adapter: Path, case: str
) -> None:
    """Each fault ends pytest with exit code 4 and one line with the place and what to do, and nothing has run."""
    edit, message = REFUSED[case]
    edit(adapter)
    result = pytester.runpytest_inprocess("-p", "no:randomly", "--nullspace-model=adapter")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = [line for line in result.errlines if line]
    assert len(told) == 1
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
    assert told[0].isprintable()
    assert "Traceback" not in result.stdout.str()
    assert not (pytester.path / "SPRUNG").exists()


def test_a_sound_adapter_is_collected(pytester: pytest.Pytester, adapter: Path) -> None:
    """What the cases above break is sound before, and its base is shown before anything is loaded."""
    result = pytester.runpytest_inprocess("-p", "no:randomly", "--nullspace-model=adapter", "--collect-only")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "nullspace: *adapter (PEFT LoRA, 1 layers, rank 2)*",
            "nullspace: base model base, named by adapter_config.json",
        ]
    )


OPTIONS: Mapping[str, str] = {
    "--nullspace-calib-size=1000000000000": "--nullspace-calib-size: takes a whole number from 1 to 1,000,000, auto *'",
    "--nullspace-seqlen=-1": "--nullspace-seqlen: takes a whole number from 1, not '-1'",
    "--nullspace-batch-size=1e3": "--nullspace-batch-size: takes a whole number from 1 to 1,000,000, or auto, *",
    "--nullspace-dtype=\x1b[31m": r"--nullspace-dtype: takes auto, float32, float16 or bfloat16, not '\x1b[[]31m'",
    "--nullspace-save-stats=~nobody-at-all/x": "--nullspace-save-stats: '~nobody-at-all/x' can be no path: *",
    f"--nullspace-init={'x' * 5000}": "--nullspace-init: 'xxx*' can be no path: File name too long",
}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option[:24].replace("\x1b", ""))
def test_an_absurd_option_is_a_usage_error(pytester: pytest.Pytester, adapter: Path, option: str) -> None:
    """What an option cannot take is told by the option's name."""
    result = pytester.runpytest_inprocess("-p", "no:randomly", "--nullspace-model=adapter", option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {OPTIONS[option]}"])


def layer(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["stats"][0].update(fields)


STATS: Mapping[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a figure edited by hand": (
        layer(BX_norm=0.01),
        "*stats.json: stats[[]0]: BX_ratio is 0.03125, but BX_norm / X_norm is 0.00125; the file was edited or "
        "damaged, so measure again",
    ),
    "another schema": (
        lambda document: document.update(schema="x\x1b[31m"),
        r"*stats.json: of schema x\x1b[[]31m 2, not pytest-nullspace/run 2; measure again with this version",
    ),
    "a layer name with markup": (
        layer(layer_name="<b>"), "*stats.json: '<b>' is not the name of a layer; measure again"
    ),
    "a figure that is text": (
        layer(X_norm="\x1b[2J"), r"*stats.json: stats[[]0]: X_norm must be a number, not '\x1b[[]2J'; measure again"
    ),
    "fewer layers than promised": (
        lambda document: document["stats"].pop(), "*stats.json: says num_layers 9, but holds 8; measure again"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATS)
def test_a_hostile_statistics_file_is_a_usage_error(
    pytester: pytest.Pytester, replay: Callable[..., pytest.RunResult], case: str
) -> None:
    """A saved run that contradicts itself, or holds what none can, is refused in one line."""
    change, message = STATS[case]
    document = json.loads((pytester.path / "stats.json").read_text())
    change(document)
    (pytester.path / "stats.json").write_text(json.dumps(document))
    result = replay()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
    assert "\x1b[2J" not in result.stderr.str() + result.stdout.str()


def test_what_a_statistics_file_says_of_itself_is_shown_plainly(
    pytester: pytest.Pytester, replay: Callable[..., pytest.RunResult]
) -> None:
    """Names, settings and an audit of a hostile file reach neither terminal, Markdown nor XML as they are."""
    document = json.loads((pytester.path / "stats.json").read_text())
    bad = "\x1b[2J<img src=x>\x07"
    document |= {"model_path": bad, "calib_dataset": bad, "outside": [bad], "device": bad, "dtype": bad}
    document["measured"] = {"seconds": {"load": 1.0, "pass": 1.0}}
    document["text"]["windows"] = bad
    document["audit"] = {
        "initial": bad, "variant": bad, "decided": bad, "layers": [], "compared": 1,
        "others": [{"name": bad, "change": 1.0, "why": bad}],
    }  # fmt: skip
    (pytester.path / "stats.json").write_text(json.dumps(document))
    result = replay("--nullspace-report=r.md", "--junit-xml=j.xml", "-v")
    shown = result.stdout.str()
    assert r"\x1b[2J<img src=x>\x07" in shown
    report, junit = (pytester.path / "r.md").read_text(), (pytester.path / "j.xml").read_text()
    for text in (shown, report, junit):
        assert not re.search("[\x00-\x08\x0b-\x1f]", text)
    assert not re.search(r"(?<!\\)<img", report)
    assert "<img" not in junit


def test_the_memory_of_a_header_is_bounded_by_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a million small lists are counted before one of them is made, in headers and in other JSON files."""
    monkeypatch.setattr(files, "MAX_JSON_VALUES", 1000)
    text = b'{"a":[' + b"[]," * 999 + b"[]]}"
    (tmp_path / "c.json").write_bytes(text)
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    for read in (lambda: read_json_object(tmp_path / "c.json", "it"), lambda: read_header(tmp_path / "m.safetensors")):
        with pytest.raises(CheckpointError, match="more than 1,000 values"):
            read()


def test_a_file_that_changed_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    """Another content of the same size is told with its hash; an untouched file is not."""
    file = fuzz.weights(tmp_path / "m.safetensors", {"a": [2]})
    read = stamps(file)
    require_unchanged(read)
    os.utime(file, ns=(1, 1))
    with pytest.raises(
        CheckpointError, match=r"m\.safetensors: changed after it was first read \(SHA-256 now [0-9a-f]{64}"
    ):
        require_unchanged(read)


@given(st.text())
def test_no_message_holds_a_control_character(text: str) -> None:
    """Whatever is put into an error, what is shown of it is printable, and quoted once."""
    assert all(c.isprintable() or c == "\n" for c in str(NullspaceError(text)))
    assert quoted(text, 50).isprintable()
    assert printable("\x1b") == r"\x1b"
    assert quoted("\x1b") == r"'\x1b'"
