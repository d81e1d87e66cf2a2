"""What a report tells of the model that was measured, beside its figures."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.verdicts import Verdict
from pytest_nullspace.run.stats import UNREACHED, RunStats


def built_as(run: RunStats) -> Iterator[str]:
    """As what the base model was built, as far as the run tells."""
    model = run.about.get("model")  # a file of another making may hold anything
    if isinstance(model, dict) and model.get("class"):
        yield f"base model built as {printable(model['class'], 300)}"


def remarks(run: RunStats) -> list[str]:
    """What was done to fit adapter and base."""
    model = run.about.get("model")
    told = model.get("remarks") if isinstance(model, dict) else None
    return [printable(remark, 1000) for remark in told] if isinstance(told, list) else []


_SEES, _OTHERS = "vision|visual|image", (("audio|speech", "sound only"), ("", "no row of this text"))
"""By what a subtree is reached, as its name tells; the first that fits."""


def unreached(verdicts: Sequence[Verdict], *, saw: bool = False) -> Iterator[str]:
    """The parts of the model that no row reached, where they hold several layers, and how to reach or allow them.

    Args:
        verdicts: Those of the run.
        saw: Whether it read images.
    """
    lost = {verdict.subject for verdict in verdicts if verdict.defect == UNREACHED}
    reached = {parent for verdict in verdicts if verdict.subject not in lost for parent in _parents(verdict.subject)}
    parts: defaultdict[str, int] = defaultdict(int)
    for name in lost:
        parts[_part(name, reached)] += 1
    for part, layers in sorted(parts.items()):
        if layers > 1:
            by, cure = next(words for names, words in _OTHERS if re.search(names, part)), ""
            if re.search(_SEES, part) and not saw:
                by, cure = "images only", "; rows of images in place of the text reach them (docs/texts.md)"
            yield (
                f"{layers} layers of {printable(part)} are reached by {by}; to allow them: "
                f"--nullspace-allow-unreached='{printable(part)}.*'{cure}"
            )


def saw(run: RunStats) -> bool:
    """Whether the run read images."""
    return any(isinstance(told, dict) and told.get("images") for told in run.about.values())


def _parents(name: str) -> list[str]:
    """The modules in which a layer lies, from the outermost, and itself."""
    parts = name.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def _part(name: str, reached: Collection[str]) -> str:
    """The outermost module about the layer that holds no layer that was reached."""
    return next(parent for parent in _parents(name) if parent not in reached)
