"""The text that a base model writes itself, for who has none that its knowledge came from: had once, then kept.

It is kept in the user's own cache folder, under a name that is made of all that it follows from, as JSON whose column
``text`` holds a stretch for each window: the file can be given as a text itself, on this machine or another.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.errors import OptionError, StatsError, TextError
from pytest_nullspace.run.saved import write_atomically
from pytest_nullspace.text.sources import OPTION, SELF

if TYPE_CHECKING:
    from pytest_nullspace.model import AdaptedModel

BETWEEN = "\n\n"
"""What stands between two texts, as between those of any table."""
_VERSION = 1
"""Of the way in which it is written; another one has files of its own."""


@dataclass(frozen=True)
class Request:
    """All that the text follows from.

    Attributes:
        base_sha256: The base model's weights and config.
        tokenizer: The digests of its tokenizer's files.
        windows: How many stretches.
        seqlen: Tokens of each.
        seed: Of the choice of tokens.
        dtype: In which numbers the base runs.
        device: On what kind of device.
    """

    base_sha256: str
    tokenizer: Mapping[str, str]
    windows: int
    seqlen: int
    seed: int
    dtype: str
    device: str

    @property
    def file_name(self) -> str:
        """The name under which it is kept."""
        told = json.dumps([_VERSION, asdict(self)], sort_keys=True)
        return f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"


@dataclass(frozen=True)
class Written:
    """A text that a base wrote.

    Attributes:
        stretches: It in stretches, one for each window.
        about: What a run tells of it: from which base and token, where it is kept, and what it cost.
    """

    stretches: tuple[str, ...]
    about: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The whole, as its file is read where that is given."""
        return BETWEEN.join(self.stretches)

    @property
    def starts(self) -> tuple[int, ...]:
        """The character at which each stretch begins."""
        ends = [0]
        for stretch in self.stretches:
            ends.append(ends[-1] + len(stretch) + len(BETWEEN))
        return tuple(ends[:-1])


def require_base(adapted: "AdaptedModel", checkpoint: Checkpoint) -> None:
    """Refuse an adapter that, switched off, is not its base: what it wrote would be another model's.

    Raises:
        OptionError: It is one, or its model writes no text.
    """
    option = f"{OPTION}={SELF}"
    if adapted.is_encoder_decoder or not getattr(adapted.model, "can_generate", lambda: False)():
        raise OptionError(f"{option}: {checkpoint.directory} is no causal language model, which alone writes text")
    if adapted.switched_off is None:
        raise OptionError(
            f"{option}: {checkpoint.directory} with its adapter switched off is not its base model, so it cannot write "
            "the base's text; give a text"
        )


def had(request: Request, write: Callable[[], Sequence[str]], first_token: int) -> Written:
    """The text as it is kept, or else written now and kept; several processes write it once.

    Args:
        request: Which text.
        write: Has the base write its stretches.
        first_token: From which token.

    Raises:
        TextError: The base writes too little.
    """
    file, since = cache_folder() / "self" / request.file_name, time.perf_counter()
    with ExitStack() as held:
        is_kept = _lock(file, held)
        kept = _kept(file)
        stretches = tuple(write()) if kept is None else kept
        if kept is None and is_kept:
            try:
                write_atomically(file, json.dumps({"text": stretches}, ensure_ascii=False) + "\n")
            except StatsError:  # a full or foreign folder: the text is no other for that
                is_kept = False
    if not "".join(stretches).strip():
        raise TextError(f"{OPTION}={SELF}: the base model writes nothing but blanks; give a text")
    about = {
        "base_sha256": request.base_sha256,
        "first_token": first_token,
        "kept": str(file) if is_kept else None,
        "was_kept": kept is not None,
        "seconds": round(time.perf_counter() - since, 3),
    }
    return Written(stretches, about)


def cache_folder() -> Path:
    """The plugin's own among the user's cache folders."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named) if named else Path.home() / ".cache"
    except RuntimeError:  # nobody's home
        folder = Path(".cache").absolute()
    return folder / "pytest-nullspace"


def _lock(file: Path, held: ExitStack) -> bool:
    """Hold the lock of ``file``; whether there is a place to keep it."""
    from filelock import FileLock

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(FileLock(file.with_suffix(".lock")))
    except OSError:
        return False
    return True


def _kept(file: Path) -> tuple[str, ...] | None:
    """What is kept in ``file``; None where nothing is, or nothing that was written here."""
    try:
        told = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    stretches = told.get("text") if isinstance(told, dict) else None
    if not isinstance(stretches, list) or not stretches or not all(isinstance(part, str) for part in stretches):
        return None
    return tuple(stretches)
