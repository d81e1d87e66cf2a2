"""Holds how conversations are read, written by a tokenizer's template in its sandbox, and cut into windows."""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pytest_nullspace.errors import CheckpointError, NullspaceError, TextError
from pytest_nullspace.text import templates
from pytest_nullspace.text.chat import Chat, chat
from pytest_nullspace.text.conversations import ASSISTANT, AUTO, OFF, WHOLE, Conversations
from pytest_nullspace.text.readers import read
from pytest_nullspace.text.sources import FileText
from pytest_nullspace.text.templates import Template, require_template
from pytest_nullspace.text.tokenizer import LoadedTokenizer, load_tokenizer
from pytest_nullspace.text.windows import counted_places

CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}\n\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)
"""One that marks what the assistant says."""
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TURNS = "[INST] {{ messages[0].content | trim }} [/INST]{% for m in messages[1:] %} {{ m['content'] }}</s>{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}{{ messages | tojson }}{{ tools | tojson if tools else '' }}"


def talk(*said: str) -> str:
    """A conversation of user and assistant in turns, as a row."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
    return json.dumps({"messages": messages})


def letters(folder: Path, template: str | None = CHATML) -> LoadedTokenizer:
    """A tokenizer of characters that begins each text with ``^``, its template beside it."""
    vocabulary = {chr(i): i for i in range(128)}
    backend = Tokenizer(models.WordLevel({**vocabulary, "<|im_start|>": 128, "<|im_end|>": 129}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "^"])
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="^ $A", special_tokens=[("^", ord("^"))])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="^", chat_template=template).save_pretrained(folder)
    return load_tokenizer(folder)


def refused(call: Callable[[], Any], error: type[NullspaceError] = TextError) -> str:
    """The message with which ``call`` fails."""
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., FileText]:
    """A function that writes rows as JSONL and gives them as a source."""

    def write(*rows: object, column: str | None = None) -> FileText:
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return FileText(file, column)

    return write


HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


class TestConversations:
    @pytest.mark.parametrize(
        "row",
        [
            {"messages": HELLO},
            {"messages": [{**message, "name": None} for message in HELLO], "id": "a"},
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            {"prompt": "hi", "completion": "hello"},
            {"prompt": HELLO[:1], "completion": HELLO[1:], "tools": None},
        ],
        ids=["messages", "filled in", "ShareGPT", "strings", "lists"],
    )
    def test_every_form_is_one_conversation(self, table: Callable[..., FileText], row: dict[str, Any]) -> None:
        """Messages, ShareGPT's, and a prompt with its completion are the same messages; empty rows are passed over."""
        found = read(table(row, dict.fromkeys(row)), AUTO)
        assert isinstance(found, Conversations)
        assert [json.loads(of) for of in found.rows] == [{"messages": HELLO}]

    def test_a_parquet_file_holds_them_too(self, tmp_path: Path) -> None:
        """A column of lists of structs is read like JSON, and so are tools beside it."""
        import pyarrow
        import pyarrow.parquet

        tools = [{"type": "function", "function": {"name": "add"}}]
        pyarrow.parquet.write_table(
            pyarrow.table({"messages": [HELLO], "tools": [json.dumps(tools)]}), tmp_path / "a.parquet"
        )
        found = read(FileText(tmp_path / "a.parquet"), AUTO)
        assert isinstance(found, Conversations)
        assert [json.loads(of) for of in found.rows] == [{"messages": HELLO, "tools": tools}]

    def test_a_text_beside_them_is_taken_unless_they_are_asked_for(self, table: Callable[..., FileText]) -> None:
        """What was read before is read still; the option or the column's name asks for the conversations."""
        row = {"text": "plain", "messages": HELLO}
        assert read(table(row), AUTO) == "plain"
        assert isinstance(read(table(row), WHOLE), Conversations)
        assert isinstance(read(table(row), ASSISTANT), Conversations)
        assert isinstance(read(table(row, column="messages"), AUTO), Conversations)
        assert read(table(row, column="text"), WHOLE) == "plain"
        assert "column 'messages' holds list, not a string" in refused(lambda: read(table(row, column="messages"), OFF))

    @pytest.mark.parametrize(
        ("row", "told"),
        [
            ({"messages": "hi"}, "line 1: column 'messages' holds str, not a list of messages"),
            ({"messages": ["hi"]}, "line 1: message 1 is str, not an object with a role and its content"),
            ({"messages": [{"content": "hi"}]}, "line 1: message 1 has no role"),
            ({"messages": [{"role": "user", "content": 3}]}, "line 1: the content of message 1 is int, not a string"),
            (
                {"messages": [HELLO[0], {"role": "user", "content": [{"type": "audio", "url": "x"}]}]},
                "line 1: message 2 holds 'audio', and only text is rendered; leave such rows out",
            ),
            ({"messages": HELLO, "tools": "{"}, "line 1: column 'tools' holds a string that is no JSON"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, "line 1: holds half a surrogate pair"),
            ({"messages": []}, "holds no conversation in its column 'messages'"),
            ({"prompt": None, "completion": None}, "holds no conversation in its columns 'prompt' and 'completion'"),
        ],
    )
    def test_what_is_none_is_refused_by_its_row(self, table: Callable[..., FileText], row: object, told: str) -> None:
        """The message says in which row, and which message of it, what is wrong."""
        assert told in refused(lambda: read(table(row), AUTO))


class TestTemplate:
    @pytest.mark.parametrize("template", [CHATML, UNMARKED, TURNS])
    def test_it_writes_what_transformers_writes(self, tmp_path: Path, template: str) -> None:
        """Text and ids are those of apply_chat_template, and no second token begins the text."""
        tokenizer = letters(tmp_path, template)
        rows = [talk("hi", "hello", "and?", "no more"), talk("  a\n", "b")]
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        for row, rendered in zip(rows, require_template(tmp_path, "it").render(rows, assistant=False), strict=True):
            messages = json.loads(row)["messages"]
            assert rendered.text == theirs.apply_chat_template(messages, tokenize=False)
            told = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)
            assert tokenizer.bare(rendered.text)[0] == told["input_ids"]

    @pytest.mark.parametrize("template", [CHATML, UNMARKED])
    def test_what_the_assistant_says_is_marked_or_found_by_prefixes(self, tmp_path: Path, template: str) -> None:
        """A template with marks and one without give the same spans: each answer with the token that ends it."""
        letters(tmp_path, template)
        row = talk("hi", "hello", "and?", "no more")
        (rendered,) = require_template(tmp_path, "it").render([row], assistant=True)
        said = [rendered.text[first:after] for first, after in rendered.spans]
        assert said == ["hello<|im_end|>", "no more<|im_end|>"]

    def test_marks_are_those_of_transformers(self, tmp_path: Path) -> None:
        """The tokens that count are the ones in transformers' own mask of the assistant's."""
        tokenizer = letters(tmp_path)
        row = talk("hi", "hello", "and?", "no more")
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(
            json.loads(row)["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        found = cut(tokenizer, tmp_path, [row], count=1, seqlen=500, assistant=True)
        (window,) = found.windows
        assert list(window.tokens) == theirs["input_ids"]
        assert window.counted == tuple(i for i, mask in enumerate(theirs["assistant_masks"]) if mask)

    @pytest.mark.parametrize(
        "template",
        [
            "{% macro say(m) %}<|a|>{% generation %}{{ m }}{% endgeneration %}{% endmacro %}"
            "{% for m in messages %}{{ say(m.content) }}{% endfor %}",
            "{% set said %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}<|a|>{{ said }}",
            "{% filter upper %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endfilter %}",
            "{% filter trim %} <|a|>{% generation %}{{ messages[1].content }}{% endgeneration %}{% endfilter %}",
            "{% set unsaid %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}",
        ],
        ids=["macro", "set", "filter", "trimmed", "unsaid"],
    )
    def test_marks_that_do_not_stand_where_they_are_written_are_refused(self, template: str) -> None:
        """What is marked within a macro, a set block or a filter, and so stands elsewhere or nowhere, is no answer."""
        told = refused(lambda: Template(Path("t"), template, {}).render([talk("hi", "hello")], assistant=True))
        assert "within a macro, a set block or a filter, so nobody can tell where that stands" in told
        Template(Path("t"), template, {}).render([talk("hi", "hello")], assistant=False)

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}<|{{ m.role }}|>\n{% generation -%}\n  {{ m.content | trim }}\n"
            "{%- endgeneration %}\n{% endfor %}",
            "{% macro say(m) %}{% generation %}{{ m }}{% endgeneration %}<|e|>{% endmacro %}"
            "{% for m in messages %}<|a|>{{ say(m.content) | trim }}{% endfor %}",
        ],
        ids=["trimmed", "macro that begins with it"],
    )
    def test_marks_stand_wherever_what_they_mark_does(self, template: str) -> None:
        """Blanks cut at a mark and a macro that begins with what it marks move nothing: the spans are what is said."""
        (found,) = Template(Path("t"), template, {}).render([talk("hi", "hello", "and?")], assistant=True)
        assert [found.text[first:after] for first, after in found.spans] == ["hi", "hello", "and?"]

    def test_a_template_that_rewrites_earlier_turns_tells_no_assistant(self, tmp_path: Path) -> None:
        """Where the first messages alone are written otherwise, nobody knows what the assistant says, which is said."""
        letters(tmp_path, "{{ messages | length }}" + UNMARKED)
        told = refused(lambda: require_template(tmp_path, "it").render([talk("a", "b", "c", "d")], assistant=True))
        assert "the first 2 messages is not the beginning of what it writes of all 4" in told

    def test_the_day_is_always_the_same(self, tmp_path: Path) -> None:
        """A template that asks for the date gets one that makes no text another tomorrow; tools and JSON are plain."""
        letters(tmp_path, DATED)
        row = json.dumps({"messages": [{"role": "user", "content": "<&é>"}], "tools": [{"name": "add"}]})
        (rendered,) = require_template(tmp_path, "it").render([row], assistant=False)
        assert rendered.text == '26 Jul 2024[{"role": "user", "content": "<&é>"}][{"name": "add"}]'

    def test_a_conversation_that_a_template_refuses_is_told(self) -> None:
        """Of many the one is named that the template cannot write, for it is as likely at fault."""
        template = "{% for m in messages %}{{ '<' + m.content }}{% endfor %}"
        odd = json.dumps({"messages": [{"role": "user", "content": None}]})
        told = refused(lambda: Template(Path("t"), template, {}).render([talk("hi"), odd], assistant=False))
        assert 'in the conversation {"messages": [{"role": "user", "content": null}]}: mend that if it is odd' in told
        told = refused(lambda: Template(Path("t"), "{{ ", {}).render([talk("hi")], assistant=False))
        assert "in the conversation" not in told

    @pytest.mark.parametrize(
        ("template", "told"),
        [
            (
                "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
                "does not come to an end",
            ),
            ("{{ 'a' * 10**10 }}", "it takes too much memory"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
            ("{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "more than 20,000,000 characters"),
            ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
            ("{{ namespace(__class__=1) }}", "it stores '__class__'"),
            ("{% set _ = messages.append(1) %}", "SecurityError"),
            ("{% include 'file' %}", "TypeError: no loader"),
            ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
            ("{{ ", "TemplateSyntaxError"),
        ],
    )
    def test_what_a_hostile_one_does_ends_in_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, template: str, told: str
    ) -> None:
        """It is stopped by time, memory, depth, length or the sandbox, and the sentence says by which."""
        monkeypatch.setattr(templates, "SECONDS", 1)
        message = refused(lambda: Template(Path("t.jinja"), template, {}).render([talk("a")], assistant=False))
        assert message.startswith("t.jinja: its chat template ")
        assert told in message
        assert message.endswith("Put the base model's own there, or give plain text")

    def test_a_template_that_ends_is_endless_nowhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the system has none of the signals that end a process, as Windows, one that ends by itself is read."""
        for name in ("SIGXCPU", "SIGKILL"):
            monkeypatch.delattr(signal, name, raising=False)
        (found,) = Template(Path("t"), TURNS, {}).render([talk("a", "b")], assistant=False)
        assert found.text == "[INST] a [/INST] b</s>"

    def test_it_is_found_where_transformers_finds_it(self, tmp_path: Path) -> None:
        """A file of its own wins over the config's; of several the default one is taken; special tokens are named."""
        config = tmp_path / "tokenizer_config.json"
        assert Template.beside(tmp_path) is None
        told = refused(lambda: require_template(tmp_path, "rows.jsonl"), CheckpointError)
        assert "its tokenizer has no chat template (looked for chat_template.jinja, and" in told
        assert "and rows.jsonl holds conversations" in told
        named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
        config.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
        found = Template.beside(tmp_path)
        assert found is not None
        assert (found.text, found.special) == ("d", {"bos_token": "<s>", "eos_token": "</s>"})
        (tmp_path / "chat_template.jinja").write_text("f")
        other = Template.beside(tmp_path)
        assert other is not None
        assert other.text == "f"
        assert other.sha256 != found.sha256
        (tmp_path / "chat_template.jinja").write_text("f" * 1_000_001)
        assert "has 1,000,001 characters; at most" in refused(lambda: Template.beside(tmp_path), CheckpointError)


def cut(
    tokenizer: LoadedTokenizer,
    folder: Path,
    rows: list[str],
    *,
    count: int,
    seqlen: int,
    assistant: bool = False,
    seed: int = 3,
) -> Chat:
    """``rows`` as `chat` cuts them by the template in ``folder``."""
    talks, template = Conversations(tuple(rows)), require_template(folder, "it")
    return chat(talks, template, tokenizer, count=count, seqlen=seqlen, seed=seed, assistant=assistant)


class TestWindows:
    @pytest.mark.parametrize("assistant", [False, True])
    def test_each_begins_with_a_conversation_or_goes_on_in_one(self, tmp_path: Path, assistant: bool) -> None:
        """Put together, the windows of each conversation are all its tokens; none holds tokens of two."""
        tokenizer = letters(tmp_path)
        rows = [talk("q" * n, "a" * (3 * n), "again", "no") for n in range(1, 30)]
        found = cut(tokenizer, tmp_path, rows, count=1000, seqlen=50, assistant=assistant)
        assert found.about["conversations"] == found.about["of"] == 29
        order = random.Random(3).sample(rows, 29)
        written = [of.text for of in require_template(tmp_path, "it").render(order, assistant=False)]
        assert found.text == "".join(written)
        begins: dict[int, list[int]] = {}
        for window in found.windows:
            assert window.within is not None
            begins.setdefault(window.within.begin, [])
            if not assistant:
                assert window.within.before == len(begins[window.within.begin])
            begins[window.within.begin] += window.tokens
            assert tokenizer.bare(found.text[window.start :])[0][0] == window.tokens[0]
            assert 1 < len(window.tokens) <= 50
        if not assistant:
            whole = [tokenizer.bare(text)[0] for text in written]
            # A last token by itself is predicted by nothing, and predicts nothing.
            assert list(begins.values()) == [ids[:-1] if len(ids) % 50 == 1 else ids for ids in whole]

    def test_they_fill_as_many_windows_as_are_asked_for(self, tmp_path: Path) -> None:
        """Conversations are drawn by the seed, each at most once, until they are as many tokens as the windows hold."""
        tokenizer = letters(tmp_path)
        rows = [talk(f"what is {n}?", f"it is {n}") for n in range(100)]
        found = cut(tokenizer, tmp_path, rows, count=4, seqlen=100)
        lengths = [len(window.tokens) for window in found.windows]
        assert sum(lengths[:-1]) < 400 <= sum(lengths)
        assert cut(tokenizer, tmp_path, rows, count=4, seqlen=100) == found
        assert cut(tokenizer, tmp_path, rows, count=4, seqlen=100, seed=4).windows != found.windows
        assert found.sha256 == Conversations(tuple(rows)).sha256

    def test_without_what_counts_there_is_no_window(self, tmp_path: Path) -> None:
        """Conversations in which no assistant speaks, and a template that writes nothing, are refused."""
        tokenizer = letters(tmp_path)
        told = refused(lambda: cut(tokenizer, tmp_path, [talk("hi")], count=1, seqlen=9, assistant=True))
        assert "of 1 conversations its chat template leaves nothing that the assistant says" in told
        letters(tmp_path, "x")
        told = refused(lambda: cut(tokenizer, tmp_path, [talk("hi")], count=1, seqlen=9))
        assert "of 1 conversations its chat template leaves no two tokens" in told

    @settings(max_examples=10)
    @given(st.lists(st.lists(st.text("abc ", min_size=1, max_size=9), min_size=2, max_size=5), min_size=1, max_size=4))
    def test_what_counts_is_what_the_assistant_says(
        self, tmp_path_factory: pytest.TempPathFactory, said: list[list[str]]
    ) -> None:
        """Of each conversation the counted tokens are the assistant's messages and their ends, however it is cut."""
        folder = tmp_path_factory.mktemp("chat")
        tokenizer = letters(folder)
        rows = [talk(*of) for of in said]
        spoken = [text for of in random.Random(3).sample(said, len(said)) for text in of[1::2]]
        whole = cut(tokenizer, folder, rows, count=1000, seqlen=1000, assistant=True).windows
        kept = counted_places(whole)
        assert kept is not None
        ids = [window.tokens[place] for window, places in zip(whole, kept, strict=True) for place in places]
        assert ids == [token for text in spoken for token in (*map(ord, text), 129)]
        places = {
            (window.within.begin, window.within.before + place)
            for window in cut(tokenizer, folder, rows, count=1000, seqlen=7, assistant=True).windows
            for place in window.counted or ()
            if window.within is not None
        }
        told = {(w.within.begin, place) for w in whole for place in w.counted or () if w.within is not None}
        # Cut shorter, windows without a prediction of what counts are left out: at most the first token of one.
        assert places <= told
        assert all(place % 7 == 0 for _, place in told - places)
