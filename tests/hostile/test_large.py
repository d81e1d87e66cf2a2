"""Saved runs that are large in the wrong way are refused in a second or two, and large ones of ours are read."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

from pytest_nullspace.errors import StatsError
from pytest_nullspace.run.saved import MAX_BYTES, MAX_KEYS, MAX_VALUES, read, to_json
from pytest_nullspace.run.stats import RunStats
from tests import saved

SECONDS = 10
"""Of processor time; on an idle machine each case takes one or two."""


def beside(tmp_path: Path, more: str) -> Path:
    """A saved run with ``more`` in its object."""
    file = tmp_path / "stats.json"
    file.write_text(f"{to_json(saved.run()).rstrip().removesuffix('}')}, {more}}}")
    return file


@pytest.mark.parametrize("keys", [5_000, 400_000])
@pytest.mark.parametrize("where", ["{}", '"deep": [{{{}}}]'])
def test_a_key_twice_among_many_is_found_at_once(tmp_path: Path, keys: int, where: str) -> None:
    """The key that stands twice is named in a time that grows with the keys alone, not with their square."""
    many = ", ".join(f'"k{i}": 0' for i in [*range(keys), keys - 1])
    begun = time.process_time()
    with pytest.raises(StatsError, match=rf"stats\.json: names 'k{keys - 1}' twice; measure again$"):
        read(beside(tmp_path, where.format(many)))
    assert time.process_time() - begun < SECONDS


@pytest.mark.parametrize("value", ["[]", "{}", '""', "0", "[[]]", '{"k": 0}'])
@pytest.mark.parametrize("key", ["junk", "measured", "outside"])
def test_more_values_than_any_run_has_are_refused_unparsed(tmp_path: Path, value: str, key: str) -> None:
    """Whatever stands under whatever key, what would take gigabytes is counted before it is parsed."""
    begun = time.process_time()
    with pytest.raises(StatsError, match=r"stats\.json: has more than 4,000,000 values, which no statistics file has;"):
        read(beside(tmp_path, f'"{key}": [{",".join([value] * MAX_VALUES)}]'))
    assert time.process_time() - begun < SECONDS


def test_an_object_of_more_keys_than_any_run_has_is_refused(tmp_path: Path) -> None:
    """A key takes far more time and memory than a value of a list, so fewer are taken."""
    assert len(read(beside(tmp_path, ", ".join(f'"k{i}": 0' for i in range(MAX_KEYS // 10)))).layers) == 9
    with pytest.raises(StatsError, match=r"stats\.json: has an object of more than 100,000 keys, which no statistics"):
        read(beside(tmp_path, ", ".join(f'"k{i}": 0' for i in range(MAX_KEYS + 1))))


def full(layers: int) -> RunStats:
    """A run that tells of everything, of so many layers, each also audited."""
    run = saved.full()
    one, task, audit = run.layers[0], run.layers[0].task, dict(run.about["audit"])
    assert task is not None
    names = [f"model.layers.{i // 100}.mlp.experts.{i % 100}.up_proj" for i in range(layers)]
    told = tuple(dataclasses.replace(one, name=n, task=dataclasses.replace(task, name=n)) for n in names)
    audit["layers"] = [{**audit["layers"][0], "name": name} for name in names]
    return dataclasses.replace(run, layers=told, checkpoint_layers=layers, about={**run.about, "audit": audit})


def test_the_bounds_leave_room_for_what_is_saved(tmp_path: Path) -> None:
    """The fullest file of as many bytes as are read holds no more values than are read; one of 5,000 layers is."""
    text = to_json(full(5_000))
    assert sum(map(text.count, ",[{")) / len(text) * MAX_BYTES < MAX_VALUES
    assert len(json.loads(text)) < MAX_KEYS
    (tmp_path / "stats.json").write_text(text)
    assert read(tmp_path / "stats.json").layers == full(5_000).layers
