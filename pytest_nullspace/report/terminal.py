"""The report on the terminal: the reference's block for each layer, a table of the worst, and a reading in words."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.audit import Audit
from pytest_nullspace.judging.baseline import Change, Comparison
from pytest_nullspace.judging.diagnosis import Diagnosis
from pytest_nullspace.judging.invariants import Expectations, Tier, Verdict, judge, judge_averages, judge_drift
from pytest_nullspace.judging.start import QUANTITIES, Start
from pytest_nullspace.run.stats import FIGURES, ON_TASK, TASK_FIGURES, Drift, LayerStats, RunStats
from pytest_nullspace.run.uncertainty import MOST_WINDOWS, windows_needed

if TYPE_CHECKING:
    import pytest

    from pytest_nullspace.settings import Settings

WORST_SHOWN = 5
OUTSIDE_SHOWN = 2
MOVED_SHOWN = 5
WIDTH = 60
MARKS = {Tier.PASS: "✓", Tier.WARN: "⚠", Tier.FAIL: "✗"}


def header(checkpoint: Checkpoint, gated: int, settings: "Settings") -> Iterator[str]:
    """What will be gated, on which text, and what lies outside, before anything is loaded."""
    total = len(checkpoint.layers)
    layers = f"{total} layers" if gated == total else f"{gated} of {total} layers"
    yield (
        f"nullspace: {printable(checkpoint.directory, 1000)} ({checkpoint.format}, {layers}, {checkpoint.ranks}); "
        f"text {printable(settings.calib_dataset, 1000)}, {windows_asked(settings)} windows; device {settings.device}"
    )
    if settings.task_dataset is not None:
        yield f"nullspace: task text {printable(settings.task_dataset, 1000)}"
    if not checkpoint.carries_base:
        base, how = (
            (settings.base, "--nullspace-base") if settings.base else (checkpoint.base, checkpoint.config_file.name)
        )
        yield f"nullspace: base model {printable(base or 'none', 1000)}, named by {how}"
    if checkpoint.outside:
        yield f"nullspace: {outside(checkpoint.outside)}"


def windows_asked(settings: "Settings") -> str:
    """How many windows are drawn of each text."""
    size = settings.calib_size
    return f"up to {settings.calib_most}" if size is None else str(size)


_KINDS = (
    (r"\.lora_magnitude_vector(\.weight)?", "DoRA magnitudes"),
    (r"\.lora_B\.bias", "LoRA biases"),
    (r"\.lora_embedding_[AB]", "LoRA matrices of embeddings"),
    (r"\.lora_[AB]\.weight", "LoRA matrices of convolutions or bare parameters"),
    (r"\.trainable_tokens_delta", "trained tokens"),
    (r"\.bias", "biases"),
    (r"", "whole weights"),
)
"""What trained tensors outside the layers are, by how their names end; the first that fits."""


def outside(names: Sequence[str]) -> str:
    """How many trained tensors no layer test covers, and which, by kind, the first of each by name."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = next(kind for ending, kind in _KINDS if re.search(rf"{ending}$", name))
        kinds.setdefault(kind, []).append(printable(name.removeprefix("base_model.model.")))
    told = (
        f"{len(held)} {kind} ({', '.join(held[:OUTSIDE_SHOWN])}{', …' if len(held) > OUTSIDE_SHOWN else ''})"
        for kind, held in kinds.items()
    )
    return f"outside the guarantee: trained tensors that no layer test covers, {len(names)} in all: {'; '.join(told)}"


def saved_header(file: Path, run: RunStats, gated: int) -> Iterator[str]:
    """Which saved run is gated, and what lay outside its layers."""
    yield (
        f"nullspace: {printable(file, 1000)} (saved run of {printable(run.model_path, 1000)}, {gated} of "
        f"{run.checkpoint_layers} layers); text {printable(run.calib_dataset, 1000)}; nothing is measured now"
    )
    if names := outside_of(run):
        yield f"nullspace: {outside(names)}"


def not_measured(run: RunStats) -> str | None:
    """Which figures nobody measured, and that they were not judged; None if all were."""
    absent = [figure for figure in run.expected if figure in run.absent]
    return f"not measured: {', '.join(absent)}; left out of judging" if absent else None


def left_out(expectations: Expectations) -> str | None:
    """Which figures are shown and were not judged, and why; None if all were."""
    if not expectations.left_out:
        return None
    named = ", ".join(FIGURES[figure] for figure in expectations.left_out)
    return (
        f"not judged: {named}, as plain LoRA (--nullspace-variant={expectations.variant}) promises no null space; "
        "a small ||BX||/||X|| alone is none"
    )


def texts(run: RunStats) -> str:
    """On which text, or texts, the run was measured."""
    task = run.about.get("task_dataset")
    return run.calib_dataset if not run.has_task else f"{run.calib_dataset}, task text {task}"


def uncertain(verdicts: Sequence[Verdict], run: RunStats) -> str | None:
    """How many verdicts more text might change, and how much text would settle them; None if there are none."""
    findings = [(v.subject, f) for v in verdicts if v.unjudged is None for f in v.findings if f.uncertain]
    if not findings:
        return None
    layers = {subject for subject, _ in findings}
    told = f"uncertain: more text might change the verdict on {len(layers)} of {len(verdicts)} layers"
    drawn = {finding.threshold.figure: _windows(run, finding.threshold.figure) for _, finding in findings}
    fewest = min(drawn.values())
    if not fewest:
        return told
    if fewest == 1:
        return f"{told}; one window tells nothing of how the figures vary, so draw more by --nullspace-calib-size"
    needed = [
        windows_needed(drawn[f.threshold.figure], f.margin, f.distance) for _, f in findings if f.margin is not None
    ]
    half = median([n for n in needed if n is not None] or drawn.values())
    name, finding = max(findings, key=lambda pair: pair[1].badness)
    settings = run.about.get("settings")
    is_auto = isinstance(settings, dict) and settings.get("calib_size", 0) is None
    return (
        f"{told}, such as {printable(name)} ({finding.threshold.figure} {finding.value:.3g} ± {finding.margin:.2g}); "
        f"about {half:.0f} windows would settle half of them"
        + (", so raise N in --nullspace-calib-size=auto:N" if is_auto else ", or try --nullspace-calib-size=auto")
    )


def _windows(run: RunStats, figure: str) -> int:
    """How many windows were drawn of the text on which ``figure`` is judged; 0 where no credible number was told."""
    recorded = run.about.get("task_text" if run.has_task and figure in ON_TASK else "text")
    windows = recorded.get("windows") if isinstance(recorded, dict) else None
    # A file of another making may hold anything.
    return windows if isinstance(windows, int) and 0 < windows <= MOST_WINDOWS else 0


def repeated(run: RunStats) -> str | None:
    """How much of the preserved text repeats, where that is a tenth or more; None if it is less, or nobody told."""
    tokens, distinct = _tokens(run)
    if 10 * (tokens - distinct) < tokens or not tokens:
        return None
    return (
        f"repeated text: only {distinct:,} of {tokens:,} tokens are new, the others repeat a stretch of the windows "
        "before them, so the margins are larger than told; give a longer text, or one that does not repeat itself"
    )


def few_rows(run: RunStats) -> str | None:
    """How many layers are wider than their rows are many, and what would be enough; None if there are none."""
    tokens, distinct = _tokens(run)
    new = distinct / tokens if tokens else 1.0
    short = [layer for layer in run.layers if 0 < layer.rows * new < layer.in_features]
    if not short:
        return None
    layer = min(short, key=lambda layer: layer.rows / layer.in_features)
    return (
        f"too few rows: {len(short)} of {len(run.layers)} layers are wider than their distinct rows are many, such as "
        f"{printable(layer.name)} (width {layer.in_features:,}, {layer.rows * new:,.0f} rows); so few rows leave some "
        f"subspace perfectly quiet on any text, so leakage says little there; {_enough(run, layer, new)}"
    )


def _enough(run: RunStats, layer: LayerStats, new: float) -> str:
    """What would give ``layer`` as many distinct rows as it is wide, of which the share ``new`` is."""
    settings, text = run.about.get("settings"), run.about.get("text")
    if isinstance(settings, dict) and settings.get("max_activation_samples") == layer.rows:
        most = math.ceil(layer.in_features / new)
        return f"--nullspace-max-activation-samples={most} would be enough, or leave it out"
    windows = text.get("windows") if isinstance(text, dict) else None
    if not isinstance(windows, int):
        return "measure on more text"
    needed = math.ceil(windows * layer.in_features / (layer.rows * new))
    return f"about {needed:,} windows as long and as new would be enough"


def _tokens(run: RunStats) -> tuple[int, int]:
    """How many tokens the preserved text had, and how many of them were new; zeros where nobody told."""
    text = run.about.get("text")  # a file of another making may hold anything
    counts = [text.get(what) for what in ("tokens", "distinct")] if isinstance(text, dict) else []
    known = [count for count in counts if isinstance(count, int) and count > 0]
    return (known[0], known[1]) if len(known) == 2 else (0, 0)


def write(reporter: "pytest.TerminalReporter", run: RunStats, expectations: Expectations) -> None:
    """Print the report of one checkpoint: with ``-v`` a block for each layer, with ``-vv`` where the time went."""
    verdicts = [judge(layer, expectations) for layer in run.layers]
    if reporter.verbosity > 0:
        for layer, verdict in zip(run.layers, verdicts, strict=True):
            for line in block(layer, verdict):
                reporter.write_line(line)
    if reporter.verbosity > 1 and (told := time_spent(run)) is not None:
        reporter.write_line(told)
    write_lines(reporter, summary(run, verdicts, expectations))


_START_UP = ("text", "imports", "model", "windows")


def time_spent(run: RunStats) -> str | None:
    """Where the time of a measurement went; None where the run does not tell."""
    try:
        seconds = run.about["measured"]["seconds"]
        start = ", ".join(f"{what} {seconds[what]:.1f} s" for what in _START_UP)
        return f"start-up: {start}; measuring {seconds['pass']:.1f} s; hashing the weights {seconds['hashes']:.1f} s"
    except (KeyError, TypeError, ValueError):
        return None


def write_lines(reporter: "pytest.TerminalReporter", lines: Iterable[tuple[str, Tier | None]]) -> None:
    """Print lines, each in the colour of its tier."""
    for line, tier in lines:
        markup = {} if tier is None else {_COLOURS[tier]: True}
        reporter.write_line(line, **markup)


_COLOURS = {Tier.PASS: "green", Tier.WARN: "yellow", Tier.FAIL: "red"}


def block(layer: LayerStats, verdict: Verdict) -> Iterator[str]:
    """The reference's block for one layer."""
    marks = {finding.threshold.figure: MARKS[finding.tier] for finding in verdict.findings}
    yield "=" * WIDTH
    yield f"Layer: {printable(layer.name)}"
    yield "=" * WIDTH
    yield f"samples: {layer.rows}"
    if layer.rank:
        spans = "" if layer.down_rank in (None, layer.rank) else f" (B spans {layer.down_rank})"
        yield f"input width: {layer.in_features}, rank: {layer.rank}{spans}, output width: {layer.out_features}"
    yield "-" * WIDTH
    yield "activation norms:"
    for label, value in (
        ("||X|| (avg):", layer.input_norm),
        ("||BX|| (avg):", layer.down_norm),
        ("||ABX|| (avg):", layer.update_norm),
        ("||W_residual @ X||:", layer.base_norm),
        ("||full output||:", layer.output_norm),
    ):
        yield f"  {label:<22} {value:.6f}"
    yield "-" * WIDTH
    yield "null-space figures:"
    for figure in ("preservation", "effectiveness", "leakage"):
        yield _figure_line(layer, figure, marks)
    yield "-" * WIDTH
    yield "adapter contribution:"
    yield _figure_line(layer, "contribution", marks)
    if layer.task is not None:
        yield "-" * WIDTH
        yield "preserved text against task text (effectiveness and contribution above are of the task text):"
        for figure in TASK_FIGURES:
            yield _figure_line(layer, figure, marks)
    yield "-" * WIDTH
    base = "not measured" if layer.base_weight_norm is None else f"{layer.base_weight_norm:.6f}"
    yield (
        f"weight norms:  ||B||_F {layer.down_weight_norm:.6f}   ||A||_F {layer.up_weight_norm:.6f}   "
        f"||W_residual||_F {base}"
    )
    for fault in _faults(verdict):
        yield f"  {MARKS[verdict.tier]} {fault}"


def _figure_line(layer: LayerStats, figure: str, marks: Mapping[str, str]) -> str:
    return f"  {FIGURES[figure] + ':':<22} {_shown(layer, figure)}  {marks.get(figure, '')}".rstrip()


def summary(
    run: RunStats, verdicts: Sequence[Verdict], expectations: Expectations
) -> Iterator[tuple[str, Tier | None]]:
    """The lines of the summary, each with the tier that colours it."""
    conditions = _conditions(run)
    if conditions is not None:
        yield conditions, None
    counts = {tier: sum(verdict.tier is tier for verdict in verdicts) for tier in Tier}
    worst = Tier.worst(verdict.tier for verdict in verdicts)
    yield (
        f"gated {len(run.layers)} of {run.checkpoint_layers} layers: {counts[Tier.PASS]} passed, "
        f"{counts[Tier.WARN]} warned, {counts[Tier.FAIL]} failed",
        worst if run.complete else Tier.WARN if worst is Tier.PASS else worst,
    )
    if not run.layers and run.drift is None:
        yield "no layer was measured; what follows is read from the files", Tier.WARN
        return
    absent = not_measured(run)
    if absent is not None:
        yield absent, Tier.WARN
    unjudged = left_out(expectations)
    if unjudged is not None:
        yield unjudged, Tier.WARN
    if names := outside_of(run):
        yield outside(names), Tier.WARN
    for told in (uncertain(verdicts, run), few_rows(run), repeated(run)):
        if told is not None:
            yield told, Tier.WARN
    yield "", None
    yield from _table(run, verdicts)
    for line in best_possible(run):
        yield line, None
    if run.drift is not None:
        yield "", None
        tier = judge_drift(run.drift, expectations).tier
        yield from ((f"{MARKS[tier]} {line}" if i == 0 else line, tier) for i, line in enumerate(drift(run.drift)))
    if run.complete:
        averages = judge_averages(run, expectations)
        yield "", None
        yield "reading (averages over all layers):", None
        yield from reading(averages)


def best_possible(run: RunStats) -> Iterator[str]:
    """Where the adapter stands between chance and the best that any subspace could do; nothing if never measured."""
    known = [(layer, layer.spectrum, layer.standing) for layer in run.layers]
    layers = [(layer, spectrum, standing) for layer, spectrum, standing in known if spectrum and standing is not None]
    if not layers:
        return
    least = median(spectrum.least_leakage / layer.chance for layer, spectrum, _ in layers)
    ranks = [spectrum.effective_rank for _, spectrum, _ in layers]
    shared = median(spectrum.shared for _, spectrum, _ in layers)
    worst, _, lowest = min(layers, key=lambda entry: entry[2])
    yield (
        f"best possible on this text: leakage / chance {least:.3g} (median over layers); from chance (0) to that (1) "
        f"the adapter stands at {median(s for *_, s in layers):.3f}, lowest {lowest:.3f} in {printable(worst.name)}; "
        f"it shares {shared:.0%} of the best subspace; effective rank of inputs {min(ranks):.1f} to {max(ranks):.1f}"
    )


def drift(told: Drift) -> Iterator[str]:
    """What the adapter makes of the base model's predictions, a line for each text."""
    for name, text in (("preserved", told.preserved), ("task", told.task)):
        if text is not None:
            yield (
                f"drift on the {name} text: loss {text.base_loss:.4g} → {text.adapted_loss:.4g} "
                f"({text.loss_change:+.3g} ± {text.loss_margin:.2g} nats a token), divergence "
                f"{text.divergence:.3g} ± {text.divergence_margin:.2g}, over {text.tokens:,} tokens"
            )
    yield f"  base: {printable(told.base, 1000)}"


def outside_of(run: RunStats) -> list[str]:
    """The trained tensors that no layer test covers, as the run's file names them."""
    names = run.about.get("outside")  # a file of another making may hold anything
    return [str(name) for name in names] if isinstance(names, list) else []


def comparison(compared: Comparison, against: Path, missing: Sequence[str]) -> Iterator[tuple[str, Tier | None]]:
    """How the run compares with an earlier one: what fails, then each figure where it became worse by most."""
    worse = [name for name, told in compared.regressions.items() if told]
    yield (
        f"against {printable(against, 1000)}: {len(worse)} of {len(compared.regressions)} layers are worse than allowed"
        + (f", {len(missing)} of its layers are missing" if missing else ""),
        Tier.FAIL if worse or missing else None,
    )
    for figure in FIGURES:
        worst = compared.worst(figure)
        if worst is not None:
            yield f"  largest change for the worse: {worst[1]} in {printable(worst[0])}", None


def start_lines(
    start: Start, file: Path, run: RunStats, trained: bool, every: bool
) -> Iterator[tuple[str, Tier | None]]:
    """What changed since the saved start: each quantity in the mean and in the layer where it changed by most.

    With ``every`` also each quantity in each layer.
    """
    wrong = [layer for layer in run.layers if any(start.check(layer, trained))]
    yield (
        f"against its start {printable(file, 1000)}, a saved run: variant {start.variant}, {start.decided}; "
        f"{len(wrong)} of {len(run.layers)} layers are not what training may make of it",
        Tier.FAIL if wrong else None,
    )
    moves = start.moves(run)
    for quantity in QUANTITIES:
        changes = [(name, move) for name, told in moves.items() for move in told if move.figure == quantity]
        if changes:
            before, now = (fmean(getattr(move, side) for _, move in changes) for side in ("before", "now"))
            name, most = max(changes, key=lambda pair: _size(pair[1]))
            yield f"  {Change(quantity, before, now, True)} in the mean; by most: {most} in {printable(name)}", None
    for name, told in moves.items() if every else ():
        yield f"  {printable(name)}: {'; '.join(map(str, told))}", None


def _size(change: Change) -> tuple[float, float]:
    """How large a change is, in whatever direction, to sort by; what is no number is the largest."""
    sizes = abs(change.share), abs(change.worsened)
    return (math.inf, math.inf) if math.isnan(sizes[1]) else sizes


def audit_lines(audited: Audit) -> Iterator[tuple[str, Tier | None]]:
    """What moved since training started, in all layers and outside them."""
    layers, of = audited.layers, len(audited.layers)
    yield (
        f"against its start {printable(audited.initial, 1000)}: variant {printable(audited.variant)}, "
        f"{printable(audited.decided)}",
        None,
    )
    down = [layer for layer in layers if not layer.down <= layer.tolerance]
    angle = max((layer.angle for layer in layers), default=0.0)
    base = sum(layer.base is not None and not layer.base <= layer.tolerance for layer in layers)
    yield (
        f"  B moved in {len(down)} of {of} layers, largest principal angle {angle:.3g}°; W_res changed in {base}; "
        f"A moved in {sum(layer.up != 0 for layer in layers)}",
        Tier.FAIL if base or (down and audited.variant == "v2") else None,
    )
    scales = Counter((layer.initial_scale, layer.scale) for layer in layers if layer.scale is not None)
    for (before, now), count in scales.items():
        told = f"was {before}" if before is not None else "the start has no such factor"
        changed = before is not None and before != now
        yield f"  scale {now}; {told} (in {count} of {of} layers)", Tier.FAIL if changed else None
    yield f"  {moved(audited)}", Tier.FAIL if audited.others else None


def diagnosis(causes: Sequence[Diagnosis]) -> Iterator[tuple[str, Tier | None]]:
    """Each cause with its evidence, its cure, what would tell it from the next likely one, and its page."""
    for cause in causes:
        yield f"diagnosis: {cause.cause}: {cause.evidence}", Tier.FAIL
        yield f"  cure: {cause.cure}", None
        yield f"  to tell it apart: {cause.apart}", None
        yield f"  more: {cause.page}", None


def moved(audited: Audit) -> str:
    """Which tensors outside the layers are not what they were, the farthest first."""
    others = sorted(audited.others, key=lambda other: (not math.isnan(other.change), -other.change))
    told = "; ".join(map(str, others[:MOVED_SHOWN])) + ("; …" if len(others) > MOVED_SHOWN else "")
    return f"{len(others)} of {audited.compared} tensors outside the layers moved" + (f": {told}" if told else "")


def _conditions(run: RunStats) -> str | None:
    try:
        seconds = run.about["measured"]["seconds"]
        of_task = f"task {_extent(run, 'task_dataset', 'task_text')}; " if run.has_task else ""
        return (
            f"{_extent(run, None, 'text')}; {of_task}{printable(run.about['device'])} {printable(run.about['dtype'])}; "
            f"loaded in {seconds['load']:.1f} s, pass {seconds['pass']:.1f} s{_backed_off(run)}"
        )
    except (KeyError, TypeError, ValueError, OverflowError):  # a file of another making may hold anything
        return None


def _backed_off(run: RunStats) -> str:
    asked, *halved = run.about["measured"].get("batch_sizes") or [1]
    return f"; no memory for {asked:d} windows a forward, so {halved[-1]:d}" if halved else ""


def _extent(run: RunStats, name: str | None, what: str) -> str:
    text = run.about[what]
    named = run.calib_dataset if name is None else run.about[name]
    return f"text {printable(named, 1000)}: {text['windows']:,} windows, {text['tokens']:,} tokens"


def _table(run: RunStats, verdicts: Sequence[Verdict]) -> Iterator[tuple[str, Tier | None]]:
    ordered = sorted(zip(run.layers, verdicts, strict=True), key=lambda pair: pair[1].severity, reverse=True)
    shown = ordered[:WORST_SHOWN]
    width = max(len(name) for name in ("average", *(printable(layer.name) for layer, _ in shown)))
    title = "worst layers" if len(ordered) > len(shown) else "layers"
    yield f"  {title:<{width}} " + "".join(f"{FIGURES[figure]:>20}" for figure in run.expected), None
    for layer, verdict in shown:
        yield _row(MARKS[verdict.tier], printable(layer.name), width, figures(layer, run.expected), verdict)
    yield _row(" ", "average", width, figures(run, run.expected), None)


def figures(of: LayerStats | RunStats, columns: Iterable[str]) -> list[str]:
    """Figures of a layer, or their averages over a run, as tables show them; a dash where one was not measured."""
    return [_shown(of, figure) for figure in columns]


def _shown(of: LayerStats | RunStats, figure: str) -> str:
    value = of.mean if isinstance(of, RunStats) else of.figure
    return "–" if figure in of.absent else f"{value(figure):.3e}"


def _row(mark: str, name: str, width: int, values: Sequence[str], verdict: Verdict | None) -> tuple[str, Tier | None]:
    line = f"{mark} {name:<{width}} " + "".join(f"{value:>20}" for value in values)
    if verdict is not None:
        line += "".join(f"  {fault}" for fault in _faults(verdict))
    return line, None if verdict is None or verdict.tier is Tier.PASS else verdict.tier


def _faults(verdict: Verdict) -> Sequence[str]:
    return verdict.faults if verdict.unjudged is None else [verdict.unjudged, *verdict.faults]


def reading(verdict: Verdict) -> Iterator[tuple[str, Tier | None]]:
    """What the verdict's figures mean, a line each."""
    if verdict.defect is not None:
        yield f"{MARKS[Tier.FAIL]} {verdict.defect}", Tier.FAIL
        return
    for finding in verdict.findings:
        figure = finding.threshold.figure
        unwanted = figure in _UNWANTED_WORDS and finding.threshold.lower_is_better
        words = (_UNWANTED_WORDS if unwanted else _WORDS)[figure][finding.tier]
        value = f"{finding.value:.2%}" if figure == "contribution" else f"{finding.value:.2e}"
        if figure == "leakage":
            words = words.format(against_chance=_against_chance(finding.value))
        yield f"{MARKS[finding.tier]} {FIGURES[figure]} {value} ({finding.threshold.bound}): {words}", finding.tier


def _against_chance(leakage: float) -> str:
    if not math.isfinite(leakage):
        return "not measurable against chance"
    if leakage > 1:
        return f"{leakage:.1f} times louder than a random subspace"
    return f"{1 / leakage:.3g} times quieter than a random subspace" if leakage else "perfectly quiet"


_WORDS = {
    "preservation": {
        Tier.PASS: "the null space is well kept; B is still approximately in it",
        Tier.WARN: "the null space is degraded, but acceptable",
        Tier.FAIL: "the null space is lost: B reads what this text uses; was B trained, or is this other data?",
    },
    "effectiveness": {
        Tier.PASS: "the adapter learned: A moved from zero to a meaningful value",
        Tier.WARN: "a small update; possibly under-fitted",
        Tier.FAIL: "nothing learned: A frozen by mistake, or the learning rate or the steps far too small",
    },
    "contribution": {
        Tier.PASS: "a clear effect on the output",
        Tier.WARN: "a small influence on the output",
        Tier.FAIL: "almost no influence on the output: rank, training time or learning rate too small",
    },
    "leakage": {
        Tier.PASS: "the adapter's input space is {against_chance}",
        Tier.WARN: "the adapter's input space is only {against_chance}",
        Tier.FAIL: "not a null space of this text: {against_chance}",
    },
    "forgetting": {
        Tier.PASS: "the preserved text is hardly changed",
        Tier.WARN: "the preserved text is changed noticeably; measure what the model still knows",
        Tier.FAIL: "the preserved text is changed much: expect the model to have forgotten",
    },
    "selectivity": {
        Tier.PASS: "the update acts on the task, and much less on what is to be preserved",
        Tier.WARN: "the update acts on the preserved text nearly as much as on the task",
        Tier.FAIL: "the update acts more on the preserved text than on the task",
    },
}
_UNWANTED_WORDS = {
    "effectiveness": {
        Tier.PASS: "no update yet, as it must be before training",
        Tier.WARN: "a small update already, although this is said to be the initial checkpoint",
        Tier.FAIL: "an update already: this is no initial checkpoint; drop --nullspace-stage=init",
    }
}


def layer_failure(layer: LayerStats, verdict: Verdict) -> str:
    """The message of a failed layer: the verdict first, then every figure with its bounds, then a reading."""
    norms = (
        f"mean norms over {layer.rows} rows: ||X|| {layer.input_norm:.6g}, ||BX|| {layer.down_norm:.6g}, "
        f"||ABX|| {layer.update_norm:.6g}, ||W_residual X|| {layer.base_norm:.6g}, ||output|| {layer.output_norm:.6g}"
    )
    return _failure(verdict, norms, _zero_update(verdict, "its A is" if layer.up_weight_norm == 0 else "A B x is"))


def model_failure(run: RunStats, verdict: Verdict) -> str:
    """The message of failed averages, likewise."""
    zero = "every A is" if all(layer.up_weight_norm == 0 for layer in run.layers) else "every A B x is"
    return _failure(verdict, f"averages over {len(run.layers)} layers", _zero_update(verdict, zero))


def _zero_update(verdict: Verdict, what: str) -> str | None:
    for finding in verdict.findings:
        if finding.threshold.figure == "effectiveness" and finding.tier is Tier.FAIL and finding.value == 0:
            return f"the update is exactly zero ({what} zero): with the adapter the output is the same as without"
    return None


def _failure(verdict: Verdict, measured: str, plainly: str | None) -> str:
    lines = [verdict.summary, *([] if plainly is None else [plainly]), "", measured]
    lines += [f"{MARKS[Tier.FAIL]} {fault}" for fault in verdict.faults]
    if verdict.defect is None:
        lines += [line for line, _ in reading(verdict)]
    return "\n".join(lines)
