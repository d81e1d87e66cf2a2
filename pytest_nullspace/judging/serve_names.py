"""Whether a server finds every module of an adapter: the names under which it looks, held against those of the base."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pytest_nullspace.checkpoint.header import FLOATING
from pytest_nullspace.checkpoint.hub import tensors_of
from pytest_nullspace.errors import printable, quoted
from pytest_nullspace.judging.served import Check, Facts, Finding, doubt, more, refused


def mapped(module: str, prefixes: Mapping[str, str]) -> str:
    """The name of a module after a server's prefixes were put in place of those of the files, each in turn."""
    name = f"{module}."
    for old, new in prefixes.items():
        if name.startswith(old):
            name = new + name[len(old) :]
    return name[:-1]


NOT_AT_HAND = (
    "its base is not at hand, so nobody held the names of its modules against those of the base; give it by "
    "--nullspace-base=DIR"
)


_STEMS = ("model", "transformer", "gpt_neox")
"""The first parts of names that the files of a base lack which was saved without the class of its head."""


def found(wrappers: Mapping[str, Mapping[str, str]], taken: Iterable[str]) -> Check:
    """Every module is found by its whole name.

    Args:
        wrappers: For each class that renames, the prefixes of the files and what stands in their place.
        taken: The classes that hold their modules under the names of their files.
    """
    plain = frozenset(taken)

    def check(facts: Facts) -> Iterator[Finding]:
        base = facts.base
        if base is None or not base.modules:
            yield doubt(NOT_AT_HAND)
            return
        prefixes = wrappers.get(base.architecture, {})
        own = {mapped(module, prefixes) for module in base.modules}
        for stem in _STEMS if not prefixes else ():
            if not any(name.startswith(f"{stem}.") for name in base.modules):  # saved without the class of the head
                own |= {f"{stem}.{module}" for module in base.modules}
        if base.ties_head:  # the files of the base hold it once
            own.add(mapped("lm_head", prefixes))
        lost = [module for module in facts.modules if mapped(module, prefixes) not in own]
        if not lost:
            return
        told = _lost(facts, lost, own, prefixes)
        if base.architecture in wrappers or base.architecture in plain:
            yield refused(told)
        else:
            yield doubt(f"{told}; how this server names the modules of {printable(base.architecture)} was not checked")

    return check


def _lost(facts: Facts, lost: Sequence[str], own: Iterable[str], prefixes: Mapping[str, str]) -> str:
    """Which modules are not found, and under which name one of them would have been."""
    first = lost[0]
    tail = re.sub(r"^.*?(layers\.|$)", r"\1", first) or first
    near = next((name for name in sorted(own) if name.endswith(f".{tail}")), None)
    many = "none of its" if len(lost) == len(facts.modules) else f"{len(lost)} of its"
    verb = "would be found, and the base alone served" if len(lost) == len(facts.modules) else "would not be found"
    looked = mapped(first, prefixes)
    as_if = f" is looked for as {quoted(looked)}" if looked != first else ""
    there = f", and the base has {quoted(near)}" if near is not None else ", and the base has no such module"
    return f"{many} {len(facts.modules)} modules {verb}: tensor {quoted(facts.modules[first])}{as_if}{there}"


def found_by_tail(told: str) -> Check:
    """Every module is found by its name from the text model on, however that is nested."""

    def check(facts: Facts) -> Iterator[Finding]:
        if facts.base is None or not facts.base.modules:
            yield doubt(NOT_AT_HAND)
            return
        own = {tail(module) for module in facts.base.modules} | ({"lm_head"} if facts.base.ties_head else set())
        lost = [module for module in facts.modules if tail(module) not in own]
        if lost:
            where = f"{len(lost)} of its {len(facts.modules)} modules"
            yield refused(f"{where} are not in the base: tensor {quoted(facts.modules[lost[0]])}: {told}")

    return check


def tail(module: str) -> str:
    """A module's name from the list of blocks on, or its last part: what stands before changes with what was saved."""
    cut = re.search(r"[^.]+\.\d+\..*$", module)
    name = cut[0] if cut is not None else module.rpartition(".")[2]
    return f"tower {name}" if _TOWERS.search(module) else name


_TOWERS = re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|embed_vision)\.")


def only_text(flag: str | None = None, *, known: bool = True) -> Check:
    """No module of an image or sound tower, unless the server is started with ``flag``; a doubt where nobody knows."""

    def check(facts: Facts) -> Iterator[Finding]:
        towers = [module for module in facts.modules if _TOWERS.search(module)]
        if towers and (flag is None or flag not in facts.asked.flags):
            unless = "" if flag is None else f", unless it is started with --{flag}"
            told = f"tensor {quoted(facts.modules[towers[0]])}{more(towers)} is of a tower, not of text{unless}"
            yield refused(told) if known else doubt(told)

    return check


_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def among_targets(facts: Facts) -> Iterator[Finding]:
    """Every module is among those to which the server was told to restrict itself."""
    told = facts.asked.flags.get("lora-target-modules")
    if told is None or "all" in told:
        return
    names = {part for name in told for part in name.split(",")}
    for packed, parts in _PACKED.items():
        if names & {packed, *parts}:
            names |= {packed, *parts}
    lost = [module for module in facts.modules if not any(f".{module}".endswith(f".{name}") for name in names)]
    if lost:
        every = ", so that the base alone is served" if len(lost) == len(facts.modules) else ""
        yield refused(
            f"{len(lost)} of its {len(facts.modules)} modules are not among --lora-target-modules "
            f"{printable(' '.join(told))}{every}: tensor {quoted(facts.modules[lost[0]])}"
        )


def query_with_value(facts: Facts) -> Iterator[Finding]:
    """Where one of q_proj, k_proj and v_proj is adapted, q_proj and v_proj are."""
    attentions = {
        module.rpartition(".")[0] for module in facts.modules if module.endswith((".q_proj", ".k_proj", ".v_proj"))
    }
    lacking = [
        f"{attention}.{part}"
        for attention in sorted(attentions)
        for part in ("q_proj", "v_proj")
        if f"{attention}.{part}" not in facts.modules
    ]
    if lacking:
        missing = f"base_model.model.{lacking[0]}.lora_A.weight"
        yield refused(
            f"tensor {quoted(missing)}{more(lacking)} is looked for beside those of its attention, and is not there"
        )


def in_blocks(pattern: str) -> Check:
    """Every tensor has one of the names that are looked for; all others are left out without an error."""
    place = re.compile(pattern)

    def check(facts: Facts) -> Iterator[Finding]:
        lost = [name for name, of in facts.kinds.items() if of.kind != "magnitude" and not place.fullmatch(name)]
        if lost:
            all_of_it = len(lost) == len(facts.kinds)
            every = ", and the base alone served" if all_of_it else ""
            yield refused(
                f"{len(lost)} of its {len(facts.kinds)} tensors would be left out{every}: tensor {quoted(lost[0])}"
            )

    return check


def held_when_opened(_: Facts) -> Iterator[Finding]:
    """What `pytest_nullspace.checkpoint.llama_cpp` refuses as it opens the file, so that nothing is left to find."""
    return iter(())


def shaped_as_base(facts: Facts) -> Iterator[Finding]:
    """Each layer reads and gives as many numbers as the base's matrix of its name."""
    if facts.base is None:
        return  # told by the names
    shapes = {
        tail(tensor.name.removesuffix(".weight")): tensor.shape
        for tensor in tensors_of(facts.base.directory)
        if tensor.name.endswith(".weight") and tensor.dtype in FLOATING
    }
    for layer in facts.layers:
        size = layer.out_features, layer.in_features
        if (held := shapes.get(tail(layer.name), size)) != size:
            yield refused(
                f"tensor {quoted(facts.modules.get(layer.name, layer.name))} is of a matrix of {size[0]:,} x "
                f"{size[1]:,}, and the base's is {' x '.join(f'{width:,}' for width in held)}"
            )
            return
