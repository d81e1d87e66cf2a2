"""How a measurement tells how far it is: an estimate after the first window, rare lines, and what would help."""

from itertools import pairwise

import pytest

from pytest_nullspace.shell.progress import AT_MOST, BETWEEN_LINES, FIRST, NEARLY, Progress


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_estimate_is_of_the_windows_and_not_of_loading() -> None:
    """Loading took 20 s and a window 15 s: after the first of 9 windows some two minutes are left."""
    clock = Clock()
    progress = Progress(clock)
    assert progress.told(0, 0) == "nullspace: reading the text and loading the model"
    clock.now = 20.0
    assert progress.told(0, 9) == "nullspace: loaded in 20 s; 9 windows to read"
    clock.now = 35.0
    assert progress.told(1, 9) == "nullspace: window 1 of 9, about 2 min left"
    clock.now = 140.0
    assert progress.told(8, 9) == "nullspace: window 8 of 9, about 15 s left"
    assert progress.told(9, 9) == "nullspace: window 9 of 9"


def test_lines_are_rare_where_none_can_be_written_anew() -> None:
    """A run of ten seconds writes none; a long one ever fewer, and is never silent for more than some minutes."""
    clock = Clock()
    progress = Progress(clock)
    clock.now = FIRST - 0.1
    assert not progress.due()
    clock.now = FIRST
    assert progress.due()
    clock.now += BETWEEN_LINES - 0.1
    assert not progress.due()
    clock.now, seen = FIRST + BETWEEN_LINES, [FIRST]
    while clock.now < 3600:
        if progress.due():
            seen.append(clock.now)
        clock.now += 1
    between = [late - soon for soon, late in pairwise(seen)]
    assert between[:3] == [BETWEEN_LINES, 2 * BETWEEN_LINES, 4 * BETWEEN_LINES]
    assert between == sorted(between)
    assert between[-1] == AT_MOST


def test_in_a_log_a_long_load_is_told_and_an_end_that_is_near_is_not() -> None:
    """What loaded at once is not told; nor is a window with less than half a minute of others behind it."""
    clock = Clock()
    quick, slow = Progress(clock), Progress(clock)
    for progress, loaded in ((quick, FIRST - 1), (slow, 60.0)):
        clock.now = 0.0
        progress.told(0, 0)
        assert not progress.worth(0, 0)
        clock.now = loaded
        assert progress.told(0, 9) == f"nullspace: loaded in {loaded:.0f} s; 9 windows to read"
        assert progress.worth(0, 9) is (progress is slow)
    clock.now += BETWEEN_LINES
    assert slow.left(3, 9) > NEARLY
    assert slow.worth(3, 9)
    clock.now += AT_MOST
    assert not slow.worth(9, 9)


@pytest.mark.parametrize(
    ("threads", "seconds", "told"),
    [
        ("4", 1.0, "nullspace: OMP_NUM_THREADS=4 is more than the 2 cores there are"),
        ("2", 1.0, None),
        ("", 1.0, None),
        ("two", 100.0, "nullspace: fewer than 9 windows are read with --nullspace-calib-size=N"),
        (
            "1",
            100.0,
            "nullspace: OMP_NUM_THREADS=1 uses 1 of 2 cores\n"
            "nullspace: fewer than 9 windows are read with --nullspace-calib-size=N",
        ),
    ],
)
def test_what_would_help_is_told_once_where_it_matters(
    monkeypatch: pytest.MonkeyPatch, threads: str, seconds: float, told: str | None
) -> None:
    """More threads than cores, and a measurement beyond ten minutes, are told with what to set."""
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    clock = Clock()
    progress = Progress(clock, cores=2)
    progress.told(0, 9)
    assert progress.hint(0, 9) is None
    clock.now = seconds
    assert progress.hint(1, 9) == told
    assert progress.hint(2, 9) is None
