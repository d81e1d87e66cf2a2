"""What a measurement needs beside its checkpoint: texts, base models and a tokenizer, read without torch.

All of it is looked at before pytest collects, so that what is wrong is one usage error and not an error of each test.
"""

from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytest_nullspace.checkpoint import Checkpoint, gguf
from pytest_nullspace.checkpoint.arrays import is_orthonormal
from pytest_nullspace.checkpoint.header import printable, read_json_object
from pytest_nullspace.checkpoint.hub import base_of, local_directory, tensors_of, weight_files
from pytest_nullspace.checkpoint.lora_null import DOWN
from pytest_nullspace.checkpoint.peft import writes_into_base
from pytest_nullspace.errors import CheckpointError, TextError
from pytest_nullspace.run.texts import FIRST, key_of
from pytest_nullspace.settings import DEFAULT_TEXT, PREFIX, Settings
from pytest_nullspace.text.choice import TokenizerChoice
from pytest_nullspace.text.conversations import ASSISTANT, AUTO, OFF, Conversations
from pytest_nullspace.text.images import Images, require_pillow
from pytest_nullspace.text.processor import require_processor
from pytest_nullspace.text.readers import Text, read
from pytest_nullspace.text.sources import (
    NAMED_SETS,
    OPTION,
    PLAIN,
    TASK_OPTION,
    FileText,
    SelfText,
    Source,
    parse_source,
)
from pytest_nullspace.text.templates import Template, require_template, require_template_of_images
from pytest_nullspace.text.tokenizer import check_tokenizer, require_tokenizer
from pytest_nullspace.text.windows import require_length

Texts = Mapping[str, Text]
"""The texts of one run by what they are called in its statistics."""


def sources(settings: Settings) -> dict[str, Source | SelfText]:
    """What the text options name; nothing is read.

    Raises:
        TextError: One names nothing that is there.
    """
    first, *further = settings.preserved
    named = {FIRST: parse_source(first.spec, first.folder, OPTION)}
    named |= {key_of(text.name): parse_source(text.spec, text.folder, OPTION) for text in further}
    if settings.task_dataset is not None:
        named["task_text"] = parse_source(settings.task_dataset, settings.task_folder, TASK_OPTION)
    return named


def read_texts(settings: Settings) -> Texts:
    """The texts that the settings name, but what the base writes, which must first be loaded.

    Raises:
        TextError: One cannot be had, or is shorter than a window of the length that was asked for.
    """
    given = {what: source for what, source in sources(settings).items() if not isinstance(source, SelfText)}
    texts = {what: _read(source, settings.chat) for what, source in given.items()}
    for what, source in given.items():
        text = texts[what]
        if isinstance(text, Images):
            require_pillow(text)
        elif isinstance(text, str):
            try:
                require_length(text, settings.seqlen or 0)
            except TextError as error:
                raise TextError(f"{source}: {error}") from None
    _require_apart(texts, settings)
    if settings.chat not in (AUTO, OFF) and not any(map(_are_talks, texts.values())):
        raise TextError(
            f"{PREFIX}chat: no text holds conversations; give a table with a column messages, or with the columns "
            "prompt and completion, or leave the option out"
        )
    return texts


def _require_apart(texts: Texts, settings: Settings) -> None:
    """Refuse a task text that is a preserved one, be it under another name: what was learned is not what was kept."""
    task = texts.get("task_text")
    same = next((text for what, text in texts.items() if what != "task_text" and text == task), None)
    if task is not None and same is not None:
        raise TextError(
            f"{TASK_OPTION}={settings.task_dataset}: the same text as is given to be preserved ({OPTION}), so nothing "
            "could tell what was kept from what was learned; give the text of the task, or leave it out"
        )


def _read(source: Source, chat: str) -> Text:
    try:
        return read(source, chat)
    except TextError as error:
        if source != NAMED_SETS[DEFAULT_TEXT]:
            raise
        raise TextError(f"{error} ({DEFAULT_TEXT} is what is read where none is given)") from None


def _are_talks(text: Text) -> bool:
    return isinstance(text, Conversations) or (isinstance(text, Images) and text.are_talks)


def template_of(tokenizer: Path, texts: Texts, settings: Settings) -> Template | None:
    """The chat template by which the conversations among ``texts`` are written; None where there are none.

    Raises:
        CheckpointError: None lies beside the tokenizer.
    """
    held = next((what for what, text in texts.items() if isinstance(text, Conversations)), None)
    return None if held is None else require_template(tokenizer, sources(settings)[held])


def check_chat(
    checkpoint: Checkpoint, initial: Checkpoint | None, settings: Settings, texts: Texts, tokenizer: Path | None = None
) -> None:
    """Refuse conversations that the tokenizer's template cannot write, as far as the first of each text tells.

    Raises:
        NullspaceError: There is no template, or it cannot be followed.
    """
    held = [text for text in texts.values() if isinstance(text, Conversations)]
    if not held:
        return
    if tokenizer is None:
        base = base_read(checkpoint, settings, initial)
        tokenizer = TokenizerChoice.of(checkpoint.directory, base).used
    template = template_of(tokenizer, texts, settings)
    for conversations in held:
        assert template is not None
        template.render(conversations.rows[:1], assistant=settings.chat == ASSISTANT)


def may_be_rows(settings: Settings) -> bool:
    """Whether a text may hold conversations or images, of which nobody knows how many windows they are unread."""
    try:
        given = sources(settings).values()
    except TextError:  # which is told where it is read, after all that is wrong without it
        return False
    return any(
        source.path.suffix.lower() not in PLAIN if isinstance(source, FileText) else not isinstance(source, SelfText)
        for source in given
        if source not in NAMED_SETS.values()
    )


def check_processor(checkpoint: Checkpoint, initial: Checkpoint | None, settings: Settings, texts: Texts) -> None:
    """Refuse rows of images where what makes a model's input of them is not there or cannot be read.

    Raises:
        NullspaceError: It is so, or the chat template of that cannot write the first conversation.
    """
    held = [text for text in texts.values() if isinstance(text, Images)]
    if not held:
        return
    base = base_read(checkpoint, settings, initial)
    place = require_processor(checkpoint, base)
    for images in held:
        if images.are_talks:
            tokenizer = TokenizerChoice.of(checkpoint.directory, base).used
            template = require_template_of_images(place, tokenizer, images.source)
            template.render([images.rows[0].talk], assistant=settings.chat == ASSISTANT)


def is_base_read(checkpoint: Checkpoint, settings: Settings, initial: Checkpoint | None) -> bool:
    """Whether a base model is read for ``checkpoint``: its own, or that with which it is compared."""
    if not checkpoint.carries_base:
        return True
    if initial is not None or settings.base is None:
        return False
    return bool(settings.drift) or (settings.profile != "reference" and not _has_orthonormal_rows(checkpoint))


def _has_orthonormal_rows(checkpoint: Checkpoint) -> bool:
    """Whether the start of a LoRA-Null directory left ``W_res = W``, as far as its first layer tells."""
    return is_orthonormal(checkpoint.tensors[f"{checkpoint.layers[0].name}.{DOWN}"])


def base_read(checkpoint: Checkpoint, settings: Settings, initial: Checkpoint | None) -> Path | None:
    """The base model that is read for ``checkpoint``; None where none is.

    Raises:
        CheckpointError: It is not there.
    """
    return base_of(checkpoint, settings.base) if is_base_read(checkpoint, settings, initial) else None


NOT_AT_HAND = f"the model with its adapter switched off is not the base, or writes no text; {PREFIX}drift tells more"
_ANYWAY = f"{PREFIX}drift with {PREFIX}init=DIR, from which training started, measures it"


def why_no_drift(checkpoint: Checkpoint, settings: Settings) -> str | None:
    """Why the predictions are not held against the base's where nobody said that they shall; None where they are.

    They are where the model with its adapter switched off is the base and predicts the next token, as far as the files
    tell of the adapter alone.
    """
    if settings.profile == "reference":
        return f"{PREFIX}profile=reference is the script to the letter, which has none; {PREFIX}drift adds it"
    if not all(fnmatchcase(layer.name, settings.layers) for layer in checkpoint.layers):
        return f"only a part of the layers is gated; {PREFIX}drift measures it"
    if checkpoint.carries_base:
        if _has_orthonormal_rows(checkpoint):
            return None
        return (
            "the rows of B are not orthonormal, so that with the adapter switched off the weights may not be those of "
            f"the base; {_ANYWAY}"
        )
    if checkpoint.cut:
        return checkpoint.cut
    if checkpoint.is_whole:
        return None
    if checkpoint.config.get("task_type") != "CAUSAL_LM" and not _of_text_writer(checkpoint, settings):
        return "it is no causal language model"
    if checkpoint.changed_base is not None:
        return f"its initialisation changed the base's weights; {_ANYWAY}"
    if written := writes_into_base(checkpoint):
        return f"it holds weights of the base itself, such as {printable(written[0])}; {PREFIX}drift loads that again"
    return None


_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the classes end that write text; of the last some read on one side and write on another, as their config says."""


def _of_text_writer(checkpoint: Checkpoint, settings: Settings) -> bool:
    """Whether an adapter that names no task, or a wrong one, is of a class that writes text on the side it reads."""
    task, parent = checkpoint.config.get("task_type"), checkpoint.config.get("auto_mapping")
    named = settings.base if settings.base is not None else checkpoint.base
    base = local_directory(named) if named else None
    config: Mapping[str, Any] = {}
    if base is not None:
        with suppress(CheckpointError):  # which is told where the base is looked at
            config = read_json_object(base / "config.json", "the base model's config")
    adapted = parent.get("base_model_class") if task is None and isinstance(parent, Mapping) else None
    classes = config.get("architectures")
    if adapted is None and task in (None, "SEQ_2_SEQ_LM") and isinstance(classes, list):
        adapted = next(iter(classes), None)
    if adapted is None:  # as of torchtune, which trains nothing else: the model will tell
        return task is None
    writers = _WRITERS if config and not config.get("is_encoder_decoder") else _WRITERS[:2]
    return str(adapted).endswith(writers)


PEFT_LEAST = (0, 18)
"""The first version of PEFT that has all that is used of it."""


def require_peft(checkpoint: Checkpoint) -> None:
    """Refuse an adapter that PEFT puts on its base where that is not installed, or too old.

    Raises:
        CheckpointError: It is so.
    """
    if checkpoint.carries_base or checkpoint.is_whole:
        return
    least = ".".join(map(str, PEFT_LEAST))
    lacking = "is not installed" if find_spec("peft") is None else None
    with suppress(PackageNotFoundError, ValueError):  # of sources that tell no version
        if lacking is None and tuple(map(int, version("peft").split(".")[:2])) < PEFT_LEAST:
            lacking = f"is installed as {version('peft')}, and {least} or later is needed"
    if lacking is not None:
        raise CheckpointError(
            f"{checkpoint.directory}: is a LoRA adapter, which PEFT puts on its base, and that {lacking}; "
            f"pip install 'peft>={least}'"
        )


def check_models(checkpoint: Checkpoint, initial: Checkpoint | None, settings: Settings, *, look: bool) -> None:
    """Refuse a base or a tokenizer that is not there or cannot be read.

    Args:
        checkpoint: What is to be measured.
        initial: The checkpoint from which training started, if it is known.
        settings: Which base, and what it is read for.
        look: Whether nothing may be loaded but what lies here and is small, as where tests are only listed.

    Raises:
        CheckpointError: It is so.
    """
    if not look:
        require_peft(checkpoint)
    base = _checked_base(checkpoint, settings, look) if is_base_read(checkpoint, settings, initial) else None
    if initial is not None and not initial.carries_base and (settings.drift or checkpoint.carries_base):
        _checked_base(initial, settings, look)
    if base is not None or checkpoint.carries_base:
        directory = TokenizerChoice.of(checkpoint.directory, base).used
        if look:
            require_tokenizer(directory)
        else:
            check_tokenizer(directory)


def _checked_base(checkpoint: Checkpoint, settings: Settings, look: bool) -> Path | None:
    """The base model of ``checkpoint``; None where it would first have to be downloaded."""
    named = settings.base if settings.base is not None else checkpoint.base
    if look and named and local_directory(named) is None:
        return None
    base = base_of(checkpoint, settings.base)
    if base.is_file():
        gguf.read_header(base)
        return base
    read_json_object(base / "config.json", "the base model's config")
    if not weight_files(base):
        raise CheckpointError(
            f"{base}: holds no base model that can be read, for no *.safetensors is in it; save it with "
            f"safe_serialization=True, or give another by {PREFIX}base=DIR"
        )
    tensors_of(base)
    return base
