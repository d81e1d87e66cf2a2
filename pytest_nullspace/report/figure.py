"""One figure explained: what it is, in what unit, on which text, where it is bound, and what to do. Markdown."""

from pytest_nullspace.judging.profiles import BOUNDS, OF_AVERAGES, OF_LAYERS, STAND_IN
from pytest_nullspace.run.figures import Bounds, Figure, Text

_ON = {Text.PRESERVED: "the preserved text", Text.TASK: "the task text where there is one", Text.BOTH: "both texts"}
_LETTERS = (
    "X is what comes into a layer, B its down projection (`lora_A` in PEFT), A its up projection (`lora_B`) with its "
    "scale, W the weight without them; P projects on what B can read."
)
_NATS = "One nat more makes a token 2.7 times less likely, 0.05 nats make it 5 % less likely."
_MARGIN = (
    "Behind `±` stands how far it may lie from what more text would give; where that reaches over a bound it is told "
    "as uncertain."
)


def page(figure: Figure) -> str:
    """All that is to be known of a figure, on a page of its own."""
    letters = [] if figure.of_predictions else [_LETTERS]
    return "\n".join([f"# {figure.name}", "", *_told(figure), *letters, _MARGIN, "", *_bounds(figure)])


def section(figure: Figure) -> str:
    """The same below others, where letters and margins are told once."""
    return "\n".join([f"## {figure.name}", "", *_told(figure), "", *_bounds(figure)])


def _told(figure: Figure) -> list[str]:
    """What it is and where it decides, a sentence or a few on each line."""
    block = "" if figure.of_predictions else f"; with `-vv` a layer's block has it as `{figure.symbol}`"
    key = f"; a saved run has it as `{figure.key}` (`{figure.follows}`)" if figure.key else ""
    told = [
        f"{figure.meaning} {figure.formula[0].upper()}{figure.formula[1:]}, "
        f"{f'in {figure.unit}' if figure.unit else 'a ratio without unit'}. Taken on {_ON[figure.text]}{block}{key}."
    ]
    told += [_NATS] if figure.unit else []
    if figure.sink_free:
        told.append("Where sink rows decide it, it is told without them as well, and does not pass.")
    return [*told, _decides(figure)]


def _bounds(figure: Figure) -> list[str]:
    """Its tiers and what they mean, how to set other bounds, and what to do."""
    bounds = figure.trained
    before = _tiers(figure.init) if figure.init else ["- It is not judged."]
    if figure.init == bounds:
        told = ["After training and before:", "", *_tiers(bounds)]
    else:
        told = ["After training:", "", *_tiers(bounds), "", "Before training (`--nullspace-stage=init`):", "", *before]
    asked = f"--nullspace-threshold={figure.name}:{bounds.passes:g}:{bounds.fails:g}"
    asked = f"`{asked}`, with other numbers, sets other bounds."
    return [*told, "", asked, "", f"**What to do where it does not pass.** {figure.cure}"]


def _decides(figure: Figure) -> str:
    """In which profiles it decides, and by which bounds where they are not its own."""
    if figure.of_predictions:
        return "It decides in every profile, where the drift is judged."
    layers = [f"`{profile}`" for profile, names in OF_LAYERS.items() if figure.name in names]
    told = [f"in each layer and in the averages by the profiles {', '.join(layers)}"] if layers else []
    if (alone := in_averages(figure)) is not None:
        named, (passes, fails) = alone
        told.append(f"in the averages alone by {named}, where it passes {passes} and fails {fails}")
    if figure.name in STAND_IN:
        told.append("in the averages where no test judges the drift")
    return f"It decides {'; '.join(told)}." if told else "It is shown, and decides only where a bound is given for it."


def in_averages(figure: Figure) -> tuple[str, tuple[str, str]] | None:
    """The profiles that judge it in the averages alone, and where it passes and fails by them; None if none do."""
    alone = [profile for profile, names in OF_AVERAGES.items() if figure.name in names - OF_LAYERS[profile]]
    if not alone:
        return None
    better, worse = ("<", ">") if figure.trained.lower_is_better else (">", "<")
    passes, fails = BOUNDS[alone[0]][figure.name]
    return " and ".join(f"`{profile}`" for profile in alone), (f"{better} {passes:g}", f"{worse} {fails:g}")


def ranges(bounds: Bounds) -> tuple[str, str, str]:
    """Where it passes, warns and fails."""
    better, worse = ("<", ">") if bounds.lower_is_better else (">", "<")
    return f"{better} {bounds.passes:g}", f"to {bounds.fails:g}", f"{worse} {bounds.fails:g}"


def _tiers(bounds: Bounds) -> list[str]:
    """Where it passes, warns and fails, and what that means."""
    of = zip(("passes", "warns", "fails"), ranges(bounds), bounds.words, strict=True)
    quiet = "so many times quieter than chance, or louder"
    return [f"- {tier} {where}: {words.format(against_chance=quiet)}" for tier, where, words in of]
