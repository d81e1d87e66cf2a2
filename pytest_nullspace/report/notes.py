"""What is to be said of a run beside its figures, once, for every format."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging.invariants import MODEL, Expectations, judge_averages, judge_drift
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.judging.weights import LayerWeights
from pytest_nullspace.report.words import colour, mark
from pytest_nullspace.run.figures import FIGURES, Text
from pytest_nullspace.run.stats import SINK, Drift, LayerStats, RunStats
from pytest_nullspace.run.uncertainty import MOST_WINDOWS, windows_needed

if TYPE_CHECKING:
    from pytest_nullspace.settings import Settings

OUTSIDE_SHOWN = 2
OTHERS_SHOWN = 3
SINKS_TOLD = 0.05
"""Of mean ``‖x‖``: sink rows of a layer that carry less are not told where they decide nothing."""


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


def outside_of(run: RunStats) -> list[str]:
    """The trained tensors that no layer test covers, as the run's file names them."""
    names = run.about.get("outside")  # a file of another making may hold anything
    return [str(name) for name in names] if isinstance(names, list) else []


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


def negative_scales(layers: Sequence[LayerStats] | Sequence[LayerWeights]) -> str | None:
    """Which layers' updates are turned round by their scale; None if there are none."""
    found = [layer for layer in layers if layer.scale is not None and layer.scale < 0]
    if not found:
        return None
    return (
        f"the scale is negative in {len(found)} of {len(layers)} layers, such as {printable(found[0].name)} "
        f"({found[0].scale:g}): what was trained is subtracted, as lora_alpha or alpha_pattern says"
    )


def left_out(expectations: Expectations) -> str | None:
    """Which figures are shown and were not judged, and why; None if all were."""
    if not expectations.left_out:
        return None
    named = ", ".join(FIGURES[figure].symbol for figure in expectations.left_out)
    return (
        f"not judged: {named}, as plain LoRA (--nullspace-variant={expectations.variant}) promises no null space; "
        "a small ||BX||/||X|| alone is none"
    )


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many tests of layers came to each tier."""
    tiers = [verdict.tier for verdict in verdicts if verdict.gated]
    words = {Tier.PASS: "passed", Tier.WARN: "warned", Tier.FAIL: "failed"}
    return ", ".join(f"{tiers.count(tier)} {word}" for tier, word in words.items())


def ungated(verdicts: Sequence[Verdict], expectations: Expectations) -> str | None:
    """How many layers are shown that no test judged, and what would have become of them; None if there are none."""
    left = [verdict for verdict in verdicts if not verdict.gated]
    if not left:
        return None
    failing = sorted((v for v in left if v.tier is Tier.FAIL), key=lambda verdict: verdict.severity, reverse=True)
    such = f", such as {printable(failing[0].subject)} ({failing[0].summary})" if failing else ""
    judged = [printable(name) for name in sorted(expectations.judged or ["nothing"])[:OTHERS_SHOWN]]
    alone = "" if len(left) < len(verdicts) else f"judged: {' and '.join(judged)} alone; "
    return (
        f"{alone}the tests of {len(left)} measured layers were left out or not run, and "
        f"{len(failing) or 'none'} of them would have failed{such}"
    )


def texts(run: RunStats) -> str:
    """On which text, or texts, the run was measured."""
    task = run.about.get("task_dataset")
    return run.calib_dataset if not run.has_task else f"{run.calib_dataset}, task text {task}"


def sinks(verdicts: Sequence[Verdict], run: RunStats) -> str | None:
    """How much of a layer's mean norms a few rows carry, and which verdicts they decide; None if it is little."""
    if any(layer.without_sinks is None for layer in run.layers):
        return "sink rows: this run does not tell of them, so a few rows may decide its ratios"
    texts = (("", layer) for layer in run.layers), ((" on the task text", layer.task) for layer in run.layers)
    found = [(on, layer) for of in texts for on, layer in of if layer is not None and layer.sinks]
    decided = [(v.subject, f) for v in verdicts if v.unjudged is None for f in v.findings if f.decided_by_sinks]
    where, most = max(found, key=lambda pair: pair[1].sink_share, default=("", None))
    if most is None or (most.sink_share < SINKS_TOLD and not decided):
        return None
    without = ", and ".join(
        f"{FIGURES[figure].symbol} is {most.figure(figure, sinks=False):.3g}, not {most.figure(figure):.3g}"
        for figure in ("preservation", "forgetting")
    )
    told = (
        f"sink rows: {len({layer.name for _, layer in found})} of {len(run.layers)} layers have rows beyond {SINK} "
        f"times the median norm, such as {printable(most.name)}{where}: {most.sinks:,} of {most.rows:,} rows carry "
        f"{most.sink_share:.1%} of mean ||X||, and without them {without}"
    )
    if not decided:
        return told
    name, finding = max(decided, key=lambda pair: pair[1].badness)
    layers = len({subject for subject, _ in decided})
    return f"{told}; they decide the verdict on {layers} of {len(verdicts)}, such as {printable(name)} ({finding})"


def uncertain(verdicts: Sequence[Verdict], run: RunStats, expectations: Expectations) -> str | None:
    """How many verdicts more text might change, and how much text would settle them; None if there are none.

    Of the layers and their averages; `uncertain_drift` tells of the predictions.
    """
    verdicts = [verdict for verdict in verdicts if verdict.gated]
    averages = [judge_averages(run, expectations)] if run.complete and expectations.gates(MODEL) else []
    findings = [(v.subject, f) for v in verdicts if v.unjudged is None for f in v.findings if f.uncertain]
    layers = {subject for subject, _ in findings}
    of_averages = [(v.subject, f) for v in averages if v.unjudged is None for f in v.findings if f.uncertain]
    subjects = [f"{len(layers)} of {len(verdicts)} layers"] if layers else []
    subjects += ["the averages"] if of_averages else []
    findings = findings or of_averages
    if not findings:
        return None
    told = f"uncertain: more text might change the verdict on {' and '.join(subjects)}"
    drawn = {finding.threshold.figure: _windows(run, finding.threshold.figure) for _, finding in findings}
    fewest = min(drawn.values())
    if not fewest:
        return told
    if fewest == 1:
        return f"{told}; {_ONE_WINDOW}"
    needed = [
        windows_needed(drawn[f.threshold.figure], f.margin, f.distance) for _, f in findings if f.margin is not None
    ]
    half = median([n for n in needed if n is not None] or drawn.values())
    name, finding = max(findings, key=lambda pair: pair[1].badness)
    return (
        f"{told}, such as {printable(name)} ({finding.threshold.figure} {finding.value:.3g} ± {finding.margin:.2g}); "
        f"about {half:.0f} windows would settle half of them"
        + (", so raise N in --nullspace-calib-size=auto:N" if _is_auto(run) else ", or try --nullspace-calib-size=auto")
    )


_ONE_WINDOW = "one window tells nothing of how the figures vary, so draw more by --nullspace-calib-size"


def uncertain_drift(run: RunStats, expectations: Expectations) -> str | None:
    """Which figures of the drift more text might put into another tier, and how much would settle them, if any."""
    verdict = None if run.drift is None else judge_drift(run.drift, expectations)
    findings = [f for f in verdict.findings if f.uncertain] if verdict is not None and verdict.gated else []
    if not findings:
        return None
    figures = ", ".join(f"{f.threshold.figure} {f.value:.2g} ± {f.margin:.2g}: {f.threshold.bound}" for f in findings)
    told = f"uncertain: more text might change the verdict on the drift ({figures})"
    drawn = [_windows(run, finding.threshold.figure) for finding in findings]
    if not min(drawn):
        return told
    if min(drawn) == 1:
        return f"{told}; {_ONE_WINDOW}"
    needed = [
        windows_needed(windows, finding.margin, finding.distance)
        for windows, finding in zip(drawn, findings, strict=True)
        if finding.margin is not None
    ]
    known = [count for count in needed if count is not None]
    # The drift is taken after the pass, which alone decides when a text was drawn from enough.
    late = "; --nullspace-calib-size=auto does not wait for the drift, so give a number" if _is_auto(run) else ""
    if len(known) < len(needed):
        return f"{told}; no text would settle what lies on its bound{late}"
    return f"{told}; about {max(known):,} windows would settle it{late}"


def _is_auto(run: RunStats) -> bool:
    """Whether windows were drawn until every verdict on a layer was settled."""
    settings = run.about.get("settings")
    return isinstance(settings, dict) and settings.get("calib_size", 0) is None


def _windows(run: RunStats, figure: str) -> int:
    """How many windows were drawn of the text on which ``figure`` is judged; 0 where no credible number was told."""
    has_task = run.has_task or (run.drift is not None and run.drift.task is not None)
    recorded = run.about.get("task_text" if has_task and FIGURES[figure].text is not Text.PRESERVED else "text")
    windows = recorded.get("windows") if isinstance(recorded, dict) else None
    # A file of another making may hold anything.
    return windows if isinstance(windows, int) and 0 < windows <= MOST_WINDOWS else 0


def doubts(verdicts: Sequence[Verdict], run: RunStats, expectations: Expectations) -> Iterator[str]:
    """What keeps the figures from being trusted as they stand."""
    told = uncertain(verdicts, run, expectations), uncertain_drift(run, expectations), few_rows(run), repeated(run)
    first = without_scale(run), other_tokenizer(run), sinks(verdicts, run)
    yield from (doubt for doubt in (*first, *told) if doubt is not None)


def without_scale(run: RunStats) -> str | None:
    """That the norm of A is not the one that is saved today; None if it is."""
    if run.about.get("A_weight_norm") is None:
        return None
    return "||A||_F: saved by an earlier version, and so without the adapter's scale; the figures are not concerned"


def other_tokenizer(run: RunStats) -> str | None:
    """That the adapter's tokenizer makes other ids of the text than its base's; None if not, or if nobody told."""
    told = run.about.get("tokenizer")  # a file of another making may hold anything
    if not isinstance(told, dict):
        return None
    if isinstance(unread := told.get("base_unread"), str):
        return (
            "tokenizer: the adapter's own is another than its base's, which could not be held against it: "
            f"{printable(unread, 300)}; if it is an older copy, remove its files from the adapter's directory"
        )
    differ, windows, first = (told.get(what) for what in ("windows_differ", "windows", "first_difference"))
    if not isinstance(differ, int) or differ < 1 or not isinstance(first, dict):
        return None
    ids = [printable("nothing" if first.get(who) is None else first[who]) for who in ("id", "base_id")]
    return (
        f"tokenizer: the adapter's own, which was taken, gives other ids than its base's in {differ} of "
        f"{printable(windows)} windows: first at token {printable(first.get('token'))} {ids[0]}, where the base's "
        f"gives {ids[1]}; if the adapter was trained with the base's, remove the older copy from its directory"
    )


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
    rows = {layer.name: _distinct(layer, new) for layer in run.layers}
    short = [layer for layer in run.layers if 0 < rows[layer.name] < layer.in_features]
    if not short:
        return None
    layer = min(short, key=lambda layer: rows[layer.name] / layer.in_features)
    return (
        f"too few rows: {len(short)} of {len(run.layers)} layers are wider than their distinct rows are many, such as "
        f"{printable(layer.name)} ({rows[layer.name]:,.0f} distinct rows in a width of {layer.in_features:,}); so few "
        "rows leave some subspace perfectly quiet on any text, so leakage says little there; "
        f"{_enough(run, layer, new)}"
    )


def _distinct(layer: LayerStats, new: float) -> float:
    """How many rows of ``layer`` are not, or almost, another one again; ``new`` is the share of such tokens."""
    apart = layer.rows * new
    return apart if layer.distinct_rows is None else min(apart, layer.distinct_rows)


def _enough(run: RunStats, layer: LayerStats, new: float) -> str:
    """What would give ``layer`` as many distinct rows as it is wide, where the share ``new`` of tokens is."""
    settings, text, rows = run.about.get("settings"), run.about.get("text"), _distinct(layer, new)
    if 2 * rows < layer.rows * new:
        return (
            "its rows repeat, as those do that hold a token without its context: give a text of more different tokens"
        )
    if isinstance(settings, dict) and settings.get("max_activation_samples") == layer.rows:
        most = math.ceil(layer.in_features * layer.rows / rows)
        return f"--nullspace-max-activation-samples={most} would be enough, or leave it out"
    windows = text.get("windows") if isinstance(text, dict) else None
    if not isinstance(windows, int):
        return "measure on more text"
    return f"about {math.ceil(windows * layer.in_features / rows):,} windows as long and as new would be enough"


def _tokens(run: RunStats) -> tuple[int, int]:
    """How many tokens the preserved text had, and how many of them were new; zeros where nobody told."""
    text = run.about.get("text")  # a file of another making may hold anything
    counts = [text.get(what) for what in ("tokens", "distinct")] if isinstance(text, dict) else []
    known = [count for count in counts if isinstance(count, int) and count > 0]
    return (known[0], known[1]) if len(known) == 2 else (0, 0)


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


def drift(told: Drift, verdict: Verdict) -> Iterator[tuple[str, Tier | None]]:
    """What the adapter makes of the base model's predictions, a line for each text with what is judged on it."""
    for name, text in (("preserved", told.preserved), ("task", told.task)):
        if text is None:
            continue
        findings = [finding for finding in verdict.findings if FIGURES[finding.threshold.figure].text == name]
        tier = Tier.worst(finding.tier for finding in findings) if findings else None
        judged = f": {', '.join(map(str, findings))}" if findings and verdict.gated else ""
        yield (
            (
                f"{' ' if tier is None else mark(verdict, tier)} drift on the {name} text: loss {text.base_loss:.4g} → "
                f"{text.adapted_loss:.4g} ({text.loss_change:+.3g} ± {text.loss_margin:.2g} nats a token), divergence "
                f"{text.divergence:.3g} ± {text.divergence_margin:.2g}, over {text.tokens:,} tokens{judged}"
            ),
            None if tier is None else colour(verdict, tier),
        )
    yield f"  base: {printable(told.base, 1000)}{'' if verdict.gated else '; no test judged this drift'}", None


def conditions(run: RunStats) -> str | None:
    """On what text, where and how fast the run was measured; None where it does not tell."""
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


_START_UP = ("text", "imports", "model", "windows")


def time_spent(run: RunStats) -> str | None:
    """Where the time of a measurement went; None where the run does not tell."""
    try:
        seconds = run.about["measured"]["seconds"]
        start = ", ".join(f"{what} {seconds[what]:.1f} s" for what in _START_UP)
        return f"start-up: {start}; measuring {seconds['pass']:.1f} s; hashing the weights {seconds['hashes']:.1f} s"
    except (KeyError, TypeError, ValueError):
        return None
