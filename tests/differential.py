"""Two readers of one format: ours of safetensors headers against the library's, on headers changed at random.

``python -m tests.differential --count 1000000 --seed 1`` (``tox -e fuzz``) prints how many files both read alike, how
many both refuse, and every kind on which they differ; it fails if there is any. A smaller run is a test.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import safetensors

from pytest_nullspace.checkpoint.header import read_header
from pytest_nullspace.errors import CheckpointError
from tests.fuzz import VALUES, places

STRICTER = ("twice", "characters; at most")
"""What is refused here and not there, on purpose: a tensor named twice, of which the library takes the last, and a name
of more than 500 characters."""
_DATA = b"".join(number.to_bytes(2, "little") for number in range(1, 4000))
"""Every stretch of it differs, so what a reader takes for a tensor tells its offsets."""
_TYPES = (
    *("F32", "BF16", "F16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"),
    *("C64", "I8", "I16", "U16", "I32", "U32", "U64", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "f32", "F128", ""),
)
_WORDS = (
    *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F32"', "{", "}", "[", "]", ",", ":", "0", "-0"),
    *("1e2", "24", "2.0", "01", "1e999", "NaN", "Infinity", "null", "true", '"a"', '"\\ud800"', '"\\ud83d\\ude00"'),
    *('"\\u0000"', " ", "\t", "\n", "\0", "\ufeff", "18446744073709551615", "18446744073709551616", '"é"'),
    *("9223372036854775808", "[" * 130 + "]" * 130, "[" * 124 + "]" * 124, "1" * 400),
)

Read = list[tuple[str, str, tuple[int, ...], bytes]] | str
"""The tensors with their bytes, or why there are none."""


class Case(NamedTuple):
    """One changed file, and what each reader makes of it."""

    data: bytes
    ours: Read
    theirs: Read

    @property
    def verdict(self) -> str:
        """``read`` or ``refused`` by both, ``stricter`` by us on purpose, or ``differ``."""
        if isinstance(self.ours, str) and isinstance(self.theirs, str):
            return "refused"
        if self.ours == self.theirs:
            return "read"
        if isinstance(self.ours, str) and any(word in self.ours for word in STRICTER):
            return "stricter"
        return "differ"


def sound(choose: random.Random) -> dict[str, Any]:
    """A header of a few tensors whose data have no holes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if choose.random() < 0.5 else {}
    at = 0
    for name in choose.sample(("a", "b.weight", "é", "", "x" * 501, "c\n"), choose.randint(0, 3)):
        bits, dtype = choose.choice(((32, "F32"), (16, "BF16"), (8, "U8"), (4, "F4"), (6, "F6_E2M3"), (64, "C64")))
        shape = [choose.choice((0, 1, 2, 3, 4)) for _ in range(choose.randint(0, 3))]
        size = 1
        for width in shape:
            size *= width
        end = at + size * bits // 8
        header[name], at = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}, end
    return header


def changed(header: dict[str, Any], choose: random.Random) -> str:
    """It with a few places changed, as JSON or as text."""
    for _ in range(choose.choice((0, 0, 1, 1, 2))):
        held = places(header)
        if not held:
            break
        (owner, key), (other, at) = choose.choice(held), choose.choice(held)
        match choose.randrange(7):
            case 0:
                del owner[key]
            case 1:
                owner[key] = json.loads(json.dumps(other[at]))
            case 2:
                owner[key] = choose.choice(VALUES)
            case 3:
                owner[key] = choose.choice(_TYPES)
            case 4 if isinstance(owner, dict):
                owner[choose.choice(("extra", "dtype", "shape", "__metadata__"))] = choose.choice(VALUES)
            case 5 if isinstance(owner[key], int) and not isinstance(owner[key], bool):
                owner[key] += choose.choice((-1, 1, 8, 2**63, 2**64))
            case _:
                owner[key] = choose.choice((0, 1, 2, 4, 24))
    text = json.dumps(header, ensure_ascii=choose.random() < 0.5)
    for _ in range(choose.choice((0, 0, 0, 0, 1, 2))):
        first, last = sorted(choose.randrange(len(text) + 1) for _ in range(2))
        match choose.randrange(4):
            case 0:
                text = text[:first] + choose.choice(_WORDS) + text[first:]
            case 1:
                text = text[:first] + text[min(last, first + 3) :]
            case 2:
                text = text[:last] + text[first : min(last, first + 60)] + text[last:]
            case _:
                text = text.replace(choose.choice(_WORDS), choose.choice(_WORDS), 1)
    return text


def files(count: int, seed: int) -> Iterator[bytes]:
    """So many files, the same for the same seed."""
    choose = random.Random(seed)
    for _ in range(count):
        header = sound(choose)
        size = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        text = changed(header, choose).encode("utf-8", "surrogatepass")
        length = len(text) + (choose.choice((1, -1, 2**62)) if choose.random() < 0.05 else 0)
        size += choose.choice((1, -1)) if choose.random() < 0.05 else 0
        yield (max(length, 0) % 2**64).to_bytes(8, "little") + text + _DATA[: max(size, 0)]


def ours(data: bytes, file: Path) -> Read:
    """What we read."""
    file.write_bytes(data)
    try:
        found = read_header(file)
    except CheckpointError as error:
        return str(error)
    at = 8 + int.from_bytes(data[:8], "little")
    tensors = [(of.name, of.dtype, of.shape, data[at + of.begin : at + of.begin + of.nbytes]) for of in found.values()]
    return sorted(tensors)


def theirs(data: bytes) -> Read:
    """What the library reads."""
    try:
        found = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        return str(error)
    return sorted((name, of["dtype"], tuple(of["shape"]), bytes(of["data"])) for name, of in found)


def cases(count: int, seed: int) -> Iterator[Case]:
    """So many changed files with what each reader makes of them."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "m.safetensors"
        for data in files(count, seed):
            yield Case(data, ours(data, file), theirs(data))


def main() -> None:
    """Hold both against each other, print the counts and what differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    shown = 0
    for case in cases(options.count, options.seed):
        counts[case.verdict] += 1
        if case.verdict == "differ" and shown < 20:
            shown += 1
            print(
                case.data[:300], f"ours: {case.ours!r:.200}", f"theirs: {case.theirs!r:.200}", "", sep="\n", flush=True
            )
    told = ", ".join(f"{counts[of]:,} {of}" for of in ("read", "refused", "stricter", "differ"))
    print(f"safetensors {safetensors.__version__}, seed {options.seed}: {told}")
    if counts["differ"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
