"""What is to be said of a run beside its figures, once, for every format."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import printable, quoted
from pytest_nullspace.judging.decision import Call, Decision
from pytest_nullspace.judging.invariants import Expectations
from pytest_nullspace.judging.profiles import WORDS, Profile
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.judging.weights import LayerWeights
from pytest_nullspace.report.words import colour, mark
from pytest_nullspace.run.figures import FIGURES, OF_DOWN, Text
from pytest_nullspace.run.predictions import Passage
from pytest_nullspace.run.stats import Drift, LayerStats, RunStats
from pytest_nullspace.run.texts import FIRST, drift_test, name_of, preserved

if TYPE_CHECKING:
    from pytest_nullspace.settings import Settings

OUTSIDE_SHOWN = 2
OTHERS_SHOWN = 3
QUOTED = 400
"""Characters of a text, as they are shown, on either side of a token whose prediction changed."""
_SELF = "--nullspace-calib-dataset=self"


def header(checkpoint: Checkpoint, gated: int, settings: "Settings", is_base_read: bool = True) -> Iterator[str]:
    """What will be gated, on which text, and what lies outside, before anything is loaded."""
    total = len(checkpoint.layers)
    layers = f"{total:,} layers" if gated == total else f"{gated:,} of {total:,} layers"
    yield (
        f"nullspace: {printable(checkpoint.directory, 1000)} ({checkpoint.format}, {layers}, {checkpoint.ranks}); "
        f"{_named(settings.text_name)} {printable(settings.calib_dataset, 1000)}, {windows_asked(settings)}; "
        f"device {settings.device}"
    )
    for text in settings.further:
        yield f"nullspace: {_named(text.name)} {printable(text.spec, 1000)}"
    if settings.task_dataset is not None:
        yield f"nullspace: task text {printable(settings.task_dataset, 1000)}"
    if not checkpoint.carries_base:
        base, how = (
            (settings.base, "--nullspace-base") if settings.base else (checkpoint.base, checkpoint.config_file.name)
        )
        yield f"nullspace: base model {printable(base or 'none', 1000)}, named by {how}"
    elif not is_base_read and settings.base:
        yield "nullspace: the base model is in the directory, so that of --nullspace-base is not read"
    if checkpoint.outside:
        yield f"nullspace: {outside(checkpoint.outside)}"
    yield from (f"nullspace: {remark}" for remark in checkpoint.remarks)


def _named(name: object) -> str:
    """How a text is announced, by its name if it has one."""
    return f"text {printable(name)}:" if name else "text"


def windows_asked(settings: "Settings") -> str:
    """How many windows are drawn of each text."""
    size = settings.calib_size
    return f"up to {settings.calib_most} windows" if size is None else f"{size} window{'s' if size > 1 else ''}"


_KINDS = (
    (r"\.lora_magnitude_vector(\.weight)?", "DoRA magnitudes"),
    (r"\.lora_B\.bias", "LoRA biases"),
    (r"\.lora_embedding_[AB]", "LoRA matrices of embeddings"),
    (r"\.experts\.\d+\..*\.lora_[AB]\.weight", "LoRA matrices of experts"),
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
    if run.has_no_down:
        return (
            f"no down projection: {' and '.join(OF_DOWN)} are not measured of a whole model, where not "
            "--nullspace-rank=R takes the R leading right singular vectors of each ΔW for one"
        )
    absent = [figure for figure in run.expected if figure in run.absent]
    return f"not measured: {', '.join(absent)}; left out of judging" if absent else None


def negative_scales(layers: Sequence[LayerStats] | Sequence[LayerWeights]) -> str | None:
    """Which layers' updates are turned round by their scale; None if there are none."""
    found = [layer for layer in layers if layer.scale is not None and layer.scale < 0]
    if not found:
        return None
    return (
        f"the scale is negative in {len(found):,} of {len(layers):,} layers, such as {printable(found[0].name)} "
        f"({found[0].scale:g}): what was trained is subtracted, as lora_alpha or alpha_pattern says"
    )


def profile(expectations: Expectations) -> str | None:
    """By what the run is judged, why, and how to say otherwise where that was guessed; None where nobody chose."""
    chosen = expectations.chosen
    if chosen is None:
        return None
    guessed = chosen.profile is Profile.LORA and not chosen.why.startswith(("as --", "a whole model"))
    other = "; if it should have one, use --nullspace-profile=nullspace" if guessed else ""
    return f"judged by {WORDS[chosen.profile]} (profile {chosen.profile}: {chosen.why}){other}"


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many tests of layers came to each tier, in other words than pytest counts its tests in."""
    tiers = [verdict.tier for verdict in verdicts if verdict.gated]
    words = {Tier.PASS: "green", Tier.WARN: "to look at", Tier.FAIL: "red"}
    return ", ".join(f"{tiers.count(tier):,} {word}" for tier, word in words.items())


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
    further = [f"{name_of(key)}: {of.get('given')}" for key, of in preserved(run.about).items() if key != FIRST]
    task = [f"task text {run.about.get('task_dataset')}"] if run.has_task else []
    return ", ".join([run.calib_dataset, *further, *task])


def best_possible(run: RunStats) -> Iterator[str]:
    """Where the adapter stands between chance and the best that any subspace could do, and what whole updates need."""
    yield from whole_updates(run)
    known = [(layer, layer.spectrum, layer.standing) for layer in run.layers]
    layers = [(layer, spectrum, standing) for layer, spectrum, standing in known if spectrum and standing is not None]
    if not layers:
        return
    least = median(spectrum.least_leakage / layer.chance for layer, spectrum, _ in layers)
    ranks = [spectrum.effective_rank for _, spectrum, _ in layers]
    shared = median(spectrum.shared for _, spectrum, _ in layers)
    worst, _, lowest = min(layers, key=lambda entry: entry[2])
    yield (
        f"best possible on this text: leakage {least:.3g} (median over layers); from chance (0) to that (1) "
        f"the adapter stands at {median(s for *_, s in layers):.3f}, lowest {lowest:.3f} in {printable(worst.name)}; "
        f"it shares {shared:.0%} of the best subspace; effective rank of inputs {min(ranks):.1f} to {max(ranks):.1f}"
    )


def whole_updates(run: RunStats) -> Iterator[str]:
    """The effective ranks of updates that are whole matrices; nothing of others."""
    ranks = {layer.name: layer.effective_rank for layer in run.layers if layer.effective_rank is not None}
    if not ranks:
        return
    values = list(ranks.values())
    most = max(ranks, key=ranks.__getitem__)
    yield (
        f"effective rank of ΔW: {min(values):.1f} to {max(values):.1f}, median {median(values):.1f}; the largest in "
        f"{printable(most)}"
    )


def drift(told: Drift, *verdicts: Verdict) -> Iterator[tuple[str, Tier | None]]:
    """What the adapter makes of the base model's predictions, a line for each text of ``verdicts`` that it has."""
    of = {verdict.subject: verdict for verdict in verdicts}
    texts = [(f"preserved text {name}".rstrip(), text, name, Text.PRESERVED) for name, text in told.texts.items()]
    texts += [("task text", told.task, told.name, Text.TASK)] if told.task is not None else []
    for what, text, name, kind in texts:
        if (verdict := of.get(drift_test(name))) is None:
            continue
        findings = [finding for finding in verdict.findings if FIGURES[finding.threshold.figure].text == kind]
        tier = Tier.worst(finding.tier for finding in findings) if findings else None
        judged = f": {', '.join(map(str, findings))}" if findings and verdict.gated else ""
        yield (
            (
                f"{' ' if tier is None else mark(verdict, tier)} drift on the {what}: loss {text.base_loss:.4g} → "
                f"{text.adapted_loss:.4g} ({text.loss_change:+.3g} ± {text.loss_margin:.2g} nats a token), divergence "
                f"{text.divergence:.3g} ± {text.divergence_margin:.2g}, over {text.tokens:,} tokens{judged}"
            ),
            None if tier is None else colour(verdict, tier),
        )
    for verdict in verdicts:
        yield from ((f"{mark(verdict)} {verdict.subject}: {fault}", colour(verdict)) for fault in verdict.faults)
    unjudged = "" if any(verdict.gated for verdict in verdicts) else "; no test judged this drift"
    yield f"  base: {printable(told.base, 1000)}{unjudged}", None


def passages(told: Drift) -> Iterator[str]:
    """Where the predictions on each preserved text changed most, so that one sees what was lost."""
    for name, text in told.texts.items():
        if text.passages:
            yield f"changed most on the preserved text{f' {printable(name)}' if name else ''}:"
        for of in text.passages:
            on = f"; the text goes on {quoted(of.after, QUOTED)}" if of.after else ""
            yield (
                f"  {place_of(of)}: after {quoted(of.before, QUOTED)} {quoted(of.token)} had probability {of.base:.2g} "
                f"and has {of.adapted:.2g}; likeliest was {quoted(of.likeliest)}, is {quoted(of.instead)} "
                f"(divergence {of.divergence:.2g}){on}"
            )


def place_of(passage: Passage) -> str:
    """Where in its text a passage stands."""
    if passage.row:
        return printable(passage.row, 200)
    if passage.end is None:
        return f"from character {passage.start:,} on"
    return f"characters {passage.start:,} to {passage.end:,}"


def conditions(run: RunStats) -> str | None:
    """On what text, where and how fast the run was measured; None where it does not tell."""
    try:
        seconds = run.about["measured"]["seconds"]
        of_task = f"task {_extent(run, 'task_dataset', 'task_text')}; " if run.has_task else ""
        further = (_extent(run, "given", key) for key in preserved(run.about) if key != FIRST)
        of_further = "".join(f"{told}; " for told in further)
        return (
            f"{_extent(run, None, 'text')}; {of_further}{of_task}"
            f"{printable(run.about['device'])} {printable(run.about['dtype'])}; "
            f"loaded in {seconds['load']:.1f} s, pass {_passed(seconds)}{_backed_off(run)}"
        )
    except (KeyError, TypeError, ValueError, OverflowError):  # a file of another making may hold anything
        return None


def measured_on(run: RunStats) -> str | None:
    """The same in few words: the texts stand in the header."""
    try:
        seconds = run.about["measured"]["seconds"]
        of = (*(preserved(run.about) or ["text"]), *(["task_text"] if run.has_task else []))
        tokens = " and ".join(f"{run.about[what]['tokens']:,}" for what in of)
        talks = _conversations(run.about[what] for what in of)
        place = f"{printable(run.about['device'])} {printable(run.about['dtype'])}"
        return (
            f"{tokens} tokens{talks}; {place}; loaded in {seconds['load']:.1f} s, pass {seconds['pass']:.1f} s"
            f"{_backed_off(run)}"
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def unread(run: RunStats, decision: Decision | None) -> str | None:
    """Of what a safe verdict says nothing, and how to have more checked; None where the base wrote a text already."""
    is_safe = decision is not None and decision.call is Call.SAFE and run.drift is not None
    if not is_safe or any("written" in entry for entry in preserved(run.about).values()):
        return None
    has_base = "update_against" not in run.about  # else none but another model could write
    return f"these texts alone were checked{f'; {_SELF} adds one' if has_base else ''}"


def _passed(seconds: Mapping[str, float]) -> str:
    """How long the pass took, and how much of it the base's predictions."""
    return f"{seconds['pass']:.1f} s" + (f" ({seconds['drift']:.1f} s for the base)" if "drift" in seconds else "")


def _backed_off(run: RunStats) -> str:
    asked, *halved = run.about["measured"].get("batch_sizes") or [1]
    return f"; no memory for {asked:d} windows a forward, so {halved[-1]:d}" if halved else ""


def _extent(run: RunStats, name: str | None, what: str) -> str:
    text = run.about[what]
    given = run.calib_dataset if name is None else text["given"] if name == "given" else run.about[name]
    named = _named(text["name"] if "name" in text else name_of(what))
    told = f"{named} {printable(given, 1000)}: {text['windows']:,} windows, {text['tokens']:,} tokens"
    return f"{told}{_written(text)}{_chat(text)}"


def _written(text: Mapping[str, Any]) -> str:
    """That the base wrote it, and what that cost; nothing of other texts."""
    if not isinstance(told := text.get("written"), Mapping):
        return ""
    return " (written by the base before)" if told["was_kept"] else f" (written by the base in {told['seconds']:.1f} s)"


def _chat(text: Mapping[str, Any]) -> str:
    """That it is of conversations, how many, and by which template; nothing of other texts."""
    if not isinstance(told := text.get("chat"), Mapping):
        return ""
    only = f"; figures of {told['counted_tokens']:,} tokens of the assistant alone" if told["assistant_only"] else ""
    return (
        f" ({told['conversations']:,} of {told['of']:,} conversations by the chat template "
        f"{printable(told['template_sha256'])[:12]}{only})"
    )


def _conversations(texts: Iterable[Mapping[str, Any]]) -> str:
    """That some of the texts are conversations, in a few words."""
    told = [of["chat"] for of in texts if isinstance(of.get("chat"), Mapping)]
    only = ", figures of the assistant's alone" if any(of["assistant_only"] for of in told) else ""
    return f" of conversations by the tokenizer's chat template{only}" if told else ""


_START_UP = ("text", "imports", "model", "windows")


def time_spent(run: RunStats) -> str | None:
    """Where the time of a measurement went; None where the run does not tell."""
    try:
        seconds = run.about["measured"]["seconds"]
        start = ", ".join(f"{what} {seconds[what]:.1f} s" for what in _START_UP)
        waited = f"waiting for the weights' hashes {seconds['hashes']:.1f} s"
        return f"start-up: {start}; measuring {seconds['pass']:.1f} s; {waited}"
    except (KeyError, TypeError, ValueError):
        return None
