"""From settings to what is gated: every checkpoint and saved run, and what can be refused before any test runs."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from pytest_nullspace.checkpoint import Checkpoint, open_checkpoint
from pytest_nullspace.checkpoint.header import quoted
from pytest_nullspace.checkpoint.hub import downloaded
from pytest_nullspace.errors import OptionError
from pytest_nullspace.measuring import inputs
from pytest_nullspace.measuring.inmemory import InMemory
from pytest_nullspace.measuring.loading import Bases, require_device
from pytest_nullspace.measuring.screening import require_plain, require_sharing
from pytest_nullspace.run.figures import FIGURES, OF_DOWN
from pytest_nullspace.settings import PREFIX, Settings, model_name
from pytest_nullspace.shell.replayed import SavedRun, require_no_down
from pytest_nullspace.shell.runs import CheckpointRun, GatedRun
from pytest_nullspace.shell.together import Together
from pytest_nullspace.text.readers import Text


def open_runs(settings: Settings, texts: dict[str, Text], live: InMemory | None = None) -> tuple[GatedRun, ...]:
    """Every checkpoint and every saved run that the settings name, read without torch.

    Args:
        settings: What is gated.
        texts: Holds the texts where they were read before the measurement.
        live: The one model, where it is in memory.

    Raises:
        CheckpointError: A directory is no checkpoint.
        StatsError: A file is no saved run.
        OptionError: The option ``layers`` matches no layer of one, or a bound would hold nothing.
    """
    bases: Bases = {}
    together = Together(settings, texts) if settings.screen else None
    if live is not None:
        models = [CheckpointRun(live.checkpoint, live.checkpoint.directory.name, settings, bases, texts, live)]
    else:
        models = [
            CheckpointRun(_opened(of, settings), model_name(of), settings, bases, texts, together=together)
            for of in settings.models
        ]
    runs = (*models, *(SavedRun(file, settings) for file in settings.stats))
    if settings.rank and not any(isinstance(run, CheckpointRun) and run.checkpoint.is_whole for run in runs):
        raise OptionError(
            f"{PREFIX}rank: {runs[0].path} has down projections of its own; the option is of merged and fully trained "
            "models, so leave it out"
        )
    _require_held(runs, settings)
    return runs


def check_inputs(runs: Sequence[GatedRun], settings: Settings, texts: dict[str, Text], *, look: bool) -> None:
    """Refuse texts, base models and tokenizers that cannot be read, before any test asks for the measurement.

    Args:
        runs: What is gated.
        settings: Which texts.
        texts: Takes the texts, so that they are not read again.
        look: Whether they are only looked for, as where tests are listed.

    Raises:
        CheckpointError: A base or a tokenizer cannot be read.
        TextError: A text cannot be read.
    """
    measured = [run for run in runs if isinstance(run, CheckpointRun)]
    if settings.screen and not look:
        require_sharing([run.checkpoint for run in measured], settings)
    for run in measured:
        for test in run.servers.tests:
            run.servers.outcome(test)
        if not look:
            run.check_merge()
    # Several processes must first meet, to fail together.
    if not measured or settings.weights_only or settings.ranks.size > 1:
        return
    inputs.sources(settings)
    if not look:
        require_device(settings)
    for run in measured:
        run.check_models(look=look)
    if not look:  # last, for it may take a while to have a text of the hub, or to learn that there is no network
        texts |= inputs.read_texts(settings)
        for run in measured:
            run.check_chat()
            run.check_processor()


def _require_held(runs: Sequence[GatedRun], settings: Settings) -> None:
    """Refuse the user's bounds against which nothing would be held in any of the runs."""
    for limit in settings.limits:
        lacking = [run.unmeasured(limit.figure) for run in runs]
        if None not in lacking:
            raise _not_measured("compare-fail", limit.figure, lacking[0])
    for override in settings.overrides:
        telling = [run for run in runs if override.figure in run.figures]
        if not telling:
            raise _not_measured("threshold", override.figure, runs[0].path)
        names = [name for run in telling for name in run.subjects(override.figure)]
        # The layers that a run in part does not tell of may be what a line is for.
        if all(run.tells_all for run in telling) and not any(map(override.names, names)):
            alike = {re.sub(r"\d+", "", name): name for name in reversed(names)}  # one of each block is enough
            line = f"{override.layers} {override.figure} {override.passes:g} {override.fails:g}"
            raise OptionError(
                f"nullspace_threshold: {quoted(line)} would never apply: it matches no test of "
                f"{', '.join(str(run.path) for run in telling)} that judges {override.figure}; the nearest are "
                f"{', '.join(get_close_matches(override.layers, alike.values(), cutoff=0))}; mend it or leave it out"
            )


def _not_measured(option: str, figure: str, where: Path | None) -> OptionError:
    record = FIGURES[figure]
    needs = (("drift", record.of_predictions), ("task-dataset", record.needs_task), ("rank=R", figure in OF_DOWN))
    by = " ".join(f"{PREFIX}{name}" for name, is_needed in needs if is_needed) or "this plugin"
    return OptionError(
        f"{PREFIX}{option}: {figure} is not measured of {where}; measure with {by}, or leave the bound out"
    )


def _opened(model: Path | str, settings: Settings) -> Checkpoint:
    directory = model if isinstance(model, Path) else downloaded(model, None, f"{PREFIX}model")
    checkpoint = open_checkpoint(directory, settings.base, settings.rank)
    if checkpoint.is_whole:
        _check_whole(checkpoint, settings)
    if settings.screen:
        require_plain(checkpoint)
    return checkpoint


def _check_whole(checkpoint: Checkpoint, settings: Settings) -> None:
    """Refuse what nothing tells of a whole model."""
    where, base = checkpoint.directory, f"its base, which {PREFIX}base names"
    if settings.weights_only:
        raise OptionError(f"{PREFIX}weights-only: {where} is a whole model without A and B to weigh; leave it out")
    if settings.init is not None:
        raise OptionError(f"{PREFIX}init: {where} is a whole model, and its start is {base}; leave the option out")
    if not settings.rank:
        require_no_down(where, settings)
