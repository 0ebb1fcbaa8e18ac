"""Registries in LLaMA-Factory's form are read as they are."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

from raysft.config import Config, Source, parse, with_overrides
from raysft.config.data import Column
from raysft.data.sources.formats import to_examples
from raysft.data.sources.registry import resolve_source
from raysft.data.types import Example
from raysft.errors import RequestError

REGISTRY = {
    "plain": {"file_name": "plain.json"},
    "chat": {
        "file_name": "chat.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog", "tools": "functions", "system": "sys"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "bot"},
        "num_samples": 5,
    },
    "renamed": {"file_name": "r.csv", "columns": {"prompt": "q", "query": "more", "response": "a", "history": "h"}},
    "web": {"file_name": "web.jsonl", "columns": {"prompt": "text"}},
    "hub": {"hf_hub_url": "someone/data", "ms_hub_url": "else/where", "subset": "en", "split": "test"},
    "folder": {"hf_hub_url": "someone/code", "folder": "python"},
    "cloud": {"cloud_file_name": "s3://bucket/data.jsonl"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dataset_info.json").write_text(json.dumps(REGISTRY))
    return tmp_path


def found(folder: Path, name: str, stage: str = "sft", **options) -> Source:
    return resolve_source(config(folder, stage), Source.model_validate({"name": name, **options}))


def config(folder: Path, stage: str = "sft") -> Config:
    data = {"train": [{"name": "x"}], "registry": str(folder)}
    return parse({"stage": stage, "model": {"path": "m"}, "data": data})


def test_a_byte_order_mark_is_no_part_of_a_registry(folder):
    content = (folder / "dataset_info.json").read_bytes()
    (folder / "dataset_info.json").write_bytes(codecs.BOM_UTF8 + content)
    assert found(folder, "plain").path == str(folder / "plain.json")


def read_fields(source: Source) -> dict[str, str]:
    return {field: column for field in get_args(Column) if (column := source.column(field))}


def test_a_source_is_described_by_its_entry(folder):
    plain = found(folder, "plain")
    assert (plain.path, plain.format) == (str(folder / "plain.json"), "alpaca")
    assert read_fields(plain) == {"instruction": "instruction", "input": "input", "output": "output"}
    chat = found(folder, "chat")
    assert (chat.format, chat.num_samples) == ("sharegpt", 5)
    assert read_fields(chat) == {"conversations": "dialog", "tools": "functions", "system": "sys"}
    assert chat.tags == {"role": "role", "content": "content", "user": "user", "assistant": "bot"}
    renamed = read_fields(found(folder, "renamed"))
    assert renamed == {"instruction": "q", "input": "more", "output": "a", "history": "h"}
    assert found(folder, "hub").path == "hf://datasets/someone/data@~parquet/en/test"
    assert found(folder, "folder").path == "hf://datasets/someone/code/python"
    assert found(folder, "cloud").path == "s3://bucket/data.jsonl"


def test_what_stands_in_the_place_of_the_prompt_is_the_text_to_continue(folder):
    web = found(folder, "web", stage="pt")
    assert (web.format, read_fields(web)) == ("text", {"text": "text"})


def test_the_config_goes_before_the_registry(folder):
    assert found(folder, "chat", num_samples=2).num_samples == 2
    assert found(folder, "chat", path="other.json") == Source(name="chat", path="other.json")
    more = found(folder, "chat", columns={"weight": "w", "system": None})
    assert read_fields(more) == {"conversations": "dialog", "tools": "functions", "weight": "w"}


@pytest.mark.parametrize("changed", [{"train.global_batch_size": 2}, {}])
def test_an_entry_describes_a_source_also_when_the_config_was_loaded_again(tmp_path, changed):
    entry = {"file_name": "a.json", "formatting": "sharegpt", "num_samples": 3}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    data = {"train": [{"name": "x"}], "registry": str(tmp_path)}
    config = parse({"model": {"path": "m"}, "data": data})
    again = parse(yaml.safe_load(with_overrides(config, changed).to_yaml()))
    source = resolve_source(again, again.data.train[0])
    assert source.path == str(tmp_path / "a.json")
    assert source == resolve_source(config, config.data.train[0])


RECORD = {
    "instruction": "I",
    "input": "N",
    "output": "O",
    "system": "S",
    "history": [["x", "y"]],
    "weight": 9,
    "tools": [{"name": "f"}],
    "text": "T",
}
ASKED = [("user", "N"), ("assistant", "O")]


@pytest.mark.parametrize(
    ("columns", "turns"),
    [
        (None, [("user", "I\nN"), ("assistant", "O")]),
        ({"prompt": "instruction", "response": "output"}, [("user", "I"), ("assistant", "O")]),
        ({"prompt": "input", "response": "output"}, ASKED),
        ({"query": "input", "response": "output"}, ASKED),
        ({"prompt": "input", "query": "", "response": "output", "system": ""}, ASKED),
        ({"prompt": "input", "response": "output", "system": "instruction"}, [("system", "I"), *ASKED]),
        ({"prompt": "input", "query": None, "response": "output", "history": "history"},
         [("user", "x"), ("assistant", "y"), *ASKED]),
    ],
)  # fmt: skip
def test_a_column_that_is_not_named_is_not_read(tmp_path, columns, turns):
    entry = {"file_name": "a.json", **({"columns": columns} if columns else {})}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    ((item, _),) = to_examples([("a:1", RECORD)], found(tmp_path, "x"))
    assert isinstance(item, Example), item
    assert [(message.role, message.content) for message in item.messages] == turns
    assert (item.tools, item.weight) == ((), 1.0)


@pytest.mark.parametrize("form", ["sharegpt", "openai"])
def test_conversations_alone_are_read_of_an_entry_without_columns(tmp_path, form):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "a.json", "formatting": form}}))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    record = {**RECORD, "conversations": turns, "messages": [{"role": "user", "content": "other"}]}
    ((item, _),) = to_examples([("a:1", record)], found(tmp_path, "x"))
    assert isinstance(item, Example), item
    assert [(message.role, message.content) for message in item.messages] == [("user", "q"), ("assistant", "a")]
    assert item.tools == ()


FILE = {"file_name": "p.json"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**FILE, "ranking": True}, "holds preferences, which sft and pt do not train on (ranking); choose another"),
        ({**FILE, "columns": {"chosen": "c"}}, "holds preferences, which sft and pt do not train on (columns.chosen)"),
        ({**FILE, "columns": {"kto_tag": "label"}}, "(columns.kto_tag); choose another"),
        ({**FILE, "columns": {"images": "images"}}, "holds images, and raysft trains on text (columns.images)"),
        ({**FILE, "columns": {"videos": "v"}}, "holds videos"),
        ({**FILE, "columns": {"audios": "a"}}, "holds audios"),
        ({"script_url": "x"}, "names script_url; raysft reads file_name, cloud_file_name and hf_hub_url"),
        ({"ms_hub_url": "x/y"}, "names ms_hub_url; raysft reads file_name"),
        ({"om_hub_url": "x/y"}, "names om_hub_url; raysft reads file_name"),
        ({}, "names no file; raysft reads file_name"),
        ({**FILE, "hf_hub_url": "x/y"}, "names hf_hub_url and file_name; leave one of them"),
        ({**FILE, "formatting": "odd"}, "has the formatting 'odd'; known: alpaca, sharegpt, openai"),
        ({**FILE, "num_sample": 2}, "unknown key num_sample; did you mean 'num_samples'?"),
        ({**FILE, "shuffle": True}, "unknown key shuffle; known: hf_hub_url, "),
        ({**FILE, "columns": {"promt": "q"}}, "unknown key columns.promt; did you mean columns.prompt?"),
        ({**FILE, "columns": {"chat": "q"}}, "unknown key columns.chat; known: prompt, query, response, history, "),
        (
            {**FILE, "formatting": "sharegpt", "tags": {"user": "u"}},
            "unknown key tags.user; did you mean tags.user_tag?",
        ),
        ({**FILE, "columns": {"messages": "m"}}, "has columns.messages, which formatting alpaca does not read; set"),
        ({**FILE, "tags": {"user_tag": "u"}}, "has tags, which formatting alpaca does not read; set formatting to"),
        ({**FILE, "formatting": "openai", "columns": {"prompt": "q"}}, "has columns.prompt, which formatting openai"),
        ({**FILE, "subset": "en"}, "has the subset 'en', and a file has none"),
        ({**FILE, "folder": "en"}, "has the folder 'en', and a file has none"),
        ({**FILE, "split": "test"}, "has the split 'test', and a file has none"),
        ({"hf_hub_url": "x/y", "split": "train[:10%]"}, "has the split 'train[:10%]'; name a whole one"),
        ({"hf_hub_url": "x/y", "folder": "f", "split": "train"}, "has a folder and a split"),
        ({**FILE, "num_samples": 0}, "num_samples=0: input should be greater than 0; mend the registry"),
        ("p.json", "is 'p.json'; a mapping with file_name belongs there"),
    ],
)
def test_what_an_entry_says_and_is_not_done_is_refused_in_one_line(tmp_path, entry, message):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(RequestError) as caught:
        found(tmp_path, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (FILE, "has columns.query, columns.response, and stage: pt trains on one text; name that one alone"),
        ({**FILE, "columns": {}}, "has no columns, and stage: pt trains on one text"),
        ({**FILE, "columns": {"prompt": "a", "query": "b"}}, "has columns.query, and stage: pt trains on one text"),
    ],
)
def test_texts_to_continue_are_one_column(tmp_path, entry, message):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(RequestError) as caught:
        found(tmp_path, "x", stage="pt")
    assert message in str(caught.value)


def test_a_name_that_the_registry_has_not_is_refused_with_the_nearest(folder):
    with pytest.raises(RequestError, match="has no dataset 'plane'; did you mean 'plain'\\?"):
        found(folder, "plane")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ('{"x": {}, "x": {}}', "the key 'x' stands twice"),
        ("[]", "a registry is a mapping"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_registry_is_refused(folder, content, message):
    (folder / "dataset_info.json").unlink()
    if content is not None:
        (folder / "dataset_info.json").write_text(content)
    with pytest.raises(RequestError, match=message):
        found(folder, "plain")


def test_a_source_without_path_and_registry_is_refused():
    with pytest.raises(RequestError, match=r"source .x. has no path; give it one, or name data\.registry"):
        parse({"model": {"path": "m"}, "data": {"train": [{"name": "x"}]}})


def test_a_weight_that_has_no_effect_is_refused():
    with pytest.raises(RequestError, match=r"has a weight, which data\.mixing=concat does not use"):
        parse({"model": {"path": "m"}, "data": {"train": [{"name": "x", "path": "p", "weight": 2}]}})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": 5}, "file_name is 5; a name belongs there"),
        ({"file_name": "a.json", "columns": ["a"]}, "columns is ['a']; a mapping of names belongs there"),
        ({"file_name": "a.json", "columns": {"query": 7}}, "columns.input=7: input should be a valid string"),
        ({"file_name": "a.json", "num_samples": "10"}, "num_samples='10': input should be a valid integer"),
    ],
)
def test_an_entry_of_wrong_types_is_refused_in_one_line(tmp_path, entry, message):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(RequestError) as caught:
        found(tmp_path, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
