"""What older releases lack, which tests of it are left out under: the pinned ones have all of it."""

from importlib.util import find_spec

import peft
import pytest
import transformers

FIVE = int(transformers.__version__.partition(".")[0]) >= 5
"""Whether transformers is of the generation whose configs, fused experts and mapped names most tests are written in."""
PEFT = tuple(map(int, peft.__version__.split(".")[:2]))

sees = pytest.mark.skipif(
    not hasattr(transformers.ProcessorMixin, "image_token_ids"),
    reason="images are read with transformers 5.11 or later",
)
five = pytest.mark.skipif(not FIVE, reason="it is of transformers 5")
maps = pytest.mark.skipif(
    find_spec("peft.utils.transformers_weight_conversion") is None,
    reason="this PEFT maps no names",
)
newest_peft = pytest.mark.skipif(PEFT < (0, 21), reason="it is of PEFT 0.21")


def leave_out_older(kind: str) -> None:
    """Skip a kind of adapter that the releases installed do not make."""
    if kind == "the layers' biases" and PEFT < (0, 21):
        pytest.skip("this PEFT does not save them")
    if kind.startswith("experts by") and not FIVE:
        pytest.skip("experts are layers before transformers 5")
