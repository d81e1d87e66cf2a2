"""The reference script's way to the same figures, as a baseline: keep what every layer was given, then multiply.

``python -m tests.benchmarks.reference streaming|cached|bare FOLDER ROWS`` runs one of the ways in a process of its own
and prints the peak of its memory in MiB.
"""

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.measuring.memory import keep_freed_memory
from pytest_nullspace.measuring.streaming import measure
from pytest_nullspace.model import AdaptedModel, load_model

SEQLEN = 512
Windows = Sequence[Sequence[int]]
NORMS = ("input_norm", "down_norm", "update_norm", "base_norm", "output_norm")


def cached(adapted: AdaptedModel, windows: Windows) -> dict[str, list[float]]:
    """The five mean norms of every layer: its inputs in lists on the CPU, concatenated when all have been seen.

    As cheap as that can be: layers that share an input keep it once, and outputs, which follow, are not kept.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in adapted.layers}
    handles = [
        layer.layer.register_forward_pre_hook(lambda _, args, kept=rows[name]: kept.append(args[0].cpu().flatten(0, 1)))
        for name, layer in adapted.layers.items()
    ]
    bare(adapted, windows)
    for handle in handles:
        handle.remove()
    found = {}
    with torch.inference_mode():
        for name, layer in adapted.layers.items():
            x, (down, up, base) = torch.cat(rows.pop(name)), (m.weight for m in (layer.down, layer.up, layer.base))
            assert isinstance(down, Tensor)
            assert isinstance(up, Tensor)
            assert isinstance(base, Tensor)
            bx = x @ down.mT
            abx, wx = layer.scale * (bx @ up.mT), x @ base.mT
            found[name] = [float(part.norm(dim=1).mean()) for part in (x, bx, abx, wx, abx + wx)]
    return found


def wait_for(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        getattr(torch, device).synchronize()


def bare(adapted: AdaptedModel, windows: Windows) -> None:
    """The decoder alone, as the pass runs it, with nothing watching."""
    with torch.inference_mode():
        for window in windows:
            decoder = adapted.model.base_model
            assert isinstance(decoder, torch.nn.Module)
            decoder(input_ids=torch.tensor([list(window)], device=adapted.device), use_cache=False)
    wait_for(adapted.device.type)


def streaming(adapted: AdaptedModel, windows: Windows) -> dict[str, list[float]]:
    """The same norms by our pass."""
    return {layer.name: [getattr(layer, norm) for norm in NORMS] for layer in measure(adapted, windows)}


WAYS: Mapping[str, Callable[[AdaptedModel, Windows], object]] = {"streaming": streaming, "cached": cached, "bare": bare}


def windows_of(rows: int, seqlen: int = SEQLEN, vocabulary: int = 128) -> list[list[int]]:
    """So many random tokens, cut into windows."""
    tokens = torch.randint(0, vocabulary, (rows // seqlen, seqlen), generator=torch.Generator().manual_seed(0))
    return [list(map(int, window)) for window in tokens]


def peak_memory() -> float:
    """The most that this process has held, in MiB.

    ``ru_maxrss`` would also count what the process that started it held.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def main(way: str, folder: str, rows: str) -> None:
    """Run one way, with memory kept as in a gate, and print its peak."""
    keep_freed_memory()
    adapted = load_model(open_checkpoint(Path(folder)), torch.device("cpu"), torch.float32)
    WAYS[way](adapted, windows_of(int(rows)))
    print(peak_memory())


if __name__ == "__main__":
    main(*sys.argv[1:])
