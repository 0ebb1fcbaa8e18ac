"""How trained turns begin and end, as the labels of conversations show it for any template."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from raysft.data.shards.manifest import Manifest
from raysft.data.tokenization.turn_ends import TurnObservation, TurnStatistics, merge_counts, stop_token_ids
from tests.shards import data_config, the_set, write_records, written
from tests.tiny import tiny_tokenizer

ADDED = ["<|endoftext|>", "<|end|>", "<|call|>", "<|return|>"]
CHAT = [["Hi.", "Yo.", "Again.", "Yo yo."]]
HEADER = "<|im_start|>{{ m.role }}\n"


def framed(end: str, prompt: str = "<|im_start|>assistant\n", turn: str = "{{ m.content }}") -> str:
    """A template with an end after each turn and a generation prompt, which marks what the assistant writes."""
    marked = "{% if m.role == 'assistant' %}{% generation %}" + turn + end + "{% endgeneration %}{% else %}"
    return f"{{% for m in messages %}}{HEADER}{marked}{turn}{end}{{% endif %}}{asking(prompt)}"


def asking(prompt: str) -> str:
    return "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"


@pytest.fixture
def tokenizer(tmp_path) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(ADDED, special_tokens=True)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "model")
    return tokenizer


def manifest(folder: Path, template: str, records: list[Any], **data: Any) -> Manifest:
    write_records(folder / "a.jsonl", records)
    model = str(folder / "model")
    return written(the_set(data_config(folder, **{"sequence_length": 256, **data}), model), model, template)


def ended(made: Manifest) -> dict[str, int]:
    return TurnStatistics.of(made.turns).end_tokens


def test_the_end_token_is_the_last_labelled_one_and_not_the_tokenizers_eos(tmp_path, tokenizer):
    template = "{% for m in messages %}" + HEADER + "{{ m.content }}<|end|>\n" + asking("<|im_start|>assistant\n")
    made = manifest(tmp_path, template, CHAT * 3)
    (end,) = stop_token_ids(made.turns)
    assert (end, ended(made)) == (tokenizer.convert_tokens_to_ids("<|end|>"), {"<|end|>": 6})
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(CHAT[0])]
    ids = tokenizer.apply_chat_template(messages, chat_template=template)["input_ids"]
    (row, *_) = pq.read_table(made.shard_paths()[0].local).to_pylist()
    assert row["input_ids"] == ids
    last = [at for at, label in enumerate(row["labels"]) if label != -100 and (row["labels"] + [-100])[at + 1] == -100]
    assert [ids[at] for at in last] == [end, end]
    assert TurnStatistics.of(made.turns) == TurnStatistics(end_tokens={"<|end|>": 6})


def test_calls_and_answers_may_end_with_different_tokens(tmp_path, tokenizer):
    end = "{{ '<|call|>' if m.tool_calls else '<|return|>' if m.role == 'assistant' else '<|end|>' }}"
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    template = framed(
        end, turn="{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
    )
    made = manifest(tmp_path, template, [{"messages": messages}])
    assert ended(made) == {"<|call|>": 1, "<|return|>": 1}
    assert stop_token_ids(made.turns) == tuple(tokenizer.convert_tokens_to_ids(["<|call|>", "<|return|>"]))


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("", TurnStatistics(no_end=2)),
        ("\n", TurnStatistics(no_end=2)),
        ("\n### End\n", TurnStatistics(text_ends=2, end_text="nd")),
        # An added token counts even if white space follows it.
        ("<|end|>\n", TurnStatistics(end_tokens={"<|end|>": 2})),
        ("{% if not loop.last %}<|end|>{% endif %}", TurnStatistics(end_tokens={"<|end|>": 1}, no_end=1)),
    ],
)
def test_turns_that_no_token_ends_are_counted(tmp_path, tokenizer, end, expected):
    made = manifest(tmp_path, framed(end), CHAT)
    assert TurnStatistics.of(made.turns) == expected


def test_an_end_outside_the_generation_markers_is_not_trained(tmp_path, tokenizer):
    marked = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    template = "{% for m in messages %}" + HEADER + marked + "{% endif %}<|end|>" + asking("<|im_start|>assistant\n")
    assert TurnStatistics.of(manifest(tmp_path, template, CHAT).turns) == TurnStatistics(no_end=2)


def test_generation_does_not_stop_at_a_token_that_the_template_also_writes_inside_turns(tmp_path, tokenizer):
    turn = "{% if m.reasoning_content %}{{ m.reasoning_content }}<|end|>{% endif %}{{ m.content }}"
    template = framed("{{ '<|return|>' if loop.last else '<|end|>' }}", turn=turn)
    messages = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Yo."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning_content": "Hm."},
    ]
    made = manifest(tmp_path, template, [{"messages": messages}])
    assert TurnStatistics.of(made.turns) == TurnStatistics(
        end_tokens={"<|end|>": 1, "<|return|>": 1}, inner_end_tokens=("<|end|>",)
    )
    assert stop_token_ids(made.turns) == (tokenizer.convert_tokens_to_ids("<|return|>"),)


def test_what_somebody_writes_does_not_change_where_turns_end(tmp_path, tokenizer):
    records = [["Hi.", "One <|end|> ends a turn."], ["Hi.", "That is <|end|>"], ["Hi.", "Yo."]]
    made = manifest(tmp_path, framed("<|end|>"), records)
    assert stop_token_ids(made.turns) == (tokenizer.convert_tokens_to_ids("<|end|>"),)
    assert ended(made) == {"<|end|>": 3}
    made = manifest(tmp_path, framed(""), [["Hi.", "Yo.<|endoftext|>"]])
    assert stop_token_ids(made.turns) == (tokenizer.eos_token_id,)  # the turns end with it, and the labels cover it


def test_only_turns_that_are_trained_on_count(tmp_path, tokenizer):
    end = "{{ '<|return|>' if loop.last else '<|end|>' }}"
    assert ended(manifest(tmp_path, framed(end), CHAT)) == {"<|end|>": 1, "<|return|>": 1}
    assert ended(manifest(tmp_path, framed(end), CHAT, mask_history=True)) == {"<|return|>": 1}
    assert ended(manifest(tmp_path, framed(end), CHAT, train_on_prompt=True)) == {"<|end|>": 1, "<|return|>": 1}
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(CHAT[0])]
    messages[3]["train"] = False
    assert ended(manifest(tmp_path, framed(end), [{"messages": messages}])) == {"<|end|>": 1}


def test_a_truncated_turn_has_no_end(tmp_path, tokenizer):
    long = [["Hi.", "word " * 200]]
    for on_overflow, expected in (
        ("truncate", TurnStatistics(truncated=1)),
        ("split", TurnStatistics(end_tokens={"<|end|>": 1})),
    ):
        made = manifest(tmp_path, framed("<|end|>"), long, on_overflow=on_overflow)
        assert TurnStatistics.of(made.turns) == expected
    made = manifest(tmp_path, framed("<|end|>"), [*long, ["Hi.", "Yo."]], on_overflow="truncate")
    assert TurnStatistics.of(made.turns) == TurnStatistics(end_tokens={"<|end|>": 1}, truncated=1)


def test_texts_completions_and_ids_end_where_their_labels_do(tmp_path, tokenizer):
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")
    assert stop_token_ids(manifest(tmp_path, framed(""), [{"text": "Once."}], stage="pt").turns) == (eos,)
    assert stop_token_ids(manifest(tmp_path, framed(""), [{"prompt": "Hi.", "completion": "Yo."}]).turns) == (eos,)
    for labels, expected in (([-100, 6, end], (end,)), ([-100, 6, -100], ()), ([5, 6, end], (end,))):
        record = {"input_ids": [5, 6, end], "labels": labels}
        assert stop_token_ids(manifest(tmp_path, framed(""), [record]).turns) == expected


def test_white_space_and_html_among_added_tokens_are_not_taken_for_end_tokens(tmp_path):
    """Some vocabularies list line breaks and HTML among their added tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\n", "</b>", "<|stop|>"])
    tokenizer.save_pretrained(tmp_path / "model")
    assert TurnStatistics.of(manifest(tmp_path, framed("\n"), [["Hi.", "<b>Yo</b>"]]).turns) == TurnStatistics(no_end=1)
    assert ended(manifest(tmp_path, framed("<|stop|>\n"), [["Hi.", "<b>So</b>"]])) == {"<|stop|>": 1}


THINKS = "<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    ("prompt", "turn", "prompt_only", "turn_only"),
    [
        (THINKS, "{{ m.content }}", "<think>\n", ""),
        (THINKS, "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}", "", ""),
        ("<|im_start|>model\n", "{{ m.content }}", "<|im_start|>model\n", ""),
        ("", "{{ m.content }}", "", "<|im_start|>assistant\n"),
        ("<|im_start|>assistant\n", "{{ m.content }}", "", ""),
        ("<|im_start|>assistant\n", "{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content }}", "", ""),
    ],
)
def test_a_generation_prompt_that_differs_from_the_turns_is_noticed(
    tmp_path, tokenizer, prompt, turn, prompt_only, turn_only
):
    statistics = TurnStatistics.of(manifest(tmp_path, framed("<|end|>\n", prompt, turn), CHAT).turns)
    assert (statistics.prompt_only, statistics.turn_only) == (prompt_only, turn_only)


def test_a_template_may_need_no_generation_prompt(tmp_path, tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %} {{ m.content }}<|end|>"
        "{% endif %}{% endfor %}"
    )
    assert TurnStatistics.of(manifest(tmp_path, template, CHAT).turns) == TurnStatistics(end_tokens={"<|end|>": 2})


def test_thinking_in_some_of_the_data_is_enough(tmp_path, tokenizer):
    turn = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}"
    plain = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yo."}]}
    thinks = {"messages": [plain["messages"][0], {**plain["messages"][1], "reasoning_content": "Hm."}]}
    template = framed("<|end|>\n", THINKS, turn)
    assert TurnStatistics.of(manifest(tmp_path, template, [plain] * 9).turns).prompt_only == "<think>\n"
    assert TurnStatistics.of(manifest(tmp_path, template, [*[plain] * 9, thinks]).turns).prompt_only == ""


def test_observations_of_several_sources_are_merged(tmp_path, tokenizer):
    end, call = (TurnObservation("end_token", number, text) for number, text in ((5, "<|end|>"), (6, "<|call|>")))
    inside = TurnObservation("inner_token", 5, "<|end|>")
    assert stop_token_ids(merge_counts([Counter({end: 3}), Counter({call: 1})])) == (5, 6)
    assert stop_token_ids(merge_counts([Counter({end: 3}), Counter({call: 4})])) == (6, 5)  # the most frequent first
    assert stop_token_ids(merge_counts([Counter({end: 3}), Counter({call: 1, inside: 1})])) == (6,)
