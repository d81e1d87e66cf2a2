"""Which tokenizer cuts the text, and what that of the base would have made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_nullspace.errors import first_line
from pytest_nullspace.text.tokenizer import (
    TOKENIZER_FILES,
    LoadedTokenizer,
    load_tokenizer,
    tokenizer_hashes,
    tokenizer_sha256,
)
from pytest_nullspace.text.windows import Shown, Window, tokens_at

FIRST_IDS = 8
"""How many ids of the first window are kept, which show what a tokenizer puts before a text."""


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer that is used, and its base's where both have one.

    Attributes:
        used: The directory, or the GGUF file, whose tokenizer cuts the text.
        base: The directory of the base's tokenizer, where another directory's is used.
    """

    used: Path
    base: Path | None = None

    @classmethod
    def of(cls, own: Path, base: Path | None) -> "TokenizerChoice":
        """The tokenizer of ``own``, the adapter's directory, if it has one, else that of ``base``, or a GGUF file."""
        beside = base.parent if base is not None and base.is_file() else base
        held = [place for place in (own, beside) if place is not None and _holds_tokenizer(place)]
        if len(held) == 2 and own.resolve() != held[1].resolve():
            return cls(*held)
        return cls(held[0] if held else base or own)

    def told(self, texts: Mapping[str, str], read: Mapping[str, Sequence[Window]], seqlen: int) -> dict[str, Any]:
        """What a run tells of its tokenizer: the digests of its files, its first ids, and whether the base's agrees.

        Args:
            texts: The texts, by what they are for.
            read: The windows of each that were used.
            seqlen: Tokens a window.
        """
        first = next(iter(read))
        files = tokenizer_hashes(self.used)
        told: dict[str, Any] = {"files": files, "first_ids": list(read[first][0].tokens[:FIRST_IDS])}
        if (decides := tokenizer_sha256(self.used)) is not None:
            told["sha256"] = decides
        read = {what: windows for what, windows in read.items() if not isinstance(windows[0].tokens, Shown)}
        if not read or self.base is None or (base_files := tokenizer_hashes(self.base)) == files:
            return told
        told["base_files"] = base_files
        try:
            return told | self.compared(load_tokenizer(self.base), texts, read, seqlen)
        except Exception as error:  # what is only compared with must not fail the gate
            return told | {"base_unread": first_line(error)}

    @staticmethod
    def compared(
        tokenizer: LoadedTokenizer, texts: Mapping[str, str], read: Mapping[str, Sequence[Window]], seqlen: int
    ) -> dict[str, Any]:
        """In how many windows ``tokenizer``, the base's, gives other ids, and the first of them."""

        def other_tokens(text: str, window: Window) -> tuple[int, ...]:
            if window.within is None:
                return tokens_at(text, tokenizer, window.start, seqlen)
            begin, end, before = window.within
            return tuple(tokenizer.bare(text[begin:end])[0][before : before + seqlen])

        pairs = {
            what: [(window.tokens, other_tokens(texts[what], window)) for window in windows]
            for what, windows in read.items()
        }
        own, other = next(iter(pairs.values()))[0]
        unlike = [(what, own, other) for what, both in pairs.items() for own, other in both if own != other]
        told: dict[str, Any] = {
            "base_first_ids": list(other[:FIRST_IDS]),
            "windows": sum(map(len, pairs.values())),
            "windows_differ": len(unlike),
        }
        if unlike:
            what, own, other = unlike[0]
            ends = min(len(own), len(other))
            place = next((i for i in range(ends) if own[i] != other[i]), ends)
            told["first_difference"] = {
                "text": what,
                "token": place,
                "id": own[place] if place < len(own) else None,
                "base_id": other[place] if place < len(other) else None,
            }
        return told


def _holds_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)
