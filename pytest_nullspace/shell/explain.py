"""What a cause or a figure is and what to do: pages of ``docs/causes``, which the wheel brings along, and records."""

import re
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill

from pytest_nullspace.errors import OptionError, quoted
from pytest_nullspace.report.figure import page
from pytest_nullspace.run.figures import FIGURES
from pytest_nullspace.settings import PREFIX

WIDTH = 80
"""Of the lines of a figure's page."""
_PLACES = (Path(__file__).parents[1] / "causes", Path(__file__).parents[2] / "docs" / "causes")
"""Where the pages lie: as the wheel installs them, or in a checkout."""


def explain(name: str) -> str:
    """The page of the cause or figure ``name``, or the names of all with a line on each where it is empty.

    Raises:
        OptionError: There is no such page.
    """
    pages = _pages()
    if not name:
        width = max(map(len, (*pages, *FIGURES)))
        told = {name: _first_sentence(text) for name, text in pages.items()}
        causes = [_entry(name, sentence, width) for name, sentence in told.items()]
        figures = [_entry(figure.name, figure.meaning, width) for figure in FIGURES.values()]
        heads = "Mistakes that a report names as a cause:", "Figures, with their bounds:"
        read = f"Read one by: pytest {PREFIX}explain=NAME"
        return "\n".join([heads[0], "", *causes, "", heads[1], "", *figures, "", read, ""])
    pages |= {figure.name: page(figure) for figure in FIGURES.values()}
    if name not in pages:
        near = get_close_matches(name, pages, cutoff=0.5) or pages
        raise OptionError(f"{PREFIX}explain: no cause or figure is called {quoted(name)}; there is {', '.join(near)}")
    return _narrow(pages[name], joined=name not in FIGURES)


def _entry(name: str, sentence: str, width: int) -> str:
    """A line of the list, and what has no room in it below."""
    return fill(f"{name:<{width}}  {sentence}", WIDTH, subsequent_indent=" " * (width + 2), break_on_hyphens=False)


def _narrow(page: str, joined: bool) -> str:
    """A page as terminals show it: lines that fit, links by their words, examples as they are.

    Args:
        page: Markdown.
        joined: Whether lines that follow one another are one paragraph, as in a file, or sentences of their own.
    """
    shown = []
    for number, part in enumerate(page.split("```")):
        if number % 2 == 0:  # else between two fences
            part = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", part)
            part = re.sub(r"(?<=\S)\n(?=[^\s\-#|])", " ", part) if joined else part
            part = "\n".join(map(_wrapped, part.split("\n")))
        shown.append(part)
    return "```".join(shown)


def _wrapped(line: str) -> str:
    indent = "  " * line.startswith("- ")
    return fill(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _pages() -> dict[str, str]:
    folder = next(place for place in _PLACES if place.is_dir())
    return {file.stem: file.read_text("utf-8") for file in sorted(folder.glob("*.md"))}


def _first_sentence(page: str) -> str:
    """The first sentence of why it happens, which says what the mistake is."""
    _, _, why = page.partition("## Why it happens\n\n")
    first, _, _ = " ".join(why.split()).partition(". ")
    return f"{first.rstrip('.')}."
