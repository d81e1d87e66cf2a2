"""Numbers to a device and back, for which a card is waited for no longer than until they are there."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def sent(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """The whole ``numbers``, also nested, as a tensor on the ``device``, which nobody waits for."""
    made = torch.tensor(numbers, dtype=torch.int64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def fetched(parts: Sequence[Tensor]) -> list[Tensor]:
    """The numbers of ``parts``, wherever they lie, on the CPU and in float64, in one transfer from each device."""
    return fetching(parts)()


def fetching(parts: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to fetch them; what is returned waits for them, and not for what a card was given since."""
    devices = {part.device: None for part in parts}
    there = {device: [place for place, part in enumerate(parts) if part.device == device] for device in devices}
    begun = [_sent_back(torch.cat([parts[place].flatten().double() for place in of])) for of in there.values()]
    shapes = [part.shape for part in parts]

    def found() -> list[Tensor]:
        known = dict[int, Tensor]()
        for places, arrived in zip(there.values(), begun, strict=True):
            split = torch.split(arrived(), [shapes[place].numel() for place in places])
            known |= {place: of.view(shapes[place]) for place, of in zip(places, split, strict=True)}
        return [known[place] for place in range(len(shapes))]

    return found


def _sent_back(numbers: Tensor) -> Callable[[], Tensor]:
    """Begin to copy ``numbers`` to the CPU; what is returned waits until they are there."""
    if numbers.device.type != "cuda":
        there = numbers.cpu()
        return lambda: there
    held = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    sent = torch.cuda.current_stream(numbers.device).record_event()

    def arrived() -> Tensor:
        sent.synchronize()
        return held

    return arrived
