"""Find the assistant turns in a rendered conversation.

A turn starts after the generation prompt and ends with its end token. Two things are certain: the generation prompt before a turn,
from rendering the conversation up to it, and the origin of the text around a marker (``markers``). ``turn_boundaries`` finds a
turn's start and end in a rendering of that part and carries them over to the whole text, where they have to agree with the
markers. The search remembers the text between two markers around a start or an end, so that most conversations need no rendering
of their parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raysft.data.tokenization.markers import MarkedRendering, Render, Turn
from raysft.data.tokenization.text_boundaries import contains_in_order, last_tag_or_word
from raysft.data.tokenization.turn_boundaries import TurnBoundaries

Span = tuple[int, int]
"""[start, end) in characters."""
MAX_REMEMBERED = 10_000
"""Texts between two turns to remember."""
REMEDY = "add {% generation %} markers to it, or set model.chat_template"


class SpanFinder:
    """Finds the assistant turns in what one template renders."""

    def __init__(self, render: Render, eos: str) -> None:
        self.boundaries = TurnBoundaries(render, eos)
        self._offsets: dict[tuple[Any, ...], int] = {}
        """(text between two markers, kinds of their turns …) → start or end of the turn, from the left marker."""

    def find_only_answer(self, turns: Sequence[Turn], text: str) -> tuple[Span, ...]:
        """Return the span of the only answer without markers, if it is the last turn and the text is prompt and answer.

        Empty if that is not certain.
        """
        if [turn["role"] for turn in turns].index("assistant") + 1 < len(turns):
            return ()
        prompt = self.boundaries.try_render(turns[:-1], (), True)
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
            start = self._edge(marked, text, index, own[0], True) if own else self.boundaries.start(marked, index)
            if start is not None and start < previous_end:
                start = self.boundaries.start_by_content(marked, index)  # the template continues the turn before
            if index + 1 == len(marked.turns):
                end = None if start is None else self.boundaries.end_of_last(marked, text, start)
            else:
                end = self._edge(marked, text, index, own[-1], False) if own else self.boundaries.end(marked, index)
            if start is None or end is None or end <= start:
                raise ValueError(f"cannot locate assistant turn {index} in the rendered chat template; {REMEDY}")
            spans[index] = (start, end)
        _check(marked, spans)
        return tuple(spans.values())

    def _edge(self, marked: MarkedRendering, text: str, index: int, own: int, start: bool) -> int | None:
        """Find the start or the end of a turn with a marker at ``own``.

        The result is remembered by the text between this marker and the one before or after it.
        """
        number = marked.anchors.index((own, marked.markers[marked.text[own]])) + (-1 if start else 1)
        if not 0 <= number < len(marked.anchors):
            return self.boundaries.start(marked, index) if start else self.boundaries.end(marked, index)
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
            found = self.boundaries.start(marked, index) if start else self.boundaries.end(marked, index)
            if found is None:
                return None
            if len(self._offsets) >= MAX_REMEMBERED:
                self._offsets.clear()
            self._offsets[key] = found - left
        return left + self._offsets[key]


def _check(marked: MarkedRendering, spans: dict[int, Span]) -> None:
    """Check that spans are in order and contain the assistant's markers and nobody else's.

    Raises:
        ValueError: they do not.
    """
    previous_end = 0
    for index, (start, end) in spans.items():
        if start < previous_end:
            raise ValueError(f"the chat template starts turn {index} inside the previous turn; {REMEDY}")
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
