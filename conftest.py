"""What every test shares: pytester, hypothesis profiles, no network, and the device on which it runs."""

import os
from collections.abc import Callable, Iterator

import _pytest.pytester
import pytest
from hypothesis import settings

pytest_plugins = ["pytester"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors, and as many processes as there are cores
os.environ.pop("GITHUB_STEP_SUMMARY", None)

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the tests marked ``gpu`` run."""
    parser.addoption(
        "--device",
        choices=("cuda", "xpu", "cpu"),
        help="run the tests marked gpu, and no others, on this device; cpu stands in for a card where there is none",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Without ``--device`` no test, nor any process that it starts, finds a card: what is held are figures of the CPU.

    Raises:
        UsageError: There is no such device.
    """
    device = config.getoption("--device")
    if device is None:
        os.environ.update(dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "-1"))
    elif device != "cpu":
        import torch

        if not getattr(torch, device).is_available():
            raise pytest.UsageError(
                f"--device={device}: torch sees none on this machine; --device=cpu stands in for it"
            )


def pytest_report_header(config: pytest.Config) -> str:
    """On which device the tests run."""
    device = config.getoption("--device")
    return "device: cpu, cards are hidden" if device is None else f"device: {device}, tests marked gpu alone"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run where ``--device`` says, and then alone."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if config.getoption("--device") is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="--device=cuda, which runs the tests of a card, was not given"))
    else:
        config.hook.pytest_deselected(items=[item for item in items if item not in marked])
        items[:] = marked


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """The device of the tests marked ``gpu``."""
    named = pytestconfig.getoption("--device")
    assert isinstance(named, str)
    return named


@pytest.fixture(scope="session", autouse=True)
def _libraries_stay() -> Iterator[None]:
    """What pytester's runs in this process import of libraries stays imported.

    It forgets all that was, and a library that is imported once more has other classes than those that it kept.
    """

    def stays(name: str) -> bool:
        return name.partition(".")[0] in ("torch", "transformers", "peft", "datasets", "accelerate", "safetensors")

    def snapshot(
        preserve: Callable[[str], bool], taken: type = _pytest.pytester.SysModulesSnapshot
    ) -> _pytest.pytester.SysModulesSnapshot:
        found: _pytest.pytester.SysModulesSnapshot = taken(preserve=lambda name: stays(name) or preserve(name))
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_pytest.pytester, "SysModulesSnapshot", snapshot)
        yield
