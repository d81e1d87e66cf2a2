"""A saved run in the place of a checkpoint: gated alike, and not measured again."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pytest_nullspace.errors import OptionError
from pytest_nullspace.judging.audit import Audit
from pytest_nullspace.judging.remedy import Remedy
from pytest_nullspace.judging.survival import Survival
from pytest_nullspace.report import notes
from pytest_nullspace.run.stats import RunStats
from pytest_nullspace.settings import PREFIX, Settings
from pytest_nullspace.shell.against import read_run
from pytest_nullspace.shell.runs import GatedRun


def require_no_down(path: Path, settings: Settings) -> None:
    """Refuse what asks for the down projections of a whole model for which nothing stands.

    Raises:
        OptionError: Something does.
    """
    needing = {
        "profile": settings.profile in ("nullspace", "reference"),
        "variant": settings.variant in ("v1", "v2") and settings.profile == "auto",
        "spectrum": settings.spectrum,
    }
    asked = next((name for name, is_asked in needing.items() if is_asked), None)
    if asked is not None:
        raise OptionError(
            f"{PREFIX}{asked}: asks what reaches a down projection, and {path} is a whole model that has none; measure "
            f"it with {PREFIX}rank=R, by which so many right singular vectors stand for it, or leave the option out"
        )


class SavedRun(GatedRun):
    """A saved run, gated as it was measured."""

    def __init__(self, file: Path, settings: Settings) -> None:
        self._saved = read_run(file)
        self._audited, _ = Audit.of(self._saved.about, str(file)), Remedy.of(self._saved.about, str(file))
        self._merged = Survival.of_run(self._saved, str(file))
        if settings.strict_scope and (self._saved.about.get("base") is None or "outside" not in self._saved.about):
            raise OptionError(
                f"{PREFIX}strict-scope: {file} does not tell what was trained outside its layers; "
                "leave the option out for it"
            )
        if self._saved.has_no_down:
            require_no_down(file, settings)
        if settings.drift and self._saved.drift is None:
            raise OptionError(f"{PREFIX}drift: {file} does not tell of it; measure the model with the option")
        super().__init__(file, file, file.stem, [layer.name for layer in self._saved.layers], settings)
        if lacking := [kind for kind in settings.merge if kind not in self.merge_types]:
            raise OptionError(
                f"{PREFIX}merge: {file} does not tell of {lacking[0]}; measure the model with the option, for a saved "
                "run holds no weights"
            )
        self.against.check_comparable(self._saved)

    @property
    def gates_all(self) -> bool:
        """Whether every adapted layer was measured and has a test."""
        return self._saved.complete and len(self.gated) == len(self._saved.layers)

    @property
    def tells_all(self) -> bool:
        """Whether every layer was measured."""
        return self._saved.complete

    @property
    def figures(self) -> Collection[str]:
        """What the saved run tells of some layer or of the predictions."""
        drift = () if self._saved.drift is None else self._saved.drift.figures
        return {*drift, *(figure for layer in self._saved.layers for figure in layer.measured)}

    @property
    def has_drift(self) -> bool:
        """Whether the saved run tells of the predictions, and they are to be judged."""
        return self._saved.drift is not None and self._settings.drift is not False

    @property
    def text_names(self) -> Sequence[str]:
        """Those of the texts on which its predictions were measured."""
        return [] if self._saved.drift is None else list(self._saved.drift.texts)

    @property
    def merge_types(self) -> Sequence[str]:
        """Those of which the saved run tells."""
        return () if self._merged is None else self._merged.types

    @property
    def has_audit(self) -> bool:
        """Whether the saved run tells of an audit."""
        return self._audited is not None

    @property
    def outside(self) -> Sequence[str]:
        """The trained tensors that the saved run names."""
        return notes.outside_of(self._saved)

    def header(self) -> Iterable[str]:
        """Which run is gated."""
        return notes.saved_header(self.path, self._saved, len(self.gated))

    def _measure(self, _: Callable[[int, int], None] | None) -> RunStats:
        return replace(self._saved, layers=tuple(layer for layer in self._saved.layers if layer.name in self.selected))
