"""Readers: every kind of file and format of record gives an example, or a reason with its location."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raysft.config import Source
from raysft.data.sources.files import find_files
from raysft.data.sources.formats import to_examples
from raysft.data.sources.holdout import is_held_out, limit_of_fraction, opening
from raysft.data.sources.messages import ROLES
from raysft.data.sources.readers import read_raw
from raysft.data.types import Example, Message, Rejected
from raysft.storage.json_files import write_jsonl
from tests import messages, samples

ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "你好", "input": "", "output": "Hi \u2028 there"},
]
AS_MESSAGES = [
    (Message("user", "Add.\n1 2"), Message("assistant", "3")),
    (Message("user", "你好"), Message("assistant", "Hi \u2028 there")),
]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(name: str, content: str | bytes) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def read_all(path: str | list[str], **options) -> list[Example | Rejected]:
    source = Source.model_validate({"name": "s", "path": path, **options})
    records = ((f"{file.path}:{position}", raw) for file in find_files(source) for position, _, raw in read_raw(file))
    return [item for item, _ in to_examples(records, source)]


def reasons(items: list[Example | Rejected]) -> dict[str, str]:
    return {item.record: item.reason for item in items if isinstance(item, Rejected)}


def refusal(path: str | list[str], **options) -> str:
    return messages.refusal(read_all, path, **options)


def lines(records: list) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def as_csv(records: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, records[0], lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def as_table(records: list[dict]) -> pa.Table:
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({name: pa.array([record.get(name) for record in records]) for name in names})


def as_parquet(records: list[dict]) -> bytes:
    out = io.BytesIO()
    pq.write_table(as_table(records), out)
    return out.getvalue()


def as_arrow(records: list[dict], new=pa.ipc.new_file) -> bytes:
    out, table = io.BytesIO(), as_table(records)
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "positions"),
    [
        ("a.json", json.dumps(ALPACA), ["[0]", "[1]"]),
        ("a.json", json.dumps(ALPACA, indent=2), ["[0]", "[1]"]),
        ("lines.json", lines(ALPACA), ["1", "2"]),
        ("a.jsonl", lines(ALPACA), ["1", "2"]),
        ("a.ndjson", lines(ALPACA).rstrip("\n"), ["1", "2"]),
        ("A.JSONL", lines(ALPACA), ["1", "2"]),
        ("blank.jsonl", "\n" + lines(ALPACA).replace("\n", "\n\n"), ["2", "4"]),
        ("crlf.jsonl", lines(ALPACA).replace("\n", "\r\n"), ["1", "2"]),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(ALPACA).encode(), ["1", "2"]),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ALPACA).encode(), ["[0]", "[1]"]),
        ("a.jsonl.gz", gzip.compress(lines(ALPACA).encode(), mtime=0), ["1", "2"]),
        ("a.json.gz", gzip.compress(json.dumps(ALPACA).encode(), mtime=0), ["[0]", "[1]"]),
        ("a.csv", as_csv(ALPACA), ["2", "3"]),
        ("bom.csv", b"\xef\xbb\xbf" + as_csv(ALPACA).encode(), ["2", "3"]),
        ("a.parquet", as_parquet(ALPACA), ["[0]", "[1]"]),
        ("a.arrow", as_arrow(ALPACA), ["[0]", "[1]"]),
        ("stream.arrow", as_arrow(ALPACA, pa.ipc.new_stream), ["[0]", "[1]"]),
        ("a.yaml", yaml.safe_dump(ALPACA), ["1", "4"]),
    ],
)
def test_every_kind_of_file_gives_the_same_examples_and_names_their_place(name, content, positions):
    save(name, content)
    items = read_all(name)
    assert [item.messages for item in items if isinstance(item, Example)] == AS_MESSAGES
    assert [item.record for item in items] == [f"{name}:{position}" for position in positions]


def test_a_text_file_has_one_text_per_line():
    save("a.txt", "one\r\n\ntwo \u2028 still two\nthree")
    assert [(item.record, item.text) for item in read_all("a.txt") if isinstance(item, Example)] == [
        ("a.txt:1", "one"),
        ("a.txt:3", "two \u2028 still two"),
        ("a.txt:4", "three"),
    ]


@pytest.mark.parametrize("head", ["categories: [x]\nconversations:\n", ""])
def test_a_yaml_corpus_is_a_list_of_alternating_turns(head):
    save("a.yml", head + "- - Hi\n  - Hello\n- [a, b, c]\n")
    first = head.count("\n") + 1
    items = read_all("a.yml")
    assert [item.record for item in items] == [f"a.yml:{first}", f"a.yml:{first + 2}"]
    assert isinstance(items[1], Example)
    assert items[1].messages == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["x", "y"]]},
            [("system", "s"), ("user", "x"), ("assistant", "y"), ("user", "q"), ("assistant", "a")],
        ),
        ({"instruction": "q", "input": None, "output": "a", "history": None}, [("user", "q"), ("assistant", "a")]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant", "tool", "assistant")]},
            [(r, r) for r in ("system", "user", "assistant", "tool", "assistant")],
        ),
        (["q", "a"], [("user", "q"), ("assistant", "a")]),
        ({"turns": ["q", "a"]}, [("user", "q"), ("assistant", "a")]),
    ],
)
def test_the_format_is_found_from_the_first_record(record, messages):
    save("a.jsonl", lines([record]))
    (item,) = read_all("a.jsonl")
    assert isinstance(item, Example)
    assert [(message.role, message.content) for message in item.messages] == messages


def test_columns_of_other_names_are_mapped():
    save("a.jsonl", lines([{"ask": "q", "answer": "a", "output": "not this one"}]))
    (item,) = read_all("a.jsonl", columns={"instruction": "ask", "output": "answer"})
    assert isinstance(item, Example)
    assert item.messages == (Message("user", "q"), Message("assistant", "a"))


@pytest.mark.parametrize(
    ("columns", "turns"),
    [
        # A column that stands for one field is not the field of its own name as well.
        ({"instruction": "input"}, [("user", "N"), ("assistant", "O")]),
        ({"instruction": "input", "system": "instruction"}, [("system", "I"), ("user", "N"), ("assistant", "O")]),
        ({"system": "instruction"}, [("system", "I"), ("user", "N"), ("assistant", "O")]),
        ({"input": None}, [("user", "I"), ("assistant", "O")]),
        ({"prompt": "input", "completion": "output"}, "NO"),
    ],
)
def test_no_column_is_read_twice(columns, turns):
    save("a.jsonl", lines([{"instruction": "I", "input": "N", "output": "O"}]))
    (item,) = read_all("a.jsonl", columns=columns)
    assert isinstance(item, Example), item
    assert (item.text or [(message.role, message.content) for message in item.messages]) == turns


def why_unusable(item: Example | Rejected) -> str:
    """Why a record cannot be trained on."""
    reason = item.reason if isinstance(item, Rejected) else item.unanswered
    assert reason
    return reason


def test_a_field_that_the_config_excludes_is_named():
    save("a.jsonl", lines([{"instruction": "I", "input": "N", "output": "O"}]))
    (item,) = read_all("a.jsonl", format="alpaca", columns={"output": None})
    for part in ("alpaca", "'output'", "(columns: instruction, input, output)", "data.train[].columns"):
        assert part in why_unusable(item)


@pytest.mark.parametrize(
    ("parts", "question"),
    [
        ({"instruction": "", "input": "just this"}, "just this"),
        ({"instruction": None, "input": "and this"}, "and this"),
        ({"input": "alone"}, "alone"),
        ({"instruction": "both", "input": ""}, "both"),
        ({"instruction": "both", "input": None}, "both"),
        ({"instruction": "a", "input": "b"}, "a\nb"),
        ({"instruction": "", "input": ""}, ""),
    ],
)
def test_empty_parts_are_left_out_of_a_question(parts, question):
    save("a.jsonl", lines([{**parts, "output": "yes"}]))
    (item,) = read_all("a.jsonl")
    assert isinstance(item, Example), item
    assert item.messages == (Message("user", question), Message("assistant", "yes"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "turn 1"),
        ({"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ("a", "b", "c", " \n"),
                                                                  strict=True)]}, "turn 3"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [], "tool_calls": []}]},
         "messages[1]"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": []}]},
         "messages[1]"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "[]"}]}, "turn 1"),
        ({"instruction": "a", "output": "b", "history": [["c", ""]]}, "turn 1"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"], ["e", None]]}, "turn 3"),
        (["a", "b", "c", ""], "turn 3"),
        ({"prompt": "a", "completion": " "}, "completion"),
    ],
)  # fmt: skip
def test_an_answer_without_text_teaches_only_to_stop_and_is_rejected_by_its_turn(record, reason):
    save("a.jsonl", lines([record]))
    (item,) = read_all("a.jsonl")
    assert reason in why_unusable(item)


def test_an_empty_question_in_a_history_is_kept():
    save("a.jsonl", lines([{"instruction": "a", "output": "b", "history": [[None, "c"]]}]))
    (item,) = read_all("a.jsonl")
    assert isinstance(item, Example)
    assert [message.content for message in item.messages] == ["", "c", "a", "b"]


def test_records_of_several_formats_keep_theirs_in_one_parquet_file():
    records = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"instruction": "i", "input": "n", "output": "o"},
        {"input": "n", "output": "o"},
        {"prompt": "p", "completion": "c"},
        {"text": "t", "weight": 2.0},
        {"instruction": "i", "output": None, "text": "not to be trained on instead"},
    ]
    save("a.parquet", as_parquet(records))
    save("a.jsonl", lines(records))
    nested, plain = (
        [why_unusable(item).split(" (")[0] if item is items[-1] else replace(item, record="") for item in items]
        for items in (read_all("a.parquet"), read_all("a.jsonl"))
    )
    assert nested == plain
    assert str(plain[-1]).endswith("column 'output' is null")


def test_parquet_with_nested_messages_reads_as_json_does():
    records = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    save("a.parquet", as_parquet(records))
    save("a.jsonl", lines(records))
    (nested,), (plain,) = read_all("a.parquet"), read_all("a.jsonl")
    assert isinstance(nested, Example)
    assert isinstance(plain, Example)
    assert nested.messages == plain.messages


COLUMNS = "data.train[].columns"


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        (3, ["a mapping or a list of turns", "3"]),
        ({"instruction": "q"}, ["alpaca", "'output'", "missing", "(columns: instruction)", COLUMNS]),
        ({"instruction": "q", "output": None}, ["alpaca", "'output'", "null", "instruction, output", COLUMNS]),
        ({"foo": 1, "bar": 2}, ["no known format", "foo, bar", "data.train[].format", COLUMNS]),
        ({}, ["no known format", "(none)", "data.train[].format", COLUMNS]),
        ({"instruction": "q", "output": 3}, ["output", "text", "3"]),
        ({"instruction": "q", "output": " \n"}, ["output", "empty"]),
        ({"instruction": "q", "output": "a", "history": 3}, ["history", "list of turns", "3"]),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, ["history[0]", "pair", "['x']"]),
        ({"instruction": "\ud800", "output": "a"}, ["instruction", "surrogate", "'\\ud800'"]),
        ({"messages": []}, ["messages", "list of turns", "[]"]),
        ({"messages": "hello"}, ["messages", "list of turns", "'hello'"]),
        ({"messages": ["hello"]}, ["messages[0]", "role and content", "'hello'"]),
        ({"messages": [{"role": "user"}]}, ["messages[0]", "'role'", "'content'", "{'role': 'user'}"]),
        (
            {"messages": [{"role": "user", "content": None}]},
            ["messages[0]", "'role'", "'content'", "{'role': 'user', 'content': None}"],
        ),
        ({"messages": [{"role": "bot", "content": "x"}]}, ["messages[0]", "role", "'bot'", ", ".join(ROLES)]),
        ({"messages": [{"role": ["user"], "content": "x"}]}, ["messages[0]", "role", "['user']", ", ".join(ROLES)]),
        ({"messages": [{"role": "user", "content": 3}]}, ["messages[0].content", "text", "3"]),
        ({"messages": [{"role": "user", "content": "x"}]}, ["no assistant turn"]),
        ({"messages": [{"role": "assistant", "content": "x"}]}, ["before the first user turn"]),
        ({"conversations": [{"from": "observation", "value": "x"}]}, ["no assistant turn"]),
        (["q"], ["no assistant turn"]),
        (["q", 3], ["turns[1]", "text", "3"]),
        ({"text": " "}, ["text is empty"]),
    ],
)
def test_an_unusable_record_is_kept_with_its_line_and_reason(record, parts):
    Path("a.jsonl").write_text("\n" + json.dumps(record) + "\n" + json.dumps(["q", "a"]) + "\n")
    rejected, good = read_all("a.jsonl")
    assert (rejected.source, rejected.record) == ("s", "a.jsonl:2")
    reason = why_unusable(rejected)
    assert [part for part in parts if part not in reason] == []
    assert "\n" not in reason
    assert isinstance(good, Example)


def test_a_broken_line_is_rejected_and_the_others_are_read():
    save("a.jsonl", b'["q", "a"]\n{"instruction": \n["q", "\xe9"]\n' + b"[" * 100_000 + b'\n["q", "a"]\n')
    items = read_all("a.jsonl")
    assert [item.record for item in items if isinstance(item, Example)] == ["a.jsonl:1", "a.jsonl:5"]
    found = reasons(items)
    assert "invalid JSON (Expecting value at column 17): '{\"instruction\":'" in found["a.jsonl:2"]
    assert "not UTF-8 text (byte 0xe9)" in found["a.jsonl:3"]
    assert "unusable JSON (maximum recursion depth exceeded" in found["a.jsonl:4"]


@pytest.mark.parametrize(
    ("name", "content", "place", "parts", "remedy"),
    [
        (
            "a.json",
            '[\n ["q", "\u2028"],\n ["q" "a"]]\n',
            "a.json:3",
            ["invalid JSON", "Expecting ',' delimiter at column 7", """'["q" "a"]]'"""],
            "correct the file",
        ),
        ("a.json", "[\n", "a.json:2", ["invalid JSON", "Expecting value at column 1"], "correct the file"),
        ("a.json", b'[["q",\n"\xe9"]]', "a.json:2", ["not UTF-8", "byte 0xe9"], "UTF-8"),
        ("a.csv", b"text\nok\n\xe9t\xe9\n", "a.csv:3", ["not UTF-8", "byte 0xe9"], "UTF-8"),
        ("a.csv", "text,text\na,b\n", "a.csv:1", ["two columns are named 'text'"], "rename"),
        (
            "a.csv",
            'text\nok\n"open\nend\n',
            "a.csv:3",
            ["invalid CSV", "unexpected end of data"],
            "correct the record",
        ),
        (
            "a.yml",
            "- [a\n- b: [",
            "a.yml:2",
            ["invalid YAML", "did not find expected ',' or ']'"],
            "correct the file",
        ),
        ("a.yml", "- \x00", "a.yml", ["invalid YAML", "unacceptable character #x0000"], "correct the file"),
        ("a.yml", "a: b\n", "a.yml", ["list", "'conversations'"], "correct the file"),
        ("a.yml", "", "a.yml", ["list", "'conversations'"], "correct the file"),
        (
            "a.xyz",
            "",
            "a.xyz",
            ["unknown kind of file"],
            ".jsonl .ndjson .json .txt .csv .parquet .arrow .yml .yaml (each also with .gz .zst .bz2)",
        ),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_refused_in_one_line(name, content, place, parts, remedy):
    save(name, content)
    fact, _, advice = refusal(name).rpartition("; ")
    assert fact.startswith(f"{place}: ")
    assert [part for part in parts if part not in fact] == []
    assert remedy in advice


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.gz", gzip.compress(lines(ALPACA).encode() * 50, mtime=0)[:-12]),
        ("a.parquet", b"PAR1"),
        ("a.parquet", as_parquet(ALPACA)[:-20]),
        ("a.arrow", b""),
    ],
)
def test_a_damaged_binary_file_is_refused_in_one_line(name, content):
    save(name, content)
    message = refusal(name)
    assert message.startswith(f"{name}: cannot be read (")
    assert message.endswith("); write the file again")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_an_empty_file_has_no_records(name):
    save(name, "")
    assert read_all(name) == []


def test_csv_counts_lines_of_the_file_and_keeps_long_and_broken_fields():
    long = "x" * 300_000
    save("a.csv", f'text,n\r\n"a\r\nb",1\r\n\r\nshort\r\n{long},2\r\na,b,c\r\n')
    items = read_all("a.csv")
    assert [(item.record, item.text) for item in items if isinstance(item, Example)] == [
        ("a.csv:2", "a\r\nb"),
        ("a.csv:6", long),
    ]
    assert reasons(items) == {
        "a.csv:5": "has 1 columns, but the header has 2",
        "a.csv:7": "has 3 columns, but the header has 2",
    }


def test_yaml_values_other_than_text_are_rejected_record_by_record():
    save("a.yml", "- [q, yes]\n- [q, !!timestamp 2020-99-99]\n- [q, a]\n- [q, 2020-09-09]\n")
    items = read_all("a.yml")
    assert reasons(items) == {
        "a.yml:1": "turns[1] must be text, but is True",
        "a.yml:2": "unusable YAML (month must be in 1..12)",
    }
    assert isinstance(items[3], Example)
    assert items[3].messages[1].content == "2020-09-09"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("d", ["d/a.txt", "d/b/c.txt", "d/b/d.json", "d/x[1].txt"]),
        ("d/", ["d/a.txt", "d/b/c.txt", "d/b/d.json", "d/x[1].txt"]),
        ("d/*.txt", ["d/a.txt", "d/x[1].txt"]),
        ("d/**/*.txt", ["d/a.txt", "d/b/c.txt", "d/x[1].txt"]),
        ("**/c.*", ["d/b/c.txt"]),
        ("d/?.txt", ["d/a.txt"]),
        ("d/[ab].txt", ["d/a.txt"]),
        ("d/x[1].txt", ["d/x[1].txt"]),
        (["d/b/c.txt", "d/a.txt"], ["d/b/c.txt", "d/a.txt"]),
        ("./d/a.txt", ["d/a.txt"]),
        ("package:fake_package/data/*.txt", ["fake_package/data/a.txt"]),
    ],
)
def test_paths_name_files_folders_globs_lists_and_packages(path, found, monkeypatch):
    for name in (
        "d/a.txt",
        "d/b/c.txt",
        "d/b/d.json",
        "d/x[1].txt",
        "d/.hidden.txt",
        "d/.git/e.txt",
        "d/README.md",
        "d/license",
    ):
        save(name, name)
    for name in ("fake_package/__init__.py", "fake_package/data/a.txt"):
        save(name, "raise ImportError('data is found without importing its package')\n")
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    assert [file.path for file in find_files(Source(name="s", path=path))] == found


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("none.txt", ["none.txt matches no file", "check the path and the working directory"]),
        ("*.txt", ["*.txt matches no file", "check the path and the working directory"]),
        ("none/", ["none/ matches no file", "check the path and the working directory"]),
        (["a.json", "*.json"], ["*.json matches a.json", "remove one of them"]),
        ("package:no_such_thing/x", ["package:no_such_thing/x: ", "'no_such_thing' is not installed"]),
        ("nope://bucket/x", ["nope://bucket/x cannot be read (Unrecognized filesystem type", "check the path"]),
    ],
)
def test_a_path_without_files_is_refused(path, parts):
    save("a.json", "[]")
    message = refusal(path)
    assert message.startswith("source 's': ")
    assert [part for part in parts if part not in message] == []


def test_a_files_identity_is_its_content():
    for name, content in (("a.txt", "x"), ("b.txt", "x"), ("c.txt", "y")):
        save(name, content)
    a, b, c = (file.identity for file in find_files(Source(name="s", path="*.txt")))
    assert a == b != c


REAL = ("alpaca_en_demo.json", "identity.json", "glaive_toolcall_en_demo.json")


@pytest.mark.parametrize("path", samples.files("alpaca.json", "calls.json", more=REAL), ids=lambda path: path.name)
def test_real_data_reads_without_loss(path):
    items = read_all(str(path))
    assert len(items) == len(json.loads(path.read_text()))
    assert not reasons(items)


def conversation(question: str, answer: str = "a") -> Example:
    return Example("s", "f:1", (Message("system", "s"), Message("user", question), Message("assistant", answer)))


@pytest.mark.parametrize(
    ("text", "held_out"),
    # Written down once: a changed hash would train on what earlier runs held out.
    [
        ("Hello, World!", False),
        ("hello world", False),
        ("What is AI?", False),
        ("Tell me a joke", False),
        ("你好", True),
        ("How are you?", True),
        ("?!", True),
    ],
)
def test_the_side_of_an_opening_never_changes(text, held_out):
    assert is_held_out(conversation(text), limit_of_fraction(0.5)) == held_out
    assert is_held_out(Example("t", "g:2", text=text), limit_of_fraction(0.5)) == held_out


def test_examples_that_open_alike_stay_on_one_side():
    assert opening(conversation("Hello,  World!")) == opening(conversation("hello world", "another")) == "hello world"
    assert opening(conversation("?!")) == "?!"
    assert opening(Example("s", "f:1", text="Ein Text.")) == "ein text"


def test_the_held_out_fraction_is_close_to_the_requested_one():
    examples = [conversation(f"question {number}") for number in range(4000)]
    sides = {
        fraction: {e.messages[1].content for e in examples if is_held_out(e, limit_of_fraction(fraction))}
        for fraction in (0.0, 0.1, 0.5)
    }
    assert not sides[0.0]
    assert 320 <= len(sides[0.1]) <= 480
    assert 1850 <= len(sides[0.5]) <= 2150
    assert sides[0.1] <= sides[0.5]


def test_a_link_back_into_its_folder_and_a_path_named_twice_give_no_record_twice():
    save("d/a.txt", "one\ntwo\n")
    Path("d/self").symlink_to(".")
    assert len(read_all("d")) == 2
    assert refusal(["d/a.txt", "d/../d/a.txt"]).endswith("remove one of them")


def test_metadata_and_caches_of_datasets_are_not_read_as_data():
    import datasets

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    records = [{"messages": turns}, {"messages": [turns[0], {"role": "assistant", "content": "", "tool_calls": calls}]}]
    datasets.Dataset.from_list(records).save_to_disk("saved")
    save("data/dataset_info.json", "{}")
    save("data/state.json", lines(records))
    save("other/state.json", lines(records))
    plain = [item.messages for item in read_all("other") if isinstance(item, Example)]
    assert len(plain) == 2
    assert [item.messages for item in read_all("saved") if isinstance(item, Example)] == plain
    datasets.load_from_disk("saved").map(lambda record: {"more": 1}).filter(lambda record: True)
    assert len(list(Path("saved").glob("cache-*.arrow"))) == 2  # the same records again, and their numbers
    for path in ("saved", "saved/*.arrow"):
        assert [item.messages for item in read_all(path) if isinstance(item, Example)] == plain
    save("mine/cache-1.jsonl", lines(records))
    assert len(read_all("mine")) == 2
    assert "data matches no file" in refusal("data")


def test_a_set_saved_with_its_splits_is_read_split_by_split():
    import datasets

    def saved(*names: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"text": name} for name in names])

    datasets.DatasetDict({"test": saved("a"), "train": saved("b", "c"), "valid": saved("d")}).save_to_disk("all/set")
    assert refusal("all/set") == refusal("all")
    for part in ("all/set: ", "the splits test, train, valid", "set path to", "all/set/train"):
        assert part in refusal("all")
    assert len(read_all("all/set/train")) == 2
    assert len(read_all(["all/set/train", "all/set/valid"])) == 3
    datasets.DatasetDict({"train": saved("b", "c")}).save_to_disk("one")
    assert len(read_all("one")) == 2


def test_a_file_uri_is_the_path_that_it_names():
    save("d e/a.txt", "one\n")
    assert len(read_all(f"file://{Path.cwd()}/d%20e/a.txt")) == 1


TALK = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("s.jsonl", TALK.replace('"b"', '"b", "reasoning_content": "\\ud800"'), "unpaired surrogate"),
        ("t.jsonl", TALK.replace("]}", '], "tools": [{"name": "\\ud800"}]}'), "unpaired surrogate"),
        ("w.jsonl", '{"text": "a", "weight": 1' + "0" * 400 + "}", "weight must be a number"),
        ("x.jsonl", '{"text": "a", "weight": 1e-60}', "between 1e-06 and 1e+06"),
        ("n.jsonl", TALK.replace("]}", '], "tools": "' + "[" * 100_000 + '"}'), "tools must be"),
        ("i.jsonl", '{"input_ids": [1, 2], "labels": [-99, 2]}', "labels must contain token IDs only, but has -99"),
        ("b.yaml", "- {text: !!bool maybe}\n- {text: good}\n", "unusable YAML"),
    ],
)  # fmt: skip
def test_an_invalid_part_of_a_record_rejects_that_record_only(name, content, reason):
    save(name, content + "\n")
    item = read_all(name)[0]
    assert isinstance(item, Rejected)
    assert reason in item.reason
    assert len(item.reason) < 300


def test_rejected_records_with_an_unpaired_surrogate_can_be_written(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [{"reason": "\ud800 é"}])
    assert json.loads((tmp_path / "r.jsonl").read_text()) == {"reason": "\ud800 é"}


def test_a_parquet_value_of_invalid_utf8_rejects_its_own_record_only():
    texts = pa.StringArray.from_buffers(
        3, pa.py_buffer(b"\0\0\0\0\4\0\0\0\6\0\0\0\t\0\0\0"), pa.py_buffer(b"good\xff\xfetoo")
    )
    pq.write_table(pa.table({"text": texts}), "p.parquet")
    items = read_all("p.parquet")
    assert [isinstance(item, Rejected) for item in items] == [False, True, False]


def test_a_system_column_opens_a_conversation_that_has_no_system_turn_of_its_own():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [
        {"messages": turns, "system": "S"},
        {"messages": [{"role": "system", "content": "T"}, *turns], "system": "S"},
    ]
    save("m.jsonl", lines(records))
    assert [item.messages[0].content for item in read_all("m.jsonl")] == ["S", "T"]  # type: ignore[union-attr]


def test_a_pretty_printed_object_says_what_is_needed():
    save("one.json", json.dumps({"text": "a"}, indent=2))
    message = refusal("one.json")
    for part in ("one.json: ", "list of records", "one record per line", "convert the file"):
        assert part in message


def test_completions_without_a_prompt_are_held_out_by_their_own_text():
    held = [
        is_held_out(Example("s", "f", text=f"text {number}", prompt_length=0), limit_of_fraction(0.3))
        for number in range(200)
    ]
    assert 30 < sum(held) < 90
