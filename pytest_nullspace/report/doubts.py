"""What keeps the figures of a run from being trusted as they stand, once, for every format."""

import math
from collections.abc import Iterator, Sequence
from statistics import median

from pytest_nullspace.checkpoint.header import printable
from pytest_nullspace.judging import scarce
from pytest_nullspace.judging.invariants import MODEL, Expectations, judge_averages, judge_drifts
from pytest_nullspace.judging.verdicts import Verdict
from pytest_nullspace.report import model, notes
from pytest_nullspace.run.figures import FIGURES, Text
from pytest_nullspace.run.stats import SINK, LayerStats, RunStats
from pytest_nullspace.run.texts import FIRST, called, key_of
from pytest_nullspace.run.uncertainty import MOST_WINDOWS, windows_needed

FEW_ROWS = "too few rows"
ON_DRIFT = "uncertain: more text might change the verdict on the drift"
SINKS_TOLD = 0.05
"""Of mean ``‖x‖``: sink rows of a layer that carry less are not told where they decide nothing."""


def sinks(verdicts: Sequence[Verdict], run: RunStats) -> str | None:
    """How much of a layer's mean norms a few rows carry, and which verdicts they decide; None if it is little."""
    if any(layer.without_sinks is None for layer in run.layers):
        return "sink rows: this run does not tell of them, so a few rows may decide its ratios"
    texts = [("", run.layers), (" on the task text", [layer.task for layer in run.layers])]
    texts += [(f" on the text {name}", of.layers) for name, of in run.on_further.items()]
    found = [(on, layer) for on, of in texts for layer in of if layer is not None and layer.sinks]
    decided = [(v.subject, f) for v in verdicts if v.unjudged is None for f in v.findings if f.decided_by_sinks]
    where, most = max(found, key=lambda pair: pair[1].sink_share, default=("", None))
    if most is None or (most.sink_share < SINKS_TOLD and not decided):
        return None
    without = ", and ".join(
        f"{figure} is {most.figure(figure, sinks=False):.3g}, not {most.figure(figure):.3g}"
        for figure in ("preservation", "forgetting")
        if figure not in most.without
    )
    told = (
        f"sink rows: {len({layer.name for _, layer in found}):,} of {len(run.layers):,} layers have rows beyond {SINK} "
        f"times the median norm, such as {printable(most.name)}{where}: {most.sinks:,} of {most.rows:,} rows carry "
        f"{most.sink_share:.1%} of the mean norm, and without them {without}"
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
    subjects = [f"{len(layers):,} of {len(verdicts):,} layers"] if layers else []
    subjects += ["the averages"] if of_averages else []
    findings = findings or of_averages
    if not findings:
        return None
    told = f"uncertain: more text might change the verdict on {' and '.join(subjects)}"
    drawn = [_windows(run, f.threshold.figure, _worst(run, name, f.threshold.figure)) for name, f in findings]
    fewest = min(drawn)
    if not fewest:
        return told
    if fewest == 1:
        return f"{told}; {_ONE_WINDOW}"
    pairs = zip(drawn, findings, strict=True)
    needed = [windows_needed(windows, f.margin, f.distance) for windows, (_, f) in pairs if f.margin is not None]
    half = median([n for n in needed if n is not None] or drawn)
    name, finding = max(findings, key=lambda pair: pair[1].badness)
    return (
        f"{told}, such as {printable(name)} ({finding.threshold.figure} {finding.value:.3g} ± {finding.margin:.2g}); "
        f"about {half:.0f} windows would settle half of them{_draw_more(run)}"
    )


def _draw_more(run: RunStats) -> str:
    """How more are drawn, of a run whose windows were drawn until every verdict was settled or were given."""
    return ", so raise N in --nullspace-calib-size=auto:N" if _is_auto(run) else ", or try --nullspace-calib-size=auto"


_ONE_WINDOW = "one window tells nothing of how the figures vary, so draw more by --nullspace-calib-size"


def uncertain_drift(run: RunStats, expectations: Expectations) -> str | None:
    """Which figures of the drift more text might put into another tier, and how much would settle them, if any."""
    verdicts = [verdict for verdict in judge_drifts(run, expectations) if verdict.gated]
    found = [(verdict.subject, f) for verdict in verdicts for f in verdict.findings if f.uncertain]
    findings = [finding for _, finding in found]
    if not findings:
        return None
    figures = ", ".join(
        f"{''.join(f'{name} ' for name in called(test)[1:])}{f.threshold.figure} {f.value:.2g} ± {f.margin:.2g}: "
        f"{f.threshold.bound}"
        for test, f in found
    )
    told = f"{ON_DRIFT} ({figures})"
    drawn = [_windows(run, f.threshold.figure, "".join(called(test)[1:])) for test, f in found]
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
    if len(known) < len(needed):
        return f"{told}; no text would settle what lies on its bound"
    return f"{told}; about {max(known):,} windows would settle it{_draw_more(run)}"


def _is_auto(run: RunStats) -> bool:
    """Whether windows were drawn until every verdict was settled."""
    settings = run.about.get("settings")
    return isinstance(settings, dict) and settings.get("calib_size", 0) is None


def _worst(run: RunStats, layer: str, figure: str) -> str:
    """The further text on which that layer is judged by ``figure``; empty for the first, and for averages."""
    found = run.layer(layer)
    return "" if found is None else found.worst_on(figure)


def _windows(run: RunStats, figure: str, text: str = "") -> int:
    """How many windows were drawn of the text on which ``figure`` is judged; 0 where no credible number was told.

    Of a preserved text but the first ``text`` is the name.
    """
    has_task = run.has_task or (run.drift is not None and run.drift.task is not None)
    key = key_of(text) if key_of(text) in run.about else FIRST
    recorded = run.about.get("task_text" if has_task and FIGURES[figure].text is not Text.PRESERVED else key)
    windows = recorded.get("windows") if isinstance(recorded, dict) else None
    # A file of another making may hold anything.
    return windows if isinstance(windows, int) and 0 < windows <= MOST_WINDOWS else 0


def cautions(run: RunStats, verdicts: Sequence[Verdict]) -> list[str]:
    """What lies outside of what was judged, and what is unusual in it."""
    names = notes.outside_of(run)
    told = notes.not_measured(run), notes.negative_scales(run.layers), notes.outside(names) if names else None
    unreached = model.unreached(verdicts, saw=model.saw(run))
    return [line for line in (*told, *model.remarks(run), *unreached) if line is not None]


def all_of(verdicts: Sequence[Verdict], run: RunStats, expectations: Expectations) -> Iterator[str]:
    """What keeps the figures from being trusted as they stand."""
    judged = {finding.threshold.figure for verdict in verdicts for finding in verdict.findings}
    few = few_rows if "leakage" in judged else lambda _: None  # it is leakage that few rows blur
    told = uncertain(verdicts, run, expectations), uncertain_drift(run, expectations), few(run), repeated(run)
    of_text = other_tokenizer(run), no_first_token(run)
    first = without_drift(run), without_scale(run), *of_text, sinks(verdicts, run)
    yield from (doubt for doubt in (*first, *told) if doubt is not None)
    for name, of in run.on_further.items():
        yield from (f"on the text {name}: {doubt}" for doubt in (few(of), repeated(of)) if doubt is not None)


def without_drift(run: RunStats) -> str | None:
    """Why no drift was measured, where nobody had left it out; None if it was."""
    return None if run.without_drift is None else f"drift not measured: {printable(run.without_drift, 1000)}"


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


def no_first_token(run: RunStats) -> str | None:
    """That the tokenizer does not put the token before a text by which the base reads it; None if not, or untold."""
    told = run.about.get("first_token")  # a file of another making may hold anything
    if not isinstance(told, dict):
        return None
    token, *losses = (told.get(what) for what in ("id", "base_loss", "base_loss_behind"))
    if not isinstance(token, int) or not all(isinstance(loss, float) for loss in losses):
        return None
    return (
        f"tokenizer: it does not begin a text with the token {token}, bos_token_id of the config, without which the "
        f"base's loss is {losses[0]:.3g} and behind which it is {losses[1]:.3g}: every figure is of a text that the "
        "model cannot read so well; save the base's own tokenizer, which adds it, or give conversations to a model of "
        "chat, whose template writes it"
    )


def repeated(run: RunStats) -> str | None:
    """How much of the preserved text repeats, where that is a tenth or more; None if it is less, or nobody told."""
    tokens, distinct = scarce.tokens_of(run)
    if 10 * (tokens - distinct) < tokens or not tokens:
        return None
    return (
        f"repeated text: only {distinct:,} of {tokens:,} tokens are new, the others repeat a stretch of the windows "
        "before them, so the margins are larger than told; give a longer text, or one that does not repeat itself"
    )


def few_rows(run: RunStats) -> str | None:
    """How many layers are wider than their rows are many, and what would be enough; None if there are none."""
    short = scarce.few_rows(run)
    if not short:
        return None
    rows = {layer.name: scarce.distinct_rows(run, layer) for layer in short}
    layer = min(short, key=lambda layer: rows[layer.name] / layer.in_features)
    return (
        f"{FEW_ROWS}: leakage proves little in {len(short):,} of {len(run.layers):,} layers, such as "
        f"{printable(layer.name)} ({rows[layer.name]:,.0f} distinct rows in a width of {layer.in_features:,}): fewer "
        "different rows than a layer is wide leave some space of it quiet by themselves, whatever the adapter does; "
        f"{_enough(run, layer)}"
    )


def _enough(run: RunStats, layer: LayerStats) -> str:
    """What would give ``layer`` as many distinct rows as it is wide."""
    settings, text, rows = run.about.get("settings"), run.about.get("text"), scarce.distinct_rows(run, layer)
    tokens, distinct = scarce.tokens_of(run)
    if 2 * rows < layer.rows * (distinct / tokens if tokens else 1.0):
        return (
            "its rows repeat, as those do that hold a token without its context: give a text of more different tokens"
        )
    if isinstance(settings, dict) and settings.get("max_activation_samples") == layer.rows:
        most = math.ceil(layer.in_features * layer.rows / rows)
        return f"--nullspace-max-activation-samples={most} would be enough, or leave it out"
    windows = text.get("windows") if isinstance(text, dict) else None
    if not isinstance(windows, int):
        return "measure on more text"
    needed = math.ceil(windows * layer.in_features / rows)
    return f"about {needed:,} such windows would be enough (--nullspace-calib-size={needed})"
