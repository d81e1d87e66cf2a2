"""Every file that a run of pytest is to write, held apart from the others and from all that is read.

Which options of pytest and of other plugins name a file is not known in general; those in wide use are listed here.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_nullspace.errors import NullspaceError, OptionError, TextError
from pytest_nullspace.report.page import Page, fitted
from pytest_nullspace.settings import CARD, PREFIX, Settings, stats_file
from pytest_nullspace.text.sources import FileText, FolderText, parse_source

if TYPE_CHECKING:
    import pytest

    from pytest_nullspace.shell.runs import GatedRun

SUMMARY = "GITHUB_STEP_SUMMARY"
_OTHERS = {
    "xmlpath": "--junit-xml",
    "log_file": "--log-file",
    "debug": "--debug",
    "benchmark_json": "--benchmark-json",
    "report_log": "--report-log",
    "htmlpath": "--html",
    "json_report_file": "--json-report-file",
}
"""Where pytest and other plugins keep the name of a file that they write, and the option that gives it."""
_READ = (
    "*.safetensors", "*.index.json", "*config.json", "*.gguf", "*.bin", "*.model", "*.jinja", "*.py", "tokenizer*",
    "*tokens*.json", "vocab*", "merges.txt", "*.arrow", "dataset_*.json", "state.json",
)  # fmt: skip
"""The files of a model and of a folder of text, by their names: beside them a run may write."""


class _File(NamedTuple):
    """A file or folder, and who named it."""

    path: Path
    by: str


def check_outputs(
    config: "pytest.Config", settings: Settings, runs: Sequence["GatedRun"], bases: Iterable[Path]
) -> None:
    """Refuse a file that is to be written twice, or that is read, whatever name leads to it.

    Args:
        config: Where pytest and other plugins say what they write.
        settings: What this one writes and reads.
        runs: What is gated, for ``{model}`` and for the folders of models.
        bases: The folders of their base models.

    Raises:
        OptionError: One of them would replace another.
    """
    ours, read = list(_ours(settings, runs)), list(_read(settings, runs, bases))
    written = [*ours, *_of_others(config)]
    for one, other in combinations(written, 2):
        if one in ours and _same(one.path, other.path):
            raise OptionError(f"{one.by}: {one.path} is written by {other.by} as well; give each a file of its own")
    for file in written:
        for source in read:
            if _same(file.path, source.path) or _is_part(file.path, source.path):
                raise OptionError(f"{file.by}: {file.path} would replace what {source.by} reads; give another name")


def _ours(settings: Settings, runs: Sequence["GatedRun"]) -> Iterator[_File]:
    if settings.save_stats is not None:
        yield from (_File(stats_file(settings.save_stats, run.name), f"{PREFIX}save-stats") for run in runs)
    yield from (_File(file, f"{PREFIX}report") for file in settings.reports)
    if settings.attest is not None:
        yield _File(settings.attest, f"{PREFIX}attest")
    if settings.card:
        yield from (_File(run.path / CARD, f"{PREFIX}card") for run in runs if run.path.is_dir())
    if summary := os.environ.get(SUMMARY):
        yield _File(Path(summary), SUMMARY)


def _of_others(config: "pytest.Config") -> Iterator[_File]:
    for dest, option in _OTHERS.items():
        named = getattr(config.option, dest, None) or (config.getini(dest) if dest == "log_file" else None)
        name = getattr(named, "name", named)  # argparse may have opened it already
        if isinstance(name, str) and name:
            yield _File(_placed(config, name), option)
    coverage: Any = getattr(config.option, "cov_report", None)
    for name in coverage.values() if isinstance(coverage, dict) else ():
        if isinstance(name, str) and name:
            yield _File(_placed(config, name), "--cov-report")


def _placed(config: "pytest.Config", name: str) -> Path:
    return config.invocation_params.dir / Path(os.path.expandvars(name)).expanduser()


def _read(settings: Settings, runs: Sequence["GatedRun"], bases: Iterable[Path]) -> Iterator[_File]:
    yield from (_File(file, f"{PREFIX}stats") for file in settings.stats)
    yield from (
        _File(run.against.earlier_file, f"{PREFIX}compare") for run in runs if run.against.earlier_file is not None
    )
    yield from (_File(run.path, f"{PREFIX}model") for run in runs if run.path not in settings.stats)
    yield from (_File(base, f"{PREFIX}base") for base in bases)
    if settings.init is not None:
        yield _File(settings.init, f"{PREFIX}init")
    for option, spec, folder in (
        *(("calib-dataset", text.spec, text.folder) for text in settings.preserved),
        ("task-dataset", settings.task_dataset, settings.task_folder),
    ):
        try:
            source = None if spec is None else parse_source(spec, folder)
        except TextError:  # told where it is read
            continue
        if isinstance(source, FileText | FolderText):
            yield _File(source.path, f"{PREFIX}{option}")


def _same(one: Path, other: Path) -> bool:
    """Whether both are one regular file, there or not yet."""
    first, second = _identity(one), _identity(other)
    return first is not None and first == second


def _identity(path: Path) -> tuple[int, int] | str | None:
    """By what a file is known, whatever its name; None for a device, a pipe or a folder."""
    try:
        status = path.stat()
    except OSError:
        return os.path.normcase(os.path.realpath(path))
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _is_part(file: Path, folder: Path) -> bool:
    """Whether ``file`` lies within ``folder`` and has the name of what is read there."""
    within = Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)) and folder.is_dir()
    return within and any(fnmatchcase(file.name, pattern) for pattern in _READ)


MOST_OF_SUMMARY = 2**20
"""Bytes of a job's summary; a larger one GitHub does not show at all."""


def append_step_summary(pages: Sequence[Page]) -> str | None:
    """Show the reports on the page of a GitHub Actions job, where pytest runs in one, within what it may hold.

    Returns:
        What to say where there was no room for any.

    Raises:
        NullspaceError: The file of the summary cannot be written.
    """
    name = os.environ.get(SUMMARY)
    if not name or not pages:
        return None
    try:
        with Path(name).open("a", encoding="utf-8", errors="backslashreplace") as summary:
            held = os.fstat(summary.fileno()).st_size
            text = fitted(pages, MOST_OF_SUMMARY - held - 1)
            summary.write(f"{text}\n" if text else "")
    except OSError as error:
        raise NullspaceError(f"{SUMMARY}: {name} cannot be written: {error.strerror}") from None
    return (
        None if text else f"{SUMMARY}: {name} holds {held:,} bytes of {MOST_OF_SUMMARY:,}, so no report is shown there"
    )
