"""What a run tells of the preserved texts that it read: by which key, and which of two runs' texts are one. Pure."""

import re
from collections.abc import Mapping
from typing import Any

DRIFT = "drift"
"""The name of the test that judges the predictions."""
RESERVED = (DRIFT, "model", "task")
"""What bounds and reports call other things by."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}"
FIRST = "text"
"""The key of the first preserved text, whose name, if it has one, stands in its entry."""


def key_of(name: str) -> str:
    """The key of a further preserved text: that of the first with the text's name, as its test is called."""
    return f"{FIRST}[{name}]"


def is_name(name: object) -> bool:
    """Whether a text may be called so: its test can then be written on a command line, and its bounds in an option."""
    return isinstance(name, str) and re.fullmatch(_NAME, name) is not None and name not in RESERVED


def name_of(key: str) -> str:
    """The name of the further text with that key; empty for any other."""
    return key[len(FIRST) + 1 : -1] if key.startswith(f"{FIRST}[") else ""


def drift_test(name: str) -> str:
    """What the test of the predictions on the text of that name is called."""
    return f"{DRIFT}[{name}]" if name else DRIFT


def is_drift(test: str) -> bool:
    """Whether a test is one of the predictions."""
    return test == DRIFT or test.startswith(f"{DRIFT}[")


def called(test: str) -> tuple[str, ...]:
    """By what a bound may name a test: by its name, one of the predictions by that of all and by its text's."""
    return (DRIFT, test[len(DRIFT) + 1 : -1]) if is_drift(test) and test != DRIFT else (test,)


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
