"""What `raysft check` says of memory, storage and time, and what it refuses."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from raysft.cluster.placement import Node
from raysft.config import Config, parse, with_overrides
from raysft.estimate.hardware import NodeMemory
from raysft.run.needs import with_needs
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


def times(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("time:")]


def test_time_follows_from_a_given_speed_and_is_not_known_without_one(folder, monkeypatch, capsys):
    give(monkeypatch, total=64 << 30)
    plan = check(config_of(folder))
    (line,) = times(capsys.readouterr().out)
    assert holds(
        line, f"time: unknown, as no run in {folder}/runs had … to give a speed, set scaling.worker_tokens_per_second"
    )
    # So many that one worker takes 90 minutes.
    given = {"scaling__worker_tokens_per_second": plan.tokens / 5_400}
    check(config_of(folder, **given))
    (line,) = times(capsys.readouterr().out)
    assert line.startswith("time: about 1:30:00 for all steps, at the ")
    assert line.endswith(" tokens/s of a worker in scaling.worker_tokens_per_second")
    check(config_of(folder, **given, train__max_hours=1.6))
    assert times(capsys.readouterr().out) == [line]
    check(config_of(folder, **given, train__max_hours=1.4))
    (limited,) = times(capsys.readouterr().out)
    assert limited == f"{line}; train.max_hours stops it earlier, and the same command resumes it"


def test_a_step_that_takes_longer_than_a_machines_notice_is_warned_of_at_a_given_speed(folder, monkeypatch):
    give(monkeypatch, total=64 << 30)
    quick = check(config_of(folder))
    assert not any("notice" in warning for warning in quick.warnings)
    seconds = 40 * quick.steps
    slow = check(config_of(folder, scaling__worker_tokens_per_second=quick.tokens / seconds))
    assert any(
        warning.startswith("a step takes about 40 s, but a machine may be taken away") for warning in slow.warnings
    )


def test_what_surely_does_not_fit_is_refused_in_one_line(folder, monkeypatch):
    give(monkeypatch, total=1 * MIB)
    message = refusal(check, config_of(folder))
    # Weights, copies and moments are 1.6 MB.
    assert holds(
        message, "a microbatch of 4 rows needs at least … MiB of memory for each worker, which has 1.0 MiB; use "
    )


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
    assert holds(refusal(check, config_of(folder)), "run.storage: … has 0.1 MiB free … free some space")


@pytest.mark.parametrize("table", [True, False])
def test_room_for_the_model_is_asked_for_with_and_without_an_estimate(folder, monkeypatch, table):
    give(monkeypatch, total=64 << 30)
    monkeypatch.setattr("raysft.run.preflight.with_needs", lambda *arguments, **_: with_needs(*arguments, table=table))
    # The model has 99,648 weights of four bytes; half of them is what it takes at least.
    monkeypatch.setattr("raysft.estimate.storage._free", lambda config: 150_000.0)
    assert holds(
        refusal(check, config_of(folder)), "run.storage: … has 0.1 MiB free, but the trained model … free some space"
    )
    monkeypatch.setattr("raysft.estimate.storage._free", lambda config: 250_000.0)
    if not table:
        assert check(config_of(folder)).memory is None
    check(config_of(folder, model__finetuning="lora"))


def test_a_storage_that_takes_no_files_is_refused(folder, monkeypatch):
    def refuses(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr("raysft.run.ownership.tempfile.TemporaryFile", refuses)
    message = refusal(check, config_of(folder))
    assert message == f"run.storage: {folder}/runs cannot be written to (Read-only file system); choose another folder"


def test_a_cache_that_takes_no_files_is_enough_if_it_has_the_data(folder, tmp_path, monkeypatch):
    def refuses(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    config = config_of(folder, data__cache=str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr("raysft.data.shards.build.lock", refuses)
        message = refusal(check, config)
        assert holds(
            message,
            f"data.cache: {tmp_path}/cache/shards does not contain … (Read-only file system); choose another folder",
        )
    check(config)
    monkeypatch.setattr("raysft.data.shards.build.lock", refuses)
    check(config)


def test_pods_have_the_memory_of_their_section(folder):
    selector = {"cloud.google.com/gke-accelerator": "nvidia-l4", "pool": "a"}
    workers = {"gpus": 1, "memory": "64Gi", "node_selector": selector}
    found = pod_memory(config_of(folder, cluster__workers=workers))
    assert (found.total, found.gpu) == (64 << 30, 22.0 * 2**30)
    assert pod_memory(config_of(folder)).gpu is None


def test_elastic_workers_are_estimated_as_they_begin(folder, monkeypatch):
    found: list[int] = []

    def estimate(training, place):
        found.append(training.workers)
        raise KeyError

    monkeypatch.setattr("raysft.run.pods.estimate", estimate)
    for nodes in (1, 2, 9):
        check_pods(config_of(folder, scaling__num_workers=[2, 8]), [Node(2.5)] * nodes, lambda line: None)
    assert found == [2, 4, 8]


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
    elsewhere = config_of(
        folder, model__path="/mnt/none/model", train__max_steps=900, scaling__worker_tokens_per_second=64
    )
    lines.clear()
    check_pods(elsewhere, [Node(4.0)], lines.append)
    # Of a model in the image only the time is known: 900 steps of 4 rows of 128 tokens.
    assert lines == [
        "time: at most 2:00:00 for 900 steps, at the 64 tokens/s of a worker in scaling.worker_tokens_per_second"
    ]
    assert not Path("/mnt/none").exists()
