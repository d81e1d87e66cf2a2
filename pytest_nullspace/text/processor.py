"""The processor that lies beside a model, read as data: what it makes of a row of images and text.

As with the tokenizer code beside it is never run, and the hub is never asked. The class is one of transformers, with
its backend of Pillow and NumPy, the same on every machine, where it has one, else with torchvision's; no config makes
more than `MOST_PIXELS` of a row.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import isqrt
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import opened, printable, read_json_object
from pytest_nullspace.errors import CheckpointError, TextError, first_line
from pytest_nullspace.text.classes import classes
from pytest_nullspace.text.images import MOST_PIXELS, Images, Row, bounded
from pytest_nullspace.text.pictured import MARK
from pytest_nullspace.text.tokenizer import Spans, backend
from pytest_nullspace.text.windows import Shown, Window

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
_PARTS = ("image_processor", "video_processor", "audio_processor", "feature_extractor", "tokenizer", "audio_tokenizer")
_NO_FIELDS = ("auto_map", "processor_class", "image_processor_type", "feature_extractor_type", "chat_template")
_FINE = ("patch", "merge", "channels", "frames")
"""By these an image is cut into parts, of which each holds so many times its pixels."""
MOST_COUNT, MOST_FINE = 1_000_000, 256
"""The largest count in a processor's config, and the largest by which an image is cut."""
_AROUND = (("<|vision_start|>", "<|vision_end|>"), ("<|begin_of_image|>", "<|end_of_image|>"))
"""What a model's chat template puts about an image, and its processor does not."""
_NOT_READ = ("input_ids", "attention_mask", "labels", "offset_mapping")
"""Of what a processor gives: nothing is padded, so all is attended to, and nothing is trained."""
_PADDED = "pixel_attention_mask"
"""What tells that some of the patches are no part of any image; of tiles `pytest_nullspace.measuring.tiles` knows."""


@dataclass(frozen=True)
class Processor:
    """A model's own processor.

    Attributes:
        directory: Where it lies.
        kind: What its class is called.
        call: It.
        sees: What it calls the pixels that the model reads.
        mark: What stands in a text where an image does.
        about: What is put before and behind that, where the text does not say where its images stand.
        unscored: The ids of the tokens that stand for an image's parts, which nobody predicts.
    """

    directory: Path
    kind: str
    call: Any
    sees: str
    mark: str
    about: tuple[str, str]
    unscored: frozenset[int]

    def told(self) -> dict[str, Any]:
        """What a run tells of it: its class, and the digests of its files."""
        hashes = {}
        for name in (PROCESSOR, PREPROCESSOR):
            if (self.directory / name).is_file():
                with opened(self.directory / name, "the processor") as (stream, _):
                    hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"class": self.kind, "files": hashes}

    def windows(self, images: Images, numbers: Sequence[int], seqlen: int) -> tuple[Window, ...]:
        """The rows of these numbers, each as a window of at most ``seqlen`` tokens.

        Raises:
            TextError: One cannot be read, or its images alone are more.
        """
        return tuple(Window(number, self.window(images.rows[number], seqlen)) for number in numbers)

    def window(self, row: Row, seqlen: int) -> Shown:
        """What it makes of a row, the text cut to ``seqlen`` tokens.

        Raises:
            TextError: The row cannot be read, or its images alone are more.
        """
        ids, beside = self._made(row)
        last = max((place for place, token in enumerate(ids) if token in self.unscored), default=-1)
        if not ids:
            raise TextError(f"{row.where}: has no tokens; remove it")
        if last >= seqlen:
            raise TextError(
                f"{row.where}: its images end at token {last + 1:,}, and a window has {seqlen:,}; raise "
                "--nullspace-seqlen, or scale the image down"
            )
        form = tuple((name, value.dtype, tuple(value.shape)) for name, value in sorted(beside.items()))
        digest = _sha256(beside)
        again = partial(self._beside, row, len(ids), seqlen, digest)
        return Shown(ids[:seqlen], again, self.unscored, digest, row.where, form)

    def spans(self, row: Row) -> Spans:
        """Of which characters of a conversation's text each token is, those that stand for images left out.

        Raises:
            TextError: It does not tell.
        """
        made = self._called(row, return_offsets_mapping=True)
        if self.call.replaced is None or self.call.replaced[0] != row.text or "offset_mapping" not in made:
            raise TextError(
                f"{row.where}: the model's processor does not tell of which characters its tokens are, so nobody can "
                "tell which the assistant says; leave --nullspace-chat=assistant out"
            )
        moved = self.call.replaced[1]
        ends = [place["new_span"][1] for place in moved]
        gained = [0, *(place["new_span"][1] - place["span"][1] for place in moved)]

        def before(character: int) -> int:
            """Where a character of the text with all that stands for its images stood before."""
            return character - int(gained[bisect_right(ends, character)])

        inside = [range(*place["new_span"]) for place in moved]
        return [
            (0, 0) if any(first in of for of in inside) else (before(first), before(after))
            for first, after in made["offset_mapping"][0].tolist()
        ]

    def _beside(self, row: Row, length: int, seqlen: int, digest: str) -> Mapping[str, Any]:
        """What the model reads beside the ids; made anew each time, for the pixels of all rows would fill memory.

        Raises:
            TextError: It is no more what it was.
        """
        ids, beside = self._made(row)
        if len(ids) != length or _sha256(beside) != digest:
            raise TextError(f"{row.where}: its image changed while it was read; run again once nothing writes to it")
        return {
            name: value[:, :seqlen] if tuple(value.shape[:2]) == (1, length) else value
            for name, value in beside.items()
        }

    def _made(self, row: Row) -> tuple[list[int], dict[str, Any]]:
        made = self._called(row)
        beside = {name: value for name, value in made.items() if name not in _NOT_READ and hasattr(value, "dtype")}
        is_tiled, is_told = (f"aspect_ratio_{part}" in beside for part in ("ids", "mask"))
        if (_PADDED in beside and not bool(beside[_PADDED].all())) or (is_tiled and not is_told):
            raise TextError(
                f"{row.where}: the model pads its images, whose padding would be counted as patches; give rows of one "
                "image, or gate the model on text alone"
            )
        return made["input_ids"][0].tolist(), beside

    def _called(self, row: Row, **how: Any) -> Any:
        """What it gives for a row."""
        text = self._text(row)
        images = [picture.image() for picture in row.pictures]
        if row.talk:
            begin = self.call.tokenizer.bos_token  # which a template may write, as transformers asks too
            how["add_special_tokens"] = not (begin and text.startswith(begin))
        elif self._reads_both_ways:
            text, how["suffix"] = self.mark * len(images), [text.rpartition(self.mark)[2]]
        self.call.replaced = None
        try:
            with bounded(row.where):
                return self.call(text=[text], images=images or None, return_tensors="pt", **how)
        except TextError:
            raise
        except Exception as error:
            raise TextError(f"{row.where}: the model's processor cannot take it: {first_line(error)}") from error

    @property
    def _reads_both_ways(self) -> bool:
        """Whether it reads all but a suffix with a look at what comes, as PaliGemma does."""
        return "suffix" in signature(self.call.__call__).parameters

    def _text(self, row: Row) -> str:
        """The row's text with what stands for an image in it, where it does not say itself where they stand."""
        count = len(row.pictures)
        if row.talk:
            if self._reads_both_ways:
                raise TextError(
                    f"{row.where}: the model reads its prompt both ways and has no turns; name a column of plain text"
                )
            if (told := row.text.count(self.mark)) != count:
                raise TextError(
                    f"{row.where}: the chat template writes {self.mark} {told} times, and it has {count} images; take "
                    "that out of its text, or put the template of the model's processor there"
                )
            return row.text
        for mark in (self.mark, MARK):
            if count and (told := row.text.count(mark)):
                if told != count:
                    raise TextError(
                        f"{row.where}: its text says {mark} {told} times, and it has {count} images; mend one of them"
                    )
                return row.text.replace(mark, self.mark)
        before, behind = self.about
        by_itself = hasattr(self.call, "num_query_tokens")  # as BLIP-2's, which writes them before all text
        return row.text if by_itself else (before + self.mark + behind) * count + row.text


def processor_of(checkpoint: Checkpoint, base: Path | None, tokenizer: Path) -> Processor:
    """The processor of a checkpoint's model: that in its own directory, or else its base's.

    Args:
        checkpoint: The checkpoint.
        base: Its base model, where that is another directory or a GGUF file.
        tokenizer: Where the tokenizer lies.

    Raises:
        CheckpointError: There is none, or none that can be taken.
    """
    model = checkpoint.directory if base is None else base
    return load_processor(require_processor(checkpoint, base), model, tokenizer)


def require_processor(checkpoint: Checkpoint, base: Path | None) -> Path:
    """Where the processor of a checkpoint's model lies; nothing is loaded.

    Raises:
        CheckpointError: There is none, or its configuration cannot be read or asks for too much.
    """
    model = checkpoint.directory if base is None else base
    for place in (checkpoint.directory, model):
        if any((place / name).is_file() for name in (PROCESSOR, PREPROCESSOR)) and not model.is_file():
            _configs(place)
            return place
    raise CheckpointError(
        f"{model}: no processor of images lies in it (looked for {PROCESSOR}, {PREPROCESSOR}); give text alone, of a "
        "table by the name of its column as in FILE:text, or save the base model's processor there"
    )


def load_processor(directory: Path, base: Path, tokenizer: Path) -> Processor:
    """The processor of a model.

    Args:
        directory: Where its files lie.
        base: Where the model's config does.
        tokenizer: Where its tokenizer does.

    Raises:
        CheckpointError: It cannot be read, asks for too much, or transformers has none of its own for the model.
    """
    fields, of_image = _configs(directory)
    model = read_json_object(base / "config.json", "the base model's config").get("model_type")
    kind, image_kind = classes(fields, of_image, model, directory)
    try:
        image_processor = image_kind.from_dict(_plain(of_image))
        held = {"image_processor": image_processor, "tokenizer": backend(tokenizer)}
        arguments = [held.get(name) for name in kind.get_attributes()]
        # What hears, and what reads video, which needs torchvision, is left out: there is neither.
        lenient: Any = type(
            kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None} | _telling(kind)
        )
        call = lenient.from_args_and_dict(arguments, _plain(fields, *_PARTS))
        if not hasattr(call, "image_token"):
            raise CheckpointError(
                f"{directory}: a {kind.__name__} puts no image among the words of a text, so there are no rows of "
                "both; gate the model on text"
            )
        mark = str(call.image_token)
        known = held["tokenizer"].get_vocab()
        told = [token for token in call.image_token_ids if isinstance(token, int)]
        unscored = frozenset(told or {known[mark]})  # BLIP-2's processor tells none since transformers 5.24
    except CheckpointError:
        raise
    except Exception as error:
        cure = "save the base model's processor into the directory"
        raise CheckpointError(
            f"{directory}: transformers cannot build the processor of its images: {first_line(error)}; "
            f"{'install that' if isinstance(error, ImportError) else cure}, or gate the model on text"
        ) from error
    around = next((pair for pair in _AROUND if all(part in known for part in pair)), ("", ""))
    return Processor(directory, kind.__name__, call, image_processor.model_input_names[0], mark, around, unscored)


def _telling(kind: Any) -> dict[str, Any]:
    """What a subclass of a processor needs to keep what it put in place of each image, and of which text."""

    def replaced(self: Any, text: Sequence[str], *args: Any, **how: Any) -> Any:
        before = text[0]
        new = kind.get_text_with_replacements(self, text, *args, **how)
        self.replaced = before, new[1][0] if new[1] else []
        return new

    return {"get_text_with_replacements": replaced, "replaced": None}


def _configs(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the processor, and those of its part that reads images."""
    fields, of_image = (
        read_json_object(directory / name, "the processor's configuration") if (directory / name).is_file() else {}
        for name in (PROCESSOR, PREPROCESSOR)
    )
    if isinstance(nested := fields.get("image_processor"), dict):
        of_image = nested
    for file, held in ((PROCESSOR, fields), (PREPROCESSOR, of_image)):
        _check(held, directory / file)
    return fields, of_image


def _check(fields: Mapping[str, Any], file: Path) -> None:
    """Refuse what would make of a small image a giant one, or very many."""

    def refuse(name: str, value: object) -> None:
        raise CheckpointError(
            f"{file}: {printable(name)} is {printable(value)}, more than any processor asks for; give the one that was "
            "saved with the model"
        )

    def check(name: str, value: object) -> None:
        match value:
            case {"height": int(height), "width": int(width)} | [int(height), int(width)]:
                if height * width > MOST_PIXELS:
                    refuse(name, value)
            case Mapping():
                for inner, held in value.items():
                    check(str(inner), held)
            case list():
                for held in value:
                    check(name, held)
            case bool():
                pass
            case int() | float():
                if not abs(value) <= _most(name):
                    refuse(name, value)

    for name, value in fields.items():
        check(name, value)


def _most(name: str) -> int:
    """The largest number that a field of that name may have."""
    if "pixels" in name or name.endswith(("edge", "height", "width")):
        return MOST_PIXELS
    if any(part in name for part in _FINE) and "max" not in name:
        return MOST_FINE
    return isqrt(MOST_PIXELS) if "size" in name else MOST_COUNT


def _sha256(beside: Mapping[str, Any]) -> str:
    """A digest of what goes beside the ids, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(beside.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    """Those of a tensor; of bfloat16, which NumPy lacks, as float32, which holds it."""
    try:
        data: bytes = value.contiguous().numpy().tobytes()
    except TypeError:
        data = value.contiguous().float().numpy().tobytes()
    return data


def _plain(fields: Mapping[str, Any], *others: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in (*_NO_FIELDS, *others)}
