"""Rare letters in place of a few of a conversation's own, to see where its turns stand in the text that a template makes of it.

A letter takes another's place, so that a text keeps its length, its white space and its tags, and most templates treat it alike.
Whether this one did is checked: the two renderings have to differ at the letters and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Turn = dict[str, Any]
Tool = dict[str, Any]
Render = Callable[[Sequence[Turn], Sequence[Tool], bool], str]
"""(turns, tools, add_generation_prompt) → rendered text."""
RARE = re.compile("[\U00017000-\U000187f7]")
"""Tangut: printable, so that Python's and JSON's quotes keep it, without case, and in nobody's data."""
LETTER = re.compile(r"<[^<>]{1,80}>|\[[^\[\]\s]{1,40}\]|/\w+|([^\W_])")
"""A letter that is no part of a tag or a switch, which templates look for."""
CLOSING = re.compile(r"</[^<>]{1,80}>|\[/[^\[\]\s]{1,40}\]")
JSON_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"(?!\s*:)')
UNQUOTED = re.compile(r"[^\s\"'\\]")
"""A sign that quotes as JSON or Python's leave as it is."""
NAMES = {"role", "type", "id", "name", "tool_call_id", "recipient", "channel"}
"""Keys whose values templates compare with others."""


@dataclass(frozen=True)
class Mark:
    """A letter of a conversation that a rare one stands for."""

    turn: int
    """The number of its turn; -1 in a tool."""
    key: str
    """The key of the turn that it is in."""
    text: str
    """The text that it is in."""
    at: int


@dataclass(frozen=True)
class View:
    """A text in which rare letters show what comes from where."""

    text: str
    """The rendering with rare letters."""
    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...]
    made: dict[str, Mark]
    """Every rare letter that was written into turns and tools."""
    places: dict[str, tuple[int, ...]]
    """Where each of those that the template shows stands."""

    @cached_property
    def anchors(self) -> list[tuple[int, Mark]]:
        """The letters that stand in the text once, in its order."""
        return [(places[0], self.made[letter]) for letter, places in self.places.items() if len(places) == 1]

    @cached_property
    def shown(self) -> dict[tuple[int, str | None], bool]:
        """For each turn and each key of it of which letters were replaced, whether any is in the text."""
        found: dict[tuple[int, str | None], bool] = {}
        for letter, mark in self.made.items():
            for key in (None, mark.key):
                found[mark.turn, key] = found.get((mark.turn, key), False) or letter in self.places
        return found

    def meeting(self, other: str) -> tuple[int, int]:
        """Where the last letter that this text shares with another rendering stands in the other and in this one."""
        for match in reversed(list(RARE.finditer(other))):
            here = self.places.get(match[0], ())
            if len(here) == 1 and other.count(match[0]) == 1:
                return match.start(), here[0]
        return 0, 0

    def shows(self, turn: int, key: str | None = None) -> bool | None:
        """Whether anything of a turn (of a key of it) is in the text; None where no letter of it was replaced."""
        return self.shown.get((turn, key))

    def hides(self, turn: int) -> bool:
        """Whether nothing of a turn is in the text: none of its letters, and it says nothing that has none."""
        if self.shows(turn) is not False:
            return False
        calls = {"tool_calls", "function_call"}
        marked = {
            key for key in self.turns[turn] if self.shows(turn, "tool_calls" if key in calls else key) is not None
        }
        return not any(
            value and isinstance(value, str | list | dict) and key not in NAMES | marked
            for key, value in self.turns[turn].items()
        )

    def unused(self) -> str:
        """A rare letter that stands nowhere."""
        return next(_letters(self.text, self.made))


def look(render: Render, turns: Sequence[Turn], tools: Sequence[Tool], text: str) -> View:
    """Find what a rendering shows of each turn.

    Where the template looks closer at a text than at its length and its tags, fewer letters are replaced: only those of contents,
    and then only in turns that it does not mind.
    """
    everything = range(-1, len(turns))
    for wanted in (None, "content"):
        view = _view(render, turns, tools, text, everything, wanted)
        if view:
            return view
    alone = [index for index in everything if _view(render, turns, tools, text, [index], "content")]
    return _view(render, turns, tools, text, alone, "content") or View(text, tuple(turns), tuple(tools), {}, {})


def _view(
    render: Render, turns: Sequence[Turn], tools: Sequence[Tool], text: str, which: Sequence[int], wanted: str | None
) -> View | None:
    writer = _Writer(text)
    marked_tools = tuple(writer.tool(tool) if -1 in which else tool for tool in tools)
    marked = tuple(writer.turn(index, turn, wanted) if index in which else turn for index, turn in enumerate(turns))
    try:
        seen = render(marked, marked_tools, False) if writer.made else text
    except Exception:  # what a template raises is its own
        return None
    places: dict[str, tuple[int, ...]] = {}
    at = 0
    for match in RARE.finditer(seen):
        if match[0] in writer.made:
            places[match[0]] = (*places.get(match[0], ()), match.start())
            if seen[at : match.start()] != text[at : match.start()]:
                return None
            at = match.end()
    if len(seen) != len(text) or seen[at:] != text[at:]:
        return None
    return View(seen, marked, marked_tools, writer.made, places)


class _Writer:
    """Writes rare letters that a text does not hold, each once."""

    def __init__(self, text: str) -> None:
        self.made: dict[str, Mark] = {}
        self.letters = _letters(text, self.made)

    def turn(self, index: int, turn: Turn, wanted: str | None) -> Turn:
        return {
            key: self._value(value, index, key, key)
            if (key not in NAMES if wanted is None else key == wanted)
            else value
            for key, value in turn.items()
        }

    def tool(self, tool: Tool) -> Tool:
        """A tool with letters in its name and its description."""
        return {
            key: self.tool(value)
            if key == "function" and isinstance(value, dict)
            else self._text(value, -1, key, _places(value))
            if key in ("name", "description") and isinstance(value, str)
            else value
            for key, value in tool.items()
        }

    def _value(self, value: Any, turn: int, top: str, key: str) -> Any:
        if isinstance(value, str):
            return value if key in NAMES else self._text(value, turn, top, _places(value))
        if isinstance(value, dict):
            if "arguments" in value:
                return self._call(value, turn)
            return {inner: self._value(each, turn, top, inner) for inner, each in value.items()}
        return [self._value(each, turn, top, key) for each in value] if isinstance(value, list) else value

    def _call(self, call: dict[str, Any], turn: int) -> dict[str, Any]:
        """A call with letters in its arguments' texts or, where there are none, in its name."""
        made = len(self.made)
        marked = {**call, "arguments": self._argument(call["arguments"], turn)}
        if len(self.made) == made and isinstance(call.get("name"), str):
            marked["name"] = self._text(call["name"], turn, "tool_calls", _places(call["name"])[-1:])
        return marked

    def _argument(self, value: Any, turn: int) -> Any:
        if isinstance(value, str):
            places = _json_places(value) if value[:1] in ("{", "[") else _places(value)
            return self._text(value, turn, "tool_calls", places)
        if isinstance(value, dict):
            return {key: self._argument(each, turn) for key, each in value.items()}
        return [self._argument(each, turn) for each in value] if isinstance(value, list) else value

    def _text(self, text: str, turn: int, key: str, places: Sequence[int]) -> str:
        pieces, at = [], 0
        for place in places:
            letter = next(self.letters, None)
            if letter is None:
                break
            self.made[letter] = Mark(turn, key, text, place)
            pieces += [text[at:place], letter]
            at = place + 1
        return "".join([*pieces, text[at:]])


def _letters(text: str, made: dict[str, Mark]) -> Iterator[str]:
    taken = set(RARE.findall(text))
    return (chr(code) for code in range(0x17000, 0x187F8) if chr(code) not in taken and chr(code) not in made)


def _places(text: str) -> list[int]:
    """The first letter, the last one, and the first one behind the last closing tag, as a thought ends with one.

    >>> _places("<think>so</think> Hi there")
    [7, 18, 25]
    """
    closed = [match.end() for match in CLOSING.finditer(text)][-1:]
    found = {_first(text, 0), *(_first(text, at) for at in closed), _last(text)} - {None}
    if not found and (other := UNQUOTED.search(text)):
        return [other.start()]
    return sorted(found)  # type: ignore[type-var, arg-type]


def _first(text: str, at: int) -> int | None:
    return next((match.start(1) for match in LETTER.finditer(text, at) if match[1]), None)


def _last(text: str) -> int | None:
    for window in (20, 200, len(text)):
        found = [match.start(1) for match in LETTER.finditer(text, max(0, len(text) - window)) if match[1]]
        if found:
            return found[-1]
    return None


def _json_places(text: str) -> list[int]:
    """The first and the last letter of the texts in JSON."""
    found = [
        match.start(1) + place
        for match in JSON_TEXT.finditer(text)
        for place in _places(match[1])
        if "\\" not in match[1]
    ]
    return sorted({found[0], found[-1]}) if found else []
