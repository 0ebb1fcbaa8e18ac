"""Sweeps through the command line, on a local Ray cluster of 2 CPUs, with a tiny model."""

import importlib.util
import io
import json
import os
import shutil
import sqlite3
import statistics
import time
from contextlib import closing, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import ray

from raysft.cli import main
from raysft.config import load
from raysft.storage.json_files import read_jsonl
from raysft.storage.lock import lock
from raysft.tune.trials import combinations
from tests.clusters import joining
from tests.processes import command
from tests.tiny import SENTENCES, tiny_model

RATES = [1.0e-5, 1.0e-2]
CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, finetuning: full}}
data:
  train: [{{name: chat, path: chat.jsonl}}]
  eval: [{{name: held, path: held.jsonl}}]
  sequence_length: 128
train: {{max_steps: 4, global_batch_size: 2, zero_stage: 0, schedule: constant, warmup_ratio: 0}}
scaling: {{threads_per_worker: 1}}
generate: {{compare_base: false, max_examples: 2, max_new_tokens: 4, do_sample: false}}
tune: {{space: {{train.learning_rate: {rates}}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and conversations that a config there names by relative paths."""
    folder = tmp_path_factory.mktemp("tune")
    tiny_model(folder / "base")
    words = " ".join(SENTENCES).split()
    for name, count in (("chat", 40), ("held", 4)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for index in range(count):
                texts = (" ".join(words[index % 40 :][:4]), " ".join(words[index * 7 % 40 :][:5]))
                turns = [
                    {"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)
                ]
                file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "sweep.yaml").write_text(CONFIG.format(folder=folder, rates=RATES))
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def sweep(local_ray, folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["tune", "sweep.yaml"]) == 0
    return folder / "runs" / "sweep"


def test_the_best_config_holds_the_better_rate(sweep):
    results = json.loads((sweep / "tune_results.json").read_text())
    assert (results["metric"], results["mode"]) == ("eval_loss", "min")
    losses = {trial["config"]["train.learning_rate"]: trial["eval_loss"] for trial in results["trials"]}
    assert set(losses) == set(RATES)
    best = load(sweep / "best.yaml")
    assert "best eval_loss" in (sweep / "sweep.html").read_text()
    assert best.train.learning_rate == min(RATES, key=losses.__getitem__) == 1e-2
    assert losses[1e-2] < losses[1e-5] - 0.1
    assert best.run.name == "sweep-best"
    assert best.tune.space == {}


def test_every_trial_is_a_whole_run_and_all_share_the_shards(sweep):
    trials = sorted((sweep / "trials").iterdir())
    assert len(trials) == 2
    for trial in trials:
        assert {"all_results.json", "generated_predictions.jsonl", "model", "README.md"} <= {
            p.name for p in trial.iterdir()
        }
        sources = json.loads((trial / "plan.json").read_text())["sources"]
        assert sources["chat"]["reused"]
    cache = sweep.parent / "cache" / "shards"
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == ["chat", "held"]
    assert len(list(cache.glob("*/*.parquet"))) == 4  # a manifest and a shard of each


def test_only_the_first_trial_evaluates_the_model_that_all_start_from(sweep):
    (kept,) = (sweep.parent / "cache" / "evaluations").iterdir()
    firsts = [json.loads(log.read_text().splitlines()[0]) for log in sweep.glob("trials/*/trainer_log.jsonl")]
    assert len(firsts) == 2
    for first in firsts:
        assert first["current_steps"] == 0
        assert first["eval_loss"] == json.loads(kept.read_text())["evaluation"]["loss"]
    begun = max(config.stat().st_mtime_ns for config in sweep.glob("trials/*/config.yaml"))
    assert kept.stat().st_mtime_ns < begun, "the second trial has computed it again"


def test_a_sweep_started_again_runs_only_what_is_missing(sweep, folder, capsys):
    logs = {log: log.stat().st_mtime_ns for log in sweep.glob("trials/*/trainer_log.jsonl")}
    before = (sweep / "tune_results.json").read_text()
    assert main(["tune", "sweep.yaml"]) == 0
    assert {log: log.stat().st_mtime_ns for log in sweep.glob("trials/*/trainer_log.jsonl")} == logs
    assert (sweep / "tune_results.json").read_text() == before
    shown = capsys.readouterr()
    assert shown.err == ""
    words = [line.split()[0] for line in shown.out.splitlines()]
    assert [word for word in words if word != "warning:"] == (
        [
            "train",
            "eval",
            "duplicates:",
            "turns:",
            "rows:",
            "steps:",
            "resources:",
            "tune:",
            "eval_loss",
            "eval_loss",
            "best",
            "best",
            "page:",
        ]
    )


def refused(capsys, *overrides: str) -> str:
    """The one line that says why a sweep was not begun."""
    assert main(["tune", "sweep.yaml", "run.name=refused", *overrides]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert not more
    assert not Path("runs/refused").exists()
    return line


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("tune.space={train.learning_rat: [1]}", "tune.space: unknown key train.learning_rat; did you mean"),
        ("tune.space={train.learning_rate: [1, fast]}", "tune.space: train.learning_rate='fast': "),
        ("tune.space={run.name: [a, b]}", "run.name is the same for all trials"),
        ("tune.space={train.max_steps: [1, 1]}", "has train.max_steps=1 twice"),
        ("tune.space={}", "tune.space is empty"),
        ("tune.metric=eval_los", "tune.metric='eval_los' is not a result of these runs; use one of eval_loss, "),
    ],
)
def test_a_wrong_sweep_is_one_line(override, reason, capsys):
    assert reason in refused(capsys, override)


def test_two_sweeps_do_not_share_a_directory(capsys):
    with lock(Path("runs/taken").absolute()):
        assert main(["tune", "sweep.yaml", "run.name=taken"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"runs/taken: process {os.getpid()} on " in line
    assert line.endswith("uses this folder; wait for it, stop it, or choose another run.name")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("scaling.num_workers=3", "scaling.num_workers=3 needs 1 CPU per worker"),
        ("tune.space={scaling.num_workers: [1, 3]}", "scaling.num_workers=3 needs 1 CPU per worker"),
        ("scaling.num_workers=[3, 4]", "scaling.num_workers=[3, 4] needs 1 CPU per worker"),
        ("scaling.cpus_per_worker=1.45", "leave no CPU for data tasks"),
        ("generate.num_actors=2", "generation in a trial needs 2 whole CPUs"),
    ],
)
def test_a_trial_that_never_fits_is_refused(override, reason, capsys):
    assert reason in refused(capsys, override)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_metric_that_a_run_lacks_ends_the_sweep_with_the_first_trial(sweep, capsys, recorded):
    """Also where all trials are done by the record: another metric may come of a stage that they have not done. The config does not
    tell whether a run has a best step."""
    shutil.copytree(sweep, sweep.with_name("metric"))
    if not recorded:
        (sweep.with_name("metric") / "trials.jsonl").unlink()
    assert main(["tune", "sweep.yaml", "run.name=metric", "tune.metric=best_step", "tune.mode=min"]) == 2
    shown = capsys.readouterr()
    line, *more = shown.err.splitlines()
    assert not more
    assert line.startswith(
        "raysft: error: tune.metric='best_step' is not a result of these runs; use one of effective_tokens_per_sec, epoch, "
        "eval_accuracy, "
    )
    assert shown.out.count("started: ") == 1
    shutil.rmtree(sweep.with_name("metric"))


def test_a_trial_that_fails_is_one_line_and_the_others_count(sweep, capsys):
    """With the rate of 1e30 the loss is not finite; the other trials are done already."""
    shutil.copytree(sweep, sweep.with_name("fails"))
    space = f"tune.space={{train.learning_rate: {[*RATES, 1.0e30]}}}"
    quick = ["generate.enabled=false", "scaling.cpus_per_worker=0.4", "train.max_failures=0", "tune.max_failures=1"]
    assert main(["tune", "sweep.yaml", "run.name=fails", space, *quick]) == 1
    shown = capsys.readouterr()
    line, *more = shown.err.splitlines()
    assert not more
    assert line.startswith("raysft: failed: 1 of 3 trials failed (step ")
    assert "best.yaml is the best of the others" in line
    assert "3 trials, 2 at a time, 2 done before" in shown.out
    assert (shown.out.count("started: "), shown.out.count("resumed: ")) == (1, 1)
    assert shown.out.count("failed, and restarts: train.learning_rate=1e+30 | step ") == 1
    last = list(read_jsonl(sweep.with_name("fails") / "trials.jsonl"))[-1]
    assert (last["values"], last["state"], last["number"]) == ({"train.learning_rate": 1e30}, "failed", 2)
    assert last["reason"] in line
    assert load(sweep.with_name("fails") / "best.yaml").train.learning_rate == 1e-2


TRACKED_RATES = [1.0e-5, 1.0e-4, 1.0e-3]
TRACKERS = ["wandb", "mlflow", *(name for name in ("swanlab", "trackio") if importlib.util.find_spec(name))]


def tracked(folder: Path, count: int) -> str:
    """What a sweep prints of two elastic trials at a time that log to trackers, which show the first rates.

    Servers are named in this process alone, after the start of the cluster.
    """
    quick = ["generate.enabled=false", "train.eval_at_start=false", "train.max_steps=2", "train.global_batch_size=6"]
    elastic = ["scaling.num_workers=[1, 3]", "scaling.cpus_per_worker=0.2", "tune.max_concurrent=2"]
    values = f"tune.space={{train.learning_rate: {TRACKED_RATES[:count]}}}"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("SWANLAB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        trackers = f"train.trackers=[{', '.join(TRACKERS)}]"
        assert main(["tune", "sweep.yaml", "run.name=tracked", trackers, *quick, *elastic, values]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def two_tracked(local_ray, folder) -> str:
    return tracked(folder, 2)


def test_two_elastic_trials_at_a_time_share_the_workers(two_tracked, folder):
    """With the most workers one trial would fill the cluster, and with as many as the nodes have it would starve its data tasks."""
    assert "2 trials, 2 at a time" in two_tracked
    first, second, *_ = last_lines(folder / "runs" / "tracked").values()
    assert second["started"] < first["ended"]
    for record in (first, second):
        assert record["state"] == "done"
        plan = json.loads((folder / "runs" / "tracked" / "trials" / record["trial"] / "plan.json").read_text())
        assert (plan["fewest_workers"], plan["most_workers"]) == (1, 2), "0.4 CPUs of 1 for each trial"


@pytest.mark.usefixtures("two_tracked")
def test_trackers_show_a_sweep_and_its_trials_together(folder):
    """Also those that a second call adds."""
    import mlflow

    tracked(folder, 3)
    trials = last_lines(folder / "runs" / "tracked")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("raysft")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert (parent.info.run_name, parent.info.status) == ("tracked", "FINISHED")
    nested = {str(run.info.run_name): run for run in runs if run is not parent}
    assert nested.keys() == trials.keys()
    assert {run.data.tags["mlflow.parentRunId"] for run in nested.values()} == {parent.info.run_id}
    assert sorted(float(run.data.params["train.learning_rate"]) for run in nested.values()) == TRACKED_RATES
    for name, run in nested.items():
        assert run.data.metrics["eval/loss"] == pytest.approx(trials[name]["metrics"]["eval_loss"])
        assert (
            len(list((folder / "runs/tracked/trials" / name / "wandb").glob(f"offline-run-*/run-{name}-*.wandb"))) == 1
        )
    if "trackio" in TRACKERS:
        with closing(sqlite3.connect(folder / "trackio" / "raysft.db")) as database:
            configs = [json.loads(config) for (config,) in database.execute("SELECT config FROM configs")]
        assert sorted(config["train"]["learning_rate"] for config in configs) == TRACKED_RATES
        assert {config["_Group"] for config in configs} == {"tracked"}
    if "swanlab" in TRACKERS:
        assert len(list((folder / "runs/tracked/trials").glob("*/swanlog/run-*/*.swanlab"))) == 3
    again = load(folder / "runs/tracked/trials" / name / "config.yaml")
    assert again.run.sweep == "tracked"
    assert load(folder / "runs/tracked/best.yaml").run.sweep is None


QUICK = ["generate.enabled=false", "tune.max_concurrent=1", "train.eval_at_start=false"]
RATES_DRAWN = "tune.space={train.learning_rate: {loguniform: [1.0e-5, 1.0e-2]}}"


def last_lines(run: Path) -> dict[str, dict]:
    """The last line of each trial in a sweep's record."""
    return {line["trial"]: line for line in read_jsonl(run / "trials.jsonl")}


def wait_for_a_second_trial(run: Path, process: BaseProcess, output: Path, seconds: float = 240) -> None:
    """Wait until the first trial is done and the second one has trained a step."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        assert process.is_alive(), output.read_text()
        states = [line["state"] for line in last_lines(run).values()]
        if states == ["done", "running"]:
            second = run / "trials" / list(last_lines(run))[1] / "trainer_log.jsonl"
            if any("loss" in record for record in read_jsonl(second)):
                return
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for the second trial of {last_lines(run)}")


def test_a_random_search_that_was_killed_ends_with_the_same_trials_and_repeats_none(
    local_ray, folder, tmp_path, capsys
):
    search = ["tune.search=random", "tune.num_samples=3", RATES_DRAWN, "run.name=killed"]
    arguments = [
        "tune",
        "sweep.yaml",
        *search,
        *QUICK,
        "train.epochs=3",
        "train.max_steps=12",
        "train.save_every_steps=1",
    ]
    drawn = [trial.name for trial in combinations(load("sweep.yaml", arguments[2:]))]
    run = folder / "runs" / "killed"
    joins, output = f"scaling.address={ray.get_runtime_context().gcs_address}", tmp_path / "printed"
    process = command([*arguments, joins], folder, output, joining())
    process.start()
    try:
        wait_for_a_second_trial(run, process, output)
    finally:
        process.kill()
        process.join()
    assert list(last_lines(run)) == drawn[:2]
    done = run / "trials" / drawn[0]
    before = {file: file.stat().st_mtime_ns for file in done.iterdir()}
    with (run / "trials.jsonl").open("a") as file:
        file.write('{"trial": "cut o')  # what a driver that is killed while it writes leaves
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "3 trials, 1 at a time, 1 done before" in shown
    assert shown.count("started: ") == 2
    assert {file: file.stat().st_mtime_ns for file in done.iterdir()} == before
    records = last_lines(run)
    assert [(name, record["state"], record["number"]) for name, record in records.items()] == [
        (name, "done", number) for number, name in enumerate(drawn)
    ]
    states = [line["state"] for line in read_jsonl(run / "trials.jsonl") if line["trial"] == drawn[1]]
    assert states.count("running") == 2
    for name in drawn:
        steps = [
            line["current_steps"] for line in read_jsonl(run / "trials" / name / "trainer_log.jsonl") if "loss" in line
        ]
        assert steps == list(range(1, 13))
        assert (
            records[name]["metrics"]["eval_loss"]
            == json.loads((run / "trials" / name / "all_results.json").read_text())["eval_loss"]
        )


def test_optuna_with_repeats_ranks_by_the_mean_and_goes_on_when_more_is_asked_for(local_ray, folder, capsys):
    search = ["tune.search=optuna", "tune.repeats=2", RATES_DRAWN, "run.name=optuna"]
    arguments = ["tune", "sweep.yaml", *search, *QUICK]
    run = folder / "runs" / "optuna"
    assert main([*arguments, "tune.num_samples=1"]) == 0
    first = last_lines(run)
    assert capsys.readouterr().out.count("started: ") == len(first) == 2
    assert main([*arguments, "tune.num_samples=2"]) == 0
    shown = capsys.readouterr().out
    assert "4 trials (2 configurations with 2 seeds), 1 at a time, 2 done before" in shown
    assert shown.count("started: ") == 2
    more = last_lines(run)
    assert list(more)[:2] == list(first)
    assert {line["ended"] for line in first.values()} < {line["ended"] for line in more.values()}
    assert [(line["number"], line["seed"], line["state"]) for line in more.values()] == [
        (0, 1, "done"), (1, 2, "done"), (2, 1, "done"), (3, 2, "done"),
    ]  # fmt: skip
    losses: dict[str, list[float]] = {}
    for line in more.values():
        results = json.loads((run / "trials" / line["trial"] / "all_results.json").read_text())
        losses.setdefault(line["configuration"], []).append(results["eval_loss"])
    results = json.loads((run / "tune_results.json").read_text())
    best, other = results["configurations"]
    for found in (best, other):
        values = losses[found["configuration"]]
        assert found["n"] == 2
        assert found["eval_loss"] == pytest.approx(statistics.fmean(values))
        assert found["eval_loss_std"] == pytest.approx(statistics.stdev(values))
    assert best["eval_loss"] < other["eval_loss"]
    assert load(run / "best.yaml").train.learning_rate == best["config"]["train.learning_rate"]
    assert len((run / "trials.csv").read_text().splitlines()) == 5


def test_two_sweeps_at_once_share_a_cluster_and_a_cache(local_ray, folder, tmp_path, capsys):
    """The workers of one leave no CPU for those of the other: they take turns. One is in a process that joins the cluster of the
    other."""
    short = ["generate.enabled=false", "train.eval_at_start=false", "train.max_steps=2", "data.cache=shared"]
    rates = {"left": 1e-3, "right": 1e-5}
    left, right = (
        ["tune", "sweep.yaml", f"run.name={name}", *short, f"tune.space={{train.learning_rate: [{rate}]}}"]
        for name, rate in rates.items()
    )
    joins, output = f"scaling.address={ray.get_runtime_context().gcs_address}", tmp_path / "printed"
    process = command([*left, joins], folder, output, joining())
    process.start()
    try:
        limit = time.monotonic() + 120
        while not (folder / "runs" / "left").exists():  # it is about to join the cluster
            assert process.is_alive(), output.read_text()
            assert time.monotonic() < limit
            time.sleep(0.1)
        assert main(right) == 0
        process.join(600)
    finally:
        process.kill()
    assert process.exitcode == 0, output.read_text()
    for name, rate in rates.items():
        (record,) = last_lines(folder / "runs" / name).values()
        assert (record["values"], record["state"]) == ({"train.learning_rate": rate}, "done")
    outputs = output.read_text() + capsys.readouterr().out
    assert outputs.count("longest") == 4, "a line for each source and sweep"
    assert outputs.count("(from the cache)") == 2, "one of them has tokenized both sources"
    assert len(list((folder / "shared" / "shards").glob("*/*.parquet"))) == 4, "a manifest and a shard of each"
