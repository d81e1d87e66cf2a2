"""A chat template at work, in a process of its own that can be ended: run as a script, by `templates` alone.

Jinja's immutable sandbox keeps a template from code and from what it is given; that it ends, and in how much memory, is
what the process is for. Like transformers' own rendering (`transformers.utils.chat_template_utils`) but for the date,
which is the same each day, so that a text is.

It reads one JSON object from standard input and writes one to standard output; of the package it imports nothing.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from typing import Any

TODAY = date(2024, 7, 26)
"""The day that a template is told; the one that Llama's holds where it is told none."""
REASONING = "reasoning_content", "thinking", "reasoning"
"""By what names a message's reasoning goes; templates read the first, gpt-oss's the second."""
MARKS = "generation"
"""The block by which a template marks what the assistant says."""

Spans = list[tuple[int, int]]


class StoppedError(Exception):
    """A template that cannot be followed further, in words."""


def limit(seconds: int, memory: int) -> None:
    """Let this process take no more, where the system can see to that."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def compiled(text: str) -> tuple[Any, list[tuple[int, str]], list[str]]:
    """The template, and two lists that it fills: what is marked and where, and all that was written so far."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    marked: list[tuple[int, str]] = []
    written: list[str] = []

    class Marks(Extension):
        tags = {MARKS}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements([f"name:end{MARKS}"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            said = str(caller())
            marked.append((sum(map(len, written)), said))
            return said

    class Names(Namespace):
        # No attribute of Python's own, by which one comes to its classes.
        def __init__(*args: Any, **kwargs: Any) -> None:
            told = dict(*args[1:], **kwargs)
            for name in told:
                _require_plain(name)
            Namespace.__init__(args[0], told)

        def __setitem__(self, name: str, value: Any) -> None:
            _require_plain(name)
            Namespace.__setitem__(self, name, value)

    def raise_exception(message: object) -> None:
        raise jinja2.exceptions.TemplateError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Marks, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": TODAY.strftime,
        "namespace": Names,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    return env.from_string(text), marked, written


def _require_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise StoppedError(f"it stores {name[:40]!r}, and no name that begins with _ may be")


class Renderer:
    """Renders conversations by one template."""

    def __init__(self, template: str, special: Mapping[str, Any], most: int) -> None:
        """Compile it.

        Args:
            template: Its text.
            special: The tokenizer's special tokens, by their names.
            most: Characters that it may write of one conversation.
        """
        self._template, self._marked, self._written = compiled(template)
        self._special, self._most = special, most

    def text(self, told: Mapping[str, Any], messages: Sequence[Any], *, prompt: bool = False) -> str:
        """``messages`` as the template writes them; with ``prompt`` up to where the assistant would begin."""
        self._marked.clear()
        self._written.clear()
        length = 0
        given = {**self._special, "messages": messages, "tools": told.get("tools"), "documents": None}
        for part in self._template.generate(**given, add_generation_prompt=prompt):
            self._written.append(part)
            length += len(part)
            if length > self._most:
                raise StoppedError(f"it writes more than {self._most:,} characters of one conversation")
        return "".join(self._written)

    def rendered(self, told: Mapping[str, Any], *, assistant: bool) -> tuple[str, Spans]:
        """One conversation, and where in it the assistant speaks, if that is asked for."""
        messages = [_with_reasoning(message) for message in told["messages"]]
        whole = self.text(told, messages)
        if not assistant:
            return whole, []
        # What a template keeps to write it later comes out elsewhere than where it was marked.
        if not all(whole.startswith(said, start) for start, said in self._marked):
            raise StoppedError(
                "it marks what the assistant says within a macro, a set block or a filter, so nobody can tell where "
                "that stands"
            )
        spans = [(start, start + len(said)) for start, said in self._marked]
        return whole, spans or list(self._by_prefixes(told, messages, whole))

    def _by_prefixes(self, told: Mapping[str, Any], messages: Sequence[Any], whole: str) -> Iterator[tuple[int, int]]:
        """What each of the assistant's messages adds to the conversation before it."""
        for place, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            # Of the last one the whole is known; what follows others may change how a template writes them.
            start = self.text(told, messages[:place], prompt=True) if place else ""
            upto = whole if place == len(messages) - 1 else self.text(told, messages[: place + 1])
            if not (upto.startswith(start) and whole.startswith(upto)):
                raise StoppedError(
                    f"what it writes of the first {place + 1} messages is not the beginning of what it writes of all "
                    f"{len(messages)}, so nobody can tell what the assistant says; mark it by {{% {MARKS} %}}"
                )
            # What stands behind the mark that ends a turn is nobody's.
            yield len(start), max(len(start), len(upto.rstrip()))


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is written of each conversation, or why not and of which."""
    number = -1
    try:
        renderer = Renderer(asked["template"], asked["special"], asked["most"])
        found = []
        for number, told in enumerate(asked["conversations"]):  # noqa: B007
            found.append(renderer.rendered(json.loads(told), assistant=asked["assistant"]))
    except MemoryError:
        return {"error": "it takes too much memory", "number": number}
    except RecursionError:
        return {"error": "it calls itself without end", "number": number}
    except StoppedError as stopped:
        return {"error": str(stopped), "number": number}
    except Exception as error:  # whatever a template may do
        return {"error": f"{type(error).__name__}: {str(error)[:300]}", "number": number}
    return {"texts": [text for text, _ in found], "spans": [spans for _, spans in found]}


def main() -> None:
    """Answer what standard input asks, with the folders given in which Jinja lies."""
    sys.path[:0] = sys.argv[1:]
    asked = json.load(sys.stdin.buffer)
    import jinja2  # noqa: F401

    limit(asked["seconds"], asked["memory"])
    sys.stdout.buffer.write(json.dumps(answer(asked)).encode("ascii"))


if __name__ == "__main__":
    main()
