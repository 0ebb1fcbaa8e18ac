"""Chat templates of Ollama, in Go's template language, that render conversations as a model's Jinja template does. Pure.

What a Jinja template writes around the contents is found by rendering, put into one form, and kept only if that form renders sample
conversations like the Jinja template. So a template that changes contents, moves them or counts turns has none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Renders a conversation, and the prompt for an answer if the second argument is True."""
MARKS = ("Kuvet", "Bolan", "Dimor", "Fesug", "Hataw", "Jepil")
"""Contents that no template writes and no filter changes."""
CONTENTS = ("Hi", "two\nlines,  here", "{{ .Content }} and {% x %}", "user", "你好 <b>&amp;</b> \\n", "a")
SYSTEM = "Be brief.\nAnswer in French."
LAST = "eq (len (slice $.Messages $i)) 1"
THOUGHT = "Well,\nso"
OPENING, CLOSING = "<think>\n", "</think>"
"""What surrounds a thought that begins an answer."""


def go_template(render: Render) -> str | None:
    """Return the Go template that renders conversations like a Jinja template, up to the prompt for an answer; None if none does.

    Ollama takes thoughts from answers if the template names them, and leaves them in otherwise. So one that drops those of earlier
    answers, as Qwen3's does, names that of a last answer; one that writes an empty thought where there is none names all of them.

    Whether a template without place for a system prompt refuses one or leaves it out: the Go template leaves it out.
    """
    try:
        plain = _texts(render, [])
        with_system = _texts_with_system(render)
        if plain is None or (with_system and with_system[2:] != plain[1:]):
            return None
        wanted = [(messages, render(messages, True)) for messages in _samples(with_system is not None)]
        for thinking in ("", _thinking(render)):
            template = _template(plain, with_system, _closing(render), thinking)
            if template and all(render_go(template, messages) == text for messages, text in wanted):
                return template
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        pass
    return None


def _texts(render: Render, system: list[Message]) -> list[str] | None:
    """Return the texts around the contents of three questions and two answers; None if turns of a role differ.

    They are: before the first question (or before and after the system prompt), from a question to its answer, from an answer
    to the next question, after the last question.
    """
    roles = ("user", "assistant", "user", "assistant", "user")
    messages = [*system, *({"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=False))]
    texts = _around(render(messages, True), [message["content"] for message in messages])
    if texts is None:
        return None
    *before, asked, answered, asked_again, answered_again, last = texts
    return [*before, asked, answered, last] if (asked, answered) == (asked_again, answered_again) else None


def _texts_with_system(render: Render) -> list[str] | None:
    try:
        return _texts(render, [{"role": "system", "content": MARKS[-1]}])
    except jinja2.TemplateError:  # many refuse a system prompt
        return None


def _around(text: str, contents: Sequence[str]) -> list[str] | None:
    """Split a text at contents, which must occur once each and in order."""
    places = [text.find(content) for content in contents]
    if min(places) < 0 or places != sorted(places) or any(text.count(content) != 1 for content in contents):
        return None
    ends = [0, *(place + len(content) for place, content in zip(places, contents, strict=True))]
    return [text[end:start] for end, start in zip(ends, [*places, len(text)], strict=True)]


def _closing(render: Render) -> str:
    """Return what follows an answer that is the last turn."""
    messages = [{"role": "user", "content": MARKS[0]}, {"role": "assistant", "content": MARKS[1]}]
    return render(messages, False).partition(MARKS[1])[2]


def _thinking(render: Render) -> str:
    """Return the text from a question to its answer if that has a thought."""
    answer = _with_thought({"role": "assistant", "content": MARKS[1]})
    messages = [{"role": "user", "content": MARKS[0]}, answer, {"role": "user", "content": MARKS[2]}]
    return render(messages, True).partition(MARKS[0])[2].partition(MARKS[1])[0]


def _with_thought(message: Message, thought: str = THOUGHT) -> Message:
    if message["role"] != "assistant":
        return message
    return {**message, "content": f"{OPENING}{thought}\n{CLOSING}\n\n{message['content']}"}


def _template(plain: Sequence[str], with_system: Sequence[str] | None, closing: str, thinking: str) -> str | None:
    before, asked, answered, last = plain
    opening = answered[len(closing) :] if answered.startswith(closing) else ""
    heads = [before, *(with_system[1:2] if with_system else ())]
    if opening and all(head.endswith(opening) for head in heads):  # each question opens alike, the first one too
        answered, before, *after = (text.removesuffix(opening) for text in (answered, *heads))
    else:
        opening, after = "", heads[1:]
    texts = [before, *after, asked, answered, last, opening, thinking, *(with_system[:1] if with_system else ())]
    if any("{{" in text or '"""' in text or text.endswith("{") for text in texts):
        return None
    head = before
    if with_system:
        otherwise = f"{{{{ else }}}}{before}" if before else ""
        head = f"{{{{ if .System }}}}{with_system[0]}{{{{ .System }}}}{after[0]}{otherwise}{{{{ end }}}}"
    end, thought = _with_thoughts(asked, thinking) if thinking else (asked, "")
    if end != last:
        end = f"{{{{ if {LAST} }}}}{last}{{{{ else }}}}{end}{{{{ end }}}}"
    loop = "range $i, $_ := .Messages" if LAST in end + thought else "range .Messages"
    return (
        f'{head}{{{{ {loop} }}}}{{{{ if eq .Role "user" }}}}{opening}{{{{ .Content }}}}{end}'
        f'{{{{ else if eq .Role "assistant" }}}}{thought}{{{{ .Content }}}}{answered}{{{{ end }}}}{{{{ end }}}}'
    )


def _with_thoughts(asked: str, thinking: str) -> tuple[str, str]:
    """Return what a question ends with, and what an answer begins with, in a template that names thoughts.

    Ollama takes what surrounds ``.Thinking`` in its own block for the marks of a thought, which it finds in answers by them.

    Args:
        asked: the text from a question to an answer without a thought.
        thinking: the text from a question to an answer with one.
    """
    shared = os.path.commonprefix([asked, thinking]).partition(OPENING.strip())[0]  # noqa: RUF071
    before, kept, after = thinking[len(shared) :].partition(f"{OPENING}{THOUGHT}\n{CLOSING}")
    # A template that drops thoughts still has a place for the last answer's, which may be continued: Ollama must find its marks.
    condition, space = (".Thinking", "") if kept else (LAST, "\n\n")
    shown = f"{{{{ if {condition} }}}}{OPENING}{{{{ .Thinking }}}}{CLOSING}{space}{{{{ end }}}}"
    otherwise = f"{{{{ else }}}}{asked[len(shared) :]}" if asked != shared else ""
    return shared, f"{{{{ if .Thinking }}}}{before}{shown}{after}{otherwise}{{{{ end }}}}"


def _samples(with_system: bool) -> Iterator[list[Message]]:
    for system in ([], [{"role": "system", "content": SYSTEM}]) if with_system else ([],):
        for first in range(len(CONTENTS)):
            for turns in (1, 3, 5):
                chosen = [CONTENTS[(first + turn) % len(CONTENTS)] for turn in range(turns)]
                roles = ("user", "assistant") * 3
                messages = [{"role": role, "content": text} for role, text in zip(roles, chosen, strict=False)]
                yield [*system, *messages]
                if turns > 1:
                    yield [*system, *map(_with_thought, messages, chosen)]


@dataclass(frozen=True)
class _Block:
    """An ``if`` or ``range``: (condition, nodes) of each branch."""

    branches: list[tuple[str, list[Any]]]


def render_go(template: str, messages: Sequence[Message]) -> str:
    """Render a conversation as Ollama does, with a Go template of the form that ``go_template`` writes.

    Ollama gives a template the system prompts as ``.System``, and all messages, those among them, as ``.Messages``. From answers it
    has taken the thoughts, as ``.Thinking``, if the template names them.

    >>> chats = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "?"}]
    >>> render_go('{{ range .Messages }}{{ if eq .Role "user" }}Q{{ .Content }}{{ else }}A{{ .Content }}{{ end }}{{ end }}', chats)
    'QHiAYoQ?'
    """
    pieces = re.split(r"\{\{ (.*?) \}\}", template)
    tokens = [(index % 2 == 1, piece) for index, piece in enumerate(pieces)]
    nodes, _ = _parse(tokens, 0)
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    taken = [_without_thought(message) for message in messages] if ".Thinking" in template else messages
    return "".join(_rendered(nodes, {"System": system, "Messages": taken}))


def _without_thought(message: Message) -> Message:
    thought, found, content = message["content"].partition(CLOSING)
    opening = OPENING.strip()
    if message["role"] != "assistant" or not found or not thought.lstrip().startswith(opening):
        return message
    return {**message, "thinking": thought.lstrip()[len(opening) :].lstrip(), "content": content.lstrip()}


def _parse(tokens: Sequence[tuple[bool, str]], at: int) -> tuple[list[Any], int]:
    """Parse nodes up to an ``else`` or ``end``; return them with the index of that token."""
    nodes: list[Any] = []
    while at < len(tokens):
        action, text = tokens[at]
        if action and re.match("else|end", text):
            return nodes, at
        if action and re.match("if |range ", text):
            branches, condition = [], text
            while condition != "end":
                inner, at = _parse(tokens, at + 1)
                branches.append((condition.removeprefix("else ").removeprefix("if "), inner))
                condition = tokens[at][1]
            nodes.append(_Block(branches))
        else:
            nodes.append((action, text))
        at += 1
    return nodes, at


def _rendered(nodes: Sequence[Any], values: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if not isinstance(node, _Block):
            action, text = node
            yield str(_value(text, values)) if action else text
        elif node.branches[0][0].startswith("range "):
            for index, message in enumerate(values["Messages"]):
                fields = {name.capitalize(): value for name, value in {"thinking": "", **message}.items()}
                inner = {**values, **fields, "i": index}
                yield from _rendered(node.branches[0][1], inner)
        else:
            chosen = next((inner for text, inner in node.branches if text == "else" or _value(text, values)), [])
            yield from _rendered(chosen, values)


def _value(text: str, values: dict[str, Any]) -> Any:
    if text == LAST:
        return len(values["Messages"]) - values["i"] == 1
    if equal := re.fullmatch(r'eq \.(\w+) "(\w+)"', text):
        return values[equal[1]] == equal[2]
    return values[text.removeprefix(".")]
