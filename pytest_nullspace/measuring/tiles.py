"""Images that a model reads as tiles, as Mllama does: which of a layer's rows are padding, and count for nothing.

Each image has as many tiles as any may have, those that it does not need are zeros, and in the tower each tile is
filled up to a multiple of `ROUND` patches. `aspect_ratio_mask` says which tiles an image has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MASK = "aspect_ratio_mask"
ROUND = 8
"""To a multiple of so many are the patches of a tile filled up, where attention runs over them."""
_FROM_TILES = (".cross_attn.k_proj", ".cross_attn.v_proj")
"""What lies among the layers of the text and reads what the tower made."""


def patches_of(model: nn.Module) -> int | None:
    """How many patches a tile has, that of its class included; None of a model without tiles."""
    told = (
        module.num_patches
        for module in model.modules()
        if hasattr(module, "max_num_tiles") and hasattr(module, "num_patches")
    )
    return next((patches for patches in told if isinstance(patches, int)), None)


def read_by(model: nn.Module) -> frozenset[int]:
    """The modules, by id, that read tiles although they lie in the decoder."""
    return frozenset(id(module) for name, module in model.named_modules() if name.endswith(_FROM_TILES))


def counted(mask: Tensor, rows: int, patches: int | None) -> list[Tensor] | None:
    """The numbers of the rows that are parts of images, of each window; None where nobody can tell.

    Args:
        mask: Which tiles there are, shape ``(windows, images, tiles)``.
        rows: How many a layer reads: for each window, image and tile in turn its patches, filled up or not.
        patches: Of a tile.
    """
    each, rest = divmod(rows, mask.numel())
    if patches is None or rest or each not in (patches, -(-patches // ROUND) * ROUND):
        return None
    filled = torch.arange(each, device=mask.device) < patches
    valid = (mask.flatten(1).bool()[:, :, None] & filled).flatten(1)
    return [window.nonzero()[:, 0] + number * valid.shape[1] for number, window in enumerate(valid)]


def drawn(numbers: Sequence[Tensor], chosen: Tensor, length: int) -> list[Tensor]:
    """Of each window the same share of its rows as of its tokens, spread alike.

    Args:
        numbers: Those of `counted`.
        chosen: The numbers of the counted tokens among those of all windows.
        length: Tokens of a window.
    """
    found = []
    for window, of in enumerate(numbers):
        places = chosen[chosen // length == window] % length
        found.append(of[(places * len(of) // length).unique()])  # type: ignore[no-untyped-call]
    return found
