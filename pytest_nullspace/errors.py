"""Every error that a user of pytest-nullspace can meet.

    NullspaceError                  anything that is the user's to mend: one sentence, no traceback
    ├── CheckpointError             the adapter's directory: what lies in it, what is missing, what does not fit
    ├── TextError (ValueError)      the calibration text: not found, too short, no such column
    ├── OptionError (ValueError)    an option or ini value that cannot be taken
    ├── StatsError                  a saved statistics file that cannot be read or trusted
    └── MeasurementError            the pass itself: non-finite, interrupted, lost, incomplete

Each message says what is wrong, where, and what to do. Warnings are `NullspaceWarning`. Whatever a message quotes, be
it a stranger's tensor name or the name of a file, no control character of it reaches a terminal.
"""

from collections.abc import Iterable

NO_APPLE = ": an Apple GPU has no float64, in which sums are taken; choose cpu"
"""What is added where ``mps`` is refused as a device."""

PREFIX = "--nullspace-"
"""Of every option that a message names."""


def escaped(text: str) -> str:
    """``text`` with everything but plain printable characters and ends of lines escaped."""
    if text.isprintable():  # nearly always, and a checkpoint has tens of thousands of names
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def printable(text: object, limit: int = 120) -> str:
    """``text`` as one line of at most ``limit`` plain printable characters, for what a stranger wrote."""
    shown = escaped(str(text)[: limit + 1]).replace("\n", "\\n")
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def quoted(text: object, limit: int = 120) -> str:
    """`printable` in quotes."""
    return f"'{printable(text, limit)}'"


def some(names: Iterable[object], shown: int = 2) -> str:
    """The first of ``names``, and how many they are where that is more."""
    listed = [printable(name) for name in names]
    return ", ".join(listed[:shown]) + (f" … ({len(listed)} in all)" if len(listed) > shown else "")


def twice(pairs: Iterable[tuple[str, object]]) -> str | None:
    """The first key of the pairs of an object that stands there twice, of which readers take one value or the other."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None


def first_line(error: BaseException) -> str:
    """What an exception of another library says, short enough to stand within a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0].rstrip(".: "), limit=300)


class NullspaceError(Exception):
    """Something the user can mend; the message stands alone, without a traceback."""

    def __str__(self) -> str:
        """The message, in plain printable characters."""
        return escaped(super().__str__())


class CheckpointError(NullspaceError):
    """The checkpoint cannot be read, is no adapter, or does not hold together."""


class TextError(NullspaceError, ValueError):
    """The calibration text cannot be had or cannot be cut into windows."""


class OptionError(NullspaceError, ValueError):
    """An option has a value that it does not take."""


class StatsError(NullspaceError):
    """A saved statistics file is unreadable, of another schema, or contradicts itself."""


class MeasurementError(NullspaceError):
    """The measurement did not produce figures that can be judged."""


class NullspaceWarning(UserWarning):
    """A figure lies in its warn tier; turn into a failure with ``-W error::pytest_nullspace.NullspaceWarning``."""
