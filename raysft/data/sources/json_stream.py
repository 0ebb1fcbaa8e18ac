"""Strict JSON, and lists of JSON values that are read incrementally."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raysft.errors import RequestError, one_line

READ_BYTES = 1 << 20
"""Bytes read from a stream at a time."""


@dataclass(frozen=True)
class Unreadable:
    """Placeholder for a record that cannot be read."""

    reason: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


JSON = json.JSONDecoder(object_pairs_hook=_object)
"""Decoder that refuses duplicate keys."""


def json_list(stream: Any, start: bytes, path: str) -> Iterator[tuple[int, int, Any]]:
    """Read the items of a JSON list, whose text is ``start`` followed by ``stream``, as (index, characters, item).

    An item that is well-formed but unusable, such as an object with a duplicate key, becomes ``Unreadable``.

    Raises:
        RequestError: the text invalid JSON or not UTF-8; the message has the line.
    """
    buffer = _Buffer(stream, start, path)
    buffer.skip("[", expected="[")
    index = 0
    while buffer.peek() != "]":
        if index:
            buffer.skip(",", expected="',' or ']'")
        item_start = buffer.at
        item = buffer.value()
        yield index, buffer.at - item_start, item
        index += 1
        buffer.discard_read()
    buffer.skip("]", expected="]")
    if buffer.peek():
        raise buffer.error("Extra data after the list", buffer.at)


class _Buffer:
    """Part of a JSON text, and the position up to which it has been read."""

    def __init__(self, stream: Any, start: bytes, path: str) -> None:
        self.stream, self.path = stream, path
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.at = self.lines_before = 0
        self.text = ""
        self.ended = False
        self._take(start)

    def _take(self, content: bytes) -> None:
        self.ended = not content
        try:
            self.text += self.decoder.decode(content, final=self.ended)
        except UnicodeDecodeError as error:
            line = self._line(len(self.text)) + content.count(b"\n", 0, error.start)
            raise RequestError(
                f"{self.path}:{line}: is not UTF-8 text (byte {error.object[error.start]:#x}); save the file as UTF-8"
            ) from None

    def _more(self) -> None:
        # Double the text, so that even a huge record is parsed only a few times.
        self._take(self.stream.read(max(READ_BYTES, len(self.text))))

    def _line(self, at: int) -> int:
        return self.lines_before + self.text.count("\n", 0, at) + 1

    def error(self, reason: str, at: int) -> RequestError:
        line = self.text[self.text.rfind("\n", 0, at) + 1 :].split("\n")[0].strip()
        column = at - self.text.rfind("\n", 0, at)
        return RequestError(
            f"{self.path}:{self._line(at)}: invalid JSON ({reason} at column {column}): {line[:40]!r}; correct the file"
        )

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def skip(self, character: str, expected: str) -> None:
        if self.peek() != character:
            raise self.error(f"Expecting {expected}", self.at)
        self.at += 1

    def value(self) -> Any:
        """Read the next JSON value; ``Unreadable`` if it is well-formed but unusable."""
        self.peek()
        while True:
            try:
                item, end = JSON.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                return self._skip_value(one_line(error))
            else:
                if end < len(self.text) or self.ended:
                    self.at = end
                    return item
            self._more()

    def _skip_value(self, reason: str) -> Unreadable:
        while True:
            try:
                _, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
                return Unreadable(f"unusable JSON ({reason})")
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.error(error.msg, error.pos) from None
            except (ValueError, RecursionError):
                raise self.error(reason, self.at) from None
            self._more()

    def discard_read(self) -> None:
        """Free the text that has been read."""
        if self.at > READ_BYTES:
            self.lines_before += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :], 0
