"""Replace a few letters of a conversation with rare ones, to see where a chat template writes each turn.

A marker takes the place of one letter, so that a text keeps its length, its white space and its tags, and most templates treat it
alike. A rendering with markers counts only if it differs from the plain one at the markers and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raysft.data.types import MEDIUM

Turn = dict[str, Any]
"""A message as a chat template reads it."""
Tool = dict[str, Any]
Render = Callable[[Sequence[Turn], Sequence[Tool], bool], str]
"""(turns, tools, add_generation_prompt) → rendered text."""
MARKER = re.compile("[\U00017000-\U000187f7]")
"""Tangut letters: printable, so that JSON and Python's ``repr`` do not escape them, without case, and absent from most data."""
LETTER = re.compile(r"<[^<>]{1,80}>|\[[^\[\]\s]{1,40}\]|/\w+|([^\W_])")
"""Group 1: a letter outside tags and switches such as ``/no_think``, which templates look for."""
CLOSING_TAG = re.compile(r"</[^<>]{1,80}>|\[/[^\[\]\s]{1,40}\]")
JSON_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(?!\s*:)')
"""A string in JSON that is not a key."""
UNESCAPED = re.compile(rf"[^\s\"'\\{MEDIUM}]")
"""A character that neither JSON nor Python's ``repr`` escapes, and that does not stand for an image."""
COMPARED_KEYS = {"role", "type", "id", "name", "tool_call_id", "recipient", "channel"}
"""Keys whose values templates compare with others."""


@dataclass(frozen=True)
class Marker:
    """The place of a letter that a marker replaces."""

    turn: int
    """Index of its turn; -1 in a tool."""
    key: str
    """Key of the turn, such as ``content``."""
    text: str
    """The text that contains the letter."""
    position: int
    """Its position in ``text``."""


@dataclass(frozen=True)
class MarkedRendering:
    """A rendered conversation in which markers show the origin of the text around them."""

    text: str
    turns: tuple[Turn, ...]
    """Turns with markers, as the template read them."""
    tools: tuple[Tool, ...]
    markers: dict[str, Marker]
    """Every marker in turns and tools, by its letter."""
    positions: dict[str, tuple[int, ...]]
    """Letter → its positions in ``text``, for the markers that the template shows."""

    @cached_property
    def anchors(self) -> list[tuple[int, Marker]]:
        """(position, marker) of the markers that occur once, in the order of the text."""
        return [(places[0], self.markers[letter]) for letter, places in self.positions.items() if len(places) == 1]

    @cached_property
    def _shown(self) -> dict[tuple[int, str | None], bool]:
        """(turn, key or None) → True if the text shows one of its markers."""
        shown: dict[tuple[int, str | None], bool] = {}
        for letter, marker in self.markers.items():
            for key in (None, marker.key):
                shown[marker.turn, key] = shown.get((marker.turn, key), False) or letter in self.positions
        return shown

    def last_common_marker(self, other: str) -> tuple[int, int]:
        """Position in ``other`` and in this text of the last marker that both contain once; (0, 0) if there is none."""
        for match in reversed(list(MARKER.finditer(other))):
            here = self.positions.get(match[0], ())
            if len(here) == 1 and other.count(match[0]) == 1:
                return match.start(), here[0]
        return 0, 0

    def shows(self, turn: int, key: str | None = None) -> bool | None:
        """Return True if the text shows something of a turn, or of one of its keys; None if it has no marker."""
        return self._shown.get((turn, key))

    def hides(self, turn: int) -> bool:
        """Return True if the text shows nothing of a turn: none of its markers, and every value has one."""
        if self.shows(turn) is not False:
            return False
        calls = {"tool_calls", "function_call"}
        marked = {
            key for key in self.turns[turn] if self.shows(turn, "tool_calls" if key in calls else key) is not None
        }
        return not any(
            value and isinstance(value, str | list | dict) and key not in COMPARED_KEYS | marked
            for key, value in self.turns[turn].items()
        )

    def content_after(self, position: int) -> str:
        """Return what follows the marker at ``position`` in its own turn."""
        marker = self.markers.get(self.text[position : position + 1])
        return marker.text[marker.position + 1 :] if marker else ""

    def contents_between(self, left: int, right: int) -> tuple[str, ...]:
        """Return what the turns say between two markers: the same characters may come from them or from the template."""
        before, after = self.markers[self.text[left]], self.markers[self.text[right]]
        turns = self.turns[before.turn + 1 : max(after.turn, 0)]
        return (self.content_after(left), *map(repr, turns), after.text[: after.position])

    def unused_letter(self) -> str:
        """Return a marker letter that occurs nowhere."""
        return next(_unused_letters(self.text, self.markers))


def render_with_markers(render: Render, turns: Sequence[Turn], tools: Sequence[Tool], text: str) -> MarkedRendering:
    """Render a conversation with as many markers as the template tolerates.

    A template may look at more of a text than its length and its tags. Then only contents get markers, and if that also changes
    the rendering, only the contents of those turns where it does not.

    Args:
        render: the chat template.
        turns: the conversation.
        tools: its tools.
        text: the rendering without markers.
    """
    everywhere = range(-1, len(turns))
    for key in (None, "content"):
        if marked := _render_marked(render, turns, tools, text, everywhere, key):
            return marked
    alone = [index for index in everywhere if _render_marked(render, turns, tools, text, [index], "content")]
    return _render_marked(render, turns, tools, text, alone, "content") or MarkedRendering(
        text, tuple(turns), tuple(tools), {}, {}
    )


def _render_marked(
    render: Render, turns: Sequence[Turn], tools: Sequence[Tool], text: str, chosen: Sequence[int], key: str | None
) -> MarkedRendering | None:
    """Render with markers in the chosen turns, in one key or in all; None if the rendering differs elsewhere too."""
    writer = _MarkerWriter(text)
    marked_tools = tuple(writer.mark_tool(tool) if -1 in chosen else tool for tool in tools)
    marked = tuple(writer.mark_turn(index, turn, key) if index in chosen else turn for index, turn in enumerate(turns))
    try:
        rendered = render(marked, marked_tools, False) if writer.markers else text
    except Exception:  # a template may raise any error
        return None
    positions: dict[str, tuple[int, ...]] = {}
    end = 0
    for match in MARKER.finditer(rendered):
        if match[0] in writer.markers:
            positions[match[0]] = (*positions.get(match[0], ()), match.start())
            if rendered[end : match.start()] != text[end : match.start()]:
                return None
            end = match.end()
    if len(rendered) != len(text) or rendered[end:] != text[end:]:
        return None
    return MarkedRendering(rendered, marked, marked_tools, writer.markers, positions)


class _MarkerWriter:
    """Puts markers that a text does not contain into turns and tools, each letter once."""

    def __init__(self, text: str) -> None:
        self.markers: dict[str, Marker] = {}
        self.letters = _unused_letters(text, self.markers)

    def mark_turn(self, index: int, turn: Turn, only: str | None) -> Turn:
        """Mark one key of a turn, or all that templates do not compare."""
        return {
            key: self._value(value, index, key, key)
            if (key not in COMPARED_KEYS if only is None else key == only)
            else value
            for key, value in turn.items()
        }

    def mark_tool(self, tool: Tool) -> Tool:
        """Mark the name and the description of a tool."""
        return {
            key: self.mark_tool(value)
            if key == "function" and isinstance(value, dict)
            else self._text(value, -1, key, _letters_to_mark(value))
            if key in ("name", "description") and isinstance(value, str)
            else value
            for key, value in tool.items()
        }

    def _value(self, value: Any, turn: int, turn_key: str, key: str) -> Any:
        if isinstance(value, str):
            return value if key in COMPARED_KEYS else self._text(value, turn, turn_key, _letters_to_mark(value))
        if isinstance(value, dict):
            if "arguments" in value:
                return self._call(value, turn)
            return {inner_key: self._value(inner, turn, turn_key, inner_key) for inner_key, inner in value.items()}
        return [self._value(item, turn, turn_key, key) for item in value] if isinstance(value, list) else value

    def _call(self, call: dict[str, Any], turn: int) -> dict[str, Any]:
        """Mark the texts in a call's arguments or, if they have none, its name."""
        before = len(self.markers)
        marked = {**call, "arguments": self._argument(call["arguments"], turn)}
        if len(self.markers) == before and isinstance(call.get("name"), str):
            marked["name"] = self._text(call["name"], turn, "tool_calls", _letters_to_mark(call["name"])[-1:])
        return marked

    def _argument(self, value: Any, turn: int) -> Any:
        if isinstance(value, str):
            positions = _json_letters_to_mark(value) if value[:1] in ("{", "[") else _letters_to_mark(value)
            return self._text(value, turn, "tool_calls", positions)
        if isinstance(value, dict):
            return {key: self._argument(inner, turn) for key, inner in value.items()}
        return [self._argument(item, turn) for item in value] if isinstance(value, list) else value

    def _text(self, text: str, turn: int, key: str, positions: Sequence[int]) -> str:
        parts, end = [], 0
        for position in positions:
            letter = next(self.letters, None)
            if letter is None:
                break
            self.markers[letter] = Marker(turn, key, text, position)
            parts += [text[end:position], letter]
            end = position + 1
        return "".join([*parts, text[end:]])


def _unused_letters(text: str, markers: dict[str, Marker]) -> Iterator[str]:
    taken = set(MARKER.findall(text))
    return (chr(code) for code in range(0x17000, 0x187F8) if chr(code) not in taken and chr(code) not in markers)


def _letters_to_mark(text: str) -> list[int]:
    """Positions of the first letter, of the last, and of the first after the last closing tag, which may end a thought.

    >>> _letters_to_mark("<think>so</think> Hi there")
    [7, 18, 25]
    """
    closed = [match.end() for match in CLOSING_TAG.finditer(text)][-1:]
    found = {_first_letter(text, 0), *(_first_letter(text, end) for end in closed), _last_letter(text)} - {None}
    if not found and (other := UNESCAPED.search(text)):
        return [other.start()]
    return sorted(found)  # type: ignore[type-var, arg-type]


def _first_letter(text: str, start: int) -> int | None:
    return next((match.start(1) for match in LETTER.finditer(text, start) if match[1]), None)


def _last_letter(text: str) -> int | None:
    for window in (20, 200, len(text)):
        found = [match.start(1) for match in LETTER.finditer(text, max(0, len(text) - window)) if match[1]]
        if found:
            return found[-1]
    return None


def _json_letters_to_mark(text: str) -> list[int]:
    """Positions of the first and the last letter in the strings of a JSON text."""
    found = [
        match.start(1) + position
        for match in JSON_STRING.finditer(text)
        for position in _letters_to_mark(match[1])
        if "\\" not in match[1]
    ]
    return sorted({found[0], found[-1]}) if found else []
