"""Jinja chat templates, rendered as transformers does it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from raysft.config import RequestError
from raysft.data.render import PROBE, ChatTemplate, Rendered
from raysft.data.skeleton import only_writes_contents
from raysft.records import Message


def chat_template(template: str, variables: dict[str, Any], for_tools: bool = False) -> ChatTemplate:
    """A template as Jinja text with its variables, ready to render."""
    import jinja2
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,  # the one that renders, so that both refuse the same
        render_jinja_template,
    )

    try:
        _compile_jinja_template(template)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"the chat template is no valid Jinja (line {error.lineno}: {error.message}); mend it, or "
            "name another in model.chat_template"
        ) from None

    def render(messages: Sequence[Message], tools: Sequence[dict[str, Any]], ask: bool, **options: Any) -> Any:
        return render_jinja_template(
            conversations=[[_plain(message) for message in messages]],
            tools=list(tools) or None,
            chat_template=template,
            add_generation_prompt=ask,
            **options,
            **variables,
        )

    def tracked(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Rendered:
        texts, spans = render(messages, tools, False, return_assistant_tokens_mask=True)
        return Rendered(texts[0], tuple(spans[0]))

    own = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
    return ChatTemplate(
        lambda messages, tools, ask: render(messages, tools, ask)[0][0],
        tracked if own else None,
        plain=not own and only_writes_contents(template),
        shown_tools=(PROBE,) if for_tools else (),
    )


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates know it."""
    calls = {"tool_calls": list(message.tool_calls)} if message.tool_calls else {}
    return {"role": message.role, "content": message.content, **calls, **message.extra}
