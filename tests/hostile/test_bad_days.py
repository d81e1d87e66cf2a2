"""Machines that die, disks that fill, files that change: no result is lost, half written, or other than it was."""

import json
import os
import shutil
import subprocess
import sys
import time
from array import array
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import saved, tiny
from tests.adapters import adapter
from tests.plugin.conftest import LOOSE, Gate

WRITER = """
import sys
from pathlib import Path
from pytest_nullspace.run.saved import write
from tests import saved
runs = [saved.run(*(f"l.{i}" for i in range(300)), rows=rows) for rows in (1, 2)]
file, count = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
for number in range(count):
    write(runs[number % 2], file)
"""


def writer(file: Path, count: int) -> "subprocess.Popen[str]":
    """A process that saves two runs in turn into one file, and has begun."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, file, str(count)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def whole(file: Path) -> bool:
    return len(json.loads(file.read_text("utf-8"))["stats"]) == 300


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    """Killed before, during or after writing, the file is the whole old run or the whole new one."""
    file = saved.save(tmp_path / "stats.json", saved.run(*(f"l.{i}" for i in range(300))))
    for delay in range(8):
        process = writer(file, 10_000)
        time.sleep(0.05 + delay * 0.0137)
        process.kill()
        process.communicate()
        assert whole(file)


def test_two_runs_may_write_one_file(tmp_path: Path) -> None:
    """Written by two processes at once, the file is always the whole of one."""
    file = saved.save(tmp_path / "stats.json", saved.run(*(f"l.{i}" for i in range(300))))
    processes = [writer(file, 100) for _ in range(2)]
    while any(process.poll() is None for process in processes):
        assert whole(file)
    assert [process.communicate() and process.returncode for process in processes] == [0, 0]
    assert [name.name for name in tmp_path.iterdir()] == ["stats.json"]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of its own; skips where this user may not."""
    places = []

    def mount(*options: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir(exist_ok=True)
        command = ["mount", *options, str(place)]
        if not shutil.which("mount"):
            pytest.skip("needs the command mount")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("old", ["old", None])
def test_a_full_disk_is_told_and_red(
    mounted: Callable[..., Path], replay: Callable[..., pytest.RunResult], old: str | None
) -> None:
    """On a disk of 12 kB, really full, a green run is not green, the old file is whole, and no half is left."""
    disk = mounted("-t", "tmpfs", "-o", "size=12k", "tmpfs")
    if old is not None:
        (disk / "out.json").write_text(old)
    saved.save(disk.parent / "many.json", saved.run(*(f"l.{i}" for i in range(300))))
    result = replay(f"--nullspace-save-stats={disk / 'out.json'}", stats=str(disk.parent / "many.json"))
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            f"nullspace: NOT GATED: {disk / 'out.json'}: cannot be written: No space left on device; mend that or give "
            "another place"
        ]
    )
    assert [(file.name, file.read_text()) for file in disk.iterdir()] == ([("out.json", old)] if old else [])


def test_a_disk_that_is_full_for_the_workers_is_told(
    mounted: Callable[..., Path], checkpoint: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the outcome that workers share finds no room, every test errs with the file, and nothing is green."""
    disk = mounted("-t", "tmpfs", "-o", "size=12k", "tmpfs")
    monkeypatch.setenv("TMPDIR", str(disk))
    result = gate(*LOOSE, "-n", "2", "-p", "no:cacheprovider")
    assert result.ret == 1
    assert not result.parseoutcomes().get("passed")
    result.stdout.fnmatch_lines(["*No space left on device*"])


def test_a_read_only_disk_is_told(mounted: Callable[..., Path], replay: Callable[..., pytest.RunResult]) -> None:
    """On a file system that nobody may write to, root neither, the file's name and the reason are told."""
    disk = mounted("-t", "tmpfs", "-o", "ro", "tmpfs")
    for name in ("stats.json", "new/stats.json"):
        result = replay(f"--nullspace-save-stats={disk / name}")
        assert result.ret == 1
        result.stdout.fnmatch_lines(
            [f"nullspace: NOT GATED: {disk / name}: cannot be written: Read-only file system; mend that or give *"]
        )


FULL = """
import pytest, resource
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_no_room_for_the_statistics_is_told_and_red(
    pytester: pytest.Pytester, replay: Callable[..., pytest.RunResult]
) -> None:
    """Where the file does not fit, a green run is not green, the old file is whole, and no half is left."""
    pytester.makeconftest(FULL)
    (pytester.path / "out.json").write_text("old")
    result = replay("--nullspace-save-stats=out.json", "-p", "no:cacheprovider", apart=True)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["nullspace: NOT GATED: *out.json: cannot be written: File too large; mend that or give another place"]
    )
    assert (pytester.path / "out.json").read_text() == "old"
    assert not [f for f in pytester.path.iterdir() if f.name.startswith(".out")]


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs a folder in which nobody may write")
def test_a_read_only_folder_is_told(replay: Callable[..., pytest.RunResult]) -> None:
    """A folder in which nothing can be made is told by the file's name."""
    result = replay("--nullspace-save-stats=/proc/self/stats.json")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["nullspace: NOT GATED: /proc/self/stats.json: cannot be written: *; mend that or *"])


# Called as often as a module of any model runs: what it does, it does inside the pass.
IN_THE_PASS = """
import gc, os, resource, signal, torch
from torch.nn.modules.module import register_module_forward_hook
calls = 0
def once(*_):
    global calls
    calls += 1
    if calls == 100:
        {act}
register_module_forward_hook(once)
"""
LEFT = """
def pytest_unconfigure():
    modules = [m for m in gc.get_objects() if isinstance(m, torch.nn.Module)]
    print(f"modules run: {calls}; hooks left:", sum(len(m._forward_hooks) for m in modules), "of", len(modules) > 50)
"""


def test_ctrl_c_in_the_pass_ends_it_without_statistics(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """A real SIGINT inside the pass ends pytest as ever (exit code 2), at once, without a hook or a partial file."""
    # A shell starts what runs in its background with the signal ignored.
    act = "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT)"
    pytester.makeconftest(IN_THE_PASS.format(act=act) + LEFT)
    (pytester.path / "stats.json").write_text("old")
    result = gate(*LOOSE, "--nullspace-save-stats=stats.json", "--nullspace-calib-size=5000", "-s")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*KeyboardInterrupt*", "modules run: 100; hooks left: 0 of *"])
    assert (pytester.path / "stats.json").read_text() == "old"
    assert "gated" not in result.stdout.str()


def test_a_checkpoint_that_changes_while_it_is_read_is_an_error(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """Weights written to during the pass give no figure: every test errs, with the file and its hash."""
    act = "f = open('runs/ft/model.safetensors', 'r+b'); f.seek(-1, 2); f.write(b'x'); f.close()"
    pytester.makeconftest(IN_THE_PASS.format(act=act))
    result = gate(*LOOSE, "--nullspace-save-stats=stats.json")
    assert result.ret == 1
    result.assert_outcomes(errors=22)
    result.stdout.fnmatch_lines(
        [
            "*model.safetensors: changed after it was first read (SHA-256 now *), so no figure would be of one "
            "checkpoint; run again once nothing writes to it"
        ]
    )
    assert "Traceback" not in result.stdout.str()
    assert not (pytester.path / "stats.json").exists()


BASE_FILES = {
    "weights": ("model.safetensors", "r+b", "f.seek(-1, 2); f.write(b'x')"),
    "config": ("config.json", "ab", "f.write(b' ')"),
}


@pytest.mark.parametrize("which", BASE_FILES)
def test_a_base_that_changes_while_it_is_read_is_an_error(gate: Gate, pytester: pytest.Pytester, which: str) -> None:
    """Files of the base written to during the pass give no figure, though the adapter's own stay as they are."""
    (pytester.path / "text.txt").write_text(tiny.TEXT)
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    adapter(pytester.path, tiny.llama(), r=4, target_modules="all-linear")
    file, mode, change = BASE_FILES[which]
    pytester.makeconftest(IN_THE_PASS.format(act=f"f = open('base/{file}', '{mode}'); {change}; f.close()"))
    result = gate(*LOOSE, "--nullspace-save-stats=stats.json", model="adapter")
    assert result.ret == 1
    result.assert_outcomes(errors=22)
    result.stdout.fnmatch_lines(
        [
            f"*/base/{file}: changed after it was first read (SHA-256 now *), so no figure would be of one "
            "checkpoint; run again once nothing writes to it"
        ]
    )
    assert "Traceback" not in result.stdout.str()
    assert not (pytester.path / "stats.json").exists()


SHORT = """
import resource, torch, transformers
from pytest_nullspace import model
from pytest_nullspace.measuring import pipeline, streaming as measure
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
def limit(): resource.setrlimit(resource.RLIMIT_AS, (used + {room}, resource.RLIM_INFINITY))
"""
SHORT_IN_THE_LOAD = SHORT + "limit()\n"
# Only in the pass: what pytest's other plugins import at the end takes memory as well.
SHORT_IN_THE_PASS = (
    SHORT
    + """
real, no_limit = measure.measure, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
def short(*a, **k):
    limit()
    try:
        return real(*a, **k)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, no_limit)
measure.measure = short
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory is Linux's")
@pytest.mark.parametrize("where", ["load", "pass"])
def test_too_little_memory_is_told_with_what_to_lower(pytester: pytest.Pytester, gate: Gate, where: str) -> None:
    """Memory that is refused, really refused, in loading or in the pass: one sentence with the options that help."""
    (pytester.path / "text.txt").write_text(tiny.TEXT * 50)
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    wide = tiny.llama(max_position_embeddings=16_384, vocab_size=128 if where == "pass" else 4_000_000)
    # Stored in half precision, so that loading has to convert it and cannot map the file.
    tiny.lora_null(pytester.path / "wide", wide.to(torch.bfloat16) if where == "load" else wide)
    pytester.makeconftest((SHORT_IN_THE_LOAD if where == "load" else SHORT_IN_THE_PASS).format(room=300_000_000))
    options = ("--nullspace-seqlen=16000", "--nullspace-batch-size=40", "--nullspace-calib-size=40")
    result = gate(*LOOSE, *options, model="wide")
    assert result.ret == 1
    result.assert_outcomes(errors=22)
    assert "Traceback" not in result.stdout.str()
    result.stdout.fnmatch_lines(
        [
            "*wide: too little memory to load the model in float32 on cpu; lower it by --nullspace-dtype=bfloat16, or "
            "take a machine with more"
        ]
        if where == "load"
        else [
            "*wide: too little memory in the pass of windows of 16000 tokens, 40 a forward, in float32 on cpu; lower "
            "--nullspace-seqlen or --nullspace-batch-size, or take --nullspace-dtype=bfloat16"
        ]
    )


def test_a_tokenizer_of_another_model_is_told(checkpoint: Path, gate: Gate) -> None:
    """A token that the model does not know is told before the pass, not as an index out of range."""
    tokenizer = checkpoint / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"e": 101', '"e": 4101'))
    result = gate(*LOOSE)
    result.assert_outcomes(errors=22)
    result.stdout.fnmatch_lines(
        [
            "*runs/ft: its tokenizer gives the token 4101, but the model knows only 128; save the base model's "
            "tokenizer into the directory"
        ]
    )


def test_the_same_command_gives_the_same_bytes(checkpoint: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """Two runs differ in time and host alone; workers, order, selection and batches change no figure beyond 1e-6."""

    def document(name: str, *options: str) -> dict[str, Any]:
        assert gate(*LOOSE, f"--nullspace-save-stats={name}", *options).ret == 0
        told: dict[str, Any] = json.loads((pytester.path / name).read_text())
        del told["measured"]
        return told

    first = document("a.json")
    assert json.dumps(first) == json.dumps(document("b.json"))
    other = document("c.json", "-n", "2", "-p", "randomly", "--nullspace-batch-size=2", "--nullspace-layers=*.[01].*")
    figures = {layer["layer_name"]: layer for layer in first["stats"]}
    assert len(other["stats"]) == 14
    for layer in other["stats"]:
        before, margins = figures[layer.pop("layer_name")], layer.pop("margin_95")
        each, each_before = (array("f", b64decode(of.pop("by_window"))) for of in (layer, before))
        assert list(each) == pytest.approx(list(each_before), rel=1e-6)
        assert layer == pytest.approx({key: before[key] for key in layer}, rel=1e-6)
        # A margin is a small difference of figures, so it is held to 1e-6 of theirs, not of its own.
        assert margins == pytest.approx(before["margin_95"], rel=1e-6, abs=1e-6)
