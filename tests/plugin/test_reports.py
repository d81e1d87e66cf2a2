"""Whole reports, from the first line to the last, as somebody reads them."""

import re
from pathlib import Path

import pytest

from fixtures.build import WORLD
from tests import saved
from tests.example import Example, differences

ROOT = Path(__file__).parents[2]


def test_the_report_that_the_readme_shows_is_the_one_that_its_command_prints(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's first command prints what README says that it prints, line by line, at 80 columns."""
    readme = (ROOT / "README.md").read_text("utf-8")
    (stated,) = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    command = re.search(r"\.venv/bin/pytest (fixtures .*)$", readme, re.MULTILINE)
    assert command is not None
    copied = {
        "fixtures/pytest.ini": WORLD.parent / "pytest.ini",
        **{f"fixtures/world/{name}": WORLD / name for name in ("null-v2", "facts.txt", "task.txt")},
    }
    outcome = Example(tuple(command[1].split()), copied).run(pytester, monkeypatch)
    assert outcome.code == 0
    assert differences(outcome.text, stated) == []
    assert max(map(len, outcome.text.splitlines())) <= 80


LOUD = """\
nullspace: stats.json (saved run of runs/ft, 9 of 9 layers); text text.txt;
  nothing is measured now
collected 10 items

stats.json F........F                                                    [100%]

============================ nullspace: stats.json =============================
verdict: DO NOT DEPLOY: 1 of 9 layers have no null space
✗ leakage: 1 layer, worst model.layers.0.self_attn.q_proj 14.4
✗ preservation: 1 layer, worst model.layers.0.self_attn.q_proj 1
more: pytest --nullspace-explain=leakage
gated 9 of 9 layers: 8 green, 0 to look at, 1 red
profile nullspace: a LoRA-Null directory
  worst layers                     leakage preservation effectiveness
✗ model.layers.0.self_attn.q_proj     14.4            1        0.0625
  average                             1.61        0.139        0.0625
=========================== short test summary info ============================
FAILED stats.json::model.layers.0.self_attn.q_proj - Failed: preservation 1 >...
FAILED stats.json::model - Failed: leakage 1.614 > 0.75
========================= 2 failed, 8 passed in 0s ==========================
verdict: DO NOT DEPLOY: 1 of 9 layers have no null space
"""


def test_a_red_report_at_80_columns(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved run with one loud layer: the layer's failure, the table, the reading and what it is about, whole."""
    saved.save(pytester.path / "loud.json", saved.run(down_norm=8.0, mean_leakage=0.9))
    example = Example(("--nullspace-stats=stats.json",), {"stats.json": pytester.path / "loud.json"})
    outcome = example.run(pytester, monkeypatch)
    assert outcome.code == 1
    assert differences(outcome.text, LOUD) == []
