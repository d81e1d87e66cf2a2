"""What a run tells beside its figures: texts, settings, files, libraries, and where the time went."""

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.measuring.written import Written
from pytest_nullspace.run.texts import FIRST, key_of
from pytest_nullspace.settings import GivenText, Settings
from pytest_nullspace.text.chat import Chat
from pytest_nullspace.text.images import Images
from pytest_nullspace.text.windows import Window, distinct_rows, text_hash, unigram_loss, windows_hash


class Clock:
    """Where the time went: the seconds of each part, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def on(self, what: str, **within: float | None) -> None:
        """All since the last part ended went on this one; ``within`` it, so much on what is named, if it was done."""
        now = time.perf_counter()
        self.seconds[what], self._since = now - self._since, now
        self.seconds |= {part: seconds for part, seconds in within.items() if seconds is not None}

    @property
    def rounded(self) -> dict[str, float]:
        """The seconds of each part, to milliseconds."""
        return {what: round(took, 3) for what, took in self.seconds.items()}


def of_format(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells by which profile it is judged."""
    return {"format": checkpoint.format, "init_lora_weights": checkpoint.config.get("init_lora_weights")}


def of_checkpoint(
    checkpoint: Checkpoint, hashes: Mapping[str, str], base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What its files are, by name and by hash, and what is told of its base."""
    return {
        **of_format(checkpoint),
        "base": checkpoint.base,
        "outside": list(checkpoint.outside),
        "weights_sha256": dict(hashes),
        **(base or {}),
    }


def of_model(name: str, kind: str, remarks: Sequence[str], since: str) -> dict[str, Any]:
    """Its class, as what its base was built, what was done to fit the two, and since when its update is told."""
    model = {"model": {"class": kind, "remarks": list(remarks)}} if kind or remarks else {}
    return {"model_class": name, **model, **({"update_against": since} if since else {})}


def of_settings(settings: Settings) -> dict[str, Any]:
    """How the run was asked for."""
    return {
        "calib_size": settings.calib_size,
        "max_activation_samples": settings.max_activation_samples,
        "seed": settings.seed,
        "processes": settings.ranks.size,
        "batch_size": settings.batch_size,
        "layers": settings.layers,
        "stage": settings.stage,
        "allow_unreached": list(settings.allow_unreached),
    }


def of_texts(
    texts: Mapping[str, str],
    read: Mapping[str, Sequence[Window]],
    seqlen: int,
    written: Mapping[str, Written],
    vocabulary: int | None = None,
    preserved: Sequence[GivenText] = (),
    chats: Mapping[str, Chat] | None = None,
    images: Mapping[str, Images] | None = None,
) -> dict[str, Any]:
    """Each text that was read, the windows of it that were used, and what made it: the base, or a chat template."""
    talks, rows = chats or {}, images or {}
    told: dict[str, dict[str, Any]] = {key_of(text.name): {"given": text.spec} for text in preserved[1:]}
    if preserved and preserved[0].name:
        told[FIRST] = {"name": preserved[0].name}
    return {
        what: {
            "sha256": _digest(what, texts, talks, rows),
            "windows": len(windows),
            "seqlen": seqlen,
            "tokens": sum(len(window.tokens) for window in windows),
            "distinct": distinct_rows(windows),
            "starts": [window.start for window in windows],
            **_without_language(windows, vocabulary),
            **({"written": written[what].about} if what in written else {}),
            **({"chat": talks[what].about} if what in talks else {}),
            **({"images": rows[what].count(window.start for window in windows)} if what in rows else {}),
            "windows_sha256": windows_hash(windows),
            **told.get(what, {}),
        }
        for what, windows in read.items()
    }


def _digest(what: str, texts: Mapping[str, str], chats: Mapping[str, Chat], images: Mapping[str, Images]) -> str:
    if what in images:
        return images[what].sha256()
    return chats[what].sha256 if what in chats else text_hash(texts[what])


def _without_language(windows: Sequence[Window], vocabulary: int | None) -> dict[str, Any]:
    """What a model that knows no language would make of a text: among how many tokens it guesses, and by counting."""
    known = vocabulary or 1 + max((max(window.tokens) for window in windows), default=0)
    return {"vocabulary": known, "unigram_loss": unigram_loss(windows, known)}


def libraries(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The libraries by which the figures of ``checkpoint`` come."""
    through_peft = not checkpoint.carries_base and not checkpoint.is_whole
    return ("torch", "transformers", "safetensors", "tokenizers", *(("peft",) if through_peft else ()))


def of_libraries(*names: str) -> dict[str, str]:
    """The versions that took part, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in ("pytest-nullspace", *names):
        with suppress(PackageNotFoundError):  # which is told where it is needed
            found[name] = version(name)
    return found


def of_machine(device: str, batch_sizes: Sequence[int], load_seconds: float, clock: Clock) -> dict[str, Any]:
    """When, where and how long."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "batch_sizes": list(batch_sizes),
        "device_name": device,
        "seconds": {"load": round(load_seconds, 3), **clock.rounded},
    }
