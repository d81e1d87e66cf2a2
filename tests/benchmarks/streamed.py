"""What streaming reads, takes of memory and of time: ``python -m tests.benchmarks.streamed [LAYERS[xWIDTH] …]``.

For each number of layers a LoRA-Null directory of that width is made, of blocks of 12.8 MB where it is 512, and
measured, each time in a process of its own: on four windows of 128 tokens with drift, libraries imported before. First
with what reads as fast as it goes, then with what sleeps after each read, so that reading takes as long as that pass
took, and, of up to 28 blocks, twice as long. Of these all is done `ROUNDS` times over, of which medians are printed; of
memory the most.

``reading`` is what the reads took, which is bytes by rate where they sleep; ``pass`` is from the first window on, and
``whole`` from the text to the last hash. Both are told as multiples too: of the longer of reading and the same with
what reads as fast as it goes. ``told`` is the memory that it told to need before it began.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

WINDOWS, TOKENS = 4, 128
ROUNDS = 3


def made(layers: int, width: int, folder: Path) -> None:
    """The directory, and its text."""
    from tests import tiny

    model = tiny.llama(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    tiny.lora_null(folder / "ft", model, rank=4, shards=max(1, layers // 4))
    (folder / "text.txt").write_text(tiny.TEXT)


class Disk:
    """What gives so many bytes a second, to whoever reads; 0 for as fast as it goes."""

    def __init__(self, rate: float) -> None:
        self.rate, self.seconds, self._free = rate, 0.0, 0.0

    def file(self, *of: Any) -> FileIO:
        """A file that lies there."""
        disk = self

        class Slow(FileIO):
            def readinto(self, buffer: Any) -> int:
                began = time.perf_counter()
                got = super().readinto(buffer) or 0
                if disk.rate:  # what two threads ask for at once comes one after the other
                    disk._free = max(disk._free, began) + got / disk.rate
                    time.sleep(max(0.0, disk._free - time.perf_counter()))
                disk.seconds += time.perf_counter() - began
                return got

        return Slow(*of)


def measured(folder: Path, rate: float) -> dict[str, Any]:
    """One run in this process, its files read with ``rate`` bytes a second; 0 for as fast as it goes."""
    from pytest_nullspace.checkpoint import open_checkpoint, raw
    from pytest_nullspace.measuring import fitting, measurement
    from pytest_nullspace.measuring.distributed import Ranks
    from pytest_nullspace.measuring.pipeline import measure_checkpoint
    from pytest_nullspace.model import import_libraries
    from pytest_nullspace.settings import STREAM, Settings

    disk, models = Disk(rate), list[Any]()
    raw.FileIO = disk.file  # type: ignore[assignment, attr-defined]
    told: list[int] = []

    def tell(*args: Any, **how: Any) -> str:
        models.append(args[0])
        told.append(fitting.needed(*args, **how)["memory"])
        return ""

    measurement.told_needed = tell  # type: ignore[attr-defined]
    settings: dict[str, Any] = {
        "models": (), "stats": (), "base": None, "calib_dataset": "text.txt", "text_folder": folder,
        "calib_size": WINDOWS, "seqlen": TOKENS, "max_activation_samples": None, "seed": 42, "batch_size": None,
        "device": "cpu", "dtype": "auto", "layers": "*", "stage": "trained", "overrides": (), "save_stats": None,
        "reports": (), "ranks": Ranks(), "drift": None, "device_map": STREAM,
    }  # fmt: skip
    checkpoint = open_checkpoint(folder / "ft")
    import_libraries(checkpoint)
    before = _memory("VmRSS")
    began = time.perf_counter()
    run = measure_checkpoint(checkpoint, Settings(**settings), [of.name for of in checkpoint.layers], Silent())
    whole = time.perf_counter() - began
    size = sum(file.stat().st_size for file in (folder / "ft").glob("*.safetensors"))
    return {
        "bytes": size, "read": models[0].shelf.bytes_read / size, "reading": disk.seconds, "whole": whole,
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


def _of_all(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure the median, of memory the most."""
    told = {name: [run[name] for run in runs] for name in runs[0]}
    return {name: max(of) if name in ("told", "peak") else median(of) for name, of in told.items()}


def main(*given: str) -> None:
    """Print the table."""
    print(
        "    layers       rate   read reading            pass           whole   before     told            peak",
        flush=True,
    )
    for name in given or ("7", "28", "112"):
        layers, width = map(int, f"{name}x512".split("x")[:2])
        few = layers <= 28
        slower = () if width > 512 else (1, 2) if few else (1,)
        runs: dict[int, list[dict[str, Any]]] = {times: [] for times in (0, *slower)}
        with TemporaryDirectory() as folder:
            _apart("make", layers, width, folder)
            for _ in range(ROUNDS if slower and few else 1):
                free = _apart("run", folder, 0)
                runs[0].append(free)
                for times in slower:
                    rate = free["bytes"] / free["pass"] / times
                    of = _apart("run", folder, rate) | {"rate": rate}
                    for part in ("pass", "whole"):
                        of[f"{part} by"] = of[part] / max(of["bytes"] / rate, free[part])
                    runs[times].append(of)
        for times, found in runs.items():
            of = _of_all(found)
            peaks = [run["peak"] / 1e6 for run in found]
            by = {part: f"x {of[f'{part} by']:.2f}" if times else "" for part in ("pass", "whole")}
            told = [f"{of[part]:6.2f} s {by[part]:7}" for part in by]
            rate = f"{of['rate'] / 1e6:5.1f} MB/s" if times else "as it goes"
            print(
                f"{name:>10} {rate:>10} {of['read']:6.3f} {of['reading']:5.2f} s {told[0]} {told[1]}"
                f" {of['before'] / 1e6:5.0f} MB {of['told'] / 1e6:5.0f} MB {min(peaks):3.0f} - {max(peaks):3.0f} MB",
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
