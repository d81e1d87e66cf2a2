"""From the command to the first window: where the CPU seconds go, and which packages are imported on the way."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
WORLD = ROOT / "fixtures" / "world"
REAL = os.environ.get("NULLSPACE_REAL_LORA")
"""A folder that holds a real model as ``base``, an adapter of it as ``lora``, and ``preserved.txt``."""

PARTS = ("pytest, collection", "text", "imports", "model", "windows", "factors")
"""What there is before the first window, in order."""
PACKAGES = ("torch", "transformers", "peft", "sympy", "accelerate", "numpy", "huggingface_hub", "pytest_nullspace")
"""Whose imports are told one by one."""

OURS = (
    "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "pytest_nullspace.plugin",
    "-p", "tests.benchmarks.started", "--nullspace-calib-size=2",
)  # fmt: skip


def gates() -> dict[str, tuple[str, ...]]:
    """The options of each gate whose start is measured, by its name in the table."""
    found: dict[str, tuple[str, ...]] = {
        "the shipped world": (
            f"--nullspace-model={WORLD / 'null-v2'}", f"--nullspace-calib-dataset={WORLD / 'facts.txt'}",
            "--nullspace-seqlen=128",
        )
    }  # fmt: skip
    if REAL:
        found["SmolLM2 under a LoRA"] = (
            f"--nullspace-model={REAL}/lora", f"--nullspace-base={REAL}/base",
            f"--nullspace-calib-dataset={REAL}/preserved.txt", "--nullspace-seqlen=128",
        )  # fmt: skip
    return found


def ran(folder: Path, options: Sequence[str], *interpreter: str) -> tuple[dict[str, Any], str]:
    """Gate in a fresh interpreter without other plugins; what `tests.benchmarks.started` told, and standard error."""
    told, stats = folder / "started.json", folder / "stats.json"
    stats.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"NULLSPACE_STARTED": str(told), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *interpreter, *OURS, *options, f"--nullspace-save-stats={stats}", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    if not stats.exists():
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    seconds = json.loads(stats.read_text("utf-8"))["measured"]["seconds"]
    return json.loads(told.read_text("utf-8")) | {"seconds": seconds}, done.stderr


def parts(told: Mapping[str, Any]) -> dict[str, float]:
    """The CPU seconds of each part, and of all of them."""
    seconds = {name: told["seconds"][name] for name in ("text", "imports", "model", "windows")}
    first = {"pytest, collection": told["pass"] - sum(seconds.values())}
    return first | seconds | {"factors": told["window"] - told["pass"], "to the first window": told["window"]}


def packages(importtime: str) -> dict[str, float]:
    """The seconds of each package's own modules, as ``python -X importtime`` has them."""
    took: Counter[str] = Counter()
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", importtime, re.MULTILINE):
        package = name.partition(".")[0]
        took[package if package in PACKAGES else "others"] += int(own)
    return {package: took[package] / 1e6 for package in (*PACKAGES, "others")}


def start_up(folder: Path, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """For each gate the parts and the packages, medians."""
    found = {}
    for name, options in gates().items():
        ran(folder, options)  # so that all is compiled and in the page cache
        of = [parts(ran(folder, options)[0]) for _ in range(rounds)]
        imported = [packages(ran(folder, options, "-X", "importtime")[1]) for _ in range(rounds)]
        found[name] = {
            "parts": {part: median(one[part] for one in of) for part in of[0]},
            "packages": {package: median(one[package] for one in imported) for package in imported[0]},
        }
    return found
