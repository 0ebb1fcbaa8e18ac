"""Duplicates: what counts as one, how many there are, and which are left out of training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysft.cluster.placement import Node
from raysft.config import Config, Source, with_overrides
from raysft.data.duplicates import Duplicates
from raysft.data.prepare import PreparedData, prepare
from raysft.data.rows import copies as compared
from raysft.data.rows.copies import find_copies
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.shards import manifest as manifests
from raysft.data.shards.manifest import load_digests
from raysft.data.shards.parts import load_part, save_part
from raysft.data.shards.ray_pipeline import record_batches
from raysft.data.shards.shard_writer import write_shards
from raysft.data.sources.content import content_digest, normalised
from raysft.data.sources.formats import to_examples
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.data.types import Example
from raysft.errors import RequestError
from raysft.run.inputs import ModelFiles, training_identity
from raysft.run.plan import Plan, make_plan
from tests.shards import data_config, the_set, write_records, written

USER, ANSWER = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}
CALL = {"function": {"name": "f", "arguments": {"a": 1, "b": "x y"}}}


@pytest.fixture(scope="module")
def model(model) -> str:
    return str(model)


def digest(record, source: str = "s", **options) -> bytes:
    ((item, _),) = to_examples([("a:1", record)], Source(name=source, **options))
    assert isinstance(item, Example), item
    return content_digest(item)


def chat(*turns, **more) -> dict:
    return {"messages": list(turns), **more}


def calls(call) -> dict:
    return chat(USER, {"role": "assistant", "content": "", "tool_calls": [call]})


PLAIN = chat(USER, ANSWER)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PLAIN, {"instruction": "How are you?", "output": "Fine."}),
        (PLAIN, {"instruction": "How", "input": "are  you?", "output": " Fine.\n"}),
        (PLAIN, {"turns": ["How are you?", "Fine."]}),
        (PLAIN, chat({**USER, "content": "How\t\nare you? "}, ANSWER)),
        (PLAIN, chat({**USER, "content": [{"type": "text", "text": "How are you?"}]}, {**ANSWER, "train": True})),
        (PLAIN, chat(USER, ANSWER, weight=2.0)),
        (chat({**USER, "content": "ü"}, ANSWER), chat({**USER, "content": "u\u0308"}, ANSWER)),
        (calls(CALL), calls({**CALL, "id": "7"})),
        (calls(CALL), calls({"function": {"arguments": json.dumps({"b": "x  y", "a": 1}), "name": "f"}})),
        (chat(USER, ANSWER, tools=[TOOL]), chat(USER, ANSWER, tools=json.dumps([TOOL]))),
        ({"text": "a b"}, {"text": " a\n b"}),
        ({"text": "ü b c d"}, {"text": "\u3000ü\x1cb\u2028\u00a0c\x0b\x85d\u2003"}),
        ({"prompt": "a ", "completion": "b"}, {"prompt": "a", "completion": " b"}),
        ({"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1, 2]}),
    ],
)
def test_what_says_the_same_has_one_hash(one, other):
    assert digest(one) == digest(other, source="other")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PLAIN, chat(USER, {**ANSWER, "content": "fine."})),
        (PLAIN, chat({"role": "system", "content": "Be kind."}, USER, ANSWER)),
        (PLAIN, chat(USER, ANSWER, USER, ANSWER)),
        (PLAIN, chat(USER, ANSWER, tools=[TOOL])),
        (PLAIN, chat(USER, {**ANSWER, "reasoning_content": "Hm."})),
        (chat(USER, {**ANSWER, "content": "a b"}), chat(USER, {**ANSWER, "content": "ab"})),
        ({"turns": ["a", "b a"]}, {"turns": ["a b", "a"]}),
        (calls(CALL), calls({"function": {"name": "g", "arguments": {"a": 1, "b": "x y"}}})),
        (calls(CALL), calls({"function": {"name": "f", "arguments": {"a": 2, "b": "x y"}}})),
        ({"text": "a b"}, {"prompt": "a ", "completion": "b"}),
        ({"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": "b c"}),
        ({"prompt": "a"}, {"prompt": "a", "completion": "-"}),
        ({"instruction": "a"}, {"instruction": "a", "output": "-"}),
        ({"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}),
    ],
)  # fmt: skip
def test_what_differs_in_a_word_has_another_hash(one, other):
    assert digest(one) != digest(other)


def test_blanks_are_those_of_python():
    blanks = "".join(chr(code) for code in range(0x11000) if chr(code).isspace())
    assert len(blanks) > 20
    assert [normalised(f"ü{blank}a") for blank in blanks] == [normalised("ü a")] * len(blanks)
    others = "".join(chr(code) for code in range(0xD800) if not chr(code).isspace())
    assert b" " not in normalised(others)


def by_hand(train: list[list[int]], evaluation: list[list[int]]) -> tuple[list[bool], ...]:
    """Copies, found one example after the other."""
    repeated, elsewhere, seen = [], [], set()
    for source in train:
        own: set[int] = set()
        for value in source:
            repeated.append(value in own)
            elsewhere.append(value not in own and value in seen)
            own.add(value)
        seen |= own
    evaluated = [value in {each for values in evaluation for each in values} for source in train for value in source]
    for values in evaluation:
        repeated += [value in values[:index] for index, value in enumerate(values)]
    return repeated, elsewhere, evaluated, [value in seen for values in evaluation for value in values]


@pytest.mark.parametrize("part", [1, 7, 1 << 22])
@pytest.mark.parametrize(
    ("kinds", "sizes", "apart"), [(6, (20, 0, 15), (9, 12)), (400, (150, 90), ()), (1, (3,), (2,))]
)
def test_copies_are_those_that_one_finds_one_by_one(monkeypatch, part, kinds, sizes, apart):
    monkeypatch.setattr(compared, "PART", part)
    random = np.random.default_rng(kinds)
    # Hashes that share one half are no copies.
    hashes = np.array([[value // 2, value % 2] for value in range(kinds)], np.uint64)
    train, evaluation = ([random.integers(kinds, size=size).tolist() for size in group] for group in (sizes, apart))
    found = find_copies([hashes[values] for values in train], [hashes[values] for values in evaluation])
    expected = by_hand(train, evaluation)
    for values, wanted in zip((found.repeated, found.elsewhere, found.evaluated, found.trained), expected, strict=True):
        assert values.tolist() == wanted


A = [["one", "1"], ["two", "2"], ["one", " 1\n"], ["three", "3"], ["four", "4"]]
B = [["two", "2"], ["five", "5"], ["six", "6"]]
E = [["six", "6"], ["seven", "7"], ["seven", "7"], ["four", "4"]]


def data(folder: Path, **changes) -> Config:
    for name, records in (("a", A), ("b", B), ("e", E)):
        write_records(folder / f"{name}.jsonl", records)
    config = data_config(folder, ("a", "b"), eval=[{"name": "e", "path": str(folder / "e.jsonl")}], packing=False)
    return with_overrides(config, {f"data.{key}": value for key, value in changes.items()})


COUNTED = Duplicates(
    {"a": {"repeated": 1, "evaluated": 1}, "b": {"repeated_elsewhere": 1, "evaluated": 1}},
    {"e": {"repeated": 1, "trained_on": 2}},
)


def trained(prepared: PreparedData, epoch: int = 0) -> list[str]:
    rows = prepared.train_rows
    ends = np.cumsum([0, *rows.row_plan.rows_of_epochs]).tolist()
    return [rows.records(row)[0].split("/")[-1] for row in range(*ends[epoch : epoch + 2])]


def test_duplicates_are_counted_and_kept(tmp_path, model):
    prepared = prepare(data(tmp_path), model)
    assert prepared.duplicates == COUNTED
    assert len(trained(prepared)) == len(A) + len(B)
    assert prepare(data(tmp_path), model).duplicates == COUNTED  # from the cache


def planned(config: Config, prepared: PreparedData) -> Plan:
    return make_plan(config, prepared, [Node(2.0)])


def test_the_plan_counts_duplicates_and_warns_of_them(tmp_path, model):
    config = data(tmp_path)
    plan = planned(config, prepare(config, model))
    recorded = json.loads(json.dumps(plan.as_dict()))
    assert recorded["sources"]["a"]["counts"] == {"repeated": 1, "evaluated": 1}
    assert recorded["evaluation"]["e"]["counts"] == {"repeated": 1, "trained_on": 2}
    (line,) = [line for line in plan.lines() if line.startswith("duplicates: ")]
    assert line == (
        "duplicates: 2 of 8 training examples are duplicates of another one, 2 of 4 evaluation examples are trained on"
    )
    assert "1 that are duplicates, 1 that are evaluated on" in plan.lines()[0]
    leak, copies = (warning for warning in plan.warnings if "data.duplicates=drop" in warning)
    assert leak.startswith("2 of 4 examples of evaluation set 'e' are trained on")
    assert copies.startswith("2 of 8 training examples are duplicates of another one")
    dropped = data(tmp_path, duplicates="drop")
    plan = planned(dropped, prepare(dropped, model))
    assert plan.examples == plan.rows == 4
    assert [line for line in plan.lines() if line.startswith("duplicates: ")] == [
        "duplicates: 4 of 8 training examples are dropped as duplicates of another one (2) or are evaluated on (2)"
    ]
    assert [warning for warning in plan.warnings if "data.duplicates" in warning] == []


def test_dropping_leaves_the_first_copy_and_nothing_that_is_evaluated(tmp_path, model):
    config = with_overrides(data(tmp_path, duplicates="drop"), {"train.epochs": 2, "train.global_batch_size": 4})
    prepared = prepare(config, model)
    for epoch in (0, 1):
        assert sorted(trained(prepared, epoch)) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4", "b.jsonl:2"]
    assert len(prepared.eval[0]) == len(E)
    assert prepared.eval_rows["e"].row_plan.rows == len(E)
    assert {name: counts["left_out"] for name, counts in prepared.duplicates.train.items()} == {"a": 2, "b": 2}
    assert prepared.duplicates.evaluation == {"e": {"repeated": 1}}


def test_the_order_of_what_is_left_is_that_of_a_source_without_duplicates(tmp_path, model):
    prepared = prepare(data(tmp_path, duplicates="drop", shuffle=False), model)
    assert trained(prepared) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4", "b.jsonl:2"]


@pytest.mark.parametrize("layout", ["packed", "single", "joined"])
def test_nothing_dropped_is_the_plan_of_all_examples(tmp_path, model, layout):
    write_records(
        tmp_path / "c.jsonl", [[f"question {number}", "x" * (number % 7)] for number in range(1, 60) if number % 7]
    )
    rows = PackedDataset(
        (written(the_set(data_config(tmp_path, ("c",)), model), model).path.location,), 64, 4, epochs=2, layout=layout
    )
    every, apart = rows.row_plan, replace(rows, apart_from=()).row_plan
    for one, other in zip(every.segments, apart.segments, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("policy", ["keep", "drop"])
@pytest.mark.parametrize("mixing", ["first_exhausted", "all_exhausted"])
def test_mixing_takes_from_what_is_left_and_the_plan_says_how_much(tmp_path, model, mixing, policy):
    """``left``: of a 3 of 5 and of b 1 of 3; with weights 3 to 1 both run out together."""
    changed = {"mixing": mixing, "train.0.weight": 3.0, "train.1.weight": 1.0}
    config = data(tmp_path, duplicates=policy, **changed)
    prepared = prepare(config, model)
    found = [record.partition(".")[0] for record in trained(prepared)]
    sizes = (3, 1) if policy == "drop" else (len(A), len(B))
    share = (min if mixing == "first_exhausted" else max)(sizes[0] / 3, sizes[1])
    assert (found.count("a"), found.count("b")) == (round(3 * share), round(share))
    assert planned(config, prepared).examples == len(found)
    if policy == "drop":
        assert sorted(trained(prepared)) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4", "b.jsonl:2"]
        said = [line for line in planned(config, prepared).lines() if line.startswith("duplicates: 4 of 8 training")]
        assert said


def test_a_source_of_which_nothing_is_left_is_told_and_refused_where_it_has_a_share(tmp_path, model):
    config = data(tmp_path, duplicates="drop")
    write_records(tmp_path / "b.jsonl", [A[0], E[1]])
    prepared = prepare(config, model)
    assert sorted(trained(prepared)) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    plan = planned(config, prepared)
    assert (plan.examples, plan.rows) == (3, 3)
    assert [line for line in plan.warnings if line.startswith("source 'b': all of its 2 examples are in an evaluation")]
    message = r"^source 'b': all of its 2 examples are .*data\.duplicates=keep$"
    with pytest.raises(RequestError, match=message):
        prepare(with_overrides(config, {"data.mixing": "all_exhausted"}), model)
    write_records(tmp_path / "a.jsonl", E[:1])
    write_records(tmp_path / "b.jsonl", E[1:])
    with pytest.raises(RequestError, match=r"^source 'a': all of its 1 examples"):
        prepare(config, model)


def test_held_out_examples_are_compared_too(tmp_path, model):
    records = [{"messages": [{"role": "system", "content": "s" * (n % 2)}, *PLAIN["messages"]]} for n in range(2)]
    openings = [[f"opening {number}", "x"] for number in range(40)]
    write_records(tmp_path / "a.jsonl", [*openings, *openings, *records])
    prepared = prepare(with_overrides(data_config(tmp_path), {"data.holdout": 0.3}), model)
    held_out, left = len(prepared.eval[0]), len(prepared.train[0])
    assert held_out + left == 82
    counts = prepared.duplicates
    assert counts.train["a"]["repeated"] + counts.evaluation["a"]["repeated"] == 40
    assert "trained_on" not in counts.evaluation["a"]  # copies have the same opening


def test_pieces_of_a_split_example_are_no_copies_of_each_other(tmp_path, model):
    long = ["q", "word " * 200]
    write_records(tmp_path / "a.jsonl", [long, ["other", "a"], long])
    prepared = prepare(data_config(tmp_path, on_overflow="split"), model)
    pieces = (len(prepared.train[0]) - 1) // 2
    assert pieces > 1
    assert prepared.duplicates.train == {"a": {"repeated": pieces}}


def test_hashes_survive_a_stop_and_are_read_apart_from_the_manifest(tmp_path, model, monkeypatch):
    write_records(tmp_path / "a.jsonl", A)
    each = the_set(data_config(tmp_path), model)
    (records,) = record_batches(each.files)
    (shard,) = write_shards([each], records, Tokenizer.load(model))
    save_part(each.directory, "part-x.json", shard)
    kept = load_part(each.directory, "part-x.json")
    assert kept is not None
    assert np.array_equal(kept.digests, shard.digests)
    expected = [digest({"turns": record}) for record in A]
    assert [values.tobytes() for values in load_digests(written(each, model).path)] == expected
    read: list[str] = []
    real = manifests.read_table
    monkeypatch.setattr(manifests, "read_table", lambda path, columns: read.extend(columns) or real(path, columns))
    manifests.load_manifest(each.manifest)
    assert read == ["shard", "length", "loss_tokens"]


def test_other_evaluation_sets_are_other_training_rows_where_duplicates_are_dropped(tmp_path, model):
    def identities(**changes) -> tuple[dict[str, str], PackedDataset]:
        config = data(tmp_path, **changes)
        prepared = prepare(config, model)
        return training_identity(config, ModelFiles(str(model), None, None), prepared), prepared.train_rows

    name = "the data of source 'a'"
    for policy, same in (("keep", True), ("drop", False)):
        before, rows = identities(duplicates=policy)
        after, changed = identities(duplicates=policy, eval=[])
        assert (before[name] == after[name]) == same
        assert rows.has_same_epochs(changed) == same
        assert (rows.content() == changed.content()) == same
    stored = json.loads(json.dumps(rows.to_dict()))
    assert PackedDataset.from_dict(stored) == replace(rows, global_batch_size=rows.row_plan.global_batch_size)
