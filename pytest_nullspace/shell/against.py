"""What a gated run is held against, and what follows: thresholds, an earlier run, its start, the causes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pytest_nullspace.checkpoint.header import quoted
from pytest_nullspace.checkpoint.layers import is_layer_name
from pytest_nullspace.errors import OptionError, StatsError
from pytest_nullspace.judging.audit import Audit
from pytest_nullspace.judging.baseline import Comparison, compare
from pytest_nullspace.judging.comparable import COMPARED, OF_ONE_BASE, Difference, incomparable
from pytest_nullspace.judging.diagnosis import diagnose
from pytest_nullspace.judging.evidence import Diagnosis
from pytest_nullspace.judging.invariants import Check, Expectations, Stage, passes
from pytest_nullspace.judging.profiles import Chosen, choose
from pytest_nullspace.judging.sanity import insane
from pytest_nullspace.judging.screening import CURE, STATEMENT, Screening
from pytest_nullspace.judging.start import Start, unpaired
from pytest_nullspace.judging.survival import Survival
from pytest_nullspace.judging.weights import LayerWeights, Weights
from pytest_nullspace.run.saved import read
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.settings import PREFIX, Settings, stats_file


@dataclass(frozen=True)
class Told:
    """What an outcome tells beside its figures."""

    outcome: RunStats
    audit: Audit | None
    weights: Weights | None
    screening: Screening | None
    survival: Survival | None


class Against:
    """What one run is held against.

    Attributes:
        earlier: The earlier run that it is compared with, if it is.
        earlier_file: Where that lies.
        missing: The names of the layers that only the earlier run has.
        start: The saved run of the initial checkpoint, if one is given, and what must have come of it.
        start_file: Where that lies.
    """

    def __init__(self, path: Path, name: str, layers: Sequence[str], settings: Settings) -> None:
        self._path, self._settings = path, settings
        self.earlier_file = None if settings.compare is None else stats_file(settings.compare, name)
        self.earlier = None if self.earlier_file is None else read_run(self.earlier_file)
        held = set(layers)
        self.missing = tuple(
            layer.name
            for layer in (self.earlier.layers if self.earlier is not None else ())
            if layer.name not in held and fnmatchcase(layer.name, settings.layers)
        )
        self.start_file = settings.saved_init
        self.start = self._saved_start(layers)
        self._told: Told | None = None
        self._held: tuple[RunStats, Comparison] | None = None

    def _saved_start(self, layers: Sequence[str]) -> Start | None:
        file = self.start_file
        if file is None:
            return None
        start = read_run(file)
        gone = unpaired(set(layers), start, lambda name: fnmatchcase(name, self._settings.layers))
        if gone:
            more = f" and {len(gone) - 1} more layers" if len(gone) > 1 else ""
            raise StatsError(f"{file}: not the start of {self._path}: only one of them has {gone[0]}{more}")
        return Start.of(start, self._settings.variant)

    def unmeasured(self, figure: str) -> Path | None:
        """Where ``figure``, which is measured here, lacks to be compared with the earlier run; None if it does not."""
        if self.earlier is None:
            return self.earlier_file
        drift = () if self.earlier.drift is None else self.earlier.drift.figures
        measured = figure in drift or any(figure in layer.measured for layer in self.earlier.layers)
        return None if measured else self.earlier_file

    def told(self, outcome: RunStats) -> Told:
        """What the outcome tells beside its figures, read once, for each of its layers asks."""
        if self._told is None or self._told.outcome is not outcome:
            about = outcome.about
            parts = Audit.of(about), Weights.of(about), Screening.told(about), Survival.of(about)
            self._told = Told(outcome, *parts)
        return self._told

    def expectations(self, outcome: RunStats, drift_selected: bool, judged: Collection[str] | None) -> Expectations:
        """What the layers are held against.

        Args:
            outcome: What was measured.
            drift_selected: Whether the predictions on each text have a test.
            judged: The names of the tests that came to a verdict, once all have run.
        """
        settings, compared, audited = self._settings, self._compared(outcome), self.told(outcome).audit
        stage = Stage(settings.stage)
        checks: list[Check] = []
        if compared is not None:
            checks.append(lambda layer: compared.regressions[layer.name])
        if audited is not None:
            checks.append(lambda layer: audited.check(layer, trained=stage is Stage.TRAINED))
        if (start := self.start) is not None:
            checks.append(lambda layer: start.check(layer, trained=stage is Stage.TRAINED))
        drifted = drift_selected and outcome.drift is not None
        return Expectations(
            stage,
            settings.overrides,
            checks,
            settings.allow_unreached,
            self._chosen(outcome),
            drifted,
            judged,
            (*insane(outcome), *(() if compared is None else compared.drift_regressions)),
        )

    def _chosen(self, outcome: RunStats) -> Chosen:
        """By what the outcome is judged."""
        begun = self.told(outcome).audit or self.start
        start = None if begun is None else (begun.variant, begun.decided)
        screening = self.told(outcome).screening
        screened = () if screening is None else screening.entries
        return choose(outcome, self._settings.profile, self._settings.variant, start, screened)

    def compared(self, outcome: RunStats) -> Comparison | None:
        """The outcome against the earlier run, if there is one that compares."""
        refused = self.earlier is not None and self._refused(outcome, self.earlier)
        return None if refused else self._compared(outcome)

    def _compared(self, outcome: RunStats) -> Comparison | None:
        """The outcome against the earlier run, held window by window once, for each of its layers asks."""
        if self.earlier is None:
            return None
        if self._held is None or self._held[0] is not outcome:
            compared = compare(outcome, self.earlier, self._settings.limits, Stage(self._settings.stage))
            self._held = outcome, compared
        return self._held[1]

    def diagnoses(self, outcome: RunStats, expected: Expectations) -> list[Diagnosis]:
        """The causes of what is wrong with a trained adapter; an initial one has none yet."""
        if self._settings.stage != Stage.TRAINED:
            return []
        told, compared, passed = self.told(outcome), self.compared(outcome), passes(outcome, expected)
        return diagnose(outcome, told.audit, compared, told.weights, expected.left_out, passed)

    def weight_faults(self, outcome: RunStats, layer: LayerWeights) -> list[str]:
        """What fails a layer of which the weights alone are gated."""
        trained = self._settings.stage == Stage.TRAINED
        audited = self.told(outcome).audit
        moved = () if audited is None else audited.faults(layer.name, trained)
        return list(dict.fromkeys([*layer.faults(trained), *moved]))

    def _refused(
        self, outcome: RunStats, earlier: RunStats, conditions: Collection[str] = tuple(COMPARED)
    ) -> list[Difference]:
        """What keeps the outcome from being compared with another run, and is not allowed."""
        return [d for d in incomparable(outcome, earlier, conditions) if d.what not in self._settings.allowed]

    def check_comparable(self, outcome: RunStats, known: Collection[str] = tuple(COMPARED)) -> None:
        """Refuse an outcome that does not compare with the earlier run or the saved start, by what is ``known``."""
        if self.start is not None and (outcome.is_whole or self.start.run.is_whole):
            raise OptionError(
                f"{PREFIX}init: {self.start_file} or {self._path} is of a whole model, which is held against its base "
                "as it is measured; leave the option out"
            )
        against = [("compare", self.earlier_file, self.earlier, set(COMPARED))]
        if self.start is not None:  # whether W_res is what it was is a test of its own, and figures may lack
            against.append(("init", self.start_file, self.start.run, {*COMPARED} - OF_ONE_BASE))
        for option, file, other, conditions in against:
            refused = [] if other is None else self._refused(outcome, other, conditions & {*known})
            if refused:
                raise OptionError(
                    f"{PREFIX}{option}: not comparable: {'; '.join(map(str, refused))}: this run of {self._path}, and "
                    f"{file}; measure both alike, or allow it by "
                    + " ".join(f"{PREFIX}compare-allow={difference.what}" for difference in refused)
                )


def read_run(file: Path) -> RunStats:
    """A saved run whose layers can be tests.

    Raises:
        StatsError: It cannot be read, holds no layer, or one whose name no layer can have.
    """
    run = read(file)
    if Weights.of(run.about, str(file)) is not None:
        raise StatsError(
            f"{file}: is of weights alone: its activations were not measured, so it can stand in for no measured run; "
            "measure without --nullspace-weights-only"
        )
    if Screening.told(run.about, str(file)) is not None:
        raise StatsError(
            f"{file}: is {STATEMENT}, which no adapter's own activations bear out, so it can stand in for no measured "
            f"run; {CURE}, without --nullspace-screen"
        )
    if not run.layers:
        raise StatsError(f"{file}: holds no layer, so there is nothing to gate")
    unfit = next((layer.name for layer in run.layers if not is_layer_name(layer.name)), None)
    if unfit is not None:
        raise StatsError(f"{file}: {quoted(unfit)} is not the name of a layer; measure again")
    return run
