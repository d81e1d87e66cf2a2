"""What a report tells of the model that was measured, beside its figures."""

from collections.abc import Iterator

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.run.stats import RunStats


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
