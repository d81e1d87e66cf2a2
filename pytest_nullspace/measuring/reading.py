"""What is read before anything is loaded: texts, and the tokenizer and processor that make windows of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.checkpoint.header import Stamps, require_unchanged, stamps
from pytest_nullspace.errors import TextError
from pytest_nullspace.measuring import about
from pytest_nullspace.measuring.inmemory import InMemory
from pytest_nullspace.measuring.inputs import Texts, base_read, read_texts, require_peft, sources, template_of
from pytest_nullspace.measuring.limits import vocabulary
from pytest_nullspace.measuring.measurement import Measurement
from pytest_nullspace.measuring.passages import passages
from pytest_nullspace.measuring.written import Written
from pytest_nullspace.run.predictions import Headroom
from pytest_nullspace.run.stats import Drift, TextDrift
from pytest_nullspace.run.texts import FIRST, key_of
from pytest_nullspace.settings import Settings
from pytest_nullspace.text.chat import Chat, chat, chat_of_images
from pytest_nullspace.text.choice import TokenizerChoice
from pytest_nullspace.text.conversations import ASSISTANT, Conversations
from pytest_nullspace.text.images import Images
from pytest_nullspace.text.processor import Processor, processor_of
from pytest_nullspace.text.templates import Template, require_template_of_images
from pytest_nullspace.text.tokenizer import LoadedTokenizer, load_tokenizer
from pytest_nullspace.text.windows import Window, draw_windows, windows_at


@dataclass(frozen=True)
class Reading:
    """What is read before anything is loaded.

    Attributes:
        base: The base model, where it is needed.
        stamps: The files that must stay what they are until the end.
        texts: Each text, by what it is; of one of conversations what was rendered of it, of rows of images nothing.
        tokenizer: The tokenizers at hand, and the one that is used.
        tokenize: What that makes of a text.
        template: What writes conversations.
        unrendered: Those, until they are rendered.
        written: The texts among them that the base wrote.
        chats: Those that were conversations.
        images: Those that are rows of images.
        processor: What makes input of these.
    """

    base: Path | None
    stamps: Stamps
    texts: Mapping[str, str]
    tokenizer: TokenizerChoice
    tokenize: LoadedTokenizer
    template: Template | None
    unrendered: Mapping[str, Conversations]
    written: Mapping[str, Written] = field(default_factory=dict)
    chats: Mapping[str, Chat] = field(default_factory=dict)
    images: Mapping[str, Images] = field(default_factory=dict)
    processor: Processor | None = None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        settings: Settings,
        initial: Checkpoint | None,
        texts: Texts | None,
        live: InMemory | None,
    ) -> "Reading":
        """Find the base, and read the texts unless they were."""
        require_peft(checkpoint)
        base = base_read(checkpoint, settings, initial) if live is None else live.base
        require_unchanged(checkpoint.stamps)
        held = checkpoint.stamps | (stamps(base) if base is not None else frozenset())
        if settings.drift and initial is not None:
            held |= initial.stamps
        tokenizer = TokenizerChoice.of(checkpoint.directory, base) if live is None else live.tokenizer
        texts = texts or read_texts(settings)
        template = template_of(tokenizer.used, texts, settings)
        plain = {what: text if isinstance(text, str) else "" for what, text in texts.items()}
        talks = {what: text for what, text in texts.items() if isinstance(text, Conversations)}
        read = cls(base, held, plain, tokenizer, load_tokenizer(tokenizer.used), template, talks)
        images = {what: text for what, text in texts.items() if isinstance(text, Images)}
        return (
            replace(read, images=images, processor=processor_of(checkpoint, base, tokenizer.used)) if images else read
        )

    def has_text(self, settings: Settings) -> bool:
        """Whether a text is read, be it what the base writes, beside images or alone."""
        return len(self.images) < len(sources(settings))

    def with_chats(self, settings: Settings, seqlen: int) -> "Reading":
        """The same with the conversations in the model's own form, those with images among them."""
        how: dict[str, Any] = {
            "count": settings.most_windows,
            "seqlen": seqlen,
            "seed": settings.seed,
            "assistant": settings.chat == ASSISTANT,
        }
        chats = {}
        for what, talks in self.unrendered.items():
            assert self.template is not None
            chats[what] = chat(talks, self.template, self.tokenize, **how)
        for what, images in self.images.items():
            if images.are_talks:
                assert self.processor is not None
                place = self.processor.directory
                template = require_template_of_images(place, self.tokenizer.used, images.source)
                chats[what] = chat_of_images(images, template, self.processor, **how)
        texts = {what: chats[what].text if what in chats else text for what, text in self.texts.items()}
        return replace(self, texts=texts, chats=chats)

    def told(self, run: Measurement) -> dict[str, Any]:
        """What a run tells of its texts, and of the tokenizer that cut them."""
        known, preserved = vocabulary(run.adapted.model), run.settings.preserved
        texts = about.of_texts(
            self.texts, run.read, run.seqlen, self.written, known, preserved, self.chats, self.images
        )
        told = {} if self.processor is None else {"processor": self.processor.told()}
        return {**texts, **told, "tokenizer": self.tokenizer.told(self.texts, run.read, run.seqlen)}

    def with_passages(self, run: Measurement, headroom: Headroom | None) -> Drift | None:
        """How far the predictions moved, and where most in each text, with what more of the update would gain."""
        drift = run.drift
        if drift is None:
            return None

        def told(what: str, of: TextDrift) -> TextDrift:
            windows = run.read[what]
            spots = run.predictions[what].spots(len(windows))
            return replace(of, passages=passages(spots, windows, self.texts[what], self.tokenize, run.seqlen))

        further = {name: told(key_of(name), of) for name, of in drift.further.items()}
        return replace(drift, preserved=told(FIRST, drift.preserved), further=further, headroom=headroom)

    def windows(self, settings: Settings, seqlen: int) -> dict[str, Sequence[Window]]:
        """The windows of each text that may be used: drawn from it, or the stretches in which the base wrote it."""

        def of(what: str, text: str) -> Sequence[Window]:
            if what in self.chats:
                return self.chats[what].windows
            if what in self.images:
                assert self.processor is not None
                images = self.images[what]
                return self.processor.windows(images, images.drawn(settings.most_windows, settings.seed), seqlen)
            if what in self.written:
                return windows_at(text, self.tokenize, self.written[what].starts, seqlen)
            try:
                return draw_windows(text, self.tokenize, count=settings.most_windows, seqlen=seqlen, seed=settings.seed)
            except TextError as error:  # which knows the text, and not where it is from
                raise TextError(f"{sources(settings)[what]}: {error}") from None

        return {what: of(what, text) for what, text in self.texts.items()}
