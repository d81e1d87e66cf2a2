"""What the study measures, against plain float64 arithmetic, and that it can be stopped and goes on."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import study, study_figures, study_worlds, world
from fixtures.lora_null import adaptable, eigenvectors
from fixtures.study_measure import changes, layers, loaded, of_weights, predicted, spectrum
from fixtures.study_run import Recipe, rounded, run
from fixtures.study_starts import Starts, starts
from fixtures.study_ways import WAYS, Trained, train
from fixtures.study_worlds import World

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

RANK = 4


@pytest.fixture(scope="module")
def base() -> Any:
    return world.untrained().eval()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return next(world.windows(world.facts_text(), 4, 64, 0))


@pytest.fixture(scope="module")
def begun(base: Any, windows: Tensor) -> Starts:
    return starts(base, windows)


@pytest.fixture(scope="module")
def little(base: Any, windows: Tensor, begun: Starts) -> World:
    """The untrained model, asked three facts."""
    asked = [study_worlds.Fact(line.prompt, line.answer) for line in world.facts()[:3]]
    texts = {"preserved": windows, "held out": windows + 0, "self": study_worlds.written(base, 0), "sums": windows}
    return World(
        base,
        texts,
        lambda _, seed: world.windows(world.task_text(), 2, 32, seed),
        lambda model: study_worlds.answered(model, world.tokenizer(), asked),
        begun,
        half=False,
    )


def batches() -> Iterator[Tensor]:
    return world.windows(world.task_text(), 4, 32, 0)


@pytest.mark.parametrize("name", WAYS)
def test_every_way_starts_from_the_base_and_learns(base: Any, begun: Starts, name: str) -> None:
    """With a rate of nothing the weights are the base's, with its own they are not, and the base itself never moves."""
    before = deepcopy(base.state_dict())
    still = train(base, WAYS[name], begun, batches(), RANK, 1, 0.0, half=False)
    for key, tensor in before.items():
        torch.testing.assert_close(still.state[key], tensor, atol=1e-5, rtol=1e-4)
    moved = train(base, WAYS[name], begun, batches(), RANK, 12, WAYS[name].rate * 3, half=False)
    assert moved.losses[-1] < moved.losses[0] - 0.01
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    assert bool(moved.pairs) == (WAYS[name].family != "full")


@pytest.mark.parametrize("name", ["LoRA", "null space (v2)", "DoRA", "full"])
def test_what_is_trained_in_half_precision_learns_as_well(base: Any, begun: Starts, name: str) -> None:
    """In bfloat16 the loss falls as in float32, to a twentieth: no step sees the weights of one before."""
    losses = [train(base, WAYS[name], begun, batches(), RANK, 12, 3e-3, half=half).losses for half in (False, True)]
    assert losses[0][-1] < losses[0][0] - 0.05
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0][0] - losses[1][-1] > 0.8 * (losses[0][0] - losses[0][-1])


def test_changes_are_those_of_their_definitions() -> None:
    """KL both ways, total variation, flips and loss of random predictions agree with float64."""
    torch.manual_seed(0)
    p, q = (torch.randn(100, 17).log_softmax(-1) for _ in range(2))
    came = torch.randint(17, (100,))
    found = changes(*(predicted_of(logs, came) for logs in (p, q)))
    p, q = p.double(), q.double()
    wanted = {
        "kl": (p.exp() * (p - q)).sum(-1).mean(),
        "reverse kl": (q.exp() * (q - p)).sum(-1).mean(),
        "variation": (p.exp() - q.exp()).clamp_min(0).sum(-1).mean(),
        "flips": (p.argmax(-1) != q.argmax(-1)).double().mean(),
        "loss rise": (p - q)[torch.arange(100), came].mean(),
    }
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-5)


def predicted_of(logs: Tensor, came: Tensor) -> Any:
    from fixtures.study_measure import Predicted

    return Predicted(logs, came)


def test_figures_of_layers_are_those_of_their_definitions(base: Any, begun: Starts, windows: Tensor) -> None:
    """Means over layers agree with float64, of v1, whose start has a part of W: only forgetting counts it."""
    trained = train(base, WAYS["v1"], begun, batches(), RANK, 4, 1e-3, half=False)
    weights = {name: layer.weight.detach().clone() for name, layer in adaptable(base).items()}
    with loaded(base, trained.state):
        rows = rows_of(base, windows)
        found, figures = layers(base, weights, trained, windows)
        assert torch.equal(found.logs, predicted(base, windows).logs)
    wanted: dict[str, float] = {}
    for name, x in rows.items():
        w, new = weights[name].double(), trained.state[f"{name}.weight"].double()
        up, down = (matrix.double() for matrix in trained.pairs[name])
        projector = torch.linalg.pinv(down) @ down
        of = {
            "preservation": mean(x @ down.mT) / mean(x),
            "leakage": float(((x @ projector).norm(dim=1) / x.norm(dim=1)).square().mean()) * x.shape[1] / RANK,
            "effectiveness": mean(x @ down.mT @ up.mT) / mean(x),
            "contribution": mean(x @ down.mT @ up.mT) / mean(x @ new.mT),
            "forgetting": mean(x @ down.mT @ up.mT) / mean(x @ (new - up @ down).mT),
            "true update": mean(x @ (new - w).mT) / mean(x @ w.mT),
        }
        wanted = {figure: wanted.get(figure, 0.0) + value / len(rows) for figure, value in of.items()}
    later = figures.pop("true update, without first rows")
    assert figures == pytest.approx(wanted, rel=1e-3)
    assert later == pytest.approx(wanted["true update"], rel=0.2)
    assert wanted["true update"] < wanted["forgetting"]


def rows_of(model: Any, windows: Tensor) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: rows.setdefault(name, []).append(args[0].detach()))
        for name, layer in adaptable(model).items()
    ]
    model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).flatten(0, 1).double() for name, parts in rows.items()}


def mean(rows: Tensor) -> float:
    return float(rows.norm(dim=1).mean())


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_figures_of_weights_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    """An update of rank one, strong and foreign to W, is one intruder with a stable rank of one."""
    torch.manual_seed(0)
    w = torch.randn(shape)
    u, v = torch.randn(shape[0]), torch.randn(shape[1])
    update = 40 * torch.outer(u / u.norm(), v / v.norm())
    found = of_weights({"a": w}, {"a": spectrum(w)}, {"a.weight": w + update})
    left, _, right = torch.linalg.svd(w, full_matrices=False)
    assert found["norm"] == pytest.approx(40, rel=1e-4)
    assert found["spectral norm"] == pytest.approx(40, rel=1e-3)
    assert found["stable rank"] == pytest.approx(1, rel=1e-3)
    new = torch.linalg.svd(w + update)[0][:, :10]
    assert found["intruders"] == int(((left.mT @ new).abs().amax(0) < 0.6).sum()) > 0
    few = min(32, *shape)
    inside = float((left[:, :few].mT @ update @ right[:few].mT).norm() / update.norm())
    assert found["alignment"] == pytest.approx(inside, rel=1e-3)


def test_starts_that_are_kept_are_read_again(base: Any, windows: Tensor, begun: Starts, tmp_path: Path) -> None:
    """The file gives the starts that it was made of, quiet rows first the quietest, loud ones the loudest."""
    file = tmp_path / "starts.safetensors"
    made = starts(base, windows, file)
    again = starts(base, windows, file)
    for name, rows in made.quiet.items():
        assert torch.equal(rows, again.quiet[name])
        assert torch.equal(rows, begun.quiet[name])
    from fixtures.lora_null import covariances

    name, matrix = next(iter(covariances(base, windows).items()))
    vectors = eigenvectors({name: matrix})[name].float()
    assert float((made.quiet[name][0] @ vectors[:, 0]).abs()) == pytest.approx(1, abs=1e-4)
    assert float((made.loud[name][0] @ vectors[:, -1]).abs()) == pytest.approx(1, abs=1e-4)


def test_a_study_that_was_stopped_goes_on(little: World, tmp_path: Path) -> None:
    """Lines that are there are not made again, the others are; every figure of the ranking is in each or is nan."""
    file, recipes = tmp_path / "little.jsonl", [Recipe("sums", RANK, 1, 1.0)]
    going = run(little, recipes, file)
    for _ in range(3):
        next(going)
    kept = file.read_text("utf-8")
    assert kept.count("\n") == 3
    rest = list(run(little, recipes, file))
    assert len(rest) == len(WAYS) - 3
    assert file.read_text("utf-8").startswith(kept)
    entries = study_figures.read(file)
    assert [entry["way"] for entry in entries] == list(WAYS)
    for name in study_figures.FIGURES:
        assert len(study_figures.column(entries, name)) == len(WAYS)
    assert not any(study_figures.lost(entries, "facts")) or max(study_figures.lost(entries)) <= 1


def test_facts_are_asked_and_answered_as_they_are_written() -> None:
    """The file holds some hundreds of facts, none twice, none empty, and no heading is left in one."""
    facts = study_worlds.facts()
    assert len(facts) > 400
    assert len(set(facts)) == len(facts)
    assert all(fact.prompt.strip() and fact.answer.strip() and "{}" not in fact.prompt for fact in facts)
    assert study_worlds.Fact("Rome is the capital of Italy. Tokyo is the capital of Japan. The capital of France is", " Paris") in facts  # fmt: skip  # noqa: E501
    assert any("\n" in fact.prompt for fact in facts)


def test_answers_are_counted_as_greedy_decoding_gives_them(base: Any) -> None:
    """What the model itself goes on with is answered, anything else is not."""
    prompt = "\nThe ruler of x is"
    tokens = world.encode(prompt)
    for _ in range(3):
        tokens = torch.cat((tokens, base(input_ids=tokens[None]).logits[0, -1].argmax()[None]))
    right = world.tokenizer().decode(tokens[-3:])
    asked = [study_worlds.Fact(prompt, right), study_worlds.Fact(prompt, right[:2] + ("a" if right[2] != "a" else "b"))]
    logs, exact = study_worlds.answered(base, world.tokenizer(), asked)
    assert exact.tolist() == [True, False]
    assert logs[0] > logs[1]


def test_a_page_gets_its_tables_and_keeps_the_rest() -> None:
    """Only what lies between the two comments of a name is changed."""
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"
    assert study.filled(page, "x", "new") == page.replace("old", "new")


def test_numbers_are_kept_to_a_few_digits() -> None:
    """Floats are cut wherever they stand, and nothing else is."""
    assert rounded({"a": [1.23456789, 7], "b": "1.23456789"}, 3) == {"a": [1.23, 7], "b": "1.23456789"}


def test_what_is_published_agrees_with_its_data() -> None:
    """The tables of the documents are those that the lines of adapters give, and every judged figure has its row."""
    published = json.loads((study.DOCS / "prediction.json").read_text("utf-8"))
    worlds = {name: study_figures.read(study.DOCS / "prediction" / f"{name}.jsonl") for name in published["adapters"]}
    assert published["adapters"] == {name: len(entries) for name, entries in worlds.items()}
    assert set(published["partial"]) == set(study_figures.FIGURES) >= set(study_figures.JUDGED_AS.values())
    for name, entries in worlds.items():
        found = study_figures.areas(entries)
        assert published["areas"][name] == pytest.approx(found, rel=1e-2)


@pytest.mark.parametrize("name", ["llama", "phi", "smollm2", "all"])
def test_what_reading_self_would_do_is_what_the_data_say(name: str) -> None:
    """The page's counts of what is missed and falsely alarmed, with and without self, are those of the data."""
    names = ["llama", "phi", "smollm2"] if name == "all" else [name]
    entries = [entry for of in names for entry in study_figures.read(study.DOCS / "prediction" / f"{of}.jsonl")]
    ruined = [entry for entry in entries if 1 - entry["kept"] > 0.1]
    cells = []
    for bound in (0.05, 0.15):
        for with_self in (False, True):

            def beyond(entry: Any, bound: float = bound, with_self: bool = with_self) -> bool:
                own, other = entry["figures"]["preserved"], entry["figures"]["self"]
                return bool(max(own["kl"], own["loss rise"], other["kl"] if with_self else 0.0) > bound)

            missed = sum(not beyond(entry) for entry in ruined)
            alarmed = sum(beyond(entry) for entry in entries) - (len(ruined) - missed)
            cells.append(f"{missed}/{len(ruined)}, {alarmed}/{len(entries) - len(ruined)}")
    page = (study.DOCS / "prediction.md").read_text("utf-8")
    table = page[page.index("<!-- self -->") : page.index("<!-- /self -->")]
    assert f"| {name} | {' | '.join(cells)} |" in table


def test_trained_weights_stand_only_inside_the_block(base: Any) -> None:
    """The base has its own weights again after the block, also after an error in it."""
    before = deepcopy(base.state_dict())
    other = Trained({name: tensor + 1 for name, tensor in before.items()}, {}, [])
    with pytest.raises(ZeroDivisionError), loaded(base, other.state):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
