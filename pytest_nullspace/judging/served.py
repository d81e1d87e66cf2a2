"""An adapter as a server would meet it: what was asked of which server, the base it is put on, and its modules.

Pure but for headers and configs: no server, no torch.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import read_json_object
from pytest_nullspace.checkpoint.hub import at_hand, tensors_of
from pytest_nullspace.checkpoint.layers import LayerSpec
from pytest_nullspace.checkpoint.peft import FORMAT, PREFIX
from pytest_nullspace.errors import OptionError, quoted
from pytest_nullspace.judging.verdicts import Tier

SERVERS: Mapping[str, tuple[str, ...]] = {
    "vllm": ("max-lora-rank", "lora-target-modules", "enable-tower-connector-lora"),
    "sglang": ("max-lora-rank", "lora-target-modules"),
    "tgi": ("num-shard",),
    "llama.cpp": (),
    "peft": (),
}
"""Each server, and those of its own settings that decide which adapters it takes."""

_VERSION = re.compile(r"[vb]?(\d+(?:\.\d+)*)")


@dataclass(frozen=True)
class Asked:
    """A server that an adapter is held against.

    Attributes:
        server: A key of `SERVERS`.
        version: Its version; None for the newest of which each rule was read.
        flags: The settings with which it is started, by name, each with its values.
    """

    server: str
    version: str | None = None
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        """The server and its version, such as ``vllm==0.11``."""
        return self.server if self.version is None else f"{self.server}=={self.version}"


def asked(text: str) -> tuple[Asked, ...]:
    """The servers that one value of the option names: ``vllm,sglang==0.5``, or one of them with its own settings.

    Raises:
        OptionError: It names none, or a setting that no rule asks for.
    """
    try:
        head, *rest = shlex.split(text)
    except ValueError:
        raise OptionError(f"takes servers such as {_EXAMPLE}, not {quoted(text)}") from None
    servers = [_server(part, text) for part in head.split(",")]
    if not rest:
        return tuple(servers)
    if len(servers) > 1:
        raise OptionError(f"takes settings of one server alone, such as {_EXAMPLE}, not {quoted(text)}")
    only = servers[0]
    return (Asked(only.server, only.version, _flags(rest, only.server)),)


_EXAMPLE = "vllm, vllm==0.11, or 'vllm --max-lora-rank 64'"


def _server(part: str, text: str) -> Asked:
    name, _, version = part.strip().partition("==")
    if name not in SERVERS or ("==" in part and not _VERSION.fullmatch(version)):
        raise OptionError(f"takes servers of {', '.join(SERVERS)}, such as {_EXAMPLE}, not {quoted(text)}")
    return Asked(name, version or None)


def _flags(words: Iterable[str], server: str) -> Mapping[str, tuple[str, ...]]:
    flags: dict[str, tuple[str, ...]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            flags[name] = (value,) if value else ()
        else:
            flags[name] = (*flags.get(name, ()), word)
    unknown = next((name for name in flags if name not in SERVERS[server]), None)
    if unknown is not None:
        known = ", ".join(f"--{known}" for known in SERVERS[server]) or "none"
        raise OptionError(f"knows no setting {quoted(unknown)} of {server} that a rule asks for; there are: {known}")
    for name in ("max-lora-rank", "num-shard"):
        told = flags.get(name)
        if told is not None and not (len(told) == 1 and told[0].isdecimal() and int(told[0])):
            raise OptionError(f"--{name} of {server} takes one whole number, not {quoted(' '.join(told))}")
    return flags


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that can be compared, such as ``(0, 11)``."""
    found = _VERSION.match(version)
    return tuple(map(int, found[1].split("."))) if found else ()


@dataclass(frozen=True)
class Base:
    """The base model on which a server puts the adapter, as its files tell.

    Attributes:
        directory: Where it lies.
        config: Its config.
        modules: The modules that have a matrix in its files; empty where there are no safetensors.
    """

    directory: Path
    config: Mapping[str, Any]
    modules: frozenset[str]

    @property
    def architecture(self) -> str:
        """The class that its config names; empty where it names none."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    def number(self, name: str) -> int | None:
        """A whole number of its config, or of the text's part in it."""
        text = self.config.get("text_config")
        for config in (text if isinstance(text, Mapping) else {}, self.config):
            if isinstance(config.get(name), int):
                return int(config[name])
        return None

    @property
    def ties_head(self) -> bool:
        """Whether its head is its embedding; where the config leaves its class's default out, the files tell."""
        text = self.config.get("text_config")
        of_text = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
        told = self.config.get("tie_word_embeddings", of_text)
        if isinstance(told, bool):
            return told
        return bool(self.modules) and not any(module.endswith("lm_head") for module in self.modules)


_MATRIX = re.compile(r"\.(weight|qweight|weight_packed)$")


def base_at_hand(checkpoint: Checkpoint, named: str | None) -> Base | None:
    """The base of an adapter where it lies on this machine; nothing is downloaded.

    Args:
        checkpoint: The adapter.
        named: The base that the user names; None for that of the adapter's config.

    Raises:
        CheckpointError: It is there, and a file of it cannot be read.
    """
    name = named or checkpoint.base
    if not name:
        return None
    directory = at_hand(name, None if named else checkpoint.base_revision)
    if directory is None or not (directory / "config.json").is_file():
        return None
    modules = {
        _MATRIX.sub("", tensor.name)
        for tensor in tensors_of(directory)
        if _MATRIX.search(tensor.name) and (len(tensor.shape) > 1 or not tensor.name.endswith(".weight"))
    }
    config = read_json_object(directory / "config.json", "the base model's config")
    return Base(directory, config, frozenset(modules))


class Kind(NamedTuple):
    """What a tensor of an adapter is, by its name.

    Attributes:
        kind: ``lora``, ``embedding``, ``magnitude``, ``bias``, ``tokens``, ``base`` or ``whole``.
        module: Of which module.
    """

    kind: str
    module: str


_KINDS = (
    ("lora", re.compile(r"\.lora_[AB]\.weight$")),
    ("embedding", re.compile(r"\.lora_embedding_[AB]$")),
    ("magnitude", re.compile(r"\.lora_magnitude_vector(\.weight)?$")),
    ("tokens", re.compile(r"(\.token_adapter)?\.trainable_tokens_delta$")),
    ("bias", re.compile(r"(\.lora_B|\.base_layer)?\.bias$")),
    ("base", re.compile(r"\.base_layer\.weight$")),
)


def kind_of(tensor: str) -> Kind:
    """What a tensor of that name is."""
    name = tensor.removeprefix(PREFIX)
    for kind, pattern in _KINDS:
        if pattern.search(name):
            return Kind(kind, pattern.sub("", name))
    return Kind("whole", name.rpartition(".")[0])


class Finding(NamedTuple):
    """What a rule finds: it fails what would be served wrongly, warns of what nobody can tell, and passes with a note.

    Attributes:
        what: A sentence that names the tensor, field or layer.
        tier: How it is judged.
    """

    what: str
    tier: Tier


@dataclass(frozen=True)
class Facts:
    """All that a rule looks at.

    Attributes:
        checkpoint: The adapter.
        base: Its base, if it is at hand.
        asked: The server.
    """

    checkpoint: Checkpoint
    base: Base | None
    asked: Asked

    @property
    def is_peft(self) -> bool:
        """Whether it is an adapter beside a base, as servers load it."""
        return self.checkpoint.format == FORMAT

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """What each tensor is, by its name, in the order of names."""
        return {name: kind_of(name) for name in sorted(self.checkpoint.tensors)}

    def of_kind(self, *kinds: str) -> list[str]:
        """The tensors of these kinds."""
        return [name for name, of in self.kinds.items() if of.kind in kinds]

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """The adapted modules, but experts: each with one of its tensors, by the name that its file gives it."""
        tensors = self.checkpoint.tensors
        found = {
            of.module: tensors[name].stored or name
            for name, of in reversed(list(self.kinds.items()))
            if of.kind in ("lora", "embedding")
        }
        return {module: tensor for module, tensor in sorted(found.items()) if not is_expert(module)}

    @property
    def experts(self) -> list[str]:
        """The tensors of experts and of bare parameters, which servers hold in many ways."""
        return [name for name, of in self.kinds.items() if is_expert(of.module)]

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Its adapted linear layers."""
        return self.checkpoint.layers

    def setting(self, name: str) -> Any:
        """A field of the adapter's config."""
        return self.checkpoint.config.get(name)


def is_expert(module: str) -> bool:
    """Whether a module is an expert's, or a block's experts together."""
    return re.search(r"\.experts(\.|$)", module) is not None


Check = Callable[[Facts], Iterable[Finding]]
"""What one rule finds in an adapter."""


def refused(what: str) -> Finding:
    """What would be served wrongly, or not at all."""
    return Finding(what, Tier.FAIL)


def doubt(what: str) -> Finding:
    """What nobody can tell from here."""
    return Finding(what, Tier.WARN)


def note(what: str) -> Finding:
    """What is taken, if the server is started so."""
    return Finding(what, Tier.PASS)


def more(names: Sequence[str]) -> str:
    """How many there are beside the first."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
