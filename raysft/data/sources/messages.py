"""Convert the turns of a record to messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raysft.data.sources.media_parts import TURN_KEYS, parse_parts, turn_images
from raysft.data.sources.tool_calls import nested_strings, parse_tool_call
from raysft.data.types import MEDIUM, Medium, Message, Record

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
"""Role in the data → role of a message; ``function`` is an assistant turn whose content is a call, perhaps after a thought."""
ROLE_OF_TAG = {
    "user": "user",
    "assistant": "assistant",
    "observation": "tool",
    "function": "function",
    "system": "system",
}
"""Tag of a source → role of a message, as in ``ROLES``."""
THOUGHT = re.compile(r"\s*(<think>.*?</think>\s*)?(.*)", re.DOTALL)
"""A thought, and what follows it."""
TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>\s*", re.DOTALL)
"""A call in the words in which Hermes and Qwen write it."""
TEMPLATE_ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that chat templates accept."""
TRAINING_KEYS = ("train", "weight")
"""Keys of a turn that control training, and are not shown to the model."""
CONSUMED_KEYS = {"role", "content", "from", "value", "tool_calls", "function_call", *TRAINING_KEYS, *TURN_KEYS}
"""Keys of a turn that become fields of the message, and so do not go into ``extra``."""


def parse_turns(value: Any, column: str, tags: Mapping[Any, str]) -> Iterator[Message]:
    """Convert turns with the keys ``from`` and ``value``, or ``role`` and ``content``, to messages.

    Args:
        value: list of turns, as read.
        column: the field that holds them, for messages.
        tags: the source's own names of keys and roles.

    Raises:
        ValueError: a turn cannot be used.
    """
    roles = {**ROLES, **{tags[tag]: role for tag, role in ROLE_OF_TAG.items() if tag in tags}} if tags else ROLES
    for index, turn in enumerate(require_list(value, column)):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{where} must be a turn with role and content, but is {turn!r:.60}")
        yield _message(turn, where, roles, tags)


def _message(turn: Record, where: str, roles: Mapping[str, str], tags: Mapping[Any, str]) -> Message:
    role_key = tags.get("role") or ("from" if "from" in turn else "role")
    text_key = tags.get("content") or ("value" if "value" in turn else "content")
    function_call = turn.get("function_call")
    if isinstance(function_call, dict) and not any(function_call.values()):
        function_call = None  # JSON written from a Parquet file has an empty call in every turn without one
    calls = turn.get("tool_calls") or ([function_call] if function_call else [])
    name = turn.get(role_key)
    role = roles.get(name) if isinstance(name, str) else None
    if role == "system" and turn.get(text_key) is None:
        turn = {**turn, text_key: ""}
    if role_key not in turn or (turn.get(text_key) is None and not calls):
        raise ValueError(f"{where} must have {role_key!r} and {text_key!r}, but is {turn!r:.60}")
    if role is None:
        raise ValueError(f"{where} has the unknown role {name!r:.40}; known roles: {', '.join(roles)}")
    content, media = _content(turn.get(text_key), f"{where}.{text_key}")
    renamed = ROLES.get(str(name)) != role
    if role == "function":
        if media or any(turn.get(key) for key in TURN_KEYS):
            raise ValueError(f"{where} is a function call, but has an image; move it to another turn")
        role = "assistant"
        content, calls = _parse_calls(content, calls, where)
    calls = require_list(calls, f"{where}.tool_calls", "calls") if calls else []
    tool_calls = tuple(parse_tool_call(call, where) for call in calls)
    consumed = {*CONSUMED_KEYS, role_key, text_key}
    extra = {key: value for key, value in turn.items() if key not in consumed and value is not None}
    standard = (role_key, text_key) == ("role", "content") and not renamed
    # Templates get a conversation with images in separate parts, regardless of the names of the record's parts.
    original = _original(turn, function_call is not None) if standard and not media else None
    for text in nested_strings((tool_calls, extra, original)):
        require_text(text, where)
    message = Message(
        role=role,  # type: ignore[arg-type]
        content=content,
        tool_calls=tool_calls,
        trainable=_trainable(turn, where),
        extra=extra,
        original=original,
        media=tuple(media),
    )
    return turn_images(message, turn, where)


def _original(turn: Record, has_function_call: bool) -> Record | None:
    """The turn without training keys and nulls; None if it is just role and content, or if templates lack its role or parts."""
    hidden = TRAINING_KEYS if has_function_call else (*TRAINING_KEYS, "function_call")
    original = {key: value for key, value in turn.items() if key not in hidden and value is not None}
    parts = original.get("content")
    if isinstance(parts, list) and any(part.get("type") != "text" for part in parts):
        return None
    if original["role"] not in TEMPLATE_ROLES:
        return None
    says_more = list(original) != ["role", "content"] or not isinstance(original["content"], str)
    return original if says_more or ROLES[original["role"]] != original["role"] else None


def _content(value: Any, where: str) -> tuple[str, Sequence[Medium]]:
    """Text of a turn, and its images; in OpenAI's format it may be a list of parts."""
    if value is None:
        return "", ()
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return parse_parts(value, where, require_text)
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text or a list of parts, but is {value!r:.40}")
    return require_text(value, where), ()


def _parse_calls(content: str, given: Any, where: str) -> tuple[str, Any]:
    """Decode the content of a function turn: perhaps a thought, then JSON with one call or a list of them.

    The JSON may stand in ``<tool_call>``, several times and after any text.

    Args:
        content: the content.
        given: calls that the turn has besides its content, which then may be any text.
        where: the turn, for messages.

    Returns:
        The thought with its tags, or the text before ``<tool_call>``, and the calls.
    """
    thought, text = THOUGHT.fullmatch(content).groups()  # pyright: ignore[reportOptionalMemberAccess]
    tagged = TOOL_CALL.findall(content)
    try:
        decoded = [json.loads(call) for call in tagged or [text]]
    except (ValueError, RecursionError):
        if given:
            return content, given
        raise ValueError(f"{where} is a function call and must be JSON, but is {text[:40]!r}") from None
    calls = [call for part in decoded for call in (part if isinstance(part, list) else [part])]
    return TOOL_CALL.sub("", content) if tagged else thought or "", given or calls


def _trainable(turn: Record, where: str) -> bool:
    """False if the turn is excluded from training, by ``train: false`` or by OpenAI's ``weight: 0``."""
    for key in TRAINING_KEYS:
        value = turn.get(key)
        if value is not None and value not in (0, 1):
            raise ValueError(f"{where}.{key} must be true or false, but is {value!r:.40}")
    return turn.get("train") not in (False, 0) and turn.get("weight") not in (False, 0)


def require_text(value: Any, field: str) -> str:
    """Return the value if it is valid Unicode text without the character that stands for a medium.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text, but is {value!r:.40}")
    if MEDIUM in value:
        raise ValueError(
            f"{field} contains the private-use character U+{ord(MEDIUM):X}, which raysft uses for images; remove it"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} contains an unpaired surrogate ({value[error.start]!r}), which is not valid Unicode text"
        ) from None
    return value


def require_list(value: Any, field: str, items: str = "turns") -> list[Any]:
    """Return the value if it is a list with at least one item.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} must be a non-empty list of {items}, but is {value!r:.40}")
    return value
