"""Conversations → the text that the chat template makes of them, and which characters the assistant wrote.

The one place that decides masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from raysft.data.calls import as_text
from raysft.data.skeleton import Skeleton
from raysft.records import Message

Render = Callable[[Sequence[Message], Sequence[dict[str, Any]], bool], str]
"""(messages, tools, add_generation_prompt) → rendered text."""
Span = tuple[int, int]
"""[start, end) in characters."""
MARKS = "\ue003\uf8f1\ue9d2\uf0e7"
"""Characters for private use, one of which shows where the template puts a turn's text."""
SKELETONS = 1000
"""Orders of roles that are remembered at most."""
PROBE = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "probe", "arguments": {}}}


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]
    """What the assistant wrote in each of its turns, with the token that ends the turn."""


@dataclass
class ChatTemplate:
    """A chat template, and how it frames what the assistant writes.

    What stands before and behind an assistant turn is learnt from renderings of short conversations, and where the turns of a
    conversation stand is seen from the places of its other turns: a second rendering, with a mark inside each of them, shows
    these. So nothing is searched for in a text that somebody wrote, and a template may render a turn differently when others
    follow it, as those do that leave out earlier thinking.
    """

    render: Render
    tracked: Callable[[Sequence[Message], Sequence[dict[str, Any]]], Rendered] | None = None
    """Rendering that knows the spans by itself, for a template that marks them with ``{% generation %}``."""
    plain: bool = False
    """Whether it only writes contents out (``skeleton.only_writes_contents``)."""
    shown_tools: tuple[dict[str, Any], ...] = ()
    """Functions that it is tried with, for a template that is only used where there are some."""
    _skeletons: dict[tuple[str, ...], Skeleton | None] = field(default_factory=dict)

    def spans(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> Rendered:
        """Render a conversation and find what the assistant wrote in it, turn by turn.

        A turn goes from behind the generation prompt to the end of the token that ends it; white space that the template puts
        behind that token is not part of it. There is a span for each assistant turn, in order.

        Raises:
            ValueError: the place of a turn is not known.
        """
        if self.plain and not tools and not any(message.tool_calls or message.extra for message in messages):
            skeleton = self._skeleton(tuple(message.role for message in messages))
            if skeleton:
                return Rendered(*skeleton.fill([message.content for message in messages]))
        return self._found(messages, tools)

    def _skeleton(self, roles: tuple[Any, ...]) -> Skeleton | None:
        """What the template writes around turns of these roles."""
        if roles not in self._skeletons:
            if len(self._skeletons) >= SKELETONS:
                self._skeletons.clear()
            contents = [f"\uf2b1{index}\uf2b2" for index in range(len(roles))]
            turns = [index for index, role in enumerate(roles) if role == "assistant"]
            rendered = self._found([Message(role, content) for role, content in zip(roles, contents, strict=True)], ())
            self._skeletons[roles] = Skeleton.learn(rendered.text, contents, turns, rendered.spans)
        return self._skeletons[roles]

    def _found(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Rendered:
        if self.tracked:
            rendered = self.tracked(messages, tools)
            turns = sum(message.role == "assistant" for message in messages)
            if len(rendered.spans) != turns:
                raise ValueError(
                    f"the chat template marks {len(rendered.spans)} generations in {turns} assistant turns"
                )
            return rendered
        text = self.render(messages, tools, False)
        places = self._places(messages, tools, text)
        found: list[Span] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            start = self._start(text, places[index - 1].ends, messages[index - 1].role, index)
            if index + 1 == len(messages):
                end = len(text)
            else:
                header = self._after(messages[index + 1].role)
                ends = [place - len(header) for place in places[index + 1].starts]
                end = next((end for end in ends if end >= start and text.startswith(header, end)), None)
                if end is None:
                    raise ValueError(f"the chat template frames turn {index + 1} in a way that is not known")
            end = start + len(text[start:end].rstrip())
            if end <= start:
                raise ValueError(f"the chat template leaves out turn {index}, the assistant's")
            found.append((start, end))
        return Rendered(text, tuple(found))

    def _places(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], text: str) -> dict[int, _Place]:
        """Where the text of each turn stands; of the assistant's only those side by side."""
        contents = {}
        for index, message in enumerate(messages):
            beside = {other.role for other in (*messages[index - 1 : index], *messages[index + 1 : index + 2])}
            inside = message.role == "system" and index > 0
            if message.role in ("user", "tool") or inside or (message.role == "assistant" and "assistant" in beside):
                contents[index] = message.content
        mark = next((mark for mark in MARKS if mark not in text), None)
        if mark is None:
            raise ValueError("the text holds the characters that would mark its places")
        marked = list(messages)
        for index, content in contents.items():
            # In the middle: templates look at how a text begins and ends.
            marked[index] = replace(marked[index], content=_halves(content)[0] + mark + _halves(content)[1])
        pieces = self.render(marked, tools, False).split(mark)
        if len(pieces) != len(contents) + 1 or "".join(pieces) != text:
            raise ValueError("the chat template changes the conversation in a way that hides where its turns are")
        places = {}
        at = 0
        for piece, (index, content) in zip(pieces, contents.items(), strict=False):
            at += len(piece)
            before = _halves(content)[0]
            place = _Place.of(text, at - len(before), content)
            if place is None:
                raise ValueError(f"the chat template changes the text of turn {index}")
            places[index] = place
        return places

    def _start(self, text: str, ends: Sequence[int], role: str, index: int) -> int:
        """Where an assistant turn starts that follows a turn whose text ends at one of ``ends``."""
        for header in self._before(role):
            for place in ends:
                if text.startswith(header, place):
                    return place + len(header)
        raise ValueError(f"the chat template frames turn {index} in a way that is not known")

    def _before(self, role: str) -> tuple[str, ...]:
        """What stands between the text of a turn and the assistant's next: as when it is asked, and as in what went before."""
        return self._frames[role][0]

    def _after(self, role: str) -> str:
        """What stands between the end of an assistant turn and the text of the next one."""
        return self._frames[role][1]

    @cached_property
    def _frames(self) -> dict[str, tuple[tuple[str, ...], str]]:
        frames = {}
        for role in ("user", "tool", "assistant", "system"):
            try:
                frames[role] = self._learn(role)
            except ValueError:
                if role == "user":
                    raise
            except Exception as error:  # a template refuses what it does not support with errors of its own
                if role == "user":
                    raise ValueError(f"the chat template refuses every conversation ({first_line(error)})") from None
        return _Known(frames)

    def _learn(self, role: Any) -> tuple[tuple[str, ...], str]:
        calls = (CALL,) if role == "tool" else ()
        opening = [Message("user", "one"), Message("assistant", "two", calls)]
        other = Message(role, "three", extra={"tool_call_id": "probe00000", "name": "probe"} if role == "tool" else {})
        asked = self.render([*opening, other], self.shown_tools, True)
        told = self.render([*opening, other], self.shown_tools, False)
        ended = self.render(opening, self.shown_tools, False)
        answered = self.render([*opening, other, Message("assistant", "four")], self.shown_tools, False)
        later = self.render(
            [*opening, other, Message("assistant", "four"), Message("user", "five")], self.shown_tools, False
        )
        if not all(word in rendered for word, rendered in (("three", asked), ("three", told), ("two", ended))):
            raise ValueError("the chat template leaves out what was said")
        headers = [asked[asked.rindex("three") + 5 :]]
        for rendered in (answered, later):
            header = rendered[rendered.rindex("three") + 5 : rendered.rindex("four")]
            if header not in headers and not header.startswith(headers[0]):
                headers.append(header)
        tail = ended[ended.rindex("two") + 3 :].rstrip()
        between = told[told.rindex("two") + 3 : told.rindex("three")]
        if not between.startswith(tail):
            raise ValueError("the chat template ends a turn differently when another follows")
        return tuple(headers), between[len(tail) :]

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template writes the functions that may be called."""
        return self._shows([Message("user", "one")], [PROBE])

    @cached_property
    def shows_calls(self) -> bool:
        """Whether the template writes the calls of an assistant turn."""
        return self._shows([Message("user", "one"), Message("assistant", "", (CALL,))], ())

    def _shows(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> bool:
        try:
            return "probe" in self.render(messages, tools, False)
        except Exception:  # refused: not shown
            return False

    def with_tools(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[Sequence[Message], Sequence[dict[str, Any]]]:
        """The conversation as the template can show it: functions and calls become text where it has no place for them."""
        calls = any(message.tool_calls or message.role == "tool" for message in messages)
        if (not tools or self.shows_tools) and (not calls or self.shows_calls):
            return messages, tools
        written = as_text(messages, tools, with_tools=not self.shows_tools, with_calls=calls and not self.shows_calls)
        return written, tools if self.shows_tools else ()


@dataclass(frozen=True)
class _Place:
    """Where a turn's text stands. Templates keep white space at its ends or take it away, and put some of their own around it,
    so that only what comes before and behind tells which of both it was."""

    starts: tuple[int, ...]
    """With the white space that the text begins with, if it is all there, and without."""
    ends: tuple[int, ...]

    @classmethod
    def of(cls, text: str, start: int, content: str) -> _Place | None:
        """The place of a content that would stand at ``start`` if all of it were there; None where it is not there."""
        stripped = content.strip()
        bare = start + len(content) - len(content.lstrip())
        end = bare + len(stripped)
        if not text.startswith(stripped, bare):
            return None
        tail = content[len(content.rstrip()) :] if stripped else ""
        whole_start = [start] if start >= 0 and text.startswith(content[: bare - start], start) else []
        whole_end = [end + len(tail)] if text.startswith(tail, end) else []
        return cls(tuple(dict.fromkeys([*whole_start, bare])), tuple(dict.fromkeys([*whole_end, end])))


class _Known(dict[str, tuple[tuple[str, ...], str]]):
    def __missing__(self, role: str) -> Any:
        raise ValueError(f"the chat template has no place for the turn of a {role}")


def _halves(content: str) -> tuple[str, str]:
    """A text cut in its middle, between two characters of its stripped part."""
    at = len(content) - len(content.lstrip()) + (len(content.strip()) + 1) // 2
    return content[:at], content[at:]


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def prompt_messages(messages: Sequence[Message]) -> Sequence[Message]:
    """What is asked: everything before the last assistant turn."""
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    return messages[:last]


def labelled(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, given by its [start, end) in characters, whether it lies inside one of the spans, both in order.

    >>> labelled([(0, 2), (2, 4), (4, 6)], [(2, 6)])
    [False, True, True]
    """
    inside = []
    position = 0
    for start, end in offsets:
        while position < len(spans) and spans[position][1] <= start:
            position += 1
        inside.append(
            position < len(spans) and spans[position][0] <= start and end <= spans[position][1] and end > start
        )
    return inside
