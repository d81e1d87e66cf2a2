"""Models by their id on the hub, against a local server that speaks the hub's download protocol."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import tiny
from tests.adapters import adapter, change
from tests.plugin.conftest import LOOSE, Gate

COMMITS = {"main": "a" * 40, "v1": "b" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves the folders ``root/owner/name`` at any revision that it knows, and remembers which files were fetched."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.token: str | None = None
        """Without it in the request nothing is served, as of a private repository."""
        self.fetched: list[tuple[str, str, str]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        token = self.server.token
        if token is not None and self.headers["Authorization"] != f"Bearer {token}":
            self.reply(401, b'{"error": "Invalid username or password."}', {"X-Error-Code": "RepoNotFound"}, body=body)
            return
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            owner, name, revision = parts[2], parts[3], parts[5] if len(parts) > 5 else "main"
            folder = self.server.root / owner / name
            if not folder.is_dir() or revision not in COMMITS:
                error = "RevisionNotFound" if folder.is_dir() else "RepoNotFound"
                self.reply(404, b"{}", {"X-Error-Code": error})
                return
            files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
            if parts[4] == "tree":
                tree = [
                    {"type": "file", "path": f, "oid": "0" * 40, "size": (folder / f).stat().st_size} for f in files
                ]
                self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
                return
            info = {"id": f"{owner}/{name}", "sha": COMMITS[revision], "siblings": [{"rfilename": f} for f in files]}
            self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            return
        if len(parts) < 5:
            self.reply(404, b"{}", {})
            return
        owner, name, _, revision, *path = parts
        file = self.server.root / owner / name / "/".join(path)
        content = file.read_bytes()
        if body:
            self.server.fetched.append((f"{owner}/{name}", revision, "/".join(path)))
        etag = hashlib.sha256(content).hexdigest()
        self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMITS[revision]}, body=body)

    def reply(self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with ``someone/adapter`` and its base ``someone/base``, beside files that nobody should fetch."""
    (pytester.path / "text.txt").write_text(tiny.TEXT)
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    root = pytester.path / "served" / "someone"
    directory = adapter(root, tiny.llama(), r=4, target_modules=["q_proj"])
    change(directory, lambda _, config: config.update(base_model_name_or_path="someone/base", revision="v1"))
    (root / "base" / "modeling.py").write_text(tiny.TRAP)
    (root / "base" / "pytorch_model.bin").write_bytes(b"pickled")
    shutil.copytree(directory, directory / "checkpoint-1")
    server = Hub(pytester.path / "served")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(pytester.path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_adapter_and_its_base_come_from_the_hub(
    hub: Hub, gate: Gate, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and base are fetched at their revisions, without code or pickles, and offline they come from the cache."""
    stats = "--nullspace-save-stats={model}.json"
    result = gate(*LOOSE, stats, model="someone/adapter@main")
    result.assert_outcomes(passed=4)
    assert {(name, revision) for name, revision, _ in hub.fetched} == {
        ("someone/adapter", "a" * 40), ("someone/base", "b" * 40)
    }  # fmt: skip
    assert {Path(file).suffix for *_, file in hub.fetched} == {".json", ".safetensors"}
    assert not any("/" in file for *_, file in hub.fetched)
    assert json.loads((pytester.path / "adapter.json").read_text())["num_layers"] == 3
    fetched = len(hub.fetched)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = gate(*LOOSE, "-v", "--nullspace-base=someone/base@v1", model="someone/adapter")
    again.assert_outcomes(passed=4)
    again.stdout.fnmatch_lines(
        ["*cache/hub/models--someone--adapter/snapshots/aaa*/adapter_config.json::*q_proj PASSED*"]
    )
    assert len(hub.fetched) == fetched


def test_what_the_hub_does_not_have_is_a_usage_error(hub: Hub, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong id, a wrong revision, and an id that is not in the cache when offline each say what to do."""
    for model in ("someone/nothing", "someone/adapter@v9"):
        result = gate(model=model)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"ERROR: --nullspace-model: {model} is no directory here and cannot be had *"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = gate(model="someone/adapter")
    assert offline.ret == pytest.ExitCode.USAGE_ERROR
    offline.stderr.fnmatch_lines(["ERROR: --nullspace-model: someone/adapter is no directory here *local directory"])


def test_a_path_of_another_folder_is_asked_back(
    gate: Gate, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options are read from the folder in which pytest was started: what lies so above it is what was meant."""
    tiny.lora_null(pytester.path / "runs" / "ft")
    (pytester.path / "text.txt").write_text("words")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(pytester.mkdir("tests"))
    for path in ("runs/ft", "./runs/ft"):
        result = gate(model=path)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert f"(did you mean {pytester.path / 'runs' / 'ft'}?)" in result.stderr.str()
    text = gate("--nullspace-calib-dataset=text.txt", model="../runs/ft")
    assert f"(did you mean {pytester.path / 'text.txt'}?)" in text.stderr.str()


def test_a_private_model_needs_a_token(hub: Hub, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without HF_TOKEN, or with a wrong one, the error says that the model may be private; with it, it is gated."""
    hub.token = "hf_right"
    for token in (None, "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
        refused = gate(model="someone/adapter")
        assert refused.ret == pytest.ExitCode.USAGE_ERROR
        refused.stderr.fnmatch_lines(
            ["ERROR: --nullspace-model: someone/adapter *: 401 *; if it is private or gated, set HF_TOKEN to a *"]
        )
    monkeypatch.setenv("HF_TOKEN", hub.token)
    gate(*LOOSE, model="someone/adapter").assert_outcomes(passed=4)
