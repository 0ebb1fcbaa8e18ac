"""Registries in LLaMA-Factory's form are read as they are."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from raysft.config import Config, RequestError, Source, parse
from raysft.data.registry import find_source

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
    "hub": {"hf_hub_url": "someone/data", "subset": "en", "split": "test"},
    "cloud": {"cloud_file_name": "s3://bucket/data.jsonl"},
    "pairs": {"file_name": "p.json", "ranking": True},
    "pictures": {"file_name": "p.json", "columns": {"images": "images"}},
    "script": {"script_url": "x"},
    "odd": {"file_name": "p.json", "formatting": "odd"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dataset_info.json").write_text(json.dumps(REGISTRY))
    return tmp_path


def found(folder: Path, name: str, stage: str = "sft", **options) -> Source:
    return find_source(config(folder, stage), Source.model_validate({"name": name, **options}))


def config(folder: Path, stage: str = "sft") -> Config:
    data = {"train": [{"name": "x"}], "registry": str(folder)}
    return parse({"stage": stage, "model": {"path": "m"}, "data": data})


def test_a_byte_order_mark_is_no_part_of_a_registry(folder):
    content = (folder / "dataset_info.json").read_bytes()
    (folder / "dataset_info.json").write_bytes(codecs.BOM_UTF8 + content)
    assert found(folder, "plain").path == str(folder / "plain.json")


def test_a_source_is_described_by_its_entry(folder):
    assert found(folder, "plain") == Source.model_validate(
        {"name": "plain", "path": str(folder / "plain.json"), "format": "alpaca", "columns": {}}
    )
    chat = found(folder, "chat")
    assert (chat.format, chat.max_examples) == ("sharegpt", 5)
    assert chat.columns == {"conversations": "dialog", "tools": "functions", "system": "sys"}
    assert chat.tags == {"role": "role", "content": "content", "user": "user", "assistant": "bot"}
    assert found(folder, "renamed").columns == {"instruction": "q", "input": "more", "output": "a", "history": "h"}
    assert found(folder, "hub").path == "hf://datasets/someone/data@~parquet/en/test"
    assert found(folder, "cloud").path == "s3://bucket/data.jsonl"


def test_what_stands_in_the_place_of_the_prompt_is_the_text_to_continue(folder):
    web = found(folder, "web", stage="pt")
    assert (web.format, web.columns) == ("text", {"text": "text"})


def test_the_config_goes_before_the_registry(folder):
    assert found(folder, "chat", max_examples=2).max_examples == 2
    assert found(folder, "chat", path="other.json") == Source(name="chat", path="other.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plane", "has no dataset 'plane'; did you mean 'plain'?"),
        ("pairs", "holds preferences (ranking)"),
        ("pictures", "holds images, and raysft trains on text"),
        ("script", "names script_url; raysft reads file_name"),
        ("odd", "has the formatting 'odd'; known: alpaca, sharegpt, openai"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(folder, name, message):
    with pytest.raises(RequestError) as caught:
        found(folder, name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "no valid JSON"), ("[]", "a registry is a mapping"), (None, "cannot be read")]
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
        ({"file_name": 5}, "file_name is 5; the name of a file or folder belongs there"),
        ({"file_name": "a.json", "columns": ["a"]}, "columns is ['a']; a mapping of names belongs there"),
        ({"file_name": "a.json", "columns": {"query": 7}}, "columns.input=7: input should be a valid string"),
        ({"file_name": "a.json", "num_samples": "10"}, "max_examples='10': input should be a valid integer"),
    ],
)
def test_an_entry_of_wrong_types_is_refused_in_one_line(tmp_path, entry, message):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(RequestError) as caught:
        found(tmp_path, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_null_is_as_if_it_were_not_there(tmp_path):
    entry = {"file_name": "a.json", "columns": {"prompt": "q", "query": None}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    assert found(tmp_path, "x").columns == {"instruction": "q"}
