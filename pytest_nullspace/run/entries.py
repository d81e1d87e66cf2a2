"""One layer's entry in the file of a run, written and read; what follows from other numbers is worked out again."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from pytest_nullspace.errors import StatsError, printable
from pytest_nullspace.run.figures import FIGURES, Text, of_layers, of_one_text
from pytest_nullspace.run.stats import LayerStats, Spectrum, WithoutSinks
from pytest_nullspace.run.texts import is_name
from pytest_nullspace.run.windows import OF_LAYER, ByWindow

AGAIN = "measure again"
EDITED = "the file was edited or damaged, so measure again"

_NOT_MEASURED = "not measured"
"""What a file holds for a norm that a quantised weight does not give; ``null`` is what is not finite."""
_APART = ("margins", "task", "spectrum", "without_sinks", "by_window", "further")
_MEASURED = tuple(name for name in LayerStats.__slots__ if name not in _APART)
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
    "unplaced": "unplaced_windows",
    "bypassed": "weight_used_alone",
    "out_features": "out_features",
    "effective_rank": "update_effective_rank",
    "mean_leakage": "leakage",
    "chance": "leakage_chance",
}
_DERIVED_TOLERANCE = 1e-6
_MARGINS, _TASK, _SPECTRUM, _FURTHER = "margin_95", "task", "spectrum", "texts"
SINK_ROWS, _WITHOUT_SINKS = "sink_rows", "without_sinks"
BY_WINDOW = "by_window"

_UNTOLD = ("down_rank", "distinct_rows", "unplaced", "bypassed", "scale", "effective_rank")
"""What older files do not tell, or what not every layer has."""
_OF_DOWN = ("down_norm", "down_weight_norm", "preservation")
"""What a layer has not whose update is a whole matrix; the rank of that matrix tells that it is one."""
_ABSENT_IN_REFERENCE: Mapping[str, int] = {"in_features": 0, "rank": 0, "out_features": 0}

_COUNTS = ("rows", "in_features", "rank", "down_rank", "distinct_rows", "unplaced", "bypassed", "out_features")


def plain(value: Any, none: str | None = None) -> Any:
    """What JSON holds for a value, however deep: a list for a tuple, and ``none`` for a number that is none."""
    if isinstance(value, dict):
        return {key: plain(inner, none) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, none) for inner in value]
    return none if isinstance(value, float) and not math.isfinite(value) else value


def _keys() -> dict[str, str]:
    """Of every field and every figure of a layer, its key in the file."""
    return _KEYS | {name: FIGURES[name].key for name in of_layers()}


def _derived() -> dict[str, str]:
    """What the file holds for its readers' sake: the field or figure, and from what it follows."""
    return {"chance": "B_rank (or rank) / in_features"} | {name: FIGURES[name].follows for name in of_layers()}


def _ratios() -> list[str]:
    """The figures that are told without sink rows as well."""
    return [name for name in of_one_text() if FIGURES[name].sink_free]


def entry_of(layer: LayerStats) -> dict[str, Any]:
    """The layer as a file holds it."""
    absent = {"mean_leakage", "leakage"} if layer.mean_leakage is None else set()
    absent |= {name for name in _UNTOLD if getattr(layer, name) is None}
    absent |= set(_OF_DOWN) if layer.down_norm is None else set()
    if layer.task is None:
        absent |= {name for name in of_layers() if FIGURES[name].text is Text.BOTH}
    entry: dict[str, Any] = {key: plain(_value(layer, name)) for name, key in _keys().items() if name not in absent}
    if layer.base_weight_norm is None:
        entry[_KEYS["base_weight_norm"]] = _NOT_MEASURED
    if layer.without_sinks is not None:
        entry[SINK_ROWS] = layer.sinks
    if layer.sinks:
        entry[_WITHOUT_SINKS] = {
            _keys()[name]: plain(_value(layer.without_sinks, name))
            for name in (*_NORMS, *_ratios())
            if name not in absent
        }
    if layer.margins:
        entry[_MARGINS] = {figure: plain(layer.margins[figure]) for figure in of_layers() if figure in layer.margins}
    if layer.by_window is not None:
        entry[BY_WINDOW] = layer.by_window.encoded()
    if layer.task is not None:
        entry[_TASK] = entry_of(layer.task)
    if layer.further:
        entry[_FURTHER] = {name: entry_of(of) for name, of in layer.further.items()}
    if layer.spectrum is not None:
        entry[_SPECTRUM] = plain(asdict(layer.spectrum))
    return entry


def _value(of: Any, name: str) -> Any:
    """A field of what was measured on one text, or a figure of it."""
    if name not in FIGURES:
        return getattr(of, name)
    figure = FIGURES[name]
    return figure.value(of, of.task) if figure.text is Text.BOTH else figure.value(of)


def layer_of(entry: object, where: str) -> LayerStats:
    """The layer of that entry.

    Raises:
        StatsError: It is none, or its numbers contradict each other.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("layer_name"), str):
        raise StatsError(f"{where}: not a layer: it has no 'layer_name'; {AGAIN}")
    values: dict[str, Any] = {"margins": _margins(entry.get(_MARGINS), where)}
    if _TASK in entry:
        values["task"] = task = layer_of(entry[_TASK], f"{where}: task")
        if task.name != entry["layer_name"] or task.task is not None:
            raise StatsError(f"{where}: its entry 'task' is not of the same layer; {AGAIN}")
    if _FURTHER in entry:
        values["further"] = _further(entry[_FURTHER], entry["layer_name"], where)
    if _SPECTRUM in entry:
        told = entry[_SPECTRUM] if isinstance(entry[_SPECTRUM], dict) else {}
        numbers = {name: number(told.get(name), f"{where}: {_SPECTRUM}: {name}") for name in Spectrum.__slots__}
        values["spectrum"] = Spectrum(**numbers)
    for name in _MEASURED:
        if name in _UNTOLD and _KEYS[name] not in entry:
            continue
        if _is_without(name, entry):
            values[name] = None
            continue
        value = entry.get(_KEYS[name], _ABSENT_IN_REFERENCE.get(name))
        if name in _COUNTS:
            if not is_count(value):
                raise StatsError(
                    f"{where}: {_KEYS[name]} must be a whole number from 0, not {printable(repr(value))}; {AGAIN}"
                )
        elif name == "base_weight_norm" and value == _NOT_MEASURED:
            value = None
        elif name != "name" and (name != "mean_leakage" or _KEYS[name] in entry):
            known = math.nan if value is None and _KEYS[name] in entry else value
            value = number(known, f"{where}: {_KEYS[name]}", signed=name == "scale")
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
    _check_possible(layer, where)
    _check_derived(entry, layer, where)
    if BY_WINDOW in entry:
        kept = ByWindow.decoded(OF_LAYER, entry[BY_WINDOW], layer, f"{where}: {BY_WINDOW}")
        layer = replace(layer, by_window=kept)
    return layer if SINK_ROWS not in entry else replace(layer, without_sinks=_without_sinks(entry, layer, where))


def _check_possible(layer: LayerStats, where: str) -> None:
    """Refuse what no layer can have at once."""
    rank, norm = layer.effective_rank, layer.up_weight_norm
    if layer.bypassed and layer.rows:
        what = f"weight_used_alone is {layer.bypassed}, but {layer.rows} rows came to the layer itself"
    elif rank is not None and norm > 0 and not rank >= 1 - _DERIVED_TOLERANCE:
        what = f"update_effective_rank is {_shown(rank)}, but no update of norm {norm:.7g} has less than 1"
    else:
        return
    raise StatsError(f"{where}: {what}; {EDITED}")


def _further(told: object, name: str, where: str) -> dict[str, LayerStats]:
    """The layer of that ``name`` on the further preserved texts."""
    if not isinstance(told, dict) or not told or not all(map(is_name, told)):
        raise StatsError(f"{where}: its entry 'texts' does not hold the layer by the names of texts; {AGAIN}")
    found = {text: layer_of(entry, f"{where}: texts: {text}") for text, entry in told.items()}
    if any(of.name != name or of.task is not None or of.further for of in found.values()):
        raise StatsError(f"{where}: its entry 'texts' is not of the same layer; {AGAIN}")
    return found


def _without_sinks(entry: Mapping[str, Any], layer: LayerStats, where: str) -> WithoutSinks:
    sinks, told = entry[SINK_ROWS], entry.get(_WITHOUT_SINKS)
    if not is_count(sinks) or 2 * sinks > layer.rows:
        shown = printable(repr(sinks))
        raise StatsError(f"{where}: {SINK_ROWS} must be a count of at most half of the rows, not {shown}; {AGAIN}")
    if not sinks:
        return WithoutSinks(layer.rows, *layer.norms)
    where = f"{where}: {_WITHOUT_SINKS}"
    if not isinstance(told, dict):
        raise StatsError(f"{where} must hold what the norms are without the {sinks} sink rows; {AGAIN}")
    values = {name: told.get(_KEYS[name], "missing") for name in _NORMS if not _is_without(name, entry)}
    norms: dict[str, Any] = dict.fromkeys(_NORMS)
    norms |= {name: number(math.nan if v is None else v, f"{where}: {_KEYS[name]}") for name, v in values.items()}
    quiet = WithoutSinks(layer.rows - sinks, **norms)
    _check_derived(told, quiet, where)
    return quiet


def _is_without(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether ``name`` is of a B that the layer of that entry has not."""
    return name in _OF_DOWN and _KEYS[name] not in entry and _KEYS["effective_rank"] in entry


def _margins(told: object, where: str) -> dict[str, float]:
    if told is None:
        return {}
    if not isinstance(told, dict) or not told.keys() <= set(of_one_text()):
        raise StatsError(f"{where}: {_MARGINS} must hold a number for each of {', '.join(of_one_text())}")
    return {
        figure: math.inf if value is None else number(value, f"{where}: {_MARGINS}: {figure}")
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
        stated = math.nan if entry[key] is None else number(entry[key], f"{where}: {key}")
        if math.isfinite(stated) != math.isfinite(follows) or (
            math.isfinite(stated) and not math.isclose(stated, follows, rel_tol=_DERIVED_TOLERANCE, abs_tol=1e-12)
        ):
            raise StatsError(
                f"{where}: {key} is {_shown(stated)}, but {formula} is {_shown(follows)}; "
                "the file was edited or damaged, so measure again"
            )


def _shown(value: float) -> str:
    return f"{value:.7g}" if math.isfinite(value) else "no number"


def is_count(value: object) -> bool:
    """Whether it is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def number(value: object, where: str, signed: bool = False) -> float:
    """A number of a file as a float, not negative unless it may be ``signed``.

    Raises:
        StatsError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StatsError(f"{where} must be a number, not {printable(repr(value))}; {AGAIN}")
    try:
        number = float(value)
    except OverflowError:
        raise StatsError(f"{where} must be a number that a float can hold; {AGAIN}") from None
    if number < 0 and not signed:
        raise StatsError(f"{where} must not be negative, but is {number:g}; {AGAIN}")
    return number


def what_is_told(layer: LayerStats) -> tuple[object, ...]:
    """What was measured of ``layer``, which is the same of every layer of a run."""
    sinks = [of is None or of.without_sinks is None for of in (layer, layer.task, *layer.further.values())]
    return layer.absent, tuple(sinks), tuple(layer.further)
