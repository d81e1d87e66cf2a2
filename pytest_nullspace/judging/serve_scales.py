"""Rules of servers about ranks, and by what an update is scaled."""

import math
from collections.abc import Iterator, Sequence

from pytest_nullspace.checkpoint.layers import LayerSpec
from pytest_nullspace.errors import printable, quoted
from pytest_nullspace.judging.served import Check, Facts, Finding, doubt, note, refused


def rank(choices: Sequence[int], default: int | None) -> Check:
    """Rank of what a server takes: of ``choices`` the largest at most, ``default`` unless it is started otherwise."""

    def check(facts: Facts) -> Iterator[Finding]:
        widest = max(facts.layers, key=lambda layer: layer.rank)
        tensor = facts.modules.get(widest.name, widest.name)
        started = facts.asked.flags.get("max-lora-rank")
        if started is not None:
            if widest.rank > int(started[0]):
                yield refused(f"tensor {quoted(tensor)} has rank {widest.rank}, more than --max-lora-rank {started[0]}")
        elif choices and widest.rank > choices[-1]:
            yield refused(f"tensor {quoted(tensor)} has rank {widest.rank}, more than any --max-lora-rank")
        elif default is not None and widest.rank > default:
            least = next(choice for choice in choices if choice >= widest.rank)
            yield note(
                f"rank {widest.rank} is more than the {default} of the default: start it with --max-lora-rank {least}"
            )

    return check


def one_rank(facts: Facts) -> Iterator[Finding]:
    """Every layer has the rank of the config."""
    other = next((layer for layer in facts.layers if layer.rank != facts.setting("r")), None)
    if other is not None:
        tensor = facts.modules.get(other.name, other.name)
        yield refused(f"tensor {quoted(tensor)} has rank {other.rank}, and the config's r is {facts.setting('r')}")


def scaled(*, rslora: bool, by_layer: bool) -> Check:
    """The update is scaled as in training, by one ``lora_alpha``.

    Args:
        rslora: Whether the server divides by the root of the rank where the config says so.
        by_layer: Whether it divides by the rank of each layer, not by the config's ``r``, and takes an alpha of 0 for
            none.
    """

    def served(facts: Facts, layer: LayerSpec) -> float:
        if by_layer and facts.setting("lora_alpha") == 0:
            return 1.0
        divisor = float(layer.rank if by_layer else facts.setting("r"))
        if rslora and facts.setting("use_rslora"):
            divisor = math.sqrt(divisor)
        return float(facts.setting("lora_alpha")) / divisor

    def check(facts: Facts) -> Iterator[Finding]:
        unknown = [] if by_layer else [*scaled_as_trained(facts)]
        if unknown:
            yield from unknown
            return
        wrong = [
            (layer, served(facts, layer))
            for layer in facts.layers
            if layer.scale is not None and not math.isclose(layer.scale.value, served(facts, layer), rel_tol=1e-6)
        ]
        if wrong:
            layer, scale = wrong[0]
            tensor = facts.modules.get(layer.name, layer.name)
            name = "use_rslora" if facts.setting("use_rslora") and not rslora else "rank_pattern and alpha_pattern"
            why = f"{name} is not read" if facts.setting("lora_alpha") != 0 else "a lora_alpha of 0 is taken for none"
            yield refused(
                f"{len(wrong)} of {len(facts.layers)} layers would be scaled wrongly, for {why}: tensor "
                f"{quoted(tensor)} was trained with {layer.scale}, and would be served with {scale:.4g}"
            )

    return check


def scaled_as_trained(facts: Facts) -> Iterator[Finding]:
    """The update is scaled as PEFT does it; without a rank in the config nobody can tell."""
    rank = facts.setting("r")
    if not (isinstance(rank, int) and rank > 0):
        yield doubt(f"the config's r is {printable(rank)}, so by what the update would be scaled was not checked")


TGI_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj")
"""The kinds of projections, in the order in which they are prepared."""
TGI_LEAST_RANK, TGI_STEP = 8, 16
"""To the first of these, a shard, a rank is padded, and beyond to a multiple of the second."""


def padded(facts: Facts) -> Iterator[Finding]:
    """The rank needs no padding: after the first kind of projection all are scaled by the padded one."""
    rank, shards = facts.setting("r"), facts.asked.flags.get("num-shard")
    if not (isinstance(rank, int) and rank > 0):
        return  # which the rule of the scale tells
    least = TGI_LEAST_RANK * (1 if shards is None else int(shards[0]))
    full = least if rank <= least else -(-rank // TGI_STEP) * TGI_STEP
    adapted = {layer.name.rpartition(".")[2]: layer for layer in reversed(facts.layers)}
    kinds = [kind for kind in TGI_PROJECTIONS if kind in adapted]
    if len(kinds) < 2:
        return
    if full != rank:
        layer = adapted[kinds[1]]
        part = math.sqrt(rank / full) if facts.setting("use_rslora") else rank / full
        yield refused(
            f"rank {rank} is padded to {full}, by which all after {kinds[0]} are scaled: tensor "
            f"{quoted(facts.modules.get(layer.name, layer.name))} would be served with {part:.3g} of its scale"
        )
    elif shards is None:
        most = rank // TGI_LEAST_RANK
        yield note(
            f"on more cards than {most} its rank is padded, and its scale wrong: start it with --num-shard {most}"
        )
