"""Every option with its ini twin, in one table, and how `Settings` come of them.

The command line wins over ini, ini over the default. Paths on the command line are relative to the folder in which
pytest was started, paths in an ini file to that file.
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pytest_nullspace.errors import OptionError, quoted
from pytest_nullspace.settings import AUTO_MOST, PREFIX, Settings, model_name, stats_file

if TYPE_CHECKING:
    import pytest

    from pytest_nullspace.judging.baseline import Limit
    from pytest_nullspace.judging.invariants import Override

_HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?"


class _Given(NamedTuple):
    """One value as the user wrote it, and where."""

    text: str
    folder: Path
    in_ini: bool


class _Option(NamedTuple):
    """A row of the table: how an option is called, read and explained."""

    name: str
    metavar: str
    help: str
    read: Callable[[_Given], Any]
    default: Any = None
    repeatable: bool = False
    switch: bool = False

    @property
    def dest(self) -> str:
        return "nullspace_" + self.name.replace("-", "_")

    @property
    def flag(self) -> str:
        return PREFIX + self.name


def _text(given: _Given) -> str:
    if not given.text.strip():
        raise OptionError("is empty")
    return given.text


def _path(given: _Given) -> Path:
    try:
        local = Path(_text(given)).expanduser()
        (given.folder / local).exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, nobody's home
        raise OptionError(f"{quoted(given.text)} can be no path: {getattr(error, 'strerror', None) or error}") from None
    # Not resolved: pytest does not follow links in the paths of tests either.
    return Path(os.path.normpath(given.folder / local))


def _model(given: _Given) -> Path | str:
    local = _path(given)
    return given.text if not local.exists() and re.fullmatch(_HUB_ID, given.text) else local


def _directory_or_id(given: _Given) -> str:
    local = _path(given)
    return str(local) if local.exists() else _text(given)


def _whole(least: int, most: float = math.inf) -> Callable[[_Given], int]:
    def read(given: _Given) -> int:
        try:
            value = int(given.text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            upto = f" to {most:,}" if value > most else ""
            raise OptionError(f"takes a whole number from {least}{upto}, not {quoted(given.text)}")
        return value

    return read


MOST_WINDOWS = 1_000_000


def _calib_size(given: _Given) -> tuple[int | None, int]:
    """How many windows, or None and how many at most."""
    kind, _, most = given.text.partition(":")
    if kind == "auto":
        return None, _whole(2, MOST_WINDOWS)(given._replace(text=most)) if most else AUTO_MOST
    try:
        return _whole(1, MOST_WINDOWS)(given), AUTO_MOST
    except OptionError:
        raise OptionError(
            f"takes a whole number from 1 to {MOST_WINDOWS:,}, auto or auto:MOST, not {quoted(given.text)}"
        ) from None


def _batch_size(given: _Given) -> int | None:
    if given.text == "auto":
        return None
    try:
        return _whole(1, 1_000_000)(given)
    except OptionError:
        raise OptionError(f"takes a whole number from 1 to 1,000,000, or auto, not {quoted(given.text)}") from None


def _one_of(*choices: str) -> Callable[[_Given], str]:
    def read(given: _Given) -> str:
        if given.text not in choices:
            raise OptionError(f"takes {', '.join(choices[:-1])} or {choices[-1]}, not {quoted(given.text)}")
        return given.text

    return read


def _device(given: _Given) -> str:
    if not re.fullmatch(r"auto|cpu|(cuda|xpu)(:\d+)?", given.text):
        raise OptionError(f"takes auto, cpu, cuda, cuda:N, xpu or xpu:N, not {quoted(given.text)}")
    return given.text


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _device_map(given: _Given) -> dict[int | str, int]:
    """The bytes allowed by each device; empty for ``auto``."""
    if given.text == "auto":
        return {}
    allowed: dict[int | str, int] = {}
    for part in given.text.split(","):
        match = re.fullmatch(r"\s*(cpu|\d{1,3})\s*=\s*(\d{1,9})\s*([KMG]i?B)\s*", part)
        if match is None:
            raise OptionError(f"takes auto, or sizes such as 0=20GiB,cpu=60GiB, not {quoted(given.text)}")
        device, size, unit = match.groups()
        allowed[device if device == "cpu" else int(device)] = int(size) * _UNITS[unit]
    return allowed


def _truth(given: _Given) -> bool:
    if given.text.lower() not in ("true", "false"):
        raise OptionError(f"takes true or false, not {quoted(given.text)}")
    return given.text.lower() == "true"


def _report(given: _Given) -> Path:
    path = _path(given)
    if path.suffix != ".md":
        raise OptionError(f"takes a file that ends in .md, not {quoted(given.text)}")
    return path


def _override(given: _Given) -> "Override":
    from pytest_nullspace.judging.invariants import Override

    form = "GLOB FIGURE PASS FAIL" if given.in_ini else "FIGURE:PASS:FAIL"
    parts = given.text.split() if given.in_ini else ["*", *given.text.split(":")]
    try:
        layers, figure, passes, fails = parts
        bounds = float(passes), float(fails)
    except ValueError:
        raise OptionError(f"takes {form}, such as {form_example(given.in_ini)}, not {quoted(given.text)}") from None
    if not all(map(math.isfinite, bounds)):
        raise OptionError(f"takes finite bounds, not {quoted(given.text)}")
    return Override(layers, figure, *bounds)


def _limit(given: _Given) -> "Limit":
    from pytest_nullspace.judging.baseline import Limit

    figure, _, amount = given.text.partition(":")
    try:
        value = float(amount.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise OptionError(f"takes FIGURE:5% or FIGURE:0.001, not {quoted(given.text)}")
    relative = amount.endswith("%")
    return Limit(figure, value / 100 if relative else value, relative)


def _allowed(given: _Given) -> str:
    from pytest_nullspace.judging.baseline import COMPARED, UNRECORDED

    return _one_of(*COMPARED, UNRECORDED)(given)


def form_example(in_ini: bool) -> str:
    """A threshold as one writes it in ini or on the command line."""
    return "*.down_proj preservation 0.2 0.6" if in_ini else "preservation:0.2:0.6"


_REQUIRE = _Option(
    "require",
    "",
    "Refuse a run that gates nothing, because it names neither a model nor a saved run.",
    _truth,
    default=False,
    switch=True,
)

_OPTIONS = (
    _Option(
        "model",
        "DIR",
        "Gate the adapter in DIR, or on the hub as owner/name[@revision]: one test per adapted layer.",
        _model,
        repeatable=True,
    ),
    _Option(
        "stats", "JSON", "Gate the saved run in JSON, without its model and without torch.", _path, repeatable=True
    ),
    _REQUIRE,
    _Option(
        "base",
        "DIR",
        "The base model of a PEFT adapter: a directory, a GGUF file or a hub id[@revision] (default: what its config "
        "names).",
        _directory_or_id,
    ),
    _Option(
        "calib-dataset",
        "TEXT",
        "The text whose knowledge must survive: wikitext2, c4, ptb, triviaqa, nqopen, a .txt, .jsonl, .json, .csv or "
        ".parquet file, a folder saved by datasets, or hub:owner/name[:config[:split[:column]]].",
        lambda given: (_text(given), given.folder),
        default="wikitext2",
    ),
    _Option(
        "task-dataset",
        "TEXT",
        "The text of what was learned, given like the text that must survive: the update is judged on it, and must be "
        "larger there.",
        lambda given: (_text(given), given.folder),
    ),
    _Option(
        "calib-size",
        "N",
        f"Windows to draw from each text; auto draws until every verdict is settled, {AUTO_MOST} at most, or auto:MOST "
        "(default 16).",
        _calib_size,
        default=(16, AUTO_MOST),
    ),
    _Option("seqlen", "N", "Tokens a window (default 2048, or what the model allows).", _whole(1, 10_000_000)),
    _Option(
        "max-activation-samples",
        "N",
        "Activation rows per layer at most, drawn evenly from all windows (default: all).",
        _whole(1),
    ),
    _Option("seed", "N", "Seed of the choice of windows and rows.", _whole(0), default=42),
    _Option(
        "batch-size",
        "N",
        "Windows per forward (default auto: as many as suit the device); a GPU that has no memory for so many is given "
        "half.",
        _batch_size,
    ),
    _Option("device", "DEVICE", "auto, cpu, cuda, cuda:N, xpu or xpu:N.", _device, default="auto"),
    _Option(
        "device-map",
        "MAP",
        "Spread a model that is larger than one device: auto over all cards, the CPU's memory and the disk, or what it "
        "may take of each, such as 0=20GiB,cpu=60GiB.",
        _device_map,
    ),
    _Option(
        "dtype",
        "DTYPE",
        "auto (float32 on CPU, the checkpoint's own elsewhere), float32, float16 or bfloat16.",
        _one_of("auto", "float32", "float16", "bfloat16"),
        default="auto",
    ),
    _Option("layers", "GLOB", "Gate only the layers whose names match GLOB.", _text, default="*"),
    _Option(
        "stage",
        "STAGE",
        "trained, or init for a checkpoint before training, whose update must still be zero.",
        _one_of("trained", "init"),
        default="trained",
    ),
    _Option(
        "threshold",
        "FIGURE:PASS:FAIL",
        "Judge FIGURE by other bounds; in ini one line GLOB FIGURE PASS FAIL for the layers that match GLOB.",
        _override,
        repeatable=True,
    ),
    _Option(
        "drift",
        "",
        "Add the test `drift`: how far the predictions on the preserved text lie from the base model's, and how much "
        "the task text gained.",
        _truth,
        default=False,
        switch=True,
    ),
    _Option(
        "spectrum",
        "",
        "Report the least leakage that any subspace could have on the preserved text, and where the adapter stands.",
        _truth,
        default=False,
        switch=True,
    ),
    _Option(
        "init",
        "DIR or JSON",
        "Hold every tensor against the checkpoint in DIR, from which training started, or norms and figures against "
        "its saved run in JSON.",
        _path,
    ),
    _Option(
        "variant",
        "VARIANT",
        "What training may move: v2 the up matrices alone, v1 and lora both; auto decides from the initial weights.",
        _one_of("auto", "v1", "v2", "lora"),
        default="auto",
    ),
    _Option(
        "compare", "JSON", "Hold each layer against an earlier run; {model} in the name stands for the run's.", _path
    ),
    _Option(
        "compare-fail",
        "FIGURE:LIMIT",
        "How much worse than in the earlier run FIGURE may be, as 5% of what it was or as a difference such as 0.001.",
        _limit,
        repeatable=True,
    ),
    _Option(
        "compare-allow",
        "WHAT",
        "Compare although WHAT differs: text, windows, seqlen, seed, rows, rank, widths, base, task, figures or "
        "unrecorded.",
        _allowed,
        repeatable=True,
    ),
    _Option(
        "weights-only",
        "",
        "Gate the weights alone, without text, forward or torch: norms, dead and non-finite layers, the rank used, and "
        "with --nullspace-init=DIR what moved. Activations are not measured, and every report says so.",
        _truth,
        default=False,
        switch=True,
    ),
    _Option("save-stats", "JSON", "Save what was measured; {model} in the name stands for the directory's.", _path),
    _Option("report", "FILE.md", "Write the report as Markdown.", _report, repeatable=True),
    _Option(
        "allow-unreached",
        "GLOB",
        "Let layers that match GLOB pass with a warning where no activation row reached them, as experts may.",
        _text,
        repeatable=True,
    ),
    _Option(
        "strict-scope",
        "",
        "Add the test `scope`, which fails where a PEFT adapter trained tensors that no layer test covers.",
        _truth,
        default=False,
        switch=True,
    ),
)


def add_options(parser: "pytest.Parser") -> None:
    """Declare every option and its ini twin to pytest."""
    group = parser.getgroup("nullspace", "gate a trained adapter (pytest-nullspace)")
    for option in _OPTIONS:
        default = f" (default {option.default})" if isinstance(option.default, str | int) and not option.switch else ""
        text = option.help + default
        shown = text.replace("%", "%%")  # argparse formats the help of options, pytest prints that of ini keys as it is
        if option.switch:
            group.addoption(option.flag, dest=option.dest, action="store_const", const="true", default=None, help=shown)
        else:
            group.addoption(
                option.flag,
                dest=option.dest,
                metavar=option.metavar,
                action="append" if option.repeatable else "store",
                default=None,
                help=shown,
            )
        kind: Literal["linelist", "string"] = "linelist" if option.repeatable else "string"
        parser.addini(option.dest, text, type=kind, default=None)
    group.addoption(
        f"{PREFIX}explain",
        nargs="?",
        const="",
        metavar="CAUSE",
        help="Print what a cause that a report names means and what to do, or the list of all causes, and end.",
    )


def read_settings(config: "pytest.Config") -> Settings | None:
    """What the command line and the ini file ask for; None where nothing is to be gated, and the plugin does nothing.

    Raises:
        OptionError: An option does not take its value; the message names both. Or nothing is to be gated, and must be.
    """
    if not any(_given(config, option) for option in _OPTIONS if option.name in ("model", "stats")):
        if _read(config, _REQUIRE) and not _only_explains(config):
            raise OptionError(f"{PREFIX}require: this run gates nothing; give {PREFIX}model=DIR or {PREFIX}stats=JSON")
        return None
    from pytest_nullspace.measuring.distributed import Ranks

    values = {option.name: _read(config, option) for option in _OPTIONS}
    calib_dataset = values["calib-dataset"]
    if isinstance(calib_dataset, str):
        calib_dataset = (calib_dataset, config.invocation_params.dir)
    settings = Settings(
        models=values["model"],
        stats=values["stats"],
        base=values["base"],
        calib_dataset=calib_dataset[0],
        text_folder=calib_dataset[1],
        calib_size=values["calib-size"][0],
        calib_most=values["calib-size"][1],
        task_dataset=values["task-dataset"][0] if values["task-dataset"] is not None else None,
        task_folder=values["task-dataset"][1] if values["task-dataset"] is not None else Path(),
        seqlen=values["seqlen"],
        max_activation_samples=values["max-activation-samples"],
        seed=values["seed"],
        batch_size=values["batch-size"],
        device=values["device"],
        device_map=values["device-map"],
        dtype=values["dtype"],
        layers=values["layers"],
        stage=values["stage"],
        overrides=values["threshold"],
        save_stats=values["save-stats"],
        reports=values["report"],
        ranks=Ranks.of(os.environ),
        allow_unreached=values["allow-unreached"],
        strict_scope=values["strict-scope"],
        drift=values["drift"],
        spectrum=values["spectrum"],
        init=values["init"],
        variant=values["variant"],
        compare=values["compare"],
        limits=values["compare-fail"],
        allowed=values["compare-allow"],
        weights_only=values["weights-only"],
    )
    _check_together(settings)
    return settings


def _only_explains(config: "pytest.Config") -> bool:
    """Whether pytest runs no tests, but shows its help, versions, markers, fixtures or cache."""
    asked = ("help", "version", "markers", "showfixtures", "show_fixtures_per_test", "cacheshow")
    return any(getattr(config.option, name, None) for name in asked)


def _check_together(settings: Settings) -> None:
    from pytest_nullspace.judging.invariants import Expectations, Stage

    for name, paths in (("model", settings.models), ("stats", settings.stats)):
        twice = next((path for i, path in enumerate(paths) if path in paths[:i]), None)
        if twice is not None:
            raise OptionError(f"{PREFIX}{name}: {twice} is given twice")
    try:
        Expectations(Stage(settings.stage), settings.overrides, variant=settings.variant)
    except OptionError as error:
        raise OptionError(f"{PREFIX}threshold: {error}") from None
    if settings.ranks.size > 1 and not settings.models:
        raise OptionError(
            f"{PREFIX}stats: a saved run leaves nothing for {settings.ranks.size} processes to measure; gate it "
            "without torchrun"
        )
    if settings.init_directory is not None and not settings.models:
        raise OptionError(
            f"{PREFIX}init: {settings.init} compares weights, and a saved run holds none; give the model as well, or a "
            "saved run of the initial checkpoint"
        )
    if settings.device_map is not None and settings.ranks.size > 1:
        raise OptionError(
            f"{PREFIX}device-map: {settings.ranks.size} processes would each spread the model over the same devices; "
            "run it without torchrun"
        )
    if settings.device_map is not None and settings.device != "auto":
        raise OptionError(f"{PREFIX}device-map: chooses the devices itself; leave {PREFIX}device out")
    _check_weights_only(settings)
    _check_compare(settings)
    saved = _files(settings, "save-stats", settings.save_stats)
    read = {
        "stats": settings.stats,
        "compare": _files(settings, "compare", settings.compare),
        "init": [file for file in [settings.saved_init] if file is not None],
    }
    for name, files in read.items():
        if not saved.isdisjoint(files):
            raise OptionError(
                f"{PREFIX}save-stats: {settings.save_stats} would replace what {PREFIX}{name} reads; give another name"
            )


def _check_weights_only(settings: Settings) -> None:
    """Weights alone give no figures of activations, and a saved run holds no weights."""
    needing = {
        "stats": settings.stats,
        "compare": settings.compare,
        "init": settings.saved_init,
        "drift": settings.drift,
        "spectrum": settings.spectrum,
    }
    given = next((name for name, value in needing.items() if value), None)
    if settings.weights_only and given is not None:
        file = " with a saved run" if given == "init" else ""
        raise OptionError(
            f"{PREFIX}weights-only: measures no activations, and {PREFIX}{given}{file} is of them; leave one of the "
            "two out"
        )


def _check_compare(settings: Settings) -> None:
    from pytest_nullspace.judging.invariants import Expectations, Stage

    allowed = settings.allowed if settings.saved_init is None else ()  # it allows of the saved start as well
    for name, values in (("compare-fail", settings.limits), ("compare-allow", allowed)):
        if values and settings.compare is None:
            raise OptionError(f"{PREFIX}{name}: needs an earlier run to compare with; give it by {PREFIX}compare=JSON")
    judged = [threshold.figure for threshold in Expectations(Stage(settings.stage)).thresholds("")]
    unknown = next((limit.figure for limit in settings.limits if limit.figure not in judged), None)
    if unknown is not None:
        raise OptionError(
            f"{PREFIX}compare-fail: no figure {unknown!r} is judged at stage {settings.stage}; "
            f"there are {', '.join(judged)}"
        )


def _files(settings: Settings, option: str, template: Path | None) -> set[Path]:
    """The file of each run that ``template`` names."""
    if template is None:
        return set()
    names = [*(model_name(model) for model in settings.models), *(file.stem for file in settings.stats)]
    files = {stats_file(template, name) for name in names}
    if len(files) < len(names):
        raise OptionError(
            f"{PREFIX}{option}: {template} would be of several models at once; put {{model}} into its "
            "name, and give models whose directories have different names"
        )
    return files


def early_models(config: "pytest.Config") -> list[Path]:
    """The models' directories, as far as they can be told before pytest has read its options."""
    said = getattr(config.known_args_namespace, "nullspace_model", None)
    folder = config.invocation_params.dir
    if said is None:
        said, folder = config.getini("nullspace_model") or (), config.inipath.parent if config.inipath else folder
    return [folder / text for text in said]


def _given(config: "pytest.Config", option: _Option) -> list[_Given]:
    said = config.getoption(option.dest)
    if said is not None:
        folder = config.invocation_params.dir
        return [_Given(text, folder, False) for text in (said if option.repeatable else [said])]
    said = config.getini(option.dest)
    folder = config.inipath.parent if config.inipath is not None else config.rootpath
    lines = said if isinstance(said, list) else [said] if said else []
    return [_Given(text, folder, True) for text in lines]


def _read(config: "pytest.Config", option: _Option) -> Any:
    values = []
    for given in _given(config, option):
        try:
            values.append(option.read(given))
        except OptionError as error:
            raise OptionError(f"{option.dest if given.in_ini else option.flag}: {error}") from None
    if option.repeatable:
        return tuple(values)
    return values[0] if values else option.default
