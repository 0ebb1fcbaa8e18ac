"""Where the assistant's turns stand in the text that a template makes of a conversation.

A turn starts where the generation prompt ends and ends with the token that ends it. Two things are known for certain: what the
template asks with before a turn, from rendering the conversation up to it, and what comes from which turn, from rare letters
(``marks``). A turn's bounds are carried from the rendering of the part to that of the whole, and have to agree with the letters.
What stands between two letters at a bound is remembered, so that most conversations need no rendering of their parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from raysft.data.tokenization.markers import NAMES, Render, Tool, Turn, View
from raysft.data.tokenization.text_boundaries import TAG, WHOLE, before_common_end, common, last_piece, stand_in

Span = tuple[int, int]
"""[start, end) in characters."""
KNOWN = 10_000
"""Texts between two turns that are remembered at most."""
REMEDY = "add {% generation %} markers to it, or name another in model.chat_template"


class Bounds:
    """Finds the assistant's turns in what a template renders."""

    def __init__(self, render: Render, eos: str) -> None:
        self.render, self.eos = render, eos
        self.known: dict[tuple[Any, ...], int] = {}
        self.asks: str | None = None

    def asked(self, turns: Sequence[Turn], text: str) -> tuple[Span, ...]:
        """The span of the only answer where it is the last turn, and the text is the prompt and what was written."""
        if [turn["role"] for turn in turns].index("assistant") + 1 < len(turns):
            return ()
        prompt = self._rendered(turns[:-1], (), True)
        if not prompt or not text.startswith(prompt) or last_piece(text.rstrip()) == last_piece(prompt.rstrip()):
            return ()
        *questions, answer = [turn["content"].strip() for turn in turns]
        before, shown, behind = text[len(prompt) :].rpartition(answer)
        own = shown and stand_in(prompt, questions) and not any(each and each in before + behind for each in questions)
        return ((len(prompt), len(text.rstrip())),) if own else ()

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
            if view.hides(index):
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
            start = here + common(prompt[there:], view.text[here:])
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
            own = 1 + len(_behind(view, here).rstrip())
            if view.turns[index + 1]["role"] == "assistant" and last_piece(rest) == self._asked(view, index):
                size = self._before_question(view, index, here, ended)  # what asks stands before the next turn as well
                if size:
                    return here + size
            if following.startswith(rest):
                return here + len(rest) + (0 if len(rest) > own else self._closing(view, index, here + own))
            asked = rest[common(rest, following) :]
            mark = view.made.get(following[:1])
            if asked and mark and mark.turn == index and self._prompt(view, index).rstrip().endswith(asked):
                return here + len(self._end_in(rest, following, own, view.text))
        return self._before_next(view, index)

    def _closing(self, view: View, index: int, end: int) -> int:
        """Length of the token that closes a turn only where others follow: of what stands before the next turn's text, all but
        what also opens a conversation that begins with that turn."""
        letter, following = view.unused(), view.turns[index + 1]
        opened = self._rendered([_saying(letter, following, calls=False)], (), False)
        place = next(((at, mark) for at, mark in view.anchors if mark.turn == index + 1), None)
        if opened is None or opened.count(letter) != 1 or place is None:
            return 0
        between = view.text[end : place[0] - len(place[1].text[: place[1].at].lstrip())]
        closing = before_common_end(between, opened[: opened.index(letter)]).rstrip()
        return len(closing) if TAG.fullmatch(closing.strip()) or closing.strip() == self.eos else 0

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
        index = len(view.turns) - 1
        if last_piece(whole) in (last_piece(text[:start].rstrip()), self._asked(view, index)):
            here = max((place for place, _ in view.anchors), default=-1)
            if here >= start and (size := self._before_question(view, index, here, view.text)):
                return here + size
        return len(whole)

    def _before_question(self, view: View, index: int, here: int, ended: str) -> int | None:
        """How far behind a letter of a turn the same is written where it is the last and where a question follows it."""
        question = {"role": "user", "content": view.unused()}
        going_on = self._rendered([*view.turns[: index + 1], question], view.tools, False)
        letter = view.text[here]
        if going_on is None or going_on.count(letter) != 1 or ended.count(letter) != 1:
            return None
        own = 1 + len(_behind(view, here).rstrip())
        behind, following = ended[ended.index(letter) :], going_on[going_on.index(letter) :]
        return len(self._end_in(behind, following, own, view.text))

    def _end_in(self, ended: str, going_on: str, own: int = 0, text: str = "") -> str:
        """What a turn ends with: all that is the same where it is the last and where others follow.

        Not beyond the token that ends a text, if that is in it behind as many characters as are the turn's own. Where the last
        turn goes on, as the template asks for another, what both begin with is not part of it either: that is how the whole text
        begins, but for tokens that begin a text.
        """
        same = going_on[: common(ended, going_on)].rstrip()
        at = same.rfind(self.eos, own) if self.eos else -1
        if at >= 0:
            return same[: at + len(self.eos)]
        if len(same) < len(ended.rstrip()):
            begins = [0, *(match.end() for match in itertools.islice(WHOLE.finditer(text), 2))]
            for match in WHOLE.finditer(same, own):
                if any(text.startswith(same[match.start() :], begin) for begin in begins):
                    return same[: match.start()].rstrip()
        return same

    def _asked(self, view: View, index: int) -> str:
        """The last piece of what asks for a turn, of the first one that was seen."""
        if self.asks is None:
            self.asks = last_piece(self._prompt(view, index).rstrip())
        return self.asks

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
