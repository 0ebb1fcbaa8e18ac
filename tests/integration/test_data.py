"""Data through the command line, on a local Ray cluster of 2 CPUs: object stores, bad records and concurrent runs."""

from __future__ import annotations

import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pyarrow import fs

from raysft.cli import main
from raysft.config import Config, parse
from raysft.data.prepare import prepare
from raysft.data.shards import openings, ray_pipeline
from raysft.data.shards.manifest import Manifest, Shard
from raysft.errors import RunStopped
from raysft.models.tokenizer import load_tokenizer
from raysft.stopping import stoppable
from raysft.storage.json_files import read_jsonl
from tests.clusters import joining

pytestmark = pytest.mark.usefixtures("local_ray")

GOOD = {"messages": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]}


@pytest.fixture(autouse=True)
def _on_cluster(monkeypatch):
    """Tokenize on the cluster, however small the data is."""
    monkeypatch.setattr(ray_pipeline, "LOCAL_BYTES", -1)


@pytest.fixture(scope="module")
def bucket(local_ray):
    """A bucket of a real S3 server on this machine: (filesystem, the options of its URIs)."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    options = f"endpoint_override=http://127.0.0.1:{port}&region=us-east-1"
    filesystem, _ = fs.FileSystem.from_uri(f"s3://bucket?{options}&allow_bucket_creation=true")
    filesystem.create_dir("bucket")
    yield filesystem, options
    server.stop()


@pytest.fixture(scope="module")
def model(model) -> str:
    return str(model)


def config_of(folder: Path, model: str, *paths: str, **data) -> Config:
    sources = [{"name": f"s{index}", "path": path} for index, path in enumerate(paths)]
    return parse(
        {
            "run": {"storage": str(folder / "runs")},
            "model": {"path": model},
            "data": {"train": sources, "sequence_length": 128, **data},
        }
    )


def lines(*records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_files_folders_and_globs_of_an_object_store_are_read(bucket, tmp_path, model):
    filesystem, options = bucket
    contents = {
        "bucket/data/a.jsonl": lines(*[GOOD] * 3),
        "bucket/data/b.jsonl.gz": gzip.compress(lines(*[GOOD] * 4)),
        "bucket/data/deep/c.json": json.dumps([GOOD] * 5).encode(),
        "bucket/odd/a b#é%20.jsonl": lines(*[GOOD] * 7),
    }
    for path, content in contents.items():
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)
    pq.write_table(pa.Table.from_pylist([GOOD] * 6), "bucket/data/deep/d.parquet", filesystem=filesystem)
    paths = ("data/a.jsonl", "data/*.gz", "data/deep", "data", "odd")
    config = config_of(tmp_path, model, *(f"s3://bucket/{path}?{options}" for path in paths))
    prepared = prepare(config, model)
    assert [len(manifest) for manifest in prepared.train] == [3, 4, 11, 18, 7]
    assert [manifest.reused for manifest in prepare(config, model).train] == [True] * 5


def test_a_file_missing_in_an_object_store_is_refused_in_one_line(bucket, tmp_path, model, capsys):
    _, options = bucket
    config = config_of(tmp_path, model, f"s3://bucket/nothing.jsonl?{options}")
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert main(["check", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert "nothing.jsonl" in error
    assert "matches no file" in error
    assert error.count("\n") == 1


BAD = {
    "a truncated line": b'{"messages": [{"role": "us',
    "another encoding": '{"messages": "ä"}'.encode("latin-1"),
    "bytes": bytes(range(128, 250)),
    "no columns": b"{}",
    "a missing column": b'{"instruction": "a"}',
    "a null": b'{"messages": null}',
    "a wrong order": lines({"messages": GOOD["messages"][::-1]}).strip(),
    "an empty answer": lines({"messages": [GOOD["messages"][0], {"role": "assistant", "content": " "}]}).strip(),
    "nested lists": b'{"messages": [[{"role": "user", "content": "a"}]]}',
    "a key twice": b'{"text": "a", "text": "b"}',
    "a number": b'{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}',
    "an unpaired surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
    "an unknown role": b'{"messages": [{"role": "bot", "content": "a"}]}',
    "no object": b"3",
    "deep brackets": b"[" * 100_000,
}


def test_bad_records_are_kept_with_file_line_and_reason_and_the_others_are_used(tmp_path, model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = b"\xef\xbb\xbf" + b"\r\n".join([lines(GOOD).strip(), *BAD.values(), b"", lines(GOOD).strip()]) + b"\r\n"
    (tmp_path / "data.jsonl").write_bytes(data)
    config = config_of(tmp_path, model, "data.jsonl", max_rejected=0.9)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert main(["prepare", "c.yaml", "run.name=r"]) == 0
    rejected = list(read_jsonl(tmp_path / "runs" / "r" / "rejected.jsonl"))
    assert [item["record"] for item in rejected] == [f"data.jsonl:{line}" for line in range(2, 2 + len(BAD))]
    assert all(item["reason"] for item in rejected)
    assert f"2 examples of {2 + len(BAD)} records" in capsys.readouterr().out
    assert main(["prepare", "c.yaml", "run.name=r", "data.max_rejected=0.1"]) == 2
    error = capsys.readouterr().err
    assert "data.jsonl:2: invalid JSON" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1" + b"\0" * 50 + b"PAR1", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(*[GOOD] * 500))[:-20], "cannot be read"),
        ("a.json", b'[{"text": "a"}, {"te', "a.json:1: invalid JSON"),
        ("a.jsonl", b"", "no usable example"),
    ],
)
def test_files_that_are_broken_as_a_whole_stop_the_run(tmp_path, model, monkeypatch, capsys, name, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "c.yaml").write_text(config_of(tmp_path, model, name, max_rejected=1.0).to_yaml())
    assert main(["check", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_parquet_files_of_different_schemas_are_one_source(tmp_path, model):
    alpaca = {"instruction": "a", "input": "", "output": "b"}
    pq.write_table(pa.Table.from_pylist([GOOD] * 2), tmp_path / "1.parquet")
    pq.write_table(pa.Table.from_pylist([alpaca] * 3), tmp_path / "2.parquet")
    (manifest,) = prepare(config_of(tmp_path, model, str(tmp_path / "*.parquet")), model).train
    assert (len(manifest), manifest.formats) == (5, ("alpaca", "openai"))


def test_a_registry_names_columns_and_draws_records_and_structs_lose_no_key(tmp_path, model):
    called = [{"type": "function", "function": {"name": "f", "arguments": {key: 1}}} for key in ("a", "b")]
    records = [
        {"messages": [*GOOD["messages"], {"role": "assistant", "content": "x", "tool_calls": [c]}]} for c in called
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(*records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "five.json").write_text(
        json.dumps([{"instruction": "ins", "input": str(n), "output": "o"} for n in range(5)])
    )
    chat = {"formatting": "openai", "columns": {"messages": "messages"}}
    entries = {
        "drawn": {"file_name": "five.json", "columns": {"prompt": "input", "response": "output"}, "num_samples": 2},
        "plain": {"file_name": "a.jsonl", **chat},
        "struct": {"file_name": "a.parquet", **chat},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8-sig")
    config = config_of(
        tmp_path, model, registry=str(tmp_path), train=[{"name": name} for name in entries], sequence_length=512
    )
    drawn, *same = prepare(config, model).train
    assert len(drawn) == 2
    assert all("ins" not in text and text.count("<|im_start|>user") == 1 for text in texts_of(drawn, model))
    assert texts_of(same[0], model) == texts_of(same[1], model)
    assert "null" not in "".join(texts_of(same[1], model))


def texts_of(manifest: Manifest, model: str) -> list[str]:
    tokenizer = load_tokenizer(model)
    rows = [ids for path in manifest.shard_paths() for ids in pq.read_table(path.local)["input_ids"].to_pylist()]
    return [tokenizer.decode(ids) for ids in rows]


def test_a_line_of_megabytes_is_dropped_and_the_others_are_used(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = {"messages": [{"role": "user", "content": "word " * 500_000}, GOOD["messages"][1]]}
    (tmp_path / "data.jsonl").write_bytes(lines(GOOD, long, GOOD))
    (manifest,) = prepare(config_of(tmp_path, model, "data.jsonl", on_overflow="drop"), model).train
    assert (len(manifest), [item.record for item in manifest.dropped]) == (2, ["data.jsonl:2"])


PREPARE = """
import sys
from raysft.cli import main
from raysft.data.shards import openings, ray_pipeline

ray_pipeline.LOCAL_BYTES = 0
sys.exit(main(sys.argv[1:]))
"""
"""The command where tasks tokenize also few data."""


def started(config: Path) -> subprocess.Popen[str]:
    """A process that works on the cluster of these tests."""
    command = [
        sys.executable,
        "-c",
        PREPARE,
        "prepare",
        str(config),
        f"scaling.address={ray.get_runtime_context().gcs_address}",
        f"run.name=r{time.time_ns()}",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=joining())


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def holders(folder: Path) -> list[int]:
    """The processes that hold or held the locks of shard sets."""
    return [json.loads(text)["process"] for file in folder.glob("*/.lock") if (text := file.read_text())]


def test_two_concurrent_runs_and_a_killed_one_leave_a_complete_set(tmp_path, model):
    records = [{"messages": [{"role": "user", "content": f"word {n}"}, GOOD["messages"][1]]} for n in range(25_000)]
    (tmp_path / "data.jsonl").write_bytes(lines(*records))
    (tmp_path / "c.yaml").write_text(
        config_of(tmp_path, model, str(tmp_path / "data.jsonl"), on_overflow="truncate").to_yaml()
    )
    shards = tmp_path / "runs" / "cache" / "shards"
    killed = started(tmp_path / "c.yaml")
    wait_for(lambda: list(shards.glob("*/*.parquet")), "the first shard")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not list(shards.glob("*/manifest.parquet")), "it was to be killed before it was done"
    with started(tmp_path / "c.yaml") as other:
        wait_for(lambda: other.pid in holders(shards) or other.poll() is not None, "the other one to write")
        assert main(["prepare", str(tmp_path / "c.yaml"), "run.name=here"]) == 0
        output, _ = other.communicate(timeout=300)
    assert other.returncode == 0, output
    (manifest,) = prepare(parse({**yaml_of(tmp_path / "c.yaml")}), model).train
    assert manifest.reused
    assert len(manifest) == 25_000
    assert sum(pq.read_metadata(path.local).num_rows for path in manifest.shard_paths()) == 25_000


def test_a_run_that_is_asked_to_stop_keeps_its_shards_and_tokenizes_only_the_others_later(tmp_path, model, monkeypatch):
    records = [{"messages": [{"role": "user", "content": f"word {n}"}, GOOD["messages"][1]]} for n in range(12_000)]
    (tmp_path / "data.jsonl").write_bytes(lines(*records))
    stopped, alone = (
        config_of(tmp_path / name, model, str(tmp_path / "data.jsonl"), holdout=0.1) for name in ("stopped", "alone")
    )
    first: list[str] = []
    with stoppable() as stopping, pytest.MonkeyPatch.context() as patch:

        def add(self: object, shard: Shard) -> None:
            first.append(shard.name)
            if len(first) == 2:  # one for each set of the first task
                stopping.ask("SIGTERM")

        patch.setattr(ray_pipeline._ProgressReport, "add", add)
        with pytest.raises(RunStopped, match=r"^stopped: SIGTERM$"):
            prepare(stopped, model)
    sets = [[*data.train, *data.eval] for data in (prepare(stopped, model), prepare(alone, model))]
    assert [manifest.shards[0] for manifest in sets[0]] == first, "those of the first call are a part of the set"
    contents = [
        [
            (pa.concat_tables(pq.read_table(path.local) for path in one.shard_paths()), one.turns, one.counts)
            for one in each
        ]
        for each in sets
    ]
    assert contents[0] == contents[1]
    for one, other in zip(*sets, strict=True):
        assert (one.lengths == other.lengths).all()
        assert (one.loss_tokens == other.loss_tokens).all()
        left = {name for name in one.directory.entries() if name.startswith("part-")}
        assert not left, "what only protected the work goes when the set is complete"


def yaml_of(path: Path) -> dict:
    import yaml

    return yaml.safe_load(path.read_text())


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, model, monkeypatch):
    from raysft.config import Source
    from raysft.data.sources.files import find_files
    from raysft.data.sources.readers import read_raw
    from raysft.errors import RequestError

    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(GOOD, GOOD))
    (file,) = find_files(Source(name="a", path=str(path)))
    path.write_bytes(lines(GOOD, GOOD, GOOD))
    os.utime(path)
    with pytest.raises(RequestError, match="changed while it was being read"):
        list(read_raw(file))


def test_small_data_becomes_the_same_shards_in_the_driver(tmp_path, model, monkeypatch):
    for name, count in (("a", 900), ("b", 40)):
        records = [
            {"messages": [{"role": "user", "content": f"{name} {n}"}, GOOD["messages"][1]]} for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*records, {"messages": None}))
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    monkeypatch.setattr(ray_pipeline, "SHARD_RECORDS", 64)  # of the driver alone: the tasks make one shard of each file
    made: dict[str, list] = {}
    for where, limit in (("cluster", -1), ("driver", 1 << 20)):
        monkeypatch.setattr(ray_pipeline, "LOCAL_BYTES", limit)
        config = config_of(tmp_path / where, model, *paths, holdout=0.2, max_rejected=0.1)
        manifests = prepare(config, model)
        made[where] = [
            (pa.concat_tables(pq.read_table(path.local) for path in manifest.shard_paths()), manifest.rejected)
            for manifest in (*manifests.train, *manifests.eval)
        ]
    assert made["driver"] == made["cluster"]
    assert sum(table.num_rows for table, _ in made["driver"]) == 940


def test_each_worker_gets_its_rows_in_order_from_ray_data_and_from_readers(tmp_path, monkeypatch):
    """Also if a reader dies, and if workers that follow each other have the same rows."""
    import threading

    import numpy as np

    from raysft.data.rows import ray_stream
    from raysft.data.rows.packed_dataset import PackedDataset
    from tests.synthetic import write_set

    monkeypatch.setattr(ray_stream, "BLOCK_TOKENS", 256)
    lengths = np.random.default_rng(0).integers(2, 60, 300)
    rows = PackedDataset((write_set(tmp_path / "a", lengths, shard_examples=50),), 64, 6, epochs=2)
    workers, first, found = 4, 2, {}

    def read(way: str, group: int, shards: list, worker: int) -> None:
        tables = shards[worker].iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        batches = rows.batches(tables, workers // group)
        found[way, group, worker] = [next(batches)]
        if way == "readers" and worker == 1:
            ray.kill(shards[worker].reader, no_restart=False)
        found[way, group, worker] += batches

    here = [ray.get_runtime_context().get_node_id()] * workers
    for way, group, shards in (
        ("split", 1, rows.dataset(first, workers).streaming_split(workers, equal=True)),
        ("split", 2, rows.dataset(first, workers, 2).streaming_split(workers, equal=True)),
        ("readers", 1, rows.node_shards(first, here)),
        ("readers", 2, rows.node_shards(first, here, group=2)),
    ):
        threads = [threading.Thread(target=read, args=(way, group, shards, worker)) for worker in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for (_, group, worker), ours in found.items():
        expected = list(rows.steps(first, worker // group, workers // group))
        assert len(ours) == len(expected) == rows.row_plan.steps - first
        for one, other in zip(ours, expected, strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in other)
    assert len(found) == 4 * workers


class CountedSteps:
    """A callback of Ray Data that counts the steps of its scheduling loop."""

    count = 0

    def on_execution_step(self, executor) -> None:
        CountedSteps.count += 1

    before_execution_starts = after_execution_succeeds = after_execution_fails = lambda *_: None


def test_rows_that_wait_for_the_training_take_no_core(tmp_path, monkeypatch):
    """The scheduling loop of Ray Data pauses, and goes on when rows are taken."""
    import numpy as np

    from raysft.cluster.scheduling_pace import LONGEST
    from raysft.data.rows import ray_stream
    from raysft.data.rows.packed_dataset import PackedDataset
    from tests.synthetic import write_set

    monkeypatch.setattr(ray_stream, "PREFETCH_BYTES", 0)  # four blocks of the 30, which have 5 MB each
    monkeypatch.setattr(ray.data.DataContext.get_current(), "custom_execution_callback_classes", [CountedSteps])
    lengths = np.random.default_rng(0).integers(2000, 2048, 600)
    rows = PackedDataset((write_set(tmp_path / "a", lengths, shard_examples=100),), 4096, 6, epochs=6)
    tables = iter(rows.dataset(0, 1).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    given = [next(tables) for _ in range(5)]
    time.sleep(1)  # until enough lie ahead
    before = CountedSteps.count
    time.sleep(2)
    steps = CountedSteps.count - before
    assert 0 < steps < 3 * 2 / LONGEST
    given += [next(tables) for _ in range(5)]
    assert len(given) == 10


def test_duplicates_and_a_number_of_held_out_examples_are_the_same_on_a_cluster(tmp_path, model, capsys, monkeypatch):
    def pairs(name: str, numbers) -> bytes:
        return lines(*({"instruction": f"{name} {number}", "output": "x"} for number in numbers))

    (tmp_path / "a.jsonl").write_bytes(pairs("q", [*range(60), *range(10)]))
    (tmp_path / "b.jsonl").write_bytes(pairs("q", range(50, 80)))
    (tmp_path / "e.jsonl").write_bytes(pairs("q", range(75, 90)) + lines({"instruction": "no answer"}))
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    found = []
    for place, size in (("cluster", -1), ("here", 1 << 30)):
        monkeypatch.setattr(ray_pipeline, "LOCAL_BYTES", size)
        monkeypatch.setattr(openings, "LOCAL_BYTES", size)
        config = config_of(
            tmp_path / place, model, *paths, holdout=8, eval=[{"name": "e", "path": str(tmp_path / "e.jsonl")}]
        )
        prepared = prepare(config, model)
        held_out = sum(len(manifest) for manifest in prepared.eval[:-1])
        assert 8 <= held_out <= 9  # an opening occurs at most twice
        assert sum(map(len, prepared.train)) == 100 - held_out
        found.append((prepared.duplicates, [manifest.lengths.tolist() for manifest in prepared.train]))
        (tmp_path / f"{place}.yaml").write_text(config.to_yaml())
    assert found[0] == found[1]
    repeated = sum(
        sum(counts.get(kind, 0) for kind in ("repeated", "repeated_elsewhere")) for counts in found[0][0].train.values()
    )
    trained_on = found[0][0].evaluation["e"]["trained_on"]
    assert 0 < trained_on <= 5
    assert 11 <= repeated <= 20
    assert main(["check", str(tmp_path / "here.yaml")]) == 0
    printed = capsys.readouterr().out
    assert f"{repeated} of {100 - held_out} training examples are duplicates of another one" in printed
    assert "1 without an answer" in printed
    assert f"{trained_on} of 16 examples of evaluation set 'e' are trained on" in printed
    assert main(["check", str(tmp_path / "here.yaml"), "data.duplicates=drop"]) == 0
    assert "training examples are dropped as duplicates of another one" in capsys.readouterr().out
