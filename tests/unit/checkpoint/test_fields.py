"""Fields of an adapter's config: each is passed on to PEFT, known to change nothing, or refused by its name."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest

from pytest_nullspace.checkpoint import open_checkpoint
from pytest_nullspace.checkpoint.fields import HARMLESS, REFUSED, unused
from pytest_nullspace.checkpoint.peft import FIELDS
from pytest_nullspace.errors import CheckpointError
from tests import fuzz


def written(folder: Path, **fields: Any) -> Path:
    """An adapter of one layer, its config as PEFT's own defaults and ``fields`` have it."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]).to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain | {"peft_type": "LORA"} | fields))
    fuzz.weights(folder / "adapter_model.safetensors", fuzz.ADAPTER)
    return folder


def test_every_field_of_peft_is_decided() -> None:
    """No field of the installed PEFT's LoraConfig is left to chance, and none is decided twice."""
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert known <= {*FIELDS, *HARMLESS, *REFUSED}
    assert not set(FIELDS) & set(HARMLESS)
    assert not set(REFUSED) & {*FIELDS, *HARMLESS}


def test_what_peft_writes_by_default_is_read(tmp_path: Path) -> None:
    """The config of a plain LoRA, every default written out, is one that is measured."""
    assert len(open_checkpoint(written(tmp_path)).layers) == 1


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_changes_the_computation_is_refused_by_its_name(field: str, tmp_path: Path) -> None:
    """Set to anything, and also as a method's empty config, it is named with what to do; unset it is not looked at."""
    on: tuple[object, ...] = (True, [1, 2], {"nblocks": 2}, {})
    off: tuple[object, ...] = (None, False, [])
    for value in on:
        with pytest.raises(CheckpointError, match=rf"adapter_config.json: {field} is set: .*, which is not measured; "):
            open_checkpoint(written(tmp_path, **{field: value}))
    for value in off:
        assert open_checkpoint(written(tmp_path, **{field: value})).layers


@pytest.mark.parametrize("value", [True, 7, "on", [1], {"a": 1}])
def test_a_field_that_nobody_knows_is_refused_where_it_is_set(value: object, tmp_path: Path) -> None:
    """What a newer PEFT or another program wrote might change the figures, so it is named; off it does nothing."""
    with pytest.raises(CheckpointError, match=re.escape("'use_next_year' is set to ")):
        open_checkpoint(written(tmp_path, use_next_year=value))
    off: tuple[object, ...] = (None, False, 0, "", [], {})
    for unset in off:
        assert open_checkpoint(written(tmp_path, use_next_year=unset)).layers


def test_what_made_the_start_and_what_training_alone_reads_is_let_through(tmp_path: Path) -> None:
    """Fields that change no figure may be set; a start that changed the base is told by its own rule."""
    told = written(
        tmp_path, eva_config={"rho": 2.0}, loftq_config={"loftq_bits": 4}, lora_dropout=0.1, merge_weights=True
    )
    assert open_checkpoint(told).changed_base is None
    for field, method in (("corda_config", "CorDA"), ("lora_ga_config", "LoRA-GA")):
        changed = open_checkpoint(written(tmp_path, **{field: {"a": 1}})).changed_base
        assert changed is not None
        assert changed.startswith(f"its {field} says that {method} changed the base's weights")


def test_a_tensor_is_only_unused_where_its_field_says_so() -> None:
    """A sampler's tensors are left out of an adapter whose config names the method, and of no other."""
    names = {"a.lora_A.weight", "a.lora_monteclora_sampler.std_prior", "a.lora_velora_embed", "a.lora_velora_embed.x"}
    assert unused(names, {}) == unused(names, {"velora_config": None, "monteclora_config": False}) == set()
    assert unused(names, {"velora_config": {}}) == {"a.lora_velora_embed"}
    assert unused(names, {"monteclora_config": {"a": 1}}) == {"a.lora_monteclora_sampler.std_prior"}
