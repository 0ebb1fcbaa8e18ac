"""Keep the thoughts of assistant turns that a chat template leaves out, or give an empty thought to turns without one.

The template reads the conversation without thoughts. What it writes for one, in its own words, is learnt from a conversation of one
question and one answer, and takes the place of what it wrote before the answer of each turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raysft.data.tokenization.markers import Render, Turn
from raysft.data.tokenization.span_search import REMEDY, Span
from raysft.data.types import Message

Thinking = Literal["template", "keep", "empty", "last"]
KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a turn that may hold its thought."""
TAGS = ("<think>", "</think>")
QUESTION, THOUGHT, ANSWER = "\uf2b3", "\uf2b4", "\uf2b5"
"""Private letters, which no template contains."""


@dataclass(frozen=True)
class ThoughtWords:
    """What a template writes between the header of an assistant turn and its answer."""

    opening: str = "<think>\n"
    closing: str = "\n</think>\n\n"
    empty: str = "<think>\n\n</think>\n\n"
    """An empty thought."""
    prompted: str = ""
    """What a generation prompt adds to the header."""
    without: tuple[str, ...] = ("",)
    """What it writes for turns without a thought, the longest first."""
    kept: frozenset[str] = field(default_factory=frozenset)
    """Where it finds the thoughts of earlier turns, and writes them: in ``content``, or in a key of the turn."""

    @classmethod
    def of(cls, render: Render, render_thinking: Render) -> ThoughtWords:
        """Learn the words of a template.

        Args:
            render: the template.
            render_thinking: the same with ``enable_thinking: true``: where thinking is off, it may show no thoughts.
        """
        plain: Turn = {"role": "assistant", "content": ANSWER}
        tagged: Turn = {"role": "assistant", "content": f"{cls.opening}{THOUGHT}{cls.closing}{ANSWER}"}
        forms = {**{key: {**plain, key: THOUGHT} for key in KEYS}, "content": tagged}
        texts = {key: _before_answer(render_thinking, turn) for key, turn in forms.items()}
        shown = next((text for text in texts.values() if text.count(THOUGHT) == 1), "")
        before = (_before_answer(render, plain), _before_answer(render, plain, follows=True))
        start, _, closing = shown.partition(THOUGHT)
        question: Turn = {"role": "user", "content": QUESTION}
        prompt, thinking_prompt = _render(render, [question], True), _render(render_thinking, [question], True)
        others = (_before_answer(render_thinking, plain), start, thinking_prompt)
        header = _common_beginning([text for text in (*before, prompt, *others) if text])
        without = tuple(sorted({text[len(header) :] for text in before if text}, key=len, reverse=True)) or cls.without
        prompted = prompt[len(header) :]
        opening, closing = (start[len(header) :], closing) if shown else (cls.opening, cls.closing)
        end = closing.strip()
        return cls(
            opening,
            closing,
            next((text for text in (*without, prompted) if end and end in text), opening + closing),
            prompted,
            without,
            # A template with its own words for thoughts may copy one in tags as part of the answer.
            frozenset(
                key
                for key, turn in forms.items()
                if texts[key] == shown and THOUGHT in _before_answer(render, turn, follows=True)
            ),
        )

    def split(self, message: Message) -> tuple[str | None, Message, str]:
        """Take the thought out of a message.

        Returns:
            The thought, None if there is none; the message without it; and where it was.
        """
        for key in KEYS:
            if isinstance(thought := message.extra.get(key), str) and thought.strip():
                return thought.strip("\n"), _without(message, message.content, key), key
        for opening, closing in (TAGS, (self.opening.strip(), self.closing.strip())):
            if opening and closing and closing in message.content:
                before, _, content = message.content.partition(closing)
                found = re.fullmatch(rf"\s*(?:{re.escape(opening)})?(.*)", before, re.DOTALL)
                assert found is not None
                if opening not in found[1]:
                    return found[1].strip("\n"), _without(message, content.lstrip("\n"), ""), "content"
        return None, message, ""

    def without_more(self, message: Message) -> Message:
        """Take the thoughts out that stand elsewhere in a message than at its beginning."""
        content = message.content
        for opening, closing in (TAGS, (self.opening.strip(), self.closing.strip())):
            if opening and closing:
                content = re.sub(rf"{re.escape(opening)}.*?{re.escape(closing)}\n{{0,2}}", "", content, flags=re.DOTALL)
        return message if content == message.content else _without(message, content, "")

    def begins_in(self, content: str) -> bool:
        """Return True if a text contains the beginning of a thought."""
        return any(opening and opening in content for opening in (TAGS[0], self.opening.strip()))

    def place(self, text: str, start: int) -> Span:
        """Return [start, end) of what the template wrote before the answer in a turn without a thought.

        Args:
            text: the conversation without thoughts.
            start: where the span of the turn starts.

        Raises:
            ValueError: the template writes something else there.
        """
        for words in self.without:
            at = text.find(words, max(0, start - len(words)), start + len(words))
            if at >= 0:
                return at, at + len(words)
        raise ValueError(
            f"cannot tell where the chat template writes the reasoning of a turn with tool calls; {REMEDY}"
        )


@dataclass(frozen=True)
class Thoughts:
    """The thoughts to write into the turns of one conversation."""

    planned: tuple[str | Literal[False] | None, ...]
    """For each assistant turn, its thought, which may be empty; False for not even an empty one; None to leave the turn as the
    template writes it."""
    words: ThoughtWords
    trains_empty: bool
    """Empty thoughts are trained, and not part of the prompt."""

    def write(self, text: str, spans: Sequence[Span]) -> tuple[str, tuple[Span, ...]]:
        """Write them into a rendered conversation.

        Args:
            text: the conversation without thoughts.
            spans: its assistant turns.

        Raises:
            ValueError: it is not certain where the thought of a turn belongs.
        """
        parts: list[str] = []
        written: list[Span] = []
        end = shift = 0
        for (start, stop), thought in zip(spans, self.planned, strict=True):
            if thought is None or start == stop:
                written.append((start + shift, stop + shift))
                continue
            left, right = self.words.place(text, start)
            block = self._block(thought)
            masked = self.words.prompted if block.startswith(self.words.prompted) else ""
            if thought == "" and not self.trains_empty:
                masked = block
            parts += (text[end:left], block)
            written.append((left + shift + len(masked), stop + shift + len(block) - (right - left)))
            shift += len(block) - (right - left)
            end = right
        return "".join([*parts, text[end:]]), tuple(written)

    def prompt(self, text: str, spans: Sequence[Span], own: str) -> str:
        """Return the prompt of the last assistant turn, with the thoughts of the turns before it.

        Args:
            text: the conversation without thoughts.
            spans: its assistant turns.
            own: the prompt that the template itself writes for the conversation without thoughts.
        """
        left, _ = self.words.place(text, spans[-1][0])
        prompted = own[left:] if own.startswith(text[:left]) else self.words.prompted
        if self.planned[-1] is not None and not self.trains_empty and self.words.empty.startswith(prompted):
            prompted = self.words.empty
        before, _ = replace(self, planned=(*self.planned[:-1], None)).write(text, spans)
        return before[: len(before) - (len(text) - left)] + prompted

    def _block(self, thought: str | Literal[False]) -> str:
        if thought is False:
            return ""
        return self.words.opening + thought + self.words.closing if thought else self.words.empty


def plan_thoughts(
    messages: Sequence[Message], words: ThoughtWords, thinking: Thinking, options: dict[str, Any]
) -> tuple[tuple[Message, ...], Thoughts] | None:
    """Take the thoughts out of a conversation.

    Args:
        messages: the conversation.
        words: the template's.
        thinking: ``data.thinking``.
        options: ``data.template_options``.

    Returns:
        The messages without the thoughts that are to be written, and these; None if the template itself does what is asked for.
    """
    if thinking == "template":
        return None
    enabled = options.get("enable_thinking", True)
    without, planned, places = [], [], []
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=-1)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            thought, rest, place = words.split(message)
            if thinking != "keep" and (enabled is False or not (place or words.begins_in(message.content))):
                thought = ""
            planned.append(thought)
            places.append(place)
            left = message if thought is None else rest
            none = thinking != "keep" and (enabled is False or (thinking == "last" and index < last))
            without.append(words.without_more(left) if none else left)
        else:
            without.append(message)
    if thinking == "last":
        planned[:-1] = [False] * (len(planned) - 1)
    if thinking == "keep" and words.kept.issuperset(filter(None, places)):
        return None
    return tuple(without), Thoughts(tuple(planned), words, trains_empty=bool(enabled))


def _common_beginning(texts: Sequence[str]) -> str:
    size = next((size for size, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), None)
    return min(texts, key=len, default="") if size is None else texts[0][:size]


def _render(render: Render, turns: Sequence[Turn], prompts: bool) -> str:
    try:
        return render(turns, (), prompts)
    except Exception:  # a template may raise any error
        return ""


def _before_answer(render: Render, turn: Turn, follows: bool = False) -> str:
    """Render a question and an answer, and perhaps one more question, up to the answer; empty if it is not shown."""
    question: Turn = {"role": "user", "content": QUESTION}
    text = _render(render, [question, turn, *([question] if follows else [])], False)
    return text[: max(0, text.rfind(ANSWER))]


def _without(message: Message, content: str, key: str) -> Message:
    """Return a message with another content and without a key."""
    original = message.original
    if original is not None:
        original = {name: value for name, value in original.items() if name != key}
        original = original if content == message.content else {**original, "content": content}
    extra = {name: value for name, value in message.extra.items() if name != key}
    return replace(message, content=content, extra=extra, original=original)
