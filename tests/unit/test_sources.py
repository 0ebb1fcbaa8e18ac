"""What people bring from other programs: prompts without answers, thoughts before calls, numbers of examples, file order."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysft.config import Config, Source, parse, with_overrides
from raysft.data.prepare import prepare
from raysft.data.shards import ray_pipeline
from raysft.data.shards.manifest import load_manifest
from raysft.data.sources.formats import to_examples
from raysft.data.sources.holdout import limit_of_count
from raysft.data.sources.pickle_guard import read_table
from raysft.data.sources.sampling import RandomSample, RecordSlice
from raysft.data.types import Example, Rejected
from raysft.errors import RequestError
from raysft.generate.metrics import flat_results, score_labelled
from raysft.models.tokenizer import load_tokenizer
from raysft.storage.path import StoragePath
from tests.shards import data_config, write_records


@pytest.fixture(scope="module")
def model(model) -> str:
    return str(model)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr(ray_pipeline, "LOCAL_BYTES", 1 << 40)


def example(record, **options) -> Example | Rejected:
    ((item, _),) = to_examples([("a:1", record)], Source(name="s", **options))
    return item


def turns(item: Example | Rejected) -> list[tuple[str, str]]:
    assert isinstance(item, Example), item
    return [(message.role, message.content) for message in item.messages]


PROMPTS = [
    {"instruction": "Say it"},
    {"instruction": "", "input": "Say it", "output": None},
    {"instruction": "Say it", "input": "", "output": ""},
    {"messages": [{"role": "user", "content": "Say it"}]},
    {"conversations": [{"from": "human", "value": "Say it"}]},
    ["Say it"],
    {"instruction": "Say it", "output": " "},
    {"messages": [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": ""}]},
    {"conversations": [{"from": "human", "value": "Say it"}, {"from": "gpt", "value": "\n"}]},
    ["Say it", ""],
]


@pytest.mark.parametrize("record", PROMPTS)
def test_a_record_without_an_answer_is_a_prompt(record):
    item = example({"turns": record} if isinstance(record, list) else record)
    assert turns(item)[:-1] == [("user", "Say it")]
    assert isinstance(item, Example)
    assert item.unanswered


def test_an_instruction_may_be_empty():
    assert turns(example({"instruction": "", "input": "q", "output": "a"})) == [("user", "q"), ("assistant", "a")]
    assert turns(example({"instruction": "i", "input": "q", "output": "a"}))[0] == ("user", "i\nq")


def test_history_before_a_prompt_is_kept():
    item = example({"instruction": "now", "history": [["x", "y"]]})
    assert turns(item)[:-1] == [("user", "x"), ("assistant", "y"), ("user", "now")]


def prompts_of(config: Config, model: str) -> list[dict]:
    prepared = prepare(config, model)
    (manifest,) = prepared.prompts
    return read_table(manifest.shard_paths()[0]).to_pylist()


def config_with_eval(folder: Path, **changes) -> Config:
    config = data_config(folder, eval=[{"name": "e", "path": str(folder / "e.jsonl")}])
    return with_overrides(config, changes)


def test_a_prompt_is_what_generation_renders_and_has_no_reference(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [["q", "a"]])
    write_records(tmp_path / "e.jsonl", [*PROMPTS, {"messages": [{"role": "user", "content": "Say it"},
                                                              {"role": "assistant", "content": "it"}]}])  # fmt: skip
    config = config_with_eval(tmp_path)
    rows = prompts_of(config, model)
    expected = load_tokenizer(model).apply_chat_template(
        [{"role": "user", "content": "Say it"}], tokenize=False, add_generation_prompt=True
    )
    assert [row["prompt"] for row in rows] == [expected] * (len(PROMPTS) + 1)
    assert [row["reference"] for row in rows] == [""] * len(PROMPTS) + ["it"]
    prepared = prepare(config, model)
    assert prepared.eval[0].counts["unanswered"] == len(PROMPTS)
    assert prepared.eval[0].loss_tokens.tolist()[: len(PROMPTS)] == [0] * len(PROMPTS)
    assert list(prepared.eval_rows) == ["e"]


HISTORY = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
QUESTION = {"role": "user", "content": "Say it"}
WEATHER = {"type": "function", "function": {"name": "f", "arguments": {}}}
OPEN = [
    {"messages": [*HISTORY, QUESTION]},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"},
                       {"from": "human", "value": "Say it"}]},
    ["Hello", "Hi", "Say it"],
    {"messages": [*HISTORY, QUESTION, {"role": "assistant", "content": "", "tool_calls": [WEATHER]},
                  {"role": "tool", "content": "sunny"}]},
]  # fmt: skip


def test_a_conversation_that_ends_with_a_question_is_asked_to_its_end_and_trained_on_before_it(tmp_path, model):
    """Its loss is that of the answers that it has."""
    write_records(tmp_path / "a.jsonl", [["q", "a"]])
    write_records(tmp_path / "e.jsonl", [*OPEN, {"messages": HISTORY}])
    config, tokenizer = config_with_eval(tmp_path, **{"data.sequence_length": 256}), load_tokenizer(model)
    rows = prompts_of(config, model)
    asked = tokenizer.apply_chat_template([*HISTORY, QUESTION], tokenize=False, add_generation_prompt=True)
    assert [row["prompt"] for row in rows[:3]] == [asked] * 3
    assert rows[0]["prompt_ids"] == tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert rows[3]["prompt"].startswith(asked.removesuffix("<|im_start|>assistant\n"))
    assert rows[3]["prompt"].endswith("\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert [row["reference"] for row in rows] == ["", "", "", "", "Hi"]
    loss_tokens = prepare(config, model).eval[0].loss_tokens.tolist()
    assert loss_tokens[:3] == [loss_tokens[4]] * 3
    assert loss_tokens[3] > loss_tokens[4] > 0


@pytest.mark.parametrize("thinking", ["template", "keep", "empty", "last"])
def test_a_question_at_the_end_is_asked_as_one_whose_answer_is_known(tmp_path, model, thinking):
    """Thoughts are written in front of the answer as configured, whether or not the record has the answer."""
    write_records(tmp_path / "a.jsonl", [["q", "a"]])
    thought = [QUESTION, {"role": "assistant", "content": "<think>\nso\n</think>\n\nHi"}, QUESTION]
    answered = [*thought, {"role": "assistant", "content": "it"}]
    write_records(tmp_path / "e.jsonl", [{"messages": thought}, {"messages": answered}])
    settings = {"model.chat_template": "qwen3", "data.thinking": thinking, "data.sequence_length": 256}
    rows = prompts_of(config_with_eval(tmp_path, **settings), model)
    assert rows[0]["prompt"] == rows[1]["prompt"]
    assert [row["reference"] for row in rows] == ["", "it"]


def test_a_prompt_longer_than_a_row_is_generated_for(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [["q", "a"]])
    write_records(tmp_path / "e.jsonl", [{"instruction": "word " * 300}, {"prompt": "word " * 300}])
    lengths = [len(row["prompt_ids"]) for row in prompts_of(config_with_eval(tmp_path), model)]
    assert min(lengths) > 300


def test_a_set_of_prompts_alone_is_not_evaluated(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [["q", "a"]])
    write_records(tmp_path / "e.jsonl", [{"instruction": "one"}, {"prompt": "two"}])
    prepared = prepare(config_with_eval(tmp_path), model)
    assert prepared.eval_rows == {}
    assert len(prepared.prompts[0]) == 2
    compared = {"train.eval_every_steps": 1, "train.keep_best": True}
    with pytest.raises(RequestError, match=r"^train\.keep_best compares .*no example of data\.eval has an answer; "):
        prepare(config_with_eval(tmp_path, **compared), model)


def test_a_set_of_prompts_alone_has_no_metric_to_choose_the_best_model_by(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [["q", "a"]])
    write_records(tmp_path / "e.jsonl", [{"instruction": "one"}, {"prompt": "two"}])
    write_records(tmp_path / "f.jsonl", [["q", "a"]])
    sets = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in "ef"]
    compared = {"train.eval_every_steps": 1, "train.keep_best": True, "data.eval": sets}
    for metric in ("eval_e_loss", "eval_f_loss"):
        with pytest.raises(
            RequestError, match=rf"^train\.best_metric={metric} .* only f has .*; .* use one of eval_loss, "
        ):
            prepare(config_with_eval(tmp_path, **compared, **{"train.best_metric": metric}), model)
    assert list(prepare(config_with_eval(tmp_path, **compared), model).eval_rows) == ["f"]


@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_a_record_without_an_answer_is_rejected_in_training(tmp_path, model, holdout):
    write_records(tmp_path / "a.jsonl", [*(["q" + str(n), "a"] for n in range(9)), {"instruction": "Say it"}])
    config = with_overrides(data_config(tmp_path), {"data.holdout": holdout})
    with pytest.raises(RequestError, match=r"a\.jsonl:10: format alpaca requires 'output'.*data\.max_rejected"):
        prepare(config, model)
    prepared = prepare(with_overrides(config, {"data.max_rejected": 0.5}), model)
    rejected = [item for manifest in (*prepared.train, *prepared.eval) for item in manifest.rejected]
    assert {item.record for item in rejected} == {f"{tmp_path}/a.jsonl:10"}


def test_predictions_without_a_label_are_not_scored_but_counted():
    config = parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}]},
                    "generate": {"metrics": ["exact_match"]}})  # fmt: skip
    pairs = [("a", "a"), ("b", "c"), ("d", ""), ("e", "")]
    rows = [{"predict": predict, "label": label, "source": "s"} for predict, label in pairs]
    results = flat_results(score_labelled(config, rows))
    assert results["predict_exact_match"] == 0.5
    assert (results["predict_examples"], results["predict_unscored"]) == (2, 2)
    assert "predict_unscored" not in flat_results(score_labelled(config, rows[:2]))
    assert flat_results(score_labelled(config, rows[2:])) == {"predict_examples": 0, "predict_unscored": 2}


CALL = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        (json.dumps(CALL), ""),
        (f"<think>\nOne and\none.\n</think>\n\n{json.dumps(CALL)}", "<think>\nOne and\none.\n</think>\n\n"),
        (f" \n<think>hm</think>{json.dumps([CALL])}", "<think>hm</think>"),
    ],
)
def test_a_thought_before_a_call_stays_in_its_turn(text, thought):
    conversation = [{"from": "human", "value": "q"}, {"from": "function_call", "value": text}]
    item = example({"conversations": conversation})
    assert isinstance(item, Example), item
    assert item.messages[-1].content == thought
    assert [call["function"] for call in item.messages[-1].tool_calls] == [CALL]


def test_a_thought_without_a_call_is_rejected():
    item = example({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "<think>x"}]})
    assert isinstance(item, Rejected)
    assert "is a function call and must be JSON, but is '<think>x'" in item.reason


def first_bytes(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def questions(manifest) -> list[str]:
    return [record for path in manifest.shard_paths() for record in read_table(path)["record"].to_pylist()]


def test_a_number_of_examples_is_held_out_of_all_sources(tmp_path, model):
    texts = {"a": [f"one {number}" for number in range(30)], "b": [f"two {number}" for number in range(10)]}
    for name, openings in texts.items():
        write_records(tmp_path / f"{name}.jsonl", [[opening, "x"] for opening in openings])
    config = with_overrides(data_config(tmp_path, ("a", "b")), {"data.holdout": 8})
    prepared = prepare(config, model)
    smallest = sorted((first_bytes(text), text) for openings in texts.values() for text in openings)[:8]
    expected = {
        f"{tmp_path}/{name}.jsonl:{number + 1}"
        for name, openings in texts.items()
        for number, text in enumerate(openings)
        if text in {chosen for _, chosen in smallest}
    }
    held_out = {record for manifest in prepared.eval for record in questions(manifest)}
    trained = {record for manifest in prepared.train for record in questions(manifest)}
    assert held_out == expected
    assert len(trained) == 32
    assert not trained & held_out
    again = prepare(config, model)
    assert [manifest.reused for manifest in (*again.train, *again.eval)] == [True] * 4


def test_a_source_without_a_held_out_example_is_trained_on_as_a_whole(tmp_path, model):
    openings = sorted((f"opening {number}" for number in range(20)), key=first_bytes)
    write_records(tmp_path / "a.jsonl", [[opening, "x"] for opening in openings[:-1]])
    write_records(tmp_path / "b.jsonl", [[openings[-1], "x"]])
    prepared = prepare(with_overrides(data_config(tmp_path, ("a", "b")), {"data.holdout": 1}), model)
    assert [(manifest.name, len(manifest)) for manifest in prepared.train] == [("a", 18), ("b", 1)]
    assert [(manifest.name, len(manifest)) for manifest in prepared.eval] == [("a", 1)]


def test_examples_with_the_same_opening_are_counted_up_to_the_last():
    hashes = np.array([7, 3, 9, 3, 3, 5], np.uint64)
    assert [int((hashes < limit_of_count(count, hashes)).sum()) for count in (1, 2, 3, 4, 5)] == [3, 3, 3, 4, 5]
    largest = np.array([2**64 - 1, 0], np.uint64)
    assert limit_of_count(1, largest) == 1


@pytest.mark.parametrize(
    ("count", "hashes", "message"),
    [
        (6, [1, 2, 3, 4, 5, 6], "data.holdout=6 must be less than the number of examples in data.train, but there are 6; "),
        (900, [1], "there are 1; lower it"),
        (1, [4, 4, 4], "data.holdout=1 holds out examples with the same opening together, but that leaves none of the 3 "),
        (1, [2**64 - 1] * 2, "leaves none of the 2 "),
    ],
)  # fmt: skip
def test_nothing_left_to_train_on_is_refused(count, hashes, message):
    with pytest.raises(RequestError) as caught:
        limit_of_count(count, np.array(hashes, np.uint64))
    assert message in str(caught.value)


def test_without_shuffling_rows_are_in_the_order_of_the_files(tmp_path, model):
    for name in ("a", "b"):
        write_records(tmp_path / f"{name}.jsonl", [[f"{name} {number}", "x"] for number in range(20)])
    config = with_overrides(
        data_config(tmp_path, ("a", "b")), {"data.shuffle": False, "data.packing": False, "train.epochs": 2}
    )
    rows = prepare(config, model).train_rows
    order = [f"{name}: {tmp_path}/{name}.jsonl:{number}" for name in ("a", "b") for number in range(1, 21)]
    read = [record for row in range(rows.row_plan.rows) for record in rows.records(row)]
    assert read == order * 2
    packed = prepare(with_overrides(config, {"data.packing": True}), model).train_rows
    first = [min(map(order.index, packed.records(row))) for row in range(packed.row_plan.rows_of_epochs[0])]
    assert first == sorted(first)
    shuffled = prepare(with_overrides(config, {"data.shuffle": True}), model).train_rows
    assert [shuffled.records(row)[0] for row in range(40)] != order
    assert rows.has_same_epochs(replace(rows, epochs=9))
    assert not rows.has_same_epochs(shuffled)


def test_the_first_examples_of_each_source_are_used(tmp_path, model):
    for name in ("a", "b"):
        write_records(tmp_path / f"{name}.jsonl", [[f"{name} {number}", "x"] for number in range(20)])
    config = with_overrides(data_config(tmp_path, ("a", "b")), {"data.max_examples": 3, "data.train.1.max_examples": 5})
    prepared = prepare(config, model)
    assert [questions(manifest) for manifest in prepared.train] == [
        [f"{tmp_path}/{name}.jsonl:{number}" for number in range(1, count + 1)] for name, count in (("a", 3), ("b", 5))
    ]
    more = with_overrides(config, {"data.max_examples": 4})
    assert [len(manifest) for manifest in prepare(more, model).train] == [4, 5]
    assert len(load_manifest(StoragePath(prepared.train_rows.manifests[0]))) == 3


@pytest.mark.parametrize(
    ("part", "sampled", "expected"),
    [
        # The numbers that ``datasets`` 5.2 gives for ``train[…]`` of 15 records.
        (":4", None, range(4)),
        ("3:5", None, range(3, 5)),
        ("12:", None, range(12, 15)),
        ("-4:", None, range(11, 15)),
        (":-4", None, range(11)),
        ("10%:50%", None, range(2, 8)),
        ("90%:", None, range(14, 15)),
        ("-99:3", None, range(3)),
        ("5:3", None, ()),
        (":100", None, range(15)),
        (":", None, range(15)),
        (":1_0", None, range(10)),
        (":" + "9" * 30, None, range(15)),
        # A percentage is rounded before its sign counts, and makes one of the other number.
        ("-3%:", None, range(15)),
        (":-3%", None, ()),
        ("-10%:", None, range(13, 15)),
        ("-0:", None, range(15)),
        ("20:50%", None, range(3, 8)),
        ("10%:-20", None, range(2, 12)),
        ("5:10", 5, range(5, 10)),
    ],
)
def test_a_slice_gives_the_records_that_datasets_gives(part, sampled, expected):
    def read():
        return ((f"f:{number}", 1, {}) for number in range(15))

    chosen = RandomSample(sampled, 0, RecordSlice.of(part)) if sampled else RecordSlice.of(part)
    assert sorted(int(location[2:]) for location, _, _ in chosen.select(read)) == list(expected)
    assert len(list(chosen.select(read, limit=2))) == min(2, len(expected))


def test_a_slice_is_taken_over_all_files_before_the_first_examples(tmp_path, model):
    for name in ("1", "2"):
        write_records(tmp_path / f"{name}.jsonl", [[f"{name} {number}", "x"] for number in range(10)])
    config = with_overrides(
        data_config(tmp_path), {"data.train.0.path": str(tmp_path / "*.jsonl"), "data.train.0.slice": "25%:75%"}
    )
    (manifest,) = prepare(config, model).train
    records = [f"{tmp_path}/{name}.jsonl:{number}" for name in ("1", "2") for number in range(1, 11)]
    assert questions(manifest) == records[5:15]
    (manifest,) = prepare(with_overrides(config, {"data.max_examples": 2}), model).train
    assert questions(manifest) == records[5:7]
    with pytest.raises(RequestError, match=r"data\.train\.0\.slice=.?abc.?: must be a slice of records, such as :1000"):
        with_overrides(config, {"data.train.0.slice": "abc"})
