"""What a user meets first: the help, a gate that was forgotten, and mistakes that are told once."""

import pytest

from pytest_nullspace.settings import PREFIX
from pytest_nullspace.shell.options import OPTIONS
from tests import tiny
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


def test_what_pytest_tells_of_itself_needs_no_gate(pytester: pytest.Pytester) -> None:
    """Where the ini file requires a gate, help, versions, markers and fixtures are shown all the same."""
    pytester.makeini("[pytest]\nnullspace_require = true\n")
    for asked in (
        "--help",
        "--version",
        "-VV",
        "--markers",
        "--fixtures",
        "--fixtures-per-test",
        "--cache-show",
        "--nullspace-explain=dead-layers",
    ):
        assert pytester.runpytest_subprocess(asked).ret in (0, pytest.ExitCode.NO_TESTS_COLLECTED), asked


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
