"""``data.thinking`` and ``data.default_system``: the texts and labels of LLaMA-Factory, with templates of several kinds."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from raysft.config import Source, parse
from raysft.config.named_templates import named_template
from raysft.data.sources.formats import to_example
from raysft.data.tokenization.tokenized_example import TokenizedExample, TokenizeOptions
from raysft.data.types import IGNORE_INDEX, Rejected
from raysft.models.tokenizer import load_tokenizer
from tests.shards import example_tokenizer

RECORDED = json.loads(Path(__file__).with_name("recorded_thoughts.json").read_text(encoding="utf-8"))
"""Written by ``tests/record_thoughts.py``."""
EMPTY = "<think>\n\n</think>\n\n"
FORGETFUL = (
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content) %}"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}"
    "<think>\n{{ (thought or '').strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% for call in m.tool_calls %}{% if m.content or not loop.first %}\n{% endif %}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Leaves out thoughts before the last question, and writes an empty one into the last turn, as Qwen3 does."""
STRIPPING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|U|>{{ m.content }}{% elif m.role == 'assistant' %}<|A|>"
    "{{ m.content.split('</think>')[-1] }}<|E|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|A|><think>\n{% endif %}"
)
"""Leaves out all thoughts, and its generation prompt opens one, as DeepSeek-R1 does."""
ALWAYS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "<think>{% if loop.last %}{{ m.reasoning_content or '' }}{% endif %}</think>{{ '\n' }}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}{{ '\n<think></think>\n' }}{% endif %}{% endif %}"
)
"""Writes an empty thought into all other turns, as GLM-4.5 does."""
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""Writes thoughts as messages of another channel, as gpt-oss does."""
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Knows no thoughts."""


@pytest.fixture(scope="module")
def encode(tokenizer_with):
    """Return a conversation's text, the parts of it that are trained, and its prompt."""

    def encode(template: str, messages: list[dict[str, Any]], tools: Any = (), **options: Any) -> Any:
        folder = tokenizer_with(chat_template=template)
        tokenizer = example_tokenizer(folder, **{"sequence_length": 4096, "with_prompts": True, **options})
        source = Source.model_validate({"name": "s", "path": "p"})
        record = {"messages": messages, **({"tools": tools} if tools else {})}
        (item,) = tokenizer([to_example(record, "openai", source, "f:1")])
        if isinstance(item, Rejected):
            return item
        assert isinstance(item, TokenizedExample)
        decode = load_tokenizer(folder).decode
        runs = itertools.groupby(range(len(item.labels)), lambda index: item.labels[index] != IGNORE_INDEX)
        trained = [decode(item.input_ids[list(run)]) for on, run in runs if on]
        assert decode(item.prompt_ids) == item.prompt
        return decode(item.input_ids), trained, item.prompt

    return encode


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(contents)]


def as_reasoning(messages: list[dict[str, Any]], key: str = "reasoning_content") -> list[dict[str, Any]]:
    """Move thoughts from the contents to a key of their own."""
    moved = []
    for turn in messages:
        thought, tag, content = turn["content"].partition("</think>")
        thought = thought.removeprefix("<think>").strip("\n")
        moved.append({**turn, "content": content.lstrip("\n"), key: thought} if tag and thought else turn)
    return moved


MODES = [
    # mask_history, enable_thinking, preserve_thinking → data.thinking
    *(
        (mask, thinking, keep, "empty")
        for mask in (False, True)
        for thinking in (True, False, None)
        for keep in (True,)
    ),
    *((False, thinking, False, "empty") for thinking in (True, False, None)),
    *((True, thinking, False, "last") for thinking in (True, False, None)),
]


@pytest.mark.parametrize(
    ("template", "mask_history", "enable_thinking", "preserve_thinking", "thinking"),
    [
        *((template, *mode) for template in ("own", "by name") for mode in MODES),
        ("own", True, True, False, "template"),
        *(("by name", False, thinking, False, "template") for thinking in (True, False, None)),
        *(("by name", True, thinking, True, "keep") for thinking in (True, None)),
    ],
)
@pytest.mark.parametrize("form", ["content", "reasoning_content"])
def test_texts_and_labels_are_those_of_llamafactory(
    encode, template, form, mask_history, enable_thinking, preserve_thinking, thinking
):
    asked = {"mask_history": mask_history, "enable_thinking": enable_thinking, "preserve_thinking": preserve_thinking}
    (recorded,) = [mode["cases"] for mode in RECORDED["thoughts"] if asked.items() <= mode.items()]
    for name, contents in RECORDED["conversations"].items():
        if enable_thinking is None and name == "multi, empty thought":
            continue  # the template's prompt has it, so that it is not trained
        messages = turns(*contents) if form == "content" else as_reasoning(turns(*contents))
        text, trained, prompt = encode(
            FORGETFUL if template == "own" else named_template("qwen3"),
            messages,
            mask_history=mask_history,
            thinking=thinking,
            template_options={} if enable_thinking is True else {"enable_thinking": enable_thinking},
        )
        expected, labelled = recorded[name]
        assert text == expected, name
        assert trained == [part.removesuffix("\n") for part in labelled], (
            name
        )  # a line break after a turn is not trained
        if enable_thinking is False or not ("</think>" in contents[-1] and enable_thinking is None):
            assert prompt == text[: text.rindex(trained[-1])], name


THOUGHTFUL = turns("a?", "<think>\nx\n</think>\n\nA", "b?", "B", "c?", "<think>\nz\n</think>\n\nC")


@pytest.mark.parametrize("form", ["content", "reasoning_content", "thinking"])
@pytest.mark.parametrize("name", ["stripping", "always", "channels", "plain"])
def test_every_kind_of_template_keeps_thoughts(encode, name, form):
    messages = THOUGHTFUL if form == "content" else as_reasoning(THOUGHTFUL, form)
    template, text, trained = {
        "stripping": (
            STRIPPING,
            "<|U|>a?<|A|><think>\nx\n</think>\n\nA<|E|><|U|>b?<|A|>B<|E|><|U|>c?<|A|><think>\nz\n</think>\n\nC<|E|>",
            ["x\n</think>\n\nA<|E|>", "B<|E|>", "z\n</think>\n\nC<|E|>"],
        ),
        "always": (
            ALWAYS,
            "<|user|>\na?<|assistant|>\n<think>x</think>\nA<|user|>\nb?<|assistant|>\n<think></think>\nB"
            "<|user|>\nc?<|assistant|>\n<think>z</think>\nC",
            ["\n<think>x</think>\nA", "\n<think></think>\nB", "\n<think>z</think>\nC"],
        ),
        "channels": (
            CHANNELS,
            "<|start|>user<|message|>a?<|end|><|start|>assistant<|channel|>analysis<|message|>x<|end|>"
            "<|start|>assistant<|channel|>final<|message|>A<|end|><|start|>user<|message|>b?<|end|>"
            "<|start|>assistant<|channel|>final<|message|>B<|end|><|start|>user<|message|>c?<|end|>"
            "<|start|>assistant<|channel|>analysis<|message|>z<|end|>"
            "<|start|>assistant<|channel|>final<|message|>C<|return|>",
            [
                "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>A",
                "<|channel|>final<|message|>B",
                "<|channel|>analysis<|message|>z<|end|><|start|>assistant<|channel|>final<|message|>C<|return|>",
            ],
        ),
        "plain": (
            PLAIN,
            "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n<think>\nx\n</think>\n\nA<|im_end|>\n"
            "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
            "<|im_start|>user\nc?<|im_end|>\n<|im_start|>assistant\n<think>\nz\n</think>\n\nC<|im_end|>\n",
            ["<think>\nx\n</think>\n\nA<|im_end|>", "B<|im_end|>", "<think>\nz\n</think>\n\nC<|im_end|>"],
        ),
    }[name]
    result = encode(template, messages, thinking="keep")
    assert result[:2] == (text, trained)
    assert result[2] == text.removesuffix(trained[-1]).rstrip("\n") or text.startswith(result[2] + trained[-1])


@pytest.mark.parametrize(
    ("template", "options", "trained", "end_of_prompt"),
    [
        (STRIPPING, {}, ["\n</think>\n\nA<|E|>"], "a?<|A|><think>\n"),
        (STRIPPING, {"enable_thinking": False}, ["A<|E|>"], f"a?<|A|>{EMPTY}"),
        (ALWAYS, {}, ["\n<think></think>\nA"], "a?<|assistant|>"),
        (ALWAYS, {"enable_thinking": False}, ["A"], "a?<|assistant|>\n<think></think>\n"),
        (PLAIN, {}, [f"{EMPTY}A<|im_end|>"], "<|im_start|>assistant\n"),
        (PLAIN, {"enable_thinking": False}, ["A<|im_end|>"], f"<|im_start|>assistant\n{EMPTY}"),
    ],
)
def test_empty_thoughts_are_trained_or_part_of_the_prompt(encode, template, options, trained, end_of_prompt):
    found = encode(template, turns("a?", "A"), thinking="empty", template_options=options)
    assert found[1] == trained
    assert found[2].endswith(end_of_prompt)
    assert found[0].startswith(found[2] + trained[0])


CALL = {"id": "abcde1234", "type": "function", "function": {"name": "add", "arguments": {"n": "one"}}}
ADD = {"type": "function", "function": {"name": "add", "description": "adds things", "parameters": {"type": "object"}}}


def test_turns_with_calls_have_the_words_that_the_template_itself_writes(encode):
    calling = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "", "reasoning_content": "x", "tool_calls": [CALL]},
        {"role": "tool", "content": "one", "tool_call_id": "abcde1234"},
        {"role": "assistant", "content": "A", "reasoning_content": "y"},
    ]
    # Every turn is after the last question, so that the template itself keeps all thoughts.
    own = encode(FORGETFUL, calling, [ADD])
    assert "<think>\nx\n</think>\n\n<tool_call>" in own[0]
    assert encode(FORGETFUL, calling, [ADD], thinking="keep") == own
    later = [*calling, *turns("b?", "B")]
    text, trained, _ = encode(FORGETFUL, later, [ADD], thinking="keep")
    assert text.startswith(own[0])
    assert trained[:2] == own[1]


def test_nothing_changes_without_thoughts(encode):
    messages = turns("a?", "A", "b?", "B")
    for template in (FORGETFUL, STRIPPING, ALWAYS, CHANNELS, PLAIN):
        assert encode(template, messages, thinking="keep") == encode(template, messages)


def test_control_tokens_in_kept_thoughts_are_escaped(encode):
    messages = turns("a?", "<think>\nx <|im_end|>\n</think>\n\nA", "b?", "B")
    _, trained, _ = encode(FORGETFUL, messages, thinking="keep", control_tokens="escape")
    assert trained[0] == "<think>\nx <|im_end|>\n</think>\n\nA<|im_end|>"


SEVERAL = "<think>\nOne.\n</think>\n\nTwo <think>\nhm\n</think>\n\nthree<think>\n\n</think>\n\n."
"""An answer with thoughts in its middle."""
NOT_FIRST = "Two <think>\nhm\n</think>\n\nthree."


@pytest.mark.parametrize("template", [FORGETFUL, named_template("qwen3")], ids=["own", "by name"])
@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize("contents", [[SEVERAL, "six."], [NOT_FIRST, SEVERAL], ["Yes.", NOT_FIRST]])
def test_without_thinking_an_answer_loses_all_of_its_thoughts(encode, template, mask_history, contents):
    thinking = "last" if mask_history else "empty"
    options = {"thinking": thinking, "mask_history": mask_history, "template_options": {"enable_thinking": False}}
    asked = [turns("One?", one, "Two?", other) for one, other in (contents, map(spoken, contents))]
    found, expected = (encode(template, each, **options) for each in asked)
    assert found == expected


def test_thoughts_of_earlier_turns_are_left_out_wherever_they_stand(encode):
    options = {"thinking": "last", "mask_history": True}
    found, expected = (
        encode(named_template("qwen3"), turns("One?", first, "Two?", "<think>\nSo.\n</think>\n\nsix."), **options)
        for first in (NOT_FIRST, spoken(NOT_FIRST))
    )
    assert found == expected
    assert "hm" not in found[0]
    assert "So." in found[0]  # the last turn keeps its own


def spoken(content: str) -> str:
    """An answer as LLaMA-Factory leaves it: each thought between its words goes, and line breaks at the beginning."""
    return re.sub("<think>\n.*?\n</think>\n\n", "", content, flags=re.DOTALL).lstrip("\n")


@pytest.mark.parametrize("recorded", RECORDED["texts"], ids=lambda case: f"{case['template']}, {case['case']}")
def test_default_system_is_that_of_llamafactory(encode, recorded):
    system, default = RECORDED["systems"][recorded["case"]]
    messages = [*([{"role": "system", "content": system}] if system else []), *turns("Hi", "Hello!")]
    text, _, prompt = encode(named_template(recorded["template"]), messages, default_system=default)
    assert text.rstrip().replace("<|eos|>", "<|im_end|>") == recorded["text"].rstrip()
    assert text.startswith(prompt.removesuffix(EMPTY))


OWN_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nI am a model.<|im_end|>\n{% endif %}" + PLAIN


@pytest.mark.parametrize(
    ("template", "default", "text"),
    [
        (OWN_SYSTEM, None, "<|im_start|>system\nI am a model.<|im_end|>\n"),
        (OWN_SYSTEM, "Be brief.", "<|im_start|>system\nBe brief.<|im_end|>\n"),
        (OWN_SYSTEM, "", "<|im_start|>system\n<|im_end|>\n"),
        (PLAIN, "", ""),
        (PLAIN, "Be brief.", "<|im_start|>system\nBe brief.<|im_end|>\n"),
    ],
)
def test_default_system_replaces_that_of_a_template(encode, template, default, text):
    for empty in ([], [{"role": "system", "content": ""}]):
        if empty and default is None:
            continue
        found = encode(template, [*empty, *turns("a?", "A")], default_system=default)
        if not (empty and default == ""):
            assert found[0].startswith(text + "<|im_start|>user\n")
            assert found[2] == found[0][: found[0].index("A<|im_end|>")]


CALLING_CHANNELS = CHANNELS.replace("<|channel|>final{% endif %}", "{% if m.tool_calls %} to={{ m.tool_calls[0].function.name }}"
    "<|channel|>call{% else %}<|channel|>final{% endif %}{% endif %}").replace(
    "{{ m.content }}", "{{ m.tool_calls[0].function.arguments | tojson if m.tool_calls else m.content }}"
)  # fmt: skip


def test_a_record_is_rejected_where_the_place_of_a_thought_is_not_certain(encode):
    calling = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "", "thinking": "x", "tool_calls": [CALL]},
        {"role": "tool", "content": "one", "tool_call_id": "abcde1234"},
        {"role": "assistant", "content": "A"},
    ]
    rejected = encode(CALLING_CHANNELS, calling, thinking="keep")
    assert isinstance(rejected, Rejected)
    assert rejected.reason.startswith(
        "cannot tell where the chat template writes the reasoning of a turn with tool calls; "
    )
    assert not isinstance(encode(CALLING_CHANNELS, calling), Rejected)


def test_options_come_from_the_config():
    data = {"train": [{"name": "a", "path": "a"}], "default_system": "", "thinking": "last"}
    options = TokenizeOptions.of(parse({"model": {"path": "m"}, "data": data}), with_prompts=False)
    assert (options.default_system, options.thinking) == ("", "last")
