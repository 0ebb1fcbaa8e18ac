"""Render a conversation and find which characters the assistant wrote.

This is the only place that decides loss masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from raysft.data.tokenization.image_words import ImageWords
from raysft.data.tokenization.markers import Render, Tool, Turn, render_with_markers
from raysft.data.tokenization.span_search import REMEDY, Span, SpanFinder
from raysft.data.tokenization.static_template import StaticTemplate
from raysft.data.tokenization.template_inputs import (
    Omission,
    TemplateInput,
    find_omission,
    template_inputs,
    up_to_first_call,
    with_content_parts,
    with_tools_as_text,
)
from raysft.data.tokenization.thoughts import ThoughtWords
from raysft.data.types import MEDIUM, Message

MAX_STATIC_TEMPLATES = 1000
"""Orders of roles to remember."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]
    """What the assistant wrote in each of its turns, with the end token."""
    given: TemplateInput = field(default_factory=lambda: TemplateInput(()))
    """What the template read."""
    omits_turns: bool = False
    """True if the template leaves out turns."""


@dataclass
class _Attempts:
    """Outcome of rendering a conversation in several forms."""

    omission: Omission | None = None
    """What the template left out in the last form that it rendered."""
    error: Exception | None = None
    """Why it refused a form, the first time."""
    rendered: list[TemplateInput] = field(default_factory=list)
    """Forms that it rendered."""


@dataclass
class ChatTemplate:
    """A chat template that renders conversations and finds the assistant turns in them."""

    render: Render
    render_generations: Callable[[Sequence[Turn], Sequence[Tool]], tuple[str, tuple[Span, ...]]] | None = None
    """Renders text and spans, for a template that marks the spans with ``{% generation %}``."""
    render_thinking: Render | None = None
    """Renders as ``render`` does with ``enable_thinking: true``."""
    only_copies_contents: bool = False
    """See ``static_template.only_copies_contents``."""
    mentions_tools: bool = True
    """True if the template's source contains ``tools``. One that does not cannot show any."""
    eos: str = ""
    """The token that ends a text."""
    images: ImageWords | None = None
    """What it writes for images, if the model takes any. ``MEDIUM`` stands for it in everything that is rendered here."""
    _static_templates: dict[tuple[str, ...], StaticTemplate | None] = field(default_factory=dict)

    def render_conversation(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Rendered:
        """Render a conversation, and find what the assistant wrote in it.

        There is a span for each assistant turn, in order. It starts after the generation prompt and ends with the turn's end
        token, without the white space that the template writes after that token.

        The template reads turns and tools as their record has them. If it refuses them or leaves something out, it reads them as
        raysft normalizes them. Tools and calls become text only if the template shows no trace of them.

        Raises:
            ValueError: a span is not certain, or the template leaves out what it must show.
            Exception: anything the template raises.
        """
        attempts = _Attempts()
        for given in template_inputs(messages, tools):
            if rendered := self._attempt(given, attempts):
                return rendered
        omission = attempts.omission or self._omission_up_to_first_call(given)
        if not omission:
            raise attempts.error or ValueError(f"the chat template ignores the conversation; {REMEDY}")
        given = attempts.rendered[0] if attempts.rendered else given
        if omission.fits_in_text:
            given = with_tools_as_text(given, messages, omission)
            attempts = _Attempts()
            if rendered := self._attempt(given, attempts):
                return rendered
            if attempts.error:
                raise attempts.error
        if rendered := self._attempt(with_content_parts(given), _Attempts()):
            return rendered
        if omission.fits_in_text:
            raise ValueError(
                "the chat template renders neither tools nor a system turn that could describe them; set model.chat_template "
                "to one that does"
            )
        return self._without_omitted_turns(given)

    def _attempt(self, given: TemplateInput, attempts: _Attempts) -> Rendered | None:
        """Render one form; None if the template refuses it or leaves something out."""
        copies = self.only_copies_contents and given.is_plain_text
        if copies and (given.has_calls or given.tools) and not (given.tools and self.mentions_tools):
            attempts.omission = Omission(tools=bool(given.tools), calls=given.has_calls)  # it reads no other keys
            return None
        try:
            if copies and not given.tools and (static := self._static_template(given.roles)):
                return Rendered(*static.fill([turn["content"] for turn in given.turns]), given)
            text, spans = self._render(given)
        except Exception as error:  # a template may raise any error
            attempts.error = attempts.error or error
            return None
        if not given.may_be_omitted:
            spans = spans or self._span_finder.find_only_answer(given.turns, text)
            if spans:
                return Rendered(text, spans, given)
        marked = render_with_markers(self.render, given.turns, given.tools, text)
        attempts.omission = find_omission(given, marked, text)
        attempts.rendered.append(given)
        return None if attempts.omission else Rendered(text, spans or self._span_finder.find(marked, text), given)

    def _without_omitted_turns(self, given: TemplateInput) -> Rendered:
        """Render a conversation of which the template leaves out turns in every form."""
        text, spans = self._render(given)
        spans = spans or self._span_finder.find(render_with_markers(self.render, given.turns, given.tools, text), text)
        if not any(start < end for start, end in spans):
            raise ValueError(f"the chat template omits what the assistant wrote; {REMEDY}")
        return Rendered(text, spans, given, omits_turns=True)

    def _static_template(self, roles: tuple[str, ...]) -> StaticTemplate | None:
        """Return what the template writes around turns of these roles; None if that is not certain."""
        if roles not in self._static_templates:
            if len(self._static_templates) >= MAX_STATIC_TEMPLATES:
                self._static_templates.clear()
            contents = [f"\uf2b1{index}\uf2b2" for index in range(len(roles))]
            given = TemplateInput(
                tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=True))
            )
            text, _ = self._render(given)
            marked = render_with_markers(self.render, given.turns, (), text)
            self._static_templates[roles] = None
            if not find_omission(given, marked, text):
                spans = self._span_finder.find(marked, text)
                self._static_templates[roles] = StaticTemplate.from_rendering(
                    text, contents, given.assistant_turns, spans
                )
        return self._static_templates[roles]

    def _render(self, given: TemplateInput) -> tuple[str, tuple[Span, ...] | None]:
        """Render text, and spans if the template marks as many generations as there are assistant turns."""
        if self.render_generations:
            text, spans = self.render_generations(given.turns, given.tools)
            return text, spans if len(spans) == len(given.assistant_turns) else None
        return self.render(given.turns, given.tools, False), None

    @property
    def words(self) -> str:
        """What it writes for an image; ``MEDIUM`` itself if the model takes none."""
        return self.images.words if self.images else MEDIUM

    @cached_property
    def thought_words(self) -> ThoughtWords:
        """What the template writes around thoughts."""
        return ThoughtWords.of(self.render, self.render_thinking or self.render)

    @cached_property
    def writes_own_system(self) -> bool:
        """True if the template gives its own system message to conversations that have none."""
        question: Turn = {"role": "user", "content": "\uf2b3"}
        try:
            own = self.render([question], (), False)
            before, _, after = self.render([{"role": "system", "content": "\uf2b4"}, question], (), False).partition(
                "\uf2b4"
            )
        except Exception:  # it has no system turns
            return False
        return len(own) > len(before + after) and own.startswith(before) and own.endswith(after)

    @cached_property
    def _span_finder(self) -> SpanFinder:
        return SpanFinder(self.render, self.eos)

    def _omission_up_to_first_call(self, given: TemplateInput) -> Omission | None:
        """Find what the template leaves out before the end of the first call; it may refuse the result that follows."""
        part = up_to_first_call(given)
        try:
            text, _ = self._render(part)
        except Exception:  # it refuses this too
            return None
        return find_omission(part, render_with_markers(self.render, part.turns, part.tools, text), text)


def tokens_in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return for each token whether it lies inside one of the spans.

    Args:
        offsets: [start, end) of each token, in characters, in order.
        spans: [start, end) in characters, in order.

    >>> tokens_in_spans([(0, 2), (2, 4), (4, 6)], [(2, 6)])
    [False, True, True]
    """
    inside = []
    number = 0
    for start, end in offsets:
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        inside.append(number < len(spans) and spans[number][0] <= start and end <= spans[number][1] and end > start)
    return inside
