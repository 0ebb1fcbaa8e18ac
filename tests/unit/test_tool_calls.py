"""Functions and their calls: from every form in the data to the chat template, or to text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from raysft.config import Source
from raysft.data.sources.formats import to_example
from raysft.data.sources.tool_calls import parse_tools, tool_schemas, tools_as_text
from raysft.data.tokenization.assistant_spans import ChatTemplate
from raysft.data.types import Example, Message

ADD = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def example(record: dict, form: str, **options) -> Example:
    return to_example(record, form, Source.model_validate({"name": "s", "path": "p", **options}), "f:1")


@pytest.mark.parametrize(
    "value", ['[{"name": "add"}]', [{"name": "add"}], [{"type": "function", "function": {"name": "add"}}]]
)
def test_tools_are_lists_or_json_wrapped_or_not(value):
    assert tool_schemas(parse_tools(value)) == ({"type": "function", "function": {"name": "add"}},)


@pytest.mark.parametrize("value", ["", "[]", None, []])
def test_empty_tools_are_allowed(value):
    assert parse_tools(value) == ()


@pytest.mark.parametrize(
    ("value", "reason"), [("{", "JSON"), ("3", "a list of functions"), ([3], "a list of functions")]
)
def test_invalid_tools_are_refused_with_a_reason(value, reason):
    with pytest.raises(ValueError, match=reason):
        parse_tools(value)


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "1 + 1?"},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 1}})},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "It is 2."},
    ],
    "tools": json.dumps([ADD]),
}
OPENAI = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ],
    "tools": [{"type": "function", "function": ADD}],
}
LEGACY = {
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": {"a": 1}}},
        {"role": "function", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ],
    "tools": [ADD],
}


@pytest.mark.parametrize(("record", "form"), [(SHAREGPT, "sharegpt"), (OPENAI, "openai"), (LEGACY, "openai")])
def test_every_form_of_a_call_becomes_the_same(record, form):
    found = example(record, form)
    assert tuple(replace(message, original=None) for message in found.messages) == (
        Message("user", "1 + 1?"),
        Message("assistant", "", (CALL,)),
        Message("tool", "2"),
        Message("assistant", "It is 2."),
    )
    assert tool_schemas(found.tools) == ({"type": "function", "function": ADD},)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "function_call", "value": "add(1)"}, "is a function call and must be JSON"),
        ({"from": "function_call", "value": "[3]"}, "a function with name and arguments"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"function": {}}]}, "a function with name and arguments"),
        (
            {"role": "user", "content": [{"type": "video"}]},
            "has a part of type 'video', but raysft only trains on text and images",
        ),
        ({"role": "assistant", "content": "x", "train": "maybe"}, "train must be true or false, but is 'maybe'"),
    ],
)
def test_invalid_turns_are_refused_with_a_reason(turn, reason):
    with pytest.raises(ValueError, match=reason):
        example({"messages": [{"role": "user", "content": "a"}, turn]}, "openai")


TEXT = json.dumps(CALL["function"])
TAGGED = f"<tool_call>\n{TEXT}\n</tool_call>"


@pytest.mark.parametrize(
    ("content", "said", "calls"),
    [
        (TAGGED, "", 1),
        (f"<think>\nhm\n</think>\n\n{TAGGED}", "<think>\nhm\n</think>\n\n", 1),
        (f"I add: {TAGGED}\n", "I add: ", 1),
        (f"{TAGGED}\n{TAGGED}", "", 2),
        (f"<tool_call>[{TEXT}, {TEXT}]</tool_call>", "", 2),
    ],
)
def test_calls_of_a_function_turn_may_stand_in_tags(content, said, calls):
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": content}]
    found = example({"conversations": turns}, "sharegpt").messages[-1]
    assert (found.content, found.tool_calls) == (said, (CALL,) * calls)


@pytest.mark.parametrize(("content", "said"), [(None, ""), ("", ""), ("Adding.", "Adding."), (TEXT, "")])
def test_a_function_turn_may_have_its_calls_beside_its_content(content, said):
    turns = [{"role": "user", "content": "q"}, {"role": "call", "content": content, "tool_calls": [CALL]}]
    found = example({"messages": turns}, "openai", tags={"function": "call"}).messages[-1]
    assert (found.role, found.content, found.tool_calls) == ("assistant", said, (CALL,))


def test_a_role_that_a_tag_gives_another_meaning_has_it_in_the_template_too():
    turns = [{"role": "assistant", "content": "q", "name": "Ann"}, {"role": "user", "content": "a", "name": "Bob"}]
    tags = {"user": "assistant", "assistant": "user"}
    found = example({"messages": turns}, "openai", tags=tags)
    rendered = ChatTemplate(
        lambda turns, tools, ask: "".join(f"<{m['role']} {m['name']}>{m['content']}" for m in turns)
    )
    assert rendered.render_conversation(found.messages).text == "<user Ann>q<assistant Bob>a"


@pytest.mark.parametrize("turn", [{"role": "system"}, {"role": "system", "content": None}])
def test_a_system_turn_without_content_is_an_empty_one(turn):
    turns = [turn, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert example({"messages": turns}, "openai").messages[0] == Message("system", "")


def test_tags_name_keys_and_roles_of_their_own():
    record = {"dialog": [{"who": "Q", "what": "a"}, {"who": "A", "what": "b"}]}
    tags = {"role": "who", "content": "what", "user": "Q", "assistant": "A"}
    found = example(record, "sharegpt", columns={"conversations": "dialog"}, tags=tags)
    assert found.messages == (Message("user", "a"), Message("assistant", "b"))


def test_turns_that_are_not_to_be_trained_on_are_marked():
    turns = [
        ("user", {}),
        ("assistant", {"train": False}),
        ("user", {}),
        ("assistant", {"weight": 0}),
        ("user", {}),
        ("assistant", {"weight": 1}),
    ]
    record = {"messages": [{"role": role, "content": "x", **extra} for role, extra in turns]}
    assert [m.trainable for m in example(record, "openai").messages if m.role == "assistant"] == [False, False, True]


def test_a_prompt_of_messages_is_not_trained_on():
    record = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    assert [m.trainable for m in example(record, "prompt_completion").messages if m.role == "assistant"] == [
        False,
        True,
    ]


def chatml(messages, tools, ask):
    """A template without support for tools."""
    return "".join(f"<{m['role']}>{m['content']}</>\n" for m in messages) + ("<assistant>" if ask else "")


def test_a_template_without_tools_gets_them_as_text_and_the_call_is_learnt():
    found = example(SHAREGPT, "sharegpt")
    template = ChatTemplate(chatml)
    rendered = template.render_conversation(found.messages, found.tools)
    assert rendered.given.tools_as_text
    assert rendered.given.tools == ()
    assert '"description": "adds"' in rendered.text
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call></>'
    assert [rendered.text[start:end] for start, end in rendered.spans] == [call, "It is 2.</>"]
    assert "<user><tool_response>\n2\n</tool_response></>" in rendered.text


def test_tools_are_appended_to_an_existing_system_turn():
    turns = [
        {"role": role, "content": text} for role, text in (("system", "Be nice."), ("user", "a"), ("assistant", "b"))
    ]
    written = tools_as_text(turns, tool_schemas([ADD]))
    assert [turn["role"] for turn in written] == ["system", "user", "assistant"]
    assert written[0]["content"].startswith("Be nice.\n\n# Tools")


def forgetful(messages, tools, ask):
    """A template that, like Qwen3's, removes the thinking of all turns but the last."""
    text = ""
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant":
            thought, _, said = content.rpartition("</think>")
            content = said if index + 1 < len(messages) else f"<think>{thought.removeprefix('<think>')}</think>{said}"
        text += f"<{message['role']}>{content}</>\n"
    return text + ("<assistant>" if ask else "")


def test_masks_are_right_where_earlier_thinking_is_left_out():
    messages = [
        Message("user", "a"),
        Message("assistant", "<think>hm</think>b"),
        Message("user", "b</>"),
        Message("assistant", "c"),
    ]
    rendered = ChatTemplate(forgetful).render_conversation(messages)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["b</>", "<think></think>c</>"]


def test_a_template_that_shows_contents_in_another_way_is_followed():
    messages = [Message("user", "a"), Message("assistant", "bee"), Message("user", "c"), Message("assistant", "d")]
    rendered = ChatTemplate(lambda *given: chatml(*given).upper()).render_conversation(messages)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["BEE</>", "D</>"]


def test_a_template_that_hides_where_turns_are_is_refused():
    messages = [Message("user", "a"), Message("assistant", "bee"), Message("user", "c"), Message("assistant", "d")]
    with pytest.raises(
        ValueError, match=r"locate assistant turn 1 .*; add \{% generation %\} .* set model\.chat_template$"
    ):
        ChatTemplate(lambda *given: chatml(*given)[::-1]).render_conversation(messages)
