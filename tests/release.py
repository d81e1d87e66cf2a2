"""A release, built and looked into: ``python -m tests.release --install`` also gates with the wheel alone.

The wheel must hold all that it needs where no repository is at hand, and none of the tests.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest_nullspace

ROOT = Path(__file__).parents[1]
WORLD = ROOT / "fixtures" / "world"
VERSION = pytest_nullspace.__version__
_HERE = ("pytest_nullspace/", f"pytest_nullspace-{VERSION}.dist-info/")
"""What the files of the wheel begin with."""


def build(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist, as hatchling builds them from this repository."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    (wheel,), (sdist,) = folder.glob(f"*-{VERSION}-*.whl"), folder.glob(f"*-{VERSION}.tar.gz")
    return wheel.resolve(), sdist.resolve()


def wheel_faults(wheel: Path) -> Iterator[str]:
    """What is wrong with the wheel."""
    with zipfile.ZipFile(wheel) as held:
        names = set(held.namelist())
        metadata = Parser().parsestr(held.read(f"{_HERE[1]}METADATA").decode("utf-8"))
        points = held.read(f"{_HERE[1]}entry_points.txt").decode("utf-8")
    package = {
        file for file in (ROOT / "pytest_nullspace").rglob("*") if file.is_file() and "__pycache__" not in file.parts
    }
    wanted = {file.relative_to(ROOT).as_posix() for file in package}
    wanted |= {f"pytest_nullspace/causes/{page.name}" for page in (ROOT / "docs" / "causes").glob("*.md")}
    wanted.add(f"{_HERE[1]}licenses/LICENSE")
    yield from (f"lacks {name}" for name in sorted(wanted - names))
    kept = {*wanted, *(name for name in names if name.startswith(_HERE[1]))}
    yield from (f"holds {name}" for name in sorted(names - kept))
    yield from (f"lacks {name}" for name in ("py.typed", "report/templates") if not _has(names, name))
    if "nullspace = pytest_nullspace.plugin" not in points:
        yield "has no entry point for pytest"
    yield from metadata_faults(metadata)


def _has(names: set[str], part: str) -> bool:
    return any(name.startswith(f"pytest_nullspace/{part}") for name in names)


def metadata_faults(metadata: Message) -> Iterator[str]:
    """What the index would lack."""
    if metadata["Version"] != VERSION:
        yield f"its version is {metadata['Version']}, not {VERSION}"
    for field in ("Summary", "License-Expression", "Requires-Python", "Keywords", "Author", "Project-URL"):
        if not metadata[field]:
            yield f"its metadata has no {field}"
    classifiers = metadata.get_all("Classifier") or []
    for wanted in (
        "Framework :: Pytest",
        "Typing :: Typed",
        "Development Status",
        "Programming Language :: Python :: 3.11",
    ):
        if not any(of.startswith(wanted) for of in classifiers):
            yield f"its metadata has no classifier {wanted}"
    if metadata["Description-Content-Type"] != "text/markdown" or not str(metadata.get_payload()).startswith(
        "# pytest"
    ):
        yield "its description is not the README"


def sdist_faults(sdist: Path) -> Iterator[str]:
    """What is wrong with the sdist: from it the suite must run and the documents be built."""
    with tarfile.open(sdist) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    left_out = (".ci/", ".github/", ".gitignore", "AGENTS.md")
    wanted = {name for name in tracked if not name.startswith(left_out) and (ROOT / name).exists()}
    yield from (f"lacks {name}" for name in sorted(wanted - names))
    yield from (f"holds {name}" for name in sorted(names) if "__pycache__" in name or name.startswith("site/"))


def changelog_fault(tag: str | None) -> str | None:
    """Whether the changelog's first version is this one, and, where a tag is released, told with its day."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    found = re.search(r"^## \[([^\]]+)\] - (\S+)$", text, re.MULTILINE)
    if found is None or found[1] != VERSION:
        return f"CHANGELOG.md does not begin with version {VERSION}"
    if tag is not None and tag != f"v{VERSION}":
        return f"the tag {tag} is not v{VERSION}"
    if tag is not None and not re.fullmatch(r"\d{4}-\d\d-\d\d", found[2]):
        return f"CHANGELOG.md has no day for version {VERSION}"
    return None


def gated_by(wheel: Path, folder: Path) -> str:
    """What the wheel prints of the shipped adapter, installed into a new environment, started in an empty folder.

    Raises:
        subprocess.CalledProcessError: It does not install, or does not pass.
    """
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    empty = folder / "empty"
    empty.mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "NULLSPACE"))
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(python), "-m", *arguments], cwd=empty, env={**environment, "HF_HUB_OFFLINE": "1"}, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"python -m {' '.join(arguments)}\n{done.stdout}{done.stderr}")
        return done.stdout

    run("pip", "install", "-q", str(wheel))
    where = run("pip", "show", "-f", "pytest-nullspace")
    if str(ROOT) in where or "causes/b-trained.md" not in where:
        raise SystemExit(f"the wheel was not installed by itself:\n{where}")
    run("pytest", "--nullspace-explain=b-trained")
    texts = [
        f"--nullspace-{kind}-dataset={WORLD / name}" for kind, name in (("calib", "facts.txt"), ("task", "task.txt"))
    ]
    return run(
        "pytest",
        f"--nullspace-model={WORLD / 'null-v2'}",
        *texts,
        "--nullspace-seqlen=256",
        "--nullspace-report=gate.html",
    )


def main() -> None:
    """Build, check, and with ``--install`` gate; end with what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where wheel and sdist are left")
    parser.add_argument("--tag", help="the tag that is released, such as v0.1.0")
    parser.add_argument("--install", action="store_true", help="install the wheel in a bare environment, and gate")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = asked.out or Path(name) / "dist"
        wheel, sdist = build(folder)
        fault = changelog_fault(asked.tag)
        faults = [f"{wheel.name}: {of}" for of in wheel_faults(wheel)] + [
            f"{sdist.name}: {of}" for of in sdist_faults(sdist)
        ]
        if faults := [*([] if fault is None else [fault]), *faults]:
            sys.exit("\n".join(faults))
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)], check=True)
        if asked.install:
            told = gated_by(wheel, Path(name))
            print(told)
            if "\nverdict: SAFE" not in told:
                sys.exit("the shipped adapter is not SAFE by the installed wheel")
        print(f"{wheel.name} and {sdist.name} are fit to be released")


if __name__ == "__main__":
    main()
