"""What transformers can build with its own code, and what it cannot load; code that a config names is never run."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from pytest_nullspace.checkpoint.header import printable, quoted, read_json_object
from pytest_nullspace.errors import CheckpointError

_FLOATS = ("Infinity", "-Infinity", "NaN")
_QUANTISERS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}
"""The packages that read a base quantised so; of others transformers' message tells."""
_POSITIONS = "rope_parameters"
"""What transformers 5 calls how positions are told; before, ``rope_theta`` and ``rope_scaling`` stood for it."""


def require_known(config: Mapping[str, Any], config_file: Path) -> None:
    """Refuse a model of which transformers itself has no code.

    Raises:
        CheckpointError: Its ``model_type`` is unknown, so it needs a newer transformers or code of its own.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        _require_positions_read(config, config_file, CONFIG_MAPPING[kind])
        return
    unknown = f"{config_file}: transformers {transformers.__version__} has no model_type {quoted(kind)} of its own"
    if code := config.get("auto_map"):
        raise CheckpointError(
            f"{unknown}, and the code that auto_map names ({printable(json.dumps(code), 200)}) is never run; take a "
            "copy of the model that was converted to an architecture of transformers, and train and gate on that, or "
            "a newer transformers where that has it"
        )
    raise CheckpointError(f"{unknown}; take a newer transformers where that has it, or mend the config")


def _require_positions_read(config: Mapping[str, Any], config_file: Path, build: Any) -> None:
    """Refuse how a model tells positions in the words of transformers 5 where an older one would pass over them.

    Raises:
        CheckpointError: It is so, and they differ from what that takes where nothing is said.
    """
    told = [*_positions(config)]
    if not told or int(transformers.__version__.partition(".")[0]) >= 5:
        return
    usual = None
    with suppress(Exception):  # of a kind that is made of others
        usual = {"rope_type": "default", "rope_theta": build().rope_theta}
    if told != [usual] or config.get(_POSITIONS) != usual:
        raise CheckpointError(
            f"{config_file}: was written by transformers 5, whose {_POSITIONS} transformers "
            f"{transformers.__version__} does not read, so it would compute another model; pip install "
            "'transformers>=5.0'"
        )


def _positions(value: Any) -> Iterator[Any]:
    """Every value under that key, however deep."""
    if isinstance(value, Mapping):
        if value.get(_POSITIONS):
            yield value[_POSITIONS]
        for inner in value.values():
            yield from _positions(inner)


def known_config(base: Path) -> dict[str, Any]:
    """The config of the base model in ``base``, as it lies there.

    Raises:
        CheckpointError: It cannot be read, or transformers itself has no code for it.
    """
    config: dict[str, Any] = with_floats(read_json_object(base / "config.json", "the base model's config"))
    require_known(config, base / "config.json")
    return config


def with_floats(value: Any) -> Any:
    """The JSON ``value`` with floats for what transformers puts as ``{"__float__": "NaN"}``, which JSON has not."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in _FLOATS:
            return float(value["__float__"])
        return {key: with_floats(inner) for key, inner in value.items()}
    return [with_floats(inner) for inner in value] if isinstance(value, list) else value


def own_code(base: Path) -> str:
    """That a base whose weights do not fit may need the code that its config names; nothing where it names none."""
    if base.is_file() or not known_config(base).get("auto_map"):
        return ""
    return "; its auto_map names code of its own, which is never run, and that may be of another architecture"


@contextmanager
def told_of(base: Path) -> Iterator[None]:
    """Say in one sentence what transformers, which raises many kinds of errors, cannot load of ``base``."""
    try:
        yield
    except CheckpointError:
        raise
    except ImportError as error:
        method = None if base.is_file() else quantiser(base)
        if method is None:
            raise CheckpointError(
                f"{base}: transformers builds this model with a package that is not installed: {printable(error, 300)}"
            ) from error
        raise CheckpointError(
            f"{base}: its weights are quantised by {printable(method)}, and what reads them is not installed: "
            f"{printable(error, 300)}; pip install {_QUANTISERS.get(method, 'what it names')}"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{base}: transformers cannot load the base model: {printable(error, 300)}{own_code(base)}; save it "
            "again with safe_serialization=True, or give another by --nullspace-base=DIR"
        ) from error


def quantiser(base: Path) -> str | None:
    """By which method the weights of ``base`` are quantised, as its config says; None where they are not."""
    config = read_json_object(base / "config.json", "the base model's config").get("quantization_config")
    return str(config.get("quant_method")) if isinstance(config, dict) else None
