"""Check the chat templates of a folder against many kinds of conversations: ``python -m tests.templates FOLDER [NAME …]``.

For each ``*.jinja`` file of FOLDER and each kind of conversation, it compares the ids with those of ``apply_chat_template``, and
the spans with the conversation: a word that the assistant wrote and the template shows lies in the span of its turn, and a word of
anybody else lies outside. A span starts at the end of the template's own generation prompt, and ends at the end of the conversation
up to its turn, wherever these are the beginning of the text. A file ``NAME_training.jinja`` with ``{% generation %}`` markers is
compared with ``NAME.jinja``.

It prints a line for each template and, with names given, the text around each span.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysft.config import Source
from raysft.data.sources.formats import to_example
from raysft.data.tokenization.chat_template import chat_template
from raysft.data.tokenization.text_boundaries import TAG
from raysft.data.tokenization.tokenize import ExampleTokenizer
from raysft.data.tokenization.tokenized_example import TokenizedExample, TokenizeOptions
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.data.types import IGNORE_INDEX
from raysft.models.tokenizer import load_tokenizer
from tests.tiny import tiny_tokenizer

VARIABLES = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "unk_token": "<|unk|>"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "where"}},
    "required": ["city"],
}


class Words:
    """Words that no template contains, each once."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1000)

    def __call__(self, count: int = 3) -> str:
        return " ".join(f"q{chr(97 + number % 26)}x{number}" for number in itertools.islice(self.numbers, count))


def turn(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def call(number: int, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": f"abcde{1000 + number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(number: int, name: str, content: str) -> dict[str, Any]:
    return turn("tool", content, tool_call_id=f"abcde{1000 + number}", name=name)


def conversations() -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yield (name, messages, tools)."""
    w = Words()
    tools = [
        {"type": "function", "function": {"name": name, "description": w(), "parameters": PARAMETERS}}
        for name in ("get_weather", "find_city")
    ]
    user, assistant = lambda **keys: turn("user", w(), **keys), lambda **keys: turn("assistant", w(), **keys)
    calling = lambda *calls, content="", **keys: turn("assistant", content, tool_calls=list(calls), **keys)  # noqa: E731
    weather = lambda number, **keys: call(number, "get_weather", {"city": w(2), **keys})  # noqa: E731
    result = lambda number, content=None: answer(number, "get_weather", content or w())  # noqa: E731
    yield "one turn", [user(), assistant()], []
    yield "system", [turn("system", w()), user(), assistant()], []
    yield "three turns", [user(), assistant(), user(), assistant(), user(), assistant()], []
    yield "ends with a question", [user(), assistant(), user(), assistant(), user()], []
    yield "two in a row", [user(), assistant(), assistant(), user(), assistant()], []
    yield "two questions in a row", [user(), user(), assistant()], []
    yield (
        "white space",
        [turn("user", f" {w()}\n"), turn("assistant", f"\n {w()} \n"), user(), turn("assistant", w() + "\n")],
        [],
    )
    yield (
        "tags",
        [user(), turn("assistant", f"<b>{w()}</b> [x] {{y}}"), user(), turn("assistant", f'"{w()}"\n```\n{w()}\n```')],
        [],
    )
    yield "numbers", [user(), turn("assistant", "4"), user(), turn("assistant", "42.")], []
    yield "signs", [turn("user", "?!"), turn("assistant", "👍🏽"), user(), turn("assistant", "。")], []
    yield (
        "thoughts in contents",
        [
            user(),
            turn("assistant", f"<think>\n{w()}\n</think>\n\n{w()}"),
            user(),
            turn("assistant", f"<think>\n{w()}\n</think>\n\n{w()}"),
        ],
        [],
    )
    yield "reasoning", [user(), assistant(reasoning_content=w()), user(), assistant(reasoning_content=w())], []
    yield "tools unused", [user(), assistant(), user(), assistant()], tools
    yield "a call", [user(), calling(weather(1)), result(1), assistant()], tools
    yield (
        "a call as JSON text",
        [user(), calling(call(1, "get_weather", f'{{"city": "{w()}"}}')), result(1), assistant()],
        tools,
    )
    yield (
        "a call with text",
        [turn("system", w()), user(), calling(weather(1), content=w()), result(1), assistant(), user(), assistant()],
        tools,
    )
    yield "calls at once", [user(), calling(weather(1), weather(2)), result(1), result(2), assistant()], tools
    yield (
        "calls one after the other",
        [user(), calling(weather(1)), result(1), calling(weather(2)), result(2), assistant()],
        tools,
    )
    yield (
        "a call of numbers",
        [user(), calling(call(1, "find_city", {"n": 3})), result(1, '{"a": "b\\n"}'), assistant()],
        tools,
    )
    yield "a call of nothing", [user(), calling(call(1, "find_city", {})), result(1), assistant()], tools
    yield "a call at the end", [user(), assistant(), user(), calling(weather(1))], tools
    yield (
        "thoughts and calls",
        [
            user(),
            calling(weather(1), reasoning_content=w()),
            result(1),
            assistant(reasoning_content=w()),
            user(),
            assistant(reasoning_content=w()),
        ],
        tools,
    )
    yield (
        "parts",
        [turn("user", [{"type": "text", "text": w()}]), turn("assistant", [{"type": "text", "text": w()}])],
        [],
    )


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_of(inner)


def words_in(value: Any) -> set[str]:
    return {
        word
        for text in strings_of(value)
        for word in "".join(c if c.isalnum() else " " for c in text).split()
        if word[:1] == "q" and word[-4:].isdigit()
    }


class TemplateCheck:
    """One template and its tokenizer."""

    def __init__(self, path: Path, folder: str) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer.add_special_tokens({key: value for key, value in VARIABLES.items() if key != "pad_token"})
        tokenizer.save_pretrained(folder)
        self.hugging_face = load_tokenizer(folder)
        options = TokenizeOptions(
            stage="sft", sequence_length=100_000, mask_history=False, train_on_prompt=False, on_overflow="error",
            keep_prompt="head", control_tokens="keep", template_options={}, default_system=None, thinking="template",
            with_prompts=False,
        )  # fmt: skip
        self.tokenizer = ExampleTokenizer(Tokenizer.load(folder), options)
        training = path.with_name(f"{path.stem}_training.jinja")
        self.marked = (
            chat_template(training.read_text(), self.hugging_face.special_tokens_map) if training.exists() else None
        )

    def __call__(self, name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], details: bool) -> str:
        """Return "kept", "as text" or the problems of a conversation."""
        record = {"messages": messages, "tools": tools}
        example = to_example(record, "openai", Source.model_validate({"name": "s", "path": "p"}), name)
        (item,) = self.tokenizer([example])
        try:
            whole = self.text(messages, tools, False)
        except Exception as error:  # a template may raise errors of its own
            whole = None
            refusal = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(item, TokenizedExample):
            if details:
                print(f"  {name}: {item.reason}")
            return "refused" if whole is None else f"REJECTED {item.reason}"
        rendered = self.tokenizer.template_for(example).render_conversation(example.messages, example.tools)
        given = rendered.given
        if given.tools_as_text or list(given.turns) != messages or list(given.tools) != tools:
            messages, tools = list(given.turns), list(given.tools)
            kept = "as text" if given.tools_as_text else "kept as read"
            if details and whole is None:
                print(f"  {name}: {kept}, because: {refusal}")
            whole = self.text(messages, tools, False)
        else:
            kept = "kept"
        ids = self.hugging_face.apply_chat_template(messages, tools=tools or None, tokenize=True, return_dict=False)
        problems = [] if item.input_ids.tolist() == ids and whole == rendered.text else ["IDS DIFFER"]
        problems += self.spans(rendered.text, rendered.spans, messages, tools, item, details and name)
        return "; ".join(problems) or kept

    def text(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.hugging_face.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def spans(self, text, spans, messages, tools, item, details) -> Iterator[str]:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(answers):
            yield "SPANS MISSING"
            return
        by_turn = dict(zip(answers, spans, strict=True))
        for index, message in [*enumerate(messages), (-1, tools)]:
            for word in words_in(message):
                at = text.find(word)
                while at >= 0:
                    inside = [turn for turn, (start, end) in by_turn.items() if start <= at and at + len(word) <= end]
                    if inside != ([index] if index in by_turn else []):
                        yield f"WORD OF TURN {index} IN {inside}"
                    at = text.find(word, at + 1)
        for index, (start, end) in by_turn.items():
            if not self.tokenizer.template.render_generations:  # the spans that a template marks are not checked
                yield from self.bounds(text, start, end, messages, tools, index)
            if details:
                before, after = text[max(0, start - 30) : start], text[end : end + 30]
                print(f"  {details}, turn {index}: …{before!r} ⟦{text[start:end]!r}⟧ {after!r}…")
        if self.marked and self.marked.render_generations:
            marked, marked_spans = self.marked.render_generations(messages, tools)
            if marked == text and [text[a:b].strip() for a, b in marked_spans] != [text[a:b].strip() for a, b in spans]:
                yield "TRAINING DIFFERS"
                if details:
                    print(f"  {details}, marked: {[text[a:b] for a, b in marked_spans]}")
        labelled = self.hugging_face.decode(item.input_ids[item.labels != IGNORE_INDEX].tolist())
        # A token may join the space at the end of the prompt to the first word.
        if "".join("".join(text[start:end] for start, end in spans).split()) != "".join(labelled.split()):
            yield "LABELS DIFFER"

    def bounds(self, text, start, end, messages, tools, index) -> Iterator[str]:
        try:
            prompt = self.text(messages[:index], tools, True)
        except Exception:  # a template may raise errors of its own
            prompt = None
        if prompt and text.startswith(prompt) and start != len(prompt):
            yield f"START OF TURN {index} IS NOT THE PROMPT'S END"
        try:
            ended = self.text(messages[: index + 1], tools, False)
        except Exception:  # a template may raise errors of its own
            ended = None
        asks = prompt and ended and ended.rstrip().endswith(prompt.rstrip()[-12:])  # whether or not it is asked to
        if ended and not asks and text.startswith(ended.rstrip()):
            closing = text[len(ended.rstrip()) : end].strip()  # some templates write it only if others follow
            if end < len(ended.rstrip()) or (closing and not TAG.fullmatch(closing)):
                yield f"END OF TURN {index} IS NOT THE TEXT'S END"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="parts of file names")
    parsed = parser.parse_args()
    total = Counter[str]()
    for path in sorted(parsed.folder.glob("*.jinja")):
        if parsed.names and not any(name in path.name for name in parsed.names):
            continue
        outcomes: dict[str, list[str]] = {}
        with tempfile.TemporaryDirectory() as folder:
            check = TemplateCheck(path, folder)
            for name, messages, tools in conversations():
                try:
                    outcome = check(name, messages, tools, bool(parsed.names))
                except Exception as error:  # continue with the next one
                    if parsed.names:
                        raise
                    outcome = f"FAILED {type(error).__name__}: {error}"
                outcomes.setdefault(outcome, []).append(name)
        for outcome, names in outcomes.items():
            total[outcome if outcome.startswith("kept") else outcome.split()[0]] += len(names)
        print(
            f"{path.stem} | "
            + " | ".join(
                f"{outcome}: {len(names) if outcome == 'kept' else ', '.join(names)}"
                for outcome, names in outcomes.items()
            ),
            flush=True,
        )
    print(dict(total))


if __name__ == "__main__":
    main()
