"""``--nullspace-attest``: a statement of the result that in-toto's own reader takes and one changed byte breaks."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fixtures.build import WORLD
from pytest_nullspace.report.attest import FIGURES, STATEMENT, TEST_RESULT
from pytest_nullspace.shell.attest import verify

FILE = "ft.intoto.json"


@pytest.fixture
def adapter(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped PEFT adapter and its base, in folders of their own, and texts to gate it on, at a wide terminal."""
    monkeypatch.setenv("COLUMNS", "400")
    for name, folder in (("peft-null", "ft"), ("base", "base")):
        shutil.copytree(WORLD / name, pytester.path / folder)
    for name in ("facts.txt", "task.txt"):
        shutil.copy(WORLD / name, pytester.path / name)
    return pytester.path / "ft"


def gated(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """A run of the gate with a statement."""
    return pytester.runpytest_subprocess(
        "--nullspace-model=ft",
        "--nullspace-base=base",
        "--nullspace-calib-dataset=facts.txt",
        "--nullspace-task-dataset=task.txt",
        "--nullspace-seqlen=128",
        "--nullspace-calib-size=4",
        f"--nullspace-attest={FILE}",
        *arguments,
    )


def stated(pytester: pytest.Pytester) -> dict[str, Any]:
    """The statement."""
    told: dict[str, Any] = json.loads((pytester.path / FILE).read_text("utf-8"))
    return told


def verified(pytester: pytest.Pytester, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the command says that holds files against it."""
    command = [sys.executable, "-m", "pytest_nullspace", "attest-verify", FILE, "ft", *arguments]
    return subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)


def is_of_in_toto(told: Mapping[str, Any]) -> None:
    """Hold it against in-toto's own messages, and the predicate against the fields that its page asks for."""
    json_format = pytest.importorskip("google.protobuf.json_format")
    messages = pytest.importorskip("in_toto_attestation.v1.statement_pb2")
    descriptors = pytest.importorskip("in_toto_attestation.v1.resource_descriptor_pb2")
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    Statement.copy_from_pb(json_format.ParseDict(told, messages.Statement())).validate()
    predicate = told["predicate"]
    assert predicate["result"] in ("PASSED", "WARNED", "FAILED")
    for one in predicate["configuration"]:
        message = json_format.ParseDict(one, descriptors.ResourceDescriptor())
        ResourceDescriptor.copy_from_pb(message).validate()
    kinds = {name: predicate[name] for name in ("passedTests", "warnedTests", "failedTests")}
    assert all(isinstance(test, str) for tests in kinds.values() for test in tests)


def test_a_whole_run_is_stated_and_one_changed_byte_is_refused(adapter: Path, pytester: pytest.Pytester) -> None:
    """Each file by its digest, each test by its id, on two workers too; what was changed, added or lost is named."""
    assert gated(pytester, "-n", "2").ret == 0
    told = stated(pytester)
    is_of_in_toto(told)
    assert (told["_type"], told["predicateType"]) == (STATEMENT, TEST_RESULT)
    names = {subject["name"] for subject in told["subject"]}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "base/model.safetensors"} <= names
    predicate = told["predicate"]
    tests = [*predicate["passedTests"], *predicate["warnedTests"]]
    assert len(tests) == 23
    assert "ft/adapter_config.json::drift" in tests
    assert not predicate["failedTests"]
    assert predicate["result"] == {"SAFE": "PASSED", "LOOK": "WARNED"}[predicate[FIGURES]["verdict"]["verdict"]]
    assert str(pytester.path) not in json.dumps(told)

    whole = verified(pytester, "--base=base")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout.startswith(f"ft: {len(names)} files are what was gated, result ")
    assert verified(pytester).stdout.rstrip().endswith("5 files of its base were not looked at (--base)")

    weights = adapter / "adapter_model.safetensors"
    sound = weights.read_bytes()
    for place in (0, len(sound) // 2, len(sound) - 1):
        weights.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        found = verified(pytester)
        assert (found.returncode, found.stdout) == (1, "")
        assert "'adapter/adapter_model.safetensors' has other bytes" in found.stderr
    weights.write_bytes(sound)
    (adapter / "chat_template.jinja").write_text("x", "utf-8")
    assert "'adapter/chat_template.jinja' is not among what was gated" in verified(pytester).stderr
    (adapter / "chat_template.jinja").unlink()
    (adapter / "adapter_config.json").rename(pytester.path / "elsewhere.json")
    assert "'adapter/adapter_config.json' is missing" in verified(pytester).stderr


def test_a_statement_may_lie_in_the_directory_that_it_is_of(adapter: Path, pytester: pytest.Pytester) -> None:
    """Under any name, and written twice: it is not among what it states."""
    for _ in range(2):
        assert gated(pytester, "--nullspace-attest=ft/stated.json").ret == 0
        command = [sys.executable, "-m", "pytest_nullspace", "attest-verify", "ft/stated.json", "ft", "--base=base"]
        assert subprocess.run(command, cwd=pytester.path, check=False).returncode == 0


def test_a_base_in_one_file_is_stated_alone(tmp_path: Path) -> None:
    """Of a GGUF base the file counts, and not what else lies beside it."""
    adapter, base = tmp_path / "ft", tmp_path / "base.gguf"
    adapter.mkdir()
    (adapter / "a").write_bytes(b"a")
    base.write_bytes(b"weights")
    (tmp_path / "beside.txt").write_text("x", "utf-8")
    digests = {"adapter/a": hashlib.sha256(b"a").hexdigest(), "base/base.gguf": hashlib.sha256(b"weights").hexdigest()}
    told = {"_type": STATEMENT, "predicateType": TEST_RESULT, "predicate": {"result": "PASSED"}}
    subjects = [{"name": name, "digest": {"sha256": digest}} for name, digest in digests.items()]
    (tmp_path / FILE).write_text(json.dumps({**told, "subject": subjects}), "utf-8")
    assert verify(tmp_path / FILE, adapter, base) == ("PASSED", 2, 0, ())


CHANGES = """
import json
from pathlib import Path


def pytest_runtest_teardown(item):
    file = Path(__file__).parent / "FILE"
    if item.name == "drift" and "ft" in item.nodeid:
        file.write_text(json.dumps({**json.loads(file.read_text()), "changed": 1}))
"""


@pytest.mark.parametrize("file", ["ft/adapter_config.json", "base/config.json"])
def test_what_changed_while_the_run_read_it_is_not_stated(adapter: Path, pytester: pytest.Pytester, file: str) -> None:
    """A statement is of the files that were measured, also of those whose digest no figure follows from."""
    assert adapter.is_dir()
    pytester.makeconftest(CHANGES.replace("FILE", file))
    found = gated(pytester)
    assert found.ret == 1
    assert not (pytester.path / FILE).exists()
    name = file.replace("ft/", "adapter/")
    found.stdout.fnmatch_lines(
        [f"nullspace: NOT GATED: '{name}': changed while the run read it, so nothing is stated; *"]
    )


MARKS = """
import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name.startswith(("serve", "scope")):
            item.add_marker(pytest.mark.xfail)
"""


@pytest.mark.parametrize("parallel", [(), ("-n", "2")], ids=["alone", "parallel"])
def test_a_failure_that_a_mark_expects_is_stated_as_a_warning(
    adapter: Path, pytester: pytest.Pytester, parallel: tuple[str, ...]
) -> None:
    """Also of a test that judges no figure: the verdict is LOOK, and the test is not among those that passed."""
    assert adapter.is_dir()
    pytester.makeconftest(MARKS)
    found = gated(pytester, "--nullspace-serve=vllm --max-lora-rank 8", *parallel)
    assert found.ret == 0
    found.stdout.fnmatch_lines(["verdict: LOOK: serve?vllm? would fail, which a mark of your own expects*"])
    predicate = stated(pytester)["predicate"]
    assert predicate["result"] == "WARNED"
    assert "ft/adapter_config.json::serve[vllm]" in predicate["warnedTests"]


def test_a_failure_is_stated_and_is_no_leave_to_deploy(adapter: Path, pytester: pytest.Pytester) -> None:
    """A red run is written with the tests that failed; its files are as stated, and the command still says no."""
    assert adapter.is_dir()
    assert gated(pytester, "--nullspace-threshold=divergence:1e-9:1e-8").ret == 1
    predicate = stated(pytester)["predicate"]
    is_of_in_toto(stated(pytester))
    assert predicate["result"] == "FAILED"
    assert predicate["failedTests"] == ["ft/adapter_config.json::drift"]
    found = verified(pytester)
    assert (found.returncode, "result FAILED" in found.stdout) == (1, True)


def test_nothing_is_stated_of_a_part(adapter: Path, pytester: pytest.Pytester) -> None:
    """A run that left tests out, or that gates no single adapter whole, writes no statement and says so."""
    assert adapter.is_dir()
    found = gated(pytester, "-k", "layers.0")
    assert not (pytester.path / FILE).exists()
    found.stdout.fnmatch_lines([f"nullspace: attest: no statement is written to {FILE}: NOT GATED: only *"])
    refused = gated(pytester, "--nullspace-weights-only")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    assert not (pytester.path / FILE).exists()
    assert "--nullspace-attest: --nullspace-weights-only measures no activations" in refused.stderr.str()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "is no statement of test results"),
        ('{"payload": ""}', "is a signed envelope"),
        (f'{{"_type": "{STATEMENT}", "predicateType": "{TEST_RESULT}", "predicate": {{}}}}', "states the result None"),
        (
            f'{{"_type": "{STATEMENT}", "predicateType": "{TEST_RESULT}", "predicate": {{"result": "PASSED"}}}}',
            "has no subjects",
        ),
        (
            f'{{"_type": "{STATEMENT}", "predicateType": "{TEST_RESULT}", "predicate": {{"result": "PASSED"}}, '
            '"subject": [{"name": "adapter/a", "digest": {"sha512": ""}}]}',
            "a subject has no name or no sha256",
        ),
        (
            f'{{"_type": "{STATEMENT}", "predicateType": "{TEST_RESULT}", "predicate": {{"result": "PASSED"}}, '
            '"subject": [{"name": "other/a", "digest": {"sha256": ""}}]}',
            "it is of no adapter",
        ),
    ],
)
def test_what_is_no_statement_is_refused(pytester: pytest.Pytester, text: str, said: str) -> None:
    """A file that states nothing, or of something else, is one line and exit 1, and never a yes."""
    (pytester.path / "ft").mkdir()
    (pytester.path / FILE).write_text(text, "utf-8")
    found = verified(pytester)
    assert (found.returncode, found.stdout) == (1, "")
    assert said in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("given", [(), ("runs/ft",)], ids=["nothing", "a directory"])
def test_the_command_says_how_to_gate_where_that_was_meant(given: tuple[str, ...]) -> None:
    """It verifies and does not gate, so what it cannot read ends with the command that does."""
    command = [sys.executable, "-m", "pytest_nullspace", *given]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "{attest-verify}" in told.stderr
    *_, last = told.stderr.splitlines()
    asked = " ".join(f"--nullspace-{name}" for name in ("model=PATH", "calib-dataset=TEXT", "task-dataset=TEXT"))
    assert last == f"to gate an adapter: pytest {asked}"
