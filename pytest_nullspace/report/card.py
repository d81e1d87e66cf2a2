"""The result in the adapter's own model card: entries of its metadata, and a section between two marks. Pure.

A model card is Markdown below a block of YAML. All that a user wrote stays byte for byte: of the YAML the plugin writes
its own entry of ``model-index`` alone, of the text what stands between the marks.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.errors import CheckpointError
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.invariants import MODEL, Expectations, judge_averages, judge_drifts
from pytest_nullspace.judging.spoken import said
from pytest_nullspace.judging.verdicts import Finding, Verdict
from pytest_nullspace.report.markdown import escape
from pytest_nullspace.report.words import MARKS, named
from pytest_nullspace.run.figures import FIGURES, Text
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.run.texts import FIRST, drift_test, name_of, preserved

if TYPE_CHECKING:
    import yaml

BEGIN, END = "<!-- pytest-nullspace: begin -->", "<!-- pytest-nullspace: end -->"
"""What the section stands between."""
SOURCE, HOME = "pytest-nullspace", "https://pypi.org/project/pytest-nullspace/"
"""By what its results are known in ``model-index``."""
MOST_METADATA = 256 * 1024
"""Characters of YAML that are read; cards have some hundred."""
TASK = "task"
"""The key of the task text among those of the preserved ones."""
_INDEX = "model-index"


@dataclass(frozen=True)
class Result:
    """What a card is told.

    Attributes:
        name: What the adapter is called.
        run: What was measured, whole.
        expectations: What it was held against.
        decision: The verdict on it.
        version: That of this plugin.
    """

    name: str
    run: RunStats
    expectations: Expectations
    decision: Decision
    version: str


def created(library: str, base: str | None) -> str:
    """A card for an adapter that has none, to be `renewed`.

    Args:
        library: By what it is loaded.
        base: The id of its base model on the hub, if it has one.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name=library, base_model=base)
    return f"---\n{data.to_yaml()}\n---\n"


def renewed(card: str, result: Result, where: str) -> str:
    """The card with the result in place of what an earlier run wrote there; the same twice.

    Args:
        card: As it is.
        result: What it is told.
        where: Its file, for messages.

    Raises:
        CheckpointError: It cannot be parsed, or not be changed without a loss; see `check`.
    """
    check(card, where)
    mark, card = ("\ufeff", card[1:]) if card.startswith("\ufeff") else ("", card)
    opening, metadata, closing, text = _parts(card)
    newline = "\r\n" if "\r\n" in card else "\n"
    metadata = _with_entries(metadata, result, newline, where)
    opening, closing = opening or f"---{newline}", closing or f"---{newline}"
    if not closing.endswith("\n"):
        closing += newline
    if not text.strip():
        text += f"# {escape(result.name)}{newline}"
    return mark + opening + metadata + closing + _with_section(text, _section(result), newline)


def check(card: str, where: str) -> None:
    """Refuse a card that cannot be parsed, or in which the place of the result is not clear.

    Raises:
        CheckpointError: Its metadata is no YAML that the hub would take, or its marks do not pair.
    """
    import yaml
    from huggingface_hub import ModelCard

    _, metadata, closing, text = _parts(card.removeprefix("\ufeff"))
    if not closing and text.lstrip().startswith(("---\n", "---\r\n")):
        raise _refusal(where, "the metadata that its first line opens is never closed by a line ---")
    if len(metadata) > MOST_METADATA:
        raise _refusal(where, f"its metadata has {len(metadata):,} characters, and at most {MOST_METADATA:,} are read")
    if (text.count(BEGIN), text.count(END)) not in ((0, 0), (1, 1)) or text.find(BEGIN) > text.find(END):
        raise _refusal(where, f"the section of the result needs one line {BEGIN} and one line {END} after it")
    if not closing:
        return
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(metadata, yaml.SafeLoader)):
            raise _refusal(where, "its metadata uses YAML's aliases (*name); write out what they stand for")
        ModelCard(f"---\n{metadata}---\n")
        root = yaml.compose(metadata, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _refusal(where, f"its metadata cannot be parsed: {_first(error)}") from None
    if root is not None and (root.flow_style or len(_keys(root)) != len(set(_keys(root)))):
        raise _refusal(where, "its metadata is written within braces, or has a key twice")


def _refusal(where: str, why: str) -> CheckpointError:
    return CheckpointError(f"{where}: {why}; mend the card, or leave --nullspace-card out")


def _first(error: Exception) -> str:
    """What is wrong and where, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    told = str(problem or error).strip().partition("\n")[0] or type(error).__name__
    return printable(told if mark is None else f"{told}, line {mark.line + 2}", 300)


def _parts(card: str) -> tuple[str, str, str, str]:
    """The line that opens the metadata, these, the line that closes them, and the text; empty where there are none."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    found = re.match(r"(\s*---(?:\r\n|\n))(---[ \t]*(?:\r\n|\n|$))", card)  # which the hub's own pattern takes for none
    if found is not None:
        return found[1], "", found[2], card[found.end() :]
    found = REGEX_YAML_BLOCK.match(card)
    if found is None:
        return "", "", "", card
    newline = re.match(r"\r\n|\r|\n", found[3])
    assert newline is not None
    return found[1], found[2] + newline[0], found[3][newline.end() :], card[found.end() :]


# --- the metadata ---------------------------------------------------------------------------------------------------


def _with_entries(metadata: str, result: Result, newline: str, where: str) -> str:
    """The YAML with this plugin's entry of ``model-index`` in place of an earlier one."""
    import yaml

    root = yaml.compose(metadata, yaml.SafeLoader) if metadata.strip() else None
    data: Any = (yaml.safe_load(metadata) if metadata.strip() else None) or {}
    items = data.get(_INDEX) or []
    name = next((item["name"] for item in items if not _is_ours(item)), printable(result.name))
    own = {"name": name, "results": _results(result)}

    def dumped(value: object) -> str:
        told: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**6)
        return told.replace("\n", newline)

    pair = None if root is None else next((pair for pair in root.value if pair[0].value == _INDEX), None)
    if pair is None:
        changed = metadata + dumped({_INDEX: [own]})
    elif not items or pair[1].flow_style or any(map(_is_mixed, items)):
        kept = [_without_ours(item) for item in items if not _is_ours(item)]
        start, end = pair[0].start_mark.index, _end_of_value(metadata, pair[1])
        changed = metadata[:start] + dumped({_INDEX: [*kept, own]}) + metadata[end:]
    else:
        changed = _spliced(metadata, pair[1], items, dumped([own]))
    _hold(metadata, changed, own, where)
    return changed


def _is_ours(item: Mapping[str, Any]) -> bool:
    results = item["results"]
    return bool(results) and all(_by_us(result) for result in results)


def _is_mixed(item: Mapping[str, Any]) -> bool:
    """Whether a tool put the results of this plugin among others."""
    return not _is_ours(item) and any(_by_us(result) for result in item["results"])


def _by_us(result: Mapping[str, Any]) -> bool:
    return (result.get("source") or {}).get("name") == SOURCE


def _without_ours(item: Mapping[str, Any]) -> dict[str, Any]:
    return {**item, "results": [result for result in item["results"] if not _by_us(result)]}


def _spliced(metadata: str, listed: "yaml.SequenceNode", items: Sequence[Mapping[str, Any]], own: str) -> str:
    """The YAML with ``own``, one item, among the items of a list in block style: in its old place, else at the end."""
    column = listed.start_mark.column
    starts = [_line_of_dash(metadata, node.start_mark.index, column) for node in listed.value]
    ends = [*starts[1:], _end_of_items(metadata, starts[-1], column)]
    told = "".join(" " * column + line for line in own.splitlines(keepends=True))
    for item, start, end in zip(items, starts, ends, strict=True):
        if _is_ours(item):
            return metadata[:start] + told + metadata[_end_of_items(metadata, start, column, end) :]
    return metadata[: ends[-1]] + told + metadata[ends[-1] :]


def _end_of_value(metadata: str, node: "yaml.Node") -> int:
    """Where the last line ends that belongs to a value."""
    if node.id == "sequence" and not node.flow_style:
        column = node.start_mark.column
        return _end_of_items(metadata, _line_of_dash(metadata, node.value[0].start_mark.index, column), column)
    return metadata.index("\n", node.end_mark.index) + 1


def _line_of_dash(metadata: str, index: int, column: int) -> int:
    """Where the line begins with the dash of the item that holds ``index``."""
    start = metadata.rfind("\n", 0, index) + 1
    while start > 0 and metadata[start : start + column + 1] != " " * column + "-":
        start = metadata.rfind("\n", 0, start - 1) + 1
    return start


def _end_of_items(metadata: str, start: int, column: int, until: int | None = None) -> int:
    """Where the last line ends that belongs to an item from ``start`` on: it is deeper than the dash, or holds one."""
    end = place = start
    for line in metadata[start:until].splitlines(keepends=True):
        place += len(line)
        deep = len(line) - len(line.lstrip(" "))
        if line.strip() and (deep > column or line[deep] == "-"):
            end = place
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return end


def _keys(root: Any) -> list[str]:
    return [str(key.value) for key, _ in root.value]


def _hold(before: str, after: str, own: Mapping[str, Any], where: str) -> None:
    """Refuse a change that did more, or less, than to put ``own`` there."""
    import yaml

    try:
        old = yaml.safe_load(before) if before.strip() else {}
        new = yaml.safe_load(after)
        others = [{k: v for k, v in (data or {}).items() if k != _INDEX} for data in (old, new)]
        items = [[item for item in (data or {}).get(_INDEX) or [] if not _is_ours(item)] for data in (old, new)]
        kept = [list(map(_without_ours, of)) for of in items]
        sound = others[0] == others[1] and kept[0] == kept[1] and new[_INDEX].count(own) == 1
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise _refusal(where, "its metadata is written in a way in which the result cannot be added without a loss")


def _results(result: Result) -> list[dict[str, Any]]:
    """The results as ``model-index`` has them: of each text its own, the verdict first."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    texts, read = _texts(result.run), _read(result.run)
    told: dict[str, list[tuple[str, str, float | str]]] = {FIRST: [("verdict", "verdict", str(result.decision.call))]}
    for key, verdict, finding in _findings(result):
        figure = finding.threshold.figure
        of = "average over layers" if verdict.subject == MODEL else "predictions"
        told.setdefault(key, []).append((figure, f"{figure} ({of})", _told(finding.value)))
    found: list[dict[str, Any]] = []
    for key, rows in told.items():  # one by one, for texts of one name would be thrown together
        entries = [
            EvalResult(
                task_type="text-generation",
                dataset_type=printable(texts[key]),
                dataset_name=printable(texts[key]),
                dataset_args=read.get(key),
                metric_type=f"nullspace-{figure}",
                metric_name=words,
                metric_value=value,
                source_name=SOURCE,
                source_url=HOME,
            )
            for figure, words, value in rows
        ]
        found += eval_results_to_model_index("", entries)[0]["results"]
    return found


def _told(value: float) -> float | str:
    """A figure in six digits, or in a word, for NaN is no value that the hub takes."""
    return float(f"{value:.6g}") if math.isfinite(value) else "not finite"


def _findings(result: Result) -> Iterator[tuple[str, Verdict, Finding]]:
    """Each figure that decided, of the predictions and the averages, with the key of its text."""
    run, expectations = result.run, result.expectations
    keys = {drift_test(name_of(key) or str(of.get("name", ""))): key for key, of in preserved(run.about).items()}
    for verdict in (*judge_drifts(run, expectations), judge_averages(run, expectations)):
        for finding in verdict.findings:
            of_task = FIGURES[finding.threshold.figure].text is Text.TASK and run.has_task
            yield TASK if of_task else keys.get(verdict.subject, FIRST), verdict, finding


def _read(run: RunStats) -> dict[str, dict[str, int]]:
    """How much of each text was read, by its key."""
    entries = {**preserved(run.about), TASK: run.about.get("task_text")}
    return {
        key: {what: entry[what] for what in ("windows", "tokens") if isinstance(entry.get(what), int)}
        for key, entry in entries.items()
        if isinstance(entry, Mapping)
    }


def _texts(run: RunStats) -> dict[str, str]:
    """What each text is called, by its key: a file by its last name alone, for a card is read by strangers."""
    entries = preserved(run.about)
    given = {key: str(entry.get("given", run.calib_dataset)) for key, entry in entries.items()}
    told = {FIRST: run.calib_dataset, **given, TASK: str(run.about.get("task_dataset") or "task text")}
    return {key: spec if spec.startswith("hub:") else re.split(r"[/\\]", spec)[-1] for key, spec in told.items()}


# --- the section ----------------------------------------------------------------------------------------------------


def _with_section(text: str, section: str, newline: str) -> str:
    """The text with the section in place of the one between the marks, else at its end."""
    section = section.replace("\n", newline)
    if BEGIN in text:
        return text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :]
    gap = "" if not text else newline if text.endswith("\n") else newline * 2
    return f"{text}{gap}{section}{newline}"


def _section(result: Result) -> str:
    """What the card tells a reader, between its marks."""
    run, decision = result.run, result.decision
    lines = [BEGIN, "## What it kept and what it learned", ""]
    lines += [f"**{decision.call}**: {escape(named(decision.sentence, run))}", ""]
    lines += ["| | figure | value | passes | fails | in words |", "|---|---|---:|---:|---:|---|"]
    lines += [_row(verdict, finding, run) for _, verdict, finding in _findings(result)]
    lines += ["", *(f"- {escape(named(f'{cause.cause}: {cause.evidence}', run))}" for cause in decision.causes)]
    lines += [*([""] if decision.causes else []), _about(result), END]
    return "\n".join(lines)


def _row(verdict: Verdict, finding: Finding, run: RunStats) -> str:
    threshold, value = finding.threshold, f"{finding.value:.3g}{finding.with_margin}"
    better, worse = ("<", ">") if threshold.lower_is_better else (">", "<")
    cells = (
        MARKS[finding.tier], threshold.figure, value, f"{better} {threshold.passes:g}",
        f"{worse} {threshold.fails:g}", named(said(verdict, finding), run),
    )  # fmt: skip
    return "| " + " | ".join(map(escape, cells)) + " |"


def _about(result: Result) -> str:
    """What was gated, on which texts and of which weights."""
    run, texts = result.run, _texts(result.run)
    told = [
        f"{'task text ' if key == TASK else ''}{escape(texts[key])}"
        f" ({', '.join(f'{many:,} {what}' for what, many in of.items())})"
        for key, of in _read(run).items()
    ]
    hashes = run.about.get("weights_sha256")
    weights = hashes.items() if isinstance(hashes, Mapping) else ()
    digests = "".join(f" SHA-256 of {escape(str(file))}: {escape(str(digest))}." for file, digest in weights)
    return (
        f"Gated by [{SOURCE}]({HOME}) {result.version}: {len(run.layers):,} of {run.checkpoint_layers:,} layers on "
        f"{' and '.join(told)}, in {escape(str(run.about.get('dtype')))}.{digests}"
    )
