"""What gating costs, measured and plotted: ``python -m tests.benchmarks.cost`` writes ``docs/cost.{json,png,md}``.

``… --draw`` only draws and writes anew what lies there. Seconds are CPU seconds of one thread, and ratios are medians
of alternated runs in one process, so that what else runs on the machine counts little. Needs matplotlib to draw.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.drift import Predictions
from pytest_nullspace.measuring.memory import keep_freed_memory
from pytest_nullspace.measuring.spectrum import spectrum
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model
from tests import tiny
from tests.benchmarks import startup
from tests.benchmarks.headers import sharded
from tests.benchmarks.reference import bare, cached, windows_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
WORLD = ROOT / "fixtures" / "world"
ROUNDS = 5
"""Alternations, unless told otherwise."""
Times = dict[str, float]


def model(folder: Path, *, width: int = 256, blocks: int = 4, rank: int = 16) -> AdaptedModel:
    """A random Llama under random adapters."""
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": blocks}
    llama = tiny.llama(**sizes, num_attention_heads=8, max_position_embeddings=2048)
    saved = tiny.lora_null(folder / f"{width}-{blocks}-{rank}", llama, rank=rank)
    return load_model(open_checkpoint(saved), torch.device("cpu"), torch.float32)


_rounds = ROUNDS


def alternated(works: Mapping[str, Callable[[], object]]) -> dict[str, Times]:
    """Each work's least CPU seconds, and the median of its ratios to the first."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(_rounds):
        for name, work in works.items():
            start = time.process_time()
            work()
            taken[name].append(time.process_time() - start)
    first = next(iter(taken.values()))
    return {
        name: {"seconds": min(times), "ratio": median(a / b for a, b in zip(times, first, strict=True))}
        for name, times in taken.items()
    }


def passes(adapted: AdaptedModel, rows: int, seqlen: int = 256) -> dict[str, Times]:
    """The pass beside the bare forward."""
    windows = windows_of(rows, seqlen)
    return alternated({"bare": lambda: bare(adapted, windows), "pass": lambda: measure(adapted, windows)})


def growth(folder: Path) -> dict[str, dict[str, dict[str, Times]]]:
    """The pass over rows, layers, width and rank, one of them changed at a time."""
    base = model(folder)
    return {
        "rows": {str(rows): passes(base, rows) for rows in (512, 1024, 2048, 4096)},
        "layers": {str(7 * blocks): passes(model(folder, blocks=blocks), 1024) for blocks in (1, 2, 4, 8, 16)},
        "width": {
            str(width): passes(model(folder, width=width, blocks=2), 1024) for width in (64, 128, 256, 512, 1024)
        },
        "rank": {str(rank): passes(model(folder, width=512, rank=rank, blocks=2), 1024) for rank in (4, 16, 64, 256)},
    }


def additions(folder: Path) -> dict[str, float]:
    """What comes on top, each over the bare forwards that it needs."""
    adapted = model(folder)
    windows, others = windows_of(2048, 256), windows_of(4096, 256)[8:]
    names = list(adapted.layers)
    told: list[float] = []

    def watched() -> None:
        start = time.process_time()
        at: list[float] = []
        measure(adapted, windows, progress=lambda *_: at.append(time.process_time()))
        told.append((time.process_time() - at[-1]) / (time.process_time() - start))

    def twice() -> None:
        measure(adapted, windows)
        measure(adapted, others)

    def both() -> None:
        with torch.inference_mode():
            for window in [*windows, *windows]:
                adapted.model(input_ids=torch.tensor([window]), use_cache=False)

    def moving() -> None:
        predictions = Predictions(lambda: nullcontext(adapted.model), len(windows), adapted.device)
        measure(adapted, windows, predictions=predictions)

    texts = alternated({"bare": lambda: bare(adapted, [*windows, *others]), "pass": twice})
    best = alternated({"bare": lambda: bare(adapted, windows), "pass": lambda: spectrum(adapted, windows, names)})
    moved = alternated({"bare": both, "pass": moving})
    beside = alternated({"alone": lambda: measure(adapted, windows), "pass": moving})
    for _ in range(_rounds):
        watched()
    return {
        "a second text, over the bare forward of both": texts["pass"]["ratio"],
        "means and margins after the last window, share of the pass": median(told),
        "`--nullspace-spectrum`, over one bare forward": best["pass"]["ratio"],
        "the pass with drift, over one forward of each model with its head": moved["pass"]["ratio"],
        "the pass with drift, over the pass alone": beside["pass"]["ratio"],
    }


def selecting(folder: Path) -> dict[str, float]:
    """The pass of the first of 16 blocks, and of the first 4, as shares of the whole."""
    adapted, windows = model(folder, blocks=16), windows_of(1024, 256)

    def of(blocks: int) -> Callable[[], object]:
        prefixes = tuple(f"model.layers.{i}." for i in range(blocks))
        names = [name for name in adapted.layers if name.startswith(prefixes)]
        return lambda: measure(adapted, windows, layers=names)

    found = alternated({"all": of(16), "1 of 16": of(1), "4 of 16": of(4)})
    return {name: times["ratio"] for name, times in found.items() if name != "all"}


def batches(folder: Path) -> dict[str, dict[str, float]]:
    """Windows a forward on a CPU: the pass over that of one window a forward."""
    small, middle = model(folder, width=96, blocks=3), model(folder, width=512, blocks=2)
    found = {}
    for name, adapted, seqlen, rows in (
        ("96 wide", small, 64, 1024), ("96 wide", small, 256, 2048), ("512 wide", middle, 64, 512),
        ("512 wide", middle, 256, 2048), ("512 wide", middle, 1024, 4096),
    ):  # fmt: skip
        windows = windows_of(rows, seqlen)
        works = {str(b): (lambda b=b: measure(adapted, windows, batch_size=b)) for b in (1, 2, 4, 8)}  # noqa: B023
        found[f"{name}, windows of {seqlen}"] = {b: times["ratio"] for b, times in alternated(works).items()}
    return found


def reference(folder: Path) -> dict[str, dict[str, float]]:
    """The reference's way beside ours at equal rows: CPU seconds here, peak memory in processes of their own."""
    adapted, found = model(folder, width=512, blocks=2), {}
    saved = folder / "512-2-16"
    for rows in (1024, 4096, 16384):
        windows = windows_of(rows)
        works = {"cached": lambda: cached(adapted, windows), "streaming": lambda: measure(adapted, windows)}  # noqa: B023
        times = alternated(works)
        found[str(rows)] = {"time": times["streaming"]["ratio"]} | {
            way: float(_output("-m", "tests.benchmarks.reference", way, str(saved), str(rows)))
            for way in ("cached", "streaming", "bare")
        }
    return found


def _output(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


def _cpu_seconds(*arguments: str, cwd: Path = ROOT) -> float:
    """CPU seconds of a fresh interpreter."""
    # As where it is installed: what it imports was compiled before.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False, cwd=cwd, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start_up(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Where the seconds go from the command to the first window."""
    return startup.start_up(folder, _rounds)


OPENING = """
import sys, time
from pathlib import Path
from pytest_nullspace.checkpoint import open_checkpoint
start = time.process_time()
open_checkpoint(Path(sys.argv[1]))
print(time.process_time() - start)
"""


def shell(folder: Path) -> dict[str, float]:
    """What the plugin adds where nothing is gated, and what 10,000 layers cost to read and collect, in CPU seconds."""
    (folder / "plain").mkdir()
    (folder / "plain" / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    plain = ("-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "plain")
    pairs = [
        (_cpu_seconds(*plain, "-p", "no:nullspace", cwd=folder), _cpu_seconds(*plain, cwd=folder))
        for _ in range(4 * _rounds + 1)
    ]
    many, collect = sharded(folder / "many", 10_000), (*plain, "--co")
    opened = float(_output("-c", OPENING, str(many)))
    collected = median(
        _cpu_seconds(*collect, f"--nullspace-model={many}", cwd=folder) - _cpu_seconds(*collect, cwd=folder)
        for _ in range(_rounds)
    )
    unused = median(after - before for before, after in pairs)
    return {"unused plugin": unused, "10,000 layers read": opened, "10,000 layers read and collected": collected}


PARTS: Mapping[str, Callable[[Path], object]] = {
    "growth": growth,
    "additions": additions,
    "selecting": selecting,
    "batches": batches,
    "reference": reference,
    "start-up": start_up,
    "shell": shell,
}


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Growth in four panels, the reference's way in two."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    fig, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (what, of) in zip(axes.flat, found["growth"].items(), strict=False):
        x = [int(value) for value in of]
        for name, label in (("bare", "bare forward"), ("pass", "our pass")):
            axis.plot(x, [times[name]["seconds"] for times in of.values()], "o-", label=label)
        for at, times in zip(x, of.values(), strict=True):
            place = (at, times["pass"]["seconds"])
            axis.annotate(f"{times['pass']['ratio']:.2f}×", place, (0, 7), textcoords="offset points", ha="center")
        axis.set(xscale="log", yscale="log", xlabel=what, title=f"pass and bare forward by {what}")
        axis.margins(x=0.1, y=0.2)
        axis.set_xticks(x, [str(value) for value in x])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set(ylabel="CPU seconds")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    x = [int(rows) for rows in found["reference"]]
    memory, parts = axes.flat[4], axes.flat[5]
    labels = {"cached": "the reference's way", "streaming": "our pass", "bare": "bare forward"}
    for way, label in labels.items():
        memory.plot(x, [of[way] for of in found["reference"].values()], "o-", label=label)
    memory.set(xscale="log", ylim=(0, None), xlabel="rows", ylabel="MiB", title="peak memory of the process")
    memory.set_xticks(x, [str(value) for value in x])
    memory.minorticks_off()
    memory.grid(alpha=0.3)
    memory.legend(fontsize=9)
    start = next(iter(found["start-up"].values()))["parts"]
    parts.barh(list(start)[::-1], list(start.values())[::-1])
    parts.set(xlabel="CPU seconds", title="the shipped world, to the first window")
    parts.grid(alpha=0.3, axis="x")
    fig.savefig(file, dpi=70)
    plt.close(fig)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, the first column left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(found: Mapping[str, Any]) -> str:
    """The page, its figures filled in."""
    grown = [
        [what, ", ".join(of), ", ".join(f"{times['pass']['ratio']:.2f}" for times in of.values())]
        for what, of in found["growth"].items()
    ]
    against = [
        [
            f"{int(rows):,}",
            f"{of['time']:.2f}",
            *(f"{of[way]:,.0f}" for way in ("cached", "streaming", "bare")),
            f"{of['streaming'] / of['cached']:.2f}",
        ]
        for rows, of in found["reference"].items()
    ]
    start = found["start-up"]
    first = next(iter(start.values()))
    return PAGE.format(
        machine=found["machine"],
        growth=table(["grows", "to", "pass ÷ bare forward"], grown),
        reference=table(
            [
                "rows",
                "time ÷ reference's",
                "reference's way, MiB",
                "our pass, MiB",
                "bare, MiB",
                "memory ÷ reference's",
            ],
            against,
        ),
        additions=table(["addition", "ratio"], [[what, f"{value:.3g}"] for what, value in found["additions"].items()]),
        selecting=table(
            ["blocks selected", "share of the pass"], [[k, f"{v:.1%}"] for k, v in found["selecting"].items()]
        ),
        batches=table(
            ["model", "1", "2", "4", "8"],
            [[name, *(f"{ratio:.2f}" for ratio in of.values())] for name, of in found["batches"].items()],
        ),
        start=table(
            ["CPU seconds", *start],
            [[part, *(f"{of['parts'][part]:.2f}" for of in start.values())] for part in first["parts"]],
        ),
        packages=table(
            ["share of all imports", *start],
            [
                [package, *(f"{of['packages'][package] / sum(of['packages'].values()):.0%}" for of in start.values())]
                for package in first["packages"]
            ],
        ),
        unused=1000 * found["shell"]["unused plugin"],
        opened=found["shell"]["10,000 layers read"],
        collected=found["shell"]["10,000 layers read and collected"],
    )


PAGE = """# What a gate costs

The physical limit is the bare forward of the decoder over the windows, and one read of the weights. This page holds
the pass against it. It is written by `python -m tests.benchmarks.cost`, which needs matplotlib
({machine}). Ratios are medians of alternated runs in one process, in CPU seconds
of one thread; of absolute seconds only the shape means anything.

![pass and bare forward by rows, layers, width and rank; peak memory; start-up](cost.png)

## Rows, layers, width, rank

{growth}

The models are random Llamas of 4 blocks 256 wide under rank 16, or 2 blocks where width and rank change (512 wide),
with one of the four changed at a time. What the hooks add is a fixed number of small operations a layer and a window,
so the narrower the model the more it shows; a real one is wider than any of these. The cost is linear in rows and
layers. A rank costs two `r × r` products a row, and once a run a decomposition of `B Bᵀ` and of `A`, which at rank
256 is most of what is added to so few rows.

## A real model

SmolLM2-135M, all 210 layers under rank 32, 16 windows of 1,024 tokens, on two cores (`tests/benchmarks/test_real.py`
says how to run it; medians of five alternations):

| | pass ÷ bare forward | bare, s a window |
| --- | ---: | ---: |
| float32 | 1.05 | 1.65 |
| bfloat16 | 1.16 | 0.70 |

Of float32's 80 ms a window 33 are norms of wide activations, 10 two `r × r` products a layer, and the others twenty
small operations a layer, which in the midst of a forward take three times what they take in a loop. In bfloat16 the
norms are 85 ms, most of it their conversion to float32. Decompositions take 0.1 s a run.

A pass holds 0.89 GiB at its peak over 2 windows and 0.91 GiB over 8, as the bare forward does. The wider the model the
less of it is norms: they grow with the width, products with its square.

## Against the reference's way

The reference keeps every layer's input rows and multiplies them afterwards. The baseline
(`tests/benchmarks/reference.py`) does this as cheaply as it can be done: layers that share an input keep it once,
and outputs are not kept.

{reference}

Our memory is that of the bare forward, whatever the number of rows; the reference's grows with it.

## What comes on top

{additions}

The adapted predictions are those of the forward that is measured, so drift costs the head and one forward of the base;
the report's line of seconds tells how many of the pass went on it.

Leakage, its whitening and the margins are part of every figure above: there is no pass without them.

## Selecting

The pass ends after the last block that holds a selected layer, so `-k layers.0.` costs about its share of 16 blocks,
and the short forward that finds out where it may end:

{selecting}

## Batches

Windows a forward on a CPU, the pass over that of one window a forward:

{batches}

Up to about 256 tokens a forward a CPU spends its time between the matrix products; beyond them a model 512 wide gains
5 % at most, and more memory is needed. So `--nullspace-batch-size=auto` puts windows together up to 256 tokens on a
CPU, and never two of the usual 2,048. On a GPU it takes 16,384 tokens, as in the table of the next section; other
numbers were not tried there. It takes half whenever the device has no memory for so many; the report says so, and the
figures are the same.

## On a card

One NVIDIA H200, torch 2.11, Triton 3.6: random weights of Llama-2-7B's shape in bfloat16, rank 128 on all 224 linear
layers, windows of 2,048 tokens, 8 a forward (`python -m tests.gpu.table`; medians of three, of PEFT at 32 windows one):

| | bare decoder, s | pass, s | pass ÷ bare | of it before the first window, s |
| --- | ---: | ---: | ---: | ---: |
| LoRA-Null, 32 windows | 2.30 | 2.47 | 1.09 | 0.04 |
| LoRA-Null, 4 windows | 0.29 | 0.41 | 1.43 | 0.04 |
| PEFT, 32 windows | 4.11 | 3.86 | 0.94 | 0.08 |

Beside the bare decoder's 15.03 GiB the pass holds 15.24 GiB. Under PEFT's own layers, whose matrices are in float32
there, the pass is quicker than the decoder alone: it adds update and base in one read and write, where PEFT takes four.

The floor is one read of each distinct input, 1.2 % of this forward: the norms of base and output are taken by the very
addition that makes the output. A kernel for Triton that takes the norms of rows reads as many bytes a second as a copy
reads and writes, or more (share of a copy's bandwidth; torch's own in brackets):

| columns | 576 | 4,096 | 11,008 | 14,336 |
| --- | ---: | ---: | ---: | ---: |
| bfloat16 | 0.77 | 1.07 (0.82) | 1.07 (0.59) | 1.06 (0.66) |
| float32 | 0.96 | 1.10 | 1.08 | 1.09 |

Where Triton is missing, or finds no compiler, plain torch does the same. Of what the pass adds over 32 windows 0.04 s
come before the first and 0.14 s in the hooks and at the end, where Python makes the records; over 4 windows 0.04 s and
0.09 s. LoRA-Null layers and plain linear LoRA layers take this road. Those with a bias of the base's own, a magnitude
(DoRA) or a start that is taken out of the base have their norms taken of what their parts gave, by the same kernel.

## Start-up

From the command to the first window of the pass, in CPU seconds of a process without pytest's other plugins
(`NULLSPACE_REAL_LORA=DIR python -m tests.benchmarks.cost --only start-up`). "Factors" is what the pass does before its
first window:

{start}

Nearly all of it are imports, and these are torch's and transformers':

{packages}

While they are imported Python's collector of cycles is off: torch and transformers make a million objects that stay,
and looking through them again and again was a quarter of it (3.0 s against 2.3 s here). Until the pass has ended they
are set aside, or each would be looked through thrice more: to the first window it was 2.39 and 3.62 s without that, on
the same day. What the run does not need is not imported: `datasets`, `pyarrow` and `pandas` for a text file, `peft` for
a LoRA-Null directory, which `tests/plugin/test_start_up.py` holds. What transformers imports by itself where it is
installed cannot be left out without telling the rest of the process that it is not there, and your own tests may run in
it: `accelerate`, Pillow, scipy, torchvision, torchaudio and soundfile, and the half of torch that compiles
(`torch._dynamo`, `torch.distributed.tensor`, sympy).

The text is read before, so that what is wrong with it is told at once; weights of the asked precision are mapped from
their file and not copied; no random number is drawn for a weight that comes from a file. Weights and base are
hashed by a thread, from when the text was read until the last window; `-vv` tells how long the end waited for it.

Where nothing is gated the plugin adds {unused:.0f} ms to pytest. The headers of a sharded checkpoint of 10,000
layers are read and checked in {opened:.2f} s; with their collection and the printing of their ids pytest takes
{collected:.2f} s longer.

## Tracking

`tox -e bench` runs the benchmarks, and fails where a *ratio* (pass over bare forward, pass over the reference's
way, share of copy bandwidth) is worse than in `tests/benchmarks/baseline.json`, on a device of the same name, by more
than a quarter; absolute times are shown and never judged. In CI:

<!-- not run: takes minutes of an idle machine; prints each ratio beside its baseline -->
```yaml
- run: pip install tox && tox -e bench
```

A change that is meant to cost is accepted by writing the baseline anew on the same kind of machine:

<!-- not run: takes minutes of an idle machine; prints pytest-benchmark's table -->
```sh
pytest tests/benchmarks -o addopts= --benchmark-only -p no:randomly --benchmark-json=run.json
python -m tests.benchmarks.track run.json --write
```

On a machine with a card this is the first thing to run. In less than six minutes it runs the tests of the card and the
benchmarks on it, and prints the pass beside the bare decoder for random weights of Llama-2-7B's shape: seconds, what
comes before the first window, peak memory, and what is launched and waited for. `--device=cpu --small` runs the same
without a card.

<!-- not run: takes minutes of a card; prints the outcome of each step -->
```sh
python -m tests.gpu
```
"""


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cost", description="What gating costs.")
    parser.add_argument("--draw", action="store_true", help="only draw and write what was measured before")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part anew; repeatable")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="alternations (default %(default)s)")
    options = parser.parse_args()
    global _rounds
    _rounds = options.rounds
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a gate, for all that is compared
    file = DOCS / "cost.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for part, of in PARTS.items():
        if not options.draw and part in (options.only or PARTS):
            with TemporaryDirectory() as folder:
                found[part] = of(Path(folder))
            found["machine"] = f"{platform.machine()}, torch {torch.__version__}, {_rounds} alternations"
            print(part, json.dumps(found[part]), flush=True)
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, DOCS / "cost.png")
    (DOCS / "cost.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
