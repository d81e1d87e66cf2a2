"""Images in tiles: a tower's padding counts for nothing, and all else as PEFT's own forward has it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pytest_nullspace.measuring import tiles
from pytest_nullspace.measuring.streaming import measure
from tests.releases import sees
from tests.unit.measuring.test_images import Case, inputs_of
from tests.unit.model.test_peft import EXACT, figures, naive

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

PATCHES, FILLED, TILES = 17, 24, 4
"""Of a tile of the tiny model with its class, the same filled up, and the tiles of an image."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("mllama"), "mllama")


def wanted(case: Case, held: list[int], counted: list[list[int]] | None) -> dict[str, Tensor]:
    """The rows that count of each layer in PEFT's own forward, those of no tile and what fills tiles up left out."""
    found = {}
    for name, windows in inputs_of(case.theirs(), case).items():
        kept = []
        for number, rows in enumerate(windows):
            if len(rows) in (TILES * PATCHES, TILES * FILLED):
                kept.append(rows.view(TILES, len(rows) // TILES, -1)[: held[number], :PATCHES].flatten(0, 1))
            else:
                kept.append(rows if counted is None else rows[counted[number]])
        found[name] = torch.cat(kept)
    return found


@sees
@pytest.mark.parametrize("chosen", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_padding_counts_for_nothing(case: Case, chosen: bool, batch_size: int) -> None:
    """Tower, projector and what of the text reads them have rows of images alone; each mean is float64's to 1e-6."""
    counted = [[len(tokens) - 1, len(tokens) - 3] for tokens in case.shown] if chosen else None
    held = [int(case.given(number)["aspect_ratio_mask"].sum()) for number in range(len(case.windows))]
    assert set(held) == {2, 3, 4}
    caught, modules = wanted(case, held, counted), dict(case.theirs().named_modules())
    found = {layer.name: layer for layer in measure(case.adapted, case.shown, counted=counted, batch_size=batch_size)}
    assert found.keys() == caught.keys()
    of_images = [name for name in found if "vision_model" in name or "projector" in name]
    assert len(of_images) > 5
    for name in (*of_images, *(name for name in found if name.endswith(("cross_attn.k_proj", "cross_attn.v_proj")))):
        assert found[name].rows == sum(held) * PATCHES, name
    for name, layer in found.items():
        assert layer.rows == len(caught[name]), name
        assert figures(layer) == pytest.approx(
            naive(caught[name], case.adapted.layers[name], modules[name]), rel=EXACT
        ), name
        assert layer.defect is None
        assert not layer.unplaced


@sees
def test_of_drawn_rows_every_window_has_some_of_its_images(case: Case) -> None:
    """With fewer rows a layer the tower counts a share of its own, and none of them is padding."""
    most = sum(map(len, case.shown)) // 2
    whole = {layer.name: layer.rows for layer in measure(case.adapted, case.shown)}
    for layer in measure(case.adapted, case.shown, max_rows=most):
        assert 0 < layer.rows <= whole[layer.name], layer.name
        assert layer.by_window is not None
        assert all(layer.by_window.rows)


@given(st.lists(st.integers(1, TILES), min_size=1, max_size=4), st.integers(1, 20), st.booleans())
def test_the_numbers_are_those_of_the_tiles_that_are_there(held: list[int], patches: int, filled: bool) -> None:
    """Whatever the patches of a tile and whether it is filled up, the counted rows are patches of an image's tiles."""
    mask = torch.tensor([[[number < tiles_of for number in range(TILES)]] for tiles_of in held])
    each = -(-patches // tiles.ROUND) * tiles.ROUND if filled else patches
    found = tiles.counted(mask, mask.numel() * each, patches)
    assert found is not None
    assert [len(of) for of in found] == [tiles_of * patches for tiles_of in held]
    for window, of in enumerate(found):
        assert bool((of // (TILES * each) == window).all())
        assert bool((of // each % TILES < held[window]).all())
        assert bool((of % each < patches).all())
    assert tiles.counted(mask, mask.numel() * each + 1, patches) is None
    assert tiles.counted(mask, mask.numel() * (each + tiles.ROUND), patches) is None
    assert tiles.counted(mask, mask.numel() * each, None) is None
