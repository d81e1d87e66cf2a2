"""Fixtures for tests that users write about the gated checkpoint; the gate and they share one measurement."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_nullspace.run.stats import LayerStats, RunStats
    from pytest_nullspace.shell.runs import GatedRun

RUNS = pytest.StashKey[tuple["GatedRun", ...]]()
"""Where the plugin keeps the checkpoints of this run of pytest."""

NO_MODEL = "no --nullspace-model was given, and no --nullspace-stats"


def runs_of(config: pytest.Config) -> "tuple[GatedRun, ...]":
    """What is gated in this run; none where the plugin is inert."""
    return config.stash.get(RUNS, ())


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Parametrize ``nullspace_layer`` over the gated layers of every checkpoint."""
    if "nullspace_layer" not in metafunc.fixturenames:
        return
    runs = runs_of(metafunc.config)
    params = [(number, name) for number, run in enumerate(runs) for name in run.gated]
    ids = [name if len(runs) == 1 else f"{runs[number].name}:{name}" for number, name in params]
    if not params:
        params, ids = [pytest.param(None, marks=pytest.mark.skip(NO_MODEL))], ["none"]  # type: ignore[list-item]
    metafunc.parametrize("nullspace_layer", params, ids=ids, indirect=True)


def _measured(run: "GatedRun", request: pytest.FixtureRequest) -> "RunStats":
    from pytest_nullspace.shell.progress import measured

    outcome = measured(run, request.node, request.config)
    if not outcome.layers:
        why = "screen takes those of the base alone" if run.screened else "weights-only gates weights alone"
        pytest.fail(f"no activation was measured: --nullspace-{why}", pytrace=False)
    return outcome


@pytest.fixture
def nullspace_layer(request: pytest.FixtureRequest) -> "LayerStats":
    """What was measured at one adapted layer; the test runs once for each layer that is gated."""
    number, name = request.param
    layer = _measured(runs_of(request.config)[number], request).layer(name)
    assert layer is not None
    return layer


@pytest.fixture
def nullspace_run(request: pytest.FixtureRequest) -> "RunStats":
    """What was measured of the checkpoint, all layers."""
    runs = runs_of(request.config)
    if not runs:
        pytest.skip(NO_MODEL)
    if len(runs) > 1:
        pytest.fail(f"nullspace_run is of one checkpoint, but {len(runs)} are given", pytrace=False)
    return _measured(runs[0], request)
