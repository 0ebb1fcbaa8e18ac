"""A sweep as a job of a cluster of two nodes, with all that it keeps in an object store: on 2 CPUs, with a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysft.storage.path import StoragePath
from tests.clusters import Cluster, started
from tests.tiny import tiny_model, write_chats

CONFIG = """
run: {{storage: "{storage}", seed: 1}}
model: {{path: base, dtype: float32, finetuning: lora}}
data:
  train: [{{name: chat, path: chat.jsonl}}]
  holdout: 0.2
  sequence_length: 128
train:
  epochs: 30
  max_steps: 6
  eval_every_steps: 2
  global_batch_size: 4
  save_every_steps: 2
  eval_at_start: false
scaling: {{threads_per_worker: 1, cpus_per_worker: 0.4}}
generate: {{enabled: false}}
tune: {{space: {{train.learning_rate: [1.0e-2, 1.0e-6]}}, scheduler: asha}}
"""
JOB_SECONDS = 600
"""A limit, not an expectation: several times what a busy machine of 2 cores needs."""


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory) -> Path:
    """The working directory of the jobs, which names model and data by relative paths."""
    folder = tmp_path_factory.mktemp("job")
    tiny_model(folder / "base")
    write_chats(folder / "chat.jsonl", 60)
    (folder / "sweep.yaml").write_text(CONFIG.format(storage=server.uri("runs")))
    return folder


@pytest.fixture(scope="module")
def cluster(server, tmp_path_factory) -> Iterator[Cluster]:
    """Two nodes, each with room for one trial."""
    with started(tmp_path_factory.mktemp("nodes"), [1, 1], forks=True) as cluster:
        yield cluster


def steps_of(run: StoragePath) -> list[int]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return [line["current_steps"] for line in lines if "loss" in line]


def test_a_submitted_sweep_uses_all_nodes_and_is_complete(cluster, folder, server):
    """Of two trials at a time, one is on another node than the driver; the one that is behind may be stopped."""
    code, output = cluster.submit(
        "raysft", "tune", "sweep.yaml", seconds=JOB_SECONDS, options=["--working-dir", str(folder)]
    )
    assert code == 0, output
    assert "2 trials, 2 at a time" in output
    sweep = StoragePath.of(server.uri("runs/sweep"))
    records = [json.loads(line) for line in (sweep / "trials.jsonl").read_text().splitlines()]
    last = {record["trial"]: record for record in records}
    assert max(record["step"] for record in last.values()) == 6
    for name, record in last.items():
        # Whether the other one is stopped, and when, depends on which of them comes first to an evaluation.
        assert record["state"] == ("done" if record["step"] == 6 else "stopped")
        assert steps_of(sweep / "trials" / name) == list(range(1, record["step"] + 1))
    assert {"config.yaml", "best.yaml", "sweep.html", "trials.csv"} <= sweep.entries().keys()
    shards = [name for name in (sweep.parent / "cache" / "shards").walk() if name.endswith(".parquet")]
    assert len(shards) == 4, "a manifest and a shard of each split"
