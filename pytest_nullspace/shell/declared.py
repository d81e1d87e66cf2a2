"""The table of options told to pytest: each on the command line, and as a key of the ini file."""

from typing import TYPE_CHECKING, Literal

from pytest_nullspace.settings import PREFIX
from pytest_nullspace.shell.options import OPTIONS

if TYPE_CHECKING:
    import pytest


def add_options(parser: "pytest.Parser") -> None:
    """Declare every option and its ini twin to pytest."""
    group = parser.getgroup("nullspace", "gate a trained adapter (pytest-nullspace)")
    for option in OPTIONS:
        default = f" (default {option.default})" if isinstance(option.default, str | int) and not option.switch else ""
        text = option.help + default
        shown = text.replace("%", "%%")  # argparse formats the help of options, pytest prints that of ini keys as it is
        if option.switch:
            group.addoption(option.flag, dest=option.dest, action="store_const", const="true", default=None, help=shown)
            if option.off:
                off, told = PREFIX + option.off, f"Leave out what {option.flag} demands."
                group.addoption(off, dest=option.dest, action="store_const", const="false", default=None, help=told)
        else:
            group.addoption(
                option.flag,
                dest=option.dest,
                metavar=option.metavar,
                action="append" if option.repeatable else "store",
                default=None,
                help=shown,
                **({} if option.bare is None else {"nargs": "?", "const": option.bare}),
            )
        kind: Literal["linelist", "string"] = "linelist" if option.repeatable else "string"
        parser.addini(option.dest, text, type=kind, default=None)
    group.addoption(
        f"{PREFIX}explain",
        nargs="?",
        const="",
        metavar="NAME",
        help="Print what a cause or a figure that a report names means and what to do, or the list of all, and end.",
    )
