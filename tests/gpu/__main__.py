"""All that is worth doing on a card, in less than six minutes: ``python -m tests.gpu``.

The tests marked ``gpu``, the benchmarks held against the baseline of a device of that name, and the table of
`tests.gpu.table`. Where there is no card ``--device=cpu --small`` runs the same, so that it can be relied on.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
PYTEST = ("-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider")


def steps(device: str, small: bool, folder: Path) -> dict[str, tuple[int, Sequence[str]]]:
    """What is run, by name: within how many seconds, and the command."""
    run = folder / "run.json"
    few = ("-k", "test_row_norms and 576") if small else ()
    bench = ("tests/benchmarks", "-o", "addopts=--strict-markers", "--benchmark-only", f"--benchmark-json={run}", *few)
    return {
        "tests": (150, (*PYTEST, "tests/gpu", f"--device={device}", "-q")),
        "benchmarks": (70, (*PYTEST, *bench, f"--device={device}", "-q")),
        "baseline": (10, ("-m", "tests.benchmarks.track", str(run))),
        "table": (130, ("-m", "tests.gpu.table", f"--device={device}", *(("--small",) if small else ()))),
    }


def main() -> int:
    """Run every step, whatever became of the one before; the exit code tells whether one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="All that is worth doing on a card.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "xpu", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny model, and few benchmarks")
    options = parser.parse_args()
    ended = []
    with TemporaryDirectory() as folder:
        for name, (seconds, command) in steps(options.device, options.small, Path(folder)).items():
            print(f"\n## {name}\n", flush=True)
            start = time.monotonic()
            try:
                code = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=seconds, check=False).returncode
                how = "ok" if code == 0 else f"FAILED, exit code {code}"
            except subprocess.TimeoutExpired:
                how = f"FAILED, not done after {seconds} s"
            ended.append(f"{name}: {how} ({time.monotonic() - start:.0f} s)")
    print("\n## all\n", *ended, sep="\n")
    return int(any("FAILED" in line for line in ended))


if __name__ == "__main__":
    sys.exit(main())
