"""Holds the ratios of a benchmark run against the committed baseline; absolute times are shown and never judged.

``python -m tests.benchmarks.track RUN.json`` with a file that ``pytest --benchmark-json`` wrote fails where a ratio is
worse than in ``baseline.json``, on a device of the same name, by more than the margin. ``… --write`` makes the run the
baseline of its device.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BASELINE = Path(__file__).with_name("baseline.json")
MARGIN = 0.25
"""By how much a ratio may be worse, relative: two busy cores of a shared machine vary by nearly as much."""
LOWER_IS_BETTER = {
    "pass_over_bare_forward": True,
    "time_over_reference": True,
    "memory_over_reference": True,
    "reading_over_parsing": True,
    "selected_over_share": True,
    "eight_over_one": True,
    "share_of_copy_bandwidth": False,
}
"""The ratios that benchmarks put into their ``extra_info``."""

Ratios = Mapping[str, Mapping[str, float]]


def ratios(run: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The ratios of each benchmark in a run, by its id."""
    found = {}
    for benchmark in run["benchmarks"]:
        told = {name: benchmark["extra_info"][name] for name in LOWER_IS_BETTER if name in benchmark["extra_info"]}
        if told:
            found[benchmark["fullname"]] = told
    return found


def device(run: Mapping[str, Any]) -> str:
    """The name of the device on which it ran."""
    return str(run["machine_info"]["device"])


def compared(now: Ratios, before: Ratios, margin: float = MARGIN) -> Iterator[tuple[str, bool]]:
    """A line for each ratio of either, and whether it is a regression."""
    for name in sorted({*now, *before}):
        for ratio, lower in LOWER_IS_BETTER.items():
            value, was = now.get(name, {}).get(ratio), before.get(name, {}).get(ratio)
            if value is not None and was is not None:
                worse = value / was - 1 if lower else was / value - 1
                yield f"{name}: {ratio} {value:.3f}, was {was:.3f} ({worse:+.1%} worse)", worse > margin
            elif value is not None:
                yield f"{name}: {ratio} {value:.3f}, new: it has no baseline", False
            elif was is not None:
                yield f"{name}: {ratio} was {was:.3f}, not run", False


def main() -> int:
    """Compare, or write; the exit code tells whether a ratio regressed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.track", description="Ratios against a baseline.")
    parser.add_argument("run", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--write", action="store_true", help="make it the baseline")
    options = parser.parse_args()
    run = json.loads(options.run.read_text("utf-8"))
    now = ratios(run)
    if not now:
        print(f"{options.run}: holds no ratio, so there is nothing to hold", file=sys.stderr)
        return 1
    baselines, name = json.loads(BASELINE.read_text("utf-8")), device(run)
    if options.write:
        baselines[name] = now
        BASELINE.write_text(json.dumps(baselines, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    if name not in baselines:
        print(f"{name}: has no baseline yet; --write makes this run its own")
    lines = list(compared(now, baselines.get(name, {})))
    for line, regressed in lines:
        print(f"{'REGRESSED' if regressed else 'ok':<10}{line}")
    return int(any(regressed for _, regressed in lines))


if __name__ == "__main__":
    sys.exit(main())
