"""The file that a run is saved in: a superset of the reference script's JSON, with its very keys, written and read.

A figure that is not finite is saved as ``null`` and read back as NaN. A figure that was never measured has no key. What
is read is a stranger's: every value is held against what it may be, and what follows from others is worked out again.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pytest_nullspace.errors import StatsError, printable, quoted, twice
from pytest_nullspace.run.entries import (
    AGAIN,
    BY_WINDOW,
    EDITED,
    SINK_ROWS,
    entry_of,
    is_count,
    layer_of,
    number,
    plain,
    what_is_told,
)
from pytest_nullspace.run.predictions import Headroom, Passage
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats, TextDrift
from pytest_nullspace.run.texts import is_name
from pytest_nullspace.run.windows import OF_PREDICTIONS, ByWindow

_DRIFT, _HEADROOM = "drift", "headroom"
_VERDICT = "verdict"
_PASSAGES = "passages"
_ROUNDED = 1e-6
_FORMAT, _GATED, _AGAINST = "format", "gated_layers", "update_against"
WHOLE = "whole model"
"""The format whose updates are whole matrices."""
MOST_LOSS = 1e6
"""Nats a token of a base, far beyond what a vocabulary or logits in half precision give."""
_OF_TEXT = tuple(name for name in TextDrift.__slots__ if name not in (BY_WINDOW, _PASSAGES))
SCHEMA = "pytest-nullspace/run"
SCHEMA_VERSION = 2
WITHOUT_SCALE = 1
"""The version whose norm of A is without the scale."""
MAX_BYTES = 100_000_000
"""Of a file that is read: a hundred thousand layers, or half as many with a task text and an audit."""
MAX_VALUES = 4_000_000
"""Of a file that is read, by its commas and brackets; one of ours has one in 26 bytes, so never more in `MAX_BYTES`.

A value may take a hundred times the memory of its bytes, whatever key it stands under.
"""
MOST_WINDOWS = 1_000_000
"""Windows of layers that a file keeps, half of `MAX_BYTES`; of more, as many experts may have, it keeps none."""
MAX_KEYS = 100_000
"""Of one object in it."""


def to_json(run: RunStats, verdict: Mapping[str, Any] | None = None) -> str:
    """The run as the text of a statistics file; the same run gives the same text.

    Args:
        run: What was measured.
        verdict: What came of it, to stand first for who reads no report. It is derived, so it is never read back.
    """
    layers = run.layers if sum(map(_windows, run.layers)) <= MOST_WINDOWS else tuple(map(_unpaired, run.layers))
    document = {
        **({_VERDICT: verdict} if verdict is not None else {}),
        "model_path": run.model_path,
        "calib_dataset": run.calib_dataset,
        "num_layers": len(run.layers),
        "stats": [entry_of(layer) for layer in layers],
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "checkpoint_layers": run.checkpoint_layers,
        **({_DRIFT: _plain_drift(run.drift)} if run.drift is not None else {}),
        **run.about,
    }
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _windows(layer: LayerStats) -> int:
    """Of how many windows something was kept."""
    own = 0 if layer.by_window is None else len(layer.by_window.rows)
    return own if layer.task is None else own + _windows(layer.task)


def _unpaired(layer: LayerStats) -> LayerStats:
    """The layer without what its windows gave."""
    return replace(layer, by_window=None, task=None if layer.task is None else _unpaired(layer.task))


def from_json(text: str, where: str) -> RunStats:
    """Read a statistics file of ours, or of the reference script (whose files lack leakage).

    Args:
        text: The file's content.
        where: Its path, for messages.

    Raises:
        StatsError: It is no such file, misses what every such file has, or contradicts itself.
    """
    try:
        # What is no number, however it is written, is what ``null`` is in our own files.
        document = json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(pairs, where),
            parse_float=lambda digits: plain(float(digits)),
            parse_constant=lambda _: None,
        )
    except (ValueError, RecursionError) as error:
        raise StatsError(f"{where}: not JSON: {printable(error)}; {AGAIN}") from None
    if not isinstance(document, dict) or not isinstance(document.get("stats"), list):
        raise StatsError(f"{where}: not a statistics file: it has no list 'stats'; {AGAIN}")
    written = document.get("schema_version", SCHEMA_VERSION)
    if document.get("schema", SCHEMA) != SCHEMA or written not in (WITHOUT_SCALE, SCHEMA_VERSION):
        raise StatsError(
            f"{where}: of schema {printable(document.get('schema'))} {printable(document.get('schema_version'))}, not "
            f"{SCHEMA} {SCHEMA_VERSION}; {AGAIN} with this version"
        )
    layers = tuple(layer_of(entry, f"{where}: stats[{i}]") for i, entry in enumerate(document["stats"]))
    if document.get("num_layers", len(layers)) != len(layers):
        raise StatsError(
            f"{where}: says num_layers {printable(document['num_layers'])}, but holds {len(layers)}; {AGAIN}"
        )
    seen: set[str] = set()
    for i, layer in enumerate(layers):
        if layer.name in seen:
            raise StatsError(f"{where}: stats[{i}]: layer {printable(layer.name)} is there twice; {AGAIN}")
        seen.add(layer.name)
        if what_is_told(layer) != what_is_told(layers[0]):
            both = f"{printable(layer.name)} and {printable(layers[0].name)}"
            raise StatsError(
                f"{where}: stats[{i}]: {both}: only one has leakage, or a task text, or {SINK_ROWS}; {AGAIN}"
            )
    checkpoint_layers = document.get("checkpoint_layers", len(layers))
    if not is_count(checkpoint_layers) or checkpoint_layers < len(layers):
        raise StatsError(
            f"{where}: checkpoint_layers must be a number from {len(layers)}, not "
            f"{printable(repr(checkpoint_layers))}; {AGAIN}"
        )
    _check_told(document, layers, checkpoint_layers, where)
    return RunStats(
        model_path=str(document.get("model_path", "")),
        calib_dataset=str(document.get("calib_dataset", "")),
        layers=layers,
        checkpoint_layers=checkpoint_layers,
        about=_about(document),
        drift=_drift(document[_DRIFT], f"{where}: {_DRIFT}") if _DRIFT in document else None,
    )


def _check_told(document: Mapping[str, Any], layers: tuple[LayerStats, ...], most: int, where: str) -> None:
    """Refuse layers that are not those of what the file tells beside them, of a checkpoint of ``most``."""
    gated = document.get(_GATED, 0)
    if not is_count(gated) or gated > most:
        shown = printable(repr(gated))
        raise StatsError(f"{where}: {_GATED} must be a count of at most {most} layers, not {shown}; {EDITED}")
    whole = document.get(_FORMAT) == WHOLE
    for i, layer in enumerate(layers):
        at, name = f"{where}: stats[{i}]", printable(layer.name)
        for of in (layer, layer.task, *layer.further.values()):
            if of is None:
                continue
            if (of.effective_rank is not None) != whole:
                shown = printable(repr(document.get(_FORMAT)))
                of_what = "a whole matrix" if not whole else "none"
                raise StatsError(f"{at}: the update of {name} is {of_what}, but the format is {shown}; {EDITED}")
            if of.scale == 0 and of.update_norm > 0 and _AGAINST not in document:
                raise StatsError(f"{at}: the scale of {name} is 0, but its update {of.update_norm:.7g}; {EDITED}")


_NAMED = (
    "model_path",
    "calib_dataset",
    "num_layers",
    "stats",
    "schema",
    "schema_version",
    "checkpoint_layers",
    "drift",
    "verdict",
)
"""The keys of a file that have a field of their own in a run."""


def _about(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a file tells beside the fields of a run, and what its version left out."""
    about = {key: value for key, value in document.items() if key not in _NAMED}
    if document.get("schema_version") == WITHOUT_SCALE and document.get(_FORMAT) == "PEFT LoRA":
        about["A_weight_norm"] = "without scale"
    return about


def _plain_drift(drift: Drift) -> dict[str, Any]:
    texts = {"preserved": drift.preserved, "task": drift.task}
    told: dict[str, Any] = {"base": drift.base}
    told |= {name: _plain_text_drift(text) for name, text in texts.items() if text is not None}
    if drift.headroom is not None:
        told[_HEADROOM] = {name: plain(value) for name, value in asdict(drift.headroom).items()}
    if drift.name:
        told["name"] = drift.name
    if drift.further:
        told["texts"] = {name: _plain_text_drift(text) for name, text in drift.further.items()}
    return told


def _plain_text_drift(text: TextDrift) -> dict[str, Any]:
    told: dict[str, Any] = {name: plain(getattr(text, name)) for name in _OF_TEXT}
    if text.passages:
        told[_PASSAGES] = [{key: plain(value) for key, value in asdict(of).items()} for of in text.passages]
    return told if text.by_window is None else told | {BY_WINDOW: text.by_window.encoded()}


def _drift(told: object, where: str) -> Drift:
    if not isinstance(told, dict) or not isinstance(told.get("base"), str) or "preserved" not in told:
        raise StatsError(f"{where}: not what a run tells of its drift; {AGAIN}")
    name, further = told.get("name", ""), told.get("texts", {})
    names = [*([name] if name != "" else []), *(further if isinstance(further, dict) else [None])]
    if not all(map(is_name, names)) or len({*names}) < len(names):
        raise StatsError(f"{where}: 'name' and 'texts' do not hold names of texts, each once; {AGAIN}")
    return Drift(
        told["base"],
        _text_drift(told["preserved"], f"{where}: preserved"),
        _text_drift(told["task"], f"{where}: task") if "task" in told else None,
        name,
        {text: _text_drift(of, f"{where}: texts: {text}") for text, of in further.items()},
        _headroom(told[_HEADROOM], f"{where}: {_HEADROOM}") if _HEADROOM in told else None,
    )


def _headroom(told: object, where: str) -> Headroom:
    if not isinstance(told, dict) or not is_count(told.get("tokens")):
        raise StatsError(f"{where}: tokens must be a whole number from 0; {AGAIN}")
    margin = told.get("margin")
    gain, doubled = (number(told.get(name), f"{where}: {name}", signed=True) for name in ("gain", "doubled"))
    _require_tokens(told["tokens"], (gain, doubled), where)
    return Headroom(told["tokens"], gain, doubled, math.inf if margin is None else number(margin, f"{where}: margin"))


def _text_drift(told: object, where: str) -> TextDrift:
    if not isinstance(told, dict) or not is_count(told.get("tokens")):
        raise StatsError(f"{where}: tokens must be a whole number from 0; {AGAIN}")
    values: dict[str, Any] = {"tokens": told["tokens"]}
    for name in _OF_TEXT[1:]:
        # A margin that is infinite, and a loss that is no number, are null in the file.
        absent = math.inf if name.endswith("margin") else math.nan
        value = told.get(name)
        values[name] = absent if value is None and name in told else number(value, f"{where}: {name}")
    if _PASSAGES in told:
        values[_PASSAGES] = _passages(told[_PASSAGES], f"{where}: {_PASSAGES}")
    drift = TextDrift(**values)
    _require_tokens(drift.tokens, (drift.base_loss, drift.adapted_loss, drift.divergence), where)
    if drift.base_loss > MOST_LOSS:
        raise StatsError(f"{where}: base_loss is {drift.base_loss:.7g}, which no model's is; {EDITED}")
    if BY_WINDOW not in told:
        return drift
    kept = ByWindow.decoded(OF_PREDICTIONS, told[BY_WINDOW], drift, f"{where}: {BY_WINDOW}")
    return replace(drift, by_window=kept)


def _require_tokens(tokens: int, values: tuple[float, ...], where: str) -> None:
    """Refuse numbers that are the mean of nothing."""
    if not tokens and any(map(math.isfinite, values)):
        raise StatsError(f"{where}: tokens is 0, but it tells what they gave; {EDITED}")


MOST_PASSAGES, MOST_TEXT = 100, 1000
"""Of a text, and characters of what one of them quotes, in a file that is read."""


def _passages(told: object, where: str) -> tuple[Passage, ...]:
    """The passages of one text; what they quote is a stranger's, and shown as such."""
    if not isinstance(told, list) or len(told) > MOST_PASSAGES or not all(isinstance(of, dict) for of in told):
        raise StatsError(f"{where} must be a list of {MOST_PASSAGES} objects at most; {AGAIN}")
    found = []
    for place, of in enumerate(told):
        at = f"{where}[{place}]"
        quoted_there = [of.get(name) for name in ("before", "token", "likeliest", "instead")]
        quoted_there += [of.get("after", ""), of.get("row", "")]
        if not all(isinstance(text, str) and len(text) <= MOST_TEXT for text in quoted_there):
            raise StatsError(f"{at}: must quote text of {MOST_TEXT} characters at most; {AGAIN}")
        start, end = of.get("start"), of.get("end")
        if not is_count(start) or not (end is None or (is_count(end) and end >= start)):
            raise StatsError(f"{at}: start and end must be characters of the text, in this order; {AGAIN}")
        base, adapted, divergence = (number(of.get(n), f"{at}: {n}") for n in ("base", "adapted", "divergence"))
        if max(base, adapted) > 1 + _ROUNDED:
            raise StatsError(f"{at}: a probability is above 1; {AGAIN}")
        before, token, likeliest, instead, after, row = quoted_there
        found.append(Passage(start, end, before, token, after, base, adapted, likeliest, instead, divergence, row))
    return tuple(found)


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """The object of ``pairs``, of which no two have one key: other readers would take the other value."""
    if (key := twice(pairs)) is not None:
        raise StatsError(f"{where}: names {quoted(key)} twice; {AGAIN}")
    if len(pairs) > MAX_KEYS:
        raise StatsError(
            f"{where}: has an object of more than {MAX_KEYS:,} keys, which no statistics file has; {AGAIN}"
        )
    return dict(pairs)


def read(file: Path) -> RunStats:
    """Read a statistics file, of ours or of the reference script.

    Raises:
        StatsError: It cannot be read, or `from_json` refuses what it holds.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise StatsError(f"{file}: has more than {MAX_BYTES:,} bytes, which no statistics file has; {AGAIN}")
        if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise StatsError(f"{file}: has more than {MAX_VALUES:,} values, which no statistics file has; {AGAIN}")
        return from_json(data.decode("utf-8"), str(file))
    except OSError as error:
        raise StatsError(
            f"{file}: the statistics file cannot be read: {error.strerror}; give a file that can be read"
        ) from None
    except UnicodeDecodeError as error:
        raise StatsError(f"{file}: not JSON: not UTF-8 text (byte {error.start}); {AGAIN}") from None


def write(run: RunStats, file: Path, verdict: Mapping[str, Any] | None = None) -> None:
    """Save the run, and what came of it, so that ``file`` holds either its old content or all of the new.

    Raises:
        StatsError: It cannot be written; the old file is untouched.
    """
    write_atomically(file, to_json(run, verdict))


def write_atomically(file: Path, text: str, mode: int | None = None) -> None:
    """Replace ``file`` by one that holds ``text``, line ends and all, at once or not at all.

    Args:
        file: What is replaced.
        text: What it then holds.
        mode: What it then permits; None for all to read it.

    Raises:
        StatsError: It cannot be written; the old file is untouched.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The only text that is not UTF-8 is a path's; escaped so, it is what JSON means by it.
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            errors="backslashreplace",
            newline="",
            dir=file.parent,
            prefix=f".{file.name}.",
            delete=False,
        ) as new:
            place = Path(new.name)
            try:
                new.write(text)
                new.flush()
                os.fsync(new.fileno())
                place.chmod(0o644 if mode is None else mode)
                new.close()  # Windows moves and removes no file that is open
                place.replace(file)
            except BaseException:
                new.close()
                place.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StatsError(f"{file}: cannot be written: {error.strerror}; mend that or give another place") from None
