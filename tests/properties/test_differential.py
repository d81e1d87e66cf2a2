"""Our reader of safetensors headers and the library's own are one: what one reads the other reads alike."""

from collections import Counter

from tests.differential import cases

COUNT = 5000


def test_both_readers_read_alike_or_both_refuse() -> None:
    """Of thousands of changed files none is read in two ways, or by one alone but for what is stricter by choice."""
    counts: Counter[str] = Counter()
    for case in cases(COUNT, seed=7):
        assert case.verdict != "differ", (case.data, case.ours, case.theirs)
        counts[case.verdict] += 1
    assert counts["read"] > COUNT / 8
    assert counts["refused"] > COUNT / 8
