"""The values that the data stage hands to the stages after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

IGNORE_INDEX = -100
"""Label of a token that the loss ignores."""
STAND_IN = "-"
"""Stands for the answer of an example that has none, so that a chat template renders it as any other."""


MEDIUM = "\U000f1a9e"
"""Stands in the content of a message for each of its media. From a private plane of Unicode."""


Record = dict[str, Any]
"""One record of a data file, as read."""


@dataclass(frozen=True)
class Medium:
    """An image or a video of a message."""

    kind: Literal["image", "video"]
    location: str
    """Path or URI of its file; empty while its bytes are only in the record."""
    content: bytes = field(default=b"", repr=False)
    """The encoded file, if the record holds it and nobody has kept it in a file yet."""
    digest: str = ""
    """Hash of the encoded file (``media.files.digest``); empty before it is opened."""
    width: int = 0
    """Pixels of the image that the processor is given: turned as its file says, and scaled to the limits of the config."""
    height: int = 0
    size: int = 0
    """Bytes of the encoded file."""


@dataclass(frozen=True)
class TokenizedMedium:
    """An image, and the tokens that stand for it."""

    kind: Literal["image", "video"]
    location: str
    digest: str
    width: int
    height: int
    start: int
    """First of its tokens: in the example or the prompt, and after packing in the row."""
    stop: int
    """The token after its last."""
    size: int = 0
    """Bytes of the encoded file."""


@dataclass(frozen=True)
class RowMedium(TokenizedMedium):
    """An image in a packed row, with the bytes that Ray Data has read."""

    content: bytes = field(default=b"", repr=False)
    """The encoded file."""
    fault: str = ""
    """Why it could not be read, or that its file has changed."""


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
    media: tuple[Medium, ...] = ()
    """Its images and videos; ``MEDIUM`` in ``content`` stands where each one is, in this order."""


@dataclass(frozen=True)
class Example:
    """One unpacked example, regardless of its format: a conversation, a text or token IDs."""

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
