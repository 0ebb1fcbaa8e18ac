"""Find where one assistant turn starts and ends in a rendered conversation, by rendering parts of the conversation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from raysft.data.tokenization.markers import COMPARED_KEYS, MarkedRendering, Render, Tool, Turn
from raysft.data.tokenization.text_boundaries import (
    TAG,
    TAG_OR_WORD,
    before_common_end,
    common_length,
    last_tag_or_word,
)


class TurnBoundaries:
    """Finds the start and the end of turns in what one template renders.

    Positions are those in ``MarkedRendering.text``, which are also those in the text without markers. None stands for a position
    that is not certain.
    """

    def __init__(self, render: Render, eos: str) -> None:
        self.render, self.eos = render, eos
        self._prompt_end: str | None = None

    def start(self, marked: MarkedRendering, index: int) -> int | None:
        """Find the start of a turn: the end of its generation prompt.

        Where the text continues in another way than the prompt, it is the start of the turn's content or, failing that, the end of
        what text and prompt have in common.
        """
        prompt = self._prompt(marked, index)
        if prompt:
            in_prompt, in_text = marked.last_common_marker(prompt)
            if marked.text.startswith(prompt[in_prompt:], in_text):
                return in_text + len(prompt) - in_prompt
        start = self.start_by_content(marked, index)
        if start is None and prompt and in_prompt:
            start = in_text + common_length(prompt[in_prompt:], marked.text[in_text:])
        return start

    def start_by_content(self, marked: MarkedRendering, index: int) -> int | None:
        """Find where a turn's content starts, by rendering the conversation with one letter instead of the turn.

        The letter is in the right place if the same text precedes it, with the turns that follow or with a question after it.
        None if it does not.
        """
        own = [positions[0] for letter, positions in marked.positions.items() if marked.markers[letter].turn == index]
        if not own:
            return None
        letter, before = marked.unused_letter(), marked.turns[:index]
        replaced = _with_content(letter, marked.turns[index], keep_calls=True)
        for after in (marked.turns[index + 1 :], [{"role": "user", "content": "?"}]):
            rendered = self.try_render([*before, replaced, *after], marked.tools, False)
            if rendered is not None and rendered.count(letter) == 1:
                start = rendered.index(letter)
                if start <= min(own) and marked.text.startswith(rendered[:start]):
                    return start
        return None

    def end(self, marked: MarkedRendering, index: int) -> int | None:
        """Find the end of a turn that others follow: what the template writes after it both here and if it is the last turn."""
        ended = self.try_render(marked.turns[: index + 1], marked.tools, False)
        if ended is not None:
            in_ended, in_text = marked.last_common_marker(ended)
            rest, following = ended[in_ended:].rstrip(), marked.text[in_text:]
            own = 1 + len(marked.content_after(in_text).rstrip())
            next_is_assistant = marked.turns[index + 1]["role"] == "assistant"
            if next_is_assistant and last_tag_or_word(rest) == self._end_of_prompt(marked, index):
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
        opened = self.try_render([_with_content(letter, following, keep_calls=False)], (), False)
        anchor = next(((position, marker) for position, marker in marked.anchors if marker.turn == index + 1), None)
        if opened is None or opened.count(letter) != 1 or anchor is None:
            return 0
        position, marker = anchor
        between = marked.text[end : position - len(marker.text[: marker.position].lstrip())]
        closing = before_common_end(between, opened[: opened.index(letter)]).rstrip()
        return len(closing) if TAG.fullmatch(closing.strip()) or closing.strip() == self.eos else 0

    def _end_before_next(self, marked: MarkedRendering, index: int) -> int | None:
        """Find the end of a turn from the next one: the template writes some text between the two.

        Rendering the conversation with one letter instead of the turn shows that text: the turn's ending is what follows the letter
        whether or not other turns follow.
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
            last = self.try_render([*marked.turns[:index], replaced], marked.tools, False)
            inside = self.try_render([*marked.turns[:index], replaced, *marked.turns[index + 1 :]], marked.tools, False)
            if last is None or inside is None or last.count(letter) != 1 or inside.count(letter) != 1:
                continue
            ended, continued = last[last.index(letter) + 1 :], inside[inside.index(letter) + 1 :]
            between = continued[len(self._common_ending(ended, continued)) : continued.find(marked.text[following])]
            if following - len(between) > own and marked.text.endswith(between, 0, following):
                return following - len(between)
        return None

    def end_of_last(self, marked: MarkedRendering, text: str, start: int) -> int:
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
        continued = self.try_render([*marked.turns[: index + 1], question], marked.tools, False)
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
        return self.try_render(marked.turns[:index], marked.tools, True) or ""

    def try_render(self, turns: Sequence[Turn], tools: Sequence[Tool], add_generation_prompt: bool) -> str | None:
        """Render a conversation; None if the template refuses it."""
        try:
            return self.render(turns, tools, add_generation_prompt)
        except Exception:  # a template may raise any error
            return None


def _with_content(letter: str, turn: Turn, keep_calls: bool) -> Turn:
    """Replace everything that a turn says with one letter."""
    content = [{"type": "text", "text": letter}] if isinstance(turn.get("content"), list) else letter
    kept = {key: value for key, value in turn.items() if key in COMPARED_KEYS or (keep_calls and key == "tool_calls")}
    return {**kept, "content": content}
