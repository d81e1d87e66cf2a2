"""The tables that documents take from the code; ``python -m tests.generated`` writes them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from pytest_nullspace.judging.served import SERVERS
from pytest_nullspace.judging.servers import Rule, rules_of
from pytest_nullspace.judging.serving import versions
from pytest_nullspace.report.figure import in_averages, ranges, section
from pytest_nullspace.run.figures import FIGURES, Figure
from pytest_nullspace.settings import PREFIX
from pytest_nullspace.shell.options import OPTIONS, Option

ROOT = Path(__file__).parents[1]


def options() -> str:
    """Every option: how it is written, its default, and what it does."""
    rows = (f"| {_written(option)} | {_default(option)} | {_told(option)} |" for option in OPTIONS)
    return "\n".join(["| option | default | what it does |", "| --- | --- | --- |", *rows])


FIRST = (
    "model", "base", "calib-dataset", "task-dataset", "drift", "init", "calib-size", "threshold", "save-stats", "stats",
    "require",
)  # fmt: skip
"""The options that one needs first."""


def first_options() -> str:
    """Those that one needs first, each with what its help says."""
    known = {option.name: option for option in OPTIONS}
    rows = (f"| {_written(known[name])} | {known[name].help.replace('|', chr(92) + '|')} |" for name in FIRST)
    return "\n".join(["| option | what it does |", "| --- | --- |", *rows])


def _written(option: Option) -> str:
    value = f"={option.metavar}" if option.metavar else ""
    off = f", `{PREFIX}{option.off}`" if option.off else ""
    return f"`{option.flag}{value}`{off}" + (", repeatable" if option.repeatable else "")


def _default(option: Option) -> str:
    if option.switch:
        return "auto" if option.off else "off"
    return f"`{option.default}`" if isinstance(option.default, str | int) else "–"


def _told(option: Option) -> str:
    return " ".join(filter(None, (option.help, option.more))).replace("|", "\\|")


def figures() -> str:
    """Every figure: its formula, and where it passes, warns and fails after training."""
    rows = (
        f"| `{figure.name}` | {_when(figure)}{figure.formula} | {' | '.join(_bounds(figure))} |"
        for figure in FIGURES.values()
    )
    return "\n".join(["| figure | what it is | passes | warns | fails |", "| --- | --- | --- | --- | --- |", *rows])


def _bounds(figure: Figure) -> tuple[str, str, str]:
    """Where it passes, warns and fails, by profiles that have bounds of their own as well."""
    passes, warns, fails = ranges(figure.trained)
    if (alone := in_averages(figure)) is None:
        return passes, warns, fails
    profiles, (other, worse) = alone
    return f"{passes}; by {profiles}, in the averages, {other}", warns, f"{fails}; by those {worse}"


def _when(figure: Figure) -> str:
    """What it is judged beside."""
    needs = {"drift": figure.of_predictions, "a task text": figure.needs_task}
    needed = " and ".join(name for name, is_needed in needs.items() if is_needed)
    return f"with {needed}: " if needed else ""


def figure_pages() -> str:
    """Every figure: a section each, with what its tiers mean."""
    return "\n\n".join(section(figure) for figure in FIGURES.values())


def servers() -> str:
    """Every rule of every server, with its source."""
    return "\n\n".join(map(_server, SERVERS))


def _held(rule: Rule) -> str:
    """For which versions a rule holds, where it does not for all."""
    if rule.until:
        return f" (up to {rule.until})"
    return f" (since {rule.since})" if rule.since else ""


def _server(server: str) -> str:
    rows = [
        f"| {rule.name} | {rule.says}{_held(rule)} | "
        f"{'held' if rule.check is not None else 'taken as it is'} | {rule.source}; {versions(rule)} |"
        for rule in rules_of(server)
    ]
    settings = ", ".join(f"`--{name}`" for name in SERVERS[server])
    told = [f"Its settings that may be told: {settings}.", ""] if settings else []
    table = ["| rule | what the server says or does | here | source |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([f"## {server}", "", *told, *table])


TABLES: Mapping[str, Callable[[], str]] = {
    "options": options,
    "first options": first_options,
    "figures": figures,
    "figure pages": figure_pages,
    "servers": servers,
}
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
