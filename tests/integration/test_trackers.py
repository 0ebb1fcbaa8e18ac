"""A run and its sequel in all trackers: names of the config, each step once, with the values of the log."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

import raysft
from raysft.cli import main
from raysft.config import load
from raysft.storage.json_files import read_jsonl
from raysft.train.checkpoint.catalog import newest
from tests.tiny import tiny_model, write_chats

pytestmark = pytest.mark.usefixtures("local_ray")

CONFIG = """
run: {{storage: {folder}/runs}}
model: {{path: {folder}/base, finetuning: full}}
data: {{train: [{{name: chat, path: {folder}/chat.jsonl}}], holdout: 0.2, sequence_length: 64}}
train:
  {{max_steps: 6, global_batch_size: 2, eval_at_start: false, save_every_steps: 2, trackers: [mlflow, swanlab, trackio],
   tracking: {{project: tried, run_name: mine, tags: [quick, team=nlp], group: together}}}}
scaling: {{num_workers: 1, cpus_per_worker: 1, threads_per_worker: 1}}
generate: {{enabled: false}}
"""


class Interrupt:
    """Ctrl-C after step 5, once the workers have the checkpoint of step 6, of which the driver then knows nothing."""

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints = checkpoints

    def on_step(self, record) -> None:
        until = time.monotonic() + 120
        while record.current_steps == 5:
            found = newest(self._checkpoints)
            if found and found.cursor.step == 6:
                raise KeyboardInterrupt
            assert time.monotonic() < until, "no checkpoint of step 6"
            time.sleep(0.05)


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """Where trackers keep a run without their servers."""
    pytest.importorskip("swanlab")
    pytest.importorskip("trackio")
    import mlflow
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), sqlite_storage.SQLiteStorage


@pytest.mark.parametrize("resumed_after", [4, 6], ids=["a step is repeated", "a step is missing"])
def test_a_run_that_goes_on_has_each_step_once_under_the_names_of_its_config(tmp_path, stores, resumed_after, capsys):
    checkpoints = tmp_path / "runs/own/checkpoints"
    client, store = stores
    tiny_model(tmp_path / "base")
    write_chats(tmp_path / "chat.jsonl", 40)
    config = tmp_path / "own.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    with pytest.raises(KeyboardInterrupt):
        raysft.run_sft(load(config), callbacks=[Interrupt(checkpoints)])
    (experiment,) = (each for each in client.search_experiments() if each.name == "tried")
    (killed,) = client.search_runs([experiment.experiment_id])
    assert killed.info.status == "KILLED"
    if resumed_after == 4:
        for folder in checkpoints.glob("checkpoint_00000006_*"):
            shutil.rmtree(folder)
    assert main(["run", str(config)]) == 0
    assert f"resuming after step {resumed_after} " in capsys.readouterr().out

    log = list(read_jsonl(tmp_path / "runs/own/trainer_log.jsonl"))
    losses = [(each["current_steps"], each["loss"]) for each in log if "loss" in each]
    (evaluation,) = (each for each in log if "eval_loss" in each)
    assert [number for number, _ in losses] == [1, 2, 3, 4, 5, 6]

    (run,) = client.search_runs([experiment.experiment_id])
    tags = {key: run.data.tags.get(key) for key in ("quick", "team")}
    assert (run.info.run_name, run.info.status, tags) == ("mine", "FINISHED", {"quick": "true", "team": "nlp"})
    found = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "train/loss")]
    assert found == [(number, pytest.approx(loss, rel=1e-5)) for number, loss in losses]
    assert run.data.metrics["eval/loss"] == pytest.approx(evaluation["eval_loss"])
    assert run.data.metrics["eval/runtime"] == evaluation["eval_runtime"]

    (record,) = store.get_run_records("tried")
    entries = store.get_logs("tried", "mine", run_id=record["id"])
    found = [(each["step"], each["train/loss"]) for each in entries if "train/loss" in each]
    assert found == [(number, pytest.approx(loss, rel=1e-5)) for number, loss in losses]
    assert [each["eval/loss"] for each in entries if "eval/loss" in each] == [evaluation["eval_loss"]]

    starts = sorted((tmp_path / "runs/own/swanlog").glob("run-*"))
    assert len(starts) == 2, "both of one id, under which swanlab sync sends them"
    assert len({path.name.split("-", 2)[2] for path in starts}) == 1
    assert not Path("swanlog").exists()
