"""Chat templates by name: the texts are those that LLaMA-Factory 0.9.5 trains on, and the labels cover the answers."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from raysft.config import Source, parse
from raysft.config.named_templates import named_template, similar_name, special_tokens, template_names, template_words
from raysft.data.prepare import prepare
from raysft.data.sources.formats import to_example
from raysft.data.tokenization.tokenize import ExampleTokenizer
from raysft.data.tokenization.tokenized_example import TokenizedExample, TokenizeOptions
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.data.types import IGNORE_INDEX, Rejected
from tests.shards import write_records

RECORDED = json.loads(Path(__file__).with_name("recorded_templates.json").read_text(encoding="utf-8"))
"""Written by ``tests/record_templates.py``."""
TEXTS = {name: group["texts"] for group in RECORDED["templates"] for name in group["names"]}
EOS_AFTER_END = {"bailing_v2", "dots_ocr", "gemma2"}
"""LLaMA-Factory writes the end-of-text token after the last answer, which its own token ends already."""
DATE = {"date_string": "01 Jan 2026"}
README = Path(__file__).parents[2] / "configs" / "README.md"


@lru_cache(maxsize=4)
def backend_for(name: str) -> Backend:
    """Return a tokenizer of bytes that has the special tokens of a template."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", *special_tokens(name))]
    )
    return backend


def tokenizer_for(name: str, **template_options: Any) -> ExampleTokenizer:
    backend = backend_for(name)
    tokenizer = Tokenizer(
        backend=backend.to_str(),
        template=named_template(name),
        tool_template=None,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        control_tokens=(),
        eos=backend.token_to_id("</s>"),
        identity=name,
    )
    options = TokenizeOptions(
        stage="sft",
        sequence_length=1 << 16,
        mask_history=False,
        train_on_prompt=False,
        on_overflow="error",
        keep_prompt="head",
        control_tokens="keep",
        template_options={**DATE, **template_options},
        default_system=None,
        thinking="template",
        with_prompts=True,
    )
    return ExampleTokenizer(tokenizer, options)


def tokenized(name: str, case: dict[str, Any]) -> TokenizedExample | Rejected:
    options = {key: case[key] for key in ("enable_thinking",) if key in case}
    source = Source.model_validate({"name": "s", "path": "p"})
    record = {key: case[key] for key in ("messages", "tools") if key in case}
    (item,) = tokenizer_for(name, **options)([to_example(record, "openai", source, "f:1")])
    return item  # type: ignore[return-value]


def decoded(name: str, ids: list[int]) -> str:
    return backend_for(name).decode(ids, skip_special_tokens=False)


def trained_texts(name: str, item: TokenizedExample) -> list[str]:
    """Return the texts of the labels that stand side by side."""
    runs = groupby(range(len(item.labels)), lambda at: item.labels[at] != IGNORE_INDEX)
    return [decoded(name, item.input_ids[list(run)].tolist()) for labelled, run in runs if labelled]


def expected(name: str, case: str) -> tuple[str, list[str]]:
    """Return a recorded text, and what of its answers is trained: not the white space after the end."""
    text, spans = TEXTS[name][case]
    if name in EOS_AFTER_END:
        text = text.removesuffix("</s>")
    return text, [text[start:end].rstrip() for start, end in spans]


def joins_results(name: str) -> bool:
    """Return True if the results of several calls belong into one turn; other names get a turn for each, by design."""
    return "<tool_response>\n" in template_words(name)["tool"]


def test_every_name_is_recorded():
    assert template_names() == sorted(TEXTS)
    assert len(TEXTS) == 121


@pytest.mark.parametrize("name", template_names())
def test_text_and_labels_are_those_of_llamafactory(name):
    for case, recorded in TEXTS[name].items():
        if isinstance(recorded, str) or (case == "two results" and not joins_results(name)):
            continue  # LLaMA-Factory refuses it, or writes </tool_response> where nothing opened one
        item = tokenized(name, RECORDED["cases"][case])
        assert isinstance(item, TokenizedExample), (case, item)
        text, answers = expected(name, case)
        assert decoded(name, item.input_ids.tolist()) == text, case
        assert "".join(trained_texts(name, item)) == "".join(answers), case
        assert dict(item.counts) == {}, case
        if case != "thinking null":  # there the prompt ends with an empty thought, and this answer has a thought
            assert item.prompt == text[: text.rindex(answers[-1])], case


@pytest.mark.parametrize("name", template_names())
def test_an_answers_end_token_is_what_generation_stops_at(name):
    """The recorded text says which token it is: the special token at the end of an answer."""
    item = tokenized(name, RECORDED["cases"]["multi"])
    assert isinstance(item, TokenizedExample)
    _, answers = expected(name, "multi")
    added = [*special_tokens(name), "</s>", "[e~["]
    ends = [next((token for token in added if answer.endswith(token)), "") for answer in answers]
    seen = [seen for _, seen in item.observations if seen.kind in ("end_token", "end_text", "no_end")]
    assert [each.text if each.kind == "end_token" else "" for each in seen] == [
        "" if end not in backend_for(name).get_vocab() else end for end in ends
    ]


def test_parallel_calls_are_refused_where_the_format_has_none():
    item = tokenized("glm4", RECORDED["cases"]["two tools"])
    assert isinstance(item, Rejected)
    assert "no parallel calls" in item.reason


@pytest.mark.parametrize("name", ["qwen3", "qwen", "glm4_moe", "mimo_v2", "llama3"])
def test_a_thought_in_a_function_call_turn_is_written_as_llamafactory_does(name):
    thought = template_words(name)["thought"].replace("{content}", "Ask.")
    call = RECORDED["cases"]["thought and call"]["messages"][1]["tool_calls"][0]["function"]
    turns = [
        ("human", "Sun?"),
        ("function_call", thought + json.dumps(call)),
        ("observation", '{"sun": true}'),
        ("gpt", "Yes."),
    ]
    record = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    source = Source.model_validate({"name": "s", "path": "p"})
    (item,) = tokenizer_for(name)([to_example(record, "sharegpt", source, "f:1")])
    assert isinstance(item, TokenizedExample), item
    text, answers = expected(name, "thought and call")
    assert decoded(name, item.input_ids.tolist()) == text
    assert "".join(trained_texts(name, item)) == "".join(answers)


@pytest.mark.parametrize("name", ["qwen3", "chatglm3", "gemma", "seed_oss", "gpt_oss"])
def test_the_saved_template_works_in_transformers(name, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend_for(name), bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = named_template(name)
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text, _ = expected(name, "system, multi")
    messages = RECORDED["cases"]["system, multi"]["messages"]
    assert loaded.apply_chat_template(messages, tokenize=False) == text
    prompt = loaded.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert text[len(prompt) :].strip().startswith(("Bye.", "<"))


def test_a_tokenizer_without_bos_and_eos_gets_no_words_for_them():
    from raysft.data.tokenization.chat_template import chat_template

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chat_template(named_template("llama2"), {}).render(turns, (), False) == "[INST] a [/INST]b"


@pytest.mark.parametrize("role", ["system", "user"])
def test_an_empty_system_turn_counts_as_none(role):
    """As in LLaMA-Factory, the default takes its place."""
    from raysft.data.tokenization.chat_template import chat_template

    turns = [{"role": "user", "content": "a"}]
    given = [{"role": "system", "content": ""}, *turns] if role == "system" else turns
    text = chat_template(named_template("smollm2"), {}).render(given, (), True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.parametrize(
    ("typed", "meant"), [("chat_ml", "chatml"), ("Qwen3", "qwen3"), ("lama3", "llama3"), ("x", None)]
)
def test_a_wrong_name_is_told_apart(typed, meant):
    assert similar_name(typed) == meant


def test_special_tokens_are_those_around_the_turns():
    assert special_tokens("gemma") == ["<start_of_turn>", "<end_of_turn>"]
    assert special_tokens("mistral") == ["[INST]", "[/INST]"]
    assert special_tokens("llama2") == []  # its [INST] is text


@pytest.mark.parametrize(
    ("name", "missing"), [("gemma", ("<start_of_turn>", "<end_of_turn>")), ("chatml", ()), ("vicuna", ())]
)
def test_a_template_of_another_family_is_found_out(tmp_path, tokenizer_with, name, missing):
    folder = tokenizer_with(chat_template=None)
    write_records(tmp_path / "a.jsonl", [{"messages": RECORDED["cases"]["single"]["messages"]}])
    config = parse(
        {
            "run": {"storage": str(tmp_path)},
            "model": {"path": folder, "chat_template": name},
            "data": {"train": [{"name": "a", "path": str(tmp_path / "a.jsonl")}], "sequence_length": 512},
        }
    )
    assert prepare(config, folder).missing_tokens == missing


def test_the_documentation_lists_all_names():
    section = README.read_text(encoding="utf-8").split("## Chat templates", 1)[1].split("\n## ", 1)[0]
    listed = section.split("```text\n", 1)[1].split("```", 1)[0]
    assert sorted(re.split(r"\s+", listed.strip())) == template_names()


@pytest.mark.parametrize("name", ["aeva", "glm4_7", "hy3", "mimo_v2", "qwen3"])
def test_an_end_of_a_thought_that_nothing_opened_stays_text_without_thinking(name):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x </think> y"}]
    item = tokenized(name, {"messages": messages, "enable_thinking": False})
    assert isinstance(item, TokenizedExample)
    answer = trained_texts(name, item)[-1]
    assert "x </think> y" in answer
    assert answer.count("y") - answer.count("hy_eos") == 1
