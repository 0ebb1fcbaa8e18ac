"""A conversation as the chat template is given it: as its record has it, as it was read, or with tools and calls as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysft.data.sources.tool_calls import calls_as_text, tool_schemas, tools_as_text
from raysft.data.tokenization.markers import Tool, Turn, View
from raysft.data.types import Message


@dataclass(frozen=True)
class Form:
    """Turns and tools as a chat template is given them."""

    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    as_text: bool = False
    """Whether tools or calls were written into the turns."""

    @property
    def calls(self) -> bool:
        """Whether functions are called in it."""
        return any(turn.get("tool_calls") or turn.get("function_call") for turn in self.turns)

    @property
    def texts(self) -> bool:
        """Whether every turn's content is a text."""
        return all(isinstance(turn.get("content"), str) for turn in self.turns)

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each turn."""
        return tuple(turn["role"] for turn in self.turns)

    @property
    def answers(self) -> list[int]:
        """The numbers of the assistant's turns."""
        return [index for index, turn in enumerate(self.turns) if turn["role"] == "assistant"]

    @property
    def may_be_hidden(self) -> bool:
        """Whether it holds something that not every template has a place for."""
        known = all(turn["role"] in ("system", "user", "assistant") for turn in self.turns)
        return bool(self.tools) or self.calls or not known or not self.texts


@dataclass(frozen=True)
class Hidden:
    """What a template leaves out of a conversation."""

    tools: bool
    calls: bool
    turn: int | None = None
    """The number of a turn whose content it does not show, or not as such."""

    @property
    def as_text(self) -> bool:
        """Whether it can be written into the texts instead."""
        return self.tools or self.calls

    def __bool__(self) -> bool:
        return self.as_text or self.turn is not None


def forms(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Form]:
    """The forms that a conversation may be given in, the record's own first."""
    given = Form(tuple(_given(message) for message in messages), tuple(tools))
    yield given
    read = Form(tuple(_read(message) for message in messages), tool_schemas(tools))
    if read != given:
        yield read
    if read.calls:  # OpenAI's own form, which some templates insist on
        yield replace(read, turns=tuple(_with_arguments_as_text(turn) for turn in read.turns))


def written(form: Form, messages: Sequence[Message], hidden: Hidden) -> Form:
    """The form with what a template hides written into the texts; calls are those that were read."""
    turns = tuple(calls_as_text(_read(message)) for message in messages) if hidden.calls else form.turns
    turns = tools_as_text(turns, tool_schemas(form.tools)) if hidden.tools else turns
    return Form(turns, () if hidden.tools else form.tools, as_text=hidden.as_text)


def in_parts(form: Form) -> Form:
    """The form for a template that reads nothing but lists of parts, as those of models that see do."""
    return replace(
        form,
        turns=tuple(
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn.get("content"), str)
            else turn
            for turn in form.turns
        ),
    )


def before_answers(form: Form) -> Form:
    """The beginning of a conversation up to its first call; a template that raises may do so for what follows it."""
    first = next(
        (
            index + bool(turn.get("tool_calls"))
            for index, turn in enumerate(form.turns)
            if turn["role"] == "tool" or turn.get("tool_calls")
        ),
        len(form.turns),
    )
    return replace(form, turns=form.turns[:first])


def hidden(form: Form, view: View, text: str) -> Hidden:
    """What of a form is not in its rendering."""
    calls = [index for index, turn in enumerate(form.turns) if turn.get("tool_calls") or turn.get("function_call")]
    answers = [index for index, turn in enumerate(form.turns) if turn["role"] == "tool"]
    gone = [
        index
        for index, turn in enumerate(form.turns)
        if (turn["role"] != "tool" and index not in calls and view.shows(index, "content") is False)
        or (isinstance(turn.get("content"), list) and _written_out(turn["content"], text))
    ]
    return Hidden(
        tools=bool(form.tools) and not _seen(view.shows(-1), [_name(tool) for tool in form.tools], text),
        calls=(
            bool(calls)
            and not all(_seen(view.shows(index, "tool_calls"), _called(form.turns[index]), text) for index in calls)
        )
        or any(view.shows(index) is False for index in answers),
        turn=gone[0] if gone else None,
    )


def quoted(messages: Sequence[Message], texts: Sequence[str]) -> bool:
    """Whether arguments that a record gives as JSON text, as OpenAI's API does, stand in texts as a quoted one.

    A template that writes a call as JSON encodes them a second time then, and the model learns to.
    """
    return any(
        form in text
        for message in messages
        for arguments in _arguments_as_text(message)
        for form in (json.dumps(arguments, ensure_ascii=False), json.dumps(arguments), repr(arguments))
        for text in texts
    )


def _arguments_as_text(message: Message) -> Iterator[str]:
    """The arguments of a turn's calls that are objects, and were given as JSON text."""
    given = message.original or {}
    calls = given.get("tool_calls") or [given.get("function_call") or {}]
    for call, read in zip(calls if message.original else (), message.tool_calls, strict=False):
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, str) and isinstance(read["function"]["arguments"], dict):
            yield arguments


def _written_out(parts: list[Any], text: str) -> bool:
    """Whether a template writes a list of parts as such, where it is not a whole turn that it writes as JSON."""
    as_json = json.dumps(parts, ensure_ascii=False)
    return str(parts) in text or text.count(as_json) > text.count(f'"content": {as_json}')


def _seen(shown: bool | None, names: Sequence[str], text: str) -> bool:
    """Whether the letters tell that something is shown or, where there are none, its name does."""
    return any(name in text for name in names) if shown is None else shown


def _called(turn: Turn) -> list[str]:
    return [_name(call) for call in turn.get("tool_calls") or [turn["function_call"]]]


def _name(value: Any) -> str:
    function = value.get("function", value) if isinstance(value, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else "\0"


def _with_arguments_as_text(turn: Turn) -> Turn:
    if not turn.get("tool_calls"):
        return turn
    functions = [call["function"] for call in turn["tool_calls"]]
    texts = [
        each["arguments"] if isinstance(each["arguments"], str) else json.dumps(each["arguments"], ensure_ascii=False)
        for each in functions
    ]
    calls = [
        {**call, "function": {**each, "arguments": text}}
        for call, each, text in zip(turn["tool_calls"], functions, texts, strict=True)
    ]
    return {**turn, "tool_calls": calls}


def _given(message: Message) -> Turn:
    return _read(message) if message.original is None else message.original


def _read(message: Message) -> Turn:
    calls = {"tool_calls": list(message.tool_calls)} if message.tool_calls else {}
    return {"role": message.role, "content": message.content, **calls, **message.extra}
