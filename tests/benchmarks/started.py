"""A plugin for measuring the start-up: CPU seconds until the first window reaches the model, and what is imported then.

``pytest -p tests.benchmarks.started …`` with the name of a file in ``NULLSPACE_STARTED`` writes them there as JSON.
"""

import json
import os
import sys
import time
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_nullspace.measuring import about
from pytest_nullspace.measuring.measurement import Measurement


def pytest_configure() -> None:
    """Have the clock count CPU seconds, and the pass tell when it begins and when its first window does."""
    vars(about)["time"] = SimpleNamespace(perf_counter=time.process_time)
    told: dict[str, Any] = {}
    real = Measurement.figures

    def figures(run: Measurement, layers: Collection[str]) -> Any:
        from pytest_nullspace.measuring.recorder import Recorder

        start = Recorder.start

        def first(recorder: Recorder, *of: Any) -> None:
            if "window" not in told:
                told.update(window=time.process_time(), modules=sorted(sys.modules))
                Path(os.environ["NULLSPACE_STARTED"]).write_text(json.dumps(told), encoding="utf-8")
            start(recorder, *of)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Recorder, "start", first)
            told.setdefault("pass", time.process_time())
            return real(run, layers)

    Measurement.figures = figures  # type: ignore[method-assign, assignment]
