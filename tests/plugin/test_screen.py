"""Several adapters screened in one pass over their base: to the first order, and never to be taken for a gate."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pytest_nullspace.errors import OptionError
from pytest_nullspace.shell.called import gate as gate_here
from tests import adapters, tiny
from tests.plugin.conftest import QUICK

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's own
LAYERS = 6
TOLD = ("-p", "no:randomly", "-W", "default::pytest_nullspace.errors.NullspaceWarning")
SCREEN = (*TOLD, "--nullspace-screen", "--nullspace-model=one", "--nullspace-model=two", *QUICK)
PASSING = "--nullspace-threshold=forgetting:50:60"
"""A bound by which random adapters pass."""
STATEMENT = "screened, first order"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one base, and others that cannot be screened with them."""
    folder = tmp_path_factory.mktemp("screen")
    configs: dict[str, dict[str, Any]] = {
        "biased": {"bias": "lora_only"},
        "one": {"r": 4},
        "two": {"r": 2, "lora_alpha": 3},
        "dora": {"use_dora": True},
        "head": {"modules_to_save": ["lm_head"]},
    }
    for name, config in configs.items():
        model = tiny.qwen2() if name == "biased" else tiny.llama(tie_word_embeddings=False)
        adapters.adapter(folder, model, name=name, target_modules=["q_proj", "up_proj"], **config)
    adapters.adapter(folder / "elsewhere", tiny.llama(), name="other", target_modules=["q_proj"])
    tiny.lora_null(folder / "null")
    return folder


@pytest.fixture
def here(made: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """They in the test's own folder, with a text."""
    monkeypatch.setenv("COLUMNS", "400")
    shutil.copytree(made, pytester.path, dirs_exist_ok=True)
    (pytester.path / "text.txt").write_text(tiny.TEXT)
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    return pytester.path


def saved(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def test_a_screened_green_is_told_everywhere_for_what_it_is(here: Path, pytester: pytest.Pytester) -> None:
    """On the terminal, in Markdown, HTML, JUnit's file, metrics and JSON; it is nowhere SAFE, and no mark is green."""
    outputs = (
        "--nullspace-report=r.md",
        "--nullspace-report=r.html",
        "--nullspace-report=r.prom",
        "--junit-xml=j.xml",
        "--nullspace-report=r.sarif",
    )
    result = pytester.runpytest_inprocess(*SCREEN, PASSING, *outputs, "--nullspace-save-stats={model}.json")
    assert result.ret == 0
    result.assert_outcomes(passed=2 * (LAYERS + 1), warnings=2 * (LAYERS + 1))
    result.stdout.fnmatch_lines(
        [
            f"nullspace: {STATEMENT}: no adapter runs, and no task text is read; gate it before you deploy",
            f"verdict: NOT GATED: {STATEMENT}: its update is * of what the base computes *; gate it before you deploy",
            f"{STATEMENT}: {LAYERS} of {LAYERS} layers: {LAYERS} green, 0 to look at, 0 red; none gated",
            "  layers, first order * leakage preservation forgetting",
            "  averages, first order * verdict",
            "  one * NOT GATED",
            f"verdict on two: NOT GATED: {STATEMENT}: *",
        ]
    )
    told = {name: (here / name).read_text() for name in ("r.md", "r.html", "r.prom", "j.xml", "one.json")}
    assert all(STATEMENT in told[name] for name in ("r.md", "r.html", "j.xml", "one.json"))
    assert not any(re.search(r"\bSAFE\b", text) for text in (result.stdout.str(), told["r.md"], told["j.xml"]))
    assert "✓" not in result.stdout.str() + told["r.md"]
    assert told["j.xml"].count('name="gated_on" value="screen"') == 2 * (LAYERS + 1)
    assert 'name="first_order_forgetting"' in told["j.xml"]
    of_one = saved(here, "one")
    assert (of_one["verdict"]["verdict"], of_one["verdict"]["basis"], of_one["stats"]) == ("NOT GATED", STATEMENT, [])
    assert set(of_one["verdict"]["thresholds"]) == {"forgetting"}
    assert of_one["measured"]["at"] == saved(here, "two")["measured"]["at"]
    for option in ("compare", "init", "stats"):  # what it saved stands in for no measured run
        model = () if option == "stats" else ("--nullspace-model=one", *QUICK)
        refused = pytester.runpytest_inprocess("-p", "no:randomly", *model, f"--nullspace-{option}=one.json")
        assert refused.ret == pytest.ExitCode.USAGE_ERROR
        refused.stderr.fnmatch_lines(
            [f"ERROR: *one.json: is {STATEMENT}, which no * can stand in for no measured run;*"]
        )


@pytest.mark.parametrize("mode", [("-n", "2"), ("-p", "no:xdist")])
def test_workers_and_selections_share_one_pass(here: Path, pytester: pytest.Pytester, mode: tuple[str, ...]) -> None:
    """With workers or without, of what was selected alone; what was left out is said, and the two tell of one pass."""
    run = pytester.runpytest_subprocess if "-n" in mode else pytester.runpytest_inprocess
    result = run(*SCREEN, "-k", "layers.0", "--nullspace-save-stats={model}.json", *mode)
    result.assert_outcomes(passed=4, warnings=4)
    result.stdout.fnmatch_lines([f"verdict: NOT GATED: {STATEMENT}: only 2 of {LAYERS + 1} tests came to a verdict*"])
    one, two = (saved(here, name) for name in ("one", "two"))
    assert one["measured"] == two["measured"]
    assert [entry["name"] for entry in one["screened"]["layers"]] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    ]


def test_what_is_loud_to_the_first_order_is_red(here: Path, pytester: pytest.Pytester) -> None:
    """Its test fails, the verdict says on what it rests, and a user's own test gets no figure of it."""
    pytester.makepyfile("def test_own(nullspace_layer): pass")
    result = pytester.runpytest_inprocess(*SCREEN, "--nullspace-layers=*q_proj", "--nullspace-profile=nullspace")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            f"verdict: DO NOT DEPLOY: {STATEMENT}: 3 of 3 layers have no null space",
            f"{STATEMENT}: 3 of {LAYERS} layers: 0 green, 0 to look at, 3 red; none gated",
            "*no activation was measured: --nullspace-screen takes those of the base alone*",
        ]
    )


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ("dora", "is more than A and B of linear layers, which is all that is screened: it trained *magnitude*"),
        ("head", "is more than A and B *: it trained 1 tensors, such as *lm_head*"),
        ("biased", "is more than A and B *"),
        ("null", "holds a base of its own (it is a LoRA-Null directory), so that it shares none*"),
        ("elsewhere/other", "takes adapters of one base, and *one names *base, *other *base; screen them apart*"),
    ],
)
def test_what_cannot_share_the_base_is_refused_by_name(
    here: Path, pytester: pytest.Pytester, other: str, why: str
) -> None:
    """Before anything runs, in a sentence that names the adapter and what is special about it."""
    result = pytester.runpytest_inprocess(*SCREEN, f"--nullspace-model={other}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --nullspace-screen: *{why}"])


@pytest.mark.parametrize(
    "option",
    [
        "compare=s.json", "init=one", "require", "card", "attest=a.json", "drift", "spectrum", "suggest", "merge=bf16",
        "weights-only", "stats=s.json", "device-map=auto", "calib-size=auto", "rank=2",
    ],
)  # fmt: skip
def test_what_wants_a_proof_is_refused_beside_it(here: Path, pytester: pytest.Pytester, option: str) -> None:
    """Each option that gates, keeps, publishes or needs the adapters to run, by its name."""
    result = pytester.runpytest_inprocess(*(o for o in SCREEN if "calib-size" not in o), f"--nullspace-{option}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    name = option.partition("=")[0]
    result.stderr.fnmatch_lines([f"ERROR: --nullspace-screen: *prove nothing; leave it out for *--nullspace-{name}*"])


def test_an_adapter_with_other_tokens_is_refused(here: Path, pytester: pytest.Pytester) -> None:
    """One whose own tokenizer cuts the text otherwise reads something else, so no pass can be shared."""
    for name, order in (("one", 1), ("two", -1)):
        tiny.tokenizer(here / name)
        file = here / name / "tokenizer.json"
        told = json.loads(file.read_text())
        told["model"]["vocab"] = dict(zip(list(told["model"]["vocab"])[::order], range(128), strict=True))
        file.write_text(json.dumps(told))
    result = pytester.runpytest_inprocess(*SCREEN, "-k", "layers.0")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*--nullspace-screen: the tokenizer of *two makes other tokens of the text than that *"]
    )


@pytest.mark.parametrize("said", ["{{ m.role + m.content }}", "{{ m.content }}"])
def test_an_adapter_with_another_chat_template_is_refused(here: Path, pytester: pytest.Pytester, said: str) -> None:
    """Also where the tokenizers are one: it writes conversations otherwise, or says that other tokens of them count."""
    talks = [{"messages": [{"role": who, "content": tiny.TEXT[:60]} for who in ("user", "assistant")]}] * 9
    (here / "chat.jsonl").write_text("\n".join(map(json.dumps, talks)))
    marked = "{% generation %}{{ m.content }}{% endgeneration %}"
    of_one = "{% if m.role == 'user' %}{{ m.content }}{% else %}" + marked + "{% endif %}"
    for name, told in (("one", of_one), ("two", "{% generation %}" + said + "{% endgeneration %}")):
        tiny.tokenizer(here / name)
        template = "{% for m in messages %}" + told + "{% endfor %}"
        (here / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    chats = "--nullspace-calib-dataset=talks=chat.jsonl", "--nullspace-chat=assistant"
    result = pytester.runpytest_inprocess(*SCREEN, "-k", "layers.0", *chats)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*: the tokenizer, with its chat template, of *two makes other tokens of the text than*"]
    )


def test_a_call_screens_nothing() -> None:
    """``gate()`` is of one adapter, and says so."""
    with pytest.raises(OptionError, match="gate: takes one adapter, and screen several; run pytest --nullspace-screen"):
        gate_here("fixtures/world/peft-null", "text.txt", screen=True)


def test_programs_are_told_what_fails_a_screen_and_never_in_the_words_of_a_gate(
    here: Path, pytester: pytest.Pytester
) -> None:
    """Each layer is an error by its name, and the averages stand under a name of their own."""
    reports = ("--nullspace-report=r.sarif", "--nullspace-report=r.prom", "--nullspace-threshold=forgetting:0:1e-9")
    pytester.runpytest_inprocess(*SCREEN, *reports)
    results = json.loads((here / "r.sarif").read_text())["runs"][0]["results"]
    layers = [one["message"]["text"] for one in results if one["message"]["text"].startswith("model.layers.")]
    assert len(layers) == 2 * LAYERS
    assert all(f": {STATEMENT}: forgetting " in text for text in layers)
    samples = (here / "r.prom").read_text()
    assert 'nullspace_screened_figure{model="one",figure="forgetting"} ' in samples
    assert f'nullspace_layers{{model="two",tier="fail"}} {LAYERS}\n' in samples
    assert "nullspace_figure{" not in samples
