"""Statements about adapters: the files that they are of, written after a whole run and held against others later."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pytest_nullspace.checkpoint.header import read_json_object
from pytest_nullspace.checkpoint.hub import base_of
from pytest_nullspace.errors import CheckpointError, StatsError, printable, quoted
from pytest_nullspace.judging.decision import Call, Decision, gaps
from pytest_nullspace.report import attest
from pytest_nullspace.run.saved import write_atomically
from pytest_nullspace.settings import PREFIX, Settings
from pytest_nullspace.shell.decided import tests_of
from pytest_nullspace.shell.runs import CheckpointRun, GatedRun

ADAPTER, BASE = "adapter", "base"
_SIGNED = (".intoto.json", ".intoto.jsonl", ".sigstore.json")
"""Statements and signatures, which may lie beside what they are of."""
_URL = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")


def write(settings: Settings, run: GatedRun, decision: Decision, failed: Sequence[str], prefix: str) -> str | None:
    """Write the statement of a whole run.

    Args:
        settings: Where to, and with which base.
        run: What was gated.
        decision: The verdict on it.
        failed: The names of its tests that failed.
        prefix: How the ids of its tests begin.

    Returns:
        What to say of it.

    Raises:
        StatsError: It cannot be written, or a file is no more what was measured.
    """
    file, outcome = settings.attest, run.peek()
    if file is None or not isinstance(run, CheckpointRun):
        return None
    if outcome is None or decision.call is Call.NOT_GATED:
        return f"no statement is written to {file}: NOT GATED: {decision.sentence}"
    expectations = run.expectations(outcome)
    if (gap := next(gaps(outcome, expectations, tests_of(run), "no layer was measured"), None)) is not None:
        return f"no statement is written to {file}: {gap.words}"
    subjects = _subjects(run.path, _base(settings, run), file)
    for name, digest in outcome.about.get("weights_sha256", {}).items():
        if subjects.get(f"{ADAPTER}/{name}") != digest:
            raise StatsError(f"{run.path / name}: changed since it was measured, so nothing is stated; run again")
    told = attest.Attested(subjects, outcome, expectations, decision, failed, prefix, _url())
    write_atomically(file, attest.statement(told))
    return f"the statement of {len(subjects)} files stands in {file}, unsigned"


def _base(settings: Settings, run: CheckpointRun) -> Path | None:
    """What the base was read from, a directory or a GGUF file; None where the adapter's directory holds it."""
    named = settings.base or run.checkpoint.base
    return None if not named else base_of(run.checkpoint, settings.base)


def _subjects(adapter: Path, base: Path | None, file: Path) -> dict[str, str]:
    of = {ADAPTER: adapter} if base is None else {ADAPTER: adapter, BASE: base}
    return {f"{kind}/{name}": digest for kind, folder in of.items() for name, digest in hashed(folder, file)}


def hashed(folder: Path, statement: Path) -> Iterator[tuple[str, str]]:
    """The name and SHA-256 of every file below ``folder``, or of the file that it is.

    Hidden files are left out, the ``statement`` itself, and others like it, and signatures.

    Raises:
        CheckpointError: One is no file that can be read.
    """
    for file in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        parts = file.relative_to(folder).parts or (file.name,)
        own = file.resolve() == statement.resolve()
        if own or file.is_dir() or any(part.startswith(".") for part in parts) or file.name.endswith(_SIGNED):
            continue
        try:
            if not file.is_file():
                raise CheckpointError(f"{file}: is no regular file, so nothing can be stated of it; remove it")
            with file.open("rb") as stream:
                yield "/".join(parts), hashlib.file_digest(stream, "sha256").hexdigest()
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
    found = {f"{kind}/{name}": digest for kind, folder in given.items() for name, digest in hashed(folder, file)}
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
