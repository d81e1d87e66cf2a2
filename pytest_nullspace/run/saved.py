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

from pytest_nullspace.errors import StatsError, printable, quoted
from pytest_nullspace.run.figures import FIGURES, Text, of_layers, of_one_text
from pytest_nullspace.run.stats import (
    Drift,
    LayerStats,
    RunStats,
    Spectrum,
    TextDrift,
    WithoutSinks,
)

SCHEMA = "pytest-nullspace/run"
SCHEMA_VERSION = 2
WITHOUT_SCALE = 1
"""The version whose norm of A is without the scale."""
MAX_BYTES = 100_000_000
"""Of a file that is read: a hundred thousand layers."""

_AGAIN = "measure again"

_NOT_MEASURED = "not measured"
"""What a file holds for a norm that a quantised weight does not give; ``null`` is what is not finite."""
_MEASURED = tuple(name for name in LayerStats.__slots__ if name not in ("margins", "task", "spectrum", "without_sinks"))
_NORMS = WithoutSinks.__slots__[1:]

# Our field -> the key in the file; the figures' are in their records. Many are the reference's own.
_KEYS = {
    "name": "layer_name",
    "rows": "num_samples",
    "input_norm": "X_norm",
    "down_norm": "BX_norm",
    "update_norm": "ABX_norm",
    "base_norm": "ResidualX_norm",
    "output_norm": "FullOutput_norm",
    "down_weight_norm": "B_weight_norm",
    "up_weight_norm": "A_weight_norm",
    "base_weight_norm": "Residual_weight_norm",
    "in_features": "in_features",
    "rank": "rank",
    "down_rank": "B_rank",
    "scale": "scale",
    "distinct_rows": "distinct_rows",
    "out_features": "out_features",
    "mean_leakage": "leakage",
    "chance": "leakage_chance",
}
_DERIVED_TOLERANCE = 1e-6


def _keys() -> dict[str, str]:
    """Of every field and every figure of a layer, its key in the file."""
    return _KEYS | {name: FIGURES[name].key for name in of_layers()}


def _derived() -> dict[str, str]:
    """What the file holds for its readers' sake: the field or figure, and from what it follows."""
    return {"chance": "B_rank (or rank) / in_features"} | {name: FIGURES[name].follows for name in of_layers()}


def _ratios() -> list[str]:
    """The figures that are told without sink rows as well."""
    return [name for name in of_one_text() if FIGURES[name].sink_free]


def to_json(run: RunStats) -> str:
    """The run as the text of a statistics file; the same run gives the same text."""
    document = {
        "model_path": run.model_path,
        "calib_dataset": run.calib_dataset,
        "num_layers": len(run.layers),
        "stats": [_entry(layer) for layer in run.layers],
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "checkpoint_layers": run.checkpoint_layers,
        **({_DRIFT: _plain_drift(run.drift)} if run.drift is not None else {}),
        **run.about,
    }
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _entry(layer: LayerStats) -> dict[str, Any]:
    absent = {"mean_leakage", "leakage"} if layer.mean_leakage is None else set()
    absent |= {name for name in _UNTOLD if getattr(layer, name) is None}
    if layer.task is None:
        absent |= {name for name in of_layers() if FIGURES[name].text is Text.BOTH}
    entry: dict[str, Any] = {key: _plain(_value(layer, name)) for name, key in _keys().items() if name not in absent}
    if layer.base_weight_norm is None:
        entry[_KEYS["base_weight_norm"]] = _NOT_MEASURED
    if layer.without_sinks is not None:
        entry[_SINK_ROWS] = layer.sinks
    if layer.sinks:
        entry[_WITHOUT_SINKS] = {
            _keys()[name]: _plain(_value(layer.without_sinks, name)) for name in (*_NORMS, *_ratios())
        }
    if layer.margins:
        entry[_MARGINS] = {figure: _plain(layer.margins[figure]) for figure in of_layers() if figure in layer.margins}
    if layer.task is not None:
        entry[_TASK] = _entry(layer.task)
    if layer.spectrum is not None:
        entry[_SPECTRUM] = {key: _plain(value) for key, value in asdict(layer.spectrum).items()}
    return entry


def _value(of: Any, name: str) -> Any:
    """A field of what was measured on one text, or a figure of it."""
    if name not in FIGURES:
        return getattr(of, name)
    figure = FIGURES[name]
    return figure.value(of, of.task) if figure.text is Text.BOTH else figure.value(of)


def _plain(value: str | int | float) -> str | int | float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
            parse_float=lambda digits: _plain(float(digits)),
            parse_constant=lambda _: None,
        )
    except (ValueError, RecursionError) as error:
        raise StatsError(f"{where}: not JSON: {printable(error)}; {_AGAIN}") from None
    if not isinstance(document, dict) or not isinstance(document.get("stats"), list):
        raise StatsError(f"{where}: not a statistics file: it has no list 'stats'; {_AGAIN}")
    written = document.get("schema_version", SCHEMA_VERSION)
    if document.get("schema", SCHEMA) != SCHEMA or written not in (WITHOUT_SCALE, SCHEMA_VERSION):
        raise StatsError(
            f"{where}: of schema {printable(document.get('schema'))} {printable(document.get('schema_version'))}, not "
            f"{SCHEMA} {SCHEMA_VERSION}; {_AGAIN} with this version"
        )
    layers = tuple(_layer(entry, f"{where}: stats[{i}]") for i, entry in enumerate(document["stats"]))
    if document.get("num_layers", len(layers)) != len(layers):
        raise StatsError(
            f"{where}: says num_layers {printable(document['num_layers'])}, but holds {len(layers)}; {_AGAIN}"
        )
    seen: set[str] = set()
    for i, layer in enumerate(layers):
        if layer.name in seen:
            raise StatsError(f"{where}: stats[{i}]: layer {printable(layer.name)} is there twice; {_AGAIN}")
        seen.add(layer.name)
        if _what(layer) != _what(layers[0]):
            both = f"{printable(layer.name)} and {printable(layers[0].name)}"
            raise StatsError(
                f"{where}: stats[{i}]: {both}: only one has leakage, or a task text, or {_SINK_ROWS}; {_AGAIN}"
            )
    checkpoint_layers = document.get("checkpoint_layers", len(layers))
    if not _is_count(checkpoint_layers) or checkpoint_layers < len(layers):
        raise StatsError(
            f"{where}: checkpoint_layers must be a number from {len(layers)}, not "
            f"{printable(repr(checkpoint_layers))}; {_AGAIN}"
        )
    return RunStats(
        model_path=str(document.get("model_path", "")),
        calib_dataset=str(document.get("calib_dataset", "")),
        layers=layers,
        checkpoint_layers=checkpoint_layers,
        about=_about(document),
        drift=_drift(document[_DRIFT], f"{where}: {_DRIFT}") if _DRIFT in document else None,
    )


_NAMED = (
    "model_path",
    "calib_dataset",
    "num_layers",
    "stats",
    "schema",
    "schema_version",
    "checkpoint_layers",
    "drift",
)
"""The keys of a file that have a field of their own in a run."""


def _about(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a file tells beside the fields of a run, and what its version left out."""
    about = {key: value for key, value in document.items() if key not in _NAMED}
    if document.get("schema_version") == WITHOUT_SCALE and document.get("format") == "PEFT LoRA":
        about["A_weight_norm"] = "without scale"
    return about


def _what(layer: LayerStats) -> tuple[object, ...]:
    """What was measured of ``layer``, which is the same of every layer of a run."""
    return layer.absent, layer.without_sinks is None, layer.task is None or layer.task.without_sinks is None


def _plain_drift(drift: Drift) -> dict[str, Any]:
    texts = {"preserved": drift.preserved, "task": drift.task}
    return {"base": drift.base} | {
        name: {key: _plain(value) for key, value in asdict(text).items()}
        for name, text in texts.items()
        if text is not None
    }


def _drift(told: object, where: str) -> Drift:
    if not isinstance(told, dict) or not isinstance(told.get("base"), str) or "preserved" not in told:
        raise StatsError(f"{where}: not what a run tells of its drift; {_AGAIN}")
    return Drift(
        told["base"],
        _text_drift(told["preserved"], f"{where}: preserved"),
        _text_drift(told["task"], f"{where}: task") if "task" in told else None,
    )


def _text_drift(told: object, where: str) -> TextDrift:
    if not isinstance(told, dict) or not _is_count(told.get("tokens")):
        raise StatsError(f"{where}: tokens must be a whole number from 0; {_AGAIN}")
    values: dict[str, Any] = {"tokens": told["tokens"]}
    for name in TextDrift.__slots__[1:]:
        # A margin that is infinite, and a loss that is no number, are null in the file.
        absent = math.inf if name.endswith("margin") else math.nan
        value = told.get(name)
        values[name] = absent if value is None and name in told else _number(value, f"{where}: {name}")
    return TextDrift(**values)


_MARGINS, _TASK, _DRIFT, _SPECTRUM = "margin_95", "task", "drift", "spectrum"
_SINK_ROWS, _WITHOUT_SINKS = "sink_rows", "without_sinks"


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """The object of ``pairs``, of which no two have one key: other readers would take the other value."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise StatsError(f"{where}: names {quoted(twice)} twice; {_AGAIN}")
    return entries


_UNTOLD = ("down_rank", "distinct_rows", "scale")
"""What older files do not tell."""
_ABSENT_IN_REFERENCE: Mapping[str, int] = {"in_features": 0, "rank": 0, "out_features": 0}


def _layer(entry: object, where: str) -> LayerStats:
    if not isinstance(entry, dict) or not isinstance(entry.get("layer_name"), str):
        raise StatsError(f"{where}: not a layer: it has no 'layer_name'; {_AGAIN}")
    values: dict[str, Any] = {"margins": _margins(entry.get(_MARGINS), where)}
    if _TASK in entry:
        values["task"] = task = _layer(entry[_TASK], f"{where}: task")
        if task.name != entry["layer_name"] or task.task is not None:
            raise StatsError(f"{where}: its entry 'task' is not of the same layer; {_AGAIN}")
    if _SPECTRUM in entry:
        told = entry[_SPECTRUM] if isinstance(entry[_SPECTRUM], dict) else {}
        numbers = {name: _number(told.get(name), f"{where}: {_SPECTRUM}: {name}") for name in Spectrum.__slots__}
        values["spectrum"] = Spectrum(**numbers)
    for name in _MEASURED:
        if name in _UNTOLD and _KEYS[name] not in entry:
            continue
        value = entry.get(_KEYS[name], _ABSENT_IN_REFERENCE.get(name))
        if name in _COUNTS:
            if not _is_count(value):
                raise StatsError(
                    f"{where}: {_KEYS[name]} must be a whole number from 0, not {printable(repr(value))}; {_AGAIN}"
                )
        elif name == "base_weight_norm" and value == _NOT_MEASURED:
            value = None
        elif name != "name" and (name != "mean_leakage" or _KEYS[name] in entry):
            known = math.nan if value is None and _KEYS[name] in entry else value
            value = _number(known, f"{where}: {_KEYS[name]}", signed=name == "scale")
        values[name] = value
    layer = LayerStats(**values)
    if layer.down_rank is not None and layer.down_rank > layer.rank:
        raise StatsError(
            f"{where}: B_rank is {layer.down_rank}, but no matrix of rank {layer.rank} spans more; the file was edited "
            "or damaged, so measure again"
        )
    if layer.distinct_rows is not None and layer.distinct_rows > min(layer.rows, layer.in_features):
        raise StatsError(
            f"{where}: distinct_rows is {layer.distinct_rows}, but of {layer.rows} rows, {layer.in_features} wide, "
            "no more than either are counted; the file was edited or damaged, so measure again"
        )
    _check_derived(entry, layer, where)
    return layer if _SINK_ROWS not in entry else replace(layer, without_sinks=_without_sinks(entry, layer, where))


def _without_sinks(entry: Mapping[str, Any], layer: LayerStats, where: str) -> WithoutSinks:
    sinks, told = entry[_SINK_ROWS], entry.get(_WITHOUT_SINKS)
    if not _is_count(sinks) or 2 * sinks > layer.rows:
        shown = printable(repr(sinks))
        raise StatsError(f"{where}: {_SINK_ROWS} must be a count of at most half of the rows, not {shown}; {_AGAIN}")
    if not sinks:
        return WithoutSinks(layer.rows, *layer.norms)
    where = f"{where}: {_WITHOUT_SINKS}"
    if not isinstance(told, dict):
        raise StatsError(f"{where} must hold what the norms are without the {sinks} sink rows; {_AGAIN}")
    values = {name: told.get(_KEYS[name], "missing") for name in _NORMS}
    norms = {name: _number(math.nan if v is None else v, f"{where}: {_KEYS[name]}") for name, v in values.items()}
    quiet = WithoutSinks(layer.rows - sinks, **norms)
    _check_derived(told, quiet, where)
    return quiet


def _margins(told: object, where: str) -> dict[str, float]:
    if told is None:
        return {}
    if not isinstance(told, dict) or not told.keys() <= set(of_one_text()):
        raise StatsError(f"{where}: {_MARGINS} must hold a number for each of {', '.join(of_one_text())}")
    return {
        figure: math.inf if value is None else _number(value, f"{where}: {_MARGINS}: {figure}")
        for figure, value in told.items()
    }


def _check_derived(entry: Mapping[str, Any], of: LayerStats | WithoutSinks, where: str) -> None:
    """Refuse a file whose ratios are not those of its norms: one of the two was edited, and only one is judged."""
    keys, ratios = _keys(), _ratios()
    for name, formula in _derived().items():
        key = keys[name]
        if key not in entry or (isinstance(of, WithoutSinks) and name not in ratios):
            continue
        follows = _value(of, name)
        stated = math.nan if entry[key] is None else _number(entry[key], f"{where}: {key}")
        if math.isfinite(stated) != math.isfinite(follows) or (
            math.isfinite(stated) and not math.isclose(stated, follows, rel_tol=_DERIVED_TOLERANCE, abs_tol=1e-12)
        ):
            raise StatsError(
                f"{where}: {key} is {_shown(stated)}, but {formula} is {_shown(follows)}; "
                "the file was edited or damaged, so measure again"
            )


def _shown(value: float) -> str:
    return f"{value:.7g}" if math.isfinite(value) else "no number"


_COUNTS = ("rows", "in_features", "rank", "down_rank", "distinct_rows", "out_features")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _number(value: object, where: str, signed: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StatsError(f"{where} must be a number, not {printable(repr(value))}; {_AGAIN}")
    try:
        number = float(value)
    except OverflowError:
        raise StatsError(f"{where} must be a number that a float can hold; {_AGAIN}") from None
    if number < 0 and not signed:
        raise StatsError(f"{where} must not be negative, but is {number:g}; {_AGAIN}")
    return number


def read(file: Path) -> RunStats:
    """Read a statistics file, of ours or of the reference script.

    Raises:
        StatsError: It cannot be read, or `from_json` refuses what it holds.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise StatsError(f"{file}: has more than {MAX_BYTES:,} bytes, which no statistics file has; {_AGAIN}")
        return from_json(data.decode("utf-8"), str(file))
    except OSError as error:
        raise StatsError(
            f"{file}: the statistics file cannot be read: {error.strerror}; give a file that can be read"
        ) from None
    except UnicodeDecodeError as error:
        raise StatsError(f"{file}: not JSON: not UTF-8 text (byte {error.start}); {_AGAIN}") from None


def write(run: RunStats, file: Path) -> None:
    """Save the run so that ``file`` holds either its old content or all of the new.

    Raises:
        StatsError: It cannot be written; the old file is untouched.
    """
    write_atomically(file, to_json(run))


def write_atomically(file: Path, text: str) -> None:
    """Replace ``file`` by one that holds ``text``, at once or not at all.

    Raises:
        StatsError: It cannot be written; the old file is untouched.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The only text that is not UTF-8 is a path's; escaped so, it is what JSON means by it.
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", dir=file.parent, prefix=f".{file.name}.", delete=False
        ) as new:
            try:
                new.write(text)
                new.flush()
                os.fsync(new.fileno())
                Path(new.name).chmod(0o644)
                Path(new.name).replace(file)
            except BaseException:
                Path(new.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StatsError(f"{file}: cannot be written: {error.strerror}; mend that or give another place") from None
