"""What a merge leaves of an update, against naive float64 computation, and what is refused."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fixtures import lora_null
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.errors import CheckpointError, StatsError
from pytest_nullspace.judging import merging
from pytest_nullspace.judging.merging import merges
from pytest_nullspace.judging.survival import KEY, LayerLeft, Left, Survival
from pytest_nullspace.judging.verdicts import Tier
from tests import saved, tiny
from tests.adapters import adapter, change, edit, merged

Q0 = "model.layers.0.self_attn.q_proj"
TYPES = ("bf16", "fp16", "fp8", "nf4")


def of(directory: Path, *types: str, base: str | None = None, start: Path | None = None, **rows: Any) -> Survival:
    """What a merge of every layer leaves."""
    checkpoint = open_checkpoint(directory, base)
    names = {layer.name for layer in checkpoint.layers}
    initial = None if start is None else open_checkpoint(start)
    return Survival.measured(merges(checkpoint, names, base, initial), types or ("bf16",), rows)


def left(weight: Tensor, update: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[float, float, float]:
    """Survival, share and cosine, naively."""
    weight, update = weight.double(), update.double()
    rest = (weight + update).float().to(dtype).double() - weight.float().to(dtype).double()
    norms = float(rest.norm()), float(update.norm())
    common = float((rest * update).sum())
    return common / norms[1] ** 2, norms[0] / norms[1], common / (norms[0] * norms[1])


def in_bf16(base: Path) -> None:
    """Store a base model in bfloat16."""
    file = base / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """An adapter of PEFT with rank 4 on a base in bfloat16."""
    directory = adapter(tmp_path, tiny.llama(), r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    in_bf16(tmp_path / "base")
    return directory


def product(directory: Path, name: str, scale: float) -> Tensor:
    """The update of a layer."""
    held = load_file(directory / "adapter_model.safetensors")
    up, down = (held[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "BA")
    return scale * up @ down


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_an_adapter_is_what_a_naive_merge_leaves(lora: Path, monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Of each layer, in blocks of few rows, whatever the size of the update."""
    monkeypatch.setattr(merging, "BLOCK", 200)
    change(lora, lambda tensors, _: tensors.update({k: t * size for k, t in tensors.items() if ".lora_B." in k}))
    found = of(lora, "bf16", "fp16")
    base = load_file(lora.parent / "base" / "model.safetensors")
    assert len(found.layers) == 6
    for layer in found.layers:
        assert layer.stored == "BF16"
        for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            naive = left(base[f"{layer.name}.weight"], product(lora, layer.name, 2.0), dtype)
            told = layer.types[kind]
            assert (told.survival, told.share, told.cosine) == pytest.approx(naive, rel=1e-6)
            error = math.sqrt(1 - 2 * naive[0] + naive[1] ** 2)
            assert told.noise == pytest.approx(error, rel=1e-5)


def test_rows_tell_what_it_does_to_activations(lora: Path) -> None:
    """Mean ‖Rx‖ over mean ‖ΔWx‖ over the rows that were given, of the layers that they are of."""
    x = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    found = of(lora, text={Q0: x})
    base = load_file(lora.parent / "base" / "model.safetensors")[f"{Q0}.weight"].double()
    update, rows = product(lora, Q0, 2.0), torch.from_numpy(x).double().T
    rest = (base + update).float().bfloat16().double() - base
    told = {layer.name: layer.types["bf16"].moved for layer in found.layers}
    ratio = float((rest @ rows).norm(dim=0).mean() / (update @ rows).norm(dim=0).mean())
    assert told.pop(Q0) == {"text": pytest.approx(ratio, rel=1e-6)}
    assert not any(told.values())


def test_a_base_in_float32_is_held_against_itself_in_the_type(tmp_path: Path) -> None:
    """Its own rounding is none of the update: what the merge changes is held against the rounded base."""
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"])
    base = load_file(tmp_path / "base" / "model.safetensors")
    told = of(directory).layers[0]
    naive = left(base[f"{told.name}.weight"], product(directory, told.name, 2.0))
    assert told.stored == "F32"
    assert told.types["bf16"].survival == pytest.approx(naive[0], rel=1e-6)


def test_dora_is_merged_with_its_magnitude(tmp_path: Path) -> None:
    """W' = m ∘ (W + AB) / ‖W + AB‖ by rows, which is what PEFT's own merge writes."""
    directory = adapter(tmp_path, tiny.llama(), r=4, use_dora=True, target_modules=["q_proj"])
    whole = merged(tmp_path, directory)
    base, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", whole))
    for layer in of(directory).layers:
        weight = f"{layer.name}.weight"
        assert layer.update_norm == pytest.approx(float((after[weight].double() - base[weight]).norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_that_did_not_move_since_a_start_in_w_has_no_update(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its norms are those of W but for rounding, so there is nothing to be lost, and a saved run may tell so."""
    directory = adapter(
        tmp_path, tiny.llama(), r=4, use_dora=True, target_modules=["q_proj"], layers_to_transform=[0, 1]
    )
    base = load_file(tmp_path / "base" / "model.safetensors")
    names = [f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)]

    def begin(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config.update(init_lora_weights="pissa")
        for name in names:
            down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
            whole = base[f"{name}.weight"].double() + config["lora_alpha"] / 4 * up @ down
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = whole.norm(dim=1).to(dtype)

    change(directory, begin)
    start = shutil.copytree(directory, tmp_path / "start")
    vector = f"base_model.model.{names[1]}.lora_magnitude_vector"
    change(directory, lambda tensors, _: tensors.update({vector: 1.01 * tensors[vector]}))
    found = of(directory, base=str(tmp_path / "base"), start=start)
    still, moved = found.layers
    assert (still.update_norm, dict(still.types)) == (0.0, {})
    assert moved.types
    run = dataclasses.replace(saved.run(*names, update_norm=1.0), about={KEY: found.to_dict()})
    assert Survival.of_run(run, "run.json") == found
    whole = dataclasses.replace(found, layers=(dataclasses.replace(still, is_part=False), moved))
    with pytest.raises(StatsError, match=f"tells nothing of {names[0]}, though that has an update"):
        Survival.of_run(dataclasses.replace(run, about={KEY: whole.to_dict()}), "run.json")


def test_a_merged_model_leaves_what_its_adapter_does(tmp_path: Path) -> None:
    """Of a whole model in float32 the update is W' − W, and each type leaves the same of it."""
    directory = adapter(tmp_path, tiny.llama(), r=4, target_modules=["q_proj"])
    whole = merged(tmp_path, directory)
    two = (of(directory, "bf16", "nf4"), of(whole, "bf16", "nf4", base=str(tmp_path / "base")))
    for one, other in zip(*(found.layers for found in two), strict=True):
        for kind in ("bf16", "nf4"):
            assert one.types[kind].survival == pytest.approx(other.types[kind].survival, rel=1e-2)


def test_a_directory_is_held_against_where_it_started(tmp_path: Path) -> None:
    """v2 began with A at zero; where A held a part of W, what training changed is AB − A₀B₀, and needs the start."""
    v2 = tiny.lora_null(tmp_path / "v2")
    held = load_file(v2 / "model.safetensors")

    def part(name: str) -> Tensor:
        return held[f"{Q0}.{name}"].double()

    update = part("ALinear.weight") @ part("BLinear.weight")
    told = {layer.name: layer for layer in of(v2).layers}[Q0]
    assert told.types["bf16"].survival == pytest.approx(left(part("weight_residual"), update)[0], rel=1e-6)

    def stretched(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q0}.BLinear.weight"] *= 2

    def further(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        stretched(tensors, _)
        tensors[f"{Q0}.ALinear.weight"] *= 1.01

    start, now = (tiny.lora_null(tmp_path / name, change=by) for name, by in (("a", stretched), ("b", further)))
    with pytest.raises(
        CheckpointError, match=f"layer {Q0}: the rows of B are not orthonormal.* by --nullspace-init=DIR"
    ):
        of(now)
    told = {layer.name: layer for layer in of(now, start=start).layers}[Q0]
    naive = left(part("weight_residual") + 2 * update, 0.02 * update)
    assert told.types["bf16"].survival == pytest.approx(naive[0], rel=1e-5)
    assert {layer.update_norm for layer in of(now, start=start).layers if layer.name != Q0} == {0.0}


def of_v1(folder: Path, residual: torch.dtype = torch.float32, far: float = 0.01) -> tuple[Path, Path, Path]:
    """A start that held a part of W in every layer, what training made of it by so much, and the untouched base."""
    model: Any = tiny.llama(initializer_range=0.2)
    model.save_pretrained(folder / "base")
    tiny.tokenizer(folder / "base")
    found = lora_null.covariances(model, [torch.arange(60), torch.arange(60, 120)])
    lora_null.initialise_v1(model, found, 4)

    def save(name: str) -> Path:
        lora_null.save(model, folder / name, transformers.AutoTokenizer.from_pretrained(folder / "base"))
        edit(
            folder / name,
            lambda tensors: tensors.update({k: t.to(residual) for k, t in tensors.items() if "_res" in k}),
        )
        return folder / name

    start = save("start")
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "ALinear" in name or "BLinear" in name:
            parameter.data += far * parameter.abs().mean() * torch.randn_like(parameter)
    return start, save("now"), folder / "base"


def test_the_untouched_base_tells_what_the_start_held(tmp_path: Path) -> None:
    """W − W_res is the start's product, so a merge of v1 is told by its base as by its start."""
    start, now, base = of_v1(tmp_path)
    by_start, by_base = of(now, "bf16", "nf4", start=start), of(now, "bf16", "nf4", base=str(base))
    for one, other in zip(by_start.layers, by_base.layers, strict=True):
        assert other.update_norm == pytest.approx(one.update_norm, rel=1e-4)
        for kind in ("bf16", "nf4"):
            assert other.types[kind].survival == pytest.approx(one.types[kind].survival, rel=0.02)


def test_a_base_that_cannot_tell_the_start_is_refused(tmp_path: Path) -> None:
    """Where W_res is rounded more coarsely than training moved, or the base is another: before anything is measured."""
    _, now, base = of_v1(tmp_path, torch.bfloat16, far=1e-4)
    checkpoint = open_checkpoint(now)
    names = {layer.name for layer in checkpoint.layers}
    with pytest.raises(CheckpointError, match=r"rounded too coarsely for what training changed.*--nullspace-init=DIR"):
        merges(checkpoint, names, str(base))
    edit(base, lambda tensors: tensors.update({k: t + torch.randn_like(t) for k, t in tensors.items()}))
    with pytest.raises(CheckpointError, match=r"W - W_res of model\S+ is not of rank 4.*--nullspace-base=DIR"):
        merges(checkpoint, names, str(base))


def test_a_start_at_zero_needs_no_base_and_is_none_the_worse_for_one(tmp_path: Path) -> None:
    """Of v2 W_res is W, however coarsely that is stored, and the whole of AB is the update."""
    model: Any = tiny.llama()
    model.save_pretrained(tmp_path / "base")
    held = load_file(tmp_path / "base" / "model.safetensors")

    def of_base(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("weight_residual"):
                tensors[name] = held[name.replace("weight_residual", "weight")].bfloat16()

    v2 = tiny.lora_null(tmp_path / "v2", change=of_base)
    assert of(v2, base=str(tmp_path / "base")) == of(v2)


def test_what_starts_with_a_part_of_w_needs_its_start(lora: Path) -> None:
    """An adapter of PiSSA is refused without, for its AB is mostly W."""
    change(lora, lambda _, config: config.update(init_lora_weights="pissa"))
    with pytest.raises(CheckpointError, match=r"started with a part of W in its own matrices.*--nullspace-init=DIR"):
        of(lora, base=str(lora.parent / "base"))
    found = of(lora, base=str(lora.parent / "base"), start=lora)
    assert {layer.update_norm for layer in found.layers} == {0.0}
    assert found.of_type("bf16").tier is Tier.FAIL


def quantised(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q0}.weight"] = tensors[f"{Q0}.weight"].to(torch.uint8)


def gone(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q0}.weight"]


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q0}.weight"] = tensors[f"{Q0}.weight"][:, :3].contiguous()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (quantised, f"tensor {Q0}.weight is U8, quantised, and a merge would begin with its rounding"),
        (gone, f"for layer {Q0} there is no tensor '{Q0}.weight'"),
        (narrow, rf"tensor {Q0}.weight is \[32, 3\], but layer {Q0} \[32, 32\]"),
    ],
)
def test_a_base_that_cannot_be_merged_into_is_refused(lora: Path, wrong: Any, says: str) -> None:
    """By the tensor's name, and with what to give."""
    edit(lora.parent / "base", wrong)
    with pytest.raises(CheckpointError, match=f"--nullspace-merge: .*{says}.*--nullspace-base=DIR"):
        of(lora)


def test_what_leaves_a_type_or_is_no_number_fails(lora: Path) -> None:
    """Beyond 65504 float16 has infinity, and a NaN in A is none of the update that survives: both fail by name."""

    def loud(tensors: dict[str, Tensor], _: Any) -> None:
        tensors[f"base_model.model.{Q0}.lora_B.weight"] *= 1e9

    change(lora, loud)
    found = of(lora, "bf16", "fp16")
    assert found.of_type("fp16").tier is Tier.FAIL
    assert found.of_type("fp16").summary == f"fp16 cannot hold {Q0}: a number of it is none, or leaves the type's range"
    assert found.of_type("bf16").told[0][0].name != Q0

    def no_number(tensors: dict[str, Tensor], _: Any) -> None:
        tensors[f"base_model.model.{Q0}.lora_B.weight"].fill_(math.nan)

    change(lora, no_number)
    assert of(lora).of_type("bf16").tier is Tier.FAIL


def told(*survivals: float, share: float | None = None) -> Survival:
    """One layer each."""
    layers = [
        LayerLeft(f"l{n}", "BF16", 1.0, {"bf16": Left(s, s if share is None else share, 1.0)})
        for n, s in enumerate(survivals)
    ]
    return Survival(("bf16",), tuple(layers))


def test_a_type_is_judged_by_its_worst_layer() -> None:
    """Below nine tenths a layer warns, below half it fails and is named; noise beyond the update warns alone."""
    assert told(0.99, 1.0).of_type("bf16").tier is Tier.PASS
    assert told(0.99, 0.8).of_type("bf16").tier is Tier.WARN
    failed = told(0.99, 0.8, 0.4).of_type("bf16")
    assert failed.tier is Tier.FAIL
    assert failed.summary == (
        "a merge in bf16 keeps 73 % of the update; 2 of 3 layers lose too much of it, and there is left 40 % of l2, "
        "whose W is stored as BF16"
    )
    assert "serve the adapter unmerged" in "\n".join(failed.lines())
    assert "; 1 of 3 layers lose too much of it" in told(0.8, 1.0, 1.0, share=3.0).of_type("bf16").summary
    noisy = told(1.0, share=3.0)
    assert noisy.of_type("bf16").tier is Tier.WARN
    assert noisy.cheapest is None
    assert "changes more beside the update than by it" in noisy.of_type("bf16").summary


def test_the_cheapest_type_that_keeps_it_is_named() -> None:
    """The one of fewest bits among those that pass, whatever the order in which they were asked for."""
    whole = {kind: Left(1.0, 1.0, 1.0) for kind in TYPES}
    layer = LayerLeft("l", "BF16", 1.0, whole)
    assert Survival(TYPES, (layer,)).cheapest == "nf4"
    spoilt = dataclasses.replace(layer, types={**whole, "nf4": Left(0.2, 0.2, 1.0)})
    assert Survival(TYPES[::-1], (spoilt,)).cheapest == "fp8"


def test_a_saved_run_tells_all_of_it(lora: Path) -> None:
    """What is read back is what was measured; a layer without a figure, or another thing in its place, is refused."""
    found = of(lora, "bf16", "nf4", text={Q0: np.ones((3, 32), np.float32)})
    written = json.loads(json.dumps({KEY: found.to_dict()}, allow_nan=False))
    assert Survival.of(written) == found
    assert written[KEY]["cheapest"] == found.cheapest
    assert Survival.of({}) is None
    del written[KEY]["layers"][0]["types"]["nf4"]
    nothing: list[dict[str, Any]] = [{"types": ["bf16"], "layers": []}, {"types": [3], "layers": [1]}]
    for wrong in (written, {KEY: []}, *({KEY: told} for told in nothing)):
        with pytest.raises(StatsError, match=f"'{KEY}' does not tell of a merge"):
            Survival.of(wrong)


@pytest.mark.parametrize(
    "edit",
    [
        {"survival": 1.0},
        {"survival": 1.0, "share": 1.0},
        {"survival": 1.0, "cosine": 10.0},
        {"survival": 0.1, "share": -0.1, "cosine": -1.0},
    ],
)
def test_survival_that_is_not_share_times_cosine_was_edited(edit: dict[str, float]) -> None:
    """One number alone is judged, so a file in which it is raised, and what it follows from is not, is refused."""
    lost = LayerLeft("l", "BF16", 1.0, {"bf16": Left(0.01, 0.1, 0.1)})
    written = {KEY: Survival(("bf16",), (lost,)).to_dict()}
    assert Survival.of(written) is not None
    written[KEY]["layers"][0]["types"]["bf16"] |= edit
    with pytest.raises(StatsError, match=f"'{KEY}' does not tell of a merge"):
        Survival.of(written)


def test_what_moves_activations_is_told_by_its_median() -> None:
    """Of an even number of layers it lies between the two in the middle; what is no number is left out."""
    layers = [
        LayerLeft(str(value), "BF16", 1.0, {"bf16": Left(1.0, 1.0, 1.0, {"text": value})})
        for value in (1.0, 0.2, math.nan, 0.6, 0.4)
    ]
    assert Survival(("bf16",), tuple(layers)).of_type("bf16").moved("text") == pytest.approx(0.5)
