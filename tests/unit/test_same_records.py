"""The same records in every file format give the tokens and labels of the chat template."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raysft.config import Source
from raysft.data.sources.files import find_files
from raysft.data.sources.formats import to_examples
from raysft.data.sources.readers import read_raw
from raysft.data.tokenization.tokenized_example import TokenizedExample
from raysft.data.types import IGNORE_INDEX, Example
from raysft.models.tokenizer import load_tokenizer
from tests.shards import example_tokenizer

EVERYTHING = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m | tojson }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m | tojson }}<|im_end|>{% endif %}\n{% endfor %}"
)
"""A template that writes everything it receives."""
TEXTS = ["x", "null", "2024-07-26", "yes", "1e5", " a\n\n b ", "q\"u,o'te", "北京 🏯", "{}", "- a: b", "~", "[1]"]
ARGUMENTS: dict[str, Callable[[random.Random], Any]] = {
    "city": lambda r: r.choice(TEXTS),
    "days": lambda r: r.randrange(-5, 2**53),
    "ratio": lambda r: r.choice([0.1, -1.5, 1e300, 2.0]),
    "exact": lambda r: r.random() < 0.5,
    "tags": lambda r: [r.choice([*TEXTS, None]) for _ in range(r.randrange(3))],
    "where": lambda r: some(r, {"lat": lambda r: r.uniform(-90, 90), "name": lambda r: r.choice(TEXTS)}),
    "stops": lambda r: [some(r, {"a": lambda r: r.randrange(9), "b": lambda r: r.choice(TEXTS)}) for _ in range(2)],
}
SCHEMA: dict[str, Callable[[random.Random], Any]] = {
    "type": lambda r: r.choice(["string", "object"]),
    "description": lambda r: r.choice(TEXTS),
    "enum": lambda r: [r.choice([*TEXTS, None]) for _ in range(r.randrange(3))],
    "default": lambda r: r.choice(TEXTS),
    "items": lambda r: some(r, {"type": lambda r: "integer", "minimum": lambda r: r.randrange(9)}),
}


class Full(random.Random):
    """Chooses every key and no null: the first record fixes the order of a column's fields."""

    def random(self) -> float:
        return 0.5

    def getrandbits(self, k: int) -> int:
        return 1


def some(r: random.Random, fields: dict[str, Callable[[random.Random], Any]]) -> dict[str, Any]:
    """Some of the fields, in order; occasionally one is null."""
    chances = {name: r.random() for name in fields}
    return {name: make(r) if chances[name] > 0.1 else None for name, make in fields.items() if chances[name] < 0.6}


def call(r: random.Random) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{r.randrange(3)}", "arguments": some(r, ARGUMENTS)}}


def tool(r: random.Random) -> dict[str, Any]:
    properties = some(r, dict.fromkeys(ARGUMENTS, lambda r: some(r, SCHEMA)))
    parameters = {"type": "object", "properties": properties, **some(r, {"required": lambda r: ["city"]})}
    return {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}


def openai(r: random.Random) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [{"role": "user", "content": r.choice(TEXTS)}]
    calls = [call(r) for _ in range(1 + r.randrange(2))]
    turns += [{"role": "assistant", "content": r.choice(["", "calling"]), "tool_calls": calls}]
    turns += [{"role": "tool", "content": r.choice(TEXTS), **some(r, {"name": lambda r: r.choice(TEXTS)})}]
    turns += [{"role": "assistant", "content": r.choice(TEXTS), **({"tool_calls": None} if r.random() > 0.8 else {})}]
    return {"messages": turns, **some(r, {"tools": lambda r: [tool(r)]})}


def sharegpt(r: random.Random) -> dict[str, Any]:
    made = call(r)["function"]
    turns = [("human", r.choice(TEXTS)), ("function_call", json.dumps(made)), ("observation", "4"), ("gpt", "5")]
    return {"conversations": [{"from": who, "value": what} for who, what in turns]}


def alpaca(r: random.Random) -> dict[str, Any]:
    fields = {"system": lambda r: r.choice(TEXTS), "history": lambda r: [["h", r.choice(TEXTS)]]}
    return {"instruction": r.choice(["", "do"]), "input": r.choice(["it", "that"]), "output": "o", **some(r, fields)}


def conversation(record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages and tools of a record, as chat templates expect them."""
    if "messages" in record:
        return record["messages"], record.get("tools")
    if "conversations" in record:
        asked, called, given, answer = (turn["value"] for turn in record["conversations"])
        calls = [{"type": "function", "function": json.loads(called)}]
        turns = [("user", asked), ("assistant", ""), ("tool", given), ("assistant", answer)]
        messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
        messages[1]["tool_calls"] = calls
        return messages, None
    turns = [("system", record["system"])] if record.get("system") else []
    for question, answer in record.get("history") or []:
        turns += [("user", question), ("assistant", answer)]
    asked = "\n".join(part for part in (record["instruction"], record["input"]) if part)
    turns += [("user", asked), ("assistant", record["output"])]
    return [{"role": role, "content": content} for role, content in turns], None


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def columns(records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def as_table(records: list[dict[str, Any]]) -> pa.Table:
    return pa.table({name: pa.array(values) for name, values in columns(records).items()})


def as_json_columns(records: list[dict[str, Any]]) -> pa.Table:
    """Lists of values of mixed types, as ``datasets`` stores them."""

    def column(values: list[Any]) -> pa.Array:
        if not any(isinstance(value, list) for value in values):
            return pa.array(values)
        texts = pa.array([each and [json.dumps(inner) for inner in each] for each in values], pa.list_(pa.string()))
        inner = pa.ExtensionArray.from_storage(pa.json_(), texts.values)
        return pa.ListArray.from_arrays(texts.offsets, inner, mask=texts.is_null())

    return pa.table({name: column(values) for name, values in columns(records).items()})


def in_parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=7)
    return out.getvalue()


def in_arrow(table: pa.Table, new=pa.ipc.new_file) -> bytes:
    out = io.BytesIO()
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def in_csv(records: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns(records))
    for row in zip(*columns(records).values(), strict=True):
        writer.writerow("" if v is None else v if isinstance(v, str) else json.dumps(v) for v in row)
    return out.getvalue().encode()


KEEP_NULLS = {
    "a.jsonl": lambda records: "".join(json.dumps(record) + "\n" for record in records).encode(),
    "a.json": lambda records: json.dumps(records, indent=1, ensure_ascii=False).encode(),
    "a.yaml": lambda records: yaml.safe_dump(records, sort_keys=False, allow_unicode=True).encode(),
    "a.csv": in_csv,
    "json.parquet": lambda records: in_parquet(as_json_columns(records)),
    "json.arrow": lambda records: in_arrow(as_json_columns(records), pa.ipc.new_stream),
}
LOSE_NULLS = {
    "a.parquet": lambda records: in_parquet(as_table(records)),
    "a.arrow": lambda records: in_arrow(as_table(records)),
    "stream.arrow": lambda records: in_arrow(as_table(records), pa.ipc.new_stream),
}


@pytest.fixture(scope="module")
def model(tokenizer_with) -> str:
    return tokenizer_with(chat_template=EVERYTHING)


def read(path: Path, model: str) -> Iterator[tuple[list[int], list[int]]]:
    source = Source(name="s", path=str(path))
    (file,) = find_files(source)
    items = [item for item, _ in to_examples(((place, raw) for place, _, raw in read_raw(file)), source)]
    read = [item for item in items if isinstance(item, Example)]
    assert read == items
    for item in example_tokenizer(model, sequence_length=1 << 20)(read):
        assert isinstance(item, TokenizedExample), item
        yield item.input_ids.tolist(), item.labels.tolist()


def expected(record: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    messages, tools = conversation(record)
    whole = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = whole["input_ids"], whole["assistant_masks"]
    return ids, [token if inside else IGNORE_INDEX for token, inside in zip(ids, trained, strict=True)]


@pytest.mark.parametrize("name", [*KEEP_NULLS, *LOSE_NULLS])
@pytest.mark.parametrize("seed", range(3))
def test_a_record_is_the_same_in_every_form(tmp_path, model, name, seed):
    r = random.Random(seed)
    records = [openai(Full(0)), *(r.choice([openai, sharegpt, alpaca])(r) for _ in range(40))]
    keeps = name in KEEP_NULLS
    (tmp_path / name).write_bytes((KEEP_NULLS if keeps else LOSE_NULLS)[name](records))
    tokenizer = load_tokenizer(model)
    right = [expected(record if keeps else without_nulls(record), tokenizer) for record in records]
    found = list(read(tmp_path / name, model))
    for index, record in enumerate(records):
        assert found[index] == right[index], record
