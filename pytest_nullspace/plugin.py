"""The entry point: options, fixtures, and the gate where a model is named. Without one nothing is imported or done."""

import pytest

from pytest_nullspace.errors import NullspaceError
from pytest_nullspace.fixtures import RUNS, nullspace_layer, nullspace_run, parametrize
from pytest_nullspace.options import add_options, read_settings

__all__ = ["nullspace_layer", "nullspace_run"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Open the checkpoints and register the gate; whatever is wrong with them ends pytest with a usage error."""
    try:
        settings = read_settings(config)
        if settings is None:
            return
        from pytest_nullspace.gate import Gate

        gate = Gate(config, settings)
    except NullspaceError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[RUNS] = gate.runs
    if config.pluginmanager.register(gate, "nullspace-gate") is None:
        raise pytest.UsageError("a model is to be gated, but the gate is blocked by -p no:nullspace-gate")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give ``nullspace_layer`` its layers."""
    parametrize(metafunc)
