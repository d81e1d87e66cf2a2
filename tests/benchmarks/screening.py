"""What a screen gives and costs beside the gate: ``python -m tests.benchmarks.screening`` writes ``docs/screening.md``.

It trains the world's PEFT adapters as `fixtures.build` does. ``… --folder DIR`` measures adapters that lie elsewhere as
well: each directory in it but its ``base``, on its ``preserved.txt``. Seconds are CPU seconds of one thread.
"""

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fixtures.build import WORLD, build_variants
from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.judging.screening import FIGURES, Screening
from pytest_nullspace.measuring.memory import keep_freed_memory
from pytest_nullspace.measuring.pipeline import measure_checkpoint
from pytest_nullspace.measuring.screen import Place, places, screen
from pytest_nullspace.measuring.screening import screen_checkpoints
from pytest_nullspace.model import AdaptedLayer, AdaptedModel
from pytest_nullspace.settings import Settings
from pytest_nullspace.shell.called import asked
from tests import adapters, tiny
from tests.benchmarks.reference import windows_of

PAGE = Path(__file__).parents[2] / "docs" / "screening.md"
MANY, ROUNDS = 8, 7
VOCABULARY = 96
"""Tokens that every base here knows."""
BEGINS, ENDS = "<!-- measured -->\n", "<!-- end of what was measured -->\n"
Differences = dict[str, dict[str, dict[str, float]]]


def settings_of(directory: Path, text: Path, **options: Any) -> Settings:
    """The settings of a run on that text, without the predictions."""
    return asked(directory, str(text), None, {"drift": False, **options})


def _names(checkpoint: Checkpoint) -> list[str]:
    return [layer.name for layer in checkpoint.layers]


def differences(directories: Sequence[Path], text: Path, **options: Any) -> Differences:
    """Of each adapter each figure in full and to the first order, and how far apart these lie in its layers."""
    checkpoints = [open_checkpoint(directory) for directory in directories]
    settings = settings_of(directories[0], text, **options)
    screened = screen_checkpoints([(of, _names(of)) for of in checkpoints], settings)
    found: Differences = {}
    for directory, of, run in zip(directories, checkpoints, screened, strict=True):
        told, full = Screening.told(run.about), measure_checkpoint(of, settings, _names(of))
        assert told is not None
        found[directory.name] = {}
        for figure in FIGURES:
            apart = [abs(told.figure(layer.name, figure) / layer.figure(figure) - 1) for layer in full.layers]
            found[directory.name][figure] = {
                "gate": full.mean(figure), "screen": told.mean(figure), "median": median(apart), "most": max(apart),
            }  # fmt: skip
    return found


def screening_of(base: Any, layers: dict[str, AdaptedLayer], held: Sequence[Place]) -> object:
    """Screen adapters on 16 windows."""
    return screen(AdaptedModel(base, layers, torch.device("cpu")), held, windows_of(4096, 256, VOCABULARY))


def times(directories: Sequence[Path], text: Path, **options: Any) -> dict[str, float]:
    """Eight adapters over one: in the pass, with what weights give, with all that is loaded; and over a gate of one."""
    checkpoints = [open_checkpoint(directory) for directory in directories]
    settings = settings_of(directories[0], text, **options)
    base, held = adapters.on_the_base(directories, options.get("base"))
    known = {count: places(held[:count]) for count in (1, MANY)}
    works = {
        "pass": lambda count: screening_of(base, held[0], known[count]),
        "weights": lambda count: screening_of(base, held[0], places(held[:count])),
        "whole": lambda count: screen_checkpoints([(of, _names(of)) for of in checkpoints[:count]], settings),
    }
    told: dict[str, list[float]] = {name: [] for name in (*works, "gate", "command")}
    for _ in range(ROUNDS):
        for name, work in works.items():
            one, many = (_seconds(lambda count=count, work=work: work(count)) for count in (1, MANY))
            told[name].append(many / one)
        gate = _seconds(lambda: measure_checkpoint(checkpoints[0], settings, _names(checkpoints[0])))
        told["gate"].append(many / gate)
    one, many = (_command(directories[:count], text, **options) for count in (1, MANY))
    told["command"].append(many / one)
    return {name: median(ratios) for name, ratios in told.items()}


def _command(directories: Sequence[Path], text: Path, **options: Any) -> float:
    """CPU seconds of the whole command, imports and all."""
    models = [f"--nullspace-model={directory}" for directory in directories]
    how = [f"--nullspace-{name}={value}" for name, value in options.items()]
    alone = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", str(directories[0]), *alone, "--nullspace-screen", *models, *how]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([*command, f"--nullspace-calib-dataset={text}"], capture_output=True, text=True, check=False)
    assert "screened, first order" in done.stdout, done.stdout + done.stderr
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def _seconds(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def copies(folder: Path, of: Path) -> list[Path]:
    """As many of one adapter as are to be screened."""
    return [shutil.copytree(of, folder / f"copy{number}") for number in range(MANY)]


def randoms(folder: Path) -> list[Path]:
    """As many random adapters of a random Llama that is wider than the world's."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}

    def made(number: int) -> Path:
        model = tiny.llama(**sizes, max_position_embeddings=512)
        return adapters.adapter(folder, model, name=f"a{number}", r=16, target_modules="all-linear")

    return [made(number) for number in range(MANY)]


def measured(elsewhere: Path | None) -> dict[str, Any]:
    """All of it."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_variants(folder, ("peft-default", "peft-rslora"), count=False)
        world = [WORLD / "peft-null", *(folder / name for name in ("peft-default", "peft-rslora"))]
        (folder / "text.txt").write_text(tiny.TEXT * 8)
        found = differences(world, WORLD / "facts.txt", base=str(WORLD / "base"))
        if elsewhere is not None:
            others = [of for of in sorted(elsewhere.iterdir()) if of.is_dir() and of.name != "base"]
            found |= differences(others, elsewhere / "preserved.txt", calib_size=4, seqlen=512)
        cost = {
            "the world's, 96 wide, rank 12": times(
                copies(folder, WORLD / "peft-null"), WORLD / "facts.txt", base=str(WORLD / "base")
            ),
            "a random Llama 512 wide, rank 16": times(randoms(folder), folder / "text.txt", seqlen=256),
        }
    return {"figures": found, "cost": cost, "machine": f"{platform.machine()}, torch {torch.__version__}"}


def tables(found: Mapping[str, Any]) -> str:
    """The two tables of the page."""
    lines = [
        "| adapter | figure | gate | screen | apart by, median of layers | most |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, figures in found["figures"].items():
        lines += [
            f"| {name} | {figure} | {of['gate']:.3g} | {of['screen']:.3g} | {of['median']:.0%} | {of['most']:.0%} |"
            for figure, of in figures.items()
        ]
    lines += ["", f"Eight adapters over one ({found['machine']}, medians of {ROUNDS} alternations):", ""]
    lines += [
        "| base | the pass over 16 windows | with what weights give | with base, text and adapters loaded | "
        "the whole command | eight screened over one gated |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | "
        + " | ".join(f"{of[what]:.2f}" for what in ("pass", "weights", "whole", "command", "gate"))
        + " |"
        for name, of in found["cost"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the tables into the page."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.screening", description="A screen beside the gate."
    )
    parser.add_argument("--folder", type=Path, help="adapters, their base and preserved.txt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = measured(options.folder)
    print(json.dumps(found, indent=1))
    before, _, rest = PAGE.read_text("utf-8").partition(BEGINS)
    PAGE.write_text(f"{before}{BEGINS}{tables(found)}{ENDS}{rest.partition(ENDS)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
