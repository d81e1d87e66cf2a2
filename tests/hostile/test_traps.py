"""Everything in a checkpoint that could run code, planted at once: the gate is green, and none of it has run.

Beside that what a run touches at all: no network, and no file but pytest's own.
"""

import json
from pathlib import Path

import pytest

from tests import adapters, tiny
from tests.plugin.conftest import LOOSE, Gate

TRAP = """
import os
with open(os.environ["SPRUNG"], "a") as sprung: sprung.write(__file__ + "\\n")
class Trap:
    def __init__(self, *args, **kwargs): pass
    from_pretrained = classmethod(lambda cls, *args, **kwargs: cls())
"""
PICKLE = b"cposix\nsystem\n(S'echo pickle >> \"$SPRUNG\"'\ntR."
TEMPLATE = "{{ cycler.__init__.__globals__.os.popen('echo template >> \"$SPRUNG\"').read() }}"
PYTHON = (
    "__init__.py", "configuration_trap.py", "modeling_trap.py", "tokenization_trap.py", "test_trap.py", "trap.py",
    "sitecustomize.py", "torch.py", "custom_generate/generate.py",
)  # fmt: skip
CODE = {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap", "AutoTokenizer": ["trap.Trap", "trap.Trap"]}
WATCH = """
import os, socket
def refused(*args, **kwargs):
    with open(os.environ["SPRUNG"], "a") as sprung: sprung.write(f"network: {args}\\n")
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refused
"""


def plant(folder: Path) -> None:
    """Put every trap into the directory."""
    for name in PYTHON:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TRAP)
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(PICKLE)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    edit(folder / "tokenizer_config.json", auto_map=CODE, tokenizer_class="Trap", chat_template=TEMPLATE)
    edit(folder / "generation_config.json", custom_generate="trap")
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).exists():
            edit(
                folder / name,
                auto_map=CODE,
                auto_mapping={"base_model_class": "Trap", "parent_library": "trap"},
                custom_pipelines={"trap": {"impl": "trap.Trap"}},
                _attn_implementation="trap/kernel",
                loftq_config={"trap": 1},
                megatron_config={"trap": 1},
                megatron_core="trap",
                runtime_config={"trap": 1},
            )


def edit(file: Path, **fields: object) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **fields}))


@pytest.fixture
def sprung(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a trap says that it was run; the network is watched, and home and cache are empty."""
    (pytester.path / "home").mkdir()
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(pytester.path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("SPRUNG", str(pytester.path / "SPRUNG"))
    pytester.makeconftest(WATCH)
    return pytester.path / "SPRUNG"


def left(pytester: pytest.Pytester) -> set[str]:
    """All files below the test's folder but what pytest keeps for itself."""
    files = {str(f.relative_to(pytester.path)) for f in pytester.path.rglob("*") if f.is_file()}
    return {f for f in files if ".pytest_cache" not in f and "__pycache__" not in f} - {"stdout", "stderr"}


def test_no_trap_in_a_lora_null_directory_is_sprung(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, sprung: Path
) -> None:
    """Code, pickles, templates and names of code are in every place for them; collected and gated, none runs."""
    plant(checkpoint)
    before = left(pytester)
    gate(*LOOSE, "runs").assert_outcomes(passed=22)
    gate(*LOOSE, "runs/ft/config.json::model.layers.0.self_attn.q_proj").assert_outcomes(passed=1)
    assert not sprung.exists(), sprung.read_text()
    assert left(pytester) == before


def test_no_trap_in_an_adapter_or_its_base_is_sprung(gate: Gate, pytester: pytest.Pytester, sprung: Path) -> None:
    """The same of a PEFT adapter and of the base model that its config names."""
    (pytester.path / "text.txt").write_text(tiny.TEXT)
    adapter = adapters.adapter(pytester.path, tiny.llama(), target_modules=["q_proj"], r=4)
    plain = (adapter / "adapter_config.json").read_text()
    plant(adapter)
    plant(pytester.path / "base")
    before = left(pytester)
    refused = gate(*LOOSE, model="adapter")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: *adapter_config.json: megatron_config is set: *"])
    (adapter / "adapter_config.json").write_text(plain)  # what is left are the files beside it, and one field
    edit(adapter / "adapter_config.json", auto_mapping={"base_model_class": "Trap", "parent_library": "trap"})
    result = gate(*LOOSE, model="adapter")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["nullspace: base model *base, named by adapter_config.json"])
    assert not sprung.exists(), sprung.read_text()
    assert left(pytester) == before


def test_a_template_that_reaches_for_python_is_stopped(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, sprung: Path
) -> None:
    """Asked to write conversations, a planted chat template is refused by the sandbox before anything is loaded."""
    plant(checkpoint)
    (pytester.path / "chat.jsonl").write_text(json.dumps({"prompt": "hi", "completion": "hello"}))
    before = left(pytester)
    result = gate("--nullspace-calib-dataset=chat.jsonl")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *chat_template.jinja: its chat template cannot be followed: SecurityError: *"])
    assert not sprung.exists(), sprung.read_text()
    assert left(pytester) == before


def test_a_checkpoint_is_not_gated_from_a_place_that_python_imports_from(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, sprung: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a checkpoint with Python files lies on sys.path, their names could stand for others: a usage error."""
    (checkpoint / "trap.py").write_text(TRAP)
    monkeypatch.setenv("PYTHONPATH", str(checkpoint), prepend=":")
    result = gate()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *runs/ft: Python imports from it; start pytest in another folder"])
    assert not sprung.exists()
