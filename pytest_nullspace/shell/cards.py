"""The model cards of the adapters that are gated: which can be written, and their files."""

import stat
from pathlib import Path

from pytest_nullspace import __version__
from pytest_nullspace.checkpoint import peft
from pytest_nullspace.checkpoint.hub import local_directory
from pytest_nullspace.errors import CheckpointError, StatsError
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.report import card
from pytest_nullspace.run.saved import write_atomically
from pytest_nullspace.settings import CARD, PREFIX
from pytest_nullspace.shell.decided import why_untold
from pytest_nullspace.shell.runs import CheckpointRun, GatedRun

MOST_BYTES = 4 * 1024 * 1024
_LIBRARIES = {peft.FORMAT: "peft", peft.MLX: "mlx", peft.GGUF: "gguf"}


def check(run: GatedRun) -> None:
    """Refuse a card that could not be written, before anything is measured.

    Raises:
        CheckpointError: It cannot be read or parsed.
    """
    if isinstance(run, CheckpointRun) and (held := _read(run.path / CARD)) is not None:
        card.check(held, str(run.path / CARD))


def write(run: GatedRun, decision: Decision) -> str | None:
    """Write the result of a whole run into the adapter's card; a saved run has none.

    Returns:
        What to say of it.

    Raises:
        CheckpointError: The card cannot be read or parsed.
        StatsError: It cannot be written.
    """
    if not isinstance(run, CheckpointRun):
        return None
    file, outcome = run.path / CARD, run.peek()
    if outcome is None or (why := why_untold(run, decision)) is not None:
        return f"{file} is left as it was: {why}"
    held = _read(file)
    library = _LIBRARIES.get(run.checkpoint.format, "transformers")
    old = card.created(library, _on_hub(run.checkpoint.base)) if held is None else held
    new = card.renewed(old, card.Result(run.name, outcome, run.expectations(outcome), decision, __version__), str(file))
    if new != held:
        write_atomically(file, new, None if held is None else stat.S_IMODE(file.stat().st_mode))
    return f"the result stands in {file}"


def _on_hub(base: str | None) -> str | None:
    """The base's id on the hub; None for a folder of this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(base or "")
    except HFValidationError:
        return None
    return None if base is None or local_directory(base) is not None else base


def _read(file: Path) -> str | None:
    """The card as it is; None where there is none."""
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(
                f"{file}: is a link, a folder or no regular file, so no result is written there; put a card of its own "
                f"there, or leave {PREFIX}card out"
            )
        if status.st_size > MOST_BYTES:
            raise CheckpointError(
                f"{file}: has {status.st_size:,} bytes, and a card of at most {MOST_BYTES:,} is read; shorten it, or "
                f"leave {PREFIX}card out"
            )
        return file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{file}: is not UTF-8 (byte {error.start}); save it so, or leave {PREFIX}card out"
        ) from None
    except OSError as error:
        raise StatsError(f"{file}: cannot be read: {error.strerror}; mend that, or leave {PREFIX}card out") from None
