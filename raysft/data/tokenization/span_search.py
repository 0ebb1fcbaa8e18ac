"""Find the assistant turns in a rendered conversation.

A turn starts after the generation prompt and ends with its end token. Two things are certain: the generation prompt before a turn,
from rendering the conversation up to it, and the origin of the text around a marker (``markers``). The search finds a turn's start
and end in a rendering of that part and carries them over to the whole text, where they have to agree with the markers. It remembers
the text between two markers around a start or an end, so that most conversations need no rendering of their parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from raysft.data.tokenization.markers import COMPARED_KEYS, MarkedRendering, Render, Tool, Turn
from raysft.data.tokenization.text_boundaries import (
    TAG,
    TAG_OR_WORD,
    before_common_end,
    common_length,
    contains_in_order,
    last_tag_or_word,
)

Span = tuple[int, int]
"""[start, end) in characters."""
MAX_REMEMBERED = 10_000
"""Texts between two turns to remember."""
REMEDY = "add {% generation %} markers to it, or set model.chat_template"


class SpanFinder:
    """Finds the assistant turns in what one template renders."""

    def __init__(self, render: Render, eos: str) -> None:
        self.render, self.eos = render, eos
        self._offsets: dict[tuple[Any, ...], int] = {}
        """(text between two markers, kinds of their turns …) → start or end of the turn, from the left marker."""
        self._prompt_end: str | None = None

    def find_only_answer(self, turns: Sequence[Turn], text: str) -> tuple[Span, ...]:
        """Return the span of the only answer without markers, if it is the last turn and the text is prompt and answer.

        Empty if that is not certain.
        """
        if [turn["role"] for turn in turns].index("assistant") + 1 < len(turns):
            return ()
        prompt = self._render(turns[:-1], (), True)
        if not prompt or not text.startswith(prompt):
            return ()
        if last_tag_or_word(text.rstrip()) == last_tag_or_word(prompt.rstrip()):
            return ()
        *questions, answer = [turn["content"].strip() for turn in turns]
        before, found, after = text[len(prompt) :].rpartition(answer)
        certain = (
            found
            and contains_in_order(prompt, questions)
            and not any(question and question in before + after for question in questions)
        )
        return ((len(prompt), len(text.rstrip())),) if certain else ()

    def find(self, marked: MarkedRendering, text: str) -> tuple[Span, ...]:
        """Return the spans of the assistant turns, in order; empty spans for turns that the template hides.

        Args:
            marked: the conversation rendered with markers.
            text: the same without.

        Raises:
            ValueError: the span of a turn is not certain.
        """
        spans: dict[int, Span] = {}
        by_turn: dict[int, list[int]] = {}
        for position, marker in marked.anchors:
            by_turn.setdefault(marker.turn, []).append(position)
        for index, turn in enumerate(marked.turns):
            if turn["role"] != "assistant":
                continue
            previous_end = max((end for _, end in spans.values()), default=0)
            if marked.hides(index):
                spans[index] = (previous_end, previous_end)
                continue
            own = by_turn.get(index, [])
            start = self._edge(marked, text, index, own[0], True) if own else self._start(marked, index)
            if start is not None and start < previous_end:
                start = self._start_by_content(marked, index)  # the template continues the turn before
            if index + 1 == len(marked.turns):
                end = None if start is None else self._end_of_last(marked, text, start)
            else:
                end = self._edge(marked, text, index, own[-1], False) if own else self._end(marked, index)
            if start is None or end is None or end <= start:
                raise ValueError(f"cannot locate assistant turn {index} in the rendered chat template; {REMEDY}")
            spans[index] = (start, end)
        _check(marked, spans)
        return tuple(spans.values())

    def _edge(self, marked: MarkedRendering, text: str, index: int, own: int, start: bool) -> int | None:
        """Find the start or the end of a turn with a marker at ``own``.

        The result is remembered by the text between this marker and the nearest one of another turn.
        """
        number = marked.anchors.index((own, marked.markers[marked.text[own]])) + (-1 if start else 1)
        if not 0 <= number < len(marked.anchors):
            return self._start(marked, index) if start else self._end(marked, index)
        other, marker = marked.anchors[number]
        left, right = sorted((own, other))
        key = (
            start,
            text[left + 1 : right],
            marked.contents_between(left, right),
            bool(marked.tools),
            marked.turns[0]["role"],
            index + 1 == len(marked.turns),
            bool(marked.turns[index].get("tool_calls")),
            marked.turns[marker.turn]["role"] if marker.turn >= 0 else "",
            bool(marked.turns[marker.turn].get("tool_calls")),
        )
        if key not in self._offsets:
            found = self._start(marked, index) if start else self._end(marked, index)
            if found is None:
                return None
            if len(self._offsets) >= MAX_REMEMBERED:
                self._offsets.clear()
            self._offsets[key] = found - left
        return left + self._offsets[key]

    def _start(self, marked: MarkedRendering, index: int) -> int | None:
        """Find the start of a turn: the end of its generation prompt.

        Where the text continues in another way than the prompt, it is the start of the turn's content or, failing that, the end of
        what text and prompt have in common.
        """
        prompt = self._prompt(marked, index)
        if prompt:
            in_prompt, in_text = marked.last_common_marker(prompt)
            if marked.text.startswith(prompt[in_prompt:], in_text):
                return in_text + len(prompt) - in_prompt
        start = self._start_by_content(marked, index)
        if start is None and prompt and in_prompt:
            start = in_text + common_length(prompt[in_prompt:], marked.text[in_text:])
        return start

    def _start_by_content(self, marked: MarkedRendering, index: int) -> int | None:
        """Find where a turn's content starts: where one letter alone would stand instead of the turn.

        Only if the text before that letter is the text before the turn, with the turns that follow or with a question after it.
        """
        own = [positions[0] for letter, positions in marked.positions.items() if marked.markers[letter].turn == index]
        if not own:
            return None
        letter, before = marked.unused_letter(), marked.turns[:index]
        replaced = _with_content(letter, marked.turns[index], keep_calls=True)
        for after in (marked.turns[index + 1 :], [{"role": "user", "content": "?"}]):
            rendered = self._render([*before, replaced, *after], marked.tools, False)
            if rendered is not None and rendered.count(letter) == 1:
                start = rendered.index(letter)
                if start <= min(own) and marked.text.startswith(rendered[:start]):
                    return start
        return None

    def _end(self, marked: MarkedRendering, index: int) -> int | None:
        """Find the end of a turn that others follow: what the template writes after it both here and if it is the last turn."""
        ended = self._render(marked.turns[: index + 1], marked.tools, False)
        if ended is not None:
            in_ended, in_text = marked.last_common_marker(ended)
            rest, following = ended[in_ended:].rstrip(), marked.text[in_text:]
            own = 1 + len(marked.content_after(in_text).rstrip())
            if marked.turns[index + 1]["role"] == "assistant" and last_tag_or_word(rest) == self._end_of_prompt(
                marked, index
            ):
                size = self._size_before_question(marked, index, in_text, ended)  # the next turn has a prompt as well
                if size:
                    return in_text + size
            if following.startswith(rest):
                closing = 0 if len(rest) > own else self._closing_size(marked, index, in_text + own)
                return in_text + len(rest) + closing
            prompt = rest[common_length(rest, following) :]
            marker = marked.markers.get(following[:1])
            if prompt and marker and marker.turn == index and self._prompt(marked, index).rstrip().endswith(prompt):
                return in_text + len(self._common_ending(rest, following, own, marked.text))
        return self._end_before_next(marked, index)

    def _closing_size(self, marked: MarkedRendering, index: int, end: int) -> int:
        """Length of the token that closes a turn only if others follow; 0 if there is none.

        It is what precedes the content of the next turn, except what also precedes it at the beginning of a conversation.
        """
        letter, following = marked.unused_letter(), marked.turns[index + 1]
        opened = self._render([_with_content(letter, following, keep_calls=False)], (), False)
        anchor = next(((position, marker) for position, marker in marked.anchors if marker.turn == index + 1), None)
        if opened is None or opened.count(letter) != 1 or anchor is None:
            return 0
        position, marker = anchor
        between = marked.text[end : position - len(marker.text[: marker.position].lstrip())]
        closing = before_common_end(between, opened[: opened.index(letter)]).rstrip()
        return len(closing) if TAG.fullmatch(closing.strip()) or closing.strip() == self.eos else 0

    def _end_before_next(self, marked: MarkedRendering, index: int) -> int | None:
        """Find the end of a turn from the next one: it is before what the template writes between the two.

        That text shows if one letter alone stands instead of the turn: there the turn's ending is what follows the letter whether
        or not other turns follow.
        """
        letter = marked.unused_letter()
        own = max((position for position, marker in marked.anchors if marker.turn == index), default=-1)
        following = next(
            (position for position, marker in marked.anchors if position > own and marker.turn > index), None
        )
        if own < 0 or following is None:
            return None
        for keep_calls in (False, True):
            replaced = _with_content(letter, marked.turns[index], keep_calls)
            last = self._render([*marked.turns[:index], replaced], marked.tools, False)
            inside = self._render([*marked.turns[:index], replaced, *marked.turns[index + 1 :]], marked.tools, False)
            if last is None or inside is None or last.count(letter) != 1 or inside.count(letter) != 1:
                continue
            ended, continued = last[last.index(letter) + 1 :], inside[inside.index(letter) + 1 :]
            between = continued[len(self._common_ending(ended, continued)) : continued.find(marked.text[following])]
            if following - len(between) > own and marked.text.endswith(between, 0, following):
                return following - len(between)
        return None

    def _end_of_last(self, marked: MarkedRendering, text: str, start: int) -> int:
        """Find the end of the last turn. Some templates write a generation prompt after it even if nobody asks for one."""
        stripped = text.rstrip()
        index = len(marked.turns) - 1
        if last_tag_or_word(stripped) in (last_tag_or_word(text[:start].rstrip()), self._end_of_prompt(marked, index)):
            anchor = max((position for position, _ in marked.anchors), default=-1)
            if anchor >= start and (size := self._size_before_question(marked, index, anchor, marked.text)):
                return anchor + size
        return len(stripped)

    def _size_before_question(self, marked: MarkedRendering, index: int, anchor: int, ended: str) -> int | None:
        """Length of the text after a turn's marker that is the same if a question follows the turn.

        Args:
            marked: the conversation.
            index: the turn.
            anchor: position of its marker.
            ended: the conversation that ends with the turn, rendered.
        """
        question = {"role": "user", "content": marked.unused_letter()}
        continued = self._render([*marked.turns[: index + 1], question], marked.tools, False)
        letter = marked.text[anchor]
        if continued is None or continued.count(letter) != 1 or ended.count(letter) != 1:
            return None
        own = 1 + len(marked.content_after(anchor).rstrip())
        after, following = ended[ended.index(letter) :], continued[continued.index(letter) :]
        return len(self._common_ending(after, following, own, marked.text))

    def _common_ending(self, ended: str, continued: str, own: int = 0, text: str = "") -> str:
        """Return the ending of a turn: the beginning that both texts share.

        It stops at an end-of-text token, and before a generation prompt that follows the last turn although nobody asked for it.
        Such a prompt begins as the whole text does, except for tokens that begin a text.

        Args:
            ended: text after the turn's last marker if it is the last turn.
            continued: the same if others follow.
            own: characters of the turn's own content in them.
            text: the whole text.
        """
        same = continued[: common_length(ended, continued)].rstrip()
        eos = same.rfind(self.eos, own) if self.eos else -1
        if eos >= 0:
            return same[: eos + len(self.eos)]
        if len(same) < len(ended.rstrip()):
            starts = [0, *(match.end() for match in itertools.islice(TAG_OR_WORD.finditer(text), 2))]
            for match in TAG_OR_WORD.finditer(same, own):
                if any(text.startswith(same[match.start() :], start) for start in starts):
                    return same[: match.start()].rstrip()
        return same

    def _end_of_prompt(self, marked: MarkedRendering, index: int) -> str:
        """Return the last tag or word of the generation prompt, of the first one seen."""
        if self._prompt_end is None:
            self._prompt_end = last_tag_or_word(self._prompt(marked, index).rstrip())
        return self._prompt_end

    def _prompt(self, marked: MarkedRendering, index: int) -> str:
        """Render the conversation before a turn with its generation prompt; empty if the template refuses it."""
        return self._render(marked.turns[:index], marked.tools, True) or ""

    def _render(self, turns: Sequence[Turn], tools: Sequence[Tool], add_generation_prompt: bool) -> str | None:
        try:
            return self.render(turns, tools, add_generation_prompt)
        except Exception:  # a template may raise errors of its own
            return None


def _with_content(letter: str, turn: Turn, keep_calls: bool) -> Turn:
    """Replace everything that a turn says by one letter."""
    content = [{"type": "text", "text": letter}] if isinstance(turn.get("content"), list) else letter
    kept = {key: value for key, value in turn.items() if key in COMPARED_KEYS or (keep_calls and key == "tool_calls")}
    return {**kept, "content": content}


def _check(marked: MarkedRendering, spans: dict[int, Span]) -> None:
    """Check that spans are in order and contain the assistant's markers and nobody else's.

    Raises:
        ValueError: they do not.
    """
    previous_end = 0
    for index, (start, end) in spans.items():
        if start < previous_end:
            raise ValueError(f"the chat template starts turn {index} inside the turn before; {REMEDY}")
        previous_end = end
    for letter, positions in marked.positions.items():
        turn = marked.markers[letter].turn
        if turn in spans:
            start, end = spans[turn]
            if not any(start <= position < end for position in positions):
                raise ValueError(f"the chat template writes part of turn {turn} outside its place; {REMEDY}")
        elif any(start <= position < end for position in positions for start, end in spans.values()):
            other = f"turn {turn}" if turn >= 0 else "the tools"
            raise ValueError(f"the chat template writes {other} inside an assistant turn; {REMEDY}")
