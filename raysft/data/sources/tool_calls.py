"""Bring functions and their calls into one shape, and write them as text for chat templates that do not support them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any


def parse_tool_call(call: Any, where: str) -> dict[str, Any]:
    """Convert a function call to ``{"type": "function", "function": {"name": …, "arguments": {…}}}``.

    Raises:
        ValueError: the call has no name.

    >>> parse_tool_call({"name": "add", "arguments": '{"a": 1}'}, "")["function"]
    {'name': 'add', 'arguments': {'a': 1}}
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} must call a function with name and arguments, but calls {call!r:.60}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        # Templates write objects as JSON; text that is not a JSON object stays text.
        arguments = parsed if isinstance(parsed, dict) else arguments
    extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}, **extra}


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Read the functions that the model may call, from a list or from a list as JSON.

    Raises:
        ValueError: the value is not a list of functions.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise ValueError(f"tools must be a list of functions or JSON, but is {value[:40]!r}") from None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"tools must be a list of functions, but is {value!r:.40}")
    return tuple(value)


def tool_schemas(tools: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Wrap functions as ``{"type": "function", "function": {…}}``, the form that most chat templates expect."""
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def nested_strings(value: Any) -> Iterator[str]:
    """Yield all strings in nested mappings and lists, including keys.

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
    """Describe the functions in the system turn, for a chat template that would silently leave them out.

    The wording follows Hermes and Qwen, as it does for calls.
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
    """Write the calls of a turn as text in ``<tool_call>``, or the result of a function in ``<tool_response>``."""
    if turn["role"] == "tool":
        return {**turn, "role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    if not turn.get("tool_calls"):
        return turn
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn["tool_calls"]]
    parts = [turn["content"]] if turn["content"] else []
    parts += [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return {key: value for key, value in turn.items() if key != "tool_calls"} | {"content": "\n".join(parts)}
