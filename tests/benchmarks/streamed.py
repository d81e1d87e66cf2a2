"""What streaming reads, takes of memory and of time: ``python -m tests.benchmarks.streamed [LAYERS[xWIDTH] …]``.

For each number of layers a LoRA-Null directory of that width is made, of blocks of 12.8 MB where it is 512, and
measured, in a process of its own: on four windows of 128 tokens with drift. Then the reader sleeps, so that reading
takes as long as computing, and longer. ``told`` is the memory that it told to need before it began.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WINDOWS, TOKENS = 4, 128


def made(layers: int, width: int, folder: Path) -> None:
    """The directory, and its text."""
    from tests import tiny

    model = tiny.llama(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    tiny.lora_null(folder / "ft", model, rank=4, shards=max(1, layers // 4))
    (folder / "text.txt").write_text(tiny.TEXT)


def measured(folder: Path, rate: float) -> dict[str, Any]:
    """One run in this process, its reader held to ``rate`` bytes a second; 0 for as fast as it goes."""
    from pytest_nullspace.checkpoint import open_checkpoint
    from pytest_nullspace.measuring import measurement
    from pytest_nullspace.measuring.distributed import Ranks
    from pytest_nullspace.measuring.fitting import needed
    from pytest_nullspace.measuring.pipeline import measure_checkpoint
    from pytest_nullspace.model import import_libraries
    from pytest_nullspace.model.shelf import Shelf
    from pytest_nullspace.settings import STREAM, Settings

    shelves, read, through = [], Shelf.read, [0.0]

    def slowly(shelf: Shelf, number: int) -> Any:
        shelves.append(shelf)
        began, before = time.perf_counter(), shelf.bytes_read
        values = read(shelf, number)
        if rate:
            due = (shelf.bytes_read - before) / rate
            time.sleep(max(0.0, due - (time.perf_counter() - began)))
        through[0] += time.perf_counter() - began
        return values

    told: list[int] = []

    def tell(*args: Any, **how: Any) -> str:
        told.append(needed(*args, **how)["memory"])
        return ""

    measurement.told_needed = tell  # type: ignore[attr-defined]
    Shelf.read = slowly  # type: ignore[method-assign, assignment]
    settings: dict[str, Any] = {
        "models": (), "stats": (), "base": None, "calib_dataset": "text.txt", "text_folder": folder,
        "calib_size": WINDOWS, "seqlen": TOKENS, "max_activation_samples": None, "seed": 42, "batch_size": None,
        "device": "cpu", "dtype": "auto", "layers": "*", "stage": "trained", "overrides": (), "save_stats": None,
        "reports": (), "ranks": Ranks(), "drift": None, "device_map": STREAM,
    }  # fmt: skip
    checkpoint = open_checkpoint(folder / "ft")
    import_libraries(checkpoint)
    before = _memory("VmRSS")
    run = measure_checkpoint(checkpoint, Settings(**settings), [of.name for of in checkpoint.layers], Silent())
    size = sum(file.stat().st_size for file in (folder / "ft").glob("*.safetensors"))
    return {
        "bytes": size, "read": shelves[0].bytes_read / size, "reading": through[0],
        "pass": run.about["measured"]["seconds"]["pass"], "before": before, "told": told[0], "peak": _memory("VmHWM"),
    }  # fmt: skip


class Silent:
    """Shows nothing of how far a measurement is."""

    def __call__(self, done: int, windows: int) -> None:
        """Show nothing."""

    def say(self, line: str) -> None:
        """Say nothing."""


def _memory(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def _apart(*call: object) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, *map(str, call)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout or "{}")
    return found


def main(*given: str) -> None:
    """Print the table."""
    print(
        f"{'layers':>6} {'rate':>10} {'read/size':>9} {'reading':>8} {'pass':>7} {'before':>8} {'told':>8} {'peak':>8}"
    )
    for name in given or ("7", "28", "112"):
        layers, width = map(int, f"{name}x512".split("x")[:2])
        with TemporaryDirectory() as folder:
            _apart("make", layers, width, folder)
            free = _apart("run", folder, 0)
            rates = (
                (0.0,)
                if layers > 28 or width > 512
                else (0.0, free["bytes"] / free["pass"], free["bytes"] / free["pass"] / 2)
            )
            for rate in rates:
                of = _apart("run", folder, rate) if rate else free
                print(
                    f"{name:>6} {rate / 1e6:7.1f} MB {of['read']:9.3f} {of['reading']:6.2f} s {of['pass']:5.2f} s "
                    f"{of['before'] / 1e6:5.0f} MB {of['told'] / 1e6:5.0f} MB {of['peak'] / 1e6:5.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", layers, width, folder]:
            made(int(layers), int(width), Path(folder))
        case ["run", folder, rate]:
            print(json.dumps(measured(Path(folder), float(rate))))
        case given:
            main(*given)
