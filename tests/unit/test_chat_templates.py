"""Chat templates of every kind: ids match the template, and the assistant turns are located or the record is rejected."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from raysft.config import Source
from raysft.data.sources.formats import to_example
from raysft.data.tokenization.span_search import REMEDY
from raysft.data.tokenization.tokenize import ExampleTokenizer
from raysft.data.tokenization.tokenized_example import TokenizedExample
from raysft.data.types import IGNORE_INDEX, Rejected
from raysft.models.tokenizer import load_tokenizer
from tests.shards import example_tokenizer

END = "<|im_end|>"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALL = {"id": "abcde1234", "type": "function", "function": {"name": "add", "arguments": {"city": "Rome"}}}
NUMBERS = {"id": "abcde1234", "type": "function", "function": {"name": "add", "arguments": {"n": 1}}}
ADD = {"type": "function", "function": {"name": "add", "description": "adds things", "parameters": {"type": "object"}}}


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


CHAT = turns(("user", "one?"), ("assistant", "Two."), ("user", "three"), ("assistant", "four"))
CALLING = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": 'two\n"lines"', "tool_call_id": "abcde1234"},
    {"role": "assistant", "content": "four"},
]
SHOWN_CALL = json.dumps(CALL["function"])


@pytest.fixture(scope="module")
def load_tokenizers(tokenizer_with):
    """Load the tiny tokenizer with a chat template, as an ExampleTokenizer and as transformers has it."""

    def load(template: str | dict[str, str], **options: Any) -> tuple[ExampleTokenizer, Any]:
        folder = tokenizer_with(chat_template=template)
        given = {"sequence_length": 4096, "with_prompts": True, **options}
        return example_tokenizer(folder, **given), load_tokenizer(folder)

    return load


def tokenized(tokenizer: ExampleTokenizer, record: dict[str, Any]) -> TokenizedExample | Rejected:
    source = Source.model_validate({"name": "s", "path": "p"})
    (item,) = tokenizer([to_example(record, "openai", source, "f:1")])
    return item  # type: ignore[return-value]


def trained_text(
    load_tokenizers, template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> str:
    """Return the text that the labels cover, after checking the ids against the record's own messages and tools."""
    tokenizer, hugging_face = load_tokenizers(template)
    item = tokenized(tokenizer, {"messages": messages, "tools": tools})
    assert isinstance(item, TokenizedExample), item
    assert "tools_as_text" not in dict(item.counts)
    assert item.input_ids.tolist() == hugging_face.apply_chat_template(messages, tools=tools, return_dict=False)
    on = item.labels != IGNORE_INDEX
    assert (item.labels[on] == item.input_ids[on]).all()
    return hugging_face.decode(item.input_ids[on].tolist())


LOOP = "{% for m in messages %}"
MINDS_IDS = (
    LOOP + "{% if m.role == 'user' %}[U] {{ m.content }} [/U]"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}"
    "[R] {{ m.tool_call_id }} {{ m.content }} [/R]"
    "{% elif m.tool_calls %}[C]{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}"
    " {{ c.function | tojson }} {{ c.id }}{% endfor %}{{ eos_token }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ANSWERS_AS_JSON = (
    LOOP + "{% if m.role == 'tool' %}<|im_start|>tool\n{{ m.content | tojson }}<|im_end|>\n"
    "{% elif m.tool_calls %}<|im_start|>assistant\n{{ m.tool_calls[0].function | tojson }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endif %}{% endfor %}" + ASK
)
GROUPED = (
    LOOP + "{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.tool_calls %}<|im_start|>assistant{% for c in m.tool_calls %}\n{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
FORGETFUL = (
    LOOP + "{% set last = loop.last %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content if last else m.content.split('</think>')[-1].lstrip() }}"
    "<|im_end|>\n{% else %}" + TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
THOUGHTFUL = [
    *turns(("user", "one?"), ("assistant", "<think>hm</think>\nTwo."), ("user", "three")),
    {"role": "assistant", "content": "four", "reasoning_content": "so\nfar"},
]
KINDS = {
    "ids": (MINDS_IDS, CALLING, f"[C] {SHOWN_CALL} abcde1234{END} four{END}"),
    "answers as JSON": (ANSWERS_AS_JSON, CALLING, f"{SHOWN_CALL}{END}four{END}"),
    "turns as JSON": (
        LOOP + "{{ m | tojson }}<|im_end|>\n{% endfor %}",
        CALLING,
        "".join(json.dumps(CALLING[turn]) + END for turn in (1, 3)),
    ),
    "something behind the last turn": (
        LOOP + TURN + "{% endfor %}{{ '<|pad|>' if not add_generation_prompt }}" + ASK,
        CHAT,
        f"Two.{END}four{END}\n<|pad|>",
    ),
    "capitals": (
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content | upper | trim }}<|im_end|>\n{% endfor %}" + ASK,
        CHAT,
        f"TWO.{END}FOUR{END}",
    ),
    "numbered turns": (
        LOOP + "<{{ loop.index }}>{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<{{ messages | length + 1 }}>assistant: {% endif %}",
        CHAT,
        f"Two.{END}four{END}",
    ),
    "lengths": (
        LOOP + "{{ m.role }} ({{ m.content | length }}): {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}",
        CHAT,
        f"(4): Two.{END}(4): four{END}",
    ),
    "words that it looks for": (
        LOOP + "<|im_start|>{{ m.role }}{{ ' (asks)' if 'one' in m.content }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK,
        CHAT,
        f"Two.{END}four{END}",
    ),
    "merged turns": (
        LOOP + "{% if loop.first or m.role != messages[loop.index0 - 1].role %}"
        "<|im_start|>{{ m.role }}\n{% endif %}"
        "{{ m.content }}{% if loop.last or m.role != messages[loop.index0 + 1].role %}<|im_end|>{% endif %}\n{% endfor %}" + ASK,
        [*CHAT[:2], *turns(("assistant", "and"), *[(turn["role"], turn["content"]) for turn in CHAT[2:]])],
        f"Two.and{END}four{END}",
    ),
    "forgotten thoughts": (FORGETFUL, THOUGHTFUL, f"Two.{END}so\nfar\n</think>\n\nfour{END}"),
    "a system turn of its own": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe nice.<|im_end|>\n{% endif %}"
        + LOOP + TURN + "{% endfor %}" + ASK,
        CHAT,
        f"Two.{END}four{END}",
    ),
    "answers in one user turn": (
        GROUPED,
        [CALLING[0], {**CALLING[1], "tool_calls": [CALL, CALL]}, CALLING[2], *CALLING[2:]],
        f"{SHOWN_CALL}{SHOWN_CALL}{END}four{END}",
    ),
    "a call of numbers": (
        GROUPED,
        [CALLING[0], {**CALLING[1], "tool_calls": [NUMBERS]}, *CALLING[2:]],
        f"{json.dumps(NUMBERS['function'])}{END}four{END}",
    ),
    "no token ends a turn": (LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}" + ASK, CHAT, "Two.four"),
    "closed where others follow": (
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}" + ASK,
        CHAT,
        f"Two.{END}four",
    ),
    "a word that others are announced by": (
        LOOP + "{% if m.role == 'user' %}Round {{ loop.index0 // 2 }}: {% endif %}{{ m.content }}\n{% endfor %}",
        CHAT,
        "Two.four",
    ),
    "always asks": (
        LOOP + "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n<|im_start|>assistant\n"
        "{% else %}{{ m.content }}<|im_end|>\n{% if loop.last %}<|im_start|>assistant\n{% endif %}{% endif %}{% endfor %}",
        CHAT,
        f"Two.{END}four{END}",
    ),
    "arguments are text": (
        LOOP + "{% if m.tool_calls %}<|im_start|>assistant\n{{ 'call ' + m.tool_calls[0].function.arguments }}<|im_end|>\n"
        "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK,
        [CALLING[0], {**CALLING[1], "tool_calls": [{"function": {"name": "add", "arguments": '{"city":"Rome"}'}}]}, *CALLING[2:]],
        f'call {{"city":"Rome"}}{END}four{END}',
    ),
    "parts": (
        LOOP + "<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }} {% endfor %}<|im_end|>\n{% endfor %}" + ASK,
        [{**turn, "content": [{"type": "text", "text": turn["content"]}, {"type": "text", "text": "!"}]} for turn in CHAT],
        f"Two. ! {END}four ! {END}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_assistant_turns_are_found_for_every_kind_of_template(load_tokenizers, kind):
    template, messages, expected = KINDS[kind]
    assert trained_text(load_tokenizers, template, messages) == expected


def test_a_record_that_the_template_refuses_is_rejected_with_the_templates_message(load_tokenizers):
    tokenizer, _ = load_tokenizers(MINDS_IDS)
    without = [{key: value for key, value in turn.items() if key != "tool_call_id"} for turn in CALLING]
    item = tokenized(tokenizer, {"messages": without})
    assert isinstance(item, Rejected)
    assert item.reason.endswith("rejects the conversation (ids have 9 letters)")


BRACKETS = (
    LOOP + "{% if m.role == 'user' %}[U]{{ m.content | string }}[/U]"
    "{% elif m.role == 'assistant' %}{{ m.content | string }}{{ eos_token }}{% endif %}{% endfor %}"
)
ALWAYS_ASKS = (
    LOOP
    + "{% if m.role == 'user' %}[U]{{ m.content | string }}[/U]<|assistant|>{% else %}{{ m.content | string }}<|end|>"
    "{% if loop.last %}<|assistant|>{% endif %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        # The same characters between the same letters, which others wrote or the template did.
        (BRACKETS, [("ask", "b"), ("ask[/U]", "b"), ("ask", "[/U]b"), ("ask", "b"), ("", "b")]),
        (BRACKETS, [("ask", "[/U]b"), ("ask[/U]", "b"), ("ask", "b"), ("[/U]", "b[/U]"), ("ask", "b")]),
        (ALWAYS_ASKS, [("ask", "b"), ("ask", f"b{END}")]),
        (ALWAYS_ASKS, [("ask", f"b{END}"), ("ask", f"b..{END}  ")]),
    ],
)
def test_contents_that_read_like_the_template_are_told_apart_from_it(load_tokenizers, template, answers):
    messages = turns(*(pair for ask, answer in answers for pair in (("user", ask), ("assistant", answer))))
    end = END if template == BRACKETS else "<|end|>"
    assert trained_text(load_tokenizers, template, messages) == "".join(f"{answer}{end}" for _, answer in answers)


HEAD = "<|im_start|>{{ m.role }}\n{{ m.content | string }}<|end|>\n"


@pytest.mark.parametrize("asks", ["<|im_start|>assistant\n{{ '' }}", "<|im_start|>assistant\n<think>\n{{ '' }}"])
@pytest.mark.parametrize(
    "messages",
    [CHAT, [*CHAT, *turns(("assistant", "and five"))], [*CHAT[:2], *turns(("assistant", "or 2")), *CHAT[2:]], CHAT[:2]],
)
@pytest.mark.parametrize("begin", ["", "{{ bos_token }}", "{{ bos_token }}<|im_start|>system\nBe nice.<|end|>\n"])
def test_a_generation_prompt_after_the_last_turn_belongs_to_no_turn(load_tokenizers, asks, messages, begin):
    """The next turn begins in the same way, so that this text is the same whether the turn is the last or not."""
    expected = "".join(f"{turn['content']}<|end|>" for turn in messages if turn["role"] == "assistant")
    assert trained_text(load_tokenizers, begin + LOOP + HEAD + "{% endfor %}" + asks, messages) == expected


def test_a_call_is_found_without_markers_in_it_or_in_its_turns_content(load_tokenizers):
    """The template shows every question that equals the last one, and both do."""
    template = (
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}" + LOOP
        + "{% if m.role == 'user' %}{{ '[TOOLS]' if m == asked[-1] }}[U]{{ m.content }}[/U]{% elif m.tool_calls %}"
        "{{ m.tool_calls[0].function | tojson }}{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )  # fmt: skip
    messages = [*CALLING[:1], {**CALLING[1], "content": "hm"}, *CALLING[2:], *CALLING]
    messages = [turn for turn in messages if turn["role"] != "tool"]
    assert trained_text(load_tokenizers, template, messages) == f"{SHOWN_CALL}{END}four{END}{SHOWN_CALL}{END}four{END}"


@pytest.mark.parametrize("sign", ['"', "\\", "'", ' "\\"', "\n", "-", "\U00017000", "\uffff"])
def test_arguments_with_characters_that_quoting_changes_do_not_hide_the_turns(load_tokenizers, sign):
    """The last turn begins as no other turn does, so that only markers can locate its content."""
    template = (
        LOOP + "{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ '<think></think>' if loop.last }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% else %}" + TURN + "{% endif %}"
        "{% endfor %}" + ASK
    )  # fmt: skip
    function = {"name": "split", "arguments": {"text": "a b", "at": [sign]}}
    messages = [CALLING[0], {**CALLING[1], "tool_calls": [{**CALL, "function": function}]}, *CALLING[2:]]
    assert (
        trained_text(load_tokenizers, template, messages)
        == f"{json.dumps(function, ensure_ascii=False)}{END}<think></think>four{END}"
    )


def test_an_only_answer_that_contains_the_question_is_refused(load_tokenizers):
    quoting = (
        LOOP
        + "<|im_start|>{{ m.role }}\n{{ '> ' + loop.previtem.content if loop.previtem }}\n{{ m.content }}<|im_end|>\n"
    )
    tokenizer, _ = load_tokenizers(quoting + "{% endfor %}" + ASK)
    item = tokenized(tokenizer, {"messages": turns(("user", "ab"), ("assistant", "b"))})
    assert isinstance(item, Rejected)
    assert "turn 0 inside an assistant turn" in item.reason
    assert item.reason.endswith("; " + REMEDY)


def test_a_question_that_a_template_leaves_out_before_the_only_answer_is_counted(load_tokenizers):
    no_system = LOOP + "{% if m.role != 'system' or loop.first %}" + TURN + "{% endif %}{% endfor %}" + ASK
    tokenizer, _ = load_tokenizers(no_system)
    for contents, counts in [(("Be nice", "one"), {"turns_left_out": 1}), (("", "one"), {})]:
        system, asked = contents
        messages = turns(("user", "hi"), ("system", system), ("user", asked), ("assistant", "Two."))
        item = tokenized(tokenizer, {"messages": messages})
        assert isinstance(item, TokenizedExample)
        assert dict(item.counts) == counts


AS_JSON = (
    LOOP
    + "{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
    + "<|im_end|>{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
)
JOINED = AS_JSON.replace("m.tool_calls | tojson", "m.tool_calls[0].function.arguments")
AS_PYTHON = AS_JSON.replace("m.tool_calls | tojson", "m.tool_calls")


@pytest.mark.parametrize(
    ("template", "arguments", "counted"),
    [
        (AS_JSON, '{"city": "Röm"}', True),
        (AS_PYTHON, '{"city": "Rome"}', True),
        (AS_JSON, {"city": "Rome"}, False),
        (AS_PYTHON, {"city": "Rome"}, False),
        (JOINED, '{"city": "Rome"}', False),
        (AS_JSON, "to Rome", False),  # not an object that the template could encode once
    ],
)
def test_double_encoded_arguments_are_kept_as_the_template_writes_them_and_counted(
    load_tokenizers, template, arguments, counted
):
    tokenizer, hugging_face = load_tokenizers(template)
    call = {"id": "abcde1234", "type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [CALLING[0], {**CALLING[1], "tool_calls": [call]}, *CALLING[2:]]
    item = tokenized(tokenizer, {"messages": messages})
    assert isinstance(item, TokenizedExample), item
    assert item.input_ids.tolist() == hugging_face.apply_chat_template(messages, return_dict=False)
    assert dict(item.counts) == ({"quoted_arguments": 1} if counted else {})


FEW = LOOP + "{% if loop.revindex <= 2 %}" + TURN + "{% endif %}{% endfor %}" + ASK


def test_turns_that_a_template_leaves_out_have_no_labels_and_are_counted(load_tokenizers):
    tokenizer, hugging_face = load_tokenizers(FEW)
    item = tokenized(tokenizer, {"messages": CHAT})
    assert isinstance(item, TokenizedExample)
    assert dict(item.counts) == {"turns_left_out": 1}
    assert item.input_ids.tolist() == hugging_face.apply_chat_template(CHAT, return_dict=False)
    assert hugging_face.decode(item.input_ids[item.labels != IGNORE_INDEX].tolist()) == f"four{END}"


SPLIT = (
    LOOP
    + "{% if m.role == 'tool' %}{% elif m.tool_calls %}<|im_start|>assistant\n{{ m.tool_calls[0].function | tojson }}"
    "[{{ messages[loop.index0 + 1].content }}]{{ m.content }}<|im_end|>\n{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + ASK
)


def test_a_turn_that_contains_another_is_refused_with_a_remedy(load_tokenizers):
    """Its mask would cover the tool's result."""
    tokenizer, _ = load_tokenizers(SPLIT)
    item = tokenized(tokenizer, {"messages": [CALLING[0], {**CALLING[1], "content": "Now"}, *CALLING[2:]]})
    assert isinstance(item, Rejected)
    for part in ("turn 2 inside an assistant turn", "{% generation %}", "model.chat_template"):
        assert part in item.reason


WITHOUT_TOOLS = (
    LOOP + "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + TURN + "{% endfor %}" + ASK
)


@pytest.mark.parametrize(
    ("template", "tools", "calls"),
    [(WITHOUT_TOOLS, True, True), (LOOP + TURN + "{% endfor %}" + ASK, True, True), (ANSWERS_AS_JSON, True, False)],
)
def test_only_tools_and_calls_that_a_template_leaves_out_become_text_and_that_is_counted(
    load_tokenizers, template, tools, calls
):
    tokenizer, hugging_face = load_tokenizers(template)
    item = tokenized(tokenizer, {"messages": CALLING, "tools": [ADD]})
    assert isinstance(item, TokenizedExample), item
    assert dict(item.counts) == {"tools_as_text": 1}
    text = hugging_face.decode(item.input_ids.tolist())
    assert ("<tools>" in text, "<tool_response>" in text) == (tools, calls)
    assert ('<tool_call>\n{"name": "add"' in text) == calls


ODD = (
    "{{ tools | tojson if tools }}"
    + LOOP
    + "{{ m | tojson }}{{ m.reasoning_content }}{{ m.name }}<|im_end|>\n{% endfor %}",
    "{% for t in tools or [] %}{{ t.name or t.function.name }} {{ t.strict }}{{ t | tojson }}{% endfor %}"
    + LOOP
    + "<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n"
    "{% if m.reasoning_content or m.thinking %}<think>{{ m.reasoning_content or m.thinking }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }} {{ c.function.name }} "
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}]{% endfor %}"
    "{{ m.tool_call_id }}{{ m.mood.now if m.mood }}<|im_end|>\n{% endfor %}" + ASK,
)


def odd_record(seed: int) -> dict[str, Any]:
    """A conversation whose turns, calls and tools have unusual keys."""
    choose = random.Random(seed)
    word = lambda: "".join(choose.choices('abcde é\n"<', k=8)) + choose.choice("xyz")  # noqa: E731
    keys = {
        "reasoning_content": word, "thinking": word, "name": word, "mood": lambda: {"now": word(), "level": choose.random()},
        "weight": lambda: choose.choice([0, 1]), "train": lambda: choose.choice([True, False]), "audio": lambda: None,
    }  # fmt: skip
    odd = lambda: {key: keys[key]() for key in choose.sample(sorted(keys), 3)}  # noqa: E731
    arguments = choose.choice([{"a": word()}, {}, json.dumps({"b": word()}), {"c": [1, {"d": word()}]}])
    call = {"id": word(), "type": "function", "index": 3, "function": {"name": "add", "arguments": arguments}}
    messages = [
        {"content": word(), "role": choose.choice(["system", "developer"]), **odd()},
        {"role": "user", "content": word(), **odd()},
        {
            "role": "assistant",
            **odd(),
            "content": choose.choice([None, word()]),
            "tool_calls": [call] * choose.choice([1, 2]),
        },
        {"role": "tool", "tool_call_id": word(), **odd(), "content": word()},
        {"role": "assistant", "content": word(), **odd(), "train": True, "weight": 1},
    ]
    tools = [{**ADD, "strict": True}, {"name": "flat", "extra": word(), "parameters": {"x-odd": 1}}]
    return {"messages": messages, "tools": choose.choice([tools, tools[:1], None])}


@pytest.mark.parametrize("template", ODD)
def test_a_template_reads_every_key_of_turns_calls_and_tools(load_tokenizers, template):
    """Except those that say how to train on a turn."""
    tokenizer, hugging_face = load_tokenizers(template)
    for seed in range(60):
        record = odd_record(seed)
        item = tokenized(tokenizer, record)
        assert isinstance(item, TokenizedExample), (seed, item)
        shown = [{k: v for k, v in turn.items() if k not in ("train", "weight")} for turn in record["messages"]]
        whole = hugging_face.apply_chat_template(shown, tools=record["tools"], tokenize=True, return_dict=False)
        assert item.input_ids.tolist() == whole
        assert "tools_as_text" not in dict(item.counts)


def test_converted_turns_keep_the_keys_that_a_template_may_read():
    turn = {"from": "gpt", "value": "four", "reasoning_content": "so far", "mood": {"now": "fine"}, "weight": 1}
    record = {"conversations": [{"from": "human", "value": "one?", "name": "Ann"}, turn]}
    example = to_example(record, "sharegpt", Source.model_validate({"name": "s", "path": "p"}), "f:1")
    assert example.messages[0].extra == {"name": "Ann"}
    assert example.messages[1].extra == {"reasoning_content": "so far", "mood": {"now": "fine"}}
