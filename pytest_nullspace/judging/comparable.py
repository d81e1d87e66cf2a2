"""Whether two runs compare: in what they must be alike, and what is told where that is not known. Pure."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_nullspace.errors import printable
from pytest_nullspace.run.stats import LayerStats, RunStats
from pytest_nullspace.run.texts import FIRST, name_of, preserved

BASE_TOLERANCE = 1e-3
"""How far ``‖W_res‖`` may differ between runs of one base, in whatever precision they were measured."""
LOSS_TOLERANCE = 0.01
"""Nats a token by which one base may read the same windows otherwise: half precision takes less than that."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Why two runs do not compare.

    Attributes:
        what: A name in `COMPARED`, or ``unrecorded``.
        how: What it is now, and what it was.
    """

    what: str
    how: str

    def __str__(self) -> str:
        """The difference in a phrase."""
        return f"{self.what} ({self.how})"


def _layers(of: Callable[[LayerStats], Any]) -> Callable[[RunStats, Collection[str]], Any]:
    def read(run: RunStats, common: Collection[str]) -> Any:
        values = {layer.name: of(layer) for layer in run.layers if layer.name in common}
        return values if any(values.values()) else None

    return read


def about(section: str, key: str) -> Callable[[RunStats, Collection[str]], Any]:
    """What reads an entry of what a run tells; None where it does not tell it."""

    def read(run: RunStats, _: Collection[str]) -> Any:
        recorded = run.about.get(section)
        value = recorded.get(key) if isinstance(recorded, Mapping) else None
        return value if value is None or isinstance(value, str | int | float) else str(value)

    return read


def _written_by(run: RunStats) -> Iterator[str]:
    """By which template each text of conversations was written, and whether the assistant's tokens alone counted."""
    for key in (*preserved(run.about), "task_text"):
        entry = run.about.get(key)
        told = entry.get("chat") if isinstance(entry, Mapping) else None
        if isinstance(told, Mapping):
            only = " of the assistant alone" if told.get("assistant_only") else ""
            yield f"{name_of(key) or key} by template {str(told.get('template_sha256'))[:12]}{only}"


def _base_files(run: RunStats, _: Collection[str]) -> Any:
    """The bytes of the base: of its files, or of what a checkpoint that carries it holds beside its layers."""
    told = run.about.get("base_model")
    if not isinstance(told, Mapping):
        return None
    files = told.get("files")
    digests = sorted(map(str, files.values())) if isinstance(files, Mapping) else [told.get("beside_sha256")]
    return None if digests == [None] else [str(digest)[:12] for digest in digests]


def _processor(run: RunStats, _: Collection[str]) -> Any:
    told = run.about.get("processor")
    files = told.get("files") if isinstance(told, Mapping) else None
    return [f"{name} {str(of)[:12]}" for name, of in sorted(files.items())] if isinstance(files, Mapping) else None


def _class(run: RunStats, _: Collection[str]) -> Any:
    told = run.about.get("model_class")
    return told if isinstance(told, str) else None


def _base_losses(run: RunStats, _: Collection[str]) -> Any:
    """How well the base alone reads each text, by its windows."""
    drift = run.drift
    if drift is None:
        return None
    found = {}
    for key in preserved(run.about):
        name = drift.name if key == FIRST else name_of(key)
        windows = about(key, "windows_sha256")(run, ())
        if isinstance(windows, str) and name in drift.texts:
            found[f"on the windows {printable(windows[:12])}"] = drift.texts[name].base_loss
    return found or None


def _tokens(run: RunStats, _: Collection[str]) -> Any:
    """What was read of each text, by its windows."""
    read = {key: about(key, "windows_sha256")(run, ()) for key in (*preserved(run.about), "task_text")}
    return {key.replace("_", " "): of for key, of in read.items() if isinstance(of, str)} or None


_LIBRARIES = ("pytest-nullspace", "torch", "transformers")
"""What every run tells the version of, and the figures come from."""


def _versions(run: RunStats) -> Mapping[str, str]:
    told = run.about.get("libraries")
    return {name: of for name, of in told.items() if isinstance(of, str)} if isinstance(told, Mapping) else {}


def _libraries(run: RunStats, _: Collection[str]) -> Any:
    told = _versions(run)
    return {name: _Version(told[name]) for name in _LIBRARIES if name in told} or None


class _Version(str):
    """The version of a library; two are alike where it promises to be compatible."""

    __slots__ = ()

    @property
    def line(self) -> str:
        """The number that changes when that promise ends: the first that is not 0."""
        found = re.match(r"(0\.)*\d+", self)
        return found[0] if found is not None else str(self)


COMPARED: Mapping[str, Callable[[RunStats, Collection[str]], Any]] = {
    "text": about("text", "sha256"),
    "texts": lambda run, _: [
        f"{name_of(key)} {str(of.get('sha256'))[:12]}" for key, of in preserved(run.about).items() if key != FIRST
    ],
    "windows": about("text", "windows"),
    "seqlen": about("text", "seqlen"),
    "seed": about("settings", "seed"),
    "rows": _layers(lambda layer: layer.rows),
    "rank": _layers(lambda layer: layer.rank),
    "widths": _layers(lambda layer: (layer.in_features, layer.out_features) if layer.in_features else ()),
    "base": _layers(lambda layer: layer.base_weight_norm),
    "base-files": _base_files,
    "config": about("base_model", "config_sha256"),
    "quantisation": about("base_model", "quantisation"),
    "base-loss": _base_losses,
    "tokenizer": about("tokenizer", "sha256"),
    "processor": _processor,
    "class": _class,
    "libraries": _libraries,
    "task": about("task_text", "sha256"),
    "chat": lambda run, _: [*_written_by(run)],
    "tokens": _tokens,
    "update": lambda run, _: "since start" if run.about.get("update_against") else "as a whole",
    "figures": lambda run, _: list(run.measured),
}
"""What two runs must have in common, and where a run records it."""
OPTIONAL = frozenset(
    ("base-files", "config", "quantisation", "base-loss", "tokenizer", "processor", "class", "libraries", "tokens")
)
"""What runs of earlier versions do not tell: where only one does, that is a doubt and no refusal."""
OF_ONE_BASE = frozenset(("base", "base-files", "base-loss", "config", "figures"))
"""What need not be alike of a run and of its start, which may hold a part of the base, and was saved anew since."""
_CUTS = frozenset(("text", "texts", "windows", "seqlen", "seed", "tokenizer", "processor", "task", "chat"))
"""What makes tokens others, so that these are a difference of their own only where none of it is known to differ."""
_OF_LAYERS = ("rows", "rank", "widths", "base")

UNRECORDED = "unrecorded"


def incomparable(
    run: RunStats, earlier: RunStats, conditions: Collection[str] = tuple(COMPARED)
) -> tuple[Difference, ...]:
    """All in which two runs differ so that their figures do not compare; layers that only one holds are left out.

    What only one of the two records, as the reference script records little, is one difference: ``unrecorded``.

    Args:
        run: This run.
        earlier: The other.
        conditions: The names in `COMPARED` that are looked at.
    """
    common = {layer.name for layer in run.layers} & {layer.name for layer in earlier.layers}
    found: list[Difference] = []
    unrecorded = []
    for what, read in COMPARED.items():
        if what not in conditions:
            continue
        now, before = read(run, common), read(earlier, common)
        if what == "tokens" and any(difference.what in _CUTS for difference in found):
            continue
        if (now is None) != (before is None):
            if what not in OPTIONAL:
                unrecorded.append(what)
        elif isinstance(now, dict):
            tolerance = LOSS_TOLERANCE if what == "base-loss" else None
            differing = [name for name in now if name in before and not _alike(now[name], before[name], tolerance)]
            if differing:
                name = differing[0]
                layers = " layers" if what in _OF_LAYERS else ""
                more = f" and {len(differing) - 1} more{layers}" if len(differing) > 1 else ""
                found.append(Difference(what, f"{name}: {_shown(now[name])}, was {_shown(before[name])}{more}"))
        elif now != before:
            found.append(Difference(what, f"{_shown(now)}, was {_shown(before)}"))
    if unrecorded:
        found.append(Difference(UNRECORDED, f"only one of the runs tells its {', '.join(unrecorded)}"))
    return tuple(found)


def doubts(run: RunStats, earlier: RunStats) -> Iterator[str]:
    """In what two runs that compare differ all the same, or may: what was allowed, is not known, or moves little."""
    allowed = incomparable(run, earlier)
    if allowed:
        yield f"not alike, which was allowed: {'; '.join(map(str, allowed))}"
    common = {layer.name for layer in run.layers} & {layer.name for layer in earlier.layers}
    told = {what: [COMPARED[what](of, common) is not None for of in (run, earlier)] for what in sorted(OPTIONAL)}
    for place, which in ((1, "the earlier run"), (0, "this run")):
        lacking = [what for what, both in told.items() if not both[place] and both[1 - place]]
        if lacking:
            yield f"not known to be alike, for {which} does not tell it: {', '.join(lacking)}"
    moved = [*_moved(run, earlier)]
    if moved:
        yield f"measured by {'; '.join(moved)}"


def _moved(run: RunStats, earlier: RunStats) -> Iterator[str]:
    """By what other version, or in what other numbers, a run was measured than an earlier one."""
    now, before = _versions(run), _versions(earlier)
    for name in now:
        if name != "python" and name in before and now[name] != before[name]:
            yield f"{printable(name)} {printable(now[name], 40)}, was {printable(before[name], 40)}"
    for what in ("dtype", "device"):
        one, other = run.about.get(what), earlier.about.get(what)
        if isinstance(one, str) and isinstance(other, str) and one != other:
            yield f"{what} {printable(one, 40)}, was {printable(other, 40)}"


def _alike(now: Any, before: Any, tolerance: float | None = None) -> bool:
    if isinstance(now, float) and isinstance(before, float):  # NaN fails its layer by itself
        if math.isnan(now) or math.isnan(before):
            return True
        relative = BASE_TOLERANCE if tolerance is None else 0.0
        return math.isclose(now, before, rel_tol=relative, abs_tol=tolerance or 0.0)
    if isinstance(now, _Version) and isinstance(before, _Version):
        return now.line == before.line
    return bool(now == before)


_DIGEST = re.compile("[0-9a-f]{64}")


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return "×".join(map(str, value)) if isinstance(value, tuple) else printable(", ".join(map(str, value)), 400)
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text[:12] if _DIGEST.fullmatch(text) else printable(text, 60)
