"""Functions that a model may call: one shape for the forms that data has them in, and plain text for templates without them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from raysft.records import Message


def tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call of a function as ``{"type": "function", "function": {"name": …, "arguments": {…}}}``.

    Raises:
        ValueError: it is none.

    >>> tool_call({"name": "add", "arguments": '{"a": 1}'}, "")["function"]
    {'name': 'add', 'arguments': {'a': 1}}
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} calls {call!r:.60}; a function's name and arguments belong there")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        # Templates write objects as JSON; text that is none stays as it is.
        arguments = parsed if isinstance(parsed, dict) else arguments
    extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}, **extra}


def tool_schemas(value: Any) -> tuple[dict[str, Any], ...]:
    """Functions that may be called, as ``{"type": "function", "function": {…}}``; from a list, or from JSON that holds one.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise ValueError(f"tools holds {value[:40]!r}, which is no JSON") from None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"tools holds {value!r:.40}, a list of functions belongs there")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def strings(value: Any) -> Iterator[str]:
    """All texts in nested mappings and lists, keys too.

    >>> list(strings([{"a": "b"}, 1, ("c",)]))
    ['a', 'b', 'c']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def as_text(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, with_tools: bool, with_calls: bool
) -> tuple[Message, ...]:
    """Write functions and calls into the texts, for a chat template that would silently leave them out.

    The wording is that of Hermes and Qwen: the functions at the end of the system turn, ``<tool_call>`` around a call and
    ``<tool_response>`` around what a function gave.

    Args:
        messages: the conversation.
        tools: functions that may be called.
        with_tools: whether to write the functions.
        with_calls: whether to write the calls and what they gave.
    """
    written = list(messages)
    if with_calls:
        written = [_call_as_text(message) for message in written]
    if with_tools and tools:
        system = written[0].content if written[0].role == "system" else ""
        listing = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        content = (
            f"{system}\n\n# Tools\n\nYou may call functions. They are described within <tools></tools>:\n<tools>\n{listing}\n"
            '</tools>\n\nTo call one, write\n<tool_call>\n{"name": <name>, "arguments": <arguments as JSON>}\n</tool_call>'
        ).lstrip()
        written[:1] = [Message("system", content), *([] if written[0].role == "system" else written[:1])]
    return tuple(written)


def _call_as_text(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>", extra=message.extra)
    if not message.tool_calls:
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls]
    written = [message.content] if message.content else []
    written += [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return Message("assistant", "\n".join(written), train=message.train, extra=message.extra)
