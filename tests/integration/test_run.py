"""Whole runs through the command line, on a local Ray cluster of 2 CPUs, with a tiny model."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from ray._private import worker

import raysft
from raysft.cli import main
from raysft.config import load
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.errors import RequestError
from raysft.storage.json_files import read_jsonl
from raysft.storage.lock import lock
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import WorkersRestarting
from raysft.telemetry.results import TRAIN_RESULTS
from raysft.train import dataset_config, launch
from raysft.train.checkpoint.catalog import complete
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.job import EvaluationJob
from raysft.train.process_group import RestartableBackend, RestartableTorchConfig
from raysft.tune.metrics import check_metric
from tests.clusters import joining
from tests.messages import holds
from tests.processes import children_named
from tests.tiny import SENTENCES, tiny_model, with_code, write_chats
from tests.training import make_config, prepare

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, conversations and texts, and a config for each stage."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model(folder / "base")
    words = " ".join(SENTENCES).split()
    write_chats(folder / "chat.jsonl", 80)
    (folder / "texts.txt").write_text("\n".join(" ".join(words[i % 30 : i % 30 + 20]) for i in range(60)) + "\n")
    (folder / "more.txt").write_text("\n".join(SENTENCES) + "\n")
    (folder / "sft.yaml").write_text(SFT.format(folder=folder))
    (folder / "pt.yaml").write_text(PT.format(folder=folder))
    return folder


SFT = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, finetuning: full}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  holdout: 0.2
  sequence_length: 128
train: {{epochs: 2, global_batch_size: 4, learning_rate: 1.0e-2, zero_stage: 2, save_every_steps: 3, eval_every_steps: 3}}
scaling: {{num_workers: 2, cpus_per_worker: 0.75, threads_per_worker: 1}}
generate: {{max_examples: 6, max_new_tokens: 8, do_sample: false, batch_size: 4}}
"""
PT = """
stage: pt
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, finetuning: full}}
data:
  train: [{{name: texts, path: {folder}/texts.txt}}]
  eval: [{{name: more, path: {folder}/more.txt}}, {{name: same, path: {folder}/texts.txt, max_examples: 5}}]
  sequence_length: 64
train: {{epochs: 7, learning_rate: 1.0e-3, eval_every_epochs: 3, eval_delay: 4}}
scaling: {{threads_per_worker: 1}}
"""


SPEED = ("runtime", "_per_second")
"""Ends of results that differ from run to run."""


def results(run: Path, stage: str) -> dict:
    return json.loads((run / f"{stage}_results.json").read_text())


def steps_of(run: Path) -> list[dict]:
    return [record for record in read_jsonl(run / "trainer_log.jsonl") if "loss" in record]


@pytest.fixture(scope="module")
def sft_run(folder) -> Path:
    """A whole supervised run on 2 workers."""
    assert main(["run", str(folder / "sft.yaml")]) == 0
    return folder / "runs" / "sft"


def test_a_run_leaves_everything_that_a_run_directory_holds(sft_run):
    names = {path.name for path in sft_run.iterdir()}
    assert names >= {
        "config.yaml",
        "plan.json",
        "trainer_log.jsonl",
        "trainer_state.json",
        "train_results.json",
        "eval_results.json",
        "predict_results.json",
        "metrics.jsonl",
        "all_results.json",
        "generated_predictions.jsonl",
        "generated_predictions_base.jsonl",
        "training_loss.png",
        "training_eval_loss.png",
        "rejected.jsonl",
        "checkpoints",
        "model",
        "README.md",
        "report.html",
    }
    assert not [name for name in names if name.endswith(".partial")]


def test_steps_are_as_planned(sft_run):
    plan = json.loads((sft_run / "plan.json").read_text())
    steps = steps_of(sft_run)
    assert [step["current_steps"] for step in steps] == list(range(1, plan["steps"] + 1))
    assert sum(step["loss_tokens"] for step in steps) == plan["loss_tokens"]
    assert steps[-1]["total_tokens"] == plan["tokens"]
    assert steps[-1]["rows"] == plan["rows"]
    assert [step["epoch"] for step in steps][plan["steps"] // 2 - 1 :: plan["steps"] // 2] == [1, 2]


def test_what_was_learnt_is_in_the_results(sft_run):
    log = list(read_jsonl(sft_run / "trainer_log.jsonl"))
    before = next(record for record in log if record.get("current_steps") == 0)
    after = results(sft_run, "eval")
    assert after["eval_loss"] < 0.85 * before["eval_loss"]
    assert after["eval_perplexity"] == pytest.approx(math.exp(after["eval_loss"]))
    assert {3, 6} <= {record["current_steps"] for record in log if "eval_loss" in record}
    whole = results(sft_run, "all")
    assert {"train_loss", "eval_loss", "predict_rouge-1", "predict_bleu-4", "base_predict_rouge-l"} <= whole.keys()
    config = load(sft_run / "config.yaml")
    for name in whole:
        check_metric(config, name)  # a sweep may compare its trials by each of them
    assert set(TRAIN_RESULTS) - {"planned_steps", "best_step", "best_eval_loss"} <= whole.keys()


def test_results_have_the_speed_of_a_trainer(sft_run, folder):
    """Counted anew: examples of both epochs, tokens, weights outside the embeddings."""
    from transformers import AutoModelForCausalLM, TrainerState

    found, plan = results(sft_run, "train"), json.loads((sft_run / "plan.json").read_text())
    train, held_out = 2 * 64, 16
    runtime = sum(step["step_seconds"] for step in steps_of(sft_run))
    assert found["train_runtime"] == pytest.approx(runtime, abs=1e-3)
    assert found["train_samples_per_second"] == pytest.approx(train / runtime, rel=1e-2)
    assert found["train_steps_per_second"] == pytest.approx(plan["steps"] / runtime, rel=1e-2)
    # LLaMA-Factory divides by the number of processes.
    assert found["effective_tokens_per_sec"] == pytest.approx(found["train_tokens_per_second"] / 2, rel=1e-2)
    model = AutoModelForCausalLM.from_pretrained(sft_run / "model")
    tokens = steps_of(sft_run)[-1]["total_tokens"]
    assert found["num_input_tokens_seen"] == tokens
    assert found["total_flos"] == 6 * tokens * model.num_parameters(exclude_embeddings=True)
    state = TrainerState.load_from_json(str(sft_run / "trainer_state.json"))
    assert (state.total_flos, state.num_input_tokens_seen) == (found["total_flos"], tokens)
    evaluated = results(sft_run, "eval")
    assert evaluated["epoch"] == found["epoch"] == 2
    assert evaluated["eval_samples_per_second"] == pytest.approx(held_out / evaluated["eval_runtime"], rel=1e-2)
    for entry in state.log_history:
        if "eval_loss" in entry and entry["step"]:
            assert entry["eval_samples_per_second"] == pytest.approx(held_out / entry["eval_runtime"], rel=1e-2)
    predicted = results(sft_run, "predict")
    assert predicted["predict_samples_per_second"] == pytest.approx(6 / predicted["predict_runtime"], rel=1e-2)


def test_every_log_line_of_a_worker_names_run_rank_and_node(sft_run):
    """Those of Python's logging begin with them; on top of each file stands whose other lines they are."""
    logs, host = Path(worker.global_worker.node.get_logs_dir_path()), socket.gethostname()
    both = {f"sft, worker {rank} ({host}): this process" for rank in range(2)}
    for kind in ("out", "err"):
        texts = [path.read_text() for path in logs.glob(f"worker-*.{kind}")]
        assert {line for text in texts for line in text.splitlines() if line.startswith("sft, worker ")} >= both, kind
    found = [json.loads(line) for path in logs.glob("train/ray-train-app-worker-*.log") for line in path.open()]
    ours = [record for record in found if record["run_name"] == "sft"]
    assert {record["world_rank"] for record in ours} == {0, 1}
    for record in ours:
        if record["message"].startswith("sft, worker "):
            assert (record["run"], record["rank"], record["node"]) == ("sft", record["world_rank"], host)
    assert {record["message"] for record in ours} >= both


def test_the_same_seed_gives_the_same_numbers_on_one_worker(folder, sft_run):
    arguments = [
        "train",
        str(folder / "sft.yaml"),
        "run.name=again",
        "scaling.num_workers=1",
        "data.cache=" + str(folder / "cache"),
    ]
    assert main(arguments) == 0
    again = folder / "runs" / "again"
    for one, other in zip(steps_of(sft_run), steps_of(again), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert one["loss_tokens"] == other["loss_tokens"]
    assert results(again, "eval")["eval_loss"] == pytest.approx(results(sft_run, "eval")["eval_loss"], rel=1e-5)


def test_evaluate_alone_gives_what_training_ended_with(folder, sft_run):
    before = results(sft_run, "eval")
    assert main(["evaluate", str(folder / "sft.yaml")]) == 0
    after = results(sft_run, "eval")
    assert after.keys() == before.keys() - {"epoch"}
    for key, value in after.items():
        assert value == pytest.approx(before[key], rel=1e-5) or key.endswith(SPEED), key


def test_a_finished_run_is_not_trained_again(folder, sft_run, capsys):
    steps = len(steps_of(sft_run))
    predictions = (sft_run / "generated_predictions.jsonl").read_text()
    assert main(["run", str(folder / "sft.yaml")]) == 0
    assert "is already trained" in capsys.readouterr().out
    assert len(steps_of(sft_run)) == steps
    assert (sft_run / "generated_predictions.jsonl").read_text() == predictions


def test_a_run_directory_belongs_to_one_config(folder, sft_run, capsys):
    assert main(["train", str(folder / "sft.yaml"), "train.learning_rate=0.5"]) == 2
    error = capsys.readouterr().err
    assert "belongs to another config: train.learning_rate=0.5 (the run has 0.01)" in error
    assert error.count("\n") == 1


def test_two_processes_do_not_work_in_one_run_directory(folder, sft_run, capsys):
    with lock(sft_run):
        assert main(["run", str(folder / "sft.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"{sft_run}: process {os.getpid()} on" in error
    assert "choose another run.name" in error
    assert error.count("\n") == 1
    assert not (sft_run / ".lock").exists()


def test_predictions_are_those_of_the_exported_model(folder, sft_run, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["export", str(sft_run), "--output", str(folder / "exported")]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "exported")
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    rows = list(read_jsonl(sft_run / "generated_predictions.jsonl"))
    assert len(rows) == 6
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == row["predict"]
    assert main(["export", str(sft_run), "--output", str(folder / "exported")]) == 2
    assert "choose another" in capsys.readouterr().err


class KillAWorker:
    """Kills a training worker (SIGKILL) when a step is done, once."""

    signal = signal.SIGKILL

    def __init__(self, step: int) -> None:
        self.step, self.killed = step, 0
        self.seen: list[int] = []

    def on_step(self, record) -> None:
        self.seen.append(record.current_steps)
        if record.current_steps == self.step and not self.killed:
            process = next(children_named("RayTrainWorker"))
            process.send_signal(self.signal)
            self.killed += 1


def test_a_killed_worker_loses_and_repeats_nothing(folder, sft_run, capsys, monkeypatch):
    """Killed after step 4, the training goes on from its newest checkpoint and ends like one that was left alone.

    That is the one of step 3, or, if the driver hears late of step 4 on a busy machine, of step 6. Its rows come from a reader of
    the node, as with many workers; those of the other training from Ray Data.
    """
    monkeypatch.setattr(dataset_config, "SPLIT_WORKERS", 1)
    kill = KillAWorker(step=4)
    raysft.run_sft(load(folder / "sft.yaml", ["run.name=killed", "generate.enabled=false"]), callbacks=[kill])
    assert kill.killed == 1
    killed = folder / "runs" / "killed"
    # It starts like the other one, whose evaluation the cache has kept.
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "after step 0 |" in line]
    assert [line.endswith(" | from the cache") for line in lines] == [True]
    before, cached = (next(read_jsonl(run / "trainer_log.jsonl")) for run in (sft_run, killed))
    computed = {key: value for key, value in before.items() if not key.endswith(SPEED)}
    assert cached == computed, "nothing was computed, in no time"
    last = {step["current_steps"]: step for step in steps_of(killed)}
    (checkpoint,) = map(int, re.findall(r"resuming after step (\d+) ", printed))
    heard = len(kill.seen) - (8 - checkpoint)
    assert checkpoint in (3, 6)
    assert heard >= 4
    again = "the steps after the checkpoint, and only those, were trained again"
    assert kill.seen == [*range(1, heard + 1), *range(checkpoint + 1, 9)], again
    assert list(last) == sorted(last), "the log has each step once"
    assert len(last) == len(steps_of(killed)), "the log has each step once"
    losses = [step["loss"] for step in last.values()]
    assert results(killed, "train")["train_loss"] == pytest.approx(sum(losses) / len(losses))
    for step in steps_of(sft_run):
        assert last[step["current_steps"]]["loss"] == pytest.approx(step["loss"], rel=1e-5)
        assert last[step["current_steps"]]["rows"] == step["rows"]
    assert results(killed, "eval")["eval_loss"] == pytest.approx(results(sft_run, "eval")["eval_loss"], rel=1e-5)


class StopAWorker(KillAWorker):
    """Halts a training worker (SIGSTOP) when a step is done, once: it keeps its connections, and does nothing any more."""

    signal = signal.SIGSTOP


def test_a_worker_that_hangs_is_named_and_replaced(folder, sft_run, capsys):
    """The others wait for it in a collective: they say so, end, and all start again from the checkpoint of step 3."""
    stop = StopAWorker(step=4)
    changes = ["run.name=hung", "generate.enabled=false", "train.hang_minutes=0.1"]
    raysft.run_sft(load(folder / "sft.yaml", changes), callbacks=[stop])
    assert stop.killed == 1
    hung = folder / "runs" / "hung"
    (named, *_) = (line["finding"] for line in read_jsonl(hung / "diagnosis.jsonl"))
    assert holds(named, "no progress for … s: worker … does not respond; 1 other waits in … ; stacks: … hung/diagnosis")
    assert named in capsys.readouterr().out
    (stacks, *_) = (hung / "diagnosis").iterdir()
    assert "raysft/train/loop.py" in stacks.read_text()
    assert "does not respond" in (hung / "report.html").read_text()
    losses = [[step["loss"] for step in steps_of(run)] for run in (sft_run, hung)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Interrupt:
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record) -> None:
        if record.current_steps == self.step:
            raise KeyboardInterrupt


def test_another_number_of_workers_goes_on_and_passes_a_damaged_checkpoint_over(folder, sft_run, capsys):
    """Two workers that share each row, stopped after their last step. A bit of the newest checkpoint flips while nothing runs: one
    worker goes on from the one before, says so, and comes to the same end."""
    config = load(folder / "sft.yaml", ["run.name=fewer", "generate.enabled=false", "scaling.sequence_parallel=2"])
    with pytest.raises(KeyboardInterrupt):
        raysft.run_sft(config, callbacks=[Interrupt(8)])
    fewer = folder / "runs" / "fewer"
    newest, before = (place.local for place in islice(complete(fewer / "checkpoints"), 2))
    step = Cursor.read(before).step  # the resumed training removes this checkpoint once it has newer ones
    assert step in (3, 6)
    part = newest / "part_0.safetensors"
    content = bytearray(part.read_bytes())
    content[-7] ^= 1
    part.write_bytes(bytes(content))
    assert "= 1 group of 2 workers × 4 rows" in capsys.readouterr().out
    alone = ["scaling.num_workers=1", "scaling.sequence_parallel=1"]
    assert main(["run", str(fewer / "config.yaml"), "run.name=fewer", *alone]) == 0
    said = capsys.readouterr().out
    assert f"{part} is not what was written" in said
    assert f"resuming after step {step} " in said
    trained = steps_of(fewer)
    assert [step["current_steps"] for step in trained] == [step["current_steps"] for step in steps_of(sft_run)]
    for one, two in zip(trained, steps_of(sft_run), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["rows"] == two["rows"]
    assert results(fewer, "eval")["eval_loss"] == pytest.approx(results(sft_run, "eval")["eval_loss"], rel=1e-4)
    found, whole = results(fewer, "train"), results(sft_run, "train")
    assert (found["total_flos"], found["num_input_tokens_seen"]) == (
        whole["total_flos"],
        whole["num_input_tokens_seen"],
    )
    seconds = sum(step["step_seconds"] for step in trained)
    assert found["train_samples_per_second"] == pytest.approx(2 * 64 / seconds, rel=1e-2), "of the whole run"


def test_a_run_that_is_done_goes_on_with_more_epochs_and_with_other_data_in_them(folder, capsys):
    """8 conversations, 4 in a step: 2 steps; then 3 epochs in all, with the learning rate of such a run."""
    data = folder / "few.jsonl"
    data.write_text("".join((folder / "chat.jsonl").read_text().splitlines(keepends=True)[:8]))
    arguments = ["run.name=more", f"data.train.0.path={data}", "data.holdout=0", "data.packing=false", "train.epochs=1"]
    arguments += [
        "train.schedule=linear",
        "train.warmup_ratio=0",
        "train.eval_every_steps=null",
        "train.save_every_steps=1",
    ]
    arguments += ["train.trackers=[]", "scaling.num_workers=1", "generate.sources=[chat]", "generate.max_examples=2"]
    arguments += ["generate.compare_base=false"]
    command = ["run", str(folder / "sft.yaml"), *arguments]
    run = folder / "runs" / "more"
    assert main(command) == 0
    predicted = (run / "generated_predictions.jsonl").read_text()
    capsys.readouterr()
    assert main(command) == 0
    assert "is already trained" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for refused, reason in (
        (["train.epochs=3"], "train.epochs=3 (the run has 1); choose another run.name, or resume with --allow-changed"),
        (
            ["train.max_grad_norm=2", "--allow-changed"],
            "has done 2 steps, but with train.max_grad_norm=2.0 (the run has 1.0) it has 2 in all",
        ),
        (
            ["train.optimizer=muon", "train.zero_stage=0", "--allow-changed"],
            "train.optimizer cannot change",
        ),
    ):
        assert main([*command, *refused]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    for name in ("config.yaml", "plan.json", "trainer_log.jsonl", "train_results.json"):
        assert (run / name).read_bytes() == before[name], "nothing is rewritten"
    assert main([*command, "train.epochs=3", "train.learning_rate=2e-2", "--allow-changed"]) == 0
    out = capsys.readouterr().out
    assert "resumes after step 2 with train.epochs=3 (before: 1), train.learning_rate=0.02 (before: 0.01)" in out
    steps = steps_of(run)
    assert [step["current_steps"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step["lr"] for step in steps] == pytest.approx(
        [1e-2, 5e-3, *(2e-2 * (6 - step) / 6 for step in range(2, 6))]
    )
    assert [step["rows"] for step in steps] == [4, 8, 12, 16, 20, 24]
    epochs = [sum(step["loss_tokens"] for step in steps[first : first + 2]) for first in (0, 2, 4)]
    assert len(set(epochs)) == 1, "each epoch trains on each example once"
    assert list(read_jsonl(run / "changes.jsonl")) == [
        {"after_step": 2, "changed": {"train.epochs": [1, 3], "train.learning_rate": [0.01, 0.02]}}
    ]
    assert results(run, "train")["total_steps"] == 6
    assert (run / "generated_predictions.jsonl").read_text() != predicted
    assert results(run, "predict")
    # Interrupted before its results were written, it goes on with other data in an epoch that has not begun, and only then.
    command = ["train", *command[1:], "train.epochs=3", "train.learning_rate=2e-2"]
    (run / "train_results.json").unlink()
    data.write_text("".join((folder / "chat.jsonl").read_text().splitlines(keepends=True)[8:20]))
    for more, reason in (
        ([], "the data of source 'chat' changed since this run's checkpoint after step 6; restore the old files"),
        (
            ["--allow-changed"],
            "the data of source 'chat' can change from epoch 4 on, but train.epochs=3; raise train.epochs",
        ),
    ):
        assert main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    assert main([*command, "train.epochs=4", "--allow-changed"]) == 0
    assert [step["rows"] for step in steps_of(run)] == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert list(read_jsonl(run / "changes.jsonl"))[1]["from_epoch"] == 4


def test_checkpoints_by_time_save_an_interrupted_run_and_go_when_it_is_done(folder, sft_run, capsys):
    """Written after each step here; what is asked for by steps, none."""
    arguments = [
        "run.name=by-time",
        "train.save_every_steps=null",
        "train.save_every_minutes=1e-6",
        "scaling.num_workers=1",
    ]
    config = load(folder / "sft.yaml", [*arguments, "generate.enabled=false"])
    with pytest.raises(KeyboardInterrupt):
        raysft.run_sft(config, callbacks=[Interrupt(4)])
    run = folder / "runs" / "by-time"
    assert Cursor.read(next(complete(run / "checkpoints"))).step >= 2
    capsys.readouterr()
    assert main(["train", str(folder / "sft.yaml"), *arguments, "generate.enabled=false"]) == 0
    assert "resuming after step" in capsys.readouterr().out
    for one, two in zip(steps_of(run), steps_of(sft_run), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert not (run / "checkpoints").exists()
    told = [
        "train",
        str(folder / "sft.yaml"),
        *arguments,
        "generate.enabled=false",
        "train.epochs=3",
        "--allow-changed",
    ]
    assert main(told) == 2
    assert "is already trained, but has no checkpoint to resume from" in capsys.readouterr().err


class Fails:
    """Raises when the second step is done."""

    def on_step(self, record) -> None:
        if record.current_steps == 2:
            raise ZeroDivisionError("of the callback")


def test_a_callback_that_raises_stops_the_training(folder):
    """In another thread than the main one, as a trial of a sweep is driven: Ray Train hands its controller over in the main one."""
    config = load(folder / "sft.yaml", ["run.name=fails", "scaling.num_workers=1", "train.epochs=200"])
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(ZeroDivisionError, match="of the callback"),
    ):
        executor.submit(raysft.run_sft, config, callbacks=[Fails()]).result(timeout=300)
    run = folder / "runs" / "fails"
    assert len(steps_of(run)) < 30
    assert not (run / "model").exists()


class SpoiltForOne(PackedDataset):
    """Rows that the second worker cannot read, as where its node holds a damaged copy."""

    def steps(self, first, worker, workers):
        if worker == 1:
            raise RequestError("the copy of worker 1 is damaged; copy it again")
        return super().steps(first, worker, workers)


def test_a_worker_that_fails_alone_before_the_training_ends_it(tmp_path):
    """The other one waits for it in a collective, for minutes if nobody stops it."""
    folder, model, manifest = prepare(tmp_path)
    config = make_config(folder, model, {"scaling.num_workers": 2, "scaling.cpus_per_worker": 0.5})
    run = RunDirectory(tmp_path / "r")
    shutil.copytree(model, tmp_path / "r" / "model")
    rows = SpoiltForOne((f"{manifest.directory}/manifest.parquet",), 96, 4)
    job = EvaluationJob(config, run, run.model.location, {"d": rows})
    begun = time.monotonic()
    with pytest.raises(RequestError, match="worker 1 is damaged"):
        launch.evaluate(job, lambda event: None)
    assert time.monotonic() - begun < 300  # a collective waits for 600 s


class StartsThirdTime(RestartableBackend):
    """First another process listens at the port that the first worker has chosen, then a worker dies."""

    starts = 0

    def on_start(self, worker_group, backend_config):
        self.starts += 1
        taken = socket.create_server(("0.0.0.0", 0))
        address = ray.util.get_node_ip_address(), taken.getsockname()[1]

        def chosen():
            if self.starts == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return address

        with taken, pytest.MonkeyPatch.context() as patch:
            if self.starts < 3:
                patch.setattr("ray.train.torch.config.get_address_and_port", chosen)
            super().on_start(worker_group, backend_config)


class StartsThirdTimeConfig(RestartableTorchConfig):
    @property
    def backend_cls(self):
        return StartsThirdTime


def test_workers_whose_process_group_does_not_start_are_started_again(tmp_path, monkeypatch):
    """They leave their CPUs to those that come after them: there is no room for both."""
    folder, model, manifest = prepare(tmp_path)
    config = make_config(folder, model, {"scaling.num_workers": 2, "scaling.cpus_per_worker": 0.75})
    shutil.copytree(model, tmp_path / "r" / "model")
    rows = PackedDataset((f"{manifest.directory}/manifest.parquet",), 96, 4)
    run = RunDirectory(tmp_path / "r")
    job = EvaluationJob(config, run, run.model.location, {"d": rows})
    monkeypatch.setattr(launch, "RestartableTorchConfig", StartsThirdTimeConfig)
    events = []
    results = launch.evaluate(job, events.append)
    assert results["eval"]["eval_loss"] > 0
    reasons = [event.reason for event in events if isinstance(event, WorkersRestarting)]
    assert [reason.partition(": ")[0] for reason in reasons] == ["the workers did not start"] * 2
    assert "EADDRINUSE" in reasons[0], reasons
    assert "ActorDied" in reasons[1] or "died" in reasons[1], reasons


def test_ctrl_c_ends_with_a_checkpoint_exit_code_75_and_one_line(folder):
    # Who starts the tests in the background starts them, and what they start, with Ctrl-C switched off.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "raysft", "train", str(folder / "sft.yaml")]
    address = f"scaling.address={ray.get_runtime_context().gcs_address}"
    arguments = ["run.name=stopped", address, "scaling.num_workers=1", "train.epochs=500"]
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=joining()
    ) as process:
        alarm = threading.Timer(300, process.kill)
        alarm.start()
        assert process.stdout
        next(line for line in process.stdout if line.startswith("step 2/"))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
        alarm.cancel()
    assert process.returncode == 75
    assert "raysft: stopped after step " in error
    assert ": Ctrl-C; checkpoint written; run the same command again to resume" in error
    assert "Traceback" not in error


def test_a_loss_that_is_not_finite_ends_the_run_at_once(folder, capsys):
    arguments = [
        "run.name=infinite",
        "train.learning_rate=1e30",
        "train.max_grad_norm=0",
        "train.max_steps=6",
        "scaling.num_workers=1",
    ]
    assert main(["train", str(folder / "sft.yaml"), *arguments]) == 1
    error = capsys.readouterr().err
    assert "the loss is" in error
    assert "lower train.learning_rate" in error
    assert error.count("\n") == 1
    # It is not tried again as if a machine had died: each step is logged once.
    steps = [step["current_steps"] for step in steps_of(folder / "runs" / "infinite")]
    assert steps == sorted(set(steps))


FAILS_ON = """

class FailsForCausalLM(OwnForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_pre_hook(self._look)

    def _look(self, module, arguments):
        if module.training and (arguments[0] == {token}).any():
            raise ValueError("no such token here")
"""


def test_an_error_that_comes_again_at_the_same_step_is_not_tried_four_times(folder, tmp_path, capsys, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = with_code(tiny_model(tmp_path / "fails"), tmp_path / "ran")
    token = AutoTokenizer.from_pretrained(own)("Ω").input_ids[0]
    code = (own / "modeling_own.py").read_text() + FAILS_ON.format(token=token)
    (own / "modeling_own.py").write_text(code)
    described = (
        (own / "config.json").read_text().replace("modeling_own.OwnForCausalLM", "modeling_own.FailsForCausalLM")
    )
    (own / "config.json").write_text(described.replace('"OwnForCausalLM"', '"FailsForCausalLM"'))
    records = [json.loads(line) for line in (folder / "chat.jsonl").read_text().splitlines()[:12]]
    records[6]["messages"][1]["content"] += " Ω"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = [f"model.path={own}", f"model.trust_remote_code=[{own}]", f"data.train.0.path={tmp_path}/data.jsonl"]
    settings += ["run.name=again-and-again", "data.holdout=0", "data.packing=false", "train.global_batch_size=3"]
    settings += ["scaling.num_workers=1", "train.eval_every_steps=null", "train.save_every_steps=1", "train.epochs=1"]
    capsys.readouterr()
    assert main(["train", str(folder / "sft.yaml"), *settings]) == 1
    out, error = capsys.readouterr()
    assert out.count("; restarting the workers") == 1, out
    assert error.count("\n") == 1
    steps = [line.split("/")[0] for line in out.splitlines() if line.startswith("step ")]
    assert len(set(steps)) == len(steps), "each step before it is trained once"
    failing = f"step {len(steps) + 1}"
    assert error.startswith(
        f"raysft: failed: worker 0 ({socket.gethostname()}) failed in {failing}: ValueError: no such token here ("
    )
    assert f"chat: {tmp_path}/data.jsonl:7" in error
    assert error.endswith(
        "not retried, because it failed the same way before: fix the cause, or remove these records\n"
    )


@pytest.fixture(scope="module")
def pt_run(folder) -> Path:
    """A whole run on raw text."""
    assert main(["run", str(folder / "pt.yaml")]) == 0
    return folder / "runs" / "pt"


def test_pre_training_has_a_perplexity_for_each_evaluation_set(pt_run):
    run = pt_run
    evaluation = results(run, "eval")
    for name in ("more", "same"):
        assert evaluation[f"eval_{name}_perplexity"] == pytest.approx(math.exp(evaluation[f"eval_{name}_loss"]))
    tokens = evaluation["eval_more_tokens"] + evaluation["eval_same_tokens"]
    mean = (
        evaluation["eval_more_loss"] * evaluation["eval_more_tokens"]
        + evaluation["eval_same_loss"] * evaluation["eval_same_tokens"]
    )
    assert evaluation["eval_loss"] == pytest.approx(mean / tokens)
    assert not (run / "generated_predictions.jsonl").exists()
    assert "evaluation loss" in (run / "README.md").read_text()


def test_evaluations_by_epoch_come_at_its_end_and_plans_say_how_many_epochs_there_are(folder, pt_run, capsys):
    plan = json.loads((pt_run / "plan.json").read_text())
    assert plan["epochs"] == 7
    of_epoch, rest = divmod(plan["steps"], 7)
    assert rest == 0
    evaluations = [record for record in read_jsonl(pt_run / "trainer_log.jsonl") if "eval_loss" in record]
    found = [(record["current_steps"], record["epoch"]) for record in evaluations]
    assert found == [(0, 0), (6 * of_epoch, 6), (7 * of_epoch, 7)], (
        "that of the third epoch comes before the delay is over"
    )
    size = f"train.global_batch_size={plan['global_batch_size']}"
    for settings, steps, epochs in (
        (["train.epochs=6.5"], 6 * of_epoch + math.ceil(of_epoch / 2), "6.5 epochs"),
        (["train.epochs=1", f"train.max_steps={9 * of_epoch}"], 9 * of_epoch, "9 epochs"),
    ):
        assert main(["check", str(folder / "pt.yaml"), "run.name=other", size, *settings]) == 0
        out = capsys.readouterr().out
        assert f"steps: {steps} of " in out
        assert f" over {epochs}, " in out


def test_the_data_decides_how_many_rows_a_step_has_once_for_a_run(folder, pt_run, capsys):
    plan = json.loads((pt_run / "plan.json").read_text())
    chosen, in_epoch = plan["global_batch_size"], plan["rows_of_epochs"][0]
    # 7 epochs of some 30 rows: 2 rows in a step give more than 100 steps, 4 do not.
    assert (chosen, plan["steps"]) == (2, 7 * -(-in_epoch // 2))
    assert yaml.safe_load((pt_run / "config.yaml").read_text())["train"]["global_batch_size"] == 2
    assert [step["epoch"] for step in steps_of(pt_run)][-(-in_epoch // 2) - 1] == 1
    assert results(pt_run, "train")["total_rows"] == plan["rows"]
    # With other data auto would be another number; this run has begun with 2.
    longer = ["train.epochs=70", "run.name=pt"]
    assert main(["check", str(folder / "pt.yaml"), *longer]) == 2
    assert "train.epochs=70 (the run has 7); choose" in capsys.readouterr().err
    assert main(["check", str(folder / "pt.yaml"), "run.name=longer", *longer[:1]]) == 0
    assert " of 16 rows (auto: chosen from the data)" in capsys.readouterr().out
    assert main(["run", str(folder / "pt.yaml")]) == 0
    out = capsys.readouterr().out
    assert " of 2 rows (auto: chosen from the data)" in out
    assert "is already trained" in out


def test_check_plans_without_training(folder, sft_run, capsys):
    assert main(["check", str(folder / "sft.yaml"), "run.name=planned"]) == 0
    out = capsys.readouterr().out
    plan = json.loads((sft_run / "plan.json").read_text())
    assert f"rows: {plan['rows']}" in out
    assert "resources: needs 2 CPUs and 0 GPUs, the cluster has 2 CPUs and 0 GPUs" in out
    assert not (folder / "runs" / "planned").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scaling.num_workers=5", "scaling.num_workers=5 needs 0.75 CPUs per worker"),
        ("scaling.use_gpu=true", "GPUs"),
        ("generate.num_actors=3", "generate.num_actors=3"),
        ("scaling.cpus_per_worker=1", "leave no CPU for data tasks"),
        ("model.path=no-such-model", "model.path=no-such-model"),
        ("data.train.0.path=no-such-file.json", "no-such-file.json"),
        ("data.sequence_length=16", "raise data.sequence_length, or set data.on_overflow to truncate, split or drop"),
    ],
)
def test_what_cannot_run_is_refused_at_once(folder, capsys, override, message):
    assert main(["run", str(folder / "sft.yaml"), "run.name=refused", override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "runs" / "refused").exists()


def test_show_prints_packed_rows(folder, capsys):
    assert main(["show", str(folder / "sft.yaml"), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("── row ") == 2
    assert "<|im_end|>⟧" in out


def test_prepare_writes_shards_once(folder, capsys):
    arguments = ["prepare", str(folder / "sft.yaml"), "run.name=prepared", f"data.cache={folder}/other"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("written: ") == 2
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("reused: ") == 2


def test_a_directory_in_which_nothing_was_trained_may_be_taken_over(folder, capsys):
    """A mistake that only the workers notice must not use the run's name up."""
    command = ["prepare", str(folder / "sft.yaml"), "run.name=taken"]
    assert main([*command, "train.learning_rate=0.5"]) == 0
    assert main([*command, "train.learning_rate=0.25"]) == 0
    assert load(folder / "runs" / "taken" / "config.yaml").train.learning_rate == 0.25


@pytest.mark.parametrize("key", ["run.storage", "data.cache"])
def test_a_folder_that_cannot_be_made_is_one_line(folder, capsys, key):
    assert main(["check", str(folder / "sft.yaml"), f"{key}={folder}/sft.yaml/x"]) == 2
    error = capsys.readouterr().err
    assert f"{key}: " in error
    assert "choose another folder" in error
    assert error.count("\n") == 1


def test_code_that_comes_with_a_model_runs_only_where_it_is_named(folder, tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = tmp_path / "ran"
    own = with_code(tiny_model(tmp_path / "own-model"), ran, tokenizer=True)
    capsys.readouterr()
    told = [
        str(folder / "sft.yaml"),
        "run.name=own",
        f"model.path={own}",
        "train.max_steps=2",
        "train.eval_at_start=false",
        "scaling.num_workers=1",
        "generate={compare_base: false, max_examples: 2, max_new_tokens: 2}",
    ]
    assert main(["check", *told]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith(f"raysft: error: model.path={own} needs its own code (modeling_own.py)")
    assert refused.count("\n") == 1
    assert not ran.exists()
    assert main(["run", *told, f"model.trust_remote_code=[{own}]"]) == 0
    run = folder / "runs" / "own"
    assert 'from_pretrained("model", trust_remote_code=True' in (run / "README.md").read_text()
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(exported).__name__ == "OwnForCausalLM"


TURN = (
    "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)


def test_a_model_stops_where_its_turns_were_trained_to_end(tmp_path, capsys):
    """Its turns end with a token that is not the tokenizer's eos, as those of many base models do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_model(tmp_path / "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = TURN
    model.resize_token_embeddings(len(tokenizer))
    for each in (model, tokenizer):
        each.save_pretrained(base)
    end, eos = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    turns = [
        {"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(("hi", "yo", "so", "yo yo"))
    ]
    (tmp_path / "a.jsonl").write_text(4 * (json.dumps({"messages": turns}) + "\n"))
    settings = {
        "run": {"storage": str(tmp_path / "runs"), "name": "r"},
        "model": {"path": str(base), "dtype": "float32", "finetuning": "full"},
        "data": {
            "train": [{"name": "a", "path": str(tmp_path / "a.jsonl")}],
            "eval": [{"name": "e", "path": str(tmp_path / "a.jsonl"), "max_examples": 1}],
            "sequence_length": 256,
        },
        "train": {
            "global_batch_size": 1,
            "epochs": 15,
            "learning_rate": 5e-3,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "eval_at_start": False,
        },
        "generate": {"max_new_tokens": 24, "do_sample": False, "compare_base": False},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    assert main(["run", str(tmp_path / "c.yaml")]) == 0
    run = tmp_path / "runs" / "r"
    assert "turns: 8, ended by <|end|> (8)" in capsys.readouterr().out
    (written,) = read_jsonl(run / "generated_predictions.jsonl")
    assert (written["predict"], written["stop"]) == ("yo yo", "eos")
    # The model before is asked with the same prompts, and stops there too.
    assert json.loads(pq.read_schema(run / "prompts.parquet").metadata[b"end_tokens"]) == [end]
    # Outside of raysft as well.
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.generation_config.eos_token_id == [end, eos]
    assert (exported.config.eos_token_id, AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id) == (end, end)
    ids = tokenizer.apply_chat_template(turns[:3], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = exported.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(out) == "yo yo<|end|>"


def test_new_tokens_end_turns_of_a_base_model_with_an_adapter(tmp_path, capsys):
    """From the config to the exported model, and a second training that goes on from the first one's adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_model(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(base)
    (tmp_path / "t.jinja").write_text(TURN.replace("<|im_start|>", "<|turn|>"))
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(("hi", "yo yo"))]
    (tmp_path / "a.jsonl").write_text(8 * (json.dumps({"messages": turns}) + "\n"))
    source = {"path": str(tmp_path / "a.jsonl")}
    model = {"path": str(base), "dtype": "float32", "chat_template": str(tmp_path / "t.jinja")}
    settings = {
        "run": {"storage": str(tmp_path / "runs"), "name": "r"},
        "model": {**model, "new_tokens": {"special": ["<|turn|>", "<|end|>"], "descriptions": {"<|end|>": "yo"}}},
        "data": {"train": [{"name": "a", **source}], "eval": [{"name": "e", **source, "max_examples": 1}]},
        "train": {
            "global_batch_size": 1,
            "epochs": 8,
            "learning_rate": 1e-2,
            "schedule": "constant",
            "warmup_ratio": 0.0,
        },
        "generate": {"max_new_tokens": 24, "do_sample": False},
    }
    settings["data"] |= {"sequence_length": 64, "packing": False, "cache": str(tmp_path / "cache")}
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    assert main(["run", str(tmp_path / "c.yaml")]) == 0
    out, run = capsys.readouterr().out, tmp_path / "runs" / "r"
    assert out.count("gets 2 tokens (<|turn|> <|end|>), once") == 1
    assert "ended by <|end|> (8)" in out
    (written,) = read_jsonl(run / "generated_predictions.jsonl")
    assert (written["predict"], written["stop"]) == ("yo yo", "eos")
    (before,) = read_jsonl(RunDirectory(run).base_predictions)
    assert before["predict"] != "yo yo"
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    exported, tokenizer = (each.from_pretrained(tmp_path / "out") for each in (AutoModelForCausalLM, AutoTokenizer))
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"])
    assert (tokenizer.eos_token, exported.generation_config.eos_token_id) == ("<|end|>", [end, eos])
    ids = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(exported.generate(ids, max_new_tokens=24)[0, ids.shape[1] :]) == "yo yo<|end|>"
    again = [f"model.adapters=[{run / 'model'}]", "run.name=s", "train.epochs=1", "generate.enabled=false"]
    capsys.readouterr()
    assert main(["run", str(tmp_path / "c.yaml"), *again]) == 0
    assert "new tokens" not in capsys.readouterr().out
    losses = [
        [row["loss"] for row in read_jsonl(tmp_path / "runs" / name / "trainer_log.jsonl") if "loss" in row]
        for name in "rs"
    ]
    assert losses[1][0] < 0.1 * losses[0][0]
