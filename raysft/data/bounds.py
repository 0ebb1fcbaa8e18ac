"""Where the assistant's turns stand in the text that a template makes of a conversation.

A turn starts where the generation prompt ends and ends with the token that ends it. Two things are known for certain: what the
template asks with before a turn, from rendering the conversation up to it, and what comes from which turn, from rare letters
(``marks``). A turn's bounds are carried from the rendering of the part to that of the whole, and have to agree with the letters.
What stands between two letters at a bound is remembered, so that most conversations need no rendering of their parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from raysft.data.marks import NAMES, Render, Tool, Turn, View

Span = tuple[int, int]
"""[start, end) in characters."""
KNOWN = 10_000
"""Texts between two turns that are remembered at most."""
WHOLE = re.compile(r"<[^<>\s]*>?|\[[^\[\]\s]*\]?|\w+")
"""What no bound cuts in two: tags and words."""
REMEDY = "add {% generation %} markers to it, or name another in model.chat_template"


class Bounds:
    """Finds the assistant's turns in what a template renders."""

    def __init__(self, render: Render, eos: str) -> None:
        self.render, self.eos = render, eos
        self.known: dict[tuple[Any, ...], int] = {}

    def asked(self, turns: Sequence[Turn], text: str) -> tuple[Span, ...]:
        """The span of the only answer where it is the last turn, and the text is the prompt and what was written."""
        if [turn["role"] for turn in turns].index("assistant") + 1 < len(turns):
            return ()
        prompt = self._rendered(turns[:-1], (), True)
        if not prompt or not text.startswith(prompt) or _last_piece(text.rstrip()) == _last_piece(prompt.rstrip()):
            return ()
        *questions, answer = [turn["content"].strip() for turn in turns]
        shown = answer in text[len(prompt) :] and _stand_in(prompt, questions)
        return ((len(prompt), len(text.rstrip())),) if shown else ()

    def find(self, view: View, text: str) -> tuple[Span, ...]:
        """The spans of the assistant's turns, in order.

        Raises:
            ValueError: the place of a turn cannot be told.
        """
        spans: dict[int, Span] = {}
        owned: dict[int, list[int]] = {}
        for place, mark in view.anchors:
            owned.setdefault(mark.turn, []).append(place)
        for index, turn in enumerate(view.turns):
            if turn["role"] != "assistant":
                continue
            if view.shows(index) is False:
                at = max((end for _, end in spans.values()), default=0)
                spans[index] = (at, at)
                continue
            own = owned.get(index, [])
            start = self._bound(view, text, index, own[0], True) if own else self._start(view, index)
            if start is not None and start < max((end for _, end in spans.values()), default=0):
                start = self._replaced(view, index)  # asked for another turn, the template goes on with the one before
            if index + 1 == len(view.turns):
                end = None if start is None else self._unasked(view, text, start)
            else:
                end = self._bound(view, text, index, own[-1], False) if own else self._end(view, index)
            if start is None or end is None:
                raise ValueError(
                    f"cannot tell where turn {index} {_in(start, end)} in the chat template's text; {REMEDY}"
                )
            if end <= start:
                raise ValueError(f"the chat template leaves out turn {index}, the assistant's; {REMEDY}")
            spans[index] = (start, end)
        _check(view, spans)
        return tuple(spans.values())

    def _bound(self, view: View, text: str, index: int, own: int, start: bool) -> int | None:
        """The start of a turn that has letters, or its end, as it was where the same stood between the same kinds of turns."""
        at = view.anchors.index((own, view.made[view.text[own]])) + (-1 if start else 1)
        if not 0 <= at < len(view.anchors):
            return self._start(view, index) if start else self._end(view, index)
        other, mark = view.anchors[at]
        left, right = sorted((own, other))
        key = (
            start,
            text[left + 1 : right],
            _wrote_between(view, left, right),
            bool(view.tools),
            view.turns[0]["role"],
            index + 1 == len(view.turns),
            bool(view.turns[index].get("tool_calls")),
            view.turns[mark.turn]["role"] if mark.turn >= 0 else "",
            bool(view.turns[mark.turn].get("tool_calls")),
        )
        if key not in self.known:
            found = self._start(view, index) if start else self._end(view, index)
            if found is None:
                return None
            if len(self.known) >= KNOWN:
                self.known.clear()
            self.known[key] = found - left
        return left + self.known[key]

    def _start(self, view: View, index: int) -> int | None:
        """Behind the prompt that asks for the turn; where the text goes on in another way, before the turn's own content, or
        as far as it goes along with the prompt."""
        prompt = self._prompt(view, index)
        if prompt:
            there, here = view.meeting(prompt)
            if view.text.startswith(prompt[there:], here):
                return here + len(prompt) - there
        start = self._replaced(view, index)
        if start is None and prompt and there:
            start = here + _common(prompt[there:], view.text[here:])
        return start

    def _replaced(self, view: View, index: int) -> int | None:
        """Where the content stands when the turn says nothing else, as it does here or where a question follows, and the text
        before it stays as it is."""
        places = [each[0] for letter, each in view.places.items() if view.made[letter].turn == index]
        if not places:
            return None
        letter, before = view.unused(), view.turns[:index]
        other = _saying(letter, view.turns[index], calls=True)
        for behind in (view.turns[index + 1 :], [{"role": "user", "content": "?"}]):
            rendered = self._rendered([*before, other, *behind], view.tools, False)
            if rendered is not None and rendered.count(letter) == 1:
                start = rendered.index(letter)
                if start <= min(places) and view.text.startswith(rendered[:start]):
                    return start
        return None

    def _end(self, view: View, index: int) -> int | None:
        """Behind what the template writes when the turn is the last; of that, what it also writes when others follow."""
        ended = self._rendered(view.turns[: index + 1], view.tools, False)
        if ended is not None:
            there, here = view.meeting(ended)
            rest, following = ended[there:].rstrip(), view.text[here:]
            if following.startswith(rest):
                return here + len(rest)
            asked = rest[_common(rest, following) :]
            mark = view.made.get(following[:1])
            if asked and mark and mark.turn == index and self._prompt(view, index).rstrip().endswith(asked):
                return here + len(self._end_in(rest, following, 1 + len(_behind(view, here).rstrip())))
        return self._before_next(view, index)

    def _before_next(self, view: View, index: int) -> int | None:
        """Before what the template writes between the end of the turn and the next one's first letter.

        The end shows where the turn says one letter alone: there it goes as far as the same is written whether others follow or
        not.
        """
        letter = view.unused()
        own = max((place for place, mark in view.anchors if mark.turn == index), default=-1)
        following = next(((place, mark) for place, mark in view.anchors if place > own and mark.turn > index), None)
        if own < 0 or following is None:
            return None
        place = following[0]
        for calls in (False, True):
            other = _saying(letter, view.turns[index], calls)
            last = self._rendered([*view.turns[:index], other], view.tools, False)
            inside = self._rendered([*view.turns[:index], other, *view.turns[index + 1 :]], view.tools, False)
            if last is None or inside is None or last.count(letter) != 1 or inside.count(letter) != 1:
                continue
            ended, going_on = last[last.index(letter) + 1 :], inside[inside.index(letter) + 1 :]
            between = going_on[len(self._end_in(ended, going_on)) : going_on.find(view.text[place])]
            if place - len(between) > own and view.text.endswith(between, 0, place):
                return place - len(between)
        return None

    def _unasked(self, view: View, text: str, start: int) -> int:
        """The end of the last turn. Some templates ask for another one behind it, whether they are told to or not."""
        whole = text.rstrip()
        if _last_piece(whole) == _last_piece(text[:start].rstrip()):
            going_on = self._rendered([*view.turns, {"role": "user", "content": view.unused()}], view.tools, False)
            there, here = view.meeting(going_on or "")
            if going_on and here >= start:
                own = 1 + len(_behind(view, here).rstrip())
                return here + len(self._end_in(view.text[here:], going_on[there:], own))
        return len(whole)

    def _end_in(self, ended: str, going_on: str, own: int = 0) -> str:
        """What a turn ends with: all that is the same where it is the last and where others follow, up to the token that ends
        a text if that is in it, behind as many characters as are the turn's own."""
        same = going_on[: _common(ended, going_on)].rstrip()
        at = same.rfind(self.eos, own) if self.eos else -1
        return same if at < 0 else same[: at + len(self.eos)]

    def _prompt(self, view: View, index: int) -> str:
        """What asks for a turn; empty where the template refuses it."""
        return self._rendered(view.turns[:index], view.tools, True) or ""

    def _rendered(self, turns: Sequence[Turn], tools: Sequence[Tool], ask: bool) -> str | None:
        try:
            return self.render(turns, tools, ask)
        except Exception:  # what a template raises is its own
            return None


def _saying(letter: str, turn: Turn, calls: bool) -> Turn:
    """A turn that says a letter instead of what it says."""
    content = [{"type": "text", "text": letter}] if isinstance(turn.get("content"), list) else letter
    kept = {key: value for key, value in turn.items() if key in NAMES or (calls and key == "tool_calls")}
    return {**kept, "content": content}


def _stand_in(text: str, contents: Sequence[str]) -> bool:
    """Whether the contents stand in the text, in order."""
    at = 0
    for content in contents:
        at = text.find(content, at)
        if at < 0:
            return False
        at += len(content)
    return True


def _behind(view: View, place: int) -> str:
    """What follows a letter in the text that it is from."""
    mark = view.made.get(view.text[place : place + 1])
    return mark.text[mark.at + 1 :] if mark else ""


def _wrote_between(view: View, left: int, right: int) -> tuple[str, ...]:
    """What the conversation has between two letters: the same characters may be its own or the template's."""
    before, after = view.made[view.text[left]], view.made[view.text[right]]
    turns = view.turns[before.turn + 1 : max(after.turn, 0)]
    return (_behind(view, left), *map(repr, turns), after.text[: after.at])


def _in(start: int | None, end: int | None) -> str:
    return "starts" if start is None else "ends"


def _last_piece(text: str) -> str:
    """The tag or the word that a text ends with, and the signs behind it."""
    end = text[-100:]
    return end[max((match.start() for match in WHOLE.finditer(end)), default=0) :]


def _common(one: str, other: str) -> int:
    """How far two texts are the same, without half a tag or half a word."""
    size = len(commonprefix([one, other]))  # noqa: RUF071 (characters are what it is about)
    for text in (one, other):
        for match in WHOLE.finditer(text[: size + 100]):
            if match.start() < size < match.end():
                size = match.start()
    return size


def _check(view: View, spans: dict[int, Span]) -> None:
    """The spans are in order, and hold what the assistant wrote and nothing of others.

    Raises:
        ValueError: they do not.
    """
    at = 0
    for index, (start, end) in spans.items():
        if start < at:
            raise ValueError(f"turn {index} starts inside the one before in the chat template's text; {REMEDY}")
        at = end
    for letter, places in view.places.items():
        turn = view.made[letter].turn
        inside = [any(start <= place < end for start, end in spans.values()) for place in places]
        if turn in spans:
            start, end = spans[turn]
            if not any(start <= place < end for place in places):
                raise ValueError(f"the chat template writes turn {turn} outside its place; {REMEDY}")
        elif any(inside):
            raise ValueError(f"the chat template writes turn {turn} inside the assistant's; {REMEDY}")
