"""How one value of an option is read: from what the user wrote to what it means, or one sentence on what it takes."""

import glob
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_nullspace.errors import NO_APPLE, OptionError, TextError, printable, quoted
from pytest_nullspace.settings import AUTO_MOST, STREAM, GivenText

if TYPE_CHECKING:
    from pytest_nullspace.judging.baseline import Limit
    from pytest_nullspace.judging.invariants import Override
    from pytest_nullspace.judging.served import Asked

_HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?"


REPORTS = (".md", ".html", ".prom", ".sarif")
"""How a report's file may end: Markdown, a page, OpenMetrics, SARIF."""


class Given(NamedTuple):
    """One value as the user wrote it, and where."""

    text: str
    folder: Path
    in_ini: bool


def text(given: Given) -> str:
    """What is not empty."""
    if not given.text.strip():
        raise OptionError("is empty")
    return given.text


def preserved(given: Given) -> GivenText:
    """A text that must survive, with its name if it has one."""
    from pytest_nullspace.text.sources import named

    try:
        name, spec = named(text(given), given.folder)
    except TextError as error:
        raise OptionError(str(error).partition(": ")[2]) from None
    return GivenText(text(given._replace(text=spec)), given.folder, name)


def path(given: Given) -> Path:
    """A path, relative to where it was given."""
    try:
        local = Path(text(given)).expanduser()
        (given.folder / local).exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, nobody's home
        raise OptionError(f"{quoted(given.text)} can be no path: {getattr(error, 'strerror', None) or error}") from None
    # Not resolved: pytest does not follow links in the paths of tests either.
    return Path(os.path.normpath(given.folder / local))


def model(given: Given) -> Path | str:
    """A checkpoint's directory, or its id on the hub."""
    local = path(given)
    if not local.exists() and any(sign in given.text for sign in "*?"):
        found = sorted(glob.glob(str(Path(given.text).expanduser()), root_dir=given.folder))  # noqa: PTH207 - may be absolute
        which = f"{len(found):,} match, such as {printable(found[0])}" if found else "nothing matches it"
        raise OptionError(
            f"{quoted(given.text)} is a pattern, and a path is taken as it stands (no shell replaces one behind '='); "
            f"give the option once for each directory: {which}"
        )
    return given.text if not local.exists() and re.fullmatch(_HUB_ID, given.text) else local


def directory_or_id(given: Given) -> str:
    """A path that is there, or whatever else it may name."""
    local = path(given)
    return str(local) if local.exists() else text(given)


def whole(least: int, most: float = math.inf) -> Callable[[Given], int]:
    """A whole number between two others."""

    def read(given: Given) -> int:
        try:
            value = int(given.text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            upto = f" to {most:,}" if value > most else ""
            raise OptionError(f"takes a whole number from {least}{upto}, not {quoted(given.text)}")
        return value

    return read


MOST_WINDOWS = 1_000_000


def calib_size(given: Given) -> tuple[int | None, int]:
    """How many windows, or None and how many at most."""
    kind, _, most = given.text.partition(":")
    if kind == "auto":
        return None, whole(2, MOST_WINDOWS)(given._replace(text=most)) if most else AUTO_MOST
    try:
        return whole(1, MOST_WINDOWS)(given), AUTO_MOST
    except OptionError:
        raise OptionError(
            f"takes a whole number from 1 to {MOST_WINDOWS:,}, auto or auto:MOST, not {quoted(given.text)}"
        ) from None


def batch_size(given: Given) -> int | None:
    """How many windows a forward; None for as many as suit the device."""
    if given.text == "auto":
        return None
    try:
        return whole(1, 1_000_000)(given)
    except OptionError:
        raise OptionError(f"takes a whole number from 1 to 1,000,000, or auto, not {quoted(given.text)}") from None


def one_of(*choices: str) -> Callable[[Given], str]:
    """One of a few words."""

    def read(given: Given) -> str:
        if given.text not in choices:
            raise OptionError(f"takes {', '.join(choices[:-1])} or {choices[-1]}, not {quoted(given.text)}")
        return given.text

    return read


def device(given: Given) -> str:
    """A device of torch, or ``auto``."""
    if not re.fullmatch(r"auto|cpu|(cuda|xpu)(:\d+)?", given.text):
        why = NO_APPLE if given.text.startswith("mps") else ""
        raise OptionError(f"takes auto, cpu, cuda, cuda:N, xpu or xpu:N, not {quoted(given.text)}{why}")
    return given.text


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def device_map(given: Given) -> dict[int | str, int] | str:
    """The bytes allowed by each device; empty for ``auto``; or ``stream``."""
    if given.text == STREAM:
        return STREAM
    if given.text == "auto":
        return {}
    allowed: dict[int | str, int] = {}
    for part in given.text.split(","):
        match = re.fullmatch(r"\s*(cpu|\d{1,3})\s*=\s*(\d{1,9})\s*([KMG]i?B)\s*", part)
        if match is None:
            raise OptionError(f"takes auto, stream, or sizes such as 0=20GiB,cpu=60GiB, not {quoted(given.text)}")
        device, size, unit = match.groups()
        allowed[device if device == "cpu" else int(device)] = int(size) * _UNITS[unit]
    return allowed


def truth(given: Given) -> bool:
    """True or false."""
    if given.text.lower() not in ("true", "false"):
        raise OptionError(f"takes true or false, not {quoted(given.text)}")
    return given.text.lower() == "true"


def auto_or_truth(given: Given) -> bool | None:
    """True or false; None for ``auto``."""
    if given.text.lower() == "auto":
        return None
    try:
        return truth(given)
    except OptionError:
        raise OptionError(f"takes auto, true or false, not {quoted(given.text)}") from None


def chat(given: Given) -> str:
    """How conversations are read, as a word, or true or false."""
    from pytest_nullspace.text.conversations import MODES, OFF, WHOLE

    said = {"true": WHOLE, "false": OFF}.get(given.text.lower(), given.text)
    return one_of(*MODES)(given._replace(text=said))


def report(given: Given) -> Path:
    """A file for a report, whose suffix says of which kind."""
    file = path(given)
    if file.suffix not in REPORTS:
        *most, last = REPORTS
        raise OptionError(f"takes a file that ends in {', '.join(most)} or {last}, not {quoted(given.text)}")
    return file


def override(given: Given) -> "Override":
    """Bounds of the user's own."""
    from pytest_nullspace.judging.invariants import Override

    form = "GLOB FIGURE PASS FAIL" if given.in_ini else "[GLOB:]FIGURE:PASS:FAIL"
    parts = given.text.split() if given.in_ini else given.text.split(":")
    if len(parts) == 3 and not given.in_ini:
        parts = ["*", *parts]
    try:
        layers, figure, passes, fails = parts
        bounds = float(passes), float(fails)
    except ValueError:
        raise OptionError(f"takes {form}, such as {form_example(given.in_ini)}, not {quoted(given.text)}") from None
    if not all(map(math.isfinite, bounds)):
        raise OptionError(f"takes finite bounds, not {quoted(given.text)}")
    return Override(layers, figure, *bounds)


def limit(given: Given) -> "Limit":
    """How much worse than before a figure may be, as a share or as a difference."""
    from pytest_nullspace.judging.baseline import Limit

    figure, _, amount = given.text.partition(":")
    try:
        value = float(amount.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise OptionError(f"takes FIGURE:5% or FIGURE:0.001, not {quoted(given.text)}")
    relative = amount.endswith("%")
    return Limit(figure, value / 100 if relative else value, relative)


def servers(given: Given) -> "tuple[Asked, ...]":
    """Servers that are to take the adapter."""
    from pytest_nullspace.judging.served import asked

    return asked(text(given))


def merged(given: Given) -> tuple[str, ...]:
    """The types in which a merge is to keep the update."""
    from pytest_nullspace.checkpoint.rounding import TYPES

    named = [name.strip() for name in text(given).split(",")]
    return tuple(dict.fromkeys(one_of(*TYPES)(given._replace(text=name)) for name in named))


def allowed(given: Given) -> str:
    """What two runs may differ in."""
    from pytest_nullspace.judging.comparable import COMPARED, UNRECORDED

    return one_of(*COMPARED, UNRECORDED)(given)


def form_example(in_ini: bool) -> str:
    """A threshold as one writes it in ini or on the command line."""
    return "* loss-rise 0.02 0.1" if in_ini else "loss-rise:0.02:0.1"
