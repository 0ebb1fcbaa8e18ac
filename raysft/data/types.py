"""The values that the data stage hands to the stages after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

IGNORE_INDEX = -100
"""Label of a token that the loss ignores."""
STAND_IN = "-"
"""Stands for the answer of an example that has none, so that a chat template renders it as any other."""


Record = dict[str, Any]
"""One record of a data file, as read."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    """The assistant's function calls, as ``{"type": "function", "function": {"name": …, "arguments": {…}}}``."""
    trainable: bool = True
    """False keeps an assistant message out of the loss."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other keys of the turn that a chat template may read: ``name``, ``tool_call_id``, ``reasoning_content`` …"""
    original: dict[str, Any] | None = None
    """The turn as written in its record, if chat templates understand it and it holds more than role and content."""


@dataclass(frozen=True)
class Example:
    """One unpacked example, whatever its format was: a conversation, a text or token IDs."""

    source: str
    """Name of the source."""
    record: str
    """The record's place in its file: ``file:line`` or ``file:[index]``."""
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the assistant may call, as JSON schemas."""
    text: str = ""
    prompt_length: int | None = None
    """Leading characters of ``text`` that are a prompt; None for raw text."""
    ids: tuple[int, ...] = ()
    """Token IDs, if the record is tokenized already."""
    labels: tuple[int, ...] = ()
    """Labels of ``ids``, not shifted."""
    weight: float = 1.0
    """Weight of each of its loss tokens in the loss."""
    unanswered: str = ""
    """Why it has no answer to train on, if it is only a prompt to generate from; its last message or text then stands for one."""


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used, and why."""

    source: str
    record: str
    """The record's place in its file, as in ``Example``."""
    reason: str
