"""The entry point: options, fixtures, and the gate where a model is named. Without one nothing is imported or done."""

from collections.abc import Generator

import pytest

from pytest_nullspace.errors import NullspaceError, escaped
from pytest_nullspace.shell.asked import early_models, holds_model, mistyped, read_settings
from pytest_nullspace.shell.declared import add_options
from pytest_nullspace.shell.fixtures import RUNS, nullspace_layer, nullspace_run, parametrize

__all__ = ["nullspace_layer", "nullspace_run"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    add_options(parser)


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None]:
    """Refuse a model that brings a conftest.py before pytest runs it, as it would for an id copied from a report.

    And an option that is none, once the conftest files had their chance to bring it.
    """
    for directory in early_models(early_config):
        found = next((file for name in ("conftest.py", "test*/conftest.py") for file in directory.glob(name)), None)
        if found is not None:
            raise pytest.UsageError(escaped(f"{found}: pytest would run it as a part of your tests; remove it"))
    yield
    for unknown in parser.parse_known_and_unknown_args(args)[1]:
        if (told := mistyped(unknown)) is not None:
            raise pytest.UsageError(escaped(told))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Where a cause or a figure is to be explained, print its page in place of a run."""
    asked = config.getoption("nullspace_explain")
    if asked is None:
        return None
    from pytest_nullspace.shell.explain import explain

    try:
        print(explain(asked))
    except NullspaceError as error:
        raise pytest.UsageError(str(error)) from None
    return pytest.ExitCode.OK


def pytest_configure(config: pytest.Config) -> None:
    """Open the checkpoints and register the gate; whatever is wrong with them ends pytest with a usage error."""
    try:
        settings = read_settings(config)
        if settings is None:
            return
        from pytest_nullspace.shell.gate import Gate

        gate = Gate(config, settings)
    except NullspaceError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[RUNS] = gate.runs
    if config.pluginmanager.register(gate, "nullspace-gate") is None:
        raise pytest.UsageError("a model is to be gated, but the gate is blocked by -p no:nullspace-gate")
    if settings.ranks.rank:
        # Of the processes that measure together one reports. Those who would are registered later than this.
        config.pluginmanager.set_blocked("terminalreporter")
        config.option.xmlpath = None


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Where an adapter's folder is named as one of tests and nothing is gated, say how it would be."""
    return (
        []
        if RUNS in config.stash
        else [
            f"nullspace: {argument} is not gated without --nullspace-model={argument}"
            for argument in map(escaped, config.option.file_or_dir)
            if holds_model(config.invocation_params.dir / argument)
        ]
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give ``nullspace_layer`` its layers."""
    parametrize(metafunc)
