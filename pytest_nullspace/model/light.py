"""Modules of a quarter of the usual size: a model whose blocks are streamed holds them all, all the time."""

from collections import OrderedDict
from typing import Any

from torch import nn

SELDOM = {
    name: type(value)
    for name, value in vars(nn.Module()).items()
    if isinstance(value, OrderedDict | set) and name not in ("_parameters", "_buffers", "_modules")
}
"""What each module has and hardly one needs, such as a dictionary for each kind of hook."""


class Light(nn.Module):
    """A module that has these once it is asked for them."""

    def __getattr__(self, name: str) -> Any:
        """What is not there; one of these is from here on."""
        if name in SELDOM:
            return vars(self).setdefault(name, SELDOM[name]())
        return super().__getattr__(name)


def lighten(module: nn.Module) -> None:
    """Let go of those that are empty, in whatever is `Light` of ``module`` and the modules inside."""
    for light in (of for of in module.modules() if isinstance(of, Light)):
        for name in SELDOM:
            if not vars(light).get(name, True):
                del vars(light)[name]
