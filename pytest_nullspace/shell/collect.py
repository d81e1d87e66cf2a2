"""The checkpoint's config file as a test file, its adapted layers as tests."""

import warnings
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nullspace.errors import NullspaceError, NullspaceWarning
from pytest_nullspace.judging import screening
from pytest_nullspace.judging.invariants import MODEL, judge, judge_averages, judge_drift
from pytest_nullspace.judging.verdicts import Tier, Verdict
from pytest_nullspace.judging.weights import STATEMENT
from pytest_nullspace.report import changes, notes, words
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.run.texts import drift_test
from pytest_nullspace.shell.progress import measured
from pytest_nullspace.shell.runs import GatedRun

if TYPE_CHECKING:
    from typing import Self


class CheckpointFile(pytest.File):
    """The file that stands for what is gated; its id is its path under rootdir, or its whole path outside."""

    run: GatedRun

    @classmethod
    def of(cls, parent: pytest.Collector, run: GatedRun) -> "Self":
        """The node of ``run``."""
        file = run.file
        node: Self = cls.from_parent(parent, path=file, nodeid=node_id(file, parent.config.rootpath))
        node.run = run
        return node

    def collect(self) -> list["GateItem"]:
        """One item a gated layer, one for the averages where every layer is gated, one for the scope if asked."""
        return self.items

    @cached_property
    def items(self) -> list["GateItem"]:
        """All that are to be gated, whatever is left of them when collection is over."""
        return list(self._items())

    def _items(self) -> Iterator["GateItem"]:
        kind = WeightsItem if self.run.weights_only else ScreenItem if self.run.screened else LayerItem
        for name in self.run.gated:
            yield kind.from_parent(self, name=name)
        if self.run.gates_all and not self.run.weights_only:
            of_averages = ScreenedAverages if self.run.screened else ModelItem
            yield of_averages.from_parent(self, name=MODEL)
        for name in self.run.against.missing:
            yield MissingItem.from_parent(self, name=name)
        if self.run.has_audit:
            yield FrozenItem.from_parent(self, name=FROZEN)
        for name in self.run.drift_tests:
            yield DriftItem.from_parent(self, name=name)
        if self.run.gates_scope:
            yield ScopeItem.from_parent(self, name=SCOPE)
        for name in self.run.merge_tests:
            yield MergeItem.from_parent(self, name=name)
        for name in self.run.servers.tests:
            yield ServeItem.from_parent(self, name=name)


def node_id(file: Path, rootdir: Path) -> str:
    """The id of a checkpoint's file among pytest's nodes."""
    return (file.relative_to(rootdir) if file.is_relative_to(rootdir) else file).as_posix()


class GateItem(pytest.Item):
    """A test of the gate.

    Attributes:
        removed: Whether something took it out of the session without deselecting it.
    """

    parent: CheckpointFile
    removed = False

    def setup(self) -> None:
        """Fail where it was removed."""
        if self.removed:
            pytest.fail(
                f"{self.name}: a conftest file or plugin removed this test without telling pytest (hook "
                "pytest_deselected); mend that, or leave tests out with -k or --deselect",
                pytrace=False,
            )

    def reportinfo(self) -> tuple[Path, int, str]:
        """Where the item lies; pytest takes a third part that ends the id for a Python name and rewrites it."""
        return self.path, 0, f"layer {self.name}"

    def record(self, **properties: str | float) -> None:
        """Put figures into the report, for JUnit and other reporters."""
        self.user_properties.extend(properties.items())

    def warn_of(self, message: str, explanation: str) -> None:
        """Pass with a warning; fail with the explanation where warnings are errors."""
        try:
            # No line of the config is to blame, so none is quoted, as `Node.warn` would.
            warnings.warn_explicit(NullspaceWarning(message), None, filename=str(self.path), lineno=0)
        except NullspaceWarning:
            raise pytest.fail.Exception(f"{explanation}\n(warnings are errors here)", pytrace=False) from None


class MeasuredItem(GateItem):
    """A test that judges what was measured; the first to be set up measures, for all."""

    def setup(self) -> None:
        """Have the checkpoint measured; whatever prevents that is an error of every item."""
        super().setup()
        measured(self.parent.run, self, self.config)

    def runtest(self) -> None:
        """Fail in the fail tier, warn in the warn tier."""
        verdict, explanation = self.judge(self.parent.run.measured())
        if verdict.tier is Tier.FAIL:
            pytest.fail(explanation, pytrace=False)
        if verdict.tier is Tier.WARN:
            self.warn_of(self.warning(verdict), explanation)

    def warning(self, verdict: Verdict) -> str:
        """The warning's message: subject and figures."""
        return f"{self.name}: {verdict.summary}"

    def judge(self, run: RunStats) -> tuple[Verdict, str]:
        """The verdict, and the message that a failure shows."""
        raise AssertionError("each kind of item judges its own subject")


class LayerItem(MeasuredItem):
    """Judges one layer."""

    def judge(self, run: RunStats) -> tuple[Verdict, str]:
        """Hold the layer's figures against its thresholds."""
        layer = run.layer(self.name)
        if layer is None:
            pytest.fail(f"{self.name} was not measured", pytrace=False)
        verdict = judge(layer, self.parent.run.expectations(run))
        figures = {figure: layer.figure(figure) for figure in layer.measured}
        self.record(tier=str(verdict.tier), rows=layer.rows, **figures)
        return verdict, words.named(words.layer_failure(layer, verdict), run)

    def warning(self, verdict: Verdict) -> str:
        """A message that layers share, so that pytest tells it once with all that gave it: a model has hundreds."""
        return verdict.warning


class WeightsItem(LayerItem):
    """Judges one layer by its weights alone."""

    def runtest(self) -> None:
        """Fail where the weights show a fault, or moved and must not have; pass only with a warning."""
        run = self.parent.run
        outcome = run.measured()
        weighed = run.against.told(outcome).weights
        layer = None if weighed is None else weighed.layer(self.name)
        if layer is None:
            pytest.fail(f"{self.name} was not weighed", pytrace=False)
        self.record(gated_on="weights", down_norm=layer.down_norm, up_norm=layer.up_norm, rank_used=layer.rank_used)
        if faults := run.against.weight_faults(outcome, layer):
            pytest.fail("\n".join(words.named(fault, outcome) for fault in faults), pytrace=False)
        self.warn_of(STATEMENT, STATEMENT)  # a pass of weights alone is never without one


class ModelItem(MeasuredItem):
    """Judges the averages over all layers."""

    def judge(self, run: RunStats) -> tuple[Verdict, str]:
        """Hold the averages against the thresholds."""
        verdict = judge_averages(run, self.parent.run.expectations(run))
        figures = {figure: run.mean(figure) for figure in run.measured}
        self.record(tier=str(verdict.tier), layers=len(run.layers), **figures)
        return verdict, words.named(words.model_failure(run, verdict), run)


class ScreenItem(LayerItem):
    """Judges what a layer would do to the first order."""

    def runtest(self) -> None:
        """Fail by a first-order figure; pass only with a warning."""
        _screened(self)


class ScreenedAverages(ModelItem):
    """Judges the averages of that."""

    def runtest(self) -> None:
        """Fail by a first-order figure; pass only with a warning."""
        _screened(self)


def _screened(item: LayerItem | ModelItem) -> None:
    run = item.parent.run
    outcome = run.measured()
    told = run.against.told(outcome).screening
    if told is None or (item.name != MODEL and item.name not in told.layers):
        pytest.fail(f"{item.name} was not screened", pytrace=False)
    verdict = screening.verdict(told, item.name, run.expectations(outcome))
    value = told.mean if item.name == MODEL else partial(told.figure, item.name)
    figures = {f"first_order_{figure}": value(figure) for figure in screening.FIGURES}
    item.record(gated_on="screen", statement=screening.STATEMENT, screen_tier=str(verdict.tier), **figures)
    if verdict.tier is Tier.FAIL:
        pytest.fail(f"{screening.STATEMENT}: {verdict.summary}", pytrace=False)
    looks = f"{screening.STATEMENT}: {verdict.warning}" if verdict.tier is Tier.WARN and not verdict.excuse else ""
    told_of_all = f"{screening.STATEMENT}, which gates nothing: {screening.CURE}"
    item.warn_of(looks or told_of_all, looks or told_of_all)  # a pass of a screen alone is never without one


class DriftItem(MeasuredItem):
    """Judges how far the predictions on one preserved text lie from the base model's."""

    def judge(self, run: RunStats) -> tuple[Verdict, str]:
        """Hold the drift against its thresholds."""
        if run.drift is None and run.without_drift is not None:
            pytest.skip(f"drift not measured: {run.without_drift}")
        text = next((text for text in run.drift.texts if drift_test(text) == self.name), None) if run.drift else None
        if run.drift is None or text is None:
            pytest.fail("the drift was not measured", pytrace=False)
        verdict = judge_drift(run.drift, self.parent.run.expectations(run), text)
        self.record(tier=str(verdict.tier), **{name: value for name, (value, _) in run.drift.figures_on(text).items()})
        return verdict, "\n".join([verdict.summary, "", *(line for line, _ in notes.drift(run.drift, verdict))])


FROZEN = "frozen"
"""The name of the item that holds everything outside the layers against its start."""


class FrozenItem(MeasuredItem):
    """Holds that no tensor outside the layers moved in training."""

    def runtest(self) -> None:
        """Fail where one did."""
        run = self.parent.run
        audited = run.against.told(run.measured()).audit
        if audited is None:
            pytest.fail("the checkpoint was not held against its start", pytrace=False)
        self.record(compared=audited.compared, moved=len(audited.others))
        if audited.others:
            pytest.fail(changes.moved(audited), pytrace=False)


class MissingItem(GateItem):
    """Stands for a layer of the earlier run that there is no more."""

    def runtest(self) -> None:
        """Fail: what the earlier run gated is gated no more."""
        pytest.fail(
            f"missing: only the earlier run {self.parent.run.against.earlier_file} has this layer", pytrace=False
        )


SCOPE = "scope"
"""The name of the item that holds that nothing was trained outside the layers."""


class ScopeItem(GateItem):
    """Holds that the layer tests cover every trained tensor, by the names in the files alone."""

    def runtest(self) -> None:
        """Fail where something was trained outside the layers."""
        outside = self.parent.run.outside
        self.record(outside=len(outside))
        if outside:
            pytest.fail(notes.outside(outside), pytrace=False)


class ServeItem(GateItem):
    """Holds that a server would take the adapter and find all of it, by headers and configs alone."""

    def runtest(self) -> None:
        """Fail where it would be refused or served otherwise than it was trained, warn of what nobody knows."""
        try:
            outcome = self.parent.run.servers.outcome(self.name)
        except NullspaceError as error:
            pytest.fail(str(error), pytrace=False)
        self.record(server=str(outcome.asked), serve_tier=str(outcome.tier), rules=outcome.rules)
        if outcome.tier is Tier.FAIL:
            pytest.fail("\n".join(outcome.lines()), pytrace=False)
        if outcome.tier is Tier.WARN:
            self.warn_of(f"{self.name}: {outcome.summary}", "\n".join(outcome.lines()))


class MergeItem(MeasuredItem):
    """Holds that a merge in one type keeps the update of every layer."""

    def runtest(self) -> None:
        """Fail where rounding takes it away, warn where it takes much of it."""
        run = self.parent.run
        survival = run.against.told(run.measured()).survival
        if survival is None or (absent := set(run.gated) - {layer.name for layer in survival.layers}):
            what = "the merge" if survival is None else f"the merge of {min(absent)}"
            pytest.fail(f"{what} was not measured", pytrace=False)
        kept = survival.of_type(run.merge_tests[self.name])
        self.record(merge_tier=str(kept.tier), survival=kept.average, layers=len(kept.told))
        if kept.tier is Tier.FAIL:
            pytest.fail("\n".join(kept.lines()), pytrace=False)
        if kept.tier is Tier.WARN:
            self.warn_of(f"{self.name}: {kept.summary}", "\n".join(kept.lines()))


def select(items: list[pytest.Item], runs: tuple[GatedRun, ...]) -> list[pytest.Item]:
    """Tell each run which layers to measure, and drop the items of averages that no longer are over all layers.

    Asked for alone, the item of the averages has all layers measured for it.

    Returns:
        The items to deselect.
    """
    layers: dict[int, set[str]] = {id(run): set() for run in runs}
    models: dict[int, ModelItem] = {}
    for item in items:
        if isinstance(item, LayerItem):
            layers[id(item.parent.run)].add(item.name)
        elif isinstance(item, ModelItem):
            models[id(item.parent.run)] = item
        elif isinstance(item, DriftItem):
            item.parent.run.drift_selected.add(item.name)
        elif isinstance(item, MergeItem):
            item.parent.run.merges_selected.add(item.name)
            layers[id(item.parent.run)].update(item.parent.run.gated)
        else:
            for run, names in wanted_by_test(item, runs):
                layers[id(run)].update(names)
    dropped: list[pytest.Item] = []
    for run in runs:
        names, model = layers[id(run)], models.get(id(run))
        gated_here = {i.name for i in items if isinstance(i, LayerItem) and i.parent.run is run}
        if model is not None and 0 < len(gated_here) < len(run.gated):
            dropped.append(model)
        elif model is not None:
            names.update(run.gated)
        run.selected = names
    return dropped


def wanted_by_test(item: pytest.Item, runs: tuple[GatedRun, ...]) -> Iterator[tuple[GatedRun, Any]]:
    """The layers that a user's test wants measured, by its use of ``nullspace_layer`` and ``nullspace_run``."""
    callspec = getattr(item, "callspec", None)
    wanted = callspec.params.get("nullspace_layer") if callspec is not None else None
    if wanted is not None:
        yield runs[wanted[0]], {wanted[1]}
    if "nullspace_run" in getattr(item, "fixturenames", ()):
        for run in runs:
            yield run, run.gated
