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

=================================== FAILURES ===================================
____________________ layer model.layers.0.self_attn.q_proj _____________________
preservation 1 > 0.5, leakage 14.4 > 0.75

mean norms over 100 rows: ||X|| 8, ||BX|| 8, ||ABX|| 0.5, ||W_residual X|| 7.5, ||output|| 10
✗ ||BX||/||X|| 1.00e+00 (pass < 0.1, fail > 0.5): the null space is lost: B reads what this text uses; was B \
trained, or is this other data?
✓ ||ABX||/||X|| 6.25e-02 (pass > 0.0001, fail < 1e-06): the adapter learned: A moved from zero to a meaningful value
✗ leakage / chance 1.44e+01 (pass < 0.5, fail > 0.75): not a null space of this text: 14.4 times louder than \
a random subspace
_________________________________ layer model __________________________________
leakage 1.614 > 0.75

averages over 9 layers
⚠ ||BX||/||X|| 1.39e-01 (pass < 0.1, fail > 0.5): the null space is degraded, but acceptable
✓ ||ABX||/||X|| 6.25e-02 (pass > 0.0001, fail < 1e-06): the adapter learned: A moved from zero to a meaningful value
✓ ||ABX||/||output|| 5.00% (pass > 0.0005, fail < 0.0002): a clear effect on the output
✗ leakage / chance 1.61e+00 (pass < 0.5, fail > 0.75): not a null space of this text: 1.6 times louder than a \
random subspace
============================ nullspace: stats.json =============================
verdict: DO NOT DEPLOY: 1 of 9 layers have no null space of the preserved
  text
✗ 1 of 9 layers have no null space of the preserved text (leakage 14.4,
  bound 0.75, model.layers.0.self_attn.q_proj)
✗ 1 of 9 layers let the preserved text in (preservation 1, bound 0.5,
  model.layers.0.self_attn.q_proj)
gated 9 of 9 layers: 8 green, 0 to look at, 1 red
judged by its null space, what it forgets and what it learned (profile
  nullspace: a LoRA-Null directory)
sink rows: this run does not tell of them, so a few rows may decide its
  ratios

  worst layers                     preserv. effect. contrib. leakage
✗ model.layers.0.self_attn.q_proj         1  0.0625      5 %    14.4
✓ model.layers.0.mlp.up_proj         0.0312  0.0625      5 %   0.016
✓ model.layers.0.mlp.down_proj       0.0312  0.0625      5 %   0.016
✓ model.layers.1.self_attn.q_proj    0.0312  0.0625      5 %   0.016
✓ model.layers.1.mlp.up_proj         0.0312  0.0625      5 %   0.016
  average                             0.139  0.0625      5 %    1.61

reading (averages over all layers):
⚠ ||BX||/||X|| 1.39e-01 (pass < 0.1, fail > 0.5): the null space is
  degraded, but acceptable
✓ ||ABX||/||X|| 6.25e-02 (pass > 0.0001, fail < 1e-06): the adapter learned:
  A moved from zero to a meaningful value
✓ ||ABX||/||output|| 5.00% (pass > 0.0005, fail < 0.0002): a clear effect on
  the output
✗ leakage / chance 1.61e+00 (pass < 0.5, fail > 0.75): not a null space of
  this text: 1.6 times louder than a random subspace
=========================== short test summary info ============================
FAILED stats.json::model.layers.0.self_attn.q_proj - Failed: preservation 1 >...
FAILED stats.json::model - Failed: leakage 1.614 > 0.75
========================= 2 failed, 8 passed in 0s ==========================
verdict: DO NOT DEPLOY: 1 of 9 layers have no null space of the preserved
  text
"""


def test_a_red_report_at_80_columns(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved run with one loud layer: the layer's failure, the table, the reading and what it is about, whole."""
    saved.save(pytester.path / "loud.json", saved.run(down_norm=8.0, mean_leakage=0.9))
    example = Example(("--nullspace-stats=stats.json",), {"stats.json": pytester.path / "loud.json"})
    outcome = example.run(pytester, monkeypatch)
    assert outcome.code == 1
    assert differences(outcome.text, LOUD) == []
