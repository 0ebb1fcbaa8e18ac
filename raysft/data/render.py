"""Conversations → the text that the model's chat template makes of them, and which characters the assistant wrote.

The one place that decides masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from raysft.records import Message

Template = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) → rendered text."""


def assistant_spans(messages: Sequence[Message], template: Template) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find what the assistant wrote in it, turn by turn.

    A turn is the text between the rendering of what came before with the generation prompt and the rendering that includes
    the turn: what the model must write when it is asked to answer. White space that the template puts after the token that
    ends the turn is not part of it.

    Args:
        messages: the conversation.
        template: the chat template.

    Returns:
        The rendered text, and for each assistant turn its [start, end) in characters: content and end-of-turn token.

    Raises:
        ValueError: the template renders a turn differently when more turns follow, so that its place is not known.

    >>> chatml = lambda ms, ask: "".join(f"<{m.role}>{m.content}</>\\n" for m in ms) + ("<assistant>" if ask else "")
    >>> text, spans = assistant_spans([Message("user", "Hi"), Message("assistant", "Hello")], chatml)
    >>> [text[start:end] for start, end in spans]
    ['Hello</>']
    """
    text = template(messages, False)
    spans = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = template(messages[:index], True)
        until = template(messages[: index + 1], False)
        if not (text.startswith(before) and text.startswith(until) and len(before) <= len(until)):
            raise ValueError(
                f"the chat template changes turn {index} when others follow it, so what the assistant wrote cannot be told apart"
            )
        content_end = len(before) + len(until[len(before) :].rstrip())
        spans.append((len(before), content_end))
    return text, spans


def prompt_messages(messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
    """What is asked and what is expected: everything before the last assistant turn, and that turn's content."""
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    return messages[:last], messages[last].content


def labelled(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
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
