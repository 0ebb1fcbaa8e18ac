"""Jinja chat templates, rendered by transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from raysft.data.tokenization.assistant_spans import ChatTemplate
from raysft.data.tokenization.image_words import ImageWords
from raysft.data.tokenization.markers import Render, Tool, Turn
from raysft.data.tokenization.span_search import Span
from raysft.data.tokenization.static_template import only_copies_contents
from raysft.errors import RequestError
from raysft.models.transformers_internals import compile_chat_template, render_chat_template


def chat_template(template: str, variables: dict[str, Any], image_token: str = "", usual: str = "") -> ChatTemplate:
    """Compile a chat template.

    Args:
        template: Jinja text.
        variables: values of its variables, such as ``eos_token``.
        image_token: token that stands for an image, if the model has a processor.
        usual: what the model's own template writes for one.

    Raises:
        RequestError: the text is not valid Jinja.
    """
    import jinja2

    try:
        compile_chat_template(template)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); fix it, or set model.chat_template"
        ) from None

    def render(turns: Sequence[Turn], tools: Sequence[Tool], add_generation_prompt: bool, **options: Any) -> Any:
        return render_chat_template(
            # apply_chat_template also removes keys without a value.
            conversations=[[{key: value for key, value in turn.items() if value is not None} for turn in turns]],
            tools=list(tools) or None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **{**variables, **options},
        )

    def with_options(**options: Any) -> Render:
        return lambda turns, tools, add_generation_prompt: render(turns, tools, add_generation_prompt, **options)[0][0]

    def render_generations(turns: Sequence[Turn], tools: Sequence[Tool]) -> tuple[str, tuple[Span, ...]]:
        given = images.given(turns) if images else turns
        texts, spans = render(given, tools, False, return_assistant_tokens_mask=True)
        return images.marked_spans(texts[0], spans[0]) if images else (texts[0], tuple(spans[0]))

    marks_generations = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
    plain, thinking = with_options(), with_options(enable_thinking=True)
    images = ImageWords(plain, image_token, usual) if image_token else None
    return ChatTemplate(
        images.render if images else plain,
        render_generations if marks_generations else None,
        ImageWords(thinking, image_token, usual).render if images else thinking,
        only_copies_contents=not marks_generations and only_copies_contents(template),
        mentions_tools="tools" in template,
        eos=str(variables.get("eos_token") or ""),
        images=images,
    )
