"""Tokenized shards: their cache key, what is counted, and when data is refused."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raysft.config import Config, with_overrides
from raysft.data.shards import build, ray_pipeline
from raysft.data.shards.build import build_shards
from raysft.data.shards.manifest import load_manifest, save_manifest
from raysft.data.shards.parts import kept_parts, load_part, part_name, remove_parts, save_part
from raysft.data.shards.prompts import write_prompts
from raysft.data.shards.ray_pipeline import record_batches
from raysft.data.shards.shard_set import ShardSet, resolve_shard_set
from raysft.data.shards.shard_writer import write_shards
from raysft.data.sources.sampling import RandomSample
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.errors import RequestError, RunStopped
from raysft.run.inputs import check_tokens
from raysft.stopping import stoppable
from tests import messages
from tests.shards import data_config, the_set, write_records, written
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

GOOD = ["How are you?", "Fine."]
LONG = ["Tell me all.", "word " * 100]


@pytest.fixture(scope="module")
def model(tokenizer_with) -> str:
    return tokenizer_with()


@pytest.fixture(autouse=True)
def _without_ray(tmp_path, monkeypatch):
    """Write shards in this process, without Ray."""

    def write_in_process(sets_by_source, load_tokenizer, notify, data_label):
        tokenizer = load_tokenizer()
        return {
            each.directory: [
                shard
                for records in record_batches(each.files, each.source.max_examples, each.sample)
                for shard in write_shards([each], records, tokenizer)
            ]
            for sets in sets_by_source
            for each in sets
        }

    monkeypatch.setattr(build, "write_shard_sets", write_in_process)
    monkeypatch.chdir(tmp_path)


def refusal(sets: list[ShardSet], model: str, max_rejected: float = 0.0) -> str:
    message = messages.refusal(build_shards, sets, model, max_rejected)
    assert not any(each.manifest.exists() for each in sets)
    return message


def records_of(each: ShardSet, model: str) -> list[str]:
    return [
        record
        for path in written(each, model).shard_paths()
        for record in pq.read_table(path.local)["record"].to_pylist()
    ]


@pytest.mark.parametrize("holdout", [0.1, 0.5, 0.9])
def test_training_and_held_out_splits_are_disjoint_and_complete(tmp_path, model, holdout):
    write_records(tmp_path / "a.jsonl", [[f"question {number}", "a"] for number in range(60)] + [3])
    config = data_config(tmp_path, holdout=holdout)
    train, held_out = (set(records_of(the_set(config, model, split=split), model)) for split in ("train", "holdout"))
    assert not train & held_out
    assert train | held_out == {f"a.jsonl:{line}" for line in range(1, 61)}


def test_unreadable_records_are_counted_once_in_the_training_split(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [[f"question {number}", "a"] for number in range(60)] + [3])
    config = data_config(tmp_path, holdout=0.5)
    train, held_out = (written(the_set(config, model, split=split), model) for split in ("train", "holdout"))
    assert [item.record for item in train.rejected] == ["a.jsonl:61"]
    assert held_out.rejected == ()
    assert train.records + held_out.records == 61


def test_what_two_want_at_the_same_time_is_written_once(tmp_path, model, monkeypatch):
    write_records(tmp_path / "a.jsonl", [[f"question {number}", "a"] for number in range(20)])
    config = data_config(tmp_path, holdout=0.5)
    sets = [the_set(config, model, split=split) for split in ("train", "holdout")]
    writing, asked, write, said = threading.Event(), [], build.write_shard_sets, []

    def write_slowly(sets_by_source, *arguments):
        asked.append(sets_by_source)
        writing.set()
        while not said:
            time.sleep(0.01)
        return write(sets_by_source, *arguments)

    monkeypatch.setattr(build, "write_shard_sets", write_slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(build_shards, sets, model, 0)
        assert writing.wait(20)
        second = build_shards(sets[::-1], model, 0, notify=said.append)
    assert len(asked) == 1
    assert [manifest.reused for manifest in (*first.result(), *second)] == [False, False, True, True]
    assert [len(manifest) for manifest in second[::-1]] == [len(manifest) for manifest in first.result()]
    assert f"process {os.getpid()} on " in said[0]
    assert not [each for each in sets if (each.directory / ".lock").exists()]


def test_max_examples_reads_the_first_records(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD, 3, GOOD, GOOD])
    config = with_overrides(data_config(tmp_path), {"data.train.0.max_examples": 2})
    manifest = written(the_set(config, model), model)
    assert (len(manifest), manifest.records, len(manifest.rejected)) == (1, 2, 1)


def drawn_of(config: Config, model: str, **options) -> list[str]:
    changes = {f"data.train.0.{name}" if name != "seed" else "run.seed": value for name, value in options.items()}
    return records_of(the_set(with_overrides(config, changes), model), model)


def test_num_samples_draws_records_by_the_seed(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD] * 20)
    config = data_config(tmp_path)
    drawn = drawn_of(config, model, num_samples=8)
    assert len(set(drawn)) == 8
    assert drawn == drawn_of(config, model, num_samples=8) != [f"a.jsonl:{line}" for line in range(1, 9)]
    assert set(drawn) != set(drawn_of(config, model, num_samples=8, seed=1))
    assert set(drawn_of(config, model, num_samples=8, max_examples=3)) < set(drawn)
    # The same records as numpy's legacy generator draws with this seed.
    np.random.seed(42)
    assert set(drawn_of(config, model, num_samples=8, seed=42)) == {
        f"a.jsonl:{index + 1}" for index in np.random.permutation(20)[:8]
    }


def test_num_samples_repeats_records_if_there_are_fewer(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD] * 5)
    config = data_config(tmp_path)
    drawn = drawn_of(config, model, num_samples=12)
    assert len(drawn) == len(set(drawn)) == 12  # repetitions have distinct locations
    assert {place.split("#")[0] for place in drawn} == {f"a.jsonl:{line}" for line in range(1, 6)}
    assert list(record_batches([], None, RandomSample(3, 0))) == [[]]


def test_a_set_is_written_once_and_found_again(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD] * 3)
    each = the_set(data_config(tmp_path), model)
    first, again = build_shards([each], model, 0)[0], build_shards([each], model, 0)[0]
    assert (first.reused, again.reused) == (False, True)
    assert first.shards == again.shards
    assert first.lengths.tolist() == again.lengths.tolist()


def test_a_set_to_train_and_to_evaluate_on_holds_each_example_once(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD] * 3)
    config = data_config(tmp_path)
    train, evaluation = build_shards([the_set(config, model), the_set(config, model)], model, 0)
    assert len(train) == len(evaluation) == 3


def changed_file(config: Config, folder: Path) -> Config:
    write_records(folder / "a.jsonl", [GOOD, GOOD])
    return config


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda config, folder: config, True),
        (changed_file, False),
        (lambda config, folder: with_overrides(config, {"data.sequence_length": 32}), False),
        (lambda config, folder: with_overrides(config, {"data.mask_history": True}), False),
        (lambda config, folder: with_overrides(config, {"data.train.0.max_examples": 1}), False),
        (lambda config, folder: with_overrides(config, {"data.train.0.num_samples": 1}), False),
        (lambda config, folder: with_overrides(config, {"data.train.0.name": "b"}), False),
        (lambda config, folder: with_overrides(config, {"data.on_overflow": "drop"}), False),
        (lambda config, folder: with_overrides(config, {"stage": "pt"}), False),
        (lambda config, folder: with_overrides(config, {"data.holdout": 0.1}), True),
        (lambda config, folder: with_overrides(config, {"train.learning_rate": 1.0}), True),
        (lambda config, folder: with_overrides(config, {"run.name": "other"}), True),
        (lambda config, folder: with_overrides(config, {"data.packing": False}), True),
    ],
)
def test_the_key_follows_what_decides_the_shards(tmp_path, model, change, same):
    write_records(tmp_path / "a.jsonl", [GOOD])
    before = the_set(data_config(tmp_path), model)
    after = the_set(change(data_config(tmp_path), tmp_path), model)
    assert (before.directory == after.directory) == same


def test_another_template_is_another_key(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD])
    other = tiny_tokenizer()
    other.chat_template = CHAT_TEMPLATE + " "
    other.save_pretrained(tmp_path / "other")
    config = data_config(tmp_path)
    assert the_set(config, model).directory != the_set(config, str(tmp_path / "other")).directory


@pytest.mark.parametrize(
    ("records", "options", "start", "parts", "remedies"),
    [
        (
            [GOOD, LONG, LONG],
            {},
            "a.jsonl:2: 523 tokens",
            ["(and 1 more)"],
            ["raise data.sequence_length", "data.on_overflow"],
        ),
        (
            [LONG],
            {"on_overflow": "drop"},
            "source 'a': ",
            ["no usable example", "a.jsonl", "1 records", "1 dropped", "data.sequence_length=64", "523 tokens"],
            ["raise data.sequence_length", "data.on_overflow"],
        ),
        (
            [LONG, 3, LONG + LONG],
            {"on_overflow": "drop", "max_rejected": 0.5},
            "source 'a': ",
            ["no usable example", "3 records", "2 dropped", "1046 tokens", "a.jsonl:2: "],
            ["raise data.sequence_length", "data.on_overflow"],
        ),
        ([], {}, "source 'a': ", ["no usable example", "0 records", "a.jsonl"], ["add data"]),
        ([GOOD, 3], {}, "a.jsonl:2: ", ["3"], ["correct the data", "data.max_rejected=0"]),
        (
            [GOOD, ["q"], 3, GOOD],
            {"max_rejected": 0.25},
            "a.jsonl:2: ",
            ["(and 1 more of 4 records of 'a')"],
            ["correct the data", "data.max_rejected=0.25"],
        ),
        ([{"text": "abc"}], {}, "a.jsonl:1: ", ["'a'", "raw text", "stage: sft"], ["set stage: pt", "format"]),
        ([GOOD], {"stage": "pt"}, "a.jsonl:1: ", ["'a'", "conversations", "stage: pt"], ["set stage: sft", "format"]),
    ],
)
def test_data_that_cannot_be_used_is_refused_before_a_manifest_is_written(
    tmp_path, model, records, options, start, parts, remedies
):
    write_records(tmp_path / "a.jsonl", records)
    config = data_config(tmp_path, **options)
    message = refusal([the_set(config, model)], model, config.data.max_rejected)
    fact, _, remedy = message.rpartition("; ")
    assert fact.startswith(start)
    assert [part for part in parts if part not in fact] == []
    assert [part for part in remedies if part not in remedy] == []


def test_an_empty_held_out_split_is_refused(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [["What is AI?", "a"]])
    config = data_config(tmp_path, holdout=0.01)
    message = refusal([the_set(config, model, split="holdout")], model)
    for part in (
        "source 'a': ",
        "data.holdout=0.01",
        "no usable example",
        "(0 records fall into it)",
        "add data, or raise data.holdout",
    ):
        assert part in message


def test_rejected_and_dropped_records_within_the_limit_are_kept_in_the_manifest(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD, LONG, 3, GOOD])
    each = the_set(data_config(tmp_path, on_overflow="drop"), model)
    for manifest in (*build_shards([each], model, 0.25), *build_shards([each], model, 0.25)):
        assert [item.record for item in manifest.rejected] == ["a.jsonl:3"]
        assert [item.record for item in manifest.dropped] == ["a.jsonl:2"]
        assert (len(manifest), manifest.records) == (2, 4)


def test_a_stricter_limit_applies_to_cached_shards_too(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD, 3])
    each = the_set(data_config(tmp_path), model)
    build_shards([each], model, 0.5)
    with pytest.raises(RequestError, match=r"^a\.jsonl:2: .*raise data\.max_rejected=0\.1$"):
        build_shards([each], model, 0.1)


def test_corrected_data_is_read_again(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD, 3])
    refusal([the_set(data_config(tmp_path), model)], model)
    write_records(tmp_path / "a.jsonl", [GOOD, GOOD])
    assert len(build_shards([the_set(data_config(tmp_path), model)], model, 0)[0]) == 2


def test_a_damaged_cache_says_what_to_delete(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD])
    each = the_set(data_config(tmp_path), model)
    (shard,) = written(each, model).shards
    (each.directory / shard).remove()
    with pytest.raises(RequestError) as caught:
        load_manifest(each.manifest)
    message = str(caught.value)
    assert message.startswith(f"{each.directory}: shard {shard} is missing; delete the folder")
    each.manifest.write_bytes(b"PAR1")
    with pytest.raises(RequestError) as caught:
        load_manifest(each.manifest)
    message = str(caught.value)
    assert message.startswith(f"{each.manifest}: ")
    assert f"damaged; delete {each.directory}" in message


@pytest.mark.parametrize(("limit", "count"), [(None, 7), (3, 3), (100, 7)])
def test_prompts_are_gathered_under_unique_names(tmp_path, model, monkeypatch, limit, count):
    monkeypatch.setattr(ray_pipeline, "SHARD_RECORDS", 3)
    write_records(tmp_path / "a.jsonl", [[f"question {number}", f"answer {number}"] for number in range(7)])
    config = data_config(tmp_path)
    manifest = written(resolve_shard_set(config, config.data.train[0], "all", model, with_prompts=True), model)
    assert write_prompts([manifest], tmp_path / "prompts.parquet", limit) == count
    rows = pq.read_table(tmp_path / "prompts.parquet").to_pylist()
    assert len({row["id"] for row in rows}) == count
    for row in rows:
        number = int(row["id"].removeprefix("a/a.jsonl:")) - 1
        assert row["prompt"] == f"<|im_start|>user\nquestion {number}<|im_end|>\n<|im_start|>assistant\n"
        assert row["label"] == f"answer {number}"


@pytest.mark.parametrize(
    "name", ["added_tokens.json", "vocab.json", "config.json", "additional_chat_templates/tool_use.jinja"]
)
def test_every_file_of_a_tokenizer_is_part_of_the_key(tmp_path, name):
    write_records(tmp_path / "a.jsonl", [GOOD])
    folder = tmp_path / "model"
    tiny_tokenizer().save_pretrained(folder)
    before = the_set(data_config(tmp_path), str(folder)).directory
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    changed = the_set(data_config(tmp_path), str(folder)).directory
    (folder / "model.safetensors").write_text("weights")
    assert before != changed == the_set(data_config(tmp_path), str(folder)).directory


def test_damaged_shards_are_written_again(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD])
    each = the_set(data_config(tmp_path), model)
    (manifest,) = build_shards([each], model, 0.0)
    for damage in (lambda path: path.write_bytes(b""), lambda path: path.unlink()):
        damage(manifest.shard_paths()[0].local)
        (manifest,) = build_shards([each], model, 0.0)
        assert not manifest.reused
        assert pq.read_table(manifest.shard_paths()[0].local).num_rows == 1
    assert build_shards([each], model, 0.0)[0].reused


def test_data_of_several_shards_that_is_tokenized_in_the_driver_goes_on_where_it_was_stopped(
    tmp_path, model, monkeypatch
):
    write_records(tmp_path / "a.jsonl", [GOOD] * 8)
    each = the_set(data_config(tmp_path), model)
    begun: list[int] = []

    def counted(sets, records, tokenizer):
        begun.append(len(records))
        if len(begun) == 3:
            stopping.ask("the machine goes")
        return write_shards(sets, records, tokenizer)

    monkeypatch.setattr(build, "write_shard_sets", ray_pipeline.write_shard_sets)
    monkeypatch.setattr(ray_pipeline, "write_shards", counted)
    monkeypatch.setattr(ray_pipeline, "SHARD_RECORDS", 2)
    monkeypatch.setattr(ray_pipeline, "SHARD_BYTES", 100)
    with stoppable() as stopping, pytest.raises(RunStopped, match="the machine goes"):
        build_shards([each], model, 0.0)
    assert begun == [2, 2, 2]
    (manifest,) = build_shards([each], model, 0.0)
    assert begun == [2, 2, 2, 2], "three of four shards are found again"
    assert manifest.records == 8
    assert len({path.location for path in manifest.shard_paths()}) == 4
    assert not kept_parts(each.directory)


def test_what_is_known_of_a_shard_is_kept_until_its_set_is_complete(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD, 3, GOOD, LONG])
    each = the_set(data_config(tmp_path, on_overflow="drop"), model)
    records = next(record_batches(each.files))
    name, tokenizer = part_name(location for location, _ in records), Tokenizer.load(model)
    [shard] = write_shards([each], records, tokenizer)
    assert shard.rejected
    assert shard.dropped
    assert load_part(each.directory, name) is None
    save_part(each.directory, name, shard)
    assert kept_parts(each.directory) == {name}
    found = load_part(each.directory, name)
    assert found is not None
    for field, value in vars(shard).items():
        kept = getattr(found, field)
        assert type(kept) is type(value), field
        assert np.array_equal(kept, value) if isinstance(value, np.ndarray) else kept == value, field
        assert not isinstance(value, np.ndarray) or kept.dtype == value.dtype
    file = each.directory / shard.name
    file.write_bytes(file.read_bytes() + b"x")
    assert load_part(each.directory, name) is None, "the shard is not what was written"
    remove_parts(each.directory)
    assert not kept_parts(each.directory)


def test_a_set_that_another_run_has_completed_keeps_the_shards_that_both_have(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [GOOD])
    each = the_set(data_config(tmp_path), model)
    records = next(record_batches(each.files))
    ours, theirs = (write_shards([each], records, Tokenizer.load(model))[0] for _ in range(2))
    save_manifest(each.manifest, "a", [theirs])
    save_manifest(each.manifest, "a", [theirs])
    save_manifest(each.manifest, "a", [ours])
    assert set(each.directory.entries()) == {"manifest.parquet", theirs.name}


def test_max_rejected_applies_to_all_splits_of_a_source_together(tmp_path, model):
    write_records(
        tmp_path / "a.jsonl", [["How are you?", "Fine."], *([[f"Question {n}?", "Yes."] for n in range(99)]), 5]
    )
    config = data_config(tmp_path, holdout=0.05, max_rejected=0.02)
    sets = [the_set(config, model, split=split) for split in ("train", "holdout")]
    assert sum(len(manifest.rejected) for manifest in build_shards(sets, model, 0.02)) >= 1


def test_a_text_whose_tokens_the_model_has_no_embeddings_for_is_found_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pipeline, "SHARD_RECORDS", 1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|a|>", "<|b|>", "<|unused|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "model")
    write_records(tmp_path / "a.jsonl", [GOOD, ["Take <|b|>.", "I do."], ["Take <|a|>.", "I do <|b|>."]])
    manifest = written(the_set(data_config(tmp_path), str(tmp_path / "model")), str(tmp_path / "model"))
    token = tokenizer.convert_tokens_to_ids("<|b|>")
    assert manifest.largest_token == (token, "a.jsonl:2")
    # A token that no text uses may lie outside, and a padded vocabulary has more rows than there are tokens.
    for rows in (token + 1, token + 100, None):
        check_tokens([manifest.largest_token], rows, tokenizer, "m")
    with pytest.raises(RequestError) as caught:
        check_tokens([manifest.largest_token], token, tokenizer, "m")
    message = str(caught.value)
    assert message.startswith("m: ")
    for part in ("403 tokens", f"embeddings for {token}", "a.jsonl:2", f"token {token} ('<|b|>')", "resize"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("field", ["input_ids", "labels", "prompt"])
def test_the_largest_token_is_that_of_ids_labels_and_prompts(tmp_path, model, field):
    where = {"input_ids": ([5, 399, 7], [5, 6, 7]), "labels": ([5, 6, 7], [-100, 399, 7])}
    record = ["Fine.", "Fine."] if field == "prompt" else dict(zip(("input_ids", "labels"), where[field], strict=True))
    write_records(tmp_path / "a.jsonl", [record])
    config = data_config(tmp_path)
    each = resolve_shard_set(config, config.data.train[0], "all", model, with_prompts=True)
    if field != "prompt":
        assert written(each, model).largest_token == (399, "a.jsonl:1")
        return
    (row,) = pq.read_table(written(each, model).shard_paths()[0].local).to_pylist()
    assert written(each, model).largest_token[0] == max(row["input_ids"] + row["prompt_ids"])


def test_ids_that_a_tokenizer_leaves_out_count(tmp_path):
    tokenizer = tiny_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["vocab"] = {token: id + (id >= 300) for token, id in described["model"]["vocab"].items()}
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(described))
    write_records(tmp_path / "a.jsonl", [{"input_ids": [5, 400], "labels": [5, 400]}])
    manifest = written(the_set(data_config(tmp_path), str(tmp_path / "model")), str(tmp_path / "model"))
    assert (manifest.largest_token, manifest.rejected) == ((400, "a.jsonl:1"), ())


SYSTEM = {"instruction": "q", "output": "a", "persona": "p"}


@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_a_column_that_no_record_has_is_refused(tmp_path, model, holdout):
    questions = [{"instruction": f"q {number}", "output": "a"} for number in range(20)]
    write_records(tmp_path / "a.jsonl", [*questions, {**SYSTEM, "instruction": "q 20"}])
    config = data_config(tmp_path, holdout=holdout)

    def sets(column: str, **more: int) -> list[ShardSet]:
        changes = {"data.train.0.columns": {"system": column}, **{f"data.train.0.{key}": more[key] for key in more}}
        changed = with_overrides(config, changes)
        splits = ("train", "holdout") if holdout else ("all",)
        return [the_set(changed, model, split=split) for split in splits]

    assert "'a': no record has the column 'persone' that system is mapped to; correct the name in" in refusal(
        sets("persone"), model
    )
    assert sum(len(manifest) for manifest in build_shards(sets("persona"), model, 0.0)) == 21
    assert sum(len(manifest) for manifest in build_shards(sets("persona", max_examples=20), model, 0.0)) == 20


def test_a_column_under_its_own_name_may_lack(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [{"instruction": "q", "output": "a"}])
    config = with_overrides(data_config(tmp_path), {"data.train.0.columns": {"input": "input", "system": None}})
    assert len(build_shards([the_set(config, model)], model, 0.0)[0]) == 1


def test_a_column_of_answers_may_lack_in_prompts(tmp_path, model):
    write_records(tmp_path / "a.jsonl", [{"instruction": "q"}])
    config = with_overrides(data_config(tmp_path), {"data.train.0.columns": {"output": "answer"}})
    assert build_shards([the_set(config, model, with_prompts=True)], model, 0.0)[0].counts["unanswered"] == 1
