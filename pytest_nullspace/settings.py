"""What the user asked for, as pure data; `pytest_nullspace.shell.options` reads it from pytest."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nullspace.errors import PREFIX as PREFIX

if TYPE_CHECKING:
    from pytest_nullspace.judging.baseline import Limit
    from pytest_nullspace.judging.invariants import Override
    from pytest_nullspace.judging.served import Asked
    from pytest_nullspace.measuring.distributed import Ranks

STREAM = "stream"
"""In place of a map: the blocks of a model are read one after the other, each for all windows."""
CARD = "README.md"
"""What the hub calls a model's card, in its directory."""
DEFAULT_TEXT = "wikitext2"
"""The text that is preserved where none is given."""
AUTO_MOST = 128
"""Windows that ``calib-size=auto`` draws at most, unless told otherwise."""


@dataclass(frozen=True)
class GivenText:
    """A preserved text, as it was given.

    Attributes:
        spec: What it is, without its name.
        folder: The folder to which its path is relative.
        name: How tests and bounds call it; empty where it has no name, as the first may.
    """

    spec: str
    folder: Path
    name: str = ""


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        models: The checkpoints' directories; text where it is an id on the hub, with ``@revision`` if one was given.
        stats: Saved runs to gate without their models.
        base: The base model of adapters that do not carry theirs, a directory, GGUF file or hub id; None for what they
            name.
        calib_dataset: The first preserved text, as given.
        text_folder: The folder to which its path is relative.
        calib_size: Windows to draw from each text; None to draw until every verdict is settled.
        seqlen: Tokens a window; None for 2048 or what the model allows, whichever is less.
        max_activation_samples: Activation rows a layer at most; None for all.
        seed: Of the choice of windows and rows.
        batch_size: Windows a forward; None for as many as suit the device.
        device: ``auto`` or a torch device.
        device_map: The bytes that the model may take of each device, over which it is spread; empty for what there is,
            `STREAM` where its blocks are read one after the other, None where that is done only if it does not fit.
        dtype: ``auto`` or a torch dtype.
        layers: A glob that the names of the gated layers match.
        rank: How many right singular vectors of what changed stand for the down projections of a whole model; 0 for
            none.
        stage: ``trained`` or ``init``.
        overrides: Thresholds of the user's own.
        save_stats: Where to save the statistics.
        reports: Where to write reports.
        ranks: The processes that a launcher started to measure together.
        init: The checkpoint from which training started, or a saved run of it.
        variant: What training might move: ``auto`` or one of `pytest_nullspace.audit.VARIANTS`.
        profile: By what each run is judged: ``auto`` or one of `pytest_nullspace.judging.profiles.Profile`.
        compare: An earlier run to hold each run against; ``{model}`` stands for the run's name.
        limits: How much worse than there a figure may be.
        allowed: The differences between the two runs that are allowed.
        task_dataset: The text of what was learned, as given.
        task_folder: The folder to which its path is relative.
        calib_most: Windows to draw from each text at most, where their number is not given.
        text_name: How that text is called, if it has a name.
        further: The preserved texts beside it.
        weights_only: Whether the weights alone are gated, and no text is run.
        screen: Whether adapters of one base are screened to the first order, in one pass over that, and not gated.
        allow_unreached: Globs of the layers that no activation row need reach.
        drift: Whether the predictions are held against the base model's; None for where that can be had without
            loading another model.
        spectrum: Whether the best that any subspace could do is reported.
        suggest: Whether the largest scale of the update is looked for whose predictions pass.
        chat: Whether conversations are rendered, one of `pytest_nullspace.text.conversations.MODES`.
        strict_scope: Whether a trained tensor that no layer test covers is a failure.
        require: Whether a run that is not gated whole is refused.
        card: Whether the result is written into each adapter's model card.
        serve: The servers that are to take each adapter.
        attest: Where a statement of the result is written.
        merge: The types in which a merge is to keep the update.
    """

    models: tuple[Path | str, ...]
    stats: tuple[Path, ...]
    base: str | None
    calib_dataset: str
    text_folder: Path
    calib_size: int | None
    seqlen: int | None
    max_activation_samples: int | None
    seed: int
    batch_size: int | None
    device: str
    dtype: str
    layers: str
    stage: str
    overrides: "tuple[Override, ...]"
    save_stats: Path | None
    reports: tuple[Path, ...]
    ranks: "Ranks"
    allow_unreached: tuple[str, ...] = ()
    strict_scope: bool = False
    require: bool = False
    card: bool = False
    serve: "tuple[Asked, ...]" = ()
    attest: Path | None = None
    merge: tuple[str, ...] = ()
    drift: bool | None = False
    spectrum: bool = False
    suggest: bool = False
    device_map: Mapping[int | str, int] | str | None = None
    init: Path | None = None
    variant: str = "auto"
    profile: str = "auto"
    compare: Path | None = None
    limits: "tuple[Limit, ...]" = ()
    allowed: tuple[str, ...] = ()
    task_dataset: str | None = None
    task_folder: Path = Path()
    calib_most: int = AUTO_MOST
    weights_only: bool = False
    screen: bool = False
    chat: str = "auto"
    rank: int = 0
    text_name: str = ""
    further: tuple[GivenText, ...] = ()

    @property
    def preserved(self) -> tuple[GivenText, ...]:
        """All texts whose knowledge must survive, the first first."""
        return GivenText(self.calib_dataset, self.text_folder, self.text_name), *self.further

    @property
    def most_windows(self) -> int:
        """Windows to draw from each text at most."""
        return self.calib_most if self.calib_size is None else self.calib_size

    @property
    def saved_init(self) -> Path | None:
        """The saved run of the initial checkpoint, where ``init`` is one."""
        return self.init if self.init is not None and (self.init.suffix == ".json" or self.init.is_file()) else None

    @property
    def init_directory(self) -> Path | None:
        """The initial checkpoint, where ``init`` is one."""
        return self.init if self.saved_init is None else None


def model_name(model: Path | str) -> str:
    """What ``{model}`` stands for: the name of the directory, or of the model on the hub."""
    return model.name if isinstance(model, Path) else model.partition("@")[0].rpartition("/")[2]


def stats_file(template: Path, name: str) -> Path:
    """The statistics file of one run: ``{model}`` in the file's name stands for ``name``."""
    return template.with_name(template.name.replace("{model}", name))
