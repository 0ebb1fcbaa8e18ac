"""A conversation in the forms that a chat template may need: as recorded, as read, or with tools and calls as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysft.data.sources.tool_calls import calls_as_text, tool_schemas, tools_as_text
from raysft.data.tokenization.markers import MarkedRendering, Tool, Turn
from raysft.data.types import MEDIUM, Message


@dataclass(frozen=True)
class TemplateInput:
    """Turns and tools as a chat template reads them."""

    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    tools_as_text: bool = False
    """True if tools or calls were written into the turns as text."""

    @property
    def has_calls(self) -> bool:
        """True if a turn calls functions."""
        return any(turn.get("tool_calls") or turn.get("function_call") for turn in self.turns)

    @property
    def is_plain_text(self) -> bool:
        """True if the content of every turn is text."""
        return all(isinstance(turn.get("content"), str) for turn in self.turns)

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each turn."""
        return tuple(turn["role"] for turn in self.turns)

    @property
    def assistant_turns(self) -> list[int]:
        """Indices of the assistant turns."""
        return [index for index, turn in enumerate(self.turns) if turn["role"] == "assistant"]

    @property
    def may_be_omitted(self) -> bool:
        """True if it contains something that some templates leave out."""
        usual_roles = all(turn["role"] in ("system", "user", "assistant") for turn in self.turns)
        if self.tools or self.has_calls or not usual_roles or not self.is_plain_text:
            return True
        # A template may read an answer with images, which has parts, and no other.
        return any(MEDIUM in self.turns[index]["content"] for index in self.assistant_turns)


@dataclass(frozen=True)
class Omission:
    """What a template leaves out of a conversation; false if nothing."""

    tools: bool
    calls: bool
    """Calls or their results."""
    turn: int | None = None
    """Index of a turn whose content it leaves out or does not write as text."""

    @property
    def fits_in_text(self) -> bool:
        """True if tools or calls are missing, which can be written into the texts instead."""
        return self.tools or self.calls

    def __bool__(self) -> bool:
        return self.fits_in_text or self.turn is not None


def template_inputs(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[TemplateInput]:
    """Yield the forms of a conversation to try, the record's own first."""
    recorded = TemplateInput(tuple(_recorded_turn(message) for message in messages), tuple(tools))
    yield recorded
    normalized = TemplateInput(tuple(_normalized_turn(message) for message in messages), tool_schemas(tools))
    if normalized != recorded:
        yield normalized
    if normalized.has_calls:  # some templates insist on OpenAI's form, in which arguments are JSON text
        yield replace(normalized, turns=tuple(_with_json_arguments(turn) for turn in normalized.turns))


def with_tools_as_text(given: TemplateInput, messages: Sequence[Message], omission: Omission) -> TemplateInput:
    """Write the tools and calls that a template leaves out into the texts."""
    turns = tuple(calls_as_text(_normalized_turn(message)) for message in messages) if omission.calls else given.turns
    turns = tools_as_text(turns, tool_schemas(given.tools)) if omission.tools else turns
    return TemplateInput(turns, () if omission.tools else given.tools, tools_as_text=omission.fits_in_text)


def with_content_parts(given: TemplateInput) -> TemplateInput:
    """Turn contents into lists of parts, for a template that reads nothing else, as those of vision models do."""
    return replace(
        given,
        turns=tuple(
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn.get("content"), str)
            else turn
            for turn in given.turns
        ),
    )


def up_to_first_call(given: TemplateInput) -> TemplateInput:
    """Cut a conversation after its first call, because a template may refuse it for what follows."""
    end = next(
        (
            index + bool(turn.get("tool_calls"))
            for index, turn in enumerate(given.turns)
            if turn["role"] == "tool" or turn.get("tool_calls")
        ),
        len(given.turns),
    )
    return replace(given, turns=given.turns[:end])


def find_omission(given: TemplateInput, marked: MarkedRendering, text: str) -> Omission:
    """Find what a rendering leaves out of its input.

    Args:
        given: the input.
        marked: its rendering with markers.
        text: its rendering without.
    """
    calls = [index for index, turn in enumerate(given.turns) if turn.get("tool_calls") or turn.get("function_call")]
    results = [index for index, turn in enumerate(given.turns) if turn["role"] == "tool"]
    omitted = [
        index
        for index, turn in enumerate(given.turns)
        if (turn["role"] != "tool" and index not in calls and marked.shows(index, "content") is False)
        or (isinstance(turn.get("content"), list) and _is_dumped(turn["content"], text))
    ]
    return Omission(
        tools=bool(given.tools) and not _is_shown(marked.shows(-1), [_name(tool) for tool in given.tools], text),
        calls=(
            bool(calls)
            and not all(
                _is_shown(marked.shows(index, "tool_calls"), _called_names(given.turns[index]), text) for index in calls
            )
        )
        or any(marked.shows(index) is False for index in results),
        turn=omitted[0] if omitted else None,
    )


def has_double_encoded_arguments(messages: Sequence[Message], texts: Sequence[str]) -> bool:
    """Return True if a text quotes arguments that the record gives as JSON text, as OpenAI's API does.

    A template that writes calls as JSON then encodes them a second time, and the model learns to do so.
    """
    return any(
        quoted in text
        for message in messages
        for arguments in _json_arguments(message)
        for quoted in (json.dumps(arguments, ensure_ascii=False), json.dumps(arguments), repr(arguments))
        for text in texts
    )


def _json_arguments(message: Message) -> Iterator[str]:
    """Yield the arguments of a turn's calls that are an object but are recorded as JSON text."""
    recorded = message.original or {}
    calls = recorded.get("tool_calls") or [recorded.get("function_call") or {}]
    for call, normalized in zip(calls if message.original else (), message.tool_calls, strict=False):
        arguments = call.get("function", call).get("arguments")
        if isinstance(arguments, str) and isinstance(normalized["function"]["arguments"], dict):
            yield arguments


def _is_dumped(parts: list[Any], text: str) -> bool:
    """Return True if a template writes a list of parts as JSON or ``repr``, other than in a turn that it writes as JSON."""
    as_json = json.dumps(parts, ensure_ascii=False)
    return str(parts) in text or text.count(as_json) > text.count(f'"content": {as_json}')


def _is_shown(marker_shown: bool | None, names: Sequence[str], text: str) -> bool:
    """Return True if a marker is shown or, where there is none, one of the names."""
    return any(name in text for name in names) if marker_shown is None else marker_shown


def _called_names(turn: Turn) -> list[str]:
    return [_name(call) for call in turn.get("tool_calls") or [turn["function_call"]]]


def _name(value: Any) -> str:
    """Return the name of a function, or NUL, which no text contains."""
    function = value.get("function", value) if isinstance(value, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else "\0"


def _with_json_arguments(turn: Turn) -> Turn:
    """Encode the arguments of a turn's calls as JSON text."""
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**turn, "tool_calls": calls}


def _recorded_turn(message: Message) -> Turn:
    return _normalized_turn(message) if message.original is None else message.original


def _normalized_turn(message: Message) -> Turn:
    calls = {"tool_calls": list(message.tool_calls)} if message.tool_calls else {}
    return {"role": message.role, "content": message.content, **calls, **message.extra}
