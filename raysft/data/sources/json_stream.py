"""JSON, strictly, and lists of it read piece by piece."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raysft.errors import RequestError

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Unreadable:
    """Stands in the place of a record that cannot be read."""

    reason: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return whole


JSON = json.JSONDecoder(object_pairs_hook=_object)


def json_list(stream: Any, start: bytes, path: str) -> Iterator[tuple[int, int, Any]]:
    """Items of a list that begins with ``start`` and goes on in ``stream``: (index, characters, item).

    An item that is well-formed and of no use is ``Unreadable``.

    Raises:
        RequestError: it is no valid JSON, or no UTF-8 text; with the line.
    """
    buffer = _Buffer(stream, start, path)
    buffer.skip("[", expected="[")
    index = 0
    while buffer.peek() != "]":
        if index:
            buffer.skip(",", expected="',' or ']'")
        before = buffer.at
        item = buffer.value()
        yield index, buffer.at - before, item
        index += 1
        buffer.forget()
    buffer.skip("]", expected="]")
    if buffer.peek():
        raise buffer.error("Extra data after the list", buffer.at)


class _Buffer:
    """A part of a JSON text, and how far it is read."""

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
                f"{self.path}:{line}: is not UTF-8 text (byte {error.object[error.start]:#x}); write the file again"
            ) from None

    def _more(self) -> None:
        # As much again as is there: a record of any size is tried only a few times.
        self._take(self.stream.read(max(READ_BYTES, len(self.text))))

    def _line(self, at: int) -> int:
        return self.lines_before + self.text.count("\n", 0, at) + 1

    def error(self, reason: str, at: int) -> RequestError:
        line = self.text[self.text.rfind("\n", 0, at) + 1 :].split("\n")[0].strip()
        column = at - self.text.rfind("\n", 0, at)
        return RequestError(
            f"{self.path}:{self._line(at)}: no valid JSON ({reason} at column {column}): {line[:40]!r}; mend the file"
        )

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
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
        """The JSON value that begins here; ``Unreadable`` where it is well-formed and of no use."""
        self.peek()
        while True:
            try:
                item, end = JSON.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                return self._pass_over(first_line(error))
            else:
                if end < len(self.text) or self.ended:
                    self.at = end
                    return item
            self._more()

    def _pass_over(self, reason: str) -> Unreadable:
        while True:
            try:
                _, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
                return Unreadable(f"no usable JSON ({reason})")
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.error(error.msg, error.pos) from None
            except (ValueError, RecursionError):
                raise self.error(reason, self.at) from None
            self._more()

    def forget(self) -> None:
        """Let go of what is read."""
        if self.at > READ_BYTES:
            self.lines_before += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :], 0


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
