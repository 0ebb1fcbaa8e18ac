"""Record what LLaMA-Factory's encoder writes, for ``tests/unit/test_named_templates.py``.

It runs where LLaMA-Factory can be imported, which needs Python 3.11, transformers 5.2, torch, an empty module ``torchaudio`` and
``pip install --no-deps llamafactory==0.9.5``, with datasets, peft, accelerate, trl, omegaconf and sentencepiece::

    python -P tests/record_templates.py > tests/unit/recorded_templates.json

Each conversation is encoded by ``encode_multiturn`` with a byte-level tokenizer and decoded with all special tokens. An answer is
[start, end) of what its labels cover. The end-of-text token that the trainer adds for some templates is added here as well.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

DATE = "01 Jan 2026"
"""Stands for the day of the recording."""
WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "a city", "enum": ["Köln", "Rome"]},
            "days": {"type": "array", "description": "when", "items": {"type": "integer"}},
        },
        "required": ["city"],
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "time",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string", "description": "a zone"}}},
    },
}


def turns(*contents: str) -> list[dict[str, Any]]:
    """Return turns of the user and the assistant."""
    return [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)
    ]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """Return a call of a function."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "It's {short}."}
MULTI = turns("Who's there?", "Me.\nAnd you", "Nobody", "Then 你好!", "ok", "Bye.")
CALL = {"role": "assistant", "content": "", "tool_calls": [call("weather", city="Köln", days=[1, 2])]}
RESULT = {"role": "tool", "content": '{"sun": true}'}
THOUGHTFUL = [
    *turns("One?", "Two.", "Three?"),
    {"role": "assistant", "content": "Four.", "reasoning_content": "So\nfar"},
]
CASES: dict[str, dict[str, Any]] = {
    "single": {"messages": turns("Hi", "Hello!")},
    "system": {"messages": [SYSTEM, *turns("Hi", "Hello!")]},
    "multi": {"messages": MULTI},
    "system, multi": {"messages": [SYSTEM, *MULTI]},
    "thought": {"messages": THOUGHTFUL},
    "thought in both": {
        "messages": [THOUGHTFUL[0], {**THOUGHTFUL[1], "reasoning_content": "hm"}, *THOUGHTFUL[2:]],
    },
    "thinking off": {"messages": THOUGHTFUL, "enable_thinking": False},
    "thinking off, multi": {"messages": MULTI, "enable_thinking": False},
    "thinking null": {"messages": THOUGHTFUL, "enable_thinking": None},
    "tools": {
        "messages": [SYSTEM, *turns("Sun?"), CALL, RESULT, *turns("?", "Yes, sun.", "And now?", "Night.")[1:]],
        "tools": [WEATHER],
    },
    "two tools": {
        "messages": [
            *turns("Sun?"),
            {**CALL, "tool_calls": [*CALL["tool_calls"], call("time", zone='"a" {1}')]},
            RESULT,
            *turns("?", "Yes.")[1:],
        ],
        "tools": [WEATHER, TIME],
    },
    "thought and call": {
        "messages": [*turns("Sun?"), {**CALL, "reasoning_content": "Ask."}, RESULT, *turns("?", "Yes.")[1:]],
    },
    "two results": {
        "messages": [*turns("Sun?"), CALL, RESULT, {**RESULT, "content": "rain"}, *turns("?", "Yes.")[1:]],
    },
    "ends with a call": {"messages": [*turns("Sun?"), CALL]},
}  # fmt: skip


def main() -> None:
    from llamafactory.data.template import (  # pyright: ignore[reportMissingImports]
        TEMPLATES,
        ReasoningTemplate,
    )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(
        ["<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "[gMASK]", "sop", "<sep>"], special_tokens=True
    )

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text.replace(datetime.now().strftime("%d %b %Y"), DATE)

    def record(template: Any, case: dict[str, Any]) -> Any:
        messages = case["messages"]
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        given = _as_it_reads_them(messages[bool(system) :], template.thought_words)
        tools = json.dumps(case["tools"], ensure_ascii=False) if "tools" in case else ""
        template.enable_thinking = case.get("enable_thinking", True)
        try:
            pairs = template.encode_multiturn(tokenizer, given, system, tools)
        except (RuntimeError, ValueError) as error:
            return str(error).split(":")[0]
        text, answers = "", []
        for prompt, answer in pairs:
            text += decode(prompt)
            answers.append([len(text), len(text) + len(decode(answer))])
            text += decode(answer)
        if template.efficient_eos:
            text += "</s>"
            answers[-1][1] += 4
        return [text, answers]

    groups: dict[str, list[str]] = {}
    for name, template in TEMPLATES.items():
        texts = {
            key: record(template, case)
            for key, case in CASES.items()
            if "enable_thinking" not in case or isinstance(template, ReasoningTemplate)
        }
        groups.setdefault(json.dumps(texts, ensure_ascii=False), []).append(name)
    recorded = [{"names": names, "texts": json.loads(texts)} for texts, names in groups.items()]
    lines = ",\n".join(json.dumps(template, ensure_ascii=False) for template in recorded)
    print(f'{{"cases": {json.dumps(CASES, ensure_ascii=False)},\n"templates": [\n{lines}\n]}}')


def _as_it_reads_them(messages: list[dict[str, Any]], thought: tuple[str, str]) -> list[dict[str, str]]:
    """Write messages as LLaMA-Factory's converters do: calls as JSON, thoughts in the content, results in one turn."""
    given: list[dict[str, str]] = []
    for message in messages:
        content: str = message["content"]
        role: str = "observation" if message["role"] == "tool" else message["role"]
        if "tool_calls" in message:
            role = "function"
            content = json.dumps([made["function"] for made in message["tool_calls"]], ensure_ascii=False)
        if "reasoning_content" in message:
            content = thought[0] + message["reasoning_content"] + thought[1] + content
        if given and role == given[-1]["role"] == "observation":
            given[-1]["content"] += f"\n</tool_response>\n<tool_response>\n{content}"
        else:
            given.append({"role": role, "content": content})
    return given


if __name__ == "__main__":
    main()
