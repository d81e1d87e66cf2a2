"""What a run tells of the preserved texts that it read: by which key, and which of two runs' texts are one. Pure."""

from collections.abc import Mapping
from typing import Any

FIRST = "text"
"""The key of the first preserved text, whose name, if it has one, stands in its entry."""


def key_of(name: str) -> str:
    """The key of a further preserved text: that of the first with the text's name, as its test is called."""
    return f"{FIRST}[{name}]"


def preserved(about: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The entry of each preserved text by its key, the first's first; a file of another making may hold anything."""
    told = {
        key: about[key] for key in sorted(about) if key == FIRST or (key.startswith(f"{FIRST}[") and key[-1] == "]")
    }
    return {key: entry for key, entry in told.items() if isinstance(entry, Mapping)}


def shared(about: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, bool]:
    """The digests of the texts that two runs both read, and whether they read the very same windows of them."""
    found: dict[str, bool] = {}
    for own in preserved(about).values():
        for its in preserved(other).values():
            digest = own.get("sha256")
            if isinstance(digest, str) and digest == its.get("sha256"):
                alike = all(own.get(what) == its.get(what) for what in ("starts", "seqlen"))
                found[digest] = found.get(digest, False) or alike
    return found
