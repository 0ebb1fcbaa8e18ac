"""Marks around a control token of a record's own text that is to be encoded as plain text."""

ESCAPE_START, ESCAPE_END = "\ufdd0", "\ufdd1"
"""Unicode noncharacters, which no text contains."""


def unescape(text: str) -> str:
    """Remove the marks from a text."""
    return text.replace(ESCAPE_START, "").replace(ESCAPE_END, "")
