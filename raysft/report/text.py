"""Text as the report shows it: without secrets, on one line or shortened, and with control characters made visible."""

from __future__ import annotations

import re
from typing import Any

MAX_CHARACTERS = 1500
"""Longest text on the page. With all texts in full, a browser could not open the page."""
SAMPLE_LENGTH = 240
"""Longest text in a sample on the terminal."""

_SPECIAL = re.compile(r"<[|｜][^<>]*?[|｜]>|</?(?:s|bos|eos|pad|think|start_of_turn|end_of_turn)>|\[/?INST\]")
"""Special tokens of the common chat templates, which separate the turns of a prompt."""
_IMAGE = re.compile(r"(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?")
"""An image in a prompt, where a template writes it with what would else separate turns."""
_ROLE = re.compile(r"\s*(?:system|user|assistant|model|tool|human)\s*(?:\n|$)")
"""Name of a role, where a template writes it before a turn."""
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in b"\n\t\r"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Control characters → their Unicode symbols. HTML would drop or refuse them."""


def masked(location: Any) -> str:
    """A path or URI without what may be secret: its credentials and its query.

    >>> masked("s3://key:secret@bucket/chats.jsonl?endpoint_override=host")
    's3://***@bucket/chats.jsonl?***'
    >>> masked("data/part-?.jsonl")
    'data/part-?.jsonl'
    """
    text = str(location)
    if "://" not in text:
        return text
    # A secret may hold slashes and @ that are not escaped, so after a colon everything up to the last @ is masked.
    text = re.sub(r"://(?:[^@/]*:.*@|[^@/]*@)", "://***@", text)
    return re.sub(r"[?#].*", "?***", text)


def visible(text: str) -> str:
    """Text with visible control characters, and unpaired surrogates escaped as in JSON.

    >>> visible("a\\x00\\ud800\\r\\n")
    'a␀\\\\ud800\\n'
    """
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return whole.replace("\r\n", "\n").replace("\r", "\n").translate(_VISIBLE)


def held_out(holdout: float) -> str:
    """What ``data.holdout`` keeps out of training, as the subject of a sentence; empty if nothing.

    >>> held_out(0.1), held_out(500)
    ('10% of each training source was', '500 examples of the training sources were')
    """
    if holdout >= 1:
        return (
            "1 example of the training sources was"
            if holdout == 1
            else f"{holdout:,.0f} examples of the training sources were"
        )
    return f"{100 * holdout:g}% of each training source was" if holdout else ""


def without_middle(text: str) -> str:
    """Text without its middle if it is long. The end is kept because a prompt often ends with its question."""
    if len(text) <= MAX_CHARACTERS:
        return text
    tail = MAX_CHARACTERS // 3
    omitted = len(text) - MAX_CHARACTERS
    return f"{text[: MAX_CHARACTERS - tail]} […{omitted:,} characters omitted…] {text[-tail:]}"


def shortened(text: Any, length: int = SAMPLE_LENGTH) -> str:
    """Text on one line, without its middle if it is long.

    >>> shortened("one two  three four", 13)
    'one two … our'
    """
    line = "".join(letter if letter.isprintable() else " " for letter in str(text))
    line = " ".join(line.split())
    if len(line) <= length:
        return line
    tail = (length - 3) // 3
    return f"{line[: length - 3 - tail].rstrip()} … {line[len(line) - tail :].lstrip()}"


def last_user_turn(prompt: str) -> str:
    """The last turn of a prompt without the chat template around it; the whole prompt if no template is recognized.

    >>> last_user_turn("<|im_start|>user\\nWho are you?<|im_end|>\\n<|im_start|>assistant\\n")
    'Who are you?'
    >>> last_user_turn("<|im_start|>user\\nIs <|vision_start|><|image_pad|><|vision_end|> a cat?<|im_end|>\\n")
    'Is <image> a cat?'
    """
    parts = _SPECIAL.split(_IMAGE.sub("<image>", prompt))
    turns = (_ROLE.sub("", part, count=1) if _ROLE.match(part) else part for part in parts)
    nonempty = [turn.strip() for turn in turns if turn.strip()]
    return nonempty[-1] if nonempty else prompt
