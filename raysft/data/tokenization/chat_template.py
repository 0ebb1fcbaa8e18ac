"""Jinja chat templates, rendered as transformers does it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from raysft.data.tokenization.assistant_spans import ChatTemplate
from raysft.data.tokenization.markers import Tool, Turn
from raysft.data.tokenization.span_search import Span
from raysft.data.tokenization.static_template import only_writes_contents
from raysft.errors import RequestError


def chat_template(template: str, variables: dict[str, Any]) -> ChatTemplate:
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

    def render(turns: Sequence[Turn], tools: Sequence[Tool], ask: bool, **options: Any) -> Any:
        return render_jinja_template(
            # As apply_chat_template does it: a key without a value is a key that is not there.
            conversations=[[{key: value for key, value in turn.items() if value is not None} for turn in turns]],
            tools=list(tools) or None,
            chat_template=template,
            add_generation_prompt=ask,
            **options,
            **variables,
        )

    def tracked(turns: Sequence[Turn], tools: Sequence[Tool]) -> tuple[str, tuple[Span, ...]]:
        texts, spans = render(turns, tools, False, return_assistant_tokens_mask=True)
        return texts[0], tuple(spans[0])

    own = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
    return ChatTemplate(
        lambda turns, tools, ask: render(turns, tools, ask)[0][0],
        tracked if own else None,
        plain=not own and only_writes_contents(template),
        names_tools="tools" in template,
        eos=str(variables.get("eos_token") or ""),
    )
