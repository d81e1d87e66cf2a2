"""What a CI copies: the commands of the GitHub action and of the GitLab job, run as their runners would run them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fixtures.build import WORLD

ROOT = Path(__file__).parents[2]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
JOB: dict[str, Any] = yaml.safe_load((ROOT / "ci" / "gitlab.yml").read_text("utf-8"))["gate adapter"]


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a shell of its own, whose ``python`` is this one."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    python = tools / "python"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "PYTEST_"))}
    paths = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder, env={**own, **paths, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def step(name: str) -> dict[str, Any]:
    """The step of that name."""
    (found,) = (step for step in STEPS if step.get("name") == name)
    return found


GIVEN: Mapping[str, str] = {
    "MODEL": str(WORLD / "null-v2"), "PRESERVED": str(WORLD / "facts.txt"), "TASK": str(WORLD / "task.txt"),
}  # fmt: skip
QUICK = "--nullspace-seqlen=128 --nullspace-calib-size=4 -p no:randomly -p no:cacheprovider"


def test_the_action_gates_keeps_the_report_and_compares_with_the_last_green_run(tmp_path: Path) -> None:
    """Its step leaves the verdict, each report and a baseline; the next run is held against that baseline."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_own.py").write_text("def test_own(): raise AssertionError('nobody named it')\n")
    output = tmp_path / "output"
    environment = {**GIVEN, "ARGUMENTS": QUICK, "COMPARE": "true", "GITHUB_OUTPUT": str(output), "NAME": "nullspace"}
    first = run(step("Gate")["run"], tmp_path, **environment)
    assert first.returncode == 0, first.stdout + first.stderr
    told = json.loads((tmp_path / "nullspace-report" / "stats.json").read_text("utf-8"))
    assert output.read_text() == f"verdict={told['verdict']['verdict']}\n"
    written = {file.name for file in (tmp_path / "nullspace-report").iterdir()}
    assert written == {"stats.json", "report.md", "report.html", "report.sarif", "junit.xml"}
    second = run(step("Gate")["run"], tmp_path, **environment)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "no change" in second.stdout
    longer = {**environment, "ARGUMENTS": QUICK.replace("size=4", "size=5")}
    assert run(step("Gate")["run"], tmp_path, **longer).returncode == 4
    assert run(step("Gate")["run"], tmp_path, **{**longer, "COMPARE": "false"}).returncode == 0
    assert run(step("Gate")["run"], tmp_path, **longer).returncode == 0


def test_the_action_fails_with_the_gate_and_keeps_the_old_baseline(tmp_path: Path) -> None:
    """A red gate fails the step, still tells its verdict, and becomes no baseline."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    output = tmp_path / "output"
    strict = f"{QUICK} --nullspace-threshold=leakage:0.000001:0.000002"
    environment = {**GIVEN, "ARGUMENTS": strict, "COMPARE": "true", "GITHUB_OUTPUT": str(output)}
    refused = run(step("Gate")["run"], tmp_path, **environment, NAME='"x')
    assert (refused.returncode, refused.stdout[:15]) == (2, "::error::name: ")
    failed = run(step("Gate")["run"], tmp_path, **environment, NAME="nullspace")
    assert failed.returncode == 1
    assert output.read_text() == "verdict=DO NOT DEPLOY\n"
    assert not (tmp_path / "nullspace-baseline.json").exists()


def test_the_action_renews_one_comment(tmp_path: Path) -> None:
    """The comment that bears the mark is replaced, a new one is made where there is none, and none fails the job.

    ``gh`` is a script that writes down what it was asked: GitHub itself is not reached.
    """
    (tmp_path / "nullspace-report").mkdir()
    (tmp_path / "nullspace-report" / "report.md").write_text("## the verdict\n")
    (tmp_path / "tools").mkdir()
    gh = tmp_path / "tools" / "gh"
    asked = tmp_path / "asked"
    for old, verb in (("", "POST"), ("77", "PATCH")):
        asked.unlink(missing_ok=True)
        gh.write_text(f'#!/bin/sh\necho "$@" >> {asked}\ncase "$*" in *paginate*) echo "{old}";; esac\n')
        gh.chmod(0o755)
        done = run(step("Tell the pull request")["run"], tmp_path, REPOSITORY="o/r", NUMBER="5", GH_TOKEN="t", NAME="a")
        assert done.returncode == 0, done.stderr
        _, last = asked.read_text().splitlines()
        assert f"-X {verb}" in last
        assert ("comments/77" in last) is bool(old)
    gh.write_text("#!/bin/sh\nexit 1\n")  # as where a pull request comes from a fork
    done = run(step("Tell the pull request")["run"], tmp_path, REPOSITORY="o/r", NUMBER="5", GH_TOKEN="t", NAME="a")
    assert (done.returncode, done.stdout[:11]) == (0, "::warning::")
    assert (
        (tmp_path / "nullspace-report" / "comment.md").read_text().startswith("<!-- pytest-nullspace: a -->\n## the v")
    )


def test_a_comment_too_long_for_github_ends_with_a_whole_line(tmp_path: Path) -> None:
    """Of a report of more than 60,000 bytes the comment has its first whole lines, and says where the rest is."""
    (tmp_path / "nullspace-report").mkdir()
    lines = ["## the verdict", "<details><summary>3,000 layers</summary>", *(f"| ✓ layer {n} ✓ |" for n in range(3000))]
    (tmp_path / "nullspace-report" / "report.md").write_text("\n".join(lines), "utf-8")
    (tmp_path / "tools").mkdir()
    gh = tmp_path / "tools" / "gh"
    gh.write_text("#!/bin/sh\n")
    gh.chmod(0o755)
    done = run(step("Tell the pull request")["run"], tmp_path, REPOSITORY="o/r", NUMBER="5", GH_TOKEN="t", NAME="a")
    assert done.returncode == 0, done.stderr
    comment = (tmp_path / "nullspace-report" / "comment.md").read_text("utf-8").splitlines()
    assert comment[0] == "<!-- pytest-nullspace: a -->"
    kept = comment[1 : comment.index("</details>") - 1]
    assert kept == lines[: len(kept)]
    assert 2000 < len(kept) < len(lines)
    assert comment[-1].endswith("the artifact a-report has it.")


def test_the_action_installs_itself(tmp_path: Path) -> None:
    """Without a package it installs the revision of it that is used, and no baseline of another gate is left."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "tools" / "python").chmod(0o755)
    (tmp_path / "nullspace-baseline.json").write_text("{}")
    for package, wanted in (("", "/the/action[peft]"), ("pytest-nullspace==1", "pytest-nullspace==1")):
        done = run(step("Install")["run"], tmp_path, PACKAGE=package, GITHUB_ACTION_PATH="/the/action")
        assert done.stdout == f"-m pip install --quiet {wanted}\n"
    assert not (tmp_path / "nullspace-baseline.json").exists()


def test_the_action_is_pinned_and_puts_no_input_into_a_script() -> None:
    """Each action that it uses is named by a commit; what a user gives reaches scripts by their environment alone."""
    for used in (step["uses"] for step in STEPS if "uses" in step):
        assert re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40}", used), used
    assert not any("${{" in step["run"] for step in STEPS if "run" in step)


def test_the_gitlab_job_writes_what_it_keeps(tmp_path: Path) -> None:
    """Its script ends green on the shipped adapter, and every artifact that it names is there."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_own.py").write_text("def test_own(): raise AssertionError('nobody named it')\n")
    done = run("\n".join(JOB["script"]), tmp_path, **GIVEN, PYTEST_ADDOPTS=QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = JOB["artifacts"]["reports"]
    for file in (*JOB["artifacts"]["paths"], reports["junit"], reports["metrics"]):
        assert (tmp_path / file).stat().st_size, file
    assert set(JOB["variables"]) == {*GIVEN, "PACKAGE"}
