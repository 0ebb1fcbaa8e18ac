"""Chat templates in Go's language, for Ollama, against the Jinja templates that they come from."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest

from raysft.config.named_templates import named_template, template_names
from raysft.data.tokenization.go_template import go_template, render_go
from tests.tiny import tiny_tokenizer
from tests.unit.test_thoughts import FORGETFUL, PLAIN, STRIPPING

WORDS = ("What", "is", "{{ .Content }}", "{% if %}", "<|im_end|>", "你好\n\n", "user", "assistant", "\\n", "[INST]")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def renderer(tokenizer, template: str):
    def render(messages: Sequence[dict[str, str]], prompts: bool) -> str:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompts
        )

    return render


def thinking(text: str, thought: str = "So\nit is.") -> str:
    return f"<think>\n{thought}\n</think>\n\n{text}"


def conversation(draw: random.Random) -> list[dict[str, str]]:
    """Up to five questions, the last one without an answer; contents without blanks around them."""
    roles = ["user", "assistant"] * draw.randint(0, 4) + ["user"]
    turns = [{"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 9))).strip()} for role in roles]
    return [{"role": "system", "content": "Be kind,\nplease."}, *turns] if draw.random() < 0.5 else turns


@pytest.mark.parametrize("name", template_names())
def test_every_named_template_has_one_that_renders_alike(tokenizer, name):
    render = renderer(tokenizer, named_template(name))
    template = go_template(render)
    assert template is not None
    draw = random.Random(name)
    for _ in range(6):
        messages = conversation(draw)
        for message in messages:
            if message["role"] == "assistant" and draw.random() < 0.3:
                message["content"] = thinking(message["content"], " ".join(draw.choices(WORDS, k=3)).strip())
        assert render_go(template, messages) == render(messages, True)


def test_a_template_is_written_as_users_of_ollama_write_it(tokenizer):
    assert go_template(renderer(tokenizer, tokenizer.chat_template)) == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
    )


CHAT = [
    ("user", "Hi"),
    ("assistant", thinking("Yes.")),
    ("user", "And?"),
    ("assistant", thinking("No.")),
    ("user", "Why?"),
]


@pytest.mark.parametrize(
    ("template", "wanted", "names_thoughts"),
    [
        (
            FORGETFUL,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
            "<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            True,
        ),
        (
            STRIPPING,
            "<|U|>Hi<|A|>\n\nYes.<|E|><|U|>And?<|A|>\n\nNo.<|E|><|U|>Why?<|A|><think>\n",
            True,
        ),
        (
            PLAIN,
            f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{thinking('Yes.')}<|im_end|>\n"
            f"<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n{thinking('No.')}<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
    ],
)
def test_thoughts_of_earlier_answers_are_kept_or_dropped_as_the_jinja_template_does(
    tokenizer, template, wanted, names_thoughts
):
    render = renderer(tokenizer, template)
    found = go_template(render)
    assert found is not None
    messages = [{"role": role, "content": content} for role, content in CHAT]
    assert render_go(found, messages) == wanted == render(messages, True)
    # Ollama takes the text before and after .Thinking for the marks of a thought.
    assert bool(re.search(r"\}\}<think>\n\{\{ \.Thinking \}\}</think>\s*\{\{ end", found)) == names_thoughts


def test_a_template_that_rewrites_thoughts_has_none(tokenizer):
    shown = LOOP + "<{{ m.role }}>{{ m.content | replace('think>', 'thought>') }}</>{% endfor %}<assistant>"
    assert go_template(renderer(tokenizer, shown)) is None


LOOP = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("template", "sample"),
    [
        # A system prompt is refused.
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
            + LOOP
            + "<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}{% if add_generation_prompt %}<model>{% endif %}",
            "<user>Hi</><model>",
        ),
        # The prompt for an answer opens a thought, which answers in the history do not have.
        (
            LOOP
            + "<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}",
            "<user>Hi</><assistant><think>\n",
        ),
    ],
)
def test_templates_with_one_special_rule(tokenizer, template, sample):
    found = go_template(renderer(tokenizer, template))
    assert found is not None
    assert render_go(found, [{"role": "user", "content": "Hi"}]) == sample


@pytest.mark.parametrize(
    "template",
    [
        LOOP + "{{ loop.index }}{{ m.content }}\n{% endfor %}",
        LOOP + "<{{ m.content | upper }}>{% endfor %}",
        LOOP + "{{ m.content }}{{ m.content }}{% endfor %}",
        LOOP + "{{ '{{ .System }}' }}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{{ missing.attribute.inside }}",
        LOOP + '"""{{ m.content }}{% endfor %}',
        LOOP + "{{ '{' }}{{ m.content }}}{% endfor %}",  # Go would read {{{ as the begin of an action
        LOOP + "{{ m.role }}{{ m.content | length }}{{ m.content }}{% endfor %}",
    ],
)
def test_templates_that_do_more_than_surround_contents_have_none(tokenizer, template):
    assert go_template(renderer(tokenizer, template)) is None
