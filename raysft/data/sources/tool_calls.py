"""Functions that a model may call: one shape for the forms that data has them in, and plain text for templates without them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any


def parse_tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call of a function as ``{"type": "function", "function": {"name": …, "arguments": {…}}}``.

    Raises:
        ValueError: it is none.

    >>> parse_tool_call({"name": "add", "arguments": '{"a": 1}'}, "")["function"]
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


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Functions that may be called, as they are; from a list, or from JSON that holds one.

    Raises:
        ValueError: there are none.
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
    return tuple(value)


def tool_schemas(tools: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Functions as ``{"type": "function", "function": {…}}``, the form that most chat templates expect."""
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def nested_strings(value: Any) -> Iterator[str]:
    """All texts in nested mappings and lists, keys too.

    >>> list(nested_strings([{"a": "b"}, 1, ("c",)]))
    ['a', 'b', 'c']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from nested_strings(key)
            yield from nested_strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from nested_strings(inner)


def tools_as_text(turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Write the functions that may be called into the system turn, for a chat template that would silently leave them out.

    The wording, here and for calls, is that of Hermes and Qwen.
    """
    has_system = turns[0]["role"] == "system" and isinstance(turns[0].get("content"), str)
    system = turns[0]["content"] if has_system else ""
    listing = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    content = (
        f"{system}\n\n# Tools\n\nYou may call functions. They are described within <tools></tools>:\n<tools>\n{listing}\n"
        '</tools>\n\nTo call one, write\n<tool_call>\n{"name": <name>, "arguments": <arguments as JSON>}\n</tool_call>'
    ).lstrip()
    return {"role": "system", "content": content}, *(turns[1:] if has_system else turns)


def calls_as_text(turn: dict[str, Any]) -> dict[str, Any]:
    """Write the calls of a turn into its text with ``<tool_call>``, or what a function gave with ``<tool_response>``."""
    if turn["role"] == "tool":
        return {**turn, "role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    if not turn.get("tool_calls"):
        return turn
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn["tool_calls"]]
    written = [turn["content"]] if turn["content"] else []
    written += [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return {key: value for key, value in turn.items() if key != "tool_calls"} | {"content": "\n".join(written)}
