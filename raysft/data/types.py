"""The values that the data stage hands to the stages after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

IGNORE_INDEX = -100
"""Label of a token that is not trained on."""


Record = dict[str, Any]
"""One record of a data file, as read."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Functions that the assistant calls, as ``{"type": "function", "function": {"name": …, "arguments": {…}}}``."""
    trainable: bool = True
    """Whether what the assistant wrote here may be trained on."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The turn's other keys, any of which a chat template may read: ``name``, ``tool_call_id``, ``reasoning_content`` …"""
    original: dict[str, Any] | None = None
    """The turn as its record has it, where it is in the form that chat templates know and says more than role and content."""


@dataclass(frozen=True)
class Example:
    """One unpacked example as every format becomes it: a conversation, a text, or token ids."""

    source: str
    """Name of the source."""
    record: str
    """Where it stands: ``file:line`` or ``file:[index]``."""
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the assistant may call, as JSON schemas."""
    text: str = ""
    prompt_length: int | None = None
    """Characters of ``text`` that are a prompt; None for a text without one."""
    ids: tuple[int, ...] = ()
    """Token ids, where the data is tokenized already."""
    labels: tuple[int, ...] = ()
    """Labels of ``ids``."""
    weight: float = 1.0
    """What each of its trained tokens counts in the loss."""


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be used."""

    source: str
    record: str
    reason: str
