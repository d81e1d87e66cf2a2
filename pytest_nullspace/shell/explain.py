"""What a named cause means and what to do about it: the pages of ``docs/causes``, which the wheel brings along."""

from difflib import get_close_matches
from pathlib import Path

from pytest_nullspace.errors import OptionError, quoted
from pytest_nullspace.settings import PREFIX

_PLACES = (Path(__file__).parents[1] / "causes", Path(__file__).parents[2] / "docs" / "causes")
"""Where the pages lie: as the wheel installs them, or in a checkout."""


def explain(name: str) -> str:
    """The page of the cause ``name``, or the names of all with what each looks like in a line, where it is empty.

    Raises:
        OptionError: There is no such page.
    """
    pages = _pages()
    if not name:
        width = max(map(len, pages))
        lines = [f"{cause:<{width}}  {_first_sentence(page)}" for cause, page in pages.items()]
        return "\n".join([*lines, "", f"Read one by: pytest {PREFIX}explain=NAME", ""])
    if name not in pages:
        near = get_close_matches(name, pages, cutoff=0.5) or pages
        raise OptionError(f"{PREFIX}explain: no cause is called {quoted(name)}; there is {', '.join(near)}")
    return pages[name]


def _pages() -> dict[str, str]:
    folder = next(place for place in _PLACES if place.is_dir())
    return {file.stem: file.read_text("utf-8") for file in sorted(folder.glob("*.md"))}


def _first_sentence(page: str) -> str:
    """The first sentence of why it happens, which says what the mistake is."""
    _, _, why = page.partition("## Why it happens\n\n")
    first, _, _ = " ".join(why.split()).partition(". ")
    return f"{first.rstrip('.')}."
