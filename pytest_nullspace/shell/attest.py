"""Statements about adapters: the files that they are of, written after a whole run and held against others later."""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pytest_nullspace.checkpoint.header import read_json_object, stamp_of
from pytest_nullspace.checkpoint.hub import base_of
from pytest_nullspace.errors import CheckpointError, StatsError, printable, quoted
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.report import attest
from pytest_nullspace.run.saved import write_atomically
from pytest_nullspace.settings import CARD, PREFIX, Settings, stats_file
from pytest_nullspace.shell.decided import warned, why_untold
from pytest_nullspace.shell.runs import CheckpointRun, GatedRun

ADAPTER, BASE = "adapter", "base"
_SIGNED = (".intoto.json", ".intoto.jsonl", ".sigstore.json")
"""Statements and signatures, which may lie beside what they are of."""
_URL = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")


class Tests(NamedTuple):
    """What became of the tests of a run.

    Attributes:
        prefix: How their ids begin.
        failed: The ids of those that failed, of this run and others.
        excused: The same of those that failed as a mark of the user's expects.
    """

    prefix: str
    failed: Collection[str]
    excused: Collection[str]

    def named(self, ids: Collection[str]) -> frozenset[str]:
        """The names of this run's tests among ``ids``."""
        return frozenset(one.removeprefix(self.prefix) for one in ids if one.startswith(self.prefix))


@dataclass(frozen=True)
class Pending:
    """A run of which a statement is to be written.

    Attributes:
        settings: Where to, and with which base.
        run: What is gated.
        stamps: The files that the statement will be of, as they were before any was read.
    """

    settings: Settings
    run: CheckpointRun
    stamps: Mapping[str, tuple[int, int]]

    def write(self, decision: Decision, tests: Tests) -> str:
        """Write the statement, if the run is whole.

        Returns:
            What to say of it.

        Raises:
            CheckpointError: A file cannot be read.
            StatsError: It cannot be written, or a file is no more what was read.
        """
        file, run, outcome = self.settings.attest, self.run, self.run.peek()
        assert file is not None
        if outcome is None or (why := why_untold(run, decision)) is not None:
            return f"no statement is written to {file}: {why}"
        files = dict(_subjects(self.settings, run))
        self._require_unchanged(files)
        subjects = {name: _digest(of) for name, of in files.items()}
        self._require_unchanged(files)
        for name, digest in outcome.about.get("weights_sha256", {}).items():
            if subjects.get(f"{ADAPTER}/{name}") != digest:
                raise StatsError(f"{run.path / name}: changed since it was measured, so nothing is stated; run again")
        failed, excused = tests.named(tests.failed), [*tests.named(tests.excused), *warned(run, outcome)]
        expectations = run.expectations(outcome)
        told = attest.Attested(subjects, outcome, expectations, decision, failed, excused, tests.prefix, _url())
        write_atomically(file, attest.statement(told))
        return f"the statement of {len(subjects)} files stands in {file}, unsigned"

    def _require_unchanged(self, files: Mapping[str, Path]) -> None:
        """Refuse files that came, went or changed since the run began, but for those that it wrote itself."""
        own = {file.resolve() for file in _written(self.settings, self.run)}
        now = {name: stamp_of(file.stat()) for name, file in files.items() if file.resolve() not in own}
        before = {name: stamp for name, stamp in self.stamps.items() if name in now or name not in files}
        changed = next((name for name in sorted({*now, *before}) if now.get(name) != before.get(name)), None)
        if changed is not None:
            raise StatsError(f"{quoted(changed)}: changed while the run read it, so nothing is stated; run again")


def pending(settings: Settings, runs: Sequence[GatedRun]) -> Pending | None:
    """The run of which a statement is asked for, before anything of it is read; None where none is."""
    if settings.attest is None:
        return None
    (run,) = runs
    assert isinstance(run, CheckpointRun)  # which the settings hold
    return Pending(settings, run, {name: stamp_of(file.stat()) for name, file in _subjects(settings, run)})


def _written(settings: Settings, run: GatedRun) -> Iterator[Path]:
    yield from settings.reports
    if settings.save_stats is not None:
        yield stats_file(settings.save_stats, run.name)
    if settings.card:
        yield run.path / CARD


def _subjects(settings: Settings, run: CheckpointRun) -> Iterator[tuple[str, Path]]:
    """Every file that a statement is of: the adapter's, and those of the base where that lies elsewhere."""
    of = {ADAPTER: run.path}
    if settings.base or run.checkpoint.base:
        of[BASE] = base_of(run.checkpoint, settings.base)
    assert settings.attest is not None
    yield from _files(of, settings.attest)


def _files(of: Mapping[str, Path], statement: Path) -> Iterator[tuple[str, Path]]:
    """Every file below some folders, or that they are, by ``adapter/NAME`` and ``base/NAME``.

    Hidden folders are left out, the ``statement`` itself, and others like it, and signatures.

    Raises:
        CheckpointError: One is no regular file.
    """
    for kind, folder in of.items():
        for file in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            parts = file.relative_to(folder).parts or (file.name,)
            hidden = any(part.startswith(".") for part in parts[:-1])
            if hidden or file.is_dir() or file.name.endswith(_SIGNED) or file.resolve() == statement.resolve():
                continue
            if not file.is_file():
                raise CheckpointError(f"{file}: is no regular file, so nothing can be stated of it; remove it")
            yield "/".join((kind, *parts)), file


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; mend that") from None


def _url() -> str | None:
    server, repository, number = (os.environ.get(name) for name in _URL)
    return f"{server}/{repository}/actions/runs/{number}" if server and repository and number else None


class Verified(NamedTuple):
    """What became of a statement that was held against files.

    Attributes:
        result: What it states: ``PASSED``, ``WARNED`` or ``FAILED``.
        files: How many files were hashed and are what it states.
        unseen: How many of its subjects lie in a folder that was not given.
        wrong: What is not as it states, in phrases.
    """

    result: str
    files: int
    unseen: int
    wrong: tuple[str, ...]


def verify(file: Path, adapter: Path, base: Path | None = None) -> Verified:
    """Hash every file of an adapter, and of its base if that is given, and hold it against a statement.

    Raises:
        CheckpointError: The statement is none, or a file cannot be read.
    """
    stated, result = _stated(file)
    given = {ADAPTER: adapter} if base is None else {ADAPTER: adapter, BASE: base}
    for kind, folder in given.items():
        if not folder.exists():
            raise CheckpointError(f"{folder}: is not there; give the {kind}'s directory")
    found = {name: _digest(of) for name, of in _files(given, file)}
    wanted = {name: digest for name, digest in stated.items() if name.partition("/")[0] in given}
    wrong = [f"{quoted(name)} is missing" for name in wanted if name not in found]
    wrong += [f"{quoted(name)} has other bytes" for name in wanted if name in found and found[name] != wanted[name]]
    wrong += [f"{quoted(name)} is not among what was gated" for name in found if name not in wanted]
    if not any(name.startswith(f"{ADAPTER}/") for name in stated):
        wrong.append("it is of no adapter")
    return Verified(result, len(found), len(stated) - len(wanted), tuple(wrong))


def _stated(file: Path) -> tuple[dict[str, str], str]:
    """The digests that a statement holds, by name, and its result."""
    told = read_json_object(file, "the statement")
    if "payload" in told or "dsseEnvelope" in told:
        raise CheckpointError(f"{file}: is a signed envelope; verify its signature first, and give the statement in it")
    predicate = told.get("predicate")
    if told.get("_type") != attest.STATEMENT or told.get("predicateType") != attest.TEST_RESULT:
        raise CheckpointError(
            f"{file}: is no statement of test results ({attest.TEST_RESULT}); give one of {PREFIX}attest"
        )
    result = predicate.get("result") if isinstance(predicate, Mapping) else None
    if result not in ("PASSED", "WARNED", "FAILED"):
        raise CheckpointError(
            f"{file}: states the result {printable(result, 40)}; one of PASSED, WARNED, FAILED is known"
        )
    return dict(_subject(file, one) for one in _list(file, told.get("subject"))), str(result)


def _list(file: Path, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise CheckpointError(f"{file}: has no subjects; write it again by {PREFIX}attest")
    return value


def _subject(file: Path, value: Any) -> tuple[str, str]:
    name = value.get("name") if isinstance(value, Mapping) else None
    digest = value.get("digest") if isinstance(value, Mapping) else None
    sha256 = digest.get("sha256") if isinstance(digest, Mapping) else None
    if not isinstance(name, str) or not isinstance(sha256, str):
        raise CheckpointError(f"{file}: a subject has no name or no sha256; write it again by {PREFIX}attest")
    return name, sha256
