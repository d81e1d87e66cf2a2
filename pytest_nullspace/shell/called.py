"""The gate without pytest: one call measures an adapter, judges it, and gives a report that a notebook shows."""

import html as escaping
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nullspace.errors import OptionError, quoted
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.invariants import Expectations, judge, verdicts_of
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.measuring import inputs
from pytest_nullspace.measuring.distributed import Ranks
from pytest_nullspace.measuring.inmemory import InMemory, in_memory
from pytest_nullspace.report import changes, html
from pytest_nullspace.report.page import Page
from pytest_nullspace.report.words import faults
from pytest_nullspace.run import saved
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.settings import PREFIX, Settings
from pytest_nullspace.shell import reports, values
from pytest_nullspace.shell.asked import meant, settings_of
from pytest_nullspace.shell.collect import FROZEN
from pytest_nullspace.shell.decided import decided, merge_failed
from pytest_nullspace.shell.opening import check_inputs, open_runs
from pytest_nullspace.shell.options import OPTIONS, Option
from pytest_nullspace.shell.runs import GatedRun
from pytest_nullspace.text.readers import Text

if TYPE_CHECKING:
    from peft import PeftModel

Texts = str | os.PathLike[str] | Sequence[str]
IN_MEMORY = "PeftModel"
"""What stands for a model in memory where a directory is asked for."""
_AS_IT_IS = ("device", "device-map", "dtype", "merge")
"""Options of how a model is loaded, or of its files, which mean nothing for one that is there."""
_NOT_HERE = ("model", "stats", "require", "report", "save-stats", "strict-scope", "weights-only", "card", "attest")
"""Options of a run of pytest that mean nothing here, or that `Report` stands for."""


@dataclass(frozen=True)
class Report:
    """What the gate found of one adapter.

    Attributes:
        run: All that was measured.
        expectations: What it was held against.
        decision: The verdict, and what decided.
        page: It as Markdown.
        sheet: What its page in HTML shows.
    """

    run: RunStats
    expectations: Expectations
    decision: Decision
    page: Page = field(repr=False)
    sheet: html.Sheet = field(repr=False)

    @property
    def verdict(self) -> str:
        """``SAFE``, ``LOOK``, ``DO NOT DEPLOY`` or ``NOT GATED``."""
        return str(self.decision.call)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """A row for each layer: its name, tier, figures and what is wrong with it; ``pandas.DataFrame`` takes it."""
        return [
            {"layer": layer.name, "tier": str(verdict.tier)}
            | {figure: layer.figure(figure) for figure in self.run.expected if figure not in layer.absent}
            | {"why": verdict.summary if verdict.tier != "pass" else "; ".join(faults(verdict))}
            for layer in self.run.layers
            for verdict in [judge(layer, self.expectations)]
        ]

    def html(self) -> str:
        """The report as one page."""
        return html.page([self.sheet])

    def markdown(self) -> str:
        """The report as Markdown."""
        return self.page.whole

    def save(self, file: str | os.PathLike[str]) -> None:
        """Save what was measured, as ``--nullspace-save-stats`` does.

        Raises:
            StatsError: It cannot be written.
        """
        saved.write(self.run, Path(file), self.decision.to_dict())

    def __str__(self) -> str:
        """The verdict in a sentence."""
        return f"{self.verdict}: {self.decision.sentence}"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, whose style and script touch nothing else of a notebook."""
        page = escaping.escape(self.html())
        return f'<iframe srcdoc="{page}" width="100%" height="700" style="border:0" title="{self.verdict}"></iframe>'


def gate(
    model: "str | os.PathLike[str] | PeftModel",
    preserved: Texts = "wikitext2",
    task: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> Report:
    """Measure an adapter and judge it, as ``pytest --nullspace-model=DIR`` does.

    A model in memory is measured where and as it is, under its active adapter, and left as it was: its modules and
    their hooks and modes, what requires a gradient and the gradients, and the state of chance.

    Args:
        model: The adapter's directory, its id on the hub, or a ``peft.PeftModel`` in memory.
        preserved: The text that must survive, as ``--nullspace-calib-dataset`` takes it; a list for several.
        task: The text of what was learned, as ``--nullspace-task-dataset`` takes it.
        tokenizer: Of a model in memory: its tokenizer, or the directory of it; by default that of its base.
        **options: The other options by their names, such as ``calib_size=32``, ``device="cuda"``, ``drift=True``; one
            that may be given several times takes a list. `docs/options.md` has them all.

    Returns:
        The verdict, and all that was measured.

    Raises:
        NullspaceError: What cannot be gated, with what to do; ``OptionError`` for a value that an option does not take.
    """
    if isinstance(model, str | os.PathLike):
        if tokenizer is not None:
            raise OptionError("gate: tokenizer is of a model in memory; a directory's lies in it, or in base=")
        return _reported(asked(model, preserved, task, options), {})
    return of_model(model, tokenizer, asked(IN_MEMORY, preserved, task, options), {})


def asked(
    model: str | os.PathLike[str], preserved: Texts, task: str | os.PathLike[str] | None, options: Mapping[str, Any]
) -> Settings:
    """The settings that the arguments of `gate` make.

    Raises:
        OptionError: There is no such option, or one does not take its value.
    """
    given: dict[str, Any] = {"model": [model], "calib-dataset": preserved}
    if task is not None:
        given["task-dataset"] = task
    for name, value in options.items():
        given[name.replace("_", "-")] = value
    known = {option.name: option for option in OPTIONS}
    if "screen" in given:
        raise OptionError(f"gate: takes one adapter, and screen several; run pytest {PREFIX}screen")
    unknown = next((name for name in given if name not in known or (name != "model" and name in _NOT_HERE)), None)
    if unknown is not None:
        word = None if unknown in known else meant(unknown, (known[name] for name in known if name not in _NOT_HERE))
        hint = f" (did you mean {word.replace('-', '_')}?)" if word else ""
        raise OptionError(f"gate: takes no option {quoted(unknown.replace('-', '_'))}{hint}; see docs/options.md")
    fixed = next((name for name in given if model is IN_MEMORY and name in _AS_IT_IS), None)
    if fixed == "merge":
        raise OptionError("gate: a merge is told of files; save the model by save_pretrained, and gate its directory")
    if fixed is not None:
        raise OptionError(
            f"gate: a model in memory is measured where and as it is; leave {fixed.replace('-', '_')} out"
        )
    return settings_of({name: _read(option, given.get(name)) for name, option in known.items()}, Path.cwd())


def texts_of(settings: Settings) -> dict[str, Text]:
    """The texts that the settings name, read once for several measurements.

    Raises:
        TextError: One cannot be had.
    """
    return dict(inputs.read_texts(settings))


def of_model(model: Any, tokenizer: Any, settings: Settings, texts: dict[str, Text]) -> Report:
    """What the gate finds of a model in memory.

    Args:
        model: The model, which may be wrapped for training.
        tokenizer: Its tokenizer, or the directory of it; that of its base if None.
        settings: As `asked` for.
        texts: The texts, where they were read before; takes them where they were not.

    Raises:
        NullspaceError: It cannot be gated.
    """
    settings = replace(settings, ranks=Ranks())  # each process holds the whole adapter
    with in_memory(model, tokenizer, settings.base) as live:
        return _reported(settings, texts, live)


def _reported(settings: Settings, texts: dict[str, Text], live: InMemory | None = None) -> Report:
    (run,) = open_runs(settings, texts, live)
    if not texts:
        check_inputs([run], settings, texts, look=False)
    run.selected, run.drift_selected = set(run.gated), set(run.drift_tests)
    run.merges_selected = set(run.merge_tests)
    outcome = run.measured()
    failed = _failed(run, outcome)
    expectations, decision = run.expectations(outcome), decided(run, failed)
    told = reports.Told(run, outcome, decision, "", failed)
    sheet = reports.sheet(told, expectations, len(outcome.layers))
    return Report(reports.diagnosed(run, outcome), expectations, decision, reports.page(told), sheet)


def _failed(run: GatedRun, outcome: RunStats) -> dict[str, str]:
    """The tests that fail, as in a run of pytest, each with what it would say."""
    found = verdicts_of(outcome, run.expectations(outcome))
    failed = {verdict.subject: verdict.summary for verdict in found if verdict.tier is Tier.FAIL}
    audited = run.against.told(outcome).audit
    if audited is not None and audited.others:
        failed[FROZEN] = changes.moved(audited)
    failed |= merge_failed(run, outcome) | run.servers.failed()
    return failed | dict.fromkeys(run.against.missing, "the earlier run has this layer, and the adapter has not")


def _read(option: Option, value: Any) -> Any:
    """One option as the command line would have it."""
    if value is None or (value is False and option.switch and option.off is None):
        return () if option.repeatable else option.default
    listed = value if option.repeatable and isinstance(value, (list, tuple)) else [value]
    found = []
    for one in listed:
        text = os.fspath(one) if isinstance(one, os.PathLike) else str(one)
        text = text.lower() if isinstance(one, bool) else text
        try:
            found.append(option.read(values.Given(text, Path.cwd(), False)))
        except OptionError as error:
            raise OptionError(f"{option.name.replace('-', '_')}: {error} ({PREFIX}{option.name})") from None
    return tuple(found) if option.repeatable else found[0]
