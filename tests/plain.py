"""A source's plain text, for tests of what is no conversation and no image."""

from pytest_nullspace.text.conversations import OFF
from pytest_nullspace.text.readers import read
from pytest_nullspace.text.sources import Source


def read_text(source: Source) -> str:
    """All texts of ``source``, joined by a blank line."""
    text = read(source, OFF)
    assert isinstance(text, str)
    return text
