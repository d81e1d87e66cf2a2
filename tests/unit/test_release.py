"""What a release must be: its wheel, its sdist, its changelog and the workflows that publish it."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_nullspace.measuring.inputs import PEFT_LEAST
from tests import release

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_wheel_and_sdist_hold_what_they_must(tmp_path: Path) -> None:
    """The wheel holds the package, causes, templates and ``py.typed``, no test, and whole metadata; the sdist all."""
    wheel, sdist = release.build(tmp_path)
    assert list(release.wheel_faults(wheel)) == []
    if (ROOT / ".git").exists():
        assert list(release.sdist_faults(sdist)) == []


def test_the_oldest_releases_that_are_tested_are_those_that_are_declared() -> None:
    """Each lower bound is a pin of ``constraints-oldest.txt``; torch's, which PyPI has with CUDA alone, is not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["peft"]]
    lines = (ROOT / "constraints-oldest.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    least = dict(of.split(">=") for of in declared)
    assert pinned.keys() == least.keys()
    others = [name for name, of in least.items() if not f"{pinned[name]}.0.".startswith(f"{of}.")]
    assert others == ["torch"]
    assert ".".join(map(str, PEFT_LEAST)) == least["peft"]


def test_the_changelog_begins_with_this_version() -> None:
    """Its first section is the version that the package has, in the form of Keep a Changelog."""
    assert release.changelog_fault(None) is None
    assert "v9.9.9" in str(release.changelog_fault("v9.9.9"))
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    groups = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert groups


@pytest.mark.parametrize("file", [ROOT / "action.yml", *WORKFLOWS], ids=lambda file: file.name)
def test_every_action_is_pinned_by_its_commit(file: Path) -> None:
    """What others wrote is taken by a commit that nobody can move, with its version beside it."""
    text = file.read_text("utf-8")
    used = re.findall(r"^\s*(?:- )?uses: (.+)$", text, re.MULTILINE)
    assert used
    assert [of for of in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v[\d.]+", of)] == []


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_may_do_no_more_than_they_must(file: Path) -> None:
    """Each reads alone unless a job says otherwise, keeps no credentials, ends in time, puts no name into a shell."""
    told: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    assert told["permissions"] == {"contents": "read"}
    for job in told["jobs"].values():
        assert job["timeout-minutes"] <= 90
        assert set(job.get("permissions", {})) <= {"id-token", "attestations", "pages"}
        for step in job["steps"]:
            assert "${{" not in step.get("run", "")
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    if "release" in file.name:
        assert told["jobs"]["publish"]["environment"]["name"] == "pypi"
        assert "password" not in file.read_text("utf-8")
