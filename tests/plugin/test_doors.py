"""What a user meets first: the help, a gate that was forgotten, and mistakes that are told once."""

import json
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pytest_nullspace.settings import PREFIX
from pytest_nullspace.shell.asked import mistyped
from pytest_nullspace.shell.options import OPTIONS
from tests import saved, tiny
from tests.adapters import adapter
from tests.plugin.conftest import Gate, Replay

OWN = "def test_own(nullspace_layer): assert nullspace_layer.rows\n"


# --- the help ---------------------------------------------------------------------------------------------------------


def test_every_help_text_is_shown(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """``pytest --help`` renders the help of every option and of its ini twin, a ``%`` as it stands."""
    monkeypatch.setenv("COLUMNS", "120")
    result = pytester.runpytest_subprocess("--help")
    assert (result.ret, result.stderr.str()) == (0, "")
    shown = " ".join(result.stdout.str().split())
    for option in OPTIONS:
        assert f"{PREFIX}{option.name}" in shown
        assert f"{option.dest} (" in shown
        assert shown.count(" ".join(option.help.split())) == 2, option.name
    assert f"{PREFIX}explain" in shown
    assert "%%" not in shown


@pytest.mark.parametrize("asked", ["--markers", "--fixtures", "--version", "-VV", "--trace-config --collect-only"])
def test_what_else_pytest_shows_of_itself_is_shown(pytester: pytest.Pytester, asked: str) -> None:
    """No other question to pytest about itself fails because the plugin is installed, or because a gate is required."""
    pytester.makepyfile("def test_own(): pass\n")
    assert pytester.runpytest_subprocess(*asked.split()).ret == 0


# --- a gate that was forgotten ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [(), ("-n", "2")], ids=["alone", "parallel"])
@pytest.mark.parametrize("where", ["option", "ini"])
def test_a_required_gate_that_was_forgotten_is_a_usage_error(
    pytester: pytest.Pytester, where: str, parallel: tuple[str, ...]
) -> None:
    """With ``--nullspace-require``, or its ini key, a run that names nothing to gate ends before a test is run."""
    pytester.makepyfile(OWN)
    pytester.makeini("[pytest]\n" + ("nullspace_require = true\n" if where == "ini" else ""))
    asked = ("--nullspace-require",) if where == "option" else ()
    result = pytester.runpytest_subprocess(*asked, *parallel)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().strip() == (
        "ERROR: --nullspace-require: this run gates nothing; give --nullspace-model=DIR or --nullspace-stats=JSON"
    )


@pytest.mark.parametrize("ini", ["nullspace_require = true", "nullspace_model = not/there"])
def test_what_pytest_tells_of_itself_needs_no_gate(pytester: pytest.Pytester, ini: str) -> None:
    """Where the ini file requires a gate, or names a model that is not there, help, versions and markers are shown."""
    pytester.makeini(f"[pytest]\n{ini}\n")
    pytester.makepyfile(OWN)
    for asked in ("--help", "-VV", "--markers", "--cache-show", "--nullspace-explain=dead-layers"):
        assert pytester.runpytest_subprocess(asked).ret == 0, asked
    for asked in ("--fixtures", "--fixtures-per-test"):  # what lies in a model's folder is collected under the gate
        assert pytester.runpytest_subprocess(asked).ret == (0 if "require" in ini else 4), asked
    for asked in ("-v", "--collect-only"):
        assert pytester.runpytest_subprocess(asked, "test_what_pytest_tells_of_itself_needs_no_gate.py").ret == 4, asked


def test_a_forgotten_gate_skips_the_users_tests_unless_one_is_required(pytester: pytest.Pytester) -> None:
    """Without the option the user's tests skip and name it; ``nullspace_require = false`` asks for nothing."""
    pytester.makepyfile(OWN)
    pytester.makeini("[pytest]\nnullspace_require = false\n")
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(skipped=1)
    assert result.ret == 0
    pytester.makeini("[pytest]\nnullspace_require = perhaps\n")
    result = pytester.runpytest_subprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "nullspace_require: takes true or false, not 'perhaps'" in result.stderr.str()


def test_a_saved_run_is_a_gate(replay: Replay) -> None:
    """Beside a saved run the option asks for nothing more."""
    assert replay("--nullspace-require", apart=True).ret == 0


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("parallel", [(), ("-n", "2")], ids=["alone", "parallel"])
@pytest.mark.parametrize("part", [("-k", "layers.0"), ("--nullspace-layers=*q_proj",)], ids=["-k", "layers"])
def test_a_required_gate_is_whole(gate: Gate, part: tuple[str, ...], parallel: tuple[str, ...]) -> None:
    """What a selection left out is NOT GATED: green for who works on a layer, and red where the gate is required."""
    lenient = ("--nullspace-profile=lora", "--nullspace-no-drift", *parallel)
    assert gate(*part, *lenient).ret == 0
    required = gate("--nullspace-require", *part, *lenient)
    assert required.ret == 1
    assert "failed" not in required.parseoutcomes()
    required.stdout.fnmatch_lines(["nullspace: NOT GATED: *ft: only *, and --nullspace-require asks for all"])
    assert gate("--nullspace-require", *lenient).ret == 0


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("parallel", [(), ("-n", "2"), ("-p", "no:terminal")], ids=["alone", "parallel", "silent"])
def test_a_required_gate_has_measured(gate: Gate, parallel: tuple[str, ...]) -> None:
    """Weights alone, whatever they show, and a list of tests are no measurement: red, with why and what to do."""
    required = gate("--nullspace-require", "--nullspace-weights-only", *parallel, quick=())
    assert required.ret == 1
    told = (
        "nullspace: NOT GATED: *ft: gated on weights, activations not measured, and --nullspace-require asks for a "
        "measurement; leave out --nullspace-weights-only, or the requirement (-o nullspace_require=false where the ini "
        "file sets it)"
    )
    shown = " ".join([*required.outlines, *required.errlines])
    assert fnmatch(" ".join(shown.split()), f"*{told}*")
    assert "no:terminal" in parallel or "layers, by norms" in shown


@pytest.mark.usefixtures("checkpoint")
def test_a_list_of_tests_is_no_gate(gate: Gate) -> None:
    """Listing says nothing of what was not run; where a gate is required it is red, for it measures nothing."""
    for listed in ("--collect-only", "--fixtures"):
        plain = gate(listed)
        assert (plain.ret, "NOT GATED" in plain.stdout.str()) == (0, False)
    required = gate("--collect-only", "--nullspace-require")
    assert required.ret == 1
    required.stdout.fnmatch_lines(
        ["nullspace: NOT GATED: --collect-only measures nothing, and --nullspace-require asks for all"]
    )


@pytest.mark.usefixtures("checkpoint")
def test_the_ini_files_requirement_can_be_left_out(gate: Gate, pytester: pytest.Pytester) -> None:
    """What the message says to do does it."""
    (pytester.path / "pytest.ini").write_text("[pytest]\nnullspace_require = true\n")
    assert gate("--nullspace-weights-only", quick=()).ret == 1
    assert gate("--nullspace-weights-only", "-o", "nullspace_require=false", quick=()).ret == 0


# --- what the libraries show ------------------------------------------------------------------------------------------


def test_no_library_speaks_into_a_failing_test(pytester: pytest.Pytester, gate: Gate) -> None:
    """The first test to fail shows its own message alone: nothing that a library printed while it loaded the base."""
    (pytester.path / "text.txt").write_text(tiny.TEXT)
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    adapter(pytester.path, tiny.llama(), r=4, target_modules=["q_proj"])
    result = gate("--nullspace-threshold=effectiveness:1e6:1e5", "-rA", model="adapter")
    assert result.ret == 1
    assert "Captured" not in result.stdout.str()
    assert "Loading weights" not in result.stdout.str() + result.stderr.str()


# --- what is wrong before anything is measured ----------------------------------------------------------------------


def refused(result: pytest.RunResult, message: str) -> None:
    """Hold that the run ended with one usage error that fits ``message``, and collected nothing."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR, result.stdout.str()
    assert "collected" not in result.stdout.str()
    lines = result.stderr.str().strip().splitlines()
    assert len(lines) == 1, lines
    assert re.fullmatch(f"ERROR: {message}", lines[0]), lines[0]


ONCE = [(), ("-n", "2"), ("-p", "no:xdist")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.txt", r".*missing\.txt: no such file or folder.*"),
        ("rows.csv:body", r".*rows\.csv: has no column 'body'; its columns: text"),
        ("empty.txt", r".*empty\.txt: holds no text; give one of some 100,000 characters"),
        ("shrot.txt", r".*: no such file or folder .* \(did you mean .*short\.txt\?\)\. .*"),
        ("short.txt", r".*short\.txt: the text has 12 characters, and windows of 32 tokens need at least 33; .*"),
        ("wikitext2", r"hub dataset Salesforce/wikitext .*: cannot be loaded: .* \(wikitext2 is .* none is given\)"),
        ("hub:nobody/nothing", r"hub dataset nobody/nothing .*: cannot be loaded: .*"),
    ],
)
def test_a_text_that_cannot_be_had_is_one_usage_error(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, text: str, message: str
) -> None:
    """Of either text all that can be told without torch is told once, before pytest collects."""
    for name, content in (("rows.csv", "text\nword\n"), ("empty.txt", "\n \n"), ("short.txt", "a short text")):
        (pytester.path / name).write_text(content)
    pytester.makeconftest("import sys; sys.modules['torch'] = None")
    for args in (
        (f"--nullspace-calib-dataset={text}",),
        (f"--nullspace-task-dataset={text}", "-n", "2"),
        (f"--nullspace-calib-dataset={text}", "-p", "no:xdist"),
    )[: 3 if text == "wikitext2" else 1]:
        refused(gate(*args), message)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.fixture(scope="module")
def on_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny PEFT adapter and its base; to be copied, never changed."""
    folder = tmp_path_factory.mktemp("on-base")
    adapter(folder, tiny.llama(), r=4, target_modules=["q_proj"])
    (folder / "text.txt").write_text(tiny.TEXT)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, r".*base_model_name_or_path: .*base is no directory, .* by --nullspace-base=DIR"),
        (lambda base: (base / "config.json").unlink(), r".*base: is no base model: .*"),
        (lambda base: (base / "config.json").write_text("{"), r".*base/config\.json: .*"),
        (without_weights, r".*base: holds no base model that can be read, for no \*\.safetensors is in it; .*"),
        (cut_short, r".*base/model\.safetensors: .*"),
        (lambda base: (base / "tokenizer.json").unlink(), r".*base: no tokenizer lies in it .*"),
        (lambda base: (base / "tokenizer.json").write_text("{}"), r".*base: its tokenizer cannot be loaded: .*"),
    ],
    ids=["gone", "no-config", "half-a-config", "no-weights", "half-the-weights", "no-tokenizer", "no-such-tokenizer"],
)
def test_a_base_that_cannot_be_read_is_one_usage_error(
    on_base: Path, gate: Gate, pytester: pytest.Pytester, spoil: Callable[[Path], object], message: str
) -> None:
    """What is wrong with the base's files, or the tokenizer's, is told once, before torch is imported."""
    shutil.copytree(on_base, pytester.path, dirs_exist_ok=True)
    config = pytester.path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(on_base), str(pytester.path)))
    spoil(pytester.path / "base")
    pytester.makeconftest("import sys; sys.modules['torch'] = None")
    refused(gate(model="adapter"), message)


def test_peft_that_is_not_there_or_too_old_is_one_usage_error(
    on_base: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """An adapter of PEFT without it is refused before torch is imported; its weights alone need none."""
    shutil.copytree(on_base, pytester.path, dirs_exist_ok=True)
    told = r".*adapter: is a LoRA adapter, which PEFT puts on its base, and that {}; pip install 'peft>=0\.18'"
    pytester.makeconftest("import sys; sys.modules['torch'] = sys.modules['peft'] = None\n")
    refused(gate(model="adapter"), told.format("is not installed"))
    assert gate("--nullspace-weights-only", model="adapter").ret == 0
    pytester.makeconftest(
        "import importlib.metadata as found\n"
        "had = found.version\n"
        "found.version = lambda name: '0.17.1' if name == 'peft' else had(name)\n"
    )
    refused(gate(model="adapter"), told.format(r"is installed as 0\.17\.1, and 0\.18 or later is needed"))


def test_a_model_among_the_tests_that_is_not_gated_is_told(
    on_base: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """A model's folder among the tests is the one that is gated: beside another it is refused, alone it is told."""
    shutil.copytree(on_base, pytester.path, dirs_exist_ok=True)
    shutil.copytree(pytester.path / "adapter", pytester.path / "new")
    told = r"new: is a model, but --nullspace-model names another, .*adapter; give both the same, or leave new out"
    refused(gate("new", model="adapter"), told)
    assert gate("--collect-only", ".", "adapter", model="adapter").ret == 0
    alone = gate("new", model=None, quick=())
    assert alone.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    alone.stdout.fnmatch_lines(["nullspace: new is not gated without --nullspace-model=new"])


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--nullspace-modle=runs/ft", "--nullspace-model"),
        ("--null-space-model=runs/ft", "--nullspace-model"),
        ("--nullspace_calib_dataset=x.txt", "--nullspace-calib-dataset"),
        ("--nullspace-explian", "--nullspace-explain"),
        ("--nullspace-no-drfit", "--nullspace-no-drift"),
        ("--nulspace-model=runs/ft", "--nullspace-model"),
        ("--nullspace-html=gate.html", "--nullspace-report"),
        ("--nullspace-text=kept.txt", "--nullspace-calib-dataset"),
        ("--nullspace-base-model=base", "--nullspace-base"),
        ("--nullspace-max_length=512", "--nullspace-seqlen"),
    ],
)
def test_an_option_that_was_mistyped_is_asked_back(argument: str, meant: str) -> None:
    """An unknown option that looks like one of the plugin's is told with the one that was meant."""
    name = argument.partition("=")[0]
    assert mistyped(argument) == f"{name}: no such option; did you mean {meant}? (pytest --help lists all)"
    for strange in ("xyz", "quiet", "verbose"):
        assert mistyped(f"--nullspace-{strange}") == f"--nullspace-{strange}: no such option (pytest --help lists all)"


def test_options_of_others_are_left_to_pytest(gate: Gate, pytester: pytest.Pytester) -> None:
    """What is like no option of the plugin is pytest's to refuse, and what a conftest file brings is nobody's."""
    refused(gate("--nullspace-modle"), r"--nullspace-modle: no such option; did you mean --nullspace-model\? .*")
    other = pytester.runpytest_subprocess("--no-such-thing")
    assert "unrecognized arguments: --no-such-thing" in other.stderr.str()
    pytester.makeconftest("def pytest_addoption(parser): parser.addoption('--nullspace-mine', action='store_true')\n")
    pytester.makepyfile("def test_own(pytestconfig): assert pytestconfig.getoption('--nullspace-mine')\n")
    assert pytester.runpytest_subprocess("--nullspace-mine").ret == 0


def test_an_option_that_names_no_base_and_a_start_that_is_none_are_usage_errors(
    on_base: Path, gate: Gate, pytester: pytest.Pytester
) -> None:
    """What ``--nullspace-base`` and ``--nullspace-init`` name is looked at as well."""
    shutil.copytree(on_base, pytester.path, dirs_exist_ok=True)
    refused(gate("--nullspace-base=no/such/base", model="adapter"), r"--nullspace-base: no/such/base is no directory.*")
    refused(gate("--nullspace-init=base", model="adapter"), r".*base.*")


def test_listing_the_tests_looks_only_for_what_lies_here(on_base: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """--collect-only needs no network and no library, and still says that a text or a base is not there."""
    shutil.copytree(on_base, pytester.path, dirs_exist_ok=True)
    heavy = ("torch", "transformers", "datasets", "tokenizers", "pyarrow")
    pytester.makeconftest("import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in heavy))
    for text in ("text.txt", "wikitext2", "hub:nobody/nothing"):
        listed = gate("--collect-only", "-q", f"--nullspace-calib-dataset={text}", model="adapter")
        assert listed.ret == 0
        assert sum("::" in line for line in listed.outlines) == 4
    refused(gate("--collect-only", "--nullspace-calib-dataset=none.txt", model="adapter"), r".*none\.txt: no such .*")
    assert gate("--collect-only", "--nullspace-base=nobody/nothing", model="adapter").ret == 0


# --- what only loading shows ----------------------------------------------------------------------------------------


def test_what_stops_the_measurement_is_shown_once(on_base: Path, gate: Gate, pytester: pytest.Pytester) -> None:
    """Without ``-v`` pytest shows the one error, and none of the tests that wait for it."""
    shutil.copytree(on_base, pytester.path, dirs_exist_ok=True)
    config = json.loads((pytester.path / "base" / "config.json").read_text())
    (pytester.path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}))
    shown = gate("--nullspace-base=base", model="adapter").stdout.str().partition("short test summary")[0]
    assert shown.count("ERROR at setup of ") == shown.count("has no model_type 'nosuch' of its own") == 1
    assert "see the first error" not in shown


@pytest.mark.parametrize("mode", ONCE, ids=["alone", "parallel", "no-xdist"])
def test_a_base_that_cannot_be_loaded_is_told_once_and_whole(
    on_base: Path, gate: Gate, pytester: pytest.Pytester, mode: tuple[str, ...]
) -> None:
    """One test says what is wrong, the gate's others and the user's own that they wait for it; none shows a chain."""
    shutil.copytree(on_base, pytester.path, dirs_exist_ok=True)
    config = json.loads((pytester.path / "base" / "config.json").read_text())
    (pytester.path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}))
    pytester.makepyfile(OWN)
    result = gate(*mode, "-vv", "--nullspace-base=base", model="adapter")
    assert result.ret == 1
    result.assert_outcomes(errors=4 + 3)
    shown = result.stdout.str().partition("short test summary")[0]
    assert shown.count("has no model_type 'nosuch' of its own") == 1
    assert shown.count("not measured: see the first error of adapter") == 6
    assert result.outlines[-1].startswith("verdict: NOT GATED: ")
    assert "[gw" not in result.outlines[-1], "the worker is no reason"
    for word in ("During handling", "direct cause", "Traceback", "Captured"):
        assert word not in shown


TIMEOUT = """
import signal
import time

import pytest
import {module} as module


def over(*_):
    pytest.fail("Timeout (>1.0s) from a fake pytest-timeout.")


def hangs(*_, **__):
    open("began.log", "a").write("x")
    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    time.sleep(60)


module.{function} = hangs
"""


@pytest.mark.parametrize(
    ("module", "function", "mode"),
    [
        ("pytest_nullspace.model", "import_libraries", ()),
        ("pytest_nullspace.measuring.reading", "load_tokenizer", ("-n", "2")),
        ("pytest_nullspace.measuring.reading", "load_tokenizer", ("-p", "no:xdist")),
    ],
    ids=["import", "parallel", "no-xdist"],
)
def test_a_timeout_within_the_measurement_ends_it_for_all(
    checkpoint: Path, gate: Gate, pytester: pytest.Pytester, module: str, function: str, mode: tuple[str, ...]
) -> None:
    """Where a timeout plugin breaks off the measurement, or an import for it, no later test begins it again."""
    pytester.makeconftest(TIMEOUT.format(module=module, function=function))
    result = gate(*mode, "-vv")
    assert result.ret == 1
    assert (pytester.path / "began.log").read_text() == "x"
    result.assert_outcomes(errors=22)
    shown = result.stdout.str().partition("short test summary")[0]
    assert shown.count("E       Failed: Timeout (>1.0s) from a fake pytest-timeout.") == 1
    assert (
        shown.count("ft: the measurement was broken off by Failed: Timeout (>1.0s) from a fake pytest-timeout; ") == 1
    )
    assert shown.count("not measured: see the first error of ft") == 20


# --- what was saved -------------------------------------------------------------------------------------------------


def test_only_files_that_were_written_are_said_to_be_saved(
    checkpoint: Path, gate: Gate, replay: Replay, pytester: pytest.Pytester
) -> None:
    """The last lines name each file of statistics that is there now, and none where nothing was measured."""

    def told(result: pytest.RunResult) -> list[str]:
        said = "nullspace: statistics saved to "
        return [line.removeprefix(said) for line in result.outlines if line.startswith(said)]

    saved.save(pytester.path / "other.json")
    both = replay("--nullspace-stats=other.json", "--nullspace-save-stats=out-{model}.json", apart=True)
    assert told(both) == [f"out-{name}.json" for name in ("stats", "other")]
    assert all(Path(file).is_file() for file in told(both))
    (pytester.path / "text.txt").write_text("a text that is short\n")
    for args in (
        ("--collect-only",),
        ("-k", "no_such_test"),
        ("--nullspace-seqlen=200",),
        ("--nullspace-dtype=float16", "--nullspace-seqlen=8", "--nullspace-device=cuda:99"),
    ):
        result = gate("--nullspace-save-stats=none.json", *args)
        assert result.ret != 0 or "--collect-only" in args
        assert told(result) == []
        assert not (pytester.path / "none.json").exists()
