"""What a text option names: a named set, a local file or folder, a dataset of the hub. Nothing is read here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pytest_nullspace.checkpoint.hub import near
from pytest_nullspace.errors import TextError, printable
from pytest_nullspace.run.texts import RESERVED, is_name

OPTION, TASK_OPTION = "--nullspace-calib-dataset", "--nullspace-task-dataset"
SELF = "self"
"""What stands for a text that the base model writes itself."""
PLAIN = (".txt", ".md")
"""Suffixes of files that are one text as they are."""
SUFFIXES = (*PLAIN, ".jsonl", ".json", ".csv", ".parquet")
"""The kinds of files that can be read."""
_HUB_SPEC = re.compile(
    r"hub:(?P<repo>\w[\w.-]*/\w[\w.-]*)"
    r"(?::(?P<config>[^:]*)(?::(?P<split>[^:\[]*(?:\[[^\]]*\])?)(?::(?P<column>.+))?)?)?"
)


@dataclass(frozen=True)
class FileText:
    """A local file.

    Attributes:
        path: The file; its suffix says how it is read.
        column: The column that holds the text; None for the default.
    """

    path: Path
    column: str | None = None

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class FolderText:
    """A folder that ``save_to_disk`` of `datasets` wrote, or one of images or of files of text.

    Attributes:
        path: The folder.
        split: The split; None for ``train``, or for all of a set that has no splits. Of others, the folder in it.
        column: The column that holds the text; None for the default.
    """

    path: Path
    split: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubText:
    """A dataset of the Hugging Face hub.

    Attributes:
        repo: Its ``owner/name``.
        config: Its configuration; None for the default.
        split: The split, which `datasets` allows to be a slice such as ``train[:1000]``.
        column: The column that holds the text; None for the default.
        file: The one file of the repository to read; None for all that the configuration has.
        revision: The branch; None for the main one.
    """

    repo: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"hub dataset {self.repo} ({', '.join(filter(None, (self.config, self.split)))})"


@dataclass(frozen=True)
class SelfText:
    """What the base model writes itself, once it is loaded."""

    def __str__(self) -> str:
        return SELF


Source = FileText | FolderText | HubText

NAMED_SETS: Mapping[str, HubText] = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", column="text"),
    "c4": HubText("allenai/c4", column="text", file="en/c4-train.00000-of-01024.json.gz"),
    # The main branch holds a loading script, which datasets no longer runs; the hub's own conversion is plain data.
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        column="sentence",
        file="penn_treebank/train/0000.parquet",
        revision="refs/convert/parquet",
    ),
    # The questions of `rc`, in its order, without the gigabytes of web pages.
    "triviaqa": HubText("mandarjoshi/trivia_qa", "rc.nocontext", column="question"),
    "nqopen": HubText("google-research-datasets/nq_open", "nq_open", column="question"),
}
"""The calibration sets of the reference under their present hub names, train split."""


def parse_source(spec: str, folder: Path = Path(), option: str = OPTION) -> Source | SelfText:
    """What ``spec`` describes; nothing is read, only looked whether a path exists.

    A named set, and ``self``, wins over a file or folder of its name, which must be written ``./name``.

    Args:
        spec: A named set, ``self``, ``FILE[:column]``, ``DIR[:split[:column]]`` or
            ``hub:owner/name[:config[:split[:column]]]``; a part left empty is the default one.
        folder: The folder to which a path is relative.
        option: Where it was given, for messages.

    Raises:
        TextError: It is none of these.
    """
    if spec in NAMED_SETS:
        return NAMED_SETS[spec]
    if spec == SELF and option == OPTION:
        return SelfText()
    if spec == SELF:
        raise TextError(
            f"{option}={SELF}: the base model writes what it knows, which is no text of the task; give that "
            f"(a folder of this name as ./{SELF})"
        )
    if spec.startswith("hub:"):
        return _parse_hub(spec, option)
    path, selectors = _split_path(spec, folder, option)
    if path.is_dir():
        split, column = (*selectors, "", "")[:2]
        return FolderText(path, split or None, column or None)
    if path.suffix.lower() not in SUFFIXES:
        raise _refusal(option, spec, f"{path} has none of the suffixes that can be read")
    if len(selectors) > 1:
        raise _refusal(option, spec, f"{path} is a file, which has no splits")
    return FileText(path, "".join(selectors) or None)


def named(spec: str, folder: Path) -> tuple[str, str]:
    """The name of a text, empty where it has none, and what it is: ``name=TEXT``.

    A file or folder whose own name has the equals sign wins over a name.

    Raises:
        TextError: What stands before the sign can be no name.
    """
    name, equals, text = spec.partition("=")
    cuts = [spec.rsplit(":", colons)[0] for colons in range(min(spec.count(":"), 2) + 1)]
    if not equals or any(_exists(folder / _at_home(cut)) for cut in cuts if "=" in cut):
        return "", spec
    if not is_name(name):
        raise TextError(
            f"{OPTION}={printable(spec)}: there is no such file or folder, and {printable(repr(name))} cannot be the "
            f"name of a text: that takes up to 40 letters, digits, '_', '.' and '-', and is not "
            f"{', '.join(RESERVED[:-1])} or {RESERVED[-1]}"
        )
    return name, text


def _parse_hub(spec: str, option: str) -> HubText:
    match = _HUB_SPEC.fullmatch(spec)
    if not match:
        raise _refusal(option, spec, "not of the form hub:owner/name[:config[:split[:column]]]")
    return HubText(match["repo"], match["config"] or None, match["split"] or "train", match["column"])


def _split_path(spec: str, folder: Path, option: str) -> tuple[Path, list[str]]:
    """The longest part of ``spec`` before a colon that exists, and what follows it: two selectors at most."""
    cuts = [spec.rsplit(":", colons) for colons in range(min(spec.count(":"), 2) + 1)]
    candidates = [(folder / _at_home(name), selectors) for name, *selectors in cuts]
    for path, selectors in candidates:
        if _exists(path):
            return path, selectors
    looked_for = " and ".join(printable(path.absolute(), 400) for path, _ in candidates)
    raise _refusal(option, spec, f"no such file or folder (looked for {looked_for}){near(candidates[0][0])}")


def _at_home(name: str) -> Path:
    """The path ``name``, a leading ``~`` replaced where it stands for someone's home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name too long for the file system
        return False


def _refusal(option: str, spec: str, reason: str) -> TextError:
    words = ", ".join((*NAMED_SETS, SELF) if option == OPTION else NAMED_SETS)
    return TextError(
        f"{option}={printable(spec)}: {reason}. It takes {words}, a file ({' '.join(SUFFIXES)}; "
        "FILE:column), a folder of texts, of images or saved by datasets (DIR:split:column), or "
        "hub:owner/name[:config[:split[:column]]]."
    )
