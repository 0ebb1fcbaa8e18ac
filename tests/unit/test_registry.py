"""Registries of LLaMA-Factory are read unchanged."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pyarrow import fs

from raysft.config import Config, Source, parse, with_overrides
from raysft.config.data import Column
from raysft.data.sources import hub_subsets
from raysft.data.sources.formats import to_examples
from raysft.data.sources.registry import resolve_source
from raysft.data.types import Example, Rejected
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


def test_a_byte_order_mark_before_a_registry_is_ignored(folder):
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


def of_entry(tmp_path: Path, **entry) -> Source:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    return found(tmp_path, "x")


def test_a_slice_of_a_split_is_a_slice_of_its_records(tmp_path):
    hub = of_entry(tmp_path, hf_hub_url="x/y", subset="en", split="test[10%:20%]")
    assert (hub.path, hub.slice) == ("hf://datasets/x/y@~parquet/en/test", "10%:20%")
    file = of_entry(tmp_path, file_name="a.json", split="train[:1000]")
    assert (file.path, file.slice) == (str(tmp_path / "a.json"), ":1000")
    assert of_entry(tmp_path, file_name="a.json", split="train").slice is None


class Hub:
    """The folders of a dataset's branch ``~parquet``."""

    def __init__(self, *subsets: str) -> None:
        self.subsets = subsets

    def get_file_info(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        assert selector.base_dir == "datasets/x/y@~parquet"
        folders = [fs.FileInfo(f"{selector.base_dir}/{name}", fs.FileType.Directory) for name in self.subsets]
        return [*folders, fs.FileInfo(f"{selector.base_dir}/.gitattributes", fs.FileType.File)]


@pytest.mark.parametrize(
    ("subsets", "result"),
    [
        (("only",), "hf://datasets/x/y@~parquet/only/train"),
        (("de", "default"), "hf://datasets/x/y@~parquet/default/train"),
        (("en", "de"), "x/y has 2 subsets; set subset to one of de, en"),
        ((), "the Hub has no Parquet files of x/y (branch ~parquet); set folder"),
    ],
)
def test_without_a_subset_the_only_one_is_taken(tmp_path, monkeypatch, subsets, result):
    hub_subsets.list_subsets.cache_clear()
    monkeypatch.setattr(hub_subsets, "filesystem_of", lambda uri: (Hub(*subsets), uri.removeprefix("hf://")))
    try:
        path = of_entry(tmp_path, hf_hub_url="x/y").path
    except RequestError as error:
        path = str(error)
        assert "\n" not in path
    assert result in str(path)
    hub_subsets.list_subsets.cache_clear()


def test_a_hub_that_refuses_is_one_line(tmp_path, monkeypatch):
    hub_subsets.list_subsets.cache_clear()

    def refuse(uri: str):
        raise OSError("no such host")

    monkeypatch.setattr(hub_subsets, "filesystem_of", refuse)
    with pytest.raises(RequestError, match=r"dataset 'x': the subsets of x/y on the Hub cannot be listed: "):
        of_entry(tmp_path, hf_hub_url="x/y")


def test_the_prompt_column_is_the_text_for_pre_training(folder):
    web = found(folder, "web", stage="pt")
    assert (web.format, read_fields(web)) == ("text", {"text": "text"})


def test_the_config_takes_precedence_over_the_registry(folder):
    assert found(folder, "chat", num_samples=2).num_samples == 2
    assert found(folder, "chat", path="other.json") == Source(name="chat", path="other.json")
    more = found(folder, "chat", columns={"weight": "w", "system": None})
    assert read_fields(more) == {"conversations": "dialog", "tools": "functions", "weight": "w"}


@pytest.mark.parametrize("changed", [{"train.global_batch_size": 2}, {}])
def test_an_entry_still_applies_after_the_config_was_saved_and_loaded(tmp_path, changed):
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


@pytest.mark.parametrize(
    ("columns", "record", "result"),
    [
        ({"response": "output"}, RECORD, [("user", ""), ("assistant", "O")]),
        ({"query": "input", "response": "output"}, {"input": "", "output": "O"}, [("user", ""), ("assistant", "O")]),
        ({"query": "input", "response": "output"}, {"output": "O"}, "'instruction', but column 'input' is missing"),
        ({"query": "input", "response": "output"}, {"input": None, "output": "O"}, "but column 'input' is null"),
        ({"prompt": "input", "response": "output"}, {"output": "O"}, "'instruction', but column 'input' is missing"),
    ],
)
def test_an_instruction_of_which_no_column_is_read_is_empty(tmp_path, columns, record, result):
    source = of_entry(tmp_path, file_name="a.json", columns=columns)
    ((item, _),) = to_examples([("a:1", record)], source)
    if isinstance(item, Example):
        assert [(message.role, message.content) for message in item.messages] == result
    else:
        assert result in item.reason


@pytest.mark.parametrize("form", ["sharegpt", "openai"])
def test_an_entry_without_columns_reads_only_conversations(tmp_path, form):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "a.json", "formatting": form}}))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    record = {**RECORD, "conversations": turns, "messages": [{"role": "user", "content": "other"}]}
    ((item, _),) = to_examples([("a:1", record)], found(tmp_path, "x"))
    assert isinstance(item, Example), item
    assert [(message.role, message.content) for message in item.messages] == [("user", "q"), ("assistant", "a")]
    assert item.tools == ()


def test_media_are_read_from_the_columns_that_the_entry_names(tmp_path):
    columns = {"messages": "conversations", "images": "pictures", "videos": "clips", "audios": "sounds"}
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    record = {"conversations": turns, "pictures": ["a.png"], "clips": [], "sounds": None, "images": ["other.png"]}
    source = of_entry(tmp_path, file_name="a.json", formatting="sharegpt", columns=columns)
    ((item, _),) = to_examples([("a:1", record)], source)
    assert isinstance(item, Example), item
    assert [medium.location for medium in item.messages[0].media] == ["a.png"]
    for column, words in (("clips", "has videos"), ("sounds", "has audio")):
        ((item, _),) = to_examples([("a:1", {**record, column: ["x"]})], source)
        assert isinstance(item, Rejected)
        assert words in item.reason


FILE = {"file_name": "p.json"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**FILE, "ranking": True}, "contains preferences (ranking), which raysft does not support; choose another"),
        ({**FILE, "columns": {"chosen": "c"}}, "contains preferences (columns.chosen)"),
        ({**FILE, "columns": {"kto_tag": "label"}}, "(columns.kto_tag), which raysft does not support; choose another"),
        ({"script_url": "x"}, "has script_url; set file_name, cloud_file_name, hf_hub_url or ms_hub_url"),
        ({"om_hub_url": "x/y"}, "has om_hub_url; set file_name"),
        ({}, "has no location; set file_name"),
        ({**FILE, "hf_hub_url": "x/y"}, "has hf_hub_url and file_name; remove one of them"),
        ({**FILE, "ms_hub_url": "x/y"}, "has file_name and ms_hub_url; remove one of them"),
        ({**FILE, "om_hub_url": "x/y"}, "has file_name and om_hub_url; remove one of them"),
        ({"script_url": "s", "ms_hub_url": "x/y"}, "has script_url and ms_hub_url; remove one of them"),
        ({"file_name": "s3://b/a.json"}, "file_name must be a path, but is 's3://b/a.json'; set cloud_file_name, "),
        ({"cloud_file_name": "a.json"}, "cloud_file_name must begin with one of s3://, gs://, "),
        ({"cloud_file_name": "http://x/a.json"}, "but is 'http://x/a.json'; use file_name for files on this machine"),
        ({"hf_hub_url": "/data/set"}, "hf_hub_url must be OWNER/NAME, but is '/data/set'; use file_name for files on"),
        ({"hf_hub_url": "x/y@main"}, "hf_hub_url must be OWNER/NAME, but is 'x/y@main'"),
        ({"hf_hub_url": "x/y", "subset": "*"}, "subset must be a name in the dataset, but is '*'; correct the entry"),
        ({"hf_hub_url": "x/y", "subset": "a/b"}, "subset must be a name in the dataset, but is 'a/b'"),
        ({"hf_hub_url": "x/y", "folder": "../z"}, "folder must be a name in the dataset, but is '../z'"),
        ({"file_name": "a\0b"}, "file_name='a\\x00b': a path cannot contain a NUL character"),
        ({"file_name": "a" * 300}, "each name in it at most 255, but this one has "),
        ({**FILE, "formatting": "odd"}, "formatting 'odd'; use one of alpaca, sharegpt, openai"),
        ({**FILE, "formatting": ["alpaca"]}, "formatting ['alpaca']; use one of alpaca, sharegpt, openai"),
        ({**FILE, "ranking": "false"}, "ranking must be true or false, but is 'false'; correct the entry"),
        ({**FILE, "num_sample": 2}, "unknown key num_sample; did you mean 'num_samples'?"),
        ({**FILE, "num_sample": None}, "unknown key num_sample; did you mean 'num_samples'?"),
        ({**FILE, "columns": {"promt": None}}, "unknown key columns.promt; did you mean columns.prompt?"),
        ({**FILE, "shuffle": True}, "unknown key shuffle; known: hf_hub_url, "),
        ({**FILE, "columns": {"promt": "q"}}, "unknown key columns.promt; did you mean columns.prompt?"),
        ({**FILE, "columns": {"chat": "q"}}, "unknown key columns.chat; known: prompt, query, response, history, "),
        (
            {**FILE, "formatting": "sharegpt", "tags": {"user": "u"}},
            "unknown key tags.user; did you mean tags.user_tag?",
        ),
        ({**FILE, "columns": {"messages": "m"}}, "has columns.messages, which formatting alpaca does not use; set"),
        ({**FILE, "tags": {"user_tag": "u"}}, "has tags, which formatting alpaca does not use; set formatting to"),
        ({**FILE, "formatting": "openai", "columns": {"prompt": "q"}}, "has columns.prompt, which formatting openai"),
        ({**FILE, "subset": "en"}, "has subset='en', but names a single file; remove subset"),
        ({**FILE, "folder": "en"}, "has folder='en', but names a single file; remove folder"),
        ({**FILE, "split": "test"}, "has split='test', but names a single file; remove split"),
        (
            {**FILE, "split": "train[:10]+test"},
            "has split='train[:10]+test', but a source must be one split or a slice of one",
        ),
        ({**FILE, "split": "train[10]"}, "split='train[10]': must be a slice of records, such as :1000, 10%:20%"),
        (
            {**FILE, "split": "train[:101%]"},
            "split='train[:101%]': percentages must be between -100% and 100%; correct",
        ),
        ({**FILE, "split": "test[:10]"}, "has split='test', but names a single file; remove split"),
        ({"hf_hub_url": "x/y", "folder": "f", "split": "train"}, "has both folder and split"),
        ({**FILE, "num_samples": 0}, "num_samples=0: must be greater than 0; correct the entry"),
        ("p.json", "must be a mapping, but is 'p.json'; write it as"),
    ],
)
def test_an_entry_that_cannot_be_followed_is_refused_in_one_line(tmp_path, entry, message):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(RequestError) as caught:
        found(tmp_path, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            FILE,
            "one text column for stage: pt, but has columns.prompt, columns.query, columns.response; map the text alone",
        ),
        ({**FILE, "columns": {}}, "one text column for stage: pt, but has no columns; map the text alone"),
        (
            {**FILE, "columns": {"prompt": "a", "query": "b"}},
            "one text column for stage: pt, but has columns.prompt, columns.query; map the text alone",
        ),
    ],
)
def test_pre_training_needs_one_text_column(tmp_path, entry, message):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(RequestError) as caught:
        found(tmp_path, "x", stage="pt")
    assert message in str(caught.value)


def test_an_unknown_name_is_refused_with_the_nearest_known_one(folder):
    with pytest.raises(RequestError, match="no dataset is named 'plane'; did you mean 'plain'\\?"):
        found(folder, "plane")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
        ('{"x": {}, "x": {}}', "duplicate key 'x'"),
        ("[]", "must be a mapping of names to datasets"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_registry_is_refused(folder, content, message):
    (folder / "dataset_info.json").unlink()
    if content is not None:
        (folder / "dataset_info.json").write_text(content)
    with pytest.raises(RequestError, match=message):
        found(folder, "plain")


def test_a_registry_elsewhere_is_refused():
    data = {"train": [{"name": "x"}], "registry": "s3://bucket/data"}
    config = parse({"model": {"path": "m"}, "data": data})
    with pytest.raises(
        RequestError, match=r"^data\.registry=s3://bucket/data must be a file or folder on this machine; copy"
    ):
        resolve_source(config, config.data.train[0])


def test_a_source_without_path_and_registry_is_refused():
    with pytest.raises(RequestError, match=r"source .x. has no path; .*data\.registry"):
        parse({"model": {"path": "m"}, "data": {"train": [{"name": "x"}]}})


def test_a_weight_that_has_no_effect_is_refused():
    with pytest.raises(RequestError, match=r"has a weight, .*data\.mixing=concat.*; set data\.mixing"):
        parse({"model": {"path": "m"}, "data": {"train": [{"name": "x", "path": "p", "weight": 2}]}})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": 5}, "file_name must be a name, but is 5"),
        ({"file_name": "a.json", "columns": ["a"]}, "columns must be a mapping of names, but is ['a']"),
        ({"file_name": "a.json", "columns": {"query": 7}}, "columns.query must be a name, but is 7; correct the entry"),
        (
            {"file_name": "a.json", "formatting": "sharegpt", "tags": {"user_tag": []}},
            "tags.user_tag must be a name, but is []",
        ),
        ({"file_name": "a.json", "num_samples": 1.5}, "num_samples=1.5: must be a valid integer; correct the entry"),
        ({"file_name": "a.json", "num_samples": "10"}, "num_samples='10': must be a valid integer"),
    ],
)
def test_an_entry_of_wrong_types_is_refused_in_one_line(tmp_path, entry, message):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(RequestError) as caught:
        found(tmp_path, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
