"""What the rules of servers look at, one check a kind of rule; `pytest_nullspace.judging.servers` says whose."""

import ast
import re
from collections.abc import Collection, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from pytest_nullspace.checkpoint.fields import HARMLESS
from pytest_nullspace.checkpoint.header import read_json_object
from pytest_nullspace.checkpoint.peft import GGUF
from pytest_nullspace.errors import printable, quoted, some
from pytest_nullspace.judging.serve_names import tail
from pytest_nullspace.judging.served import Check, Facts, Finding, doubt, is_expert, more, refused


def is_adapter(facts: Facts) -> Iterator[Finding]:
    """A directory of another format is no adapter of PEFT's, which is what servers load."""
    if not facts.is_peft:
        cure = (
            "it has no adapter: serve it as a model"
            if facts.checkpoint.is_whole
            else "merge it into a plain model (W_res + A B in each layer), and serve that"
            if facts.checkpoint.carries_base
            else "llama.cpp alone opens it: give the PEFT directory from which it was converted"
            if facts.checkpoint.format == GGUF
            else "convert it to PEFT's names first, and gate what is served"
        )
        yield refused(f"its {facts.checkpoint.config_file.name} is of {facts.checkpoint.format}, not of PEFT; {cure}")


def one_file(facts: Facts) -> Iterator[Finding]:
    """All weights lie in the one file that is opened."""
    others = sorted({tensor.file.name for tensor in facts.checkpoint.tensors.values()} - {"adapter_model.safetensors"})
    if others:
        yield refused(
            f"its weights lie in {some(others)}, and only adapter_model.safetensors would be opened; write them into "
            "that one file"
        )


def no_tensors(*kinds: str, told: str) -> Check:
    """None of these kinds, of which ``told`` says what becomes."""

    def check(facts: Facts) -> Iterator[Finding]:
        if found := facts.of_kind(*kinds):
            yield refused(f"tensor {quoted(found[0])}{more(found)}: {told}")

    return check


def no_dora(facts: Facts) -> Iterator[Finding]:
    """No DoRA."""
    magnitudes = facts.of_kind("magnitude")
    if magnitudes or facts.setting("use_dora"):
        named = f": tensor {quoted(magnitudes[0])}{more(magnitudes)}" if magnitudes else ""
        yield refused(f"use_dora is {facts.setting('use_dora')}{named}; merge it into the base, and serve that")


def no_bias(facts: Facts) -> Iterator[Finding]:
    """No biases, be they the adapter's or the base's."""
    found, setting = facts.of_kind("bias"), facts.setting("bias")
    if found:
        yield refused(f"tensor {quoted(found[0])}{more(found)} is a trained bias")
    elif setting not in (None, "none"):
        yield refused(f"the config's bias is {printable(setting)}, not none")


_HEADS = {"classifier", "score"}
_NORM = re.compile(r"_layernorm|\.norm")


def no_whole_modules(*, silently: bool, by_name: bool = False) -> Check:
    """No whole modules beside the LoRA; with ``by_name`` the config is not asked, and norms are left out later."""
    told = "left out without an error" if silently else "refused"

    def check(facts: Facts) -> Iterator[Finding]:
        whole = facts.of_kind("whole")
        norms = [name for name in whole if by_name and _NORM.search(name)]
        whole = [name for name in whole if name not in norms]
        named = [] if by_name else list(facts.setting("modules_to_save") or ())
        if norms and not whole:
            what = f"tensor {quoted(norms[0])}{more(norms)}"
            yield refused(f"{what} is a norm, which is converted and then not loaded; merge the adapter, and serve it")
        if not whole and not named:
            return
        what = f"tensor {quoted(whole[0])}{more(whole)}" if whole else f"modules_to_save {printable(named)}"
        if named and set(named) <= _HEADS:
            yield doubt(f"{what} is a head of classification, which a later version may take")
        else:
            yield refused(f"{what} is a whole module, which is {told}; merge the adapter, and serve the model")

    return check


def no_added_rows(facts: Facts) -> Iterator[Finding]:
    """What was saved of the base's own embedding is left out, so it must be the base's, without added tokens."""
    for name in facts.of_kind("base"):
        tensor = facts.checkpoint.tensors[name]
        rows, vocabulary = tensor.shape[0], None if facts.base is None else facts.base.number("vocab_size")
        if vocabulary is None:
            yield doubt(
                f"tensor {quoted(name)} is left out, and without the base nobody can tell whether rows were added"
            )
        elif rows > vocabulary:
            yield refused(
                f"tensor {quoted(name)} has {rows:,} rows, and the base {vocabulary:,}: it is left out, and the tokens "
                "that were added with it"
            )


def embedding_of_base(facts: Facts) -> Iterator[Finding]:
    """A LoRA on the embedding is as wide as the base's vocabulary."""
    vocabulary = None if facts.base is None else facts.base.number("vocab_size")
    for name in facts.of_kind("embedding"):
        width = facts.checkpoint.tensors[name].shape[-1]
        if name.endswith("_A") and vocabulary is not None and width != vocabulary:
            yield refused(f"tensor {quoted(name)} is of {width:,} tokens, and the base has {vocabulary:,}")


def plain_start(taken: Collection[str]) -> Check:
    """The adapter started from no part of the base, which would have to be taken out again; ``taken`` starts do not."""

    def check(facts: Facts) -> Iterator[Finding]:
        start = facts.setting("init_lora_weights")
        if isinstance(start, str) and start.lower() not in taken:
            yield refused(
                f"init_lora_weights is {quoted(start)}, and the base that it is served on is whole; save it by PEFT's "
                "path_initial_model_for_weight_conversion"
            )

    return check


def known_experts(facts: Facts) -> Iterator[Finding]:
    """Experts are held in so many ways that nobody wrote down which is taken."""
    if facts.experts:
        name = facts.experts[0]
        yield doubt(f"tensor {quoted(name)}{more(facts.experts)} is of experts; how they must be named was not checked")


def architectures(taken: Iterable[str], not_taken: Iterable[str]) -> Check:
    """The base is of a class that takes adapters."""
    takes, refuses = frozenset(taken), frozenset(not_taken)

    def check(facts: Facts) -> Iterator[Finding]:
        if facts.base is None:
            return
        named = facts.base.architecture
        if named in refuses:
            yield refused(f"the base is a {named}, which takes no adapter; merge it, and serve the model")
        elif named not in takes:
            yield doubt(
                f"whether {printable(named) or 'a base that names no architecture'} takes adapters was not checked"
            )

    return check


def listed_targets(facts: Facts) -> Iterator[Finding]:
    """``target_modules`` is a list, or one of two words."""
    targets = facts.setting("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield refused(f"target_modules is the regex {quoted(targets)}; write the list of the modules in its place")


def head_apart(facts: Facts) -> Iterator[Finding]:
    """No LoRA on a head that is the embedding."""
    heads = [module for module in facts.modules if module.rpartition(".")[2] in ("lm_head", "unembed_tokens")]
    if heads and facts.base is not None and facts.base.ties_head:
        yield refused(f"tensor {quoted(facts.modules[heads[0]])} is on a head that the base ties to its embedding")
    elif heads and facts.base is None:
        yield doubt(
            f"tensor {quoted(facts.modules[heads[0]])} is on the head, and without the base nobody knows if it is tied"
        )


def no_head(facts: Facts) -> Iterator[Finding]:
    """No LoRA on head or embedding."""
    names = [module for module in facts.modules if module.rpartition(".")[2] in ("lm_head", "embed_tokens")]
    if names and facts.base is not None and facts.base.architecture.startswith(("Qwen2", "Qwen3")):
        yield refused(f"tensor {quoted(facts.modules[names[0]])} is on the head or the embedding of a Qwen")


def pooled(known: Iterable[str]) -> Check:
    """The modules are of those for which there is room without a class's own help."""
    names = frozenset(known)

    def check(facts: Facts) -> Iterator[Finding]:
        other = [module for module in facts.modules if module.rpartition(".")[2] not in names]
        if other:
            yield doubt(
                f"tensor {quoted(facts.modules[other[0]])}{more(other)} is of a module that only a class with sizes of "
                "its own has room for; whether this one has was not checked"
            )

    return check


def sized(facts: Facts) -> Iterator[Finding]:
    """The matrices are as wide as one block's config says of all blocks."""
    heads, hidden, inner = (
        facts.base and facts.base.number(name) for name in ("num_attention_heads", "hidden_size", "intermediate_size")
    )
    if facts.base is None or not heads or not hidden or not inner:
        return
    of_head = facts.base.number("head_dim") or hidden // heads
    shared = facts.base.number("num_key_value_heads") or heads
    told = {
        "q_proj": (hidden, of_head * heads), "k_proj": (hidden, of_head * shared), "v_proj": (hidden, of_head * shared),
        "o_proj": ((facts.base.number("v_head_dim") or of_head) * heads, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    for layer in facts.layers:
        size = (layer.in_features, layer.out_features)
        if (wanted := told.get(layer.name.rpartition(".")[2], size)) != size and not is_expert(layer.name):
            yield doubt(
                f"tensor {quoted(facts.modules.get(layer.name, layer.name))} is of a module of {size[0]} to {size[1]}, "
                f"and the base's config makes it {wanted[0]} to {wanted[1]}; whether its class has sizes of its own "
                "was not checked"
            )
            return


def no_added_tokens(facts: Facts) -> Iterator[Finding]:
    """``added_tokens.json`` names no token beyond the base's vocabulary."""
    file = facts.checkpoint.directory / "added_tokens.json"
    if not file.exists():
        return
    added = [(token, n) for token, n in read_json_object(file, "the added tokens").items() if isinstance(n, int)]
    vocabulary = None if facts.base is None else facts.base.number("vocab_size")
    if vocabulary is None:
        yield doubt(
            f"{file.name} names {len(added)} tokens, and without the base nobody can tell whether they are its own"
        )
        return
    beyond = [token for token, number in added if number >= vocabulary]
    if beyond:
        yield refused(f"{file.name} adds {quoted(beyond[0])}{more(beyond)} to the base's {vocabulary:,} tokens")


def in_every_block(facts: Facts) -> Iterator[Finding]:
    """A projection that is adapted in one block is adapted in all, with one rank."""
    blocks = None if facts.base is None else facts.base.number("num_hidden_layers")
    if blocks is None:
        why = "its base is not at hand" if facts.base is None else "its base's config tells no num_hidden_layers"
        yield doubt(f"{why}, so that nobody can tell whether a projection is adapted in every block, as it must be")
        return
    ranks: dict[str, dict[int, int]] = {}
    for layer in facts.layers:
        match = re.search(r"(?:^|\.)layers\.(\d+)\.(?:.*\.)?(\w+)$", layer.name)
        if match is not None and not is_expert(layer.name):
            ranks.setdefault(match[2], {})[int(match[1])] = layer.rank
    for projection, of in sorted(ranks.items()):
        lacking = [block for block in range(blocks) if block not in of]
        if lacking:
            yield refused(
                f"{projection} is adapted in {len(of)} of {blocks} blocks, not in block {lacking[0]}: then it is left "
                "out in all of them"
            )
        elif len(set(of.values())) > 1:
            yield refused(f"{projection} has rank {min(of.values())} in one block and {max(of.values())} in another")


def none_missing(facts: Facts) -> Iterator[Finding]:
    """What ``target_modules`` names in the base is in the adapter."""
    targets, base = facts.setting("target_modules"), facts.base
    narrowed = any(facts.setting(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    if base is None or not isinstance(targets, list) or narrowed or not base.architecture.endswith("ForCausalLM"):
        return
    wanted = [
        m for m in sorted(base.modules) if any(m == t or m.endswith(f".{t}") for t in targets) and not is_expert(m)
    ]
    held = {tail(module) for module in facts.modules}
    missing = [module for module in wanted if tail(module) not in held]
    if missing:
        yield doubt(
            f"{len(missing)} of the {len(wanted)} modules that target_modules names have no tensors here, such as "
            f"{quoted(missing[0])}; they would be adapted by nothing, with a warning"
        )


def known_fields(facts: Facts) -> Iterator[Finding]:
    """The PEFT that is installed knows every field that is set."""
    fields = installed_fields()
    unknown = [
        name
        for name, value in facts.checkpoint.config.items()
        if fields and value and name not in fields and name not in HARMLESS
    ]
    if unknown:
        yield refused(
            f"the config's {quoted(unknown[0])} is not known to the PEFT that is installed, and would be ignored"
        )


def installed_fields() -> frozenset[str]:
    """The fields of the installed PEFT's configs, read from its source, which is not run; none where none is there."""
    spec = find_spec("peft")
    if spec is None or spec.origin is None:
        return frozenset()
    names: set[str] = {"auto_mapping", "peft_version"}
    for part in ("config.py", "tuners/lora/config.py"):
        try:
            tree = ast.parse((Path(spec.origin).parent / part).read_text("utf-8"))
        except (OSError, SyntaxError):
            return frozenset()
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        wanted = [node for node in classes if node.name in ("PeftConfigMixin", "PeftConfig", "LoraConfig")]
        names |= {
            line.target.id
            for node in wanted
            for line in node.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        }
    return frozenset(names)
