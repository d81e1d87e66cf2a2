"""The pass beside the bare decoder on a device, random weights of Llama-2-7B's shape: ``python -m tests.gpu.table``.

Under LoRA-Null and under a PEFT adapter: seconds of both, what the pass takes before its first window, what is left for
the hooks, peak memory, and what is launched and waited for in two batches.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from pytest_nullspace.measuring.batching import Batching
from pytest_nullspace.measuring.loading import device_name
from pytest_nullspace.measuring.recorder import Recorder
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedLayer, AdaptedModel
from pytest_nullspace.model.lora_null import AdaptedLinear
from pytest_nullspace.model.views import view
from tests import tiny
from tests.benchmarks.reference import wait_for

COUNTED = (
    "aten::sum", "aten::copy_", "aten::item", "cudaLaunchKernel", "cudaMemcpyAsync", "cudaStreamSynchronize",
    "cudaDeviceSynchronize", "cudaEventSynchronize",
)  # fmt: skip
"""What is counted one by one; all that torch dispatches is counted together."""
ROUNDS = 3


class Size(NamedTuple):
    """What is measured: the model's sizes, its rank, and the windows.

    Attributes:
        sizes: Of the Llama.
        rank: Of every layer.
        windows: How many, in the larger and the smaller run.
        seqlen: Tokens of each.
        batch: Windows a forward.
    """

    sizes: dict[str, int]
    rank: int
    windows: tuple[int, int]
    seqlen: int
    batch: int


LLAMA_2_7B = Size(
    {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
     "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    128, (32, 4), 2048, 8,
)  # fmt: skip
SMALL = Size(dict(tiny.SIZES), 4, (4, 2), 64, 2)


def plain(of: Size, device: str, dtype: torch.dtype) -> nn.Module:
    """A Llama with random weights, made where it runs."""
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**of.sizes), dtype=dtype)
    return model.eval().requires_grad_(False)


def lora_null(of: Size, device: str, dtype: torch.dtype) -> AdaptedModel:
    """It with a null space of that rank, orthonormal rows, in every linear layer but the head."""
    model, layers = plain(of, device, dtype), {}
    linear = {name: at for name, at in model.named_modules() if isinstance(at, nn.Linear) and name != "lm_head"}
    for name, at in linear.items():
        with torch.device("meta"):
            adapted = AdaptedLinear(at.in_features, at.out_features, of.rank, bias=False, protected=None)
        rows = torch.linalg.qr(torch.randn(at.in_features, of.rank, device=device))[0].mT
        up = 0.01 * torch.randn(at.out_features, of.rank, device=device)
        for part, weight in (adapted.BLinear, rows), (adapted.ALinear, up), (adapted.residual, at.weight):
            part.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        model.set_submodule(name, adapted)
        layers[name] = AdaptedLayer(
            name, adapted, adapted.BLinear, adapted.ALinear, adapted.residual, 1.0, adapted.down_matrix,
            partial(getattr, adapted.residual, "weight"), has_bias=False, joined=adapted.joined,
        )  # fmt: skip
    return AdaptedModel(model, layers, torch.device(device))


def peft(of: Size, device: str, dtype: torch.dtype) -> AdaptedModel:
    """It under PEFT's own layers, their matrices random."""
    model = plain(of, device, dtype)
    config = LoraConfig(r=of.rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore"):  # as in a gate
        wrapped: Any = get_peft_model(model, config)
    wrapped.eval().requires_grad_(False)
    found = {name: at for name, at in model.named_modules() if hasattr(at, "lora_A")}
    return AdaptedModel(
        model, {name: view(name, layer, "default") for name, layer in found.items()}, torch.device(device)
    )


Windows = Sequence[Sequence[int]]


def bare(adapted: AdaptedModel, windows: Windows, batch: int) -> None:
    """The decoder alone, with nothing watching."""
    decoder = adapted.model.base_model
    assert isinstance(decoder, nn.Module)
    with torch.inference_mode():
        for first in range(0, len(windows), batch):
            decoder(input_ids=torch.tensor(windows[first : first + batch], device=adapted.device), use_cache=False)


@contextmanager
def first_window(at: list[float], device: str) -> Iterator[None]:
    """Note in ``at`` when each pass comes to its first window, with all done that it was given before."""
    start = Recorder.start
    seen: set[int] = set()

    def noted(recorder: Recorder, *of: Any) -> None:
        if id(recorder) not in seen:
            seen.add(id(recorder))
            wait_for(device)
            at.append(time.perf_counter())
        start(recorder, *of)

    Recorder.start = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Recorder.start = start  # type: ignore[method-assign]


def seconds(work: Callable[[], object], device: str) -> float:
    """Until the device has done it."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def peak(work: Callable[[], object], device: str) -> float | None:
    """The most memory of the card that it held, in GiB; None for a CPU."""
    if device == "cpu":
        return None
    card = getattr(torch, device)
    card.reset_peak_memory_stats()
    work()
    return float(card.max_memory_allocated()) / 2**30


def counts(work: Callable[[], object], device: str) -> dict[str, int]:
    """How often each of `COUNTED` was called, and how many operations torch dispatched."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as profiled:
        work()
        wait_for(device)
    found = {event.key: event.count for event in profiled.key_averages()}
    dispatched = sum(count for name, count in found.items() if name.startswith("aten::"))
    return {"dispatched": dispatched} | {name: found[name] for name in COUNTED if name in found}


def rows(adapted: AdaptedModel, of: Size, device: str) -> Iterator[tuple[str, str]]:
    """The lines of the table."""
    vocabulary, draw = of.sizes["vocab_size"], torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocabulary, (of.windows[0], of.seqlen), generator=draw).tolist()
    for count in of.windows:
        windows, taken = drawn[:count], []
        work = partial(bare, adapted, windows, of.batch), partial(measure, adapted, windows, batch_size=of.batch)
        for one in work:  # so that kernels are chosen, and memory is set aside
            one()
        for _ in range(ROUNDS):
            of_bare, at = seconds(work[0], device), list[float]()
            start = time.perf_counter()
            with first_window(at, device):
                of_pass = seconds(work[1], device)
            taken.append((of_bare, of_pass, at[0] - start))
        decoder, whole, before = (median(column) for column in zip(*taken, strict=True))
        what = f"{count} windows of {of.seqlen}, {of.batch} a forward"
        yield f"{what}: bare decoder, s", f"{decoder:.3f}"
        yield f"{what}: pass, s", f"{whole:.3f}"
        yield f"{what}: pass ÷ bare", f"{median(b / a for a, b, _ in taken):.3f}"
        yield f"{what}: before the first window, s", f"{before:.3f}"
        yield f"{what}: left for hooks and the end, s", f"{whole - before - decoder:.3f}"
        memory = [peak(one, device) for one in work]
        if None not in memory:
            yield f"{what}: peak memory, pass and bare, GiB", f"{memory[1]:.2f}, {memory[0]:.2f}"
    for batch in (of.batch // 2, 2 * of.batch, 4 * of.batch):  # whether another number would be the better default
        other = partial(measure, adapted, drawn, batch_size=batch)
        other()
        yield f"{len(drawn)} windows of {of.seqlen}, {batch} a forward: pass, s", f"{seconds(other, device):.3f}"
    batching = Batching.trying(1, torch.device(device))
    found = seconds(partial(measure, adapted, 2 * drawn, batch_size=batching), device)
    yield f"{2 * len(drawn)} windows of {of.seqlen}, from 1 a forward as many as gain: pass, s", f"{found:.3f}"
    yield "how many that is", str(batching.size)
    for batch in dict.fromkeys((1, of.batch)):
        two = counts(partial(measure, adapted, drawn[: 2 * batch], batch_size=batch), device)
        alone = counts(partial(bare, adapted, drawn[: 2 * batch], batch), device)
        for name, count in two.items():
            yield f"two batches of {batch}: {name}, pass and bare", f"{count:,}, {alone.get(name, 0):,}"


def main() -> None:
    """Print the table for each kind of adapter."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.table", description="The pass beside the bare decoder.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "xpu", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny model in place of one of 7B")
    options = parser.parse_args()
    of = SMALL if options.small else LLAMA_2_7B
    name = device_name(torch.device(options.device))
    print(f"{name}, torch {torch.__version__}, bfloat16, rank {of.rank}, hidden size {of.sizes['hidden_size']}")
    for kind, made in ("LoRA-Null", lora_null), ("PEFT", peft):
        print(f"\n| {kind} | |\n| --- | ---: |", flush=True)
        for what, figure in rows(made(of, options.device, torch.bfloat16), of, options.device):
            print(f"| {what} | {figure} |", flush=True)


if __name__ == "__main__":
    main()
