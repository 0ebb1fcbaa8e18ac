"""What `raysft check` says of memory, storage and time, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysft.cluster.placement import Node
from raysft.config import Config, parse, with_overrides
from raysft.estimate.hardware import NodeMemory
from raysft.run.pods import check_pods, pod_memory
from raysft.run.verbs import check
from tests.messages import holds, refusal
from tests.tiny import tiny_model, write_chats

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("needs")
    tiny_model(folder / "model")
    write_chats(folder / "chats.jsonl", 60)
    return folder


def config_of(folder: Path, **settings) -> Config:
    config = parse(
        {
            "run": {"name": "r", "storage": str(folder / "runs")},
            "model": {"path": str(folder / "model"), "finetuning": "full"},
            "data": {"train": [{"name": "chats", "path": str(folder / "chats.jsonl")}], "sequence_length": 128},
            "train": {"global_batch_size": 4, "micro_batch_size": 4},
            "scaling": {"address": "local"},
            "generate": {"enabled": False},
        }
    )
    return with_overrides(config, {key.replace("__", "."): value for key, value in settings.items()})


def give(monkeypatch, **memory) -> None:
    monkeypatch.setattr("raysft.run.needs.smallest_node", lambda *_: (Node(2.0), NodeMemory(**memory)))


def test_check_prints_a_table_and_the_storage(folder, monkeypatch, capsys):
    give(monkeypatch, total=64 << 30)
    plan = check(config_of(folder))
    printed = capsys.readouterr().out.splitlines()
    begin = next(index for index, line in enumerate(printed) if line.startswith("memory: about"))
    assert "of 64.0 GiB for each worker" in printed[begin]
    assert "up to 4 rows at once fit" in printed[begin]
    names = [line[2:16].strip() for line in printed[begin + 1 : begin + 9]]
    assert names == ["weights", "gradients", "master weights", "moments", "activations", "logits", "buckets", "rest"]
    assert any(line.startswith("storage: 3 checkpoints of") and "are free" in line for line in printed)
    assert plan.memory is not None
    # 99,648 weights in float32.
    assert plan.memory["parts_gib"]["weights"] == pytest.approx(99_648 * 4 / 2**30, abs=1e-4)
    assert json.loads(json.dumps(plan.as_dict()))["memory"]["traced"]
    assert not any("memory" in warning for warning in plan.warnings)


def test_what_surely_does_not_fit_is_refused_in_one_line(folder, monkeypatch):
    give(monkeypatch, total=1 * MIB)
    message = refusal(check, config_of(folder))
    # Weights, copies and moments are 1.6 MB.
    assert holds(message, "a microbatch of 4 rows needs at least 0.0 GiB of memory for each worker, which has … use ")


def test_swap_counts_before_a_run_is_refused(folder, monkeypatch):
    give(monkeypatch, total=1 * MIB, swap=64.0 * MIB)
    plan = check(config_of(folder))
    assert any("needs about" in warning for warning in plan.warnings)


def test_without_knowing_the_memory_nothing_is_refused(folder, monkeypatch):
    monkeypatch.setattr("raysft.run.needs.smallest_node", lambda *_: None)
    plan = check(config_of(folder))
    assert plan.memory is not None
    assert not any("memory" in warning for warning in plan.warnings)


def test_a_model_that_cannot_be_made_without_weights_is_not_estimated(folder, monkeypatch, capsys):
    def fails(*_):
        raise KeyError("no such thing")

    monkeypatch.setattr("raysft.estimate.estimate.measure", fails)
    assert check(config_of(folder)).memory is None
    assert "memory: not estimated" in capsys.readouterr().out


def test_a_full_disk_is_refused(folder, monkeypatch):
    give(monkeypatch, total=64 << 30)
    monkeypatch.setattr("raysft.estimate.storage._free", lambda config: 1e5)
    assert holds(refusal(check, config_of(folder)), "run.storage: … has 0.0 GiB free … make room")


def test_pods_have_the_memory_of_their_section(folder):
    selector = {"cloud.google.com/gke-accelerator": "nvidia-l4", "pool": "a"}
    workers = {"gpus": 1, "memory": "64Gi", "node_selector": selector}
    found = pod_memory(config_of(folder, cluster__workers=workers))
    assert (found.total, found.gpu) == (64 << 30, 22.0 * 2**30)
    assert pod_memory(config_of(folder)).gpu is None


def test_a_training_is_estimated_for_pods_that_do_not_exist(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lines: list[str] = []
    config = config_of(folder, run__storage="/mnt/none/runs")
    check_pods(config, [Node(4.0, name="a worker's pod")], lines.append)
    assert "of 16.0 GiB for each worker" in lines[0]
    small = config_of(folder, cluster__workers={"memory": "1Mi"})
    message = refusal(check_pods, small, [Node(4.0)], lines.append)
    assert "needs at least" in message
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "64"}')
    lines.clear()
    check_pods(config_of(folder, model__path=str(tmp_path)), [Node(4.0)], lines.append)
    assert [line.partition(" (")[0] for line in lines] == ["memory: not estimated"]
    elsewhere = config_of(folder, model__path="/mnt/none/model")
    lines.clear()
    check_pods(elsewhere, [Node(4.0)], lines.append)
    assert not lines, "a model of the image cannot be read here"
    assert not Path("/mnt/none").exists()
