"""What a cause or a figure is and what to do: pages of ``docs/causes``, which the wheel brings along, and records."""

from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap

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
        causes = [f"{cause:<{width}}  {_first_sentence(text)}" for cause, text in pages.items()]
        figures = [f"{figure.name:<{width}}  {figure.meaning}" for figure in FIGURES.values()]
        heads = "Mistakes that a report names as a cause:", "Figures, with their bounds:"
        read = f"Read one by: pytest {PREFIX}explain=NAME"
        return "\n".join([heads[0], "", *causes, "", heads[1], "", *figures, "", read, ""])
    pages |= {figure.name: _narrow(page(figure)) for figure in FIGURES.values()}
    if name not in pages:
        near = get_close_matches(name, pages, cutoff=0.5) or pages
        raise OptionError(f"{PREFIX}explain: no cause or figure is called {quoted(name)}; there is {', '.join(near)}")
    return pages[name]


def _narrow(page: str) -> str:
    """A page as terminals show it."""
    lines = (wrap(line, WIDTH, subsequent_indent="  " * line.startswith("- ")) or [""] for line in page.splitlines())
    return "\n".join(part for parts in lines for part in parts) + "\n"


def _pages() -> dict[str, str]:
    folder = next(place for place in _PLACES if place.is_dir())
    return {file.stem: file.read_text("utf-8") for file in sorted(folder.glob("*.md"))}


def _first_sentence(page: str) -> str:
    """The first sentence of why it happens, which says what the mistake is."""
    _, _, why = page.partition("## Why it happens\n\n")
    first, _, _ = " ".join(why.split()).partition(". ")
    return f"{first.rstrip('.')}."
