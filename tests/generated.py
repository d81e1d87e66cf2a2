"""The tables that documents take from the code; ``python -m tests.generated`` writes them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from pytest_nullspace.shell.options import OPTIONS, Option

ROOT = Path(__file__).parents[1]


def options() -> str:
    """Every option: how it is written, its default, and what it does."""
    rows = (f"| {_written(option)} | {_default(option)} | {_told(option)} |" for option in OPTIONS)
    return "\n".join(["| option | default | what it does |", "| --- | --- | --- |", *rows])


def _written(option: Option) -> str:
    value = f"={option.metavar}" if option.metavar else ""
    return f"`{option.flag}{value}`" + (", repeatable" if option.repeatable else "")


def _default(option: Option) -> str:
    if option.switch:
        return "off"
    return f"`{option.default}`" if isinstance(option.default, str | int) else "–"


def _told(option: Option) -> str:
    return " ".join(filter(None, (option.help, option.more))).replace("|", "\\|")


TABLES: Mapping[str, Callable[[], str]] = {"options": options}
"""Each table by the name that its place in a document has."""


def renewed(text: str) -> str:
    """A document with every table as the code has it now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}, written by python -m tests.generated -->", f"<!-- end of {name} -->"
        whole = f"{begin}\n\n{table()}\n\n{end}".replace("\\", r"\\")
        text = re.sub(rf"{re.escape(begin)}.*?{re.escape(end)}", whole, text, flags=re.DOTALL)
    return text


def documents() -> list[Path]:
    """The documents that hold such a table."""
    return [file for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if "tests.generated -->" in file.read_text()]


if __name__ == "__main__":
    for document in documents():
        document.write_text(renewed(document.read_text("utf-8")), "utf-8")
