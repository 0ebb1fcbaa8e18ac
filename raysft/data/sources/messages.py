"""The turns of a record → messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from raysft.data.sources.tool_calls import nested_strings, parse_tool_call
from raysft.data.types import Message, Record

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "function",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
"""Names of roles in the field's data; a ``function`` is an assistant's call whose content is JSON."""
ROLE_OF_TAG = {
    "user": "user",
    "assistant": "assistant",
    "observation": "tool",
    "function": "function",
    "system": "system",
}
TEMPLATE_ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that chat templates know."""
TRAINING_KEYS = ("train", "weight")
"""Keys of a turn that say how to train on it, and are no part of what the model reads."""
CONSUMED_KEYS = {"role", "content", "from", "value", "tool_calls", "function_call", *TRAINING_KEYS}
"""Keys of a turn that become something else, and so are not kept beside it."""


def parse_turns(value: Any, column: str, tags: Mapping[Any, str]) -> Iterator[Message]:
    """Turns of role and content, by the keys ``from`` and ``value`` or ``role`` and ``content``."""
    roles = {**ROLES, **{tags[tag]: role for tag, role in ROLE_OF_TAG.items() if tag in tags}} if tags else ROLES
    for index, turn in enumerate(require_list(value, column)):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{where} holds {turn!r:.60}, a turn of role and content belongs there")
        role_key = tags.get("role") or ("from" if "from" in turn else "role")
        text_key = tags.get("content") or ("value" if "value" in turn else "content")
        called = turn.get("function_call")
        if isinstance(called, dict) and not any(called.values()):
            called = None  # as JSON that was written from a Parquet file has it in turns without a call
        calls = turn.get("tool_calls") or ([called] if called else [])
        if role_key not in turn or (turn.get(text_key) is None and not calls):
            raise ValueError(f"{where} needs {role_key!r} and {text_key!r}, it is {turn!r:.60}")
        role = turn[role_key]
        known = roles.get(role) if isinstance(role, str) else None
        if known is None:
            raise ValueError(f"{where} has the role {role!r:.40}; known: {', '.join(roles)}")
        content = _content(turn.get(text_key), f"{where}.{text_key}")
        if known == "function":
            known, calls, content = "assistant", _parse_calls(content, where), ""
        extra = {
            key: value
            for key, value in turn.items()
            if key not in {*CONSUMED_KEYS, role_key, text_key} and value is not None
        }
        made = (
            tuple(parse_tool_call(call, where) for call in require_list(calls, f"{where}.tool_calls", "calls"))
            if calls
            else ()
        )
        original = _original(turn, called is not None) if (role_key, text_key) == ("role", "content") else None
        for text in nested_strings((made, extra, original)):
            require_text(text, where)
        yield Message(
            role=known,  # type: ignore[arg-type]
            content=content,
            tool_calls=made,
            trainable=_trainable(turn, where),
            extra=extra,
            original=original,
        )


def _original(turn: Record, calls: bool) -> Record | None:
    """A turn as chat templates are to see it; None where role and content say all of it, or they do not know its role."""
    hidden = TRAINING_KEYS if calls else (*TRAINING_KEYS, "function_call")
    original = {key: value for key, value in turn.items() if key not in hidden and value is not None}
    if original["role"] not in TEMPLATE_ROLES:
        return None
    says_more = list(original) != ["role", "content"] or not isinstance(original["content"], str)
    return original if says_more or ROLES[original["role"]] != original["role"] else None


def _content(value: Any, where: str) -> str:
    """A turn's text; OpenAI also writes it as a list of parts."""
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        other = [part.get("type") for part in value if part.get("type") != "text"]
        if other:
            raise ValueError(f"{where} holds a part of type {other[0]!r}; only text can be trained on")
        return "".join(require_text(part.get("text"), where) for part in value)
    return require_text(value, where)


def _parse_calls(content: str, where: str) -> list[Any]:
    """The calls that a function turn holds as JSON: one, or a list."""
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is a function call and holds no JSON: {content[:40]!r}") from None
    return calls if isinstance(calls, list) else [calls]


def _trainable(turn: Record, where: str) -> bool:
    """Whether a turn may be trained on: ``train: false``, or ``weight: 0`` as OpenAI has it, says no."""
    for key in ("train", "weight"):
        value = turn.get(key)
        if value is not None and value not in (0, 1):
            raise ValueError(f"{where}.{key} is {value!r:.40}; true or false belongs there")
    return turn.get("train") not in (False, 0) and turn.get("weight") not in (False, 0)


def require_text(value: Any, field: str) -> str:
    """A value that has to be a text which can be encoded."""
    if not isinstance(value, str):
        raise ValueError(f"{field} holds {value!r:.40}, a text belongs there")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} holds half a character ({value[error.start]!r}), which no tokenizer takes") from None
    return value


def require_list(value: Any, field: str, what: str = "turns") -> list[Any]:
    """A value that has to be a list which holds something."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} holds {value!r:.40}, a list of {what} belongs there")
    return value
