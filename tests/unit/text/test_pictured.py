"""Conversations with images: how tables hold them, and how the processor's template and transformers write them."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import transformers
from pyarrow import parquet

from pytest_nullspace.errors import CheckpointError, TextError
from pytest_nullspace.text.chat import Chat, chat_of_images
from pytest_nullspace.text.conversations import AUTO, OFF, WHOLE, Conversations
from pytest_nullspace.text.images import Images
from pytest_nullspace.text.processor import Processor, load_processor
from pytest_nullspace.text.readers import read
from pytest_nullspace.text.sources import FileText, FolderText
from pytest_nullspace.text.templates import Template, require_template_of_images
from tests import tiny
from tests.adapters import adapter
from tests.releases import sees
from tests.seeing import CHATS, KINDS, gallery, png, processor, said, tokenizer

# PEFT's own, while the tests make adapters with it.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

ANSWER = said("assistant", "a cat")
WRITTEN = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
OPENAI = {"type": "image_url", "image_url": {"url": WRITTEN}}
Table = Callable[..., FileText]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """A function that writes rows as JSON lines beside three images."""
    gallery(tmp_path)

    def write(*rows: object, column: str | None = None) -> FileText:
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        return FileText(file, column)

    return write


def images(source: FileText | FolderText, chat: str = AUTO) -> Images:
    """The conversations with images of a source."""
    found = read(source, chat)
    assert isinstance(found, Images)
    assert found.are_talks
    return found


def shown(found: Images, number: int = 0) -> tuple[list[list[str]], list[str]]:
    """The parts of each message of a row, and which images it has."""
    row = found.rows[number]
    parts = [[part.get("text", "▢") for part in message["content"]] for message in json.loads(row.talk)["messages"]]
    return parts, [of.held.name if isinstance(of.held, Path) else "bytes" for of in row.pictures]


class TestRows:
    """In which forms tables hold them."""

    @pytest.mark.parametrize(
        ("row", "held"),
        [
            ({"messages": [said("user", None, "what"), ANSWER], "images": ["0.png"]}, ["0.png"]),
            ({"messages": [said("user", {"index": 0}, "what"), ANSWER], "image": "0.png"}, ["0.png"]),
            ({"messages": [said("user", {"image": "0.png"}, "what"), ANSWER]}, ["0.png"]),
            ({"messages": [said("user", {"path": "0.png"}, "what"), ANSWER]}, ["0.png"]),
            ({"messages": [said("user", OPENAI, "what"), ANSWER]}, ["bytes"]),
            ({"messages": [said("user", {"base64": WRITTEN.partition(",")[2]}, "what"), ANSWER]}, ["bytes"]),
            ({"messages": [{"role": "user", "content": "what"}, ANSWER], "images": ["0.png"]}, ["0.png"]),
            ({"messages": [{"role": "user", "content": "<image>what"}, ANSWER], "images": ["0.png"]}, ["0.png"]),
            ({"id": "7", "image": "0.png", "conversations": [
                {"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "a cat"}]}, ["0.png"]),
            ({"prompt": [said("user", None, "what")], "completion": [ANSWER], "images": ["0.png"]}, ["0.png"]),
            ({"prompt": "what", "completion": "a cat", "image": "0.png"}, ["0.png"]),
        ],
    )  # fmt: skip
    def test_every_form_is_one_conversation(self, row: dict[str, Any], held: list[str], table: Table) -> None:
        """TRL's, the hub's, OpenAI's and ShareGPT's say the same: an image, what is asked, what is answered."""
        assert shown(images(table(row))) == ([["▢", "what"], ["a cat"]], held)

    def test_several_images_stand_where_the_messages_say(self, table: Table) -> None:
        """In order, by the numbers that parts tell, at the marks, or all before what the user says first."""
        two = {"images": ["0.png", "1.png"]}
        by_number = said("user", {"index": 1}, "or", {"index": 0})
        marked = [{"role": "user", "content": "<image>or<image>"}, ANSWER]
        rows = images(
            table(
                {"messages": [said("system", "be brief"), said("user", None, "or", None)], **two},
                {"messages": [by_number], **two},
                {"messages": marked, **two},
                {"messages": [said("system", "be brief"), said("user", "or")], **two},
                {"messages": [said("user", {"image": "2.png"}, "or", None)], "images": ["1.png"]},
                {"messages": [said("user", "none")], "images": []},
            )
        )
        assert shown(rows, 0) == ([["be brief"], ["▢", "or", "▢"]], ["0.png", "1.png"])
        assert shown(rows, 1) == ([["▢", "or", "▢"]], ["1.png", "0.png"])
        assert shown(rows, 2) == ([["▢", "or", "▢"], ["a cat"]], ["0.png", "1.png"])
        assert shown(rows, 3) == ([["be brief"], ["▢", "▢", "or"]], ["0.png", "1.png"])
        assert shown(rows, 4) == ([["▢", "or", "▢"]], ["2.png", "1.png"])
        assert shown(rows, 5) == ([["none"]], [])

    def test_a_parquet_a_dataset_and_a_folder(self, tmp_path: Path) -> None:
        """Bytes beside the messages, an image of datasets within them, which is not decoded, and metadata."""
        import datasets

        messages = [said("user", None, "what"), ANSWER]
        file = tmp_path / "rows.parquet"
        cell = [{"bytes": png(), "path": None}]
        parquet.write_table(pyarrow.table({"messages": [messages], "images": [cell]}), file)
        assert shown(images(FileText(file, None))) == ([["▢", "what"], ["a cat"]], ["bytes"])
        part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
        form = {"role": datasets.Value("string"), "content": datasets.List(part)}
        own = [said("user", {"image": {"bytes": b"no image", "path": None}, "text": None}, "what"), ANSWER]
        features = datasets.Features({"messages": datasets.List(form)})
        whole = [[{**of, "content": [{"image": None, "text": None, **one} for one in of["content"]]} for of in own]]
        datasets.Dataset.from_dict({"messages": whole}, features).save_to_disk(str(tmp_path / "saved"))
        assert shown(images(FolderText(tmp_path / "saved"))) == ([["▢", "what"], ["a cat"]], ["bytes"])
        gallery(tmp_path / "shots")
        line = {"file_name": "1.png", "messages": messages}
        (tmp_path / "shots/metadata.jsonl").write_text(json.dumps(line))
        assert shown(images(FolderText(tmp_path / "shots"))) == ([["▢", "what"], ["a cat"]], ["1.png"])

    def test_which_column_is_read(self, table: Table) -> None:
        """A text wins as ever; the messages alone, both, or none of them, where that is asked for."""
        talk = {"messages": [{"role": "user", "content": "hello"}], "image": "0.png"}
        assert isinstance(read(table(talk, column="messages"), AUTO), Conversations)
        assert images(table(talk, column="image+messages")).rows[0].pictures
        told = read(table({**talk, "text": "plain"}), AUTO)
        assert isinstance(told, Images)
        assert (told.are_talks, told.rows[0].text) == (False, "plain")
        assert images(table({**talk, "text": "plain"}), WHOLE).rows[0].pictures
        with pytest.raises(TextError, match="beside conversations in 'messages', which --nullspace-chat=off does not"):
            read(table(talk), OFF)

    @pytest.mark.parametrize(
        ("row", "told"),
        [
            ({"messages": [said("user", None, None, "x")], "images": ["0.png"]}, "places for 2 images .* and 1 stand"),
            ({"messages": [said("user", None, "x")], "images": []}, "have places for 1 images .* and 0 stand"),
            ({"messages": [said("user", None, "x")]}, "have places for 1 images .* and 0 stand"),
            ({"messages": [said("user", {"index": 1}, "x")], "images": ["0.png"]}, r"number their images \[1\]"),
            ({"messages": [said("assistant", "x")], "images": ["0.png"]}, "no user speaks in it"),
            ({"messages": [said("user", {"image": "../x.png"})]}, "'../x.png' leads out of"),
            ({"messages": [said("user", {"image": "https://a.b/x.png"})]}, "is not at hand, and nothing is fetched"),
            ({"messages": [said("user", {"image": "data:image/png;base64,?"})]}, "written out as text is no base64"),
            ({"messages": [said("user", {"image": 1.5})]}, "holds float, neither an image's path nor its bytes"),
            ({"messages": [said("user", None, {"type": "audio"})], "images": ["0.png"]}, "message 1 holds 'audio'"),
        ],
    )  # fmt: skip
    def test_wrong_or_missing_images_are_one_error_of_the_row(self, row: Any, told: str, table: Table) -> None:
        """By file and line, before anything is loaded."""
        good = {"messages": [said("user", {"image": "0.png"}, "x")]}
        with pytest.raises(TextError, match=f"rows.jsonl: line 2: .*{told}"):
            read(table(good, row), AUTO)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, its base described as each family in turn; never run."""
    folder = tmp_path_factory.mktemp("made")
    adapter(folder, tiny.llama(), r=2, target_modules=["q_proj"])
    return folder / "base"


def of(base: Path, family: str) -> tuple[Processor, Template]:
    """The processor of a family and its template."""
    for name in ("processor_config.json", "chat_template.json"):
        (base / name).unlink(missing_ok=True)
    tokenizer(base, KINDS[family])
    processor(base, KINDS[family])
    (base / "chat_template.jinja").write_text(CHATS[family])
    return load_processor(base, base, base), require_template_of_images(base, base, "rows")


def cut(found: Images, base: Path, family: str, seqlen: int = 99, *, assistant: bool = True) -> Chat:
    called, template = of(base, family)
    how: dict[str, Any] = {"count": 9, "seqlen": seqlen, "seed": 0, "assistant": assistant}
    return chat_of_images(found, template, called, **how)


TALKS = [
    {"messages": [said("user", None, "ask"), ANSWER], "images": ["0.png"]},
    {"messages": [said("user", None, None, "or"), ANSWER, said("user", "and"), ANSWER], "images": ["0.png", "1.png"]},
    {"messages": [said("user", "no"), ANSWER, said("user", None, "now"), ANSWER], "images": ["2.png"]},
    {"messages": [said("user", "none"), ANSWER], "images": []},
]


@sees
class TestTheModelsOwnForm:
    """What the processor makes of what its template writes."""

    @pytest.mark.parametrize("family", ["gemma3", "llava"])
    def test_tokens_and_marks_are_those_of_transformers(self, family: str, made: Path, table: Table) -> None:
        """Ids, and which of them the assistant says, with images before, between and behind."""
        found = images(table(*TALKS))
        windows = cut(found, made, family, 200).windows
        own = transformers.AutoProcessor.from_pretrained(made)
        assert [window.start for window in windows] == [0, 1, 2, 3]
        for window in windows:
            row = found.rows[window.start]
            messages, pictures = json.loads(row.talk)["messages"], iter(row.pictures)
            for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
                part["image"] = next(pictures).image()
            theirs = own.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None
            )
            assert list(window.tokens) == list(theirs["input_ids"][0])
            mask = theirs["assistant_masks"][0]
            assert window.counted == tuple(place for place, counts in enumerate(mask) if counts)

    def test_what_the_assistant_says_alone_counts(self, made: Path, table: Table) -> None:
        """Of what Qwen's processor makes; a conversation in whose first tokens it says nothing is no window."""
        found = images(table(*TALKS))
        told = cut(found, made, "qwen2_5_vl")
        assert [[bytes(window.tokens[place] for place in window.counted or ())] for window in told.windows] == [
            [b"a cat;"], [b"a cat;a cat;"], [b"a cat;a cat;"], [b"a cat;"]
        ]  # fmt: skip
        about = {"conversations": 4, "of": 4, "assistant_only": True, "counted_tokens": 36}
        assert told.about.items() >= about.items()
        short = cut(images(table(TALKS[0])), made, "qwen2_5_vl", 20)
        assert bytes(short.windows[0].tokens[place] for place in short.windows[0].counted or ()) == b"a c"
        with pytest.raises(TextError, match="leaves nothing that the assistant says in the first 16 tokens; raise"):
            cut(images(table(TALKS[0])), made, "qwen2_5_vl", 16)
        assert cut(images(table(TALKS[0])), made, "qwen2_5_vl", 16, assistant=False).windows[0].counted is None

    def test_a_mark_in_what_somebody_says_is_named(self, made: Path, table: Table) -> None:
        """What would stand for an image that is not there is refused by its row."""
        found = images(table({"messages": [said("user", None, "an <|image_pad|>")], "images": ["0.png"]}))
        with pytest.raises(
            TextError, match=r"line 1: the chat template writes <\|image_pad\|> 2 times, and it has 1 im"
        ):
            cut(found, made, "qwen2_5_vl")

    def test_a_model_without_turns_is_refused(self, made: Path, table: Table) -> None:
        """PaliGemma reads its prompt both ways."""
        tokenizer(made, KINDS["paligemma"])
        processor(made, KINDS["paligemma"])
        called, (found,) = load_processor(made, made, made), images(table(TALKS[0])).rows
        with pytest.raises(TextError, match="line 1: the model reads its prompt both ways and has no turns"):
            called.window(found, 99)

    def test_the_template_is_the_processors(self, made: Path) -> None:
        """Its config's, an earlier transformers', the file's, and else its tokenizer's; without any, one sentence."""
        of(made, "llava")
        found: list[str] = []

        def text() -> str:
            return require_template_of_images(made, made, "rows.jsonl").text

        found.append(text())
        (made / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
        found.append(text())
        fields = json.loads((made / "processor_config.json").read_text())
        (made / "processor_config.json").write_text(json.dumps({**fields, "chat_template": "own"}))
        found.append(text())
        for name in ("processor_config.json", "chat_template.json", "chat_template.jinja"):
            (made / name).unlink()
        config = json.loads((made / "tokenizer_config.json").read_text())
        (made / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "tokenizer's"}))
        assert [*found, text()] == [CHATS["llava"], "legacy", "own", "tokenizer's"]
        (made / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"its processor has no chat template .*, and rows.jsonl holds conv"):
            text()
