"""Where processes meet: sums that are whole, and one clear message wherever they cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from pytest_nullspace.errors import MeasurementError, OptionError
from pytest_nullspace.measuring.distributed import ALONE, Ranks

ROOT = Path(__file__).parents[3]
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


def meet(size: int, port: int, *meetings: str) -> tuple[list[int], list[dict[str, Any]]]:
    """The exit code of each of ``size`` processes, and what each of them got from each meeting."""
    command = [sys.executable, "-m", "tests.unit.measuring.ranks", *meetings]
    address = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | address | {"RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(size)
    ]
    told = [process.communicate(timeout=300)[0].decode().splitlines() for process in processes]
    outcomes = [{name: of for line in lines for name, of in json.loads(line).items()} for lines in told]
    return [process.returncode for process in processes], outcomes


def test_shares_are_disjoint_even_and_whole() -> None:
    """Every window is read by exactly one process, and no process reads two more than another."""
    for size in (1, 2, 3, 7):
        for windows in (range(0), range(1), range(16, 32), range(5, 22)):
            shares = [Ranks(rank, size).share(windows) for rank in range(size)]
            assert [window for share in shares for window in share] == list(windows)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_is_added_is_whole_or_an_error_of_all() -> None:
    """Three processes get the same sums, or the same message: a window lost or twice, another text, file or error."""
    codes, outcomes = meet(
        3, 29721,
        "added", "more_processes_than_windows", "told", "window_lost", "window_twice", "elsewhere", "other_files",
        "error",
    )  # fmt: skip
    assert codes == [0, 0, 0]
    assert outcomes[2].pop("error") == "facts.txt: is empty"
    heard = outcomes[0].copy()
    assert outcomes[1] == heard
    assert outcomes[2] == {name: of for name, of in heard.items() if name != "error"}
    assert heard == {
        "added": [window + 0.1 for window in range(3, 10)],
        "more_processes_than_windows": [1.0],
        "told": [[], [0.5], [0.5, 0.5]],
        "window_lost": "sums: 5 windows were read, not the 6 that were asked for",
        "window_twice": "sums: 18 windows were read, not the 6 that were asked for",
        "elsewhere": "process 2 is at 'sums, (6,)', process 0 at 'sums, (3,)': each must measure the same in the same "
        "order; give all of them the same options, and -p no:randomly",
        "other_files": "process 2 did not measure what process 0 did, for weights differ; give all of them the same "
        "options and files",
        "error": "process 2 of 3 failed, so the others ended as well: facts.txt: is empty",
    }


@pytest.mark.parametrize(("how", "port"), [("killed", 29722), ("hangs", 29723)])
def test_a_process_that_is_lost_ends_the_wait_of_the_others(how: str, port: int) -> None:
    """No process waits for ever for one that was killed or hangs; it says what happened."""
    started = monotonic()
    codes, outcomes = meet(2, port, how)
    assert monotonic() - started < 40
    assert codes[0] == 0
    assert (codes[1] == -9) == (how == "killed")
    assert outcomes[0][how].startswith("another process died, perhaps out of memory, or did not answer for 0:00:03: ")


def test_the_processes_are_those_that_the_launcher_says() -> None:
    """The environment of torchrun is read; one process needs none of it, and half of it or nonsense is refused."""
    assert Ranks.of(LAUNCHED) == Ranks(1, 4, 0)
    assert Ranks.of({}) == Ranks.of({"WORLD_SIZE": "1", "RANK": "0"}) == ALONE
    for changed, told in {
        ("RANK", ""): "WORLD_SIZE is 4, but RANK is not set; start the processes by torchrun, or unset WORLD_SIZE",
        ("RANK", "4"): "RANK is 4, but WORLD_SIZE is 4; start the processes by torchrun",
        ("WORLD_SIZE", "x"): "the environment's WORLD_SIZE must be a whole number, not 'x'; unset it",
    }.items():
        with pytest.raises(OptionError) as error:
            Ranks.of(LAUNCHED | dict([changed]))
        assert str(error.value) == told


def test_alone_a_window_that_was_not_read_is_an_error_too() -> None:
    """Without other processes sums are held to be of every window as well."""
    with pytest.raises(MeasurementError, match="sums: 2 windows were read, not the 3 that were asked for"):
        ALONE.add("sums", range(3), [0, 2])


def test_nobody_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that never come are an error that names where they were awaited."""
    code = (
        "import os; from datetime import timedelta; from pytest_nullspace.measuring import distributed as d\n"
        "d.TIMEOUT = timedelta(seconds=1)\n"
        "try:\n    d._join()\nexcept d.MeasurementError as e: print(e)"
    )
    environment = os.environ | LAUNCHED | {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29724"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("the processes cannot meet at 127.0.0.1:29724 (MASTER_ADDR, MASTER_PORT): ")
