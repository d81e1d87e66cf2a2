"""The one verdict on a run, where it is read: first and last on the terminal, in Markdown, in JUnit and in JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pytest_nullspace.run.stats import Drift, RunStats, TextDrift
from tests import saved

QUIET = ("-p", "no:randomly", "-p", "no:cacheprovider")


def run(rise: float = 0.006, **changes: Any) -> RunStats:
    drift = Drift("the base", TextDrift(480, 2.0, 2.0 + rise, rise / 2, 0.001, 0.0001), TextDrift(480, 3, 2, 0.5, 0, 0))
    return dataclasses.replace(saved.run(**changes), drift=drift)


def gate(pytester: pytest.Pytester, told: RunStats, *options: str) -> pytest.RunResult:
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    saved.save(pytester.path / "ft.json", told)
    return pytester.runpytest_inprocess(*QUIET, "--nullspace-stats=ft.json", *options)


def test_the_verdict_is_first_and_last_and_in_every_file(pytester: pytest.Pytester) -> None:
    """One sentence opens the report and ends all output; Markdown, JUnit and JSON hold it as well."""
    files = ("--nullspace-save-stats=out.json", "--nullspace-report=out.md", "--junit-xml=out.xml")
    result = gate(pytester, run(0.3), *files)
    said = "it forgets: the preserved text is 26 % less likely"
    report = result.outlines.index(next(line for line in result.outlines if "= nullspace: ft.json =" in line))
    assert result.outlines[report + 1] == result.outlines[-1] == f"verdict: DO NOT DEPLOY: {said}"
    assert Path("out.md").read_text("utf-8").splitlines()[2] == f"**DO NOT DEPLOY**: {said}"
    assert f'name="nullspace_verdict" value="DO NOT DEPLOY" /><property name="nullspace_why" value="{said}"' in (
        Path("out.xml").read_text("utf-8")
    )
    text = Path("out.json").read_text("utf-8")
    assert next(iter(json.loads(text))) == "verdict"
    assert json.loads(text)["verdict"]["sentence"] == said


def test_a_saved_verdict_is_never_believed(pytester: pytest.Pytester) -> None:
    """A file that says it is safe is judged by its figures, and saved again with the verdict that follows."""
    gate(pytester, run(0.3), "--nullspace-save-stats=out.json")
    forged = json.loads(Path("out.json").read_text("utf-8"))
    forged["verdict"] = {"verdict": "SAFE", "sentence": "trust me"}
    Path("forged.json").write_text(json.dumps(forged), "utf-8")
    result = pytester.runpytest_inprocess(*QUIET, "--nullspace-stats=forged.json", "--nullspace-save-stats=again.json")
    assert "trust me" not in result.stdout.str()
    assert json.loads(Path("again.json").read_text("utf-8"))["verdict"]["verdict"] == "DO NOT DEPLOY"


def test_a_good_run_is_safe_and_a_part_of_it_is_not_gated(pytester: pytest.Pytester) -> None:
    """The same figures: safe where every test ran, and not gated where some were left out."""
    whole = gate(pytester, run())
    whole.assert_outcomes(passed=11)
    assert whole.outlines[-1] == "verdict: SAFE: preserved text 0.6 % less likely, task text 2.7 x as likely"
    part = gate(pytester, run(), "-k", "layers.0.")
    assert part.ret == 0
    part.stdout.fnmatch_lines(["verdict: NOT GATED: only 3 of 11 tests came to a verdict, not*"])


def test_pytests_own_exit_agrees_with_the_verdict(pytester: pytest.Pytester) -> None:
    """Warnings that are errors, and an expected failure: what pytest says of the tests is what the verdict says."""
    strict = gate(pytester, run(0.07), "-W", "error::pytest_nullspace.errors.NullspaceWarning")
    assert strict.ret == 1
    strict.stdout.fnmatch_lines(["verdict: DO NOT DEPLOY: *"])
    (pytester.path / "conftest.py").write_text(
        "import pytest\n"
        "def pytest_collection_modifyitems(items):\n"
        "    for item in items:\n"
        "        if item.name == 'drift': item.add_marker(pytest.mark.xfail)\n"
    )
    expected = gate(pytester, run(0.3))
    assert expected.ret == 0
    expected.stdout.fnmatch_lines(["verdict: LOOK: drift would fail, which a mark of your own expects"])


def test_the_workers_of_xdist_give_one_verdict(pytester: pytest.Pytester) -> None:
    """Under -n the verdict is that of all tests, once first and once last."""
    result = gate(pytester, run(0.3), "-n", "2")
    assert result.outlines[-1] == "verdict: DO NOT DEPLOY: it forgets: the preserved text is 26 % less likely"
    assert sum("verdict: DO NOT DEPLOY" in line for line in result.outlines) == 2


def test_several_candidates_stand_in_one_table(pytester: pytest.Pytester) -> None:
    """Of two saved runs each format tells verdict, drift, gain, forgetting and worst layer, and marks the safe one."""
    quiet, loud = (
        dataclasses.replace(
            of,
            layers=tuple(
                dataclasses.replace(layer, task=dataclasses.replace(layer, update_norm=4.0)) for layer in of.layers
            ),
        )
        for of in (run(), run(0.3))
    )
    saved.save(pytester.path / "bad.json", loud)
    formats = ("--nullspace-report=out.md", "--nullspace-report=out.html", "--junit-xml=out.xml")
    result = gate(pytester, quiet, "--nullspace-stats=bad.json", "--nullspace-save-stats={model}-again.json", *formats)
    result.stdout.fnmatch_lines(
        ["*= nullspace: candidates =*", "★ ft.json *SAFE *", "  bad.json *DO NOT DEPLOY *", "★ best: ft.json, *"]
    )
    assert result.outlines[-2].startswith("verdict on bad.json: DO NOT DEPLOY: ")
    worst = saved.NAMES[0]
    told = {"ft.json": ("SAFE", 0.003, 1.0, worst), "bad.json": ("DO NOT DEPLOY", 0.15, 1.0, worst)}
    markdown = Path("out.md").read_text("utf-8")
    assert markdown.startswith("## nullspace: candidates\n")
    page = Path("out.html").read_text("utf-8").partition('<table class="rivals">')[2].partition("</table>")[0]
    junit = {
        found["name"]: found["value"]
        for found in (told.attrib for told in ElementTree.parse("out.xml").iter("property"))
        if found["name"].startswith("nullspace_")
    }
    json_told = [json.loads(Path(f"{name}-again.json").read_text("utf-8"))["verdict"] for name in ("ft", "bad")]
    assert [of["best"] for of in json_told] == ["ft.json", "ft.json"]
    assert json_told[0]["candidates"] == json_told[1]["candidates"]
    assert junit["nullspace_best"] == "ft.json"
    forgetting = 0.5 / 7.5
    for (name, (call, divergence, gain, layer)), entry in zip(told.items(), json_told[0]["candidates"], strict=True):
        star = "★" if name == "ft.json" else " "
        (row,) = (line for line in result.outlines if line.startswith(f"{star} {name}"))
        assert row.split()[-4:-1] == [f"{divergence:.3g}", f"{gain:.3g}", f"{forgetting:.3g}"]
        assert layer.endswith(row.split()[-1].lstrip("…"))
        cells = f"{call} | {divergence:.3g} | {gain:.3g} | {forgetting:.3g} | {layer} |"
        assert f"| {star} | {name} | {cells}" in markdown
        assert f">{name}</a>" in page
        assert f"<title>divergence {divergence:.3g}, beside the others</title>" in page
        assert entry.pop("task-gain") == pytest.approx(gain)
        assert entry == {
            "name": name, "verdict": call, "divergence": divergence, "forgetting": forgetting, "worst_layer": layer,
            "best": name == "ft.json",
        }  # fmt: skip
        assert junit[f"nullspace_verdict[{name}]"] == call
        assert float(junit[f"nullspace_divergence[{name}]"]) == divergence
        assert float(junit[f"nullspace_task_gain[{name}]"]) == pytest.approx(gain)
        assert float(junit[f"nullspace_forgetting[{name}]"]) == forgetting
        assert junit[f"nullspace_worst_layer[{name}]"] == layer


MANY = [f"model.layers.{block}.mlp.up_proj" for block in range(200)]


def lost(*names: str) -> RunStats:
    """A run of which no layer has a null space."""
    told = saved.run(*names)
    loud = tuple(dataclasses.replace(layer, mean_leakage=0.9) for layer in told.layers)
    return dataclasses.replace(told, layers=loud, drift=run(0.3).drift)


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_two_hundred_failures_take_forty_lines(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: tuple[str, ...]
) -> None:
    """Failures are grouped and a few ids listed within 80 columns; counts, JUnit and a user's own traceback stay."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("CI", raising=False)
    short = gate(pytester, lost(*MANY), "--junit-xml=out.xml", *workers)
    short.assert_outcomes(failed=202)
    other = ("benchmark: ", "plugins: ", "rootdir: ", "-")
    own = [line for line in short.outlines if not line.startswith(other)]
    assert len(own) <= 40, short.stdout.str()
    assert max(map(len, own)) <= 80
    short.stdout.fnmatch_lines(["✗ leakage: 200 layers, worst model.layers.*", "... and 199 more (all with -v)"])
    assert sum(line.startswith("FAILED ") for line in own) == 3
    assert Path("out.xml").read_text("utf-8").count("<failure ") == 202


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_a_message_fits_the_terminal_and_is_whole_in_junit(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: tuple[str, ...]
) -> None:
    """What a failed test says is wrapped at the terminal's width, and stands in one line in JUnit's file."""
    monkeypatch.setenv("COLUMNS", "80")
    result = gate(pytester, lost(*MANY[:3]), "-v", "--junit-xml=out.xml", *workers)
    shown = result.stdout.str().partition("= FAILURES =")[2].partition("= nullspace: ")[0]
    said = "drift on the preserved text: loss "
    assert said in shown
    assert max(len(line) for line in shown.splitlines() if not line.startswith("-")) <= 80
    whole = [line for line in Path("out.xml").read_text("utf-8").splitlines() if said in line]
    assert len(whole) == 2, "in the message and in the text"
    assert min(map(len, whole)) > 80


def test_whoever_asks_sees_all_and_other_tests_are_left_alone(pytester: pytest.Pytester) -> None:
    """``-v``, ``-rf`` and ``-rA`` list every failure, ``-vv`` shows each, ``-v`` a few; a user's test fails as ever."""
    (pytester.path / "test_own.py").write_text("def test_own():\n    assert 1 == 2\n")
    names = MANY[:9]
    for asked, blocks in (("-vv", 11), ("-v", 3), ("-rf", 0), ("-rA", 0)):
        result = gate(pytester, lost(*names), asked, ".")
        assert sum(line.startswith("FAILED ") for line in result.outlines) == 9 + 2 + 1, asked
        assert sum("_ layer " in line for line in result.outlines) == blocks, asked
        hidden = "... and 8 more, each with its figures below (whole with -vv)"
        assert (hidden in result.outlines) is (asked == "-v")
        result.stdout.fnmatch_lines(["*_ test_own _*", ">*assert 1 == 2"])
        assert result.outlines[-2] == "1 other test failed, which no verdict is of"
        assert "more (all with -v)" not in result.stdout.str()


@pytest.mark.parametrize("profile", ["lora", "nullspace"])
def test_predictions_that_no_test_judges_are_never_safe(pytester: pytest.Pytester, profile: str) -> None:
    """A saved run that forgot all is not safe by leaving its drift out; without a null space its averages warn too."""
    result = gate(pytester, run(3.0), "--nullspace-no-drift", f"--nullspace-profile={profile}", "-W", "default")
    assert result.ret == 0
    assert result.outlines[-1].startswith("verdict: LOOK: ")
    strict = ("-W", "error::pytest_nullspace.NullspaceWarning")
    assert gate(pytester, run(3.0), "--nullspace-no-drift", f"--nullspace-profile={profile}", *strict).ret == (
        1 if profile == "lora" else 0
    )
