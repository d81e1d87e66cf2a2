"""From pytest's options and ini file to `Settings`, refused where they do not go together.

The command line wins over ini, ini over the default; only ``self`` alone stands beside the ini's texts. Paths on the
command line are relative to the folder in which pytest was started, paths in an ini file to that file.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nullspace.errors import OptionError, quoted
from pytest_nullspace.settings import DEFAULT_TEXT, PREFIX, STREAM, GivenText, Settings, model_name, stats_file
from pytest_nullspace.shell import values
from pytest_nullspace.shell.options import OPTIONS, REQUIRE, Option

if TYPE_CHECKING:
    import pytest


def read_settings(config: "pytest.Config") -> Settings | None:
    """What the command line and the ini file ask for; None where nothing is to be gated, and the plugin does nothing.

    Raises:
        OptionError: An option does not take its value; the message names both. Or nothing is to be gated, and must be.
    """
    if _only_explains(config):
        return None
    if not any(_given(config, option) for option in OPTIONS if option.name in ("model", "stats")):
        if _read(config, REQUIRE) and not _shows_fixtures(config):
            raise OptionError(f"{PREFIX}require: this run gates nothing; give {PREFIX}model=DIR or {PREFIX}stats=JSON")
        return None
    read = {option.name: _read(config, option) for option in (*OPTIONS, REQUIRE)}
    return settings_of(read, config.invocation_params.dir)


def settings_of(read: Mapping[str, Any], folder: Path) -> Settings:
    """The settings that the values of all options make, where ``folder`` is the one in which they were given.

    Raises:
        OptionError: They do not go together.
    """
    from pytest_nullspace.measuring.distributed import Ranks

    first, *further = _preserved(read["calib-dataset"], folder)
    settings = Settings(
        models=read["model"],
        stats=read["stats"],
        base=read["base"],
        calib_dataset=first.spec,
        text_folder=first.folder,
        text_name=first.name,
        further=tuple(further),
        calib_size=read["calib-size"][0],
        calib_most=read["calib-size"][1],
        task_dataset=read["task-dataset"][0] if read["task-dataset"] is not None else None,
        task_folder=read["task-dataset"][1] if read["task-dataset"] is not None else Path(),
        chat=read["chat"],
        seqlen=read["seqlen"],
        max_activation_samples=read["max-activation-samples"],
        seed=read["seed"],
        batch_size=read["batch-size"],
        device=read["device"],
        device_map=read["device-map"],
        dtype=read["dtype"],
        layers=read["layers"],
        rank=read["rank"],
        stage=read["stage"],
        overrides=read["threshold"],
        save_stats=read["save-stats"],
        reports=read["report"],
        ranks=Ranks.of(os.environ),
        allow_unreached=read["allow-unreached"],
        strict_scope=read["strict-scope"],
        require=read.get(REQUIRE.name, False),
        card=read["card"],
        serve=tuple(server for given in read["serve"] for server in given),
        attest=read["attest"],
        merge=tuple(dict.fromkeys(kind for given in read["merge"] for kind in given)),
        drift=read["suggest"] or read["drift"],
        spectrum=read["spectrum"],
        suggest=read["suggest"],
        init=read["init"],
        variant=read["variant"],
        profile=read["profile"],
        compare=read["compare"],
        limits=read["compare-fail"],
        allowed=read["compare-allow"],
        weights_only=read["weights-only"],
        screen=read["screen"],
    )
    _check_together(settings)
    return settings


def _preserved(given: Sequence[GivenText], folder: Path) -> Sequence[GivenText]:
    """The preserved texts, each but the first with a name of its own; what the base writes has one already."""
    from pytest_nullspace.text.sources import SELF

    given = [*given[:1], *(replace(t, name=t.name or SELF) if t.spec == SELF else t for t in given[1:])]
    names = [text.name for text in given]
    if "" in names[1:]:
        nameless = given[names.index("", 1)].spec
        raise OptionError(
            f"{PREFIX}calib-dataset: {quoted(nameless)} needs a name, as the text after the first does: give it as "
            "NAME=TEXT"
        )
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise OptionError(f"{PREFIX}calib-dataset: two texts have the name {twice}; give each its own")
    return given or [GivenText(DEFAULT_TEXT, folder)]


def _only_explains(config: "pytest.Config") -> bool:
    """Whether pytest shows its help, versions, markers or cache, for which nothing is collected."""
    shown = config.option  # told as pytest tells, for what it does not show it runs
    return bool(shown.help or shown.version > 1 or shown.markers or getattr(shown, "cacheshow", None))


def _shows_fixtures(config: "pytest.Config") -> bool:
    return bool(config.option.showfixtures or config.option.show_fixtures_per_test)


def lists_only(config: "pytest.Config") -> bool:
    """Whether pytest runs no test, but collects them to list them or their fixtures."""
    return bool(config.option.collectonly) or _shows_fixtures(config)


def _check_together(settings: Settings) -> None:
    from pytest_nullspace.judging.invariants import Expectations, Stage

    for name, paths in (("model", settings.models), ("stats", settings.stats)):
        twice = next((path for i, path in enumerate(paths) if path in paths[:i]), None)
        if twice is not None:
            raise OptionError(f"{PREFIX}{name}: {twice} is given twice")
    try:
        Expectations(Stage(settings.stage), settings.overrides)
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
    if settings.suggest and not settings.models:
        raise OptionError(
            f"{PREFIX}suggest: asks the model for its predictions at other scales, and a saved run holds none; give "
            "the model as well"
        )
    spreads = settings.device_map not in (None, STREAM)
    if spreads and settings.ranks.size > 1:
        raise OptionError(
            f"{PREFIX}device-map: {settings.ranks.size} processes would each spread the model over the same devices; "
            "run it without torchrun"
        )
    if spreads and settings.device != "auto":
        raise OptionError(f"{PREFIX}device-map: chooses the devices itself; leave {PREFIX}device out")
    _check_screen(settings)
    _check_card(settings)
    _check_serve(settings)
    _check_attest(settings)
    _check_merge(settings)
    _check_weights_only(settings)
    _check_compare(settings)
    for option, template in (("save-stats", settings.save_stats), ("compare", settings.compare)):
        _check_apart(settings, option, template)


def _check_card(settings: Settings) -> None:
    """A card lies in the directory of a trained adapter that is gated whole."""
    if not settings.card:
        return
    why = None
    if not settings.models:
        why = "a saved run has no card; give the model as well"
    elif on_hub := next((model for model in settings.models if isinstance(model, str)), None):
        why = f"{on_hub} lies on the hub; download it, and give its directory"
    elif settings.stage != "trained":
        why = "before training there is no result to tell; leave it out"
    elif settings.weights_only:
        why = f"{PREFIX}weights-only measures no activations, which is no result; leave one of the two out"
    if why is not None:
        raise OptionError(f"{PREFIX}card: {why}")


def _check_serve(settings: Settings) -> None:
    """Servers load the files of a trained adapter, each server once."""
    named = [str(server) for server in settings.serve]
    twice = next((name for place, name in enumerate(named) if name in named[:place]), None)
    why = None
    if twice is not None:
        why = f"{twice} is given twice"
    elif named and not settings.models:
        why = "a saved run holds no files that a server could load; give the model as well"
    if why is not None:
        raise OptionError(f"{PREFIX}serve: {why}")


def _check_attest(settings: Settings) -> None:
    """A statement is of one adapter's files, which are at hand, and of a whole run."""
    if settings.attest is None:
        return
    why = None
    if settings.stats or len(settings.models) != 1:
        why = "states the result of one adapter; give one model, and no saved run"
    elif isinstance(settings.models[0], str):
        why = f"{settings.models[0]} lies on the hub; download it, and give its directory"
    elif settings.weights_only:
        why = f"{PREFIX}weights-only measures no activations, which is no result; leave one of the two out"
    if why is not None:
        raise OptionError(f"{PREFIX}attest: {why}")


def _check_merge(settings: Settings) -> None:
    """Only a trained update can be kept, or lost."""
    if settings.merge and settings.stage != "trained":
        raise OptionError(f"{PREFIX}merge: before training there is no update that a merge could keep; leave it out")


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


def _check_screen(settings: Settings) -> None:
    """What no adapter's own activations bear out proves nothing, and needs the base in memory once."""
    needing = {
        "stats": settings.stats,
        "compare": settings.compare,
        "init": settings.init,
        "require": settings.require,
        "card": settings.card,
        "attest": settings.attest,
        "drift": settings.drift,
        "spectrum": settings.spectrum,
        "suggest": settings.suggest,
        "merge": settings.merge,
        "weights-only": settings.weights_only,
        "rank": settings.rank,
        "device-map": settings.device_map is not None,
        "calib-size": settings.calib_size is None,
    }
    given = [PREFIX + name for name, value in needing.items() if value]
    if settings.screen and settings.ranks.size > 1:
        given.append("torchrun")
    if settings.screen and given:
        auto = "=auto" if given == [f"{PREFIX}calib-size"] else ""
        raise OptionError(
            f"{PREFIX}screen: takes first-order figures of adapters from the base's activations, which prove nothing; "
            f"leave it out for {' and '.join(given)}{auto}, or these out for a screen"
        )


def _check_compare(settings: Settings) -> None:
    from pytest_nullspace.judging.invariants import Expectations, Stage
    from pytest_nullspace.run.texts import DRIFT

    allowed = settings.allowed if settings.saved_init is None else ()  # it allows of the saved start as well
    for name, given in (("compare-fail", settings.limits), ("compare-allow", allowed)):
        if given and settings.compare is None:
            raise OptionError(f"{PREFIX}{name}: needs an earlier run to compare with; give it by {PREFIX}compare=JSON")
    expected = Expectations(Stage(settings.stage))
    judged = [threshold.figure for of in ("", DRIFT) for threshold in expected.thresholds(of)]
    unknown = next((limit.figure for limit in settings.limits if limit.figure not in judged), None)
    if unknown is not None:
        raise OptionError(
            f"{PREFIX}compare-fail: no figure {unknown!r} is judged at stage {settings.stage}; "
            f"there are {', '.join(judged)}"
        )


def _check_apart(settings: Settings, option: str, template: Path | None) -> None:
    """Refuse a ``template`` that would name one file for several runs."""
    names = [*(model_name(model) for model in settings.models), *(file.stem for file in settings.stats)]
    if template is not None and len({stats_file(template, name) for name in names}) < len(names):
        raise OptionError(
            f"{PREFIX}{option}: {template} would be of several models at once; put {{model}} into its "
            "name, and give models whose directories have different names"
        )


def early_models(config: "pytest.Config") -> list[Path]:
    """The models' directories, as far as they can be told before pytest has read its options."""
    said = getattr(config.known_args_namespace, "nullspace_model", None)
    folder = config.invocation_params.dir
    if said is None:
        said, folder = config.getini("nullspace_model") or (), config.inipath.parent if config.inipath else folder
    return [folder / text for text in said]


def mistyped(argument: str) -> str | None:
    """What is to be said of an argument that pytest does not know, where an option of this plugin was meant."""
    from difflib import get_close_matches

    name = argument.partition("=")[0]
    written = re.sub("^--null[-_]space[-_]|^--nullspace_", PREFIX, name)
    alike = get_close_matches(written, [option.flag for option in OPTIONS], 1, cutoff=0.85)
    if written.startswith(PREFIX):
        word = meant(written.removeprefix(PREFIX), OPTIONS, "explain")
        alike = [PREFIX + word] if word is not None else []
    elif not alike:
        return None
    return f"{name}: no such option{f'; did you mean {alike[0]}?' if alike else ''} (pytest --help lists all)"


def meant(word: str, options: Iterable[Option], *more: str) -> str | None:
    """The name that ``word`` means: of an option that others call so, or one that is nearly so; None if none is."""
    from difflib import get_close_matches

    word = word.replace("_", "-")
    here = list(options)
    others = {other: option.name for option in here for other in option.also}
    names = [name for option in here for name in (option.name, option.off) if name] + [*more]
    begun = [name for name in names if name.startswith(f"{word}-") or word.startswith(f"{name}-")]
    return others.get(word) or next(iter([*begun, *get_close_matches(word, names, 1, cutoff=0.7)]), None)


def holds_model(path: Path) -> bool:
    """Whether ``path`` is the directory of an adapter or a model, as far as a glance tells."""
    return (path / "adapter_config.json").is_file() or (
        (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    )


def require_gated(arguments: Sequence[str], folder: Path, settings: Settings, gated: Collection[Path]) -> None:
    """Refuse a model's directory that is named as one of tests beside others that are gated, as after half a change.

    Args:
        arguments: What pytest collects.
        folder: To which they are relative.
        settings: What the user asked for.
        gated: The directories that are gated.

    Raises:
        OptionError: There is one. It would collect nothing, and the others would be green for it.
    """
    for argument in arguments if settings.models else ():
        path = (folder / argument).resolve()
        if holds_model(path) and not any(of.resolve().is_relative_to(path) for of in gated):
            raise OptionError(
                f"{argument}: is a model, but {PREFIX}model names another, {settings.models[0]}; give both the same, "
                f"or leave {argument} out"
            )


def _given(config: "pytest.Config", option: Option) -> list[values.Given]:
    told = config.getini(option.dest)
    folder = config.inipath.parent if config.inipath is not None else config.rootpath
    lines = told if isinstance(told, list) else [told] if told else []
    of_ini = [values.Given(text, folder, True) for text in lines]
    said = config.getoption(option.dest)
    if said is None:
        return of_ini
    folder = config.invocation_params.dir
    given = [values.Given(text, folder, False) for text in (said if option.repeatable else [said])]
    if option.name == "calib-dataset":
        from pytest_nullspace.text.sources import SELF

        if said == [SELF]:  # what the base writes is asked beside a text, as the report advises, not in its place
            return [*(text for text in of_ini if text.text != SELF), *given]
    return given


def _read(config: "pytest.Config", option: Option) -> Any:
    found = []
    for given in _given(config, option):
        try:
            found.append(option.read(given))
        except OptionError as error:
            raise OptionError(f"{option.dest if given.in_ini else option.flag}: {error}") from None
    if option.repeatable:
        return tuple(found)
    return found[0] if found else option.default
