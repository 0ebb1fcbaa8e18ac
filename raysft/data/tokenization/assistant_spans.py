"""Conversations → the text that the chat template makes of them, and which characters the assistant wrote.

The one place that decides masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from raysft.data.tokenization.markers import Render, Tool, Turn, look
from raysft.data.tokenization.span_search import REMEDY, Bounds, Span
from raysft.data.tokenization.static_template import Skeleton
from raysft.data.tokenization.template_inputs import Form, Hidden, before_answers, forms, hidden, in_parts, written
from raysft.data.types import Message

SKELETONS = 1000
"""Orders of roles that are remembered at most."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]
    """What the assistant wrote in each of its turns, with the token that ends the turn."""
    form: Form = field(default_factory=lambda: Form(()))
    """What the template was given."""
    left_out: bool = False
    """Whether the template leaves out turns."""


@dataclass
class _Tried:
    """What came of the forms of a conversation."""

    missing: Hidden | None = None
    """What the template hides of the last one that it rendered."""
    refused: Exception | None = None
    """Why it refused one, the first time."""
    rendered: list[Form] = field(default_factory=list)
    """Those that it rendered."""


@dataclass
class ChatTemplate:
    """A chat template, and what it makes of conversations."""

    render: Render
    tracked: Callable[[Sequence[Turn], Sequence[Tool]], tuple[str, tuple[Span, ...]]] | None = None
    """Rendering that knows the spans by itself, for a template that marks them with ``{% generation %}``."""
    plain: bool = False
    """Whether it only writes contents out (``skeleton.only_writes_contents``)."""
    names_tools: bool = True
    """Whether its text names ``tools``; one that does not cannot show any."""
    eos: str = ""
    """The token that ends a text."""
    _skeletons: dict[tuple[str, ...], Skeleton | None] = field(default_factory=dict)

    def rendered(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Rendered:
        """Render a conversation, and find what the assistant wrote in it, turn by turn.

        A turn goes from behind the generation prompt to the end of the token that ends it; white space that the template puts
        behind that token is not part of it. There is a span for each assistant turn, in order.

        The template gets turns and tools as their record has them. Only where it then refuses them or leaves something out does
        it get them as they were read, and only where it shows no trace of tools or calls are these written into the texts.

        Raises:
            ValueError: the place of a turn cannot be told.
            Exception: whatever the template raises.
        """
        tried = _Tried()
        for form in forms(messages, tools):
            if shown := self._shown(form, tried):
                return shown
        missing = tried.missing or self._missing_before_answers(form)
        if not missing:
            raise tried.refused or ValueError(f"the chat template shows nothing of the conversation; {REMEDY}")
        form = tried.rendered[0] if tried.rendered else form
        if missing.as_text:
            form = written(form, messages, missing)
            tried = _Tried()
            if shown := self._shown(form, tried):
                return shown
            if tried.refused:
                raise tried.refused
        if shown := self._shown(in_parts(form), _Tried()):
            return shown
        if missing.as_text:
            raise ValueError(f"the chat template shows no tools, and no system turn that could name them; {REMEDY}")
        return self._partly(form)

    def _shown(self, form: Form, tried: _Tried) -> Rendered | None:
        """A conversation in one form; None where the template refuses it or leaves something out."""
        if self.plain and form.texts and (form.calls or form.tools) and not (form.tools and self.names_tools):
            tried.missing = Hidden(tools=bool(form.tools), calls=form.calls)  # it reads no other keys
            return None
        try:
            if self.plain and form.texts and not form.tools and (skeleton := self._skeleton(form.roles)):
                return Rendered(*skeleton.fill([turn["content"] for turn in form.turns]), form)
            text, spans = self._text(form)
        except Exception as error:  # a template refuses what it does not support with errors of its own
            tried.refused = tried.refused or error
            return None
        if not form.may_be_hidden:
            spans = spans or self._bounds.asked(form.turns, text)
            if spans:
                return Rendered(text, spans, form)
        view = look(self.render, form.turns, form.tools, text)
        tried.missing = hidden(form, view, text)
        tried.rendered.append(form)
        return None if tried.missing else Rendered(text, spans or self._bounds.find(view, text), form)

    def _partly(self, form: Form) -> Rendered:
        """A conversation of which the template leaves out turns in every form."""
        text, spans = self._text(form)
        spans = spans or self._bounds.find(look(self.render, form.turns, form.tools, text), text)
        if not any(start < end for start, end in spans):
            raise ValueError(f"the chat template leaves out what the assistant wrote; {REMEDY}")
        return Rendered(text, spans, form, left_out=True)

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        """What the template writes around turns of these roles."""
        if roles not in self._skeletons:
            if len(self._skeletons) >= SKELETONS:
                self._skeletons.clear()
            contents = [f"\uf2b1{index}\uf2b2" for index in range(len(roles))]
            form = Form(
                tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=True))
            )
            text, _ = self._text(form)
            view = look(self.render, form.turns, (), text)
            self._skeletons[roles] = None
            if not hidden(form, view, text):
                spans = self._bounds.find(view, text)
                self._skeletons[roles] = Skeleton.learn(text, contents, form.answers, spans)
        return self._skeletons[roles]

    def _text(self, form: Form) -> tuple[str, tuple[Span, ...] | None]:
        """The rendering, and the spans where the template marks as many generations as there are assistant turns."""
        if self.tracked:
            text, spans = self.tracked(form.turns, form.tools)
            return text, spans if len(spans) == len(form.answers) else None
        return self.render(form.turns, form.tools, False), None

    @cached_property
    def _bounds(self) -> Bounds:
        return Bounds(self.render, self.eos)

    def _missing_before_answers(self, form: Form) -> Hidden | None:
        """What a template that refuses a conversation hides of its beginning up to the first call; it may mind the answer."""
        part = before_answers(form)
        try:
            text, _ = self._text(part)
        except Exception:  # refused again
            return None
        return hidden(part, look(self.render, part.turns, part.tools, text), text)


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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
