"""Which layers too few rows reached for their leakage to prove a quiet space. Pure."""

from collections.abc import Mapping, Sequence

from pytest_nullspace.run.stats import LayerStats, RunStats
from pytest_nullspace.run.texts import FIRST


def tokens_of(run: RunStats) -> tuple[int, int]:
    """How many tokens the preserved text had, and how many of them were new; zeros where nobody told."""
    text = run.about.get("text")  # a file of another making may hold anything
    counts = [text.get(what) for what in ("tokens", "distinct")] if isinstance(text, dict) else []
    known = [count for count in counts if isinstance(count, int) and count > 0]
    return (known[0], known[1]) if len(known) == 2 else (0, 0)


def distinct_rows(run: RunStats, layer: LayerStats) -> float:
    """How many rows of ``layer`` are not, or almost, another one again."""
    tokens, distinct = tokens_of(run)
    apart = layer.rows * (distinct / tokens if tokens else 1.0)
    return apart if layer.distinct_rows is None else min(apart, layer.distinct_rows)


def few_rows(run: RunStats) -> list[LayerStats]:
    """The layers that are wider than the distinct rows which reached them are many.

    So many rows leave some space of such an input quiet by themselves, whatever the adapter does.
    """
    if run.has_no_down:  # there is no leakage that they could blur
        return []
    return [layer for layer in run.layers if layer.rows and distinct_rows(run, layer) < layer.in_features]


def short_texts(run: RunStats) -> Mapping[str, Sequence[LayerStats]]:
    """Those layers on each preserved text that has some, by its name; that of the first may be empty."""
    first = run.about.get(FIRST)
    name = first.get("name") if isinstance(first, dict) else None
    texts = {name if isinstance(name, str) else "": run, **run.on_further}
    return {name: few for name, of in texts.items() if (few := few_rows(of))}
