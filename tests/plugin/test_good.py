"""Adapters that were trained as they should be, and must pass: some of those of the documentation."""

from pathlib import Path

import pytest

from fixtures import good
from fixtures.build import WORLD, Schedule
from fixtures.good import GOOD, Good, Ground
from fixtures.world import Architecture
from tests.plugin.conftest import Gate

# PEFT's own, while it makes adapters.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

READING = Schedule(60, 4e-3)
"""Enough for a base that knows how the facts are written, if none of them by heart."""
HELD = ("llama-v2-2", "llama-v2-64", "llama-peft-16", "llama-v1-16", "qwen2-v2-16")


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Ground]:
    """The base of each architecture, made when it is first asked for."""
    return {kind: good.ground(tmp_path_factory.mktemp("base") / kind, kind, READING) for kind in ("llama", "qwen2")}


@pytest.mark.parametrize("adapter", [one for one in GOOD if one.name in HELD], ids=lambda one: one.name)
def test_a_good_adapter_passes(
    adapter: Good, grounds: dict[Architecture, Ground], gate: Gate, pytester: pytest.Pytester
) -> None:
    """What kept the facts and learned of the task is green on both texts and by its drift."""
    on = grounds[adapter.architecture]
    assert good.build(adapter, on, pytester.path / "good").is_good
    result = gate(*good.gate(adapter, on, Path("good")), *good.TASK, model=None, quick=())
    assert result.ret == 0, result.outlines


def test_every_kind_and_architecture_is_among_the_documented() -> None:
    """The page holds both formats, every initialisation, ranks from 2 to 64 and two architectures, once each."""
    assert {one.kind for one in GOOD} == {"v2", "v1", "CorDA", "PEFT", "PEFT CorDA"}
    assert {one.architecture for one in GOOD} == {"llama", "qwen2"}
    assert {2, 4, 8, 16, 32, 64} <= {one.rank for one in GOOD}
    rows = (WORLD.parents[1] / "docs" / "good.md").read_text("utf-8").splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:4]] for row in rows if row.startswith("| ")]
    assert cells[1:] == [[one.architecture, one.kind, str(one.rank)] for one in GOOD]
