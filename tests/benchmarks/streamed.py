"""What streaming reads, takes of memory and of time: ``python -m tests.benchmarks.streamed [LAYERS …]``.

For each number of layers a LoRA-Null directory of blocks of 12.8 MB is made and measured, in a process of its own: on
four windows of 128 tokens with drift. Then the reader sleeps, so that reading takes as long as computing, and longer.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WINDOWS, TOKENS = 4, 128


def made(layers: int, folder: Path) -> None:
    """The directory, and its text."""
    from tests import tiny

    model = tiny.llama(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8
    )
    tiny.lora_null(folder / "ft", model, rank=4, shards=max(1, layers // 4))
    (folder / "text.txt").write_text(tiny.TEXT)


def measured(folder: Path, rate: float) -> dict[str, Any]:
    """One run in this process, its reader held to ``rate`` bytes a second; 0 for as fast as it goes."""
    from pytest_nullspace.checkpoint import open_checkpoint
    from pytest_nullspace.measuring.distributed import Ranks
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
    run = measure_checkpoint(checkpoint, Settings(**settings), [layer.name for layer in checkpoint.layers])
    size = sum(file.stat().st_size for file in (folder / "ft").glob("*.safetensors"))
    return {
        "read": shelves[0].bytes_read / size, "reading": through[0], "pass": run.about["measured"]["seconds"]["pass"],
        "before": before, "peak": _memory("VmHWM"),
    }  # fmt: skip


def _memory(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def _apart(*call: object) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, *map(str, call)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout or "{}")
    return found


def main(*given: str) -> None:
    """Print the table."""
    print(f"{'layers':>6} {'rate':>10} {'read/size':>9} {'reading':>8} {'pass':>7} {'before':>8} {'peak':>8}")
    for layers in map(int, given or ("7", "28", "112")):
        with TemporaryDirectory() as folder:
            _apart("make", layers, folder)
            free = _apart("run", folder, 0)
            rates = (0.0,) if layers > 28 else (0.0, 13e6 * layers / free["pass"], 13e6 * layers / free["pass"] / 2)
            for rate in rates:
                of = _apart("run", folder, rate) if rate else free
                print(
                    f"{layers:6} {rate / 1e6:7.1f} MB {of['read']:9.3f} {of['reading']:6.2f} s {of['pass']:5.2f} s "
                    f"{of['before'] / 1e6:5.0f} MB {of['peak'] / 1e6:5.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", layers, folder]:
            made(int(layers), Path(folder))
        case ["run", folder, rate]:
            print(json.dumps(measured(Path(folder), float(rate))))
        case given:
            main(*given)
