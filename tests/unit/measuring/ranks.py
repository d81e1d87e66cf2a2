"""What the test of several processes starts in each: meeting after meeting, and what each gave."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any

import torch

from pytest_nullspace.errors import NullspaceError, TextError
from pytest_nullspace.measuring import distributed
from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.settings import STREAM

ME = Ranks.of(os.environ)


def added() -> Any:
    """Seven windows, each summed by the one process that reads it."""
    windows = range(3, 10)
    sums = torch.zeros(7, dtype=torch.float64)
    for window in ME.share(windows):
        sums[window - 3] = window + 0.1
    ME.add("sums", windows, ME.share(windows), sums)
    return sums.tolist()


def more_processes_than_windows() -> Any:
    """One window for all."""
    sums = torch.full((1,), float(len(ME.share(range(1)))))
    ME.add("sums", range(1), ME.share(range(1)), sums)
    return sums.tolist()


def told() -> Any:
    """Each process tells what it found, also tensors."""
    return [rows.tolist() for rows in ME.told("rows", torch.full((ME.rank,), 0.5))]


def window_lost() -> Any:
    """The last process reads one window fewer than its share."""
    ME.add("sums", range(6), ME.share(range(6))[: 1 if ME.rank == ME.size - 1 else None], torch.zeros(6))


def window_twice() -> Any:
    """Every process reads all."""
    ME.add("sums", range(6), range(6), torch.zeros(6))


def elsewhere() -> Any:
    """The last process sums another text."""
    windows = range(ME.size if ME.rank < ME.size - 1 else 2 * ME.size)
    ME.add("sums", windows, ME.share(windows), torch.zeros(len(windows)))


def other_files() -> Any:
    """The last process read another file."""
    ME.agree({"text": 1, "weights": ME.rank == ME.size - 1})


def error() -> Any:
    """The last process fails while the others go on."""
    with ME.joined():
        if ME.rank == ME.size - 1:
            raise TextError("facts.txt: is empty")
        ME.add("sums", range(ME.size), ME.share(range(ME.size)), torch.zeros(1))


def sinks() -> Any:
    """Windows in which rows outweigh all others, most of them those of the last process."""
    from pytest_nullspace.measuring.streaming import measure
    from tests.unit.measuring.test_sinks import WINDOWS, load_sinks

    with TemporaryDirectory() as folder:
        found = measure(load_sinks(Path(folder)), WINDOWS, ranks=ME)
    return {layer.name: astuple(layer.without_sinks) for layer in found if layer.without_sinks is not None}


def streamed() -> Any:
    """A model whose blocks each process reads for its own windows."""
    from tests import tiny
    from tests.unit.measuring.conftest import figures, measure, write_texts

    with TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = name
        write_texts(folder)
        run = measure(folder, tiny.lora_null(folder / "ft"), calib_size=3, batch_size=1, device_map=STREAM, ranks=ME)
    return figures(run), run.about["model"]["remarks"]


def killed() -> Any:
    """The last process is killed while the others wait for it."""
    if ME.rank == ME.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    added()


def hangs() -> Any:
    """The last process neither answers nor dies."""
    if ME.rank == ME.size - 1:
        sleep(6)
    added()


def outcome(of: Callable[[], Any]) -> Any:
    """What the meeting gave, or its message."""
    try:
        return of()
    except NullspaceError as error:
        return str(error)


if __name__ == "__main__":
    distributed.TIMEOUT = timedelta(
        seconds=60 if {"sinks", "streamed"} & set(sys.argv) else 3
    )  # those who meet there load a model first
    with ME.joined():
        for name in sys.argv[1:]:
            print(json.dumps({name: outcome(globals()[name])}), flush=True)
