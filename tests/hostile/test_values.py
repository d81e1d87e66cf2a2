"""Values that break arithmetic, and configs that ask for more than the files hold: figures, defects, or one error."""

import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pytest_nullspace import gate
from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.arrays import is_finite
from pytest_nullspace.checkpoint.header import read_header
from pytest_nullspace.errors import CheckpointError, MeasurementError
from pytest_nullspace.judging.invariants import Expectations, Stage, judge
from pytest_nullspace.judging.verdicts import Finding, Threshold, Tier
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.measuring.unmeasured import read_files
from pytest_nullspace.model import AdaptedModel, load_model
from pytest_nullspace.model.bounds import LEADS_TO_CODE, without
from pytest_nullspace.run.stats import LayerStats, RunStats
from tests import saved, tiny
from tests.adapters import adapter, change, edit, merged
from tests.families import MAKERS

Q = "model.layers.1.self_attn.q_proj"
WINDOWS = [[token % 128 for token in range(start, start + 24)] for start in (3, 40)]
CPU = torch.device("cpu")


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    return load_model(open_checkpoint(folder), CPU, dtype)


def measured(folder: Path, part: str, change: Any, dtype: torch.dtype = torch.float32) -> LayerStats:
    """One layer's figures, one of its tensors changed before the checkpoint is saved."""

    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{Q}.{part}"] = change(tensors[f"{Q}.{part}"])

    (layer,) = measure(loaded(tiny.lora_null(folder, change=edit), dtype), WINDOWS, layers=[Q])
    return layer


def test_a_rank_deficient_b_is_measured_by_its_true_row_space(tmp_path: Path) -> None:
    """A row that repeats another adds nothing to the space: leakage is that of the rows that are left, and finite."""
    whole = measured(tmp_path / "a", "BLinear.weight", lambda b: torch.cat([b[:1], b[1:2], b[1:2], b[1:2]]))
    again = measured(tmp_path / "b", "BLinear.weight", lambda b: torch.cat([b[:1], b[1:2], 3 * b[1:2], -b[1:2]]))
    assert math.isfinite(whole.leakage)
    assert whole.mean_leakage == pytest.approx(again.mean_leakage, rel=1e-5)


def written(gauge: Tensor) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    """Writes every update as ``(A M⁻¹)(M B)``, M the ``gauge``, each factor rounded to float32."""

    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("BLinear.weight")]:
            up = name.replace("BLinear", "ALinear")
            tensors[name] = (gauge @ tensors[name].double()).float()
            tensors[up] = (tensors[up].double() @ torch.linalg.inv(gauge)).float()

    return change


GAUGES: Mapping[str, tuple[Tensor, float]] = {
    "one row small": (torch.diag(torch.tensor([1, 2.0**-27, 1, 1], dtype=torch.float64)), 1e-7),
    "one row large": (torch.diag(torch.tensor([1, 2.0**27, 1, 1], dtype=torch.float64)), 1e-7),
    "each by another": (torch.diag(torch.tensor([2.0**-60, 1, 2.0**30, 2.0**60], dtype=torch.float64)), 1e-7),
    "turned about": (torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]], 1e-7),
    "mixed": (torch.eye(4, dtype=torch.float64) + 2.0**9, 1e-4),
}


@pytest.mark.parametrize(
    ("gauge", "dtype"),
    # In bfloat16 a mixed B is rounded to another matrix.
    [(gauge, torch.float32) for gauge in GAUGES] + [(gauge, torch.bfloat16) for gauge in GAUGES if gauge != "mixed"],
)
def test_no_other_way_to_write_the_same_update_is_quieter(tmp_path: Path, gauge: str, dtype: torch.dtype) -> None:
    """What is measured follows from A B alone, not from how it is split in two: a direction of B is never lost."""
    matrix, rounding = GAUGES[gauge]
    plain = measure(loaded(tiny.lora_null(tmp_path / "a"), dtype), WINDOWS)
    other = measure(loaded(tiny.lora_null(tmp_path / "b", change=written(matrix)), dtype), WINDOWS)
    figures = ("leakage", "effectiveness", "contribution", "forgetting", "down_rank")
    for one, two in zip(plain, other, strict=True):
        want = [getattr(one, figure) for figure in figures]
        assert [getattr(two, figure) for figure in figures] == pytest.approx(want, rel=10 * rounding), one.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_leakage_of_a_b_whose_rows_are_nearly_one_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    """Where rounding of Bx would outweigh what tells its rows apart, it is not rounded: leakage is that of float64."""
    model = loaded(tiny.lora_null(tmp_path, change=written(torch.eye(4, dtype=torch.float64) + 2.0**5)), dtype)
    layer, seen = model.layers[Q], []
    handle = layer.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    (measured,) = measure(model, WINDOWS, layers=[Q])
    handle.remove()
    x, basis = torch.cat(seen[-len(WINDOWS) :]), torch.linalg.svd(layer.down_matrix(), full_matrices=False)[2]
    leakage = ((x @ basis.mT).norm(dim=1) / x.norm(dim=1)).square().mean()
    assert measured.mean_leakage == pytest.approx(float(leakage), rel=1e-6)


def test_rows_of_b_that_add_nothing_do_not_make_it_quieter_than_chance(tmp_path: Path) -> None:
    """Chance is that of the space which B spans: repeated and empty rows are no excuse for what the others leak."""
    whole = measured(tmp_path / "a", "BLinear.weight", lambda b: torch.cat([b[:2], b[:1], 0 * b[:1]]))
    assert whole.mean_leakage is not None
    assert (whole.rank, whole.down_rank) == (4, 2)
    assert whole.leakage == pytest.approx(whole.mean_leakage * whole.in_features / 2)
    assert judge(whole, Expectations()).tier is Tier.FAIL


@pytest.mark.parametrize("part", ["BLinear.weight", "ALinear.weight"])
def test_denormal_weights_have_figures_and_no_green(tmp_path: Path, part: str) -> None:
    """Weights that float32 hardly holds are measured as what they are, and such an update passes nothing."""
    layer = measured(tmp_path, part, lambda w: w * 1e-42)
    assert layer.defect is None
    assert layer.update_norm < 1e-30
    assert judge(layer, Expectations()).tier is Tier.FAIL


def test_a_b_of_zeros_is_not_green(tmp_path: Path) -> None:
    """A layer with B = 0 sees nothing and does nothing: its figures are finite and it fails."""
    layer = measured(tmp_path, "BLinear.weight", torch.zeros_like)
    assert judge(layer, Expectations()).tier is Tier.FAIL
    assert judge(layer, Expectations(stage=Stage.INIT)).tier is Tier.FAIL
    assert layer.update_norm == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_a_value_that_breaks_the_forward_is_never_green(tmp_path: Path, value: float) -> None:
    """NaN, infinities and what overflows within the forward fail their layer."""
    layer = measured(tmp_path, "ALinear.weight", lambda w: w.clone().fill_(value))
    assert judge(layer, Expectations()).tier is Tier.FAIL


UNSEEN = 14
"""A token that is in no text here."""


def spoilt(part: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    """Writes a value into the row of a token that no text has, of the tensors whose names end so."""

    def to(tensors: dict[str, Tensor]) -> None:
        (name,) = [name for name in tensors if name.endswith(part)]
        tensors[name][UNSEEN if len(tensors[name]) > UNSEEN else 0, 3] = value

    return to


def with_tokens(folder: Path, part: str, value: float, **config: Any) -> Path:
    directory = adapter(folder, tiny.llama(tie_word_embeddings=False), r=4, target_modules=["q_proj"], **config)
    change(directory, lambda tensors, _: spoilt(part, value)(tensors))
    return directory


def merged_with(folder: Path, part: str, value: float) -> Path:
    lora = adapter(folder, tiny.llama(tie_word_embeddings=False), r=4, target_modules=["q_proj"])
    return edit(merged(folder, lora), spoilt(part, value))


def lora_null_with(folder: Path, part: str, value: float) -> Path:
    (folder / "base").mkdir()
    directory = tiny.lora_null(folder / "ft", change=lambda tensors, _: spoilt(part, value)(tensors))
    tiny.tokenizer(directory)
    return directory


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("made", "part"),
    [
        (partial(with_tokens, trainable_token_indices=[UNSEEN]), "trainable_tokens_delta"),
        (partial(with_tokens, modules_to_save=["embed_tokens"]), "embed_tokens.weight"),
        (partial(with_tokens, modules_to_save=["embed_tokens"]), "in memory"),
        (merged_with, "embed_tokens.weight"),
        (lora_null_with, "embed_tokens.weight"),
    ],
)
def test_a_row_that_no_text_asks_for_is_finite_or_refused(
    made: Callable[..., Path], part: str, value: float, tmp_path: Path
) -> None:
    """What training wrote outside the layers is read as a whole: NaN for a token that no window has is told by name."""
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    directory: Any = made(tmp_path, "embed_tokens.weight" if part == "in memory" else part, value)
    options: dict[str, Any] = {"base": tmp_path / "base"} if made is merged_with else {}
    if part == "in memory":
        part, directory = "embed_tokens.weight", in_memory(tmp_path / "base", directory)
    with pytest.raises(
        CheckpointError, match=rf"tensor \S*{part} holds NaN or infinity, and no layer test covers it; "
    ):
        gate(directory, tmp_path / "text.txt", seqlen=64, calib_size=2, **options)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["loaded", "streamed", "on disk", "in memory"])
@pytest.mark.parametrize("part", ["embed_tokens.weight", "lm_head.weight", "layers.1.mlp.down_proj.weight"])
def test_a_base_that_is_not_finite_where_no_text_looks_is_refused_by_the_name_of_its_tensor(
    how: str, part: str, tmp_path: Path
) -> None:
    """What an adapter leaves as it was is deployed with it: one NaN in a row or weight that no test is of is told."""
    adapter(tmp_path, tiny.llama(tie_word_embeddings=False), r=4, target_modules=["q_proj"])
    edit(tmp_path / "base", spoilt(part, math.nan))
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    directory: Any = tmp_path / "adapter"
    if how == "in memory":
        directory = in_memory(tmp_path / "base", directory)
    options = {of: {"device_map": over} for of, over in (("streamed", "stream"), ("on disk", "cpu=1KB"))}.get(how, {})
    with pytest.raises(CheckpointError, match=rf"tensor \S*{part}(, on the base \S+,)? holds NaN or infinity") as told:
        gate(directory, tmp_path / "text.txt", seqlen=64, calib_size=2, drift=False, **options)
    assert how == "in memory" or str(tmp_path / "base") in str(told.value)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("part", "config"), [("lora_B.bias", {"lora_bias": True}), ("lora_magnitude_vector", {"use_dora": True})]
)
def test_a_part_of_a_layer_that_no_norm_is_of_is_finite_also_where_the_layer_may_be_left_out(
    part: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """Where no row has to reach a layer, as in a tower that sees, NaN in its bias or DoRA's norms is told by name."""
    directory = adapter(tmp_path, MAKERS["llava"](), r=4, target_modules=["q_proj"], **config)

    def spoil(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        (name,) = [name for name in tensors if part in name and "vision" in name]
        tensors[name][0] = math.nan

    change(directory, spoil)
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    with pytest.raises(CheckpointError, match=r"tensor \S*vision_tower\S*" + part.replace("lora_B", r"lora_B\S*")):
        gate(directory, tmp_path / "text.txt", seqlen=32, calib_size=2, allow_unreached="*vision*")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_merged_model_and_its_base_may_not_hold_the_same_nan(tmp_path: Path) -> None:
    """What is alike in both is no change, and is deployed all the same: of the model it is told."""
    lora = adapter(tmp_path, tiny.llama(tie_word_embeddings=False), r=4, target_modules=["q_proj"])
    whole = merged(tmp_path, lora)
    for directory in (whole, tmp_path / "base"):
        edit(directory, spoilt("embed_tokens.weight", math.nan))
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    with pytest.raises(CheckpointError, match=r"tensor \S*embed_tokens.weight holds NaN or infinity"):
        gate(whole, tmp_path / "text.txt", seqlen=64, calib_size=2, base=tmp_path / "base")


def in_memory(base: Path, directory: Path) -> Any:
    import peft
    import transformers

    return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), directory)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_such_a_row_is_refused_where_weights_alone_are_gated(tmp_path: Path) -> None:
    """Without a text the tensors outside the layers are read as well."""
    directory = with_tokens(tmp_path, "trainable_tokens_delta", math.nan, trainable_token_indices=[UNSEEN])
    asked: Any = SimpleNamespace(weights_only=True, layers="*", stage="trained")
    with pytest.raises(CheckpointError, match="trainable_tokens_delta holds NaN or infinity"):
        read_files(open_checkpoint(directory), asked, [])


NOT_FINITE = {
    torch.float16: (math.nan, math.inf), torch.bfloat16: (math.nan, -math.inf), torch.float32: (math.nan, math.inf),
    torch.float64: (math.nan, -math.inf), torch.complex64: (complex(0, math.nan), complex(math.inf, 0)),
    torch.float8_e5m2: (math.nan, math.inf), torch.float8_e4m3fn: (math.nan,), torch.float8_e8m0fnu: (math.nan,),
    torch.float8_e5m2fnuz: (math.nan,), torch.float8_e4m3fnuz: (math.nan,), torch.int16: (), torch.uint8: (),
}  # fmt: skip


@pytest.mark.parametrize("dtype", NOT_FINITE, ids=str)
def test_what_is_no_number_is_known_in_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    """By its bits a tensor of any type is finite exactly where torch finds it so, its largest numbers included."""
    from safetensors.torch import save_file

    info: Any = torch.iinfo(dtype) if not dtype.is_floating_point and not dtype.is_complex else torch.finfo(dtype)
    whole = [
        torch.tensor([1.0, 2.0]).to(dtype),
        torch.tensor([info.max, info.min], dtype=torch.float64).to(dtype),
        torch.empty(0, dtype=dtype),
    ]
    broken = [torch.tensor([1, value, 1]).to(dtype) for value in NOT_FINITE[dtype]]
    save_file({str(place): tensor for place, tensor in enumerate([*whole, *broken])}, tmp_path / "x.safetensors")
    held = read_header(tmp_path / "x.safetensors")
    found = [is_finite(held[str(place)]) for place in range(len(held))]
    assert found == [True] * len(whole) + [False] * len(broken)


def test_no_window_and_an_empty_one_are_errors(tmp_path: Path) -> None:
    """Without tokens there is nothing to measure, and no figure."""
    model = loaded(tiny.lora_null(tmp_path))
    for windows in ([], [[1, 2], []]):
        with pytest.raises(MeasurementError, match="windows: there is none, or one without tokens"):
            measure(model, windows)


def test_ctrl_c_in_the_pass_removes_every_hook(tmp_path: Path) -> None:
    """An interrupt after the first batch goes through at once, and the model is left without a hook."""
    model = loaded(tiny.lora_null(tmp_path))

    def interrupt(done: int, _: int) -> None:
        raise KeyboardInterrupt(done)

    with pytest.raises(KeyboardInterrupt):
        measure(model, WINDOWS, progress=interrupt)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    assert len(measure(model, WINDOWS)) == 21


ABSURD: Mapping[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers is 1000000000, more than any model has"),
    "a few more layers": ({"num_hidden_layers": 90_000}, "config.json: describes a model far larger than the "),
    "labels": ({"num_labels": 10**9}, ""),
    "vocabulary": ({"vocab_size": 10**12}, "config.json: describes a model far larger than"),
    "width": ({"intermediate_size": 10**10}, "config.json: describes a model far larger than"),
    "wrong type": ({"hidden_size": "\x1b[31m"}, "config.json: transformers cannot build a causal 'llama' model"),
    "no model": ({"model_type": "trap"}, " has no m"),
}  # fmt: skip


@pytest.mark.parametrize("case", ABSURD)
def test_a_config_cannot_ask_for_more_than_the_files_hold(tmp_path: Path, case: str) -> None:
    """Absurd sizes are refused in bounded time, before memory is taken; nested ones that shape nothing are dropped."""
    fields, message = ABSURD[case]
    folder = tiny.lora_null(tmp_path / "ft", change=lambda _, config: config.update(fields))
    started = time.perf_counter()
    if message:
        with pytest.raises(CheckpointError) as caught:
            loaded(folder)
        assert message in str(caught.value)
        assert str(caught.value).isprintable()
        cure = "convert" if case == "no model" else "; give the config that was saved with"
        assert cure in str(caught.value)
    else:
        loaded(folder)
    assert time.perf_counter() - started < 20


def test_masks_of_a_hostile_size_are_refused_before_they_are_made(tmp_path: Path) -> None:
    """GPT-Neo makes a mask of all positions squared in every layer: a config of a million is told, not built."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    small = GPTNeoConfig(
        vocab_size=128, max_position_embeddings=64, hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global"], 2]], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    loaded(tiny.lora_null(tmp_path / "sound", GPTNeoForCausalLM(small)))
    folder = tiny.lora_null(
        tmp_path / "ft", GPTNeoForCausalLM(small), change=lambda _, fields: fields.update(max_position_embeddings=10**6)
    )
    with pytest.raises(CheckpointError, match="describes a model far larger than"):
        loaded(folder)


def test_a_nested_field_cannot_name_a_kernel_or_code() -> None:
    """What leads to code is dropped at every depth of the config, not at its top alone."""
    fields = {"a": {"_attn_implementation": "x/kernel", "b": [{"auto_map": {}, "c": 1}]}, "auto_map": {}}
    assert without(LEADS_TO_CODE, fields) == {"a": {"b": [{"c": 1}]}}


FIELD = st.sampled_from([*tiny.SIZES, "rope_parameters", "hidden_act", "head_dim", "layer_types", "pad_token_id", "x"])
VALUE = st.sampled_from(
    [0, -1, 1, 7, 2**31, 10**18, 0.5, 1e400, True, None, "", "gelu", "x\x1b", [], [1], {}, {"rope_type": "x"}]
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA-Null directory whose config is rewritten over and over."""
    return tiny.lora_null(tmp_path_factory.mktemp("config") / "ft")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(FIELD, VALUE, min_size=1, max_size=3))
def test_any_config_is_built_or_refused(sound: Path, fields: dict[str, Any]) -> None:
    """Whatever a model's config says, loading it raises nothing but our own error, and that in plain characters."""
    file = sound / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), **fields}))
    told = ""
    try:
        loaded(sound)
    except CheckpointError as error:
        told = str(error)
    finally:
        file.write_text(before)
    assert not told or told.isprintable()


@given(st.floats(1e-9, 1e9), st.floats(-1e-7, 1e-7))
def test_a_finding_never_rounds_to_its_bound(bound: float, off: float) -> None:
    """Value and bound are shown in as many digits as it takes to see which side the value lies on."""
    value = bound * (1 + off)
    threshold = Threshold("preservation", bound / 2, bound, lower_is_better=True)
    finding = str(Finding(value, threshold, threshold.tier(value)))
    _, shown, sign, limit = finding.split()
    compare = {">": float.__gt__, "<": float.__lt__, ">=": float.__ge__, "<=": float.__le__}[sign]
    assert compare(float(shown), float(limit))
    assert str(Finding(0.5000001, Threshold("leakage", 0.1, 0.5, lower_is_better=True), Tier.FAIL)) == (
        "leakage 0.5000001 > 0.5"
    )


def test_ten_thousand_layers_are_found_at_once() -> None:
    """Looking up every layer of a large run takes no longer than a walk through it."""
    run = RunStats("m", "t", tuple(saved.run(*(f"l.{i}" for i in range(10_000))).layers), 10_000)
    started = time.perf_counter()
    assert all(run.layer(layer.name) is layer for layer in run.layers)
    assert time.perf_counter() - started < 1
    assert run.layer("nothing") is None
